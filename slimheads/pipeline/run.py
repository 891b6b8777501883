"""The ordered stages of a run. Read this first.

    recipe -> load -> score -> select -> prune -> recover -> export -> verify -> bench -> report

`_stages` runs them in order. A stage whose inputs, section of the recipe and library versions are those of an earlier
run in the same folder is reused. Nothing appears in the output folder before the run ends: then the report is made and
all of it is published at once, without slim/ where the certificate failed.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from slimheads.errors import UsageError
from slimheads.models.checkpoint import Source, find
from slimheads.notices import collected
from slimheads.output.folder import PUBLISHED
from slimheads.output.place import require_place
from slimheads.output.publishing import publish
from slimheads.output.store import Store, lock
from slimheads.pipeline.assemble import Circumstances, assemble
from slimheads.pipeline.checks import require_providers, require_target, require_usable
from slimheads.pipeline.contents import all_contents, contents
from slimheads.pipeline.finished import Finished
from slimheads.pipeline.latency_tables import RecipeTables
from slimheads.pipeline.progress import Progress, Silent
from slimheads.pipeline.run_models import RunModels
from slimheads.pipeline.stage import MissingError, Runner, StoppedError
from slimheads.pipeline.stages.bench import Graphs, bench_stage
from slimheads.pipeline.stages.export import export_stage
from slimheads.pipeline.stages.load import load_stage
from slimheads.pipeline.stages.prune import prune_stage
from slimheads.pipeline.stages.recover import recover_stage
from slimheads.pipeline.stages.score import Scored, score_stage
from slimheads.pipeline.stages.select import Selected, select_stage
from slimheads.pipeline.stages.verify import Subjects, verify_stage
from slimheads.recipe.recipe import Recipe
from slimheads.report.model import Report
from slimheads.report.render import append_step_summary
from slimheads.runtime.cpu import cpu_features
from slimheads.runtime.environment import Environment, environment
from slimheads.runtime.memory import PeakMemory
from slimheads.runtime.sessions import session_options_record

log = logging.getLogger(__name__)

STAGE_NAMES = ("load", "score", "select", "prune", "recover", "export", "verify", "bench", "report")


def _stages(recipe: Recipe, source: Source, runner: Runner) -> Finished:
    """Every stage but the report, each a function of earlier results and its section of the recipe."""
    do, note, models = runner.do, runner.progress.note, RunModels(source)
    loaded = do(load_stage(models))
    scored = do(score_stage(recipe.score, models, loaded))
    selected = do(select_stage(recipe.select, RecipeTables(recipe, source), scored, runner.progress))
    pruned = do(prune_stage(source, loaded, selected))
    recovered = do(recover_stage(recipe.recover, pruned))
    exported = do(export_stage(recipe.export, models, loaded, pruned, recovered, note))
    verified = do(verify_stage(recipe, models, Subjects(scored, selected, pruned, recovered, exported), note))
    benched = None
    if not verified.ends_run:
        benched = do(bench_stage(recipe.bench, models, Graphs.of(recipe, pruned, exported, verified), runner.progress))
    return Finished(recipe, source, loaded, scored, selected, pruned, exported, verified, benched)


def run(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    from_stage: str | None = None,
    until: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Report | None:
    """Runs a recipe and publishes what it made in `out`.

    Args:
        recipe: a recipe or the path of one.
        out: the output folder, made if missing.
        overrides: `key=value` strings that replace values of a recipe file.
        from_stage: run this stage and all later ones even where an earlier run's results could be used.
        until: stop after this stage; only recipe.yaml, scores.json and plan.json are published then. A certificate
            that fails on the way is reported all the same.
        progress: informed of each stage.
        command: the command that runs this again, for the report.

    Returns:
        The report, whose verdict says whether all held (a failed certificate or gate is in it, not raised); None when
        `until` stopped the run before the report.

    Raises:
        SlimheadsError: of the class that says what failed.
    """
    started, memory = time.perf_counter(), PeakMemory()
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe, overrides)
    _require_stage_names(from_stage, until)
    out = Path(out)
    with recipe.located(), collected() as notices:
        source = _checked(recipe, out)
        with lock(out):
            surroundings = _environment(recipe)
            runner = Runner(Store(out), progress or Silent(), from_stage, until)
            try:
                finished = _stages(recipe, source, runner)
            except StoppedError:
                _publish_part(recipe, runner, out)
                return None
            command = command or shlex.join(["slimheads", "run", "recipe.yaml"])
            seconds, peak = time.perf_counter() - started, max(memory.megabytes(), runner.peak_rss_mb)
            circumstances = Circumstances(command, surroundings, runner.timings, notices, seconds, peak)
            return _report(finished, circumstances, out)


def dry_run(
    recipe: Recipe, out: str | Path, *, from_stage: str | None = None, until: str | None = None
) -> dict[str, str]:
    """What `run` would do, stage by stage: "run" or "reuse". Reads the model's files, writes nothing.

    Raises:
        SlimheadsError: what `run` would raise before its first stage.
    """
    _require_stage_names(from_stage, until)
    with recipe.located():
        source = _checked(recipe, Path(out))
        runner = Runner(Store(Path(out)), Silent(), from_stage, until, dry=True)
        with suppress(MissingError, StoppedError):  # `runner.done` holds the stages up to there
            _stages(recipe, source, runner)
    planned = STAGE_NAMES[: STAGE_NAMES.index(until or "report") + 1]
    return {name: "reuse" if name in runner.done else "run" for name in planned}


def _environment(recipe: Recipe) -> Environment:
    bench = recipe.bench
    return environment(
        {str(name): session_options_record(name, bench.threads) for name in bench.providers}, cpu_features()
    )


def _checked(recipe: Recipe, out: Path) -> Source:
    """The recipe's model, once everything holds that can be checked before any work."""
    require_providers(recipe)
    require_target(recipe)
    source = find(recipe.model, recipe.task)
    require_usable(recipe, source)
    require_place(out, source.folder, recipe)
    return source


def _require_stage_names(from_stage: str | None, until: str | None) -> None:
    """Refuses names that are no stage, and an order that runs nothing.

    Raises:
        UsageError: naming the option.
    """
    for option, name in (("--from", from_stage), ("--until", until)):
        if name is not None and name not in STAGE_NAMES:
            raise UsageError(f"there is no stage '{name}'", where=option, hint=f"use one of {', '.join(STAGE_NAMES)}")
    if from_stage and until and STAGE_NAMES.index(from_stage) > STAGE_NAMES.index(until):
        raise UsageError(f"{from_stage} comes after {until}", where="--from", hint="give them in the stages' order")


def _publish_part(recipe: Recipe, runner: Runner, out: Path) -> None:
    """After `--until`: the plan so far. What another recipe or another model left may not stand beside it."""
    scored = next((result for result in runner.done.values() if isinstance(result, Scored)), None)
    selected = next((result for result in runner.done.values() if isinstance(result, Selected)), None)
    wanted = contents(recipe, scored, selected)
    if not all((out / name).is_file() and (out / name).read_bytes() == content for name, content in wanted.items()):
        publish(out, wanted, retract=PUBLISHED)


def _report(finished: Finished, circumstances: Circumstances, out: Path) -> Report:
    report = assemble(finished, circumstances)
    wanted = all_contents(finished, report)
    publish(out, wanted, {"slim", "dense"} - wanted.keys())
    try:
        append_step_summary(report)
    except OSError as error:  # the run is done and published: its findings stand
        log.warning("the step summary cannot be written: %s", error)
    return report

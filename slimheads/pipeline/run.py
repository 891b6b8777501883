"""The ordered stages of a run. Read this first.

    recipe -> load -> score -> select -> prune -> recover -> export -> verify -> bench -> report

`run` takes them in order. A stage whose inputs, section of the recipe and library versions are those of an earlier run
in the same folder is reused. Nothing appears in the output folder before the run ends: then the report is made and all
of it is published at once, without slim/ where the certificate failed.
"""

from __future__ import annotations

import logging
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from slimheads.errors import SlimheadsError, UsageError
from slimheads.models.checkpoint import find
from slimheads.notices import collected, tell
from slimheads.output.folder import PUBLISHED
from slimheads.output.place import require_place
from slimheads.output.publishing import publish
from slimheads.output.store import Record, Store, lock, stage_key
from slimheads.pipeline.assemble import assemble, contents
from slimheads.pipeline.checks import require_providers, require_target, require_usable
from slimheads.pipeline.job import Job
from slimheads.pipeline.progress import Progress, Silent
from slimheads.pipeline.stages import STAGES, Stage, versions
from slimheads.recipe.recipe import Recipe
from slimheads.report.model import Report, StageRecord
from slimheads.report.render import append_step_summary
from slimheads.runtime.cpu import cpu_features
from slimheads.runtime.environment import Environment, environment
from slimheads.runtime.memory import PeakMemory
from slimheads.runtime.sessions import session_options_record

log = logging.getLogger(__name__)

STAGE_NAMES = (*(stage.name for stage in STAGES), "report")


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
        progress: told about each stage.
        command: what to call to run this again, for the report.

    Returns:
        The report, whose verdict says whether all held (a failed certificate or gate is in it, not raised); None when
        `until` stopped the run before the report.

    Raises:
        SlimheadsError: of the class that says what failed.
    """
    started, memory = time.perf_counter(), PeakMemory()
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe, overrides)
    check_stage_names(from_stage, until)
    with recipe.located():
        return _run(recipe, Path(out), from_stage, until, progress or Silent(), command, started, memory)


def _run(
    recipe: Recipe,
    out: Path,
    from_stage: str | None,
    until: str | None,
    progress: Progress,
    command: str | None,
    started: float,
    memory: PeakMemory,
) -> Report | None:
    require_providers(recipe)
    require_target(recipe)
    with collected() as notices:
        source = find(recipe.model, recipe.task)
        require_usable(recipe, source)
        require_place(out, source.folder, recipe)
        with lock(out):
            bench = recipe.bench
            options = {str(name): session_options_record(name, bench.threads) for name in bench.providers}
            surroundings = environment(options, cpu_features())
            job = Job(recipe, source, progress.note, notices=notices)
            timings: list[StageRecord] = []
            for stage in stages_until(until):
                timings.append(_do(stage, job, Store(out), from_stage, progress))
                if stage.name == "verify" and not job.certificate().passed:
                    until = None  # nothing after a broken proof is worth measuring: the report is all that is left
                    break
            if until not in (None, "report"):
                _publish_part(job, out)
                return None
            return _report(job, out, timings, surroundings, command, started, memory)


def stages_until(until: str | None) -> Iterator[Stage]:
    """The stages up to and including `until` (all for None), without the report."""
    for stage in STAGES:
        yield stage
        if stage.name == until:
            return


def check_stage_names(from_stage: str | None, until: str | None) -> None:
    """Refuses names that are no stage, and an order that runs nothing.

    Raises:
        UsageError: naming the option.
    """
    for option, name in (("--from", from_stage), ("--until", until)):
        if name is not None and name not in STAGE_NAMES:
            raise UsageError(f"there is no stage '{name}'", where=option, hint=f"use one of {', '.join(STAGE_NAMES)}")
    if from_stage and until and STAGE_NAMES.index(from_stage) > STAGE_NAMES.index(until):
        raise UsageError(f"{from_stage} comes after {until}", where="--from", hint="give them in the stages' order")


def dry_run(
    recipe: Recipe, out: str | Path, *, from_stage: str | None = None, until: str | None = None
) -> dict[str, str]:
    """What `run` would do, stage by stage: "run" or "reuse". Reads the model's files, writes nothing.

    Raises:
        SlimheadsError: what `run` would raise before its first stage.
    """
    check_stage_names(from_stage, until)
    with recipe.located():
        require_providers(recipe)
        require_target(recipe)
        source = find(recipe.model, recipe.task)
        require_usable(recipe, source)
        require_place(Path(out), source.folder, recipe)
        return _foreseen(Job(recipe, source, lambda _: None, measures=False), Path(out), from_stage, until)


def _foreseen(job: Job, out: Path, from_stage: str | None, until: str | None) -> dict[str, str]:
    left: dict[str, str] = {}
    found = {}
    for stage in stages_until(until):
        stored = _reusable(stage, Store(out), _key(stage, job, left), from_stage)
        left[stage.name] = _content_of(stored) if stored else "still to be made"
        if stored:
            job.records[stage.name] = stored
        found[stage.name] = "reuse" if stored else "run"
    return found if until not in (None, "report") else found | {"report": "run"}


def _key(stage: Stage, job: Job, left: Mapping[str, str]) -> str:
    """What this stage's result depends on, given the content that the stages it reads left."""
    return stage_key(stage.name, stage.section(job), [left[name] for name in stage.reads], versions())


def _content_of(record: Record) -> str:
    """A stage's inputs, result and files as one hash.

    The inputs alone would not do: where a stage is run again and leaves other bytes than before, what later stages
    found out about the earlier bytes, a certificate above all, must not be taken for these.
    """
    files = {name: stamp.sha256 for name, stamp in record.files.items()}
    return stage_key(record.stage, {"result": record.result, "files": files}, [record.key], {})


def _reusable(stage: Stage, store: Store, key: str, from_stage: str | None) -> Record | None:
    forced = from_stage is not None and STAGE_NAMES.index(stage.name) >= STAGE_NAMES.index(from_stage)
    return None if forced else store.find(stage.name, key)


def _do(stage: Stage, job: Job, store: Store, from_stage: str | None, progress: Progress) -> StageRecord:
    started, memory = time.perf_counter(), PeakMemory()
    progress.start(stage.name)  # what a stage depends on can take its time: files to hash, a latency table to measure
    key = _key(stage, job, {name: _content_of(record) for name, record in job.records.items()})
    record = _reusable(stage, store, key, from_stage)
    reused = record is not None
    if record is None:
        record = _work(stage, job, store, key, started, memory)
    for notice in record.notices:
        tell(notice)
    job.records[stage.name] = record
    progress.finish(stage.name, record.seconds, reused)
    return StageRecord(stage=stage.name, seconds=record.seconds, peak_rss_mb=record.peak_rss_mb or 0.0, reused=reused)


def _work(stage: Stage, job: Job, store: Store, key: str, started: float, memory: PeakMemory) -> Record:
    with store.begin(stage.name, key) as work:
        with collected() as told, _inner_files_not_named(stage, store):
            result, keep = stage.work(job, work.path)
        seconds, peak = time.perf_counter() - started, memory.megabytes()
        if keep:
            return work.publish(result, seconds, peak, told)
    store.discard(stage.name, key)
    return Record(path=store.out, stage=stage.name, key=key, seconds=seconds, peak_rss_mb=peak, result=result, files={})


@contextmanager
def _inner_files_not_named(stage: Stage, store: Store) -> Iterator[None]:
    """An error names what a stage made by its place in slim/ or dense/: no user looks below .slimheads."""
    inside = re.compile(re.escape(str(store.inside)) + r"[/\\](stages[/\\][^/\\]+[/\\])?[^/\\]+[/\\]")
    try:
        yield
    except SlimheadsError as error:
        error.what = inside.sub("", error.what)
        if error.where and inside.match(error.where):
            error.where = f"{inside.sub('', error.where)}, as the {stage.name} stage has it"
        raise


def _publish_part(job: Job, out: Path) -> None:
    """After `--until`: the plan so far. What another recipe or another model left may not stand beside it."""
    wanted = contents(job)
    if not all((out / name).is_file() and (out / name).read_bytes() == content for name, content in wanted.items()):
        publish(out, wanted, retract=PUBLISHED)


def _report(
    job: Job,
    out: Path,
    timings: Sequence[StageRecord],
    surroundings: Environment,
    command: str | None,
    started: float,
    memory: PeakMemory,
) -> Report:
    report = assemble(
        job,
        stages=tuple(timings),
        surroundings=surroundings,
        command=command or shlex.join(["slimheads", "run", "recipe.yaml"]),
        seconds=time.perf_counter() - started,
        peak_rss_mb=max([memory.megabytes(), *(t.peak_rss_mb for t in timings if not t.reused)]),
    )
    wanted = contents(job, report)
    publish(out, wanted, {"slim", "dense"} - wanted.keys())
    try:
        append_step_summary(report)
    except OSError as error:  # the run is done and published: what it found stands
        log.warning("the step summary cannot be written: %s", error)
    return report

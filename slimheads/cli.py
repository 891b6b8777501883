"""The command line: arguments -> library -> exit code; no logic. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimheads import __version__
from slimheads.errors import EnvironmentLackError, UsageError
from slimheads.exits import complain, exit_code, handle_signals, raise_if_interrupted, silence_libraries
from slimheads.names import ALL_KINDS, SiteKind
from slimheads.notices import collected
from slimheads.streams import SteadyConsole, flush_standard_streams, open_standard_streams

if TYPE_CHECKING:
    from slimheads.console.progress import Display

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Delete attention heads from a Hugging Face transformer, export it to ONNX, and prove what was shipped.",
    epilog="Exit codes: 0 all held, 1 internal error, 2 recipe or usage, 3 model refused, 4 certificate failed, "
    "5 missing dependency, provider, memory or disk, 6 output folder busy, 7 a gate was not met, 130/143 interrupted.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. select.ratio=0.5.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Task = Annotated[str, typer.Option(help="What the model is used for; auto reads it from the model.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The output folder; runs/RECIPE by default.")] = None,
    overrides: Overrides = None,
    from_stage: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Run again from here on.")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: prune, export, prove, measure, report."""
    from slimheads.console import tables
    from slimheads.pipeline import run as pipeline
    from slimheads.pipeline.preview import preview
    from slimheads.recipe.recipe import Recipe
    from slimheads.report import render

    chosen = Recipe.read(recipe, overrides or ())
    out = out or Path("runs", recipe.stem)
    if dry_run:
        stages = pipeline.dry_run(chosen, out, from_stage=from_stage, until=until)
        with _display("plan") as display:
            found = preview(chosen, display.note)
        data = {"stages": stages, **found.model_dump(mode="json")}
        _show(as_json, data, lambda: tables.print_dry_run(stages, found))
        return
    with _display(stages=len(pipeline.STAGE_NAMES)) as display:
        made = pipeline.run(
            chosen,
            out,
            from_stage=from_stage,
            until=until,
            progress=display,
            command=_command_line(recipe, out, overrides),
        )
    if made is None:
        print(f"stopped after {until}; what there is so far is in {out}", file=sys.stderr)
        return
    data = made.model_dump(mode="json")
    _show(as_json, data, lambda: render.print_summary(made, tables.stdout(), out))
    for reason in made.verdict.reasons:
        complain(reason)
    raise typer.Exit(made.verdict.exit_code)


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what a recipe would delete: heads, parameters, FLOPs, bytes, predicted latency. Writes no weights."""
    from slimheads.console import tables
    from slimheads.pipeline.preview import preview
    from slimheads.recipe.recipe import Recipe

    chosen = Recipe.read(recipe, overrides or ())
    with _display("plan") as display:
        found = preview(chosen, display.note)
    _show(as_json, found.model_dump(mode="json"), lambda: tables.print_preview(found))


@app.command()
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, pkg://package/folder or a hub id.")],
    task: Task = "auto",
    as_json: AsJson = False,
) -> None:
    """Score every head and feed-forward neuron of a model by weight magnitude."""
    from slimheads.console import tables
    from slimheads.models.loading import load
    from slimheads.pruning.scoring.score import score as score_model

    scores = score_model(load(model, task))
    _show(as_json, scores.table().model_dump(mode="json"), lambda: tables.print_scores(scores))


@app.command()
def bench(
    first: Annotated[Path, typer.Argument(metavar="A.onnx", help="The file to compare against.")],
    second: Annotated[Path, typer.Argument(metavar="B.onnx", help="The file in question.")],
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="BxL[xP]", help="Batch x length, e.g. 1x128; 1x1x512: one token after 512."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads within an operator.")] = 2,
    provider: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    min_seconds: Annotated[float, typer.Option(help="Seconds to measure each shape for.")] = 3.0,
    plot: Annotated[Path | None, typer.Option(help="Draw every sample over time to this .svg or .png file.")] = None,
    max_ratio: Annotated[
        float | None,
        typer.Option(help="Exit with 7 unless B / A latency is at most this in every shape, conclusively."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how much faster one ONNX file runs than another, with an interval and a control."""
    from slimheads.console import tables
    from slimheads.latency.bench import bench as measure
    from slimheads.latency.gate import require_limit, require_ratio
    from slimheads.report.timeline import require_picture, write_timeline

    wanted = [_shape(text) for text in shapes or ["1x16", "1x128"]]
    if plot:
        require_picture(plot)
    if max_ratio is not None:
        require_limit(max_ratio, "--max-ratio")
    with _display("bench") as display:
        display.work(f"{len(wanted)} shapes, each at least {min_seconds:g} s of runs, interleaved with a control")
        rows = measure(
            first, second, shapes=wanted, threads=threads, provider=provider, min_seconds=min_seconds,
            on_progress=display.note, on_share=display.share,
        )  # fmt: skip
    _show(as_json, [row.model_dump(mode="json") for row in rows], lambda: tables.print_latency(rows))
    if plot:
        write_timeline(rows, plot, names=("first", "second"))
    if max_ratio is not None:
        require_ratio(rows, max_ratio, asked=f"--max-ratio {max_ratio}", names=("first", "second"))


@app.command()
def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, pkg://package/folder or a hub id.")],
    task: Task = "auto",
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", metavar="BxL", help="Batch x length, e.g. 1x128.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads within an operator.")] = 2,
    provider: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    within_groups: Annotated[
        bool, typer.Option("--within-groups", help="Count query heads where they share KV heads.")
    ] = False,
    kinds: Annotated[
        str,
        typer.Option(
            help="Sites to measure. For each kind of block, attention takes up to about 16 slim models, feed_forward "
            "up to 18 and layer 3; each is exported and timed."
        ),
    ] = "attention,feed_forward,layer",
    min_seconds: Annotated[float, typer.Option(help="Seconds to measure each count and shape for.")] = 1.0,
    again: Annotated[bool, typer.Option("--again", help="Measure even what is stored.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what each count of heads, neurons and layers costs, once for a model and machine, to predict plans."""
    from slimheads.console import tables
    from slimheads.latency.profile import profile as measure
    from slimheads.latency.table_store import Setting
    from slimheads.models.checkpoint import find

    wanted = [_shape(text) for text in shapes or ["1x16", "1x128"]]
    with _display("profile") as display:
        found = measure(
            find(model, task), wanted, Setting(provider, threads, within_groups, _kinds(kinds)),
            min_seconds=min_seconds, again=again, tell=display.note, on_share=display.share,
        )  # fmt: skip
    data = [{"path": str(f.path), "reused": f.reused, "table": f.table.model_dump(mode="json")} for f in found]
    _show(as_json, data, lambda: tables.print_profiles(found))


@app.command()
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, pkg://package/folder or a hub id.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this new file instead of stdout.")] = None,
) -> None:
    """Write a commented recipe for a model."""
    from slimheads.families.family import families
    from slimheads.families.limits import fitting
    from slimheads.models.checkpoint import describe, find, read_config
    from slimheads.recipe.sections import DEFAULT_SHAPES
    from slimheads.recipe.template import commented_recipe

    source = find(model)
    decoder, fed_texts = source.task == "text-generation", families()[source.family].inputs == "text"
    shapes = fitting(read_config(source.folder), DEFAULT_SHAPES)
    if out is not None and Path(model).is_dir() and not Path(model).is_absolute():
        model = os.path.relpath(model, out.parent)  # a recipe's paths start at its own folder
    text = commented_recipe(model, source.task, decoder, describe(source), fed_texts=fed_texts, shapes=shapes)
    if out is None:
        _show(False, None, lambda: print(text, end=""))
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        hint = "name a new file in a folder that exists"
        raise UsageError(f"cannot write the recipe ({error.strerror})", where=str(out), hint=hint) from error


@app.command()
def families(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/families.md.")] = False,
) -> None:
    """List the model families that are covered, and what the tests proved of each."""
    from slimheads.console import tables
    from slimheads.families.evidence import evidence
    from slimheads.families.support import supported_families
    from slimheads.report.families_page import render_families

    rows = supported_families()
    if markdown:
        _show(False, rows, lambda: print(render_families(rows, evidence().versions), end=""))
    else:
        _show(as_json, [row.model_dump(mode="json") for row in rows], lambda: tables.print_families(rows))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from slimheads.recipe.recipe import recipe_schema

    _show(True, recipe_schema(), lambda: None)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check that this machine has what a run needs."""
    from slimheads.console import tables
    from slimheads.runtime.doctor import doctor as examine

    checks = examine()
    _show(as_json, [check.model_dump(mode="json") for check in checks], lambda: tables.print_checks(checks))
    lacking = [check for check in checks if not check.ok]
    if lacking:
        names, hint = ", ".join(check.name for check in lacking), lacking[0].hint or "see the list above"
        raise EnvironmentLackError(f"this environment lacks: {names}", hint=hint)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `slimheads` command. Ends the process with the contract's exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    # Typer knows --debug before the command only; it is to be allowed anywhere.
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    if not debug:
        silence_libraries()
    handle_signals()
    open_standard_streams()
    code = exit_code(lambda: _command(arguments), debug=debug)
    flush_standard_streams()
    sys.exit(code)


def _command(arguments: list[str]) -> int:
    with collected(lambda text: print(f"note: {text}", file=sys.stderr)):
        return int(app(arguments, prog_name="slimheads", standalone_mode=False) or 0)


@contextmanager
def _display(doing: str | None = None, stages: int = 1) -> Iterator[Display]:
    """Progress on stderr: of the one thing that is done, or of a run's stages, which say their own names."""
    from slimheads.console.progress import display

    console = SteadyConsole(stderr=True)
    with display(console, raise_if_interrupted, stages) as shown:
        if doing:
            shown.start(doing)
        yield shown


def _command_line(recipe: Path, out: Path, overrides: Sequence[str] | None) -> str:
    sets = [part for override in overrides or () for part in ("--set", override)]
    return shlex.join(["slimheads", "run", str(recipe), "--out", str(out), *sets])


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if len(sizes) not in (2, 3, 4) or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UsageError(f"'{text}' is no shape", where="--shape", hint="write batch x length, like 1x128, or 1x1x512")
    return tuple(int(size) for size in sizes)


def _kinds(text: str) -> tuple[SiteKind, ...]:
    named = text.split(",")
    if not set(named) <= set(ALL_KINDS):
        raise UsageError(f"'{text}' are no kinds of sites", where="--kinds", hint=f"name some of {','.join(ALL_KINDS)}")
    return tuple(kind for kind in ALL_KINDS if kind in named)


def _show(as_json: bool, data: Any, for_people: Callable[[], object]) -> None:
    """Prints a command's result. That its reader left before the end (`| head`) is no failure of the command."""
    try:
        if as_json:
            print(json.dumps(data, indent=2, allow_nan=False))
        else:
            for_people()
        sys.stdout.flush()
    except BrokenPipeError:
        flush_standard_streams()
    except OSError as error:
        hint = "free some space, or send it elsewhere"
        raise EnvironmentLackError(f"cannot be written ({error.strerror})", where="stdout", hint=hint) from error

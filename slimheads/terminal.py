"""Tables for people, as the commands print them on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from slimheads import wording
from slimheads.bench import Latency
from slimheads.catalogue import NOT_PROVEN
from slimheads.environment import Check
from slimheads.preview import Preview, plan_of
from slimheads.profiling import Profile
from slimheads.scoring import Scores
from slimheads.streams import SteadyConsole

_AGAIN = "profile with --again on a machine that does nothing else"
_UNWRAPPED = 100_000  # columns: a line a row, however long, for grep and its like


def stdout() -> Console:
    """Plain, unwrapped text where stdout is a file or a pipe."""
    console = SteadyConsole(highlight=False)
    return console if console.is_terminal else SteadyConsole(highlight=False, width=_UNWRAPPED)


def print_scores(scores: Scores) -> None:
    """One row a site, its units from the weakest to the strongest."""
    table = Table("site", "unit", "weakest first: unit (score)", box=None, pad_edge=False)
    for site in scores.sites:
        ranked = sorted(range(len(site.scores)), key=lambda unit: (site.scores[unit], unit))
        table.add_row(site.site, site.unit, "  ".join(f"{unit} ({site.scores[unit]:.4g})" for unit in ranked))
    stdout().print(table)


def print_preview(found: Preview) -> None:
    """Before and after, then what goes at each site."""
    console, plan = stdout(), plan_of(found)
    console.print(f"{found.model} ({found.task})", markup=False)
    table = Table("", "dense", "slim", "change", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = (
        ("heads" if plan.sites[0].unit == "head" else "KV groups", "heads", wording.whole),
        ("parameters", "parameters", wording.whole),
        ("weights", "bytes", wording.size),
        (f"FLOPs at {wording.shape_text(found.shape)}", "flops", wording.flops),
    )
    for label, name, form in rows:
        before, after = getattr(found.dense, name), getattr(found.slim, name)
        table.add_row(label, form(before), form(after), wording.change(before, after))
    console.print(table)
    sites = Table("site", "keeps", "deletes", box=None, pad_edge=False)
    for site in plan.sites:
        sites.add_row(site.site, f"{len(site.kept)} of {site.total}", " ".join(map(str, site.removed)) or "nothing")
    console.print(sites)
    _print_prediction(console, found)


def _print_prediction(console: Console, found: Preview) -> None:
    if found.selection.asked == "auto":
        unit = "heads" if plan_of(found).sites[0].unit == "head" else "KV groups"
        console.print(wording.selection_line(found.selection, unit), markup=False, soft_wrap=True)
    if found.predicted:
        table = Table("predicted at", "dense", "slim", "speedup (by the latency table)", box=None, pad_edge=False)
        for row in found.predicted:
            place = f"{wording.shape_text(row.shape)} ({row.provider}, {wording.plural(row.threads, 'thread')})"
            estimate, low, high = wording.span(row.speedup)
            medians = (wording.milliseconds(ms) for ms in (row.dense_ms, row.slim_ms))
            table.add_row(place, *medians, f"{estimate} ({low} to {high})")
        console.print(table)
        if doubtful := max(row.doubtful for row in found.predicted):
            console.print(f"{_in_doubt(doubtful)} in the latency table: {_AGAIN}", soft_wrap=True)
    if found.predicted_reason:
        console.print(f"latency is not predicted: {found.predicted_reason}", markup=False, soft_wrap=True)


def print_profiles(profiles: Sequence[Profile]) -> None:
    """One table a shape: what is left of the dense latency at each count, and what a unit deleted in one site saves."""
    console = stdout()
    for made in profiles:
        table, how = made.table, "reused" if made.reused else "measured"
        place = f"{wording.shape_text(table.shape)}, {table.provider}, {wording.plural(table.threads, 'thread')}"
        console.print(f"{place}: dense {wording.milliseconds(table.dense_ms)}; {how}, {made.path}", soft_wrap=True)
        rows = Table("sites", "keep", "share of dense latency (95% interval)", box=None, pad_edge=False)
        rows.add_column("saved a deleted unit and site", justify="right")
        rows.add_column("")
        for point in table.points:
            kind = table.kinds[point.kind]
            each = (1 - point.share.estimate) / (kind.total - point.kept) / len(kind.sites)
            interval = f"{point.share.estimate:.3f} ({point.share.low:.3f} to {point.share.high:.3f})"
            saved = f"{each:.2%}, {1000 * each * table.dense_ms:.3g} µs"
            doubt = f"in doubt: {point.doubt}" if point.doubt else ""
            rows.add_row(f"{len(kind.sites)} {kind.name}", f"{point.kept} of {kind.total}", interval, saved, doubt)
        console.print(rows)
        if table.doubtful:
            console.print(f"{_in_doubt(table.doubtful)}: {_AGAIN}", soft_wrap=True)


def _in_doubt(points: int) -> str:
    return f"{wording.plural(points, 'point')} in doubt"


def print_dry_run(stages: Mapping[str, str], found: Preview) -> None:
    """What a run would do, stage by stage, and what it would delete."""
    table = Table("stage", "would", box=None, pad_edge=False)
    for stage, what in stages.items():
        table.add_row(stage, what)
    stdout().print(table)
    print_preview(found)


def print_families(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a family file; how many tests stand behind each model type, and what is not proven."""
    table = Table("family", "model types", "unit", "projections", "tasks", "reload", box=None, pad_edge=False)
    table.add_column("evidence")
    for row in rows:
        proven = (f"{t} ({sum(found['tests'].values())} tests)" for t, found in row["evidence"].items())
        lacking = (f"{t} {NOT_PROVEN}: {reason}" for t, reason in row["not_proven"].items())
        types, tasks = ", ".join(row["model_types"]), ", ".join(row["tasks"]) or NOT_PROVEN
        said = "; ".join((*proven, *lacking))
        table.add_row(row["family"], types, row["unit"], row["layout"], tasks, row["reload"] or NOT_PROVEN, said)
    stdout().print(table)


def print_checks(checks: Sequence[Check]) -> None:
    """One row a check of the environment; what to do about a failed one below it."""
    table = Table("check", "", "found", "expected", box=None, pad_edge=False)
    for check in checks:
        table.add_row(check.name, "ok" if check.ok else "LACKS", check.found, check.expected)
        if not check.ok and check.hint:
            table.add_row("", "", check.hint, "")
    stdout().print(table)


def print_latency(rows: Sequence[Latency]) -> None:
    """One row a shape: medians, and the ratio with its interval and verdict; of decoders what they write a second."""
    table = Table("shape", "first", "second", "speedup (95% interval)", "control", "verdict", box=None, pad_edge=False)
    console = stdout()
    for row in rows:
        shape = wording.latency_place(row)
        if row.dense is None or row.slim is None or row.speedup is None or row.control is None:
            table.add_row(shape, "", "", "", "", f"{row.verdict}: {row.reason}")
            continue
        speedup, control = (f"{i.estimate:.3f} ({i.low:.3f} to {i.high:.3f})" for i in (row.speedup, row.control))
        medians = (wording.milliseconds(t.median_ms) for t in (row.dense, row.slim))
        table.add_row(shape, *medians, speedup, control, f"{row.verdict}: {row.reason}" if row.reason else row.verdict)
    console.print(table)
    for row in rows:
        if row.dense and row.slim and row.dense.tokens_per_second and row.slim.tokens_per_second:
            rates = (wording.figures(t.tokens_per_second or 0) for t in (row.dense, row.slim))
            console.print(f"{wording.latency_place(row)}: {' to '.join(rates)} tokens a second", markup=False)
    cache = next((row.cache_bytes_per_token for row in rows if row.cache_bytes_per_token), None)
    if cache:
        sizes = f"{wording.size(cache.dense)} to {wording.size(cache.slim)}"
        console.print(f"cache: {sizes} a token of each sequence", markup=False)

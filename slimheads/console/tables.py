"""Tables for people, on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from slimheads import formatting as fmt
from slimheads.families.support import FamilySupport
from slimheads.latency.profile import Profile
from slimheads.latency.records import Latency
from slimheads.pipeline.preview import Preview
from slimheads.pruning.plan import SitePlan
from slimheads.pruning.scores import Scores
from slimheads.report import wording
from slimheads.report.families_page import NOT_PROVEN
from slimheads.runtime.doctor import Check
from slimheads.streams import SteadyConsole

_AGAIN = "profile with --again on a machine that does nothing else"
_PAGE_WIDTH = 100  # columns, of a table with sentences in it
_ENDS = 4  # neurons shown of a block's weakest, and of its strongest
_UNWRAPPED = 100_000  # columns: one line per row, however long, for grep and its like


def stdout() -> Console:
    """Plain, unwrapped text where stdout is a file or a pipe."""
    console = SteadyConsole(highlight=False)
    return console if console.is_terminal else SteadyConsole(highlight=False, width=_UNWRAPPED)


def print_scores(scores: Scores) -> None:
    """One row per site, its units from the weakest to the strongest; of a feed-forward block a few of both."""
    table = Table("site", "unit", "weakest first: unit (score)", box=None, pad_edge=False)
    for site in scores.sites:
        ranked = sorted(range(len(site.scores)), key=lambda unit: (site.scores[unit], unit))
        texts = [f"{unit} ({site.scores[unit]:.4g})" for unit in ranked]
        if len(texts) > 2 * _ENDS and site.unit == "neuron":
            texts[_ENDS:-_ENDS] = [f"... {fmt.whole(len(texts) - 2 * _ENDS)} more ..."]
        table.add_row(site.site, site.unit, "  ".join(texts))
    stdout().print(table)


def print_preview(found: Preview) -> None:
    """Before and after, then what goes at each site."""
    console, plan = stdout(), found.plan
    console.print(f"{found.model} ({found.task})", markup=False)
    table = Table("", "dense", "slim", "change", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, count in found.kinds.items():
        label = wording.units(count.unit, 2) + wording.among(kind, found.kinds)
        table.add_row(label, fmt.whole(count.total), fmt.whole(count.kept), fmt.change(count.total, count.kept))
    rows = (
        ("parameters", "parameters", fmt.whole),
        ("weights", "bytes", fmt.size),
        (f"FLOPs at {fmt.shape_text(found.shape)}", "flops", fmt.flops),
    )
    for label, name, form in rows:
        before, after = getattr(found.dense, name), getattr(found.slim, name)
        table.add_row(label, form(before), form(after), fmt.change(before, after))
    console.print(table)
    sites = Table("site", "keeps", "deletes", box=None, pad_edge=False)
    for site in plan.sites:
        sites.add_row(site.site, *_kept_and_deleted(site))
    console.print(sites)
    _print_prediction(console, found)


def _kept_and_deleted(site: SitePlan) -> tuple[str, str]:
    """Heads are named one by one, neurons counted, and a layer is kept or dropped."""
    kept, removed = f"{len(site.kept)} of {site.total}", site.total - len(site.kept)
    if site.kind == "layer":
        return ("dropped", "the layer") if removed else ("kept", "nothing")
    if site.kind == "feed_forward" and removed:
        return kept, f"{fmt.whole(removed)} {wording.units(site.unit, removed)}"
    return kept, " ".join(map(str, site.removed)) or "nothing"


def _print_prediction(console: Console, found: Preview) -> None:
    for label, text in wording.selection_lines(found.selection, found.kinds):
        console.print(f"{label}: {text}", markup=False, soft_wrap=True)
    if found.predicted:
        table = Table("predicted at", "dense", "slim", "speedup (by the latency table)", box=None, pad_edge=False)
        for row in found.predicted:
            place = f"{fmt.shape_text(row.shape)} ({row.provider}, {fmt.plural(row.threads, 'thread')})"
            estimate, low, high = wording.interval_texts(row.speedup)
            medians = (fmt.milliseconds(ms) for ms in (row.dense_ms, row.slim_ms))
            table.add_row(place, *medians, f"{estimate} ({low} to {high})")
        console.print(table)
        if doubtful := max(row.doubtful for row in found.predicted):
            console.print(f"{_noisy(doubtful)} in the latency table: {_AGAIN}", soft_wrap=True)
    if found.predicted_reason:
        console.print(f"latency is not predicted: {found.predicted_reason}", markup=False, soft_wrap=True)


def print_profiles(profiles: Sequence[Profile]) -> None:
    """One table per shape: what is left of the dense latency at each count, and what deleting one unit saves."""
    console = stdout()
    for made in profiles:
        table, how = made.table, "reused" if made.reused else "measured"
        place = f"{fmt.shape_text(table.shape)}, {table.provider}, {fmt.plural(table.threads, 'thread')}"
        console.print(f"{place}: dense {fmt.milliseconds(table.dense_ms)}; {how}, {made.path}", soft_wrap=True)
        rows = Table("kind", "sites", "keep", "share of dense latency (95% interval)", box=None, pad_edge=False)
        rows.add_column("saved per deleted unit", justify="right")
        rows.add_column("")
        for point in table.points:
            kind = table.kinds[point.kind]
            sites = 1 if kind.kind == "layer" else len(kind.sites)  # that delete so many units
            each = (1 - point.share.estimate) / (kind.total - point.kept) / sites
            interval = f"{point.share.estimate:.3f} ({point.share.low:.3f} to {point.share.high:.3f})"
            saved = f"{each:.3%}, {1000 * each * table.dense_ms:.3g} µs"
            noise = f"noisy: {point.noise}" if point.noise else ""
            named = f"{len(kind.sites)} {kind.name}"
            rows.add_row(kind.kind.replace("_", " "), named, f"{point.kept} of {kind.total}", interval, saved, noise)
        console.print(rows)
        if table.noisy_points:
            console.print(f"{_noisy(table.noisy_points)}: {_AGAIN}", soft_wrap=True)


def _noisy(points: int) -> str:
    return f"{fmt.plural(points, 'point')} noisy"


def print_dry_run(stages: Mapping[str, str], found: Preview) -> None:
    """What a run would do, stage by stage, and what it would delete."""
    table = Table("stage", "would", box=None, pad_edge=False)
    for stage, what in stages.items():
        table.add_row(stage, what)
    stdout().print(table)
    print_preview(found)


def print_families(rows: Sequence[FamilySupport]) -> None:
    """One row per model type: what is deleted, and how many tests there are of it, or why it is not proven."""
    console = stdout()
    table = Table("model type", "family", "unit", "evidence", box=None, pad_edge=False)
    for column in table.columns[:2]:
        column.no_wrap = True
    for row in rows:
        for model_type in row.model_types:
            found, reason = row.evidence.get(model_type), row.not_proven.get(model_type)
            evidence = f"{sum(found.tests.values())} tests" if found else f"{NOT_PROVEN}: {reason}"
            table.add_row(model_type, row.family, row.unit.replace(", ", " "), evidence)
    console.print(table, width=min(console.width, _PAGE_WIDTH))
    console.print("Projections, tasks, variants and tolerances: --json or --markdown.", markup=False, soft_wrap=True)


def print_checks(checks: Sequence[Check]) -> None:
    """One row per check of the environment; what to do about a failed one below it."""
    table = Table("check", "", "found", "expected", box=None, pad_edge=False)
    for check in checks:
        table.add_row(check.name, "ok" if check.ok else "MISSING", check.found, check.expected)
        if not check.ok and check.hint:
            table.add_row("", "", check.hint, "")
    stdout().print(table)


def print_latency(rows: Sequence[Latency]) -> None:
    """One row per shape: medians, and the ratio with its interval and verdict; for decoders, tokens per second."""
    table = Table("shape", "first", "second", "speedup (95% interval)", "control", "verdict", box=None, pad_edge=False)
    console = stdout()
    for row in rows:
        shape = wording.latency_place(row)
        if row.dense is None or row.slim is None or row.speedup is None or row.control is None:
            table.add_row(shape, "", "", "", "", f"{row.verdict}: {row.reason}")
            continue
        speedup, control = (f"{i.estimate:.3f} ({i.low:.3f} to {i.high:.3f})" for i in (row.speedup, row.control))
        medians = (fmt.milliseconds(t.median_ms) for t in (row.dense, row.slim))
        table.add_row(shape, *medians, speedup, control, f"{row.verdict}: {row.reason}" if row.reason else row.verdict)
    console.print(table)
    for row in rows:
        if row.dense and row.slim and row.dense.tokens_per_second and row.slim.tokens_per_second:
            rates = (fmt.figures(t.tokens_per_second or 0) for t in (row.dense, row.slim))
            console.print(f"{wording.latency_place(row)}: {' to '.join(rates)} tokens per second", markup=False)
    cache = next((row.cache_bytes_per_token for row in rows if row.cache_bytes_per_token), None)
    if cache:
        sizes = f"{fmt.size(cache.dense)} to {fmt.size(cache.slim)}"
        console.print(f"cache: {sizes} per token of each sequence", markup=False)

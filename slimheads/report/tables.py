"""The report's tables as text cells, and the filters of its templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slimheads import formatting as fmt
from slimheads.latency.attribution import Treatment
from slimheads.latency.graph_choice import GraphChoice
from slimheads.latency.records import Interval, Latency, Timing
from slimheads.names import SiteKind
from slimheads.report import card, conditions, wording
from slimheads.report.markdown import Cell, Table, Verbatim, fenced, figure_and_note, markdown_table
from slimheads.report.model import GateResult, KindCount, Prediction, Report
from slimheads.report.plan_rows import MOST_BARS
from slimheads.verification.certificate import Link
from slimheads.verification.drift import Drift

NONE = "not measured"


@dataclass(frozen=True)
class KeyFigure:
    """One of the few figures at the top of the page."""

    value: str
    label: str
    note: str


@dataclass(frozen=True)
class Step:
    """One step of the certificate's chain: a link for one file, or a link that does not apply."""

    number: int
    tone: Literal["ok", "bad", "skipped"]
    name: str
    state: str
    subject: str = ""
    figures: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class DriftSection:
    """The figures of one sample; without any, the reason."""

    sample: str
    size: str
    table: Table
    reason: str | None


def tables(report: Report) -> dict[str, Any]:
    """Everything that the templates lay out, by the name they use for it."""
    model = report.model
    return {
        "title": card.short_name(model.source),
        "key_figures": key_figures(report),
        "sizes": sizes(report),
        "size_notes": [
            f"{name}: {side.reason}" for name, side in (("Dense", model.dense), ("Slim", model.slim)) if side.reason
        ],
        "files": Table.of(
            ("File", "Size"), [(path, fmt.size(count)) for path, count in sorted(report.files.items())], {1}
        ),
        "links": links(report.certificate),
        "chain": chain(report),
        "drifts": [drift_section(found) for found in (report.drift, report.drift_text) if found is not None],
        "latencies": latencies(report.latency),
        "candidates": candidates(report.candidates if len(report.candidates) > 1 else ()),
        "treatments": treatments(report.treatments),
        "predictions": predictions(report.predictions),
        "predictions_note": f"{'By FLOPs' if report.predictions else 'Not made'}: {report.predictions_reason}"
        if report.predictions_reason
        else "",
        "gates": gates(report.gates),
        "stages": conditions.stages(report),
        "environment": conditions.environment(report.environment),
        "loader": card.loader(model),
        "preparer": card.preparer(model),
        "unit": wording.units(model.unit, 1),
        "plan_notes": plan_notes(model.kinds),
        "removed_units": wording.removed_units(model.kinds),
        "removed_counts": wording.removed_counts(model.kinds, _removed),
        "static_axes": card.static_axes(report),
    }


def plan_notes(kinds: Mapping[SiteKind, KindCount]) -> list[str]:
    """What the picture shows beside heads."""
    notes = []
    if blocks := kinds.get("feed_forward"):
        notes.append("A bar is the share of a feed-forward block's neurons that was kept.")
        if blocks.sites > MOST_BARS:
            notes.append(f"As there are more than {MOST_BARS} such blocks, those of one layer are added up.")
    if "layer" in kinds:
        notes.append("An empty row is a layer that was dropped whole.")
    return notes


def key_figures(report: Report) -> list[KeyFigure]:
    """What was removed, size, latency and drift, before any table."""
    dense, slim = report.model.dense, report.model.slim
    files = "encoder and merged decoder" if report.model.encoder_decoder else "model file"
    found = [
        KeyFigure(
            fmt.percent(count.removed / count.total),
            f"of {wording.units(count.unit, 2)} removed",
            wording.of_all(count) + wording.among(kind, report.model.kinds),
        )
        for kind, count in wording.removed_kinds(report.model.kinds).items()
    ]
    found.append(KeyFigure(fmt.change(dense.bytes, slim.bytes), files, f"{_size(dense.bytes)} to {_size(slim.bytes)}"))
    measured = [row for row in report.shipped_latency if row.speedup is not None]
    if measured:
        row = max(measured, key=lambda one: one.shape)
        note = f"at {wording.latency_place(row)}, {wording.latency_setup(row)}"
        clear = row.verdict in ("faster", "slower") and row.speedup is not None
        value = fmt.ratio(row.speedup.estimate) if clear and row.speedup else row.verdict
        found.append(KeyFigure(value, "speedup vs. dense" if clear else "latency", note))
    else:
        found.append(KeyFigure(NONE, "latency", "see below"))
    pair = wording.against_random(report.drift) if report.drift else None
    if pair is not None:
        name, value, control, _ = pair
        found.append(KeyFigure(value, name, f"random removal: {control}"))
    else:
        found.append(KeyFigure(NONE, "drift", "see below"))
    return found


def sizes(report: Report) -> Table:
    """Before, after and the change, for each kind of unit, parameters, bytes and FLOPs."""
    model, dense, slim = report.model, report.model.dense, report.model.slim
    shape = f" at {fmt.shape_text(model.flops_shape)}" if model.flops_shape else ""

    def row(name: str, text: Callable[[float | None], str], before: float | None, after: float | None) -> list[str]:
        return [name, text(before), text(after), fmt.change(before, after)]

    rows = []
    for kind, count in model.kinds.items():
        name = fmt.capitalized(wording.units(count.unit, 2)) + wording.among(kind, model.kinds)
        rows.append(row(name, _whole, count.total, count.kept))
    rows += [
        row("Parameters", _whole, dense.parameters, slim.parameters),
        row("Bytes, float32 ONNX", _size, dense.bytes, slim.bytes),
        row(f"FLOPs per run{shape}", _flops, dense.flops, slim.flops),
    ]
    return Table.of(("", "Dense", "Slim", "Change"), rows, {1, 2, 3})


def links(found: Sequence[Link]) -> Table:
    """The certificate in order, one row per link and subject."""
    head = ("Link", "Held equal", "Subject", "Largest difference", "Relative", "Allowed", "Cases", "Result")
    rows = []
    for link in sorted(found, key=lambda link: link.link):
        result = "held" if link.passed else f"FAILED: {link.reason or link.worst_case or 'beyond the tolerance'}"
        relative = "" if link.max_rel is None else fmt.difference(link.max_rel)
        cells = (str(link.link), link.name, link.subject, largest(link), relative, allowed(link))
        rows.append((*cells, fmt.whole(link.cases), result))
    return Table.of(head, rows, {3, 4, 6})


def chain(report: Report) -> list[Step]:
    """The certificate's links in order, those that do not apply included."""
    steps = [_step(link) for link in report.certificate]
    steps += [Step(skip.link, "skipped", skip.reason, "does not apply") for skip in report.certificate_skipped]
    return sorted(steps, key=lambda step: step.number)


def _step(link: Link) -> Step:
    tolerance = () if link.max_abs is None else (f"allowed {allowed(link)}",)
    figures = (largest(link), *tolerance, fmt.plural(link.cases, "case"))
    if link.passed:
        return Step(link.link, "ok", link.name, "held", link.subject, figures)
    fault = link.reason or "beyond the tolerance"
    fault += f"; worst case: {link.worst_case}" if link.worst_case else ""
    return Step(link.link, "bad", link.name, "FAILED", link.subject, figures, fault)


def largest(link: Link) -> str:
    """A link's largest difference; there is none of structure and tokens, nor where a value is not finite."""
    if link.max_abs is None:
        return {"structure": "structure only", "tokens": "tokens only"}.get(link.kind, "not finite")
    return fmt.difference(link.max_abs)


def allowed(link: Link) -> str:
    """A link's tolerance: atol + rtol x |reference|, or rtol of the largest output."""
    if link.atol is None:
        if link.rtol is None:
            return "no deviation"
        share = fmt.percent(link.rtol) if link.rtol >= 1e-3 else fmt.tolerance(link.rtol)
        return f"{share} of the largest output"
    return fmt.tolerance(link.atol) + (f" + {fmt.tolerance(link.rtol)} relative" if link.rtol else "")


def drift_section(drift: Drift) -> DriftSection:
    """What a page shows of one sample."""
    return DriftSection(wording.sample_line(drift), wording.sample_size(drift), drift_table(drift), drift.reason)


def drift_table(drift: Drift) -> Table:
    """The slim model's figures beside the random control's mean and range; only figures that the task has."""
    control = drift.random_control
    rows = []
    for name, label in wording.FIGURE_NAMES.items():
        slim = getattr(drift.slim, name) if drift.slim else None
        if slim is None:
            continue
        mean = getattr(control.mean, name) if control else None
        seeds = [value for one in control.figures if (value := getattr(one, name)) is not None] if control else []
        decimals = fmt.decimals_apart(slim, mean) if mean is not None else 3
        if name == "perplexity" and drift.perplexity_dense is not None:
            label = f"perplexity (dense: {drift.perplexity_dense:.3f})"
        mean_text = NONE if mean is None else f"{mean:.{decimals}f}"
        spread = fmt.span(min(seeds), max(seeds), decimals) if seeds else NONE
        rows.append((fmt.capitalized(label), f"{slim:.{decimals}f}", mean_text, spread))
    return Table.of(("Figure", "Slim", "Random removal", "Random, all seeds"), rows, {1, 2, 3})


def latencies(rows: Sequence[Latency]) -> Table:
    """One row per measurement, with its control and its verdict; with columns of their own for decoders."""
    head = ("Shape", "Setting", "Dense", "Slim", "Speedup", "FLOP ratio", "Realised", "Control", "Verdict")
    decoders = any(row.phase for row in rows)
    cells = []
    for row in rows:
        flop = fmt.ratio(row.flop_speedup) if row.flop_speedup is not None else "not counted"
        realised = fmt.percent(row.realised) if row.realised is not None else NONE
        verdict = f"{row.verdict}: {row.reason}" if row.reason else row.verdict
        timings, intervals = (_timing(row.dense), _timing(row.slim)), (_interval(row.speedup), _interval(row.control))
        place, written = (
            (wording.latency_place(row), wording.latency_setup(row)),
            _decoder_cells(row) if decoders else (),
        )
        cells.append((*place, *timings, *written, intervals[0], flop, realised, intervals[1], verdict))
    extra = ("Tokens/s", "Cache per token") if decoders else ()
    return Table.of((*head[:4], *extra, *head[4:]), cells, range(2, 8 + len(extra)))


def _decoder_cells(row: Latency) -> tuple[str, str]:
    """Tokens per second and bytes of the cache per token, dense to slim."""
    rates = [timing.tokens_per_second if timing else None for timing in (row.dense, row.slim)]
    cache = row.cache_bytes_per_token
    return (
        NONE if None in rates else " to ".join(fmt.figures(rate) for rate in rates if rate is not None),
        NONE if cache is None else f"{fmt.size(cache.dense)} to {fmt.size(cache.slim)}",
    )


def candidates(found: Sequence[GraphChoice]) -> Table:
    """The float32 graphs that could ship."""
    rows = []
    for one in found:
        proven = {None: "not tried", True: "proven", False: "refused"}[one.proven]
        rows.append(
            (one.candidate, proven if one.built else "not built", "yes" if one.ships else "no", one.reason or "")
        )
    return Table.of(("Graph", "Certificate", "Ships", "Reason"), rows)


def treatments(rows: Sequence[Treatment]) -> Table:
    """Speedup attribution: the deletion and the treatment (another graph or precision), measured in the same rounds."""
    head = ("Treatment", "Shape", "Setting", "Deletion", "Treatment, dense", "Treatment, slim", "Both", "Verdict, slim")
    cells = []
    for row in rows:
        setting = f"{row.graph}, " if row.graph else ""
        setting += f"{row.provider}, {fmt.plural(row.threads, 'thread')}"
        ratios = (_interval(ratio) for ratio in (row.deletion, row.on_dense, row.on_slim, row.whole))
        verdict = f"{row.verdict}: {row.reason}" if row.reason else row.verdict
        cells.append((row.treatment, fmt.shape_text(row.shape), setting, *ratios, verdict))
    return Table.of(head, cells, {3, 4, 5, 6})


def predictions(rows: Sequence[Prediction]) -> Table:
    """One row per float32 measurement: the predicted and the measured speedup, and the error."""
    head = ("Shape", "Setting", "Predicted by", "Predicted", "Measured", "Error", "Note")
    cells = []
    for row in rows:
        place = (fmt.shape_text(row.shape), wording.setting(row))
        predicted = fmt.ratio(row.speedup) if row.speedup is not None else "not counted"
        if row.low is not None and row.high is not None:
            predicted = Cell(predicted, fmt.span(row.low, row.high, 2))
        measured = fmt.ratio(row.measured) if row.measured is not None else "inconclusive"
        error = fmt.signed_percent(row.error) if row.error is not None else ""
        by = "latency table" if row.source == "table" else "FLOPs"
        cells.append((*place, by, predicted, measured, error, row.reason or ""))
    return Table.of(head, cells, {3, 4, 5})


def gates(found: Sequence[GateResult]) -> Table:
    """The recipe's gates and the measurements."""
    rows = []
    for gate in found:
        measured = fmt.figures(gate.measured) if gate.measured is not None else NONE
        result = ("met" if gate.met else "NOT MET") + (f": {gate.reason}" if gate.reason else "")
        rows.append((gate.gate, f"{gate.limit:g}", measured, result))
    return Table.of(("Gate", "Limit", "Measured", "Result"), rows, {1, 2})


def _removed(count: KindCount) -> str:
    """18 of 72 attention heads: the model card's words."""
    noun = "attention heads" if count.unit == "head" else wording.units(count.unit, 2)
    return f"{wording.of_all(count)} {noun}"


def _whole(number: float | None) -> str:
    return fmt.whole(number) if number is not None else NONE


def _size(count: float | None) -> str:
    return fmt.size(count) if count is not None else NONE


def _flops(count: float | None) -> str:
    return fmt.flops(count) if count is not None else NONE


def _timing(timing: Timing | None) -> str:
    if timing is None:
        return NONE
    return Cell(fmt.milliseconds(timing.median_ms), f"{fmt.figures(timing.p10_ms)} to {fmt.figures(timing.p90_ms)}")


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return NONE
    estimate, low, high = wording.interval_texts(interval)
    return Cell(f"{estimate}x", f"{low} to {high}")


FILTERS: dict[str, Callable[..., Any]] = {
    "fenced": fenced,
    "markdown_table": markdown_table,
    "figure_and_note": figure_and_note,
    "verbatim": Verbatim,
    "capitalized": fmt.capitalized,
}

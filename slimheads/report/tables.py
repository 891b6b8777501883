"""The report's tables as text cells, and the filters of its templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slimheads import formatting as fmt
from slimheads.latency.attribution import Treatment
from slimheads.latency.graph_choice import GraphChoice
from slimheads.latency.records import Interval, Latency, Timing
from slimheads.report import card, wording
from slimheads.report.markdown import Cell, Table, Verbatim, fenced, figure_and_note, markdown_table
from slimheads.report.model import GateResult, Prediction, Report
from slimheads.verification.certificate import Link
from slimheads.verification.drift import Drift

NONE = "not measured"


@dataclass(frozen=True)
class KeyFigure:
    """One of the few figures at the top of the page."""

    value: str
    label: str
    note: str


def tables(report: Report) -> dict[str, Any]:
    """Everything that the templates lay out, by the name they use for it."""
    model = report.model
    drifts = [("drift", report.drift), ("drift on the recipe's text", report.drift_text)]
    return {
        "title": card.short_name(model.source),
        "key_figures": key_figures(report),
        "sizes": sizes(report),
        "files": table(
            ("File", "Size"), [(path, fmt.size(count)) for path, count in sorted(report.files.items())], {1}
        ),
        "links": links(report.certificate),
        "chain": sorted([*report.certificate, *report.certificate_skipped], key=lambda link: link.link),
        "drifts": [(name, found, drift_table(found)) for name, found in drifts if found is not None],
        "latencies": latencies(report.latency),
        "candidates": candidates(report.candidates),
        "treatments": treatments(report.treatments),
        "predictions": predictions(report.predictions),
        "gates": gates(report.gates),
        "stages": stages(report),
        "environment": environment_table(report),
        "loader": card.loader(model),
        "preparer": card.preparer(model),
        "unit": wording.units(model, 1),
        "units": wording.units(model, 2),
        "static_axes": card.static_axes(report),
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> Table:
    """A `Table` from any sequences."""
    return Table(tuple(head), tuple(tuple(row) for row in rows), frozenset(numeric))


def key_figures(report: Report) -> list[KeyFigure]:
    """Heads, size, latency and drift, before any table."""
    heads, dense, slim = report.model.heads, report.model.dense, report.model.slim
    share = fmt.percent(heads.removed / heads.total) if heads.total else "none"
    files = "encoder and merged decoder" if report.model.encoder_decoder else "model file"
    found = [
        KeyFigure(
            share,
            f"of {wording.units(report.model, 2)} removed",
            f"{fmt.whole(heads.removed)} of {fmt.whole(heads.total)}",
        ),
        KeyFigure(fmt.change(dense.bytes, slim.bytes), files, f"{_size(dense.bytes)} to {_size(slim.bytes)}"),
    ]
    measured = [row for row in report.shipped_latency if row.speedup is not None]
    if measured:
        row = max(measured, key=lambda one: one.shape)
        note = f"at {wording.latency_place(row)}, {wording.latency_setup(row)}"
        clear = row.verdict in ("faster", "slower") and row.speedup is not None
        value = fmt.ratio(row.speedup.estimate) if clear and row.speedup else row.verdict
        found.append(KeyFigure(value, "speed of the dense model" if clear else "latency", note))
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
    """Before, after and the change, for heads, parameters, bytes and FLOPs."""
    model, dense, slim = report.model, report.model.dense, report.model.slim
    shape = f" at {fmt.shape_text(model.flops_shape)}" if model.flops_shape else ""
    units, heads = wording.units(model, 2), model.heads

    def row(name: str, text: Callable[[float | None], str], before: float | None, after: float | None) -> list[str]:
        return [name, text(before), text(after), fmt.change(before, after)]

    rows = [
        row(units[0].upper() + units[1:], _whole, heads.total, heads.kept),
        row("Parameters", _whole, dense.parameters, slim.parameters),
        row("Bytes, float32 ONNX", _size, dense.bytes, slim.bytes),
        row(f"FLOPs per run{shape}", _flops, dense.flops, slim.flops),
    ]
    return table(("", "Dense", "Slim", "Change"), rows, {1, 2, 3})


def links(found: Sequence[Link]) -> Table:
    """The certificate, one row per link and subject."""
    head = ("Link", "Held equal", "Subject", "Largest difference", "Relative", "Allowed", "Cases", "Result")
    rows = []
    for link in found:
        result = "held" if link.passed else f"FAILED: {link.reason or link.worst_case or 'beyond the tolerance'}"
        relative = "" if link.max_rel is None else fmt.difference(link.max_rel)
        cells = (str(link.link), link.name, link.subject, largest(link), relative, allowed(link))
        rows.append((*cells, fmt.whole(link.cases), result))
    return table(head, rows, {3, 4, 6})


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
        spread = f"{min(seeds):.3f} to {max(seeds):.3f}" if seeds else NONE
        if name == "perplexity" and drift.perplexity_dense is not None:
            label = f"perplexity (dense: {drift.perplexity_dense:.3f})"
        slim_text, mean_text = fmt.apart(slim, mean) if mean is not None else (f"{slim:.3f}", NONE)
        rows.append((label[0].upper() + label[1:], slim_text, mean_text, spread))
    return table(("Figure", "Slim", "Random removal", "Random, all seeds"), rows, {1, 2, 3})


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
    return table((*head[:4], *extra, *head[4:]), cells, range(2, 8 + len(extra)))


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
    return table(("Graph", "Certificate", "Ships", "Reason"), rows)


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
    return table(head, cells, {3, 4, 5, 6})


def predictions(rows: Sequence[Prediction]) -> Table:
    """One row per float32 measurement: the predicted and the measured speedup, and the error."""
    head = ("Shape", "Setting", "Predicted by", "Predicted", "Measured", "Error", "Note")
    cells = []
    for row in rows:
        place = (fmt.shape_text(row.shape), wording.setting(row))
        predicted = fmt.ratio(row.speedup) if row.speedup is not None else "not counted"
        if row.low is not None and row.high is not None:
            predicted = Cell(predicted, f"{row.low:.2f} to {row.high:.2f}")
        measured = fmt.ratio(row.measured) if row.measured is not None else "inconclusive"
        error = fmt.signed_percent(row.error) if row.error is not None else ""
        by = "latency table" if row.source == "table" else "FLOPs"
        cells.append((*place, by, predicted, measured, error, row.reason or ""))
    return table(head, cells, {3, 4, 5})


def gates(found: Sequence[GateResult]) -> Table:
    """The recipe's gates and the measurements."""
    rows = []
    for gate in found:
        measured = fmt.figures(gate.measured) if gate.measured is not None else NONE
        result = ("met" if gate.met else "NOT MET") + (f": {gate.reason}" if gate.reason else "")
        rows.append((gate.gate, f"{gate.limit:g}", measured, result))
    return table(("Gate", "Limit", "Measured", "Result"), rows, {1, 2})


def stages(report: Report) -> Table:
    """Time and peak memory of each stage."""
    rows = [
        (
            stage.stage,
            fmt.seconds(stage.seconds),
            f"{fmt.whole(stage.peak_rss_mb)} MB",
            "reused" if stage.reused else "ran",
        )
        for stage in report.stages
    ]
    rows.append(("whole run", fmt.seconds(report.seconds), f"{fmt.whole(report.peak_rss_mb)} MB", ""))
    return table(("Stage", "Time", "Peak memory", "Status"), rows, {1, 2})


def environment_table(report: Report) -> Table:
    """Software, hardware and session options."""
    env, hidden = report.environment, "not readable on this system"
    load = " ".join(f"{value:.2f}" for value in env.load_average) if env.load_average else hidden
    clock = f"{fmt.whole(env.cpu_frequency_mhz)} MHz at the start" if env.cpu_frequency_mhz else hidden
    clock += f", at most {fmt.whole(env.cpu_frequency_max_mhz)} MHz" if env.cpu_frequency_max_mhz else ""
    boost = hidden if env.cpu_boost is None else "allowed" if env.cpu_boost else "off"
    cores = ", ".join(
        f"{count or 'unknown'} {kind}"
        for count, kind in ((env.cores_physical, "physical"), (env.cores_logical, "logical"))
    )
    memory = f"{env.memory_bytes / 1024**3:.1f} GiB, {env.memory_available_bytes / 1024**3:.1f} GiB free at the start"
    rows = [("slimheads", env.slimheads), ("Python", env.python)]
    rows += [(name, version or "not installed") for name, version in env.packages.items()]
    rows += [
        ("Platform", env.platform),
        ("CPU", env.cpu),
        ("CPU features", hidden if env.cpu_features is None else ", ".join(env.cpu_features)),
        ("Cores", f"{cores}, {env.cores_usable:g} usable"),
        ("CPU governor", env.cpu_governor or hidden),
    ]
    rows += [("CPU clock", clock), ("Clock boost", boost), ("Memory", memory), ("Load, 1, 5, 15 min", load)]
    rows += [("Providers", ", ".join(env.providers) or "none")]
    gpus = [f"{gpu.name}, driver {gpu.driver}, {gpu.memory}" for gpu in env.gpus or ()]
    rows += [("GPU", "; ".join(gpus) or str(env.gpu_reason))] if env.gpus or "cuda" in env.session_options else []
    rows += [
        (f"Session, {provider}: {key}", str(value or "none") if isinstance(value, dict | list) else str(value))
        for provider, options in env.session_options.items()
        for key, value in options.items()
    ]
    return table(("What", "Value"), rows)


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
    estimate, low, high = wording.span(interval)
    return Cell(f"{estimate}x", f"{low} to {high}")


FILTERS: dict[str, Callable[..., Any]] = {
    "fenced": fenced,
    "markdown_table": markdown_table,
    "figure_and_note": figure_and_note,
    "verbatim": Verbatim,
    "largest": largest,
    "tolerance": fmt.tolerance,
    "allowed": allowed,
    "percent": fmt.percent,
    "seconds": fmt.seconds,
    "whole": fmt.whole,
    "listing": fmt.listing,
    "shape": fmt.shape_text,
    "plural": fmt.plural,
    "sample_size": wording.sample_size,
}

"""The words for measurements that several pages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from slimheads.formatting import (
    decimals_apart,
    listing,
    percent,
    plural,
    ratio,
    shape_text,
    signed_percent,
    span,
    whole,
)
from slimheads.latency.counts import Selection
from slimheads.latency.records import Interval, Latency
from slimheads.names import SiteKind, Unit
from slimheads.report.model import KindCount, Prediction
from slimheads.verification.drift import Drift

NOUNS: dict[Unit, str] = {
    "head": "head",
    "kv_group": "KV group",
    "neuron": "feed-forward neuron",
    "layer": "layer",
}
FIGURE_NAMES = {
    "cosine": "mean cosine of embeddings",
    "cosine_min": "worst cosine",
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity against dense",
    "kl_divergence": "KL divergence, nats per token",
    "top1_agreement": "same most likely token",
}


def interval_texts(interval: Interval) -> tuple[str, str, str]:
    """Estimate, low and high with as many decimals as tell them from 1: a bound of 1.003 never reads 1.00."""
    values = (interval.estimate, interval.low, interval.high)
    digits = next((d for d in range(2, 6) if all(float(f"{v:.{d}f}") != 1 or v == 1 for v in values)), 6)
    estimate, low, high = (f"{value:.{digits}f}" for value in values)
    return estimate, low, high


def latency_text(row: Latency) -> str:
    """One measurement: the speedup with its interval, and the share of the FLOP-ratio speedup that it reaches."""
    place = f"at {latency_place(row)}"
    if row.verdict == "not measured" or row.speedup is None:
        return f"not measured {place}: {row.reason}"
    if row.verdict == "inconclusive":
        return f"inconclusive {place}: {row.reason or 'the control does not hold'}"
    estimate, low, high = interval_texts(row.speedup)
    interval = f"95% interval {low} to {high}"
    if row.verdict == "no difference shown":
        return f"no difference shown {place}: {estimate}x, {interval}"
    if row.verdict == "slower":
        return f"slower, {estimate}x the dense model's speed ({interval}) {place}"
    realised = f", {percent(row.realised)} of the FLOP-ratio speedup" if row.realised is not None else ""
    return f"{estimate}x faster ({interval}) {place}{realised}"


def latency_place(row: Latency) -> str:
    """1x128, or batch 1 where inputs have no length; of a decoder, prefill 1x128 or decode 1x1 after 512."""
    return f"{row.phase} {shape_text(row.shape)}" if row.phase else shape_text(row.shape)


def latency_setup(row: Latency) -> str:
    """fp32, cpu, 2 threads; before that the graph, where there are several."""
    graph = f"{row.graph}, " if row.graph else ""
    form = "" if row.candidate == "plain" else f" ({row.candidate})"
    form = " (plain, does not ship)" if row.ships is False else form
    return f"{graph}{row.precision}{form}, {row.provider}, {plural(row.threads, 'thread')}"


def setting(row: Prediction) -> str:
    """cpu, 2 threads; before that the graph, where there are several."""
    graph = f"{row.graph}, " if row.graph else ""
    return f"{graph}{row.provider}, {plural(row.threads, 'thread')}"


def prediction_lines(rows: Sequence[Prediction]) -> list[tuple[str, str]]:
    """How far predicted slim latencies were from measured ones: a label and a text for each source of predictions."""
    lines = []
    for source, name in (("table", "Table-based"), ("flops", "FLOP-based")):
        own = [row for row in rows if row.source == source]
        errors = [row.error for row in own if row.error is not None]
        if len(errors) > 1:
            text = f"worst error {signed_percent(max(errors, key=abs))} ({plural(len(errors), 'shape')})"
        elif errors:
            shape = next(row.shape for row in own if row.error is not None)
            text = f"error {signed_percent(errors[0])} at {shape_text(shape)}"
        else:
            predicted = [f"{ratio(row.speedup)} at {shape_text(row.shape)}" for row in own if row.speedup is not None]
            text = f"{listing(predicted or ['nothing'])} (no conclusive measurement to compare with)"
        if own:
            lines.append((f"{name} latency prediction", text))
    return lines


def selection_lines(selection: Selection, kinds: Mapping[SiteKind, KindCount]) -> list[tuple[str, str]]:
    """The step that each key set to auto chose, and its gain by the latency table: a label and a text."""
    lines = []
    if selection.asked == "auto":
        unit = units(kinds["attention"].unit, selection.kept_more)
        lines.append(("Head counts", _selection_text(selection, unit, "multiple_of")))
    if (neurons := selection.feed_forward) and neurons.asked == "auto":
        unit = units(kinds["feed_forward"].unit, neurons.kept_more)
        lines.append(("Neuron counts", _selection_text(neurons, unit, "ffn_multiple_of")))
    return lines


def _selection_text(selection: Selection, unit: str, key: str) -> str:
    chose = f"{key}: auto chose {selection.multiple_of}"
    if selection.predicted_gain is None:
        tried = [candidate.multiple_of for candidate in selection.candidates]
        steps = f" (tried: {listing(tried)})" if tried else ""
        return f"{chose}, no gain: {selection.reason}{steps}"
    more = f", with {selection.kept_more} {unit} more kept" if selection.kept_more else ""
    if selection.reason:
        return f"{chose}: {selection.reason}{more}"
    estimate, low, high = interval_texts(selection.predicted_gain)
    return f"{chose}: predicted {estimate}x vs. no step ({low} to {high} by the latency table){more}"


def against_random(drift: Drift) -> tuple[str, str, str, int] | None:
    """The headline figure's name, the slim model's value, the control's range over its seeds, and how many they are."""
    if drift.headline is None or drift.slim is None or drift.random_control is None:
        return None
    slim = getattr(drift.slim, drift.headline)
    control = [getattr(figures, drift.headline) for figures in drift.random_control.figures]
    if slim is None or None in control:
        return None
    low, high = min(control), max(control)
    decimals = decimals_apart(slim, min((low, high), key=lambda end: abs(end - slim)))
    return FIGURE_NAMES[drift.headline], f"{slim:.{decimals}f}", span(low, high, decimals), len(control)


def sample_size(drift: Drift) -> str:
    """125 texts, 3,104 tokens; or 64 images."""
    tokens = "" if drift.tokens is None else f", {whole(drift.tokens)} tokens"
    embedded = "" if drift.embedding in (None, "mean") else f", embedded by {drift.embedding}"
    return plural(drift.texts, drift.noun) + tokens + embedded


def sample_line(drift: Drift) -> str:
    """The built-in sample, or the name of the recipe's own."""
    return "the built-in sample" if drift.sample == "built-in" else drift.sample


def units(unit: Unit, count: int) -> str:
    """The word for that many units: head, KV groups, feed-forward neurons."""
    return NOUNS[unit] if count == 1 else NOUNS[unit] + "s"


def removed_kinds(kinds: Mapping[SiteKind, KindCount]) -> dict[SiteKind, KindCount]:
    """The kinds that lose units; all kinds where none does."""
    return {kind: count for kind, count in kinds.items() if count.removed} or dict(kinds)


def removed_units(kinds: Mapping[SiteKind, KindCount]) -> str:
    """What is removed, without numbers: heads and feed-forward neurons."""
    return listing([units(count.unit, 2) for count in removed_kinds(kinds).values()])


def removed_counts(kinds: Mapping[SiteKind, KindCount], each: Callable[[KindCount], str]) -> str:
    """What is removed, kind by kind. A dropped layer's heads and neurons do not count beside it, and the text says so.

    Args:
        each: the text of one kind.
    """
    texts = {kind: each(count) for kind, count in removed_kinds(kinds).items()}
    layers, inside = texts.pop("layer", ""), listing(list(texts.values())) if texts else ""
    return f"{layers}, and in the other layers {inside}" if layers and inside else layers or inside


def among(kind: SiteKind, kinds: Mapping[SiteKind, KindCount]) -> str:
    """What to add to a count where it is not of the whole model: nothing inside a dropped layer counts."""
    dropped = kind != "layer" and "layer" in kinds and kinds["layer"].removed
    return " in layers that stay" if dropped else ""


def of_all(count: KindCount) -> str:
    """18 of 72."""
    return f"{whole(count.removed)} of {whole(count.total)}"


def site_labels(sites: Sequence[str]) -> tuple[list[str], str]:
    """Row labels and their title: the layer numbers where names differ in nothing else, else the names themselves."""
    split = [site.split(".") for site in sites]
    if len({len(parts) for parts in split}) == 1 and len(sites) > 1:
        differing = [index for index, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1]
        if len(differing) == 1 and all(parts[differing[0]].isdigit() for parts in split):
            return [parts[differing[0]] for parts in split], "layer"
    return list(sites), "site"

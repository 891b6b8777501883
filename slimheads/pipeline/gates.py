"""The gates of a recipe, judged on what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimheads.errors import GateError
from slimheads.latency.gate import latency_bound
from slimheads.latency.records import Latency
from slimheads.recipe.recipe import Recipe
from slimheads.recipe.sections import Gates
from slimheads.report.model import GateResult, Size
from slimheads.verification.certificate import Link
from slimheads.verification.drift import Drift

_REMEDIES = {
    "latency_ratio": "delete more heads, or measure on a machine that does nothing else",
    "size_ratio": "delete more heads, or allow more bytes",
    "min_cosine": "delete less (select.ratio, select.ffn_ratio), or from elsewhere (select.scope)",
    "max_perplexity_ratio": "delete less (select.ratio, select.ffn_ratio), or from elsewhere (select.scope)",
    "min_top1_agreement": "delete less (select.ratio, select.ffn_ratio), or from elsewhere (select.scope)",
    "min_precision_cosine": "leave that precision out of export.precisions, or for int8 try another export.int8_for",
}


def judge(
    gates: Gates,
    latency: Sequence[Latency],
    drifts: Sequence[Drift],
    dense: Size,
    slim: Size,
    links: Sequence[Link] = (),
) -> tuple[GateResult, ...]:
    """Every gate the recipe sets, against the worst measurement it applies to. What was not measured is not met."""
    found: list[GateResult] = []
    if gates.latency_ratio is not None:
        found.append(_latency_gate(gates.latency_ratio, [row for row in latency if row.ships is not False]))
    if gates.size_ratio is not None:
        ratio = slim.bytes / dense.bytes if slim.bytes and dense.bytes else None
        found.append(
            _at_most("size_ratio", gates.size_ratio, ratio, "slim / dense bytes of the float32 ONNX that clients load")
        )
    if gates.max_perplexity_ratio is not None:
        worst = _worst(drifts, "perplexity_ratio", max)
        found.append(_at_most("max_perplexity_ratio", gates.max_perplexity_ratio, worst, "slim / dense perplexity"))
    for gate, figure in (("min_cosine", "cosine"), ("min_top1_agreement", "top1_agreement")):
        limit = getattr(gates, gate)
        if limit is not None:
            found.append(_at_least(gate, limit, _worst(drifts, figure, min), figure.replace("_", " ")))
    if gates.min_precision_cosine is not None:
        found.append(_precision_gate(gates.min_precision_cosine, [link for link in links if link.precision]))
    return tuple(found)


def _precision_gate(limit: float, links: Sequence[Link]) -> GateResult:
    """The file whose rounding costs most; where float32 ships alone there is nothing that could lose anything."""
    name = "min_precision_cosine"
    if not links:
        return GateResult(gate=name, limit=limit, measured=None, met=True, reason="nothing but float32 ships")
    worst = min(links, key=lambda link: -1.0 if link.cosine is None else link.cosine)
    return _at_least(name, limit, worst.cosine, f"{worst.precision} ({worst.subject}): mean cosine to float32")


def unmet_gate(gate: GateResult, recipe: Recipe) -> GateError:
    """A gate that was not met, as an error at its key of the recipe."""
    return GateError(
        f"gate {gate.gate} was not met: {gate.reason}",
        where=recipe.where(f"gates.{gate.gate}"),
        hint=_REMEDIES[gate.gate],
    )


def _latency_gate(limit: float, latency: Sequence[Latency]) -> GateResult:
    met, ratio, reason = latency_bound(latency, limit)
    return GateResult(gate="latency_ratio", limit=limit, measured=ratio, met=met, reason=reason)


def _at_most(gate: str, limit: float, value: float | None, what: str) -> GateResult:
    return _gate(gate, limit, value, value is not None and value <= limit, what, "at most")


def _at_least(gate: str, limit: float, value: float | None, what: str) -> GateResult:
    return _gate(gate, limit, value, value is not None and value >= limit, what, "at least")


def _gate(gate: str, limit: float, value: float | None, met: bool, what: str, bound: str) -> GateResult:
    reason = f"{what} was not measured in this run" if value is None else f"{what} {value:.4g}, wanted {bound} {limit}"
    return GateResult(gate=gate, limit=limit, measured=value, met=met, reason=reason)


def _worst(drifts: Sequence[Drift], figure: str, pick: Any) -> float | None:
    values = [getattr(d.slim, figure) if d.slim else None for d in drifts]
    return None if not values or None in values else float(pick(values))

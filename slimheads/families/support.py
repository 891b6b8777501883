"""What is supported: one row per family file, with what the tests proved about its model types."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import get_args

from pydantic import BaseModel, ConfigDict

from slimheads.families.evidence import SECTIONS, TypeEvidence, digest, evidence
from slimheads.families.family import Family, Inputs, SiteRow, families
from slimheads.names import UNITS, SiteKind, Unit

_NEEDED = SECTIONS.keys() - {"tokens"}  # only some models generate
_LAYOUTS = ("separate", "fused in blocks", "fused by head")
# Link 3 compares one graph per precision with the plain graph.
_PRECISION = re.compile(r"_(fp16|int8|q4)\.onnx$")


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteSupport(_Result):
    """One row of a family file: the module name it matches, what can be deleted, how its projections are stored."""

    match: str
    kind: SiteKind
    unit: Unit
    layout: str | None  # null for layers


class TypeSupport(_Result):
    """The evidence for one model type: the largest differences over its variants, and the tests that looked for them.

    `links` has one entry per link and precision. Its value is relative to the largest output for link 3, and null where
    there is no difference to state.
    """

    deleted: tuple[Unit, ...]  # what the certificates deleted
    links: Mapping[str, float | None]
    gated: Mapping[str, float]  # by dtype
    scores: Mapping[str, float]  # by dtype
    tokens: int | None
    tests: Mapping[str, int]  # test -> how often it ran and passed


class FamilySupport(_Result):
    """One family file: what it covers, and what is proven. What is not proven is null or left out."""

    family: str
    title: str
    model_types: tuple[str, ...]
    inputs: Inputs
    sites: tuple[SiteSupport, ...]
    unit: str
    layout: str
    tasks: tuple[str, ...]
    reload: str | None
    variants: Mapping[str, tuple[str, ...]]  # by model type
    evidence: Mapping[str, TypeSupport]  # by model type
    not_proven: Mapping[str, str]  # model type -> reason


def shortfall(model_type: str, family: Family) -> str | None:
    """Why a model type is not proven, in a few words; None if it is."""
    found = evidence().model_types.get(model_type)
    if found is None:
        return "no evidence"
    if found.digest != digest(family):
        return "its family file changed since"
    missing = sorted(section for section in _NEEDED if not getattr(found, section))
    lacking = {kind for kind in _kinds(family, model_type) if not _deleted(found).intersection(UNITS[kind])}
    missing += sorted(f"deleted {UNITS[kind][0]}s" for kind in lacking)
    return f"no proof of {', '.join(missing)}" if missing else None


def supported_families() -> tuple[FamilySupport, ...]:
    """One row per family file, as `slimheads families` lists them."""
    return tuple(_row(name, family) for name, family in families().items())


def _row(name: str, family: Family) -> FamilySupport:
    reasons = {model_type: shortfall(model_type, family) for model_type in family.model_types}
    proven = {t: evidence().model_types[t] for t, reason in reasons.items() if reason is None}
    sites = tuple(_site(family, row) for row in family.sites if not _always_stays(row))
    return FamilySupport(
        family=name,
        title=family.title,
        model_types=family.model_types,
        inputs=family.inputs,
        sites=sites,
        unit=_joined(site.unit for site in sites),
        layout=_joined(site.layout for site in sites if site.kind == "attention" and site.layout),
        tasks=tuple(sorted({proof.task for found in proven.values() for proof in found.tasks})),
        reload=" / ".join(dict.fromkeys(_reload(found) for found in proven.values())) or None,
        variants={t: variants for t, found in proven.items() if (variants := _variants(found))},
        evidence={t: _largest_differences(found) for t, found in proven.items()},
        not_proven={t: reason for t, reason in reasons.items() if reason is not None},
    )


def _joined(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _site(family: Family, row: SiteRow) -> SiteSupport:
    layout = None if row.kind == "layer" else _layout(row)
    return SiteSupport(match=row.match, kind=row.kind, unit=_unit(family, row), layout=layout)


def _always_stays(row: SiteRow) -> bool:
    """Whether the row is of layers none of which can ever be dropped."""
    return any(stays.which == "all" and not stays.when for stays in row.stays)


def _kinds(family: Family, model_type: str) -> set[SiteKind]:
    """The kinds of sites that lose units in models of a type."""
    rows = (row for row in family.sites if row.when.get("model_type", model_type) == model_type)
    return {row.kind for row in rows if not _always_stays(row)}


def _deleted(found: TypeEvidence) -> set[Unit]:
    return {unit for proof in found.certificate for unit in proof.units}


def _unit(family: Family, row: SiteRow) -> Unit:
    if row.kind != "attention":
        return UNITS[row.kind][0]
    units, heads = family.keys(row)
    multi_query = isinstance(units, int)  # its one KV head stays, and query heads are deleted
    return "head" if units == heads or multi_query else "kv_group"


def _layout(row: SiteRow) -> str:
    layouts = [projection.layout for projection in row.projections]
    fused = 2 if any("[" in layout for layout in layouts) else 1 if any("|" in layout for layout in layouts) else 0
    return _LAYOUTS[fused]


def _reload(found: TypeEvidence) -> str:
    """Which libraries rebuild a slim model, and stock transformers which ones."""
    stock = [proof for proof in found.reload if proof.tier == "stock"]
    counts = {kind: {proof.counts for proof in stock if proof.kind == kind} for kind in UNITS}
    sizes: dict[SiteKind, str] = {"attention": "head counts", "feed_forward": "widths"}
    words = [f"{'any' if 'ragged' in counts[kind] else 'equal'} {sizes[kind]}" for kind in sizes if counts[kind]]
    words += ["fewer layers"] * bool(counts["layer"])
    return f"stock with {', '.join(words)}; slimheads" if words else "slimheads"


def _variants(found: TypeEvidence) -> tuple[str, ...]:
    certified, gated = ({proof.variant for proof in proofs} for proofs in (found.certificate, found.gated))
    return tuple(sorted((certified | gated) - {""}))


def _largest_differences(found: TypeEvidence) -> TypeSupport:
    gated: dict[str, float] = {}
    for proof in found.gated:
        gated[proof.dtype] = max(gated.get(proof.dtype, 0.0), proof.max_abs)
    return TypeSupport(
        deleted=tuple(sorted(_deleted(found), key=get_args(Unit).index)),
        links=_links(found),
        gated=gated,
        scores={proof.dtype: proof.max_rel for proof in found.scores},
        tokens=sum(proof.tokens for proof in found.tokens) or None,
        tests=dict(found.tests),
    )


def _links(found: TypeEvidence) -> dict[str, float | None]:
    worst: dict[str, float | None] = {}
    for link in (link for proof in found.certificate for link in proof.links):
        precision = _PRECISION.search(link.subject) if link.link == 3 else None
        name = f"{link.link} {precision[1]}" if precision else str(link.link)
        size = link.max_rel if link.link == 3 else link.max_abs
        worst[name] = None if size is None else max(size, worst.get(name) or 0.0)
    return dict(sorted(worst.items()))

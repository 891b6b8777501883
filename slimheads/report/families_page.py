"""docs/families.md: the supported families and the evidence for them, as one page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slimheads.families.support import FamilySupport
from slimheads.names import SiteKind

NOT_PROVEN = "not proven"
_COVERED = (
    *("Family", "Model types", "Attention blocks", "Projections", "Unit", "Feed-forward blocks", "Layers"),
    *("Inputs", "Tasks", "Reloaded by", "Variants"),
)


def render_families(rows: Sequence[FamilySupport], versions: Mapping[str, str]) -> str:
    """The page.

    Args:
        rows: as `supported_families` gives them.
        versions: of the packages that the evidence was made with, by name.
    """
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    covered = _table([_COVERED, *map(_covered_row, rows)])
    return _PAGE.format(versions=named, covered=covered, proved=_table(_proved_rows(rows)))


def _covered_row(row: FamilySupport) -> tuple[str, ...]:
    variants = "; ".join(f"{t} ({variant})" for t, found in row.variants.items() for variant in found)
    types = ", ".join(f"`{t}`" for t in row.model_types)
    tasks, reload = ", ".join(row.tasks) or NOT_PROVEN, row.reload or NOT_PROVEN
    heads = ", ".join(dict.fromkeys(site.unit for site in row.sites if site.kind == "attention"))
    attention, neurons, layers = (_blocks(row, kind) for kind in ("attention", "feed_forward", "layer"))
    return (row.title, types, attention, row.layout, heads, neurons, layers, row.inputs, tasks, reload, variants)


def _blocks(row: FamilySupport, kind: SiteKind) -> str:
    found = [site for site in row.sites if site.kind == kind]
    return ", ".join(dict.fromkeys(f"`{site.match}`" for site in found)) or "none"


def _proved_rows(rows: Sequence[FamilySupport]) -> list[tuple[str, ...]]:
    evidence = {t: found for row in rows for t, found in row.evidence.items()}
    not_proven = {t: reason for row in rows for t, reason in row.not_proven.items()}
    links = sorted({link for found in evidence.values() for link in found.links})
    dtypes = sorted({dtype for found in evidence.values() for dtype in found.gated})
    head = (
        "Model type",
        "deleted",
        *(f"gated {dtype}" for dtype in dtypes),
        *(f"link {link}" for link in links),
        "tests",
    )
    made = [head]
    for model_type in sorted(evidence.keys() | not_proven.keys()):
        if model_type in not_proven:
            made.append((f"`{model_type}`", f"{NOT_PROVEN}: {not_proven[model_type]}", *[""] * (len(head) - 2)))
            continue
        found = evidence[model_type]
        gated = (_size(found.gated.get(dtype, "")) for dtype in dtypes)
        held = (_size(found.links[link]) if link in found.links else "" for link in links)
        deleted = ", ".join(found.deleted)
        made.append((f"`{model_type}`", deleted, *gated, *held, str(sum(found.tests.values()))))
    return made


def _size(value: float | str | None) -> str:
    return "held" if value is None else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


_PAGE = """<!-- Made by `make families` from slimheads/families/evidence.json, which the tests write. Do not edit. -->
# Model families

What the family files cover, and what the tests proved with {versions}.

## Covered

{covered}

Unit: what attention loses as one piece. Where every query head has its own keys and values, a kv_group is one head.
Feed-forward blocks lose neurons, and layers go as a whole; "none" says that this family's cannot.
"Fused in blocks": all queries, then all keys, then all values in one matrix. "Fused by head": query, key and value of
the first head, then those of the second. "Reloaded by" names the libraries that rebuilt a slim folder in a test: stock
transformers 4 if no more was deleted than it says, slimheads always.

## Proved

Largest differences on random models of three layers, with a different number of heads or neurons in every block and,
where layers can go, one layer dropped, over every variant above. "deleted": the units that were. "gated": slim torch
against the dense model with gates, eager and sdpa, unpadded and padded. Links are those of the certificate, over batch
1 and 4, lengths 1, 8 and 128, padding and past: 1 gated dense torch == slim torch, 2 slim torch == slim ONNX, 3 each
further graph against it (relative to the largest output), 4 the graph's own structure, 5 greedy tokens through ONNX
Runtime with the cache. "held": tensors and tokens were equal, so there is no difference to state. Blank: the link does
not apply. "tests": how many tests passed.

{proved}
"""

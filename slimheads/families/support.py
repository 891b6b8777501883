"""The catalogue: what the family files cover, beside what the tests proved of it.

The evidence is written by the tests themselves (`make families`), never by hand: a proof gets into it when the test
that looked for it passed. It holds a digest of what each model type's family file said then; where the file says
something else now, or there is no evidence, the model type is not proven.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from slimheads.errors import UsageError
from slimheads.families.family import Family, SiteRow, families
from slimheads.names import Unit

EVIDENCE = cast(Path, files("slimheads") / "families" / "evidence.json")
NOT_PROVEN = "not proven"
_LAYOUTS = ("separate", "fused in blocks", "fused by head")
# A graph's link 3 is one proof a precision.
_PRECISION = re.compile(r"_(fp16|int8|q4)\.onnx$")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LinkProof(_Part):
    """A link of a certificate that held."""

    link: int
    subject: str
    cases: int
    max_abs: float | None
    max_rel: float | None


class CertificateProof(_Part):
    """A certificate whose links all held, with another number of heads in every attention block."""

    task: str
    variant: str = ""  # what differs from the plain test model, e.g. "head_dim: 6"
    units: tuple[Unit, ...]
    links: tuple[LinkProof, ...]


class GatedProof(_Part):
    """Deleted equals gated, in torch."""

    variant: str = ""
    implementation: str  # of attention: eager, sdpa
    dtype: str
    max_abs: float


class TaskProof(_Part):
    """Deleted equals gated under this task's head, and the slim folder reloads to the same outputs."""

    task: str
    max_abs: float


class ReloadProof(_Part):
    """Who reloads a slim folder to the same weights, counts and outputs."""

    counts: Literal["ragged", "equal"]
    tier: Literal["stock", "slimheads"]


class TokenProof(_Part):
    """Greedy tokens of an unmodified client with its cache, equal to torch's."""

    client: str
    tokens: int


class ScoreProof(_Part):
    """Scores equal a loop over single heads in float64."""

    dtype: str
    max_rel: float


class TypeEvidence(_Part):
    """What was proven of one model type."""

    family: str
    digest: str
    tests: Mapping[str, int]  # test -> how often it ran (and passed)
    certificate: tuple[CertificateProof, ...] = ()
    gated: tuple[GatedProof, ...] = ()
    tasks: tuple[TaskProof, ...] = ()
    reload: tuple[ReloadProof, ...] = ()
    tokens: tuple[TokenProof, ...] = ()
    scores: tuple[ScoreProof, ...] = ()


SECTIONS: Mapping[str, type[_Part]] = {
    "certificate": CertificateProof,
    "gated": GatedProof,
    "tasks": TaskProof,
    "reload": ReloadProof,
    "tokens": TokenProof,
    "scores": ScoreProof,
}
_NEEDED = SECTIONS.keys() - {"tokens"}  # only some models generate


class Evidence(_Part):
    """families/evidence.json."""

    format: Literal[1] = 1
    versions: Mapping[str, str]
    model_types: Mapping[str, TypeEvidence]

    def to_json(self) -> str:
        """One line a proof, sorted, so that a change shows as what it is."""
        return _lines(self.model_dump(mode="json", exclude_defaults=True) | {"format": self.format}) + "\n"


def _lines(value: Any, indent: str = "") -> str:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(part, dict | list) for part in parts):
        return json.dumps(value, sort_keys=True)
    inner = f"{indent} "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _lines(part, inner) for part in value) + f"\n{indent}]"
    named = (f"{inner}{json.dumps(key)}: {_lines(part, inner)}" for key, part in sorted(value.items()))
    return "{\n" + ",\n".join(named) + f"\n{indent}}}"


@cache
def evidence() -> Evidence:
    """The packaged evidence. Where there is none yet, it proves nothing.

    Raises:
        UsageError: the file is damaged.
    """
    if not EVIDENCE.is_file():
        return Evidence(versions={}, model_types={})
    try:
        return Evidence.model_validate_json(EVIDENCE.read_bytes())
    except ValidationError as error:
        what = f"damaged evidence ({error.errors()[0]['msg']})"
        raise UsageError(what, where=str(EVIDENCE), hint="run `make families`, or install slimheads again") from error


def digest(family: Family) -> str:
    """Of all that a family file says about its model types; its title, comments and other model types do not count."""
    said = family.model_dump(mode="json", exclude={"title", "model_types"}, exclude_defaults=True)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def shortfall(model_type: str, family: Family) -> str | None:
    """Why a model type is not proven, in a few words; None if it is."""
    found = evidence().model_types.get(model_type)
    if found is None:
        return "no evidence"
    if found.digest != digest(family):
        return "its family file changed since"
    lacking = sorted(section for section in _NEEDED if not getattr(found, section))
    return f"no proof of {', '.join(lacking)}" if lacking else None


def family_rows() -> list[dict[str, Any]]:
    """What `slimheads families` lists: one row a family file, as JSON data. What is not proven is null or left out."""
    return [_row(name, family) for name, family in families().items()]


def _row(name: str, family: Family) -> dict[str, Any]:
    reasons = {model_type: shortfall(model_type, family) for model_type in family.model_types}
    proven = {t: evidence().model_types[t] for t, reason in reasons.items() if reason is None}
    return {
        "family": name,
        "title": family.title,
        "model_types": list(family.model_types),
        "inputs": family.inputs,
        "sites": [{"match": row.match, "unit": _unit(family, row), "layout": _layout(row)} for row in family.sites],
        "unit": _joined(_unit(family, row) for row in family.sites),
        "layout": _joined(_layout(row) for row in family.sites),
        "tasks": sorted({proof.task for found in proven.values() for proof in found.tasks}),
        "reload": _joined(_reload(found) for found in proven.values()) or None,
        "variants": {t: variants for t, found in proven.items() if (variants := _variants(found))},
        "evidence": {t: _summary(found) for t, found in proven.items()},
        "not_proven": {t: reason for t, reason in reasons.items() if reason is not None},
    }


def _joined(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _unit(family: Family, row: SiteRow) -> str:
    units, heads = family.keys(row)
    one_kv_head = isinstance(units, int)  # multi-query: its query heads are what goes
    return "head" if units == heads or one_kv_head else "kv_group"


def _layout(row: SiteRow) -> str:
    layouts = [projection.layout for projection in row.projections]
    fused = 2 if any("[" in layout for layout in layouts) else 1 if any("|" in layout for layout in layouts) else 0
    return _LAYOUTS[fused]


def _reload(found: TypeEvidence) -> str:
    stock = {proof.counts for proof in found.reload if proof.tier == "stock"}
    if "ragged" in stock:
        return "stock transformers 4, slimheads"
    return "stock with equal counts, slimheads" if stock else "slimheads"


def _variants(found: TypeEvidence) -> list[str]:
    certified, gated = ({proof.variant for proof in proofs} for proofs in (found.certificate, found.gated))
    return sorted((certified | gated) - {""})


def _summary(found: TypeEvidence) -> dict[str, Any]:
    """The largest differences over all variants, and the tests that looked for them."""
    gated: dict[str, float] = {}
    for proof in found.gated:
        gated[proof.dtype] = max(gated.get(proof.dtype, 0.0), proof.max_abs)
    return {
        "links": _links(found),
        "gated": gated,
        "scores": {proof.dtype: proof.max_rel for proof in found.scores},
        "tokens": sum(proof.tokens for proof in found.tokens) or None,
        "tests": dict(found.tests),
    }


def _links(found: TypeEvidence) -> dict[str, float | None]:
    """By link (and precision): the largest difference; a share of the largest output for link 3; null for 4 and 5."""
    worst: dict[str, float | None] = {}
    for link in (link for proof in found.certificate for link in proof.links):
        precision = _PRECISION.search(link.subject) if link.link == 3 else None
        name = f"{link.link} {precision[1]}" if precision else str(link.link)
        size = link.max_rel if link.link == 3 else link.max_abs
        worst[name] = None if size is None else max(size, worst.get(name) or 0.0)
    return dict(sorted(worst.items()))


def render_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """docs/families.md, from what `family_rows` gives."""
    covered = [
        (
            "Family",
            "Model types",
            "Attention blocks",
            "Projections",
            "Unit",
            "Inputs",
            "Tasks",
            "Reloaded by",
            "Variants",
        )
    ]
    for row in rows:
        variants = (f"{t} ({v})" for t, found in row["variants"].items() for v in found)
        blocks = _joined(f"`{site['match']}`" for site in row["sites"])
        tasks, reload = _joined(row["tasks"]) or NOT_PROVEN, row["reload"] or NOT_PROVEN
        types = _joined(f"`{t}`" for t in row["model_types"])
        covered.append(
            (row["title"], types, blocks, row["layout"], row["unit"], row["inputs"], tasks, reload, "; ".join(variants))
        )
    found = {t: proof for row in rows for t, proof in row["evidence"].items()}
    lacking = {t: reason for row in rows for t, reason in row["not_proven"].items()}
    links = sorted({link for proof in found.values() for link in proof["links"]})
    dtypes = sorted({dtype for proof in found.values() for dtype in proof["gated"]})
    proved = [("Model type", *(f"gated {dtype}" for dtype in dtypes), *(f"link {link}" for link in links), "tests")]
    for model_type in sorted(found.keys() | lacking.keys()):
        if model_type in lacking:
            proved.append((f"`{model_type}`", f"{NOT_PROVEN}: {lacking[model_type]}", *[""] * (len(proved[0]) - 2)))
            continue
        proof = found[model_type]
        sizes = (_size(proof["gated"].get(dtype, "")) for dtype in dtypes)
        held = (_size(proof["links"][link]) if link in proof["links"] else "" for link in links)
        proved.append((f"`{model_type}`", *sizes, *held, str(sum(proof["tests"].values()))))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(evidence().versions.items()))
    return _PAGE.format(versions=versions, covered=_table(covered), proved=_table(proved))


def _size(value: float | str | None) -> str:
    return "held" if value is None else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


_PAGE = """<!-- Made by `make families` from slimheads/families/evidence.json, which the tests write. Do not edit. -->
# Model families

What the family files cover, and what the tests proved of it with {versions}.

## Covered

{covered}

Unit: what is deleted alone; of a kv_group, a head where every head has its own keys and values.
"Fused in blocks": all queries, then all keys, then all values in one matrix. "Fused by head": query, key and value of
the first head, then of the second. "Reloaded by" says who rebuilds a slim folder, found out by doing it.

## Proved

Largest differences on random models of three layers with another number of heads in every attention block, over every
variant above. "gated": slim torch against the dense model with gates, eager and sdpa, unpadded and padded. Links are
those of the certificate, over batch 1 and 4, lengths 1, 8 and 128, padding and past: 1 gated dense torch == slim torch,
2 slim torch == slim ONNX, 3 each further graph against it (as a share of the largest output), 4 the graph's own
structure, 5 greedy tokens through ONNX Runtime with the cache. "held": tensors and tokens were equal, where there is no
difference to state; blank: the link does not apply. "tests": how many looked, and passed.

{proved}
"""

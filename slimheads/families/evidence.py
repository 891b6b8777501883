"""evidence.json: what the tests proved about each model type.

The tests write the file (`make families`); it is never edited by hand. A proof is recorded when its test passed. Each
model type has the digest of its family file at that time. If the file has changed since, or there is no evidence, the
model type is not proven.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from slimheads.errors import UsageError
from slimheads.families.family import Family
from slimheads.names import SiteKind, Unit

EVIDENCE = cast(Path, files("slimheads") / "families" / "evidence.json")


class Proof(BaseModel):
    """Something that a test proved about a model type."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LinkProof(Proof):
    """A link of a certificate that held."""

    link: int
    subject: str
    cases: int
    max_abs: float | None
    max_rel: float | None


class CertificateProof(Proof):
    """A certificate whose links all held, with a different number of units in every block. `units` were deleted."""

    task: str
    variant: str = ""  # what differs from the plain test model, e.g. "head_dim: 6"
    units: tuple[Unit, ...]
    links: tuple[LinkProof, ...]


class GatedProof(Proof):
    """Deleted equals gated, in torch."""

    variant: str = ""
    implementation: str  # of attention: eager, sdpa
    dtype: str
    max_abs: float


class TaskProof(Proof):
    """Deleted equals gated for the model class of this task, and the slim folder reloads to the same outputs."""

    task: str
    max_abs: float


class ReloadProof(Proof):
    """Which library reloads a slim folder, that lost units of one kind, to the same weights, sizes and outputs."""

    kind: SiteKind = "attention"
    counts: Literal["ragged", "equal"]
    tier: Literal["stock", "slimheads"]


class TokenProof(Proof):
    """Greedy tokens from an unmodified client with its cache, equal to those from torch."""

    client: str
    tokens: int


class ScoreProof(Proof):
    """Scores equal a loop over single heads in float64."""

    dtype: str
    max_rel: float


class TypeEvidence(BaseModel):
    """What was proven about one model type."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    family: str
    digest: str
    tests: Mapping[str, int]  # test -> how often it ran and passed
    certificate: tuple[CertificateProof, ...] = ()
    gated: tuple[GatedProof, ...] = ()
    tasks: tuple[TaskProof, ...] = ()
    reload: tuple[ReloadProof, ...] = ()
    tokens: tuple[TokenProof, ...] = ()
    scores: tuple[ScoreProof, ...] = ()


SECTIONS: Mapping[str, type[Proof]] = {
    "certificate": CertificateProof,
    "gated": GatedProof,
    "tasks": TaskProof,
    "reload": ReloadProof,
    "tokens": TokenProof,
    "scores": ScoreProof,
}


class Evidence(BaseModel):
    """families/evidence.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    versions: Mapping[str, str]
    model_types: Mapping[str, TypeEvidence]

    def to_json(self) -> str:
        """One line per proof, sorted, so that a diff shows what changed."""
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
    """The packaged evidence; empty if there is no file yet.

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
    """A digest of what a family file states about each of its model types: all but the title and the type names."""
    stated = family.model_dump(mode="json", exclude={"title", "model_types"}, exclude_defaults=True)
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]

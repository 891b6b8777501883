"""Scores: one number a unit, from the weights alone.

Magnitude: M(l, h) = ||W_Q||_F + ||W_K||_F + ||W_V||_F + ||W_O||_F over the slices of head h in layer l, without biases.
For a KV group: the norms of its one K and one V slice, and those of all its query and output slices taken together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimheads.attention import Projection, Site, Unit, find_sites
from slimheads.errors import ModelRefusedError

ROLES = ("query", "key", "value", "output")


@dataclass(frozen=True)
class SiteScores:
    """The scores of one site, one a unit, in the site's order."""

    site: str
    unit: Unit
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """The scores of a model's sites, in the model's order."""

    method: str
    sites: tuple[SiteScores, ...]

    def to_json(self) -> dict[str, Any]:
        """The contents of scores.json."""
        sites = [{"site": s.site, "scores": list(s.scores)} for s in self.sites]
        return {"format": 1, "method": self.method, "sites": sites}

    def to_record(self) -> dict[str, Any]:
        """Everything, for a later run; scores.json leaves the units out."""
        return {"method": self.method, "sites": [asdict(site) for site in self.sites]}

    @classmethod
    def from_record(cls, data: dict[str, Any]) -> Scores:
        """Reads what `to_record` wrote."""
        sites = (SiteScores(s["site"], s["unit"], tuple(s["scores"])) for s in data["sites"])
        return cls(data["method"], tuple(sites))


def score(model: PreTrainedModel, method: str = "magnitude") -> Scores:
    """Scores every unit of every site. Reads each weight once; works in any dtype, accumulating in float32 and float64.

    Args:
        model: a model that `slimheads.load` covers, dense or slim.
        method: "magnitude", the only one so far.

    Raises:
        ModelRefusedError: the model's family is not covered, or a weight holds NaN or infinity (the tensor is named).
    """
    if method != "magnitude":
        raise ValueError(f"unknown scoring method {method!r}")
    sites = find_sites(model)
    return Scores(method, tuple(SiteScores(s.name, s.unit, _magnitudes(model, s)) for s in sites))


def _magnitudes(model: PreTrainedModel, site: Site) -> tuple[float, ...]:
    squares = np.zeros((len(ROLES), site.total))
    for projection in site.projections:
        per_feature = _squared_norms(model.get_submodule(projection.module), projection)
        for index, role in enumerate(ROLES):
            of_role = projection.role_of == role
            np.add.at(squares[index], projection.unit_of[of_role], per_feature[of_role])
    return tuple(float(total) for total in np.sqrt(squares).sum(axis=0))


def _squared_norms(module: torch.nn.Module, projection: Projection) -> np.ndarray:
    """Squared Euclidean norm of each feature of the divided axis, float64 [features]."""
    weight = cast(torch.Tensor, module.weight).detach()
    along = 1 if isinstance(module, Conv1D) == projection.divides_inputs else 0
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(weight, dim=along, dtype=wide).double()
    if not bool(torch.isfinite(norms).all()):
        raise ModelRefusedError(
            "the tensor holds NaN or infinity, or is too large for its norm",
            where=f"{projection.module}.weight",
            hint="the checkpoint is damaged: fetch or train it again",
        )
    squares: np.ndarray = norms.square().cpu().numpy()
    return squares

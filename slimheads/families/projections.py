"""The labels of a projection's features: which unit each belongs to, and in which role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from slimheads.families.layout import OUTPUTS, Block

_Labels = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # the last four fields of a Projection


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear module of a site. Feature i of the divided axis belongs to `span[i]` units, starting at `unit_of[i]`.

    `member_of[i]` is the index of its query head in the group, or -1 if the group's heads share the feature.
    """

    module: str  # qualified name in the model
    unit_of: np.ndarray  # int64 [features]
    member_of: np.ndarray  # int64 [features]
    role_of: np.ndarray  # str [features]
    span: np.ndarray  # int64 [features]; above 1 only for keys and values when units are query heads

    @property
    def divides_inputs(self) -> bool:
        """Whether this is the output projection, whose input features are divided and whose bias is not."""
        return bool(self.role_of[0] in OUTPUTS)

    def kept_features(self, kept: tuple[int, ...]) -> np.ndarray:
        """Indices (int64, ascending) of the features that are kept when the units `kept` are."""
        stays = np.zeros(int((self.unit_of + self.span).max()), np.int64)
        stays[list(kept)] = 1
        before = np.concatenate([[0], stays.cumsum()])
        return np.flatnonzero(before[self.unit_of + self.span] > before[self.unit_of])

    def by_head(self, members: int) -> Projection:
        """The same with query heads as units, `members` per group."""
        own = self.member_of >= 0
        unit_of = self.unit_of * members + np.where(own, self.member_of, 0)
        return replace(self, unit_of=unit_of, span=np.where(own, 1, members))


def units(module: str, blocks: tuple[Block, ...], sizes: Mapping[str, int], left: tuple[int, ...]) -> Projection:
    """A projection of attention.

    Args:
        module: its qualified name.
        blocks: its parsed layout.
        sizes: the dense model's numbers of `unit`, `member` and `dim`.
        left: the dense model's query heads that are left.
    """
    return Projection(module, *_labels(blocks, sizes["unit"], sizes["member"], sizes["dim"], left))


@lru_cache(maxsize=64)  # most layers of a model have the same labels
def _labels(blocks: tuple[Block, ...], units: int, members: int, dim: int, left: tuple[int, ...]) -> _Labels:
    """Labels of the features that are left of the dense model's, with units and members renumbered."""
    unit_of, member_of, role_of = _of_blocks(blocks, {"unit": units, "member": members, "dim": dim})
    dense = Projection("", unit_of, member_of, role_of, np.ones_like(unit_of))
    groups = sorted({head // members for head in left})
    here = dense.by_head(members).kept_features(left)
    unit_of, member_of = unit_of[here], member_of[here]
    place = np.searchsorted(left, unit_of * members + member_of) % (len(left) // len(groups))
    labels = (
        np.searchsorted(groups, unit_of),
        np.where(member_of < 0, -1, place),
        role_of[here],
        np.ones_like(unit_of),
    )
    return _shared(labels)


def neurons(module: str, blocks: tuple[Block, ...], width: int) -> Projection:
    """A projection of a feed-forward block of `width` neurons."""
    return Projection(module, *_neuron_labels(blocks, width))


@lru_cache(maxsize=64)
def _neuron_labels(blocks: tuple[Block, ...], width: int) -> _Labels:
    """Labels of `width` neurons. Neurons are all alike, so those that are left of the dense model's count from 0."""
    unit_of, member_of, role_of = _of_blocks(blocks, {"unit": width, "member": 1, "dim": 1})
    return _shared((unit_of, member_of, role_of, np.ones_like(unit_of)))


def _of_blocks(blocks: tuple[Block, ...], sizes: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    unit_of, member_of, role_of = (
        np.concatenate(parts) for parts in zip(*(b.labels(sizes) for b in blocks), strict=True)
    )
    return unit_of, member_of, role_of


def _shared(labels: _Labels) -> _Labels:
    """Read-only, because every projection of a layout has the same arrays."""
    for array in labels:
        array.flags.writeable = False
    return labels

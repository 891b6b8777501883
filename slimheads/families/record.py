"""The plan inside config.json, as far as finding sites needs it: what is left of the dense model, and new layer names.

Layers that stay are renumbered, so a slim model's `encoder.layer.1` may be the dense model's `encoder.layer.2`. The
record names everything as the dense model does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from slimheads.families.family import PLAN_KEY
from slimheads.names import SiteKind

Range = int | list[int]  # a unit, or the first and the last of adjacent ones


def in_ranges(units: Sequence[int]) -> list[Range]:
    """Ascending units with each run of adjacent ones as [first, last]."""
    at = np.array(units, np.int64)
    starts = at[np.diff(at, prepend=at[:1] - 2) != 1].tolist()
    ends = at[np.diff(at, append=at[-1:] + 2) != 1].tolist()
    return [first if first == last else [first, last] for first, last in zip(starts, ends, strict=True)]


def out_of_ranges(ranges: Iterable[Any], total: int) -> Iterator[int]:
    """The units that `in_ranges` wrote.

    Raises:
        ValueError: something is neither a number nor an ascending range, or reaches beyond the `total` units.
    """
    for item in ranges:
        first, last = item if isinstance(item, list | tuple) and len(item) == 2 else (item, item)
        if not (type(first) is int and type(last) is int and 0 <= first <= last < total):
            raise ValueError(f"{item!r} is neither one of {total} units nor a range [first, last] of them")
        yield from range(first, last + 1)


def stack_of(layer: str) -> str:
    """The qualified name of the list that a layer is in."""
    return layer.rpartition(".")[0]


@dataclass(frozen=True)
class Renumbering:
    """How layers are renumbered when some of them go. `dropped` has the indices that go, by the name of their list."""

    dropped: Mapping[str, frozenset[int]] = field(default_factory=dict)

    @classmethod
    def without(cls, layers: Iterable[str]) -> Renumbering:
        """Without these layers, by their qualified names."""
        found: dict[str, set[int]] = {}
        for layer in layers:
            stack, _, index = layer.rpartition(".")
            found.setdefault(stack, set()).add(int(index))
        return cls({stack: frozenset(indices) for stack, indices in found.items()})

    def new_name(self, name: str) -> str:
        """What a module that stays is called afterwards."""
        return self._with_index(name, lambda gone, index: index - sum(other < index for other in gone))

    def old_name(self, name: str) -> str:
        """What a module was called before."""
        return self._with_index(name, _before)

    def drops(self, name: str) -> bool:
        """Whether a module is or is in a layer that goes."""
        found = self._place(name)
        return found is not None and found[2] in self.dropped[found[0]]

    def _with_index(self, name: str, change: Any) -> str:
        found = self._place(name)
        if found is None:
            return name
        stack, rest, index = found
        return f"{stack}.{change(self.dropped[stack], index)}{rest}"

    def _place(self, name: str) -> tuple[str, str, int] | None:
        """The list that a module is in, what follows its index there, and the index."""
        parts = name.split(".")
        for end, part in enumerate(parts[1:], 1):
            stack = ".".join(parts[:end])
            if part.isdigit() and stack in self.dropped:
                return stack, "".join(f".{other}" for other in parts[end + 1 :]), int(part)
        return None


def _before(gone: frozenset[int], index: int) -> int:
    for other in sorted(gone):
        index += other <= index
    return index


def recorded_sites(config: PretrainedConfig) -> Sequence[Mapping[str, Any]]:
    """The sites of the plan in a configuration, as they are written; none in a dense model's."""
    record = getattr(config, PLAN_KEY, None) or {"sites": []}
    sites: Sequence[Mapping[str, Any]] = record["sites"]
    return sites


def recorded_renumbering(config: PretrainedConfig) -> Renumbering:
    """How the layers of a slim model were renumbered since it was dense."""
    return Renumbering.without(s["site"] for s in recorded_sites(config) if kind_of(s) == "layer" and not s["kept"])


def kind_of(site: Mapping[str, Any]) -> SiteKind:
    """The kind of a recorded site; plans of format 1 have attention alone."""
    kind: SiteKind = site.get("kind", "attention")
    return kind

"""Layouts: how a projection's long axis is divided among heads, in the words of a family file.

`query(unit dim) | key(unit dim) | value(unit dim)` reads: three blocks one after the other, each of them a run of
units, each unit a run of head_dim features. `unit [query key value] dim` is one block of units, each of which is a
query, a key and a value. `member` stands for the query heads that share one KV head. The input projections are divided
along their output features, `output(...)` along its input features; `position(...)` is what a head has besides the
four that the score counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict

Role = Literal["query", "key", "value", "output", "position"]

_BLOCK = re.compile(
    r"(?P<role>query|key|value|output|position)\((?P<dims>(?:unit|member|dim)(?: (?:unit|member|dim))*)\)"
)
_INTERLEAVED = re.compile(r"unit \[(?P<roles>(?:query|key|value)(?: (?:query|key|value))*)\] dim")


class Block(BaseModel):
    """One run of features, divided from the outermost to the innermost dimension; `role` is one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    roles: tuple[Role, ...]
    dims: tuple[Literal["role", "unit", "member", "dim"], ...]

    def shape(self, sizes: Mapping[str, int]) -> list[int]:
        """The size of each dimension; `sizes` gives those of unit, member and dim (1 where it is not known yet)."""
        return [len(self.roles) if dim == "role" else sizes.get(dim, 1) for dim in self.dims]

    def labels(self, sizes: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each feature of the block: unit (int64), member (int64, -1 where members share it), role (str)."""
        indices = np.indices(self.shape(sizes)).reshape(len(self.dims), -1)
        unit = indices[self.dims.index("unit")]
        member = indices[self.dims.index("member")] if "member" in self.dims else np.full_like(unit, -1)
        return unit, member, np.array(self.roles)[indices[self.dims.index("role")]]


def blocks_of(layout: str) -> tuple[Block, ...]:
    """Reads a layout.

    Raises:
        ValueError: it is not one.
    """
    return tuple(_parse(layout))


def _parse(layout: str) -> Iterator[Block]:
    interleaved = _INTERLEAVED.fullmatch(layout)
    if interleaved:
        yield Block(roles=cast(Any, tuple(interleaved["roles"].split())), dims=("unit", "role", "dim"))
        return
    for text in layout.split(" | "):
        match = _BLOCK.fullmatch(text.strip())
        if not match or "unit" not in match["dims"].split():
            raise ValueError(
                f"expected blocks like 'query(unit dim)' joined by ' | ', or 'unit [query key value] dim', got {text!r}"
            )
        yield Block(roles=(cast(Role, match["role"]),), dims=cast(Any, ("role", *match["dims"].split())))

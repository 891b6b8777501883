"""The layout language of the family files: how the features of a projection are divided among heads or neurons.

`query(unit dim) | key(unit dim) | value(unit dim)`: three blocks one after the other, each a run of units, each unit a
run of head_dim features.
`unit [query key value] dim`: one block of units, each of them a query, a key and a value.
`unit [query*member key value] dim`: the same for KV groups. `member` stands for the query heads that share one KV head,
so a unit is all its queries, then its key and its value.
`4 [query value key] unit dim`: four equal shares of the units, each with its queries, then its values, then its keys.

`expand(unit)`, `gate(unit)`: a feed-forward block's input projections, one feature per neuron; `gate(unit) |
expand(unit)` is a fused one. `contract(unit)`: its output projection.

Input projections are divided along their output features, `output(...)` and `contract(...)` along their input features.
`position(...)` features belong to a head but not to its score.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict

Role = Literal["query", "key", "value", "output", "position", "expand", "gate", "contract"]
OUTPUTS: frozenset[Role] = frozenset({"output", "contract"})  # roles of projections whose input features are divided

_BLOCK = re.compile(
    r"(?P<role>query|key|value|output|position|expand|gate|contract)"
    r"\((?P<dims>(?:unit|member|dim)(?: (?:unit|member|dim))*)\)"
)
_ROLES = r"\[(?P<roles>(?:query|key|value)(?: (?:query|key|value))*)\]"
_INTERLEAVED = re.compile(rf"unit {_ROLES} dim")
_GROUPED = "unit [query*member key value] dim"
_DIVIDED = re.compile(rf"(?P<shares>[1-9][0-9]*) {_ROLES} unit dim")


class Block(BaseModel):
    """One run of features, with its dimensions from the outermost to the innermost; `role` is one of them.

    `per_member` are the roles that a unit has once per member, before its next role. With `shares`, the units are
    divided into that many equal parts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    roles: tuple[Role, ...]
    dims: tuple[Literal["share", "role", "unit", "member", "dim"], ...]
    per_member: tuple[Role, ...] = ()
    shares: int = 1

    def labels(self, sizes: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each feature of the block: unit (int64), member (int64, -1 if the members share it), role (str).

        Args:
            sizes: the numbers of `unit`, `member` and `dim`.
        """
        parts = [(r, m) for r in self.roles for m in (range(sizes["member"]) if r in self.per_member else (-1,))]
        in_share = sizes["unit"] // self.shares
        counts = {**sizes, "role": len(parts), "share": self.shares, "unit": in_share}
        indices = np.indices([counts[dim] for dim in self.dims]).reshape(len(self.dims), -1)
        at = dict(zip(self.dims, indices, strict=True))
        unit = at["unit"] + in_share * at.get("share", np.zeros_like(at["unit"]))
        role, member = (np.array(column)[at["role"]] for column in zip(*parts, strict=True))
        return unit, at.get("member", member), role


@cache
def blocks_of(layout: str) -> tuple[Block, ...]:
    """Parses a layout.

    Raises:
        ValueError: the text is not a layout.
    """
    return tuple(_parse(layout))


def _parse(layout: str) -> Iterator[Block]:
    interleaved = _INTERLEAVED.fullmatch(layout)
    if interleaved:
        yield Block(roles=cast(Any, tuple(interleaved["roles"].split())), dims=("unit", "role", "dim"))
        return
    if layout == _GROUPED:
        yield Block(roles=("query", "key", "value"), dims=("unit", "role", "dim"), per_member=("query",))
        return
    divided = _DIVIDED.fullmatch(layout)
    if divided:
        roles, shares = cast(Any, tuple(divided["roles"].split())), int(divided["shares"])
        yield Block(roles=roles, dims=("share", "role", "unit", "dim"), shares=shares)
        return
    for text in layout.split(" | "):
        match = _BLOCK.fullmatch(text.strip())
        if not match or "unit" not in match["dims"].split():
            raise ValueError(
                f"expected blocks like 'query(unit dim)' joined by ' | ', or 'unit [query key value] dim', got {text!r}"
            )
        yield Block(roles=(cast(Role, match["role"]),), dims=cast(Any, ("role", *match["dims"].split())))

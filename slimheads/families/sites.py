"""Finds a model's attention blocks ("sites"): which rows and columns of which tensors belong to which head.

The family file describes them. Every feature of a projection gets a label: its unit and its role. Scores, gates and
deletion use only labels, so they do not depend on the family.

The units of a site with grouped queries are KV groups by default. They can also be query heads; then keys and values
belong to all heads of their group and are deleted with the last of them. The units of a multi-query site, whose heads
share one KV head, are always query heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimheads.errors import ModelRefusedError
from slimheads.families.family import (
    PLAN_KEY,
    Counted,
    Family,
    ProjectionRow,
    SiteRow,
    check_head_counts,
    family_of,
    head_count,
    site_count,
    site_pattern,
)
from slimheads.families.layout import Block, blocks_of
from slimheads.names import Unit


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
        return bool(self.role_of[0] == "output")

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


@dataclass(frozen=True)
class Table:
    """A parameter or buffer that is divided among the query heads along `axis`, `entries` for each."""

    module: str  # qualified name of its owner
    name: str
    axis: int
    entries: int

    def kept_entries(self, heads: tuple[int, ...]) -> list[int]:
        """Indices of the entries that are kept when the query heads `heads` are."""
        return [head * self.entries + entry for head in heads for entry in range(self.entries)]


@dataclass(frozen=True, eq=False)
class Site:
    """One attention block of a model in its current state."""

    name: str
    layer: int  # its index among the sites of its kind
    unit: Unit
    total: int  # current number of units
    members: int  # query heads that share one KV head
    head_dim: int
    projections: tuple[Projection, ...]
    attributes: tuple[tuple[str, str, Counted], ...]  # (qualified module, attribute, what it counts)
    tables: tuple[Table, ...] = ()
    adapter: str | None = None
    closed: bool = False  # its stock forward does not call its projections' modules (see `adapters.opened`)

    @property
    def output(self) -> Projection:
        """The output projection; gates multiply its input."""
        return next(p for p in self.projections if p.divides_inputs)

    @property
    def heads_per_unit(self) -> int:
        """Query heads in a unit."""
        return self.members if self.unit == "kv_group" else 1

    def by_head(self) -> Site:
        """The same block with query heads as units; itself if they are already."""
        if self.unit == "head":
            return self
        projections = tuple(p.by_head(self.members) for p in self.projections)
        return replace(self, unit="head", total=self.total * self.members, projections=projections)

    def kept_heads(self, kept: tuple[int, ...]) -> tuple[int, ...]:
        """The query heads that are kept when the units `kept` are."""
        width = self.heads_per_unit
        return tuple(unit * width + member for unit in kept for member in range(width))

    def kept_per_group(self, kept: tuple[int, ...]) -> dict[int, int]:
        """The number of kept query heads in each KV group that keeps any."""
        groups = [head // self.members for head in self.kept_heads(kept)]
        return {group: groups.count(group) for group in groups}

    def counted(self, what: Counted, kept: tuple[int, ...]) -> int:
        """A counting attribute after keeping `kept`: KV heads, query heads, query heads per KV head, or query width."""
        heads, groups = len(self.kept_heads(kept)), len(self.kept_per_group(kept))
        return {"units": groups, "heads": heads, "members": heads // groups, "width": heads * self.head_dim}[what]


def find_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Every attention block of a dense or slim model, in the order of its family's rows and of its modules.

    Raises:
        ModelRefusedError: the family is not covered, a tensor of its file is missing or has another size, a tensor
            of an attention block is in no row of the file, or the number of blocks is not the configured one.
    """
    _, family = family_of(model.config)
    check_head_counts(model.config, family)
    modules = dict(model.named_modules())
    sites: list[Site] = []
    for row in family.rows(model.config):
        pattern = site_pattern(row)
        found = [(name, int(m[1])) for name in modules if (m := pattern.fullmatch(name))]
        expected = site_count(model.config, row)
        if len(found) != expected:
            raise ModelRefusedError(
                f"{len(found)} modules match '{row.match}', but {row.count} gives {expected}",
                where=model.config.model_type,
                hint="the family file does not describe this model",
            )
        for layer, (name, index) in enumerate(found):
            sites.append(_read_site(model.config, family, row, modules, _Place(name, layer, index)))
    _refuse_undescribed_blocks(family, modules, [site.name for site in sites])
    return tuple(sites)


@dataclass(frozen=True)
class _Place:
    site: str
    layer: int
    index: int  # the first index in its name


def _read_site(
    config: PretrainedConfig, family: Family, row: SiteRow, modules: Mapping[str, torch.nn.Module], place: _Place
) -> Site:
    name = place.site
    dense_units, dense_heads = (head_count(config, key, place.index) for key in family.keys(row))
    members = dense_heads // dense_units
    left = _heads_left(config, name, dense_heads, members)
    units = len({head // members for head in left})
    sizes = {"unit": dense_units, "member": members}
    present = [p for p in row.projections if not (p.optional and f"{name}.{p.module}" not in modules)]
    projections = tuple(_read_projection(p, modules, name, sizes, left) for p in present)
    _refuse_undescribed_tensors(row, modules[name], name)
    site = Site(
        name=name,
        layer=place.layer,
        unit="head" if dense_units == dense_heads else "kv_group",
        total=units,
        members=len(left) // units,
        head_dim=sizes["dim"],
        projections=projections,
        attributes=tuple((*_split(f"{name}.{path}"), what) for path, what in row.attributes.items()),
        tables=tuple(_read_tables(row, modules, name, len(left), sizes["dim"])),
        adapter=row.adapter,
        closed=row.closed,
    )
    return site.by_head() if dense_units == 1 else site


def _heads_left(config: PretrainedConfig, site: str, heads: int, members: int) -> tuple[int, ...]:
    """The dense model's query heads that are left in a site by the recorded plan; `members` per KV head."""
    recorded = getattr(config, PLAN_KEY, None) or {"sites": []}
    own = next((s for s in recorded["sites"] if s["site"] == site), None)
    if own is None:
        return tuple(range(heads))
    if own["unit"] == "head":
        return tuple(own["kept"])
    return tuple(group * members + member for group in own["kept"] for member in range(members))


def _read_projection(
    projection: ProjectionRow,
    modules: Mapping[str, torch.nn.Module],
    site: str,
    sizes: dict[str, int],
    left: tuple[int, ...],
) -> Projection:
    qualified = f"{site}.{projection.module}"
    module = modules.get(qualified)
    if not isinstance(module, torch.nn.Linear | Conv1D):
        raise ModelRefusedError(
            f"expected a linear layer, found {type(module).__name__ if module else 'nothing'}",
            where=qualified,
            hint="the family file does not describe this model",
        )
    blocks = blocks_of(projection.layout)
    features = linear_features(module)[0 if blocks[0].roles == ("output",) else 1]
    # head_dim comes from the first projection and must fit all others.
    per_dim = len(_labelled(qualified, blocks, {**sizes, "dim": 1}, left).unit_of)
    sizes.setdefault("dim", features // per_dim)
    if per_dim * sizes["dim"] != features:
        raise ModelRefusedError(
            f"{features} features cannot be {projection.layout} with {sizes}",
            where=f"{qualified}.weight",
            hint="use the config.json that was saved with these weights",
        )
    return _labelled(qualified, blocks, sizes, left)


def _labelled(module: str, blocks: tuple[Block, ...], sizes: Mapping[str, int], left: tuple[int, ...]) -> Projection:
    return Projection(module, *_labels(blocks, sizes["unit"], sizes["member"], sizes["dim"], left))


@lru_cache(maxsize=64)  # most layers of a model have the same labels
def _labels(
    blocks: tuple[Block, ...], units: int, members: int, dim: int, left: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels of the features that are left of the dense model's, with units and members renumbered."""
    sizes = {"unit": units, "member": members, "dim": dim}
    unit_of, member_of, role_of = (
        np.concatenate(parts) for parts in zip(*(b.labels(sizes) for b in blocks), strict=True)
    )
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
    for array in labels:
        array.flags.writeable = False  # shared by every projection of this layout
    return labels


def _read_tables(
    row: SiteRow, modules: Mapping[str, torch.nn.Module], site: str, heads: int, head_dim: int
) -> Iterator[Table]:
    for table in row.tables:
        owner, name = _split(f"{site}.{table.tensor}")
        tensor = getattr(modules.get(owner), name, None)
        if tensor is None and table.optional:
            continue
        each = head_dim if table.entries == "head_dim" else 1
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape[table.axis : table.axis + 1]) != (heads * each,):
            size = f"a tensor of {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else "nothing"
            raise ModelRefusedError(
                f"expected {heads} heads times {each} along axis {table.axis}, found {size}",
                where=f"{owner}.{name}",
                hint="the family file does not describe this model",
            )
        yield Table(owner, name, table.axis, each)


def _refuse_undescribed_blocks(family: Family, modules: Mapping[str, torch.nn.Module], sites: Sequence[str]) -> None:
    """Refuses attention modules that are not a site, inside one or around one: their heads would never be deleted."""
    inside, around = set(sites), {parent for site in sites for parent in _parents(site)}
    for name, module in modules.items():
        is_attention = "attention" in type(module).__name__.lower() and any(True for _ in module.parameters())
        described = name in around or not inside.isdisjoint((name, *_parents(name)))
        if is_attention and not described and not any(fnmatchcase(name, glob) for glob in family.untouched):
            raise ModelRefusedError(
                f"an attention block ({type(module).__name__}) that the family file does not describe",
                where=name,
                hint="add a row for it under sites, or list it under untouched",
            )


def _parents(name: str) -> Iterator[str]:
    """Qualified names of the modules around a module, from the inside out."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def linear_features(module: torch.nn.Module) -> tuple[int, int]:
    """(input features, output features) of an `nn.Linear` (weight [out, in]) or a `Conv1D` (weight [in, out])."""
    first, second = cast(torch.Tensor, module.weight).shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def _refuse_undescribed_tensors(row: SiteRow, site: torch.nn.Module, name: str) -> None:
    owned = (*(p.module for p in row.projections), *(t.tensor for t in row.tables), *row.keep)
    for parameter, _ in site.named_parameters():
        if not any(parameter == own or parameter.startswith(f"{own}.") for own in owned):
            raise ModelRefusedError(
                "the family file does not describe this tensor",
                where=f"{name}.{parameter}",
                hint="list it under projections, tables or keep",
            )


def _split(path: str) -> tuple[str, Any]:
    owner, _, name = path.rpartition(".")
    return owner, name

"""Finds a model's sites: which rows and columns of which tensors belong to which head or neuron, and which module is
which layer.

The family file describes them. Every feature of a projection gets a label: its unit and its role. Scores, gates and
deletion use only labels, so they do not depend on the family.

The units of an attention site with grouped queries are KV groups by default. They can also be query heads; then keys
and values belong to all heads of their group and are deleted with the last of them. The units of a multi-query site,
whose heads share one KV head, are always query heads. The units of a feed-forward site are neurons. A layer is one
unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimheads.errors import ModelRefusedError
from slimheads.families.family import (
    Counted,
    Family,
    ProjectionRow,
    SiteRow,
    check_head_counts,
    family_of,
    head_count,
    holds,
    site_count,
    site_pattern,
)
from slimheads.families.projections import Projection, neurons, units
from slimheads.families.record import kind_of, out_of_ranges, recorded_renumbering, recorded_sites, stack_of
from slimheads.names import SiteKind, Unit

SiteKey = tuple[SiteKind, str]  # a site's kind and name: a feed-forward block may be the layer itself


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
    """One attention block, feed-forward block or layer of a model in its current state."""

    name: str
    kind: SiteKind
    row: SiteRow
    unit: Unit
    total: int  # current number of units
    projections: tuple[Projection, ...] = ()
    attributes: tuple[tuple[str, str, Counted], ...] = ()  # (qualified module, attribute, what it counts)
    # Of attention:
    members: int = 1  # query heads that share one KV head
    head_dim: int = 1
    tables: tuple[Table, ...] = ()
    # Of layers:
    stays: str | None = None  # why it cannot be dropped

    @property
    def key(self) -> SiteKey:
        """Kind and name."""
        return self.kind, self.name

    @property
    def stack(self) -> str:
        """The qualified name of the list of layers that a layer is in."""
        return stack_of(self.name)

    @property
    def output(self) -> Projection:
        """The output projection; gates multiply its input."""
        return next(p for p in self.projections if p.divides_inputs)

    @property
    def heads_per_unit(self) -> int:
        """Query heads in a unit."""
        return self.members if self.unit == "kv_group" else 1

    def by_head(self) -> Site:
        """The same block with query heads as units; itself where there are no KV groups."""
        if self.unit != "kv_group":
            return self
        projections = tuple(p.by_head(self.members) for p in self.projections)
        return replace(self, unit="head", total=self.total * self.members, projections=projections)

    def kept_heads(self, kept: tuple[int, ...]) -> tuple[int, ...]:
        """The query heads (or neurons) that are kept when the units `kept` are."""
        width = self.heads_per_unit
        return tuple(unit * width + member for unit in kept for member in range(width))

    def kept_per_group(self, kept: tuple[int, ...]) -> dict[int, int]:
        """The number of kept query heads in each KV group that keeps any."""
        return dict(Counter(head // self.members for head in self.kept_heads(kept)))

    def counted(self, what: Counted, kept: tuple[int, ...]) -> int:
        """A counting attribute after keeping `kept`: KV heads (or neurons), query heads, query heads per KV head, or
        query width.
        """
        heads, groups = len(self.kept_heads(kept)), len(self.kept_per_group(kept))
        return {"units": groups, "heads": heads, "members": heads // groups, "width": heads * self.head_dim}[what]


def find_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Every site of a dense or slim model, in the order of its family's rows and of its modules.

    Raises:
        ModelRefusedError: the family is not covered, a tensor of its file is missing or has another size, a tensor
            of a block or layer is in no row of the file, or the number of blocks or layers is not the configured one.
    """
    _, family = family_of(model.config)
    check_head_counts(model.config, family)
    modules = dict(model.named_modules())
    left = _left_of_attention(model.config)
    sites: list[Site] = []
    for row in family.rows(model.config):
        pattern = site_pattern(row)
        found = [(name, int(m[1])) for name in modules if (m := pattern.fullmatch(name))]
        expected = site_count(model.config, row.count) if row.count else len(found)
        if len(found) != expected:
            raise ModelRefusedError(
                f"{len(found)} modules match '{row.match}', but {row.count} gives {expected}",
                where=model.config.model_type,
                hint="the family file does not describe this model",
            )
        for name, index in found:
            if row.kind == "attention":
                sites.append(_read_attention(model.config, family, row, modules, name, index, left.get(name)))
            elif row.kind == "feed_forward":
                sites += _read_feed_forward(row, modules, name)
            else:
                sites.append(_read_layer(model.config, row, name))
    _refuse_undescribed_tensors(model, sites)
    _refuse_undescribed_blocks(family, modules, [site.name for site in sites])
    return tuple(sites)


def of_kind(sites: Iterable[Site], kind: SiteKind) -> tuple[Site, ...]:
    """The sites of one kind."""
    return tuple(site for site in sites if site.kind == kind)


def _left_of_attention(config: PretrainedConfig) -> dict[str, tuple[Unit, tuple[int, ...]]]:
    """What the recorded plan left of the dense model's attention sites, by their present names."""
    layers = recorded_renumbering(config)
    return {
        layers.new_name(s["site"]): (s["unit"], tuple(out_of_ranges(s["kept"], s["total"])))
        for s in recorded_sites(config)
        if kind_of(s) == "attention"
    }


def _read_attention(
    config: PretrainedConfig,
    family: Family,
    row: SiteRow,
    modules: Mapping[str, torch.nn.Module],
    name: str,
    index: int,
    recorded: tuple[Unit, tuple[int, ...]] | None,
) -> Site:
    """`index` is the first one in the site's name."""
    dense_units, dense_heads = (head_count(config, key, index) for key in family.keys(row))
    members = dense_heads // dense_units
    left = _heads_left(recorded, dense_heads, members)
    units = len({head // members for head in left})
    sizes = {"unit": dense_units, "member": members}
    present = _present(row, modules, name)
    projections = tuple(_read_projection(p, modules, name, sizes, left) for p in present)
    site = Site(
        name=name,
        kind="attention",
        row=row,
        unit="head" if dense_units == dense_heads else "kv_group",
        total=units,
        members=len(left) // units,
        head_dim=sizes["dim"],
        projections=projections,
        attributes=_attributes(row, name),
        tables=tuple(_read_tables(row, modules, name, len(left), sizes["dim"])),
    )
    return site.by_head() if dense_units == 1 else site


def _present(row: SiteRow, modules: Mapping[str, torch.nn.Module], name: str) -> list[ProjectionRow]:
    return [p for p in row.projections if not (p.optional and f"{name}.{p.module}" not in modules)]


def _attributes(row: SiteRow, name: str) -> tuple[tuple[str, str, Counted], ...]:
    return tuple((*_split(f"{name}.{path}"), what) for path, what in row.attributes.items())


def _heads_left(recorded: tuple[Unit, tuple[int, ...]] | None, heads: int, members: int) -> tuple[int, ...]:
    """The dense model's query heads that are left in a site by the recorded plan; `members` per KV head."""
    unit, kept = recorded or ("head", tuple(range(heads)))
    if unit == "head":
        return kept
    return tuple(group * members + member for group in kept for member in range(members))


def _read_feed_forward(row: SiteRow, modules: Mapping[str, torch.nn.Module], name: str) -> list[Site]:
    """The site; none where the module is another block, without an optional output projection."""
    present = _present(row, modules, name)
    output = next((p for p in present if p.divides_inputs), None)
    if output is None:
        return []
    width = linear_features(_linear(modules, f"{name}.{output.module}"))[0]
    projections = []
    for projection in present:
        qualified = f"{name}.{projection.module}"
        features = linear_features(_linear(modules, qualified))[0 if projection.divides_inputs else 1]
        labelled = neurons(qualified, projection.blocks, width)
        if len(labelled.unit_of) != features:
            raise ModelRefusedError(
                f"{features} features cannot be {projection.layout} of {width} neurons",
                where=f"{qualified}.weight",
                hint="use the config.json that was saved with these weights",
            )
        projections.append(labelled)
    return [Site(name, "feed_forward", row, "neuron", width, tuple(projections), _attributes(row, name))]


def _read_layer(config: PretrainedConfig, row: SiteRow, name: str) -> Site:
    first = name.endswith(".0")
    reasons = (s.because for s in row.stays if holds(config, s.when) and (s.which == "all" or first))
    return Site(name, "layer", row, "layer", 1, stays=next(reasons, None))


def _linear(modules: Mapping[str, torch.nn.Module], qualified: str) -> torch.nn.Linear | Conv1D:
    module = modules.get(qualified)
    if not isinstance(module, torch.nn.Linear | Conv1D):
        raise ModelRefusedError(
            f"expected a linear layer, found {type(module).__name__ if module else 'nothing'}",
            where=qualified,
            hint="the family file does not describe this model",
        )
    return module


def _read_projection(
    projection: ProjectionRow,
    modules: Mapping[str, torch.nn.Module],
    site: str,
    sizes: dict[str, int],
    left: tuple[int, ...],
) -> Projection:
    qualified = f"{site}.{projection.module}"
    features = linear_features(_linear(modules, qualified))[0 if projection.divides_inputs else 1]
    # head_dim comes from the first projection and must fit all others.
    per_dim = len(units(qualified, projection.blocks, {**sizes, "dim": 1}, left).unit_of)
    sizes.setdefault("dim", features // per_dim)
    if per_dim * sizes["dim"] != features:
        raise ModelRefusedError(
            f"{features} features cannot be {projection.layout} with {sizes}",
            where=f"{qualified}.weight",
            hint="use the config.json that was saved with these weights",
        )
    return units(qualified, projection.blocks, sizes, left)


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


def _refuse_undescribed_tensors(model: torch.nn.Module, sites: Sequence[Site]) -> None:
    """Refuses a parameter in a layer or block that no row of any kind describes: nobody knows what it belongs to."""
    names, owned = {site.name for site in sites}, set()
    for site in sites:
        row = site.row
        owned |= {
            f"{site.name}.{own}"
            for own in (*(p.module for p in row.projections), *(t.tensor for t in row.tables), *row.keep)
        }
    for parameter, _ in model.named_parameters():
        around = list(_parents(parameter))
        if names.isdisjoint(around) or not owned.isdisjoint((parameter, *around)):
            continue
        raise ModelRefusedError(
            "the family file does not describe this tensor",
            where=parameter,
            hint="list it under projections, tables or keep",
        )


def _split(path: str) -> tuple[str, Any]:
    owner, _, name = path.rpartition(".")
    return owner, name

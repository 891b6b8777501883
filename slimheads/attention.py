"""Reads families/ and finds a model's sites: which rows and columns of which tensors belong to which head.

A family file names, for every attention block, its projections and a *layout* for each: how the projection's long axis
is divided. `query(unit dim) | key(unit dim) | value(unit dim)` reads: three blocks one after the other, each of them a
run of units, each unit a run of head_dim features. `unit [query key value] dim` is one block of units, each of which is
a query, a key and a value. `member` stands for the query heads that share one KV head. The input projections are
divided along their output features, `output(...)` along its input features.

From that, every feature gets one label: the unit it belongs to and its role. Scores, gates and deletion read labels
only, so none of them knows any family.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimheads.errors import ModelRefusedError
from slimheads.recipe_yaml import read_yaml, validate

Unit = Literal["head", "kv_group"]
Role = Literal["query", "key", "value", "output"]
Reload = Literal["pruned_heads", "head_counts"]
PLAN_KEY = "slimheads"  # where config.json keeps the plan

_FOLDER = cast(Path, files("slimheads") / "families")
_REFUSED = _FOLDER / "refused.yaml"
_BLOCK = re.compile(r"(?P<role>query|key|value|output)\((?P<dims>(?:unit|member|dim)(?: (?:unit|member|dim))*)\)")
_INTERLEAVED = re.compile(r"unit \[(?P<roles>(?:query|key|value)(?: (?:query|key|value))*)\] dim")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Block(_Strict):
    """One run of features, divided from the outermost to the innermost dimension; `role` is one of them."""

    roles: tuple[Role, ...]
    dims: tuple[Literal["role", "unit", "member", "dim"], ...]


class ProjectionRow(_Strict):
    """A linear module of a site and how its features are laid out."""

    module: str
    layout: str

    @field_validator("layout")
    @classmethod
    def _parses(cls, layout: str) -> str:
        _blocks(layout)
        return layout


class Refusal(_Strict):
    """A configuration of the family that is not covered, and why."""

    key: str
    value: bool | int | str
    reason: str


class RefusedTypes(_Strict):
    """Model types that no family file can describe, and why."""

    model_types: tuple[str, ...]
    reason: str


class RefusedTable(_Strict):
    """families/refused.yaml."""

    refused: tuple[RefusedTypes, ...]


class SiteRow(_Strict):
    """A kind of attention block: the modules whose name ends in `match`, `*` standing for one layer index."""

    match: str
    count: str = Field(description="config key that says how many such sites a model has")
    projections: tuple[ProjectionRow, ...]
    keep: tuple[str, ...] = ()
    attributes: Mapping[str, Literal["units", "heads", "width"]] = Field(default_factory=dict)


class Family(_Strict):
    """One file of families/."""

    title: str
    model_types: tuple[str, ...]
    units: str = Field(description="config key with the number of units of a dense site")
    heads: str | None = Field(default=None, description="config key with the number of query heads, where it differs")
    reload: Reload | None = Field(default=None, description="what lets the stock library rebuild the smaller modules")
    refuse: tuple[Refusal, ...] = ()
    sites: tuple[SiteRow, ...]


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear module of a site. `unit_of[i]` and `role_of[i]` label feature i of the divided axis."""

    module: str  # qualified name in the model
    unit_of: np.ndarray  # int64 [features]
    role_of: np.ndarray  # str [features]

    @property
    def divides_inputs(self) -> bool:
        """True for the output projection: its input features are divided, its bias is not."""
        return bool(self.role_of[0] == "output")

    def kept_features(self, kept: tuple[int, ...]) -> np.ndarray:
        """Indices (int64) of the features that stay when only the units `kept` stay, in their old order."""
        return np.flatnonzero(np.isin(self.unit_of, kept))


@dataclass(frozen=True, eq=False)
class Site:
    """One attention block of a model, as it is now."""

    name: str
    layer: int
    unit: Unit
    total: int  # units it has now
    heads_per_unit: int
    head_dim: int
    projections: tuple[Projection, ...]
    attributes: tuple[tuple[str, str, str], ...]  # (qualified module, attribute, what it counts)

    @property
    def output(self) -> Projection:
        """The output projection, at whose input gates act."""
        return next(p for p in self.projections if p.divides_inputs)

    def counted(self, what: str, units: int) -> int:
        """The value of a counting attribute when `units` units stay: units, query heads or query width."""
        return {"units": 1, "heads": self.heads_per_unit, "width": self.heads_per_unit * self.head_dim}[what] * units


@cache
def families() -> Mapping[str, Family]:
    """Every family by its file's name. A damaged family file raises `UsageError` with file and line."""
    paths = sorted(path for path in _FOLDER.glob("*.yaml") if path != _REFUSED)
    return {path.stem: validate(Family, *read_yaml(path)) for path in paths}


@cache
def refused_types() -> Mapping[str, str]:
    """Why a model type is refused, by model type. A damaged table raises `UsageError` with file and line."""
    table = validate(RefusedTable, *read_yaml(_REFUSED))
    return {model_type: row.reason for row in table.refused for model_type in row.model_types}


def family_of(config: PretrainedConfig) -> tuple[str, Family]:
    """The family that covers a configuration.

    Raises:
        ModelRefusedError: no family covers its model type or can, or the family refuses this configuration.
    """
    known = {model_type: name for name, family in families().items() for model_type in family.model_types}
    if config.model_type in refused_types():
        raise ModelRefusedError(
            f"model type '{config.model_type}' is refused: {refused_types()[config.model_type]}",
            where="config.json",
            hint="see `slimheads families` for what is covered",
        )
    if config.model_type not in known:
        near = difflib.get_close_matches(str(config.model_type), known, n=1, cutoff=0.0)[0]
        raise ModelRefusedError(
            f"model type '{config.model_type}' is not covered (the nearest covered one is '{near}')",
            hint="see `slimheads families` for what is",
        )
    name = known[config.model_type]
    family = families()[name]
    for refusal in family.refuse:
        found = getattr(config, refusal.key, None)
        if (bool(found) if isinstance(refusal.value, bool) else found) == refusal.value:
            raise ModelRefusedError(
                f"{refusal.key}: {refusal.value} is refused, for {refusal.reason}",
                where=f"config.json ({config.model_type})",
                hint="use a checkpoint without it",
            )
    return name, family


def family_rows() -> list[dict[str, Any]]:
    """What `slimheads families` lists: one row a family file, as JSON data."""
    return [
        {
            "family": name,
            "title": family.title,
            "model_types": list(family.model_types),
            "unit": "head" if family.heads is None else "kv_group (head where every head has its own keys and values)",
            "layout": "fused"
            if any(mark in p.layout for mark in "|[" for site in family.sites for p in site.projections)
            else "separate",
            "reload": {
                None: "slimheads",
                "pruned_heads": "stock transformers 4, slimheads",
                "head_counts": "stock with equal counts, slimheads",
            }[family.reload],
        }
        for name, family in families().items()
    ]


def find_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Every attention block of a model, dense or slim, in the model's own order.

    Raises:
        ModelRefusedError: the family is not covered, a tensor of its file is missing or has another size, a tensor
            of an attention block is claimed by no line of the file, or the number of blocks is not the configured one.
    """
    _, family = family_of(model.config)
    check_head_counts(model.config, family)
    modules = dict(model.named_modules())
    sites: list[Site] = []
    for row in family.sites:
        pattern = _pattern(row)
        found = [(name, int(m[1])) for name in modules if (m := pattern.fullmatch(name))]
        expected = int(getattr(model.config, row.count))
        if len(found) != expected:
            raise ModelRefusedError(
                f"{len(found)} modules match '{row.match}' where {row.count} says {expected}",
                where=model.config.model_type,
                hint="the family file does not describe this model",
            )
        sites += [_read_site(model.config, family, row, modules, name, layer) for name, layer in found]
    return tuple(sites)


def is_projection(family: Family, tensor: str) -> bool:
    """Whether a checkpoint's tensor is, by its name, a projection's weight or bias in some layer of the family."""
    owner = tensor.rpartition(".")[0]
    return any(
        owner.endswith(f".{p.module}") and bool(_pattern(row).fullmatch(owner.removesuffix(f".{p.module}")))
        for row in family.sites
        for p in row.projections
    )


def dense_value(config: PretrainedConfig, key: str) -> Any:
    """A config key as it was before any deletion (a slim config may carry smaller head counts)."""
    recorded = getattr(config, PLAN_KEY, None) or {}
    return recorded.get("dense", {}).get(key, getattr(config, key))


def check_head_counts(config: PretrainedConfig, family: Family) -> None:
    """Refuses head counts that no model can have: transformers itself accepts -4 heads.

    Raises:
        ModelRefusedError: naming the config key.
    """

    def refuse(what: str) -> None:
        raise ModelRefusedError(what, where="config.json", hint="the configuration is damaged: fetch the model again")

    for key in {family.units, family.heads or family.units}:
        value = dense_value(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            refuse(f"{key} is {value!r} where a whole number of at least 1 belongs")
    heads, units = dense_value(config, family.heads or family.units), dense_value(config, family.units)
    if heads % units:
        refuse(f"{heads} query heads cannot share {units} key-value heads evenly")
    if not getattr(config, "head_dim", None) and config.hidden_size % heads:
        refuse(f"hidden_size {config.hidden_size} is not a multiple of {heads} heads")


def _pattern(row: SiteRow) -> re.Pattern[str]:
    return re.compile(r"(?:.*\.)?" + re.escape(row.match).replace(r"\*", r"(\d+)"))


def _read_site(
    config: PretrainedConfig,
    family: Family,
    row: SiteRow,
    modules: Mapping[str, torch.nn.Module],
    name: str,
    layer: int,
) -> Site:
    dense_units = dense_value(config, family.units)
    members = dense_value(config, family.heads or family.units) // dense_units
    units = _units_now(config, name, dense_units)
    sizes = {"unit": units, "member": members}
    projections = tuple(_read_projection(row, p, modules, name, sizes) for p in row.projections)
    _claim_all(row, modules[name], name)
    return Site(
        name=name,
        layer=layer,
        unit="head" if members == 1 else "kv_group",
        total=units,
        heads_per_unit=members,
        head_dim=sizes["dim"],
        projections=projections,
        attributes=tuple(
            (f"{name}.{path}".rpartition(".")[0], path.rpartition(".")[2], what)
            for path, what in row.attributes.items()
        ),
    )


def _read_projection(
    row: SiteRow, projection: ProjectionRow, modules: Mapping[str, torch.nn.Module], site: str, sizes: dict[str, int]
) -> Projection:
    qualified = f"{site}.{projection.module}"
    module = modules.get(qualified)
    if not isinstance(module, torch.nn.Linear | Conv1D):
        raise ModelRefusedError(
            f"expected a linear layer, found {type(module).__name__ if module else 'nothing'}",
            where=qualified,
            hint="the family file does not describe this model",
        )
    blocks = _blocks(projection.layout)
    features = linear_features(module)[0 if blocks[0].roles == ("output",) else 1]
    # head_dim is read off the first projection and must hold for all the others.
    per_dim = sum(int(np.prod([sizes.get(d, len(b.roles)) for d in b.dims if d != "dim"])) for b in blocks)
    sizes.setdefault("dim", features // per_dim)
    if per_dim * sizes["dim"] != features:
        raise ModelRefusedError(
            f"{features} features cannot be {projection.layout} with {sizes}",
            where=f"{qualified}.weight",
            hint="the weights do not agree with config.json",
        )
    units, roles = [], []
    for block in blocks:
        indices = np.indices([sizes.get(d, len(block.roles)) for d in block.dims]).reshape(len(block.dims), -1)
        units.append(indices[block.dims.index("unit")])
        roles.append(np.array(block.roles)[indices[block.dims.index("role")]])
    return Projection(qualified, np.concatenate(units), np.concatenate(roles))


def linear_features(module: torch.nn.Module) -> tuple[int, int]:
    """(input features, output features) of an `nn.Linear` (weight [out, in]) or a `Conv1D` (weight [in, out])."""
    first, second = cast(torch.Tensor, module.weight).shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def _units_now(config: PretrainedConfig, site: str, dense_units: int) -> int:
    recorded = getattr(config, PLAN_KEY, None)
    if not recorded:
        return dense_units
    return next((len(s["kept"]) for s in recorded["sites"] if s["site"] == site), dense_units)


def _claim_all(row: SiteRow, site: torch.nn.Module, name: str) -> None:
    owned = (*(p.module for p in row.projections), *row.keep)
    for parameter, _ in site.named_parameters():
        if not any(parameter.startswith(f"{module}.") for module in owned):
            raise ModelRefusedError(
                "no line of the family file says what becomes of this tensor",
                where=f"{name}.{parameter}",
                hint="list it under projections or keep",
            )


def _blocks(layout: str) -> tuple[Block, ...]:
    return tuple(_parse_blocks(layout))


def _parse_blocks(layout: str) -> Iterator[Block]:
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

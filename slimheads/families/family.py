"""The family files, read and checked: which model types are covered, and which are refused and why."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from transformers import PretrainedConfig

from slimheads.errors import ModelRefusedError
from slimheads.families.layout import OUTPUTS, Block, blocks_of
from slimheads.names import SiteKind
from slimheads.strict_yaml import read_yaml, validate

Reload = Literal["pruned_heads", "head_counts"]
Counted = Literal["units", "heads", "members", "width"]
PerLayer = Literal["list", "repeats"]  # "repeats" is [[entries, times], ...]
Conditions = Mapping[str, bool | int | str]
Inputs = Literal["text", "image", "text and image", "unpadded text and image", "waveform", "spectrogram"]
PLAN_KEY = "slimheads"  # the key of the plan in config.json

_FOLDER = cast(Path, files("slimheads") / "families")
_REFUSED = _FOLDER / "refused.yaml"
_NEURON_ROLES = frozenset({"expand", "gate", "contract"})


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ProjectionRow(_Strict):
    """A linear module of a site and the layout of its features."""

    module: str
    layout: str
    optional: bool = Field(default=False, description="whether some configurations do not have it")

    @field_validator("layout")
    @classmethod
    def _parses(cls, layout: str) -> str:
        blocks_of(layout)
        return layout

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The parsed layout."""
        return blocks_of(self.layout)

    @property
    def divides_inputs(self) -> bool:
        """Whether this is the output projection, whose input features are divided."""
        return self.blocks[0].roles[0] in OUTPUTS


class TableRow(_Strict):
    """A parameter or buffer of an attention block that is divided among its query heads along one axis."""

    tensor: str
    axis: int
    entries: Literal["one", "head_dim"] = Field(default="one", description="entries per head")
    optional: bool = Field(default=False, description="whether some sites or configurations do not have it")


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


class Stays(_Strict):
    """Layers that cannot be dropped, and why."""

    which: Literal["first", "all"]
    because: str
    when: Conditions = Field(default_factory=dict, description="values that the configuration must have")


class SiteRow(_Strict):
    """The sites of one kind that are the modules whose name ends in `match`, `*` standing for an index.

    Config keys may be dotted, to reach into a part's own configuration. A list is taken by the first index (head
    counts) or added up (`count`); `a * b` is a product.
    """

    kind: SiteKind = "attention"
    match: str
    when: Conditions = Field(
        default_factory=dict, description="values that the configuration must have for the row to apply"
    )
    count: str | None = Field(
        default=None, description="config key with the number of such sites; of layers, it becomes smaller with them"
    )
    projections: tuple[ProjectionRow, ...] = ()
    keep: tuple[str, ...] = Field(default=(), description="tensors inside that belong to no unit")
    attributes: Mapping[str, Counted] = Field(default_factory=dict)
    # Of attention:
    units: str | int | None = Field(
        default=None, description="if different from the family's; 1 in a multi-query block without a key for it"
    )
    heads: str | None = Field(default=None, description="if different from the family's, or from the row's units")
    tables: tuple[TableRow, ...] = ()
    adapter: str | None = Field(
        default=None, description="a function of slimheads.families.adapters, for what data cannot describe"
    )
    closed: bool = Field(
        default=False, description="whether the stock forward reads weights without calling their modules"
    )
    # Of feed-forward blocks:
    width: str | None = Field(default=None, description="config key of the width, and of nothing else")
    # Of layers:
    same: tuple[str, ...] = Field(default=(), description="further config keys that hold the number of layers")
    per_layer: Mapping[str, PerLayer] = Field(
        default_factory=dict, description="config lists with an entry per layer, and their form"
    )
    stays: tuple[Stays, ...] = ()

    @model_validator(mode="after")
    def _fits_its_kind(self) -> SiteRow:
        roles = {role for projection in self.projections for block in projection.blocks for role in block.roles}
        outputs = [projection for projection in self.projections if projection.divides_inputs]
        if self.kind == "layer":
            right = not self.projections and self.count is not None
        else:
            neurons = self.kind == "feed_forward"
            right = len(outputs) == 1 and all((role in _NEURON_ROLES) == neurons for role in roles)
        if not right:
            raise ValueError(f"the projections or the count of '{self.match}' are not those of kind {self.kind}")
        return self

    @property
    def layer_keys(self) -> tuple[str, ...]:
        """The config keys that hold the number of these layers, in all or by stage; none where it is a product."""
        return (self.count, *self.same) if self.count and " * " not in self.count else ()


class Positions(_Strict):
    """The number of positions of a family's models."""

    key: str | None = Field(
        default="max_position_embeddings", description="config key, possibly dotted; null if there is no limit"
    )
    after_padding: tuple[str, ...] = Field(
        default=(), description="model types whose table of positions starts after the padding token's index"
    )


class Family(_Strict):
    """One file of families/."""

    title: str
    model_types: tuple[str, ...]
    units: str | None = Field(default=None, description="config key with the number of units of a dense site")
    heads: str | None = Field(default=None, description="config key with the number of query heads, if different")
    reload: Reload | None = Field(default=None, description="how plain transformers can rebuild the smaller modules")
    inputs: Inputs = Field(default="text", description="the kind of the models' inputs")
    positions: Positions = Positions()
    refuse: tuple[Refusal, ...] = ()
    sites: tuple[SiteRow, ...]
    untouched: tuple[str, ...] = Field(default=(), description="globs of attention modules that keep all heads")

    @model_validator(mode="after")
    def _names_units(self) -> Family:
        if self.units is None and any(row.kind == "attention" and row.units is None for row in self.sites):
            raise ValueError("neither the family nor each of its sites names units")
        if self.heads is not None and self.units is None:
            raise ValueError("heads of the family belong to units of the family, and it names none")
        return self

    def rows(self, config: PretrainedConfig, kind: SiteKind | None = None) -> tuple[SiteRow, ...]:
        """The rows, of all kinds or of one, that apply to a configuration."""
        return tuple(row for row in self.sites if kind in (None, row.kind) and holds(config, row.when))

    def keys(self, row: SiteRow) -> tuple[str | int, str | int]:
        """The config keys (or numbers) for a row's units (heads or KV heads) and for its query heads."""
        units = cast("str | int", row.units or self.units)
        return units, row.heads or (None if row.units else self.heads) or units

    @property
    def head_keys(self) -> tuple[str, ...]:
        """The config keys of head counts that a slim configuration overwrites, sorted."""
        if self.reload != "head_counts":
            return ()
        attention = (row for row in self.sites if row.kind == "attention")
        return tuple(sorted({key for row in attention for key in self.keys(row) if isinstance(key, str)}))

    @property
    def recorded_keys(self) -> frozenset[str]:
        """The config keys that a slim configuration may overwrite, so that their dense values are recorded."""
        widths = (row.width for row in self.sites if row.width)
        layers = (key for row in self.sites if row.kind == "layer" for key in (*row.layer_keys, *row.per_layer))
        return frozenset((*self.head_keys, *widths, *layers))


@cache
def families() -> Mapping[str, Family]:
    """Every family by the name of its file. A damaged family file raises `UsageError` with file and line."""
    paths = sorted(path for path in _FOLDER.glob("*.yaml") if path != _REFUSED)
    return {path.stem: validate(Family, *read_yaml(path)) for path in paths}


@cache
def refused_types() -> Mapping[str, str]:
    """The reason for refusing a model type, by model type. A damaged table raises `UsageError` with file and line."""
    table = validate(RefusedTable, *read_yaml(_REFUSED))
    return {model_type: row.reason for row in table.refused for model_type in row.model_types}


def covered_types() -> Mapping[str, str]:
    """The name of the family that covers a model type, by model type."""
    return {model_type: name for name, family in families().items() for model_type in family.model_types}


def family_named(model_type: str) -> tuple[str, Family]:
    """The family that covers a model type; transformers is not used.

    Raises:
        ModelRefusedError: no family covers it, or it is refused.
    """
    known = covered_types()
    if model_type in refused_types():
        raise ModelRefusedError(
            f"model type '{model_type}' is refused: {refused_types()[model_type]}",
            where="config.json",
            hint="run `slimheads families` for the covered model types",
        )
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, n=1, cutoff=0.0)[0]
        raise ModelRefusedError(
            f"model type '{model_type}' is not covered (the nearest covered one is '{near}')",
            where="config.json",
            hint="run `slimheads families` for the covered model types",
        )
    return known[model_type], families()[known[model_type]]


def family_of(config: PretrainedConfig) -> tuple[str, Family]:
    """The family that covers a configuration.

    Raises:
        ModelRefusedError: no family covers its model type, or the type or this configuration is refused.
    """
    name, family = family_named(str(config.model_type))
    for refusal in family.refuse:
        if holds(config, {refusal.key: refusal.value}):
            raise ModelRefusedError(
                f"{refusal.key}: {refusal.value} is refused because {refusal.reason}",
                where=f"config.json ({config.model_type})",
                hint="use a checkpoint without it",
            )
    return name, family


def is_projection(family: Family, tensor: str) -> bool:
    """Whether a checkpoint's tensor is, by its name, the weight or bias of a projection in the family."""
    owner = tensor.rpartition(".")[0]
    return any(
        owner.endswith(f".{p.module}") and bool(site_pattern(row).fullmatch(owner.removesuffix(f".{p.module}")))
        for row in family.sites
        for p in row.projections
    )


def site_pattern(row: SiteRow) -> re.Pattern[str]:
    """The pattern of the qualified names of a row's modules; its groups are their indices."""
    return re.compile(r"(?:.*\.)?" + re.escape(row.match).replace(r"\*", r"(\d+)"))


def site_count(config: PretrainedConfig, count: str) -> int:
    """The number of sites by the `count` of a row."""
    factors = (lookup(config, key.strip()) for key in count.split(" * "))
    return math.prod(sum(factor) if isinstance(factor, list | tuple) else int(factor) for factor in factors)


def head_count(config: PretrainedConfig, key: str | int, index: int) -> int:
    """The dense number of heads, by a config key (or a number), for the site with this first index."""
    value = dense_value(config, key)
    return int(value[index] if isinstance(value, list | tuple) else value)


def dense_value(config: PretrainedConfig, key: str | int) -> Any:
    """A config key's value before any deletion (a slim config may have smaller counts); a number is its own value."""
    if isinstance(key, int):
        return key
    recorded = getattr(config, PLAN_KEY, None) or {}
    return recorded["dense"][key] if key in recorded.get("dense", {}) else lookup(config, key)


def holds(config: PretrainedConfig, conditions: Conditions) -> bool:
    """Whether a configuration has these values; a missing or empty key counts as false."""
    found = {key: lookup(config, key, optional=True) for key in conditions}
    return all(
        bool((bool(found[key]) if isinstance(value, bool) else found[key]) == value)
        for key, value in conditions.items()
    )


def lookup(config: Any, key: str, *, optional: bool = False) -> Any:
    """The value of a config key, which may be dotted; None for a missing one that is optional.

    Raises:
        AttributeError: the key is missing and not optional.
    """
    for part in key.split("."):
        config = getattr(config, part, None) if optional else getattr(config, part)
    return config


def assign(config: Any, key: str, value: Any) -> None:
    """Sets a config key, which may be dotted."""
    owner, _, name = key.rpartition(".")
    setattr(lookup(config, owner) if owner else config, name, value)


def check_head_counts(config: PretrainedConfig, family: Family) -> None:
    """Refuses impossible head counts, since transformers accepts even -4 heads.

    Raises:
        ModelRefusedError: naming the config key.
    """

    def refuse(what: str) -> None:
        raise ModelRefusedError(what, where="config.json", hint="correct it, or use the config.json of these weights")

    for row in family.rows(config, "attention"):
        units_key, heads_key = family.keys(row)
        for key in (units_key, heads_key):
            for value in _each(dense_value(config, key)):
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    refuse(f"{key} is {value!r}, but must be a whole number of at least 1")
        pairs = zip(_each(dense_value(config, heads_key)), _each(dense_value(config, units_key)), strict=True)
        for heads, units in pairs:
            if heads % units:
                refuse(f"{heads} query heads cannot share {units} key-value heads evenly")
        heads = dense_value(config, heads_key)
        part = str(heads_key).rpartition(".")[0]
        owner = lookup(config, part) if part else config
        hidden = getattr(owner, "hidden_size", None)
        fixed = getattr(owner, "head_dim", None)
        if isinstance(heads, int) and hidden is not None and not fixed and hidden % heads:
            refuse(f"hidden_size {hidden} is not a multiple of {heads} heads")


def _each(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, list | tuple) else (value,)

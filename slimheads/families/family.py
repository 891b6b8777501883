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
from slimheads.families.layout import blocks_of
from slimheads.strict_yaml import read_yaml, validate

Reload = Literal["pruned_heads", "head_counts"]
Counted = Literal["units", "heads", "members", "width"]
Inputs = Literal["text", "image", "text and image", "unpadded text and image", "waveform", "spectrogram"]
PLAN_KEY = "slimheads"  # the key of the plan in config.json

_FOLDER = cast(Path, files("slimheads") / "families")
_REFUSED = _FOLDER / "refused.yaml"


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


class TableRow(_Strict):
    """A parameter or buffer of a site that is divided among its query heads along one axis."""

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


class SiteRow(_Strict):
    """A kind of attention block: the modules whose name ends in `match`, `*` standing for an index.

    Config keys may be dotted, to reach into a part's own configuration. A list is taken by the first index (head
    counts) or added up (`count`); `a * b` is a product.
    """

    match: str
    when: Mapping[str, bool | int | str] = Field(
        default_factory=dict, description="values that the configuration must have for the row to apply"
    )
    count: str = Field(description="config key with the number of such sites")
    units: str | int | None = Field(
        default=None, description="if different from the family's; 1 in a multi-query block without a key for it"
    )
    heads: str | None = Field(default=None, description="if different from the family's, or from the row's units")
    projections: tuple[ProjectionRow, ...]
    tables: tuple[TableRow, ...] = ()
    keep: tuple[str, ...] = ()
    attributes: Mapping[str, Counted] = Field(default_factory=dict)
    adapter: str | None = Field(
        default=None, description="a function of slimheads.families.adapters, for what data cannot describe"
    )
    closed: bool = Field(
        default=False, description="whether the stock forward reads weights without calling their modules"
    )


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
        if self.units is None and any(row.units is None for row in self.sites):
            raise ValueError("neither the family nor each of its sites names units")
        if self.heads is not None and self.units is None:
            raise ValueError("heads of the family belong to units of the family, and it names none")
        return self

    def rows(self, config: PretrainedConfig) -> tuple[SiteRow, ...]:
        """The rows that apply to a configuration."""
        return tuple(row for row in self.sites if all(_has(config, key, value) for key, value in row.when.items()))

    def keys(self, row: SiteRow) -> tuple[str | int, str | int]:
        """The config keys (or numbers) for a row's units (heads or KV heads) and for its query heads."""
        units = cast("str | int", row.units or self.units)
        return units, row.heads or (None if row.units else self.heads) or units

    @property
    def count_keys(self) -> tuple[str, ...]:
        """Every config key that holds a number of heads, sorted."""
        return tuple(sorted({key for row in self.sites for key in self.keys(row) if isinstance(key, str)}))

    @property
    def recorded_keys(self) -> tuple[str, ...]:
        """The keys that a slim configuration overwrites, so that their dense values are recorded."""
        return self.count_keys if self.reload == "head_counts" else ()


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
        if _has(config, refusal.key, refusal.value):
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


def site_count(config: PretrainedConfig, row: SiteRow) -> int:
    """The number of sites of a row's kind, by the configuration."""
    factors = (_lookup(config, key.strip()) for key in row.count.split(" * "))
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
    return recorded["dense"][key] if key in recorded.get("dense", {}) else _lookup(config, key)


def _has(config: PretrainedConfig, key: str, value: bool | int | str) -> bool:
    """Whether a configuration has this value; a missing or empty key counts as false."""
    found = getattr(config, key, None)
    return bool((bool(found) if isinstance(value, bool) else found) == value)


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def check_head_counts(config: PretrainedConfig, family: Family) -> None:
    """Refuses impossible head counts, since transformers accepts even -4 heads.

    Raises:
        ModelRefusedError: naming the config key.
    """

    def refuse(what: str) -> None:
        raise ModelRefusedError(what, where="config.json", hint="correct it, or use the config.json of these weights")

    for row in family.rows(config):
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
        owner = _lookup(config, part) if part else config
        hidden = getattr(owner, "hidden_size", None)
        fixed = getattr(owner, "head_dim", None)
        if isinstance(heads, int) and hidden is not None and not fixed and hidden % heads:
            refuse(f"hidden_size {hidden} is not a multiple of {heads} heads")


def _each(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, list | tuple) else (value,)

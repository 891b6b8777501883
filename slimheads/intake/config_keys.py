"""allowed.yaml, read and checked: which config keys the installed transformers uses, which it ignores, and which load
code.

A key that is in none of these tables and unknown to the model's configuration class is refused, because it may change
what the model computes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict
from transformers import GenerationConfig, PretrainedConfig

from slimheads.strict_yaml import read_yaml, validate

_FILE = cast(Path, files("slimheads.intake") / "allowed.yaml")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RefusedKeys(_Strict):
    """Keys that must not have a value in any model, with the reason."""

    keys: tuple[str, ...]
    reason: str
    hint: str


class KeysOfTypes(_Strict):
    """Further keys that the code of some model types reads."""

    model_types: tuple[str, ...]
    keys: tuple[str, ...]


class Allowed(_Strict):
    """allowed.yaml; its comments explain each list."""

    name_code: tuple[str, ...]
    origin: tuple[str, ...]
    refused: tuple[RefusedKeys, ...]
    also_read: tuple[KeysOfTypes, ...]
    rotary: tuple[str, ...]
    harmless: tuple[str, ...]
    sizes: tuple[str, ...]
    harmless_names: tuple[str, ...]
    harmless_while: Mapping[str, str | int]
    tokenizers: tuple[str, ...]
    newer_tokenizers: tuple[str, ...]


@cache
def allowed() -> Allowed:
    """The tables of allowed.yaml."""
    return validate(Allowed, *read_yaml(_FILE))


def refusal_of(key: str) -> RefusedKeys | None:
    """The row that refuses a key, if there is one."""
    return next((row for row in allowed().refused if key in row.keys), None)


def known_keys(config_class: type[PretrainedConfig]) -> frozenset[str]:
    """The keys that a configuration class accepts and stores, from its signature and from an instance."""
    taken = {
        name
        for part in config_class.__mro__
        if "__init__" in vars(part)
        for name in inspect.signature(vars(part)["__init__"]).parameters
    } - {"self", "args", "kwargs"}
    kept = {*vars(config_class()), *config_class.attribute_map, *config_class.attribute_map.values()}
    also = {key for row in allowed().also_read if config_class.model_type in row.model_types for key in row.keys}
    rotary = allowed().rotary if {"rope_theta", "rotary_emb_base", "global_rope_theta"} & taken else ()
    return frozenset(taken | kept | also | {*rotary})


def means_nothing(key: str, value: Any) -> bool:
    """Whether a key that the configuration class does not know has no effect on what the model computes."""
    tables = allowed()
    if key in tables.harmless_while:
        return bool(value == tables.harmless_while[key])
    named = any(re.fullmatch(pattern, key) for pattern in tables.harmless_names)
    return named or key in {*tables.harmless, *tables.sizes, *_generation_keys()}


@cache
def _generation_keys() -> frozenset[str]:
    """Keys of generation_config.json, which older checkpoints have in config.json."""
    return frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))


def is_tokenizer(name: object) -> bool:
    """Whether a `tokenizer_class` is allowed: a known one, or one of transformers 5 that version 4 does not find."""
    tables = allowed()
    return isinstance(name, str) and (name.removesuffix("Fast") in tables.tokenizers or name in tables.newer_tokenizers)

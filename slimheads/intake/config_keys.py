"""allowed.yaml, read and checked: which keys of a configuration mean something to the loaded transformers, which mean
nothing, and which load code.

A key that is in none of its tables, and that the model's own configuration class does not know, is refused: it may
change what the model computes.
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
    """Keys that no model may have with a value, and why."""

    keys: tuple[str, ...]
    reason: str
    hint: str


class KeysOfTypes(_Strict):
    """What the code of some model types reads besides."""

    model_types: tuple[str, ...]
    keys: tuple[str, ...]


class Allowed(_Strict):
    """allowed.yaml, which says what each list is for."""

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
    """The tables."""
    return validate(Allowed, *read_yaml(_FILE))


def refusal_of(key: str) -> RefusedKeys | None:
    """Why no model may have this key with a value, where that is so."""
    return next((row for row in allowed().refused if key in row.keys), None)


def known_keys(config_class: type[PretrainedConfig]) -> frozenset[str]:
    """What a configuration class of transformers takes and keeps, by its signature and by an instance of it."""
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
    """Whether a key that the configuration class does not know changes nothing that the model computes."""
    tables = allowed()
    if key in tables.harmless_while:
        return bool(value == tables.harmless_while[key])
    named = any(re.fullmatch(pattern, key) for pattern in tables.harmless_names)
    return named or key in {*tables.harmless, *tables.sizes, *_generation_keys()}


@cache
def _generation_keys() -> frozenset[str]:
    """What belongs to generation_config.json and stood in config.json before that existed."""
    return frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))


def is_tokenizer(name: object) -> bool:
    """Whether a `tokenizer_class` may be looked up, or is one of transformers 5 that no lookup finds."""
    tables = allowed()
    return isinstance(name, str) and (name.removesuffix("Fast") in tables.tokenizers or name in tables.newer_tokenizers)

"""Reads a model's JSON files and finds keys that name code, at any depth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimheads.errors import ModelRefusedError
from slimheads.intake.config_keys import allowed

AGAIN = "fetch the model again"
_DEEPEST = 64  # levels of nesting
_LABELS = {"id2label", "label2id"}  # whose keys are the user's own words


def read_json(path: Path, hint: str = AGAIN) -> Any:
    """A JSON file of a model; `hint` says what to do if it cannot be read.

    Raises:
        FileNotFoundError: there is none.
        ModelRefusedError: it is not JSON, or not a regular file.
    """
    if path.exists() and not path.is_file():
        raise ModelRefusedError("is not a regular file", where=str(path), hint=hint)
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        _check_depth(data)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelRefusedError(f"not readable as JSON ({error})", where=str(path), hint=hint) from error
    return data


def read_json_as(path: Path, kind: type, hint: str = AGAIN) -> Any:
    """A JSON file of a model that holds an object (`kind` is dict) or a list; None if there is no such file.

    Raises:
        ModelRefusedError: it is not JSON, or holds something else.
    """
    if not path.is_file():
        return None
    data = read_json(path, hint)
    if not isinstance(data, kind):
        named = "object" if kind is dict else kind.__name__
        raise ModelRefusedError(f"not a JSON {named}", where=str(path), hint=hint)
    return data


def all_keys(data: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every key at any depth: the place of its object, the key, its value."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield place, key, value
            if key not in _LABELS:
                yield from all_keys(value, f"{place}.{key}")
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from all_keys(value, f"{place}[{number}]")


def all_objects(data: Any) -> Iterator[dict[str, Any]]:
    """Every object at any depth, outermost first."""
    if isinstance(data, dict):
        yield data
    yield from (value for _, _, value in all_keys(data) if isinstance(value, dict))


def without_code(data: Any, path: Path) -> Any:
    """The data without keys that name code, at any depth; config.json also without keys about the model's origin.

    Raises:
        ModelRefusedError: a key names a kernel to download and run.
    """
    if isinstance(data, list):
        return [without_code(value, path) for value in data]
    if not isinstance(data, dict):
        return data
    refuse_kernels(data, path)
    is_config = path.name == "config.json"
    dropped = (*allowed().name_code, *(allowed().origin if is_config else ()))
    return {
        key: value if key in _LABELS else without_code(value, path)
        for key, value in data.items()
        if key not in dropped and not (is_config and "_implementation" in key)
    }


def refuse_kernels(data: dict[str, Any], path: Path) -> None:
    """Refuses keys that name a hub "kernel", which transformers 4.56 to 5.2 download and run (CVE-2026-4372).

    Raises:
        ModelRefusedError: naming the file and the key.
    """
    for key, value in data.items():
        if "_implementation" in key and "/" in json.dumps(value):
            raise ModelRefusedError(
                f"'{key}' names code to download and run", where=str(path), hint="do not use this checkpoint"
            )


def _check_depth(data: Any) -> None:
    """Deeper nesting than any configuration has would overflow the recursion of later walks."""
    level = [data]
    for _ in range(_DEEPEST):
        level = [v for d in level if isinstance(d, dict | list) for v in (d.values() if isinstance(d, dict) else d)]
    if level:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

"""Translates tokenizer_config.json from transformers 5 so that versions 4 and 5 can both read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimheads.errors import ModelRefusedError
from slimheads.intake.json_files import read_json_as

TOKENIZER_SETTINGS = "tokenizer_config.json"
# transformers 5's name for PreTrainedTokenizerFast, a tokenizer that is entirely in tokenizer.json.
_BACKEND = "TokenizersBackend"
# Keys that make a client read further files or run code.
_LEADING_ELSEWHERE = {"auto_map", "init_inputs", "fast_tokenizer_files"}
_OF_FIVE = {"backend", "is_local", "model_specific_special_tokens"}


def tokenizer_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in a form that both major versions of transformers read; None if there is no such file.

    A list under `extra_special_tokens` moves to `additional_special_tokens`, which both versions read.

    Raises:
        ModelRefusedError: the file is damaged, or has values that neither version can read.
    """
    settings = read_json_as(folder / TOKENIZER_SETTINGS, dict)
    if settings is None:
        return None
    _check_types(folder, settings)
    made = {key: value for key, value in settings.items() if not (value and _leads_elsewhere(key))}
    listed, named = settings.get("extra_special_tokens"), settings.get("model_specific_special_tokens")
    if isinstance(listed, list):
        del made["extra_special_tokens"]
        tokens = [*(settings.get("additional_special_tokens") or []), *(_content(folder, token) for token in listed)]
        made["additional_special_tokens"] = [token for n, token in enumerate(tokens) if token not in tokens[:n]]
    if isinstance(named, dict) and named and not made.get("extra_special_tokens"):
        made["extra_special_tokens"] = named
    if settings.get("tokenizer_class") == _BACKEND:
        if not (folder / "tokenizer.json").is_file():
            raise _refuse(folder, f"{_BACKEND} needs a tokenizer.json, but there is none")
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
    return made if made == settings else {key: value for key, value in made.items() if key not in _OF_FIVE}


def translated(folder: Path) -> dict[str, Any] | None:
    """The settings if they must differ from the file; None if the file can be copied unchanged."""
    made = tokenizer_settings(folder)
    return None if made == read_json_as(folder / TOKENIZER_SETTINGS, dict) else made


def _check_types(folder: Path, settings: dict[str, Any]) -> None:
    name, length = settings.get("tokenizer_class"), settings.get("model_max_length")
    if not isinstance(name, str | None):
        raise _refuse(folder, "tokenizer_class is not a name")
    if isinstance(length, bool) or not isinstance(length, int | float | None) or (length is not None and length < 1):
        raise _refuse(folder, "model_max_length is not a number of tokens")
    if not isinstance(settings.get("extra_special_tokens"), list | dict | None):
        raise _refuse(folder, "extra_special_tokens is neither a list nor names with their tokens")
    if not isinstance(settings.get("additional_special_tokens"), list | None):
        raise _refuse(folder, "additional_special_tokens is not a list")


def _leads_elsewhere(key: str) -> bool:
    # Many versions write special_tokens_map_file, and none reads it.
    return key in _LEADING_ELSEWHERE or (key.endswith("_file") and key != "special_tokens_map_file")


def _content(folder: Path, token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise _refuse(folder, "extra_special_tokens has something that is not a token")
    return text


def _refuse(folder: Path, what: str) -> ModelRefusedError:
    return ModelRefusedError(what, where=str(folder / TOKENIZER_SETTINGS), hint="fetch the model folder again")

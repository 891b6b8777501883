"""Checks the JSON files of a model except config.json for anything that a client would load because they name it.

Classes must be on an allow-list, files and repositories elsewhere are refused, and keys that name code do not ship.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from slimheads.errors import ModelRefusedError
from slimheads.intake.config_keys import allowed, is_tokenizer
from slimheads.intake.json_files import AGAIN, all_keys, all_objects, read_json, refuse_kernels, without_code

_CLASSES = ("processor_class", "image_processor_type", "feature_extractor_type", "video_processor_type")
# Keys that name files and repositories elsewhere. Others in tokenizer_config.json are ignored and do not ship (see
# tokenizer_settings), because older versions wrote the former paths of files there.
_ELSEWHERE = ("tokenizer_name_or_path", "model_name_or_path", "transformers_weights", "mecab_option")
# Layers that sentence-transformers imports by dotted name.
_IMPORTED = ("activation_function", "activation_fn", "sbert_ce_default_activation_function")
# Files that transformers or sentence-transformers read by name; a damaged one is refused.
_READ_BY_NAME = {
    *("tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json", "processor_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
}
_VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json"}  # their keys are tokens
_LARGEST = 2**24  # bytes of a file that is read for its keys


def check_side_file(path: Path) -> None:
    """Checks one JSON file.

    Raises:
        ModelRefusedError: naming the file and the key.
    """
    data = _content(path)
    if path.name == "tokenizer_config.json" and not isinstance(data, dict):
        raise ModelRefusedError("is not a JSON object", where=str(path), hint=AGAIN)
    for _, key, value in all_keys(data):
        if value is not None:
            _check_key(key, value, path)
    for found in all_objects(data):
        refuse_kernels(found, path)
        refuse_imports(found, path)


def strip_code(path: Path) -> None:
    """Rewrites a JSON file without the keys that name code, if it has any."""
    if names_code(path):
        clean = without_code(_content(path), path)
        path.write_text(json.dumps(clean, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def names_code(path: Path) -> list[str]:
    """The keys of a JSON file that name code. They do not ship."""
    return sorted({key for _, key, _ in all_keys(_content(path)) if key in allowed().name_code})


def refuse_imports(data: dict[str, Any], path: Path) -> None:
    """Refuses a layer that would be imported from outside torch.

    Raises:
        ModelRefusedError: naming the file and the key.
    """
    for key in _IMPORTED:
        value = data.get(key)
        if isinstance(value, str) and "." in value and not re.fullmatch(r"torch\.nn(\.\w+)+", value):
            refuse_class(key, value, path)


def refuse_class(key: str, value: object, path: Path) -> NoReturn:
    """Refuses a class that is not on the allow-list.

    Raises:
        ModelRefusedError: naming the file and the key.
    """
    raise ModelRefusedError(
        f"'{key}' names {value!r}, which is not on the list of allowed classes",
        where=str(path),
        hint="use a class of transformers or sentence-transformers for this kind of model",
    )


def _content(path: Path) -> Any:
    """A file's content; None for a vocabulary, a large file, or a damaged file that no library reads by name."""
    if path.name in _VOCABULARIES or path.stat().st_size > _LARGEST:
        return None
    try:
        return read_json(path)
    except ModelRefusedError:
        if path.name in _READ_BY_NAME:
            raise
        return None


def _check_key(key: str, value: Any, path: Path) -> None:
    if key == "tokenizer_class" and not is_tokenizer(value):
        refuse_class(key, value, path)
    if key in _CLASSES and not (isinstance(value, str) and value in _processors()):
        refuse_class(key, value, path)
    if key in _ELSEWHERE and value:
        raise ModelRefusedError(
            f"'{key}' names a file or repository outside this folder", where=str(path), hint="remove the key"
        )


@cache
def _processors() -> frozenset[str]:
    """Processors, image processors and feature extractors of transformers, by current and former names."""
    tables = (FEATURE_EXTRACTOR_MAPPING_NAMES, IMAGE_PROCESSOR_MAPPING_NAMES, PROCESSOR_MAPPING_NAMES)
    listed = [names if isinstance(names, tuple | list) else (names,) for table in tables for names in table.values()]
    found = {name for names in listed for name in names if name} | {"Wav2Vec2ProcessorWithLM"}
    earlier = {name.replace("ImageProcessor", "FeatureExtractor") for name in found}
    return frozenset(found | earlier | {f"{name}Fast" for name in found if name.endswith("ImageProcessor")})

"""The checks of a model folder before transformers builds a class from it or a file is copied.

1. Every file is a regular file inside the folder; only links into the hub cache's blobs may lead out of it.
2. The model type is covered, and every nested configuration is one that this type has.
3. Every key of config.json is known to the installed transformers for this type, or known to have no effect. Keys that
   name code, a kernel, another file or another repository are refused, or left out with a notice.
4. Tokenizers, processors and modules named in the other JSON files are on an allow-list.
5. An index names only safetensors files in its own folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from slimheads.errors import ModelRefusedError
from slimheads.families.family import covered_types, family_named
from slimheads.intake.config_keys import is_tokenizer, known_keys, means_nothing, refusal_of
from slimheads.intake.json_files import AGAIN, all_keys, all_objects, read_json, without_code
from slimheads.intake.model_files import is_read, refuse_link, refuse_links
from slimheads.intake.rope import in_keys_of_4
from slimheads.intake.side_json import check_side_file, names_code, refuse_class, refuse_imports
from slimheads.notices import notify


def examine(folder: Path) -> None:
    """Checks a folder's files and its JSON files except config.json, with a notice for keys that will not ship.

    Raises:
        ModelRefusedError: naming the file, and the key.
    """
    refuse_links(folder)
    for path in sorted(folder.rglob("*.json")):
        if is_read(path.relative_to(folder)) and path.is_file():
            if path != folder / "config.json":
                check_side_file(path)
            for key in names_code(path):
                notify(f"{path.relative_to(folder)}: '{key}' names code: it is ignored and left out of slim/")


def checked_config(folder: Path) -> dict[str, Any]:
    """config.json with the keys that matter, as transformers 4 writes them. No class is built from it.

    Raises:
        FileNotFoundError: there is no config.json.
        ModelRefusedError: it is damaged, of an uncovered model type, or has a refused key.
    """
    path = folder / "config.json"
    if path.is_symlink():
        refuse_link(folder, path)
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str) or not data["model_type"]:
        raise ModelRefusedError("no model_type", where=str(path), hint=_add_model_type(data))
    clean = without_code(data, path)
    model_type = clean["model_type"]
    family_named(model_type)
    if model_type not in CONFIG_MAPPING:
        raise ModelRefusedError(
            f"unknown to transformers: '{model_type}'", where=str(path), hint="use a covered family"
        )
    names = clean.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ModelRefusedError("architectures is not a list of names", where=str(path), hint=AGAIN)
    if clean.get("tokenizer_class") is not None and not is_tokenizer(clean["tokenizer_class"]):
        refuse_class("tokenizer_class", clean["tokenizer_class"], path)
    for found in all_objects(clean):
        refuse_imports(found, path)
    config_class: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return _known(in_keys_of_4(clean, model_type, known_keys(config_class), str(path)), config_class, "", path)


def _known(data: dict[str, Any], config_class: type[PretrainedConfig], part: str, path: Path) -> dict[str, Any]:
    """The keys that the class knows or that have no effect; `part` is the path of a nested configuration."""
    known, parts = known_keys(config_class), _parts(config_class)
    clean: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{part}{key}"
        if refused := refusal_of(key):
            if not _is_empty(value):
                raise ModelRefusedError(f"'{where}' is refused: {refused.reason}", where=str(path), hint=refused.hint)
        elif key in parts and isinstance(value, dict):
            clean[key] = _part(value, parts[key], where, path)
        elif key == "model_type" or key in known or means_nothing(key, value):
            _refuse_parts(value, where, path)
            clean[key] = value
        elif not _is_empty(value):
            raise ModelRefusedError(
                f"transformers {transformers.__version__} does not know '{where}' for {data['model_type']}, and it may "
                "change what the model computes",
                where=str(path),
                hint="remove the key if the model works without it, or save the model again with this transformers",
            )
    return clean


def _parts(config_class: type[PretrainedConfig]) -> dict[str, type[PretrainedConfig]]:
    """The classes of nested configurations by key; CLIP has two keys for each."""
    found = config_class.sub_configs if isinstance(config_class.sub_configs, dict) else {}
    return {key: kind for name, kind in found.items() for key in (name, f"{name}_dict")}


def _part(data: dict[str, Any], kind: type[PretrainedConfig], where: str, path: Path) -> dict[str, Any]:
    if data.get("model_type", kind.model_type) not in (None, kind.model_type):
        raise ModelRefusedError(
            f"'{where}' is of model type {data['model_type']!r}, but should be '{kind.model_type}'",
            where=str(path),
            hint="use a checkpoint of a covered family",
        )
    return _known({"model_type": kind.model_type} | data, kind, f"{where}.", path)


def _refuse_parts(value: Any, where: str, path: Path) -> None:
    """Refuses an object that names a model type, because transformers would build another model from it."""
    for place, key, _ in all_keys(value):
        if key == "model_type":
            raise ModelRefusedError(
                f"'{where}{place}' is a model within the model, which is not covered",
                where=str(path),
                hint="use a checkpoint without it",
            )


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _add_model_type(data: Any) -> str:
    """What to add: the model type whose class names begin like the architecture's, if there is one."""
    names = data.get("architectures") if isinstance(data, dict) else None
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    bases = {str(MODEL_MAPPING_NAMES.get(kind, "")).removesuffix("Model"): kind for kind in covered_types()}
    near = max((base for base in bases if base and first.startswith(base)), key=len, default=None)
    kind = f'"model_type": "{bases[near]}"' if near else 'a model_type, e.g. "model_type": "bert"'
    return f"add {kind} to config.json, if the folder is a transformers checkpoint"

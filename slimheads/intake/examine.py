"""What a model folder is judged by before any class of transformers is built from it or a file of it is copied.

1. Every file is a regular one of the folder's own; a link may lead out of it only into the hub cache's blobs.
2. The model type is a covered one, and every part within the configuration is one that this type has.
3. Every key of config.json is one that the loaded transformers knows for this type, or one that is known to mean
   nothing. What names code, a kernel, another file or another repository is refused, or left out and told.
4. Tokenizers, processors and modules that the other JSON files name are classes of an allow-list.
5. An index names only safetensors files of its own folder.
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
from slimheads.intake.rope import in_words_of_4
from slimheads.intake.side_json import judge_side_file, names_code, refuse_class, refuse_imports
from slimheads.notices import tell


def examine(folder: Path) -> None:
    """Judges a folder's files and the JSON files besides config.json; what will not ship is told.

    Raises:
        ModelRefusedError: naming the file, and the key.
    """
    refuse_links(folder)
    for path in sorted(folder.rglob("*.json")):
        if is_read(path.relative_to(folder)) and path.is_file():
            if path != folder / "config.json":
                judge_side_file(path)
            for key in names_code(path):
                tell(f"{path.relative_to(folder)}: '{key}' names code: it is not obeyed, and slim/ ships without it")


def judged_config(folder: Path) -> dict[str, Any]:
    """config.json with the keys that count, in the words of transformers 4; no class was built from it.

    Raises:
        FileNotFoundError: there is none.
        ModelRefusedError: it is damaged, of a kind that is not covered, or has a key that is refused.
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
        raise ModelRefusedError(f"transformers knows no '{model_type}'", where=str(path), hint="use a covered family")
    names = clean.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ModelRefusedError("architectures is not a list of names", where=str(path), hint=AGAIN)
    if clean.get("tokenizer_class") is not None and not is_tokenizer(clean["tokenizer_class"]):
        refuse_class("tokenizer_class", clean["tokenizer_class"], path)
    for found in all_objects(clean):
        refuse_imports(found, path)
    config_class: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return _known(in_words_of_4(clean, model_type, known_keys(config_class), str(path)), config_class, "", path)


def _known(data: dict[str, Any], config_class: type[PretrainedConfig], part: str, path: Path) -> dict[str, Any]:
    """The keys that the class knows or that mean nothing; `part` is where a part's own configuration stands."""
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
    """The parts that have a configuration of their own, by key; CLIP's have two keys each."""
    found = config_class.sub_configs if isinstance(config_class.sub_configs, dict) else {}
    return {key: kind for name, kind in found.items() for key in (name, f"{name}_dict")}


def _part(data: dict[str, Any], kind: type[PretrainedConfig], where: str, path: Path) -> dict[str, Any]:
    if data.get("model_type", kind.model_type) not in (None, kind.model_type):
        raise ModelRefusedError(
            f"'{where}' is of model type {data['model_type']!r}, where '{kind.model_type}' belongs",
            where=str(path),
            hint="use a checkpoint of a covered family",
        )
    return _known({"model_type": kind.model_type} | data, kind, f"{where}.", path)


def _refuse_parts(value: Any, where: str, path: Path) -> None:
    """A mapping that names a model type is built as a model of its own, which is covered nowhere else."""
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
    """What to write: the model type whose classes the architecture's name begins like, where there is one."""
    names = data.get("architectures") if isinstance(data, dict) else None
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    bases = {str(MODEL_MAPPING_NAMES.get(kind, "")).removesuffix("Model"): kind for kind in covered_types()}
    near = max((base for base in bases if base and first.startswith(base)), key=len, default=None)
    kind = f'"model_type": "{bases[near]}"' if near else 'a model_type, say "model_type": "bert"'
    return f"add {kind} to config.json, if the folder is a transformers checkpoint"

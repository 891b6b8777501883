"""The modules of a sentence-transformers folder: which of them slim/ can contain, and for which task.

modules.json names a Python class for each step from text to embedding, and a client imports it. So only classes of
sentence-transformers itself are accepted, and only kinds that work behind an ONNX graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from slimheads.errors import ModelRefusedError
from slimheads.intake.json_files import read_json_as

MODULES = "modules.json"
# sentence-transformers reads the first of these that exists.
TRANSFORMER_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_TRANSFORMERS = ("Transformer", "MLMTransformer")
WEIGHTED = ("Dense", "LayerNorm")
_KINDS = (*_TRANSFORMERS, *WEIGHTED, "Pooling", "Normalize", "Dropout", "SpladePooling", "LogitScore")
_CLASS = re.compile(r"sentence_transformers(?:\.[A-Za-z_]\w*)*\.(?P<kind>[A-Za-z_]\w*)")
_ACTIVATION = re.compile(r"torch\.nn\.modules\.(?:activation|linear)\.(?P<name>[A-Z]\w*)")
# The tasks of a Transformer module, by its own names and by optimum's.
_TASKS: Mapping[str, str] = MappingProxyType(
    {
        "feature-extraction": "feature-extraction",
        "fill-mask": "fill-mask",
        "sequence-classification": "text-classification",
        "text-generation": "text-generation",
    }
)
_ALONE = f"remove {MODULES} to prune the transformer alone"


@dataclass(frozen=True)
class SentenceModule:
    """One step: the name of its class, and its folder inside the model's folder ("" for that folder itself)."""

    kind: str
    path: str


def sentence_modules(folder: Path) -> tuple[SentenceModule, ...]:
    """The modules of a sentence-transformers folder in order; none if there is no modules.json.

    Raises:
        ModelRefusedError: modules.json is damaged, leads out of the folder, names an unsupported class or a transformer
            in a subfolder; or a module's weights are pickled or missing.
    """
    entries = read_json_as(folder / MODULES, list)
    if entries is None:
        return ()
    modules = tuple(_module(folder, entry) for entry in entries)
    if not modules or modules[0].kind not in _TRANSFORMERS:
        raise _refuse(folder, "the first module is not a transformer", _ALONE)
    for module in modules[1:]:
        if not module.path or module.kind in _TRANSFORMERS:
            raise _refuse(folder, f"'{module.kind}' is not a module with its own folder", _ALONE)
        _check_weights(folder, module)
    return modules


def module_files(folder: Path) -> Iterator[Path]:
    """Relative paths of the files of the modules after the transformer: settings and safetensors."""
    for module in sentence_modules(folder)[1:]:
        for name in ("config.json", "model.safetensors"):
            if (folder / module.path / name).is_file():
                yield Path(module.path, name)


def task_of_modules(folder: Path) -> str | None:
    """The task of a sentence-transformers folder's transformer; None for other folders.

    Raises:
        ModelRefusedError: as `sentence_modules`, or the task is unknown.
    """
    modules = sentence_modules(folder)
    if not modules:
        return None
    default = "fill-mask" if modules[0].kind == "MLMTransformer" else "feature-extraction"
    stated = transformer_settings(folder).get("transformer_task", default)
    if stated not in _TASKS:
        raise _refuse(folder, f"the transformer's task is '{stated}', which is not covered", _ALONE)
    return _TASKS[stated]


def transformer_settings(folder: Path) -> dict[str, Any]:
    """The content of sentence_bert_config.json, under any of its names.

    Raises:
        ModelRefusedError: the file is damaged.
    """
    found = (read_json_as(folder / name, dict) for name in TRANSFORMER_SETTINGS)
    return next((settings for settings in found if settings), {})


def module_settings(folder: Path, module: SentenceModule) -> dict[str, Any]:
    """The content of a module's own config.json.

    Raises:
        ModelRefusedError: the file is damaged.
    """
    return dict(read_json_as(folder / module.path / "config.json", dict) or {})


def activation_name(folder: Path, module: SentenceModule) -> str:
    """The name of a Dense module's activation class in torch.nn.

    Raises:
        ModelRefusedError: it is another class, which a client would import.
    """
    named = module_settings(folder, module).get("activation_function", "torch.nn.modules.activation.Tanh")
    match = _ACTIVATION.fullmatch(str(named))
    if match is None:
        raise ModelRefusedError(
            f"the activation function '{named}' is not a class of torch.nn",
            where=str(folder / module.path / "config.json"),
            hint=_ALONE,
        )
    return match["name"]


def _module(folder: Path, entry: Any) -> SentenceModule:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("type", "path", "name")):
        raise _refuse(folder, "a module without a name, a type or a path", "fetch the model folder again")
    inside = PurePosixPath(entry["path"])
    if (
        inside.is_absolute()
        or ".." in inside.parts
        or any(mark in entry["path"] for mark in "\\:")
        or not entry["path"].isprintable()
    ):
        raise _refuse(
            folder,
            f"the path {entry['path']!r} leads out of the folder",
            "use a folder that sentence-transformers wrote",
        )
    path = "" if inside == PurePosixPath() else inside.as_posix()
    match = _CLASS.fullmatch(entry["type"])
    if match and path and (folder / path / "config.json").is_file():
        nested = read_json_as(folder / path / "config.json", dict) or {}
        if "model_type" in nested:
            raise _refuse(
                folder,
                f"the transformer is in {path}/, not in the folder itself",
                f"save the model again with sentence-transformers, which puts it there, or use {folder / path} "
                "for the transformer alone",
            )
    if match is None:
        raise _refuse(
            folder, f"'{entry['type']}' is not a class of sentence-transformers, and a client would run it", _ALONE
        )
    if match["kind"] not in _KINDS:
        raise _refuse(folder, f"a module of the class {match['kind']} is not covered", _ALONE)
    return SentenceModule(match["kind"], path)


def _check_weights(folder: Path, module: SentenceModule) -> None:
    if module.kind not in WEIGHTED:
        return
    inside = folder / module.path
    if module.kind == "Dense":
        activation_name(folder, module)
    if (inside / "model.safetensors").is_file():
        return
    pickled = next((p.name for p in sorted(inside.glob("*.bin"))), None)
    raise ModelRefusedError(
        "pickled weights are refused because loading them can run code" if pickled else "there is no model.safetensors",
        where=str(inside / pickled) if pickled else str(inside),
        hint="save the model again with sentence-transformers, which writes safetensors",
    )


def _refuse(folder: Path, what: str, hint: str) -> ModelRefusedError:
    return ModelRefusedError(what, where=str(folder / MODULES), hint=hint)

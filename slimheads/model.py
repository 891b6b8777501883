"""Where a model comes from, what is refused, and how a slim one is saved and reloads.

Only safetensors are read, no code of a checkpoint is ever run, and a checkpoint that lacks a weight is refused rather
than completed with random numbers.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimheads.attention import PLAN_KEY, Site, check_head_counts, dense_value, family_of, find_sites, is_projection
from slimheads.errors import EnvironmentLackError, ModelRefusedError, UsageError
from slimheads.selection import Plan
from slimheads.surgery import record_plan, recorded_plan, shrink

log = logging.getLogger(__name__)

# The tasks slimheads proves, by the suffix of the architecture's class name, with the Auto class that loads each.
TASKS: Mapping[str, tuple[str, str]] = {
    "text-generation": ("ForCausalLM|LMHeadModel", "AutoModelForCausalLM"),
    "fill-mask": ("ForMaskedLM", "AutoModelForMaskedLM"),
    "text-classification": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "token-classification": ("ForTokenClassification", "AutoModelForTokenClassification"),
    "question-answering": ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "feature-extraction": ("Model", "AutoModel"),  # last: every LMHeadModel ends in Model
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What transformers raises, among asserts and plain mistakes, when a config and the weights do not make a model.
_LOADING_FAILURES = (
    *(OSError, ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError),
    SafetensorError,
)
_SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".spm", ".tiktoken", ".safetensors"}
_SIDE_NAMES = {"LICENSE", "LICENCE", "NOTICE"}
_OWN_FILES = {"config.json", "generation_config.json", "plan.json"}
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.vocab", "*.bpe", "*.spm", "LICENSE*"]


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk and what it will be loaded as."""

    given: str  # as the recipe or the user named it
    folder: Path
    task: str
    model_type: str
    family: str
    architecture: str  # the transformers class that is built
    from_hub: bool = False


def find(source: str, task: str = "auto") -> Source:
    """Finds a checkpoint and reads its config, without reading weights.

    Args:
        source: a folder, `pkg://package/folder` (a folder in an installed package) or a hub id.
        task: "auto" (from the checkpoint's architecture) or a key of `TASKS`.

    Raises:
        UsageError: there is no such folder, package or hub id, or the task is unknown.
        EnvironmentLackError: a hub id that is not in the local cache, and the hub cannot be reached.
        ModelRefusedError: the checkpoint is not one that slimheads reads, or its family is not covered.
    """
    folder = _folder(source)
    config = read_config(folder)
    family, _ = family_of(config)
    task = _task_of(config) if task == "auto" else task
    if task not in TASKS:
        raise UsageError(f"unknown task '{task}'", hint=f"use auto or one of {', '.join(TASKS)}")
    architecture = _architecture(config, task)
    from_hub = not source.startswith("pkg://") and folder != Path(source).expanduser()
    return Source(source, folder, task, str(config.model_type), family, architecture.__name__, from_hub)


def describe(source: Source) -> list[str]:
    """What is known of a checkpoint from its config alone, a line each."""
    config = read_config(source.folder)
    _, family = family_of(config)
    heads, units = (dense_value(config, key) for key in (family.heads or family.units, family.units))
    shared = f", {units} KV heads: {heads // units} query heads go together" if heads != units else ""
    layers = sum(int(getattr(config, row.count)) for row in family.sites)
    return [
        f"{source.architecture} of the {family.title} family, used for {source.task}",
        f"{layers} attention blocks of {heads} heads{shared}",
    ]


def load(source: str | Path, task: str = "auto", *, attn_implementation: str | None = None) -> PreTrainedModel:
    """Loads a dense or slim checkpoint for inference, on the CPU, in the dtype it was saved in.

    Args:
        source: as for `find`.
        task: as for `find`.
        attn_implementation: "sdpa", "eager", or None for transformers' own choice.

    Raises:
        As `find`, and ModelRefusedError for damaged, missing, non-finite or pickled weights (named).
    """
    found = find(str(source), task)
    config = read_config(found.folder)
    build = _load_slim if hasattr(config, PLAN_KEY) else _from_pretrained
    model = build(getattr(transformers, found.architecture), found.folder, config, attn_implementation)
    find_sites(model)  # a family file that does not describe this model is an error here, not later
    return model.eval()


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes config.json (with the plan), model.safetensors and the side files of the model's source.

    The folder must not exist or be empty. `slimheads.load` gives the same model back.

    Raises:
        UsageError: the folder holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("the folder exists and is not empty", where=str(folder), hint="name a new folder")
    # Listed before anything is written, for the folder may lie inside the source. A model made in memory has no source.
    source = Path(model.name_or_path)
    beside = list(side_files(source)) if model.name_or_path and source.is_dir() else []
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    for weights in weight_files(folder):
        # safetensors writes 0600; a shipped file is as readable as its config
        weights.chmod((folder / "config.json").stat().st_mode)
    for relative in beside:
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(source / relative, target)


def side_files(folder: Path) -> Iterator[Path]:
    """Relative paths of what belongs to a checkpoint besides its weights and config: tokenizer, pooling, licence.

    Weights of the model itself, other exports, code and hidden files are left out.
    """
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not path.is_file() or relative.parts[0] in {"onnx", "openvino"}:
            continue
        if len(relative.parts) == 1 and (path.suffix == ".safetensors" or path.name.endswith(".index.json")):
            continue
        if path.name in _SIDE_NAMES or (path.suffix in _SIDE_SUFFIXES and str(relative) not in _OWN_FILES):
            yield relative


def read_config(folder: Path) -> PretrainedConfig:
    """Reads config.json through transformers, after removing or refusing what could make transformers run code.

    Raises:
        ModelRefusedError: the file is missing, damaged, of an unknown model type, or names code to run.
    """
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelRefusedError(
            "there is no config.json", where=str(folder), hint="name a transformers checkpoint folder"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelRefusedError(
            f"not readable as JSON ({error})", where=str(path), hint="fetch the model again"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ModelRefusedError("no model_type", where=str(path), hint="name a transformers checkpoint folder")
    if "quantization_config" in data:
        raise ModelRefusedError(
            "quantized weights are not covered", where=str(path), hint="start from the full weights"
        )
    names = data.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelRefusedError("architectures is not a list of names", where=str(path), hint="fetch the model again")
    model_type = data["model_type"]
    clean = _without_implementation_keys(data, path)
    if model_type not in CONFIG_MAPPING:
        family_of(PretrainedConfig.from_dict({"model_type": model_type}))
        raise ModelRefusedError(f"transformers knows no '{model_type}'", where=str(path), hint="use a covered family")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(clean)
        _, family = family_of(config)
        plan = recorded_plan(config, family)
        check_head_counts(config, family)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ModelRefusedError(
            f"damaged configuration ({error})", where=str(path), hint="fetch the model again"
        ) from error
    if config.pruned_heads and plan is None:
        raise ModelRefusedError(
            "heads were already deleted by transformers' own prune_heads",
            where=str(path),
            hint="start from the model before that",
        )
    return cast(PretrainedConfig, config)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, shards included.

    Raises:
        ModelRefusedError: there are none (pickled weights are named and refused), or a shard is missing.
    """
    single, index = (folder / name for name in _WEIGHTS)
    if index.is_file() and not single.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelRefusedError("damaged index", where=str(index), hint="fetch the model again") from error
        shards = tuple(folder / str(name) for name in names)
        for shard in shards:
            if shard.parent != folder or not shard.is_file():
                raise ModelRefusedError("a shard is missing", where=str(shard), hint="fetch the model again")
        return shards
    if single.is_file():
        return (single,)
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelRefusedError(
            "pickled weights are refused, for loading them can run code",
            where=str(folder / pickles[0]),
            hint="convert with transformers' `save_pretrained(..., safe_serialization=True)`",
        )
    raise ModelRefusedError("there is no model.safetensors", where=str(folder), hint="name a folder with weights")


def _folder(source: str) -> Path:
    if source.startswith("pkg://"):
        package, _, inside = source.removeprefix("pkg://").partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentLackError(
                f"package '{package}' is not installed", where=source, hint=f"pip install {package.replace('_', '-')}"
            )
        folder = Path(spec.submodule_search_locations[0], inside)
        if not folder.is_dir():
            raise UsageError(
                f"the package has no folder '{inside}'", where=source, hint="check the path after the package"
            )
        return folder
    folder = Path(os.path.expanduser(source))  # noqa: PTH111 - pathlib's raises for an unknown user
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UsageError(
            "no such folder", where=source, hint="name a checkpoint folder, pkg://package/folder or a hub id"
        )
    return _from_hub(source)


def _from_hub(source: str) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_PATTERNS))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(
            "neither a folder here nor a model on the hub", where=source, hint="check the name, and your access token"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentLackError(
            "no folder of that name here, and as a hub id it is not in the cache and the hub cannot be reached",
            where=source,
            hint="check the path, connect, or download the model first with `hf download`",
        ) from error


def _without_implementation_keys(data: Any, path: Path) -> Any:
    # transformers 4.56 to 5.2 fetch and run a hub "kernel" that such a key names (CVE-2026-4372).
    if isinstance(data, list):
        return [_without_implementation_keys(value, path) for value in data]
    if not isinstance(data, dict):
        return data
    clean: dict[str, Any] = {}
    for key, value in data.items():
        if "_implementation" not in key:
            clean[key] = _without_implementation_keys(value, path)
        elif "/" in json.dumps(value):
            raise ModelRefusedError(
                f"'{key}' names code to fetch and run", where=str(path), hint="do not use this checkpoint"
            )
    return clean


def _task_of(config: PretrainedConfig) -> str:
    for name in config.architectures or ():
        for task, (suffixes, _) in TASKS.items():
            if str(name).endswith(tuple(suffixes.split("|"))):
                return task
    return "feature-extraction"


def _architecture(config: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    auto = getattr(transformers, TASKS[task][1])
    try:
        return cast(type[PreTrainedModel], auto._model_mapping[type(config)])
    except KeyError as error:
        raise UsageError(f"{config.model_type} has no model for '{task}'", hint="use task: auto") from error


def _from_pretrained(
    model_class: Any, folder: Path, config: PretrainedConfig, attn_implementation: str | None
) -> PreTrainedModel:
    files = weight_files(folder)
    _check_headers(files)

    def build(**extra: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        return cast(
            tuple[PreTrainedModel, dict[str, Any]],
            model_class.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                attn_implementation=attn_implementation,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            ),
        )

    try:
        model, info = build()
        if info["missing_keys"] and all(key.startswith("pooler.") for key in info["missing_keys"]):
            model, info = build(add_pooling_layer=False)
    except _LOADING_FAILURES as error:
        raise ModelRefusedError(
            f"transformers cannot load it ({' '.join(str(error).split())[:300]})",
            where=str(folder),
            hint="fetch the model again",
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelRefusedError(
            f"{len(missing)} weights of {model_class.__name__} are not in the checkpoint, first {missing[0]}",
            where=str(folder),
            hint="name the task this checkpoint was trained for",
        )
    beyond = [key for key in sorted(info["unexpected_keys"]) if is_projection(family_of(config)[1], key)]
    if beyond:
        raise ModelRefusedError(
            f"the checkpoint has an attention block that config.json does not count: {beyond[0]}",
            where=str(folder),
            hint="the configuration is damaged: fetch the model again",
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelRefusedError("the tensor holds NaN or infinity", where=name, hint="the checkpoint is damaged")
    return model


def _check_headers(files: tuple[Path, ...]) -> None:
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ModelRefusedError(
                f"damaged weights ({error})", where=str(path), hint="fetch the model again"
            ) from error


def _load_slim(
    model_class: Any, folder: Path, config: PretrainedConfig, attn_implementation: str | None
) -> PreTrainedModel:
    """Builds the dense skeleton without weights, applies the same surgery, and lets transformers load the tensors."""
    _, family = family_of(config)
    plan = recorded_plan(config, family) or Plan(())
    for key, value in getattr(config, PLAN_KEY)["dense"].items():
        setattr(config, key, value)
    delattr(config, PLAN_KEY)
    config.pruned_heads = {}

    dense_sites: tuple[Site, ...] = ()

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        nonlocal dense_sites, plan
        model_class.__init__(self, *args, **kwargs)
        dense_sites = find_sites(self)
        plan = _for_class(plan, dense_sites)
        shrink(self, dense_sites, plan)

    skeleton = type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})
    try:
        model = _from_pretrained(skeleton, folder, config, attn_implementation)
    except UsageError as error:
        raise ModelRefusedError(
            f"the recorded plan does not fit the model ({error.where}: {error.what})",
            where=str(folder / "config.json"),
            hint="fetch the model again",
        ) from error
    model.__class__ = model_class
    record_plan(model.config, family, dense_sites, plan)
    return model


def _for_class(plan: Plan, sites: tuple[Site, ...]) -> Plan:
    """Renames a plan's sites for a class with another head: `h.0.attn` here is `transformer.h.0.attn` there."""

    def name(planned: str) -> str:
        return next(
            (s.name for s in sites if f".{s.name}".endswith(f".{planned}") or planned.endswith(f".{s.name}")), planned
        )

    return Plan(tuple(replace(site, site=name(site.site)) for site in plan.sites))

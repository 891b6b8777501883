"""Checks that a checkpoint's tensors are those of the model built from them, by name, shape and value.

Each cause of a mismatch has its own error, because each has its own remedy:
1. Names with a prefix from a wrapper (torch.compile, data parallel) or a training loop.
2. An adapter's weights among the model's own.
3. A tensor whose shape differs from the one that config.json gives.
4. A tied tensor that is missing although config.json does not tie it, or stored twice with different values.
5. A missing head: a checkpoint for another task. Any other missing tensor: an incomplete checkpoint.
6. Biases or attention blocks that config.json does not have. NaN and infinity.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from slimheads.errors import ModelRefusedError, one_line
from slimheads.families.family import Family, is_projection
from slimheads.runtime.quiet import quiet_transformers

# The prefixes that wrappers add to tensor names.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
_PARALLEL = "module."  # DataParallel and DistributedDataParallel; a model's own names can contain this after the start
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\.")
_MISMATCH = "size mismatch for"  # transformers' message names the tensor by its last part only
_ROWS = 1 << 24  # elements of a tensor compared at a time


def tensor_files(files: Iterable[Path]) -> dict[str, Path]:
    """Every tensor's name with the file that holds it, read from the headers alone.

    Raises:
        ModelRefusedError: a file is damaged, or the names are those of a wrapped model or of an adapter.
    """
    found: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ModelRefusedError(
                f"damaged weights ({error})", where=str(path), hint="fetch the file again"
            ) from error
    _refuse_wrapped(found)
    return found


def refused_loading(
    error: Exception, model_class: Any, settings: PretrainedConfig, files: Mapping[str, Path], folder: Path
) -> ModelRefusedError:
    """An error that transformers raised while loading, with the remedy for its cause."""
    text = one_line(error, None)
    config = str(folder / "config.json")
    if _MISMATCH in text:
        name, stored, wanted = next(_other_shapes(model_class, settings, files), ("a tensor", "another", "its own"))
        return ModelRefusedError(
            f"{name} has the shape {stored} in the weights, but {wanted} by config.json",
            where=config,
            hint="use the config.json that was saved with these weights",
        )
    if "adding_idx must be within num_embeddings" in text:
        return ModelRefusedError(
            "pad_token_id is not below vocab_size",
            where=config,
            hint="set it to the tokenizer's padding token, or to null",
        )
    if "state dictionary of the model you are trying to load is corrupted" in text:
        return ModelRefusedError(
            "the names of some weights have the model's prefix and those of others do not",
            where=str(folder),
            hint="save the whole model with save_pretrained, not its parts",
        )
    return ModelRefusedError(
        f"transformers cannot load it ({text[:300]})",
        where=str(folder),
        hint="check that config.json and the weights were saved together, or fetch both again",
    )


def _other_shapes(
    model_class: Any, config: PretrainedConfig, files: Mapping[str, Path]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Stored tensors whose shape differs from the model's: name, stored shape, the model's shape."""
    with torch.device("meta"), quiet_transformers():
        made = model_class(copy.deepcopy(config))
    base = f"{made.base_model_prefix}."
    expected = {name: list(tensor.shape) for name, tensor in made.state_dict().items()}
    for name, path in files.items():
        called = next((one for one in (name, base + name, name.removeprefix(base)) if one in expected), None)
        if called is None:
            continue
        with safe_open(path, framework="pt") as tensors:
            stored = list(tensors.get_slice(name).get_shape())
        if stored != expected[called]:
            yield name, stored, expected[called]


def check_loaded(
    model: PreTrainedModel, info: Mapping[str, Any], files: Mapping[str, Path], folder: Path, family: Family
) -> None:
    """Refuses a model with randomly initialised or unused projection weights, or with NaN or infinity.

    Args:
        info: the loading info of `from_pretrained`: missing, mismatched and unexpected names.
        files: every tensor's name in the checkpoint with its file.

    Raises:
        ModelRefusedError: naming the tensor.
    """
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise _incomplete(model, missing, files, folder)
    for key in sorted(info["unexpected_keys"]):
        if is_projection(family, key):
            raise _uncounted(model, key, folder)
    _refuse_differing_ties(model, files)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise ModelRefusedError("the tensor holds NaN or infinity", where=name, hint="the checkpoint is damaged")


def _refuse_wrapped(files: Mapping[str, Path]) -> None:
    for name, path in files.items():
        if _ADAPTER.search(name):
            raise ModelRefusedError(
                f"{name} belongs to an adapter that is not merged",
                where=str(path),
                hint="merge it into the model first, with peft's merge_and_unload(), and save that",
            )
        for prefix, wrapper in _WRAPPERS.items():
            if prefix in name:
                raise _prefixed(prefix, path, f"{name} has the prefix '{prefix}' of {wrapper}", prefix.rstrip("."))
    if files and all(name.startswith(_PARALLEL) for name in files):
        what = f"every name has the prefix '{_PARALLEL}' of data parallel training"
        raise _prefixed(_PARALLEL, next(iter(files.values())), what, "module")


def _prefixed(prefix: str, path: Path, what: str, inner: str | None = None) -> ModelRefusedError:
    saving = f"save the inner model (`model.{inner}.save_pretrained`), or " if inner else ""
    return ModelRefusedError(what, where=str(path), hint=f"{saving}rename the tensors without the prefix '{prefix}'")


def _incomplete(
    model: PreTrainedModel, missing: Sequence[str], files: Mapping[str, Path], folder: Path
) -> ModelRefusedError:
    class_name = type(model).__name__
    if prefix := _prefix_of(model, files):
        what = f"the names of the weights have a prefix '{prefix}' that {class_name} does not know"
        return _prefixed(prefix, next(iter(files.values())), what)
    what = f"{len(missing)} weights of {class_name} are not in the checkpoint, first {missing[0]}"
    tied = model._tied_weights_keys or ()
    if all(any(re.search(pattern, name) for pattern in tied) for name in missing):
        return ModelRefusedError(
            f"{what}, and config.json does not tie it to the embeddings (tie_word_embeddings is false)",
            where=str(folder),
            hint="set tie_word_embeddings to true in config.json if the model was trained so; "
            "else the checkpoint is incomplete: save it again with its head, or name another task",
        )
    body = f"{model.base_model_prefix}."
    if model.base_model is not model and not any(name.startswith(body) for name in missing):
        hint = "name the task this checkpoint was trained for"
        return ModelRefusedError(what, where=str(folder), hint=hint)
    hint = "use the config.json that was saved with these weights, or fetch the weights again: they are incomplete"
    return ModelRefusedError(what, where=str(folder), hint=hint)


def _prefix_of(model: PreTrainedModel, files: Mapping[str, Path]) -> str | None:
    """A prefix without which most of the checkpoint's names match the model's, if most do not match as they are."""
    expected = {name for name, _ in model.named_parameters()}
    expected |= {name.removeprefix(f"{model.base_model_prefix}.") for name in expected}
    if sum(name in expected for name in files) * 2 > len(files):
        return None
    prefixes = Counter(prefix for name in files for prefix in _leading(name) if name.removeprefix(prefix) in expected)
    prefix, count = prefixes.most_common(1)[0] if prefixes else ("", 0)
    return prefix if count * 2 > len(files) else None


def _leading(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) + "." for count in range(1, min(4, len(parts)))]


def _uncounted(model: PreTrainedModel, key: str, folder: Path) -> ModelRefusedError:
    """The error for a stored projection tensor that the model, as described by config.json, does not have."""
    modules = {name for name, _ in model.named_modules()}
    owner = key.rpartition(".")[0]
    if owner in modules or f"{model.base_model_prefix}.{owner}" in modules:
        return ModelRefusedError(
            f"the checkpoint has {key}, but {type(model).__name__} as config.json describes it does not",
            where=str(folder / "config.json"),
            hint="use the config.json that was saved with these weights: it turns such biases on",
        )
    return ModelRefusedError(
        f"the checkpoint has more blocks than config.json says: {key}",
        where=str(folder / "config.json"),
        hint="use the config.json that was saved with these weights",
    )


def _refuse_differing_ties(model: PreTrainedModel, files: Mapping[str, Path]) -> None:
    """Refuses tensors that the model ties but the checkpoint stores twice with different values."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        stored = [name for name in names if name in files]
        for other in stored[1:]:
            if not _same(files[stored[0]], stored[0], files[other], other):
                raise ModelRefusedError(
                    f"{other} differs from {stored[0]}, but the model ties the two",
                    where=str(files[other]),
                    hint="set tie_word_embeddings to false in config.json to use both, or remove one of them from "
                    "the weights",
                )


def _same(one_file: Path, one: str, other_file: Path, other: str) -> bool:
    """Whether two stored tensors are equal, read in parts."""
    with safe_open(one_file, framework="pt") as a, safe_open(other_file, framework="pt") as b:
        first, second = a.get_slice(one), b.get_slice(other)
        shape = first.get_shape()
        if shape != second.get_shape():
            return False
        rows = max(1, _ROWS // max(1, math.prod(shape[1:])))
        return all(
            torch.equal(first[start : start + rows], second[start : start + rows])
            for start in range(0, shape[0] if shape else 0, rows)
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Ten times as fast as `isfinite(tensor).all()`, without a temporary tensor. NaN shows in minimum and maximum."""
    return tensor.numel() == 0 or all(math.isfinite(end) for end in torch.aminmax(tensor))

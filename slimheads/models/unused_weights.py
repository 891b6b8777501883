"""Weights that are in a checkpoint but not in the model built from it, most often a custom task head.

They are never dropped silently:
1. Buffers that other versions stored (position ids, masks) are not weights and do not count.
2. If the recipe names the task, or the checkpoint names the class that is built, there is a notice.
3. There is also a notice for pretraining heads, which fine-tuned models do not use.
4. Otherwise the purpose of the checkpoint is unknown, and it is refused until a task is named.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.models.tasks import class_names
from slimheads.notices import notify
from slimheads.runtime.quiet import quiet_transformers

_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|attn_mask|num_batches_tracked|relative_position_index)$"
)
_PRETRAINING = ("AutoModelForPreTraining", "AutoModelForMaskedLM", "AutoModelForCausalLM")


def account_for_unused(
    model: PreTrainedModel, unused: Sequence[str], files: Mapping[str, Path], folder: Path, *, task_named: bool
) -> None:
    """Adds a notice about weights that the model does not use, or refuses the checkpoint.

    Args:
        unused: names in the checkpoint, with or without the base model's prefix.
        files: every tensor's name in the checkpoint with its file.
        task_named: whether the user named this task.

    Raises:
        ModelRefusedError: the task was guessed, and the weights may be what the checkpoint is for.
    """
    class_name = type(model).__name__
    declared = [name for name in model.config.architectures or () if isinstance(name, str)]
    names = [name for name in unused if not _is_buffer(name, files, model.base_model_prefix)]
    known = task_named or class_name in declared
    if not names:
        if declared and not known and not hasattr(transformers, declared[0]):
            notify(f"{declared[0]} is not a class of transformers: loaded as {class_name}; name the task if it differs")
        return
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if known or _only_pretraining(model.config, declared, names):
        notify(f"{class_name} does not use {shown}, which are not in slim/")
        return
    architecture = f"the architecture {declared[0]}" if declared else "a config.json without architectures"
    raise ModelRefusedError(
        f"{shown} would be left out: slimheads knows no task for {architecture}",
        where=str(folder),
        hint="name the task in the recipe (task:), or use task: feature-extraction to load the model without them",
    )


def _is_buffer(name: str, files: Mapping[str, Path], base: str) -> bool:
    if _BUFFERS.search(name):
        return True
    stored = next((known for known in (name, f"{base}.{name}") if known in files), None)
    if stored is None:
        return False
    with safe_open(files[stored], framework="pt") as tensors:
        part = tensors.get_slice(stored)
        kind, shape = part.get_dtype(), part.get_shape()
    causal_mask = name.endswith(".bias") and len(shape) == 4 and shape[:2] == [1, 1]
    return causal_mask or not str(kind).startswith(("F", "BF"))


def _only_pretraining(config: PretrainedConfig, declared: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a checkpoint is from pretraining, by its architecture or, if it names none, by its heads."""
    if declared:
        return any(name in class_names("AutoModelForPreTraining", config) for name in declared)
    heads = {head for auto in _PRETRAINING for found in class_names(auto, config) for head in _names_of(found, config)}
    return all(name in heads for name in names)


def _names_of(class_name: str, config: PretrainedConfig) -> Iterator[Any]:
    """Names of a class's tensors, with and without the base model's prefix; built on the meta device."""
    with torch.device("meta"), quiet_transformers():
        made = getattr(transformers, class_name)(copy.deepcopy(config))
    for name in made.state_dict():
        yield name
        yield name.removeprefix(f"{made.base_model_prefix}.")

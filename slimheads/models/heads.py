"""Weights that a checkpoint has and the model that is built of it does not use: a head of its owner's own, most often.

They never vanish silently:
1. Buffers that other versions stored (position ids, masks) are no weights.
2. Under a task that the recipe names, and under an architecture that the model is built as, they are told.
3. So are the heads of pretraining, which every fine-tuned model goes without.
4. Else what the checkpoint is for is not known, and it is refused until a task is named.
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
from slimheads.models.checkpoint import class_names
from slimheads.notices import tell
from slimheads.runtime.quiet import quiet_transformers

_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|attn_mask|num_batches_tracked|relative_position_index)$"
)
_PRETRAINING = ("AutoModelForPreTraining", "AutoModelForMaskedLM", "AutoModelForCausalLM")


def account_for_unused(
    model: PreTrainedModel, unused: Sequence[str], files: Mapping[str, Path], folder: Path, *, task_named: bool
) -> None:
    """Tells of weights that the model leaves out, or refuses to leave them out.

    Args:
        unused: names in the checkpoint, with or without the base model's prefix.
        files: every tensor's name in the checkpoint with its file.
        task_named: whether the user asked for this task.

    Raises:
        ModelRefusedError: the task was guessed, and the weights may be what the checkpoint is for.
    """
    class_name = type(model).__name__
    declared = [name for name in model.config.architectures or () if isinstance(name, str)]
    names = [name for name in unused if not _is_buffer(name, files, model.base_model_prefix)]
    known = task_named or class_name in declared
    if not names:
        if declared and not known and not hasattr(transformers, declared[0]):
            tell(f"{declared[0]} is no class of transformers: taken as {class_name}; name the task if it is another")
        return
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if known or _only_pretraining(model.config, declared, names):
        tell(f"{class_name} does not use {shown}, which slim/ goes without")
        return
    architecture = f"the architecture {declared[0]}" if declared else "a config.json that names no architecture"
    raise ModelRefusedError(
        f"{shown} would be left out: slimheads knows no task for {architecture}",
        where=str(folder),
        hint="name the task in the recipe (task:), or task: feature-extraction to go without them",
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
    """Whether a checkpoint is one of pretraining, by its architecture or, where it names none, by all of its heads."""
    if declared:
        return any(name in class_names("AutoModelForPreTraining", config) for name in declared)
    heads = {head for auto in _PRETRAINING for found in class_names(auto, config) for head in _names_of(found, config)}
    return all(name in heads for name in names)


def _names_of(class_name: str, config: PretrainedConfig) -> Iterator[Any]:
    """Names of a class's tensors, built without memory."""
    with torch.device("meta"), quiet_transformers():
        made = getattr(transformers, class_name)(copy.deepcopy(config))
    for name in made.state_dict():
        yield name
        yield name.removeprefix(f"{made.base_model_prefix}.")

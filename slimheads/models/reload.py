"""Which library can reload a slim folder, determined by reloading it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import PreTrainedModel

from slimheads.errors import first_line
from slimheads.families.sites import find_sites
from slimheads.models.tasks import auto_classes
from slimheads.pruning.layers import POSITIONS
from slimheads.runtime.quiet import quiet_transformers

Tier = Literal["stock", "slimheads"]


def reload_tier(folder: Path, model: PreTrainedModel, task: str) -> tuple[Tier, str]:
    """Tries plain transformers on a saved folder and compares every tensor with the model that was saved.

    Returns:
        The tier, and one sentence with the reason.
    """
    auto = auto_classes(model.config)[task]
    try:
        with quiet_transformers():
            stock = getattr(transformers, auto).from_pretrained(
                folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return (
            "slimheads",
            f"Plain transformers does not rebuild these sizes ({first_line(error)[:120]}): use slimheads.load.",
        )
    by = f"Plain transformers ({transformers.__version__}) reloads it with {auto}.from_pretrained"
    extra = stock.state_dict().keys() - model.state_dict().keys()
    if extra and all(name.startswith("pooler.") for name in extra):
        stock.pooler = None
        by += ", all but the pooler, which is in no file and is random unless add_pooling_layer=False is given"
    if same_weights(stock, model) and same_attributes(stock, model):
        return "stock", f"{by}."
    return "slimheads", "Plain transformers loads it with other weights, sizes or layers: use slimheads.load."


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether both have the same tensors, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_attributes(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether the head counts and widths in the attributes of every block agree, and the layers' own numbers.

    A stale count gives wrong outputs.
    """
    with contextlib.suppress(AttributeError):
        return all(
            getattr(one.get_submodule(module), name) == getattr(other.get_submodule(module), name)
            for site in find_sites(other)
            for module, name, _ in site.attributes
        ) and all(
            getattr(one.get_submodule(name), position, None) == getattr(module, position, None)
            for name, module in other.named_modules()
            for position in POSITIONS
        )
    return False

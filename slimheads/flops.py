"""Counts a model's size and the arithmetic of one run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.inputs import make_inputs, to_torch


def parameters(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters in their own dtype, tied ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def flops(model: PreTrainedModel, batch: int, length: int = 1) -> int:
    """Floating-point operations of one forward: 2 a multiply-add, matrix products and convolutions only.

    Args:
        batch: texts, images or recordings.
        length: tokens or frames of each; of no effect where inputs have no length.

    Counted by torch's own FlopCounterMode while the model runs, so nothing is assumed about the architecture.

    Raises:
        UsageError: the model does not run at this shape.
    """
    feed = to_torch(make_inputs(model.config, batch, length, np.random.default_rng(0)), model)
    # torch counts the attention of GPUs but not its CPU kernel.
    cpu_attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        try:
            model(**feed)
        except (IndexError, RuntimeError) as error:  # past the end of a position table, say
            said = " ".join(str(error).split())[:200]
            raise UsageError(
                f"the model does not run on [{batch}, {length}] tokens ({said})",
                where="bench.shapes",
                hint="name shorter shapes",
            ) from error
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

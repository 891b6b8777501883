"""Counts a model's size and the arithmetic of one run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

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
        length: tokens or frames of each; of no effect where inputs have no length. An encoder-decoder's decoder reads
            as many tokens.

    Counted by torch's own FlopCounterMode while the model runs, so nothing is assumed about the architecture.

    Raises:
        UsageError: the model does not run at this shape.
    """
    feed = to_torch(make_inputs(model.config, batch, length, np.random.default_rng(0)), model)
    return _counted(partial(model, **feed), batch, length)


def encoder_flops(model: PreTrainedModel, batch: int, length: int = 1) -> int:
    """The same for the encoder alone of an encoder-decoder."""
    feed = to_torch(make_inputs(model.config, batch, length, np.random.default_rng(0)), model)
    del feed["decoder_input_ids"]
    return _counted(partial(model.get_encoder(), **feed), batch, length)


def step_flops(model: PreTrainedModel, batch: int, length: int, past: int, positions: int) -> int:
    """The same for one pass of an encoder-decoder's decoder.

    Args:
        batch: sequences.
        length: new tokens of each.
        past: tokens of each that are in the cache already.
        positions: what the encoder left for each.
    """
    states = BaseModelOutput(torch.zeros((batch, positions, model.config.hidden_size), dtype=model.dtype))
    ids = torch.zeros((batch, past + length), dtype=torch.long)
    with torch.no_grad():
        cache = model(encoder_outputs=states, decoder_input_ids=ids[:, :past], use_cache=True).past_key_values
    run = partial(model, encoder_outputs=states, decoder_input_ids=ids[:, past:], past_key_values=cache, use_cache=True)
    return _counted(run, batch, length)


def _counted(run: Callable[[], Any], batch: int, length: int) -> int:
    # torch counts the attention of GPUs but not its CPU kernel.
    cpu_attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        try:
            run()
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

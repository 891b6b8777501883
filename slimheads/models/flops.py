"""Counts parameters and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from slimheads.data.inputs import make_inputs, to_torch
from slimheads.errors import UsageError, one_line


def parameters(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters in their own dtype, tied ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def flops(model: PreTrainedModel, batch: int, length: int = 1, past: int = 0) -> int:
    """Floating-point operations of one forward pass: 2 per multiply-add, matrix products and convolutions only.

    Args:
        batch: texts, images or recordings.
        length: tokens or frames of each; ignored if inputs have no length. The decoder of an encoder-decoder reads as
            many tokens.
        past: tokens of each that are already in a decoder's cache.

    torch's own FlopCounterMode counts while the model runs, so nothing is assumed about the architecture.

    Raises:
        UsageError: the model does not run at this shape, or has no cache for the past.
    """
    feed: dict[str, Any] = dict(
        to_torch(make_inputs(model.config, batch, past + length, np.random.default_rng(0)), model)
    )
    if past:
        with _refused_shape(batch, length, past), torch.no_grad():
            earlier = {name: tensor[:, :past] for name, tensor in feed.items()}
            cache = getattr(model(**earlier, use_cache=True), "past_key_values", None)
        if cache is None or model.config.is_encoder_decoder:
            raise UsageError(
                f"the model keeps no cache to hold {past} tokens in",
                hint="use shapes of [batch, length]",
            )
        feed |= {"input_ids": feed["input_ids"][:, past:], "past_key_values": cache, "use_cache": True}
    return _counted(partial(model, **feed), batch, length, past)


def encoder_flops(model: PreTrainedModel, batch: int, length: int = 1) -> int:
    """The same for the encoder of an encoder-decoder."""
    feed = to_torch(make_inputs(model.config, batch, length, np.random.default_rng(0)), model)
    del feed["decoder_input_ids"]
    return _counted(partial(model.get_encoder(), **feed), batch, length)


def step_flops(model: PreTrainedModel, batch: int, length: int, past: int, positions: int) -> int:
    """The same for one pass of an encoder-decoder's decoder.

    Args:
        batch: sequences.
        length: new tokens of each.
        past: tokens of each that are already in the cache.
        positions: encoder positions of each.
    """
    states = BaseModelOutput(torch.zeros((batch, positions, model.config.hidden_size), dtype=model.dtype))
    ids = torch.zeros((batch, past + length), dtype=torch.long)
    with torch.no_grad():
        cache = model(encoder_outputs=states, decoder_input_ids=ids[:, :past], use_cache=True).past_key_values
    run = partial(model, encoder_outputs=states, decoder_input_ids=ids[:, past:], past_key_values=cache, use_cache=True)
    return _counted(run, batch, length, past)


def _counted(run: Callable[[], Any], batch: int, length: int, past: int = 0) -> int:
    # torch counts the attention of GPUs but not its CPU kernel.
    cpu_attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    counter = FlopCounterMode(display=False, custom_mapping=cpu_attention)
    with torch.no_grad(), counter, _refused_shape(batch, length, past):
        run()
    return int(counter.get_total_flops())


@contextmanager
def _refused_shape(batch: int, length: int, past: int) -> Iterator[None]:
    try:
        yield
    except (IndexError, RuntimeError) as error:  # e.g. past the end of a position table
        after = f" after {past}" if past else ""
        raise UsageError(
            f"the model does not run on [{batch}, {length}] tokens{after} ({one_line(error)})",
            hint="use a shorter shape",
        ) from error


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

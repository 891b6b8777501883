"""The shapes of a model's KV cache, which differ from layer to layer in a slim model."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from slimheads.names import KvShape


def has_cache(config: PretrainedConfig, task: str) -> bool:
    """Whether the exported graphs have a KV cache: those of an encoder-decoder, and of a decoder that writes text."""
    return bool(config.is_encoder_decoder) or task == "text-generation"


def cache_shapes(model: PreTrainedModel) -> tuple[tuple[KvShape, ...], tuple[KvShape, ...]]:
    """Per layer: the caches of self-attention, and of cross-attention, which only an encoder-decoder has."""
    return _seq2seq_kv_shapes(model) if model.config.is_encoder_decoder else (kv_shapes(model), ())


def kv_shapes(model: PreTrainedModel) -> tuple[KvShape, ...]:
    """Of every layer, from the cache that a forward of two tokens leaves."""
    with torch.no_grad():
        cache = model(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=True).past_key_values
    # GPTBigCode's cache has room for cross-attention behind the two.
    return tuple((key.shape[1], key.shape[3], value.shape[3]) for key, value, *_ in cache.to_legacy_cache())


def _seq2seq_kv_shapes(model: PreTrainedModel) -> tuple[tuple[KvShape, ...], tuple[KvShape, ...]]:
    """Of every layer of an encoder-decoder: those of the decoder's self-attention, and those of its cross-attention."""
    states = BaseModelOutput(last_hidden_state=torch.zeros((1, 2, model.config.hidden_size), dtype=model.dtype))
    with torch.no_grad():
        made = model(encoder_outputs=states, decoder_input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=True)
    layers = made.past_key_values.to_legacy_cache()
    own, cross = (
        tuple((layer[i].shape[1], layer[i].shape[3], layer[i + 1].shape[3]) for layer in layers) for i in (0, 2)
    )
    return own, cross

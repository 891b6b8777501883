"""Small random models, one a covered model type, built from their configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from slimheads.checkpoint import TASKS

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 120,
    "max_position_embeddings": 160,
}
_GROUPED: dict[str, Any] = _SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "roberta": _SIZES | {"pad_token_id": 1},
    "electra": _SIZES | {"embedding_size": 16},
    "distilbert": {
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 48,
        "vocab_size": 120,
        "max_position_embeddings": 160,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": 120,
        "n_positions": 160,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": None},
    "qwen2": _GROUPED,
}
DECODERS = {"gpt2", "llama", "mistral", "qwen2"}


def tiny_model(
    model_type: str, *, task: str | None = None, seed: int = 0, attn_implementation: str | None = None, **changes: Any
) -> PreTrainedModel:
    """A random float32 model in eval mode whose biases and norms are random too, so that none of them can hide."""
    import transformers

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | changes)
    task = task or ("text-generation" if model_type in DECODERS else "feature-extraction")
    model = getattr(transformers, TASKS[task][1]).from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()

"""Greedy generation with a torch model: the reference for tokens from ONNX graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin


def seq2seq_generate(model: Any, inputs: Mapping[str, torch.Tensor], start: int, new_tokens: int) -> torch.Tensor:
    """Plain greedy search of an encoder-decoder, in torch or in ONNX Runtime; int64 [batch, 1 + new_tokens]."""
    options = greedy_options(new_tokens)
    options["generation_config"].decoder_start_token_id = start
    # Whisper's own `generate` adds languages, timestamps and windows, from a config that may be missing.
    made: torch.Tensor = GenerationMixin.generate(model, **inputs, **options)
    return made


def greedy_options(new_tokens: int) -> dict[str, Any]:
    """Options that make `generate` a plain greedy search of a fixed length, whatever generation_config.json says."""
    return {
        "generation_config": GenerationConfig(max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0),
        "use_model_defaults": False,
        "eos_token_id": None,  # taken from the model unless it is given here
        "use_cache": True,
    }

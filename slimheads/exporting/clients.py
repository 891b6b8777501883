"""optimum's runtime as a client of the files that ship."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM, ORTModelForSpeechSeq2Seq

import slimheads.runtime.onnx_runtime  # noqa: F401 - telemetry off
from slimheads.models.generation import greedy_options, seq2seq_generate
from slimheads.runtime.quiet import quiet


def greedy_tokens(folder: Path, input_ids: torch.Tensor, attention_mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy continuation through optimum's unmodified `ORTModelForCausalLM`, with its cache.

    Args:
        folder: a folder with config.json and onnx/model.onnx.
        input_ids, attention_mask: int64 [batch, length].

    Returns:
        int64 [batch, length + new_tokens].
    """
    with quiet():
        model = ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name="model.onnx", use_cache=True)
        made = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **greedy_options(new_tokens),
        )
    return torch.as_tensor(made)


def seq2seq_greedy_tokens(
    folder: Path, inputs: Mapping[str, torch.Tensor], start: int, new_tokens: int, *, merged: bool
) -> torch.Tensor:
    """The same for an encoder-decoder, through `ORTModelForSeq2SeqLM` or `ORTModelForSpeechSeq2Seq`.

    Args:
        folder: a folder with config.json and onnx/.
        inputs: the encoder's: ids and mask, or features.
        start: the decoder's first token.
        merged: whether to use the merged decoder, or the other two.

    Returns:
        int64 [batch, 1 + new_tokens].
    """
    client = ORTModelForSpeechSeq2Seq if "input_features" in inputs else ORTModelForSeq2SeqLM
    with quiet():
        model = client.from_pretrained(folder, subfolder="onnx", use_cache=True, use_merged=merged)
        return torch.as_tensor(seq2seq_generate(model, inputs, start, new_tokens))

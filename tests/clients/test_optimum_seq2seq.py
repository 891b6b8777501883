"""optimum's runtime, unmodified, on the four files of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTModelForSpeechSeq2Seq
from shipped import Shipped
from tiny import spread
from transformers import PreTrainedModel

IDS = torch.randint(5, 120, (3, 9), generator=torch.Generator().manual_seed(0))
PADDED = {
    "right": torch.arange(9) < torch.tensor([[9], [4], [7]]),
    "left": torch.arange(9) >= torch.tensor([[0], [5], [2]]),
}


def inputs_of(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """One text, and several padded left and right; or recordings."""
    if model.config.model_type == "whisper":
        config = model.config
        sizes = (3, config.num_mel_bins, 2 * config.max_source_positions)
        features = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        return [{"input_features": features[:1]}, {"input_features": features}]
    padded = [{"input_ids": IDS.where(mask, 1), "attention_mask": mask.long()} for mask in PADDED.values()]
    return [{"input_ids": IDS[:1]}, *padded]


def client_of(made: Shipped, merged: bool) -> Any:
    client = ORTModelForSpeechSeq2Seq if made.slim.config.model_type == "whisper" else ORTModelForSeq2SeqLM
    model = client.from_pretrained(made.folder, use_cache=True, use_merged=merged)
    assert (model.decoder_with_past is None) == merged and model.decoder.is_merged == merged
    return model


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "split"])
def test_an_encoder_decoder_generates_torchs_tokens(
    exported_seq2seq: str, merged: bool, shipped: Callable[..., Shipped]
) -> None:
    made = shipped(exported_seq2seq)
    client = client_of(made, merged)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    as_dense = []
    for inputs in inputs_of(made.slim):
        expected, found = (torch.as_tensor(m.generate(**inputs, **options)) for m in (made.slim, client))
        assert expected.shape[1] >= 24 and torch.equal(found, expected)
        as_dense.append(torch.equal(torch.as_tensor(made.dense.generate(**inputs, **options)), expected))
    assert not all(as_dense)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "split"])
@pytest.mark.parametrize("model_type", spread("bart", "t5"))
def test_an_encoder_decoder_finds_torchs_beams(model_type: str, merged: bool, shipped: Callable[..., Shipped]) -> None:
    """Beam search reorders the cache of self-attention layer by layer."""
    made = shipped(model_type)
    client = client_of(made, merged)
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    for inputs in inputs_of(made.slim):
        expected = made.slim.generate(**inputs, **options)
        assert torch.equal(torch.as_tensor(client.generate(**inputs, **options)), expected)

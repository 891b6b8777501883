"""optimum's runtime, unmodified, on the folder that ships."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from optimum.exporters.tasks import TasksManager
from optimum.onnxruntime import (
    ORTModelForAudioClassification,
    ORTModelForCausalLM,
    ORTModelForCTC,
    ORTModelForCustomTasks,
    ORTModelForFeatureExtraction,
    ORTModelForImageClassification,
)
from shipped import Shipped
from tiny import AUDIO, VISION, spread
from transformers import AutoConfig, AutoTokenizer

from slimheads.data.inputs import make_inputs, to_torch
from slimheads.models.tasks import TASKS

TEXTS = ["Close the file.", "A mapping of names to values that keeps the order of insertion.", "Ünïcode — and 数字 42"]


def test_the_slim_minilm_gives_torchs_hidden_states(slim_minilm: Shipped) -> None:
    client = ORTModelForFeatureExtraction.from_pretrained(slim_minilm.folder)
    tokenizer = AutoTokenizer.from_pretrained(slim_minilm.folder)
    for texts in (TEXTS, TEXTS[1:2]):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = slim_minilm.slim(**batch).last_hidden_state
            dense = slim_minilm.dense(**batch).last_hidden_state
        real = batch["attention_mask"].bool()
        found = torch.as_tensor(client(**batch).last_hidden_state)
        assert found.shape == expected.shape
        assert (found - expected)[real].abs().max() <= 1e-4
        assert (found - dense)[real].abs().max() > 0.1


def test_an_encoder_of_every_type_gives_torchs_hidden_states(
    exported_encoder: str, shipped: Callable[..., Shipped]
) -> None:
    made = shipped(exported_encoder)
    client = ORTModelForFeatureExtraction.from_pretrained(made.folder)
    ids = torch.randint(5, 120, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7]])).long()
    with torch.no_grad():
        expected = made.slim(input_ids=ids, attention_mask=mask).last_hidden_state
    found = torch.as_tensor(client(input_ids=ids, attention_mask=mask).last_hidden_state)
    assert (found - expected)[mask.bool()].abs().max() <= 1e-4


CLIENTS = {
    "feature-extraction": ORTModelForFeatureExtraction,
    "image-classification": ORTModelForImageClassification,
    "object-detection": ORTModelForCustomTasks,
    "audio-classification": ORTModelForAudioClassification,
    "automatic-speech-recognition": ORTModelForCTC,
}


@pytest.mark.parametrize(
    "model_type,task",
    spread(
        *(
            (model_type, task)
            for model_type in sorted(VISION | AUDIO)
            for task in CLIENTS
            if type(AutoConfig.for_model(model_type)) in getattr(transformers, TASKS[task])._model_mapping
            and task in TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
        )
    ),
)
def test_every_model_of_images_or_sound_gives_torchs_outputs(
    model_type: str, task: str, shipped: Callable[..., Shipped]
) -> None:
    made = shipped(model_type, task)
    client = CLIENTS[task].from_pretrained(made.folder)
    for batch in (1, 3):
        feed = to_torch(make_inputs(made.dense.config, batch, 9, np.random.default_rng(batch)), made.slim)
        with torch.no_grad():
            expected = made.slim(**feed)[0]
        found = torch.as_tensor(client(**feed)[0])
        assert found.shape == expected.shape and (found - expected).abs().max() <= 1e-4


def test_a_decoder_generates_torchs_tokens_with_its_cache(
    exported_decoder: str, shipped: Callable[..., Shipped], prove: Callable[..., None]
) -> None:
    made = shipped(exported_decoder)
    client = ORTModelForCausalLM.from_pretrained(made.folder, use_cache=True)
    assert client.can_use_cache
    ids = torch.randint(5, 120, (3, 9), generator=torch.Generator().manual_seed(0))
    left = (torch.arange(9) >= torch.tensor([[0], [5], [2]])).long()
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    for inputs in ({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": left}):
        expected = made.slim.generate(**inputs, **options)
        found = torch.as_tensor(client.generate(**inputs, **options))
        assert expected.shape[1] == 33 and torch.equal(found, expected)
    prove("tokens", client="optimum", tokens=4 * 24)


def test_a_decoder_finds_torchs_beams(shipped: Callable[..., Shipped]) -> None:
    """Beam search reorders the cache layer by layer."""
    made = shipped("llama")
    client = ORTModelForCausalLM.from_pretrained(made.folder, use_cache=True)
    ids = torch.randint(5, 120, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) >= torch.tensor([[0], [3]])).long()
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    expected = made.slim.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(torch.as_tensor(client.generate(input_ids=ids, attention_mask=mask, **options)), expected)

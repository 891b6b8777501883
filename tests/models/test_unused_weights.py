"""Weights that a model does not use never vanish silently, and ordinary checkpoints pass all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_weights import change, refusal
from transformers import PreTrainedModel

from slimheads.models.loading import load
from slimheads.notices import collected

Tiny = Callable[..., PreTrainedModel]


def saved(tiny: Tiny, folder: Path, model_type: str, class_name: str, **config: Any) -> Path:
    """A checkpoint of any transformers class, of the sizes of a tiny model."""
    settings = type(tiny(model_type).config).from_dict(tiny(model_type).config.to_dict() | config)
    getattr(transformers, class_name)(settings).save_pretrained(folder)
    return folder


def told_of(folder: Path, task: str = "auto") -> tuple[str, list[str]]:
    with collected() as told:
        return type(load(folder, task)).__name__, told


@pytest.mark.parametrize(
    ("kind", "class_name", "head"),
    [
        ("bert", "BertForSequenceClassification", "classifier"),
        ("llama", "LlamaForSequenceClassification", "score.weight"),
    ],
)
def test_a_head_of_an_unknown_architecture_asks_for_the_task(
    tiny: Tiny, tmp_path: Path, kind: str, class_name: str, head: str
) -> None:
    saved(tiny, tmp_path, kind, class_name, pad_token_id=1)
    for architectures in (["OwnersModel"], [], None):
        error = refusal(change(tmp_path, architectures=architectures))
        assert head in error.what and "task" in error.hint
        assert "OwnersModel" in error.what or not architectures
    made, told = told_of(tmp_path, "feature-extraction")
    assert made.endswith("Model") and len(told) == 1 and head in told[0]
    assert told_of(tmp_path, "text-classification") == (class_name, [])


def test_a_head_that_transformers_knows_and_slimheads_does_not_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    error = refusal(saved(tiny, tmp_path, "bert", "BertForMultipleChoice"))
    assert "BertForMultipleChoice" in error.what and "classifier" in error.what


def test_an_unknown_architecture_without_a_head_is_told(tiny: Tiny, tmp_path: Path) -> None:
    saved(tiny, tmp_path, "bert", "BertModel")
    assert told_of(tmp_path) == ("BertModel", [])
    made, told = told_of(change(tmp_path, architectures=["OwnersModel"]))
    assert made == "BertModel" and len(told) == 1 and "OwnersModel" in told[0]


@pytest.mark.parametrize(
    ("kind", "class_name", "architectures", "made"),
    [
        ("bert", "BertForPreTraining", ["BertForMaskedLM"], "BertForMaskedLM"),
        ("bert", "BertForPreTraining", ["BertForPreTraining"], "BertModel"),
        ("bert", "BertForPreTraining", None, "BertModel"),
        ("bert", "BertForMaskedLM", ["BertModel"], "BertModel"),
        ("electra", "ElectraForPreTraining", ["ElectraForPreTraining"], "ElectraModel"),
        ("roberta", "RobertaForMaskedLM", ["RobertaForMaskedLM"], "RobertaForMaskedLM"),
        ("distilbert", "DistilBertForMaskedLM", None, "DistilBertModel"),
        ("gpt2", "GPT2LMHeadModel", ["GPT2LMHeadModel"], "GPT2LMHeadModel"),
        ("vit", "ViTForImageClassification", ["ViTForImageClassification"], "ViTForImageClassification"),
    ],
)
def test_checkpoints_of_pretraining_pass(
    tiny: Tiny, tmp_path: Path, kind: str, class_name: str, architectures: list[str] | None, made: str
) -> None:
    change(saved(tiny, tmp_path, kind, class_name), architectures=architectures)
    found, told = told_of(tmp_path)
    assert found == made
    assert bool(told) == (class_name != made) and all("does not use" in line for line in told)


def test_buffers_of_other_versions_are_no_weights(tiny: Tiny, tmp_path: Path) -> None:
    saved(tiny, tmp_path / "bert", "bert", "BertModel")
    change(tmp_path / "bert", lambda all_: all_ | {"embeddings.position_ids": torch.arange(160)[None]})
    assert told_of(tmp_path / "bert")[1] == []
    saved(tiny, tmp_path / "neox", "gpt_neox", "GPTNeoXForCausalLM")
    masks = {f"gpt_neox.layers.0.attention.{name}": torch.ones(1, 1, 8, 8) for name in ("bias", "mask.bias")}
    rotary = {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}
    masked = {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}
    change(tmp_path / "neox", lambda all_: all_ | masks | rotary | masked)
    assert told_of(tmp_path / "neox")[1] == []


@pytest.mark.parametrize("key", ["torchscript", "output_attentions", "output_hidden_states", "gradient_checkpointing"])
def test_how_a_model_is_run_is_not_carried_over(tiny: Tiny, tmp_path: Path, key: str) -> None:
    saved(tiny, tmp_path, "bert", "BertModel")
    plain = load(tmp_path).config.to_dict()
    with collected() as told:
        model = load(change(tmp_path, **{key: True}))
    assert model.config.to_dict() == plain
    assert len(told) == 1 and f"'{key}: true'" in told[0]


def test_a_model_that_gives_tuples_gives_named_outputs(tiny: Tiny, tmp_path: Path) -> None:
    saved(tiny, tmp_path, "bert", "BertModel")
    ids = torch.arange(4, 12)[None]
    wanted = load(tmp_path)(ids).last_hidden_state
    assert torch.equal(load(change(tmp_path, return_dict=False))(ids).last_hidden_state, wanted)


def test_labels_may_have_the_names_of_switches(tiny: Tiny, tmp_path: Path) -> None:
    labels = {"0": "torchscript", "1": "no"}
    tiny("bert", task="text-classification").save_pretrained(tmp_path)
    change(tmp_path, id2label=labels, label2id={"torchscript": 0, "no": 1})
    assert load(tmp_path).config.label2id == {"torchscript": 0, "no": 1}

"""What does not fit a model is refused for its own cause, with its own remedy; what fits in another form passes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.models.loading import load

Tiny = Callable[..., PreTrainedModel]
Tensors = dict[str, torch.Tensor]


def change(folder: Path, tensors: Callable[[Tensors], Mapping[str, torch.Tensor]] | None = None, **config: Any) -> Path:
    """Rewrites a saved model's weights, and sets keys of its config.json."""
    if tensors:
        file = folder / "model.safetensors"
        changed = {name: tensor.clone().contiguous() for name, tensor in tensors(load_file(file)).items()}
        save_file(changed, file, {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def refusal(folder: Path, task: str = "auto") -> ModelRefusedError:
    with pytest.raises(ModelRefusedError) as refused:
        load(folder, task)
    return refused.value


@pytest.fixture
def llama(tiny: Tiny, tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def bert(tiny: Tiny, tmp_path: Path) -> Path:
    tiny("bert", task="feature-extraction").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("_orig_mod.", "model._orig_mod.save_pretrained"),
        ("module.", "model.module.save_pretrained"),
        ("_orig_mod.module.", "rename"),
        ("module._orig_mod.", "rename"),
        ("net.", "rename"),
        ("model.", "rename"),  # which is a part of llama's own names as well
        ("wrapped.inner.", "rename"),
    ],
)
def test_a_prefix_is_named_with_what_to_do_about_it(llama: Path, prefix: str, remedy: str) -> None:
    error = refusal(change(llama, lambda all_: {prefix + name: tensor for name, tensor in all_.items()}))
    assert error.where == str(llama / "model.safetensors")
    assert prefix in error.what or any(part in error.what for part in ("_orig_mod.", "module."))
    assert remedy in error.hint and "task" not in error.hint


@pytest.mark.parametrize("prefix", ["model.", "bert_model."])
def test_a_prefix_before_an_encoder_with_a_head(tiny: Tiny, tmp_path: Path, prefix: str) -> None:
    tiny("bert", task="text-classification").save_pretrained(tmp_path)
    error = refusal(change(tmp_path, lambda all_: {prefix + name: tensor for name, tensor in all_.items()}))
    assert f"'{prefix}'" in error.what and "rename" in error.hint


def test_a_part_that_was_compiled_is_found_inside_the_names(llama: Path) -> None:
    error = refusal(change(llama, lambda a: {n.replace("mlp.", "_orig_mod.mlp."): t for n, t in a.items()}))
    assert "_orig_mod." in error.what


def test_an_adapter_inside_the_weights_is_to_be_merged(llama: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    error = refusal(change(llama, lambda all_: all_ | {name: torch.ones(2, 32)}))
    assert name in error.what and "merge" in error.hint


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapters_file_is_refused_alone_and_beside_weights(llama: Path, name: str, weights: bool) -> None:
    (llama / name).write_text("{}")
    if not weights:
        for other in ("model.safetensors", "config.json"):
            (llama / other).unlink()
    error = refusal(llama)
    assert error.where == str(llama / name) and "adapter" in error.what and "merge" in error.hint
    assert ("remove the adapter's files" in error.hint) == weights


def test_another_shape_is_named_in_full_with_both_shapes(bert: Path) -> None:
    error = refusal(change(bert, intermediate_size=64))
    assert "encoder.layer.0.intermediate.dense" in error.what and "48" in error.what and "64" in error.what
    assert error.where == str(bert / "config.json") and "config.json" in error.hint


@pytest.mark.parametrize(("task", "head"), [("text-classification", "classifier"), ("fill-mask", "cls.predictions")])
def test_a_head_that_lacks_is_anothers_tasks(bert: Path, task: str, head: str) -> None:
    error = refusal(bert, task)
    assert head in error.what and "name the task" in error.hint


def test_layers_that_lack_are_no_matter_of_the_task(bert: Path) -> None:
    error = refusal(change(bert, num_hidden_layers=4))
    assert "encoder.layer.3" in error.what and "task" not in error.hint


def test_biases_that_config_json_does_not_count(tiny: Tiny, tmp_path: Path) -> None:
    tiny("llama", attention_bias=True).save_pretrained(tmp_path)
    error = refusal(change(tmp_path, attention_bias=False))
    assert "_proj.bias" in error.what and "as config.json describes it" in error.what


# Tied tensors

TABLE = "model.embed_tokens.weight"


def test_a_head_that_lacks_and_is_not_tied_is_named_with_the_key(llama: Path) -> None:
    error = refusal(change(llama, lambda a: {n: t for n, t in a.items() if n != "lm_head.weight"}))
    assert "lm_head.weight" in error.what and "tie_word_embeddings" in error.hint


def test_a_tied_head_may_be_stored_too(llama: Path) -> None:
    model = load(change(llama, lambda all_: all_ | {"lm_head.weight": all_[TABLE]}, tie_word_embeddings=True))
    assert model.get_parameter("lm_head.weight") is model.get_parameter(TABLE)


@pytest.mark.parametrize(
    ("kind", "task", "head", "table"),
    [
        ("llama", "text-generation", "lm_head.weight", TABLE),
        ("t5", "text2text-generation", "lm_head.weight", "shared.weight"),
        ("bert", "fill-mask", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_a_tied_head_with_other_values_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, kind: str, task: str, head: str, table: str
) -> None:
    tiny(kind, task=task, tie_word_embeddings=True).save_pretrained(tmp_path)
    load(tmp_path)

    def one_value(all_: Tensors) -> Tensors:
        other = all_[table].clone()
        other[-1, -1] += 1
        return all_ | {head: other}

    error = refusal(change(tmp_path, one_value))
    assert head in f"{error.what}" and table in error.what and "tie_word_embeddings" in error.hint
    if kind != "bert":  # whose head shares the table whatever the key says in what was saved
        load(change(tmp_path, tie_word_embeddings=False))


# Padding of classifiers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", [None, -1, 120, 5000])
def test_a_decoder_that_classifies_needs_a_padding_token(
    tiny: Tiny, tmp_path: Path, kind: str, padding: int | None
) -> None:
    tiny(kind, task="text-classification", pad_token_id=1).save_pretrained(tmp_path)
    load(tmp_path)
    error = refusal(change(tmp_path, pad_token_id=padding))
    assert error.what.startswith(f"pad_token_id is {json.dumps(padding)}") and error.where.endswith("config.json")


def test_an_encoder_that_classifies_needs_none(tiny: Tiny, tmp_path: Path) -> None:
    tiny("distilbert", task="text-classification").save_pretrained(tmp_path)
    load(change(tmp_path, pad_token_id=None))


def test_a_padding_token_beyond_the_vocabulary_is_named(llama: Path) -> None:
    error = refusal(change(llama, pad_token_id=120))
    assert "pad_token_id" in error.what and error.where.endswith("config.json")

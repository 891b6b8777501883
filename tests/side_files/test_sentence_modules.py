"""sentence-transformers' folders: what is carried, what is refused by name, and how drift embeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sentence_folders import change, copied, lay_out, write
from sentence_transformers.models import Dense, LayerNorm, Pooling
from whole_runs import slimheads, write_recipe

from slimheads.errors import ModelRefusedError
from slimheads.models.checkpoint import find
from slimheads.notices import collected
from slimheads.pipeline.checks import require_side_files
from slimheads.recipe.recipe import Recipe
from slimheads.side_files.embedding import MODES, embedding_of, require_embedding
from slimheads.side_files.sentence_modules import sentence_modules

MEAN = {"pooling_mode_mean_tokens": True}
DENSE = {"in_features": 6, "out_features": 4, "activation_function": "torch.nn.modules.activation.Tanh"}
CLASSIFIES = {"transformer_task": "sequence-classification"}
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def states(width: int = 6) -> torch.Tensor:
    return torch.randn(3, 4, width, generator=torch.Generator().manual_seed(0))


def save_weights(folder: Path, module: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(module.state_dict(), folder / "model.safetensors")
    return folder


def theirs(modes: Any, *after: Any) -> torch.Tensor:
    """What sentence-transformers' own modules make of the states."""
    features = {"token_embeddings": states(), "attention_mask": MASK}
    for module in (Pooling(6, pooling_mode=modes), *after):
        features = module(features)
    return features["sentence_embedding"].detach()


def older(*modes: str) -> dict[str, bool]:
    """The keys of older versions; their names do not follow one rule."""
    names = {"cls": "cls_token", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "lasttoken": "lasttoken"}
    return {f"pooling_mode_{names.get(mode, f'{mode}_tokens')}": mode in modes for mode in MODES}


@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), ("cls", "max", "lasttoken"), ("mean", "weightedmean")])
@pytest.mark.parametrize("words", ["older", "newer"])
def test_pooling_is_that_of_sentence_transformers(modes: tuple[str, ...], words: str, tmp_path: Path) -> None:
    settings = older(*modes) if words == "older" else {"pooling_mode": modes[0] if len(modes) == 1 else list(modes)}
    lay_out(tmp_path, {"1_Pooling": settings})
    torch.testing.assert_close(embedding_of(tmp_path).pool(states(), MASK), theirs(modes))


def test_what_follows_the_pooling_is_part_of_the_embedding(tmp_path: Path) -> None:
    norm, dense = LayerNorm(6), Dense(6, 4, activation_function=torch.nn.GELU())
    with torch.no_grad():
        norm.norm.weight.uniform_(0.5, 2)
    settings = DENSE | {"activation_function": "torch.nn.modules.activation.GELU"}
    lay_out(tmp_path, {"1_Pooling": MEAN, "2_LayerNorm": {"dimension": 6}, "3_Dense": settings, "4_Normalize": {}})
    save_weights(tmp_path / "2_LayerNorm", norm)
    save_weights(tmp_path / "3_Dense", dense)
    found = embedding_of(tmp_path)
    torch.testing.assert_close(found.pool(states(), MASK), theirs("mean", norm, dense))
    assert str(found) == "mean, then 2_LayerNorm, then 3_Dense"
    require_embedding(tmp_path, 6)
    with pytest.raises(ModelRefusedError, match="do not fit a model of width 8"):
        require_embedding(tmp_path, 8)


def test_prompts_cases_and_lengths_are_those_of_the_folder(tmp_path: Path) -> None:
    lay_out(tmp_path, {"1_Pooling": MEAN | {"include_prompt": False}})
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 7, "do_lower_case": True})
    write(
        tmp_path / "config_sentence_transformers.json",
        {"prompts": {"query": "Find: ", "document": ""}, "default_prompt_name": "query"},
    )
    found = embedding_of(tmp_path)
    assert (found.max_tokens, found.prompt_pooled) == (7, False)
    assert found.texts(["The Cat"]) == ["Find: the cat"]
    change(tmp_path / "config_sentence_transformers.json", default_prompt_name="none")
    with pytest.raises(ModelRefusedError, match="names no prompt"):
        embedding_of(tmp_path)


def test_without_modules_the_mean_is_measured(tmp_path: Path) -> None:
    assert str(embedding_of(tmp_path)) == "mean"
    assert sentence_modules(tmp_path) == ()


def entry(**changes: Any) -> list[dict[str, Any]]:
    """modules.json with a transformer and one module more."""
    first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    second = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    return [first, second | changes]


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ("{", "not readable as JSON"),
        ({}, "not a JSON list"),
        ([], "not a transformer"),
        ([7], "without a name, a type or a path"),
        (entry(type=None), "without a name, a type or a path"),
        (entry(path="../1_Pooling"), "leads out of the folder"),
        (entry(path="/etc"), "leads out of the folder"),
        (entry(path="C:\\x"), "leads out of the folder"),
        (entry(type="mymodule.MyModule"), "'mymodule.MyModule' is not a class of sentence-transformers"),
        (entry(type="sentence_transformers_evil.models.Pooling"), "is not a class of sentence-transformers"),
        (entry(type="evil.sentence_transformers.models.Pooling"), "is not a class of sentence-transformers"),
        (entry(type="sentence_transformers.models.WeightedLayerPooling"), "WeightedLayerPooling is not covered"),
        (entry(type="sentence_transformers.util.import_from_string"), "import_from_string is not covered"),
        (entry(path=""), "not a module with its own folder"),
        (entry()[1:], "not a transformer"),
        ([entry(type="sentence_transformers.models.StaticEmbedding")[1]], "StaticEmbedding is not covered"),
    ],
)
def test_modules_that_cannot_be_carried_are_refused_by_name(modules: Any, said: str, tmp_path: Path) -> None:
    copied(tmp_path / "m")
    write(tmp_path / "m" / "modules.json", modules)
    with pytest.raises(ModelRefusedError, match=said) as caught:
        find(str(tmp_path / "m"))
    assert caught.value.where == str(tmp_path / "m" / "modules.json")


@pytest.mark.parametrize("inside", ["0_Transformer", "0_BERT", "model"])
def test_a_transformer_in_a_folder_of_its_own_is_refused_with_the_folder_to_give(inside: str, tmp_path: Path) -> None:
    copied(tmp_path / "m" / inside)
    lay_out(tmp_path / "m", {"1_Pooling": MEAN}, path=inside)
    ended = slimheads("run", write_recipe(tmp_path / "r.yaml", tmp_path / "m"), "--out", tmp_path / "out")
    assert ended.code == 3 and f"or use {tmp_path / 'm' / inside} " in ended.err
    assert find(str(tmp_path / "m" / inside)).task == "feature-extraction"


@pytest.mark.parametrize("name", ["2_Dense", "2_LayerNorm"])
def test_a_modules_pickled_or_missing_weights_are_named(name: str, tmp_path: Path) -> None:
    source = lay_out(copied(tmp_path / "m"), {"1_Pooling": MEAN, name: DENSE})
    with pytest.raises(ModelRefusedError, match=r"no model\.safetensors") as caught:
        find(str(source))
    assert caught.value.where == str(source / name)
    write(source / name / "pytorch_model.bin", "")
    with pytest.raises(ModelRefusedError, match="pickled") as caught:
        find(str(source))
    assert caught.value.where == str(source / name / "pytorch_model.bin")
    write(source / name / "model.safetensors", "cut")
    with pytest.raises(ModelRefusedError, match="damaged module"):
        require_side_files(Recipe(model="m"), find(str(source)))


@pytest.mark.parametrize("named", ["os.getcwd", "torch.hub.list", "torch.nn.modules.activation.Tanh.forward", 7])
def test_an_activation_function_is_a_class_of_torch_nn(named: Any, tmp_path: Path) -> None:
    source = lay_out(copied(tmp_path / "m"), {"1_Pooling": MEAN, "2_Dense": DENSE | {"activation_function": named}})
    save_weights(source / "2_Dense", Dense(6, 4))
    with pytest.raises(ModelRefusedError, match=str(named)) as caught:
        find(str(source))
    assert caught.value.where == str(source / "2_Dense" / "config.json")


@pytest.mark.parametrize(
    ("kind", "architecture", "first", "settings", "task"),
    [
        ("llama", "LlamaForCausalLM", "Transformer", {}, "feature-extraction"),
        ("gpt2", "GPT2LMHeadModel", "Transformer", {"transformer_task": "text-generation"}, "text-generation"),
        ("bert", "BertForMaskedLM", "Transformer", {}, "feature-extraction"),
        ("bert", "BertForMaskedLM", "MLMTransformer", {}, "fill-mask"),
        ("bert", "BertForSequenceClassification", "Transformer", CLASSIFIES, "text-classification"),
    ],
)
def test_the_modules_say_the_task(
    kind: str, architecture: str, first: str, settings: dict[str, Any], task: str, tmp_path: Path
) -> None:
    source = lay_out(copied(tmp_path / "m", kind), {"1_Pooling": MEAN}, first)
    change(source / "config.json", architectures=[architecture])
    write(source / "sentence_bert_config.json", settings)
    assert find(str(source)).task == task


def test_a_task_that_the_modules_cannot_use_is_told_with_the_one_they_can(tmp_path: Path) -> None:
    source = lay_out(copied(tmp_path / "m", "gpt2"), {"1_Pooling": MEAN})
    with collected() as told:
        require_side_files(Recipe(model="m"), find(str(source)))
        assert not told
        require_side_files(Recipe(model="m"), find(str(source), "text-generation"))
    assert ["set task: feature-extraction" in text for text in told] == [True]


def test_an_encoder_decoder_among_the_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match="only the encoder of an encoder-decoder"):
        find(str(lay_out(copied(tmp_path / "m", "t5"), {"1_Pooling": MEAN})))

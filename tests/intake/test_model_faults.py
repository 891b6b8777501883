"""Damaged, unsafe and foreign checkpoints: each is refused with code 3, in one line that names the place."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.families.sites import find_sites, of_kind
from slimheads.models.checkpoint import find
from slimheads.models.loading import load, save
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.surgery import prune

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense BERT, a slim BERT, one slim in neurons and layers, a slim Llama and a sharded GPT-2, saved once."""
    root = tmp_path_factory.mktemp("originals")
    save(tiny_model("bert"), root / "bert")
    for model_type in ("bert", "llama"):
        model = tiny_model(model_type)
        heads = of_kind(find_sites(model), "attention")
        plan = Plan(tuple(SitePlan(s.name, s.unit, s.total, (0, 2)) for s in heads))
        save(prune(model, plan), root / f"slim {model_type}")
    model = tiny_model("bert")
    neurons = SitePlan("encoder.layer.0", "neuron", 48, tuple(range(40)), "feed_forward")
    save(prune(model, Plan((neurons, SitePlan("encoder.layer.1", "layer", 1, (), "layer")))), root / "slim in kinds")
    save(tiny_model("llama"), root / "llama")
    tiny_model("gpt2").save_pretrained(root / "sharded", max_shard_size="20KB")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def checkpoint(originals: dict[str, Path], tmp_path: Path) -> Checkpoint:
    """`checkpoint(name, **config changes)`: a copy that may be damaged."""

    def copied(name: str = "bert", **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(originals[name], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return copied


def refusal(folder: Path, task: str = "auto") -> ModelRefusedError:
    with pytest.raises(ModelRefusedError) as refused:
        load(folder, task)
    assert refused.value.exit_code == 3
    assert "\n" not in str(refused.value)
    return refused.value


@pytest.mark.parametrize("name", ["bert", "slim bert", "llama", "slim llama", "sharded"])
def test_what_is_not_damaged_loads(checkpoint: Checkpoint, name: str) -> None:
    assert isinstance(load(checkpoint(name)), PreTrainedModel)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(data)] = data
    path.write_bytes(bytes(whole))


@pytest.mark.parametrize("name", ["bert", "slim bert"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: cut(path, 0),
        lambda path: cut(path, 5),
        lambda path: cut(path, 300),
        lambda path: cut(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: overwrite(path, 0, struct.pack("<Q", 2**62)),
        lambda path: overwrite(path, 8, b"["),
        lambda path: overwrite(path, 40, b"\xff\xff"),
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ],
    ids=[
        "empty",
        "no header",
        "cut header",
        "one byte short",
        "one byte more",
        "long",
        "not JSON",
        "not UTF-8",
        "LFS pointer",
    ],
)
def test_damaged_weights_are_refused_by_file(checkpoint: Checkpoint, name: str, damage: Callable[[Path], None]) -> None:
    folder = checkpoint(name)
    damage(folder / "model.safetensors")
    assert refusal(folder).where == str(folder / "model.safetensors")


def test_a_damaged_or_missing_shard_is_refused_by_file(checkpoint: Checkpoint) -> None:
    folder = checkpoint("sharded")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    cut(shard, shard.stat().st_size - 1)
    assert refusal(folder).where == str(shard)
    shard.unlink()
    error = refusal(folder)
    assert error.where == str(shard) and "missing" in error.what


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {}}']
)
def test_a_damaged_index_is_refused(checkpoint: Checkpoint, index: str) -> None:
    folder = checkpoint("sharded")
    (folder / "model.safetensors.index.json").write_text(index)
    assert "index" in str(refusal(folder))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/model.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(checkpoint: Checkpoint, name: str) -> None:
    folder = checkpoint("sharded")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"wte.weight": name}})
    )
    refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights_are_refused_with_a_remedy(checkpoint: Checkpoint, name: str) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").rename(folder / name)
    error = refusal(folder)
    assert error.where == str(folder / name) and "safe_serialization" in error.hint


def test_no_weights_at_all_are_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder).what


@pytest.mark.parametrize("name", ["bert", "slim bert"])
@pytest.mark.parametrize("tensor", ["encoder.layer.1.attention.self.key.bias", "embeddings.LayerNorm.weight"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite_is_refused_by_name(
    checkpoint: Checkpoint, name: str, tensor: str, bad: float
) -> None:
    folder = checkpoint(name)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].view(-1)[-1] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert refusal(folder).where == tensor


@pytest.mark.parametrize("name", ["bert", "slim bert"])
def test_a_missing_or_misshapen_tensor_is_refused(checkpoint: Checkpoint, name: str) -> None:
    folder = checkpoint(name)
    tensors = load_file(folder / "model.safetensors")
    tensor = "encoder.layer.1.attention.self.key.weight"
    save_file(tensors | {tensor: torch.zeros(3, 5)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "has the shape [3, 5]" in refusal(folder).what
    tensors.pop(tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert tensor in refusal(folder).what


@pytest.mark.parametrize(
    "changes,what",
    [
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of 5"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"num_hidden_layers": 5}, "encoder.layer.3"),
        ({"num_hidden_layers": 2}, "encoder.layer.2.attention"),
        ({"num_hidden_layers": 0}, "encoder.layer.0.attention"),
        ({"num_hidden_layers": -1}, "encoder.layer.0.attention"),
        ({"num_hidden_layers": "3"}, "cannot load"),
        ({"hidden_size": 0}, "by config.json"),
        ({"hidden_size": "32"}, "damaged configuration"),
        ({"vocab_size": -1}, "cannot load"),
        ({"pad_token_id": 500}, "pad_token_id"),
        ({"hidden_act": "nope"}, "nope"),
        ({"architectures": 5}, "architectures"),
        ({"architectures": [5]}, "architectures"),
        ({"architectures": "BertModel"}, "architectures"),
        ({"dtype": 5}, "cannot load"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights are not covered"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantized weights"),
        ({"pruned_heads": {"0": [1]}}, "prune_heads"),
        ({"pruned_heads": {"x": [1]}}, "damaged configuration"),
        ({"add_cross_attention": True}, "cross-attention is not covered"),
        ({"is_decoder": True}, "encoder only"),
        ({"is_decoder": "true"}, "encoder only"),
        ({"model_type": "reformer"}, "'reformer' is not covered"),
        ({"model_type": "olmo2"}, "'olmo2' is refused: queries and keys are normalized over all heads together"),
        ({"model_type": "bertt"}, "the nearest covered one is 'bert'"),
        ({"model_type": 5}, "no model_type"),
    ],
    ids=str,
)
def test_a_damaged_or_foreign_configuration_is_refused(
    checkpoint: Checkpoint, changes: dict[str, Any], what: str
) -> None:
    assert what in refusal(checkpoint(**changes)).what


@pytest.mark.parametrize(
    "changes,what",
    [
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 16}, "cannot share 16"),
    ],
    ids=str,
)
def test_damaged_group_counts_are_refused(checkpoint: Checkpoint, changes: dict[str, Any], what: str) -> None:
    assert what in refusal(checkpoint("llama", **changes)).what


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"bert"', "{}", "\xff\xfe"])
def test_a_config_that_is_no_configuration_is_refused(checkpoint: Checkpoint, text: str) -> None:
    folder = checkpoint()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert str(folder) in str(refusal(folder).where)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path).what


KERNEL = "someone/kernel"


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation_internal": KERNEL},
        {"_attn_implementation": KERNEL},
        {"attn_implementation": f"{KERNEL}@main:function"},
        {"experts_implementation": KERNEL},
        {"_attn_implementation_internal": {"": KERNEL}},
        {"text_config": {"_attn_implementation_internal": KERNEL}},
        {"a": {"b": {"_attn_implementation_internal": KERNEL}}},
        {"towers": [{"_attn_implementation_internal": KERNEL}]},
    ],
    ids=str,
)
def test_a_config_that_names_code_to_run_is_refused(checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
    folder = checkpoint(**changes)
    with pytest.raises(ModelRefusedError, match="names code to download and run"):
        find(str(folder))
    refusal(folder)


def test_a_harmless_implementation_key_is_dropped(checkpoint: Checkpoint) -> None:
    assert load(checkpoint(_attn_implementation="flash_attention_2")).config._attn_implementation == "sdpa"


def test_code_beside_a_checkpoint_never_runs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint(auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    load(folder)
    assert not (tmp_path / "ran").exists()


SITE = {"site": "encoder.layer.0.attention", "unit": "head", "total": 4, "kept": [0, 2]}


@pytest.mark.parametrize(
    "record",
    [
        5,
        "plan",
        [],
        {},
        {"format": 1},
        {"format": 3},
        {"sites": []},
        {"sites": None},
        {"sites": [SITE]},
        {"sites": [SITE, SITE, SITE]},
        {"sites": [SITE | {"kept": "02"}]},
        {"dense": None},
        {"dense": {"num_attention_heads": 4}},
        {"dense": {"num_attention_heads": "4"}},
        {"dense": {"num_attention_heads": 4, "model_type": 3}},
        {"dense": {"num_attention_heads": 8}},
        {"dense": {"num_attention_heads": 0}},
        {"site 0": {"kept": [0, 1, 2]}},
        {"site 0": {"kept": [0]}},
        {"site 0": {"kept": []}},
        {"site 0": {"kept": [2, 0]}},
        {"site 0": {"kept": [0, 4]}},
        {"site 0": {"kept": [[0, 4]]}},
        {"site 0": {"kind": "layer"}},
        {"site 0": {"kind": None}},
        {"site 0": {"total": 5}},
        {"site 0": {"unit": "kv_group"}},
        {"site 0": {"site": "encoder.layer.9.attention"}},
    ],
    ids=str,
)
def test_a_damaged_plan_record_is_refused(checkpoint: Checkpoint, record: Any) -> None:
    folder = checkpoint("slim bert")
    config = json.loads((folder / "config.json").read_text())
    if isinstance(record, dict) and record:
        whole = config["slimheads"]
        change = dict(record)
        whole["sites"][0] |= change.pop("site 0", {})
        record = whole | change if record != {"format": 1} else record
    (folder / "config.json").write_text(json.dumps(config | {"slimheads": record}))
    refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {0: {"kept": [[0, 48]]}},
        {0: {"kept": [[0, 39], 39]}},
        {0: {"kept": [[0, 40]]}},  # one more than there are
        {0: {"kept": [[1, 39]]}},
        {0: {"total": 47}},
        {0: {"kind": "attention"}},
        {0: {"kind": "layer"}},
        {0: {"site": "encoder.layer.1"}},  # it is in the layer that goes
        {0: {"site": "encoder.layer.2"}},
        {1: {"kept": [0]}},
        {1: {"site": "encoder.layer.3"}},
        {1: {"site": "encoder.layer"}},
        {1: {"site": "encoder"}},
        {1: {"site": ""}},
        {1: {"unit": "neuron"}},
        {1: {"total": 2}},
        {"dense": {}},
        {"dense": {"num_hidden_layers": 2}},
        {"dense": {"num_hidden_layers": "3"}},
        {"dense": {"num_hidden_layers": -3}},
        {"dense": {"num_hidden_layers": 3, "hidden_size": 64}},
        {"dense": {"num_hidden_layers": 3, "intermediate_size": 40}},
    ],
    ids=str,
)
def test_a_damaged_record_of_neurons_or_layers_is_refused(checkpoint: Checkpoint, changes: dict[Any, Any]) -> None:
    folder = checkpoint("slim in kinds")
    load(folder)
    config = json.loads((folder / "config.json").read_text())
    record = config["slimheads"]
    for place, change in changes.items():
        if place == "dense":
            record["dense"] = change
        else:
            record["sites"][place] |= change
    (folder / "config.json").write_text(json.dumps(config))
    refusal(folder)


def test_a_slim_checkpoint_without_its_plan_is_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint("slim bert")
    config = json.loads((folder / "config.json").read_text())
    del config["slimheads"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "prune_heads" in refusal(folder).what
    del config["pruned_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "has the shape" in refusal(folder).what

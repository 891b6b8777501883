"""What a model folder is judged by before transformers sees it: allow-lists, never a try.

The oracles are transformers itself (which keys published models have, what a rotary angle is), a file that a model's
code would write, and a socket that may not be opened.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from whole_runs import slimheads

from slimheads.errors import ModelRefusedError
from slimheads.families.family import covered_types
from slimheads.intake.config_keys import allowed, is_tokenizer
from slimheads.models.checkpoint import find, read_config
from slimheads.models.loading import load, save

Tiny = Callable[..., PreTrainedModel]
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    for model_type in ("bert", "clip", "dpt"):
        tiny_model(model_type).save_pretrained(root / model_type)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def folder(originals: dict[str, Path], tmp_path: Path) -> Folder:
    """`folder(kind, **config changes)`: a copy of a small model's folder."""

    def copied(kind: str = "bert", **changes: Any) -> Path:
        target = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(originals[kind], target)
        write(target / "config.json", json.loads((target / "config.json").read_text()) | changes)
        return target

    return copied


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def refusal(folder: Path) -> ModelRefusedError:
    with pytest.raises(ModelRefusedError) as refused:
        find(str(folder))
    assert "\n" not in str(refused.value)
    return refused.value


# what passes


def test_every_covered_model_as_transformers_writes_it_passes(tiny: Tiny, tmp_path: Path, variety: str) -> None:
    config = tiny(variety).config
    config.save_pretrained(tmp_path)
    config.to_json_file(tmp_path / "whole.json", use_diff=False)
    for text in ((tmp_path / "config.json").read_text(), (tmp_path / "whole.json").read_text()):
        (tmp_path / "config.json").write_text(text)
        read = read_config(tmp_path).to_dict()
        expected = AutoConfig.for_model(**json.loads(text)).to_dict()
        ours_to_choose = {"_name_or_path", "transformers_version", "_attn_implementation_internal"}
        assert {k: v for k, v in read.items() if k not in ours_to_choose} == {
            k: v for k, v in expected.items() if k not in ours_to_choose
        }


def test_every_tokenizer_of_a_covered_model_is_on_the_list() -> None:
    names = {name for kind in covered_types() for name in TOKENIZER_MAPPING_NAMES.get(kind, ()) if name}
    assert {name for name in names if not is_tokenizer(name)} == set()


# Keys of config.json files that are on the hub, each beside those that the class knows.
PUBLISHED: dict[str, dict[str, Any]] = {
    "bert": {
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "gradient_checkpointing": False,
        "output_past": True,
        "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
        "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "4.1.0"},
        "eos_token_ids": 0,
        "language": "german",
        "name": "",
    },
    "gpt2": {
        "n_ctx": 1024,
        "n_special": 0,
        "predict_special_tokens": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "output_past": True,
        "top_p": 0.9,
    },
    "llama": {
        "max_sequence_length": 2048,
        "unsloth_version": "2024.9",
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "quantization_config": None,
    },
    "qwen2": {"use_mrope": False, "max_window_layers": 21, "use_sliding_window": False},
    "phi3": {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False},
    "gemma2": {"cache_implementation": "hybrid", "hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {"sliding_window_pattern": 6, "use_bidirectional_attention": True},
    "distilbert": {"tie_weights_": True, "output_past": True},
    "bart": {
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "normalize_before": False,
        "normalize_embedding": True,
        "extra_pos_embeddings": 2,
        "force_bos_token_to_be_generated": False,
        "static_position_embeddings": False,
        "_num_labels": 3,
    },
    "t5": {"n_positions": 512, "output_past": True},
    "bloom": {
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "masked_softmax_fusion": True,
        "offset_alibi": 100,
        "pretraining_tp": 4,
        "seq_length": 2048,
        "skip_bias_add": True,
        "n_inner": None,
        "unk_token_id": 0,
    },
    "wav2vec2": {
        "freeze_feat_extract_train": True,
        "mask_channel_length": 10,
        "mask_channel_selection": "static",
        "no_mask_channel_overlap": False,
        "mask_time_min_space": 1,
    },
    "albert": {"down_scale_factor": 1, "gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0},
    "swin": {"path_norm": True},
    "modernbert": {"position_embedding_type": "absolute"},
    "mpt": {"tokenizer_name": "EleutherAI/gpt-neox-20b", "init_device": "cpu", "verbose": 0},
    "deberta-v2": {"norm_rel_ebd": "layer_norm", "position_buckets": 256, "share_att_key": True},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_left_over_keys_of_published_models_pass(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    tiny(kind).config.save_pretrained(tmp_path)
    write(tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text()) | PUBLISHED[kind])
    assert read_config(tmp_path).model_type == kind


# keys of config.json


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"attribute_map": {"hidden_size": "vocab_size"}}, "attribute_map"),
        ({"sub_configs": {"text_config": 1}}, "sub_configs"),
        ({"attn_output_gate": True}, "attn_output_gate"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters"),
        ({"position_embedding_kind": "rotary"}, "position_embedding_kind"),
        ({"adapters": {"a": 1}}, "adapters"),
        ({"use_kernels": True}, "use_kernels"),
        ({"num_residual_streams": 4}, "num_residual_streams"),
        ({"from_dict": "x"}, "from_dict"),
        ({"text_config": {"model_type": "lightglue"}}, "text_config"),
        ({"task_specific_params": {"a": {"model_type": "lightglue"}}}, "task_specific_params.a"),
        ({"tokenizer_class": "RagTokenizer"}, "RagTokenizer"),
        ({"tokenizer_class": "AutoModel"}, "AutoModel"),
        ({"sbert_ce_default_activation_function": "mymodule.Evil"}, "mymodule.Evil"),
        ({"sentence_transformers": {"activation_fn": "os.system"}}, "os.system"),
        ({"architectures": ["../evil"]}, "architectures"),
    ],
    ids=str,
)
def test_a_key_that_changes_what_is_loaded_or_computed_is_refused_by_name(
    folder: Folder, changes: dict[str, Any], named: str
) -> None:
    error = refusal(folder(**changes))
    assert named in error.what and str(error.where).endswith("config.json")


@pytest.mark.parametrize("empty", [None, False, "", [], {}])
def test_an_empty_key_means_nothing_and_does_not_ship(folder: Folder, tmp_path: Path, empty: Any) -> None:
    model = load(folder(attn_output_gate=empty, quantization_config=empty))
    save(model, tmp_path / "out")
    assert (
        not {"attn_output_gate", "quantization_config"} & json.loads((tmp_path / "out/config.json").read_text()).keys()
    )


@pytest.mark.parametrize(
    "kind,changes,named",
    [
        ("dpt", {"backbone_config": {"model_type": "lightglue"}}, "backbone_config"),
        ("dpt", {"backbone_config": {"model_type": "dinov2"}}, "backbone_config"),
        ("dpt", {"backbone": "resnet50", "use_timm_backbone": True}, "backbone"),
        ("dpt", {"use_pretrained_backbone": True}, "use_pretrained_backbone"),
        ("clip", {"text_config": {"model_type": "lightglue"}}, "text_config"),
        ("clip", {"vision_config": {"quantization_config": {"a": 1}}}, "vision_config.quantization_config"),
        ("clip", {"text_config_dict": {"rope_parameters": {"a": 1}}}, "text_config_dict.rope_parameters"),
        ("clip", {"vision_config": {"hidden_act": {"model_type": "bert"}}}, "vision_config.hidden_act"),
    ],
    ids=str,
)
def test_parts_are_judged_like_the_whole(folder: Folder, kind: str, changes: dict[str, Any], named: str) -> None:
    assert f"'{named}" in refusal(folder(kind, **changes)).what


def test_without_a_model_type_the_line_to_add_is_said(folder: Folder) -> None:
    model = folder(model_type=None, architectures=["BertForMaskedLM"])
    error = refusal(model)
    assert "model_type" in error.what and 'add "model_type": "bert"' in error.hint
    assert error.where == str(model / "config.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": "bert", "a": ' * 10_000,
        "[" * 100_000,
        '{"model_type": "bert", "a": ' + "[" * 300 + "]" * 300 + "}",
        '{"model_type": "bert", "layer_norm_eps": NaN}',
    ],
)
def test_json_that_is_none_is_refused_by_file(folder: Folder, text: str) -> None:
    model = folder()
    (model / "config.json").write_text(text)
    assert refusal(model).where == str(model / "config.json")


def test_keys_that_name_code_are_told_and_do_not_ship(
    folder: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = folder(auto_map={"AutoModel": "evil.Evil"}, custom_pipelines={"p": {"impl": "evil.P"}})
    write(
        model / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "auto_map": {"AutoTokenizer": ["e.E", None]}},
    )
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [{"name": k, "type": f"sentence_transformers.models.{k}", "path": path} for k, path in kinds.items()]
    write(model / "modules.json", modules)
    write(model / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "trust_remote_code": True})
    with caplog.at_level(logging.WARNING):
        save(load(model), tmp_path / "out")
    assert {"auto_map", "custom_pipelines", "trust_remote_code"} == {
        r.getMessage().split("'")[1] for r in caplog.records
    }
    shipped = "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))
    assert "BertTokenizer" in shipped and "pooling_mode_mean_tokens" in shipped
    assert not [key for key in allowed().name_code if key in shipped]


# other JSON files


@pytest.mark.parametrize(
    "name,data,named",
    [
        ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, "RagTokenizer"),
        ("tokenizer_config.json", {"tokenizer_class": "LightGlueForKeypointMatching"}, "LightGlue"),
        ("tokenizer_config.json", {"tokenizer_class": 7}, "tokenizer_class"),
        ("tokenizer_config.json", {"mecab_option": "-d /etc"}, "mecab_option"),
        ("tokenizer_config.json", [], "object"),
        ("preprocessor_config.json", {"image_processor_type": "RagTokenizer"}, "image_processor_type"),
        ("processor_config.json", {"a": {"processor_class": "AutoModel"}}, "processor_class"),
        ("sentence_bert_config.json", {"model_args": {"attn_implementation": "a/kernel"}}, "attn_implementation"),
        ("sentence_bert_config.json", {"tokenizer_name_or_path": "someone/else"}, "tokenizer_name_or_path"),
        ("2_Dense/config.json", {"activation_function": "evil.Act"}, "evil.Act"),
    ],
    ids=str,
)
def test_what_another_file_names_is_judged_too(folder: Folder, name: str, data: Any, named: str) -> None:
    model = folder()
    write(model / name, data)
    error = refusal(model)
    assert named in error.what and error.where == str(model / name)


def test_usual_side_files_pass(folder: Folder) -> None:
    model = folder()
    write(
        model / "tokenizer_config.json", {"tokenizer_class": "BertTokenizerFast", "name_or_path": "bert-base-uncased"}
    )
    write(model / "preprocessor_config.json", {"feature_extractor_type": "ViTFeatureExtractor"})
    write(model / "2_Dense" / "config.json", {"activation_function": "torch.nn.modules.activation.Tanh"})
    write(model / "modules.json", [{"name": "0", "type": "sentence_transformers.models.Transformer", "path": ""}])
    (model / "notes.json").write_text("no JSON at all")
    find(str(model))


# files


@pytest.mark.parametrize("name", ["special.json", "1_Pooling", "LICENSE", "config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused_by_name(folder: Folder, tmp_path: Path, name: str) -> None:
    model, outside = folder(), tmp_path / "outside"
    outside.mkdir()
    if (model / name).exists():
        shutil.move(model / name, outside / name)
    else:
        write(outside / "secret.json", {"key": "secret"})
    target = outside / name if (outside / name).exists() else outside if "_" in name else outside / "secret.json"
    (model / name).symlink_to(target)
    error = refusal(model)
    assert error.where == str(model / name) and "link out" in error.what


def test_a_link_that_leads_nowhere_and_a_pipe_are_refused(folder: Folder) -> None:
    model = folder()
    (model / "vocab.txt").symlink_to(model / "gone.txt")
    assert "missing file" in refusal(model).what
    (model / "vocab.txt").unlink()
    os.mkfifo(model / "tokenizer.json")
    assert refusal(model).where == str(model / "tokenizer.json")


def test_links_within_the_folder_and_a_link_to_the_folder_pass(folder: Folder, tmp_path: Path) -> None:
    model = folder()
    (model / "LICENSE.txt").write_text("free")
    (model / "LICENSE").symlink_to("LICENSE.txt")
    (tmp_path / "latest").symlink_to(model)
    assert find(str(tmp_path / "latest")).model_type == "bert"


@pytest.mark.parametrize("through", ["", "link out of the cache"])
def test_the_hub_caches_own_links_pass_and_no_others(folder: Folder, tmp_path: Path, through: str) -> None:
    source, cached = folder(), tmp_path / "hub" / "models--someone--tiny"
    snapshot = cached / "snapshots" / "0123abcd"
    (cached / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(cached / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    if through:
        (tmp_path / "secret.json").write_text("{}")
        (cached / "blobs" / "evil").symlink_to(tmp_path / "secret.json")
        (snapshot / "special.json").symlink_to("../../blobs/evil")
        assert "link out" in refusal(snapshot).what
    else:
        assert isinstance(load(snapshot), PreTrainedModel)


@pytest.mark.parametrize(
    "shard", ["model-00001-of-00001.bin", "../other/model.safetensors", "/tmp/model.safetensors", "a\\b.safetensors", 5]
)
def test_an_index_that_names_anything_but_safetensors_beside_it_opens_nothing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, shard: Any
) -> None:
    model = folder()
    (model / "model.safetensors").rename(model / "model-00001-of-00001.bin")
    write(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": shard}})
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was reached"))
    with pytest.raises(ModelRefusedError, match="only safetensors files beside it") as refused:
        load(model)
    assert refused.value.where == str(model / "model.safetensors.index.json")


# no code, no connection

CODE = "import os, pathlib\npathlib.Path(os.environ['CANARY']).touch()\n"
HOSTILE: dict[str, dict[str, Any]] = {
    "a kind that builds another": {
        "model_type": "lightglue",
        "trust_remote_code": True,
        "keypoint_detector_config": "EVIL",
    },
    "a part": {"backbone_config": "EVIL", "model_type": "dpt"},
    "a tokenizer": {"tokenizer_class": "RagTokenizer", "question_encoder": "EVIL", "generator": {"model_type": "bert"}},
    "an auto_map": {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}},
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("command", ["plan", "score", "init"])
def test_code_beside_a_model_never_runs_and_nothing_is_asked_for(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
) -> None:
    evil = {"model_type": "evil", "_name_or_path": str(tmp_path / "evil"), "auto_map": {"AutoConfig": "evil.Evil"}}
    model = folder(**{key: evil if value == "EVIL" else value for key, value in HOSTILE[kind].items()})
    for place in (model, tmp_path / "evil"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(CODE)
    write(tmp_path / "evil" / "config.json", evil)
    (tmp_path / "recipe.yaml").write_text(f"model: {json.dumps(str(model))}\n")
    given = tmp_path / "recipe.yaml" if command == "plan" else model
    monkeypatch.setenv("CANARY", str(tmp_path / "ran"))
    ended = slimheads(command, given)
    assert not (tmp_path / "ran").exists()
    assert ended.code == (0 if kind == "an auto_map" else 3), ended.err


@pytest.mark.parametrize(
    "changes",
    [
        {
            "model_type": "lightglue",
            "keypoint_detector_config": {"model_type": "evil", "_name_or_path": "someone/thing"},
        },
        {
            "model_type": "edgetam_vision_model",
            "backbone_config": {"model_type": "timm_wrapper", "architecture": "resnet18"},
        },
        {"model_type": "detr", "use_timm_backbone": True, "backbone": "resnet50", "use_pretrained_backbone": True},
        {"model_type": "dpt", "use_timm_backbone": True, "backbone": "resnet50", "use_pretrained_backbone": True},
        {"transformers_weights": "someone/thing"},
        {"tokenizer_class": "RagTokenizer"},
    ],
    ids=lambda changes: changes.get("model_type", str(changes)),
)
def test_a_refused_local_model_opens_no_socket(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("a connection was tried"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    model = folder(**changes)
    refusal(model)
    with pytest.raises(ModelRefusedError):
        load(model)

"""Rotary positions as transformers 5 writes them: the model's own angles, or a refusal by the key's name.

The oracle is a model whose configuration was made in the words of transformers 4, before its file was rewritten.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.models.checkpoint import read_config
from slimheads.models.loading import load

Tiny = Callable[..., PreTrainedModel]

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "attention_factor": 1.3}
LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}


def scaled(kind: str, theta: float = 500.0, **settings: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **settings}}


# model type, what transformers 4 writes, what transformers 5 writes for it
WRITTEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default": ("llama", {"rope_theta": 500.0}, {"rope_type": "default", "rope_theta": 500.0}),
    "linear": ("llama", scaled("linear", factor=4.0), {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}),
    "dynamic": ("llama", scaled("dynamic", factor=4.0), {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}),
    "llama3": ("llama", scaled("llama3", **LLAMA3), {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}),
    "yarn": ("qwen2", scaled("yarn", **YARN), {"rope_type": "yarn", "rope_theta": 500.0, **YARN}),
    "no class key": (
        "mistral",
        scaled("linear", factor=4.0),
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    ),
    "partial": (
        "stablelm",
        {"rope_theta": 500.0, "partial_rotary_factor": 1.0},
        {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    ),
    "other names": (
        "gpt_neox",
        {"rotary_emb_base": 500.0, "rotary_pct": 0.5},
        {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
    "longrope": (
        "llama",
        {
            "rope_theta": 500.0,
            "rope_scaling": {"rope_type": "longrope", "factor": 4.0, **LONG},
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 64, "factor": 4.0, **LONG},
    ),
    "by layer": (
        "gemma3_text",
        {"rope_local_base_freq": 50.0, **scaled("linear", factor=8.0)},
        {
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "by layer, other names": (
        "modernbert",
        {"global_rope_theta": 500.0, "local_rope_theta": 50.0},
        {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
}


def rewritten(folder: Path, drop: dict[str, Any], **changes: Any) -> Path:
    path = folder / "config.json"
    data = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(data | changes))
    return folder


def answer(model: PreTrainedModel, length: int) -> torch.Tensor:
    ids = torch.randint(3, 120, (1, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize("written", WRITTEN)
def test_the_angles_are_those_of_the_model(tiny: Tiny, tmp_path: Path, written: str) -> None:
    kind, four, five = WRITTEN[written]
    model = tiny(kind, **four)
    model.save_pretrained(tmp_path)
    before = answer(model, 100)
    plain = answer(tiny(kind), 100)
    assert (before - plain).abs().max() > 1e-3 or written == "partial"  # else any angles would do
    loaded = load(rewritten(tmp_path, four, rope_parameters=five))
    assert torch.equal(answer(loaded, 100), before)
    assert not hasattr(loaded.config, "rope_parameters")


def test_phi3s_long_factors_stand_where_transformers_4_looks(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("phi3").config
    size = int(config.hidden_size // config.num_attention_heads * config.partial_rotary_factor) // 2
    factors = {"short_factor": [1.0] * size, "long_factor": [4.0] * size}
    config.save_pretrained(tmp_path)
    limit = config.max_position_embeddings
    five = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": limit // 4, **factors}
    read = read_config(rewritten(tmp_path, {"original_max_position_embeddings": 0}, rope_parameters=five))
    assert read.rope_scaling == {"type": "longrope", **factors}
    assert (read.rope_theta, read.original_max_position_embeddings) == (1e4, limit // 4)


@pytest.mark.parametrize(
    "kind,changes,named",
    [
        ("llama", {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "mrope"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_theta"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, "rope_parameters.mrope_section"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1e4}}, "disagree"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ("llama", {"rope_parameters": 7}, "mapping"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 8,
                }
            },
            "original_max_position_embeddings",
        ),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 9.0, **LONG}
                | {"original_max_position_embeddings": 64}
            },
            "factor",
        ),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "full_attention"),
        ("nemotron", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "linear"),
        ("gptj", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}},
            "rope_scaling.mrope_section",
        ),
        ("modernbert", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ],
    ids=str,
)
def test_what_transformers_4_cannot_compute_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, kind: str, changes: dict[str, Any], named: str
) -> None:
    tiny(kind).config.save_pretrained(tmp_path)
    with pytest.raises(ModelRefusedError) as refused:
        read_config(rewritten(tmp_path, {"rope_theta": 0}, **changes))
    assert named in refused.value.what and next(iter(changes)).split("_")[0] in refused.value.what
    assert "4.57" in refused.value.hint and refused.value.where == str(tmp_path / "config.json")


def test_layer_types_that_say_what_transformers_4_derives_pass(tiny: Tiny, tmp_path: Path) -> None:
    tiny("modernbert").config.save_pretrained(tmp_path)
    types = ["full_attention", "sliding_attention", "full_attention"]  # of three layers, every second
    assert not hasattr(read_config(rewritten(tmp_path, {}, layer_types=types)), "layer_types")


def test_the_dtype_that_transformers_5_names_is_read(tiny: Tiny, tmp_path: Path) -> None:
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(rewritten(tmp_path, {"torch_dtype": 0}, dtype="bfloat16")).dtype == torch.bfloat16

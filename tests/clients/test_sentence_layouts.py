"""sentence-transformers, unmodified, on what is made of its own folders: a decoder whose last token is the embedding,
several poolings at once, a Dense module, a prompt that is not pooled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from sentence_folders import copied, lay_out, write
from sentence_transformers import SentenceTransformer
from whole_runs import report_of, slimheads, steady, write_recipe

from slimheads.data.texts import read_texts

POOLING = {"embedding_dimension": 32, "pooling_mode": ["mean", "lasttoken"], "include_prompt": False}
TEXTS = ["the of and", "a is that it for with on the", "the"]
DENSE = {"in_features": 64, "out_features": 16, "activation_function": "torch.nn.modules.activation.Tanh"}


def source(folder: Path) -> Path:
    made = lay_out(
        copied(folder, "llama"),
        {"1_Pooling": POOLING, "2_Dense": DENSE},
    )
    weights = {"linear.weight": torch.randn(16, 64), "linear.bias": torch.randn(16)}
    save_file(weights, made / "2_Dense" / "model.safetensors")
    write(made / "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": True})
    prompts = {"prompts": {"query": "it is on "}, "default_prompt_name": "query"}
    write(made / "config_sentence_transformers.json", prompts)
    return made


def embedded(folder: Path, texts: list[str], backend: Any = "onnx") -> np.ndarray:
    return np.asarray(SentenceTransformer(str(folder), backend=backend, device="cpu").encode(texts), np.float64)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """The source (under -1) and the outputs of runs by ratio."""
    home = tmp_path_factory.mktemp("layouts")
    model = source(home / "model")
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        for ratio in (0.0, 0.5):
            recipe = write_recipe(home / "r.yaml", model, select={"ratio": ratio})
            ended = slimheads("run", recipe, "--out", home / str(ratio))
            assert ended.code == 0, ended.err
    return {-1: model, 0.0: home / "0.0", 0.5: home / "0.5"}


def test_with_nothing_deleted_slim_embeds_as_its_source(runs: dict[float, Path]) -> None:
    found, expected = embedded(runs[0.0] / "slim", TEXTS), embedded(runs[-1], TEXTS, "torch")
    assert found.shape == expected.shape == (3, 16)
    assert np.abs(found - expected).max() <= 1e-4


def test_the_graph_of_a_decoder_that_embeds_asks_for_no_positions(runs: dict[float, Path]) -> None:
    graph = onnx.load(runs[0.5] / "slim" / "onnx" / "model.onnx").graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask"]


def test_drift_is_measured_on_the_embeddings_that_a_client_gets(runs: dict[float, Path]) -> None:
    texts = list(read_texts(None))
    pair = (embedded(runs[-1], texts, "torch"), embedded(runs[0.5] / "slim", texts))
    dense, slim = (made / np.linalg.norm(made, axis=1, keepdims=True) for made in pair)
    drift = report_of(runs[0.5])["drift"]
    assert drift["embedding"] == "mean and lasttoken, then 2_Dense"
    assert "embedded by mean and lasttoken, then 2" in (runs[0.5] / "report.md").read_text(encoding="utf-8")
    assert drift["slim"]["cosine"] == pytest.approx((dense * slim).sum(1).mean(), abs=1e-4)
    assert drift["slim"]["cosine"] < 0.999

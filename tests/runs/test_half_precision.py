"""Checkpoints in float16 and bfloat16: scored as if in float64, pruned and saved as they are, exported as asked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from layouts import unit_tensors
from onnx import TensorProto
from safetensors import safe_open
from tiny import tiny_model
from transformers import PreTrainedModel
from whole_runs import report_of, slimheads, steady, write_recipe

from slimheads.models.loading import load

DTYPES = {"float16": ("F16", torch.float16), "bfloat16": ("BF16", torch.bfloat16)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)


def stored(folder: Path) -> set[str]:
    """The dtypes of a checkpoint's tensors, off the file's header."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def magnitudes(model: PreTrainedModel) -> list[list[float]]:
    """The score by its definition, added up in float64, number by number."""

    def norm(matrix: torch.Tensor) -> float:
        return math.sqrt(math.fsum(x * x for x in matrix.double().flatten().tolist()))

    layers = unit_tensors(model)
    return [[norm(u.query) + norm(u.key) + norm(u.value) + norm(u.output) for u in units] for units in layers]


@pytest.mark.parametrize("model_type", ["bert", "llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_run_keeps_the_checkpoints_dtype_and_every_kept_bit(
    model_type: str, dtype: str, tmp_path: Path
) -> None:
    label, torch_dtype = DTYPES[dtype]
    dense = tiny_model(model_type).to(torch_dtype)
    dense.save_pretrained(tmp_path / "dense")
    assert stored(tmp_path / "dense") == {label}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "dense", export={"precisions": ["fp32", "fp16"]})
    out = tmp_path / "out"
    ended = slimheads("run", recipe, "--out", out)
    assert ended.code == 0, ended.err
    assert all(link["passed"] for link in report_of(out)["certificate"])

    scores = json.loads((out / "scores.json").read_text())["sites"]
    for site, expected in zip(scores, magnitudes(dense), strict=True):
        assert site["scores"] == pytest.approx(expected, rel=1e-6, abs=0)

    assert stored(out / "slim") == {label}
    assert json.loads((out / "slim" / "config.json").read_text())["dtype"] == dtype
    slim, kept = load(out / "slim"), [s["kept"] for s in json.loads((out / "plan.json").read_text())["sites"]]
    pairs = zip(unit_tensors(dense), unit_tensors(slim, kept), kept, strict=True)
    for before, after, units in pairs:
        for old, new in zip((before[unit] for unit in units), after, strict=True):
            for role in ("query", "key", "value", "output"):
                assert getattr(new, role).dtype == torch_dtype
                assert torch.equal(getattr(old, role), getattr(new, role))
            assert all(torch.equal(a, b) for a, b in zip(old.biases, new.biases, strict=True))

    for side in ("dense", "slim"):
        for name, float_type in (("model.onnx", TensorProto.FLOAT), ("model_fp16.onnx", TensorProto.FLOAT16)):
            tensors = onnx.load(str(out / side / "onnx" / name)).graph.initializer
            assert {t.data_type for t in tensors if len(t.dims) == 2 and t.data_type != TensorProto.INT64} == {
                float_type
            }


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_config_that_does_not_name_the_dtype_changes_nothing(dtype: str, tmp_path: Path) -> None:
    label, torch_dtype = DTYPES[dtype]
    tiny_model("bert").to(torch_dtype).save_pretrained(tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    data = json.loads(config.read_text())
    del data["dtype"]
    config.write_text(json.dumps(data))
    ended = slimheads("run", write_recipe(tmp_path / "r.yaml", tmp_path / "dense"), "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert stored(tmp_path / "out" / "slim") == {label}
    assert load(tmp_path / "out" / "slim").dtype == torch_dtype

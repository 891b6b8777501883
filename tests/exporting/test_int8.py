"""int8 that is right on every CPU: the arithmetic itself, the files, and runs for CPUs that are not at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from shipped import Shipped, ship
from tiny import tiny_model
from transformers import PreTrainedModel
from whole_runs import checkpoint, report_of, slimheads, steady, write_recipe

from slimheads.exporting.export import export
from slimheads.exporting.quantize import to_int8
from slimheads.pruning.plan import Plan
from slimheads.runtime import cpu
from slimheads.runtime.sessions import open_session
from slimheads.verification import precision_proof
from slimheads.verification.integer_products import SAFE_WEIGHT, integer_product, overflow_faults, saturating_product
from slimheads.verification.prove import verify

EXTREMES = np.array([0, 1, 127, 254, 255], np.uint8)


# ------------------------------------------------------------------------------------------------- the arithmetic


def pairs(weights: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of extreme activations by one column of two weights."""
    steps = np.stack(np.meshgrid(EXTREMES, EXTREMES), axis=-1).reshape(-1, 2)
    return steps, np.array(weights, np.int8)[:, None]


@pytest.mark.parametrize("sign", [1, -1])
def test_two_products_fit_into_16_bits_up_to_64_and_no_further(sign: int) -> None:
    fits, overflows = pairs((sign * 64, sign * 64)), pairs((sign * 65, sign * 65))
    assert np.array_equal(integer_product(*fits), saturating_product(*fits))
    assert not np.array_equal(integer_product(*overflows), saturating_product(*overflows))
    assert SAFE_WEIGHT == 64


def test_full_range_weights_can_lose_half_of_a_sum_and_safe_ones_nothing() -> None:
    draw = np.random.default_rng(0)
    steps = draw.integers(0, 256, (50, 96), dtype=np.uint8)
    full, safe = (draw.integers(-limit, limit + 1, (96, 40), dtype=np.int8) for limit in (127, 64))
    assert np.array_equal(integer_product(steps, safe), saturating_product(steps, safe))
    assert np.array_equal(integer_product(steps, safe), np.einsum("ij,jk->ik", steps.astype(int), safe.astype(int)))
    steps[:], full[:] = 255, 127
    assert (saturating_product(steps, full) < 0.51 * integer_product(steps, full)).all()


def test_the_last_of_an_odd_number_of_inputs_has_a_sum_of_its_own() -> None:
    steps, weights = np.full((1, 3), 255, np.uint8), np.full((3, 1), 127, np.int8)
    assert saturating_product(steps, weights).item() == 32767 + 255 * 127


# ---------------------------------------------------------------------------------------------------- whole graphs


class _Exact(OpRun):  # type: ignore[misc]
    """MatMulInteger by `product`, activations and weights as they are stored, zero points taken off afterwards."""

    op_domain = ""
    product = staticmethod(integer_product)

    def _run(self, a: np.ndarray, b: np.ndarray, a_zero: Any = None, b_zero: Any = None) -> tuple[np.ndarray]:
        zero = 0 if a_zero is None else int(a_zero)
        assert b.dtype == np.int8 and not np.any(b_zero)
        return ((type(self).product(a, b) - zero * b.astype(np.int64).sum(axis=0)).astype(np.int32),)


class _Saturating(_Exact):
    product = staticmethod(saturating_product)


class DequantizeLinear(OpRun):  # type: ignore[misc]
    """Of a whole tensor; onnx has one for later opsets only."""

    op_domain = ""

    def _run(self, x: np.ndarray, scale: np.ndarray, zero: np.ndarray, **_: Any) -> tuple[np.ndarray]:
        return ((x.astype(np.float32) - zero.astype(np.float32)) * scale,)


def evaluated(path: Path, feed: dict[str, np.ndarray], kind: type[_Exact]) -> np.ndarray:
    """The graph's first output in numpy, its integer products added up as `kind` does."""
    operator = type("MatMulInteger", (kind,), {"op_domain": ""})
    output: np.ndarray = ReferenceEvaluator(onnx.load(str(path)), new_ops=[operator, DequantizeLinear]).run(None, feed)[
        0
    ]
    return output


@pytest.fixture(scope="module")
def steep() -> PreTrainedModel:
    """A BERT whose feed-forward weights are all at the ends of their range, where sums get large."""
    model = tiny_model("bert")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("intermediate.dense.weight"):
                weight.copy_(0.05 * weight.sign())
    return model


@pytest.fixture(scope="module")
def both(steep: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """any.onnx and avx512_vnni.onnx of the steep model."""
    folder = tmp_path_factory.mktemp("steep")
    export(steep, folder, task="feature-extraction")
    for target in ("any", "avx512_vnni"):
        to_int8(folder / "model.onnx", folder / f"{target}.onnx", target)  # type: ignore[arg-type]
    return folder


FEED = {
    "input_ids": np.arange(3, 15, dtype=np.int64)[None],
    "attention_mask": np.ones((1, 12), np.int64),
    "token_type_ids": np.zeros((1, 12), np.int64),
}


def test_a_file_for_any_cpu_is_right_with_and_without_vnni_and_one_for_vnni_is_not(both: Path) -> None:
    size = np.abs(open_session(both / "model.onnx").run(None, FEED)[0]).max()
    off = {}
    for target in ("any", "avx512_vnni"):
        exact, saturated = (evaluated(both / f"{target}.onnx", FEED, kind) for kind in (_Exact, _Saturating))
        off[target] = np.abs(exact - saturated).max() / size
    assert off["any"] == 0
    assert off["avx512_vnni"] > 0.05


def test_onnx_runtime_adds_up_what_numpy_does(both: Path) -> None:
    found = open_session(both / "any.onnx", optimize=False).run(None, FEED)[0]
    assert np.abs(found - evaluated(both / "any.onnx", FEED, _Exact)).max() < 0.02 * np.abs(found).max()


def test_weights_beyond_64_are_named_and_tables_are_not(both: Path) -> None:
    assert list(overflow_faults(both / "any.onnx")) == []
    faults = list(overflow_faults(both / "avx512_vnni.onnx"))
    assert faults and all("holds 127, and two products of more than 64 overflow 16 bits" in fault for fault in faults)
    tables = [t for t in onnx.load(str(both / "any.onnx")).graph.initializer if "embeddings.weight_quantized" in t.name]
    assert tables and all(numpy_helper.to_array(table).dtype == np.uint8 for table in tables)  # all of their 8 bits


# --------------------------------------------------------------------------------------------------- the certificate


@pytest.fixture(scope="module")
def bert(
    tiny: Callable[..., PreTrainedModel], equal: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> Shipped:
    dense = tiny("bert")
    return ship(
        dense, equal(dense, 2), tmp_path_factory.mktemp("b"), task="feature-extraction", precisions=("fp32", "int8")
    )


def test_full_range_weights_in_a_file_for_any_cpu_fail_link_4_on_every_cpu(bert: Shipped, tmp_path: Path) -> None:
    made = bert.copied(tmp_path)
    to_int8(made.onnx(), made.onnx("model_int8.onnx"), "avx512_vnni")
    failed = [link for link in made.certificate("int8", int8_for="any").links if not link.passed]
    assert [link.link for link in failed] == [4] and "overflow 16 bits" in str(failed[0].reason)


def damaged(made: Shipped, change: Callable[[dict[str, np.ndarray], str], None]) -> list[Any]:
    """Failed links after a change of the query weight of the second layer: tensors by name, and the weight's name."""
    path = made.onnx("model_int8.onnx")
    proto = onnx.load(str(path))
    node = next(
        n for n in proto.graph.node if n.op_type == "MatMulInteger" and "layer.1/attention/self/query" in n.name
    )
    tensors = {t.name: numpy_helper.to_array(t).copy() for t in proto.graph.initializer}
    change(tensors, node.input[1].removesuffix("_quantized"))
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    onnx.save(proto, str(path))
    return [link for link in made.certificate("int8").links if not link.passed]


def swap_heads(tensors: dict[str, np.ndarray], name: str) -> None:
    """Honest weights, every scale with its own column, and two heads in each other's place."""
    for part in ("quantized", "scale", "zero_point"):
        array = tensors[f"{name}_{part}"]
        tensors[f"{name}_{part}"] = np.roll(array, array.shape[-1] // 2, axis=-1)


def one_step(tensors: dict[str, np.ndarray], name: str) -> None:
    steps = tensors[f"{name}_quantized"]
    steps[3, 5] += 1 if steps[3, 5] < 0 else -1


def scaled(tensors: dict[str, np.ndarray], name: str) -> None:
    tensors[f"{name}_scale"] *= np.float32(1.17)


@pytest.mark.parametrize("change", [swap_heads, one_step, scaled])
def test_a_changed_int8_file_fails_link_3(
    bert: Shipped, tmp_path: Path, change: Callable[[dict[str, np.ndarray], str], None]
) -> None:
    failed = damaged(bert.copied(tmp_path), change)
    assert [link.link for link in failed] == [3] and not failed[0].weak
    assert "rounded" in str(failed[0].reason)


def test_products_wired_to_one_anothers_weights_fail_link_3(bert: Shipped, tmp_path: Path) -> None:
    """Every weight is right, and none where it belongs: the arithmetic tells, by far more than it allows."""
    made = bert.copied(tmp_path)
    path = made.onnx("model_int8.onnx")
    proto = onnx.load(str(path))
    nodes = {n.name: n for n in proto.graph.node}
    layers = [f"/encoder/layer.{layer}/attention/self/query/MatMul_quant" for layer in (0, 1)]
    for suffix in ("", "_scales_mul"):
        one, other = (nodes[f"{name}{suffix}"] for name in layers)
        for place in (1, 3) if not suffix else (1,):
            one.input[place], other.input[place] = other.input[place], one.input[place]
    onnx.save(proto, str(path))
    (failed,) = (link for link in made.certificate("int8").links if not link.passed)
    assert failed.link == 3 and failed.weak
    assert failed.rtol is not None and failed.max_rel is not None and failed.max_rel > 100 * failed.rtol


def test_honest_int8_equals_the_same_numbers_added_up_exactly(bert: Shipped) -> None:
    (link,) = (link for link in bert.certificate("int8").links if link.link == 3)
    assert link.passed and link.max_abs == 0 and link.precision == "int8"
    assert link.cosine is not None and link.cosine < 1 and link.fused_rel is not None


# ------------------------------------------------------------------------------------------ CPUs that are not at hand


@pytest.mark.parametrize("features", [("avx2",), ("avx2", "avx512_f"), None])
def test_a_cpu_without_vnni_is_told_before_the_export(
    features: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch)
    monkeypatch.setattr(cpu, "cpu_features", lambda: features)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    for target in ("avx512_vnni", "arm64"):
        recipe = write_recipe(tmp_path / "r.yaml", export={"precisions": ["fp32", "int8"], "int8_for": target})
        for command in (("run", recipe, "--out", tmp_path / "out"), ("run", recipe, "--dry-run")):
            ended = slimheads(*command)
            assert ended.code == 5 and "export.int8_for: any" in ended.err, ended.err
        assert "export" not in ended.out and not (tmp_path / "out").exists()
    recipe = write_recipe(tmp_path / "r.yaml", export={"precisions": ["fp32", "int8"]})
    assert slimheads("run", recipe, "--out", tmp_path / "out").code == 0
    assert report_of(tmp_path / "out")["recipe"]["export"]["int8_for"] == "any"


@pytest.mark.parametrize(
    ("machine", "features"), [("x86_64", ("avx2", "avx_vnni")), ("AMD64", ("avx512_vnni",)), ("arm64", None)]
)
def test_full_range_weights_may_be_asked_for_where_products_are_added_in_32_bits(
    machine: str, features: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "cpu_features", lambda: features)
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    for target in ("any", "avx2", "avx512_vnni", "arm64"):
        cpu.require_int8_target(target)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- weak precisions


@pytest.fixture
def outlier(tmp_path: Path) -> Path:
    """A token classifier whose last states have one value of thousands, which the classifier does not read.

    As one byte a state, all others become zero: in int8 it says nothing but its bias.
    """
    model = tiny_model("bert", task="token-classification")
    with torch.no_grad():
        norm = model.bert.encoder.layer[-1].output.LayerNorm
        norm.weight[0], norm.bias[0] = 0.0, 20000.0
        model.classifier.weight[:, 0] = 0.0
    folder = tmp_path / "outlier"
    model.save_pretrained(folder)
    for file in checkpoint().glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def weak_run(model: Path, tmp_path: Path, **export_section: Any) -> tuple[Any, Path]:
    wanted = {"precisions": ["fp32", "fp16", "int8"]} | export_section
    recipe = write_recipe(tmp_path / "r.yaml", model, task="token-classification", export=wanted)
    return slimheads("run", recipe, "--out", tmp_path / "out"), tmp_path / "out"


def test_a_weak_precision_ends_with_code_4_and_the_remedies(
    outlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch)
    ended, out = weak_run(outlier, tmp_path)
    assert ended.code == 4 and not (out / "slim").exists()
    (reason,) = report_of(out)["verdict"]["reasons"]
    for said in ("model_int8.onnx", "int8 out of export.precisions", "export.int8_for", "on_weak_precision: drop"):
        assert said in reason
    assert "classifier" in reason and "report this" not in reason  # the product with the largest error


def test_a_weak_precision_is_left_out_by_name_and_the_rest_is_published(
    outlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch)
    ended, out = weak_run(outlier, tmp_path, on_weak_precision="drop")
    assert ended.code == 0, ended.err
    report = report_of(out)
    assert [one["precision"] for one in report["left_out"]] == ["int8"]
    for side in ("dense", "slim"):
        assert {f.name for f in (out / side / "onnx").iterdir()} == {"model.onnx", "model_fp16.onnx"}
    assert {row["precision"] for row in report["latency"]} == {"fp32", "fp16"}
    assert not any("int8" in name or "quantized" in name for name in report["files"])
    for page in ("report.md", "slim/README.md"):
        text = (out / page).read_text(encoding="utf-8")
        assert "int8 is not published (export.on_weak_precision: drop): " in text
    again, _ = weak_run(outlier, tmp_path, on_weak_precision="fail")
    assert again.code == 4  # what the certificate found is not taken over, and the graphs are not made anew
    assert next(s for s in report_of(out)["stages"] if s["stage"] == "export")["reused"]


@pytest.mark.slow
def test_all_files_of_a_weak_precision_are_left_out_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
    monkeypatch.setattr(precision_proof, "LEAST_COSINE", 1.0)
    export_section = {"precisions": ["fp32", "int8"], "on_weak_precision": "drop"}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint("bart"), export=export_section)
    ended = slimheads("run", recipe, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    names = {f.name for f in (tmp_path / "out/slim/onnx").iterdir()}
    assert len(names) == 4 and not any("int8" in name or "quantized" in name for name in names)
    assert "every graph beyond fp32 was left out" in str(report_of(tmp_path / "out")["certificate_skipped"])


def test_a_weight_that_is_wrong_is_no_weak_precision(bert: Shipped, tmp_path: Path) -> None:
    """Left out is what rounding spoils; what was built wrongly fails, whatever the recipe says."""
    made = bert.copied(tmp_path)
    damaged(made, one_step)
    found = verify(
        copy.deepcopy(made.dense),
        made.slim,
        made.plan,
        made.folder,
        made.dense_onnx.parent,
        task=made.task,
        precisions=("fp32", "int8"),
        on_weak_precision="drop",
    )
    assert not found.passed and not found.left_out


def test_what_rounding_costs_has_a_gate_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
    for least, code in ((0.9, 0), (1.0, 7)):
        recipe = write_recipe(
            tmp_path / "r.yaml", export={"precisions": ["fp32", "int8"]}, gates={"min_precision_cosine": least}
        )
        ended = slimheads("run", recipe, "--out", tmp_path / "out")
        assert ended.code == code, ended.err
    (reason,) = report_of(tmp_path / "out")["verdict"]["reasons"]
    assert "min_precision_cosine" in reason and "int8 (onnx/model_int8.onnx)" in reason
    assert report_of(tmp_path / "out")["environment"]["cpu_features"]

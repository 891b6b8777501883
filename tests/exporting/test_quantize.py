"""Precisions: int8 for three kinds of CPU, weights of 4 bits, and what the certificate says of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import FLOAT, write_model
from shipped import Shipped, edit_tensor
from tiny import DECODERS, SEQ2SEQ, task_of
from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.exporting.artifacts import client_names
from slimheads.exporting.export import export
from slimheads.exporting.precisions import PRECISIONS
from slimheads.exporting.quantize import Q4_BLOCK, to_int8, to_q4
from slimheads.names import Int8For
from slimheads.runtime.onnx_signature import nodes_of, read_interface
from slimheads.runtime.sessions import open_session
from slimheads.verification import quantized_weights
from slimheads.verification.quantized_weights import quantized_faults
from slimheads.verification.rounded import write_rounded

TARGETS: tuple[Int8For, ...] = ("any", "avx512_vnni", "avx2", "arm64")
# Products as MatMul, as Gemm (GPT-2), as Gemm of a transposed weight (CLIP's projections), and in four files.
PRODUCTS: list[Any] = ["bert", "gpt2", "clip"]
PRODUCTS += [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "opt", "vit", "bart", "t5", "whisper")]


@pytest.fixture
def gpt2(shipped: Callable[..., Shipped]) -> Shipped:
    return shipped("gpt2", precisions=("fp32", "q4"), kinds=("attention",))


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def operators(path: Path) -> list[str]:
    return [node.op_type for node in nodes_of(onnx.load(str(path)).graph)]


# ----------------------------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_int8_weights_have_seven_bits_where_sums_of_sixteen_would_overflow(
    model_type: str, tiny: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """x86 without VNNI adds two products of an unsigned and a signed byte in 16 bits: 2 x 255 x 64 fits, x 127 not."""
    export(tiny(model_type), tmp_path, task=task_of(model_type))
    largest: dict[str, int] = {}
    for target in TARGETS:
        path = tmp_path / f"{target}.onnx"
        to_int8(tmp_path / "model.onnx", path, target)
        weights = [a for name, a in tensors(path).items() if name.endswith("_quantized") and a.dtype == np.int8]
        assert weights and "MatMulInteger" in operators(path)
        largest[target] = max(int(np.abs(weight.astype(int)).max()) for weight in weights)
        assert list(quantized_faults(tmp_path / "model.onnx", path)) == []
        open_session(path)
    assert largest == {"any": 64, "avx512_vnni": 127, "avx2": 64, "arm64": 127}
    assert 2 * 255 * largest["avx2"] < 2**15 <= 2 * 255 * largest["avx512_vnni"]


@pytest.mark.parametrize("target", TARGETS)
def test_int8_holds_for_every_kind_of_cpu(target: Int8For, shipped: Callable[..., Shipped], tmp_path: Path) -> None:
    made = shipped("bert", "token-classification").copied(tmp_path)  # its logits are no next tokens
    export(made.slim, made.folder / "onnx", task=made.task, precisions=("fp32", "int8"), int8_for=target)
    found = made.certificate("int8", int8_for=target)
    assert found.passed, found.error()
    (link,) = (link for link in found.links if link.link == 3)
    assert link.cosine is not None and 0.99 < link.cosine < 1 and link.top1_agreement is None


def test_int8_is_published_under_the_names_that_clients_look_for() -> None:
    assert client_names("model", "int8") == ("model_quantized.onnx",)
    assert client_names("decoder_model_merged", "int8") == ("decoder_model_merged_quantized.onnx",)
    assert client_names("model", "fp32") == client_names("model", "fp16") == client_names("model", "q4") == ()


# --------------------------------------------------------------------------------------------------------- 4 bits


@pytest.mark.parametrize("model_type", PRODUCTS)
def test_all_links_hold_for_weights_of_4_bits(model_type: str, shipped: Callable[..., Shipped]) -> None:
    made = shipped(model_type, precisions=("fp32", "q4"))
    found = made.certificate("q4")
    assert found.passed, found.error()
    links = [link for link in found.links if link.link == 3]
    assert len(links) == (4 if model_type in SEQ2SEQ else 1)
    for link in links:
        path = made.onnx(link.subject.removeprefix("onnx/"))
        assert link.name.startswith("slim ONNX fp32 with the same rounded weights == ")
        assert link.cosine is not None and 0.9 < link.cosine < 1
        writes = model_type in DECODERS or (model_type in SEQ2SEQ and "encoder_model" not in link.subject)
        assert (link.top1_agreement is not None) == writes
        left = [n for n in nodes_of(onnx.load(str(path)).graph) if n.op_type in ("MatMul", "Gemm")]
        assert not {name for node in left for name in node.input[1:]} & tensors(path).keys()
        assert path.stat().st_size < made.onnx(path.name.replace("_q4", "")).stat().st_size
        assert read_interface(path).kv_shapes == read_interface(made.onnx(path.name.replace("_q4", ""))).kv_shapes


def test_4_bit_weights_are_symmetric_blocks_of_32_as_clients_expect(gpt2: Shipped) -> None:
    nodes = [n for n in onnx.load(str(gpt2.onnx("model_q4.onnx"))).graph.node if n.op_type == "MatMulNBits"]
    assert len(nodes) == 12  # four products in each of three layers; the head is the embedding's own table
    for node in nodes:
        options = {a.name: a.i for a in node.attribute}
        assert (options["bits"], options["block_size"], options["accuracy_level"]) == (4, Q4_BLOCK, 4)
        assert len([name for name in node.input if name]) == 3  # no zero points


@pytest.mark.parametrize("options", [{}, {"transB": 1}, {"alpha": 2.0}, {"transA": 1}])
def test_a_gemm_computes_the_same_as_a_product_and_a_sum(options: dict[str, int], tmp_path: Path) -> None:
    """Where it does more than these two, it is left alone; where nothing else is in the graph, that is an error."""
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((40, 40)).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    plain, made, rounded = (tmp_path / name for name in ("model.onnx", "model_q4.onnx", "rounded.onnx"))
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", **options)]
    write_model(plain, {"x": (FLOAT, [40, 40])}, nodes, {"w": weight, "b": bias})
    if set(options) - {"transB"}:
        with pytest.raises(ModelRefusedError, match=r"export\.precisions: 4-bit weights .* leave out q4"):
            to_q4(plain, made)
        assert not made.exists()
        return
    to_q4(plain, made)
    assert operators(made) == ["MatMulNBits", "Add"] and list(quantized_faults(plain, made)) == []
    write_rounded(plain, made, rounded)
    feed = {"x": rng.standard_normal((40, 40)).astype(np.float32)}
    exact, found = (open_session(path).run(None, feed)[0] for path in (rounded, made))
    assert np.abs(exact - found).max() < 0.02 * np.abs(exact).max()
    assert np.abs(open_session(plain).run(None, feed)[0] - exact).max() > 0.02 * np.abs(exact).max()


def four_bit(weight: np.ndarray) -> dict[str, np.ndarray]:
    """Symmetric blocks of 32 along the inputs by the book: the largest value becomes -8, the scale its eighth."""
    inputs, outputs = weight.shape
    padded = np.zeros((-(-inputs // 32) * 32, outputs), np.float32)
    padded[:inputs] = weight
    packed, scales = [], []
    for column in padded.T:
        for block in column.reshape(-1, 32):
            scale = block[np.abs(block).argmax()] / np.float32(-8)
            steps = np.clip(np.rint(block / scale) + 8, 0, 15).astype(np.uint8)
            packed.append(steps[::2] | steps[1::2] << 4)
            scales.append(scale)
    blocks = len(padded) // 32
    return {
        "w_Q4": np.array(packed).reshape(outputs, blocks, 16),
        "w_scales": np.array(scales, np.float32).reshape(outputs, blocks),
    }


WEIGHT = np.random.default_rng(1).standard_normal((40, 5)).astype(np.float32)


def faults(folder: Path, made: dict[str, np.ndarray]) -> list[str]:
    paths = []
    for name, arrays in (("model.onnx", {"w": WEIGHT}), ("model_q4.onnx", made)):
        held = [numpy_helper.from_array(array, key) for key, array in arrays.items()]
        onnx.save(helper.make_model(helper.make_graph([], "g", [], [], held)), str(folder / name))
        paths.append(folder / name)
    return list(quantized_faults(*paths))


@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_blocks_rounded_by_the_book_are_no_fault(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_weights, "_BLOCK", block)
    assert faults(tmp_path, four_bit(WEIGHT)) == []


def one_step_off(made: dict[str, np.ndarray]) -> None:
    made["w_Q4"][3, 0, 5] ^= 1


def columns_swapped(made: dict[str, np.ndarray]) -> None:
    made["w_Q4"] = made["w_Q4"][::-1].copy()


def halves_swapped(made: dict[str, np.ndarray]) -> None:
    made["w_Q4"] = (made["w_Q4"] << 4) | (made["w_Q4"] >> 4)


def coarser(made: dict[str, np.ndarray]) -> None:
    """Honestly rounded, to half of a step that is twice as large as it need be."""
    made["w_scales"] = made["w_scales"] * 2
    padded = np.zeros((64, 5), np.float32)
    padded[:40] = WEIGHT
    steps = (np.rint(padded.T.reshape(5, 2, 32) / made["w_scales"][..., None]) + 8).astype(np.uint8)
    made["w_Q4"] = steps[..., ::2] | steps[..., 1::2] << 4


def scale_is_nan(made: dict[str, np.ndarray]) -> None:
    made["w_scales"][0, 0] = np.nan


def sign_turned(made: dict[str, np.ndarray]) -> None:
    made["w_scales"] = -made["w_scales"]


@pytest.mark.parametrize("damage", [one_step_off, columns_swapped, halves_swapped, coarser, scale_is_nan, sign_turned])
def test_blocks_that_are_not_the_float32_weight_rounded_are_named(
    tmp_path: Path, damage: Callable[[dict[str, np.ndarray]], None]
) -> None:
    made = four_bit(WEIGHT)
    damage(made)
    assert faults(tmp_path, made) == ["model_q4.onnx: w is not the float32 graph's, rounded"]


def test_blocks_of_another_weight_are_named_by_their_sizes(tmp_path: Path) -> None:
    assert faults(tmp_path, four_bit(WEIGHT[:, :3])) == [
        "model_q4.onnx: w is 3x2x16 in 4 bits where the float32 graph has 40x5"
    ]
    assert faults(tmp_path, four_bit(WEIGHT[:20])) == [
        "model_q4.onnx: w is 5x1x16 in 4 bits where the float32 graph has 40x5"
    ]


def test_a_changed_weight_fails_link_3_though_outputs_agree(gpt2: Shipped, tmp_path: Path) -> None:
    made = gpt2.copied(tmp_path)
    path = made.onnx("model_q4.onnx")
    proto = onnx.load(str(path))
    packed = next(t for t in proto.graph.initializer if t.name.endswith("c_fc.weight_Q4"))
    array = numpy_helper.to_array(packed).copy()
    array[0, 0, 0] ^= 1
    packed.CopyFrom(numpy_helper.from_array(array, packed.name))
    onnx.save(proto, str(path))
    found = made.certificate("q4")
    failed = [link for link in found.links if not link.passed]
    assert [link.link for link in failed] == [3]
    assert failed[0].reason and failed[0].reason.endswith("c_fc.weight is not the float32 graph's, rounded")
    assert (
        failed[0].max_rel is not None and failed[0].max_rel < PRECISIONS["q4"].tolerance
    )  # numbers alone would have let it pass


def test_products_wired_to_one_anothers_weights_fail_link_3(gpt2: Shipped, tmp_path: Path) -> None:
    """Every weight is right, and none where it belongs: the arithmetic tells."""
    made = gpt2.copied(tmp_path)
    path = made.onnx("model_q4.onnx")
    proto = onnx.load(str(path))
    one, other, _ = (n for n in proto.graph.node if n.op_type == "MatMulNBits" and "mlp/c_fc" in n.name)
    for place in (1, 2):
        one.input[place], other.input[place] = other.input[place], one.input[place]
    onnx.save(proto, str(path))
    found = made.certificate("q4")
    failed = [link for link in found.links if not link.passed]
    assert [link.link for link in failed] == [3] and "differs beyond" in str(failed[0].reason)


def test_a_graph_without_weights_for_it_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.onnx", {"x": (TensorProto.FLOAT, [1, 4])})
    with pytest.raises(ModelRefusedError):
        to_q4(path, tmp_path / "model_q4.onnx")


def test_an_edited_embedding_fails_link_3(gpt2: Shipped, tmp_path: Path) -> None:
    """What is not rounded stays bit for bit."""
    made = gpt2.copied(tmp_path)
    edit_tensor(made.onnx("model_q4.onnx"), "wte.weight", lambda table: table + np.float32(1e-6))
    failed = [link for link in made.certificate("q4").links if not link.passed]
    assert [link.link for link in failed] == [3] and "wte.weight is not what the float32 graph has" in str(failed)

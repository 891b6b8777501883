"""The reference of an int8 or q4 file: the float32 graph with its rounded weights, and products in exact arithmetic.

Link 3 compares the file with it. Its structure is the float32 graph's and only the rounded numbers are the file's. So a
wrong head, a product by another product's weights and a sum that overflows all differ from it, and correct rounding
does not.

- int8: x is rounded to unsigned bytes as a whole (`DynamicQuantizeLinear`), the product is one of whole numbers.
- q4: each 32 neighbours of x are rounded to signed bytes by their largest (accuracy level 4), the weights are scaled.

Whole numbers are multiplied and added as float64, which is exact and uses no 16-bit instruction of the CPU. Without
ONNX Runtime's own fusions, an int8 file then agrees with its reference to the last bit, where its sums are right; with
fusions, the last bit of an activation can change a rounding by a whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from slimheads.exporting.graph_files import save_graph

BLOCK = 32  # neighbours of x that q4 rounds together
LOSS = "slimheads.loss/"
_LEAST = 1e-30  # in place of the largest value of an all-zero block: 127 divided by it is still a float32


def write_rounded(source: Path, quantized: Path, target: Path) -> None:
    """Writes the float32 graph as an int8 or q4 file computes it.

    Args:
        source, quantized: as `slimheads.verification.quantized_weights.quantized_faults` takes them.
        target: an ONNX file in an existing folder.
    """
    proto = onnx.load(str(source))
    writer = _writer(proto, quantized)
    nodes = [made for node in proto.graph.node for made in writer.converted(node)]
    writer.store_rounded()
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes)
    save_graph(proto, target)


def write_losses(source: Path, quantized: Path, target: Path) -> None:
    """Writes the float32 graph with an output `slimheads.loss/<node>` for each product that the file rounds.

    It is the error by rounding this product alone: the L2 norm of the error as a share of the output's.

    Args:
        source, quantized, target: as `write_rounded` takes them.
    """
    proto = onnx.load(str(source))
    writer = _writer(proto, quantized)
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        made = list(writer.converted(node))
        nodes.append(node)
        if made != [node]:
            nodes += [*_under_another_name(made, node.output[0]), *_loss(node)]
            loss = helper.make_tensor_value_info(f"{LOSS}{node.name}", onnx.TensorProto.FLOAT, None)
            proto.graph.output.append(loss)
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes)
    save_graph(proto, target)


def _writer(proto: onnx.ModelProto, quantized: Path) -> _Writer:
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(quantized)).graph.initializer}
    opset = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    return _Writer(proto.graph, stored, opset)


def _under_another_name(made: list[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """A converted product under another name, so that all later nodes read the float32 one."""
    made[-1].output[0] = f"{output}_rounded_product"
    return made


def _loss(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    exact = node.output[0]
    off, size, whole = (f"{exact}_{part}" for part in ("off", "off_size", "size"))
    yield helper.make_node("Sub", [f"{exact}_rounded_product", exact], [off])
    yield helper.make_node("ReduceL2", [off], [size], keepdims=0)
    yield helper.make_node("ReduceL2", [exact], [whole], keepdims=0)
    yield helper.make_node("Div", [size, whole], [f"{LOSS}{node.name}"])


def four_bit_steps(packed: np.ndarray) -> np.ndarray:
    """Multiples of a block's scale, float64 [outputs, blocks, size], from uint8 [outputs, blocks, size / 2].

    The lower four bits come first; 8 stands for zero.
    """
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1) - 8.0


class _Writer:
    def __init__(self, graph: onnx.GraphProto, stored: Mapping[str, np.ndarray], opset: int) -> None:
        self._graph, self._stored, self._opset = graph, stored, opset
        self._weights = {t.name: tuple(t.dims) for t in graph.initializer}
        self._made: set[str] = set()  # tensors that several products share

    def converted(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A product by a rounded weight as its file computes it; any other node as it is."""
        weight = node.input[1] if node.op_type in ("MatMul", "Gemm") else ""
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        name = f"{weight}_Transposed" if options.get("transB") else weight
        form = {f"{name}_quantized": self._integers, f"{name}_Q4": self._blocks}
        product = next((made for held, made in form.items() if weight in self._weights and held in self._stored), None)
        if product is None:
            yield node
            return
        biased = len(node.input) > 2 and node.input[2]
        output = f"{node.output[0]}_product" if biased else node.output[0]
        yield from product(node.input[0], name, output)
        if biased:
            yield helper.make_node("Add", [output, node.input[2]], [node.output[0]], f"{node.name}_Add")

    def _integers(self, x: str, weight: str, output: str) -> Iterator[onnx.NodeProto]:
        scales = self._store(f"{weight}_scale", self._stored[f"{weight}_scale"])
        if f"{x}_centred" not in self._made:
            parts = [f"{x}_{part}" for part in ("steps", "step", "zero")]
            yield helper.make_node("DynamicQuantizeLinear", [x], parts, f"{x}_DynamicQuantizeLinear")
            yield from self._centred(x, "steps", "zero")
        if f"{weight}_centred" not in self._made:
            for part in ("quantized", "zero_point"):
                self._store(f"{weight}_{part}", self._stored[f"{weight}_{part}"])
            yield from self._centred(weight, "quantized", "zero_point")
        whole = [f"{x}_centred", f"{weight}_centred"]
        yield helper.make_node("MatMul", whole, [f"{output}_exact"], f"{output}_MatMul")
        yield helper.make_node("Cast", [f"{output}_exact"], [f"{output}_whole"], to=onnx.TensorProto.FLOAT)
        yield helper.make_node("Mul", [f"{x}_step", scales], [f"{output}_scale"])
        yield helper.make_node("Mul", [f"{output}_whole", f"{output}_scale"], [output])

    def _centred(self, name: str, steps: str, zero: str) -> Iterator[onnx.NodeProto]:
        self._made.add(f"{name}_centred")
        exact = [f"{name}_{part}_exact" for part in (steps, zero)]
        for part, made in zip((steps, zero), exact, strict=True):
            yield helper.make_node("Cast", [f"{name}_{part}"], [made], to=onnx.TensorProto.DOUBLE)
        yield helper.make_node("Sub", exact, [f"{name}_centred"])

    def _blocks(self, x: str, weight: str, output: str) -> Iterator[onnx.NodeProto]:
        packed = self._stored[f"{weight}_Q4"]
        shape = self._weights.get(weight) or self._weights[weight.removesuffix("_Transposed")][::-1]
        weights = self._store(f"{weight}_rounded", self._dequantized(weight, shape))
        if f"{x}_rounded" not in self._made:
            self._made.add(f"{x}_rounded")
            yield from self._rounded_in_blocks(x, shape[0], packed.shape[1])
        yield helper.make_node("MatMul", [f"{x}_rounded", weights], [output], f"{output}_MatMul")

    def _rounded_in_blocks(self, x: str, inputs: int, blocks: int) -> Iterator[onnx.NodeProto]:
        """x [..., inputs] with each block's values as whole multiples of its largest / 127."""

        def whole(name: str, *numbers: int) -> str:
            return self._store(f"{x}_{name}", np.array(numbers, np.int64))

        limit = self._store("slimheads_127", np.array([127], np.float32))
        least = self._store("slimheads_least", np.array([_LEAST], np.float32))
        rows, padding = whole("rows", -1, inputs), whole("padding", 0, 0, 0, blocks * BLOCK - inputs)
        cut = whole("cut_from", 0), whole("cut_to", inputs), whole("cut_axis", -1)
        # The axes of a reduction became an input with opset 18.
        last: tuple[list[str], dict[str, list[int]]] = (
            ([whole("last", -1)], {}) if self._opset >= 18 else ([], {"axes": [-1]})
        )
        steps: list[tuple[str, list[str], str, dict[str, list[int]]]] = [
            ("Shape", [x], "shape", {}),
            ("Reshape", [x, rows], "flat", {}),
            ("Pad", [f"{x}_flat", padding], "padded", {}),
            ("Reshape", [f"{x}_padded", whole("blocks", -1, blocks, BLOCK)], "blocked", {}),
            ("Abs", [f"{x}_blocked"], "sizes", {}),
            ("ReduceMax", [f"{x}_sizes", *last[0]], "largest", last[1]),
            ("Max", [f"{x}_largest", least], "divisor", {}),
            ("Div", [f"{x}_largest", limit], "step", {}),
            ("Div", [limit, f"{x}_divisor"], "steps_a_unit", {}),
            ("Mul", [f"{x}_blocked", f"{x}_steps_a_unit"], "exact_steps", {}),
            ("Round", [f"{x}_exact_steps"], "whole_steps", {}),
            ("Mul", [f"{x}_whole_steps", f"{x}_step"], "scaled", {}),
            ("Reshape", [f"{x}_scaled", whole("back", -1, blocks * BLOCK)], "joined", {}),
            ("Slice", [f"{x}_joined", *cut], "cut", {}),
            ("Reshape", [f"{x}_cut", f"{x}_shape"], "rounded", {}),
        ]
        for operator, read, written, options in steps:
            yield helper.make_node(operator, read, [f"{x}_{written}"], f"{x}_{written}_{operator}", **options)

    def store_rounded(self) -> None:
        """Stores a rounded tensor's values where other nodes than products read it and the file has no float32 copy."""
        for tensor in self._graph.initializer:
            if tensor.name not in self._stored and any(
                f"{tensor.name}_{suffix}" in self._stored for suffix in ("quantized", "Q4")
            ):
                array = self._dequantized(tensor.name, tuple(tensor.dims))
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    def _dequantized(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if f"{name}_quantized" in self._stored:
            steps, zero, scale = (self._stored[f"{name}_{part}"] for part in ("quantized", "zero_point", "scale"))
            return np.asarray((steps.astype(np.float32) - zero.astype(np.float32)) * scale, np.float32)
        packed = self._stored[f"{name}_Q4"]
        scales = self._stored[f"{name}_scales"].reshape(*packed.shape[:2], 1)
        turned = (four_bit_steps(packed) * scales).reshape(len(packed), -1)[:, : shape[0]]
        return np.ascontiguousarray(turned.T, dtype=np.float32)

    def _store(self, name: str, array: np.ndarray) -> str:
        if name not in self._made:
            self._made.add(name)
            self._graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

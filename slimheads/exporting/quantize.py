"""Converters from a float32 graph: to float16, to dynamic int8, and to weights of 4 bits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.registry import IntegerOpsRegistry
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

import slimheads.runtime.onnx_runtime  # noqa: F401 - telemetry off
from slimheads.errors import ModelRefusedError
from slimheads.exporting import graph_files
from slimheads.exporting.half import join_float32, norm_nodes
from slimheads.names import Int8For
from slimheads.runtime.quiet import quiet

# Weights are signed, symmetric and per output channel, activations unsigned. Without VNNI, x86 adds pairs of products
# in 16 bits, which full-range weights overflow: files that may run there have weights of 7 bits, -64 to 64. Lookup
# tables have 8 bits (unsigned) in every file.
SIXTEEN_BITS: frozenset[Int8For] = frozenset({"any", "avx2"})
# Convolutions stay: a weight that the graph computes (wav2vec 2.0 normalizes one) cannot be quantized beforehand.
_QUANTIZED = sorted(IntegerOpsRegistry.keys() - {"Conv"})
# 4 bits in symmetric blocks of 32 along the input axis, as transformers.js converts by default; activations are
# quantized to int8 on the fly (accuracy level 4), which is the kernel that CPUs have instructions for.
Q4_BLOCK, _Q4_ACCURACY = 32, 4


def to_fp16(source: Path, target: Path) -> None:
    """float16 weights and arithmetic; inputs and outputs stay float32, so that clients need no change.

    Root mean square norms are computed in float32: see half.py.
    """
    # Shapes are inferred before the weights are loaded, because inference fails past 2 GiB.
    proto = onnx.shape_inference.infer_shapes(onnx.load(str(source), load_external_data=False))
    load_external_data_for_model(proto, str(source.parent))
    norms = list(norm_nodes(proto.graph))
    made = OnnxModel(
        convert_float_to_float16(proto, keep_io_types=True, disable_shape_infer=True, node_block_list=norms)
    )
    join_float32(made.model.graph)
    made.topological_sort()  # the converter appends its casts at the end, and branches of a graph must be sorted
    graph_files.save_graph(made.model, target)


def to_int8(source: Path, target: Path, int8_for: Int8For = "any") -> None:
    """int8 weights per output channel, activations quantized at run time (per tensor, MiniLM lost 4% of cosine).

    Args:
        int8_for: the CPUs that the file is for. With "any" or "avx2" it is right on all CPUs; with "avx512_vnni" or
            "arm64", sums overflow on x86 without VNNI.
    """
    with quiet(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".int8-") as scratch:
        made = Path(scratch) / target.name
        quantize_dynamic(
            str(source),
            str(made),
            op_types_to_quantize=_QUANTIZED,
            per_channel=True,
            reduce_range=int8_for in SIXTEEN_BITS,
            weight_type=QuantType.QInt8,
            use_external_data_format=graph_files.graph_bytes(source) > graph_files.ONE_FILE,
        )
        graph_files.save_graph(onnx.load(str(made)), target)


def to_q4(source: Path, target: Path) -> None:
    """Weights of matrix products in 4 bits (`MatMulNBits`); embeddings, convolutions and biases stay float32.

    Raises:
        ModelRefusedError: the graph has no matrix product by a constant.
    """
    proto = onnx.load(str(source))
    nodes = [made for node in proto.graph.node for made in _product_and_sum(node, proto.graph)]
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes)
    with quiet():
        quantizer = MatMulNBitsQuantizer(
            proto, bits=4, block_size=Q4_BLOCK, is_symmetric=True, accuracy_level=_Q4_ACCURACY
        )
        quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in made.graph.node):
        raise ModelRefusedError(
            "4-bit weights are for matrix products by a constant, and the graph has none",
            keys=("export.precisions",),
            hint="leave out q4",
        )
    graph_files.save_graph(made, target)


def _product_and_sum(node: onnx.NodeProto, graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """A Gemm by a constant as MatMul and Add, because the quantizer only reads MatMul; any other node as it is.

    A transposed weight is stored as `<name>_Transposed`, the name that ONNX Runtime's int8 quantizer uses.
    """
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    weight = next((t for t in graph.initializer if node.op_type == "Gemm" and t.name == node.input[1]), None)
    scaled = any(options.get(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    if weight is None or scaled or options.get("transA"):
        yield node
        return
    name = weight.name
    if options.get("transB"):
        name = f"{weight.name}_Transposed"
        if all(t.name != name for t in graph.initializer):
            array = np.ascontiguousarray(numpy_helper.to_array(weight).T)
            graph.initializer.append(numpy_helper.from_array(array, name))
    biased = len(node.input) > 2 and node.input[2]
    product = f"{node.output[0]}_product" if biased else node.output[0]
    yield helper.make_node("MatMul", [node.input[0], name], [product], f"{node.name}_MatMul")
    if biased:
        yield helper.make_node("Add", [product, node.input[2]], [node.output[0]], f"{node.name}_Add")

"""Products of unsigned and signed bytes as x86 and ARM compute them: the arithmetic of int8 graphs.

With VNNI, and on ARM, products are added in 32 bits. AVX2 and AVX-512 without VNNI multiply two neighbours at a time
and add the two products in 16 bits (`vpmaddubsw`), where the sum saturates at -32,768 and 32,767: with full-range
weights it can be off by half. Weights within +-64 never saturate it: 255 x 64 x 2 = 32,640.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from slimheads.runtime.onnx_signature import nodes_of

SAFE_WEIGHT = 64
# Operators that multiply bytes, and the index of the input with the weights.
_WEIGHTS = {
    "ConvInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "QAttention": 1,
    "QGemm": 3,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}


def overflow_faults(path: Path) -> Iterator[str]:
    """Weights of a file's integer products with which a sum of two may not fit into 16 bits; nothing if all do.

    Unsigned weights are multiplied in 16 and added in 32 bits on every CPU, and lookup tables are not multiplied.
    """
    for name, weights in product_weights(path):
        if weights is None:
            yield f"{path.name}: {name} is computed by the graph, so nothing bounds it"
        elif (
            weights.dtype == np.int8 and (largest := int(np.abs(weights.astype(np.int16)).max(initial=0))) > SAFE_WEIGHT
        ):
            yield f"{path.name}: {name} holds {largest}, and two products of more than {SAFE_WEIGHT} overflow 16 bits"


def product_weights(path: Path) -> list[tuple[str, np.ndarray | None]]:
    """The weights of a file's integer products: name and whole numbers, or None where the graph computes them."""
    graph = onnx.load(str(path)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    read = dict.fromkeys(node.input[_WEIGHTS[node.op_type]] for node in nodes_of(graph) if node.op_type in _WEIGHTS)
    return [(name, numpy_helper.to_array(stored[name]) if name in stored else None) for name in read]

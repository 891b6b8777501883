"""Root mean square norms in float16 graphs are computed in float32, as in transformers.

The square of a value above 256 overflows float16, and such activations are common in decoders. Also, ONNX Runtime
before 1.32 fuses the norm even if its constants have no float16 kernels, and then cannot load the graph.
"""

from __future__ import annotations

from collections import defaultdict

import onnx
from onnx import TensorProto, helper

_AFTER_MEAN = frozenset({"Add", "Sqrt", "Reciprocal", "Div", "Mul"})  # to x * 1 / sqrt(mean + epsilon)


def norm_nodes(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes from a square to the product with the inverse root of its mean."""
    made = {output: node for node in graph.node for output in node.output}
    users: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    found: set[str] = set()
    for mean in graph.node:
        square = made.get(mean.input[0]) if mean.op_type == "ReduceMean" else None
        if square is None or square.op_type != "Pow":
            continue
        chain = [square, mean]
        while chain[-1].op_type != "Mul" and len(users[chain[-1].output[0]]) == 1:
            following = users[chain[-1].output[0]][0]
            if following.op_type not in _AFTER_MEAN:
                break
            chain.append(following)
        constants = (made.get(name) for node in chain for name in node.input)
        found |= {node.name for node in (*chain, *constants) if node and (node in chain or node.op_type == "Constant")}
    return found


def join_float32(graph: onnx.GraphProto) -> None:
    """Removes each pair of casts from float32 to float16 and back that the converter left between two such nodes."""
    made = {output: node for node in graph.node for output in node.output}
    whole: dict[str, str] = {}
    for node in graph.node:
        before = made.get(node.input[0]) if _is_cast(node, TensorProto.FLOAT) else None
        # Only a float32 result has a cast by the converter itself.
        if before is not None and _is_cast(before, TensorProto.FLOAT16) and before.input[0].endswith("_cast_to_fp16"):
            whole[node.output[0]] = before.input[0]
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = whole.get(name, name)
    results, nodes, before = {output.name for output in graph.output}, list(graph.node), 0
    while len(nodes) != before:
        before, read = len(nodes), results | {name for node in nodes for name in node.input}
        nodes = [node for node in nodes if node.op_type != "Cast" or node.output[0] in read]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _is_cast(node: onnx.NodeProto, to: int) -> bool:
    return node.op_type == "Cast" and any(helper.get_attribute_value(a) == to for a in node.attribute if a.name == "to")

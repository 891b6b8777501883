"""Small ONNX files made by hand, for tests of what opens, reads and feeds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INT64, FLOAT, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL
VOCABULARY = 37


def write_model(
    path: Path,
    inputs: dict[str, tuple[int, list[Any]]],
    nodes: list[onnx.NodeProto] | None = None,
    initializers: dict[str, np.ndarray] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A file with the given inputs; without nodes, every input is handed through to an output."""
    values = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    nodes = nodes or [helper.make_node("Identity", [name], [f"out.{name}"]) for name in inputs]
    outputs = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
    if nodes[-1].op_type == "Identity":
        outputs = [helper.make_tensor_value_info(f"out.{name}", *kind) for name, kind in inputs.items()]
    else:
        outputs = [helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, None)]
    stored = [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values, outputs, stored),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def write_encoder(path: Path) -> Path:
    """input_ids -> Cast -> Gather in a table of VOCABULARY rows, as an exported embedding."""
    return write_model(
        path,
        {"input_ids": (INT64, ["batch_size", "sequence_length"])},
        [
            helper.make_node("Cast", ["input_ids"], ["ids"], to=INT64),
            helper.make_node("Gather", ["table", "ids"], ["y"]),
        ],
        {"table": np.ones((VOCABULARY, 4), np.float32)},
    )


WIDTH = 8  # of each head of write_decoder


def write_decoder(path: Path, heads: int, *, carries: bool = True, dim: int | str = WIDTH) -> Path:
    """A decoder whose "keys" are rows of a table, so that what its cache must hold is known: input_ids [b, s] ->
    present.0.key [b, heads, past + s, WIDTH], the past before the new. Its other output is the sum of them all.

    Args:
        carries: whether it puts the cache out.
        dim: how axis 3 of the past is declared.
    """
    table = np.arange(VOCABULARY * heads * WIDTH, dtype=np.float32).reshape(VOCABULARY, heads * WIDTH)
    past = ["batch_size", heads, "past_sequence_length", dim]
    values = {"input_ids": (INT64, ["batch_size", "sequence_length"]), "past_key_values.0.key": (FLOAT, past)}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Reshape", ["rows", "split"], ["heads"]),
        helper.make_node("Transpose", ["heads"], ["new"], perm=[0, 2, 1, 3]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("ReduceSum", ["present.0.key"], ["logits"], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *kind) for name, kind in values.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in ("logits", "present.0.key")[: 1 + carries]],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([0, 0, heads, WIDTH], np.int64), "split"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def assert_one_line(error: Exception, *words: str) -> None:
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)

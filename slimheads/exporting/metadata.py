"""Sizes recorded in an ONNX file beside its graph, which `slimheads.runtime.onnx_signature` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from slimheads.names import KvAxes, KvShape
from slimheads.runtime.onnx_signature import AXES_KEY, CROSS_KV_SHAPES_KEY, KV_SHAPES_KEY


def label_axes(path: Path, axes: Mapping[str, Any]) -> None:
    """Records the axis sizes of image and sound inputs, which are free in the file even if the model takes one size."""
    proto = onnx.load(str(path), load_external_data=False)
    _set_metadata(proto, AXES_KEY, axes)
    # Only the graph is written again; external weights stay where they are.
    path.write_bytes(proto.SerializeToString())


def label_cache(path: Path, shapes: Sequence[KvShape], cross: Sequence[KvShape], axes: KvAxes) -> None:
    """Records the true cache shapes and, with "symbolic", frees axes 1 and 3 of the past inputs.

    optimum's client sizes the first, empty cache by config.json, which has one head count for all layers. Free axes
    accept that, because ONNX Runtime's Concat ignores an empty operand.
    """
    proto = onnx.load(str(path), load_external_data=False)
    _set_metadata(proto, KV_SHAPES_KEY, shapes)
    if cross:
        _set_metadata(proto, CROSS_KV_SHAPES_KEY, cross)
    if axes == "symbolic":
        for value in proto.graph.input:
            if value.name.startswith("past_key_values."):
                _, *owner, kind = value.name.split(".")  # past_key_values.0.key, or past_key_values.0.encoder.key
                dims, cache = value.type.tensor_type.shape.dim, "_".join(owner)
                dims[1].dim_param, dims[3].dim_param = f"kv_heads_{cache}", f"head_dim_{cache}_{kind}"
    # Only the graph is written again; external weights stay where they are.
    path.write_bytes(proto.SerializeToString())


def _set_metadata(proto: onnx.ModelProto, key: str, value: Any) -> None:
    """Sets one entry as JSON and keeps the others."""
    onnx.helper.set_model_props(proto, {p.key: p.value for p in proto.metadata_props} | {key: json.dumps(value)})

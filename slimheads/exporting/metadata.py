"""Metadata of an ONNX file, which `slimheads.runtime.onnx_signature` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from slimheads.runtime.onnx_signature import AXES_KEY


def label_axes(path: Path, axes: Mapping[str, Any]) -> None:
    """Records the axis sizes of image and sound inputs, which are free in the file even if the model takes one size."""
    proto = onnx.load(str(path), load_external_data=False)
    set_metadata(proto, AXES_KEY, axes)
    # Only the graph is written again; external weights stay where they are.
    path.write_bytes(proto.SerializeToString())


def set_metadata(proto: onnx.ModelProto, key: str, value: Any) -> None:
    """Sets one entry as JSON and keeps the others."""
    onnx.helper.set_model_props(proto, {p.key: p.value for p in proto.metadata_props} | {key: json.dumps(value)})

"""What an ONNX file says about itself besides its graph, for `slimheads.sessions` to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from slimheads.runtime.onnx_signature import AXES_KEY


def label_axes(path: Path, axes: Mapping[str, Any]) -> None:
    """Records the sizes of images' and sounds' axes, which optimum leaves free even where the model takes one size."""
    proto = onnx.load(str(path), load_external_data=False)
    set_metadata(proto, AXES_KEY, axes)
    # The weights of a large file stay where they are: only the graph is written again.
    path.write_bytes(proto.SerializeToString())


def set_metadata(proto: onnx.ModelProto, key: str, value: Any) -> None:
    """Sets one entry, as JSON, and keeps the others."""
    onnx.helper.set_model_props(proto, {p.key: p.value for p in proto.metadata_props} | {key: json.dumps(value)})

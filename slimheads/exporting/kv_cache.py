"""KV caches whose head count differs between layers: their shapes, and the axes of the exported cache inputs.

An encoder-decoder has two caches per layer, of self-attention and of cross-attention, and their counts differ too.

optimum's client sizes the first, empty cache by config.json, which has one head count for all layers. So with `kv_axes:
symbolic`, axes 1 and 3 of every past input are free: ONNX Runtime's Concat ignores an empty operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from slimheads.exporting.metadata import set_metadata
from slimheads.names import KvAxes, KvShape
from slimheads.runtime.onnx_signature import CROSS_KV_SHAPES_KEY, KV_SHAPES_KEY


def label_cache(path: Path, shapes: Sequence[KvShape], cross: Sequence[KvShape], axes: KvAxes) -> None:
    """Records the true cache shapes in the metadata and, for "symbolic", frees axes 1 and 3 of the past inputs."""
    proto = onnx.load(str(path), load_external_data=False)
    set_metadata(proto, KV_SHAPES_KEY, shapes)
    if cross:
        set_metadata(proto, CROSS_KV_SHAPES_KEY, cross)
    if axes == "symbolic":
        for value in proto.graph.input:
            if value.name.startswith("past_key_values."):
                _, *owner, kind = value.name.split(".")  # past_key_values.0.key, or past_key_values.0.encoder.key
                dims, cache = value.type.tensor_type.shape.dim, "_".join(owner)
                dims[1].dim_param, dims[3].dim_param = f"kv_heads_{cache}", f"head_dim_{cache}_{kind}"
    # Only the graph is written again; external weights stay where they are.
    path.write_bytes(proto.SerializeToString())

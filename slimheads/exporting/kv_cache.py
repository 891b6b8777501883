"""Decoders whose KV cache has another head count in every layer: their true shapes at export, and the axes of the file.

An encoder-decoder has two caches a layer, of self-attention and of cross-attention, and their counts differ too.

optimum's dummy `past_key_values` have one head count for all layers, which fails on a non-uniform model; and its client
sizes the first, empty cache by config.json. So the dummy inputs here are read off a real forward, and (kv_axes:
symbolic) axes 1 and 3 of every past input are made free: ONNX Runtime's Concat ignores an empty operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from slimheads.exporting.metadata import set_metadata
from slimheads.names import KvAxes, KvShape
from slimheads.runtime.onnx_signature import CROSS_KV_SHAPES_KEY, KV_SHAPES_KEY


def true_cache_config(config_class: type[Any], shapes: Sequence[KvShape], cross: Sequence[KvShape] = ()) -> type[Any]:
    """A subclass of an optimum OnnxConfig whose dummy past has each layer's own shape."""

    class TrueCacheConfig(config_class):  # type: ignore[misc]
        def overwrite_shape_and_generate_input(
            self, dummy_input_gen: Any, input_name: str, framework: str, input_shapes: dict[str, Any]
        ) -> Any:
            made = super().overwrite_shape_and_generate_input(dummy_input_gen, input_name, framework, input_shapes)
            if input_name != "past_key_values":
                return made
            batch, lengths = made[0][1].shape[0], [tensor.shape[2] for tensor in made[0][1::2]]
            by_layer = zip(shapes, cross, strict=True) if cross else zip(shapes, strict=True)
            return [
                tuple(
                    torch.rand(batch, heads, length, dim)
                    for (heads, *dims), length in zip(layer, lengths, strict=True)
                    for dim in dims
                )
                for layer in by_layer
            ]

    return TrueCacheConfig


def label_cache(path: Path, shapes: Sequence[KvShape], axes: KvAxes, cross: Sequence[KvShape] = ()) -> None:
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
    # The weights of a large file stay where they are: only the graph is written again.
    path.write_bytes(proto.SerializeToString())

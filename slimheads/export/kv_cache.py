"""Decoders whose KV cache has another head count in every layer: their true shapes at export, and the axes of the file.

optimum's dummy `past_key_values` have one head count for all layers, which fails on a non-uniform model; and its client
sizes the first, empty cache by config.json. So the dummy inputs here are read off a real forward, and (kv_axes:
symbolic) axes 1 and 3 of every past input are made free: ONNX Runtime's Concat ignores an empty operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from transformers import PreTrainedModel

from slimheads.export.metadata import set_metadata
from slimheads.sessions import KV_SHAPES_KEY

KvAxes = Literal["symbolic", "static"]
KvShape = tuple[int, int, int]  # KV heads, head_dim of keys, head_dim of values


def kv_shapes(model: PreTrainedModel) -> tuple[KvShape, ...]:
    """Per layer: (KV heads, key head_dim, value head_dim), read off a forward of two tokens."""
    with torch.no_grad():
        cache = model(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=True).past_key_values
    return tuple((key.shape[1], key.shape[3], value.shape[3]) for key, value in cache.to_legacy_cache())


def true_cache_config(config_class: type[Any], shapes: Sequence[KvShape]) -> type[Any]:
    """A subclass of an optimum OnnxConfig whose dummy past has each layer's own shape."""

    class TrueCacheConfig(config_class):  # type: ignore[misc]
        def overwrite_shape_and_generate_input(
            self, dummy_input_gen: Any, input_name: str, framework: str, input_shapes: dict[str, Any]
        ) -> Any:
            made = super().overwrite_shape_and_generate_input(dummy_input_gen, input_name, framework, input_shapes)
            if input_name != "past_key_values":
                return made
            batch, length = made[0][1].shape[0], made[0][1].shape[2]
            return [
                (torch.rand(batch, heads, length, key_dim), torch.rand(batch, heads, length, value_dim))
                for heads, key_dim, value_dim in shapes
            ]

    return TrueCacheConfig


def label_cache(path: Path, shapes: Sequence[KvShape], axes: KvAxes) -> None:
    """Records the true cache shapes in the metadata and, for "symbolic", frees axes 1 and 3 of the past inputs."""
    proto = onnx.load(str(path), load_external_data=False)
    set_metadata(proto, KV_SHAPES_KEY, shapes)
    if axes == "symbolic":
        for value in proto.graph.input:
            if value.name.startswith("past_key_values."):
                _, layer, kind = value.name.split(".")
                dims = value.type.tensor_type.shape.dim
                dims[1].dim_param, dims[3].dim_param = f"kv_heads_{layer}", f"head_dim_{layer}_{kind}"
    # The weights of a large file stay where they are: only the graph is written again.
    path.write_bytes(proto.SerializeToString())

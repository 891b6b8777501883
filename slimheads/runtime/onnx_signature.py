"""The inputs and outputs of an ONNX file, as the file itself and its metadata describe them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from slimheads.errors import UsageError, one_line
from slimheads.names import KvShape
from slimheads.runtime.onnx_runtime import onnxruntime

KV_SHAPES_KEY = "slimheads.kv_shapes"  # metadata_props: JSON [[kv_heads, head_dim_k, head_dim_v], ...], one per layer
CROSS_KV_SHAPES_KEY = "slimheads.cross_kv_shapes"  # the same for the cross-attention of an encoder-decoder
# metadata_props: JSON {input: [[size at length 1, growth per further token or frame], ...]}, axes after the batch
AXES_KEY = "slimheads.axes"
# Images, spectrograms, waveforms and encoder outputs. Some of them have no length.
FLOAT_INPUTS = frozenset({"pixel_values", "input_features", "input_values", "encoder_hidden_states"})


@dataclass(frozen=True)
class Input:
    """One graph input. A dimension is a number if the file fixes it, otherwise a name or None."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str | None, ...]

    @property
    def is_cache(self) -> bool:
        """Whether it holds keys or values of earlier tokens."""
        return self.name.split(".")[0] == "past_key_values"

    @property
    def is_cross(self) -> bool:
        """Whether it is the cache of a decoder's cross-attention."""
        return self.is_cache and "encoder" in self.name.split(".")


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of an ONNX file.

    `vocabulary` is the number of rows of the table that input_ids index, if the graph shows it. From the metadata, if
    present: `kv_shapes` with the cache shape of every layer, `cross_kv_shapes` with those of a decoder's
    cross-attention, and `axes` with the sizes of image and sound axes (see AXES_KEY).
    """

    where: str
    inputs: tuple[Input, ...]
    vocabulary: int | None = None
    kv_shapes: tuple[KvShape, ...] = ()
    cross_kv_shapes: tuple[KvShape, ...] = ()
    axes: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @property
    def cache(self) -> dict[str, str]:
        """The outputs of a run that are the caches of the next: output -> input."""
        inputs = (wanted.name for wanted in self.inputs if wanted.is_cache)
        carried = {"present" + name.removeprefix("past_key_values"): name for name in inputs}
        return {output: name for output, name in carried.items() if output in self.outputs}

    @property
    def cache_bytes_per_token(self) -> int | None:
        """Bytes by which a decoder's cache grows per token of a sequence: KV heads x (key width + value width) x bytes
        per element, over all layers. The cross-attention cache does not grow. None if there is no cache, or the file
        does not give its sizes.
        """
        own = [wanted for wanted in self.inputs if wanted.is_cache and not wanted.is_cross]
        sizes = [(self.cache_size(wanted), wanted.dtype.itemsize) for wanted in own]
        if not sizes or any(size is None for size, _ in sizes):
            return None
        return sum(size[0] * size[1] * item for size, item in sizes if size)

    def cache_size(self, wanted: Input) -> tuple[int, int] | None:
        """(KV heads, width) of a cache [batch, heads, past, width], if its axes or the metadata give them."""
        if len(wanted.dims) != 4:
            return None
        heads, width = wanted.dims[1], wanted.dims[3]
        if isinstance(heads, int) and isinstance(width, int):
            return heads, width
        parts, shapes = wanted.name.split("."), self.cross_kv_shapes if wanted.is_cross else self.kv_shapes
        layer = next((int(part) for part in parts if part.isdigit()), len(shapes))
        if layer >= len(shapes) or parts[-1] not in {"key", "value"}:
            return None
        kv_heads, key_width, value_width = shapes[layer]
        stated = key_width if parts[-1] == "key" else value_width
        return heads if isinstance(heads, int) else kv_heads, width if isinstance(width, int) else stated

    def without(self, names: Collection[str]) -> Interface:
        """The same without these inputs."""
        return replace(self, inputs=tuple(wanted for wanted in self.inputs if wanted.name not in names))

    @property
    def has_length(self) -> bool:
        """Whether any input's size depends on a length; images and spectrograms have one size."""
        return any(self._varies(wanted) for wanted in self.inputs)

    def _varies(self, wanted: Input) -> bool:
        if wanted.name in self.axes:
            return any(more for _, more in self.axes[wanted.name])
        free = [dim for dim in wanted.dims[1:] if isinstance(dim, str)]
        return wanted.name not in FLOAT_INPUTS or any(dim.endswith("sequence_length") for dim in free)


def read_interface(source: str | Path | onnxruntime.InferenceSession) -> Interface:
    """Read the inputs and outputs of a file or an open session, without external data. A session has no vocabulary.

    Raises:
        UsageError: the file is missing or damaged, or its metadata does not have the form of the keys above.
    """
    if isinstance(source, onnxruntime.InferenceSession):
        inputs = tuple(Input(i.name, _ort_dtype(i.type), tuple(i.shape)) for i in source.get_inputs())
        metadata = source.get_modelmeta().custom_metadata_map
        own, cross = _kv_shapes(metadata, "session")
        outputs = tuple(output.name for output in source.get_outputs())
        return Interface("session", inputs, None, own, cross, _axes(metadata, "session"), outputs)
    try:
        model = onnx.load(str(source), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise UsageError(
            f"the ONNX file cannot be read ({one_line(error)})",
            where=str(source),
            hint="export it again",
        ) from error
    if not model.HasField("graph"):  # what an empty file parses as
        raise UsageError("the ONNX file has no graph", where=str(source), hint="export it again")
    stored = {tensor.name for tensor in model.graph.initializer}  # old files list initializers among the inputs
    inputs = tuple(
        Input(value.name, _proto_dtype(value.type.tensor_type.elem_type), tuple(_dims(value)))
        for value in model.graph.input
        if value.name not in stored
    )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    where, outputs = str(source), tuple(value.name for value in model.graph.output)
    own, cross = _kv_shapes(metadata, where)
    return Interface(where, inputs, _vocabulary(model.graph), own, cross, _axes(metadata, where), outputs)


def _dims(value: onnx.ValueInfoProto) -> Iterator[int | str | None]:
    for dim in value.type.tensor_type.shape.dim:
        yield dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None


def _proto_dtype(elem_type: int) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type)) if elem_type else np.dtype(object)


def _ort_dtype(name: str) -> np.dtype[Any]:
    element = name.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype({"float": "float32", "double": "float64"}.get(element, element))
    except TypeError:  # a type that numpy does not have: refused when it has to be filled
        return np.dtype(object)


def _kv_shapes(metadata: dict[str, str], where: str) -> Iterator[tuple[KvShape, ...]]:
    for key in (KV_SHAPES_KEY, CROSS_KV_SHAPES_KEY):
        try:
            yield tuple((int(h), int(k), int(v)) for h, k, v in json.loads(metadata.get(key, "[]")))
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"metadata {key} is not a list of [kv_heads, head_dim_k, head_dim_v]",
                where=where,
                hint="export it again",
            ) from error


def _axes(metadata: dict[str, str], where: str) -> dict[str, tuple[tuple[int, int], ...]]:
    try:
        stored = json.loads(metadata.get(AXES_KEY, "{}"))
        return {str(name): tuple((int(first), int(more)) for first, more in axes) for name, axes in stored.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"metadata {AXES_KEY} is not a table of [size, growth per length] by input",
            where=where,
            hint="export it again",
        ) from error


# Lookup operators, with the positions of their inputs for indices and table.
_LOOKUPS = MappingProxyType({"Gather": (1, 0), "GatherBlockQuantized": (1, 0), "EmbedLayerNormalization": (0, 2)})

_SAME_IDS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node in topological order (by the ONNX standard); subgraphs come before the node that holds them."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)
        yield node


def _vocabulary(graph: onnx.GraphProto) -> int | None:
    """Rows of the table that input_ids index, or None if the graph does not show it."""
    tables = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 2}
    nodes = list(nodes_of(graph))
    origin = {output: node for node in nodes for output in node.output}
    ids = {"input_ids", "decoder_input_ids"}
    rows = []
    for node in nodes:
        if node.op_type in _SAME_IDS and node.input[0] in ids:
            ids.update(node.output)
        indices, data = _LOOKUPS.get(node.op_type, (0, 0))
        if indices != data and node.input[indices] in ids:
            table = node.input[data]
            while table not in tables and table in origin:  # through the conversion of a quantized or fp16 table
                table = origin[table].input[0] if origin[table].input else ""
            if table in tables:
                rows.append(tables[table])
    return min(rows, default=None)

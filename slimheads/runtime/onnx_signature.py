"""What an ONNX file says about its own inputs, and inputs made from that: every stage feeds a graph the same way."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from slimheads.errors import UsageError, one_line
from slimheads.runtime.onnx_runtime import onnxruntime

Array = NDArray[Any]

KV_SHAPES_KEY = "slimheads.kv_shapes"  # metadata_props: JSON [[kv_heads, head_dim_k, head_dim_v], ...], one a layer
CROSS_KV_SHAPES_KEY = "slimheads.cross_kv_shapes"  # the same for the cross-attention of an encoder-decoder
# metadata_props: JSON {input: [[size at length 1, more for each further token or frame], ...]}, axes after the batch
AXES_KEY = "slimheads.axes"
UNKNOWN_VOCABULARY = 100


@dataclass(frozen=True)
class Input:
    """One graph input: a dimension is a number where the file fixes it and a name (or None) where it does not."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str | None, ...]

    @property
    def is_cache(self) -> bool:
        """Whether it holds keys or values of earlier tokens."""
        return self.name.split(".")[0] == "past_key_values"

    @property
    def is_cross(self) -> bool:
        """Whether it holds what a decoder keeps of its encoder."""
        return self.is_cache and "encoder" in self.name.split(".")


@dataclass(frozen=True)
class Interface:
    """What an ONNX file says about its own inputs.

    `vocabulary` is the number of rows of the table that input_ids index, where the graph shows it. `kv_shapes` holds
    (kv_heads, head_dim of keys, head_dim of values) of every layer, `cross_kv_shapes` the same for what a decoder keeps
    of its encoder, and `axes` the sizes of images' and sounds' axes (see AXES_KEY), where the file's metadata carries
    them.
    """

    where: str
    inputs: tuple[Input, ...]
    vocabulary: int | None = None
    kv_shapes: tuple[tuple[int, int, int], ...] = ()
    cross_kv_shapes: tuple[tuple[int, int, int], ...] = ()
    axes: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @property
    def cache(self) -> dict[str, str]:
        """Which outputs of a run are the caches of the next: output -> input."""
        inputs = (wanted.name for wanted in self.inputs if wanted.is_cache)
        carried = {"present" + name.removeprefix("past_key_values"): name for name in inputs}
        return {output: name for output, name in carried.items() if output in self.outputs}

    @property
    def cache_bytes_per_token(self) -> int | None:
        """Bytes that a decoder's cache grows by with each token of a sequence: over all layers, KV heads x (key width
        + value width) x bytes an element. None where there is no such cache, or the file does not give its sizes.
        What is kept of an encoder does not grow.
        """
        own = [wanted for wanted in self.inputs if wanted.is_cache and not wanted.is_cross]
        sizes = [(self.cache_size(wanted), wanted.dtype.itemsize) for wanted in own]
        if not sizes or any(size is None for size, _ in sizes):
            return None
        return sum(size[0] * size[1] * item for size, item in sizes if size)

    def cache_size(self, wanted: Input) -> tuple[int, int] | None:
        """(KV heads, width) of a cache [batch, heads, past, width], where its axes or the metadata give them."""
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
        """The same file as if it had none of these inputs."""
        return replace(self, inputs=tuple(wanted for wanted in self.inputs if wanted.name not in names))

    @property
    def has_length(self) -> bool:
        """Whether any input's size depends on a length; images and spectrograms have one size."""
        return any(self._varies(wanted) for wanted in self.inputs)

    def _varies(self, wanted: Input) -> bool:
        if wanted.name in self.axes:
            return any(more for _, more in self.axes[wanted.name])
        free = [dim for dim in wanted.dims[1:] if isinstance(dim, str)]
        return _FILLERS.get(wanted.name) is not _normal or any(dim.endswith("sequence_length") for dim in free)


def read_interface(source: str | Path | onnxruntime.InferenceSession) -> Interface:
    """Read a file's (or an open session's) inputs; external data is not loaded. A session does not show its vocabulary.

    Raises:
        UsageError: the file is missing or damaged, or its metadata is not what KV_SHAPES_KEY stands for.
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
        raise UsageError("the ONNX file holds no graph", where=str(source), hint="export it again")
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
    except TypeError:  # a type numpy has no name for: refused by name if it has to be filled
        return np.dtype(object)


def _kv_shapes(metadata: dict[str, str], where: str) -> Iterator[tuple[tuple[int, int, int], ...]]:
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
            f"metadata {AXES_KEY} is not a table of [size, more for each length] by input",
            where=where,
            hint="export it again",
        ) from error


# Where an operator that looks rows up takes its indices and its table.
_LOOKUPS = MappingProxyType({"Gather": (1, 0), "GatherBlockQuantized": (1, 0), "EmbedLayerNormalization": (0, 2)})

_SAME_IDS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node in topological order (by the ONNX standard), those of an If's branches and the like before itself."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)
        yield node


def _vocabulary(graph: onnx.GraphProto) -> int | None:
    """Rows of the table that input_ids are looked up in, or None where the graph does not show it."""
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
            while table not in tables and table in origin:  # a quantized or half-precision table is converted first
                table = origin[table].input[0] if origin[table].input else ""
            if table in tables:
                rows.append(tables[table])
    return min(rows, default=None)


@dataclass(frozen=True)
class _Request:
    interface: Interface
    batch: int
    length: int
    past: int
    encoder_length: int
    seed: int

    def rng(self, name: str) -> np.random.Generator:
        """A stream of its own for each name: two files that share an input get the same values in it."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])


def inputs_for(
    source: str | Path | onnxruntime.InferenceSession | Interface,
    batch: int,
    length: int,
    past: int = 0,
    seed: int = 0,
    encoder_length: int | None = None,
) -> dict[str, Array]:
    """Inputs for a transformer ONNX file, unpadded, made from the file's own input metadata.

    Args:
        source: the file, an open session, or what `read_interface` gave for one. From a session, ids stay under 100.
        batch: sequences (or images, or clips).
        length: new tokens a sequence; frames of a waveform where the file says how many samples these take (AXES_KEY),
            otherwise samples.
        past: tokens already in the KV cache; 0 gives caches with a zero-length axis 2.
        seed: the same seed gives the same values, input by input, whatever other inputs a file has.
        encoder_length: positions that a decoder's encoder saw, `length` unless given.

    Returns:
        Arrays by input name: ids [batch, length], attention_mask [batch, past + length], caches
        [batch, heads, past, dim].

    Raises:
        UsageError: the shape is not a shape, the file fixes another one, or an input is not one that can be filled.
    """
    encoder_length = length if encoder_length is None else encoder_length
    if min(batch, length, encoder_length) < 1 or past < 0:
        raise UsageError(
            f"shape (batch {batch}, length {length}, past {past}, encoder {encoder_length}) is not possible",
            hint="batch and lengths start at 1, past at 0",
        )
    interface = source if isinstance(source, Interface) else read_interface(source)
    request = _Request(interface, batch, length, past, encoder_length, seed)
    return {wanted.name: _fill(wanted, request) for wanted in interface.inputs}


def _fill(wanted: Input, request: _Request) -> Array:
    fill = _FILLERS.get(wanted.name.split(".")[0])
    if fill is None or wanted.dtype == object:
        raise _cannot_fill(wanted, request, "it is not an input of a kind that is known here")
    array = fill(wanted, request).astype(wanted.dtype)
    fits = len(array.shape) == len(wanted.dims) and all(
        size == dim or not isinstance(dim, int) for size, dim in zip(array.shape, wanted.dims, strict=True)
    )
    if not fits:
        raise _cannot_fill(wanted, request, f"the file wants {list(wanted.dims)}, not {list(array.shape)}")
    return array


def _cannot_fill(wanted: Input, request: _Request, why: str) -> UsageError:
    return UsageError(
        f"input {wanted.name!r} cannot be filled: {why}",
        where=request.interface.where,
        hint="give a file whose inputs have the names and axes that optimum exports, or another shape",
    )


def _token_ids(wanted: Input, request: _Request) -> Array:
    vocabulary = request.interface.vocabulary or UNKNOWN_VOCABULARY
    return request.rng(wanted.name).integers(0, vocabulary, (request.batch, request.length))


def _ones(wanted: Input, request: _Request) -> Array:
    return np.ones((request.batch, request.past + request.length))


def _encoder_ones(wanted: Input, request: _Request) -> Array:
    return np.ones((request.batch, request.encoder_length))


def _zeros(wanted: Input, request: _Request) -> Array:
    return np.zeros((request.batch, request.length))


def _positions(wanted: Input, request: _Request) -> Array:
    span = np.arange(request.past, request.past + request.length)
    return np.broadcast_to(span, (request.batch, request.length))


def _cache_branch(wanted: Input, request: _Request) -> Array:
    return np.full((1,), request.past > 0)


# What exporters name the free axes of images, spectrograms and waveforms, and the usual size of each.
_FREE_AXES = MappingProxyType(
    {"num_channels": 3, "height": 224, "width": 224, "feature_size": 80, "num_mel_bins": 80, "nb_max_frames": 3000}
)


def _normal(wanted: Input, request: _Request) -> Array:
    sizes = [request.batch]
    stated = request.interface.axes.get(wanted.name, ())
    for axis, dim in enumerate(wanted.dims[1:], start=1):
        if isinstance(dim, int):
            sizes.append(dim)
        elif len(stated) == len(wanted.dims) - 1:
            first, more = stated[axis - 1]
            sizes.append(first + more * (request.length - 1))
        elif dim is not None and dim in _FREE_AXES:
            sizes.append(_FREE_AXES[dim])
        elif dim is not None and dim.endswith("sequence_length"):
            sizes.append(request.encoder_length if dim.startswith("encoder") else request.length)
        else:
            raise _cannot_fill(wanted, request, f"the size of its axis {axis} ({dim}) is not known")
    return request.rng(wanted.name).standard_normal(sizes, dtype=np.float32)


def _cache(wanted: Input, request: _Request) -> Array:
    if len(wanted.dims) != 4:
        raise _cannot_fill(wanted, request, "a cache of [batch, heads, past, dim] is expected")
    if (size := request.interface.cache_size(wanted)) is None:
        key = CROSS_KV_SHAPES_KEY if wanted.is_cross else KV_SHAPES_KEY
        raise _cannot_fill(wanted, request, f"its axes 1 and 3 are free and metadata {key} does not give them")
    heads, width = size
    past = request.encoder_length if wanted.is_cross else request.past
    return request.rng(wanted.name).standard_normal((request.batch, heads, past, width), dtype=np.float32)


_FILLERS: MappingProxyType[str, Callable[[Input, _Request], Array]] = MappingProxyType(
    {
        "input_ids": _token_ids,
        "decoder_input_ids": _token_ids,
        "attention_mask": _ones,
        "decoder_attention_mask": _ones,
        "encoder_attention_mask": _encoder_ones,
        "token_type_ids": _zeros,
        "position_ids": _positions,
        "use_cache_branch": _cache_branch,
        "pixel_values": _normal,
        "input_features": _normal,
        "input_values": _normal,
        "encoder_hidden_states": _normal,
        "past_key_values": _cache,
    }
)

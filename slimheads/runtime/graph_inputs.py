"""Inputs for an ONNX file, made from its own description, so that every stage feeds a graph in the same way."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimheads.errors import UsageError
from slimheads.runtime.onnx_runtime import onnxruntime
from slimheads.runtime.onnx_signature import (
    CROSS_KV_SHAPES_KEY,
    FLOAT_INPUTS,
    KV_SHAPES_KEY,
    Input,
    Interface,
    read_interface,
)

Array = NDArray[Any]
UNKNOWN_VOCABULARY = 100


@dataclass(frozen=True)
class _Request:
    interface: Interface
    batch: int
    length: int
    past: int
    encoder_length: int
    seed: int

    def rng(self, name: str) -> np.random.Generator:
        """One random stream per input name, so that two files get the same values for a shared input."""
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
        source: the file, an open session, or what `read_interface` returned. For a session, ids are below 100.
        batch: sequences (or images, or clips).
        length: new tokens per sequence; for waveforms frames if the file gives their size in samples (AXES_KEY), else
            samples.
        past: tokens already in the KV cache; with 0, axis 2 of the caches has length zero.
        seed: the same seed gives the same values for each input, independent of a file's other inputs.
        encoder_length: encoder positions behind a decoder, `length` by default.

    Returns:
        Arrays by input name: ids [batch, length], attention_mask [batch, past + length], caches
        [batch, heads, past, dim].

    Raises:
        UsageError: the shape is not possible, the file has another fixed shape, or an input is of an unknown kind.
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
        raise _cannot_fill(wanted, request, "its kind is not known")
    array = fill(wanted, request).astype(wanted.dtype)
    fits = len(array.shape) == len(wanted.dims) and all(
        size == dim or not isinstance(dim, int) for size, dim in zip(array.shape, wanted.dims, strict=True)
    )
    if not fits:
        raise _cannot_fill(wanted, request, f"the file needs {list(wanted.dims)}, not {list(array.shape)}")
    return array


def _cannot_fill(wanted: Input, request: _Request, why: str) -> UsageError:
    return UsageError(
        f"input {wanted.name!r} cannot be filled: {why}",
        where=request.interface.where,
        hint="use a file whose inputs have the names and axes of an optimum export, or another shape",
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


# Names that exporters give to free axes of images and spectrograms, and their usual sizes.
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
        raise _cannot_fill(wanted, request, "a cache should be [batch, heads, past, dim]")
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
        "past_key_values": _cache,
        **dict.fromkeys(FLOAT_INPUTS, _normal),
    }
)

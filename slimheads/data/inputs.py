"""Inputs for a torch model: texts, images or sound, by the kind in its family file, as arrays by input name.

Texts and waveforms have a length (tokens, or frames after the convolutions). Images and spectrograms have the size that
the configuration fixes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from slimheads.errors import UsageError, one_line
from slimheads.families.config_facts import inputs_kind, takes_text, text_config

Arrays = dict[str, NDArray[Any]]


class Axis(NamedTuple):
    """Size of an input's axis: `first` at length 1, plus `more` per further token or frame."""

    first: int
    more: int


def float_axes(config: PretrainedConfig) -> dict[str, tuple[Axis, ...]]:
    """The axes after the batch of each floating-point input of a model, by input name."""
    kind = inputs_kind(config)
    if "image" in kind:
        vision = getattr(config, "vision_config", config)
        side = vision.image_size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return {"pixel_values": (Axis(vision.num_channels, 0), Axis(height, 0), Axis(width, 0))}
    if kind == "waveform":
        # Backwards through the convolutions: the samples that one frame covers, and the step to the next frame.
        seen = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            seen = (seen - 1) * stride + kernel
        return {"input_values": (Axis(seen, math.prod(config.conv_stride)),)}
    if kind == "spectrogram" and config.is_encoder_decoder:
        # The convolutions halve the frames.
        return {"input_features": (Axis(config.num_mel_bins, 0), Axis(2 * config.max_source_positions, 0))}
    if kind == "spectrogram":
        return {"input_values": (Axis(config.max_length, 0), Axis(config.num_mel_bins, 0))}
    return {}


def make_inputs(config: PretrainedConfig, batch: int, length: int, rng: np.random.Generator) -> Arrays:
    """Random inputs without padding: int64 ids [batch, length] with their mask, standard normal images and sound.

    Args:
        length: tokens, or frames of a waveform; ignored if inputs have no length. The decoder of an encoder-decoder
            gets as many tokens.
    """
    made: Arrays = {}
    if takes_text(config):
        words, pad = text_config(config).vocab_size, getattr(text_config(config), "pad_token_id", None)
        ids = rng.integers(0, words, (batch, length)).astype(np.int64)
        if pad is not None:
            ids[ids == pad] = (pad + 1) % words  # RoBERTa derives positions from the padding ids
        made = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for name, axes in float_axes(config).items():
        sizes = [batch, *(axis.first + axis.more * (length - 1) for axis in axes)]
        made[name] = rng.standard_normal(sizes, dtype=np.float32)
    if config.is_encoder_decoder:
        made["decoder_input_ids"] = rng.integers(0, config.vocab_size, (batch, length)).astype(np.int64)
    return made


def to_torch(arrays: Mapping[str, NDArray[Any]], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The inputs as tensors, floating-point ones in the model's own dtype."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def read_inputs(path: Path, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The user's inputs from a safetensors file, n of each: for example `pixel_values` [n, 3, 224, 224].

    Raises:
        UsageError: the file is missing or damaged, or its tensors do not fit the model.
    """

    def refuse(what: str) -> UsageError:
        wanted = " and ".join(make_inputs(config, 1, 1, np.random.default_rng(0)))
        hint = f"use a safetensors file with {wanted}, equally many of each"
        return UsageError(f"{path}: {what}", keys=("verify.inputs",), hint=hint)

    try:
        arrays = safetensors.numpy.load_file(path)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy lacks
        raise refuse(f"the inputs cannot be read ({one_line(error)})") from error
    expected = make_inputs(config, 1, 1, np.random.default_rng(0))
    if arrays.keys() != expected.keys():
        raise refuse(
            f"the file has {', '.join(sorted(arrays)) or 'nothing'}, but the model takes {', '.join(expected)}"
        )
    for name, array in arrays.items():
        like, axes = expected[name], _accepted_axes(float_axes(config).get(name, (Axis(1, 1),)))
        if array.ndim != like.ndim or not array.size or not all(map(_fits, array.shape[1:], axes)):
            raise refuse(f"{name} is {list(array.shape)}, but the model takes {['n', *like.shape[1:]]}")
        if array.dtype.kind != like.dtype.kind:
            raise refuse(f"{name} is {array.dtype}, but the model takes {like.dtype}")
        if not np.isfinite(array).all():
            raise refuse(f"{name} has a value that is NaN or infinite")
    if len({len(array) for array in arrays.values()}) > 1:
        raise refuse(f"{' and '.join(arrays)} have different numbers of inputs")
    return {name: torch.from_numpy(array.astype(expected[name].dtype)) for name, array in arrays.items()}


def _accepted_axes(axes: Sequence[Axis]) -> list[Axis]:
    """Any height and width, because some models take other sizes than the configured one."""
    return [axes[0], Axis(1, 1), Axis(1, 1)] if len(axes) == 3 else list(axes)


def _fits(size: int, axis: Axis) -> bool:
    return size >= axis.first if axis.more else size == axis.first

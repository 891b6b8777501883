"""Facts of a configuration: what its model is fed, and which shapes differ for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from transformers import PretrainedConfig

from slimheads.families.family import Inputs, family_of

# The noun for one input, in messages and reports.
NOUNS: Mapping[Inputs, str] = MappingProxyType(
    {
        "text": "text",
        "image": "image",
        "text and image": "text-image pair",
        "unpadded text and image": "text-image pair",
        "waveform": "recording",
        "spectrogram": "recording",
    }
)


def inputs_kind(config: PretrainedConfig) -> Inputs:
    """What the family file says a model is fed."""
    return family_of(config)[1].inputs


def takes_text(config: PretrainedConfig) -> bool:
    """Whether token ids are among a model's inputs."""
    return "text" in inputs_kind(config)


def takes_padding(config: PretrainedConfig) -> bool:
    """Whether a mask says which tokens are padding. SigLIP was trained without one, and its graph takes none."""
    return inputs_kind(config) in ("text", "text and image")


def has_length(config: PretrainedConfig) -> bool:
    """Whether a model's inputs may be of any length."""
    return inputs_kind(config) not in ("image", "spectrogram")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that its text side is built from: the whole, unless there are several sides."""
    part: PretrainedConfig = getattr(config, "text_config", config)
    return part


def measured_shapes(config: PretrainedConfig, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The shapes that differ for this model: those of inputs without a length are [batch] alone, each once."""
    return tuple(shapes) if has_length(config) else without_length(shapes)


def without_length(shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Each batch size of the shapes once, as [batch]."""
    return tuple(dict.fromkeys(shape[:1] for shape in shapes))

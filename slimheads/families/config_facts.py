"""Facts of a configuration: the kind of its inputs, and which shapes are different for it."""

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
    """The kind of a model's inputs, from its family file."""
    return family_of(config)[1].inputs


def takes_text(config: PretrainedConfig) -> bool:
    """Whether token ids are among a model's inputs."""
    return "text" in inputs_kind(config)


def takes_padding(config: PretrainedConfig) -> bool:
    """Whether a mask marks padding tokens. SigLIP was trained without one, and its graph takes none."""
    return inputs_kind(config) in ("text", "text and image")


def has_length(config: PretrainedConfig) -> bool:
    """Whether a model's inputs can have any length."""
    return inputs_kind(config) not in ("image", "spectrogram")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a model's text part, which is the whole configuration if there is only one part."""
    part: PretrainedConfig = getattr(config, "text_config", config)
    return part


def measured_shapes(config: PretrainedConfig, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The shapes that are different for this model: [batch], each once, if its inputs have no length."""
    return tuple(shapes) if has_length(config) else without_length(shapes)


def without_length(shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Each batch size of the shapes once, as [batch]."""
    return tuple(dict.fromkeys(shape[:1] for shape in shapes))

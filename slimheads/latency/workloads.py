"""What is timed: a model's one graph, or an encoder-decoder's encoder and one step of its decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from slimheads.exporting.artifacts import ENCODER, MERGED_DECODER
from slimheads.families.config_facts import measured_shapes, takes_text
from slimheads.families.limits import position_limit
from slimheads.models import flops
from slimheads.names import Shape


@dataclass(frozen=True)
class Workload:
    """A graph by the first part of its file's name, its shapes, and a torch model's operations at such a shape."""

    graph: str
    shapes: tuple[Shape, ...]
    flops: Callable[..., int]  # (model, *shape) -> floating-point operations


def workloads(config: PretrainedConfig, shapes: Sequence[Shape]) -> tuple[Workload, ...]:
    """What is timed at the recipe's shapes, each [batch, length] or, for a decoder, [batch, length, past].

    For an encoder-decoder: its encoder at that length, and one new token of its decoder after as many tokens, in the
    merged graph, which clients load.
    """
    measured = measured_shapes(config, shapes)
    if not config.is_encoder_decoder:
        return (Workload("model", measured, flops.flops),)
    steps = tuple(dict.fromkeys(_step(config, batch, length) for batch, length in shapes))
    return Workload(ENCODER, measured, flops.encoder_flops), Workload(MERGED_DECODER, steps, flops.step_flops)


def loaded_graphs(config: PretrainedConfig) -> tuple[str, ...]:
    """The graphs that a client loads: of an encoder-decoder, the encoder and the merged decoder."""
    return (ENCODER, MERGED_DECODER) if config.is_encoder_decoder else ("model",)


def _step(config: PretrainedConfig, batch: int, length: int) -> Shape:
    """[batch, new tokens, tokens in the cache, encoder's positions]."""
    positions = length if takes_text(config) else config.max_source_positions
    return batch, 1, min(length, position_limit(config) - 1), positions

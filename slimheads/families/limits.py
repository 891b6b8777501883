"""How long a model's inputs can be, from its family file, and the token that its decoder starts with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from slimheads.errors import UsageError
from slimheads.families.config_facts import has_length
from slimheads.families.family import family_of

UNLIMITED = 2**31 - 1


def position_limit(config: PretrainedConfig) -> int:
    """The most tokens that a model takes, including the cache; for an encoder-decoder, in each half.

    This is the size of the position table, if there is one. For rotary and relative positions it is the longest input
    that the configuration states, or UNLIMITED if it states none.
    """
    _, family = family_of(config)
    found: Any = config if family.positions.key else None
    for part in (family.positions.key or "").split("."):
        found = getattr(found, part, None)
    if not isinstance(found, int):
        return UNLIMITED
    absolute = getattr(config, "position_embedding_type", "absolute") == "absolute"
    padding = getattr(config, "pad_token_id", None)
    if config.model_type in family.positions.after_padding and absolute and padding is not None:
        return found - int(padding) - 1
    return found


def require_fit(config: PretrainedConfig, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuses shapes, [batch, length] or [batch, length, past], that are longer than the position limit.

    Raises:
        UsageError: naming shapes that fit.
    """
    limit = position_limit(config)
    long = next((shape for shape in shapes if has_length(config) and sum(shape[1:]) > limit), None)
    if long is not None:
        fit = [list(shape) for shape in fitting(config, shapes)]
        raise UsageError(
            f"the shape {list(long)} is longer than the {limit} positions of the model",
            keys=("bench.shapes",),
            hint=f"these would fit: {fit}",
        )


def fitting(config: PretrainedConfig, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The shapes, each once, cut to the position limit; the past is cut before the new tokens."""
    limit = position_limit(config) if has_length(config) else UNLIMITED
    made = []
    for batch, length, *past in shapes:
        new = min(length, limit)
        room = [min(tokens, limit - new) for tokens in past]
        made.append((batch, new, *(room if any(room) or sum((length, *past)) <= limit else [])))
    return tuple(dict.fromkeys(made))


def decoder_start(model: PreTrainedModel) -> int:
    """The token that generation starts with; 0 if the model names none, since any token will do for a comparison."""
    named = (
        getattr(source, key, None)
        for key in ("decoder_start_token_id", "bos_token_id")
        for source in (model.generation_config, model.config)
    )
    return next((token for token in named if isinstance(token, int)), 0)

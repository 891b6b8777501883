"""Lengths at which a model changes its computation: which of them the certificate tries, and which it only states.

An attention window, clipped distances and the end of a position table only matter in inputs that are longer, so the
certificate tries such inputs too. Two kinds of rotary embedding choose their frequencies by the length of the input,
which an export cannot record: their graphs are right for short inputs only. Such a limit, and every change that is too
costly to try, is stated in the report and on the model card.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict
from transformers import PretrainedConfig

from slimheads.families.config_facts import has_length, takes_text, text_config
from slimheads.families.family import family_of
from slimheads.families.limits import UNLIMITED, position_limit
from slimheads.formatting import listing, whole

USUAL = 128  # the longest input that is tried with every model
PAST_IT = 3  # tokens by which an input reaches past a change
# Limits of one more input in a batch of one: as many tokens as the usual batch of four by 128, or so few tokens and
# operations that it takes seconds.
_FREE_TOKENS, _MOST_TOKENS, _MOST_FLOPS = 4 * USUAL + PAST_IT, 4096 + PAST_IT, 1e12

WrongPast = Literal["model", "graph"]


class Change(BaseModel):
    """A length: inputs of more tokens are computed in another way than shorter ones.

    `wrong_past`: the model itself takes no longer input, or it does but its exported graph is not right there.
    `tried`: the longest input tried because of it: past it, or up to it where nothing is right past it; null where that
    was too costly.
    """

    model_config = ConfigDict(frozen=True)
    length: int
    key: str  # of config.json
    what: str  # the computation past it
    wrong_past: WrongPast | None = None
    tried: int | None


class Lengths(BaseModel):
    """The longest input that the certificate tried, and the lengths at which the computation changes."""

    model_config = ConfigDict(frozen=True)
    tried: int  # tokens, or frames of a waveform
    changes: tuple[Change, ...]

    def limits(self) -> list[str]:
        """Warnings: lengths past which the graph is wrong, or past which nothing was tried."""
        said = []
        for change in self.changes:
            place = f"{whole(change.length)} tokens ({change.key})"
            if change.wrong_past == "graph":
                tried = "" if change.tried else f"; it is proven up to {whole(self.tried)} tokens"
                said.append(
                    f"The ONNX graphs are right up to {place} and wrong past them: {change.what} there, which an "
                    f"exported graph cannot do{tried}."
                )
            elif change.wrong_past is None and change.tried is None:
                said.append(
                    f"Proven up to {whole(self.tried)} tokens only: past {place}, {change.what}, and inputs of that "
                    "length were too costly to try."
                )
        return said

    def __str__(self) -> str:
        passed = [f"{whole(one.length)} ({one.key})" for one in self.changes if (one.tried or 0) > one.length]
        text = f"proven up to {whole(self.tried)} tokens" + (f", on both sides of {listing(passed)}" if passed else "")
        ends = [one for one in self.changes if one.wrong_past == "model" and one.length > self.tried]
        return text + "".join(f"; the model takes up to {whole(one.length)} ({one.key})" for one in ends)


def lengths(config: PretrainedConfig) -> Lengths | None:
    """The lengths of a model that are tried, and those that are not; None where inputs have no length."""
    if not (has_length(config) or _has_tokens(config)):
        return None
    changes = tuple(_changes(config))
    return Lengths(
        tried=max([min(USUAL, right_up_to(config)), *(change.tried or 0 for change in changes)]), changes=changes
    )


def right_up_to(config: PretrainedConfig) -> int:
    """The longest input that the model accepts and for which its exported graph is right."""
    return min([position_limit(config), *(length for length, _, _ in _frozen(text_config(config)))])


def _changes(config: PretrainedConfig) -> Iterator[Change]:
    """In order of length."""
    found: list[tuple[int, str, str, WrongPast | None]] = [(*one, None) for one in _windows(config)]
    found += [(*one, "graph") for one in _frozen(text_config(config))]
    end = right_up_to(config)
    if table := _table(config):
        found.append((position_limit(config), table, "there are no positions", "model"))
    for length, key, what, wrong in sorted(found, key=lambda one: one[0]):
        if wrong is None and length >= end:
            continue  # never reached
        longest = length if wrong else min(length + PAST_IT, end)
        tried = longest if affordable(config, longest) else None
        yield Change(length=length, key=key, what=what, wrong_past=wrong, tried=tried)


def affordable(config: PretrainedConfig, length: int) -> bool:
    """Whether one input of this length runs within seconds."""
    text = text_config(config)
    layers = getattr(text, "num_hidden_layers", None) or 1
    weights = 12 * layers * (getattr(text, "hidden_size", None) or 1) ** 2
    return length <= _FREE_TOKENS or (length <= _MOST_TOKENS and 2 * weights * length <= _MOST_FLOPS)


def _has_tokens(config: PretrainedConfig) -> bool:
    """Whether a model reads or writes text."""
    return takes_text(config) or bool(config.is_encoder_decoder)


def _table(config: PretrainedConfig) -> str:
    """The key that sizes the position table, where there is one."""
    text = text_config(config)
    if hasattr(text, "rope_theta") or position_limit(config) == UNLIMITED or not _has_tokens(config):
        return ""
    return str(family_of(config)[1].positions.key)


def _windows(config: PretrainedConfig) -> Iterator[tuple[int, str, str]]:
    text = text_config(config)

    def named(key: str) -> int:
        value = getattr(text, key, None)
        return value if isinstance(value, int) and value > 0 else 0

    window, far = "attention sees only a window of tokens", "greater distances count as the greatest"
    slides = "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    if named("sliding_window") and slides and getattr(text, "use_sliding_window", True):
        yield named("sliding_window"), "sliding_window", window
    if named("local_attention"):  # ModernBERT's, half of it on either side
        yield named("local_attention") // 2 + 1, "local_attention", window
    if "local" in getattr(text, "attention_layers", ()):
        yield named("window_size"), "window_size", window
    for key in ("relative_attention_max_distance", "max_bucket_distance"):  # T5's, WavLM's
        if named(key):
            yield named(key), key, far
    if config.model_type == "mpnet":
        yield 128, "relative_attention_num_buckets", far
    if getattr(text, "relative_attention", False):  # DeBERTa's
        if named("position_buckets"):
            yield named("position_buckets") // 2, "position_buckets", "distances are counted in ever wider steps"
        if named("max_relative_positions"):
            yield named("max_relative_positions"), "max_relative_positions", far


def _frozen(text: PretrainedConfig) -> Iterator[tuple[int, str, str]]:
    """Rotary frequencies that transformers chooses by the longest position (modeling_rope_utils.py)."""
    scaling = getattr(text, "rope_scaling", None) or {}
    kind = str(scaling.get("rope_type") or scaling.get("type"))
    if "dynamic" in kind:
        yield text.max_position_embeddings, "max_position_embeddings", f"{kind} rope_scaling takes other frequencies"
    if kind == "longrope":
        key = "original_max_position_embeddings"
        key = key if hasattr(text, key) else "max_position_embeddings"
        yield getattr(text, key), key, "longrope takes other frequencies"

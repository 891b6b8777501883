"""Drift: how far the slim model's outputs are from the untouched model's, beside a random control of the same size."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Figures(BaseModel):
    """Quality figures of one pruned model against the dense one; null where the task has no such figure."""

    model_config = ConfigDict(frozen=True)
    cosine: float | None = None  # mean cosine of the text embeddings (encoders)
    cosine_min: float | None = None  # the worst text
    perplexity: float | None = None  # decoders, over all scored tokens
    perplexity_ratio: float | None = None  # slim / dense
    kl_divergence: float | None = None  # mean over tokens of KL(dense || slim), in nats
    top1_agreement: float | None = None  # share of tokens whose most likely next token is the same


class RandomControl(BaseModel):
    """The same number of heads removed at random under the same rules, once a seed."""

    model_config = ConfigDict(frozen=True)
    seeds: tuple[int, ...]
    figures: tuple[Figures, ...]  # one a seed
    mean: Figures


class Drift(BaseModel):
    """Drift on one sample of text."""

    model_config = ConfigDict(frozen=True)
    sample: str  # "built-in" or the file's name
    texts: int
    tokens: int
    slim: Figures | None
    perplexity_dense: float | None = None
    headline: str | None  # the Figures field the verdict rests on: "cosine" or "perplexity_ratio"
    random_control: RandomControl | None
    beats_random: bool | None  # on the headline figure, against the control's mean; null where nothing was removed
    reason: str | None = None  # why there are no figures

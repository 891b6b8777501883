"""Metrics of two models' outputs on the same inputs. Numbers from outputs, with no model and no session."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from slimheads.data.texts import TextBatch


class Figures(BaseModel):
    """Quality figures of one pruned model against the dense one; null where the task has no such figure."""

    model_config = ConfigDict(frozen=True)
    cosine: float | None = None  # mean cosine of the embeddings (all but decoders)
    cosine_min: float | None = None  # the worst text, image or recording
    perplexity: float | None = None  # decoders, over all scored tokens
    perplexity_ratio: float | None = None  # slim / dense
    kl_divergence: float | None = None  # mean over tokens of KL(dense || slim), in nats
    top1_agreement: float | None = None  # share of tokens whose most likely next token is the same


class Metric(Protocol):
    """Figures of one pruned model against the dense one, gathered batch after batch."""

    headline: ClassVar[str]  # the Figures field that the verdict rests on

    def add(self, dense: torch.Tensor, pruned: torch.Tensor, batch: TextBatch) -> None:
        """Adds both models' outputs on a batch."""
        ...

    def figures(self) -> Figures:
        """The figures over all batches; what is not finite is not hidden."""
        ...

    def dense_perplexity(self) -> float | None:
        """The dense model's own perplexity, where the metric has one."""
        ...


@dataclass
class CosineMetric:
    """Cosine of embeddings."""

    headline: ClassVar[str] = "cosine"
    cosines: list[float] = field(default_factory=list)

    def add(self, dense: torch.Tensor, pruned: torch.Tensor, batch: TextBatch) -> None:
        """From unit embeddings [texts, width]."""
        self.cosines += (dense.double() * pruned.double()).sum(-1).tolist()

    def figures(self) -> Figures:
        # A NaN anywhere must show in both figures: min() alone would keep or lose it by its position.
        mean = sum(self.cosines) / len(self.cosines)
        return Figures(cosine=mean, cosine_min=min(self.cosines) if math.isfinite(mean) else mean)

    def dense_perplexity(self) -> None:
        return None


@dataclass
class TokenMetric:
    """KL divergence and top-1 agreement at every token of an answer."""

    headline: ClassVar[str] = "kl_divergence"
    tokens: int = 0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, dense: torch.Tensor, pruned: torch.Tensor, batch: TextBatch) -> None:
        """From logits [texts, longest, vocabulary]; one text at a time, so that the log-softmaxes stay small."""
        for row, length in enumerate(batch.lengths):
            self._compare(*(logits[row, :length].float().log_softmax(-1) for logits in (dense, pruned)))

    def _compare(self, reference: torch.Tensor, found: torch.Tensor) -> None:
        """From log-probabilities [tokens, vocabulary]."""
        self.tokens += len(reference)
        # A token the dense model rules out (-inf) adds nothing, whatever the pruned model says.
        terms = torch.where(reference.isneginf(), 0.0, reference.exp() * (reference - found))
        self.divergence += terms.sum(-1).double().sum().item()
        self.agreed += int((reference.argmax(-1) == found.argmax(-1)).sum())

    def figures(self) -> Figures:
        divergence = self.divergence / self.tokens
        return Figures(
            kl_divergence=max(0.0, divergence) if math.isfinite(divergence) else divergence,  # rounding dips below 0
            # The argmax of NaN is no token.
            top1_agreement=math.nan if math.isnan(divergence) else self.agreed / self.tokens,
        )

    def dense_perplexity(self) -> float | None:
        return None


@dataclass
class PerplexityMetric(TokenMetric):
    """The same at every token of a text but its first, and perplexity: exp of the mean negative log-likelihood."""

    headline: ClassVar[str] = "perplexity_ratio"
    dense_nats: float = 0.0
    pruned_nats: float = 0.0

    def add(self, dense: torch.Tensor, pruned: torch.Tensor, batch: TextBatch) -> None:
        """From logits [texts, longest, vocabulary]."""
        for row, length in enumerate(batch.lengths):
            targets = batch.input_ids[row, 1:length, None]
            reference = dense[row, : length - 1].float().log_softmax(-1)
            found = pruned[row, : length - 1].float().log_softmax(-1)
            self._compare(reference, found)
            self.dense_nats -= reference.gather(-1, targets).double().sum().item()
            self.pruned_nats -= found.gather(-1, targets).double().sum().item()

    def figures(self) -> Figures:
        perplexity = _exp(self.pruned_nats / self.tokens)
        ratio = _exp((self.pruned_nats - self.dense_nats) / self.tokens)
        return super().figures().model_copy(update={"perplexity": perplexity, "perplexity_ratio": ratio})

    def dense_perplexity(self) -> float:
        return _exp(self.dense_nats / self.tokens)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


class Agreement:
    """Cosine and top-1 agreement of two models' output vectors, over many inputs."""

    def __init__(self) -> None:
        self._cosines: list[np.ndarray] = []
        self._same_tokens: list[np.ndarray] = []

    def add(self, reference: np.ndarray, other: np.ndarray, *, logits: bool) -> None:
        """Takes two outputs [..., width] at the same positions.

        Args:
            logits: whether the vectors are scores of tokens.
        """
        a, b = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (reference, other))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        self._cosines.append((a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny))
        if logits:
            self._same_tokens.append(a.argmax(axis=1) == b.argmax(axis=1))

    @property
    def cosine(self) -> float | None:
        """Mean cosine of the two vectors of a position."""
        return float(np.concatenate(self._cosines).mean()) if self._cosines else None

    @property
    def top1(self) -> float | None:
        """Share of positions at which both have the same largest logit."""
        return float(np.concatenate(self._same_tokens).mean()) if self._same_tokens else None

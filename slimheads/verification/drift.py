"""Drift: how far the slim model's outputs are from the untouched model's, beside a random control of the same size.

- Encoders: the cosine of L2-normalised text embeddings, pooled from the base model's last hidden state.
- Decoders: perplexity, KL divergence and top-1 agreement over every token of a text but its first.
- Encoder-decoders: KL divergence and top-1 agreement over every token of the dense model's answers to the texts
  (greedy, at most 32 tokens); all models read the same answers.
- Models that take images or sound: the cosine of embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimheads.data.metrics import CosineMetric, Figures, Metric, PerplexityMetric, TokenMetric
from slimheads.data.texts import TextBatch, text_batches
from slimheads.errors import UsageError, one_line
from slimheads.families.limits import decoder_start, position_limit
from slimheads.models.generation import seq2seq_generate
from slimheads.side_files.embedding import MEAN, Embedding

# Makes a fresh context manager, within which the dense model is a pruned one.
Pruned = Callable[[], AbstractContextManager[object]]

LOGITS_BUDGET = 256 * 2**20  # bytes of one model's float32 logits for one batch; large vocabularies get smaller batches


class RandomControl(BaseModel):
    """As many units of each kind removed at random under the same rules, once per seed."""

    model_config = ConfigDict(frozen=True)
    seeds: tuple[int, ...]
    figures: tuple[Figures, ...]  # one per seed
    mean: Figures


class Drift(BaseModel):
    """Drift on one sample of texts, images or sound."""

    model_config = ConfigDict(frozen=True)
    sample: str  # "built-in" or the file's name
    noun: str = "text"  # what the sample consists of
    texts: int  # how many of them
    tokens: int | None  # null where there are none
    embedding: str | None = None  # how token states were pooled: "mean", or "lasttoken, then 2_Dense"
    slim: Figures | None
    perplexity_dense: float | None = None
    headline: str | None  # the Figures field the verdict rests on: "cosine", "perplexity_ratio" or "kl_divergence"
    random_control: RandomControl | None
    beats_random: bool | None  # on the headline figure, against every seed; null where nothing was removed
    reason: str | None = None  # why there are no figures


def measure_drift(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    controls: Sequence[tuple[int, Pruned]],
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str],
    *,
    task: str,
    sample_name: str,
    embedding: Embedding = MEAN,
    max_length: int = 128,
    batch_size: int = 16,
) -> Drift:
    """Compares `slim`, and the dense model under each random control, with `dense` on the same texts.

    Args:
        dense, slim: models in eval mode on one device.
        controls: pairs of a seed and a context manager within which `dense` is a randomly pruned model. It is entered
            once per batch, so that no further copy of the weights is needed.
        tokenizer: None where the source folder has none: then there are no figures, only the reason.
        texts: at least one.
        task: as `slimheads.models.checkpoint` names tasks.
        sample_name: what the report calls the texts.
        embedding: how an encoder's token states become one vector per text.
        max_length: tokens per text, at most; fewer where the model has fewer positions.
        batch_size: most texts per batch.

    Returns:
        The figures; one that is not finite is null, and `reason` names it.
    """
    if tokenizer is None:
        return _no_figures(sample_name, "the model folder has no tokenizer, so no text could be put through it")
    metric: type[CosineMetric | TokenMetric]
    if task in _ON_LOGITS:
        metric, outputs = _ON_LOGITS[task]
        vocabulary = dense.get_output_embeddings().weight.shape[0]
        batch_size = max(1, min(batch_size, LOGITS_BUDGET // (4 * vocabulary * max_length)))
    else:
        metric, outputs = CosineMetric, _embedder(embedding, _prompt_tokens(embedding, tokenizer))
        texts, max_length = embedding.texts(texts), min(max_length, embedding.max_tokens or max_length)
    run = _DriftRun(dense, slim, controls, outputs, metric(), [metric() for _ in controls])
    tokens = 0
    for batch in text_batches(dense, tokenizer, texts, max_length, batch_size):
        fed = answered(dense, batch) if task == "text2text-generation" else batch
        tokens += sum(fed.lengths) - (len(fed.lengths) if task == "text-generation" else 0)
        run.add(fed)
    if not tokens:
        return _no_figures(sample_name, "no text has a token to score")
    by = None if task in _ON_LOGITS else str(embedding)
    return run.summary(sample_name, len(texts)).model_copy(update={"tokens": tokens, "embedding": by})


def drift_on_inputs(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    controls: Sequence[tuple[int, Pruned]],
    inputs: Mapping[str, torch.Tensor],
    *,
    sample_name: str,
    noun: str,
    batch_size: int = 16,
) -> Drift:
    """`measure_drift` for models that take images or sound, from `inputs` by name.

    An embedding is the mean of the base model's last hidden state over its positions; of a model with two towers, both
    towers' embeddings one after the other; of one with neither, its logits. Each is L2-normalised.

    Raises:
        UsageError: the model does not run on these inputs.
    """
    count = len(next(iter(inputs.values())))
    run = _DriftRun(dense, slim, controls, _embed_inputs, CosineMetric(), [CosineMetric() for _ in controls])
    for start in range(0, count, batch_size):
        try:
            run.add({name: tensor[start : start + batch_size] for name, tensor in inputs.items()})
        except (ValueError, RuntimeError, IndexError) as error:
            hint = "give inputs of the size that the model takes"
            raise UsageError(
                f"the model does not run on the inputs of {sample_name} ({one_line(error)})",
                keys=("verify.inputs",),
                hint=hint,
            ) from error
    return run.summary(sample_name, count).model_copy(update={"noun": noun})


def _logits(model: PreTrainedModel, batch: TextBatch) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits


def _answer_logits(model: PreTrainedModel, batch: TextBatch) -> torch.Tensor:
    assert batch.answer is not None
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        decoder_input_ids=batch.answer[:, :-1],
        use_cache=False,
    ).logits
    return logits


# Tasks whose figures come from logits: their metric, and what gives the logits.
_ON_LOGITS: Mapping[str, tuple[type[TokenMetric], Callable[[PreTrainedModel, TextBatch], torch.Tensor]]] = (
    MappingProxyType(
        {"text-generation": (PerplexityMetric, _logits), "text2text-generation": (TokenMetric, _answer_logits)}
    )
)


def _embedder(embedding: Embedding, prompt: int) -> Callable[[PreTrainedModel, TextBatch], torch.Tensor]:
    def embed(model: PreTrainedModel, batch: TextBatch) -> torch.Tensor:
        states = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask.clone()
        mask[:, :prompt] = 0
        return F.normalize(embedding.pool(states.float(), mask), dim=-1)

    return embed


def _prompt_tokens(embedding: Embedding, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of a text's first tokens the pooling leaves out: the prompt's, without the token that ends a text."""
    if embedding.prompt_pooled or not embedding.prompt:
        return 0
    ids: list[int] = tokenizer(embedding.prompt)["input_ids"]
    return len(ids) - int(bool(ids) and ids[-1] in tokenizer.all_special_ids)


def _embed_inputs(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    made = model.base_model(**batch)
    if "last_hidden_state" in made:
        return F.normalize(made.last_hidden_state.float().mean(1), dim=-1)
    towers = [made[name] for name in ("text_embeds", "image_embeds") if name in made]
    return F.normalize(torch.cat(towers or [made.logits], dim=-1).float(), dim=-1)


@dataclass
class _DriftRun:
    """The slim model and every random control, each compared with the dense model's outputs."""

    dense: PreTrainedModel
    slim: PreTrainedModel
    controls: Sequence[tuple[int, Pruned]]
    outputs: Callable[[PreTrainedModel, Any], torch.Tensor]
    of_slim: Metric
    of_controls: Sequence[Metric]

    @torch.no_grad()
    def add(self, batch: Any) -> None:
        reference = self.outputs(self.dense, batch)
        self.of_slim.add(reference, self.outputs(self.slim, batch), batch)
        for metric, (_, pruned) in zip(self.of_controls, self.controls, strict=True):
            with pruned():
                metric.add(reference, self.outputs(self.dense, batch), batch)

    def summary(self, sample_name: str, count: int) -> Drift:
        return _summary(self.of_slim, [seed for seed, _ in self.controls], self.of_controls, sample_name, count)


def _summary(slim: Metric, seeds: Sequence[int], controls: Sequence[Metric], sample_name: str, texts: int) -> Drift:
    problems: list[str] = []
    figures = _finite(slim.figures(), "slim", problems)
    control = _control(seeds, [metric.figures() for metric in controls], problems)
    dense_perplexity = slim.dense_perplexity()
    if dense_perplexity is not None and not math.isfinite(dense_perplexity):
        dense_perplexity = None
        problems.append("dense perplexity")
    return Drift(
        sample=sample_name,
        texts=texts,
        tokens=None,
        slim=figures,
        perplexity_dense=dense_perplexity,
        headline=slim.headline,
        random_control=control,
        beats_random=_beats(figures, control, slim.headline),
        reason=f"not finite: {', '.join(problems)}" if problems else None,
    )


def _finite(figures: Figures, whose: str, problems: list[str]) -> Figures:
    """The figures with null for those that are not finite, which are added to `problems`."""
    bad = [name for name, value in figures if value is not None and not math.isfinite(value)]
    problems += [f"{whose} {name}" for name in bad]
    return figures.model_copy(update=dict.fromkeys(bad))


def _control(seeds: Sequence[int], found: Sequence[Figures], problems: list[str]) -> RandomControl | None:
    if not seeds:
        return None
    figures = tuple(_finite(each, f"random seed {seed}", problems) for seed, each in zip(seeds, found, strict=True))
    means: dict[str, float | None] = {}
    for name in Figures.model_fields:
        values = [getattr(each, name) for each in figures]
        means[name] = None if None in values else sum(values) / len(values)
    return RandomControl(seeds=tuple(seeds), figures=figures, mean=Figures(**means))


def _beats(slim: Figures, control: RandomControl | None, headline: str) -> bool | None:
    """Whether the headline figure (a higher cosine, a lower perplexity ratio) is better than with every random seed.

    Against the mean of three seeds, half of all scores no better than chance would be called a success.
    """
    ours = getattr(slim, headline)
    random = [getattr(figures, headline) for figures in control.figures] if control else []
    if ours is None or not random or None in random:
        return None
    return bool(ours > max(random) if headline == "cosine" else ours < min(random))


def _no_figures(sample_name: str, reason: str) -> Drift:
    return Drift(
        sample=sample_name,
        texts=0,
        tokens=0,
        slim=None,
        headline=None,
        random_control=None,
        beats_random=None,
        reason=reason,
    )


def answered(model: PreTrainedModel, batch: TextBatch, new_tokens: int = 32) -> TextBatch:
    """The texts with an encoder-decoder's own greedy answer to each, up to its end or to `new_tokens`."""
    start, room = decoder_start(model), min(new_tokens, position_limit(model.config) - 1)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    answer = seq2seq_generate(model, inputs, start, room)
    named = getattr(model.generation_config or model.config, "eos_token_id", None)
    ends = [] if named is None else [named] if isinstance(named, int) else list(named)
    ended = torch.isin(answer[:, 1:], torch.tensor(ends, dtype=answer.dtype))
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, room)
    return replace(batch, answer=answer, lengths=lengths.tolist())

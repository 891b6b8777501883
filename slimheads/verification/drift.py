"""Drift: how far the slim model's outputs are from the untouched model's, beside a random control of the same size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimheads.data.texts import TextBatch, text_batches
from slimheads.errors import UsageError, one_line
from slimheads.families.limits import decoder_start, position_limit
from slimheads.models.generation import seq2seq_generate
from slimheads.side_files.embedding import MEAN, Embedding

# Where pruning is entered and left: a fresh context manager a call, within which the dense model is a pruned one.
Pruned = Callable[[], AbstractContextManager[object]]

LOGITS_BUDGET = 256 * 2**20  # bytes of one model's float32 logits for one batch; large vocabularies get fewer rows


class Figures(BaseModel):
    """Quality figures of one pruned model against the dense one; null where the task has no such figure."""

    model_config = ConfigDict(frozen=True)
    cosine: float | None = None  # mean cosine of the embeddings (all but decoders)
    cosine_min: float | None = None  # the worst text, image or recording
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
    """Drift on one sample of texts, images or sound."""

    model_config = ConfigDict(frozen=True)
    sample: str  # "built-in" or the file's name
    noun: str = "text"  # what the sample consists of
    texts: int  # how many of them
    tokens: int | None  # null where there are none
    embedding: str | None = None  # what was made of the token states: "mean", or "lasttoken, then 2_Dense"
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
    """Hold `slim`, and the dense model under each random control, against `dense` on the same texts.

    Encoders: the cosine of L2-normalised text embeddings (`embedding` of the base model's last hidden state).
    Decoders (`task` is "text-generation"): perplexity, KL divergence and top-1 agreement over every token but a text's
    first. A decoder's perplexity is exp of the mean negative log-likelihood a token, in nats.
    Encoder-decoders ("text2text-generation"): KL divergence and top-1 agreement over every token of the answers that
    the dense model gives to the texts (greedily, 32 tokens at most), all models reading the same answers.

    Args:
        dense, slim: models in eval mode on one device.
        controls: a seed, and what makes `dense` a randomly pruned model for the length of a `with`; it is entered
            once a batch, so that no further copy of the weights is needed.
        tokenizer: None where the source folder has none: then there are no figures, only the reason.
        texts: at least one.
        sample_name: what the report calls the texts.
        max_length: tokens a text is cut to; lower where the model has fewer positions.
        batch_size: texts a batch, at most.

    Returns:
        The figures; one that is not finite is null, and `reason` names it.
    """
    if tokenizer is None:
        return _no_figures(sample_name, "the model folder has no tokenizer, so no text could be put through it")
    measures: dict[str, tuple[type[_DecoderTally | _AnswerTally], Any]] = {
        "text-generation": (_DecoderTally, _logits),
        "text2text-generation": (_AnswerTally, _answer_logits),
    }
    tally, outputs = measures.get(task, (_EncoderTally, _embedder(embedding, _prompt_tokens(embedding, tokenizer))))
    if task in measures:
        vocabulary = dense.get_output_embeddings().weight.shape[0]
        batch_size = max(1, min(batch_size, LOGITS_BUDGET // (4 * vocabulary * max_length)))
    tallies = _Tallies(dense, slim, controls, outputs, tally(), [tally() for _ in controls])
    tokens = 0
    if task not in measures:
        texts, max_length = embedding.texts(texts), min(max_length, embedding.max_tokens or max_length)
    for batch in text_batches(dense, tokenizer, texts, max_length, batch_size):
        fed = answered(dense, batch) if task == "text2text-generation" else batch
        tokens += sum(fed.lengths) - (len(fed.lengths) if task == "text-generation" else 0)
        tallies.add(fed)
    if not tokens:
        return _no_figures(sample_name, "no text has a token to score")
    by = None if task in measures else str(embedding)
    return tallies.summary(sample_name, len(texts)).model_copy(update={"tokens": tokens, "embedding": by})


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
    """`measure_drift` for models that are fed images or sound: the cosine of embeddings, of `inputs` by name.

    An embedding is the mean of the base model's last hidden state over its positions; of a model with two towers, both
    towers' embeddings one after the other; of one with neither, its logits. Each is L2-normalised.

    Raises:
        UsageError: the model does not run on these inputs.
    """
    count = len(next(iter(inputs.values())))
    tallies = _Tallies(dense, slim, controls, _embed_inputs, _EncoderTally(), [_EncoderTally() for _ in controls])
    for start in range(0, count, batch_size):
        try:
            tallies.add({name: tensor[start : start + batch_size] for name, tensor in inputs.items()})
        except (ValueError, RuntimeError, IndexError) as error:
            hint = "give inputs of the size that the model takes"
            raise UsageError(
                f"the model does not run on the inputs of {sample_name} ({one_line(error)})",
                keys=("verify.inputs",),
                hint=hint,
            ) from error
    return tallies.summary(sample_name, count).model_copy(update={"noun": noun})


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


def _embedder(embedding: Embedding, prompt: int) -> Callable[[PreTrainedModel, TextBatch], torch.Tensor]:
    def embed(model: PreTrainedModel, batch: TextBatch) -> torch.Tensor:
        states = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask.clone()
        mask[:, :prompt] = 0
        return F.normalize(embedding.pool(states.float(), mask), dim=-1)

    return embed


def _prompt_tokens(embedding: Embedding, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of a text's first tokens the pooling leaves out: the prompt's, without what ends a text."""
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


class _Tally(Protocol):
    """What is kept of one pruned model, batch after batch."""

    headline: ClassVar[str]  # the Figures field that the verdict rests on

    def add(self, dense: torch.Tensor, pruned: torch.Tensor, batch: TextBatch) -> None: ...
    def figures(self) -> Figures: ...
    def dense_perplexity(self) -> float | None: ...


@dataclass
class _EncoderTally:
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
class _AnswerTally:
    headline: ClassVar[str] = "kl_divergence"
    tokens: int = 0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, dense: torch.Tensor, pruned: torch.Tensor, batch: TextBatch) -> None:
        """From logits [texts, longest, vocabulary]; a text at a time, so that the log-softmaxes stay small."""
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
            top1_agreement=math.nan
            if math.isnan(divergence)
            else self.agreed / self.tokens,  # argmax of NaN is no token
        )

    def dense_perplexity(self) -> float | None:
        return None


@dataclass
class _DecoderTally(_AnswerTally):
    headline: ClassVar[str] = "perplexity_ratio"
    dense_nats: float = 0.0
    pruned_nats: float = 0.0

    def add(self, dense: torch.Tensor, pruned: torch.Tensor, batch: TextBatch) -> None:
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


@dataclass
class _Tallies:
    """What is kept of the slim model and of every random control, each held against the dense model's outputs."""

    dense: PreTrainedModel
    slim: PreTrainedModel
    controls: Sequence[tuple[int, Pruned]]
    outputs: Callable[[PreTrainedModel, Any], torch.Tensor]
    of_slim: _Tally
    of_controls: Sequence[_Tally]

    @torch.no_grad()
    def add(self, batch: Any) -> None:
        reference = self.outputs(self.dense, batch)
        self.of_slim.add(reference, self.outputs(self.slim, batch), batch)
        for tally, (_, pruned) in zip(self.of_controls, self.controls, strict=True):
            with pruned():
                tally.add(reference, self.outputs(self.dense, batch), batch)

    def summary(self, sample_name: str, count: int) -> Drift:
        return _summary(self.of_slim, [seed for seed, _ in self.controls], self.of_controls, sample_name, count)


def _summary(slim: _Tally, seeds: Sequence[int], controls: Sequence[_Tally], sample_name: str, texts: int) -> Drift:
    problems: list[str] = []
    figures = _finite(slim.figures(), "slim", problems)
    control = _control(seeds, [tally.figures() for tally in controls], problems)
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

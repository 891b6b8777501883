"""Sizes and arithmetic, against formulas written out for each architecture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.models.flops import flops, parameters, weight_bytes
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune

HIDDEN, LAYERS, VOCABULARY, DIM = 32, 3, 120, 8
DENSE = {"bert": (4, 48), "gpt2": (4, 128), "llama": (4, 48), "vit": (4, 48)}  # heads or KV groups, and neurons
Layers = list[tuple[int, int]]
SHAPES = [(1, 1), (1, 16), (4, 9)]


def attention(batch: int, length: int, heads: int, dim: int, past: int = 0) -> int:
    """Scores and the weighted sum of values."""
    return 2 * (2 * batch * heads * length * (past + length) * dim)


def bert(batch: int, length: int, layers: Layers) -> int:
    tokens = batch * length
    total = 2 * batch * HIDDEN * HIDDEN  # the pooler sees one token
    for heads, inner in layers:
        total += 4 * 2 * tokens * HIDDEN * heads * DIM + attention(batch, length, heads, DIM)
        total += 2 * 2 * tokens * HIDDEN * inner
    return total


def gpt2(batch: int, length: int, layers: Layers, past: int = 0) -> int:
    tokens = batch * length
    total = 2 * tokens * HIDDEN * VOCABULARY
    for heads, inner in layers:
        total += 4 * 2 * tokens * HIDDEN * heads * DIM + attention(batch, length, heads, DIM, past)
        total += 2 * 2 * tokens * HIDDEN * inner
    return total


def llama(batch: int, length: int, layers: Layers, past: int = 0) -> int:
    """Two query heads to a KV head, four features each; three matrices in the feed-forward block."""
    tokens, dim = batch * length, HIDDEN // 8
    total = 2 * tokens * HIDDEN * VOCABULARY + 2 * length * dim // 2  # the angles of the positions, an outer product
    for groups, inner in layers:
        total += 2 * tokens * HIDDEN * dim * (2 * groups + groups + groups + 2 * groups)
        total += attention(batch, length, 2 * groups, dim, past) + 3 * 2 * tokens * HIDDEN * inner
    return total


def vit(batch: int, length: int, layers: Layers) -> int:
    """Images of 30x30 in patches of 6x6 make 26 tokens, whatever length is asked for."""
    patches, pixels = 25, 3 * 6 * 6
    total = 2 * batch * patches * pixels * HIDDEN + 2 * batch * HIDDEN * HIDDEN  # the pooler sees one token
    for heads, inner in layers:
        total += 4 * 2 * batch * 26 * HIDDEN * heads * DIM + attention(batch, 26, heads, DIM)
        total += 2 * 2 * batch * 26 * HIDDEN * inner
    return total


FORMULAS = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", FORMULAS)
def test_flops_are_those_of_the_formula_dense_and_slim(
    model_type: str, attn_implementation: str, tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan]
) -> None:
    formula = FORMULAS[model_type]
    model = tiny(model_type, attn_implementation=attn_implementation)
    assert model.config._attn_implementation == attn_implementation
    plan = ragged(model)
    for shape in SHAPES:
        assert flops(model, *shape) == formula(*shape, [DENSE[model_type]] * LAYERS)
    prune(model, plan)
    for shape in SHAPES:
        assert flops(model, *shape) == formula(*shape, left(plan))


def left(plan: Plan) -> Layers:
    """What each layer that stays has left."""
    heads, neurons = ([len(site.kept) for site in plan.of_kind(k).sites] for k in ("attention", "feed_forward"))
    assert len(heads) == LAYERS - 1
    return list(zip(heads, neurons, strict=True))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("past", [1, 20])
def test_flops_after_a_past_are_those_of_the_new_tokens_against_all(
    model_type: str, past: int, tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan]
) -> None:
    formula, model = {"gpt2": gpt2, "llama": llama}[model_type], tiny(model_type)
    plan = ragged(model)
    for batch, length in ((1, 1), (2, 3)):
        assert flops(model, batch, length, past) == formula(batch, length, [DENSE[model_type]] * LAYERS, past)
    prune(model, plan)
    assert flops(model, 1, 1, past) == formula(1, 1, left(plan), past)


def test_a_past_that_a_model_cannot_hold_is_a_usage_error(tiny: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(UsageError, match="keeps no cache to hold 4 tokens"):
        flops(tiny("bert"), 1, 1, 4)
    with pytest.raises(UsageError, match=r"\[1, 1\] tokens after 160"):
        flops(tiny("gpt2"), 1, 1, 160)


def test_counting_leaves_the_model_as_it_was(tiny: Callable[..., PreTrainedModel]) -> None:
    model, same = tiny("llama"), tiny("llama")
    flops(model, 2, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not model.training


def test_tied_weights_are_counted_once(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    block = 2 * 2 * HIDDEN + (HIDDEN + 1) * 3 * HIDDEN + (HIDDEN + 1) * HIDDEN  # two norms, attention
    block += (HIDDEN + 1) * 4 * HIDDEN + (4 * HIDDEN + 1) * HIDDEN
    expected = VOCABULARY * HIDDEN + 160 * HIDDEN + LAYERS * block + 2 * HIDDEN
    assert parameters(model) == expected and weight_bytes(model) == 4 * expected
    assert weight_bytes(model.to(torch.bfloat16)) == 2 * expected


def test_a_shape_past_the_position_table_is_a_usage_error(tiny: Callable[..., PreTrainedModel]) -> None:
    """RoBERTa's table starts at 2, so that two of its 160 positions cannot be used."""
    flops(tiny("roberta"), 1, 158)
    with pytest.raises(UsageError, match=r"\[1, 159\]"):
        flops(tiny("roberta"), 1, 159)

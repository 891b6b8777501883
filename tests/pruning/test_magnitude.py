"""Scores equal a plain loop over single heads, whatever the family and the dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from layouts import UnitTensors, unit_tensors
from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.families.sites import find_sites
from slimheads.pruning.plan import Plan
from slimheads.pruning.scoring.score import score
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]


def frobenius(matrix: torch.Tensor) -> float:
    return math.sqrt(math.fsum(x * x for x in matrix.double().flatten().tolist()))


def magnitude(unit: UnitTensors) -> float:
    return frobenius(unit.query) + frobenius(unit.key) + frobenius(unit.value) + frobenius(unit.output)


def assert_equal_to_the_loop(model: PreTrainedModel, rel: float) -> float:
    """Returns the largest relative difference."""
    largest, scores = 0.0, score(model)
    assert [s.site for s in scores.sites] == [site.name for site in find_sites(model)]
    for site, units in zip(scores.sites, unit_tensors(model), strict=True):
        expected = [magnitude(unit) for unit in units]
        assert list(site.scores) == pytest.approx(expected, rel=rel, abs=0)
        largest = max(largest, *(abs(found / own - 1) for found, own in zip(site.scores, expected, strict=True)))
    return largest


# The loop adds in float64. Norms of float32, bfloat16 and float16 weights are accumulated in float32.
@pytest.mark.parametrize(
    "dtype,rel",
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
    ids=["float64", "float32", "bfloat16", "float16"],
)
def test_scores_equal_a_loop_over_single_heads(
    tiny: Tiny, prove: Callable[..., None], variety: str, dtype: torch.dtype, rel: float
) -> None:
    largest = assert_equal_to_the_loop(tiny(variety).to(dtype), rel)
    prove("scores", dtype=str(dtype).removeprefix("torch."), max_rel=largest)


def test_scores_of_minilm_equal_a_loop_over_single_heads(minilm: PreTrainedModel) -> None:
    assert_equal_to_the_loop(minilm, 1e-6)


def test_scores_of_query_groups_take_their_queries_together(tiny: Tiny) -> None:
    model = tiny("llama")
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            projection.weight.zero_()
        attention.q_proj.weight[0, 0], attention.q_proj.weight[7, 0] = 3.0, 4.0  # two query heads of one group
    assert score(model).sites[0].scores == (5.0, 0.0, 0.0, 0.0)


def test_biases_do_not_count(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type)
    before = score(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(7.0)
    assert score(model) == before


def test_a_slim_model_scores_as_its_kept_units_did(tiny: Tiny, ragged: Callable[..., Plan], variety: str) -> None:
    model = tiny(variety)
    before, plan = score(model), ragged(model)
    expected = [[s.scores[u] for u in p.kept] for s, p in zip(before.sites, plan.sites, strict=True)]
    assert [list(s.scores) for s in score(prune(model, plan)).sites] == [pytest.approx(e, rel=1e-6) for e in expected]


def test_scoring_changes_nothing(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_weight_that_is_not_finite_is_refused_by_name(tiny: Tiny, model_type: str, dtype: torch.dtype) -> None:
    model = tiny(model_type).to(dtype)
    projection = find_sites(model)[1].projections[-1]
    for bad in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            model.get_submodule(projection.module).weight[0, 0] = bad
        with pytest.raises(ModelRefusedError, match="NaN or infinity") as refused:
            score(model)
        assert (refused.value.where, refused.value.exit_code) == (f"{projection.module}.weight", 3), bad


def test_large_half_precision_weights_do_not_overflow(tiny: Tiny) -> None:
    model = tiny("bert").to(torch.float16)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.fill_(60_000.0)  # its square is beyond float16
    assert score(model).sites[0].scores[0] > 60_000

"""Scores equal a plain loop over single heads and neurons, whatever the family and the dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from blocks import neuron_tensors
from layouts import UnitTensors, unit_tensors
from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.families.sites import find_sites, of_kind
from slimheads.pruning.plan import Plan
from slimheads.pruning.scoring.score import score
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]


def frobenius(matrix: torch.Tensor) -> float:
    return math.sqrt(math.fsum(x * x for x in matrix.double().flatten().tolist()))


def magnitude(unit: UnitTensors) -> float:
    return frobenius(unit.query) + frobenius(unit.key) + frobenius(unit.value) + frobenius(unit.output)


def magnitudes(model: PreTrainedModel) -> dict[tuple[str, str], list[float]]:
    """What a loop over single units gives, by kind and site."""
    sites = find_sites(model)
    heads = zip(of_kind(sites, "attention"), unit_tensors(model), strict=True)
    by_head = {site.key: [magnitude(unit) for unit in units] for site, units in heads}
    neurons = neuron_tensors(model).items()
    by_neuron = {
        ("feed_forward", name): [math.fsum(map(frobenius, neuron.weights)) for neuron in block]
        for name, block in neurons
    }
    return by_head | by_neuron


def assert_equal_to_the_loop(model: PreTrainedModel, rel: float) -> float:
    """Returns the largest relative difference."""
    largest, found = 0.0, {(s.kind, s.site): s.scores for s in score(model).sites}
    expected = magnitudes(model)
    assert list(found) == [site.key for site in find_sites(model) if site.kind != "layer"]
    assert found.keys() == expected.keys()
    for key, scores in found.items():
        assert list(scores) == pytest.approx(expected[key], rel=rel, abs=0), key
        largest = max(largest, *(abs(a / b - 1) for a, b in zip(scores, expected[key], strict=True)))
    return largest


# The loop adds in float64. Norms of float32, bfloat16 and float16 weights are accumulated in float32.
@pytest.mark.parametrize(
    "dtype,rel",
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
    ids=["float64", "float32", "bfloat16", "float16"],
)
def test_scores_equal_a_loop_over_single_units(
    tiny: Tiny, prove: Callable[..., None], variety: str, dtype: torch.dtype, rel: float
) -> None:
    largest = assert_equal_to_the_loop(tiny(variety).to(dtype), rel)
    prove("scores", dtype=str(dtype).removeprefix("torch."), max_rel=largest)


def test_scores_of_minilm_equal_a_loop_over_single_units(minilm: PreTrainedModel) -> None:
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


def test_the_score_of_a_gated_neuron_adds_its_three_slices(tiny: Tiny) -> None:
    model = tiny("llama")
    with torch.no_grad():
        block = model.model.layers[0].mlp
        for projection in (block.gate_proj, block.up_proj, block.down_proj):
            projection.weight.zero_()
        block.gate_proj.weight[5, 0], block.gate_proj.weight[5, 1] = 3.0, 4.0
        block.up_proj.weight[5, 2] = 2.0
        block.down_proj.weight[7, 5] = 1.0
    scores = next(s for s in score(model).sites if s.kind == "feed_forward").scores
    assert scores == tuple(8.0 if neuron == 5 else 0.0 for neuron in range(48))


def test_a_slim_model_scores_as_its_kept_units_did(tiny: Tiny, ragged: Callable[..., Plan], variety: str) -> None:
    model = tiny(variety)
    before, plan = {(s.kind, s.site): s.scores for s in score(model).sites}, ragged(model)
    expected = [[before[p.key][unit] for unit in p.kept] for p in plan.sites if p.kind != "layer"]
    assert [list(s.scores) for s in score(prune(model, plan)).sites] == [pytest.approx(e, rel=1e-6) for e in expected]


def test_scoring_changes_nothing(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_weight_that_is_not_finite_is_refused_by_name(tiny: Tiny, model_type: str, dtype: torch.dtype) -> None:
    model = tiny(model_type).to(dtype)
    for kind in ("attention", "feed_forward"):
        projection = of_kind(find_sites(model), kind)[1].projections[-1]
        weight = model.get_submodule(projection.module).weight.data
        own = weight[0, 0].clone()
        for bad in (math.nan, math.inf, -math.inf):
            weight[0, 0] = bad
            with pytest.raises(ModelRefusedError, match="NaN or infinity") as refused:
                score(model)
            assert (refused.value.where, refused.value.exit_code) == (f"{projection.module}.weight", 3), bad
        weight[0, 0] = own


def test_large_half_precision_weights_do_not_overflow(tiny: Tiny) -> None:
    model = tiny("bert").to(torch.float16)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.fill_(60_000.0)  # its square is beyond float16
    assert score(model).sites[0].scores[0] > 60_000

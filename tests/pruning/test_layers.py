"""Dropping whole layers: gated equals deleted, what is renumbered, and what cannot go."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import stacks_of
from plans import renamed
from tiny import InFloat64Throughout, default_dtype
from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError, UsageError
from slimheads.families.sites import find_sites, of_kind
from slimheads.models.loading import load, save
from slimheads.pruning.gates import gated
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]
Ragged = Callable[..., Plan]
Batches = Callable[[PreTrainedModel], dict[str, dict[str, torch.Tensor]]]
Answers = Callable[..., dict[str, torch.Tensor]]

# Which layers of the small models cannot go, by hand; None is all of them.
POSITION_BIASES = {"encoder.block.0", "decoder.block.0"}  # all layers read those of the first
WINDOWS = {"encoder.layers.0.blocks.0", "encoder.layers.1.blocks.0"}  # they shift in every other block
GLOBAL = {"layers.0", "layers.1"}  # every other layer sees the whole text
IMMOVABLE: dict[str, set[str] | None] = {
    "albert": None,  # one pass after another goes through them
    "albert-one-layer": None,
    "albert-relative": None,
    "deberta-v2-conv": {"encoder.layer.0"},  # a convolution follows the first
    "donut-swin": WINDOWS,
    "gpt2-inverse-layers": None,  # attention is divided by the layer's number
    "modernbert": GLOBAL,
    "modernbert-biased": GLOBAL,
    "mt5": POSITION_BIASES,
    "qwen3_moe-sparse": {"model.layers.0", "model.layers.1"},  # the second alone has no experts, by its number
    "swin": WINDOWS,
    "swin-windows": WINDOWS,
    "t5": POSITION_BIASES,
    "wavlm": {"encoder.layers.0"},
    "wavlm-stable": {"encoder.layers.0"},
    "yolos": None,  # it adds positions of its own after each layer
}


def without(*layers: str) -> Plan:
    return Plan(tuple(SitePlan(layer, "layer", 1, (), "layer") for layer in layers))


def names_of(model: PreTrainedModel) -> list[str]:
    return [f"{stack}.{index}" for stack, modules in stacks_of(model).items() for index in range(len(modules))]


def test_each_layer_can_go_or_says_why_not(tiny: Tiny, variety: str) -> None:
    model = tiny(variety)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    refused = set()
    for layer in names_of(model):
        try:
            prune(copy.deepcopy(model), without(layer))
        except UsageError as error:
            assert error.where.startswith(layer.rpartition(".")[0]) and error.hint
            refused.add(layer)
    immovable = IMMOVABLE.get(variety, set())
    assert refused == (set(names_of(model)) if immovable is None else immovable)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_a_gated_layer_equals_a_dropped_one_and_is_left_out(
    tiny: Tiny, ragged: Ragged, batches: Batches, answers: Answers, model_type: str, dtype: torch.dtype, atol: float
) -> None:
    """Left out by hand: the module is replaced by one that gives back its input."""
    model = tiny(model_type).to(dtype)
    plan = ragged(model, kinds=("layer",))
    gone = [site.site for site in plan.sites if not site.kept]
    if not gone:
        pytest.skip("none of its layers can go")
    with default_dtype(dtype):
        fed = batches(model)["one"]
        with gated(model, plan):
            expected = answers(model, fed)
        passed = copy.deepcopy(model)
        for name in gone:
            layer = passed.get_submodule(name)
            layer.forward = passing(layer.forward)
        for other in (passed, prune(model, plan)):
            for name, value in answers(other, fed).items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=atol)


def passing(forward: Any) -> Any:
    """The stock forward, whose states are those that came in."""

    def same(*inputs: Any, **options: Any) -> Any:
        entered = inputs[0] if inputs else options["hidden_states"]
        outputs = forward(*inputs, **options)
        if isinstance(outputs, torch.Tensor):
            return entered
        return tuple(entered if torch.is_tensor(o) and o.shape == entered.shape else o for o in outputs)

    return same


def test_gradients_flow_through_a_layers_gate(
    tiny: Tiny, ragged: Ragged, batches: Batches, answers: Answers, model_type: str
) -> None:
    model = tiny(model_type).double()
    plan = ragged(model, kinds=("layer",))
    gone = [site for site in plan.sites if not site.kept]
    if not gone:
        pytest.skip("none of its layers can go")
    batch, step = batches(model)["one"], 1e-5
    with default_dtype(torch.float64), InFloat64Throughout(), gated(model, plan) as gates:
        gate = gates[gone[0].key]
        model(**batch)[0].square().sum().backward()
        assert gate.grad is not None and torch.isfinite(gate.grad).all() and gate.grad.item() != 0
        losses = []
        with torch.no_grad():
            for at in (step, -step):
                gate.fill_(at)
                losses.append(model(**batch)[0].square().sum().item())
        assert gate.grad.item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5)


def test_the_layers_that_stay_are_the_same_objects_under_new_names(tiny: Tiny, ragged: Ragged, variety: str) -> None:
    model = tiny(variety)
    plan = ragged(model, kinds=("layer",))
    before = {renamed(name, plan): model.get_submodule(name) for name in names_of(model)}
    prune(model, plan)
    assert names_of(model) == [name for name in before if name]
    assert all(model.get_submodule(name) is module for name, module in before.items() if name)
    for name, module in model.named_modules():
        for layer in (layer for layer in names_of(model) if name.startswith(f"{layer}.")):
            for attribute in ("layer_idx", "layer_id"):
                if (number := getattr(module, attribute, None)) is not None:
                    assert number == int(layer.rpartition(".")[2]), name


def test_the_cache_of_an_encoder_decoder_has_a_place_for_each_layer_that_stays(
    tiny: Tiny, ragged: Ragged, batches: Batches, seq2seq_type: str
) -> None:
    model = tiny(seq2seq_type)
    layers = prune(model, ragged(model)).get_decoder()
    with torch.no_grad():
        cache = model(**batches(model)["one"], use_cache=True).past_key_values.to_legacy_cache()
    stack = layers.block if seq2seq_type in {"mt5", "t5"} else layers.layers
    assert len(cache) == len(stack) and all(torch.is_tensor(part) for layer in cache for part in layer)


def test_what_is_in_a_dropped_layer_cannot_be_planned(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type)
    layers = [site for site in of_kind(find_sites(model), "layer") if not site.stays]
    for layer in layers[-1:]:
        for site in (s for s in find_sites(model) if s.kind != "layer" and f"{s.name}.".startswith(f"{layer.name}.")):
            own = SitePlan(site.name, site.unit, site.total, (0,), site.kind)
            with pytest.raises(UsageError, match="in a layer that the plan drops") as refused:
                Plan((own, *without(layer.name).sites))
            assert refused.value.where == site.name


def test_one_layer_of_each_stack_stays(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type)
    sites = of_kind(find_sites(model), "layer")
    for stack in stacks_of(model):
        own = [site for site in sites if site.name.rpartition(".")[0] == stack]
        if not any(site.stays for site in own):
            with pytest.raises(UsageError, match=f"drops all {len(own)} layers") as refused:
                prune(model, without(*(site.name for site in own)))
            assert refused.value.where == stack


def test_a_layer_that_stays_says_why(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type)
    for site in of_kind(find_sites(model), "layer"):
        if site.stays:
            with pytest.raises(UsageError, match="cannot be dropped, because") as refused:
                prune(model, without(site.name))
            assert refused.value.where == site.name and site.stays in str(refused.value)


def test_prunings_of_all_kinds_compose(
    tiny: Tiny, ragged: Ragged, batches: Batches, answers: Answers, tmp_path: Any, variety: str
) -> None:
    """Heads, then neurons, then a layer, then neurons again: the same as one plan, the record included."""
    step_by_step, at_once = tiny(variety), tiny(variety)
    heads = ragged(step_by_step, seed=1, kinds=("attention",))
    neurons = ragged(step_by_step, seed=2, kinds=("feed_forward",))
    layers = ragged(step_by_step, seed=3, kinds=("layer",))
    for plan in (heads, neurons, layers):
        prune(step_by_step, plan)
    save(step_by_step, tmp_path / "slim")
    step_by_step = load(tmp_path / "slim")
    again = ragged(step_by_step, seed=4, kinds=("feed_forward",))
    prune(step_by_step, again)
    later = {site.site: site.kept for site in again.sites}
    composed = []
    for site in (site for site in (*heads.sites, *neurons.sites) if renamed(site.site, layers)):
        kept = later.get(str(renamed(site.site, layers)), range(len(site.kept))) if site.kind != "attention" else None
        units = site.kept if kept is None else tuple(site.kept[unit] for unit in kept)
        composed.append(SitePlan(site.site, site.unit, site.total, units, site.kind))
    prune(at_once, Plan((*composed, *layers.sites)))
    state = step_by_step.state_dict()
    assert state.keys() == at_once.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in at_once.state_dict().items())
    assert step_by_step.config.slimheads == at_once.config.slimheads
    fed = batches(at_once)["one"]
    for name, value in answers(step_by_step, fed).items():
        assert torch.equal(value, answers(at_once, fed)[name])


def test_a_record_with_more_layers_than_were_dropped_is_refused_before_they_are_built(
    tiny: Tiny, tmp_path: Path
) -> None:
    save(prune(tiny("bert"), without("encoder.layer.1")), tmp_path / "slim")
    path = tmp_path / "slim" / "config.json"
    config = json.loads(path.read_text())
    config["slimheads"]["dense"]["num_hidden_layers"] = 4  # one more; with a billion of them nothing would end
    path.write_text(json.dumps(config))
    with pytest.raises(ModelRefusedError, match="num_hidden_layers was 4, and is 2 without 1 layers"):
        load(tmp_path / "slim")

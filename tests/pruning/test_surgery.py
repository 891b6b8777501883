"""Deleted equals gated, on every covered model type; and what surgery must leave alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from blocks import NeuronTensors, neuron_tensors
from layouts import UnitTensors
from plans import renamed, units_by_site
from tiny import DECODERS, default_dtype, tasks_of, type_of, variant_of
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.families.family import families, family_of
from slimheads.families.sites import find_sites
from slimheads.models.loading import load, save
from slimheads.pruning.gates import gated
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]
Ragged = Callable[..., Plan]
Batch = dict[str, torch.Tensor]
Batches = Callable[[PreTrainedModel], dict[str, Batch]]
Answers = Callable[..., dict[str, torch.Tensor]]
Prove = Callable[..., None]
HEADS = [
    pytest.param(model_type, task, marks=() if model_type == family.model_types[0] else pytest.mark.slow)
    for family in families().values()
    for model_type in family.model_types
    for task in tasks_of(model_type)
]
# Their eager attention casts a float64 mask to float32: rows that see only padding become NaN, dense or slim. With a
# window those are also the rows of padding that stand far behind the text.
NAN_WHEN_PADDED_LEFT = {v for v in DECODERS if type_of(v) not in {"falcon", "gpt2", "gpt_neo", "gptj"}}
NAN_WHEN_PADDED_RIGHT = {"gemma2", "gemma3_text", "mistral", "mistral-wide", "phi3-wide", "qwen2-windows"}
NAN_WHEN_PADDED_RIGHT |= {"modernbert", "modernbert-biased"}
NAN_WHEN_PADDED_LEFT |= {"clip", "modernbert", "modernbert-biased"}
STOCK_PRUNES = [m for family in families().values() if family.reload == "pruned_heads" for m in family.model_types]


def assert_slim_equals_gated(
    model: PreTrainedModel, plan: Plan, batches: dict[str, Batch], answers: Answers, atol: float
) -> float:
    """Prunes the model; returns the largest difference."""
    with gated(model, plan):
        expected = {name: answers(model, batch) for name, batch in batches.items()}
    prune(model, plan)
    largest = 0.0
    for name, batch in batches.items():
        for key, value in answers(model, batch).items():
            torch.testing.assert_close(value, expected[name][key], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
            largest = max(largest, (value - expected[name][key]).abs().max().item())
    return largest


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_deleted_equals_gated(
    tiny: Tiny,
    ragged: Ragged,
    batches: Batches,
    answers: Answers,
    prove: Prove,
    variety: str,
    dtype: torch.dtype,
    atol: float,
    implementation: str,
    seed: int,
) -> None:
    if implementation == "sdpa" and not tiny(variety)._supports_sdpa:
        pytest.skip("transformers has no sdpa for it")
    if variety == "gpt2-upcast" and (dtype, implementation) == (torch.float64, "eager"):
        pytest.skip("it knows no wider type than float32")
    model = tiny(variety, attn_implementation=implementation).to(dtype)
    fed = batches(model)
    if dtype == torch.float64 and implementation == "eager":
        nan = {"padded left": NAN_WHEN_PADDED_LEFT, "padded right": NAN_WHEN_PADDED_RIGHT}
        fed = {name: batch for name, batch in fed.items() if variety not in nan.get(name, ())}
    assert model.config._attn_implementation == implementation
    with default_dtype(dtype):
        largest = assert_slim_equals_gated(model, ragged(model, seed), fed, answers, atol)
    said = str(dtype).removeprefix("torch.")
    prove("gated", variant=variant_of(variety), implementation=implementation, dtype=said, max_abs=largest)


@pytest.mark.parametrize("model_type,task", HEADS)
def test_deleted_equals_gated_under_each_head_class_and_it_reloads(
    tiny: Tiny,
    ragged: Ragged,
    batches: Batches,
    answers: Answers,
    prove: Prove,
    tmp_path: Path,
    model_type: str,
    task: str,
) -> None:
    model = tiny(model_type, task=task, pad_token_id=1)
    largest = assert_slim_equals_gated(model, ragged(model), batches(model), answers, 1e-5)
    save(model, tmp_path / "slim")
    loaded = load(tmp_path / "slim")
    assert type(loaded) is type(model)
    for batch in batches(model).values():
        for key, value in answers(loaded, batch).items():
            assert torch.equal(value, answers(model, batch)[key])
    prove("tasks", task=task, max_abs=largest)


def test_deleted_equals_gated_on_minilm(
    minilm: PreTrainedModel, ragged: Ragged, batches: Batches, answers: Answers
) -> None:
    model = copy.deepcopy(minilm)
    assert_slim_equals_gated(model, ragged(model), batches(model), answers, 1e-5)


def test_what_is_kept_is_the_dense_models_own(tiny: Tiny, ragged: Ragged, variety: str) -> None:
    model = tiny(variety)
    plan, before = ragged(model), copy.deepcopy(model)
    dense = units_by_site(before)
    divided = {name for name in before.state_dict() if is_divided(model, name)}
    prune(model, plan)
    slim = units_by_site(model, plan)
    assert len(slim) == sum(site.kind != "layer" for site in plan.sites)
    for site in (site for site in plan.sites if site.kind != "layer"):
        name = renamed(site.site, plan)
        for old, new in zip((dense[site.key][unit] for unit in site.kept), slim[site.kind, name], strict=True):
            assert same(old, new), site.site
    names = {name: renamed(name, plan) for name in before.state_dict()}
    assert model.state_dict().keys() == {name for name in names.values() if name}
    for name, tensor in before.state_dict().items():
        if names[name] and name not in divided:
            assert torch.equal(model.state_dict()[names[name]], tensor), name


def same(one: UnitTensors | NeuronTensors, other: UnitTensors | NeuronTensors) -> bool:
    """Whether two units have the same numbers everywhere."""
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def tensors_of(unit: UnitTensors | NeuronTensors) -> list[torch.Tensor]:
    fields = [getattr(unit, f.name) for f in dataclasses.fields(unit)]
    return [t for value in fields if value is not None for t in (value if isinstance(value, tuple) else (value,))]


def test_deleting_neurons_deletes_their_rows_and_columns_and_no_more(tiny: Tiny, ragged: Ragged, variety: str) -> None:
    model = tiny(variety)
    plan = ragged(model, kinds=("feed_forward",))
    neurons = neuron_tensors(model)
    gone = sum(neurons[site.site][unit].elements for site in plan.sites for unit in site.removed)
    before = model.num_parameters()
    prune(model, plan)
    assert before - model.num_parameters() == gone > 0


def is_divided(model: PreTrainedModel, parameter: str) -> bool:
    """Whether some entries of a parameter belong to one unit and some to another."""
    return any(
        parameter.startswith(f"{p.module}.") and not (p.divides_inputs and parameter.endswith("bias"))
        for site in find_sites(model)
        for p in site.projections
    ) or any(parameter == f"{t.module}.{t.name}" for site in find_sites(model) for t in site.tables)


def test_a_site_that_the_plan_does_not_name_is_untouched(tiny: Tiny, ragged: Ragged, model_type: str) -> None:
    model, whole = tiny(model_type), ragged(tiny(model_type), kinds=("attention", "feed_forward"))
    named = Plan(whole.sites[::2])
    dense = units_by_site(copy.deepcopy(model))
    prune(model, named)
    kept = {site.key: site.kept for site in named.sites}
    every = [site for site in whole.sites if site.kind == "attention"]
    left = Plan(tuple(replace(s, kept=kept.get(s.key, tuple(range(s.total)))) for s in every))
    for key, slim in units_by_site(model, left).items():
        old = dense[key]
        assert all(same(old[unit], new) for unit, new in zip(kept.get(key, range(len(old))), slim, strict=True)), key


@pytest.mark.parametrize("model_type", STOCK_PRUNES)
def test_weights_and_attributes_are_those_of_the_stock_librarys_own_pruning(
    tiny: Tiny, ragged: Ragged, model_type: str
) -> None:
    model, stock = (tiny(model_type, task="feature-extraction") for _ in range(2))
    plan = ragged(model, kinds=("attention",))
    stock.prune_heads({layer: list(site.removed) for layer, site in enumerate(plan.sites) if site.removed})
    prune(model, plan)
    expected = stock.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    for (name, ours), theirs in zip(model.named_modules(), stock.modules(), strict=True):
        assert plain_attributes(ours) == plain_attributes(theirs), name


def plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str)
    return {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "training" and not k.startswith("_")}


def test_linear_layers_state_their_new_shapes(tiny: Tiny, ragged: Ragged, model_type: str) -> None:
    model = prune(tiny(model_type), ragged(tiny(model_type)))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
            assert module.bias is None or module.bias.shape == (module.out_features,)
        if isinstance(module, transformers.pytorch_utils.Conv1D):
            assert module.weight.shape == (module.nx, module.nf) and module.bias.shape == (module.nf,)


def test_greedy_tokens_with_the_cache_are_the_same(
    tiny: Tiny, ragged: Ragged, batches: Batches, decoder_variety: str
) -> None:
    model = tiny(decoder_variety)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "use_cache": True}
    plan, fed = ragged(model), {name: batches(model)[name] for name in ("one", "padded left")}
    with gated(model, plan):
        expected = {name: model.generate(**batch, **options) for name, batch in fed.items()}
    prune(model, plan)
    for name, batch in fed.items():
        tokens = model.generate(**batch, **options)
        assert torch.equal(tokens, expected[name]) and tokens.shape[1] == 9 + 12, name


def test_steps_with_the_cache_equal_one_pass(
    tiny: Tiny, ragged: Ragged, batches: Batches, decoder_variety: str
) -> None:
    model = tiny(decoder_variety)
    prune(model, ragged(model))
    ids = batches(model)["one"]["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=0, atol=1e-5)


def test_modules_keep_identity_hooks_dtype_and_requires_grad(
    tiny: Tiny, ragged: Ragged, batches: Batches, model_type: str
) -> None:
    model = tiny(model_type).to(torch.bfloat16)
    plan = ragged(model)
    staying = [site for site in find_sites(model) if site.projections and renamed(site.name, plan)]
    projections = {renamed(p.module, plan): model.get_submodule(p.module) for site in staying for p in site.projections}
    first, second, *_, last = projections.values()
    first.weight.requires_grad_(False)
    calls: list[int] = []
    last.register_forward_hook(lambda *_: calls.append(1))
    assert prune(model, plan) is model
    assert all(model.get_submodule(name) is module for name, module in projections.items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in (first.weight, second.weight)] == [False, True]
    assert not model.training
    model(**batches(model)["one"])
    assert set(calls) == {1}  # ALBERT calls it again and again


def damaged_plans(plan: Plan) -> dict[str, Plan]:
    *others, last = [site for site in plan.sites if site.kind != "layer"]
    return {
        "another count": Plan((*others, replace(last, total=last.total + 1))),
        "an unknown site": Plan((*plan.sites, SitePlan("encoder.layer.99.attention", "head", 4, (0,)))),
        "another kind": Plan((*others, SitePlan(others[0].site, "neuron", 4, (0,), "feed_forward"))),
        "an unknown layer": Plan((*plan.sites, SitePlan("encoder.layer.99", "layer", 1, (), "layer"))),
    }


def test_a_plan_that_does_not_match_changes_nothing(tiny: Tiny, ragged: Ragged, model_type: str) -> None:
    model = tiny(model_type)
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(model.config.to_dict())
    for damage, plan in damaged_plans(ragged(model)).items():
        with pytest.raises(UsageError):
            prune(model, plan)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), damage
        assert model.config.to_dict() == config, damage


def test_pruning_again_equals_pruning_once(
    tiny: Tiny, equal: Any, ragged: Ragged, tmp_path: Path, variety: str
) -> None:
    model, at_once = tiny(variety), tiny(variety)
    first = equal(model, 3)
    save(prune(model, first), tmp_path / "once")
    again = load(tmp_path / "once")
    second = ragged(again, seed=3)
    save(prune(again, second), tmp_path / "twice")
    once = {site.key: site for site in first.sites}
    composed = Plan(tuple(original(site, once.get(site.key)) for site in second.sites))
    prune(at_once, composed)
    for model_now in (again, load(tmp_path / "twice")):
        state = model_now.state_dict()
        assert state.keys() == at_once.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in at_once.state_dict().items())
        found, expected = model_now.config.to_dict(), at_once.config.to_dict()
        for key in ("slimheads", "pruned_heads", *family_of(model_now.config)[1].recorded_keys):
            part = key.partition(".")[0]
            assert found.get(part) == expected.get(part), key


def original(site: SitePlan, once: SitePlan | None) -> SitePlan:
    """What a plan for a slim model says of the dense one, by what the site kept `once`."""
    return replace(once, kept=tuple(once.kept[unit] for unit in site.kept)) if once else site


def test_a_slim_model_can_be_pruned_again_in_memory(
    tiny: Tiny, equal: Any, ragged: Ragged, batches: Batches, answers: Answers, variety: str
) -> None:
    model = tiny(variety)
    prune(model, equal(model, 3))
    assert_slim_equals_gated(model, ragged(model, seed=2), batches(model), answers, 1e-5)


def test_the_stock_library_learns_the_new_counts(tiny: Tiny, equal: Any, model_type: str) -> None:
    model = tiny(model_type)
    plan = equal(model, 2)
    prune(model, plan)
    reload = family_of(model.config)[1].reload
    if reload == "pruned_heads":
        assert model.config.pruned_heads == {layer: list(site.removed) for layer, site in enumerate(plan.sites)}
    if reload == "head_counts":
        dense = tiny(model_type).config
        members = dense.num_attention_heads // dense.num_key_value_heads
        assert (model.config.num_key_value_heads, model.config.num_attention_heads) == (2, 2 * members)
        given = getattr(dense, "head_dim", None)
        assert model.config.head_dim == (given or dense.hidden_size // dense.num_attention_heads)

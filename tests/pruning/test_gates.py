"""Gates: what they multiply, what flows through them, and that nothing of them stays behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plans import units_by_site
from tiny import DECODERS, ENCODERS, InFloat64Throughout, default_dtype
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.families.config_facts import takes_text
from slimheads.families.sites import find_sites
from slimheads.pruning.gates import gated
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]
Ragged = Callable[..., Plan]
Batches = Callable[[PreTrainedModel], dict[str, dict[str, torch.Tensor]]]
Answers = Callable[..., dict[str, torch.Tensor]]


def hooks_of(model: torch.nn.Module) -> list[Any]:
    hooks = (hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks))
    return [hook for own in hooks for hook in own.values()]


def keep_all(model: PreTrainedModel) -> Plan:
    return Plan(tuple(SitePlan(s.name, s.unit, s.total, tuple(range(s.total)), s.kind) for s in find_sites(model)))


def test_a_closed_gate_equals_a_zeroed_slice_of_the_output_projection(
    tiny: Tiny, ragged: Ragged, batches: Batches, answers: Answers, variety: str
) -> None:
    model = tiny(variety)
    plan, zeroed = ragged(model, kinds=("attention", "feed_forward")), copy.deepcopy(model)
    units = units_by_site(zeroed)
    for site in plan.sites:
        for unit in site.removed:
            units[site.key][unit].output.zero_()
    with gated(model, plan) as gates:
        assert [(key, gate.tolist()) for key, gate in gates.items()] == [
            (site.key, [float(unit in site.kept) for unit in range(site.total)]) for site in plan.sites
        ]
        for batch in batches(model).values():
            for name, value in answers(zeroed, batch).items():
                torch.testing.assert_close(answers(model, batch)[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "feed_forward"])
@pytest.mark.parametrize("opened", [0, 1], ids=["at 0", "at 1"])
def test_gradients_of_gates_and_kept_weights_equal_finite_differences(
    tiny: Tiny, ragged: Ragged, batches: Batches, model_type: str, opened: int, kind: str
) -> None:
    model, step, rel = tiny(model_type).double(), 1e-5, 1e-5
    plan = ragged(model)
    site = next(s for s in plan.sites if s.kind == kind and s.removed)
    unit = (site.removed, site.kept)[opened][0]
    batch = batches(model)["padded right" if takes_text(model.config) else "several"]
    padded = model_type in ENCODERS | DECODERS  # the others' first output does not have the positions of the mask
    counted = batch["attention_mask"][..., None] if padded else torch.ones(1)

    def loss() -> torch.Tensor:
        output = model(**batch)[0]
        directions = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return (output * directions * counted).sum()

    def slope(tensor: torch.Tensor, index: Any) -> float:
        values = []
        with torch.no_grad():
            start = tensor[index].item()
            for sign in (1, -1):
                tensor[index] = start + sign * step
                values.append(loss().item())
            tensor[index] = start
        return (values[0] - values[1]) / (2 * step)

    with default_dtype(torch.float64), InFloat64Throughout(), gated(model, plan) as gates:
        gate = gates[site.key]
        loss().backward()
        assert gate.grad is not None
        assert gate.grad[unit].item() == pytest.approx(slope(gate, unit), rel=rel)
        weights, gradients = units_by_site(model)[site.key], gradient_units(model)[site.key]
        kept_output = weights[site.kept[0]].output
        first = (0,) * kept_output.ndim
        assert gradients[site.kept[0]].output[first].item() == pytest.approx(slope(kept_output, first), rel=rel)
        for gone in site.removed:
            assert not any(tensor.any() for tensor in gradients[gone].weights)
        alive = [all(tensor.any() for tensor in gradients[unit].weights[-2:]) for unit in site.kept]
        assert all(alive) if kind == "attention" else any(alive)  # a rectified neuron may be silent


def gradient_units(model: PreTrainedModel) -> Any:
    """The gradients of a model, divided into units as its weights are."""
    mirror = copy.deepcopy(model)
    for parameter, own in zip(mirror.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(own) if own.grad is None else own.grad.clone()
    return units_by_site(mirror)


def test_leaving_restores_every_bit_and_leaves_no_hook(
    tiny: Tiny, ragged: Ragged, batches: Batches, answers: Answers, model_type: str
) -> None:
    model = tiny(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = {name: answers(model, batch) for name, batch in batches(model).items()}
    with gated(model, ragged(model)):
        assert hooks_of(model)
        assert any(
            not torch.equal(value, outputs[name][key])
            for name, batch in batches(model).items()
            for key, value in answers(model, batch).items()
        )
    assert not hooks_of(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, batch in batches(model).items():
        assert all(torch.equal(outputs[name][key], value) for key, value in answers(model, batch).items())


def test_an_exception_inside_leaves_no_hook_either(tiny: Tiny, ragged: Ragged) -> None:
    model = tiny("bert")
    with pytest.raises(KeyboardInterrupt), gated(model, ragged(model)):
        raise KeyboardInterrupt
    assert not hooks_of(model)


def test_hooks_of_others_stay(tiny: Tiny, ragged: Ragged, batches: Batches) -> None:
    model = tiny("bert")
    seen: list[int] = []
    model.encoder.layer[0].attention.output.dense.register_forward_pre_hook(lambda *_: seen.append(1))
    with gated(model, ragged(model)):
        model(**batches(model)["one"])
    model(**batches(model)["one"])
    assert len(seen) == 2 and len(hooks_of(model)) == 1


def test_an_attention_that_was_opened_for_gates_is_closed_again(tiny: Tiny, ragged: Ragged, batches: Batches) -> None:
    """WavLM's own forward never calls its output projection, where gates act."""
    model = tiny("wavlm")
    plan, attention = ragged(model, kinds=("attention",)), model.encoder.layers[0].attention
    own, state = type(attention), set(vars(attention))
    for kept in (plan, keep_all(model)):
        with gated(model, kept):
            assert type(attention) is not own
            model(**batches(model)["one"])
        assert type(attention) is own and set(vars(attention)) == state
    slim = prune(model, plan)
    before = [layer.attention.kept_heads for layer in slim.encoder.layers]
    with gated(slim, keep_all(slim)):
        pass
    assert [layer.attention.kept_heads for layer in slim.encoder.layers] == before == [list(s.kept) for s in plan.sites]


def test_writing_a_gate_in_place_acts(
    tiny: Tiny, ragged: Ragged, batches: Batches, answers: Answers, model_type: str
) -> None:
    model = tiny(model_type)
    dense = answers(model, batches(model)["one"])
    with gated(model, ragged(model)) as gates:
        with torch.no_grad():
            for gate in gates.values():
                gate.fill_(1.0)
        opened = answers(model, batches(model)["one"])
    assert all(torch.equal(dense[name], value) for name, value in opened.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_gates_take_the_models_dtype(tiny: Tiny, batches: Batches, answers: Answers, dtype: torch.dtype) -> None:
    model = tiny("bert").to(dtype)
    dense = answers(model, batches(model)["one"])
    with gated(model, keep_all(model)) as gates:
        assert {gate.dtype for gate in gates.values()} == {dtype}
        assert all(torch.equal(dense[k], v) for k, v in answers(model, batches(model)["one"]).items())


def test_a_frozen_model_still_gives_its_gates_gradients(tiny: Tiny, batches: Batches) -> None:
    model = tiny("gpt2").requires_grad_(False)
    with gated(model, keep_all(model)) as gates:
        model(**batches(model)["one"]).logits.square().sum().backward()
        assert all(gate.grad is not None and bool(gate.grad.any()) for gate in gates.values())


def test_a_plan_for_another_model_is_refused_and_leaves_no_hook(tiny: Tiny, ragged: Ragged) -> None:
    model = tiny("bert")
    with pytest.raises(UsageError, match="no such site"), gated(model, ragged(tiny("gpt2"))):
        pass
    assert not hooks_of(model)

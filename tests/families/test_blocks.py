"""Family files describe every feed-forward block and every layer: each neuron's slices, and whose each tensor is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from blocks import neuron_tensors, stacks_of
from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.families.projections import Projection
from slimheads.families.sites import find_sites, linear_features, of_kind
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]


def test_every_feed_forward_block_is_a_site_of_its_width(tiny: Tiny, variety: str) -> None:
    model = tiny(variety)
    sites = of_kind(find_sites(model), "feed_forward")
    assert {site.name: site.total for site in sites} == {n: len(own) for n, own in neuron_tensors(model).items()}
    assert {site.unit for site in sites} == {"neuron"}


def test_every_layer_is_a_site(tiny: Tiny, variety: str) -> None:
    model = tiny(variety)
    layers = of_kind(find_sites(model), "layer")
    assert [s.name for s in layers] == [f"{n}.{i}" for n, stack in stacks_of(model).items() for i in range(len(stack))]
    assert {(site.unit, site.total) for site in layers} == {("layer", 1)}


def test_kinds_come_in_one_order_and_layers_of_a_stack_count_up(tiny: Tiny, variety: str) -> None:
    sites = find_sites(tiny(variety))
    assert [s.kind for s in sites] == [
        s.kind for k in ("attention", "feed_forward", "layer") for s in of_kind(sites, k)
    ]
    assert len({site.key for site in sites}) == len(sites)


def test_labels_pick_the_slices_of_each_neuron(tiny: Tiny, variety: str) -> None:
    model = tiny(variety)
    neurons = neuron_tensors(model)
    for site in of_kind(find_sites(model), "feed_forward"):
        inputs = [p for p in site.projections if not p.divides_inputs]
        for index, own in enumerate(neurons[site.name]):
            [column] = slices(model, site.output, index)
            assert torch.equal(column, own.output)
            found = [row for projection in inputs for row in slices(model, projection, index)]
            assert same_tensors(found, [tensor for tensor in (own.row, own.gate) if tensor is not None])


def slices(model: PreTrainedModel, projection: Projection, unit: int) -> torch.Tensor:
    """The features of a unit, one a row."""
    module = model.get_submodule(projection.module)
    rows = isinstance(module, torch.nn.Linear) != projection.divides_inputs
    weight = module.weight if rows else module.weight.T
    return weight[np.flatnonzero(projection.unit_of == unit)]


def same_tensors(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return sorted(tensor.tolist() for tensor in some) == sorted(tensor.tolist() for tensor in others)


def test_every_feature_of_a_feed_forward_block_is_labelled_once(tiny: Tiny, variety: str) -> None:
    model = tiny(variety)
    for site in of_kind(find_sites(model), "feed_forward"):
        for projection in site.projections:
            width = linear_features(model.get_submodule(projection.module))[0 if projection.divides_inputs else 1]
            assert len(projection.unit_of) == len(projection.role_of) == width
            assert set(projection.unit_of.tolist()) == set(range(site.total))
        assert site.projections.count(site.output) == 1


def test_a_slim_models_blocks_and_layers_are_found_as_they_are_now(
    tiny: Tiny, ragged: Callable[..., Plan], variety: str
) -> None:
    model = tiny(variety)
    plan = ragged(model)
    stacks = {name: len(stack) for name, stack in stacks_of(model).items()}
    for gone in (site for site in plan.sites if not site.kept):
        stacks[gone.site.rpartition(".")[0]] -= 1
    prune(model, plan)
    sites = find_sites(model)
    assert {name: len(stack) for name, stack in stacks_of(model).items()} == stacks
    assert len(of_kind(sites, "layer")) == sum(stacks.values())
    widths = [len(site.kept) for site in plan.sites if site.kind == "feed_forward"]
    assert [site.total for site in of_kind(sites, "feed_forward")] == widths
    assert {site.name: site.total for site in of_kind(sites, "feed_forward")} == {
        name: len(own) for name, own in neuron_tensors(model).items()
    }


def test_a_parameter_that_no_row_describes_is_refused_wherever_it_is_in_a_layer(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type)
    for stack in stacks_of(model).values():
        for module in stack[-1].modules():
            module.register_parameter("odd", torch.nn.Parameter(torch.zeros(1)))
            name = next(name for name, _ in model.named_parameters() if name.endswith(".odd"))
            # Inside a projection, a norm or MobileBERT's bottlenecks it belongs to whom that belongs to.
            owned = isinstance(module, torch.nn.Linear) or not list(module.children()) or "bottleneck" in name
            if not owned:
                with pytest.raises(ModelRefusedError, match="does not describe this tensor") as refused:
                    find_sites(model)
                assert refused.value.where == name
            del module.odd


@pytest.mark.parametrize(
    "model_type,owner",
    [("bert", "encoder.layer.1.intermediate"), ("llama", "model.layers.1.mlp"), ("bart", "model.decoder.layers.1")],
)
def test_a_norm_over_the_width_is_refused_by_name(tiny: Tiny, model_type: str, owner: str) -> None:
    """It takes its mean over the neurons that stay, so that deleting some would change what the others give."""
    model = tiny(model_type)
    model.get_submodule(owner).inner_norm = torch.nn.LayerNorm(48)
    with pytest.raises(ModelRefusedError, match="does not describe this tensor") as refused:
        find_sites(model)
    assert refused.value.where == f"{owner}.inner_norm.weight"

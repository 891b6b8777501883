"""plan.json: what is written, what is read, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.models.loading import load, save
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.surgery import prune

settings.register_profile("slimheads", max_examples=80, deadline=None, derandomize=True)
settings.load_profile("slimheads")

Tiny = Callable[..., PreTrainedModel]
Ragged = Callable[..., Plan]
NEURONS: dict[str, Any] = {"site": "h.0", "kind": "feed_forward", "unit": "neuron", "total": 9, "kept": [[0, 3], 7]}
LAYER: dict[str, Any] = {"site": "h.1", "kind": "layer", "unit": "layer", "total": 1, "kept": []}
HEADS: dict[str, Any] = {"site": "h.0.attn", "kind": "attention", "unit": "head", "total": 4, "kept": [0, 2]}


def read(*sites: dict[str, Any]) -> Plan:
    return Plan.from_json({"format": 2, "sites": list(sites)})


def test_ranges_are_inclusive() -> None:
    plan = read(HEADS, NEURONS, LAYER)
    assert [site.kept for site in plan.sites] == [(0, 2), (0, 1, 2, 3, 7), ()]
    assert plan.sites[1].removed == (4, 5, 6, 8)
    assert (plan.total, plan.removed, plan.kinds) == (14, 7, ("attention", "feed_forward", "layer"))
    assert plan.to_json() == {"format": 2, "sites": [HEADS, NEURONS, LAYER]}


@given(st.sets(st.integers(0, 60), min_size=1))
def test_kept_neurons_survive_json_in_the_fewest_ranges(kept: set[int]) -> None:
    plan = Plan((SitePlan("h.0", "neuron", 61, tuple(sorted(kept)), "feed_forward"),))
    written = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(written) == plan
    runs = 1 + sum(b != a + 1 for a, b in pairwise(sorted(kept)))
    assert len(written["sites"][0]["kept"]) == runs


def test_joint_plans_survive_json(tiny: Tiny, ragged: Ragged, model_type: str) -> None:
    plan = ragged(tiny(model_type))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    "kept",
    [
        [[0, 3], [3, 5]],  # overlap
        [[0, 3], 2],
        [[4, 5], [0, 1]],  # descending
        [[3, 0]],
        [7, [0, 2]],
        [[0, 9]],  # beyond the total
        [[9, 10]],
        [9],
        [[-1, 2]],
        [[False, True]],  # booleans
        [True],
        [[0, True]],
        [[0, 1, 2]],  # no pair
        [[0]],
        [[]],
        [["0", "3"]],
        [[0.0, 3.0]],
        [None],
        "0-3",
        [],  # a block keeps something
        [[0, 10**12]],
    ],
    ids=str,
)
def test_malformed_ranges_are_refused(kept: Any) -> None:
    with pytest.raises(UsageError):
        read(NEURONS | {"kept": kept})


@pytest.mark.parametrize(
    "changes",
    [
        {"total": 0},
        {"total": -3},
        {"total": True},
        {"total": 10**12},
        {"unit": "head"},
        {"unit": "layer"},
        {"kind": "neuron"},
        {"kind": None},
    ],
    ids=str,
)
def test_a_site_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        read(NEURONS | changes)


@pytest.mark.parametrize("kept", [[1], [0, 1], [[0, 1]], [[0, 0], 0]], ids=str)
def test_a_layer_is_one_unit(kept: Any) -> None:
    with pytest.raises(UsageError):
        read(LAYER | {"kept": kept})


def test_a_site_is_named_once_of_each_kind() -> None:
    """A block that is the layer itself shares its name with it."""
    assert len(read(HEADS, NEURONS, LAYER | {"site": "h.0", "kept": [0]}).sites) == 3
    with pytest.raises(UsageError, match="planned twice") as refused:
        read(HEADS, NEURONS, NEURONS)
    assert refused.value.where == "h.0"


@pytest.mark.parametrize("inside", [HEADS | {"site": "h.1.attn"}, NEURONS | {"site": "h.1"}], ids=["heads", "neurons"])
def test_what_is_in_a_layer_that_goes_cannot_be_planned(inside: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="in a layer that the plan drops") as refused:
        read(inside, LAYER)
    assert refused.value.where == inside["site"]
    assert len(read(inside | {"site": inside["site"].replace("1", "10")}, LAYER).sites) == 2


# --------------------------------------------------------------------------------------------------------- format 1


def old_form(plan: Plan) -> dict[str, Any]:
    """As slimheads wrote plans before there were kinds."""
    sites = [{"site": s.site, "unit": s.unit, "total": s.total, "kept": list(s.kept)} for s in plan.sites]
    return {"format": 1, "sites": sites}


def test_a_plan_of_format_1_is_read(tiny: Tiny, ragged: Ragged, model_type: str) -> None:
    plan = ragged(tiny(model_type), kinds=("attention",))
    assert Plan.from_json(json.loads(json.dumps(old_form(plan)))) == plan


@pytest.mark.parametrize(
    "data",
    [
        {"format": 1, "sites": [HEADS]},  # it knows no kinds
        {"format": 2, "sites": [{key: value for key, value in HEADS.items() if key != "kind"}]},
        {"format": 1.0, "sites": []},
        {"format": True, "sites": []},
        {"format": 3, "sites": []},
        {"sites": []},
    ],
    ids=str,
)
def test_formats_are_not_mixed(data: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan.from_json(data)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5"])
def test_a_slim_folder_of_format_1_still_loads_and_is_pruned_on(
    tiny: Tiny, ragged: Ragged, tmp_path: Path, model_type: str
) -> None:
    model = tiny(model_type)
    plan = ragged(model, kinds=("attention",))
    save(prune(model, plan), tmp_path / "slim")
    file = tmp_path / "slim" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4} if model_type == "llama" else {}
    file.write_text(json.dumps(config | {"slimheads": old_form(plan) | {"dense": heads}}), encoding="utf-8")
    loaded = load(tmp_path / "slim")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    again = ragged(model, seed=5, kinds=("feed_forward", "layer"))
    prune(loaded, again)
    prune(model, again)
    assert loaded.config.slimheads == model.config.slimheads
    assert Plan.from_json({k: v for k, v in loaded.config.slimheads.items() if k != "dense"}).sites


def test_units_of_another_kind_are_refused_in_memory_too() -> None:
    site = SitePlan("h.0", "neuron", 9, (0,), "feed_forward")
    for wrong in ({"kind": "attention"}, {"unit": "kv_group"}, {"kept": ()}, {"kept": (1, 0)}, {"kept": (9,)}):
        with pytest.raises(UsageError) as refused:
            replace(site, **wrong)
        assert refused.value.where == "h.0"

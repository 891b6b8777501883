"""Selection on small tables whose answer can be worked out by hand, and plans as files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slimheads.errors import UsageError
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.scores import Scores, SiteScores
from slimheads.pruning.select import random_plan, select


def scores_of(*rows: list[float]) -> Scores:
    return Scores("magnitude", tuple(SiteScores(f"layer.{i}", "head", tuple(row)) for i, row in enumerate(rows)))


def kept(plan: Plan) -> list[tuple[int, ...]]:
    return [site.kept for site in plan.sites]


WEAK_FIRST_LAYER = scores_of([1, 2, 3, 4], [8, 7, 6, 5], [9, 10, 11, 12])


def weakest(ratio: float, **rules: Any) -> Plan:
    """Of all layers together, by the scores as they are."""
    return select(WEAK_FIRST_LAYER, ratio, scope="global", normalize="none", **rules)


def test_global_takes_the_weakest_of_all() -> None:
    assert kept(weakest(0.25)) == [(3,), (0, 1, 2, 3), (0, 1, 2, 3)]
    assert kept(weakest(0.5)) == [(3,), (0,), (0, 1, 2, 3)]


def test_layer_is_the_default() -> None:
    assert select(WEAK_FIRST_LAYER, 0.5) == select(WEAK_FIRST_LAYER, 0.5, scope="layer")
    assert kept(select(WEAK_FIRST_LAYER, 0.5)) == [(2, 3), (0, 1), (2, 3)]


def test_layer_takes_the_weakest_of_each() -> None:
    assert kept(select(WEAK_FIRST_LAYER, 0.25, scope="layer")) == [(1, 2, 3), (0, 1, 2), (1, 2, 3)]


def test_normalize_compares_each_with_its_own_layer_and_is_the_default() -> None:
    # Divided by their means 2.5, 6.5 and 10.5 the weakest are 0.4 and 0.8 of the first layer and 0.77 of the second.
    assert kept(select(WEAK_FIRST_LAYER, 0.25, scope="global")) == [(2, 3), (0, 1, 2), (0, 1, 2, 3)]


def test_keep_at_least() -> None:
    assert kept(weakest(0.25, keep_at_least=3)) == [(1, 2, 3), (0, 1, 2), (1, 2, 3)]


def test_multiple_of_goes_in_chunks() -> None:
    assert kept(weakest(0.4, multiple_of=2)) == [(2, 3), (0, 1), (0, 1, 2, 3)]


def test_a_site_that_is_no_multiple_first_falls_to_one() -> None:
    assert kept(select(scores_of([1, 2, 3, 4, 5, 6, 7]), 0.5, multiple_of=4)) == [(3, 4, 5, 6)]


def test_equal_counts() -> None:
    assert kept(select(WEAK_FIRST_LAYER, 0.5, counts="equal")) == [(2, 3), (0, 1), (2, 3)]


def test_equal_counts_need_equal_sites() -> None:
    with pytest.raises(UsageError, match="the same number of units"):
        select(scores_of([1, 2], [1, 2, 3]), 0.5, counts="equal")


def test_one_head_too_many_says_what_can_go() -> None:
    with pytest.raises(UsageError, match=r"means 10 of 12 units.*only 9") as refused:
        weakest(0.9)
    assert "0.75" in refused.value.hint
    assert weakest(0.75).removed == 9


def test_a_ratio_below_one_head_says_what_is_enough() -> None:
    with pytest.raises(UsageError, match="removes nothing") as refused:
        weakest(0.05)
    assert "0.0834" in refused.value.hint
    assert weakest(0.0834).removed == 1


def test_floors_that_let_nothing_go_say_so() -> None:
    for ratio in (0.001, 0.5):
        with pytest.raises(UsageError) as refused:
            select(WEAK_FIRST_LAYER, ratio, keep_at_least=4)
        assert "lower" in refused.value.hint and "0" in refused.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1},
        {"ratio": -0.1},
        {"ratio": float("nan")},
        {"ratio": 0.5, "keep_at_least": 0},
        {"ratio": 0.5, "multiple_of": 0},
    ],
)
def test_options_out_of_range_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        select(WEAK_FIRST_LAYER, **options)


def test_a_plan_survives_json() -> None:
    plan = weakest(0.25)
    data = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(data) == plan
    assert data["sites"][0] == {"site": "layer.0", "kind": "attention", "unit": "head", "total": 4, "kept": [3]}


@pytest.mark.parametrize("kept_units", [(), (1, 0), (0, 0), (-1,), (4,)])
def test_a_plan_keeps_real_units_in_order(kept_units: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="of 4 units"):
        SitePlan("layer.0", "head", 4, kept_units)


SITE = {"site": "layer.0", "unit": "head", "total": 4, "kept": [0, 1]}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"format": 2, "sites": [SITE]},
        {"format": 1},
        {"format": 1, "sites": None},
        {"format": 1, "sites": ["layer.0"]},
        {"format": 1, "sites": [SITE, SITE]},
        {"format": 1, "sites": [SITE | {"unit": "heed"}]},
        {"format": 1, "sites": [SITE | {"total": "4"}]},
        {"format": 1, "sites": [SITE | {"kept": "01"}]},
        {"format": 1, "sites": [SITE | {"kept": [0.5, 1.5]}]},
        {"format": 1, "sites": [SITE | {"kept": [False, True]}]},
        {"format": 1, "sites": [SITE | {"kept": []}]},
        {"format": 1, "sites": [SITE | {"kept": [0, 9]}]},
        {"format": 1, "sites": [{"site": "layer.0"}]},
    ],
)
def test_what_is_no_plan_is_a_usage_error(data: Any) -> None:
    with pytest.raises(UsageError):
        Plan.from_json(data)


@pytest.mark.parametrize(
    "rules", [{"scope": "layer"}, {"counts": "equal"}, {"multiple_of": 2, "keep_at_least": 2}], ids=str
)
def test_a_random_plan_follows_the_rules_and_ignores_the_scores(rules: dict[str, Any]) -> None:
    controls = [random_plan(WEAK_FIRST_LAYER, seed, 0.5, **rules) for seed in range(8)]
    chosen = select(WEAK_FIRST_LAYER, 0.5, **rules)
    assert {plan.removed for plan in controls} == {chosen.removed}
    assert len(set(controls)) > 1
    shuffled = scores_of([4, 3, 2, 1], [9, 9, 9, 9], [0, 0, 0, 0])
    assert controls == [random_plan(shuffled, seed, 0.5, **rules) for seed in range(8)]
    for plan in controls:
        assert all(len(site.kept) >= rules.get("keep_at_least", 1) for site in plan.sites)
        assert all(len(site.kept) % rules.get("multiple_of", 1) == 0 for site in plan.sites)

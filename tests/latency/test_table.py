"""What a table predicts, against sums done by hand; which sites are alike, against the arithmetic they lose."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from latency_tables import kind_of, stairs, table_of
from pydantic import ValidationError
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.families.config_facts import measured_shapes
from slimheads.latency.records import Interval
from slimheads.latency.table import LatencyTable, kinds_of, measured_counts, plan_keeping, predict
from slimheads.models.flops import flops
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]


def plan_of(*counts: int, total: int = 4, name: str = "layer") -> Plan:
    return Plan(tuple(SitePlan(f"{name}.{i}", "head", total, tuple(range(kept))) for i, kept in enumerate(counts)))


# Prediction


def test_a_plan_saves_what_its_sites_save_each() -> None:
    saved = {1: 0.30, 2: 0.18, 3: 0.06, 4: 0.0}  # of the whole model, by all three layers together
    table = table_of([kind_of()], lambda _, kept: 1 - saved[kept])
    share = 1 - 0.18 / 3 - 0.0 / 3 - 0.30 / 3
    found = predict(table, plan_of(2, 4, 1))
    assert found.slim_ms == pytest.approx(10 * share)
    assert found.speedup.estimate == pytest.approx(1 / share)
    assert found.speedup.low == found.speedup.high == found.speedup.estimate


def test_kinds_save_each_their_own() -> None:
    kinds = [kind_of(2, 3, "text"), kind_of(4, 5, "image")]
    table = table_of(kinds, lambda kind, kept: 1 - (0.01 * (3 - kept) if kind == 0 else 0.04 * (5 - kept)))
    plan = Plan((*plan_of(1, 3, total=3, name="text").sites, *plan_of(5, 2, 5, 4, total=5, name="image").sites))
    share = 1 - 0.02 / 2 - (0.12 + 0.04) / 4
    assert predict(table, plan).speedup.estimate == pytest.approx(1 / share)


def test_all_layers_alike_are_read_off_the_point_itself_with_its_interval() -> None:
    table = table_of([kind_of()], lambda _, kept: 0.8 + 0.05 * kept, margin=0.02)
    found = predict(table, plan_of(2, 2, 2))
    assert found.slim_ms == pytest.approx(9.0)
    assert found.speedup.low == pytest.approx(1 / 0.92, rel=1e-3)
    assert found.speedup.high == pytest.approx(1 / 0.88, rel=1e-3)


def test_margins_of_different_points_add_as_independent_errors_do() -> None:
    table = table_of([kind_of()], lambda _, kept: 0.9, margin=0.03)
    # one point stands for two layers: twice the same error, and once another
    margin = ((2 / 3 * 0.03) ** 2 + (1 / 3 * 0.03) ** 2) ** 0.5
    found = predict(table, plan_of(1, 1, 2))
    assert found.speedup.estimate == pytest.approx(1 / 0.9)
    assert (1 / found.speedup.low - 1 / found.speedup.high) / 2 == pytest.approx(margin, rel=1e-2)
    assert predict(table, plan_of(1, 4, 4)).speedup.estimate == pytest.approx(1 / (1 - 0.1 / 3))


def test_a_point_in_doubt_is_no_surer_than_its_control() -> None:
    off = Interval(estimate=1.06, low=1.02, high=1.1)
    surer, doubtful = (
        table_of([kind_of()], lambda _, kept: 0.9, margin=0.001, **more) for more in ({}, {"control": off})
    )
    assert (surer.noisy_points, doubtful.noisy_points) == (0, 3)
    widths = [p.high - p.low for p in (predict(t, plan_of(2, 2, 2)).speedup for t in (surer, doubtful))]
    assert widths[1] > 0.2 > 0.01 > widths[0]


def test_ratio_zero_is_the_dense_model_and_no_noise_makes_it_more() -> None:
    found = predict(table_of([kind_of()], lambda _, kept: 0.7, margin=0.2), plan_of(4, 4, 4))
    assert found.speedup == Interval(estimate=1.0, low=1.0, high=1.0)
    assert found.slim_ms == found.dense_ms


@pytest.mark.parametrize(
    "plan", [plan_of(2, 2), plan_of(2, 2, 2, 2), plan_of(2, 2, 2, total=5), plan_of(2, 2, 2, name="other")], ids=str
)
def test_a_plan_of_another_model_is_refused(plan: Plan) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        predict(table_of([kind_of()], lambda _, kept: 0.9), plan)


# Which counts are measured


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8, 16])
def test_every_count_is_measured_up_to_sixteen(threads: int) -> None:
    for total in range(1, 18):
        assert measured_counts(total, 1, threads) == tuple(range(1, total))


@pytest.mark.parametrize(("total", "threads"), [(32, 1), (32, 2), (64, 4), (40, 3)])
def test_beyond_that_fewer_are_measured_and_the_stairs_survive(total: int, threads: int) -> None:
    kinds, curve = [kind_of(2, total)], stairs(total, threads, 0.01)
    assert len(kinds[0].counts(threads)) <= 16 + threads < total - 1
    table = table_of(kinds, curve, threads=threads)
    for kept in range(1, total):
        found = predict(table, plan_of(kept, kept, total=total))
        assert 1 / found.speedup.estimate == pytest.approx(curve(0, kept))


def test_counts_within_groups_are_those_that_every_group_can_keep() -> None:
    assert measured_counts(32, 8, 2) == (8, 16, 24)


# Kinds


@pytest.mark.parametrize(
    "variety,expected",
    [
        ("bert", [(3, 4)]),
        ("albert", [(4, 4)]),
        ("swin-windows", [(2, 4), (2, 8)]),
        ("clip", [(2, 4), (2, 6)]),
        ("llama", [(3, 4)]),
    ],
)
def test_sites_that_are_alike_are_one_kind(variety: str, expected: Sequence[tuple[int, int]], tiny: Tiny) -> None:
    kinds = kinds_of(tiny(variety))
    assert sorted((len(kind.sites), kind.total) for kind in kinds) == expected
    assert all(kind.step == 1 for kind in kinds)


def test_two_towers_of_the_same_sizes_are_two_kinds_for_they_see_other_lengths(tiny: Tiny) -> None:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    kinds = kinds_of(tiny("clip", vision_config=vision | {"image_size": 30, "patch_size": 6}))
    assert [(len(kind.sites), kind.total) for kind in kinds] == [(2, 4), (2, 4)]


def test_within_groups_counts_query_heads_one_of_each_group(tiny: Tiny) -> None:
    (groups,), (heads,) = (kinds_of(tiny("llama"), within) for within in (False, True))
    assert (groups.unit, groups.total, groups.step, groups.counts(2)) == ("kv_group", 4, 1, (1, 2, 3))
    assert (heads.unit, heads.total, heads.step, heads.counts(2)) == ("head", 8, 4, (4,))
    assert heads.keeping(4) == (0, 2, 4, 6)


@pytest.mark.parametrize("variety", ["bert", "albert", "swin-windows", "clip", "wavlm", "modernbert", "gpt2"])
def test_sites_of_a_kind_lose_the_same_arithmetic(variety: str, tiny: Tiny) -> None:
    dense = tiny(variety)
    shape = measured_shapes(dense.config, [(1, 12)])[0]
    for kind in (kinds := kinds_of(dense)):
        left = set()
        for site in kind.sites:
            whole = {s: SitePlan(s, k.unit, k.total, k.keeping(k.total)) for k in kinds for s in k.sites}
            whole[site] = SitePlan(site, kind.unit, kind.total, kind.keeping(1))
            left.add(flops(prune(copy.deepcopy(dense), Plan(tuple(whole.values()))), *shape))
        assert len(left) == 1 and left < {flops(dense, *shape)} | left


@pytest.mark.parametrize("variety,within", [("bert", False), ("llama", False), ("llama", True), ("clip", False)])
def test_every_point_is_a_plan_that_the_model_takes(variety: str, within: bool, tiny: Tiny) -> None:
    kinds = kinds_of(tiny(variety), within)
    for index, kind in enumerate(kinds):
        for count in kind.counts(2):
            plan = plan_keeping(kinds, index, count)
            pruned = kinds_of(prune(tiny(variety), plan), within)
            assert next(k.total for k in pruned if set(k.sites) == set(kind.sites)) == count
            assert sum(len(site.removed) for site in plan.sites) == (kind.total - count) * len(kind.sites)


# The file


def test_a_table_survives_json_and_its_fingerprint_is_of_its_content() -> None:
    table = table_of([kind_of()], lambda _, kept: 0.8 + kept / 20, made_for={"a": [1, {"b": None}]})
    again = LatencyTable.model_validate_json(table.model_dump_json())
    assert again == table and again.fingerprint() == table.fingerprint()
    other = table_of([kind_of()], lambda _, kept: 0.8 + kept / 20.1, made_for={"a": [1, {"b": None}]})
    assert other.fingerprint() != table.fingerprint()


def test_a_table_with_a_point_too_few_or_an_impossible_one_is_none() -> None:
    data = table_of([kind_of()], lambda _, kept: 0.9).model_dump()
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda d: d.update(points=d["points"][1:]),
        lambda d: d.update(points=(*d["points"], d["points"][0])),
        lambda d: d["points"][0]["share"].update(low=0.0),
        lambda d: d["points"][0]["share"].update(estimate=float("nan")),
        lambda d: d.update(dense_ms=0.0),
        lambda d: d.update(format=2),
        lambda d: d.update(more=1),
    ]
    for change in changes:
        damaged = copy.deepcopy(data)
        change(damaged)
        with pytest.raises(ValidationError):
            LatencyTable.model_validate(damaged)


def test_random_plans_agree_with_a_loop_over_their_sites() -> None:
    draw = random.Random(3)
    shares = {kept: draw.uniform(0.6, 1.0) for kept in range(1, 13)}
    table = table_of([kind_of(6, 12)], lambda _, kept: shares[kept], threads=2)
    for _ in range(50):
        counts = [draw.randint(1, 12) for _ in range(6)]
        left = 1.0
        for count in counts:
            if count < 12:
                left -= (1 - shares[count]) / 6
        assert predict(table, plan_of(*counts, total=12)).slim_ms == pytest.approx(10 * left)

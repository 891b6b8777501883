"""What a table predicts, against sums done by hand; which sites are alike, against the arithmetic they lose."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from latency_tables import kind_of, layers_of, neurons_of, stairs, table_of
from pydantic import ValidationError
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.families.config_facts import measured_shapes
from slimheads.latency.kinds import alignment, kinds_of, measured_heads, measured_layers, measured_widths
from slimheads.latency.records import Interval
from slimheads.latency.table import LatencyTable, predict
from slimheads.models.flops import flops
from slimheads.names import ALL_KINDS
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]


def plan_of(*counts: int, total: int = 4, name: str = "layer") -> Plan:
    return Plan(tuple(SitePlan(f"{name}.{i}", "head", total, tuple(range(kept))) for i, kept in enumerate(counts)))


def joint(heads: Sequence[int], widths: Sequence[int], dropped: Sequence[int] = (), *, total: int = 4) -> Plan:
    """Every site of a model of `layer.N` and `mlp.N` (128 neurons), but for what is inside of a dropped layer."""
    stay = [layer for layer in range(len(heads)) if layer not in dropped]
    return Plan(
        (
            *(SitePlan(f"layer.{i}", "head", total, tuple(range(heads[i]))) for i in stay),
            *(SitePlan(f"mlp.{i}", "neuron", 128, tuple(range(widths[i])), "feed_forward") for i in stay),
            *(SitePlan(f"layer.{i}", "layer", 1, (0,) if i in stay else (), "layer") for i in range(len(heads))),
        )
    )


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


def test_a_site_that_is_not_named_saves_nothing() -> None:
    table = table_of([kind_of()], lambda _, kept: 0.7 + kept / 20)
    assert predict(table, plan_of(2, 1)) == predict(table, plan_of(2, 1, 4))


def test_heads_neurons_and_layers_save_each_their_own() -> None:
    # 128 neurons are measured at 32, 64 and 96; 4 layers with 1, 2 and 3 of them left.
    shares = [{1: 0.82, 2: 0.88, 3: 0.93}, {32: 0.6, 64: 0.72, 96: 0.87}, {1: 0.3, 2: 0.5, 3: 0.76}]
    table = table_of([kind_of(4), neurons_of(4, 128), layers_of(4)], lambda kind, kept: shares[kind][kept])
    plan = joint([2, 4, 1, 3], [64, 128, 80, 32], dropped=[3])
    share = 1 - (0.12 + 0 + 0.18) / 4 - (0.28 + 0 + (0.28 + 0.13) / 2) / 4 - 0.24
    assert predict(table, plan).slim_ms == pytest.approx(10 * share)
    # the table knows more than the plan names
    assert predict(table, plan_of(2, 4, 1, 3)).slim_ms == pytest.approx(10 * (1 - (0.12 + 0.18 + 0.07) / 4))


@pytest.mark.parametrize(("dropped", "saved"), [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (6, 0.7), (7, 0.85)])
def test_between_measured_numbers_of_layers_savings_are_in_proportion(dropped: int, saved: float) -> None:
    left = {6: 0.8, 4: 0.6, 2: 0.3}  # of 8; a single one is as far below as the line through the last two leads
    table = table_of([layers_of(8)], lambda _, kept: left[kept])
    plan = Plan(tuple(SitePlan(f"layer.{i}", "layer", 1, () if i < dropped else (0,), "layer") for i in range(8)))
    assert predict(table, plan).slim_ms == pytest.approx(10 * (1 - saved))


def test_which_of_the_alike_layers_go_makes_no_difference() -> None:
    table = table_of([layers_of(4)], lambda _, kept: 0.2 + 0.2 * kept)
    plans = [joint([4] * 4, [128] * 4, dropped) for dropped in ([0, 1], [3, 1])]
    assert predict(table, plans[0]) == predict(table, plans[1])


@pytest.mark.parametrize("kept", [1, 16, 47, 100, 127])
def test_widths_outside_and_between_the_measured_ones_are_on_their_line(kept: int) -> None:
    table = table_of([neurons_of(2, 128)], lambda _, width: 0.4 + 0.6 * width / 128, margin=0.01)
    plan = Plan((SitePlan("mlp.0", "neuron", 128, tuple(range(kept)), "feed_forward"),))
    found = predict(table, plan)
    assert 1 / found.speedup.estimate == pytest.approx(1 - 0.6 * (128 - kept) / 128 / 2)
    assert found.speedup.low < found.speedup.estimate < found.speedup.high


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(2, 2, 2, 2),
        plan_of(2, 2, 2, total=5),
        plan_of(2, 2, 2, name="other"),
        Plan((SitePlan("layer.0", "neuron", 4, (0,), "feed_forward"),)),
        Plan((SitePlan("layer.0", "layer", 1, (), "layer"), SitePlan("layer.1", "layer", 1, (0,), "layer"))),
    ],
    ids=str,
)
def test_a_plan_of_another_model_or_of_kinds_that_were_not_measured_is_refused(plan: Plan) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        predict(table_of([kind_of()], lambda _, kept: 0.9), plan)


def test_more_layers_than_may_go_are_refused() -> None:
    table = table_of([layers_of(3, least=2)], lambda _, kept: 0.9)
    gone = [SitePlan(f"layer.{i}", "layer", 1, (), "layer") for i in range(2)]
    with pytest.raises(UsageError, match="2 of 3 layers"):
        predict(table, Plan((*gone, SitePlan("layer.2", "layer", 1, (0,), "layer"))))


# Which counts are measured


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8, 16])
def test_every_count_is_measured_up_to_sixteen(threads: int) -> None:
    for total in range(1, 18):
        assert measured_heads(total, 1, threads) == tuple(range(1, total))


@pytest.mark.parametrize(("total", "threads"), [(32, 1), (32, 2), (64, 4), (40, 3)])
def test_beyond_that_fewer_are_measured_and_the_stairs_survive(total: int, threads: int) -> None:
    kinds, curve = [kind_of(2, total)], stairs(total, threads, 0.01)
    assert len(kinds[0].counts(threads)) <= 16 + threads < total - 1
    table = table_of(kinds, curve, threads=threads)
    for kept in range(1, total):
        found = predict(table, plan_of(kept, kept, total=total))
        assert 1 / found.speedup.estimate == pytest.approx(curve(0, kept))


def test_counts_within_groups_are_those_that_every_group_can_keep() -> None:
    assert measured_heads(32, 8, 2) == (8, 16, 24)


def test_widths_are_even_and_wide_blocks_have_some_of_each_lesser_alignment() -> None:
    even = [32, 160, 288, 448, 576, 704, 832, 960, 1088, 1248, 1376, 1504]  # twelve of 47, both ends among them
    uneven = [384 - 16, 384 - 11, 384 - 8, 1536 - 16, 1536 - 11, 1536 - 8]
    assert measured_widths(1536) == tuple(sorted(even + uneven))
    assert [width for width in measured_widths(1536) if alignment(width) < 32] == sorted(uneven)
    assert (measured_widths(128), measured_widths(48), measured_widths(8)) == (
        (32, 64, 96),
        (8, 16, 24, 32, 40),
        (2, 4, 6),
    )
    assert (measured_widths(3), measured_widths(2), measured_widths(1)) == ((1, 2), (1,), ())


def test_widths_of_each_alignment_lie_on_a_line_of_their_own() -> None:
    penalty = {1: 0.05, 8: 0.02, 16: 0.01, 32: 0.0}
    table = table_of([neurons_of(1, 1536)], lambda _, width: 0.4 + 0.6 * width / 1536 + penalty[alignment(width)])
    for kept in range(1, 1536, 31):
        plan = Plan((SitePlan("mlp.0", "neuron", 1536, tuple(range(kept)), "feed_forward"),))
        share = 0.4 + 0.6 * kept / 1536 + penalty[alignment(kept)]
        assert 1 / predict(table, plan).speedup.estimate == pytest.approx(share)


@pytest.mark.parametrize(
    ("total", "least", "counts"),
    [(12, 1, (3, 6, 9)), (6, 1, (2, 3, 4)), (3, 1, (1, 2)), (2, 1, (1,)), (1, 1, ()), (1, 0, (0,)), (4, 4, ())],
)
def test_layers_are_measured_with_a_quarter_half_and_three_quarters_gone(
    total: int, least: int, counts: Sequence[int]
) -> None:
    assert measured_layers(total, least) == counts


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


def test_blocks_of_each_kind_and_the_layers_of_a_stack_are_kinds_of_their_own(tiny: Tiny) -> None:
    found = kinds_of(tiny("bert"), kinds=ALL_KINDS)
    assert [(kind.kind, kind.unit, len(kind.sites), kind.total, kind.least) for kind in found] == [
        ("attention", "head", 3, 4, 1),
        ("feed_forward", "neuron", 3, 48, 1),
        ("layer", "layer", 3, 3, 1),
    ]
    assert [kind.kind for kind in kinds_of(tiny("bert"), kinds=("layer", "attention"))] == ["attention", "layer"]
    towers = list(kinds_of(tiny("clip"), kinds=("layer",)))
    assert [(len(kind.sites), kind.total, kind.least) for kind in towers] == [(2, 2, 1), (2, 2, 1)]


@pytest.mark.parametrize(
    "variety,measured",
    [
        ("bert", [(1, 2)]),
        ("albert", [(), ()]),  # shared weights: no layer can be dropped
        ("wavlm", [(), (0, 1)]),  # the first computes the position biases; the other two may both go
        ("swin-windows", [(1,), (1,)]),  # a stack per stage
        ("qwen3_moe-sparse", [(), ()]),  # a layer's number says whether it has experts, so the last must stay
    ],
)
def test_layers_are_measured_where_they_may_be_dropped(variety: str, measured: list[Any], tiny: Tiny) -> None:
    assert [kind.counts(2) for kind in kinds_of(tiny(variety), kinds=("layer",))] == measured


@pytest.mark.parametrize("variety", ["bert", "albert", "swin-windows", "clip", "wavlm", "modernbert", "gpt2"])
def test_sites_of_a_kind_lose_the_same_arithmetic(variety: str, tiny: Tiny) -> None:
    dense = tiny(variety)
    shape = measured_shapes(dense.config, [(1, 12)])[0]
    for kind in kinds_of(dense, kinds=ALL_KINDS):
        if kind.least == kind.total:
            continue
        units, kept = (1, ()) if kind.kind == "layer" else (kind.total, kind.keeping(1))
        left = set()
        for site in kind.sites:
            # in some architectures only some layers can go alone, because a layer's number says what it does
            with suppress(UsageError) if kind.kind == "layer" else nullcontext():
                plan = Plan((SitePlan(site, kind.unit, units, kept, kind.kind),))
                left.add(flops(prune(copy.deepcopy(dense), plan), *shape))
        assert len(left) == 1 and max(left) < flops(dense, *shape)


@pytest.mark.parametrize(
    "variety,within", [("bert", False), ("llama", False), ("llama", True), ("clip", False), ("gpt2", False)]
)
def test_every_point_is_a_plan_that_the_model_takes(variety: str, within: bool, tiny: Tiny) -> None:
    for kind in kinds_of(tiny(variety), within, ALL_KINDS):
        for count in kind.counts(2):
            plan = kind.plan(count)
            pruned = kinds_of(prune(tiny(variety), plan), within, ALL_KINDS)
            assert count in [k.total for k in pruned if (k.kind, k.name) == (kind.kind, kind.name)]
            sites = 1 if kind.kind == "layer" else len(kind.sites)
            assert sum(len(site.removed) for site in plan.sites) == (kind.total - count) * sites


def test_the_last_layers_are_dropped_so_that_the_others_keep_their_numbers() -> None:
    assert [site.kept for site in layers_of(5).plan(3).sites] == [(0,), (0,), (0,), (), ()]


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
        lambda d: d.update(format=1),
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


def test_random_joint_plans_agree_with_a_loop_over_their_layers() -> None:
    draw = random.Random(4)
    heads, neurons = ({at: draw.uniform(0.7, 1.0) for at in counts} for counts in (range(1, 4), (32, 64, 96)))
    stack = {6: 0.7, 4: 0.5, 2: 0.25}  # of 8 layers
    kinds = [kind_of(8), neurons_of(8, 128), layers_of(8)]
    table = table_of(kinds, lambda kind, kept: (heads, neurons, stack)[kind][kept])
    for _ in range(50):
        dropped = draw.sample(range(8), draw.randint(0, 2))
        counts, widths = ([draw.choice(choice) for _ in range(8)] for choice in ((1, 2, 3, 4), (32, 64, 96, 128)))
        left = 1 - {0: 0.0, 1: 0.15, 2: 0.3}[len(dropped)]
        for layer in range(8):
            if layer not in dropped:
                left -= (1 - heads.get(counts[layer], 1.0)) / 8
                left -= (1 - neurons.get(widths[layer], 1.0)) / 8
        assert left > 0
        assert predict(table, joint(counts, widths, dropped)).slim_ms == pytest.approx(10 * left)

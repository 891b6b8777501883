"""`multiple_of: auto` on made-up tables: it snaps where that pays, by what the table says and no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from latency_tables import kind_of, neurons_of, stairs, table_of

from slimheads.errors import UsageError
from slimheads.latency.counts import Selection, choose_steps
from slimheads.latency.table import LatencyTable, predict
from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import Scores, SiteScores
from slimheads.pruning.select import select

LAYERS, HEADS = 4, 8
TOGETHER: dict[str, Any] = {"scope": "global", "normalize": "none"}  # so that layers keep different counts


def ascending(*starts: float) -> Scores:
    """One layer for each start: its heads rise by one."""
    rows = (tuple(start + head for head in range(HEADS)) for start in starts)
    return Scores("magnitude", tuple(SiteScores(f"layer.{i}", "head", row) for i, row in enumerate(rows)))


def choose_step(scores: Scores, rules: dict[str, Any], tables: Sequence[LatencyTable]) -> tuple[Plan, Selection]:
    """With the step of heads left open."""
    return choose_steps(scores, rules | {"multiple_of": "auto"}, tables)


# 4 + 3 + 1 + 0 of 32 heads go at a quarter: two layers are left with an odd count.
SCORES = ascending(0.0, 1.5, 3.1, 9.0)
RULES: dict[str, Any] = {"ratio": 0.25, **TOGETHER}


def table(share: Callable[[int, int], float], **more: Any) -> LatencyTable:
    return table_of([kind_of(LAYERS, HEADS)], share, **more)


def linear(_: int, kept: int) -> float:
    return 1 - 0.03 * (HEADS - kept)


def test_the_plan_to_be_snapped_has_odd_counts() -> None:
    assert [len(site.kept) for site in select(SCORES, **RULES).sites] == [4, 5, 7, 8]


@pytest.mark.parametrize("threads", [2, 4])
def test_stairs_are_snapped_to_and_as_many_heads_go(threads: int) -> None:
    steps = table(stairs(HEADS, threads, 0.03), threads=threads)
    plan, found = choose_step(SCORES, RULES, [steps])
    assert found.multiple_of == threads and found.asked == "auto" and found.reason is None
    assert all(len(site.kept) % threads == 0 for site in plan.sites)
    assert plan == select(SCORES, **RULES, multiple_of=threads)
    plain = select(SCORES, **RULES)
    assert plan.removed == plain.removed == 8 and found.kept_more == 0
    # the gain, from two predictions of whole plans
    gain = predict(steps, plain).slim_ms / predict(steps, plan).slim_ms
    assert found.predicted_gain is not None
    assert found.predicted_gain.estimate == pytest.approx(gain) and gain > 1


def test_where_every_head_costs_the_same_nothing_is_snapped() -> None:
    plan, found = choose_step(SCORES, RULES, [table(linear)])
    assert (plan, found.multiple_of, found.predicted_gain) == (select(SCORES, **RULES), 1, None)
    assert "noise" in str(found.reason)
    assert [candidate.multiple_of for candidate in found.candidates] == [1, 2, 4]


def test_of_steps_that_are_as_good_the_smallest_is_taken() -> None:
    even = ascending(0.0, 0.5, 9.0, 9.5)  # step 4 makes the same plan as step 2
    rules = RULES
    assert select(even, **rules, multiple_of=4) == select(even, **rules, multiple_of=2) == select(even, **rules)
    _, found = choose_step(even, rules, [table(stairs(HEADS, 2, 0.03))])
    assert found.multiple_of == 1
    _, found = choose_step(SCORES, RULES, [table(stairs(HEADS, 2, 0.03))])
    worth = {c.multiple_of: c.saved for c in found.candidates}
    assert worth[2] == pytest.approx(worth[4]) and found.multiple_of == 2


@pytest.mark.parametrize(("margin", "step"), [(0.001, 2), (0.08, 1)])
def test_a_gain_within_the_noise_of_the_table_is_none(margin: float, step: int) -> None:
    _, found = choose_step(SCORES, RULES, [table(stairs(HEADS, 2, 0.03), margin=margin)])
    assert found.multiple_of == step
    if step == 2:
        assert found.predicted_gain is not None and 1 < found.predicted_gain.low < found.predicted_gain.estimate


def test_a_step_that_deletes_fewer_does_not_win_by_that_alone() -> None:
    # 7 of 32 are wanted: in fours only 4 can go. A head costs the same everywhere.
    rules = RULES | {"ratio": 0.22}
    assert select(SCORES, **rules).removed == 7 and select(SCORES, **rules, multiple_of=4).removed == 4
    for scale in (0.5, 1.0, 2.0):
        _, found = choose_step(SCORES, rules, [table(lambda _, kept, s=scale: 1 - 0.03 * s * (HEADS - kept))])
        assert found.multiple_of == 1
    # On stairs of two, the seventh head saves nothing: six go, and the latency is the same.
    plan, found = choose_step(SCORES, rules, [table(stairs(HEADS, 2, 0.03))])
    assert (found.multiple_of, plan.removed, found.kept_more) == (2, 6, 1)
    assert found.predicted_gain is not None and found.predicted_gain.estimate >= 1


def test_a_step_that_runs_slower_than_no_step_is_not_taken_for_its_worth_a_head() -> None:
    # The first two heads of a layer save much, later ones little: in twos each head saves more, but far fewer go.
    scores, rules = ascending(0.0, 0.1, 0.2, 0.3), RULES | {"ratio": 0.49, "scope": "layer"}
    saved = {8: 0.0, 7: 0.05, 6: 0.20, 5: 0.22, 4: 0.24, 3: 0.25, 2: 0.26, 1: 0.27}
    _, found = choose_step(scores, rules, [table(lambda _, kept: 1 - saved[kept])])
    one, two = found.candidates
    assert (one.removed, two.removed) == (12, 8) and two.saved / two.removed > one.saved / one.removed
    assert found.multiple_of == 1


def test_shapes_count_alike() -> None:
    flat, steep = table(linear), table(stairs(HEADS, 2, 0.03), shape=(1, 128))
    plan, found = choose_step(SCORES, RULES, [flat, steep])
    assert found.multiple_of == 2
    plain = select(SCORES, **RULES)
    shares = [[predict(t, p).slim_ms / 10 for t in (flat, steep)] for p in (plain, plan)]
    assert found.predicted_gain is not None
    assert found.predicted_gain.estimate == pytest.approx(sum(shares[0]) / sum(shares[1]))


def test_steps_that_the_floors_forbid_are_left_out() -> None:
    _, found = choose_step(SCORES, RULES | {"keep_at_least": 5}, [table(linear, threads=4)])
    assert [candidate.multiple_of for candidate in found.candidates] == [1, 2, 3]


def test_ratio_zero_and_impossible_ratios_are_as_in_select() -> None:
    plan, found = choose_step(SCORES, RULES | {"ratio": 0}, [table(linear)])
    assert (plan.removed, found.multiple_of, found.reason) == (0, 1, "nothing is deleted")
    with pytest.raises(UsageError, match="the floors allow the removal of only"):
        choose_step(SCORES, RULES | {"ratio": 0.95}, [table(linear)])


def test_select_itself_takes_numbers_only() -> None:
    with pytest.raises(UsageError, match="needs a latency table"):
        select(SCORES, **RULES, multiple_of="auto")  # type: ignore[arg-type]


# Neurons

NEURONS = 512


def of_both_kinds(second: float = 77.7) -> Scores:
    """Heads as above, and two blocks whose neurons rise by one; the second block's start higher."""
    rows = (tuple(start + 1.01 * neuron for neuron in range(NEURONS)) for start in (0.0, second))
    blocks = (SiteScores(f"mlp.{i}", "neuron", row, kind="feed_forward") for i, row in enumerate(rows))
    return Scores("magnitude", (*SCORES.sites, *blocks))


def of_widths(cost: Callable[[int], float], margin: float = 0.0) -> LatencyTable:
    """Every head costs the same; a width costs what a formula says."""
    kinds = [kind_of(LAYERS, HEADS), neurons_of(2, NEURONS)]
    return table_of(kinds, lambda kind, kept: cost(kept) if kind else linear(0, kept), margin=margin)


def in_steps(step: int) -> Callable[[int], float]:
    """A width costs as much as the next multiple of `step`."""
    return lambda kept: 1 - 0.5 * (NEURONS - -(-kept // step) * step) / NEURONS


JOINT = RULES | {"ffn_ratio": 0.40625, "ffn_multiple_of": "auto"}


def widths(plan: Plan) -> list[int]:
    return [len(site.kept) for site in plan.sites if site.kind == "feed_forward"]


@pytest.mark.parametrize("step", [8, 16, 32])
def test_neurons_go_in_the_steps_that_pay_and_heads_as_they_were_told(step: int) -> None:
    scores = of_both_kinds()
    assert any(width % 8 for width in widths(select(scores, **JOINT | {"ffn_multiple_of": 1})))
    plan, found = choose_steps(scores, JOINT, [of_widths(in_steps(step), margin=0.001)])
    assert plan == select(scores, **JOINT | {"ffn_multiple_of": step})
    assert all(width % step == 0 for width in widths(plan))
    assert (found.asked, found.multiple_of, found.candidates) == (1, 1, ())
    neurons = found.feed_forward
    assert neurons is not None and (neurons.asked, neurons.multiple_of, neurons.reason) == ("auto", step, None)
    assert [candidate.multiple_of for candidate in neurons.candidates] == [1, 8, 16, 32]


@pytest.mark.parametrize("margin", [0.0, 0.03])
def test_widths_that_all_cost_alike_or_within_the_noise_are_not_snapped(margin: float) -> None:
    cost = in_steps(32) if margin else in_steps(1)
    plan, found = choose_steps(of_both_kinds(), JOINT, [of_widths(cost, margin)])
    assert found.feed_forward is not None
    assert found.feed_forward.multiple_of == 1 and "noise" in str(found.feed_forward.reason)
    assert plan == select(of_both_kinds(), **JOINT | {"ffn_multiple_of": 1})


def test_a_block_keeps_32_neurons_where_single_ones_may_go() -> None:
    scores, rules = of_both_kinds(second=1e6), JOINT | {"ffn_ratio": 0.495}  # 506 of 1,024, nearly all of one block
    assert widths(select(scores, **rules | {"ffn_multiple_of": 1})) == [NEURONS - 506, NEURONS]
    plan, found = choose_steps(scores, rules, [of_widths(in_steps(1))])
    assert found.feed_forward is not None and found.feed_forward.multiple_of == 1
    assert widths(plan) == [32, NEURONS - (506 - (NEURONS - 32))]


def test_both_steps_may_be_left_open_and_neither_depends_on_the_other() -> None:
    kinds, heads = [kind_of(LAYERS, HEADS), neurons_of(2, NEURONS)], stairs(HEADS, 2, 0.03)
    tables = [table_of(kinds, lambda kind, kept: in_steps(16)(kept) if kind else heads(0, kept))]
    plan, found = choose_steps(of_both_kinds(), JOINT | {"multiple_of": "auto"}, tables)
    alone = choose_step(SCORES, RULES, [table(heads)])[1]
    assert found.feed_forward is not None and (found.multiple_of, found.feed_forward.multiple_of) == (2, 16)
    assert [(c.multiple_of, c.removed) for c in found.candidates] == [
        (c.multiple_of, c.removed) for c in alone.candidates
    ]
    assert [c.saved for c in found.candidates] == pytest.approx([c.saved for c in alone.candidates])
    assert plan == select(of_both_kinds(), **JOINT | {"multiple_of": 2, "ffn_multiple_of": 16})


def test_where_no_neurons_go_nothing_is_said_of_them() -> None:
    assert choose_step(SCORES, RULES, [table(linear)])[1].feed_forward is None
    assert choose_steps(SCORES, RULES, [])[1] == Selection(asked=1, multiple_of=1)

"""`multiple_of: auto` on made-up tables: it snaps where that pays, by what the table says and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from latency_tables import kind_of, stairs, table_of

from slimheads.errors import UsageError
from slimheads.latency.head_counts import choose_step
from slimheads.latency.table import LatencyTable, predict
from slimheads.pruning.scores import Scores, SiteScores
from slimheads.pruning.select import select

LAYERS, HEADS = 4, 8


def ascending(*starts: float) -> Scores:
    """One layer for each start: its heads rise by one."""
    rows = (tuple(start + head for head in range(HEADS)) for start in starts)
    return Scores("magnitude", tuple(SiteScores(f"layer.{i}", "head", row) for i, row in enumerate(rows)))


# 4 + 3 + 1 + 0 of 32 heads go at a quarter: two layers are left with an odd count.
SCORES = ascending(0.0, 1.5, 3.1, 9.0)
RULES: dict[str, Any] = {"ratio": 0.25}


def table(share: Callable[[int, int], float], **more: Any) -> LatencyTable:
    return table_of([kind_of(LAYERS, HEADS)], share, **more)


def linear(_: int, kept: int) -> float:
    return 1 - 0.03 * (HEADS - kept)


def test_the_plan_to_be_snapped_has_odd_counts() -> None:
    assert [len(site.kept) for site in select(SCORES, 0.25).sites] == [4, 5, 7, 8]


@pytest.mark.parametrize("threads", [2, 4])
def test_stairs_are_snapped_to_and_as_many_heads_go(threads: int) -> None:
    steps = table(stairs(HEADS, threads, 0.03), threads=threads)
    plan, found = choose_step(SCORES, RULES, [steps])
    assert found.multiple_of == threads and found.asked == "auto" and found.reason is None
    assert all(len(site.kept) % threads == 0 for site in plan.sites)
    assert plan == select(SCORES, 0.25, multiple_of=threads)
    plain = select(SCORES, 0.25)
    assert plan.removed == plain.removed == 8 and found.kept_more == 0
    # the gain, from two predictions of whole plans
    gain = predict(steps, plain).slim_ms / predict(steps, plan).slim_ms
    assert found.predicted_gain is not None
    assert found.predicted_gain.estimate == pytest.approx(gain) and gain > 1


def test_where_every_head_costs_the_same_nothing_is_snapped() -> None:
    plan, found = choose_step(SCORES, RULES, [table(linear)])
    assert (plan, found.multiple_of, found.predicted_gain) == (select(SCORES, 0.25), 1, None)
    assert "noise" in str(found.reason)
    assert [candidate.multiple_of for candidate in found.candidates] == [1, 2, 4]


def test_of_steps_that_are_as_good_the_smallest_is_taken() -> None:
    even = ascending(0.0, 0.5, 9.0, 9.5)  # step 4 makes the same plan as step 2
    rules = {"ratio": 0.25}
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
    rules = {"ratio": 0.22}
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
    scores, rules = ascending(0.0, 0.1, 0.2, 0.3), {"ratio": 0.49, "scope": "layer"}
    saved = {8: 0.0, 7: 0.05, 6: 0.20, 5: 0.22, 4: 0.24, 3: 0.25, 2: 0.26, 1: 0.27}
    _, found = choose_step(scores, rules, [table(lambda _, kept: 1 - saved[kept])])
    one, two = found.candidates
    assert (one.removed, two.removed) == (12, 8) and two.saved / two.removed > one.saved / one.removed
    assert found.multiple_of == 1


def test_shapes_count_alike() -> None:
    flat, steep = table(linear), table(stairs(HEADS, 2, 0.03), shape=(1, 128))
    plan, found = choose_step(SCORES, RULES, [flat, steep])
    assert found.multiple_of == 2
    plain = select(SCORES, 0.25)
    shares = [[predict(t, p).slim_ms / 10 for t in (flat, steep)] for p in (plain, plan)]
    assert found.predicted_gain is not None
    assert found.predicted_gain.estimate == pytest.approx(sum(shares[0]) / sum(shares[1]))


def test_steps_that_the_floors_forbid_are_left_out() -> None:
    _, found = choose_step(SCORES, {"ratio": 0.25, "keep_at_least": 5}, [table(linear, threads=4)])
    assert [candidate.multiple_of for candidate in found.candidates] == [1, 2, 3]


def test_ratio_zero_and_impossible_ratios_are_as_in_select() -> None:
    plan, found = choose_step(SCORES, {"ratio": 0}, [table(linear)])
    assert (plan.removed, found.multiple_of, found.reason) == (0, 1, "nothing is deleted")
    with pytest.raises(UsageError, match="the floors allow the removal of only"):
        choose_step(SCORES, {"ratio": 0.95}, [table(linear)])


def test_select_itself_takes_numbers_only() -> None:
    with pytest.raises(UsageError, match="needs a latency table"):
        select(SCORES, 0.25, multiple_of="auto")  # type: ignore[arg-type]

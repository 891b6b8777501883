"""What every plan must satisfy, whatever the scores: generated scores, ratios and floors against plain oracles."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from slimheads.errors import UsageError
from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import Scores, SiteScores
from slimheads.pruning.select import select

settings.register_profile("slimheads", max_examples=80, deadline=None, derandomize=True)
settings.load_profile("slimheads")

# Few distinct values make ties common; the others are what real norms look like.
VALUES = st.one_of(st.sampled_from([0.0, 0.1, 0.8275, 1.0]), st.floats(1e-6, 100.0))
RATIOS = st.integers(0, 99).map(lambda percent: percent / 100)


def table(sizes: st.SearchStrategy[list[int]]) -> st.SearchStrategy[Scores]:
    return sizes.flatmap(
        lambda counts: st.tuples(*(st.lists(VALUES, min_size=n, max_size=n) for n in counts)).map(scores_of)
    )


def scores_of(rows: Any) -> Scores:
    sites = (SiteScores(f"layer.{index}", "head", tuple(row)) for index, row in enumerate(rows))
    return Scores("magnitude", tuple(sites))


RAGGED = table(st.lists(st.integers(1, 12), min_size=1, max_size=5))
EVEN = table(st.tuples(st.integers(1, 5), st.integers(1, 16)).map(lambda shape: [shape[1]] * shape[0]))
OPTIONS = st.fixed_dictionaries(
    {
        "scope": st.sampled_from(["global", "layer"]),
        "normalize": st.sampled_from(["none", "layer"]),
        "keep_at_least": st.integers(1, 5),
        "multiple_of": st.integers(1, 7),
    }
)

ALL: dict[str, Any] = {"scope": "global", "normalize": "none"}


def removed(plan: Plan) -> set[tuple[int, int]]:
    return {(index, unit) for index, site in enumerate(plan.sites) for unit in site.removed}


def attempt(scores: Scores, ratio: float, **options: Any) -> Plan:
    """The plan, or a rejected example where the floors forbid this ratio."""
    try:
        return select(scores, ratio, **options)
    except UsageError:
        assume(False)
        raise


@given(RAGGED, RATIOS, st.sampled_from(["none", "layer"]))
def test_global_plans_equal_brute_force(scores: Scores, ratio: float, normalize: Any) -> None:
    plan = attempt(scores, ratio, scope="global", normalize=normalize)
    ranked = []
    for index, site in enumerate(scores.sites):
        mean = math.fsum(site.scores) / len(site.scores)
        scale = mean if normalize == "layer" and mean > 0 else 1.0
        order = sorted((value, unit) for unit, value in enumerate(site.scores))
        ranked += [(value / scale, index, value, unit) for value, unit in order[:-1]]  # the strongest stays
    wanted = int(Fraction(str(ratio)) * sum(len(site.scores) for site in scores.sites))
    assert removed(plan) == {(index, unit) for _, index, _, unit in sorted(ranked)[:wanted]}


@given(RAGGED, RATIOS)
def test_layer_plans_equal_brute_force(scores: Scores, ratio: float) -> None:
    plan = attempt(scores, ratio, scope="layer")
    for site, planned in zip(scores.sites, plan.sites, strict=True):
        order = sorted(range(len(site.scores)), key=lambda unit: (site.scores[unit], unit))
        wanted = int(Fraction(str(ratio)) * len(order))
        assert planned.kept == tuple(sorted(order[wanted:]))


@given(RAGGED, RATIOS)
def test_exactly_the_floor_of_ratio_times_units_go(scores: Scores, ratio: float) -> None:
    plan = attempt(scores, ratio, scope="global")
    assert plan.removed == (round(ratio * 100) * plan.total) // 100


@given(RAGGED, RATIOS, OPTIONS)
@example(scores_of([[0.8275] * 15]), 0.5, {"multiple_of": 7})
def test_floors_hold(scores: Scores, ratio: float, options: dict[str, Any]) -> None:
    plan = attempt(scores, ratio, **options)
    assert plan.removed <= ratio * plan.total + 1e-9
    for site in plan.sites:
        assert len(site.kept) >= 1
        if site.removed:
            assert len(site.kept) % options.get("multiple_of", 1) == 0
            assert len(site.kept) >= options.get("keep_at_least", 1)


@given(RAGGED, RATIOS, RATIOS, OPTIONS)
def test_a_larger_ratio_removes_all_that_a_smaller_one_does(
    scores: Scores, one: float, other: float, options: dict[str, Any]
) -> None:
    small, large = attempt(scores, min(one, other), **options), attempt(scores, max(one, other), **options)
    assert removed(small) <= removed(large)


@given(RAGGED, RATIOS, OPTIONS)
def test_within_a_site_the_weakest_go_first_and_ties_by_index(
    scores: Scores, ratio: float, options: dict[str, Any]
) -> None:
    plan = attempt(scores, ratio, **options)
    for site, planned in zip(scores.sites, plan.sites, strict=True):
        order = sorted(range(planned.total), key=lambda unit: (site.scores[unit], unit))
        assert set(planned.removed) == set(order[: len(planned.removed)])


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), RATIOS)
def test_equal_scores_go_by_site_and_unit(sizes: list[int], ratio: float) -> None:
    plan = attempt(scores_of([[1.0] * size for size in sizes]), ratio, scope="global")
    free = [(index, unit) for index, size in enumerate(sizes) for unit in range(size - 1)]
    assert removed(plan) == set(free[: plan.removed])


@given(EVEN, RATIOS, OPTIONS)
def test_equal_counts_are_equal(scores: Scores, ratio: float, options: dict[str, Any]) -> None:
    plan = attempt(scores, ratio, counts="equal", **options)
    assert len({len(site.kept) for site in plan.sites}) == 1


@given(RAGGED, OPTIONS)
def test_ratio_0_keeps_all(scores: Scores, options: dict[str, Any]) -> None:
    assert removed(select(scores, 0, **options)) == set()


@given(RAGGED, RATIOS, st.integers(-20, 20))
def test_scaling_all_scores_changes_nothing(scores: Scores, ratio: float, power: int) -> None:
    scaled = scores_of([[value * 2.0**power for value in site.scores] for site in scores.sites])
    assert removed(attempt(scores, ratio, **ALL)) == removed(attempt(scaled, ratio, **ALL))


@given(RAGGED, RATIOS, st.integers(1, 20))
def test_normalize_ignores_the_scale_of_one_site(scores: Scores, ratio: float, power: int) -> None:
    rows = [list(site.scores) for site in scores.sites]
    scaled = scores_of([[value * 2.0**power for value in rows[0]], *rows[1:]])
    one, other = (attempt(each, ratio, scope="global", normalize="layer") for each in (scores, scaled))
    assert removed(one) == removed(other)


@given(RAGGED, st.floats(0.0, 0.99999), OPTIONS, st.sampled_from(["any", "equal"]))
@example(scores_of([[1.0] * 12]), 0.001, {"keep_at_least": 12}, "any")  # nothing may go, and nothing is asked
@example(scores_of([[1.0] * 4, [1.0] * 12]), 0.01, {"scope": "layer", "multiple_of": 4, "keep_at_least": 2}, "any")
@example(scores_of([[1.0] * 4, [2.0] * 3]), 0.2, ALL | {"multiple_of": 2}, "any")  # the first chunk is not the smallest
@example(scores_of([[1.0] * 12, [1.0] * 2]), 0.95, {"scope": "layer"}, "any")  # the second site is the narrow one
@example(scores_of([[1.0] * 12]), 0.5, {"keep_at_least": 11}, "any")  # 1/12 rounded down would be no ratio at all
def test_a_refused_ratio_is_answered_with_one_that_works(
    scores: Scores, ratio: float, options: dict[str, Any], counts: Any
) -> None:
    even = len({len(site.scores) for site in scores.sites}) == 1
    assume(counts == "any" or even)
    try:
        select(scores, ratio, counts=counts, **options)
    except UsageError as error:
        stated = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", error.hint)]
        assert stated, error.hint
        plan = select(scores, stated[0], counts=counts, **options)
        assert plan.removed > 0 or stated[0] == 0


def test_a_tie_across_a_rounding_error_is_still_a_tie() -> None:
    # The mean of seven equal scores can come out one bit below the score itself.
    value = next(v / 997 for v in range(1, 997) if math.fsum([v / 997] * 7) / 7 < v / 997)
    plan = select(scores_of([[value] * 15]), 0.5, multiple_of=7)
    assert len(plan.sites[0].kept) == 14


def test_a_written_ratio_means_its_decimal() -> None:
    scores = scores_of([[float(unit) for unit in range(100)]])
    for percent in range(1, 100):
        assert select(scores, percent / 100).removed == percent, percent

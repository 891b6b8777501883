"""Selection over heads, neurons and layers at once: generated scores of whole models against plain oracles."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slimheads.errors import UsageError
from slimheads.names import SiteKind
from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import Scores, SiteScores
from slimheads.pruning.select import random_plan, select

settings.register_profile("slimheads", max_examples=80, deadline=None, derandomize=True)
settings.load_profile("slimheads")

UNITS: dict[SiteKind, Any] = {"attention": "head", "feed_forward": "neuron", "layer": "layer"}
VALUES = st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.floats(1e-6, 100.0))
SHARES = st.integers(0, 90).map(lambda percent: percent / 100)


def units(most: int) -> st.SearchStrategy[list[float]]:
    return st.lists(VALUES, min_size=1, max_size=most)


Layer = tuple[list[float], list[float], float]  # heads, neurons, and the layer itself
MODELS: st.SearchStrategy[list[Layer]] = st.lists(st.tuples(units(6), units(40), VALUES), min_size=1, max_size=4)
RULES = st.fixed_dictionaries(
    {
        "scope": st.sampled_from(["global", "layer"]),
        "normalize": st.sampled_from(["none", "layer"]),
        "keep_at_least": st.integers(1, 3),
        "multiple_of": st.integers(1, 3),
        "ffn_multiple_of": st.integers(1, 12),
    }
)


def scores_of(model: list[Layer], *kinds: SiteKind) -> Scores:
    rows = [
        *(("attention", f"h.{index}.attn", heads) for index, (heads, _, _) in enumerate(model)),
        *(("feed_forward", f"h.{index}", neurons) for index, (_, neurons, _) in enumerate(model)),
        *(("layer", f"h.{index}", [value]) for index, (_, _, value) in enumerate(model)),
    ]
    wanted = kinds or tuple(UNITS)
    return Scores("s", tuple(SiteScores(n, UNITS[k], tuple(own), kind=k) for k, n, own in rows if k in wanted))


def attempt(scores: Scores, **options: Any) -> Plan:
    """The plan, or a rejected example where the floors forbid a ratio."""
    try:
        return select(scores, **options)
    except UsageError:
        assume(False)
        raise


def removed(plan: Plan, kind: SiteKind) -> set[tuple[str, int]]:
    return {(site.site, unit) for site in plan.of_kind(kind).sites for unit in site.removed}


@given(MODELS, SHARES, SHARES, RULES)
def test_kinds_do_not_influence_each_other(
    model: list[Layer], ratio: float, ffn_ratio: float, rules: dict[str, Any]
) -> None:
    plan = attempt(scores_of(model), ratio=ratio, ffn_ratio=ffn_ratio, **rules)
    heads = select(scores_of(model, "attention"), ratio, **rules)
    assert plan.of_kind("attention") == heads
    if not ffn_ratio:
        assert plan == heads
        return
    # Neurons are chosen as heads with the same scores would be, with their own floor.
    step = rules["ffn_multiple_of"]
    alike = Scores("s", tuple(SiteScores(f"h.{i}", "head", tuple(own)) for i, (_, own, _) in enumerate(model)))
    chosen = select(alike, ffn_ratio, rules["scope"], rules["normalize"], keep_at_least=step, multiple_of=step)
    neurons = plan.of_kind("feed_forward").sites
    assert [(site.site, site.kept) for site in neurons] == [(site.site, site.kept) for site in chosen.sites]


@given(MODELS, SHARES, RULES)
def test_floors_of_feed_forward_blocks_hold(model: list[Layer], ffn_ratio: float, rules: dict[str, Any]) -> None:
    plan = attempt(scores_of(model), ratio=0, ffn_ratio=ffn_ratio, **rules)
    total = sum(len(neurons) for _, neurons, _ in model)
    assert len(removed(plan, "feed_forward")) <= Fraction(str(ffn_ratio)) * total
    for site in plan.of_kind("feed_forward").sites:
        if site.removed:
            assert len(site.kept) % rules["ffn_multiple_of"] == 0 and len(site.kept) >= rules["ffn_multiple_of"]


@given(MODELS, SHARES, SHARES, RULES)
def test_a_larger_ratio_removes_all_neurons_that_a_smaller_one_does(
    model: list[Layer], one: float, other: float, rules: dict[str, Any]
) -> None:
    scores, (less, more) = scores_of(model), sorted((one, other))
    small, large = (attempt(scores, ratio=0, ffn_ratio=share, **rules) for share in (less, more))
    assert removed(small, "feed_forward") <= removed(large, "feed_forward")


@given(MODELS, SHARES, st.sampled_from(["none", "layer"]))
def test_neurons_of_all_blocks_go_by_brute_force(model: list[Layer], ffn_ratio: float, normalize: Any) -> None:
    scores = scores_of(model)
    plan = attempt(scores, ratio=0, ffn_ratio=ffn_ratio, scope="global", normalize=normalize, ffn_multiple_of=1)
    ranked = []
    for index, (_, neurons, _) in enumerate(model):
        mean = sum(map(Fraction, neurons)) / len(neurons)
        scale = float(mean) if normalize == "layer" and mean > 0 else 1.0
        order = sorted((value, unit) for unit, value in enumerate(neurons))
        ranked += [(value / scale, index, value, unit) for value, unit in order[:-1]]  # the strongest stays
    wanted = int(Fraction(str(ffn_ratio)) * sum(len(neurons) for _, neurons, _ in model))
    expected = {(f"h.{index}", unit) for _, index, _, unit in sorted(ranked)[:wanted]}
    assert removed(plan, "feed_forward") == expected


@given(MODELS, st.integers(1, 3), st.sampled_from([0, 0.5]), st.sampled_from([0, 0.3, 0.6]), st.integers(1, 3))
def test_layers_go_first_and_what_is_in_them_is_not_counted(
    model: list[Layer], most: int, ratio: float, ffn_ratio: float, step: int
) -> None:
    drop, rules = min(most, len(model) - 1), {"scope": "global", "ffn_multiple_of": step}
    assume(drop)
    plan = attempt(scores_of(model), ratio=ratio, ffn_ratio=ffn_ratio, drop_layers=drop, **rules)
    gone = sorted(range(len(model)), key=lambda index: (model[index][2], index))[:drop]
    assert [index for index, site in enumerate(plan.of_kind("layer").sites) if not site.kept] == sorted(gone)
    staying = scores_of(model, "attention", "feed_forward")
    left = tuple(s for s in staying.sites if int(s.site.split(".")[1]) not in gone)
    alone = select(Scores("s", left), ratio, ffn_ratio=ffn_ratio, **rules)
    assert plan.sites[: len(alone.sites)] == alone.sites
    assert len(plan.sites) == len(alone.sites) + len(model)


def test_a_plan_names_what_it_may_touch_and_no_more() -> None:
    scores = scores_of([([1, 2, 3], [4, 5, 6, 7], 1.0), ([3, 2, 1], [7, 6, 5, 4], 2.0)])
    assert select(scores, 0.4).kinds == ("attention",)
    assert select(scores, 0.4, ffn_ratio=0.5, ffn_multiple_of=2).kinds == ("attention", "feed_forward")
    assert select(scores, 0.4, drop_layers=1).kinds == ("attention", "layer")
    whole = select(scores, 0, ffn_ratio=0.5, ffn_multiple_of=2, drop_layers=1)
    assert [(site.kind, site.site, site.kept) for site in whole.sites] == [
        ("attention", "h.1.attn", (0, 1, 2)),
        ("feed_forward", "h.1", (0, 1)),
        ("layer", "h.0", ()),
        ("layer", "h.1", (0,)),
    ]


def test_equal_counts_are_equal_in_each_kind() -> None:
    scores = scores_of([([1, 2, 3, 4], [1.0] * 64, 1.0), ([9, 8, 7, 6], [9.0] * 64, 2.0)])
    plan = select(scores, 0.5, ffn_ratio=0.5, counts="equal", scope="global")
    assert [len(site.kept) for site in plan.sites] == [2, 2, 32, 32]


def test_each_stack_keeps_a_layer_and_more_is_refused_with_what_can_go() -> None:
    said = {"encoder.0": 1.0, "encoder.1": 2.0, "decoder.0": 8.0, "decoder.1": 9.0}
    layers = [SiteScores(name, "layer", (score,), kind="layer") for name, score in said.items()]
    scores = Scores("s", (SiteScores("decoder.1.attn", "head", (1.0, 2.0)), *layers))
    plan = select(scores, 0, drop_layers=2)
    assert [site.site for site in plan.sites if not site.kept] == ["encoder.0", "decoder.0"]
    with pytest.raises(UsageError, match="only 2 can go") as refused:
        select(scores, 0, drop_layers=3)
    assert refused.value.keys == ("select.drop_layers",)


def test_layers_without_scores_cannot_be_chosen() -> None:
    scores = scores_of([([1, 2], [1, 2], 0.0)], "attention", "feed_forward")
    with pytest.raises(UsageError, match="layers have no score") as refused:
        select(scores, 0.5, drop_layers=1)
    assert refused.value.keys == ("select.drop_layers", "score.method")


def test_a_random_plan_of_all_kinds_has_the_size_of_the_chosen_one() -> None:
    scores = scores_of([([float(i), 2, 3, 4], [float(j) for j in range(64)], float(i)) for i in range(3)])
    rules = {"ffn_ratio": 0.5, "drop_layers": 1}
    chosen, drawn = select(scores, 0.25, **rules), {random_plan(scores, seed, 0.25, **rules) for seed in range(6)}
    assert len(drawn) > 1 and {plan.removed for plan in drawn} == {chosen.removed}

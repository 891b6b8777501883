"""Which graph ships: the fastest that is proven, and never by noise."""

from __future__ import annotations

from typing import Any

import pytest

from slimheads.bench import Interval
from slimheads.treatments import MIN_GAIN, Treatment, choices, choose


def row(treatment: str, on_slim: float | None, verdict: str = "faster", **more: Any) -> Treatment:
    ratio = None if on_slim is None else Interval(estimate=on_slim, low=on_slim - 0.01, high=on_slim + 0.01)
    fields: dict[str, Any] = {
        "treatment": treatment,
        "kind": "candidate",
        "provider": "cpu",
        "threads": 2,
        "graph": None,
        "shape": (1, 128),
        "deletion": ratio,
        "on_dense": ratio,
        "on_slim": ratio,
        "whole": ratio,
        "verdict": verdict,
    }
    return Treatment(**fields | more)


@pytest.mark.parametrize(
    ("rows", "ships"),
    [
        ([], "plain"),
        ([row("fused", 1.05), row("optimized", 1.10)], "optimized"),
        ([row("fused", 1.05, shape=(1, 16)), row("fused", 1.0, "no difference shown")], "fused"),
        ([row("fused", 1.30, shape=(1, 16)), row("fused", 0.98, "slower")], "plain"),
        ([row("fused", 1.30, shape=(1, 16)), row("fused", 1.2, "inconclusive", reason="noise")], "plain"),
        ([row("fused", 1.30, shape=(1, 16)), row("fused", None, "not measured", reason="no memory")], "plain"),
        ([row("fused", 1.20, "no difference shown")], "plain"),
        ([row("fused", MIN_GAIN - 0.001)], "plain"),
        ([row("int8", 2.4, kind="precision")], "plain"),
    ],
)
def test_another_graph_than_the_plain_one_ships_only_where_it_is_shown_to_be_faster(
    rows: list[Treatment], ships: str
) -> None:
    chosen, reasons = choose(rows)
    assert chosen == ships
    assert set(reasons) == {one.treatment for one in rows if one.kind == "candidate"}


def test_every_candidate_has_its_fate_and_exactly_one_ships() -> None:
    found = choices(
        {"optimized": None, "fused": None, "rewritten": "it changes nothing in this graph"},
        {"optimized": None, "fused": "layer 1 says num_heads 12, the plan 6"},
        [row("optimized", 1.05)],
    )
    assert [(one.candidate, one.built, one.proven, one.ships) for one in found] == [
        ("plain", True, True, False),
        ("optimized", True, True, True),
        ("fused", True, False, False),
        ("rewritten", False, None, False),
    ]
    assert [one.reason for one in found] == [
        "optimized ships, 1.050x the plain graph's speed",
        "1.050x the plain graph's speed",
        "layer 1 says num_heads 12, the plan 6",
        "it changes nothing in this graph",
    ]

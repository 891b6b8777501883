"""Which graph ships: the fastest that is proven, and never by noise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import psutil
import pytest
from whole_runs import checkpoint, measured, report_of, slimheads, steady, write_recipe

from slimheads.latency.attribution import Ratio, Treatment, lacking_memory
from slimheads.latency.graph_choice import MIN_GAIN, choose_graph, graph_choices
from slimheads.latency.records import Interval
from slimheads.pipeline.stages import bench as bench_stage
from slimheads.runtime.onnx_signature import nodes_of


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
    choice = choose_graph(rows)
    assert choice.ships == ships
    assert set(choice.reasons) == {one.treatment for one in rows if one.kind == "candidate"}


def test_every_candidate_has_its_fate_and_exactly_one_ships() -> None:
    found = graph_choices(
        {"optimized": None, "fused": None, "rewritten": "it changes nothing in this graph"},
        {"optimized": None, "fused": "layer 1 says num_heads 12, the plan 6"},
        choose_graph([row("optimized", 1.05)]),
    )
    assert [(one.candidate, one.built, one.proven, one.ships) for one in found] == [
        ("plain", True, True, False),
        ("optimized", True, True, True),
        ("fused", True, False, False),
        ("rewritten", False, None, False),
    ]
    assert [one.reason for one in found] == [
        "optimized ships, 1.050x vs. plain export",
        "1.050x vs. plain export",
        "layer 1 says num_heads 12, the plan 6",
        "it changes nothing in this graph",
    ]


def operators(path: Path) -> set[str]:
    return {node.op_type for node in nodes_of(onnx.load(str(path)).graph)}


def test_the_graph_that_gains_most_ships_with_its_own_proof_and_is_compared_with_its_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch, gains={"fused": 1.05, "attention": 1.20})
    out = tmp_path / "out"
    names = ["plain", "attention", "fused"]
    recipe = write_recipe(tmp_path / "r.yaml", export={"precisions": ["fp32", "int8"], "candidates": names})
    ended = slimheads("run", recipe, "--out", out)
    assert ended.code == 0, ended.err
    report = report_of(out)
    assert [(one["candidate"], one["ships"]) for one in report["candidates"]] == [
        ("plain", False),
        ("attention", True),
        ("fused", False),
    ]
    for side in ("dense", "slim"):
        path = out / side / "onnx" / "model.onnx"
        assert "Attention" in operators(path) and "SkipLayerNormalization" not in operators(path)
        assert report["model"][side]["bytes"] == path.stat().st_size == report["files"][f"{side}/onnx/model.onnx"]
    assert [(row["precision"], row["candidate"], row["ships"]) for row in report["latency"]] == [
        ("fp32", "attention", True),
        ("fp32", "plain", False),
        ("int8", "plain", True),
    ]
    assert [(row["treatment"], row["kind"]) for row in report["treatments"]] == [
        ("attention", "candidate"),
        ("int8", "precision"),
        ("fused", "candidate"),
    ]
    subjects = {link["subject"] for link in report["certificate"]}
    assert {"onnx/model.onnx (attention)", "dense/onnx/model.onnx (attention)", "onnx/model.onnx (plain)"} <= subjects
    page = (out / "report.md").read_text()
    said = "Shipped graph: attention (1.200x vs. plain export when chosen, 1.200x when measured again)."
    assert said in page
    assert "fp32 (attention), cpu, 1 thread" in page and "fp32 (plain, does not ship), cpu, 1 thread" in page


def test_the_graph_that_ships_is_reported_and_judged_by_a_measurement_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused graph is lucky when it is chosen; what counts is how it does afterwards."""
    steady(monkeypatch, estimate=1.10, gains={"fused": 1.30})
    lucky, times = bench_stage.attribute, list[Path]()

    def sobering(*files: Path, **options: Any) -> Any:
        found = lucky(*files, **options)
        times.append(files[3])
        if len(times) % 2:
            return [one.model_copy(update={"latency": measured("faster", 1.90)}) for one in found]
        less = Ratio(interval=Interval(estimate=1.02, low=1.01, high=1.03), verdict="faster")
        return [one.model_copy(update={"latency": measured("faster", 1.20), "on_slim": less}) for one in found]

    monkeypatch.setattr(bench_stage, "attribute", sobering)
    export, out = {"candidates": ["plain", "fused"]}, tmp_path / "out"
    recipe = write_recipe(tmp_path / "r.yaml", export=export, gates={"latency_ratio": 1 / 1.15})
    ended = slimheads("run", recipe, "--out", out)
    assert ended.code == 0, ended.err  # the plain graph's 1.10 would not do
    assert len(times) == 2 and len(set(times)) == 1
    report = report_of(out)
    rows = [(row["candidate"], row["ships"], row["speedup"]["estimate"]) for row in report["latency"]]
    assert rows == [("fused", True, 1.20), ("plain", False, 1.10)]
    (given,) = report["treatments"]
    assert given["on_slim"]["estimate"] == 1.02
    (foreseen,) = report["predictions"]
    assert foreseen["measured"] == 1.10, "tables are made of plain graphs, so predictions are held against those"
    assert "1.300x vs. plain export when chosen, 1.020x" in (out / "report.md").read_text()
    recipe = write_recipe(tmp_path / "r.yaml", export=export, gates={"latency_ratio": 1 / 1.25})
    assert slimheads("run", recipe, "--out", out).code == 7  # the lucky 1.90 is not what counts


def test_a_graph_that_the_certificate_refuses_is_not_even_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime cannot run the rotary embedding that its own optimizer makes of Gemma's at a batch of four."""
    steady(monkeypatch, gains={"fused": 3.0})
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint("gemma"), export={"candidates": ["plain", "fused"]})
    assert slimheads("run", recipe, "--out", tmp_path / "out").code == 0
    report = report_of(tmp_path / "out")
    plain, fused = report["candidates"]
    assert plain["ships"] and not fused["ships"] and fused["built"] and fused["proven"] is False
    assert "link 3" in fused["reason"] and report["treatments"] == []


def test_treatments_of_a_model_that_is_too_large_for_five_sessions_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / str(number) for number in range(4)]
    for file in files:
        file.write_bytes(bytes(1000))
    assert lacking_memory(files) is None
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9_999))
    assert lacking_memory(files) == "five sessions of this model need about 10.0 kB of memory, and 10.00 kB are free"

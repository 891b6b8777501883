"""The benchmarks run on a small model and print what they promise. How long anything took is never asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from whole_runs import checkpoint

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FEW = ("--sets", "2", "--rounds", "1")


def ran(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def rows(script: str, *arguments: str) -> list[dict[str, Any]]:
    found = json.loads(ran(script, *arguments, "--json"))
    assert found["title"] and "cores" in found["machine"]
    for row in found["rows"]:
        for value in row.values():
            numbers = value.values() if isinstance(value, dict) else [value]
            assert all(math.isfinite(n) and n >= 0 for n in numbers if not isinstance(n, str | bool)), row
    return list(found["rows"])


@pytest.mark.slow
def test_predictions_are_of_joint_plans_and_compared_with_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMHEADS_CACHE", str(tmp_path))
    quick = ("--plans", "3", "--shape", "1x8", "--min-seconds", "0.01", "--table-seconds", "0.01")
    found = json.loads(ran("prediction.py", str(checkpoint()), *quick, "--json"))
    assert len(found["rows"]) == 3 and len({json.dumps(row["kept"]) for row in found["rows"]}) == 3
    for row in found["rows"]:
        layers = sum(row["kept"]["layer"])
        assert len(row["kept"]["attention"]) == len(row["kept"]["feed_forward"]) == layers >= 1
        assert row["error"] == pytest.approx(row["measured"] / row["predicted"] - 1)
    again = ran("prediction.py", str(checkpoint()), *quick)
    assert "attention" in again and ("median error" in again or "nothing conclusive" in again)


@pytest.mark.slow
def test_scoring_is_measured_in_every_layout_and_dtype() -> None:
    layouts, dtypes = ("llama", "gpt2", "bert", "gpt_neox"), ("float32", "bfloat16")
    found = rows("scoring.py", "--sizes", "1M", *FEW)
    assert [(r["dtype"], r["layout"]) for r in found] == [(d, x) for d in dtypes for x in layouts]
    for wide, half in zip(found[:4], found[4:], strict=True):
        assert wide["scored MB"] == pytest.approx(2 * half["scored MB"])
        assert wide["score rate / plain"].keys() == {"estimate", "low", "high"}
    # Two layers of width 64: queries and outputs of 64 x 64, keys and values of half as many, and three feed-forward
    # matrices of 64 x 256, in float32.
    assert found[0]["scored MB"] * 1e6 == pytest.approx(2 * (3 * 64 * 64 + 3 * 64 * 256) * 4)


@pytest.mark.slow
def test_surgery_is_compared_with_a_copy_of_what_it_keeps() -> None:
    ratios = (("--ratio", ratio, "--ffn_ratio", ratio) for ratio in ("0.5", "0"))
    half, whole = (rows("surgery.py", "--sizes", "1M", *FEW, *both) for both in ratios)
    assert [r["layout"] for r in half] == ["llama", "gpt2", "bert", "gpt_neox"] * 2
    for cut, uncut in zip(half, whole, strict=True):
        assert cut["kept MB"] == pytest.approx(uncut["kept MB"] / 2)


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own_and_held_to_the_limit(tmp_path: Path) -> None:
    [row] = rows("memory.py", "--sizes", "1M", "--dtypes", "float32", "--folder", str(tmp_path))
    assert row["model MiB"] == pytest.approx(4 * row["parameters"] / 2**20)
    assert row["limit MiB"] == pytest.approx(row["model MiB"] + row["largest tensor MiB"] + 300)
    assert row["within"] is True and row["peak of load, score and prune MiB"] <= row["limit MiB"]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_export_is_compared_with_bare_optimum() -> None:
    [row] = rows("export_overhead.py", "--sizes", "1M", "--layouts", "llama", *FEW)
    assert row["optimum s"] > 0 and row["slimheads s"] > 0


@pytest.mark.slow
def test_int8_of_7_bits_is_compared_with_8() -> None:
    found = rows("int8.py", "--model", str(checkpoint()), "--length", "8", "--threads", "1", "--seconds", "0.05")
    assert [row["weights"] for row in found] == ["signed 7", "signed 8", "unsigned 8"]
    assert found[0]["1 - mean cosine"] > found[1]["1 - mean cosine"]


@pytest.mark.slow
def test_start_up_is_measured_against_what_a_command_cannot_do_without() -> None:
    found = rows("startup.py", *FEW)
    assert [row["command"] for row in found] == ["slimheads --help", "slimheads plan pipelines/minilm.yaml"]


@pytest.mark.slow
def test_selection_is_compared_with_random_removal() -> None:
    found = rows("selection.py", "--models", "bert", "--seeds", "1")
    assert [(row["heads"], row["neurons"]) for row in found[:3]] == [("25%", "0%"), ("50%", "0%"), ("0%", "25%")]
    for row in found:
        assert row["random, layer, best of 5"] <= row["random, layer"]
        assert sum(value for key, value in row.items() if key.startswith("rank")) == pytest.approx(1 + 2 + 3)
    assert found[1]["layer"] > found[0]["layer"] and found[5]["layer"] > found[4]["layer"]  # half against less


def test_a_table_begins_with_the_machine_and_ends_with_the_slope() -> None:
    lines = ran("surgery.py", "--sizes", "1M", "20M", "--layouts", "llama", "--dtypes", "float32", *FEW).splitlines()
    assert lines[0] == "Surgery" and "torch" in lines[1]
    assert sum(line.startswith("| llama | float32 |") for line in lines) == 2
    assert lines[-1].startswith("float32: time grows as parameters to the power of")

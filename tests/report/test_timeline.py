"""The picture of the samples shows every extreme, says what it cut off, and draws nothing that was not measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from whole_runs import measured

from slimheads.errors import UsageError
from slimheads.latency.records import Samples
from slimheads.report.svg import PALETTE
from slimheads.report.timeline import write_timeline

SETS = 4
SVG = "{http://www.w3.org/2000/svg}"
COLOURS = [PALETTE[name][0] for name in ("dense", "slim", "limit")]


def row(rounds: int = 30, spikes: int = 0, **changes: Any) -> Any:
    times = np.random.default_rng(0).normal(1.0, 0.01, (3, SETS, rounds))
    times[0, 0, :spikes] = 50.0
    dense, slim, control = times.tolist()
    return measured(samples=Samples(dense=dense, slim=slim, control=control), **changes)


def drawn(tmp_path: Path, *rows: Any) -> tuple[list[str], list[str]]:
    """The texts and the colours of the lines of more than two points."""
    path = tmp_path / "t.svg"
    write_timeline(rows, path, names=("a.onnx", "b.onnx"))
    root = ElementTree.fromstring(path.read_text())
    assert root.tag == f"{SVG}svg"  # a file of its own, not a part of a page
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    lines = [path for path in root.iter(f"{SVG}path") if path.attrib["d"].count("L") > 5]
    return texts, [line.attrib["style"].split("stroke: ")[1][:7] for line in lines]


def test_every_session_of_every_set_has_a_line(tmp_path: Path) -> None:
    texts, lines = drawn(tmp_path, row(shape=(1, 8)), row(shape=(2, 8)))
    assert len(lines) == 2 * 3 * SETS and len(set(lines)) == 3
    assert {"a.onnx", "b.onnx", "control: a.onnx once more", "1x8", "2x8", "1", "4"} <= {*texts}
    assert any("faster" in text for text in texts) and not any("above the scale" in text for text in texts)


def test_samples_above_the_scale_are_counted(tmp_path: Path) -> None:
    texts, _ = drawn(tmp_path, row(rounds=300, spikes=7))
    (said,) = (text for text in texts if "above the scale" in text)
    assert int(said.split()[0]) >= 7


@pytest.mark.parametrize("count", [2, 50, 5000])
def test_the_least_and_the_greatest_sample_are_drawn_however_many_there_are(tmp_path: Path, count: int) -> None:
    times = np.random.default_rng(count).normal(1, 0.01, count)
    samples = Samples(dense=[times.tolist()], slim=[[0.98] * count], control=[[1.02] * count])
    write_timeline([measured(samples=samples)], tmp_path / "t.svg")
    root = ElementTree.fromstring((tmp_path / "t.svg").read_text())
    (axes,) = (group for group in root.iter(f"{SVG}g") if group.get("id") == "axes_1")
    heights = {}
    for path in axes.iter(f"{SVG}path"):
        stroke = path.get("style", "").partition("stroke: ")[2][:7]
        heights[stroke] = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path.get("d", ""))]
    dense, at_098, at_102 = (heights[colour] for colour in COLOURS)
    drawn = [0.98 + 0.04 * (y - at_098[0]) / (at_102[0] - at_098[0]) for y in dense]
    assert (min(drawn), max(drawn)) == pytest.approx((times.min(), times.max()), abs=2e-4)


def test_what_was_not_measured_is_said_and_not_drawn(tmp_path: Path) -> None:
    texts, lines = drawn(tmp_path, measured("not measured"))
    assert "nothing was measured" in texts and lines == []


def test_a_picture_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    for name in ("missing/t.svg", "missing/t.png"):
        with pytest.raises(UsageError, match="cannot be written"):
            write_timeline([row()], tmp_path / name)

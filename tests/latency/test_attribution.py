"""What pruning and a treatment give is told apart, and the parts agree with the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_files import write_encoder

from slimheads.errors import UsageError
from slimheads.latency import bench as bench_module
from slimheads.latency import sampling as measuring
from slimheads.latency.attribution import attribute
from slimheads.latency.bench import bench
from slimheads.latency.records import Latency
from slimheads.latency.sampling import SETS, Series
from slimheads.latency.statistics import ratio_interval

COST = {"dense.onnx": 8.0, "slim.onnx": 6.0, "dense-fused.onnx": 4.0, "slim-fused.onnx": 2.0}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, ...]:
    return tuple(write_encoder(tmp_path / name) for name in COST)


def pretend(monkeypatch: pytest.MonkeyPatch, control: float = 1.0) -> list[tuple[Any, ...]]:
    """Measuring as on a machine on which every file has its cost, and the control `control` times the first's."""
    calls: list[tuple[Any, ...]] = []

    def measure(files: Any, shapes: Any, effort: Any, **_: Any) -> dict[Any, Series]:
        calls.append((tuple(files), effort))
        costs = [COST[file.name] for file in files]
        noise = np.random.default_rng(0).normal(1, 0.001, (SETS, 20, len(files) + 1))
        return {shape: Series(sets=list(np.array([*costs, control * costs[0]]) * noise)) for shape in shapes}

    monkeypatch.setattr(bench_module, "measure", measure)
    return calls


def test_each_ratio_is_of_the_files_it_names(files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(monkeypatch)
    (found,) = attribute(*files, shapes=[(1, 8)], precision="fused", flops={(1, 8): (3.0, 2.0)}, min_seconds=3)
    row = found.latency
    assert row.speedup and row.dense and row.slim and found.on_dense and found.on_slim and found.whole
    assert row.speedup.estimate == pytest.approx(4 / 2, rel=0.01)  # pruning, of treated graphs
    assert found.on_dense.interval.estimate == pytest.approx(8 / 4, rel=0.01)
    assert found.on_slim.interval.estimate == pytest.approx(6 / 2, rel=0.01)
    assert found.whole.interval.estimate == pytest.approx(8 / 2, rel=0.01)
    assert (row.dense.median_ms, row.slim.median_ms) == (pytest.approx(4, rel=0.01), pytest.approx(2, rel=0.01))
    assert (row.precision, row.flop_speedup, row.verdict) == ("fused", 1.5, "faster")
    assert {found.on_dense.verdict, found.on_slim.verdict, found.whole.verdict} == {"faster"}
    ((_, effort),) = calls
    assert effort.min_seconds == pytest.approx(5)  # five sessions: each runs as often as of three in three seconds
    bench(*files[:2], shapes=[(1, 8)], min_seconds=3)
    assert calls[1][1].min_seconds == 3


def test_a_control_that_is_off_vetoes_every_ratio(files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, control=1.2)
    (found,) = attribute(*files, shapes=[(1, 8)])
    for part in (found.latency, found.on_dense, found.on_slim, found.whole):
        assert part is not None and part.verdict == "inconclusive" and part.reason and "misses 1" in part.reason


def test_really_measured_the_four_run_in_the_same_rounds(files: tuple[Path, ...]) -> None:
    (found,) = attribute(*files, shapes=[(1, 8)], min_seconds=0.02)
    row = found.latency
    assert row.samples and row.control and found.whole
    dense, slim, control = (np.array(times) for times in (row.samples.dense, row.samples.slim, row.samples.control))
    assert dense.shape == slim.shape == control.shape
    assert ratio_interval(dense, slim) == row.speedup and ratio_interval(dense, control) == row.control
    assert Latency.model_validate_json(row.model_dump_json()).speedup == row.speedup


def test_without_the_provider_all_of_it_is_not_measured(
    files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    (found,) = attribute(*files, shapes=[(1, 8)], provider="cuda", on_missing="skip")
    assert found.latency.verdict == "not measured"
    assert (found.on_dense, found.on_slim, found.whole) == (None, None, None)


def test_a_file_that_cannot_run_a_shape_is_named(files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.bind

    def bind(session: Any, feed: Any) -> Any:
        run = real(session, feed)
        if session._model_path.endswith("slim-fused.onnx"):
            raise RuntimeError("no kernel")
        return run

    monkeypatch.setattr(measuring, "bind", bind)
    with pytest.raises(UsageError, match=r"slim-fused\.onnx: ONNX Runtime cannot run the shape \[1, 8\] .*no kernel"):
        attribute(*files, shapes=[(1, 8)], min_seconds=0.02)

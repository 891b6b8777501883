"""A latency verdict is worth something only if its interval covers the truth and its control can veto it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import WIDTH, write_decoder

import slimheads
from slimheads.errors import EnvironmentLackError, UsageError
from slimheads.latency import bench as bench_module
from slimheads.latency import sampling as measuring
from slimheads.latency import statistics
from slimheads.latency.records import Interval, Latency, Verdict
from slimheads.latency.sampling import SETS
from slimheads.latency.statistics import judge, ratio_interval, timing

# ---------------------------------------------------------------------------------------------------------- statistics


def noisy_samples(rng: np.random.Generator, medians: tuple[float, float], sets: int = SETS, rounds: int = 24) -> Any:
    """Times as a shared machine gives them, [2, sets, rounds].

    A slow mood of the machine that both sessions of a round share (autocorrelated, 20%), luck of each session for its
    whole life (2.5%), and jitter of each run with a heavy tail.
    """
    total = sets * rounds
    mood = np.zeros(total)
    for step in range(1, total):
        mood[step] = 0.95 * mood[step - 1] + rng.normal(0, 0.2 * np.sqrt(1 - 0.95**2))
    luck = rng.normal(0, 0.025, (2, sets, 1))
    jitter = np.abs(rng.standard_t(3, (2, sets, rounds))) * 0.03
    return np.array(medians)[:, None, None] * np.exp(mood.reshape(sets, rounds) + luck + jitter)


def test_a_repeat_falls_into_the_interval_in_about_95_of_100_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    rng = np.random.default_rng(5)
    repeated = covered = 0
    for _ in range(300):
        first, second = (ratio_interval(*noisy_samples(rng, (4.0, 4.0))) for _ in range(2))
        repeated += first.low <= second.estimate <= first.high
        covered += first.low <= 1 <= first.high
    # The standard deviation of the share is 1.3% at 300 measurements.
    assert 0.92 <= repeated / 300 <= 0.99
    assert covered > repeated  # the ratio itself strays less than a repeat does


def test_a_known_ratio_lies_in_the_interval_and_near_the_estimate() -> None:
    rng = np.random.default_rng(6)
    found = [ratio_interval(*noisy_samples(rng, (5.0, 4.0))) for _ in range(20)]
    assert sum(interval.low <= 1.25 <= interval.high for interval in found) >= 17
    assert np.mean([interval.estimate for interval in found]) == pytest.approx(1.25, rel=0.01)
    assert all(interval.low <= interval.estimate <= interval.high for interval in found)
    assert all(judge(interval, Interval(estimate=1, low=0.99, high=1.01)) == ("faster", None) for interval in found)


def test_in_steady_times_the_estimate_is_the_ratio_of_the_medians_that_are_reported() -> None:
    dense, slim = np.random.default_rng(7).normal(1, 0.01, (2, SETS, 200)) * np.array([5.0, 4.0])[:, None, None]
    ratio = timing(dense).median_ms / timing(slim).median_ms
    assert ratio_interval(dense, slim).estimate == pytest.approx(ratio, rel=0.002)


def test_a_machine_that_is_three_times_slower_in_half_of_the_sets_does_not_blur_the_ratio() -> None:
    samples = noisy_samples(np.random.default_rng(9), (5.0, 4.0))
    calm = ratio_interval(*samples)
    samples[:, ::2] *= 3
    assert ratio_interval(*samples) == calm


def test_the_interval_is_the_same_for_the_same_seed_and_reversed_for_reversed_roles() -> None:
    dense, slim = noisy_samples(np.random.default_rng(8), (5.0, 4.0))
    interval = ratio_interval(dense, slim, seed=1)
    assert ratio_interval(dense, slim, seed=1) == interval
    swapped = ratio_interval(slim, dense, seed=1)
    assert (1 / swapped.high, 1 / swapped.low) == pytest.approx((interval.low, interval.high), rel=1e-3)


def test_constant_samples_give_an_interval_of_no_width() -> None:
    interval = ratio_interval(np.full((SETS, 3), 6.0), np.full((SETS, 3), 4.0))
    assert (interval.estimate, interval.low, interval.high) == (1.5, 1.5, 1.5)


def test_timing_counts_runs_and_orders_its_percentiles() -> None:
    summary = timing(np.arange(1.0, 102.0).reshape(1, -1), repeats=3)
    assert (summary.p10_ms, summary.median_ms, summary.p90_ms, summary.runs) == (11.0, 51.0, 91.0, 303)


def interval_of(low: float, high: float) -> Interval:
    return Interval(estimate=(low + high) / 2, low=low, high=high)


@pytest.mark.parametrize(
    ("speedup", "control", "verdict"),
    [
        ((1.10, 1.20), (0.98, 1.02), "faster"),
        ((0.80, 0.90), (0.98, 1.02), "slower"),
        ((0.99, 1.05), (0.98, 1.02), "no difference shown"),
        ((1.00, 1.05), (0.98, 1.02), "no difference shown"),
        ((1.10, 1.20), (1.01, 1.03), "inconclusive"),
        ((1.10, 1.20), (0.95, 0.99), "inconclusive"),
        ((1.10, 1.20), (0.92, 1.08), "inconclusive"),
        ((0.99, 1.05), (0.92, 1.08), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_interval_unless_the_control_vetoes_it(
    speedup: tuple[float, float], control: tuple[float, float], verdict: str
) -> None:
    found, reason = judge(interval_of(*speedup), interval_of(*control))
    assert found == verdict
    assert (reason is not None) == (verdict == "inconclusive")
    if reason is not None:
        assert f"[{control[0]:.3f}, {control[1]:.3f}]" in reason


# ---------------------------------------------------------------------------------------------------- real ONNX Runtime


def write_model(path: Path, layers: int, rows: int = 50) -> Path:
    """input_ids -> an embedding -> `layers` matrix products."""
    rng, width = np.random.default_rng(0), 64
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x0"])]
    stored = {"table": rng.standard_normal((rows, width), dtype=np.float32)}
    for layer in range(layers):
        stored[f"w{layer}"] = rng.standard_normal((width, width), dtype=np.float32) / 8
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"x{layer + 1}"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, ["batch_size", "sequence_length", width])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "dense.onnx", 8), write_model(folder / "slim.onnx", 2)


@pytest.fixture(scope="module")
def measured(models: tuple[Path, Path]) -> tuple[tuple[Latency, ...], list[str]]:
    lines: list[str] = []
    flops = {(1, 64): (8.0, 2.0)}
    shapes = [(2, 16), (1, 64)]
    return slimheads.bench(
        *models, shapes=shapes, min_seconds=0.1, precision="fp16", flops=flops, on_progress=lines.append
    ), lines


def test_a_row_a_shape_in_the_order_asked_for_with_everything_filled(
    measured: tuple[tuple[Latency, ...], list[str]],
) -> None:
    rows, lines = measured
    assert [row.shape for row in rows] == [(2, 16), (1, 64)]
    for row in rows:
        assert (row.provider, row.threads, row.precision) == ("cpu", 2, "fp16")
        assert row.verdict in get_args(Verdict) and row.verdict != "not measured"
        assert (row.reason is None) == (row.verdict != "inconclusive")
        assert row.dense and row.slim and row.speedup and row.control and row.samples
        assert row.dense.p10_ms <= row.dense.median_ms <= row.dense.p90_ms
        assert row.speedup.low <= row.speedup.high and row.control.low <= row.control.high
        assert row.dense.runs == row.slim.runs >= 30
        shapes = {np.shape(times) for times in (row.samples.dense, row.samples.slim, row.samples.control)}
        assert len(shapes) == 1
        assert ratio_interval(np.array(row.samples.dense), np.array(row.samples.slim)) == row.speedup
    assert len(lines) == sum(len(row.samples.dense) for row in rows if row.samples)
    assert all("\n" not in line for line in lines)


def test_realised_is_the_measured_ratio_over_the_flop_ratio_and_null_without_one(
    measured: tuple[tuple[Latency, ...], list[str]],
) -> None:
    without, known = measured[0]
    assert (without.flop_speedup, without.realised) == (None, None)
    assert known.flop_speedup == 4.0 and known.speedup and known.realised == known.speedup.estimate / 4.0


def test_samples_stay_out_of_json_and_a_row_can_be_read_back(
    measured: tuple[tuple[Latency, ...], list[str]],
) -> None:
    for row in measured[0]:
        text = row.model_dump_json()
        assert "samples" not in json.loads(text)
        assert Latency.model_validate_json(text) == row.model_copy(update={"samples": None})


def test_dense_slim_and_control_are_opened_afresh_a_set_with_the_same_options_in_random_order(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[Any, ...]] = []
    real = measuring.open_session

    def spy(path: Path, *options: Any, **named: Any) -> Any:
        opened.append((path, options, tuple(named.items())))
        return real(path, *options, **named)

    monkeypatch.setattr(measuring, "open_session", spy)
    slimheads.bench(*models, shapes=[(1, 8)], threads=1, min_seconds=0.01, min_pairs=1)
    assert len(opened) >= 3 * SETS
    assert len({call[1:] for call in opened}) == 1
    sets = [tuple(path for path, *_ in opened[start : start + 3]) for start in range(0, len(opened), 3)]
    dense, slim = models
    assert all(sorted(paths) == sorted([dense, dense, slim]) for paths in sets)
    assert len({paths.index(slim) for paths in sets}) == 3


def test_a_missing_provider_fails_or_is_reported_as_not_measured(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentLackError) as refused:
        slimheads.bench(*models, shapes=[(1, 8)], provider="cuda")
    assert refused.value.exit_code == 5
    rows = slimheads.bench(
        *models, shapes=[(1, 8), (1, 9)], provider="cuda", on_missing="skip", flops={(1, 8): (3.0, 2.0)}
    )
    assert [(row.shape, row.verdict, row.provider) for row in rows] == [
        ((1, 8), "not measured", "cuda"),
        ((1, 9), "not measured", "cuda"),
    ]
    for row in rows:
        assert row.reason and "CUDAExecutionProvider" in row.reason
        assert [row.dense, row.slim, row.speedup, row.control, row.realised] == [None] * 5
    assert rows[0].flop_speedup == 1.5


def test_what_cannot_be_measured_is_a_usage_error_of_one_line(models: tuple[Path, Path], tmp_path: Path) -> None:
    dense, slim = models
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(slim.read_bytes()[:1000])
    calls: list[Callable[[], object]] = [
        lambda: slimheads.bench(dense, broken, shapes=[(1, 8)]),
        lambda: slimheads.bench(tmp_path / "missing.onnx", slim, shapes=[(1, 8)]),
        lambda: slimheads.bench(dense, slim, shapes=[(8,)]),
        lambda: slimheads.bench(dense, slim, shapes=[(0, 8)]),
        lambda: slimheads.bench(dense, slim, shapes=[(1, 8)], min_seconds=0),
        lambda: slimheads.bench(dense, slim, shapes=[(1, 8)], min_pairs=0),
        lambda: slimheads.bench(dense, slim, shapes=[(1, 8)], provider="abacus"),
    ]
    for call in calls:
        with pytest.raises(UsageError) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_a_shape_that_a_file_takes_but_cannot_run_is_a_usage_error_that_names_it(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["positions", "position_ids"], ["y"])],
        "g",
        [helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch_size", "sequence_length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((8, 4), np.float32), "positions")],
    )
    short = tmp_path / "short.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), short)
    assert slimheads.bench(short, short, shapes=[(1, 8)], min_seconds=0.01)[0].dense is not None
    with pytest.raises(UsageError) as refused:
        slimheads.bench(models[0], short, shapes=[(1, 9)])
    said = str(refused.value)
    assert said.startswith(f"{short}: ONNX Runtime cannot run the shape [1, 9]") and "\n" not in said


def test_decoders_with_different_head_counts_each_fill_a_cache_of_their_own(tmp_path: Path) -> None:
    dense, slim = (write_decoder(tmp_path / f"{heads}.onnx", heads) for heads in (4, 2))
    prefill, decode = slimheads.bench(dense, slim, shapes=[(2, 8), (2, 1, 16)], min_seconds=0.02)
    assert (prefill.shape, prefill.phase, decode.shape, decode.phase) == ((2, 8), "prefill", (2, 1, 16), "decode")
    for row, tokens in ((prefill, 16), (decode, 2)):
        assert row.speedup and row.dense and row.slim
        assert row.dense.tokens_per_second == pytest.approx(1e3 * tokens / row.dense.median_ms)
        assert row.slim.tokens_per_second == pytest.approx(1e3 * tokens / row.slim.median_ms)
        cache = row.cache_bytes_per_token
        assert cache and (cache.dense, cache.slim) == (4 * WIDTH * 4, 2 * WIDTH * 4)


def test_what_only_decoders_have_is_null_of_others(measured: tuple[tuple[Latency, ...], list[str]]) -> None:
    for row in measured[0]:
        assert row.phase is None and row.cache_bytes_per_token is None
        assert row.dense and row.slim and (row.dense.tokens_per_second, row.slim.tokens_per_second) == (None, None)


def test_a_row_tells_the_conditions_of_its_measurement(measured: tuple[tuple[Latency, ...], list[str]]) -> None:
    first, second = (row.conditions for row in measured[0])
    assert first is not None and first == second  # the shapes of one call share their session sets
    assert (first.load_start is None) == (first.load_end is None) == (not hasattr(os, "getloadavg"))


def test_a_gpu_provider_that_runs_nothing_of_a_file_is_not_measured_as_if_it_did(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider is pretended: sessions run on the CPU, through the code that every provider takes."""
    placed = {"CUDAExecutionProvider": 5, "CPUExecutionProvider": 2}
    monkeypatch.setattr(bench_module, "require_provider", lambda provider: None)
    for module in (bench_module, measuring):
        real = module.open_session
        monkeypatch.setattr(module, "open_session", lambda path, *_, real=real, **named: real(path, **named))
    monkeypatch.setattr(bench_module, "placement_of", lambda session: placed)
    (row,) = slimheads.bench(*models, shapes=[(1, 8)], provider="cuda", min_seconds=0.02)
    assert row.provider == "cuda" and row.placement and row.placement.dense == row.placement.slim == placed
    del placed["CUDAExecutionProvider"]
    with pytest.raises(EnvironmentLackError, match="runs no operator of the file"):
        slimheads.bench(*models, shapes=[(1, 8)], provider="cuda")
    (row,) = slimheads.bench(*models, shapes=[(1, 8)], provider="cuda", on_missing="skip")
    assert row.verdict == "not measured" and row.reason and "runs no operator" in row.reason

"""Rounds are fair, warm-up and length are enough, and trouble prolongs them: on a clock that only runs move on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from slimheads.latency.bench import EXTENSION
from slimheads.latency.sampling import SETS, Effort, Series, add_set, one_round, warm_up
from slimheads.latency.statistics import control_fault, judge, ratio_interval, timing


@dataclass
class Machine:
    """A clock that only runs move on, and a log of who ran."""

    now_ns: int = 0
    log: list[int] = field(default_factory=list)

    def clock(self) -> int:
        return self.now_ns

    def run(self, role: int, cost_ms: Callable[[], float]) -> Callable[[], None]:
        def once() -> None:
            self.now_ns += int(cost_ms() * 1e6)
            self.log.append(role)

        return once


def measure(
    machine: Machine, runs: list[Callable[[], None]], min_seconds: float = 3.0, min_pairs: int = 30
) -> tuple[Series, np.random.Generator]:
    series, rng = Series(), np.random.default_rng(0)
    while not series.done:
        add_set(series, runs, rng, min_seconds=min_seconds, min_pairs=min_pairs, clock=machine.clock)
        series.update_done(
            Effort(min_seconds, min_pairs, EXTENSION),
            lambda dense, control: control_fault(ratio_interval(dense, control)) is None,
        )
    return series, rng


def verdict_of(series: Series) -> tuple[str, str | None]:
    dense, slim, control = (series.samples(role) for role in range(3))
    return judge(ratio_interval(dense, slim), ratio_interval(dense, control))


def test_each_round_runs_every_session_once_in_an_order_that_varies() -> None:
    machine = Machine()
    runs = [machine.run(role, lambda: 20.0) for role in range(3)]
    series = Series()
    add_set(series, runs, np.random.default_rng(0), min_seconds=60, min_pairs=1, clock=machine.clock)
    rounds = len(series.sets[0])
    timed = [
        tuple(machine.log[start : start + 3]) for start in range(len(machine.log) - 3 * rounds, len(machine.log), 3)
    ]
    assert all(sorted(order) == [0, 1, 2] for order in timed)
    counts = [timed.count(order) for order in itertools.permutations(range(3))]
    assert min(counts) > rounds / 6 / 3  # about a sixth each: with 110 rounds 18, give or take 4


def test_times_are_credited_to_the_session_that_took_them_whatever_the_order() -> None:
    machine = Machine()
    runs = [machine.run(role, lambda cost=cost: cost) for role, cost in enumerate((3.0, 2.0, 5.0))]
    for order in itertools.permutations(range(3)):
        assert one_round(runs, order, 2, machine.clock) == pytest.approx([3e6, 2e6, 5e6])


@pytest.mark.parametrize(("min_seconds", "min_pairs", "cost_ms"), [(3.0, 30, 4.0), (0.5, 200, 40.0), (2.0, 1, 700.0)])
def test_a_calm_measurement_reaches_both_minimums_and_stops_there(
    min_seconds: float, min_pairs: int, cost_ms: float
) -> None:
    machine = Machine()
    series, _ = measure(machine, [machine.run(role, lambda: cost_ms) for role in range(3)], min_seconds, min_pairs)
    assert len(series.sets) == SETS
    pairs = sum(len(rounds) for rounds in series.sets)
    assert pairs >= min_pairs and series.seconds >= min_seconds
    one_more_each = SETS * 3 * cost_ms / 1e3
    assert series.seconds <= max(1.2 * min_seconds, min_pairs * 3 * cost_ms / 1e3) + one_more_each


def test_a_machine_that_gets_faster_after_the_first_set_is_measured_for_min_seconds_all_the_same() -> None:
    machine = Machine()
    series, _ = measure(machine, [machine.run(role, lambda: 8.0 if machine.now_ns < 3e8 else 4.0) for role in range(3)])
    assert len(series.sets) > SETS and series.seconds >= 3.0
    assert len({len(rounds) for rounds in series.sets}) == 1


def test_warm_up_lasts_until_times_settle_and_ends_on_a_machine_that_never_does() -> None:
    machine = Machine()
    slow_start = [machine.run(role, lambda: 2.0 + 20.0 * 0.8 ** len(machine.log)) for role in range(3)]
    assert warm_up(slow_start, machine.clock, limit_ns=10**12) == pytest.approx([2e6] * 3, rel=0.05)
    assert len(machine.log) < 150  # it stopped because they settled
    restless = Machine()
    ever_faster = [restless.run(role, lambda: 1e3 * 0.9 ** len(restless.log)) for role in range(3)]
    warm_up(ever_faster, restless.clock, limit_ns=10**15)
    assert len(restless.log) <= 150
    slow = Machine()
    warm_up([slow.run(role, lambda: 9e3) for role in range(3)], slow.clock, limit_ns=10**9)
    assert len(slow.log) == 6


def test_a_run_of_microseconds_is_repeated_until_a_sample_is_a_millisecond() -> None:
    machine = Machine()
    series, _ = measure(machine, [machine.run(role, lambda: 0.01) for role in range(3)], min_seconds=0.2)
    assert series.repeats * 0.01 >= 1.0
    assert timing(series.samples(0), series.repeats).median_ms == pytest.approx(0.01)


def test_a_machine_that_slows_down_all_the_time_does_not_fake_a_speedup() -> None:
    machine, rng = Machine(), np.random.default_rng(1)

    def cost() -> float:  # three times slower after three seconds
        return 4.0 * (1 + 2 * machine.now_ns / 3e9) * float(np.exp(rng.normal(0, 0.03)))

    series, _ = measure(machine, [machine.run(role, cost) for role in range(3)])
    verdict, reason = verdict_of(series)
    assert verdict == "no difference shown", reason
    assert timing(series.samples(0)).p90_ms > 1.5 * timing(series.samples(0)).p10_ms  # it really slowed down


@pytest.mark.parametrize("trouble", ["biased", "bimodal"])
def test_a_control_that_is_off_prolongs_the_measurement_and_then_makes_it_inconclusive(trouble: str) -> None:
    machine, rng = Machine(), np.random.default_rng(2)
    mode = {"now": 1.0}

    def control() -> float:
        if trouble == "bimodal" and rng.random() < 0.02:  # stays in one mode for about a session set
            mode["now"] = 2.6 - mode["now"]
        return 4.0 * (1.1 if trouble == "biased" else mode["now"]) * float(np.exp(rng.normal(0, 0.03)))

    calm = [
        machine.run(role, lambda cost=cost: cost * float(np.exp(rng.normal(0, 0.03))))
        for role, cost in enumerate((4.0, 2.0))
    ]
    series, _ = measure(machine, [*calm, machine.run(2, control)])
    assert series.seconds >= EXTENSION * 3.0 or len(series.sets) == EXTENSION * SETS
    verdict, reason = verdict_of(series)
    found = ratio_interval(series.samples(0), series.samples(2))
    assert verdict == "inconclusive"
    assert reason is not None and f"[{found.low:.3f}, {found.high:.3f}]" in reason and control_fault(found) == reason


@pytest.mark.parametrize("cost_ms", [0.01, 0.3])
def test_warm_up_of_short_runs_lasts_for_the_milliseconds_that_a_clock_needs_to_rise(cost_ms: float) -> None:
    machine = Machine()
    rising = [machine.run(role, lambda: cost_ms * (2.0 if machine.now_ns < 15e6 else 1.0)) for role in range(3)]
    assert warm_up(rising, machine.clock, limit_ns=150_000_000) == pytest.approx([cost_ms * 1e6] * 3)
    assert 20e6 <= machine.now_ns < 25e6


def test_warm_up_of_runs_of_seconds_is_two_turns_and_the_cold_one_does_not_count() -> None:
    machine = Machine()
    cold = [machine.run(role, lambda: 9e3 if len(machine.log) < 3 else 4e3) for role in range(3)]
    assert warm_up(cold, machine.clock, limit_ns=150_000_000) == [4e9] * 3
    assert len(machine.log) == 6


def test_five_sessions_a_round_are_measured_like_three() -> None:
    machine = Machine()
    series, _ = measure(machine, [machine.run(role, lambda role=role: 2.0 + role) for role in range(5)])
    assert [float(np.median(series.samples(role))) for role in range(5)] == pytest.approx([2, 3, 4, 5, 6])
    assert series.samples(-1).tolist() == series.samples(4).tolist()


def test_it_is_the_control_that_ends_a_measurement_and_not_that_two_files_are_alike() -> None:
    machine = Machine()
    series, _ = measure(machine, [machine.run(role, lambda cost=cost: cost) for role, cost in enumerate((4, 2, 4))])
    assert len(series.sets) == SETS

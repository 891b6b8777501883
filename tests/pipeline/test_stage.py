"""The runner: when a stage's stored result may be used again, on stages that do next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimheads.errors import UsageError
from slimheads.output.store import Store
from slimheads.pipeline.progress import Silent
from slimheads.pipeline.stage import MissingError, Result, Runner, Stage, StoppedError


class Number(Result):
    value: int
    kept: bool = True

    @property
    def reusable(self) -> bool:
        return self.kept


def stage(name: str, value: int, *reads: Result, depends: object = None, kept: bool = True) -> Stage[Number]:
    def work(folder: Path) -> Number:
        (folder / "value.txt").write_text(str(value))
        return Number(value=value, kept=kept)

    return Stage(name, Number, work, lambda: {"depends": depends}, reads)


def chain(out: Path, first: int, *, from_stage: str | None = None) -> dict[str, bool]:
    """Three stages, the middle one with the same result whatever the first gives: which of them were reused."""
    runner = Runner(Store(out), Silent(), from_stage)
    loaded = runner.do(stage("load", first, depends=first))
    scored = runner.do(stage("score", 7, loaded))
    runner.do(stage("select", 8, scored))
    return {timing.stage: timing.reused for timing in runner.timings}


def test_a_change_reaches_every_later_stage_even_through_one_whose_result_is_the_same(tmp_path: Path) -> None:
    assert set(chain(tmp_path, 1).values()) == {False}
    assert set(chain(tmp_path, 1).values()) == {True}
    assert set(chain(tmp_path, 2).values()) == {False}


def test_a_forced_stage_forces_every_later_one(tmp_path: Path) -> None:
    chain(tmp_path, 1)
    assert chain(tmp_path, 1, from_stage="score") == {"load": True, "score": False, "select": False}


def test_a_stored_result_is_the_result_with_its_files(tmp_path: Path) -> None:
    made, found = (Runner(Store(tmp_path), Silent()).do(stage("load", 5)) for _ in range(2))
    assert made == found and found.value == 5
    assert (found.folder / "value.txt").read_text() == "5"


def test_the_key_that_is_stored_is_that_after_the_work(tmp_path: Path) -> None:
    """As for a choice by latency tables, which the work itself measures and stores."""
    measured: list[int] = []

    def work(folder: Path) -> Number:
        measured.append(1)
        return Number(value=1)

    for expected in (False, True):
        runner = Runner(Store(tmp_path), Silent())
        runner.do(Stage("load", Number, work, lambda: {"measured": len(measured)}))
        assert runner.timings[0].reused is expected


def test_a_result_that_is_not_reusable_is_made_again(tmp_path: Path) -> None:
    for _ in range(2):
        runner = Runner(Store(tmp_path), Silent())
        runner.do(stage("load", 1, kept=False))
        assert not runner.timings[0].reused


def test_a_dry_run_works_nothing_and_goes_on_with_what_is_presumed(tmp_path: Path) -> None:
    runner = Runner(Store(tmp_path), Silent(), dry=True)
    with pytest.raises(MissingError):
        runner.do(stage("load", 1))
    presumed = Stage("verify", Number, lambda _: Number(value=1), dict, presumed=Number(value=3))
    assert runner.do(presumed).value == 3
    assert not runner.done and not list(tmp_path.iterdir())


def test_until_stops_after_the_stage(tmp_path: Path) -> None:
    runner = Runner(Store(tmp_path), Silent(), until="load")
    with pytest.raises(StoppedError):
        runner.do(stage("load", 1))
    assert list(runner.done) == ["load"]


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing(folder: Path) -> Number:
        (folder / "half").write_text("half")
        raise UsageError("it cannot be done", hint="do something else")

    runner = Runner(Store(tmp_path), Silent())
    with pytest.raises(UsageError):
        runner.do(Stage("load", Number, failing, dict))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

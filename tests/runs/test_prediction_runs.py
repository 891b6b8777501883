"""Whole runs and plans beside a latency table: what is predicted, what `multiple_of: auto` comes to, what is reused."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from latency_tables import keep_table, stairs
from whole_runs import checkpoint, measured, report_of, reused, slimheads, steady, write_recipe

from slimheads.latency import profile as profiling
from slimheads.latency.table import predict
from slimheads.latency.table_store import Setting, folder
from slimheads.pipeline.run import dry_run
from slimheads.pipeline.stages import verify as verify_stage
from slimheads.pruning.plan import Plan
from slimheads.recipe.recipe import Recipe

TWO = Setting("cpu", 2)
SHAPE = (1, 8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steady(monkeypatch)
    monkeypatch.setenv("SLIMHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever measures a table fails."""

    def bench(*_: Any, **__: Any) -> None:
        raise AssertionError("a table was measured")

    monkeypatch.setattr(profiling, "bench", bench)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rules of every random control, as it is made."""
    found: list[dict[str, Any]] = []

    def spy(scores: Any, seed: int, **given: Any) -> Plan:
        found.append(given)
        return real(scores, seed, **given)

    real = verify_stage.random_plan
    monkeypatch.setattr(verify_stage, "random_plan", spy)
    return found


def recipe_of(home: Path, multiple_of: int | str = "auto", model: str = "bert", **more: Any) -> Path:
    together = {"scope": "global", "normalize": "none"}  # so that layers keep different counts
    select = {"ratio": 0.5, "multiple_of": multiple_of, **together} | more.pop("select", {})
    bench = {"shapes": [list(SHAPE)], "threads": 2, "min_seconds": 0.05}
    return write_recipe(home / "r.yaml", checkpoint(model), select=select, bench=bench, **more)


def ran(recipe: Path, out: Path, *more: str) -> Any:
    ended = slimheads("run", recipe, "--out", out, *more)
    assert ended.code == 0, ended.err
    return report_of(out)


def kept(out: Path) -> list[int]:
    return [len(site.kept) for site in Plan.from_json(json.loads((out / "plan.json").read_text())).sites]


# auto


def test_auto_snaps_by_the_stored_table_and_every_stage_is_reused(tmp_path: Path, never: None) -> None:
    recipe, out = recipe_of(tmp_path), tmp_path / "out"
    ran(recipe, out, "--set", "select.multiple_of=1")
    assert any(count % 2 for count in kept(out))
    keep_table(checkpoint(), stairs(4, 2, 0.1), SHAPE, TWO)
    report = ran(recipe, out)
    assert kept(out) == [count for count in kept(out) if count % 2 == 0] and sum(kept(out)) == 6
    found = report["selection"]
    assert (found["asked"], found["multiple_of"], found["reason"]) == ("auto", 2, None)
    assert found["predicted_gain"]["estimate"] > 1
    assert "auto chose 2" in (out / "report.md").read_text()
    again = ran(recipe, out)
    assert all(reused(again).values()) and again["selection"] == found
    assert slimheads("run", recipe, "--out", out, "--dry-run", "--json").json["stages"]["select"] == "reuse"
    # another table: the choice is made again, and no later stage takes the old one's plan for its own
    keep_table(checkpoint(), lambda _, count: 1 - 0.1 * (4 - count), SHAPE, TWO)
    other = ran(recipe, out)
    assert other["selection"]["multiple_of"] == 1 and not any(reused(other)[stage] for stage in ("select", "prune"))


def test_random_controls_are_under_the_step_that_was_chosen(
    tmp_path: Path, never: None, rules: list[dict[str, Any]]
) -> None:
    keep_table(checkpoint(), stairs(4, 2, 0.1), SHAPE, TWO)
    ran(recipe_of(tmp_path), tmp_path / "out")
    assert len(rules) == 3 and {given["multiple_of"] for given in rules} == {2}


def test_both_steps_are_chosen_by_one_table_and_controls_are_under_both(
    tmp_path: Path, never: None, rules: list[dict[str, Any]]
) -> None:
    setting, steps = Setting("cpu", 2, kinds=("attention", "feed_forward")), (stairs(4, 2, 0.05), stairs(48, 16, 0.005))
    keep_table(checkpoint(), lambda kind, count: steps[kind](kind, count), SHAPE, setting)
    recipe = recipe_of(tmp_path, select={"ffn_ratio": 0.25, "ffn_multiple_of": "auto"})
    report = ran(recipe, tmp_path / "out")
    found = report["selection"]
    assert (found["multiple_of"], found["feed_forward"]["multiple_of"]) == (2, 16)
    assert {(given["multiple_of"], given["ffn_multiple_of"]) for given in rules} == {(2, 16)} and len(rules) == 3
    assert {given["ffn_keep_at_least"] for given in rules} == {32}
    assert min(kept(tmp_path / "out")[3:]) == 32 and all(count % 16 == 0 for count in kept(tmp_path / "out")[3:])
    assert report["predictions"][0]["source"] == "table"
    page = (tmp_path / "out" / "report.md").read_text()
    assert "ffn_multiple_of: auto chose 16" in page and " multiple_of: auto chose 2" in page
    said = slimheads("plan", recipe).out
    assert "ffn_multiple_of: auto chose 16" in said and " multiple_of: auto chose 2" in said


def proportional(calls: list[int]) -> Callable[..., Any]:
    """In place of `bench` of a table: the slim file's share of the bytes is its share of the latency."""

    def bench(dense: Path, slim: Path, *, shapes: Sequence[Any], **_: Any) -> Any:
        calls.append(1)
        ratio = dense.stat().st_size / slim.stat().st_size
        return [measured("faster", ratio, shape=shape) for shape in shapes]

    return bench


def test_a_missing_table_is_measured_once_by_the_run_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(profiling, "bench", proportional(calls))
    recipe, out = recipe_of(tmp_path), tmp_path / "out"
    ended = slimheads("run", recipe, "--out", out, "--dry-run", "--until", "load", "--json")
    assert ended.code == 0
    assert len(calls) == 3  # the preview of a dry run chooses, too
    next(folder().iterdir()).unlink()
    ended = slimheads("run", recipe, "--out", out)
    assert ended.code == 0 and len(calls) == 6
    assert "select   starts: choose the units to delete, by latency tables" in ended.err
    again = ran(recipe, out)
    assert len(calls) == 6 and all(reused(again).values())
    assert again["predictions"][0]["source"] == "table"


def test_a_dry_run_s_stages_are_looked_up_without_measuring(tmp_path: Path, never: None) -> None:
    recipe = Recipe.read(recipe_of(tmp_path))
    assert dry_run(recipe, tmp_path / "out")["select"] == "run"
    assert not folder().exists()


def test_a_plan_chooses_as_the_run_does(tmp_path: Path, never: None) -> None:
    keep_table(checkpoint(), stairs(4, 2, 0.1), SHAPE, TWO)
    recipe = recipe_of(tmp_path)
    report, found = ran(recipe, tmp_path / "out"), slimheads("plan", recipe, "--json").json
    assert found["plan"] == json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["selection"] == report["selection"]
    assert "auto chose 2" in slimheads("plan", recipe).out
    assert found["predicted"][0]["speedup"]["estimate"] == report["predictions"][0]["speedup"]


def test_a_number_needs_no_table_and_is_told_as_it_was_asked(tmp_path: Path, never: None) -> None:
    report = ran(recipe_of(tmp_path, 2), tmp_path / "out")
    assert (report["selection"]["asked"], report["selection"]["multiple_of"]) == (2, 2)
    assert report["selection"]["predicted_gain"] is None


@pytest.mark.parametrize("command", [["plan"], ["run"]])
def test_auto_on_an_encoder_decoder_is_refused_with_its_place(command: list[str], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, model="t5")
    ended = slimheads(*command, recipe)
    assert ended.code == 2 and "r.yaml:5:" in ended.err and "encoder-decoder (t5)" in ended.err


# Predicted against measured


def test_a_run_is_predicted_by_the_table_of_its_shape_and_threads(tmp_path: Path, never: None) -> None:
    path = keep_table(checkpoint(), lambda _, count: 1 - 0.1 * (4 - count), SHAPE, TWO, margin=0.01)
    recipe, out = recipe_of(tmp_path, 1, export={"precisions": ["fp32", "fp16"]}), tmp_path / "out"
    (row,) = ran(recipe, out)["predictions"]
    share = 1 - sum(0.1 * (4 - count) / 3 for count in kept(out))
    assert (row["source"], row["shape"], row["threads"], row["provider"]) == ("table", list(SHAPE), 2, "cpu")
    assert row["speedup"] == pytest.approx(1 / share) and row["low"] < row["speedup"] < row["high"]
    assert row["measured"] == 1.25 and row["error"] == pytest.approx((share * 10) / (10 / 1.25) - 1)
    table = profiling.LatencyTable.model_validate_json(path.read_bytes())
    plan = Plan.from_json(json.loads((out / "plan.json").read_text()))
    assert predict(table, plan).speedup.estimate == row["speedup"]
    other = ran(recipe, out, "--set", "bench.threads=1")["predictions"][0]
    assert other["source"] == "flops"


def test_without_a_table_a_run_is_predicted_by_flops_and_says_so(tmp_path: Path, never: None) -> None:
    report = ran(recipe_of(tmp_path, 1), tmp_path / "out")
    (row,), (timed,) = report["predictions"], report["latency"]
    assert (row["source"], row["speedup"], row["low"]) == ("flops", timed["flop_speedup"], None)
    assert row["error"] == pytest.approx(1.25 / timed["flop_speedup"] - 1)
    assert "slimheads profile" in report["predictions_reason"]


@pytest.mark.parametrize("verdict", ["inconclusive", "not measured"])
def test_what_was_not_measured_conclusively_has_no_error_but_a_reason(
    verdict: str, tmp_path: Path, never: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch, verdict)
    (row,) = ran(recipe_of(tmp_path, 1), tmp_path / "out")["predictions"]
    assert (row["measured"], row["error"]) == (None, None)
    assert row["speedup"] > 1 and row["reason"]


def test_an_encoder_decoder_is_predicted_graph_by_graph_by_flops(tmp_path: Path, never: None) -> None:
    report = ran(recipe_of(tmp_path, 1, model="t5"), tmp_path / "out")
    assert [(row["graph"], row["source"]) for row in report["predictions"]] == [
        ("encoder_model", "flops"),
        ("decoder_model_merged", "flops"),
    ]
    assert "encoder-decoder" in slimheads("plan", tmp_path / "r.yaml", "--json").json["predicted_reason"]


@pytest.mark.parametrize(("model", "measured_at"), [("bert", [1, 8]), pytest.param("vit", [1], marks=pytest.mark.slow)])
def test_the_command_that_a_plan_names_makes_its_prediction(model: str, measured_at: list[int], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 1, model)
    before = slimheads("plan", recipe, "--json").json
    assert before["predicted"] is None
    said = before["predicted_reason"].partition("make one with: ")[2]
    assert said in slimheads("plan", recipe).out
    program, *arguments = shlex.split(said)
    assert program == "slimheads"
    assert slimheads(*arguments, "--min-seconds", 0.01).code == 0
    after = slimheads("plan", recipe, "--json").json
    (row,) = after["predicted"]
    assert after["predicted_reason"] is None and row["shape"] == measured_at
    assert row["slim_ms"] == pytest.approx(row["dense_ms"] / row["speedup"]["estimate"])
    assert after["plan"] == before["plan"]


def test_within_groups_has_a_table_of_its_own(tmp_path: Path, never: None) -> None:
    within = Setting("cpu", 2, within_groups=True)
    recipe = recipe_of(tmp_path, 1, "llama", select={"within_groups": True})
    for setting, source in ((TWO, "flops"), (within, "table")):
        keep_table(checkpoint("llama"), lambda _, count: 0.9, SHAPE, setting)
        assert ran(recipe, tmp_path / "out")["predictions"][0]["source"] == source

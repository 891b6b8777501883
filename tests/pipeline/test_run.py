"""The order of a run: what runs again, what is reused, where a run stops, and what stands in the folder afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file
from whole_runs import (
    STAGES,
    checkpoint,
    report_of,
    reused,
    steady,
    tree,
    visible,
    write_recipe,
)

from slimheads.errors import UsageError
from slimheads.notices import notify
from slimheads.pipeline.run import STAGE_NAMES, dry_run, run
from slimheads.pipeline.stage import versions
from slimheads.pipeline.stages import export as export_stage
from slimheads.pipeline.stages import prune as prune_stage
from slimheads.pipeline.stages import verify as verify_stage
from slimheads.recipe.recipe import Recipe
from slimheads.report.model import Report
from slimheads.verification.certificate import Certificate


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with r.yaml, its model and text, and a finished run in out/. Not to be changed: take `mine`."""
    home = tmp_path_factory.mktemp("done")
    shutil.copytree(checkpoint(), home / "model")
    (home / "text.txt").write_text("the a of to\nin is that it for\n")
    recipe = write_recipe(home / "r.yaml", home / "model", verify={"text": "text.txt"})
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        report = run(recipe, home / "out")
    assert report is not None and report.verdict.ok
    return home


@pytest.fixture
def mine(done: Path, tmp_path: Path) -> Iterator[Path]:
    """The same, free to be changed: `done` itself is set aside, so that the paths in the recipe stay the same."""
    shutil.copytree(done, tmp_path / "kept", symlinks=True)
    yield done
    shutil.rmtree(done)
    shutil.copytree(tmp_path / "kept", done, symlinks=True)


def again(home: Path, *overrides: str, **options: Any) -> Report:
    report = run(home / "r.yaml", home / "out", overrides=overrides, **options)
    assert report is not None
    return report


def ran(report: Report) -> list[str]:
    """The stages that were not reused."""
    return [stage.stage for stage in report.stages if not stage.reused]


def would_run(home: Path, *overrides: str, **options: Any) -> list[str]:
    found = dry_run(Recipe.read(home / "r.yaml", overrides), home / "out", **options)
    return [stage for stage, what in found.items() if what == "run" and stage != "report"]


# Reuse


def test_the_stages_are_those_of_the_contract() -> None:
    contract = "recipe -> load -> score -> select -> prune -> recover -> export -> verify -> bench -> report"
    assert ["recipe", *STAGE_NAMES] == contract.split(" -> ")


def test_a_second_run_reuses_all_and_publishes_the_same(mine: Path) -> None:
    before = {k: v for k, v in tree(mine / "out").items() if not k.startswith(("report.", ".slimheads", "slim/README"))}
    first = report_of(mine / "out")
    assert not any(reused(first).values())
    assert would_run(mine) == []
    report = again(mine)
    assert ran(report) == []
    after = tree(mine / "out")
    assert {name: after[name] for name in before} == before
    second = report_of(mine / "out")
    assert all(reused(second).values())
    assert [s["seconds"] for s in second["stages"]] == [
        s["seconds"] for s in first["stages"]
    ]  # what it cost when it ran
    same = ("model", "scores", "plan", "certificate", "drift", "latency", "files", "recipe", "gates")
    assert {key: second[key] for key in same} == {key: first[key] for key in same}


FROM = {name: list(STAGES[STAGES.index(name) :]) for name in STAGES}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("gates.size_ratio=0.99", []),
        ("bench.threads=2", ["bench"]),
        ("bench.shapes=[[1, 4]]", ["bench"]),
        ("verify.atol=1e-3", ["verify"]),
        ("verify.text=null", ["verify"]),
        ("export.kv_axes=static", FROM["export"]),
        ("export.precisions=[fp32, int8]", FROM["export"]),
        ("select.ratio=0.25", FROM["select"]),
        ("select.scope=layer", FROM["select"]),
        ("task=fill-mask", FROM["load"]),
    ],
)
def test_a_change_of_the_recipe_runs_what_depends_on_it(done: Path, change: str, expected: list[str]) -> None:
    assert would_run(done, change) == expected


@pytest.mark.parametrize("change", ["bench.threads=2", "select.ratio=0.25"])
def test_a_run_does_what_the_dry_run_said(mine: Path, change: str) -> None:
    expected = would_run(mine, change)
    assert ran(again(mine, change)) == expected
    assert would_run(mine, change) == []


def change_a_weight(file: Path) -> None:
    tensors = load_file(file)
    tensors["embeddings.word_embeddings.weight"][5, 5] += 1
    save_file(tensors, file, {"format": "pt"})


def test_a_changed_source_runs_all(mine: Path) -> None:
    change_a_weight(mine / "model" / "model.safetensors")
    assert would_run(mine) == list(STAGES)


def test_a_changed_tokenizer_runs_all_for_it_ships_too(mine: Path) -> None:
    path = mine / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"the"', '"thy"'))
    assert would_run(mine) == list(STAGES)


def test_a_changed_text_runs_verify_and_another_path_to_the_same_text_nothing(mine: Path) -> None:
    (mine / "text.txt").rename(mine / "elsewhere.txt")
    assert would_run(mine, f"verify.text={mine / 'elsewhere.txt'}") == []
    (mine / "elsewhere.txt").write_text("other words\n")
    assert would_run(mine, f"verify.text={mine / 'elsewhere.txt'}") == ["verify"]


def test_the_same_model_in_another_folder_is_the_same(mine: Path) -> None:
    (mine / "model").rename(mine / "moved")
    assert would_run(mine, f"model={mine / 'moved'}") == []


def test_another_version_of_a_library_or_of_our_code_runs_all(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "transformers", "slimheads"):
        with monkeypatch.context() as patch:
            patch.setattr("slimheads.pipeline.stage.versions", lambda name=name: versions() | {name: "another"})
            assert would_run(done) == list(STAGES)


def test_the_published_recipe_runs_to_the_same_results(mine: Path) -> None:
    report = run(mine / "out" / "recipe.yaml", mine / "out")
    assert report is not None and ran(report) == []


def test_an_override_lands_in_the_published_recipe(mine: Path) -> None:
    again(mine, "select.ratio=0.25", "gates.size_ratio=1.0")
    written = Recipe.read(mine / "out" / "recipe.yaml")
    assert (written.select.ratio, written.gates.size_ratio) == (0.25, 1.0)


@pytest.mark.parametrize(
    ("stage", "pattern"),
    [("prune", "slim/model.safetensors"), ("export", "slim/onnx/model.onnx"), ("score", "record.json")],
)
def test_a_damaged_stored_file_runs_its_stage_with_a_warning(
    mine: Path, stage: str, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    (file,) = (mine / "out" / ".slimheads" / "stages" / stage).glob(f"*/{pattern}")
    before = file.read_bytes()
    file.unlink()  # not written over: it is the published file as well
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    report = again(mine)
    assert ran(report) == [stage]
    assert [r.levelname for r in caplog.records if "damaged" in r.message and stage in r.message] == ["WARNING"]
    assert report.verdict.ok
    assert would_run(mine) == []


def test_a_stage_that_leaves_other_bytes_takes_its_old_certificate_with_it(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run forced to prune again is interrupted; the next one must not pair the new weights with the old proof."""
    with monkeypatch.context() as patch:
        patch.setattr(prune_stage, "save", broken_save)
        patch.setattr(export_stage, "export", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            again(mine, from_stage="prune")
    assert would_run(mine) == FROM["export"]
    assert again(mine).verdict.exit_code == 4


@pytest.mark.parametrize("stage", ["verify", "bench"])
def test_a_result_that_may_not_be_reused_replaces_one_that_might(
    mine: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def failing(*given: Any, **options: Any) -> Certificate:
        links = stages_verify(*given, **options).links
        return Certificate((links[0].model_copy(update={"passed": False, "reason": "flaky"}), *links[1:]), ())

    with monkeypatch.context() as patch:
        patch.setattr(verify_stage, "verify", failing)
        steady(patch, "inconclusive")
        again(mine, from_stage=stage)
    assert would_run(mine) == [stage]


def test_an_edit_of_the_output_is_refused_by_name_until_it_is_moved_away(mine: Path) -> None:
    edited = mine / "out" / "slim" / "onnx" / "model.onnx"
    whole = edited.read_bytes()
    edited.write_bytes(b"edited in place")
    with pytest.raises(UsageError, match="was changed after slimheads made it") as caught:
        again(mine)
    assert caught.value.where == str(edited)
    assert edited.read_bytes() == b"edited in place"
    edited.rename(mine / "edited.onnx")
    assert again(mine).verdict.ok
    assert edited.read_bytes() == whole


@pytest.mark.parametrize("verdict", ["inconclusive", "not measured"])
def test_a_latency_that_says_nothing_is_measured_again(
    mine: Path, monkeypatch: pytest.MonkeyPatch, verdict: str
) -> None:
    steady(monkeypatch, verdict)
    assert ran(again(mine, "bench.threads=2")) == ["bench"]
    assert would_run(mine, "bench.threads=2") == ["bench"]
    assert ran(again(mine, "bench.threads=2")) == ["bench"]


# --from and --until


@pytest.mark.parametrize("stage", ["load", "export", "bench", "report"])
def test_from_runs_this_stage_and_all_later_ones(mine: Path, stage: str) -> None:
    expected = FROM.get(stage, [])
    assert would_run(mine, from_stage=stage) == expected
    assert ran(again(mine, from_stage=stage)) == expected


@pytest.mark.parametrize(
    ("stage", "published"),
    [
        ("load", {"recipe.yaml"}),
        ("score", {"recipe.yaml", "scores.json"}),
        ("select", {"recipe.yaml", "scores.json", "plan.json"}),
        ("export", {"recipe.yaml", "scores.json", "plan.json"}),
    ],
)
def test_until_stops_and_publishes_the_plan_so_far(tmp_path: Path, stage: str, published: set[str]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    assert run(recipe, tmp_path / "out", until=stage) is None
    assert visible(tmp_path / "out") == published
    stored = {path.name for path in (tmp_path / "out" / ".slimheads" / "stages").iterdir()}
    assert stored == set(STAGES[: STAGES.index(stage) + 1])
    report = run(recipe, tmp_path / "out")
    assert report is not None and ran(report) == list(STAGES[STAGES.index(stage) + 1 :])
    assert (tmp_path / "out" / "slim").is_dir()


def test_until_report_is_a_whole_run(mine: Path) -> None:
    assert again(mine, until="report").verdict.ok


def test_until_leaves_a_finished_run_of_the_same_recipe_alone(mine: Path) -> None:
    before = tree(mine / "out")
    assert run(mine / "r.yaml", mine / "out", until="select") is None
    after = tree(mine / "out")
    assert after == before


def test_until_retracts_what_another_recipe_left(mine: Path) -> None:
    assert run(mine / "r.yaml", mine / "out", overrides=["select.ratio=0.25"], until="select") is None
    assert visible(mine / "out") == {"recipe.yaml", "scores.json", "plan.json"}
    assert sum(len(site["kept"]) for site in json.loads((mine / "out" / "plan.json").read_text())["sites"]) == 9


def test_until_retracts_what_another_model_left_under_the_same_recipe(mine: Path) -> None:
    change = load_file(mine / "model" / "model.safetensors")
    change["encoder.layer.0.attention.self.query.weight"] *= 9
    save_file(change, mine / "model" / "model.safetensors", {"format": "pt"})
    assert run(mine / "r.yaml", mine / "out", until="score") is None
    assert visible(mine / "out") == {"recipe.yaml", "scores.json"}


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"from_stage": "prun"}, "--from"),
        ({"until": "recipe"}, "--until"),
        ({"from_stage": "bench", "until": "export"}, "--from"),
    ],
)
def test_stage_names_that_make_no_sense_are_refused(done: Path, options: dict[str, str], where: str) -> None:
    before = tree(done)
    for call in (run, lambda recipe, out, **given: dry_run(Recipe.read(recipe), out, **given)):
        with pytest.raises(UsageError) as caught:
            call(done / "r.yaml", done / "out", **options)  # type: ignore[operator]
        assert caught.value.where == where
    assert tree(done) == before


def test_a_partial_run_plans_no_later_stage(done: Path) -> None:
    planned = dry_run(Recipe.read(done / "r.yaml"), done / "other", until="select")
    assert planned == dict.fromkeys(("load", "score", "select"), "run")


# The certificate decides


def broken_save(model: Any, folder: Path) -> None:
    """As `save`, but one weight is written wrong."""
    stages_save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.attention.output.dense.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


stages_save, stages_verify = prune_stage.save, verify_stage.verify


@pytest.mark.parametrize("until", [None, "verify", "bench"])
def test_a_failed_certificate_ends_the_run_with_its_report_and_retracts_slim(
    mine: Path, monkeypatch: pytest.MonkeyPatch, until: str | None
) -> None:
    assert (mine / "out" / "slim").is_dir()
    monkeypatch.setattr(prune_stage, "save", broken_save)
    report = again(mine, from_stage="prune", until=until)
    assert (report.verdict.ok, report.verdict.exit_code) == (False, 4)
    assert report.verdict.reasons[0].startswith(
        "link 1 (model.safetensors): gated dense torch == slim torch failed at batch"
    )
    assert "differs beyond" in report.verdict.reasons[0]
    assert visible(mine / "out") == {
        "dense", "recipe.yaml", "scores.json", "plan.json", "report.json", "report.md", "report.html",
    }  # fmt: skip
    written = report_of(mine / "out")
    assert [link["link"] for link in written["certificate"] if not link["passed"]] == [1]
    assert (written["latency"], written["drift"]) == ([], None)
    assert written["latency_reason"] and written["drift_reason"]
    assert written["model"]["slim"]["flops"] is None and written["model"]["slim"]["reason"]
    assert "verify" in would_run(mine)  # a failed certificate is no result to be reused
    monkeypatch.undo()
    steady(monkeypatch)
    assert again(mine, from_stage="prune").verdict.ok
    assert (mine / "out" / "slim").is_dir()


# Around a run


def test_a_dry_run_writes_nothing(done: Path, tmp_path: Path) -> None:
    before = tree(done)
    for options in ({}, {"from_stage": "load"}, {"until": "select"}):
        dry_run(Recipe.read(done / "r.yaml"), done / "out", **options)
    assert tree(done) == before
    found = dry_run(Recipe.read(done / "r.yaml"), tmp_path / "new")
    assert found == dict.fromkeys(STAGE_NAMES, "run")
    assert not list(tmp_path.iterdir())
    assert dry_run(Recipe.read(done / "r.yaml"), tmp_path, until="score") == {"load": "run", "score": "run"}


def test_a_run_takes_a_recipe_made_in_python(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": str(checkpoint()), "select": {"ratio": 0.25}})
    report = run(recipe, tmp_path / "out")
    assert report is not None and report.model.heads.removed == 3
    assert Recipe.read(tmp_path / "out" / "recipe.yaml") == recipe


def test_the_source_is_left_as_it_was(mine: Path) -> None:
    before = tree(mine / "model")
    again(mine, from_stage="load")
    (mine / "out" / "slim" / "config.json").write_text("an edit of the output")
    assert tree(mine / "model") == before


def test_a_missing_text_is_told_before_any_work(mine: Path) -> None:
    before = tree(mine / "out")
    with pytest.raises(UsageError, match=r"nowhere\.txt: the texts cannot be read"):
        run(mine / "r.yaml", mine / "out", overrides=["select.ratio=0.25", f"verify.text={mine / 'nowhere.txt'}"])
    assert tree(mine / "out") == before


def test_the_step_summary_gets_the_report(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = mine / "summary.md"
    summary.write_text("# before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    again(mine)
    assert summary.read_text() == "# before\n" + (mine / "out" / "report.md").read_text() + "\n"


def test_a_step_summary_that_cannot_be_written_changes_no_verdict(
    mine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(mine / "no" / "such" / "folder.md"))
    assert again(mine).verdict.ok
    assert any("step summary" in record.message for record in caplog.records)


def test_two_runs_of_the_same_recipe_make_the_same_model(done: Path, tmp_path: Path) -> None:
    report = run(done / "r.yaml", tmp_path / "out")
    assert report is not None
    for name in ("plan.json", "scores.json", "slim/model.safetensors", "slim/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (done / "out" / name).read_bytes()
    assert report.drift == Report.model_validate_json((done / "out" / "report.json").read_text()).drift


def test_peak_memory_and_time_of_a_run_are_at_least_those_of_its_parts(done: Path) -> None:
    report = report_of(done / "out")
    assert report["peak_rss_mb"] >= max(stage["peak_rss_mb"] for stage in report["stages"]) > 50
    assert report["seconds"] >= sum(stage["seconds"] for stage in report["stages"]) - 0.5


def test_an_error_names_no_file_of_the_store(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*given: Any, **_: Any) -> Certificate:
        file = given[3] / "onnx" / "model.onnx"
        raise UsageError(f"{file} cannot be read", where=str(file), hint="export it again")

    monkeypatch.setattr("slimheads.pipeline.stages.verify.verify", damaged)
    with pytest.raises(UsageError) as failed:
        again(mine, "verify.atol=1e-3")
    assert str(failed.value).startswith("slim/onnx/model.onnx, as the verify stage has it: slim/onnx/model.onnx cannot")


def test_what_a_stage_told_is_told_again_where_it_is_reused(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify_stage.verify

    def telling(*given: Any, **options: Any) -> Certificate:
        notify("a layer was left out")
        return real(*given, **options)

    monkeypatch.setattr("slimheads.pipeline.stages.verify.verify", telling)
    assert again(mine, "verify.atol=1e-3").notices == ("a layer was left out",)
    monkeypatch.undo()
    steady(monkeypatch)
    report = again(mine, "verify.atol=1e-3")
    assert ran(report) == [] and report.notices == ("a layer was left out",)

"""A preview says what a run will do, and leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from whole_runs import checkpoint, report_of, slimheads, steady, tree, write_recipe

from slimheads.errors import UsageError
from slimheads.pipeline.preview import preview
from slimheads.recipe.recipe import Recipe

JOINT = {"ratio": 0.25, "ffn_ratio": 0.4, "ffn_multiple_of": 8}


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_counts_and_plan_are_those_of_a_run(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint(model_type), select=JOINT)
    found = preview(Recipe.read(recipe))
    assert slimheads("run", recipe, "--out", tmp_path / "out").code == 0
    report = report_of(tmp_path / "out")
    for side in ("dense", "slim"):
        assert getattr(found, side).parameters == report["model"][side]["parameters"]
        assert getattr(found, side).flops == report["model"][side]["flops"]
    assert (found.dense.heads, found.slim.heads) == (
        report["model"]["heads"]["total"],
        report["model"]["heads"]["kept"],
    )
    assert found.model_dump(mode="json")["kinds"] == report["model"]["kinds"]
    assert found.plan.to_json() == json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (found.model, found.task) == (report["model"]["source"], report["model"]["task"])
    assert list(found.shape) == report["model"]["flops_shape"]


def test_bytes_are_those_of_the_weights_in_their_own_dtype() -> None:
    found = preview(Recipe(model=str(checkpoint())))
    assert (found.dense.bytes, found.slim.bytes) == (4 * found.dense.parameters, 4 * found.slim.parameters)


def test_ratio_zero_changes_no_figure() -> None:
    found = preview(Recipe.model_validate({"model": str(checkpoint()), "select": {"ratio": 0.0}}))
    assert found.dense == found.slim
    assert found.plan.removed == 0


def test_it_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml")
    before = tree(tmp_path), tree(checkpoint())
    assert slimheads("plan", recipe).code == 0
    assert (tree(tmp_path), tree(checkpoint())) == before


def test_a_ratio_that_the_floors_forbid_names_its_line(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {checkpoint()}\nselect:\n  keep_at_least: 3\n  ratio: 0.5\n")
    with pytest.raises(UsageError, match=r"r\.yaml:4:10: ratio 0\.5 means 2 of 4 units of encoder\.layer\.0"):
        preview(Recipe.read(recipe))

"""A run writes in new folders, empty ones and its own, apart from what it reads; all else is refused, untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole_runs import tree

from slimheads.errors import UsageError
from slimheads.output.place import require_place
from slimheads.recipe.recipe import Recipe


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("model", "empty", "foreign", "tree/.git", "me", "real", "own/.slimheads/stages", "own/slim", "kept"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("model/config.json", "foreign/thesis.tex", "me/.profile", "own/.slimheads/text.txt", "kept/.gitkeep"):
        (tmp_path / file).write_text("mine")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "to-slim").symlink_to("own/slim")
    (tmp_path / "partly").mkdir()
    (tmp_path / "partly" / "model.safetensors").symlink_to("../own/slim/model.safetensors")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def require(out: str, model: str = "model", **verify: str) -> None:
    require_place(Path(out), Path(model), Recipe.model_validate({"model": model, "verify": verify}))


@pytest.mark.parametrize("out", ["new", "new/below", "empty", "own", "own/", "kept", "model-2", "me/runs", "tree/runs"])
def test_folders_to_write_in(home: Path, out: str) -> None:
    before = tree(home)
    require(out)
    assert tree(home) == before


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("link", "is a link"),
        ("link/", "is a link"),
        ("foreign", r"thesis\.tex"),
        (".", "the model lies in the output folder"),
        ("tree", "git work tree"),
        ("me", "straight into this folder"),
        ("me/../me", "straight into this folder"),
        ("/", "the model lies in the output folder"),
        ("model", "lies in the model's folder"),
        ("model/runs/x", "lies in the model's folder"),
        ("empty/../model/runs", "lies in the model's folder"),
    ],
)
def test_folders_that_are_not_for_a_run(home: Path, out: str, said: str) -> None:
    before = tree(home)
    with pytest.raises(UsageError, match=said):
        require(out)
    assert tree(home) == before


@pytest.mark.parametrize(
    "model", ["own", "own/slim", "own/slim/", "./own/../own/slim", "to-slim", "own/.slimheads/stages", "partly"]
)
def test_a_model_that_the_run_would_replace(home: Path, model: str) -> None:
    for out in ("own", str(home / "own"), "real/../own"):
        with pytest.raises(
            UsageError, match=r"the (model lies in the output folder|output folder lies in the model's folder)"
        ):
            require(out, model)
    require("new", model)


def test_a_sample_that_the_run_would_replace(home: Path) -> None:
    for text in ("own/slim/text.txt", "own/.slimheads/text.txt", "to-slim/text.txt", "own/report.md"):
        with pytest.raises(UsageError, match="the sample lies where"):
            require("own", text=text)
    require("own", text="own/my-text.txt")

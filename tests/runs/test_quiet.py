"""A user sees lines of slimheads and of no other library, also on the first run, when caches are made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import Ended, checkpoint, write_recipe

_CACHES = ("HF_", "MPL", "TRANSFORMERS_", "XDG_", "SLIMHEADS_", "PYTHONWARNINGS")


def first(home: Path, *arguments: object) -> Ended:
    """A command without any library's cache, in a process of its own: C++ code writes to the file descriptor."""
    home.mkdir()
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith(_CACHES)}
    ended = subprocess.run(
        [sys.executable, "-m", "slimheads", *map(str, arguments)],
        env=surroundings | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_stderr_of_a_first_run_holds_progress_and_nothing_else(kind: str, tmp_path: Path) -> None:
    forms = ["plain", "optimized", "attention", "fused", "rewritten"]
    export = {"precisions": ["fp32", "fp16", "int8"], "candidates": forms}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint(kind), export=export)
    ended = first(tmp_path / "home", "run", recipe, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert ended.complaints == []


@pytest.mark.slow
def test_a_first_plot_shows_no_line_of_the_library_that_draws_it(tmp_path: Path) -> None:
    ended = first(tmp_path / "home", "doctor")
    assert list((tmp_path / "home").rglob("fontlist*")), "matplotlib found a cache: this was no first plot"
    assert ended.err == "" or ended.complaints[0].startswith("slimheads: this environment lacks"), ended.err

"""A user sees lines of slimheads and of no other library, also on the first run, when caches are made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import Ended, checkpoint, write_recipe

_CACHES = ("HF_", "MPL", "TRANSFORMERS_", "XDG_", "SLIMHEADS_", "PYTHONWARNINGS")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_stderr_of_a_first_run_holds_progress_and_nothing_else(kind: str, tmp_path: Path) -> None:
    """In a process of its own, for C++ code writes to the file descriptor."""
    home = tmp_path / "home"
    home.mkdir()
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith(_CACHES)}
    forms = ["plain", "optimized", "attention", "fused", "rewritten"]
    export = {"precisions": ["fp32", "fp16", "int8"], "candidates": forms}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint(kind), export=export)
    ended = subprocess.run(
        [sys.executable, "-m", "slimheads", "run", recipe, "--out", tmp_path / "out"],
        env=surroundings | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    assert list(home.rglob("fontlist*")), "matplotlib found a cache: this was no first run"
    assert Ended(ended.returncode, ended.stdout, ended.stderr).complaints == []

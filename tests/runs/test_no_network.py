"""A local model is never a reason to open a connection: not to read, run or refuse it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import checkpoint, write_recipe

# In a process of its own: no name is looked up, and nothing but a Unix socket connects. Every try is written down,
# for a library may catch what is raised.
GUARDED = """
import socket, sys
tries = []
def refuse(*where, **_):
    tries.append(where[-1] if where else None)
    raise OSError(101, "no network in this test")
real = socket.socket.connect
socket.socket.connect = lambda self, to: real(self, to) if self.family == socket.AF_UNIX else refuse(to)
socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
from slimheads.cli import main
try:
    main()
finally:
    print("tries", tries, file=sys.stderr)
"""


def guarded(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, free to use the hub if it wanted to."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    command = [sys.executable, "-c", GUARDED, *map(str, arguments)]
    return subprocess.run(command, env=outside, capture_output=True, text=True, check=False, timeout=240)


def tries(ended: subprocess.CompletedProcess[str]) -> str:
    return next(line for line in ended.stderr.splitlines() if line.startswith("tries"))


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    """A local model of a kind that is not covered, whose configuration names another on the hub."""
    folder = tmp_path / "refused"
    shutil.copytree(checkpoint(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "detr", "use_timm_backbone": True, "backbone": "resnet50", "_name_or_path": "some/model"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_run_of_a_local_model_connects_to_nothing(kind: str, tmp_path: Path) -> None:
    ended = guarded("run", write_recipe(tmp_path / "r.yaml", checkpoint(kind)), "--out", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert tries(ended) == "tries []"


@pytest.mark.parametrize("command", ["doctor", "families", "init", "plan", "schema", "score"])
def test_no_other_command_connects(command: str, tmp_path: Path) -> None:
    subjects = {"init": checkpoint(), "plan": write_recipe(tmp_path / "r.yaml"), "score": checkpoint()}
    ended = guarded(command, *([subjects[command]] if command in subjects else []))
    assert ended.returncode == 0, ended.stderr
    assert tries(ended) == "tries []"


def test_a_local_model_that_is_refused_connects_to_nothing(refused: Path, tmp_path: Path) -> None:
    for arguments in (("run", write_recipe(tmp_path / "r.yaml", refused), "-o", tmp_path / "out"), ("score", refused)):
        ended = guarded(*arguments)
        assert ended.returncode == 3, ended.stderr
        assert tries(ended) == "tries []"


def test_the_guard_sees_a_try() -> None:
    ended = guarded("score", "someone/something")
    assert ended.returncode == 5, ended.stderr
    assert tries(ended) != "tries []"

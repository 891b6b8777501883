"""ONNX Runtime's telemetry is off before the first session, in every process."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import checkpoint, write_recipe

import slimheads as package
from slimheads.runtime.environment import environment

HOME = Path(package.__file__).parent
SPOT = "slimheads.runtime.onnx_runtime"
# Runs a command, and says in which order telemetry was switched and the first session was opened.
WATCHED = """
import sys
import onnxruntime
seen = []
def told(name, real):
    return lambda *args, **named: (seen.append(name), real(*args, **named))[1]
for name in ("disable_telemetry_events", "enable_telemetry_events", "InferenceSession"):
    real = getattr(onnxruntime, name)
    if isinstance(real, type):
        class Session(real):
            def __init__(self, *args, **named):
                seen.append("InferenceSession")
                super().__init__(*args, **named)
        onnxruntime.InferenceSession = Session
    else:
        setattr(onnxruntime, name, told(name, real))
from slimheads.cli import main
try:
    main()
finally:
    print("seen", *dict.fromkeys(seen), file=sys.stderr)
"""


def seen(*arguments: object) -> list[str]:
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return next(line.split()[1:] for line in ended.stderr.splitlines() if line.startswith("seen"))


def test_every_command_that_opens_a_session_has_switched_it_off_before(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path / "r.yaml"), tmp_path / "out"
    graph, short = out / "slim" / "onnx" / "model.onnx", ("--shape", "1x8", "--min-seconds", "0.05", "--threads", "1")
    for arguments in (("run", recipe, "--out", out), ("bench", graph, graph, *short)):
        assert seen(*arguments) == ["disable_telemetry_events", "InferenceSession"]


@pytest.mark.parametrize("command", ["doctor", "families", "init", "plan", "schema", "score"])
def test_no_other_command_has_it_on(command: str, tmp_path: Path) -> None:
    subjects = {"init": checkpoint(), "plan": write_recipe(tmp_path / "r.yaml"), "score": checkpoint()}
    noted = seen(command, *([subjects[command]] if command in subjects else []))
    assert noted in ([], ["disable_telemetry_events"], ["disable_telemetry_events", "InferenceSession"])


def test_importing_the_package_tells_child_processes() -> None:
    bare = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    code = "import slimheads, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    ended = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "1"


def test_the_environment_record_says_so() -> None:
    assert environment().onnxruntime_telemetry == "off"


@pytest.mark.parametrize("path", sorted(HOME.rglob("*.py")), ids=lambda path: path.relative_to(HOME).as_posix())
def test_a_module_that_imports_onnxruntime_imports_the_one_spot(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    uses = any("onnxruntime" in name.split(".") for name in imported)
    assert not uses or SPOT in imported or path.name == "onnx_runtime.py"

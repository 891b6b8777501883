"""A local model is never a reason to open a connection, and ONNX Runtime's telemetry is off before any session."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import Forks
from whole_runs import checkpoint, write_recipe

import slimheads as package
from slimheads.runtime.environment import environment

HOME = Path(package.__file__).parent
SPOT = "slimheads.runtime.onnx_runtime"
OFF, SESSION = "disable_telemetry_events", "InferenceSession"
# No name is looked up, and nothing but a Unix socket connects; and the order in which telemetry is switched and the
# first session is opened. Every try is written down, because a library may catch what is raised.
WATCHED = """
import json, socket, sys
import onnxruntime
tries, seen = [], []
def refuse(*where, **_):
    tries.append(repr(where[-1]) if where else None)
    raise OSError(101, "no network in this test")
connect = socket.socket.connect
socket.socket.connect = lambda self, to: connect(self, to) if self.family == socket.AF_UNIX else refuse(to)
socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
def noted(name, real):
    return lambda *args, **named: (seen.append(name), real(*args, **named))[1]
for name in ("disable_telemetry_events", "enable_telemetry_events"):
    setattr(onnxruntime, name, noted(name, getattr(onnxruntime, name)))
class Session(onnxruntime.InferenceSession):
    def __init__(self, *args, **named):
        seen.append("InferenceSession")
        super().__init__(*args, **named)
onnxruntime.InferenceSession = Session
def after():
    print(json.dumps({"tries": tries, "seen": list(dict.fromkeys(seen))}), file=sys.stderr)
"""


@dataclass(frozen=True)
class Watched:
    """How a command ended, the connections that it tried, and what it did with ONNX Runtime, in this order."""

    code: int
    err: str
    tries: list[str]
    seen: list[str]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Free to use the hub if they wanted to."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    with Forks(tmp_path_factory.mktemp("forks"), WATCHED, outside) as made:
        yield made


def watched(forks: Forks, *arguments: object) -> Watched:
    ended = forks.run(*arguments)
    *_, last = ended.stderr.splitlines()
    return Watched(ended.returncode, ended.stderr, **json.loads(last))


def test_no_command_connects_or_has_telemetry_on(forks: Forks, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path / "r.yaml"), tmp_path / "out"
    graph, short = out / "slim" / "onnx" / "model.onnx", ("--shape", "1x8", "--min-seconds", "0.05", "--threads", "1")
    opens_sessions = {
        "run": ("run", recipe, "--out", out),
        "bench": ("bench", graph, graph, *short),
        "run of a decoder": ("run", write_recipe(tmp_path / "d.yaml", checkpoint("gpt2")), "--out", tmp_path / "gpt2"),
    }
    others = {
        **{name: (name,) for name in ("doctor", "families", "schema")},
        **{name: (name, checkpoint()) for name in ("init", "score")},
        "plan": ("plan", recipe),
    }
    for name, arguments in (opens_sessions | others).items():
        found = watched(forks, *arguments)
        assert (found.code, found.tries) == (0, []), f"{name}: {found.err}"
        assert found.seen in ([OFF, SESSION], *([] if name in opens_sessions else ([], [OFF]))), name


def test_a_local_model_that_is_refused_connects_to_nothing(forks: Forks, tmp_path: Path) -> None:
    """It is of a kind that is not covered, and its configuration names another on the hub."""
    folder = tmp_path / "refused"
    shutil.copytree(checkpoint(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "detr", "use_timm_backbone": True, "backbone": "resnet50", "_name_or_path": "some/model"}
    (folder / "config.json").write_text(json.dumps(config))
    for arguments in (("run", write_recipe(tmp_path / "r.yaml", folder), "-o", tmp_path / "out"), ("score", folder)):
        found = watched(forks, *arguments)
        assert (found.code, found.tries) == (3, []), f"{arguments[0]}: {found.err}"


def test_a_try_to_connect_is_seen(forks: Forks) -> None:
    found = watched(forks, "score", "someone/something")
    assert found.code == 5 and found.tries, found.err


def test_importing_the_package_tells_child_processes() -> None:
    bare = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    code = "import slimheads, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    ended = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "1"


def test_the_environment_record_says_so() -> None:
    assert environment().onnxruntime_telemetry == "off"


def test_a_module_that_imports_onnxruntime_imports_the_one_spot() -> None:
    for path in HOME.rglob("*.py"):
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
        uses = any("onnxruntime" in name.split(".") for name in imported)
        assert not uses or SPOT in imported or path.name == "onnx_runtime.py", path

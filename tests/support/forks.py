"""Commands in processes of their own, which share the start of Python: a process that imported the libraries forks.

Importing torch, transformers and optimum takes longer than most commands do. slimheads itself is not imported before
the fork: what it does when it is imported happens in every command's own process.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

# Where stdout leads: a file, a reader that has gone, one that goes after a line, nowhere (`>&-`).
Stdout = Literal["file", "gone", "after a line", "closed"]
LIBRARIES = (
    *("onnxruntime.quantization", "onnxruntime.transformers.optimizer", "optimum.exporters.onnx.convert"),
    *("scipy.stats", "torch._dynamo", "transformers.loss.loss_utils", "transformers.models.auto.modeling_auto"),
)


class Forks:
    """Runs commands with the given environment; `before` is Python code that each process runs first."""

    def __init__(self, home: Path, before: str = "", environment: Mapping[str, str] = os.environ) -> None:
        self._home = home
        home.mkdir(parents=True, exist_ok=True)
        # Telemetry would start a thread, which no fork may have; and what is left in a buffer at the end counts too.
        changes = {"ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": ""}
        self._server = subprocess.Popen(
            [sys.executable, __file__, before],
            env=dict(environment) | changes,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, *arguments: object, stdout: Stdout = "file", merged: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """`slimheads ARGUMENTS`; `merged`: stderr goes where stdout goes."""
        out, err = self._home / "stdout", self._home / "stderr"
        command = [str(argument) for argument in arguments]
        asked = {"command": command, "stdout": stdout, "merged": merged, "out": str(out), "err": str(err)}
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(command, code, *(p.read_text(encoding="utf-8") for p in (out, err)))

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        self._server.communicate()


def _serve(before: str) -> None:
    """Forks for every line of stdin, and answers with the exit code."""
    for name in LIBRARIES:
        __import__(name)
    for line in iter(sys.stdin.readline, ""):
        sys.stdout.flush()
        if not (process := os.fork()):
            _become(json.loads(line), before)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    _end(0)


def _become(asked: dict[str, Any], before: str) -> NoReturn:
    """The command itself, to the end of this process."""
    for number, name in ((2, "err"), (1, "out")):
        file = os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    if asked["stdout"] in ("gone", "after a line"):
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(write)
        if asked["stdout"] == "after a line":
            subprocess.Popen(["head", "-1"], stdin=read, stdout=subprocess.DEVNULL)
        os.close(read)
    if asked["stdout"] == "closed":  # as Python starts without one
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
    if asked["merged"]:
        os.dup2(1, 2)
    sys.argv = ["slimheads", *asked["command"]]
    _end(_code_of(before))


def _code_of(before: str) -> int:
    """Runs the command; its exit code, or 1 after a traceback."""
    code = before + "\nfrom slimheads.cli import main\ntry:\n    main()\nfinally:\n    after()"
    try:
        exec(code, {"after": lambda: None})
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    raise AssertionError("main returned without an exit code")


def _end(code: int) -> NoReturn:
    """What Python does at exit, but for taking the libraries apart, which takes seconds."""
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:
        traceback.print_exc()
        os._exit(120)
    os._exit(code)


if __name__ == "__main__":
    _serve(*sys.argv[1:])

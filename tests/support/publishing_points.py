"""Cuts publishing short at every rename, in processes of their own, and prints what it found as JSON.

    python publishing_points.py exchange|rename FOLDER [all]

`all`: at every call that changes the disk, in minutes. Not a test module: it forks, and must have no threads.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from slimheads.errors import SlimheadsError
from slimheads.output import publishing
from slimheads.output.publishing import Source, publish
from slimheads.output.store import lock

Cut = Literal["kill before", "kill after", "fail once", "fail from then on"]
CUTS: tuple[Cut, ...] = ("kill before", "kill after", "fail once", "fail from then on")
DONE = 99  # the exit code of a process in which there were fewer calls

OLD: Mapping[str, Source] = {
    "plan.json": b"both",
    "slim": {"config.json": b"old", "onnx/model.onnx": b"old graph", "old.txt": b"only in the old one"},
    "report.json": b"old",
    "report.html": b"old",
}
NEW: Mapping[str, Source] = {
    "plan.json": b"both",
    "slim": {"config.json": b"new", "onnx/model.onnx": b"new graph", "new.txt": b"only in the new one"},
    "report.json": b"new",
    "report.md": b"new",
}
RETRACTED = ("report.html",)


def show_new(out: Path) -> None:
    publish(out, NEW, RETRACTED)


def take_the_lock(out: Path) -> None:
    with lock(out):
        pass


def shown(folder: Path) -> dict[str, dict[str, str]]:
    """Name -> path -> content of what a user sees."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] != ".slimheads":
            found.setdefault(parts[0], {})["/".join(parts[1:])] = path.read_text()
    return found


def cut_short(work: Callable[[Path], None], out: Path, at: int, cut: Cut, exchanging: bool) -> tuple[int, str]:
    """Does the work in a process in which the call number `at` goes wrong: how it ended, and what was called there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _cut_calls(at, cut, writer, exchanging)
            work(out)
            os._exit(DONE)
        except SlimheadsError as error:
            os._exit(error.exit_code)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr)
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as told:
        call = told.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), call


def _cut_calls(at: int, cut: Cut, writer: int, exchanging: bool) -> None:
    calls = iter(range(10_000))
    die = (os.getpid(), signal.SIGKILL)
    kill = os.kill

    def cutting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            number = next(calls)
            if number == at:
                os.write(writer, name.encode())
            if number == at and cut == "kill before":
                kill(*die)
            if (number == at and cut == "fail once") or (number >= at and cut == "fail from then on"):
                raise OSError(errno.EIO, "Input/output error")
            try:
                return real(*given, **options)
            finally:
                if number == at and cut == "kill after":
                    kill(*die)

        return call

    os.fsync = lambda _: None  # what a process leaves behind does not depend on it
    for name in ("rename", "replace", *(("unlink", "rmdir", "mkdir", "fsync") if "all" in sys.argv else ())):
        setattr(os, name, cutting(name, getattr(os, name)))
    exchange = publishing.exchange if exchanging else lambda *_: False
    publishing.exchange = cutting("exchange", exchange)


def every_cut(
    start: Path, work: Callable[[Path], None], exchanging: bool, seen: Callable[..., None], cuts: Sequence[Cut] = CUTS
) -> None:
    """Calls `seen(out, cut, code, call)` after each way in which the work on a copy of `start` can be cut short."""
    out = start.with_name(f"{start.name}-cut")
    for cut in cuts:
        for at in range(10_000):
            shutil.copytree(start, out)
            code, call = cut_short(work, out, at, cut, exchanging)
            if not call:
                assert code == DONE, (cut, at, code)
                shutil.rmtree(out)
                break
            seen(out, cut, code, call)
            shutil.rmtree(out)


def main(exchanging: bool, home: Path) -> dict[str, Any]:
    start, counts, faults = home / "out", Counter[str](), []
    with lock(start):
        publish(start, OLD)
    old = shown(start)
    with lock(start):
        publish(start, NEW, RETRACTED)
    new = shown(start)
    shutil.rmtree(start)
    with lock(start):
        publish(start, OLD)

    def check(right: bool, what: str, *where: object) -> None:
        if not right:
            faults.append(f"{what}: {' / '.join(map(str, where))}")

    def settled(out: Path, *where: object) -> None:
        try:
            take_the_lock(out)
        except SlimheadsError as error:
            check(False, str(error), *where)
            return
        now = shown(out)
        check(now in (old, new), "a mix of two runs stays", *where)
        counts["back to the old run" if now == old else "the new run"] += 1
        check(not list((out / ".slimheads").glob("tmp-*")), "a folder is left over", *where)
        check(not (out / ".slimheads" / "publishing.json").exists(), "the intent is left over", *where)
        show_new(out)
        check(shown(out) == new, "the next run is not shown", *where)

    def after_publishing(out: Path, cut: Cut, code: int, call: str) -> None:
        where = (cut, call)
        counts[f"{cut} {'a rename' if call in ('rename', 'replace', 'exchange') else 'another call'}"] += 1
        now = shown(out)
        for name, files in now.items():
            check(files in (old.get(name), new.get(name)), f"{name} is not whole", *where)
        check("slim" in now or not exchanging, "slim/ is missing for an instant", *where)
        ends = {-signal.SIGKILL} if cut.startswith("kill") else {5, DONE}
        check(code in ends, f"ended with {code}", *where)
        if cut == "fail once" and code == 5 and call != "fsync":
            check(now == old, "an error changed what is shown", *where)
        if (out / ".slimheads" / "publishing.json").exists() and (cut == "kill after" or "all" in sys.argv):
            every_cut(out, take_the_lock, exchanging, after_undoing, CUTS if "all" in sys.argv else CUTS[1::2])
        settled(out, *where)

    def after_undoing(out: Path, cut: Cut, code: int, call: str) -> None:
        counts[f"{cut} when undone"] += 1
        ends = {-signal.SIGKILL} if cut.startswith("kill") else {2, 5, DONE}
        check(code in ends, f"undoing ended with {code}", cut, call)
        check("slim" in shown(out) or not exchanging, "slim/ is missing for an instant", cut, call)
        settled(out, "undone", cut, call)

    every_cut(start, show_new, exchanging, after_publishing)
    return {"counts": counts, "faults": faults}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1] == "exchange", Path(sys.argv[2])), indent=1))

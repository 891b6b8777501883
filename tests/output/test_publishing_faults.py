"""An earlier good output is never lost: publishing is killed, or a rename fails, at every point, and nothing strange is
followed, replaced or deleted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_runs import checkpoint, slimheads, steady, tree, write_recipe

from slimheads import files as disk
from slimheads.errors import EnvironmentLackError, UsageError
from slimheads.output import publishing
from slimheads.output.publishing import publish
from slimheads.output.store import lock

POINTS = Path(__file__).parents[1] / "support" / "publishing_points.py"


def can_exchange(folder: Path) -> bool:
    for name in ("a", "b"):
        (folder / name).write_text(name)
    return disk.exchange(folder / "a", folder / "b") and (folder / "a").read_text() == "b"


def content(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.relative_to(out).parts[0] != ".slimheads"
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed")
@pytest.mark.parametrize("how", ["exchange", "rename"])
def test_a_kill_and_an_error_at_every_rename_lose_nothing(how: str, tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    if how == "exchange" and not can_exchange(tmp_path / "probe"):
        pytest.skip("this system cannot exchange two names")
    (tmp_path / "home").mkdir()
    line = [sys.executable, str(POINTS), how, str(tmp_path / "home")]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    print(how, found["counts"])
    assert found["faults"] == []
    # Two renames for the intent, and for each of five names one; without the exchange two where it was shown before.
    for cut in ("kill before", "kill after", "fail once", "fail from then on"):
        assert found["counts"][f"{cut} a rename"] >= {"exchange": 2 + 5, "rename": 2 + 5 + 3}[how]
    for cut in ("kill after", "fail from then on"):
        assert found["counts"][f"{cut} when undone"] > 5


@pytest.mark.parametrize("exchanging", [True, False])
@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_rename_that_fails_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanging: bool, failure: BaseException
) -> None:
    publish(tmp_path, {"slim": {"a": b"1"}, "report.json": b"1"})
    before = content(tmp_path)
    rename, exchange = os.rename, publishing.exchange
    into_place = str(tmp_path / "report.json")

    def failing(source: Any, target: Any) -> None:
        if os.fspath(target) == into_place and "new" in Path(source).parts:
            raise failure
        rename(source, target)

    def failing_exchange(first: Path, second: Path) -> bool:
        if str(second) == into_place and exchanging and "new" in first.parts:
            raise failure
        return exchanging and exchange(first, second)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        patch.setattr(publishing, "exchange", failing_exchange)
        with pytest.raises(EnvironmentLackError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
            publish(tmp_path, {"slim": {"a": b"2"}, "report.json": b"2"})
    assert content(tmp_path) == before
    assert [path.name for path in (tmp_path / ".slimheads").iterdir()] == ["published.json"]
    if isinstance(caught.value, EnvironmentLackError):
        assert caught.value.exit_code == 5
        assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize("number", [1, 22, 38, 95])  # EPERM, EINVAL, ENOSYS, EOPNOTSUPP
def test_a_file_system_that_cannot_exchange_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Library:
        def renameat2(self, *_: Any) -> int:
            disk.ctypes.set_errno(number)
            return -1

    publish(tmp_path, {"slim": {"a": b"1"}})
    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *_, **__: Library())
    publish(tmp_path, {"slim": {"a": b"2"}})
    assert content(tmp_path) == {"slim/a": b"2"}


def half_published(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run leaves it that was killed after it had moved slim/ away."""
    publish(out, {"slim": {"a": b"1"}, "report.json": b"1"})
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "exchange", lambda *_: False)
        patch.setattr(publishing, "undo", lambda _: None)
        rename = os.rename

        def failing(source: Any, target: Any) -> None:
            if os.fspath(target) == str(out / "slim"):
                raise KeyboardInterrupt
            rename(source, target)

        patch.setattr(os, "rename", failing)
        with pytest.raises(KeyboardInterrupt):
            publish(out, {"slim": {"a": b"2"}, "report.json": b"2"})
    assert not (out / "slim").exists()


def edit_intent(out: Path, **changes: Any) -> None:
    path = out / ".slimheads" / "publishing.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_half_published_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_published(tmp_path, monkeypatch)
    with lock(tmp_path):
        assert content(tmp_path) == {"slim/a": b"1", "report.json": b"1"}


def test_a_damaged_intent_clears_nothing_until_a_run_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_published(tmp_path, monkeypatch)
    (tmp_path / ".slimheads" / "publishing.json").write_text("{")
    for _ in range(2):
        with lock(tmp_path):
            assert [path.read_bytes() for path in (tmp_path / ".slimheads").glob("tmp-*/old/slim/a")] == [b"1"]
    with lock(tmp_path):
        publish(tmp_path, {"slim": {"a": b"3"}})
    with lock(tmp_path):
        assert content(tmp_path) == {"slim/a": b"3", "report.json": b"1"}
        assert not list((tmp_path / ".slimheads").glob("tmp-*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"folder": "../../stranger"},
        {"folder": "stages"},
        {"folder": "tmp-photos"},
        {"changing": ["../../stranger/photo.jpg"]},
        {"changing": ["photo.jpg"]},
        {"before": ["/etc"]},
        {"folder": None},
    ],
)
def test_a_forged_intent_reaches_nothing_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for folder in (tmp_path / "stranger", out / ".slimheads" / "tmp-photos"):
        folder.mkdir(parents=True)
        (folder / "photo.jpg").write_text("mine")
    (out / "photo.jpg").write_text("mine")
    half_published(out, monkeypatch)
    edit_intent(out, **changes)
    with lock(out):
        pass
    photos = [tmp_path / "stranger", out / ".slimheads" / "tmp-photos", out]
    assert all((folder / "photo.jpg").read_text() == "mine" for folder in photos)


def test_a_file_of_the_users_under_a_half_published_name_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_published(tmp_path, monkeypatch)
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "notes.md").write_text("mine")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"slim/notes\.md: was not made by slimheads"), lock(tmp_path):
            pass
    assert (tmp_path / "slim" / "notes.md").read_text() == "mine"
    shutil.rmtree(tmp_path / "slim")
    with lock(tmp_path):
        assert content(tmp_path) == {"slim/a": b"1", "report.json": b"1"}


# What is not ours


def add_a_note(out: Path) -> Path:
    (out / "slim" / "notes.md").write_text("mine")
    return out / "slim" / "notes.md"


def add_a_folder(out: Path) -> Path:
    (out / "slim" / "onnx" / ".git").mkdir()
    (out / "slim" / "onnx" / ".git" / "HEAD").write_text("mine")
    return out / "slim" / "onnx" / ".git" / "HEAD"


def add_a_link(out: Path) -> Path:
    (out / "slim" / "more").symlink_to(out.parent)
    return out / "slim" / "more"


def edit_the_card(out: Path) -> Path:
    (out / "slim" / "README.md").write_text("longer than it was")
    return out / "slim" / "README.md"


def edit_to_the_same_size(out: Path) -> Path:
    (out / "report.md").write_text("ruport")
    os.utime(out / "report.md", ns=(1, 1))
    return out / "report.md"


def replace_by_a_folder(out: Path) -> Path:
    (out / "report.md").unlink()
    (out / "report.md").mkdir()
    (out / "report.md" / "mine").write_text("mine")
    return out / "report.md" / "mine"


def replace_by_a_pipe(out: Path) -> Path:
    (out / "slim" / "README.md").unlink()
    os.mkfifo(out / "slim" / "README.md")
    return out / "slim" / "README.md"


CHANGES = (
    add_a_note,
    add_a_folder,
    add_a_link,
    edit_the_card,
    edit_to_the_same_size,
    replace_by_a_folder,
    replace_by_a_pipe,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_the_user_changed_in_the_output_is_refused_by_name(tmp_path: Path, change: Callable[[Path], Path]) -> None:
    out = tmp_path / "out"
    with lock(out):
        publish(out, {"slim": {"README.md": b"card", "onnx": {}, "onnx/a": b"1"}, "report.md": b"report"})
    (out / "slim" / "onnx" / "a").unlink()  # what is gone is no loss
    (out / "slim" / ".DS_Store").write_text("of a file browser")
    with lock(out):
        pass
    file = change(out)
    with pytest.raises(UsageError) as caught, lock(out):
        pass
    assert caught.value.where == str(file)
    for retract in ((), ("slim", "report.md")):
        with pytest.raises(UsageError):
            publish(out, {} if retract else {"slim": {"a": b"2"}, "report.md": b"2"}, retract)
    assert os.path.lexists(file)


def test_an_output_of_an_earlier_version_is_replaced(tmp_path: Path) -> None:
    publish(tmp_path, {"slim": {"a": b"1"}, "report.md": b"1"})
    record = tmp_path / ".slimheads" / "published.json"
    record.write_text(json.dumps({"format": 1, "names": ["slim", "report.md"]}))
    publish(tmp_path, {"slim": {"b": b"2"}})
    with lock(tmp_path):
        assert content(tmp_path) == {"slim/b": b"2", "report.md": b"1"}
    (tmp_path / "slim" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="slim/mine"), lock(tmp_path):
        pass


@pytest.mark.parametrize("name", ["", "lock", "holder", "published.json", "stages", "stages/load", "tmp-" + 32 * "a"])
def test_our_own_folder_may_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    out, stranger = tmp_path / "out", tmp_path / "stranger"
    (stranger / ("tmp-" + 32 * "b")).mkdir(parents=True)
    (stranger / ("tmp-" + 32 * "b") / "photo.jpg").write_text("mine")
    link = out / ".slimheads" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(stranger)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="is a link") as caught, lock(out):
        pass
    assert caught.value.where == str(link)
    assert tree(tmp_path) == before


# Whole runs


KILLED = """
import os, signal, sys
from slimheads import cli
from slimheads.output import publishing
exchange = publishing.exchange
def dying(first, second):
    if second.name != "slim":
        return exchange(first, second)
    exchange(first, second) or os.rename(second, first.parent.parent / "old" / "slim")
    os.kill(os.getpid(), signal.SIGKILL)
publishing.exchange = dying
cli.main(sys.argv[1:])
"""


def test_a_run_that_is_killed_while_it_publishes_loses_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch)
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint(), model)
    recipe = write_recipe(tmp_path / "r.yaml", model)
    assert slimheads("run", recipe, "--out", out).code == 0
    before = content(out)
    again = write_recipe(tmp_path / "again.yaml", model, select={"ratio": 0.25})
    line = [sys.executable, "-c", KILLED, "run", str(again), "--out", str(out)]
    assert subprocess.run(line, capture_output=True, check=False).returncode == -signal.SIGKILL
    os.truncate(model / "model.safetensors", 1000)  # so that the next run ends early
    assert slimheads("run", recipe, "--out", out).code == 3
    assert content(out) == before

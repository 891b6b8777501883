"""What the store does when files are damaged, processes are killed, and disks refuse."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slimheads.errors import EnvironmentLackError, OutputBusyError, UsageError
from slimheads.output.publishing import publish
from slimheads.output.store import Store, lock

KEY = "c" * 64

HOLDER = """
import sys, time
from pathlib import Path
from slimheads.output.store import Store, lock
out = Path(sys.argv[1])
with lock(out), Store(out).begin("prune") as work:
    (work.path / "half").write_bytes(b"x")
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holding(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder in the middle of a stage."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_and_told_who_holds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with holding(out) as process:
        with pytest.raises(OutputBusyError) as caught, lock(out):
            pass
        assert caught.value.exit_code == 6
        assert str(out) in str(caught.value)
        assert f"process {process.pid}" in str(caught.value)
        assert list((out / ".slimheads").glob("tmp-*/half"))  # the refused one did not clear the other's work


def test_a_killed_process_frees_the_folder_and_its_rest_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with holding(out) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list((out / ".slimheads").glob("tmp-*/half"))
        with lock(out):
            assert not list((out / ".slimheads").glob("tmp-*"))


def test_a_second_hold_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with lock(tmp_path):
        with pytest.raises(OutputBusyError, match=f"process {os.getpid()}"), lock(tmp_path):
            pass
        with pytest.raises(OutputBusyError), lock(tmp_path):  # being refused does not free it
            pass
    with lock(tmp_path):
        pass


def test_a_hold_ends_with_a_failure(tmp_path: Path) -> None:
    for failure in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(failure), lock(tmp_path):
            raise failure
        with lock(tmp_path):
            pass


def test_an_unreadable_holder_is_simply_not_named(tmp_path: Path) -> None:
    with lock(tmp_path):
        (tmp_path / ".slimheads" / "holder").write_text("")
        with pytest.raises(OutputBusyError, match="another run is writing"), lock(tmp_path):
            pass


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd" / ".slimheads" / "lock").mkdir(parents=True)
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none"), tmp_path / "odd"):
        with pytest.raises(UsageError, match="cannot write in the output folder") as caught, lock(out):
            pass
        assert str(out) in str(caught.value)
    assert (tmp_path / "file").read_text() == "x"


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 3)


def _flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _remove_file(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").unlink()


def _add_file(folder: Path) -> None:
    (folder / "onnx" / "extra.onnx").write_bytes(b"x")


def _swap_for_a_link(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").rename(folder.parent.parent / "moved.onnx")
    (folder / "onnx" / "model.onnx").symlink_to(folder.parent.parent / "moved.onnx")


def _remove_record(folder: Path) -> None:
    (folder / "record.json").unlink()


def _cut_record(folder: Path) -> None:
    os.truncate(folder / "record.json", 40)


def _record_is_no_text(folder: Path) -> None:
    (folder / "record.json").write_bytes(b"\xff\xfe\x00")


def _record_nests_deeply(folder: Path) -> None:
    (folder / "record.json").write_text("[" * 100_000)


def _edit_result(folder: Path) -> None:
    path = folder / "record.json"
    path.write_text(path.read_text().replace("0.875", "0.975"))


def _edit_published_copy(folder: Path) -> None:
    """The output shares the stage's bytes: an editor that writes in place changes both."""
    path = folder.parents[3] / "slim" / "model.safetensors"
    assert path.samefile(folder / "model.safetensors")
    path.write_bytes(b"edited!")


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (_truncate, "model.safetensors has 3 bytes, not 7"),
    (_flip_a_bit, "model.safetensors was changed"),
    (_remove_file, "onnx/model.onnx is missing"),
    (_add_file, "onnx/extra.onnx was added"),
    (_swap_for_a_link, "onnx/model.onnx is not a regular file"),
    (_remove_record, "record.json is missing"),
    (_cut_record, "Unterminated string"),
    (_record_is_no_text, "decode"),
    (_record_nests_deeply, "recursion"),
    (_edit_result, "record.json was changed"),
    (_edit_published_copy, "model.safetensors was changed"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=[damage.__name__.strip("_") for damage, _ in DAMAGE])
def test_a_damaged_stage_runs_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], reason: str
) -> None:
    def run() -> Any:
        with store.begin("prune") as work:
            (work.path / "model.safetensors").write_bytes(b"weights")
            (work.path / "onnx").mkdir()
            (work.path / "onnx" / "model.onnx").write_bytes(b"graph")
            return work.publish(KEY, {"cosine": 0.875}, 1.0, None)

    store = Store(tmp_path)
    record = run()
    publish(tmp_path, {"slim": record.path})
    assert store.find("prune", KEY) == record
    damage(record.path)
    assert store.find("prune", KEY) is None
    (warning,) = caplog.records
    assert "prune runs again" in warning.getMessage()
    assert reason in warning.getMessage()
    assert run() == record
    assert store.find("prune", KEY) == record


def test_a_full_disk_is_named_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    publish(tmp_path, {"slim": {"a": b"1"}})
    with pytest.raises(EnvironmentLackError, match="the disk is full") as caught, Store(tmp_path).begin("prune"):
        full()
    assert caught.value.exit_code == 5
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EnvironmentLackError, match="the disk is full"):
        publish(tmp_path, {"slim": {"a": b"2"}})
    assert (tmp_path / "slim" / "a").read_bytes() == b"1"
    assert not list((tmp_path / ".slimheads").glob("tmp-*"))


def test_other_failures_of_a_stage_are_not_blamed_on_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Store(tmp_path).begin("prune"):
        (tmp_path / "the model's own file").read_bytes()

"""Stage records: keyed by what they depend on, and moved into place by one rename.

    OUT/.slimheads/lock                       held by the run that may write in OUT
    OUT/.slimheads/holder                     its process id, for the error message of other runs
    OUT/.slimheads/published.json             the files in OUT that a run may replace (`folder`)
    OUT/.slimheads/stages/STAGE/KEY/          one finished stage: record.json and its files
    OUT/.slimheads/tmp-*                      work in progress; left over only by a killed run

A folder gets its final name by one rename after every byte in it is written and synced. A folder with a final name is
therefore complete, unless it was damaged later, which the hashes in record.json show.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from slimheads.errors import OutputBusyError, one_line
from slimheads.files import (
    disk_full_named,
    files_below,
    new_folder,
    remove,
    sha256_file,
    sync,
    sync_folders,
    unwritable_named,
    write,
)
from slimheads.output.folder import PUBLISHED, refuse_foreign, refuse_links
from slimheads.output.publishing import OWN_FOLDER, undo

log = logging.getLogger(__name__)


class Stamp(BaseModel):
    """A file's content when its stage ended."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    sha256: str
    bytes: int


class Record(BaseModel):
    """One finished stage; `path` is the folder with its files, `files` are relative to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    path: Path = Field(exclude=True)
    format: Literal[1] = 1
    stage: str
    key: str
    seconds: float
    peak_rss_mb: float | None
    result: dict[str, Any]
    files: dict[str, Stamp]
    notices: list[str] = []  # shown again when the result is reused


def stage_key(stage: str, section: Mapping[str, Any], upstream: Sequence[str], versions: Mapping[str, str]) -> str:
    """What a stage's result depends on, as one SHA-256 in hex: two runs with the same key may share the result.

    Args:
        stage: the stage's name.
        section: its part of the recipe, as JSON types.
        upstream: the keys or content hashes of what it reads, in a fixed order.
        versions: of every package whose change may change the result.
    """
    return _digest({"stage": stage, "section": section, "upstream": list(upstream), "versions": versions})


def _digest(data: object) -> str:
    return hashlib.sha256(_json(data)).hexdigest()


def _json(data: object) -> bytes:
    """Canonical: equal values give equal bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Locks an output folder, made if needed, for one run; the lock of a killed run ends with its process.

    A publication that a killed run left incomplete is undone, and its leftovers are removed.

    Raises:
        OutputBusyError: another run holds it.
        UsageError: it cannot be made or written, holds files of the user's under published names, or `.slimheads` in
            it is a link.
        EnvironmentLackError: the disk is full, or fails.
    """
    inside = folder / ".slimheads"
    with unwritable_named(folder):
        refuse_links(inside)
        inside.mkdir(parents=True, exist_ok=True)
        held = FileLock(inside / "lock")
        try:
            held.acquire(blocking=False)
        except Timeout:
            raise _busy(folder) from None
    holder = inside / "holder"
    try:
        with unwritable_named(folder):
            holder.write_text(str(os.getpid()), encoding="ascii")
        if undo(folder):
            for left_over in inside.glob("tmp-*"):
                if OWN_FOLDER.fullmatch(left_over.name):
                    remove(left_over)
        refuse_foreign(folder, PUBLISHED)
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        held.release()


def _busy(folder: Path) -> OutputBusyError:
    try:
        pid = int((folder / ".slimheads" / "holder").read_text(encoding="ascii"))
    except (OSError, ValueError):
        who = "another run"
    else:
        who = f"another run (process {pid})"
    return OutputBusyError(
        f"{who} is writing in this folder",
        where=str(folder),
        hint="wait until it ends, or choose another folder with --out",
    )


class Store:
    """The finished stages of one output folder. Whoever writes holds the folder's `lock`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.inside = out / ".slimheads"

    def find(self, stage: str, key: str) -> Record | None:
        """The finished stage with this key, every file checked against its hash; None if there is none.

        A damaged one is none: the reason is logged as a warning, and the stage is to run again.
        """
        folder = self._folder(stage, key)
        if not folder.exists():
            return None
        try:
            record = _read_record(folder)
            if (record.stage, record.key) != (stage, key):
                raise ValueError("record.json belongs to another stage")
            _check_files(record)
        except (OSError, ValueError, RecursionError) as error:
            log.warning("the stage %s runs again, its stored result is damaged: %s", stage, one_line(error))
            return None
        return record

    @contextmanager
    def begin(self, stage: str) -> Iterator[Work]:
        """A folder to work in. It becomes the stage's record with `publish`, or else is gone when the block ends."""
        path = new_folder(self.inside)
        try:
            with disk_full_named(self.out):
                yield Work(path, stage, self._shelf(stage))
        finally:
            remove(path)

    def discard(self, stage: str, key: str) -> None:
        """Remove the finished stage with this key, if there is one: it ran again, to a result that is not kept."""
        remove(self._folder(stage, key))

    def _folder(self, stage: str, key: str) -> Path:
        return self._shelf(stage) / key

    def _shelf(self, stage: str) -> Path:
        return self.inside / "stages" / stage


class Work:
    """A stage in progress: it writes its files below `path`, then calls `publish` once."""

    def __init__(self, path: Path, stage: str, shelf: Path) -> None:
        self.path = path
        self._stage, self._shelf = stage, shelf

    def publish(
        self,
        key: str,
        result: Mapping[str, Any],
        seconds: float,
        peak_rss_mb: float | None,
        notices: Sequence[str] = (),
    ) -> Record:
        """Make what was written the stage's record, in place of every earlier one of that stage.

        Args:
            key: what the result depends on, as `stage_key` makes it.
            result: the stage's result as JSON types, without NaN.
            seconds: wall-clock time it took.
            peak_rss_mb: the process's peak resident memory in MiB, if known.
            notices: given during the stage.
        """
        target, files = self._shelf / key, dict[str, Stamp]()
        for file in files_below(self.path):
            name = file.relative_to(self.path).as_posix()
            if name == "record.json":
                raise ValueError("a stage's own file cannot be called record.json")
            sync(file)
            files[name] = Stamp(sha256=sha256_file(file), bytes=file.stat().st_size)
        record = Record(
            path=target,
            stage=self._stage,
            key=key,
            seconds=float(seconds),
            peak_rss_mb=None if peak_rss_mb is None else float(peak_rss_mb),
            result=json.loads(_json(result)),
            files=files,
            notices=list(notices),
        )
        content = record.model_dump(mode="json")
        write(self.path / "record.json", _json({**content, "digest": _digest(content)}))
        sync_folders(self.path)
        self._shelf.mkdir(parents=True, exist_ok=True)
        remove(target)  # there only if it is damaged
        self.path.rename(target)
        sync(self._shelf)
        for other in list(self._shelf.iterdir()):
            if other != target:
                remove(other)
        return record


def _read_record(folder: Path) -> Record:
    if not (folder / "record.json").is_file():
        raise ValueError("record.json is missing")
    data = json.loads((folder / "record.json").read_bytes())
    if not isinstance(data, dict) or data.pop("digest", None) != _digest(data):
        raise ValueError("record.json was changed")
    return Record.model_validate({**data, "path": folder})


def _check_files(record: Record) -> None:
    """Raise ValueError for the first file that is not what its stage left."""
    there = {file.relative_to(record.path).as_posix(): file for file in files_below(record.path)}
    there.pop("record.json")
    for name in sorted(there.keys() | record.files.keys()):
        if name not in there:
            raise ValueError(f"{name} is missing")
        if name not in record.files:
            raise ValueError(f"{name} was added")
        stamp, size = record.files[name], there[name].stat().st_size
        if size != stamp.bytes:
            raise ValueError(f"{name} has {size} bytes, not {stamp.bytes}")
        if sha256_file(there[name]) != stamp.sha256:
            raise ValueError(f"{name} was changed")

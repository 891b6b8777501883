"""Writing and removing files so that a crash or a full disk never leaves a partial file under its final name."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimheads.errors import EnvironmentLackError, UsageError

# linux/fcntl.h, linux/fs.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# An old kernel, a file system without exchange (FUSE, NFS), or a sandbox that blocks the call.
_NO_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM})
_FLUSHABLE = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows flushes only files opened for writing
_NO_FOLDER_SYNC = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.EBADF, errno.ENOTSUP})


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Every regular file below a folder, sorted; anything that is neither file nor folder raises ValueError."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.relative_to(folder)} is not a regular file")
        if path.is_file():
            found.append(path)
    return found


def is_there(path: Path) -> bool:
    """Whether the name is taken, also by a dangling link."""
    return path.is_symlink() or path.exists()


def new_folder(inside: Path) -> Path:
    """A fresh `tmp-…` folder. Not by mkdtemp, because other users cannot read its folders, even after a rename."""
    path = inside / f"tmp-{uuid.uuid4().hex}"
    path.mkdir(parents=True)
    return path


def remove(path: Path) -> None:
    """Delete a file or folder if it exists; the next run deletes what could not be deleted now."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Write a file and flush it to disk."""
    path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk before a rename makes them visible.

    Folders are skipped where the system cannot flush them: Windows does not open them, some network drives refuse.
    """
    try:
        descriptor = os.open(path, _FLUSHABLE)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise


def sync_folders(folder: Path) -> None:
    """`sync` a folder and every folder below it."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync(path)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names of one file system atomically; False where the system cannot (only Linux can, on most disks).

    Raises:
        OSError: as for a rename.
    """
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if swap is None:
        return False
    if swap(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))


@contextmanager
def disk_full_named(folder: Path) -> Iterator[None]:
    """Turn a full disk into EnvironmentLackError; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        hint = "free some space, or choose another output folder"
        raise EnvironmentLackError("the disk is full", where=str(folder), hint=hint) from error


@contextmanager
def failing_disk_named(folder: Path) -> Iterator[None]:
    """Turn a disk error while an output folder is being changed into EnvironmentLackError."""
    try:
        with disk_full_named(folder):
            yield
    except OSError as error:
        raise EnvironmentLackError(
            f"the files in it cannot be replaced ({error.strerror or error}), and the earlier ones are kept",
            where=str(folder),
            hint="check that its disk works and that no other program has its files open, then run again",
        ) from error


@contextmanager
def unwritable_named(folder: Path) -> Iterator[None]:
    """Turn a folder that cannot be created or written into UsageError, a full disk into EnvironmentLackError."""
    try:
        with disk_full_named(folder):
            yield
    except OSError as error:
        what = f"cannot write in the output folder: {error.strerror or error}"
        raise UsageError(what, where=str(folder), hint="choose an output folder that can be written") from error

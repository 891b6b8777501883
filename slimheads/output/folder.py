"""Which files of an output folder may be replaced: those that a run published and that are unchanged since.

    OUT/.slimheads/published.json    the names in OUT that runs published, and what each of their files held

Any other file under one of these names is the user's. It is refused by name before a run does any work, and again
before it publishes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slimheads.errors import UsageError, one_line
from slimheads.files import is_there, sha256_file

log = logging.getLogger(__name__)

PUBLISHED = (
    "slim",
    "dense",
    "recipe.yaml",
    "scores.json",
    "plan.json",
    "report.json",
    "report.md",
    "report.html",
)
# Files that file browsers write into the folders they show.
BROWSER_FILES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


class Mark(BaseModel):
    """A published file's content."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    sha256: str
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path) -> Mark:
        """A file's content now."""
        info = file.stat()
        return cls(sha256=sha256_file(file), bytes=info.st_size, mtime_ns=info.st_mtime_ns)

    def fits(self, file: Path) -> bool:
        """Whether a file still has this content; a file of the same size and time is not read."""
        if file.is_symlink() or not file.is_file():
            return False
        info = file.stat()
        if info.st_size != self.bytes:
            return False
        return info.st_mtime_ns == self.mtime_ns or sha256_file(file) == self.sha256


class Shown(BaseModel):
    """What runs published in an output folder.

    `files` has the files of each name by their path in the output folder. The names of a record of format 1 are not in
    it: all their files count as ours.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    format: Literal[1, 2] = 2
    names: tuple[str, ...] = ()
    files: Mapping[str, Mapping[str, Mark]] = {}


def shown(out: Path) -> Shown:
    """What runs published in `out`; nothing if the record is damaged, so that every file there is refused."""
    try:
        return Shown.model_validate_json((out / ".slimheads" / "published.json").read_bytes())
    except FileNotFoundError:
        return Shown()
    except (OSError, ValueError) as error:
        log.warning("published.json is damaged: %s", one_line(error))
        return Shown()


def marks(folder: Path, name: str) -> dict[str, Mark]:
    """The files of one name in a folder, by their path in it."""
    return {file.relative_to(folder).as_posix(): Mark.of(file) for file in _files(folder / name)}


def is_whole(folder: Path, name: str, published: Mapping[str, Mark]) -> bool:
    """Whether a name holds exactly the files that were published under it."""
    found = {file.relative_to(folder).as_posix(): file for file in _files(folder / name)}
    return found.keys() == published.keys() and all(published[path].fits(file) for path, file in found.items())


def refuse_foreign(out: Path, names: Iterable[str]) -> None:
    """Refuses to replace a file of the user's: a folder that happens to be called `slim`, or a file added to ours.

    Raises:
        UsageError: naming the first such file or folder.
    """
    ours = shown(out)
    for name in names:
        if is_there(out / name) and name not in ours.names:
            raise _foreign(out / name, "was not made by slimheads")
        if name in ours.files:
            refuse_changed(out, name, ours.files[name])


def refuse_changed(out: Path, name: str, published: Mapping[str, Mark]) -> None:
    """Refuses files that were added to or changed in a published name; deleted ones do not matter.

    Raises:
        UsageError: naming the first file that was added or changed.
    """
    for file in _files(out / name):
        mark = published.get(file.relative_to(out).as_posix())
        if mark is None:
            raise _foreign(file, "was not made by slimheads")
        if not mark.fits(file):
            raise _foreign(file, "was changed after slimheads made it")


def _foreign(path: Path, what: str) -> UsageError:
    hint = "move it away, or choose another folder with --out"
    return UsageError(f"{what}, and a run would replace it", where=str(path), hint=hint)


def _files(path: Path) -> Iterator[Path]:
    """What is at a path and below it, without the folders; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        for below in sorted(path.rglob("*")):
            if (below.is_symlink() or not below.is_dir()) and below.name not in BROWSER_FILES:
                yield below
    elif is_there(path):
        yield path


def refuse_links(inside: Path) -> None:
    """Refuses links in `.slimheads`: a run writes and removes files there.

    Raises:
        UsageError: naming the link.
    """
    for path in (inside, *(found for level in ("*", "stages/*", "stages/*/*") for found in inside.glob(level))):
        if path.is_symlink():
            raise UsageError(
                "is a link, and a run writes and clears what is there",
                where=str(path),
                hint="remove the link, or choose another folder with --out",
            )

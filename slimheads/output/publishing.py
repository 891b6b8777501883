"""Publishing: results are assembled aside, exchanged name by name, and put back if that is interrupted.

    OUT/.slimheads/tmp-*/new/NAME        assembled, to be published
    OUT/.slimheads/tmp-*/old/NAME        published before, on systems that cannot exchange two names atomically
    OUT/.slimheads/publishing.json       the intent: there from before the first rename until after the last

The intent is the next published.json plus what is needed to undo it. Renaming it to published.json commits the new run.
Until then, the next process that holds the folder's lock restores everything that was published before.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pydantic import field_validator

from slimheads.errors import SlimheadsError, one_line
from slimheads.files import (
    exchange,
    failing_disk_named,
    is_there,
    new_folder,
    remove,
    sync,
    sync_folders,
    write,
)
from slimheads.output.folder import PUBLISHED, Shown, is_whole, marks, refuse_changed, refuse_foreign, shown

log = logging.getLogger(__name__)

Content = Path | bytes
Source = Content | Mapping[str, Content]
OWN_FOLDER = re.compile("tmp-[0-9a-f]{32}")


class Intent(Shown):
    """What is being published: from `folder`, under the names `changing`, of which `before` existed already."""

    folder: str
    changing: tuple[str, ...]
    before: tuple[str, ...]

    @field_validator("folder")
    @classmethod
    def _is_ours(cls, folder: str) -> str:
        if not OWN_FOLDER.fullmatch(folder):
            raise ValueError(f"{folder!r} is no folder of a run")
        return folder

    @field_validator("changing", "before")
    @classmethod
    def _are_published(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not set(names) <= set(PUBLISHED):
            raise ValueError("a run publishes no such names")
        return names


def publish(out: Path, wanted: Mapping[str, Source], retract: Iterable[str] = ()) -> None:
    """Publishes one run in the output folder: every wanted name complete, every retracted one removed.

    Everything is assembled aside first. Then the names are exchanged for the new ones, in the given order. Each name is
    complete at all times where the system can exchange two names atomically; elsewhere it is missing for an instant.
    If a rename fails, everything is put back; if the process is killed, the next holder of the lock does so.
    Files of stage records are hard-linked, except ONNX external data. Other files are copied, so that an edit of the
    output does not change the user's sources.

    Args:
        out: the output folder; the caller holds its lock.
        wanted: name -> a file or folder, bytes, or a folder's content as relative path -> file, folder or bytes. The
            names are among `PUBLISHED`.
        retract: names to remove; those that are wanted stay.

    Raises:
        UsageError: a file that no run of ours published would be replaced.
        EnvironmentLackError: the disk is full, or fails; what was published before is kept.
    """
    names = tuple(dict.fromkeys([*wanted, *retract]))
    if not set(names) <= set(PUBLISHED):
        raise ValueError(f"a run publishes none of {sorted(set(names) - set(PUBLISHED))}")
    refuse_foreign(out, names)
    aside = None
    try:
        with failing_disk_named(out):
            aside = new_folder(out / ".slimheads")
            for part in ("new", "old", "undone"):
                (aside / part).mkdir()
            for name, source in wanted.items():
                _assemble(aside / "new", name, source, own=out / ".slimheads")
            sync_folders(aside)
            _carry_out(out, aside, _intent(out, aside, names, wanted.keys()))
    except BaseException:
        with suppress(SlimheadsError):  # the disk still fails: the next holder of the lock tries again
            undo(out)
        raise
    finally:
        if aside and not is_there(_intent_file(out)):
            remove(aside)


def _intent(out: Path, aside: Path, names: Iterable[str], wanted: Iterable[str]) -> Intent:
    ours, new = shown(out), set(wanted)
    stay = [name for name in ours.names if name not in names]
    return Intent(
        names=tuple(sorted({*stay, *new})),
        files={name: ours.files[name] for name in stay if name in ours.files}
        | {name: marks(aside / "new", name) for name in sorted(new)},
        folder=aside.name,
        changing=tuple(names),
        before=tuple(name for name in names if is_there(out / name)),
    )


def _carry_out(out: Path, aside: Path, intent: Intent) -> None:
    file = _intent_file(out)
    write(aside / file.name, intent.model_dump_json().encode())
    (aside / file.name).replace(file)
    sync(file.parent)
    for name in intent.changing:
        if name in intent.names and name in intent.before:
            _exchange_or_move(aside / "new" / name, out / name, aside / "old" / name)
        elif name in intent.names:
            (aside / "new" / name).rename(out / name)
        elif name in intent.before:
            (out / name).rename(aside / "old" / name)
    for folder in (out, aside / "new", aside / "old"):
        sync(folder)
    file.replace(file.with_name("published.json"))
    sync(file.parent)


def _exchange_or_move(path: Path, of: Path, away: Path) -> None:
    """Exchanges two names; where the system cannot, moves `of` to `away` first."""
    if not exchange(path, of):
        of.rename(away)
        path.rename(of)


def undo(out: Path) -> bool:
    """Restores what was published before an interrupted publication. The caller holds the folder's lock.

    Returns:
        Whether leftovers of runs in `.slimheads` may be removed: not if the intent is damaged, because the only copy of
        what was published may be there.

    Raises:
        UsageError: the user changed what was just published.
        EnvironmentLackError: a rename fails; nothing is lost, and the next call tries again.
    """
    file = _intent_file(out)
    with failing_disk_named(out):
        try:
            intent = Intent.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return True
        except ValueError as error:
            log.warning("publishing.json is damaged: %s", one_line(error))
            return False
        aside = file.with_name(intent.folder)
        if aside.is_dir() and not any(path.is_symlink() for path in (aside, *aside.glob("*"))):
            for name in reversed(intent.changing):
                _put_back(out, aside, name, intent)
            for folder in (out, aside / "new"):
                sync(folder)
        file.unlink()
        sync(file.parent)
    return True


def _put_back(out: Path, aside: Path, name: str, intent: Intent) -> None:
    now, new, old = out / name, aside / "new" / name, aside / "old" / name
    before, published = shown(out).files.get(name), intent.files.get(name, {})
    if before is not None and is_whole(out, name, before):
        return
    if name not in intent.before:
        if name in intent.names and is_there(now) and not is_there(new):
            refuse_changed(out, name, published)
            now.rename(new)
        return
    if not is_there(old) and is_there(new) and not is_whole(aside / "new", name, published):
        old = new  # the two were exchanged
    if is_there(old) and not is_there(now):
        old.rename(now)
    elif is_there(old):
        refuse_changed(out, name, published)
        _exchange_or_move(old, now, aside / "undone" / name)


def _intent_file(out: Path) -> Path:
    return out / ".slimheads" / "publishing.json"


def _assemble(folder: Path, name: str, source: Source, own: Path) -> None:
    """Assembles one name below `folder`."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or not relative.parts or ".." in relative.parts:
        raise ValueError(f"{name!r} does not stay inside its folder")
    target = folder / relative
    if isinstance(source, Mapping):
        target.mkdir(parents=True)
        for below, content in source.items():
            _assemble(target, below, content, own)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file():
        raise ValueError(f"{name} is given twice")
    if isinstance(source, bytes):
        write(target, source)
    elif source.is_dir():
        target.mkdir(exist_ok=True)
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            if not (_is_own(source, own) and file == source / "record.json"):
                _assemble(target, file.relative_to(source).as_posix(), file, own)
    else:
        _link_or_copy(source, target, own)


def _is_own(source: Path, own: Path) -> bool:
    return own.resolve() in source.resolve().parents


def _link_or_copy(source: Path, target: Path, own: Path) -> None:
    # onnx reads no weights beside a graph that have a second name: they could belong to another model.
    if _is_own(source, own) and not source.name.endswith(".onnx_data"):
        try:
            os.link(source, target)
        except OSError:  # a filesystem without hard links, or their limit reached
            log.debug("%s cannot be linked, copying it", source)
        else:
            return
    shutil.copyfile(source, target)
    sync(target)

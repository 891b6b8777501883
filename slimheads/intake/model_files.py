"""Which files of a model folder may be read: regular files in it, and links into the hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimheads.errors import ModelRefusedError

_NOT_READ = {"onnx", "openvino"}  # exports of the model


def is_read(relative: Path) -> bool:
    """Whether a path may be read or shipped. Hidden files, other exports and training checkpoints may not."""
    first = relative.parts[0]
    skipped = len(relative.parts) > 1 and (first in _NOT_READ or first.startswith("checkpoint-"))
    return not skipped and not any(part.startswith(".") for part in relative.parts)


def refuse_links(folder: Path) -> None:
    """Refuses a folder with links out of it, or with anything that is neither file nor folder.

    Raises:
        ModelRefusedError: naming the first.
    """
    for here, folders, files in os.walk(folder):
        place = Path(here)
        folders[:] = [name for name in folders if is_read((place / name / "x").relative_to(folder))]
        for name in sorted([*folders, *files]):
            if is_read((place / name).relative_to(folder)):
                _check(folder, place / name)


def refuse_link(folder: Path, path: Path) -> None:
    """The same for one file and the folders above it.

    Raises:
        ModelRefusedError: naming the link.
    """
    relative = path.relative_to(folder)
    for part in (*reversed(relative.parents[:-1]), relative):
        _check(folder, folder / part)


def check_shards(index: Path, names: list[Any]) -> None:
    """Refuses an index that names anything other than safetensors files beside it.

    Raises:
        ModelRefusedError: naming the index.
    """
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or re.search(r"[/\\:\0]", name):
            raise ModelRefusedError(
                f"it names {name!r} as weights, but only safetensors files beside it are read",
                where=str(index),
                hint="convert with transformers' `save_pretrained(..., safe_serialization=True)`",
            )


def _check(folder: Path, path: Path) -> None:
    hint = "replace it by the file itself, or remove it"
    if path.is_symlink():
        root, target = folder.resolve(), path.resolve()
        if not any(target.is_relative_to(place) for place in (root, *_blobs(root))):
            raise ModelRefusedError("is a link out of the model's folder", where=str(path), hint=hint)
    if not (path.is_file() or path.is_dir()):
        what = "is a link to a missing file" if path.is_symlink() else "is neither a file nor a folder"
        raise ModelRefusedError(what, where=str(path), hint=hint)


def _blobs(root: Path) -> Iterator[Path]:
    """The targets of links in the hub's cache: models--OWNER--NAME/snapshots/REVISION/file -> ../../blobs/HASH."""
    for revision in (root, *root.parents):
        if revision.parent.name == "snapshots" and revision.parent.parent.name.startswith("models--"):
            yield revision.parent.parent / "blobs"

"""Finds a checkpoint's folder: a path, a folder inside an installed package, or a model on the hub."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from slimheads.errors import EnvironmentLackError, UsageError
from slimheads.side_files.shipped_files import HUB_PATTERNS


def locate(source: str) -> Path:
    """The folder of a checkpoint; a model on the hub is downloaded first.

    Args:
        source: a folder, `pkg://package/folder` or a hub id.

    Raises:
        UsageError: there is no such folder, package folder or hub id.
        EnvironmentLackError: the package is not installed, or the hub cannot be reached.
    """
    if source.startswith("pkg://"):
        package, _, inside = source.removeprefix("pkg://").partition("/")
        inside_package = package.isidentifier() and not Path(inside).is_absolute() and ".." not in Path(inside).parts
        if (package or inside) and not inside_package:
            raise UsageError("not a folder inside a package", where=source, hint="write pkg://package/folder")
        spec = find_spec(package) if package else None
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentLackError(
                f"package '{package}' is not installed",
                where=source,
                keys=("model",),
                hint=f"pip install {package.replace('_', '-')}",
            )
        folder = Path(spec.submodule_search_locations[0], inside)
        if not folder.is_dir() or not folder.resolve().is_relative_to(
            Path(spec.submodule_search_locations[0]).resolve()
        ):
            raise UsageError(
                f"the package {package} has no folder '{inside}'",
                where=source,
                keys=("model",),
                hint="check the path after the package",
            )
        return folder
    folder = Path(os.path.expanduser(source))  # noqa: PTH111 - pathlib's raises for an unknown user
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UsageError(
            f"there is no folder '{source}'",
            keys=("model",),
            hint="name a checkpoint folder, pkg://package/folder or a hub id",
        )
    return _from_hub(source)


def _from_hub(source: str) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=HUB_PATTERNS))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(
            f"'{source}' is neither a folder here nor a model on the hub",
            keys=("model",),
            hint="check the name, and your access token",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentLackError(
            f"there is no folder '{source}' here, no such hub id in the cache, and the hub cannot be reached",
            keys=("model",),
            hint="check the path, connect, or download the model first with `hf download`",
        ) from error

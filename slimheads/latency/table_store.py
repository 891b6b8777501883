"""Where latency tables are stored for later runs.

    $SLIMHEADS_CACHE, or $XDG_CACHE_HOME/slimheads, or ~/.cache/slimheads
        profiles/KEY.json       one table: one model, one shape, one way of running it, on one machine

The key is a hash of everything that a latency depends on, so a table that is found is valid. A table of all kinds of
sites serves where fewer are asked for. A file gets its name by one rename. A damaged file is reported and measured
again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import JsonValue

import slimheads
from slimheads.errors import EnvironmentLackError, one_line
from slimheads.files import remove, write
from slimheads.latency.table import FORMAT, LatencyTable
from slimheads.models.checkpoint import Source
from slimheads.names import ALL_KINDS, Shape, SiteKind
from slimheads.runtime.environment import environment
from slimheads.runtime.sessions import session_options_record

log = logging.getLogger(__name__)

_ABOUT_THE_SOURCE = ("_name_or_path", "transformers_version")  # keys of config.json that do not describe the model


@dataclass(frozen=True)
class Setting:
    """How a model is run, and which units are counted."""

    provider: str = "cpu"
    threads: int = 2
    within_groups: bool = False  # query heads where they share KV heads, as `select.within_groups` deletes them
    kinds: tuple[SiteKind, ...] = ("attention",)  # of the sites that are measured, in the order of `ALL_KINDS`


def stored(source: Source, shapes: Sequence[Shape], setting: Setting) -> dict[Shape, LatencyTable]:
    """The stored tables by shape. A damaged one is left out, and the reason logged as a warning."""
    wider = dict.fromkeys((setting, replace(setting, kinds=ALL_KINDS)))
    found: dict[Shape, LatencyTable] = {}
    for shape in shapes:
        tables = (_read(made_for(source, shape, one)) for one in wider)
        if (table := next((table for table in tables if table is not None), None)) is not None:
            found[shape] = table
    return found


def folder() -> Path:
    """The folder of the tables."""
    if own := os.environ.get("SLIMHEADS_CACHE"):
        return Path(own).expanduser() / "profiles"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "slimheads" / "profiles"


def made_for(source: Source, shape: Shape, setting: Setting) -> dict[str, JsonValue]:
    """Everything that a table's figures depend on. Latency depends on the sizes of weights, not on their values."""
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    machine = environment()
    gpu = {"gpu": _gpu()} if setting.provider == "cuda" else {}
    return {
        "format": FORMAT,
        "config": {key: value for key, value in config.items() if key not in _ABOUT_THE_SOURCE},
        "task": source.task,
        "architecture": source.architecture,
        "shape": list(shape),
        **asdict(setting),
        "kinds": list(setting.kinds),
        "session": dict(session_options_record(setting.provider, setting.threads)),
        "machine": {"cpu": machine.cpu, "cores": machine.cores_usable, "kind": platform.machine(), **gpu},
        "packages": {**machine.packages, "slimheads": slimheads.__version__},
    }


def _gpu() -> str:
    """The GPUs that this process may use and their driver, by the names that nvidia-smi prints."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown"
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    return "; ".join([*filter(None, listed), os.environ.get("CUDA_VISIBLE_DEVICES", "all")])


def path_of(about: Mapping[str, JsonValue]) -> Path:
    """The file of the table that is `made_for` this, whether or not it is there."""
    identity = json.dumps(about, sort_keys=True, separators=(",", ":"))
    return folder() / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"


def _read(about: Mapping[str, JsonValue]) -> LatencyTable | None:
    path = path_of(about)
    try:
        table = LatencyTable.model_validate_json(path.read_bytes())
        if table.made_for != about:
            raise ValueError("it was made for something else")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("the latency table %s is not used, it is damaged: %s", path, one_line(error))
        return None
    return table


def store(table: LatencyTable) -> Path:
    """Writes a table, and returns its file, which appears under its name only when complete.

    Raises:
        EnvironmentLackError: the folder cannot be written.
    """
    path = path_of(table.made_for)
    draft = path.with_name(f"tmp-{uuid.uuid4().hex}")
    with writable(path.parent):
        try:
            write(draft, (table.model_dump_json(indent=1) + "\n").encode())
            draft.replace(path)
        finally:
            remove(draft)
    return path


@contextmanager
def writable(where: Path) -> Iterator[None]:
    """Makes the folder; a failure to write there becomes an EnvironmentLackError."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise EnvironmentLackError(
            f"latency tables cannot be stored here ({error.strerror or error})",
            where=str(where),
            hint="set SLIMHEADS_CACHE to a folder that can be written",
        ) from error

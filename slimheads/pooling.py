"""How a sentence-transformers folder makes one embedding of a text's token states."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from slimheads.errors import ModelRefusedError

Pooling = Literal["mean", "cls"]


def pooling_of(folder: Path) -> Pooling:
    """How a sentence-transformers folder pools token states into an embedding; "mean" where it does not say, or says
    something else than the mean or the first token.

    Raises:
        ModelRefusedError: modules.json or the pooling config is damaged, or points out of the folder.
    """
    modules = _json_file(folder / "modules.json", list)
    for module in modules or []:
        if not isinstance(module, dict) or not str(module.get("type", "")).endswith(".Pooling"):
            continue
        inside = PurePosixPath(str(module.get("path", "")))
        if inside.is_absolute() or ".." in inside.parts:
            hint = "use a folder as sentence-transformers wrote it"
            raise ModelRefusedError(f"the path {inside} leaves the folder", where=f"{folder}/modules.json", hint=hint)
        config = _json_file(folder / inside / "config.json", dict) or {}
        first_token = config.get("pooling_mode_cls_token") is True or config.get("pooling_mode") in ("cls", ["cls"])
        return "cls" if first_token else "mean"
    return "mean"


def _json_file(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelRefusedError("not valid JSON", where=str(path), hint="fetch the model folder again") from error
    if not isinstance(data, kind):
        raise ModelRefusedError(f"not a JSON {kind.__name__}", where=str(path), hint="fetch the model folder again")
    return data

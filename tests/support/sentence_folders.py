"""Folders as sentence-transformers writes them, around a small random model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whole_runs import checkpoint


def copied(folder: Path, model_type: str = "bert") -> Path:
    """A small checkpoint with its tokenizer, to be changed at will."""
    shutil.copytree(checkpoint(model_type), folder)
    return folder


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")


def change(path: Path, **keys: Any) -> None:
    """Sets keys of a JSON file."""
    write(path, (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}) | keys)


def lay_out(folder: Path, modules: Mapping[str, Any], first: str = "Transformer", path: str = "") -> Path:
    """Writes modules.json and a config.json for each module; `modules` are settings by folder, as "1_Pooling"."""
    entries = [{"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{first}"}]
    for number, (name, settings) in enumerate(modules.items(), start=1):
        kind = name.partition("_")[2]
        entries.append(
            {"idx": number, "name": str(number), "path": name, "type": f"sentence_transformers.models.{kind}"}
        )
        write(folder / name / "config.json", settings)
    write(folder / "modules.json", entries)
    return folder

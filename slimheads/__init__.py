"""slimheads: delete attention heads for real, export to ONNX, and prove what ships.

Public names are imported on first use, so that `slimheads --help` does not wait for torch.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it when it is imported; child processes inherit it

if TYPE_CHECKING:
    from slimheads.bench import bench as bench
    from slimheads.certificate import verify as verify
    from slimheads.export import export as export
    from slimheads.gating import gated as gated
    from slimheads.model import load as load
    from slimheads.model import save as save
    from slimheads.pipeline import run as run
    from slimheads.recipe import Recipe as Recipe
    from slimheads.report import Report as Report
    from slimheads.scoring import Scores as Scores
    from slimheads.scoring import score as score
    from slimheads.selection import Plan as Plan
    from slimheads.selection import select as select
    from slimheads.surgery import prune as prune

_HOME = {
    "Plan": "selection",
    "Recipe": "recipe",
    "Report": "report",
    "Scores": "scoring",
    "bench": "bench",
    "export": "export",
    "gated": "gating",
    "load": "model",
    "prune": "surgery",
    "run": "pipeline",
    "save": "model",
    "score": "scoring",
    "select": "selection",
    "verify": "certificate",
}


class _Package(ModuleType):
    """`slimheads.bench` and `slimheads.export` are public functions and also modules: the function keeps the name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'slimheads' has no attribute {name!r}")
        value = getattr(import_module(f"slimheads.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


sys.modules[__name__].__class__ = _Package

"""slimheads: delete attention heads for real, export to ONNX, and prove what ships.

Public names are imported on first use, so that `slimheads --help` does not wait for torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it when it is imported; child processes inherit it

if TYPE_CHECKING:
    from slimheads.exporting.export import export as export
    from slimheads.latency.bench import bench as bench
    from slimheads.models.loading import load as load
    from slimheads.models.loading import save as save
    from slimheads.pipeline.run import run as run
    from slimheads.pruning.gates import gated as gated
    from slimheads.pruning.plan import Plan as Plan
    from slimheads.pruning.scores import Scores as Scores
    from slimheads.pruning.scoring.score import score as score
    from slimheads.pruning.select import select as select
    from slimheads.pruning.surgery import prune as prune
    from slimheads.recipe.recipe import Recipe as Recipe
    from slimheads.report.model import Report as Report
    from slimheads.verification.prove import verify as verify

_HOME = {
    "Plan": "pruning.plan",
    "Recipe": "recipe.recipe",
    "Report": "report.model",
    "Scores": "pruning.scores",
    "bench": "latency.bench",
    "export": "exporting.export",
    "gated": "pruning.gates",
    "load": "models.loading",
    "prune": "pruning.surgery",
    "run": "pipeline.run",
    "save": "models.loading",
    "score": "pruning.scoring.score",
    "select": "pruning.select",
    "verify": "verification.prove",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimheads' has no attribute {name!r}")
    return getattr(import_module(f"slimheads.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

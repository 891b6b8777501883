"""recover: the kept weights stay as they are, the only method so far."""

from __future__ import annotations

from pathlib import Path

from slimheads.pipeline.stage import Result, Stage
from slimheads.pipeline.stages.prune import Pruned
from slimheads.recipe.sections import Recover


class Recovered(Result):
    """How the kept weights were changed."""

    method: str


def recover_stage(section: Recover, pruned: Pruned) -> Stage[Recovered]:
    """Records the method."""

    def work(folder: Path) -> Recovered:
        return Recovered(method=section.method)

    about = f"method {section.method}"
    return Stage("recover", Recovered, work, lambda: section.model_dump(mode="json"), (pruned,), about=about)

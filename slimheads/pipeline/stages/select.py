"""select: the plan, from the scores and, where a step is auto, from latency tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimheads.latency.counts import Selection, choose_steps
from slimheads.latency.table import LatencyTable
from slimheads.pipeline.latency_tables import RecipeTables
from slimheads.pipeline.progress import Progress
from slimheads.pipeline.stage import Result, Stage
from slimheads.pipeline.stages.score import Scored
from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import Scores
from slimheads.recipe.sections import Select


class Selected(Result):
    """What is deleted, and how the steps of counts were chosen."""

    plan: Plan
    selection: Selection


def select_stage(section: Select, tables: RecipeTables, scored: Scored, progress: Progress) -> Stage[Selected]:
    """Latency tables are measured in this stage where the recipe needs them and they are not stored."""
    auto = bool(section.auto_steps)

    def work(folder: Path) -> Selected:
        found = tables.measured(progress.note, progress.share) if auto else {}
        plan, selection = choose(scored.scores, section, tuple(found.values()))
        return Selected(plan=plan, selection=selection)

    def depends() -> dict[str, Any]:
        return section.model_dump(mode="json") | ({"tables": tables.fingerprints()} if auto else {})

    about = "choose the units to delete" + (", by latency tables" if auto else "")
    return Stage("select", Selected, work, depends, (scored,), about=about)


def choose(scores: Scores, section: Select, tables: Sequence[LatencyTable] = ()) -> tuple[Plan, Selection]:
    """`slimheads.select` by the recipe.

    Args:
        tables: of the model at the recipe's shapes; only a step that is auto needs them.
    """
    return choose_steps(scores, section.model_dump(mode="json"), tables)

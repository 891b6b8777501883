"""score: one number per unit."""

from __future__ import annotations

from pathlib import Path

from slimheads.pipeline.run_models import RunModels
from slimheads.pipeline.stage import Result, Stage
from slimheads.pipeline.stages.load import Loaded
from slimheads.pruning.scores import Scores
from slimheads.pruning.scoring.score import score
from slimheads.recipe.sections import Score


class Scored(Result):
    """The scores of every site."""

    scores: Scores


def score_stage(section: Score, models: RunModels, loaded: Loaded) -> Stage[Scored]:
    """Scores the dense model by the recipe's method."""

    def work(folder: Path) -> Scored:
        return Scored(scores=score(models.dense(), section.method))

    about = f"score every unit by {section.method}"
    return Stage("score", Scored, work, lambda: section.model_dump(mode="json"), (loaded,), about=about)

"""Scores by any method. A new method is a file in this folder, an entry here and a name in names.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from transformers import PreTrainedModel

from slimheads.errors import require_known
from slimheads.names import ScoreMethod
from slimheads.pruning.scores import Scores, SiteScores
from slimheads.pruning.scoring.magnitude import magnitude

METHODS: Mapping[ScoreMethod, Callable[[PreTrainedModel], tuple[SiteScores, ...]]] = MappingProxyType(
    {"magnitude": magnitude}
)


def score(model: PreTrainedModel, method: ScoreMethod = "magnitude") -> Scores:
    """Scores the units of a model that `slimheads.load` covers, dense or slim: heads or KV groups, and neurons.

    Raises:
        UsageError: the method is not known.
        ModelRefusedError: the model's family is not covered, or a weight holds NaN or infinity (the tensor is named).
    """
    require_known("score.method", method, METHODS)
    return Scores(method, METHODS[method](model))

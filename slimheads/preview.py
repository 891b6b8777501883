"""What a recipe would delete, without writing anything: heads, parameters, FLOPs and bytes before and after."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from slimheads import flops
from slimheads.checkpoint import find
from slimheads.inputs import measured_shapes
from slimheads.model import load
from slimheads.preconditions import require_usable
from slimheads.recipe import Recipe
from slimheads.scoring import score
from slimheads.selection import Plan
from slimheads.stages import choose
from slimheads.surgery import prune


class Cost(BaseModel):
    """One model: `bytes` are those of its weights in their own dtype, `flops` those of one run at `Preview.shape`."""

    model_config = ConfigDict(frozen=True)
    heads: int  # units: heads, or KV groups
    parameters: int
    flops: int
    bytes: int


class Preview(BaseModel):
    """A plan and what it would change."""

    model_config = ConfigDict(frozen=True)
    model: str
    task: str
    shape: tuple[int, ...]
    dense: Cost
    slim: Cost
    plan: dict[str, Any]  # as in plan.json


def preview(recipe: Recipe) -> Preview:
    """Scores the model, chooses, and deletes in memory to count what is left.

    Raises:
        SlimheadsError: as `slimheads.run` would up to its prune stage.
    """
    source = find(recipe.model, recipe.task)
    require_usable(recipe, source)
    model = load(source.folder, source.task)
    plan = choose(score(model, recipe.score.method), recipe)
    shape = measured_shapes(model.config, recipe.bench.shapes)[-1]

    def cost(units: int) -> Cost:
        return Cost(
            heads=units,
            parameters=flops.parameters(model),
            flops=flops.flops(model, *shape),
            bytes=flops.weight_bytes(model),
        )

    dense = cost(plan.total)
    prune(model, plan)
    return Preview(
        model=source.given,
        task=source.task,
        shape=shape,
        dense=dense,
        slim=cost(plan.total - plan.removed),
        plan=plan.to_json(),
    )


def plan_of(found: Preview) -> Plan:
    """The plan in a preview."""
    return Plan.from_json(found.plan)

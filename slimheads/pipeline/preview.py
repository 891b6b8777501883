"""What a recipe would delete, without writing weights: units, parameters, FLOPs and bytes, and predicted latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import BaseModel, ConfigDict

from slimheads.errors import about_keys
from slimheads.families.config_facts import measured_shapes
from slimheads.latency.counts import Selection
from slimheads.latency.records import Interval
from slimheads.latency.table import LatencyTable, predict
from slimheads.models import flops
from slimheads.models.checkpoint import find, read_config
from slimheads.models.loading import load
from slimheads.names import Shape, SiteKind
from slimheads.pipeline.checks import require_usable
from slimheads.pipeline.latency_tables import RecipeTables
from slimheads.pipeline.stages.select import choose
from slimheads.pruning.plan import Plan
from slimheads.pruning.scoring.score import score
from slimheads.pruning.surgery import prune
from slimheads.recipe.recipe import Recipe
from slimheads.report.model import KindCount, count_kinds


class Cost(BaseModel):
    """One model: `bytes` are those of its weights in their own dtype, `flops` those of one run at `Preview.shape`."""

    model_config = ConfigDict(frozen=True)
    heads: int  # units of attention: heads, or KV groups
    parameters: int
    flops: int
    bytes: int


class PlannedLatency(BaseModel):
    """What the latency table predicts at one shape; the interval is that of the table's own noise."""

    model_config = ConfigDict(frozen=True)
    provider: str
    threads: int
    shape: tuple[int, ...]
    dense_ms: float
    slim_ms: float
    speedup: Interval
    doubtful: int  # noisy points of the table


class Preview(BaseModel):
    """A plan and what it would change."""

    model_config = ConfigDict(frozen=True)
    model: str
    task: str
    shape: tuple[int, ...]
    kinds: dict[SiteKind, KindCount]  # as in report.json
    dense: Cost
    slim: Cost
    plan: Plan
    selection: Selection
    predicted: tuple[PlannedLatency, ...] | None  # a shape with a table each
    predicted_reason: str | None  # why it is null, or lacks a shape


def preview(recipe: Recipe, note: Callable[[str], None] = lambda line: None) -> Preview:
    """Scores the model, chooses, deletes in memory to count what is left, and looks its latency up.

    A latency table is measured only where a step that is auto cannot be chosen without it; it is stored for later runs.

    Args:
        note: called with a line of text while a table is measured.

    Raises:
        SlimheadsError: as `slimheads.run` would up to its prune stage.
    """
    with recipe.located():
        return _preview(recipe, note)


def _preview(recipe: Recipe, note: Callable[[str], None]) -> Preview:
    source = find(recipe.model, recipe.task)
    require_usable(recipe, source)
    recipe_tables = RecipeTables(recipe, source)
    tables: Mapping[Shape, LatencyTable] = {}
    if recipe.select.auto_steps:
        tables = recipe_tables.measured(note)
    elif not read_config(source.folder).is_encoder_decoder:
        tables = recipe_tables.stored()
    model = load(source.folder, source.given_task)
    plan, selection = choose(score(model, recipe.score.method), recipe.select, tuple(tables.values()))
    shape = measured_shapes(model.config, recipe.bench.shapes)[-1]

    @about_keys("bench.shapes")
    def cost(units: int) -> Cost:
        return Cost(
            heads=units,
            parameters=flops.parameters(model),
            flops=flops.flops(model, *shape),
            bytes=flops.weight_bytes(model),
        )

    kinds = count_kinds(plan)
    dense = cost(kinds["attention"].total)
    prune(model, plan)
    return Preview(
        model=source.given,
        task=source.task,
        shape=shape,
        kinds=kinds,
        dense=dense,
        slim=cost(kinds["attention"].kept),
        plan=plan,
        selection=selection,
        predicted=tuple(_predicted(table, plan) for table in tables.values()) or None,
        predicted_reason=recipe_tables.missing(),
    )


def _predicted(table: LatencyTable, plan: Plan) -> PlannedLatency:
    found = predict(table, plan)
    return PlannedLatency(
        provider=table.provider,
        threads=table.threads,
        shape=table.shape,
        dense_ms=found.dense_ms,
        slim_ms=found.slim_ms,
        speedup=found.speedup,
        doubtful=table.noisy_points,
    )

"""The latency tables of a recipe's model: at its shapes, on the first of its providers that is there."""

from __future__ import annotations

from collections.abc import Callable

from slimheads.latency.profile import profile, table_shapes
from slimheads.latency.table import LatencyTable
from slimheads.latency.table_store import Setting, stored
from slimheads.models.checkpoint import Source
from slimheads.names import Shape
from slimheads.recipe.recipe import Recipe
from slimheads.runtime.onnx_runtime import onnxruntime
from slimheads.runtime.sessions import PROVIDERS


def setting_of(recipe: Recipe) -> Setting:
    """How a recipe's model is run by the first provider that is there."""
    here = onnxruntime.get_available_providers()
    provider = next((p for p in recipe.bench.providers if PROVIDERS[p] in here), recipe.bench.providers[0])
    return Setting(provider, recipe.bench.threads, recipe.select.within_groups)


def tables_for(
    recipe: Recipe, source: Source, tell: Callable[[str], None], *, measures: bool = True
) -> dict[Shape, LatencyTable]:
    """The latency tables of the recipe's model, shapes and first provider; those that lack are measured, or left out.

    Raises:
        SlimheadsError: as `profile`.
    """
    shapes, setting = table_shapes(source, recipe.bench.shapes), setting_of(recipe)
    if not measures:
        return stored(source, shapes, setting)
    return {made.table.shape: made.table for made in profile(source, shapes, setting, tell=tell)}

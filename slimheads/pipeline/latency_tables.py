"""The latency tables of a recipe's model: at its shapes, on the first of its providers that is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from slimheads.latency.profile import command, profile, table_shapes
from slimheads.latency.table import LatencyTable
from slimheads.latency.table_store import Setting, stored
from slimheads.models.checkpoint import Source, read_config
from slimheads.names import Shape, SiteKind
from slimheads.recipe.recipe import Recipe
from slimheads.recipe.sections import Select
from slimheads.runtime.onnx_runtime import onnxruntime
from slimheads.runtime.sessions import PROVIDERS


def setting_of(recipe: Recipe, provider: str, threads: int) -> Setting:
    """What is measured for a recipe: the kinds of sites that its plan touches."""
    return Setting(provider, threads, recipe.select.within_groups, _touched(recipe.select))


def _touched(select: Select) -> tuple[SiteKind, ...]:
    touched: dict[SiteKind, bool] = {
        "attention": select.ratio > 0 or select.multiple_of == "auto",
        "feed_forward": select.ffn_ratio > 0 or select.ffn_multiple_of == "auto",
        "layer": select.drop_layers > 0,
    }
    return tuple(kind for kind, is_touched in touched.items() if is_touched) or ("attention",)


@dataclass(frozen=True)
class RecipeTables:
    """Which tables a recipe reads."""

    recipe: Recipe
    source: Source

    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that differ for this model.

        Raises:
            UsageError: the model is an encoder-decoder, of which there are no tables.
        """
        return table_shapes(self.source, self.recipe.bench.shapes)

    def setting(self) -> Setting:
        """How the model is run by the first provider that is there."""
        bench, here = self.recipe.bench, onnxruntime.get_available_providers()
        provider = next((p for p in bench.providers if PROVIDERS[p] in here), bench.providers[0])
        return setting_of(self.recipe, provider, bench.threads)

    def stored(self) -> dict[Shape, LatencyTable]:
        """Those that are stored."""
        return stored(self.source, self.shapes(), self.setting())

    def measured(
        self, note: Callable[[str], None], share: Callable[[float], None] = lambda share: None
    ) -> dict[Shape, LatencyTable]:
        """All of them; what is not stored is measured, and stored.

        Raises:
            SlimheadsError: as `profile`.
        """
        made = profile(self.source, self.shapes(), self.setting(), tell=note, on_share=share)
        return {one.table.shape: one.table for one in made}

    def fingerprints(self) -> dict[str, Any]:
        """What a choice by these tables depends on, as JSON types; null for a table that is not stored."""
        found = self.stored()
        tables = [[list(shape), found[shape].fingerprint() if shape in found else None] for shape in self.shapes()]
        return {"setting": asdict(self.setting()), "tables": tables}

    def missing(self) -> str | None:
        """Why some shape has no table, and what to do about it; None where every shape has one."""
        if read_config(self.source.folder).is_encoder_decoder:
            return "there are no latency tables of encoder-decoders"
        found = self.stored()
        missing = [shape for shape in self.shapes() if shape not in found]
        if not missing:
            return None
        return f"there is no latency table yet; make one with: {command(self.source, missing, self.setting())}"

"""What a run has when its stages are done, and which of its files are published."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from slimheads.exporting.artifacts import client_names, file_name, parts_of
from slimheads.exporting.graph_files import graph_files
from slimheads.latency.graph_choice import GraphChoice, graph_choices
from slimheads.models.checkpoint import Source, read_config
from slimheads.names import PLAIN, GraphForm, Precision, Side
from slimheads.pipeline.stages.bench import Benched
from slimheads.pipeline.stages.export import Exported
from slimheads.pipeline.stages.load import Loaded
from slimheads.pipeline.stages.prune import Pruned
from slimheads.pipeline.stages.score import Scored
from slimheads.pipeline.stages.select import Selected
from slimheads.pipeline.stages.verify import Verified
from slimheads.pruning.scores import ScoreTable
from slimheads.recipe.recipe import Recipe


@dataclass(frozen=True)
class Finished:
    """The results of all stages; `benched` is None where the certificate failed."""

    recipe: Recipe
    source: Source
    loaded: Loaded
    scored: Scored
    selected: Selected
    pruned: Pruned
    exported: Exported
    verified: Verified
    benched: Benched | None

    @property
    def score_table(self) -> ScoreTable:
        """One score for each unit of the plan."""
        return self.scored.scores.behind(self.selected.plan).table()

    @property
    def precisions(self) -> list[Precision]:
        """The precisions that ship."""
        return self.verified.precisions(self.recipe.export.precisions)

    @property
    def graphs(self) -> tuple[GraphChoice, ...]:
        """The forms of the float32 graph that could ship; one of them does, or none where the certificate failed."""
        refused = {proof.candidate: proof.reason for proof in self.verified.certificate.forms}
        return graph_choices(self.exported.forms, refused, self.benched.choice if self.benched else None)

    @property
    def shipped(self) -> GraphForm:
        """Which float32 graph ships as model.onnx; the plain one stands for it where none does."""
        return next((graph.candidate for graph in self.graphs if graph.ships), PLAIN)

    def published_graphs(self, side: Side) -> dict[str, Path]:
        """The files of one side's onnx/ as published, by name: the shipped graph, and each under all of its names."""
        exported, ships = self.exported, self.precisions
        files = {path.name: path for path in sorted(exported.onnx_folder(side).iterdir())}
        plain, parts = file_name("model", "fp32"), parts_of(read_config(self.source.folder))
        left_out = set(self.recipe.export.precisions) - set(ships)
        for part, precision in product(parts, left_out):
            for path in graph_files(exported.onnx(side, precision, part)):
                del files[path.name]
        if (shipped := self.shipped) != PLAIN:
            files = {name: path for name, path in files.items() if not name.startswith(plain)}
            files |= {path.name: path for path in graph_files(exported.onnx(side, "fp32", form=shipped))}
        for part, precision in product(parts, ships):
            own = file_name(part, precision)
            files |= dict.fromkeys(client_names(part, precision), files[own])
        return files

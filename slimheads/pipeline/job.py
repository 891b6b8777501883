"""One run under way: its recipe, its model, and what its stages left so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.exporting.artifacts import client_names, file_name, parts_of
from slimheads.exporting.graph_files import graph_files
from slimheads.latency.attribution import Treatment
from slimheads.latency.graph_choice import GraphChoice, graph_choices
from slimheads.latency.head_counts import Selection
from slimheads.latency.table import LatencyTable
from slimheads.models.checkpoint import Source
from slimheads.models.loading import load
from slimheads.names import PLAIN, GraphForm, Precision, Shape
from slimheads.output.store import Record
from slimheads.pipeline.latency_tables import tables_for
from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import Scores
from slimheads.recipe.recipe import Recipe
from slimheads.verification.certificate import Certificate, FormProof, LeftOut, Link, SkippedLink


@dataclass
class Job:
    """One run under way."""

    recipe: Recipe
    source: Source
    tell: Callable[[str], None]  # a line of progress within a stage
    notices: list[str] = field(default_factory=list)  # what was told so far
    measures: bool = True  # latency tables that a step asks for and that are not stored
    records: dict[str, Record] = field(default_factory=dict)
    _tables: dict[Shape, LatencyTable] | None = None
    _models: dict[str, PreTrainedModel] = field(default_factory=dict)

    def result(self, stage: str) -> dict[str, Any]:
        """The JSON result of a finished stage."""
        return self.records[stage].result

    def dense(self) -> PreTrainedModel:
        """The untouched model, in float32."""
        return self._model("dense", self.source.folder, self.source.asked)

    def slim(self) -> PreTrainedModel:
        """The slim model as reloaded from what the prune stage wrote, in float32."""
        try:
            return self._model("slim", self.slim_folder, self.source.task)
        except ModelRefusedError as error:
            error.what = f"the slim model made of it cannot be loaded: {error.what}"
            error.where, error.hint = str(self.source.folder), f"run again with --debug and report it ({error.hint})"
            raise

    @property
    def slim_folder(self) -> Path:
        """The torch half of slim/."""
        return self.records["prune"].path / "slim"

    def plan(self) -> Plan:
        """What is deleted."""
        return Plan.from_json(self.result("select"))

    def selection(self) -> Selection:
        """How the plan's head counts were chosen."""
        return Selection.model_validate(self.result("select")["selection"])

    def tables(self) -> dict[Shape, LatencyTable]:
        """The model's latency tables at the recipe's shapes; without `measures`, those that are stored."""
        if self._tables is None:
            self._tables = tables_for(self.recipe, self.source, self.tell, measures=self.measures)
        return self._tables

    def scores(self) -> Scores:
        """One number a unit, and one a query head where those share keys and values."""
        return Scores.from_record(self.result("score"))

    def planned_scores(self) -> Scores:
        """One number for each unit of the plan; before there is one, for each unit that is the rule."""
        if "select" not in self.records:
            return self.scores()
        return self.scores().in_units({site.site: site.unit for site in self.plan().sites})

    def onnx(self, side: str, precision: Precision, graph: str = "model", candidate: GraphForm = "plain") -> Path:
        """An exported graph; `side` is "dense" or "slim", `graph` one of an encoder-decoder's.

        A candidate that was built (see the export stage's result) is there in "fp32" alone.
        """
        return self.onnx_folder(side, candidate) / file_name(graph, precision)

    def onnx_folder(self, side: str, candidate: GraphForm = "plain") -> Path:
        """The exported graphs of one side."""
        return candidate_folder(self.records["export"].path, candidate) / side / "onnx"

    def certificate(self) -> Certificate:
        """What the verify stage found."""
        return certificate_of(self.result("verify"))

    def precisions(self) -> list[Precision]:
        """The precisions that ship: those of the recipe but for those that the certificate left out as weak."""
        left_out = {one.precision for one in self.certificate().left_out} if "verify" in self.records else set()
        return [precision for precision in self.recipe.export.precisions if precision not in left_out]

    def proven_candidates(self) -> list[GraphForm]:
        """The candidate graphs that were built and that the certificate did not refuse."""
        return [proof.candidate for proof in self.certificate().forms if proof.passed]

    def graphs(self) -> tuple[GraphChoice, ...]:
        """The float32 graphs that could ship. One of them does, the plain one before anything was measured; none where
        the certificate failed.
        """
        built, certificate = self.result("export")["candidates"], self.certificate()
        tried = {proof.candidate: proof.reason for proof in certificate.forms}
        refused = tried if certificate.passed else None
        measured = self.result("bench") if "bench" in self.records else {"treatments": (), "again": ()}
        decides = self.recipe.bench.providers[0]
        rows, again = (
            [row for row in map(Treatment.model_validate, measured[key]) if row.provider == decides]
            for key in ("treatments", "again")
        )
        return graph_choices(built, refused, rows, again)

    def treatments(self) -> tuple[Treatment, ...]:
        """What each treatment gave; of the graph that ships, when it was measured again."""
        if "bench" not in self.records:
            return ()
        chosen, again = (
            [Treatment.model_validate(row) for row in self.result("bench")[key]] for key in ("treatments", "again")
        )
        return (*again, *(row for row in chosen if row.treatment not in {one.treatment for one in again}))

    def shipped(self) -> GraphForm:
        """Which float32 graph ships as model.onnx; the plain one stands for it where none does."""
        return next((graph.candidate for graph in self.graphs() if graph.ships), PLAIN)

    def published_graphs(self, side: str) -> dict[str, Path]:
        """The files of one side's onnx/ as published, by name: the shipped graph, and each under all of its names."""
        files = {path.name: path for path in sorted(self.onnx_folder(side).iterdir())}
        plain, parts = file_name("model", "fp32"), parts_of(self.dense().config)
        left_out = set(self.recipe.export.precisions) - set(self.precisions())
        for part, precision in product(parts, left_out):
            for path in graph_files(self.onnx(side, precision, part)):
                del files[path.name]
        if (shipped := self.shipped()) != PLAIN:
            files = {name: path for name, path in files.items() if not name.startswith(plain)}
            files |= {path.name: path for path in graph_files(self.onnx(side, "fp32", candidate=shipped))}
        for part, precision in product(parts, self.precisions()):
            own = file_name(part, precision)
            files |= dict.fromkeys(client_names(part, precision), files[own])
        return files

    def _model(self, side: str, folder: Path, task: str) -> PreTrainedModel:
        if side not in self._models:
            self._models[side] = load(folder, task).float()
        return self._models[side]


def candidate_folder(exported: Path, candidate: GraphForm) -> Path:
    """Where a candidate's dense/ and slim/ are among what the export stage left."""
    return exported if candidate == "plain" else exported / "candidates" / candidate


def certificate_of(result: Mapping[str, Any]) -> Certificate:
    """The certificate in a verify result."""
    return Certificate(
        tuple(Link.model_validate(link) for link in result["links"]),
        tuple(SkippedLink.model_validate(link) for link in result["skipped"]),
        tuple(FormProof.model_validate(proof) for proof in result["candidates"]),
        tuple(LeftOut.model_validate(one) for one in result["left_out"]),
    )

"""bench: which pairs of graphs are timed, and which form of the float32 graph ships."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import PretrainedConfig

from slimheads.errors import about_keys
from slimheads.families.config_facts import measured_shapes
from slimheads.formatting import plural
from slimheads.latency.attribution import (
    EFFORT,
    Treatment,
    TreatmentKind,
    attribute,
    lacking_memory,
    treatment_of,
    unmeasured,
)
from slimheads.latency.bench import bench
from slimheads.latency.graph_choice import Choice, choose_graph
from slimheads.latency.records import Latency
from slimheads.latency.workloads import Workload, workloads
from slimheads.models import flops
from slimheads.models.checkpoint import read_config
from slimheads.names import PLAIN, GraphForm, Precision, Provider, Shape
from slimheads.pipeline.progress import Progress
from slimheads.pipeline.run_models import RunModels
from slimheads.pipeline.stage import Result, Stage
from slimheads.pipeline.stages.export import SIDES, Exported
from slimheads.pipeline.stages.prune import Pruned
from slimheads.pipeline.stages.verify import Verified
from slimheads.recipe.recipe import Recipe
from slimheads.recipe.sections import Bench
from slimheads.runtime.environment import environment


class Counted(BaseModel):
    """Floating-point operations of one run at `shape`."""

    model_config = ConfigDict(frozen=True)
    shape: Shape
    dense: int
    slim: int


class Benched(Result):
    """Latencies of what ships and of the plain graph, and what each further form and precision gives by itself.

    The form that ships was measured again once it was chosen: the measurement that it was chosen by flatters it.
    """

    latency: tuple[Latency, ...]
    treatments: tuple[Treatment, ...]
    again: tuple[Treatment, ...]  # of the form that ships
    choice: Choice  # by the first provider
    flops: Counted

    @property
    def reusable(self) -> bool:
        """What was not measured, or not conclusively, is measured again next time."""
        verdicts = {*(row.verdict for row in self.latency), *(row.verdict for row in (*self.treatments, *self.again))}
        return not verdicts & {"inconclusive", "not measured"}

    def shown_treatments(self) -> tuple[Treatment, ...]:
        """Every treatment; of the form that ships, the measurement after the choice."""
        again = {one.treatment for one in self.again}
        return (*self.again, *(row for row in self.treatments if row.treatment not in again))


@dataclass(frozen=True)
class Graphs:
    """What the bench stage times."""

    pruned: Pruned
    exported: Exported
    precisions: list[Precision]  # that ship
    forms: list[GraphForm]  # proven, besides the plain one

    @property
    def treatments(self) -> list[str]:
        """What is measured besides the plain graph in fp32."""
        return [*(precision for precision in self.precisions if precision != "fp32"), *self.forms]

    @classmethod
    def of(cls, recipe: Recipe, pruned: Pruned, exported: Exported, verified: Verified) -> Graphs:
        """What the certificate lets ship."""
        return cls(pruned, exported, verified.precisions(recipe.export.precisions), verified.proven_forms)


def bench_stage(section: Bench, models: RunModels, graphs: Graphs, progress: Progress) -> Stage[Benched]:
    """Depends on the machine, and on what was proven: nothing else may ship."""

    def work(folder: Path) -> Benched:
        return _work(section, models, graphs, progress)

    def depends() -> dict[str, Any]:
        machine = {"machine": platform.machine(), "cpu": environment().cpu}
        timed = {"precisions": graphs.precisions, "candidates": graphs.forms}
        return section.model_dump(mode="json") | timed | machine

    config = read_config(models.source.folder)
    return Stage("bench", Benched, work, depends, (graphs.exported,), about=_about(section, config, graphs))


def _about(section: Bench, config: PretrainedConfig, graphs: Graphs) -> str:
    shapes = sum(len(workload.shapes) for workload in workloads(config, section.shapes))
    timed = f"{plural(shapes, 'shape')} x {plural(len(graphs.treatments) + 1, 'form')} of the graph"
    if len(section.providers) > 1:
        timed += f" x {len(section.providers)} providers"
    seconds = section.min_seconds * shapes * len(section.providers) * (1 + EFFORT * len(graphs.treatments))
    why = "interleaved with a control so that noise is not reported as speedup"
    return f"{timed}, {why}; at least {seconds:.0f} s of timed runs"


@dataclass
class _Done:
    """How much of the stage is measured. One unit is what one shape of one pair of graphs takes."""

    total: float
    tell: Callable[[float], None]
    begun: float = 0.0

    def next(self, units: float) -> Callable[[float], None]:
        """Takes the share of the measurement that begins now, and passes on that of the stage."""
        before = self.begun
        self.begun += units
        return lambda share: self.tell(min(1.0, (before + share * units) / self.total))


def _work(section: Bench, models: RunModels, graphs: Graphs, progress: Progress) -> Benched:
    dense, slim = models.dense(), models.slim(graphs.pruned.slim)
    rows: list[Latency] = []
    treatments: list[Treatment] = []
    timed = product(section.providers, workloads(dense.config, section.shapes))
    subjects = [_Timed(section, models, graphs, progress.note, provider, workload) for provider, workload in timed]
    # One form is measured again if it is to ship, which is not known yet.
    each = 1 + EFFORT * (len(graphs.treatments) + bool(graphs.forms))
    done = _Done(each * sum(subject.shapes for subject in subjects), progress.share)
    for subject in subjects:
        rows += subject.plain(done)
        for precision in graphs.precisions:
            if precision != "fp32":
                of_precision, given = subject.treated(done, precision)
                rows, treatments = rows + of_precision, treatments + given
        for form in graphs.forms:
            treatments += subject.treated(done, "fp32", form)[1]
    decides = section.providers[0]
    choice = choose_graph([t for t in treatments if t.provider == decides])
    again: list[Treatment] = []
    for form, subject in product([name for name in graphs.forms if name == choice.ships], subjects):
        progress.note(f"the {form} graph ships, and is measured again")
        of_form, given = subject.treated(done, "fp32", form)
        rows, again = of_form + rows, again + given
    rows = [row.model_copy(update={"ships": row.precision != "fp32" or row.candidate == choice.ships}) for row in rows]
    place: dict[str, int] = {name: at for at, name in enumerate((*section.providers, *graphs.precisions))}
    rows.sort(key=lambda row: (place[row.provider], place[row.precision]))
    shape = measured_shapes(dense.config, section.shapes)[-1]
    with about_keys("bench.shapes"):
        counted = Counted(shape=shape, dense=flops.flops(dense, *shape), slim=flops.flops(slim, *shape))
    choice = choice.confirmed([t for t in again if t.provider == decides])
    return Benched(latency=tuple(rows), treatments=tuple(treatments), again=tuple(again), choice=choice, flops=counted)


class _Timed:
    """The measurements of one graph of a model on one provider."""

    def __init__(
        self,
        section: Bench,
        models: RunModels,
        graphs: Graphs,
        note: Callable[[str], None],
        provider: Provider,
        workload: Workload,
    ) -> None:
        pair = (models.dense(), models.slim(graphs.pruned.slim))
        self._exported, self._note, self._graph = graphs.exported, note, workload.graph
        self.shapes = len(workload.shapes)
        with about_keys("bench.shapes"):
            counts = {shape: tuple(workload.flops(model, *shape) for model in pair) for shape in workload.shapes}
        self._options: dict[str, Any] = {
            "shapes": workload.shapes,
            "provider": provider,
            "threads": section.threads,
            "graph": workload.graph if pair[0].config.is_encoder_decoder else None,
            "min_seconds": section.min_seconds,
            "flops": counts,
            "on_missing": section.on_missing,
        }

    def plain(self, done: _Done) -> list[Latency]:
        """Dense against slim as exported."""
        share = done.next(self.shapes)
        files, note = self._files("fp32"), self._noting(PLAIN)
        return list(bench(*files, precision="fp32", on_progress=note, on_share=share, **self._options))

    def treated(
        self, done: _Done, precision: Precision, form: GraphForm = PLAIN
    ) -> tuple[list[Latency], list[Treatment]]:
        """Dense against slim in another precision or as another graph, and what that treatment gave by itself."""
        treatment: str = form if precision == "fp32" else precision
        note, share = self._noting(treatment), done.next(EFFORT * self.shapes)
        plain, treated = self._files("fp32"), self._files(precision, form)
        kind: TreatmentKind = "candidate" if precision == "fp32" else "precision"
        if reason := lacking_memory((*treated, *plain)):
            rows = list(bench(*treated, precision=precision, on_progress=note, on_share=share, **self._options))
            given = [unmeasured(row, treatment, kind, reason) for row in rows]
        else:
            files = *plain, *treated
            found = attribute(*files, precision=precision, on_progress=note, on_share=share, **self._options)
            rows = [one.latency for one in found]
            given = [treatment_of(one, treatment, kind) for one in found]
        return [row.model_copy(update={"candidate": form}) for row in rows], given

    def _noting(self, what: str) -> Callable[[str], None]:
        return lambda line: self._note(f"{what}, {line}")

    def _files(self, precision: Precision, form: GraphForm = PLAIN) -> tuple[Path, Path]:
        dense, slim = (self._exported.onnx(side, precision, self._graph, form) for side in SIDES)
        return dense, slim

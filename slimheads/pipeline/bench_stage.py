"""The bench stage: which pairs of graphs are timed, and which float32 graph is the one to ship."""

from __future__ import annotations

import platform
from itertools import product
from pathlib import Path
from typing import Any

from slimheads.families.config_facts import measured_shapes
from slimheads.latency.attribution import Treatment, TreatmentKind, attribute, lacking_memory, treatment_of, unmeasured
from slimheads.latency.bench import bench
from slimheads.latency.graph_choice import choose_graph
from slimheads.latency.records import Latency
from slimheads.latency.workloads import Workload, workloads
from slimheads.models import flops
from slimheads.names import PLAIN, GraphForm, Precision, Provider
from slimheads.pipeline.job import Job
from slimheads.runtime.environment import environment


def bench_section(job: Job) -> dict[str, Any]:
    """What the measurements depend on besides the exported graphs: the candidates that were proven, above all."""
    forms: list[GraphForm] | str = [name for name in job.recipe.export.candidates if name != PLAIN]
    if forms:
        forms = job.proven_candidates() if "verify" in job.records else "still to be proven"
    machine = {"machine": platform.machine(), "cpu": environment().cpu}
    chosen = {"precisions": job.precisions(), "candidates": forms}
    return job.recipe.bench.model_dump(mode="json") | chosen | machine


def bench_work(job: Job, _folder: Path) -> tuple[dict[str, Any], bool]:
    """Dense against slim on every provider, in every precision, and under every candidate graph that was proven.

    What is reported of the candidate that ships is a measurement of its own: the one that it was chosen by flatters it.
    """
    section, config = job.recipe.bench, job.dense().config
    rows: list[Latency] = []
    treatments: list[Treatment] = []
    subjects = [_Measured(job, *of) for of in product(section.providers, workloads(config, section.shapes))]
    for measured in subjects:
        rows += measured.plain()
        for precision in job.precisions():
            if precision != "fp32":
                of_precision, given = measured.treated(precision)
                rows, treatments = rows + of_precision, treatments + given
        for candidate in job.proven_candidates():
            treatments += measured.treated("fp32", candidate)[1]
    ships, _ = choose_graph([t for t in treatments if t.provider == section.providers[0]])
    again: list[Treatment] = []
    for chosen, measured in product([name for name in job.proven_candidates() if name == ships], subjects):
        job.tell(f"the {chosen} graph ships, and is measured afresh")
        of_form, given = measured.treated("fp32", chosen)
        rows, again = of_form + rows, again + given
    rows = [row.model_copy(update={"ships": row.precision != "fp32" or row.candidate == ships}) for row in rows]
    place: dict[str, int] = {name: at for at, name in enumerate((*section.providers, *job.recipe.export.precisions))}
    rows.sort(key=lambda row: (place[row.provider], place[row.precision]))
    shape = measured_shapes(config, section.shapes)[-1]
    whole = {side: flops.flops(model(), *shape) for side, model in (("dense", job.dense), ("slim", job.slim))}
    result = {
        "latency": [row.model_dump(mode="json") for row in rows],
        "treatments": [row.model_dump(mode="json") for row in treatments],
        "again": [row.model_dump(mode="json") for row in again],
        "flops": {"shape": list(shape)} | whole,
    }
    # What was not measured, or not conclusively, is measured again next time.
    verdicts = {*(row.verdict for row in rows), *(treatment.verdict for treatment in (*treatments, *again))}
    return result, not verdicts & {"inconclusive", "not measured"}


class _Measured:
    """The measurements of one graph of a model on one provider."""

    def __init__(self, job: Job, provider: Provider, workload: Workload) -> None:
        section, models = job.recipe.bench, (job.dense(), job.slim())
        self._job, self._graph = job, workload.graph
        self._options: dict[str, Any] = {
            "shapes": workload.shapes,
            "provider": provider,
            "threads": section.threads,
            "graph": workload.graph if models[0].config.is_encoder_decoder else None,
            "min_seconds": section.min_seconds,
            "flops": {shape: tuple(workload.flops(model, *shape) for model in models) for shape in workload.shapes},
            "on_missing": section.on_missing,
            "on_progress": job.tell,
        }

    def plain(self) -> list[Latency]:
        """Dense against slim as exported."""
        return list(bench(*self._files("fp32"), precision="fp32", **self._options))

    def treated(self, precision: Precision, candidate: GraphForm = PLAIN) -> tuple[list[Latency], list[Treatment]]:
        """Dense against slim in another precision or as another graph, and what that treatment gave by itself."""
        treatment: str = candidate if precision == "fp32" else precision
        self._job.tell(f"latency of {treatment}")
        plain, treated = self._files("fp32"), self._files(precision, candidate)
        kind: TreatmentKind = "candidate" if precision == "fp32" else "precision"
        if reason := lacking_memory((*treated, *plain)):
            rows = list(bench(*treated, precision=precision, **self._options))
            given = [unmeasured(row, treatment, kind, reason) for row in rows]
        else:
            found = attribute(*plain, *treated, precision=precision, **self._options)
            rows = [one.latency for one in found]
            given = [treatment_of(one, treatment, kind) for one in found]
        return [row.model_copy(update={"candidate": candidate}) for row in rows], given

    def _files(self, precision: Precision, candidate: GraphForm = PLAIN) -> tuple[Path, Path]:
        dense, slim = (self._job.onnx(side, precision, self._graph, candidate) for side in ("dense", "slim"))
        return dense, slim

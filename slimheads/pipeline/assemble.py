"""The last stage: from what the others left to a Report, its gates and verdict, and to what is published."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimheads.errors import GateError, UsageError
from slimheads.exporting.graph_files import graph_bytes
from slimheads.families.config_facts import NOUNS
from slimheads.families.family import Inputs, families
from slimheads.latency.profile import command, table_shapes
from slimheads.latency.records import Latency
from slimheads.latency.table import Predicted, predict
from slimheads.latency.table_store import Setting, stored
from slimheads.latency.workloads import loaded_graphs
from slimheads.models.checkpoint import read_config
from slimheads.names import PLAIN
from slimheads.output.publishing import Source
from slimheads.pipeline.gates import judge, unmet
from slimheads.pipeline.job import Job
from slimheads.report.model import (
    Heads,
    ModelFacts,
    PlanTable,
    Prediction,
    Report,
    ScoreTable,
    Size,
    StageRecord,
    Verdict,
)
from slimheads.report.render import render_html, render_markdown, render_model_card
from slimheads.report.tables import short_name
from slimheads.runtime.environment import Environment
from slimheads.side_files.files import stated_terms
from slimheads.verification.drift import Drift
from slimheads.verification.lengths import lengths

BROKEN_PROOF = "the certificate failed, so nothing after it was measured"


def assemble(
    job: Job,
    *,
    stages: Sequence[StageRecord],
    surroundings: Environment,
    command: str,
    seconds: float,
    peak_rss_mb: float,
) -> Report:
    """Puts the report together, judges the gates and gives the verdict."""
    certificate = job.certificate().with_form(job.shipped())
    measured = job.result("bench") if "bench" in job.records else {"latency": []}
    latency = tuple(Latency.model_validate(row) for row in measured["latency"])
    drift, drift_text = (_drift_of(job, key) for key in ("drift", "drift_text"))
    facts = _facts(job)
    drifts = [d for d in (drift, drift_text) if d]
    gates = judge(
        job.recipe.gates,
        [row for row in latency if row.ships is not False],
        drifts,
        facts.dense,
        facts.slim,
        certificate.links,
    )
    error = certificate.error()
    unmet = [unmet(gate, job) for gate in gates if not gate.met]
    predictions, no_table = predict_rows(job, latency)
    drift_reason, text_reason = _no_drift(job, facts.inputs, certificate.passed)
    return Report(
        verdict=Verdict(
            ok=not (error or unmet),
            exit_code=error.exit_code if error else GateError.exit_code if unmet else 0,
            reasons=(str(error),) if error else tuple(map(str, unmet)),
        ),
        recipe=job.recipe.model_dump(mode="json"),
        model=facts,
        files=dict(_file_sizes(job)),
        scores=ScoreTable.model_validate(job.planned_scores().to_json(), strict=False),
        plan=PlanTable.model_validate(job.plan().to_json(), strict=False),
        certificate=certificate.links,
        certificate_skipped=certificate.skipped,
        lengths=lengths(job.dense().config),
        left_out=certificate.left_out,
        drift=drift,
        drift_reason=None if drift else drift_reason,
        drift_text=drift_text,
        drift_text_reason=None if drift_text else text_reason,
        latency=latency,
        latency_reason=None if latency else BROKEN_PROOF,
        candidates=job.graphs(),
        treatments=job.treatments(),
        selection=job.selection(),
        predictions=predictions,
        predictions_reason=no_table if predictions else BROKEN_PROOF,
        gates=gates,
        notices=tuple(job.notices),
        stages=tuple(stages),
        environment=surroundings,
        command=command,
        seconds=seconds,
        peak_rss_mb=peak_rss_mb,
    )


def predict_rows(job: Job, latency: Sequence[Latency]) -> tuple[tuple[Prediction, ...], str | None]:
    """Every row of the plain float32 graphs predicted from the plan, and why a row is predicted by FLOPs.

    With the tables that are stored now: a table is of the dense model, so none was made with this plan's latency known.
    """
    found, reason = [], None
    for row in latency:
        if row.precision == "fp32" and row.candidate == PLAIN:  # tables are made of plain graphs
            by_table, lacking = _by_table(job, row)
            reason = reason or lacking
            found.append(_prediction(row, by_table))
    return tuple(found), reason


def _by_table(job: Job, row: Latency) -> tuple[Predicted | None, str | None]:
    if row.graph is not None:
        return None, "there are no latency tables of models with several graphs"
    setting = Setting(row.provider, row.threads, job.recipe.select.within_groups)
    tables = stored(job.source, [row.shape], setting)
    if row.shape not in tables:
        shapes = table_shapes(job.source, job.recipe.bench.shapes)
        return None, f"there is no latency table yet; make one with: {command(job.source, shapes, setting)}"
    try:
        return predict(tables[row.shape], job.plan()), None
    except UsageError as error:
        return None, error.what


def _prediction(row: Latency, by_table: Predicted | None) -> Prediction:
    interval = by_table.speedup if by_table else None
    speedup = interval.estimate if interval else row.flop_speedup
    measured = row.speedup.estimate if row.speedup and row.verdict != "inconclusive" else None
    return Prediction(
        provider=row.provider,
        threads=row.threads,
        graph=row.graph,
        shape=row.shape,
        source="table" if interval else "flops",
        speedup=speedup,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        measured=measured,
        error=measured / speedup - 1 if measured and speedup else None,
        reason="the FLOPs were not counted" if speedup is None else row.reason if measured is None else None,
    )


def contents(job: Job, report: Report | None = None) -> dict[str, Source]:
    """What is published: name in the output folder -> content. Without a report, the plan so far.

    slim/ is left out where the certificate failed.
    """
    wanted: dict[str, Source] = {"recipe.yaml": job.recipe.resolved_yaml().encode()}
    if "score" in job.records:
        wanted["scores.json"] = _json(job.planned_scores().to_json())
    if "select" in job.records:
        wanted["plan.json"] = _json(job.plan().to_json())
    if report is None:
        return wanted
    config = job.onnx_folder("dense").parent / "config.json"
    wanted["dense"] = {"config.json": config} | _published_graphs(job, "dense")
    if job.certificate().passed:
        torch_half = {f.name: f for f in job.slim_folder.iterdir() if f.name != "README.md"}
        card = render_model_card(_shareable(report)).encode()
        wanted["slim"] = {**torch_half, **_published_graphs(job, "slim"), "README.md": card}
    wanted["report.json"] = report.to_json().encode()
    wanted["report.md"] = render_markdown(report).encode()
    wanted["report.html"] = render_html(report).encode()
    return wanted


def _published_graphs(job: Job, side: str) -> dict[str, Path]:
    return {f"onnx/{name}": path for name, path in job.published_graphs(side).items()}


def _shareable(report: Report) -> Report:
    """The card leaves this machine with the model, so it calls a folder of this machine by its name alone."""
    model = report.model
    if model.hub_id or model.source.startswith("pkg://"):
        return report
    return report.model_copy(update={"model": model.model_copy(update={"source": short_name(model.source)})})


def _drift_of(job: Job, key: str) -> Drift | None:
    found = job.result("verify")[key]
    return Drift.model_validate(found) if found else None


def _no_drift(job: Job, fed: Inputs, proven: bool) -> tuple[str, str]:
    """Why there is no drift on the built-in sample or the recipe's inputs, and none on the recipe's text."""
    if fed == "text":
        no_text = "the recipe names no text of its own (verify.text)"
        return BROKEN_PROOF, BROKEN_PROOF if job.recipe.verify.text else no_text
    nouns = f"{NOUNS[fed]}s"
    no_sample = f"there is no built-in sample of {nouns}, and the recipe names no inputs of its own (verify.inputs)"
    return no_sample if proven else BROKEN_PROOF, f"drift of this model is measured on {nouns}"


def _facts(job: Job) -> ModelFacts:
    plan, loaded, pruned = job.plan(), job.result("load"), job.result("prune")
    counted = job.result("bench")["flops"] if "bench" in job.records else {}

    config = read_config(job.source.folder)
    graphs = loaded_graphs(config)

    def size(side: str, parameters: int) -> Size:
        return Size(
            parameters=parameters,
            bytes=sum(graph_bytes(job.onnx(side, "fp32", graph, job.shipped())) for graph in graphs),
            flops=counted.get(side),
            reason=None if counted else BROKEN_PROOF,
        )

    return ModelFacts(
        source=job.source.given,
        hub_id=job.source.given if job.source.from_hub else None,
        type=job.source.model_type,
        family=families()[job.source.family].title,
        task=job.source.task,
        unit=plan.sites[0].unit,
        inputs=families()[job.source.family].inputs,
        dense=size("dense", loaded["parameters"]),
        slim=size("slim", pruned["parameters"]),
        flops_shape=tuple(counted["shape"]) if counted else None,
        heads=Heads(total=plan.total, kept=plan.total - plan.removed, removed=plan.removed),
        reload=pruned["reload"],
        reload_note=pruned["reload_note"],
        sentence_transformers=pruned["sentence_transformers"],
        encoder_decoder=config.is_encoder_decoder,
        terms=stated_terms(job.source.folder),
    )


def _file_sizes(job: Job) -> Iterator[tuple[str, int]]:
    for side in ("dense", "slim"):
        for name, file in _published_graphs(job, side).items():
            yield f"{side}/{name}", file.stat().st_size
    for file in sorted(job.slim_folder.glob("*.safetensors")):
        yield f"slim/{file.name}", file.stat().st_size


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()

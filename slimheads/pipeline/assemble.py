"""The last stage: from the results of the others to a Report, with its gates and verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slimheads.errors import CertificateError, GateError
from slimheads.exporting.graph_files import graph_bytes
from slimheads.families.config_facts import NOUNS
from slimheads.families.family import Inputs, families
from slimheads.latency.workloads import loaded_graphs
from slimheads.models.checkpoint import read_config
from slimheads.names import Side
from slimheads.pipeline.contents import published_graphs
from slimheads.pipeline.finished import Finished
from slimheads.pipeline.gates import judge, unmet_gate
from slimheads.pipeline.predictions import predict_rows
from slimheads.pipeline.stages.export import SIDES
from slimheads.report.model import GateResult, ModelFacts, Report, Size, StageRecord, Verdict, count_kinds
from slimheads.runtime.environment import Environment
from slimheads.side_files.shipped_files import stated_terms
from slimheads.verification.lengths import lengths

BROKEN_PROOF = "the certificate failed, so nothing after it was measured"


@dataclass(frozen=True)
class Circumstances:
    """What a report says of the run itself."""

    command: str
    environment: Environment
    stages: Sequence[StageRecord]
    notices: Sequence[str]
    seconds: float
    peak_rss_mb: float


def assemble(run: Finished, circumstances: Circumstances) -> Report:
    """Puts the report together, judges the gates and gives the verdict."""
    certificate = run.verified.certificate.with_form(run.shipped)
    latency = run.benched.latency if run.benched else ()
    drift, drift_text = run.verified.drift, run.verified.drift_text
    drift_reason, text_reason = _no_drift(run)
    facts = _facts(run)
    shipped = [row for row in latency if row.ships is not False]
    drifts = [d for d in (drift, drift_text) if d]
    gates = judge(run.recipe.gates, shipped, drifts, facts.dense, facts.slim, certificate.links)
    predictions, no_table = predict_rows(run, latency)
    return Report(
        verdict=_verdict(run, certificate.error(), gates),
        recipe=run.recipe.model_dump(mode="json"),
        model=facts,
        files=dict(_file_sizes(run)),
        scores=run.score_table,
        plan=run.selected.plan,
        certificate=certificate.links,
        certificate_skipped=certificate.skipped,
        lengths=lengths(read_config(run.source.folder)),
        left_out=certificate.left_out,
        drift=drift,
        drift_reason=None if drift else drift_reason,
        drift_text=drift_text,
        drift_text_reason=None if drift_text else text_reason,
        latency=latency,
        latency_reason=None if latency else BROKEN_PROOF,
        candidates=run.graphs,
        treatments=run.benched.shown_treatments() if run.benched else (),
        selection=run.selected.selection,
        predictions=predictions,
        predictions_reason=no_table if predictions else BROKEN_PROOF,
        gates=gates,
        notices=tuple(circumstances.notices),
        stages=tuple(circumstances.stages),
        environment=circumstances.environment,
        command=circumstances.command,
        seconds=circumstances.seconds,
        peak_rss_mb=circumstances.peak_rss_mb,
    )


def _verdict(run: Finished, error: CertificateError | None, gates: Sequence[GateResult]) -> Verdict:
    if error:
        return Verdict(ok=False, exit_code=error.exit_code, reasons=(str(error),))
    unmet = [unmet_gate(gate, run.recipe) for gate in gates if not gate.met]
    return Verdict(ok=not unmet, exit_code=GateError.exit_code if unmet else 0, reasons=tuple(map(str, unmet)))


def _no_drift(run: Finished) -> tuple[str, str]:
    """Why there is no drift on the built-in sample or the recipe's inputs, and none on the recipe's text."""
    fed: Inputs = families()[run.source.family].inputs
    if fed == "text":
        no_text = "the recipe names no text of its own (verify.text)"
        return BROKEN_PROOF, BROKEN_PROOF if run.recipe.verify.text else no_text
    nouns = f"{NOUNS[fed]}s"
    no_sample = f"there is no built-in sample of {nouns}, and the recipe names no inputs of its own (verify.inputs)"
    proven = run.verified.certificate.passed
    return no_sample if proven else BROKEN_PROOF, f"drift of this model is measured on {nouns}"


def _facts(run: Finished) -> ModelFacts:
    source, config = run.source, read_config(run.source.folder)
    counted, family = run.benched.flops if run.benched else None, families()[run.source.family]

    def size(side: Side, parameters: int) -> Size:
        graphs = [run.exported.onnx(side, "fp32", graph, run.shipped) for graph in loaded_graphs(config)]
        return Size(
            parameters=parameters,
            bytes=sum(map(graph_bytes, graphs)),
            flops=getattr(counted, side) if counted else None,
            reason=None if counted else BROKEN_PROOF,
        )

    return ModelFacts(
        source=source.given,
        hub_id=source.given if source.from_hub else None,
        type=source.model_type,
        family=family.title,
        task=source.task,
        inputs=family.inputs,
        dense=size("dense", run.loaded.parameters),
        slim=size("slim", run.pruned.parameters),
        flops_shape=counted.shape if counted else None,
        kinds=count_kinds(run.selected.plan),
        reload=run.pruned.reload,
        reload_note=run.pruned.reload_note,
        sentence_transformers=run.pruned.sentence_transformers,
        encoder_decoder=config.is_encoder_decoder,
        terms=stated_terms(source.folder),
    )


def _file_sizes(run: Finished) -> Iterator[tuple[str, int]]:
    for side in SIDES:
        for name, file in published_graphs(run, side).items():
            yield f"{side}/{name}", file.stat().st_size
    for file in sorted(run.pruned.slim.glob("*.safetensors")):
        yield f"slim/{file.name}", file.stat().st_size

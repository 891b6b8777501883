"""verify: the certificate of what was exported, and the drift of the slim model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slimheads.data.inputs import read_inputs
from slimheads.data.texts import read_texts
from slimheads.families.config_facts import NOUNS, inputs_kind
from slimheads.files import sha256_file
from slimheads.names import GraphForm, Precision
from slimheads.pipeline.run_models import RunModels
from slimheads.pipeline.stage import Result, Stage
from slimheads.pipeline.stages.export import Exported
from slimheads.pipeline.stages.prune import Pruned
from slimheads.pipeline.stages.recover import Recovered
from slimheads.pipeline.stages.score import Scored
from slimheads.pipeline.stages.select import Selected
from slimheads.pruning.gates import gated
from slimheads.pruning.select import random_plan
from slimheads.recipe.recipe import Recipe
from slimheads.runtime.cpu import cpu_features
from slimheads.side_files.embedding import embedding_of
from slimheads.side_files.tokenizing import load_tokenizer
from slimheads.verification.certificate import Certificate, FormProof
from slimheads.verification.drift import Drift, drift_on_inputs, measure_drift
from slimheads.verification.prove import verify

CONTROL_SEEDS = (1, 2, 3)


class Verified(Result):
    """The proof, and where it holds the drift on the built-in sample and on the recipe's own."""

    certificate: Certificate
    drift: Drift | None = None
    drift_text: Drift | None = None

    @property
    def reusable(self) -> bool:
        """A failed proof is tried again."""
        return self.certificate.passed

    @property
    def ends_run(self) -> bool:
        """Nothing after a failed proof is worth measuring."""
        return not self.certificate.passed

    def precisions(self, wanted: Sequence[Precision]) -> list[Precision]:
        """Those of the recipe but for what the certificate left out as weak."""
        left_out = {one.precision for one in self.certificate.left_out}
        return [precision for precision in wanted if precision not in left_out]

    @property
    def proven_forms(self) -> list[GraphForm]:
        """The further forms of the graph that were built and that the certificate did not refuse."""
        return [proof.candidate for proof in self.certificate.forms if proof.passed]


@dataclass(frozen=True)
class Subjects:
    """What the verify stage looks at."""

    scored: Scored
    selected: Selected
    pruned: Pruned
    recovered: Recovered
    exported: Exported


def verify_stage(recipe: Recipe, models: RunModels, subjects: Subjects, note: Callable[[str], None]) -> Stage[Verified]:
    """Depends on this CPU as well: ONNX Runtime chooses its kernels by it."""

    def work(folder: Path) -> Verified:
        certificate = _certificate(recipe, models, subjects, note)
        if not certificate.passed:
            return Verified(certificate=certificate)
        drift, drift_text = _drifts(recipe, models, subjects, note)
        return Verified(certificate=certificate, drift=drift, drift_text=drift_text)

    def depends() -> dict[str, Any]:
        section, export = recipe.verify, recipe.export
        text = "\n".join(read_texts(Path(section.text))).encode() if section.text else None
        samples = {
            "text": hashlib.sha256(text).hexdigest() if text else None,
            "inputs": sha256_file(Path(section.inputs)) if section.inputs else None,
        }
        keys = {"precisions", "candidates", "int8_for", "on_weak_precision"}
        exported = export.model_dump(mode="json", include=keys)
        return section.model_dump(mode="json") | samples | exported | {"cpu": cpu_features()}

    reads = (subjects.selected, subjects.recovered, subjects.exported)
    about = "prove every graph, then measure the drift of the outputs"
    presumed = _all_proven(subjects.exported.built)
    return Stage("verify", Verified, work, depends, reads, presumed, about)


def _all_proven(forms: Sequence[GraphForm]) -> Verified:
    """What a dry run expects."""
    proofs = tuple(FormProof(candidate=form, links=()) for form in forms)
    return Verified(certificate=Certificate((), (), proofs))


def _certificate(recipe: Recipe, models: RunModels, of: Subjects, note: Callable[[str], None]) -> Certificate:
    exported, export = of.exported, recipe.export
    return verify(
        models.dense(),
        models.slim(of.pruned.slim),
        of.selected.plan,
        exported.folder / "slim",
        exported.onnx_folder("dense"),
        task=models.source.task,
        precisions=export.precisions,
        atol=recipe.verify.atol,
        rtol=recipe.verify.rtol,
        int8_for=export.int8_for,
        on_weak_precision=export.on_weak_precision,
        candidates={form: exported.form_folder(form) for form in exported.built},
        on_progress=note,
    )


def _drifts(
    recipe: Recipe, models: RunModels, of: Subjects, note: Callable[[str], None]
) -> tuple[Drift | None, Drift | None]:
    """On the built-in sample, or on the recipe's inputs where there is no built-in one; and on the recipe's text."""
    dense, slim, section = models.dense(), models.slim(of.pruned.slim), recipe.verify
    controls = _controls(recipe, models, of.scored, of.selected)
    kind = inputs_kind(dense.config)
    if kind != "text":
        if not section.inputs:
            return None, None
        note("drift on the recipe's inputs")
        path = Path(section.inputs)
        inputs = read_inputs(path, dense.config)
        return drift_on_inputs(dense, slim, controls, inputs, sample_name=path.name, noun=NOUNS[kind]), None
    folder = models.source.folder
    tokenizer, embedding = load_tokenizer(folder, dense.config), embedding_of(folder)

    def on(path: Path | None, name: str) -> Drift:
        texts = read_texts(path)
        return measure_drift(
            dense, slim, controls, tokenizer, texts, task=models.source.task, sample_name=name, embedding=embedding
        )

    note("drift on the built-in sample")
    built_in = on(None, "built-in")
    if not section.text:
        return built_in, None
    note("drift on the recipe's text")
    return built_in, on(Path(section.text), Path(section.text).name)


def _controls(
    recipe: Recipe, models: RunModels, scored: Scored, selected: Selected
) -> list[tuple[int, Callable[[], AbstractContextManager[Any]]]]:
    """The dense model under random plans of the same size, by seed."""
    if selected.plan.removed == 0:
        return []
    rules = recipe.select.model_dump(mode="json") | selected.selection.steps
    plans = [(seed, random_plan(scored.scores, seed, **rules)) for seed in CONTROL_SEEDS]
    return [(seed, partial(gated, models.dense(), plan)) for seed, plan in plans]

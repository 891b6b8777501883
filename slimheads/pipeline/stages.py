"""The stages: each takes what earlier ones left and its own section of the recipe, and leaves files and a JSON result.

A stage's key covers what the stages it reads left, so it changes when anything before it does.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import slimheads
from slimheads.data.inputs import read_inputs
from slimheads.data.texts import read_texts
from slimheads.exporting.artifacts import file_name
from slimheads.exporting.export import export
from slimheads.exporting.graph_forms import build_form
from slimheads.families.config_facts import NOUNS, inputs_kind
from slimheads.files import sha256_file
from slimheads.intake.examine import judged_config
from slimheads.latency.head_counts import Selection, choose_step
from slimheads.latency.profile import table_shapes
from slimheads.latency.table import LatencyTable
from slimheads.models import flops
from slimheads.models.checkpoint import weight_files
from slimheads.models.loading import load, save
from slimheads.models.reload import reload_tier
from slimheads.names import GraphForm
from slimheads.pipeline.bench_stage import bench_section, bench_work
from slimheads.pipeline.job import Job, candidate_folder
from slimheads.pipeline.latency_tables import setting_of
from slimheads.pruning.gates import gated
from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import Scores
from slimheads.pruning.scoring.score import score
from slimheads.pruning.select import random_plan, select
from slimheads.pruning.surgery import prune
from slimheads.recipe.recipe import Recipe
from slimheads.runtime.cpu import cpu_features
from slimheads.runtime.environment import installed
from slimheads.side_files.embedding import embedding_of
from slimheads.side_files.files import side_files
from slimheads.side_files.sentence_modules import MODULES
from slimheads.side_files.tokenizing import load_tokenizer
from slimheads.verification.drift import Drift, drift_on_inputs, measure_drift
from slimheads.verification.prove import verify

CONTROL_SEEDS = (1, 2, 3)
_VERSIONED = (
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "scipy",
)


@dataclass(frozen=True)
class Stage:
    """A stage: which earlier ones it reads, which part of the recipe, and its work.

    `work(job, folder)` writes its files to `folder` and returns its result, and whether a later run may reuse it.
    """

    name: str
    reads: tuple[str, ...]
    section: Callable[[Job], Mapping[str, Any]]
    work: Callable[[Job, Path], tuple[dict[str, Any], bool]]


@cache
def versions() -> dict[str, str]:
    """What a stored result depends on besides its inputs: our own code, byte for byte, and the libraries below it."""
    own = hashlib.sha256()
    package = Path(slimheads.__file__).parent
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.yaml"), *package.rglob("*.txt")]):
        own.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return {"slimheads": own.hexdigest(), "python": platform.python_version()} | {
        n: installed(n) or "none" for n in _VERSIONED
    }


def _dump(section: Any) -> dict[str, Any]:
    return dict(section.model_dump(mode="json"))


# load


def _content(job: Job) -> dict[str, Any]:
    folder = job.source.folder
    files = [Path("config.json"), *(f.relative_to(folder) for f in weight_files(folder)), *side_files(folder)]
    return {"task": job.source.task, "files": {f.as_posix(): sha256_file(folder / f) for f in files}}


def _load(job: Job, _folder: Path) -> tuple[dict[str, Any], bool]:
    return {"parameters": flops.parameters(job.dense())}, True


# score, select


def _score(job: Job, _folder: Path) -> tuple[dict[str, Any], bool]:
    return score(job.dense(), job.recipe.score.method).to_record(), True


def _select_section(job: Job) -> dict[str, Any]:
    section = _dump(job.recipe.select)
    if job.recipe.select.multiple_of != "auto":
        return section
    setting, shapes = setting_of(job.recipe), table_shapes(job.source, job.recipe.bench.shapes)
    tables = job.tables()
    found = [[list(shape), tables[shape].fingerprint() if shape in tables else None] for shape in shapes]
    return section | {"setting": asdict(setting), "tables": found}


def _select(job: Job, _folder: Path) -> tuple[dict[str, Any], bool]:
    auto = job.recipe.select.multiple_of == "auto"
    plan, selection = choose(job.scores(), job.recipe, tuple(job.tables().values()) if auto else ())
    return plan.to_json() | {"selection": selection.model_dump(mode="json")}, True


def choose(scores: Scores, recipe: Recipe, tables: Sequence[LatencyTable] = ()) -> tuple[Plan, Selection]:
    """`select` by the recipe; its error points at the recipe's key.

    Args:
        tables: of the model at the recipe's shapes; only `multiple_of: auto` needs them.
    """
    asked, rules = recipe.select.multiple_of, _dump(recipe.select)
    with recipe.located():
        if asked == "auto" and tables:
            return choose_step(scores, rules, tables)
        return select(scores, **rules), Selection(asked=asked, multiple_of=asked)


# prune


def _prune(job: Job, folder: Path) -> tuple[dict[str, Any], bool]:
    plan, out = job.plan(), folder / "slim"
    model = prune(load(job.source.folder, job.source.asked), plan)
    save(model, out)
    if plan.removed == 0:
        # Ratio 0 changes nothing: the weights that ship are the source's own files, byte for byte.
        for made in weight_files(out):
            made.unlink()
        for original in weight_files(job.source.folder):
            shutil.copyfile(original, out / original.name)
        index = job.source.folder / "model.safetensors.index.json"
        if index.is_file():
            shutil.copyfile(index, out / index.name)
    tier, note = reload_tier(out, model, job.source.task)
    facts = {"reload": tier, "reload_note": note, "parameters": flops.parameters(model)}
    embeds = job.source.task == "feature-extraction" and (out / MODULES).is_file()
    return facts | {"sentence_transformers": embeds}, True


# recover


def _recover(job: Job, _folder: Path) -> tuple[dict[str, Any], bool]:
    return {"method": job.recipe.recover.method}, True


# export


def _export_section(job: Job) -> dict[str, Any]:
    """What the graphs depend on; which of them may ship is the certificate's affair."""
    return {key: value for key, value in _dump(job.recipe.export).items() if key != "on_weak_precision"}


def _export(job: Job, folder: Path) -> tuple[dict[str, Any], bool]:
    section = job.recipe.export
    options = _export_section(job)
    del options["candidates"]
    for side, model in (("dense", job.dense), ("slim", job.slim)):
        job.tell(f"{side} to ONNX ({', '.join(section.precisions)})")
        export(model(), folder / side / "onnx", task=job.source.task, **options)
    _beside_graphs(job, folder)
    reasons: dict[str, str | None] = {}
    for candidate in section.candidates:
        if candidate != "plain":
            job.tell(f"dense and slim {candidate}")
            reasons[candidate] = _candidate(job, folder, candidate)
    return {"candidates": reasons}, True


def _candidate(job: Job, exported: Path, candidate: GraphForm) -> str | None:
    """Builds a candidate of both sides, or of none: a fused graph's gain is measured against a fused dense graph."""
    folder = candidate_folder(exported, candidate)
    for side in ("dense", "slim"):
        plain, target = (root / side / "onnx" / file_name("model", "fp32") for root in (exported, folder))
        target.parent.mkdir(parents=True)
        reason = build_form(candidate, plain, target, job.dense().config)
        if reason:
            shutil.rmtree(folder)
            return f"{side}: {reason}"
    _beside_graphs(job, folder)
    return None


def _beside_graphs(job: Job, folder: Path) -> None:
    """optimum's and transformers.js's clients look for config.json beside onnx/."""
    dense = json.dumps(judged_config(job.source.folder), indent=2, ensure_ascii=False) + "\n"
    (folder / "dense" / "config.json").write_text(dense, encoding="utf-8")
    shutil.copyfile(job.slim_folder / "config.json", folder / "slim" / "config.json")
    generation = job.slim_folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / "slim" / generation.name)


# verify


def _verify_section(job: Job) -> dict[str, Any]:
    section, content = job.recipe.verify, dict[str, str | None]()
    content["text"] = (
        hashlib.sha256("\n".join(read_texts(Path(section.text))).encode()).hexdigest() if section.text else None
    )
    content["inputs"] = sha256_file(Path(section.inputs)) if section.inputs else None
    export = job.recipe.export
    keys = ("precisions", "candidates", "int8_for", "on_weak_precision")
    return _dump(section) | content | {key: _dump(export)[key] for key in keys} | {"cpu": cpu_features()}


def _verify(job: Job, _folder: Path) -> tuple[dict[str, Any], bool]:
    exported = job.records["export"]
    reasons = exported.result["candidates"]
    built = [candidate for candidate in job.recipe.export.candidates if reasons.get(candidate, "plain") is None]
    certificate = verify(
        job.dense(),
        job.slim(),
        job.plan(),
        exported.path / "slim",
        job.onnx_folder("dense"),
        task=job.source.task,
        precisions=job.recipe.export.precisions,
        atol=job.recipe.verify.atol,
        rtol=job.recipe.verify.rtol,
        int8_for=job.recipe.export.int8_for,
        on_weak_precision=job.recipe.export.on_weak_precision,
        candidates={candidate: candidate_folder(exported.path, candidate) for candidate in built},
        on_progress=job.tell,
    )
    result: dict[str, Any] = {
        "links": [link.model_dump(mode="json") for link in certificate.links],
        "skipped": [link.model_dump(mode="json") for link in certificate.skipped],
        "candidates": [proof.model_dump(mode="json") for proof in certificate.forms],
        "left_out": [one.model_dump(mode="json") for one in certificate.left_out],
        "drift": None,
        "drift_text": None,
    }
    if certificate.passed and inputs_kind(job.dense().config) != "text":
        if job.recipe.verify.inputs:
            job.tell("drift on the recipe's inputs")
            result["drift"] = _drift_on_inputs(job, Path(job.recipe.verify.inputs))
    elif certificate.passed:
        job.tell("drift on the built-in sample")
        result["drift"] = _drift(job, "built-in", None)
        if job.recipe.verify.text:
            job.tell("drift on the recipe's text")
            result["drift_text"] = _drift(job, Path(job.recipe.verify.text).name, Path(job.recipe.verify.text))
    return result, certificate.passed


def _drift(job: Job, name: str, text: Path | None) -> dict[str, Any]:
    drift: Drift = measure_drift(
        job.dense(),
        job.slim(),
        _controls(job),
        load_tokenizer(job.source.folder, job.dense().config),
        read_texts(text),
        task=job.source.task,
        sample_name=name,
        embedding=embedding_of(job.source.folder),
    )
    return drift.model_dump(mode="json")


def _drift_on_inputs(job: Job, path: Path) -> dict[str, Any]:
    config = job.dense().config
    return drift_on_inputs(
        job.dense(),
        job.slim(),
        _controls(job),
        read_inputs(path, config),
        sample_name=path.name,
        noun=NOUNS[inputs_kind(config)],
    ).model_dump(mode="json")


def _controls(job: Job) -> list[tuple[int, Callable[[], AbstractContextManager[Any]]]]:
    if job.plan().removed == 0:
        return []
    rules = _dump(job.recipe.select) | {"multiple_of": job.selection().multiple_of}
    plans = [(seed, random_plan(job.scores(), seed, **rules)) for seed in CONTROL_SEEDS]
    return [(seed, partial(gated, job.dense(), plan)) for seed, plan in plans]


STAGES: tuple[Stage, ...] = (
    Stage("load", (), _content, _load),
    Stage("score", ("load",), lambda job: _dump(job.recipe.score), _score),
    Stage("select", ("score",), _select_section, _select),
    Stage("prune", ("load", "select"), lambda _: {}, _prune),
    Stage("recover", ("prune",), lambda job: _dump(job.recipe.recover), _recover),
    Stage("export", ("load", "recover"), _export_section, _export),
    Stage("verify", ("select", "recover", "export"), _verify_section, _verify),
    Stage("bench", ("export",), bench_section, bench_work),
)

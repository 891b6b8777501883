"""The stages: each takes what earlier ones left and its own section of the recipe, and leaves files and a JSON result.

A stage's key covers what the stages it reads left, so it changes when anything before it does. Models are loaded when
a stage first needs one and shared by the stages of one run.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import slimheads
from slimheads import flops
from slimheads.bench import Latency, bench
from slimheads.certificate import Certificate, Link, SkippedLink, verify
from slimheads.checkpoint import Source, side_files, weight_files
from slimheads.disk import sha256_file
from slimheads.drift import Drift, drift_on_inputs, measure_drift
from slimheads.environment import environment, installed
from slimheads.errors import SlimheadsError
from slimheads.export import Precision, export, file_name
from slimheads.gating import gated
from slimheads.inputs import NOUNS, inputs_kind, measured_shapes, read_inputs
from slimheads.latency_table import LatencyTable
from slimheads.model import load, save
from slimheads.pooling import pooling_of
from slimheads.profiling import setting_of, table_shapes, tables_for
from slimheads.recipe import Recipe
from slimheads.reload import reload_tier
from slimheads.scoring import Scores, score
from slimheads.selection import Plan, random_plan, select
from slimheads.snapping import Selection, choose_step
from slimheads.store import Record
from slimheads.surgery import prune
from slimheads.table_store import Shape
from slimheads.texts import read_texts
from slimheads.workloads import workloads

CONTROL_SEEDS = (1, 2, 3)
_VERSIONED = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime", "scipy")


@dataclass
class Job:
    """One run under way."""

    recipe: Recipe
    source: Source
    tell: Callable[[str], None]  # a line of progress within a stage
    measures: bool = True  # latency tables that a step asks for and that are not stored
    records: dict[str, Record] = field(default_factory=dict)
    _tables: dict[Shape, LatencyTable] | None = None
    _models: dict[str, PreTrainedModel] = field(default_factory=dict)

    def result(self, stage: str) -> dict[str, Any]:
        """The JSON result of a finished stage."""
        return self.records[stage].result

    def dense(self) -> PreTrainedModel:
        """The untouched model, in float32."""
        return self._model("dense", self.source.folder)

    def slim(self) -> PreTrainedModel:
        """The slim model as reloaded from what the prune stage wrote, in float32."""
        return self._model("slim", self.slim_folder)

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

    def onnx(self, side: str, precision: Precision, graph: str = "model") -> Path:
        """An exported graph; `side` is "dense" or "slim", `graph` one of an encoder-decoder's."""
        return self.onnx_folder(side) / file_name(graph, precision)

    def onnx_folder(self, side: str) -> Path:
        """The exported graphs of one side."""
        return self.records["export"].path / side / "onnx"

    def _model(self, side: str, folder: Path) -> PreTrainedModel:
        if side not in self._models:
            self._models[side] = load(folder, self.source.task).float()
        return self._models[side]


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
    """`select` by the recipe; its error names the recipe's line.

    Args:
        tables: of the model at the recipe's shapes; only `multiple_of: auto` needs them.
    """
    asked, rules = recipe.select.multiple_of, _dump(recipe.select)
    try:
        if asked == "auto" and tables:
            return choose_step(scores, rules, tables)
        return select(scores, **rules), Selection(asked=asked, multiple_of=asked)
    except SlimheadsError as error:
        error.where = recipe.where("select.ratio")
        raise


# prune


def _prune(job: Job, folder: Path) -> tuple[dict[str, Any], bool]:
    plan, out = job.plan(), folder / "slim"
    model = prune(load(job.source.folder, job.source.task), plan)
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
    return facts | {"sentence_transformers": (out / "modules.json").is_file()}, True


# recover


def _recover(job: Job, _folder: Path) -> tuple[dict[str, Any], bool]:
    return {"method": job.recipe.recover.method}, True


# export


def _export(job: Job, folder: Path) -> tuple[dict[str, Any], bool]:
    options = _dump(job.recipe.export)
    for side, model in (("dense", job.dense), ("slim", job.slim)):
        job.tell(f"{side} to ONNX ({', '.join(options['precisions'])})")
        export(model(), folder / side / "onnx", task=job.source.task, **options)
    for path in (folder / "dense", folder / "slim"):
        # optimum's and transformers.js's clients look for config.json beside onnx/.
        shutil.copyfile(
            (job.source.folder if path.name == "dense" else job.slim_folder) / "config.json", path / "config.json"
        )
    generation = job.slim_folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / "slim" / generation.name)
    return {}, True


# verify


def _verify_section(job: Job) -> dict[str, Any]:
    section, content = job.recipe.verify, dict[str, str | None]()
    content["text"] = (
        hashlib.sha256("\n".join(read_texts(Path(section.text))).encode()).hexdigest() if section.text else None
    )
    content["inputs"] = sha256_file(Path(section.inputs)) if section.inputs else None
    return _dump(section) | content | {"precisions": list(job.recipe.export.precisions)}


def _verify(job: Job, _folder: Path) -> tuple[dict[str, Any], bool]:
    certificate = verify(
        job.dense(),
        job.slim(),
        job.plan(),
        job.records["export"].path / "slim",
        job.onnx_folder("dense"),
        task=job.source.task,
        precisions=job.recipe.export.precisions,
        atol=job.recipe.verify.atol,
        rtol=job.recipe.verify.rtol,
        on_progress=job.tell,
    )
    result: dict[str, Any] = {
        "links": [link.model_dump(mode="json") for link in certificate.links],
        "skipped": [link.model_dump(mode="json") for link in certificate.skipped],
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


def certificate_of(result: Mapping[str, Any]) -> Certificate:
    """The certificate in a verify result."""
    return Certificate(
        tuple(Link.model_validate(link) for link in result["links"]),
        tuple(SkippedLink.model_validate(link) for link in result["skipped"]),
    )


def _drift(job: Job, name: str, text: Path | None) -> dict[str, Any]:
    drift: Drift = measure_drift(
        job.dense(),
        job.slim(),
        _controls(job),
        _tokenizer(job.source.folder),
        read_texts(text),
        task=job.source.task,
        sample_name=name,
        pooling=pooling_of(job.source.folder),
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


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


# bench


def _bench_section(job: Job) -> dict[str, Any]:
    machine = {"machine": platform.machine(), "cpu": environment().cpu}
    return _dump(job.recipe.bench) | {"precisions": list(job.recipe.export.precisions)} | machine


def _bench(job: Job, _folder: Path) -> tuple[dict[str, Any], bool]:
    section = job.recipe.bench
    config = job.dense().config
    timed = workloads(config, section.shapes)
    counted = [
        {shape: (w.flops(job.dense(), *shape), w.flops(job.slim(), *shape)) for shape in w.shapes} for w in timed
    ]
    rows: list[Latency] = []
    for provider, precision in product(section.providers, job.recipe.export.precisions):
        for workload, ratios in zip(timed, counted, strict=True):
            rows += bench(
                job.onnx("dense", precision, workload.graph),
                job.onnx("slim", precision, workload.graph),
                shapes=workload.shapes,
                provider=provider,
                threads=section.threads,
                precision=precision,
                graph=workload.graph if len(timed) > 1 else None,
                min_seconds=section.min_seconds,
                flops=ratios,
                on_missing=section.on_missing,
                on_progress=job.tell,
            )
    shape = measured_shapes(config, section.shapes)[-1]
    whole = {side: flops.flops(model(), *shape) for side, model in (("dense", job.dense), ("slim", job.slim))}
    result = {"latency": [row.model_dump(mode="json") for row in rows], "flops": {"shape": list(shape)} | whole}
    # What was not measured, or not conclusively, is measured again next time.
    return result, all(row.verdict not in ("inconclusive", "not measured") for row in rows)


STAGES: tuple[Stage, ...] = (
    Stage("load", (), _content, _load),
    Stage("score", ("load",), lambda job: _dump(job.recipe.score), _score),
    Stage("select", ("score",), _select_section, _select),
    Stage("prune", ("load", "select"), lambda _: {}, _prune),
    Stage("recover", ("prune",), lambda job: _dump(job.recipe.recover), _recover),
    Stage("export", ("load", "recover"), lambda job: _dump(job.recipe.export), _export),
    Stage("verify", ("select", "recover", "export"), _verify_section, _verify),
    Stage("bench", ("export",), _bench_section, _bench),
)

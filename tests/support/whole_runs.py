"""Small whole runs: checkpoints with a tokenizer, recipes that take seconds, and the command line called in-process."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ASTFeatureExtractor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from slimheads import cli
from slimheads.latency import bench as measuring
from slimheads.latency.attribution import Attribution, Ratio
from slimheads.latency.records import Interval, Latency, Timing
from slimheads.models.loading import save
from slimheads.pipeline.run import STAGE_NAMES
from slimheads.pipeline.stages import bench as bench_stage

WORDS = ("[PAD]", "[UNK]", "the", "a", "of", "to", "and", "in", "is", "that", "it", "for", "as", "with", "on")
BERT_SITES = tuple(f"encoder.layer.{layer}.attention" for layer in range(3))
STAGES = tuple(name for name in STAGE_NAMES if name != "report")

CLASSIFIERS = {
    "vit": "image-classification",
    "wav2vec2": "automatic-speech-recognition",
    "audio-spectrogram-transformer": "audio-classification",
}
_home = tempfile.TemporaryDirectory(prefix="slimheads-tests-")


def _preparer(model_type: str) -> Any:
    """What makes a model's inputs of images or sound."""
    if model_type == "vit":
        return ViTImageProcessor(size={"height": 30, "width": 30})
    if model_type == "audio-spectrogram-transformer":
        return ASTFeatureExtractor(num_mel_bins=24, max_length=40)
    letters = Path(_home.name, "letters.json")
    letters.write_text(json.dumps({letter: number for number, letter in enumerate(["<pad>", "<unk>", "|", *"etaoin"])}))
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(str(letters)))


@functools.cache
def checkpoint(model_type: str = "bert") -> Path:
    """The folder of a small random model with a word-level tokenizer, or with what prepares images or sound.

    Not to be changed: copy it.
    """
    folder = Path(_home.name, f"tiny-{model_type}")
    tiny_model(model_type, task=CLASSIFIERS.get(model_type)).save_pretrained(folder)
    if model_type in CLASSIFIERS:
        _preparer(model_type).save_pretrained(folder)
        return folder
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def write_recipe(path: Path, model: Path | str | None = None, **sections: Any) -> Path:
    """A recipe of one small shape and the plain graph alone; each keyword replaces a section. JSON is YAML too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {
        "model": str(model or checkpoint()),
        "select": {"ratio": 0.5, "scope": "global", "normalize": "none"},  # another number of heads in every layer
        "bench": {"shapes": [[1, 8]], "min_seconds": 0.05, "threads": 1},
    }
    data |= sections
    data["export"] = {"candidates": ["plain"]} | sections.get("export", {})
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """The lines on stderr that are no progress."""
        return [line for line in self.err.splitlines() if not _PROGRESS.fullmatch(line)]

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)


_NAMES = "|".join((*STAGES, "plan", "profile"))
_PROGRESS = re.compile(rf"(?:{_NAMES}) +(?:reused \(took \d+\.\d s\)|\d+\.\d s|starts(?:: .+)?|\d+ (?:s|min) so far.*)")


def slimheads(*arguments: object) -> Ended:
    """Runs the command in this process; signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return Ended(end.code, out.getvalue(), err.getvalue())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise AssertionError("main returned without an exit code")


def measured(verdict: str = "faster", estimate: float = 1.25, **changes: Any) -> Latency:
    """A row as `bench` returns it."""
    row: dict[str, Any] = {
        "provider": "cpu",
        "threads": 1,
        "precision": "fp32",
        "shape": (1, 8),
        "verdict": verdict,
        "reason": "the machine was too noisy" if verdict == "inconclusive" else None,
    }
    if verdict == "not measured":
        return Latency(**row | {"reason": "the provider is not there"} | changes)
    timing = Timing(median_ms=1.0, p10_ms=0.9, p90_ms=1.1, runs=30)
    interval = Interval(estimate=estimate, low=estimate - 0.01, high=estimate + 0.01)
    control = Interval(estimate=1.0, low=0.99, high=1.01)
    return Latency(**row | {"dense": timing, "slim": timing, "speedup": interval, "control": control} | changes)


def steady(
    patch: pytest.MonkeyPatch, verdict: str = "faster", estimate: float = 1.25, gains: Mapping[str, float] | None = None
) -> None:
    """Has the bench stage measure nothing: quick, and always the same, so that gates and reuse do not depend on it.

    Args:
        gains: what a candidate graph gives, by its name; any other treatment neither gains nor loses.
    """

    def bench(
        *_: Path, shapes: Any, provider: str, threads: int, precision: str, graph: Any, flops: Any, **__: Any
    ) -> Sequence[Latency]:
        ratios = {shape: flops[shape][0] / flops[shape][1] for shape in shapes}
        labels = {"provider": provider, "threads": threads, "precision": precision, "graph": graph}
        return [
            measured(verdict, estimate, shape=shape, **labels).model_copy(
                update={"flop_speedup": ratios[shape], "realised": estimate / ratios[shape]}
            )
            for shape in shapes
        ]

    def attribute(*files: Path, **options: Any) -> Sequence[Attribution]:
        gain = next((gain for name, gain in (gains or {}).items() if name in files[3].parts), 1.0)
        interval = Interval(estimate=gain, low=gain - 0.01, high=gain + 0.01)
        ratio = Ratio(interval=interval, verdict="faster" if gain > 1.01 else "no difference shown")
        return [
            Attribution(latency=row, on_dense=ratio, on_slim=ratio, whole=ratio) for row in bench(*files, **options)
        ]

    patch.setattr(bench_stage, "bench", bench)
    patch.setattr(bench_stage, "attribute", attribute)


def tree(folder: Path) -> Mapping[str, str]:
    """Every file and folder below, hidden ones included, with a hash of what is in it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "/"
        for path in sorted(folder.rglob("*"))
    }


def visible(folder: Path) -> set[str]:
    """What a user sees in an output folder."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def reused(report: Mapping[str, Any]) -> dict[str, bool]:
    """Stage by stage, from report.json."""
    return {stage["stage"]: stage["reused"] for stage in report["stages"]}


def report_of(out: Path) -> Any:
    """report.json of an output folder."""
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@functools.cache
def finished(model_type: str = "bert") -> Path:
    """The output folder of a whole run with every precision. Not to be changed: copy it.

    Latency is really measured for BERT, though not prolonged where the machine is noisy.
    """
    home = Path(_home.name, f"run-{model_type}")
    recipe = write_recipe(home / "r.yaml", checkpoint(model_type), export={"precisions": ["fp32", "fp16", "int8"]})
    with pytest.MonkeyPatch.context() as patch:
        if model_type == "bert":
            patch.setattr(measuring, "EXTENSION", 1)
        else:
            steady(patch)
        ended = slimheads("run", recipe, "--out", home / "out")
    assert ended.code == 0, ended.err
    return home / "out"


def corrupt(folder: Path) -> None:
    """A weight of the last layer's attention changed by a little, as a wrong byte on a disk may do."""
    tensors = load_file(folder / "model.safetensors")
    name = [name for name in sorted(tensors) if re.search("(value|v_proj|c_attn).weight$", name)][-1]
    tensors[name][0] *= 1.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def corrupting(model: PreTrainedModel, folder: Path) -> None:
    """Saves a slim model as the prune stage does, and damages it."""
    save(model, folder)
    corrupt(folder)

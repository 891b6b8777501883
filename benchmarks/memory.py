"""Peak memory of loading, scoring and pruning, compared with the size of the model.

Each measurement is a separate process that loads a checkpoint from disk, scores it and prunes it. The figure is the
highest resident set (VmHWM, mapped files included) from before the load to after the deletion, minus the resident set
after all imports and before the load. The limit is the size of the model, its largest tensor and 300 MiB; exit code 1
if a model needs more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from common import DTYPES, arguments, bytes_of, model_of, show

from slimheads.models.loading import load, save
from slimheads.pruning.scoring.score import score
from slimheads.pruning.select import select
from slimheads.pruning.surgery import prune
from slimheads.runtime.memory import PeakMemory

SPARE_MB = 300.0


def _resident_mb() -> float:
    return psutil.Process().memory_info().rss / 2**20


def child(folder: str, ratio: float) -> None:
    """Loads, scores and prunes; prints the memory used, in MiB."""
    before, memory = _resident_mb(), PeakMemory()
    model = load(folder)
    loaded = memory.megabytes() - before
    size, largest = bytes_of(model.parameters()), max(bytes_of([p]) for p in model.parameters())
    prune(model, select(score(model), ratio=ratio, scope="global"))
    measured = {"loading": loaded, "all": memory.megabytes() - before, "kept": _resident_mb() - before}
    print(json.dumps(measured | {"size": size / 2**20, "largest": largest / 2**20}))


def measure(size: str, dtype: str, ratio: float, folder: Path) -> dict[str, Any]:
    """One row of the table; the checkpoint is deleted before the next is made."""
    model = model_of("llama", size, DTYPES[dtype], all_weights=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="slimheads-memory-") as scratch:
        save(model, Path(scratch, "model"))
        parameters = sum(p.numel() for p in model.parameters())
        del model
        command = [sys.executable, __file__, "--ratio", str(ratio), "--child", str(Path(scratch, "model"))]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    limit = found["size"] + found["largest"] + SPARE_MB
    return {
        "dtype": dtype,
        "parameters": parameters,
        "model MiB": found["size"],
        "largest tensor MiB": found["largest"],
        "peak of load MiB": found["loading"],
        "peak of load, score and prune MiB": found["all"],
        "after MiB": found["kept"],
        "peak / model": found["all"] / found["size"],
        "limit MiB": limit,
        "within": found["all"] <= limit,
    }


def main() -> None:
    """Every size in every dtype."""
    parser = arguments(
        __doc__, sizes=["20M", "100M", "350M", "1.5B"], dtypes=["float32", "bfloat16"], ratio=0.25,
        folder=tempfile.gettempdir(),
    )  # fmt: skip
    parser.add_argument("--child", help="measure this checkpoint in this process, and print JSON")
    given = parser.parse_args()
    if given.child:
        child(given.child, given.ratio)
        return
    rows = [measure(size, dtype, given.ratio, Path(given.folder)) for dtype in given.dtypes for size in given.sizes]
    note = (
        f"peak: VmHWM of a process of its own, less its resident memory before the load; limit: model + largest "
        f"tensor + {SPARE_MB:.0f} MiB"
    )
    show(rows, title="Memory", notes=[note], as_json=given.json)
    sys.exit(not all(row["within"] for row in rows))


if __name__ == "__main__":
    main()

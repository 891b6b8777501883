"""Start-up time of `slimheads --help`, compared with Python alone, and of `slimheads plan`.

`plan` is compared with importing torch and transformers, which loading a model needs.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
from common import arguments, paired, show

from slimheads.latency.statistics import ratio_interval


def run(command: list[str], _: None) -> None:
    """Runs a command to its end; CalledProcessError if it fails."""
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Two commands, each interleaved with its lower bound."""
    given = arguments(__doc__, recipe="pipelines/minilm.yaml", sets=5, rounds=2).parse_args()
    pairs = {
        "slimheads --help": (["-m", "slimheads", "--help"], ["-c", "pass"], "python"),
        f"slimheads plan {given.recipe}": (
            ["-m", "slimheads", "plan", given.recipe],
            ["-c", "import torch, transformers.modeling_utils"],
            "import torch and transformers",
        ),
    }
    rows = []
    for name, (ours, floor, what) in pairs.items():
        commands = [(lambda: None, partial(run, command)) for command in (ours, floor)]
        seconds, least = paired(commands, sets=given.sets, rounds=given.rounds)
        rows.append(
            {
                "command": name,
                "seconds": float(np.median(seconds)),
                "against": what,
                "its seconds": float(np.median(least)),
                "ratio": ratio_interval(seconds, least),
            }
        )
    show(rows, title="Start-up", notes=["warm: each command once before it is timed"], as_json=given.json)


if __name__ == "__main__":
    main()

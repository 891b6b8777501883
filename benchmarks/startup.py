"""How long a command takes to start: `slimheads --help` and `slimheads plan`, against starting Python alone.

`plan` is taken against importing torch and transformers, without which no model can be loaded.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
from common import arguments, paired, show

from slimheads.latency.statistics import ratio_interval


def run(command: list[str], _: None) -> None:
    """Runs a command to its end; CalledProcessError where it fails."""
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Two commands, each in turns with what it cannot do without."""
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

"""Rate of scoring, relative to `torch.linalg.vector_norm(weight)` over each of the same tensors.

That is the fastest norm in torch. It always uses a single thread, while scoring uses all threads that it is given:
`--threads 1` compares both on one thread. In half precision its result is rounded to half precision, too coarse for a
score; its rate in float32 is therefore measured as well.
"""

from __future__ import annotations

import numpy as np
import torch
from common import DTYPES, arguments, block_weights, bytes_of, model_of, paired, show, slope

from slimheads.latency.statistics import ratio_interval
from slimheads.pruning.scoring.score import score


def measure(layout: str, size: str, dtype: str, sets: int, rounds: int) -> dict[str, object]:
    """One row of the table."""
    model = model_of(layout, size, DTYPES[dtype])
    weights = block_weights(model)

    def plain(_: None) -> list[torch.Tensor]:
        return [torch.linalg.vector_norm(weight) for weight in weights]

    def in_float32(_: None) -> list[torch.Tensor]:
        return [torch.linalg.vector_norm(weight, dtype=torch.float32) for weight in weights]

    runs = [(lambda: None, work) for work in (plain, in_float32, lambda _: score(model))]
    own_rate, wide, ours = paired(runs, sets=sets, rounds=rounds)
    gigabytes = bytes_of(weights) / 1e9
    return {
        "layout": layout,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "scored MB": gigabytes * 1e3,
        "plain GB/s": gigabytes / float(np.median(own_rate)),
        "score GB/s": gigabytes / float(np.median(ours)),
        "score ms": 1e3 * float(np.median(ours)),
        "score rate / plain": ratio_interval(own_rate, ours),
        "score rate / plain in float32": ratio_interval(wide, ours),
    }


def main() -> None:
    """Every size in the first layout, and every layout in the second size."""
    parser = arguments(
        __doc__,
        sizes=["20M", "100M", "350M", "1.5B"],
        layouts=["llama", "gpt2", "bert", "gpt_neox"],
        dtypes=["float32", "bfloat16"],
        sets=10,
        rounds=3,
        threads=2,
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases = [(given.layouts[0], size) for size in given.sizes]
    cases += [(layout, given.sizes[:2][-1]) for layout in given.layouts[1:]]
    rows = [measure(*case, dtype, given.sets, given.rounds) for dtype in given.dtypes for case in cases]
    slopes = {}
    for dtype in given.dtypes if len(given.sizes) > 1 else ():
        line = [r for r in rows if (r["layout"], r["dtype"]) == (given.layouts[0], dtype)]
        slopes[dtype] = slope([r["parameters"] for r in line], [r["score ms"] for r in line])
    notes = [f"{dtype}: time grows as parameters to the power of {power:.2f}" for dtype, power in slopes.items()]
    show(rows, title="Scoring", notes=notes, as_json=given.json, slopes=slopes)


if __name__ == "__main__":
    main()

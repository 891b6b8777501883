"""Time of surgery, relative to copying as many bytes as it keeps.

The copy clones, for every pruned weight, a contiguous part of that weight with as many elements as are kept. Both
allocate memory for all that is kept and keep the dense weights, so that neither includes the time to free them.
"""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from common import DTYPES, arguments, block_weights, bytes_of, model_of, paired, show, slope
from transformers import PreTrainedModel

from slimheads.latency.statistics import ratio_interval
from slimheads.pruning.scoring.score import score
from slimheads.pruning.select import select
from slimheads.pruning.surgery import prune


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's modules that holds the very same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def measure(
    layout: str, size: str, dtype: str, ratios: tuple[float, float], sets: int, rounds: int
) -> dict[str, object]:
    """One row of the table."""
    model = model_of(layout, size, DTYPES[dtype])
    plan = select(score(model), ratio=ratios[0], ffn_ratio=ratios[1], scope="global")  # small layers have few groups
    kept = block_weights(prune(same_weights(model), plan))
    stretches = [dense.flatten()[: slim.numel()] for dense, slim in zip(block_weights(model), kept, strict=True)]
    kept_bytes, parameters = bytes_of(kept), sum(p.numel() for p in model.parameters())
    del kept

    def plain(_: None) -> list[torch.Tensor]:
        return [stretch.clone() for stretch in stretches]

    copied, ours = paired(
        [(lambda: None, plain), (functools.partial(same_weights, model), lambda dense: prune(dense, plan))],
        sets=sets,
        rounds=rounds,
    )
    return {
        "layout": layout,
        "dtype": dtype,
        "parameters": parameters,
        "kept MB": kept_bytes / 1e6,
        "copy GB/s": kept_bytes / 1e9 / float(np.median(copied)),
        "surgery ms": 1e3 * float(np.median(ours)),
        "surgery / copy": ratio_interval(ours, copied),
    }


def main() -> None:
    """Every size in the first layout, and every layout in the second size."""
    parser = arguments(
        __doc__,
        sizes=["20M", "100M", "350M", "1.5B"],
        layouts=["llama", "gpt2", "bert", "gpt_neox"],
        dtypes=["float32", "bfloat16"],
        ratio=0.25,
        ffn_ratio=0.4,
        sets=10,
        rounds=3,
        threads=2,
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases = [(given.layouts[0], size) for size in given.sizes]
    cases += [(layout, given.sizes[:2][-1]) for layout in given.layouts[1:]]
    rows = [
        measure(*case, dtype, (given.ratio, given.ffn_ratio), given.sets, given.rounds)
        for dtype in given.dtypes
        for case in cases
    ]
    slopes = {}
    for dtype in given.dtypes if len(given.sizes) > 1 else ():
        line = [r for r in rows if (r["layout"], r["dtype"]) == (given.layouts[0], dtype)]
        slopes[dtype] = slope([r["parameters"] for r in line], [r["surgery ms"] for r in line])
    notes = [f"{dtype}: time grows as parameters to the power of {power:.2f}" for dtype, power in slopes.items()]
    show(rows, title="Surgery", notes=notes, as_json=given.json, slopes=slopes)


if __name__ == "__main__":
    main()

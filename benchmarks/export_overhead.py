"""Time of `slimheads.export` in float32, relative to `onnx_export_from_model` of optimum with its defaults.

optimum's own validation, which only logs its findings, is left out of both. slimheads additionally reads the model's
sites and, for decoders, the shapes of its cache, and writes labels into the graph.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from common import arguments, model_of, paired, show
from optimum.exporters.onnx import onnx_export_from_model

import slimheads
from slimheads.latency.statistics import ratio_interval

TASKS = {"bert": "fill-mask", "llama": "text-generation", "gpt2": "text-generation", "gpt_neox": "text-generation"}


def measure(layout: str, size: str, sets: int, rounds: int) -> dict[str, object]:
    """One row of the table."""
    model, task = model_of(layout, size, torch.float32, all_weights=True), TASKS[layout]
    full_task = f"{task}-with-past" if task == "text-generation" else task

    def bare(folder: tempfile.TemporaryDirectory[str]) -> object:
        return onnx_export_from_model(model, Path(folder.name), task=full_task, do_validation=False), folder

    def ours(folder: tempfile.TemporaryDirectory[str]) -> object:
        return slimheads.export(model, folder.name, task=task), folder

    optimum_s, slimheads_s = paired(
        [(tempfile.TemporaryDirectory, bare), (tempfile.TemporaryDirectory, ours)], sets=sets, rounds=rounds
    )
    return {
        "layout": layout,
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimum s": float(np.median(optimum_s)),
        "slimheads s": float(np.median(slimheads_s)),
        "slimheads / optimum": ratio_interval(slimheads_s, optimum_s),
    }


def main() -> None:
    """Every layout in every size."""
    parser = arguments(__doc__, sizes=["20M"], layouts=["bert", "gpt2", "llama"], sets=5, rounds=1)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = [measure(layout, size, given.sets, given.rounds) for size in given.sizes for layout in given.layouts]
    show(rows, title="Export", notes=["float32, without optimum's validation"], as_json=given.json)


if __name__ == "__main__":
    main()

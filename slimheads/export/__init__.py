"""Export: from a torch model to the ONNX files that ship. The only place that imports optimum."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from slimheads.export.kv_cache import KvAxes
from slimheads.export.optimum_backend import greedy_options, greedy_tokens, to_onnx
from slimheads.export.precisions import to_fp16, to_int8

Precision = Literal["fp32", "fp16", "int8"]
FILES: dict[Precision, str] = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}

__all__ = ["FILES", "Graph", "KvAxes", "Precision", "export", "greedy_options", "greedy_tokens"]


@dataclass(frozen=True)
class Graph:
    """One ONNX file that was made."""

    precision: Precision
    path: Path


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    task: str,
    precisions: Sequence[Precision] = ("fp32",),
    kv_axes: KvAxes = "symbolic",
) -> tuple[Graph, ...]:
    """Exports a model to `folder`: model.onnx, and model_fp16.onnx and model_int8.onnx where asked for.

    Args:
        model: dense or slim, on the CPU. A half-precision model is exported from a float32 copy.
        folder: made if missing; files in it are replaced.
        task: what the graph computes, a key of `slimheads.checkpoint.TASKS`.
        precisions: "fp32" is always made: the others start from it.
        kv_axes: whether the cache's head axes are free ("symbolic", for optimum) or fixed ("static", for genai).

    Raises:
        ModelRefusedError: optimum has no export for this model type and task.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    plain = folder / FILES["fp32"]
    to_onnx(model, plain, task, kv_axes)
    graphs = [Graph("fp32", plain)]
    makers = {"fp16": to_fp16, "int8": to_int8}
    for precision in precisions:
        if precision != "fp32":
            makers[precision](plain, folder / FILES[precision])
            graphs.append(Graph(precision, folder / FILES[precision]))
    return tuple(graphs)

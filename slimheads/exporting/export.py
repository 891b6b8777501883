"""Export: from a torch model to the ONNX files that ship."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedModel

from slimheads.data.inputs import float_axes
from slimheads.errors import require_known
from slimheads.exporting.artifacts import ENCODER, FIRST_DECODER, MERGED_DECODER, NEXT_DECODER, file_name, parts_of
from slimheads.exporting.backends import Backend, optimum
from slimheads.exporting.metadata import label_axes, label_cache
from slimheads.exporting.precisions import PRECISIONS
from slimheads.families.adapters import opened
from slimheads.families.sites import find_sites
from slimheads.models.kv_shapes import cache_shapes, has_cache
from slimheads.models.tasks import SEQ2SEQ_TASKS, TASKS
from slimheads.names import Int8For, KvAxes, Precision
from slimheads.runtime.onnx_signature import read_interface

BACKEND: Backend = optimum


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
    int8_for: Int8For = "any",
) -> tuple[Graph, ...]:
    """Exports a model to `folder`: model.onnx, and model_fp16.onnx, model_int8.onnx, model_q4.onnx by `precisions`.

    An encoder-decoder becomes encoder_model.onnx, decoder_model.onnx (its first pass), decoder_with_past_model.onnx
    (one token more) and decoder_model_merged.onnx (both), each in every precision.

    Args:
        model: dense or slim, on the CPU. A half-precision model is exported from a float32 copy.
        folder: made if missing; files in it are replaced.
        task: what the graph computes, as `slimheads.checkpoint` names tasks.
        precisions: "fp32" is always made: the others start from it.
        kv_axes: whether the cache's head axes are free ("symbolic", for optimum) or fixed ("static", for genai).
        int8_for: the CPUs that "int8" is made for; "any" is right on every x86-64 and ARM CPU.

    Raises:
        UsageError: a name is not known.
        ModelRefusedError: optimum has no export for this model type and task, or the graph no weight for "q4".
    """
    for precision in precisions:
        require_known("export.precisions", precision, PRECISIONS)
    require_known("export.kv_axes", kv_axes, get_args(KvAxes))
    require_known("export.int8_for", int8_for, get_args(Int8For))
    require_known("task", task, TASKS | SEQ2SEQ_TASKS)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    with opened(model, find_sites(model)):
        BACKEND.to_onnx(model, folder, task)
        _label(model, folder, task, kv_axes)
    parts = parts_of(model.config)
    graphs = [Graph("fp32", folder / file_name(part, "fp32")) for part in parts]
    for precision in precisions:
        if precision != "fp32":
            graphs += [_converted(folder, part, precision, kv_axes, int8_for) for part in parts]
    return tuple(graphs)


def _label(model: PreTrainedModel, folder: Path, task: str, kv_axes: KvAxes) -> None:
    """Records in the float32 graphs the sizes that `slimheads.runtime.onnx_signature` reads."""
    caches = cache_shapes(model) if has_cache(model.config, task) else None
    sizes = float_axes(model.config)
    for part in parts_of(model.config):
        path = folder / file_name(part, "fp32")
        if caches and part != ENCODER:
            label_cache(path, *caches, kv_axes)
        if sizes and "decoder" not in part:
            label_axes(path, sizes)


def _converted(folder: Path, part: str, precision: Precision, kv_axes: KvAxes, int8_for: Int8For) -> Graph:
    path, plain = folder / file_name(part, precision), folder / file_name(part, "fp32")
    convert = PRECISIONS[precision].convert
    assert convert is not None  # only fp32 has none
    if part == MERGED_DECODER:
        # Converters do not look into the branches of the merged graph: its parts are converted, and merged again.
        first, following = (folder / file_name(p, precision) for p in (FIRST_DECODER, NEXT_DECODER))
        BACKEND.merge_decoders(first, following, path)
        interface = read_interface(plain)
        label_cache(path, interface.kv_shapes, interface.cross_kv_shapes, kv_axes)
    else:
        convert(plain, path, int8_for)
    return Graph(precision, path)

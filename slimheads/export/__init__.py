"""Export: from a torch model to the ONNX files that ship. The only place that imports optimum."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PretrainedConfig, PreTrainedModel

from slimheads.adapters import opened
from slimheads.attention import find_sites
from slimheads.checkpoint import SEQ2SEQ_TASKS, TASKS
from slimheads.errors import require_known
from slimheads.export.candidates import Candidate, build_candidate
from slimheads.export.graph_files import graph_bytes
from slimheads.export.kv_cache import KvAxes, label_cache
from slimheads.export.optimum_backend import (
    greedy_options,
    greedy_tokens,
    merge_decoders,
    seq2seq_generate,
    seq2seq_greedy_tokens,
    to_onnx,
)
from slimheads.export.precisions import Int8For, to_fp16, to_int8, to_q4
from slimheads.interface import read_interface

Precision = Literal["fp32", "fp16", "int8", "q4"]
FILES: dict[Precision, str] = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_int8.onnx",
    "q4": "model_q4.onnx",
}
# transformers.js asks for `model_quantized.onnx` as its q8, and optimum's quantizer writes that name.
_FURTHER_NAMES: dict[Precision, tuple[str, ...]] = {"int8": ("model_quantized.onnx",)}
# An encoder-decoder's files by what clients call them; the merged decoder is both others behind one switch.
ENCODER, FIRST_DECODER, NEXT_DECODER = "encoder_model", "decoder_model", "decoder_with_past_model"
MERGED_DECODER = "decoder_model_merged"
PARTS = (ENCODER, FIRST_DECODER, NEXT_DECODER, MERGED_DECODER)

__all__ = [
    "ENCODER",
    "FILES",
    "FIRST_DECODER",
    "MERGED_DECODER",
    "NEXT_DECODER",
    "PARTS",
    "Candidate",
    "Graph",
    "Int8For",
    "KvAxes",
    "Precision",
    "build_candidate",
    "client_names",
    "export",
    "file_name",
    "graph_bytes",
    "greedy_options",
    "greedy_tokens",
    "parts_of",
    "seq2seq_generate",
    "seq2seq_greedy_tokens",
]


@dataclass(frozen=True)
class Graph:
    """One ONNX file that was made."""

    precision: Precision
    path: Path


def parts_of(config: PretrainedConfig) -> tuple[str, ...]:
    """What a model's graphs are called: "model", or the four of an encoder-decoder."""
    return PARTS if config.is_encoder_decoder else ("model",)


def file_name(part: str, precision: Precision) -> str:
    """A graph's file: encoder_model.onnx, encoder_model_fp16.onnx."""
    return FILES[precision].replace("model", part, 1)


def client_names(part: str, precision: Precision) -> tuple[str, ...]:
    """Further names under which clients look for a graph: the same bytes are published under each of them."""
    return tuple(name.replace("model", part, 1) for name in _FURTHER_NAMES.get(precision, ()))


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    task: str,
    precisions: Sequence[Precision] = ("fp32",),
    kv_axes: KvAxes = "symbolic",
    int8_for: Int8For = "any",
) -> tuple[Graph, ...]:
    """Exports a model to `folder`: model.onnx, and model_fp16.onnx, model_int8.onnx, model_q4.onnx where asked for.

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
        require_known("export.precisions", precision, FILES)
    require_known("export.kv_axes", kv_axes, get_args(KvAxes))
    require_known("export.int8_for", int8_for, get_args(Int8For))
    require_known("task", task, TASKS | SEQ2SEQ_TASKS)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    with opened(model, find_sites(model)):
        to_onnx(model, folder, task, kv_axes)
    graphs: list[Graph] = []
    wanted: list[Precision] = ["fp32", *(p for p in precisions if p != "fp32")]
    for precision in wanted:
        graphs += [_made(folder, part, precision, kv_axes, int8_for) for part in parts_of(model.config)]
    return tuple(graphs)


def _made(folder: Path, part: str, precision: Precision, kv_axes: KvAxes, int8_for: Int8For) -> Graph:
    """A graph that is there in fp32, and is made from that one in the others."""
    path, plain = folder / file_name(part, precision), folder / file_name(part, "fp32")
    if precision == "fp32":
        return Graph(precision, path)
    if part == MERGED_DECODER:
        # Converters do not look into the branches of the merged graph: its parts are converted, and merged again.
        first, following = (folder / file_name(p, precision) for p in (FIRST_DECODER, NEXT_DECODER))
        merge_decoders(first, following, path)
        interface = read_interface(plain)
        label_cache(path, interface.kv_shapes, kv_axes, interface.cross_kv_shapes)
    elif precision == "int8":
        to_int8(plain, path, int8_for)
    else:
        {"fp16": to_fp16, "q4": to_q4}[precision](plain, path)
    return Graph(precision, path)

"""The names of the files that an export writes."""

from __future__ import annotations

from transformers import PretrainedConfig

from slimheads.exporting.precisions import PRECISIONS
from slimheads.names import Precision

# An encoder-decoder's graphs, by the names that clients load. The merged decoder holds both others behind one switch.
ENCODER, FIRST_DECODER, NEXT_DECODER = "encoder_model", "decoder_model", "decoder_with_past_model"
MERGED_DECODER = "decoder_model_merged"
PARTS = (ENCODER, FIRST_DECODER, NEXT_DECODER, MERGED_DECODER)


def parts_of(config: PretrainedConfig) -> tuple[str, ...]:
    """The names of a model's graphs: "model", or the four of an encoder-decoder."""
    return PARTS if config.is_encoder_decoder else ("model",)


def file_name(part: str, precision: Precision) -> str:
    """The name of a graph's file: encoder_model.onnx, encoder_model_fp16.onnx."""
    return f"{part}{PRECISIONS[precision].suffix}.onnx"


def client_names(part: str, precision: Precision) -> tuple[str, ...]:
    """Further names that clients load a graph by. The same bytes are published under each of them."""
    return tuple(f"{part}{suffix}.onnx" for suffix in PRECISIONS[precision].further_suffixes)

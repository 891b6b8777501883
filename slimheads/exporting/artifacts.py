"""The files that an export makes, and what clients call them."""

from __future__ import annotations

from transformers import PretrainedConfig

from slimheads.names import Precision

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


def parts_of(config: PretrainedConfig) -> tuple[str, ...]:
    """What a model's graphs are called: "model", or the four of an encoder-decoder."""
    return PARTS if config.is_encoder_decoder else ("model",)


def file_name(part: str, precision: Precision) -> str:
    """A graph's file: encoder_model.onnx, encoder_model_fp16.onnx."""
    return FILES[precision].replace("model", part, 1)


def client_names(part: str, precision: Precision) -> tuple[str, ...]:
    """Further names under which clients look for a graph: the same bytes are published under each of them."""
    return tuple(name.replace("model", part, 1) for name in _FURTHER_NAMES.get(precision, ()))

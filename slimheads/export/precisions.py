"""Further graphs made from the float32 one: float16 and dynamic int8."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.registry import IntegerOpsRegistry
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

# Convolutions stay: a weight that the graph computes (wav2vec 2.0 normalizes one) cannot be quantized beforehand.
_QUANTIZED = sorted(IntegerOpsRegistry.keys() - {"Conv"})


def to_fp16(source: Path, target: Path) -> None:
    """float16 weights and arithmetic, float32 inputs and outputs (so that clients feed what they fed before)."""
    made = OnnxModel(convert_float_to_float16(onnx.load(str(source)), keep_io_types=True))
    made.topological_sort()  # the converter appends its casts, and a branch of the merged decoder takes no disorder
    onnx.save(made.model, str(target))


def to_int8(source: Path, target: Path) -> None:
    """int8 weights per output channel, activations quantized as they come (per tensor lost 4% of cosine on MiniLM)."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises a preprocessing that only static quantization needs
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".int8-") as scratch:
            made = Path(scratch) / target.name
            quantize_dynamic(
                str(source), str(made), op_types_to_quantize=_QUANTIZED, per_channel=True, weight_type=QuantType.QInt8
            )
            made.rename(target)
    finally:
        logging.disable(level)

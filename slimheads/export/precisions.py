"""Further graphs made from the float32 one: float16 and dynamic int8."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx
from onnx.external_data_helper import load_external_data_for_model
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.registry import IntegerOpsRegistry
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from slimheads.export import graph_files

# Convolutions stay: a weight that the graph computes (wav2vec 2.0 normalizes one) cannot be quantized beforehand.
_QUANTIZED = sorted(IntegerOpsRegistry.keys() - {"Conv"})


def to_fp16(source: Path, target: Path) -> None:
    """float16 weights and arithmetic, float32 inputs and outputs (so that clients feed what they fed before)."""
    # Shapes are inferred before the weights are there: past 2 GiB the inference cannot take them.
    proto = onnx.shape_inference.infer_shapes(onnx.load(str(source), load_external_data=False))
    load_external_data_for_model(proto, str(source.parent))
    made = OnnxModel(convert_float_to_float16(proto, keep_io_types=True, disable_shape_infer=True))
    made.topological_sort()  # the converter appends its casts, and a branch of the merged decoder takes no disorder
    graph_files.save_graph(made.model, target)


def to_int8(source: Path, target: Path) -> None:
    """int8 weights per output channel, activations quantized as they come (per tensor lost 4% of cosine on MiniLM)."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises a preprocessing that only static quantization needs
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".int8-") as scratch:
            made = Path(scratch) / target.name
            quantize_dynamic(
                str(source),
                str(made),
                op_types_to_quantize=_QUANTIZED,
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=graph_files.graph_bytes(source) > graph_files.ONE_FILE,
            )
            graph_files.save_graph(onnx.load(str(made)), target)
    finally:
        logging.disable(level)

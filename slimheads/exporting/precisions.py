"""The precisions of an ONNX file, one row each. A new one is a row here, its converter, and its name in `names`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from slimheads.exporting.quantize import to_fp16, to_int8, to_q4
from slimheads.names import Int8For, Precision


@dataclass(frozen=True)
class PrecisionSpec:
    """What sets one precision apart.

    `suffix` follows a graph's name in its file's name, and the same bytes are also published under each of
    `further_suffixes`. `convert` writes the file from the float32 one; None for float32 itself.

    `tolerance` is that of the certificate's link 3: the largest difference as a share of the largest output.
    `rounded` precisions store weights as whole numbers with a scale. Rounding changes outputs by as much as a wrong
    head does, so link 3 compares these files with the float32 graph that has the same rounded weights.
    `for_cpus` precisions depend on `export.int8_for`, the CPUs they are made for.
    """

    suffix: str = ""
    further_suffixes: tuple[str, ...] = ()
    convert: Callable[[Path, Path, Int8For], None] | None = None
    tolerance: float = 0.0
    rounded: bool = False
    for_cpus: bool = False


# Measured for the tolerances: fp16 against float32, 0.001 to 0.002. int8 without ONNX Runtime's fusions, against exact
# sums of the same whole numbers: equal to the last bit in every family's test model and MiniLM. q4 without fusions: at
# most 0.033 (Qwen 3's test model; MiniLM 0.012), because the last bit of an activation can move its rounding by a step.
# Heads swapped in one layer of MiniLM cost 0.15 to 0.25.
PRECISIONS: Mapping[Precision, PrecisionSpec] = MappingProxyType(
    {
        "fp32": PrecisionSpec(),
        "fp16": PrecisionSpec("_fp16", convert=lambda source, target, _: to_fp16(source, target), tolerance=0.01),
        # transformers.js loads `model_quantized.onnx` as its q8, and optimum's quantizer writes that name.
        "int8": PrecisionSpec("_int8", ("_quantized",), to_int8, tolerance=1e-5, rounded=True, for_cpus=True),
        "q4": PrecisionSpec(
            "_q4", convert=lambda source, target, _: to_q4(source, target), tolerance=0.05, rounded=True
        ),
    }
)

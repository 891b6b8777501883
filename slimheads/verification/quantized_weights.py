"""Link 3 of an int8 or q4 file: whether every weight is its float32 one, rounded. No graph is run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from slimheads.verification.onnx_files import read_graph, sizes_text
from slimheads.verification.rounded import four_bit_steps

_BLOCK = 2**20  # elements compared at a time
_NOT_ROUNDED = "is not the float32 graph's, rounded"
_TINY = float(np.finfo(np.float32).tiny)
_HALF_A_STEP = 0.501  # rounding to the nearest step; scales are float32


def quantized_faults(source: Path, quantized: Path) -> Iterator[str]:
    """Tensors of an int8 or q4 file that are not those of the float32 file it came from, rounded; nothing if all are.

    Args:
        source: the float32 file.
        quantized: as ONNX Runtime's `quantize_dynamic` writes it: a tensor that it rounded is `<name>_quantized` with
            `<name>_scale` and `<name>_zero_point`, one for all or one for each index of the last axis. Or as its
            `MatMulNBitsQuantizer` does: `<name>_Q4` and `<name>_scales` in symmetric blocks. A Gemm's transposed weight
            is `<name>_Transposed` first.
    """
    made = {t.name: onnx.numpy_helper.to_array(t) for t in read_graph(quantized, weights=True).initializer}
    for tensor in read_graph(source, weights=True).initializer:
        fault = _rounding_fault(tensor.name, onnx.numpy_helper.to_array(tensor), made)
        if fault:
            yield f"{quantized.name}: {tensor.name} {fault}"


def _rounding_fault(name: str, array: np.ndarray, made: Mapping[str, np.ndarray]) -> str | None:
    """A tensor with several readers may be stored twice, in float32 and rounded; both must be right."""
    faults: list[str | None] = []
    for stored, expected in ((name, array), (f"{name}_Transposed", array.T)):
        if stored in made:
            same = np.array_equal(made[stored], expected, equal_nan=expected.dtype.kind == "f")
            faults.append(None if same else "is not what the float32 graph has")
        if f"{stored}_quantized" in made:
            faults.append(_step_fault(expected, *(made[f"{stored}_{p}"] for p in ("quantized", "scale", "zero_point"))))
        if f"{stored}_Q4" in made:
            faults.append(_block_fault(expected, made[f"{stored}_Q4"], made[f"{stored}_scales"]))
    return next((fault for fault in faults if fault), None) if faults else "is missing"


def _step_fault(expected: np.ndarray, steps: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> str | None:
    if steps.shape != expected.shape:
        return f"is {sizes_text([steps.shape])} where the float32 graph has {sizes_text([expected.shape])}"
    return None if _is_rounded(expected, steps, scale, zero) else _NOT_ROUNDED


def _block_fault(expected: np.ndarray, packed: np.ndarray, scales: np.ndarray) -> str | None:
    inputs, outputs = expected.shape
    held, blocks, half = packed.shape
    if (held, blocks) != (outputs, math.ceil(inputs / (2 * half))) or scales.size != held * blocks:
        return f"is {sizes_text([packed.shape])} in 4 bits where the float32 graph has {sizes_text([expected.shape])}"
    return None if _is_rounded_in_blocks(expected, packed, scales.reshape(held, blocks)) else _NOT_ROUNDED


def _is_rounded(exact: np.ndarray, steps: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> bool:
    """Whether `steps`, scaled, is `exact` to half a step. `scale` and `zero` are single, or one per last index."""
    scale, zero = scale.astype(np.float64), zero.astype(np.float64)
    rows = max(1, len(exact) if exact.ndim < 2 else _BLOCK // math.prod(exact.shape[1:]))
    for start in range(0, len(exact), rows):  # in parts, because a large table does not fit into memory in float64
        part = slice(start, start + rows)
        if not (np.abs((steps[part] - zero) * scale - exact[part]) <= _HALF_A_STEP * scale).all():  # False for NaN
            return False
    return True


def _is_rounded_in_blocks(exact: np.ndarray, packed: np.ndarray, scales: np.ndarray) -> bool:
    """Whether 4-bit blocks, scaled, are `exact` to half a step as far as their range goes.

    Args:
        exact: [inputs, outputs].
        packed: uint8 [outputs, blocks, half a block], the lower four bits first; 8 stands for zero.
        scales: [outputs, blocks]: minus an eighth of the block's value of largest magnitude, which becomes -8.
    """
    size = 2 * packed.shape[2]
    columns = max(1, _BLOCK // (packed.shape[1] * size))
    for start in range(0, len(packed), columns):
        part = slice(start, start + columns)
        steps, scale = four_bit_steps(packed[part]), scales[part, :, None].astype(np.float64)
        whole = np.zeros((len(steps), steps.shape[1] * size))
        whole[:, : len(exact)] = exact[:, part].T
        blocks = whole.reshape(steps.shape)
        largest = np.abs(blocks).max(axis=-1, keepdims=True)
        ends = -8 * scale, 7 * scale
        off = np.abs(steps * scale - blocks.clip(np.minimum(*ends), np.maximum(*ends))) / np.abs(scale).clip(_TINY)
        # The padding of the last block is ignored.
        rounded = off.reshape(whole.shape)[:, : len(exact)] <= _HALF_A_STEP
        if not (rounded.all() and (np.abs(8 * np.abs(scale) - largest) <= 1e-6 * largest).all()):
            return False
    return True

"""Link 3 of one file of a further precision: its arithmetic, and what its rounding costs.

float16 is held against float32 itself. The whole numbers of int8 and q4 change outputs by as much as a wrong head does,
so these files are held against the float32 graph with the same rounded numbers (`slimheads.rounded`), where what is
left is next to nothing; what rounding costs is drift, and has a floor below which a file is of no use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

from slimheads.data.metrics import Agreement
from slimheads.exporting.precisions import PRECISIONS
from slimheads.names import Precision
from slimheads.verification.parity import AnyCase, Comparison, Outputs, Runner, compare_all
from slimheads.verification.quantized_weights import quantized_faults
from slimheads.verification.rounded import LOSS
from slimheads.verification.subjects import Subject, Yardstick

# How far ONNX Runtime's own fusions may move an int8 or q4 file: they change last bits, and these roundings. At most
# 0.07 measured (MiniLM). No fault of the file can hide in it: the file was held as written.
FUSED_TOLERANCE = 0.3
# Mean cosine to float32's outputs. Measured at least 0.9976 (int8) and 0.91 (q4) in every family's test model, whose
# weights are random, and 0.981 and 0.949 on MiniLM fed random tokens.
LEAST_COSINE = 0.8


@dataclass(frozen=True)
class Finding:
    """What was found of one file.

    `weak` is why its numbers do not do, where it is a matter of numbers alone; `faults` are weights that are not the
    float32 ones, rounded.
    """

    comparisons: tuple[Comparison, ...]
    tolerance: float
    cosine: float | None
    top1: float | None
    fused: float | None  # largest relative difference that ONNX Runtime's fusions make
    weak: str | None
    faults: tuple[str, ...]


def examine(precision: Precision, plain: Subject, made: Subject, yardstick: Yardstick | None) -> Finding:
    """Runs a file over all cases, against what it should give and against float32.

    Raises:
        SlimheadsError, OSError, or what ONNX Runtime raises: a file cannot be opened.
    """
    tolerance, agreement, run, exact = (
        PRECISIONS[precision].tolerance,
        Agreement(),
        _once(made.open()),
        _once(plain.open()),
    )
    written, reference = (_once(yardstick.as_written()), yardstick.reference()) if yardstick else (run, exact)
    comparisons: list[Comparison] = []
    fused: list[Comparison] = []
    for case in made.cases:
        comparisons += compare_all(reference, written, [case], None, tolerance)
        compare_all(exact, run, [case], None, inf, agreement)
        if yardstick:
            fused += compare_all(written, run, [case], None, FUSED_TOLERANCE)
    moved = [one.max_rel for one in fused if isfinite(one.max_rel)]
    rounded = yardstick is not None and made.converted
    return Finding(
        comparisons=tuple(comparisons + [_as_fused(one) for one in fused if not one.passed]),
        tolerance=tolerance,
        cosine=agreement.cosine,
        top1=agreement.top1,
        fused=max(moved, default=None),
        weak=_weak([*comparisons, *fused], agreement.cosine, made.cases, yardstick),
        faults=tuple(quantized_faults(plain.path, made.path)) if rounded else (),
    )


def _once(runner: Runner) -> Runner:
    """The same runner, which keeps the outputs of its last case."""
    last: list[tuple[AnyCase, Outputs]] = []

    def run(case: AnyCase) -> Outputs:
        if not last or last[0][0] is not case:
            last[:] = [(case, runner(case))]
        return last[0][1]

    return run


def _as_fused(comparison: Comparison) -> Comparison:
    return replace(comparison, reason=f"as ONNX Runtime fuses it, {comparison.reason}")


def _weak(
    found: Sequence[Comparison], cosine: float | None, cases: Sequence[AnyCase], yardstick: Yardstick | None
) -> str | None:
    failed = [one for one in found if not one.passed]
    if any(not one.numeric for one in failed):
        return None
    low = cosine is not None and cosine < LEAST_COSINE
    if not failed and not low:
        return None
    said = failed[0].reason if failed else f"its outputs have a mean cosine of {cosine:.3f} to float32's"
    worst = _worst_product(yardstick, cases[-1]) if yardstick else None
    return f"{said}; of all products {worst[0]} loses most by itself, {worst[1]:.1%} of its output" if worst else said


def _worst_product(yardstick: Yardstick, case: AnyCase) -> tuple[str, float] | None:
    """The node whose output suffers most from its own rounding, where the graphs show it."""
    outputs = yardstick.losses()(case)
    losses = {name.removeprefix(LOSS): float(value) for name, value in outputs.items() if name.startswith(LOSS)}
    return max(losses.items(), key=lambda item: item[1]) if losses else None

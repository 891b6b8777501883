"""Link 3 of one file in a further precision: its arithmetic, and the cost of its rounding.

float16 is compared with float32 itself. The whole numbers of int8 and q4 change outputs by as much as a wrong head
does, so these files are compared with the float32 graph that has the same rounded weights
(`slimheads.verification.rounded`), and almost no difference is left. The cost of rounding is drift from float32, and a
file with too much of it does not ship.
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

# The difference that ONNX Runtime's own fusions may make in an int8 or q4 file: they change last bits, and these change
# roundings. Measured: at most 0.07 (MiniLM). It hides no fault, because the file is also compared without fusions.
FUSED_TOLERANCE = 0.3
# Mean cosine to float32's outputs. Measured at least 0.9976 (int8) and 0.91 (q4) in every family's test model, whose
# weights are random, and 0.981 and 0.949 on MiniLM fed random tokens.
LEAST_COSINE = 0.8


@dataclass(frozen=True)
class Finding:
    """The result of one file.

    `weak` is the reason where it fails by its numbers alone; `faults` are weights that are not the float32 ones,
    rounded.
    """

    comparisons: tuple[Comparison, ...]
    tolerance: float
    cosine: float | None
    top1: float | None
    fused: float | None  # largest relative difference by ONNX Runtime's fusions
    weak: str | None
    faults: tuple[str, ...]


def examine(precision: Precision, plain: Subject, made: Subject, yardstick: Yardstick | None) -> Finding:
    """Runs a file over all cases, and compares it with its reference and with float32.

    Raises:
        SlimheadsError, OSError, or what ONNX Runtime raises: a file cannot be opened.
    """
    tolerance, agreement = PRECISIONS[precision].tolerance, Agreement()
    run, exact = _cached(made.open()), _cached(plain.open())
    written, reference = (_cached(yardstick.as_written()), yardstick.reference()) if yardstick else (run, exact)
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
        comparisons=tuple(comparisons + [_with_fusions(one) for one in fused if not one.passed]),
        tolerance=tolerance,
        cosine=agreement.cosine,
        top1=agreement.top1,
        fused=max(moved, default=None),
        weak=_weak([*comparisons, *fused], agreement.cosine, made.cases, yardstick),
        faults=tuple(quantized_faults(plain.path, made.path)) if rounded else (),
    )


def _cached(runner: Runner) -> Runner:
    """The same runner, which keeps the outputs of its last case."""
    last: list[tuple[AnyCase, Outputs]] = []

    def run(case: AnyCase) -> Outputs:
        if not last or last[0][0] is not case:
            last[:] = [(case, runner(case))]
        return last[0][1]

    return run


def _with_fusions(comparison: Comparison) -> Comparison:
    return replace(comparison, reason=f"with ONNX Runtime's fusions, {comparison.reason}")


def _weak(
    found: Sequence[Comparison], cosine: float | None, cases: Sequence[AnyCase], yardstick: Yardstick | None
) -> str | None:
    failed = [one for one in found if not one.passed]
    if any(not one.numeric for one in failed):
        return None
    low = cosine is not None and cosine < LEAST_COSINE
    if not failed and not low:
        return None
    said = failed[0].reason if failed else f"the mean cosine of its outputs to float32 is {cosine:.3f}"
    worst = _worst_product(yardstick, cases[-1]) if yardstick else None
    return f"{said}; the largest rounding error is in {worst[0]}, {worst[1]:.1%} of its output" if worst else said


def _worst_product(yardstick: Yardstick, case: AnyCase) -> tuple[str, float] | None:
    """The product with the largest error by its own rounding, and that error as a share of its output."""
    outputs = yardstick.losses()(case)
    losses = {name.removeprefix(LOSS): float(value) for name, value in outputs.items() if name.startswith(LOSS)}
    return max(losses.items(), key=lambda item: item[1]) if losses else None

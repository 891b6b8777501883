"""The certificate: the chain of equalities from the gated dense model to the file that ships."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Link(BaseModel):
    """One equality of the chain, over all its cases.

    `max_abs` is the largest absolute difference, `max_rel` the same divided by the reference's largest magnitude in
    that case. A case holds where |a - b| <= atol + rtol * |b| at every unpadded position and every value is finite.
    Link 4 compares structure, not numbers: its differences are null.
    """

    model_config = ConfigDict(frozen=True)
    link: int  # 1 to 5, as the contract numbers them
    name: str  # "gated dense torch == slim torch"
    subject: str  # what was held against it, e.g. "onnx/model_int8.onnx"
    max_abs: float | None
    max_rel: float | None
    atol: float | None
    rtol: float | None
    cases: int
    passed: bool
    worst_case: str | None = None  # e.g. "batch 4, length 128, left padding, past 7"
    reason: str | None = None  # why it failed


class SkippedLink(BaseModel):
    """A link that has nothing to compare in this run, and why."""

    model_config = ConfigDict(frozen=True)
    link: int
    reason: str

"""The certificate: the chain of equalities from the gated dense model to the file that ships.

1. gated dense torch == slim torch, before recovery, the slim one as reloaded from disk
2. slim torch == slim ONNX fp32 in ONNX Runtime
3. each further graph against the fp32 one it came from, each with its own tolerance
4. the graph itself: every targeted tensor shrank by what the plan says, fused nodes carry their own layer's head count
5. decoders: greedy tokens through ONNX Runtime with the cache == torch, token for token

An encoder-decoder ships as four files, and links 2 to 5 have a row for each that they concern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from slimheads.chain import Chain, Generation, Shipped, Structure, Subject, chain_of
from slimheads.errors import CertificateError, SlimheadsError
from slimheads.export import Precision
from slimheads.gating import gated
from slimheads.graph_check import quantized_faults
from slimheads.parity import REFUSALS, Comparison, Outputs, compare_all, in_short
from slimheads.selection import Plan

# Deleting equals gating up to the order of additions: 0.0 on small models, 3e-6 on BERT-base (float32).
SURGERY_TOLERANCE = 1e-5
# What a precision may cost by itself, as a share of the largest output. Measured: fp16 0.001 to 0.002, int8 0.01 to
# 0.15 (MiniLM at 128 tokens). A wrong head can cost less than that: int8 weights are also held one by one against those
# they were rounded from. What is lost in quality is drift.
PRECISION_TOLERANCES: dict[Precision, float] = {"fp16": 0.01, "int8": 0.3}
# How a model, a file or a runtime says that it cannot do what a link asks of it.
_FAILURES: tuple[type[Exception], ...] = (SlimheadsError, OSError, *REFUSALS)


class Link(BaseModel):
    """One equality of the chain, over all its cases.

    `max_abs` is the largest absolute difference, `max_rel` the same divided by the reference's largest magnitude in
    that case. A case holds where |a - b| <= atol + rtol * |a| at every unpadded position and every value is finite;
    where `atol` is null, where max_rel <= rtol.
    Links 4 and 5 compare structure and tokens, not numbers: their differences are null.
    """

    model_config = ConfigDict(frozen=True)
    link: int  # 1 to 5, as the contract numbers them
    name: str  # "gated dense torch == slim torch"
    subject: str  # what was held against it, e.g. "onnx/model_int8.onnx"
    max_abs: float | None = None
    max_rel: float | None = None
    atol: float | None = None
    rtol: float | None = None
    cases: int
    passed: bool
    worst_case: str | None = None  # e.g. "batch 4, length 128, left padding, past 7"
    reason: str | None = None  # why it failed


class SkippedLink(BaseModel):
    """A link that has nothing to compare in this run, and why."""

    model_config = ConfigDict(frozen=True)
    link: int
    reason: str


@dataclass(frozen=True)
class Certificate:
    """All links of one run; links after the first failed one are still tried, for they say where the fault lies."""

    links: tuple[Link, ...]
    skipped: tuple[SkippedLink, ...]

    @property
    def passed(self) -> bool:
        """True if every link held."""
        return all(link.passed for link in self.links)

    def error(self) -> CertificateError | None:
        """The first failed link as an error that names link, case and largest difference; None if all held."""
        failed = next((link for link in self.links if not link.passed), None)
        if failed is None:
            return None
        size = f", largest difference {failed.max_abs:.3g}" if failed.max_abs is not None else ""
        where = f"link {failed.link} ({failed.subject})"
        case = f" at {failed.worst_case}" if failed.worst_case else ""
        return CertificateError(
            f"{failed.name} failed{case}: {failed.reason}{size}", where=where, hint="nothing was published; report this"
        )


def verify(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    plan: Plan,
    folder: str | Path,
    dense_onnx: str | Path,
    *,
    task: str,
    precisions: Sequence[Precision] = ("fp32",),
    atol: float = 1e-4,
    rtol: float = 1e-4,
    on_progress: Callable[[str], None] | None = None,
) -> Certificate:
    """Tries every link.

    Args:
        dense: the untouched model, float32.
        slim: the pruned model as reloaded from `folder`, float32.
        plan: what was deleted.
        folder: the slim folder, with config.json and onnx/.
        dense_onnx: the folder of the dense graphs, exported the same way.
        task: as `slimheads.checkpoint` names tasks.
        precisions: the graphs in `folder/onnx` to hold against the fp32 one.
        atol, rtol: for link 2.
        on_progress: called with each link's name before it is tried.

    Returns:
        The certificate; a link that fails is in it, nothing is raised for it.
    """
    chain = chain_of(Shipped(dense, slim, plan, Path(dense_onnx), Path(folder), task))
    tell = on_progress or (lambda _: None)
    tell("link 1: gated dense torch == slim torch")
    links = [_surgery(chain, dense, slim, plan)]
    tell("link 2: slim torch == slim ONNX")
    links += [_exported(chain, slim, subject, atol, rtol) for subject in chain.subjects("fp32")]
    further = [p for p in precisions if p != "fp32"]
    for precision in further:
        tell(f"link 3: {precision} against fp32")
        pairs = zip(chain.subjects("fp32"), chain.subjects(precision), strict=True)
        links += [_derived(precision, plain, made) for plain, made in pairs]
    tell("link 4: the graph itself")
    links += [_structure(structure) for structure in chain.structures(further)]
    skipped = [] if further else [SkippedLink(link=3, reason="no graph beyond fp32 was asked for")]
    generations = chain.generations()
    if generations:
        tell("link 5: greedy tokens with the cache")
        by_file = groupby(generations, key=lambda generation: generation.path)
        links += [_tokens(path, list(group)) for path, group in by_file]
    else:
        skipped.append(SkippedLink(link=5, reason="not a decoder: it generates no tokens"))
    return Certificate(tuple(links), tuple(skipped))


def _surgery(chain: Chain, dense: PreTrainedModel, slim: PreTrainedModel, plan: Plan) -> Link:
    whole = chain.torch_form(dense)

    def gated_dense(case: Any) -> Outputs:
        with gated(dense, plan):
            return whole(case)

    found = compare_all(gated_dense, chain.torch_form(slim), chain.cases, SURGERY_TOLERANCE, SURGERY_TOLERANCE)
    name = "gated dense torch == slim torch"
    return _link(1, name, "model.safetensors", found, SURGERY_TOLERANCE, SURGERY_TOLERANCE)


def _exported(chain: Chain, slim: PreTrainedModel, subject: Subject, atol: float, rtol: float) -> Link:
    name, shown = "slim torch == slim ONNX fp32", _shown(subject.path)
    try:
        found = compare_all(chain.torch_form(slim), subject.open(), subject.cases, atol, rtol)
    except _FAILURES as error:
        return _broken(2, name, shown, error)
    return _link(2, name, shown, found, atol, rtol)


def _derived(precision: Precision, plain: Subject, made: Subject) -> Link:
    rtol = PRECISION_TOLERANCES[precision]
    name, shown = f"slim ONNX fp32 == slim ONNX {precision}", _shown(made.path)
    try:
        found = compare_all(plain.open(), made.open(), made.cases, None, rtol)
        faults = list(quantized_faults(plain.path, made.path)) if precision == "int8" and made.converted else []
    except _FAILURES as error:
        return _broken(3, name, shown, error)
    link = _link(3, name, shown, found, None, rtol)
    if link.passed and faults:
        return link.model_copy(update={"passed": False, "worst_case": None, "reason": _first_of(faults)})
    return link


def _structure(structure: Structure) -> Link:
    name, shown = "every targeted tensor shrank by what the plan says", _shown(structure.path)
    try:
        faults = list(structure.faults())
    except SlimheadsError as error:
        return _broken(4, name, shown, error)
    reason = _first_of(faults) if faults else None
    return Link(link=4, name=name, subject=shown, cases=structure.tensors, passed=not faults, reason=reason)


def _tokens(path: Path, generations: Sequence[Generation]) -> Link:
    wrong: list[tuple[str, str]] = []
    for generation in generations:
        try:
            reason = _first_other_token(generation)
        except _FAILURES as error:
            reason = f"it does not run: {in_short(error)}"
        if reason:
            wrong.append((generation.prompt, reason))
    return Link(
        link=5,
        name="greedy tokens with the cache == torch",
        subject=_shown(path),
        cases=len(generations),
        passed=not wrong,
        worst_case=wrong[0][0] if wrong else None,
        reason=wrong[0][1] if wrong else None,
    )


def _first_other_token(generation: Generation) -> str | None:
    with torch.no_grad():
        expected = generation.expected()
    differs = (expected != generation.found()).nonzero()
    if not len(differs):
        return None
    row, column = differs[0].tolist()
    return f"row {row} differs from new token {column - (expected.shape[1] - generation.new_tokens) + 1} on"


def _shown(path: Path) -> str:
    return f"onnx/{path.name}"


def _first_of(faults: Sequence[str]) -> str:
    return f"{faults[0]}{f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''}"


def _link(number: int, name: str, subject: str, found: Sequence[Comparison], atol: float | None, rtol: float) -> Link:
    worst = min(found, key=lambda c: (c.passed, -c.max_abs))
    finite = worst.max_abs != float("inf")  # a case that could not be compared has no difference to state
    return Link(
        link=number,
        name=name,
        subject=subject,
        max_abs=worst.max_abs if finite else None,
        max_rel=worst.max_rel if finite else None,
        atol=atol,
        rtol=rtol,
        cases=len(found),
        passed=worst.passed,
        worst_case=worst.case,
        reason=worst.reason,
    )


def _broken(number: int, name: str, subject: str, error: Exception) -> Link:
    return Link(link=number, name=name, subject=subject, cases=0, passed=False, reason=in_short(error))

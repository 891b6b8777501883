"""The certificate: the chain of equalities from the gated dense model to the file that ships.

1. gated dense torch == slim torch, before recovery, the slim one as reloaded from disk
2. slim torch == slim ONNX fp32 in ONNX Runtime
3. each further graph against the fp32 one it came from, each with its own tolerance; int8 and q4 against that one with
   the same rounded weights
4. the graph itself: every targeted tensor shrank by what the plan says, fused nodes carry their own layer's head count,
   int8 weights are such that no sum of products overflows on the CPUs they are for
5. decoders: greedy tokens through ONNX Runtime with the cache == torch, token for token

An encoder-decoder ships as four files, and links 2 to 5 have a row for each that they concern.

GraphForm graphs have links 3 to 5 of their own, apart from the run's: one that does not hold cannot ship, and that is
all that follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict, computed_field
from transformers import PreTrainedModel

from slimheads.errors import CertificateError, SlimheadsError, first_line, require_known
from slimheads.exporting.artifacts import FILES
from slimheads.names import GraphForm, Int8For, OnWeakPrecision, Precision
from slimheads.pruning.gates import gated
from slimheads.pruning.plan import Plan
from slimheads.verification.parity import REFUSALS, Comparison, Form, Outputs, compare_all
from slimheads.verification.precision_proof import examine
from slimheads.verification.subjects import Chain, Generation, OneFile, Shipped, Structure, Subject, Yardstick, chain_of

# Deleting equals gating up to the order of additions: 0.0 on small models, 3e-6 on BERT-base (float32).
SURGERY_TOLERANCE = 1e-5
# What another form of the same float32 graph may cost, absolute and relative: only the order of additions. Measured: at
# most 5e-6 in every family's test model, MiniLM and a BERT of 600 million parameters; a wrong head count, 0.1 and more.
CANDIDATE_TOLERANCE = 1e-4
_NO_CANDIDATES: Mapping[GraphForm, Path] = MappingProxyType({})
# How a model, a file or a runtime says that it cannot do what a link asks of it.
_FAILURES: tuple[type[Exception], ...] = (SlimheadsError, OSError, *REFUSALS)


class Link(BaseModel):
    """One equality of the chain, over all its cases.

    `max_abs` is the largest absolute difference, `max_rel` the same divided by the reference's largest magnitude in
    that case. A case holds where |a - b| <= atol + rtol * |a| at every unpadded position and every value is finite;
    where `atol` is null, where max_rel <= rtol.
    Links 4 and 5 compare structure and tokens, not numbers: their differences are null.

    A precision's drift from float32 stands beside its link 3, over the same cases: `cosine` is the mean cosine of the
    two outputs at a position, `top1_agreement` (of what writes text) the share of positions with the same next token.
    `fused_rel` is how far ONNX Runtime's own fusions move an int8 or q4 file, in the sense of `max_rel`. `weak` says of
    a link 3 that failed that numbers alone are to blame: rounding costs too much.
    """

    model_config = ConfigDict(frozen=True)
    link: int  # 1 to 5, as the contract numbers them
    name: str  # "gated dense torch == slim torch"
    subject: str  # what was held against it, e.g. "onnx/model_int8.onnx"
    max_abs: float | None = None
    max_rel: float | None = None
    atol: float | None = None
    rtol: float | None = None
    cosine: float | None = None
    top1_agreement: float | None = None
    precision: Precision | None = None  # of a link 3
    fused_rel: float | None = None
    weak: bool = False
    cases: int
    passed: bool
    worst_case: str | None = None  # e.g. "batch 4, length 128, left padding, past 7"
    reason: str | None = None  # why it failed


class SkippedLink(BaseModel):
    """A link that has nothing to compare in this run, and why."""

    model_config = ConfigDict(frozen=True)
    link: int
    reason: str


class CandidateProof(BaseModel):
    """What was found of a candidate graph; `reason` says why it may not ship."""

    model_config = ConfigDict(frozen=True)
    candidate: GraphForm
    links: tuple[Link, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """True if every link held."""
        return all(link.passed for link in self.links)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def reason(self) -> str | None:
        """The first link that did not hold, in words."""
        failed = next((link for link in self.links if not link.passed), None)
        return f"link {failed.link} ({failed.subject}): {_failure(failed)}" if failed else None


class LeftOut(BaseModel):
    """A precision that does not ship because it is weak: its links 3, and the first that failed in words."""

    model_config = ConfigDict(frozen=True)
    precision: Precision
    links: tuple[Link, ...]
    reason: str


@dataclass(frozen=True)
class Certificate:
    """All links of one run; links after the first failed one are still tried, for they say where the fault lies."""

    links: tuple[Link, ...]
    skipped: tuple[SkippedLink, ...]
    candidates: tuple[CandidateProof, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def passed(self) -> bool:
        """True if every link held; candidates have no say in it."""
        return all(link.passed for link in self.links)

    def error(self) -> CertificateError | None:
        """The first failed link as an error that names link, case and largest difference; None if all held."""
        failed = next((link for link in self.links if not link.passed), None)
        if failed is None:
            return None
        where = f"link {failed.link} ({failed.subject})"
        return CertificateError(_failure(failed), where=where, hint=_remedy(failed))

    def with_candidate(self, name: GraphForm) -> Certificate:
        """The certificate of what ships where this candidate ships as onnx/model.onnx: its links close the chain.

        Raises:
            KeyError: there is no such candidate.
        """
        if name == "plain":
            return self
        proof = {proof.candidate: proof for proof in self.candidates}[name]
        shown = _shown(Path(FILES["fp32"]))
        plain = tuple(
            link.model_copy(update={"subject": f"{shown} (plain)"}) if link.subject == shown else link
            for link in self.links
        )
        skipped = tuple(link for link in self.skipped if link.link not in {own.link for own in proof.links})
        return replace(self, links=plain + proof.links, skipped=skipped)


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
    int8_for: Int8For = "any",
    on_weak_precision: OnWeakPrecision = "fail",
    candidates: Mapping[GraphForm, Path] = _NO_CANDIDATES,
    on_progress: Callable[[str], None] | None = None,
) -> Certificate:
    """Tries every link, and those of the candidates where all others held.

    Args:
        dense: the untouched model, float32.
        slim: the pruned model as reloaded from `folder`, float32.
        plan: what was deleted.
        folder: the slim folder, with config.json and onnx/.
        dense_onnx: the folder of the dense graphs, exported the same way.
        task: as `slimheads.checkpoint` names tasks.
        precisions: the graphs in `folder/onnx` to hold against the fp32 one.
        atol, rtol: for link 2.
        int8_for: what the int8 files were made for.
        on_weak_precision: "drop" leaves out a precision whose link 3 fails by its numbers, in all of its files.
        candidates: name -> folder with dense/ and slim/, each with config.json and onnx/model.onnx; of one-file models.
        on_progress: called with each link's name before it is tried.

    Returns:
        The certificate; a link that fails is in it, nothing is raised for it.

    Raises:
        UsageError: the name of a precision or candidate is not known.
    """
    for precision in precisions:
        require_known("export.precisions", precision, FILES)
    for candidate in candidates:
        require_known("export.candidates", candidate, get_args(GraphForm))
    shipped = Shipped(dense, slim, plan, Path(dense_onnx), Path(folder), task, int8_for)
    chain = chain_of(shipped)
    tell = on_progress or (lambda _: None)
    tell("link 1: gated dense torch == slim torch")
    links = [_surgery(chain, dense, slim, plan)]
    tell("link 2: slim torch == slim ONNX")
    links += [_exported(chain, slim, subject, atol, rtol) for subject in chain.subjects("fp32")]
    further = [p for p in precisions if p != "fp32"]
    generations = chain.generations()
    left_out: list[LeftOut] = []
    for precision in further:
        tell(f"link 3: {precision} against fp32")
        files = zip(chain.subjects("fp32"), chain.subjects(precision), chain.yardsticks(precision), strict=True)
        derived = [_derived(precision, *subjects, writes=bool(generations)) for subjects in files]
        if on_weak_precision == "drop" and (weak := _only_weak(precision, derived)):
            left_out.append(weak)
        else:
            links += derived
    kept = [precision for precision in further if precision not in {one.precision for one in left_out}]
    tell("link 4: the graph itself")
    links += [_structure(structure, structure.claim, _shown(structure.path)) for structure in chain.structures(kept)]
    none_left = "every graph beyond fp32 was left out" if further else "no graph beyond fp32 was asked for"
    skipped = [] if kept else [SkippedLink(link=3, reason=none_left)]
    if generations:
        tell("link 5: greedy tokens with the cache")
        by_file = groupby(generations, key=lambda generation: generation.path)
        links += [_tokens(_shown(path), list(group)) for path, group in by_file]
    else:
        skipped.append(SkippedLink(link=5, reason="not a decoder: it generates no tokens"))
    proofs: list[CandidateProof] = []
    for name, made in candidates.items() if all(link.passed for link in links) else ():
        tell(f"links 3 to 5 of the {name} graph")
        proofs.append(_candidate(name, OneFile(shipped), OneFile(shipped.as_candidate(made))))
    return Certificate(tuple(links), tuple(skipped), tuple(proofs), tuple(left_out))


def _candidate(name: GraphForm, plain: OneFile, made: OneFile) -> CandidateProof:
    """Links 3 to 5 of another form of both graphs: the dense one is what the slim one's speed is measured against."""
    shown = [f"{place} ({name})" for place in (f"dense/{_shown(Path(FILES['fp32']))}", _shown(Path(FILES["fp32"])))]
    dense, slim = ((plain.dense_subject(), made.dense_subject()), (plain.subjects("fp32")[0], made.subjects("fp32")[0]))
    links = []
    for side, where, (before, after) in zip(("dense", "slim"), shown, (dense, slim), strict=True):
        said = f"{side} ONNX plain == {side} ONNX {name}"
        links.append(_compared(3, said, where, before.open, after, CANDIDATE_TOLERANCE, CANDIDATE_TOLERANCE))
    for where, structure in zip(shown, made.fused(), strict=True):
        links.append(_structure(structure, "fused attention nodes carry their own layer's head count", where))
    generations = made.generations()
    if generations:
        links.append(_tokens(shown[1], generations))
    return CandidateProof(candidate=name, links=tuple(links))


def _surgery(chain: Chain, dense: PreTrainedModel, slim: PreTrainedModel, plan: Plan) -> Link:
    whole = chain.torch_form(dense)

    def gated_dense(case: Any) -> Outputs:
        with gated(dense, plan):
            return whole(case)

    found = compare_all(gated_dense, chain.torch_form(slim), chain.cases, SURGERY_TOLERANCE, SURGERY_TOLERANCE)
    name = "gated dense torch == slim torch"
    return _link(1, name, "model.safetensors", found, SURGERY_TOLERANCE, SURGERY_TOLERANCE)


def _exported(chain: Chain, slim: PreTrainedModel, subject: Subject, atol: float, rtol: float) -> Link:
    name = "slim torch == slim ONNX fp32"
    return _compared(2, name, _shown(subject.path), lambda: chain.torch_form(slim), subject, atol, rtol)


def _derived(precision: Precision, plain: Subject, made: Subject, yardstick: Yardstick | None, *, writes: bool) -> Link:
    name, shown = f"slim ONNX fp32 == slim ONNX {precision}", _shown(made.path)
    if yardstick:
        name = f"slim ONNX fp32 with the same rounded weights == slim ONNX {precision}"
    try:
        found = examine(precision, plain, made, yardstick)
    except _FAILURES as error:
        return _broken(3, name, shown, error)
    link = _link(3, name, shown, found.comparisons, None, found.tolerance)
    measured: dict[str, Any] = {
        "precision": precision,
        "fused_rel": found.fused,
        "cosine": found.cosine,
        "top1_agreement": found.top1 if writes else None,
    }
    if found.faults:
        measured |= {"passed": False, "worst_case": None, "reason": _first_of(found.faults)}
    elif found.weak:
        case = None if link.passed else link.worst_case
        measured |= {"passed": False, "weak": True, "worst_case": case, "reason": found.weak}
    return link.model_copy(update=measured)


def _only_weak(precision: Precision, links: Sequence[Link]) -> LeftOut | None:
    """The precision as left out, if its numbers are all that is wrong with it."""
    failed = [link for link in links if not link.passed]
    if not failed or not all(link.weak for link in failed):
        return None
    return LeftOut(precision=precision, links=tuple(links), reason=f"{failed[0].subject}: {_failure(failed[0])}")


def _remedy(failed: Link) -> str:
    if not failed.weak:
        return "nothing was published; report this"
    other = ", try another export.int8_for" if failed.precision == "int8" else ""
    drop = "set export.on_weak_precision: drop to publish the rest"
    return f"nothing was published; leave {failed.precision} out of export.precisions{other}, or {drop}"


def _compared(
    number: int,
    name: str,
    shown: str,
    reference: Callable[[], Form],
    made: Subject,
    atol: float | None,
    rtol: float,
) -> Link:
    try:
        found = compare_all(reference(), made.open(), made.cases, atol, rtol)
    except _FAILURES as error:
        return _broken(number, name, shown, error)
    return _link(number, name, shown, found, atol, rtol)


def _structure(structure: Structure, name: str, shown: str) -> Link:
    try:
        faults = list(structure.faults())
    except SlimheadsError as error:
        return _broken(4, name, shown, error)
    reason = _first_of(faults) if faults else None
    return Link(link=4, name=name, subject=shown, cases=structure.tensors, passed=not faults, reason=reason)


def _tokens(shown: str, generations: Sequence[Generation]) -> Link:
    wrong: list[tuple[str, str]] = []
    for generation in generations:
        try:
            reason = _first_other_token(generation)
        except _FAILURES as error:
            reason = f"it does not run: {first_line(error)}"
        if reason:
            wrong.append((generation.prompt, reason))
    return Link(
        link=5,
        name="greedy tokens with the cache == torch",
        subject=shown,
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


def _failure(link: Link) -> str:
    case = f" at {link.worst_case}" if link.worst_case else ""
    said = f"differs by {link.max_abs:.3g}" if link.max_abs is not None else ""
    reason = link.reason or "beyond the tolerance"
    size = f", largest difference {link.max_abs:.3g}" if said and said not in reason else ""
    return f"{link.name} failed{case}: {reason}{size}"


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
    return Link(link=number, name=name, subject=subject, cases=0, passed=False, reason=first_line(error))

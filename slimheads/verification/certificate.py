"""The certificate: the chain of equalities from the gated dense model to the files that ship.

1. gated dense torch == slim torch, before recovery, the slim one as reloaded from disk
2. slim torch == slim ONNX fp32 in ONNX Runtime
3. each further graph against the fp32 one it was made from, each with its own tolerance; precisions whose weights are
   whole numbers (int8, q4) against the fp32 graph with the same rounded weights
4. the graph itself: every targeted tensor shrank by what the plan says, fused nodes carry their own layer's head count,
   int8 weights are such that no sum of products overflows on the CPUs they are for
5. decoders: greedy tokens through ONNX Runtime with the cache == torch, token for token

An encoder-decoder ships as four files, and each file has rows of its own in links 2 to 5.

Other forms of the float32 graph have links 3 to 5 of their own. A form with a failed link cannot ship, and the run goes
on without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ConfigDict, computed_field

from slimheads.errors import CertificateError
from slimheads.exporting.artifacts import file_name
from slimheads.exporting.precisions import PRECISIONS
from slimheads.names import PLAIN, GraphForm, LinkKind, Precision


class Link(BaseModel):
    """One equality of the chain, over all its cases.

    `max_abs` is the largest absolute difference, `max_rel` the same divided by the reference's largest magnitude in
    that case. A case holds where |a - b| <= atol + rtol * |a| at every unpadded position and every value is finite;
    where `atol` is null, where max_rel <= rtol.
    Links 4 and 5 compare structure and tokens, not numbers: their differences are null.

    A precision's drift from float32 stands beside its link 3, over the same cases: `cosine` is the mean cosine of the
    two outputs at a position, `top1_agreement` (of models that write text) the share of positions with the same next
    token. `fused_rel` is how far ONNX Runtime's own fusions move an int8 or q4 file, in the sense of `max_rel`. `weak`
    marks a link 3 that failed by its numbers alone: rounding costs too much.
    """

    model_config = ConfigDict(frozen=True)
    link: int  # 1 to 5, as the contract numbers them
    name: str  # "gated dense torch == slim torch"
    subject: str  # the file in question, as `subject_of` writes it
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

    def failure(self) -> str:
        """What failed, at which case, and by how much."""
        case = f" at {self.worst_case}" if self.worst_case else ""
        reason = self.reason or "beyond the tolerance"
        if self.max_abs is not None:
            reason += f", largest difference {self.max_abs:.3g}"
        return f"{self.name} failed{case}: {reason}"

    @property
    def kind(self) -> LinkKind:
        """What the link compares, by its number."""
        kinds: tuple[LinkKind, ...] = get_args(LinkKind)
        return kinds[self.link - 1]


class SkippedLink(BaseModel):
    """A link that has nothing to compare in this run, and why."""

    model_config = ConfigDict(frozen=True)
    link: int
    reason: str


class FormProof(BaseModel):
    """The links of another form of the float32 graph; `reason` says why it cannot ship."""

    model_config = ConfigDict(frozen=True)
    candidate: GraphForm
    links: tuple[Link, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """True if every link held."""
        return first_failed(self.links) is None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def reason(self) -> str | None:
        """The first link that did not hold, in words."""
        failed = first_failed(self.links)
        return f"link {failed.link} ({failed.subject}): {failed.failure()}" if failed else None


class LeftOut(BaseModel):
    """A precision that does not ship because it is weak: its links 3, and the first that failed in words."""

    model_config = ConfigDict(frozen=True)
    precision: Precision
    links: tuple[Link, ...]
    reason: str


@dataclass(frozen=True)
class Certificate:
    """All links of one run. Links after a failed one are still tried, because they show where the fault lies."""

    links: tuple[Link, ...]
    skipped: tuple[SkippedLink, ...]
    forms: tuple[FormProof, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def passed(self) -> bool:
        """True if every link held; other forms of the graph do not count."""
        return first_failed(self.links) is None

    def error(self) -> CertificateError | None:
        """The first failed link as an error that names link, case and largest difference; None if all held."""
        failed = first_failed(self.links)
        if failed is None:
            return None
        where = f"link {failed.link} ({failed.subject})"
        return CertificateError(failed.failure(), where=where, hint=_remedy(failed))

    def with_form(self, form: GraphForm) -> Certificate:
        """The certificate of a run that ships this form as onnx/model.onnx: the form's links close the chain.

        Raises:
            KeyError: this form was not proven.
        """
        if form == PLAIN:
            return self
        own = {proof.candidate: proof for proof in self.forms}[form].links
        plain = Path(file_name("model", "fp32"))
        renamed = {subject_of(plain): f"{subject_of(plain)} ({PLAIN})"}
        links = [link.model_copy(update={"subject": renamed.get(link.subject, link.subject)}) for link in self.links]
        skipped = [link for link in self.skipped if link.link not in {one.link for one in own}]
        return replace(self, links=(*links, *own), skipped=tuple(skipped))


def subject_of(path: Path, form: GraphForm = PLAIN, *, dense: bool = False) -> str:
    """What a link's `subject` says of a graph: its file below slim/, or below the run's folder where it is dense."""
    place = f"{'dense/' if dense else ''}onnx/{path.name}"
    return place if form == PLAIN else f"{place} ({form})"


def first_failed(links: tuple[Link, ...]) -> Link | None:
    """The first link that did not hold."""
    return next((link for link in links if not link.passed), None)


def _remedy(failed: Link) -> str:
    if not failed.weak or failed.precision is None:
        return "nothing was published; report this"
    other = ", try another export.int8_for" if PRECISIONS[failed.precision].for_cpus else ""
    drop = "set export.on_weak_precision: drop to publish the rest"
    return f"nothing was published; leave {failed.precision} out of export.precisions{other}, or {drop}"

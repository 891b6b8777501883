"""The certificate: the chain of equalities from the gated dense model to the file that ships.

1. gated dense torch == slim torch, before recovery, the slim one as reloaded from disk
2. slim torch == slim ONNX fp32 in ONNX Runtime
3. each further graph against the fp32 one it came from, each with its own tolerance
4. the graph itself: every targeted tensor shrank by what the plan says, fused nodes carry their own layer's head count
5. decoders: greedy tokens through ONNX Runtime with the cache == torch, token for token
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from slimheads.attention import find_sites
from slimheads.errors import CertificateError, SlimheadsError
from slimheads.export import FILES, Graph, Precision, greedy_options, greedy_tokens
from slimheads.export.kv_cache import kv_shapes
from slimheads.gating import gated
from slimheads.graph_check import fused_faults, graph_faults, quantized_faults
from slimheads.parity import (
    REFUSALS,
    Case,
    Comparison,
    Form,
    Outputs,
    cases,
    compare_all,
    in_short,
    onnx_form,
    onnx_greedy,
    position_limit,
    torch_form,
)
from slimheads.selection import Plan
from slimheads.sessions import open_session, read_interface

# Deleting equals gating up to the order of additions: 0.0 on small models, 3e-6 on BERT-base (float32).
SURGERY_TOLERANCE = 1e-5
# What a precision may cost by itself, as a share of the largest output. Measured: fp16 0.001 to 0.002, int8 0.01 to
# 0.15 (MiniLM at 128 tokens). A wrong head can cost less than that: int8 weights are also held one by one against those
# they were rounded from. What is lost in quality is drift.
PRECISION_TOLERANCES: dict[Precision, float] = {"fp16": 0.01, "int8": 0.3}
PROMPT_TOKENS, NEW_TOKENS = 8, 16
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
        dense_onnx: the dense graph, exported the same way.
        task: a key of `slimheads.checkpoint.TASKS`.
        precisions: the graphs in `folder/onnx` to hold against the fp32 one.
        atol, rtol: for link 2.
        on_progress: called with each link's name before it is tried.

    Returns:
        The certificate; a link that fails is in it, nothing is raised for it.
    """
    onnx_folder = Path(folder) / "onnx"
    chain = _Chain(dense, slim, plan, onnx_folder, Path(dense_onnx), task, cases(dense.config, task))
    tell = on_progress or (lambda _: None)
    tell("link 1: gated dense torch == slim torch")
    links = [_surgery(chain)]
    tell("link 2: slim torch == slim ONNX")
    links.append(_exported(chain, atol, rtol))
    further = [p for p in precisions if p != "fp32"]
    for precision in further:
        tell(f"link 3: {FILES[precision]} against {FILES['fp32']}")
        links.append(_derived(chain, Graph(precision, onnx_folder / FILES[precision])))
    tell("link 4: the graph itself")
    links.append(_structure(chain, [onnx_folder / FILES[p] for p in further]))
    skipped = [] if further else [SkippedLink(link=3, reason="no graph beyond fp32 was asked for")]
    if task == "text-generation":
        tell("link 5: greedy tokens with the cache")
        links.append(_tokens(chain, Path(folder)))
    else:
        skipped.append(SkippedLink(link=5, reason="not a decoder: it generates no tokens"))
    return Certificate(tuple(links), tuple(skipped))


@dataclass(frozen=True)
class _Chain:
    dense: PreTrainedModel
    slim: PreTrainedModel
    plan: Plan
    onnx_folder: Path
    dense_onnx: Path
    task: str
    cases: tuple[Case, ...]

    def onnx(self, path: Path) -> Form:
        shapes = kv_shapes(self.slim) if self.task == "text-generation" else ()
        return onnx_form(open_session(path), shapes)

    def tokens(self, folder: Path, case: Case, new_tokens: int) -> torch.Tensor:
        """Through the client that users have; without it where the file fixes its cache axes, which it cannot feed."""
        path = self.onnx_folder / FILES["fp32"]
        caches = [i for i in read_interface(path).inputs if i.name.startswith("past_key_values.")]
        if any(isinstance(i.dims[1], int) for i in caches):
            made = onnx_greedy(open_session(path), kv_shapes(self.slim), case.ids, case.mask, new_tokens)
            return torch.from_numpy(made)
        return greedy_tokens(folder, torch.from_numpy(case.ids), torch.from_numpy(case.mask), new_tokens)


def _surgery(chain: _Chain) -> Link:
    def gated_dense(case: Case) -> Outputs:
        with gated(chain.dense, chain.plan):
            return torch_form(chain.dense)(case)

    found = compare_all(gated_dense, torch_form(chain.slim), chain.cases, SURGERY_TOLERANCE, SURGERY_TOLERANCE)
    name = "gated dense torch == slim torch"
    return _link(1, name, "model.safetensors", found, SURGERY_TOLERANCE, SURGERY_TOLERANCE)


def _exported(chain: _Chain, atol: float, rtol: float) -> Link:
    name, subject = "slim torch == slim ONNX fp32", f"onnx/{FILES['fp32']}"
    try:
        found = compare_all(
            torch_form(chain.slim), chain.onnx(chain.onnx_folder / FILES["fp32"]), chain.cases, atol, rtol
        )
    except _FAILURES as error:
        return _broken(2, name, subject, error)
    return _link(2, name, subject, found, atol, rtol)


def _derived(chain: _Chain, graph: Graph) -> Link:
    rtol = PRECISION_TOLERANCES[graph.precision]
    name, subject = f"slim ONNX fp32 == slim ONNX {graph.precision}", f"onnx/{graph.path.name}"
    plain = chain.onnx_folder / FILES["fp32"]
    try:
        found = compare_all(chain.onnx(plain), chain.onnx(graph.path), chain.cases, None, rtol)
        faults = list(quantized_faults(plain, graph.path)) if graph.precision == "int8" else []
    except _FAILURES as error:
        return _broken(3, name, subject, error)
    link = _link(3, name, subject, found, None, rtol)
    if link.passed and faults:
        return link.model_copy(update={"passed": False, "worst_case": None, "reason": _first_of(faults)})
    return link


def _structure(chain: _Chain, further: Sequence[Path]) -> Link:
    sites = find_sites(chain.dense)
    name, subject = "every targeted tensor shrank by what the plan says", f"onnx/{FILES['fp32']}"
    try:
        faults = list(graph_faults(chain.dense_onnx, chain.onnx_folder / FILES["fp32"], sites, chain.plan))
        for path in further:
            faults += fused_faults(path, sites, chain.plan)
    except SlimheadsError as error:
        return _broken(4, name, subject, error)
    return Link(
        link=4,
        name=name,
        subject=subject,
        cases=sum(len(site.projections) for site in sites),
        passed=not faults,
        reason=_first_of(faults) if faults else None,
    )


def _tokens(chain: _Chain, folder: Path) -> Link:
    limit = position_limit(chain.dense.config)
    fresh = [case for case in chain.cases if case.padding in ("no", "left") and not case.past]
    length = max(case.length for case in fresh if case.length <= min(PROMPT_TOKENS, limit // 2))
    prompts = [case for case in fresh if case.length == length]
    name, subject = "greedy tokens with the cache == torch", f"onnx/{FILES['fp32']}"
    wrong: list[tuple[str, str]] = []
    for case in prompts:
        try:
            reason = _first_other_token(chain, folder, case, min(NEW_TOKENS, limit - length))
        except _FAILURES as error:
            reason = f"it does not run: {in_short(error)}"
        if reason:
            wrong.append((str(case), reason))
    return Link(
        link=5,
        name=name,
        subject=subject,
        cases=len(prompts),
        passed=not wrong,
        worst_case=wrong[0][0] if wrong else None,
        reason=wrong[0][1] if wrong else None,
    )


def _first_other_token(chain: _Chain, folder: Path, case: Case, new_tokens: int) -> str | None:
    ids, mask = torch.from_numpy(case.ids), torch.from_numpy(case.mask)
    with torch.no_grad():
        expected = chain.slim.generate(input_ids=ids, attention_mask=mask, **greedy_options(new_tokens))
    differs = (expected != chain.tokens(folder, case, new_tokens)).nonzero()
    if not len(differs):
        return None
    row, column = differs[0].tolist()
    return f"row {row} differs from new token {column - case.length + 1} on"


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

"""Proves what the files of a run compute: tries every link of the certificate, which certificate.py lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from slimheads.errors import SlimheadsError, first_line, require_known
from slimheads.exporting.precisions import PRECISIONS
from slimheads.names import GraphForm, Int8For, OnWeakPrecision, Precision
from slimheads.pruning.gates import gated
from slimheads.pruning.plan import Plan
from slimheads.verification.certificate import Certificate, FormProof, LeftOut, Link, SkippedLink, subject_of
from slimheads.verification.parity import REFUSALS, Comparison, Outputs, Runner, compare_all
from slimheads.verification.precision_proof import examine
from slimheads.verification.subjects import Chain, Generation, OneFile, Shipped, Structure, Subject, Yardstick, chain_of

# Deleting equals gating up to the order of additions: 0.0 on small models, 3e-6 on BERT-base (float32).
SURGERY_TOLERANCE = 1e-5
# The difference allowed between forms of the same float32 graph, absolute and relative: only the order of additions
# differs. Measured: at most 5e-6 in every family's test model, MiniLM and a BERT of 600 million parameters; a wrong
# head count costs 0.1 and more.
FORM_TOLERANCE = 1e-4
_NO_FORMS: Mapping[GraphForm, Path] = MappingProxyType({})
# The exceptions by which a model, a file or a runtime refuses what a link needs.
_FAILURES: tuple[type[Exception], ...] = (SlimheadsError, OSError, *REFUSALS)


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
    candidates: Mapping[GraphForm, Path] = _NO_FORMS,
    on_progress: Callable[[str], None] | None = None,
) -> Certificate:
    """Tries every link, and where all of them hold, those of the other forms of the float32 graph.

    Args:
        dense: the untouched model, float32.
        slim: the pruned model as reloaded from `folder`, float32.
        plan: what was deleted.
        folder: the slim folder, with config.json and onnx/.
        dense_onnx: the folder of the dense graphs, exported the same way.
        task: as `slimheads.models.checkpoint` names tasks.
        precisions: the graphs in `folder/onnx` to compare with the fp32 one.
        atol, rtol: for link 2.
        int8_for: the CPUs that the int8 files are for.
        on_weak_precision: "drop" leaves out a precision whose link 3 fails by its numbers, in all of its files.
        candidates: other forms of a model in one file -> folder with dense/ and slim/, laid out like `folder`.
        on_progress: called with each link's name before it is tried.

    Returns:
        The certificate. A link that fails is in it and raises nothing.

    Raises:
        UsageError: the name of a precision or form is not known.
    """
    for precision in precisions:
        require_known("export.precisions", precision, PRECISIONS)
    for form in candidates:
        require_known("export.candidates", form, get_args(GraphForm))
    shipped = Shipped(dense, slim, plan, Path(dense_onnx), Path(folder), task, int8_for)
    further, tell = [p for p in precisions if p != "fp32"], on_progress or (lambda _: None)
    found = _prove_plain(shipped, further, (atol, rtol), tell, drop_weak=on_weak_precision == "drop")
    return replace(found, forms=tuple(_forms(shipped, candidates, tell))) if found.passed else found


def _prove_plain(
    shipped: Shipped,
    further: Sequence[Precision],
    tolerances: tuple[float, float],
    tell: Callable[[str], None],
    *,
    drop_weak: bool,
) -> Certificate:
    """The five links of the graphs as exported."""
    chain = chain_of(shipped)
    tell("link 1: gated dense torch == slim torch")
    links = [_surgery(chain, shipped.dense, shipped.slim, shipped.plan)]
    tell("link 2: slim torch == slim ONNX")
    links += [_exported(chain, shipped.slim, subject, *tolerances) for subject in chain.subjects("fp32")]
    kept, left_out = list[Precision](), list[LeftOut]()
    for precision in further:
        tell(f"link 3: {precision} against fp32")
        derived = _derived_graphs(chain, precision)
        if drop_weak and (weak := _only_weak(precision, derived)):
            left_out.append(weak)
        else:
            kept.append(precision)
            links += derived
    tell("link 4: the graph itself")
    links += [_structure(one, one.claim, subject_of(one.path)) for one in chain.structures(kept)]
    if chain.writes_text:
        tell("link 5: greedy tokens with the cache")
    links += _all_tokens(chain)
    return Certificate(tuple(links), tuple(_skipped(chain, kept, left_out)), left_out=tuple(left_out))


def _skipped(chain: Chain, kept: Sequence[Precision], left_out: Sequence[LeftOut]) -> Iterator[SkippedLink]:
    if not kept:
        reason = "every graph beyond fp32 was left out" if left_out else "export.precisions has nothing beyond fp32"
        yield SkippedLink(link=3, reason=reason)
    if not chain.writes_text:
        yield SkippedLink(link=5, reason="not a decoder: it generates no tokens")


def _forms(shipped: Shipped, folders: Mapping[GraphForm, Path], tell: Callable[[str], None]) -> Iterator[FormProof]:
    for form, folder in folders.items():
        tell(f"links 3 to 5 of the {form} graph")
        yield _form(form, OneFile(shipped), OneFile(shipped.as_form(folder)))


def _form(form: GraphForm, plain: OneFile, made: OneFile) -> FormProof:
    """Links 3 to 5 of another form of both graphs: the slim one's speed is measured against the dense one's."""
    links: list[Link] = []
    compared = {
        "dense": (plain.dense_subject(), made.dense_subject()),
        "slim": (plain.subjects("fp32")[0], made.subjects("fp32")[0]),
    }
    shown = [subject_of(after.path, form, dense=side == "dense") for side, (_, after) in compared.items()]
    for where, (side, (before, after)) in zip(shown, compared.items(), strict=True):
        name = f"{side} ONNX plain == {side} ONNX {form}"
        links.append(_compared(3, name, where, before.open, after, FORM_TOLERANCE, FORM_TOLERANCE))
    claim = "fused attention nodes carry their own layer's head count"
    links += [_structure(structure, claim, where) for where, structure in zip(shown, made.fused(), strict=True)]
    generations = made.generations()
    if generations:
        links.append(_tokens(shown[1], generations))
    return FormProof(candidate=form, links=tuple(links))


def _surgery(chain: Chain, dense: PreTrainedModel, slim: PreTrainedModel, plan: Plan) -> Link:
    whole = chain.torch_runner(dense)

    def gated_dense(case: Any) -> Outputs:
        with gated(dense, plan):
            return whole(case)

    found = compare_all(gated_dense, chain.torch_runner(slim), chain.cases, SURGERY_TOLERANCE, SURGERY_TOLERANCE)
    name = "gated dense torch == slim torch"
    return _link(1, name, "model.safetensors", found, SURGERY_TOLERANCE, SURGERY_TOLERANCE)


def _exported(chain: Chain, slim: PreTrainedModel, subject: Subject, atol: float, rtol: float) -> Link:
    name = "slim torch == slim ONNX fp32"
    return _compared(2, name, subject_of(subject.path), lambda: chain.torch_runner(slim), subject, atol, rtol)


def _derived_graphs(chain: Chain, precision: Precision) -> list[Link]:
    """Link 3 of every file of a precision."""
    files = zip(chain.subjects("fp32"), chain.subjects(precision), chain.yardsticks(precision), strict=True)
    return [_derived_graph(precision, *subjects, writes=chain.writes_text) for subjects in files]


def _derived_graph(
    precision: Precision, plain: Subject, made: Subject, yardstick: Yardstick | None, *, writes: bool
) -> Link:
    name, shown = f"slim ONNX fp32 == slim ONNX {precision}", subject_of(made.path)
    if yardstick:
        name = f"slim ONNX fp32 with the same rounded weights == slim ONNX {precision}"
    try:
        found = examine(precision, plain, made, yardstick)
    except _FAILURES as error:
        return _failed_to_run(3, name, shown, error)
    link = _link(3, name, shown, found.comparisons, None, found.tolerance)
    measured: dict[str, Any] = {
        "precision": precision,
        "fused_rel": found.fused,
        "cosine": found.cosine,
        "top1_agreement": found.top1 if writes else None,
    }
    if found.faults:
        measured |= {"passed": False, "worst_case": None, "reason": _first_fault(found.faults)}
    elif found.weak:
        case = None if link.passed else link.worst_case
        measured |= {"passed": False, "weak": True, "worst_case": case, "reason": found.weak}
    return link.model_copy(update=measured)


def _only_weak(precision: Precision, links: Sequence[Link]) -> LeftOut | None:
    """The precision as left out, if it fails by its numbers alone."""
    failed = [link for link in links if not link.passed]
    if not failed or not all(link.weak for link in failed):
        return None
    return LeftOut(precision=precision, links=tuple(links), reason=f"{failed[0].subject}: {failed[0].failure()}")


def _compared(
    number: int,
    name: str,
    shown: str,
    reference: Callable[[], Runner],
    made: Subject,
    atol: float | None,
    rtol: float,
) -> Link:
    try:
        found = compare_all(reference(), made.open(), made.cases, atol, rtol)
    except _FAILURES as error:
        return _failed_to_run(number, name, shown, error)
    return _link(number, name, shown, found, atol, rtol)


def _structure(structure: Structure, name: str, shown: str) -> Link:
    try:
        faults = list(structure.faults())
    except SlimheadsError as error:
        return _failed_to_run(4, name, shown, error)
    reason = _first_fault(faults) if faults else None
    return Link(link=4, name=name, subject=shown, cases=structure.tensors, passed=not faults, reason=reason)


def _all_tokens(chain: Chain) -> list[Link]:
    """Link 5 of every file that writes text."""
    by_file = groupby(chain.generations(), key=lambda generation: generation.path)
    return [_tokens(subject_of(path), list(group)) for path, group in by_file]


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


def _first_fault(faults: Sequence[str]) -> str:
    return f"{faults[0]}{f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''}"


def _link(number: int, name: str, subject: str, found: Sequence[Comparison], atol: float | None, rtol: float) -> Link:
    worst = min(found, key=lambda c: (c.passed, -c.max_abs))
    finite = worst.max_abs != float("inf")  # a case that could not be compared has no difference
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


def _failed_to_run(number: int, name: str, subject: str, error: Exception) -> Link:
    return Link(link=number, name=name, subject=subject, cases=0, passed=False, reason=first_line(error))

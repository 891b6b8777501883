"""The first lines of every rendering of a report: the verdict, warnings and findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slimheads.formatting import change, difference, listing, percent, plural, shape_text, tolerance, whole
from slimheads.latency.graph_choice import GraphChoice
from slimheads.report.model import KindCount, Report
from slimheads.report.wording import (
    FIGURE_NAMES,
    against_random,
    latency_setup,
    latency_text,
    of_all,
    prediction_lines,
    removed_counts,
    sample_line,
    selection_lines,
    units,
)
from slimheads.verification.certificate import Link
from slimheads.verification.drift import Drift


class Finding(NamedTuple):
    """One line: what it is about, and what was found. Its text ends in one full stop."""

    label: str
    text: str

    @classmethod
    def of(cls, label: str, text: str) -> Finding:
        """On one line; reasons come with or without a full stop."""
        return cls(label, " ".join(text.split()).rstrip(".") + ".")

    def __str__(self) -> str:
        return f"{self.label}: {self.text}"


class Headline(NamedTuple):
    """The first lines of every rendering: the verdict, what must not be overlooked, and the findings."""

    verdict: Finding
    warnings: list[str]
    findings: list[Finding]

    @property
    def lines(self) -> list[str]:
        """All of them, in order."""
        return [str(self.verdict), *self.warnings, *map(str, self.findings)]


def headline(report: Report) -> Headline:
    """A report in words, most important first."""
    drifts = [drift for drift in (report.drift, report.drift_text) if drift is not None]
    warnings = [
        f"{one.precision} is not published (export.on_weak_precision: drop): {one.reason.rstrip('.')}."
        for one in report.left_out
    ]
    warnings += [line for drift in drifts if (line := _no_better_than_random(report, drift))]
    warnings += report.lengths.limits() if report.lengths else []
    findings = [_removed(report), *_latencies(report)]
    if len(report.candidates) > 1:
        findings.append(_graph(report.candidates))
    findings += [Finding.of(*line) for line in prediction_lines(report.predictions)]
    findings += [Finding.of(*line) for line in selection_lines(report.selection, report.model.kinds)]
    findings += [_drift(drift, report.scores.method) for drift in drifts]
    if report.drift is None:
        findings.append(Finding.of("Drift", f"not measured: {report.drift_reason}"))
    findings.insert(len(findings) if report.proven else 0, _certificate(report))
    if report.lengths and report.proven:
        findings.append(Finding.of("Lengths", str(report.lengths)))
    findings += [Finding.of("Note", notice) for notice in report.notices]
    return Headline(_verdict(report), warnings, findings)


def _latencies(report: Report) -> list[Finding]:
    if not report.latency:
        return [Finding.of("Latency", f"not measured: {report.latency_reason}")]
    rows = report.shipped_latency
    same = len({latency_setup(row) for row in rows}) == 1
    return [Finding.of("Latency" if same else f"Latency, {latency_setup(row)}", latency_text(row)) for row in rows]


def _graph(candidates: Sequence[GraphChoice]) -> Finding:
    """Which float32 graph ships, and why; or why none does."""
    shipped = next((one for one in candidates if one.ships), None)
    name, reason = (shipped.candidate, shipped.reason) if shipped else ("none", candidates[0].reason)
    return Finding.of("Shipped graph", f"{name} ({reason})")


def _verdict(report: Report) -> Finding:
    verdict = report.verdict
    if not verdict.ok:
        return Finding.of(f"Failed (exit code {verdict.exit_code})", "; ".join(verdict.reasons))
    held = "the certificate held" if report.certificate else f"no certificate: {report.certificate_reason}"
    match report.gates:
        case ():
            gates = "the recipe sets no gates"
        case (gate,):
            gates = f"the gate {gate.gate} was met"
        case several:
            gates = f"all {len(several)} gates were met" if len(several) > 2 else "both gates were met"
    return Finding.of("Passed", f"{held}, and {gates}")


def _no_better_than_random(report: Report, drift: Drift) -> str | None:
    if drift.beats_random is not False:
        return None
    text = f"{report.scores.method.capitalize()} is no better than random removal on {sample_line(drift)}"
    if (pair := against_random(drift)) is None:
        return f"{text}."
    name, slim, control, seeds = pair
    return f"{text}: {name} {slim}, random {control} ({plural(seeds, 'seed')})."


def _drift(drift: Drift, method: str) -> Finding:
    label = f"Drift on {sample_line(drift)} ({plural(drift.texts, drift.noun)})"
    if drift.slim is None:
        return Finding.of(label, f"not measured: {drift.reason}")
    if (pair := against_random(drift)) is not None:
        name, slim, control, seeds = pair
        better = f"; {method} is better than every seed" if drift.beats_random else ""
        return Finding.of(label, f"{name} {slim}, random removal {control} ({plural(seeds, 'seed')}){better}")
    value = getattr(drift.slim, drift.headline) if drift.headline else None
    name = FIGURE_NAMES[drift.headline] if drift.headline else "no headline figure"
    return Finding.of(label, f"{name} {'not measured' if value is None else f'{value:.3f}'}, no random control")


def _removed(report: Report) -> Finding:
    kinds, dense, slim = report.model.kinds, report.model.dense, report.model.slim
    if not any(count.removed for count in kinds.values()):
        everything = [f"{whole(count.total)} {units(count.unit, count.total)}" for count in kinds.values()]
        return Finding.of("Removed nothing", f"all {listing(everything)} are kept")
    text = f"parameters {change(dense.parameters, slim.parameters)}, bytes {change(dense.bytes, slim.bytes)}"
    if dense.flops is not None and slim.flops is not None and report.model.flops_shape:
        text += f", FLOPs {change(dense.flops, slim.flops)} at {shape_text(report.model.flops_shape)}"
    return Finding.of(f"Removed {removed_counts(kinds, _with_share)}", text)


def _with_share(count: KindCount) -> str:
    return f"{of_all(count)} {units(count.unit, count.total)} ({percent(count.removed / count.total)})"


def _certificate(report: Report) -> Finding:
    if not report.certificate:
        return Finding.of("Certificate", f"not made: {report.certificate_reason}")
    failed = [link for link in report.certificate if not link.passed]
    if failed:
        return Finding.of("Certificate", "; ".join(_failed_link(link) for link in failed))
    numbers = sorted({link.link for link in report.certificate})
    text = f"{'links' if len(numbers) > 1 else 'link'} {listing(numbers)} held"
    text += f" over {plural(sum(link.cases for link in report.certificate), 'case')}"
    exact = [link.max_abs for link in report.certificate if link.kind in ("deletion", "export")]
    if differences := [size for size in exact if size is not None]:
        text += f"; largest difference in float32: {difference(max(differences))}"
    for skip in report.certificate_skipped:
        text += f"; link {skip.link} does not apply ({skip.reason})"
    return Finding.of("Certificate", text)


def _failed_link(link: Link) -> str:
    text = f"link {link.link} FAILED ({link.name}, {link.subject})"
    if link.max_abs is not None:
        text += f": largest difference {difference(link.max_abs)}"
        if link.atol is not None:
            text += f", tolerance {tolerance(link.atol)}"
    if link.worst_case:
        text += f", at {link.worst_case}"
    return f"{text}: {link.reason}" if link.reason else text

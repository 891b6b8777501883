"""The first lines of every rendering of a report: the verdict, warnings and findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slimheads.formatting import change, difference, listing, percent, plural, shape_text, tolerance, whole
from slimheads.latency.graph_choice import GraphChoice
from slimheads.report.model import Report
from slimheads.report.wording import (
    FIGURE_NAMES,
    against_random,
    latency_line,
    latency_setup,
    prediction_line,
    sample_line,
    selection_line,
    units,
)
from slimheads.verification.certificate import Link
from slimheads.verification.drift import Drift


class Headline(NamedTuple):
    """The first lines of every rendering: the verdict, what must be said plainly, and the findings."""

    verdict: str
    warnings: list[str]
    findings: list[str]

    @property
    def lines(self) -> list[str]:
        """All of them, in order."""
        return [self.verdict, *self.warnings, *self.findings]


def headline(report: Report) -> Headline:
    """A report in words, most important first."""
    drifts = (report.drift, report.drift_text)
    warnings = [
        f"{one.precision} was left out, as export.on_weak_precision: drop asks: {one.reason}."
        for one in report.left_out
    ]
    warnings += [lost for drift in drifts if (lost := _lost_to_random(report, drift))]
    warnings += report.lengths.limits() if report.lengths else []
    lines = [_removed(report)]
    if report.latency:
        same = len({latency_setup(row) for row in report.shipped_latency}) == 1
        lines += [f"Latency: {latency_line(row, setup=not same)}." for row in report.shipped_latency]
    else:
        lines.append(f"Latency: not measured: {report.latency_reason}.")
    if len(report.candidates) > 1:
        lines.append(_graph(report.candidates))
    if report.predictions:
        lines.append(prediction_line(report.predictions))
    if report.selection.asked == "auto":
        lines.append(selection_line(report.selection, units(report.model, report.selection.kept_more)))
    lines.append(_drift(report.drift, report.drift_reason, report.scores.method))
    if report.drift_text is not None:
        lines.append(_drift(report.drift_text, None, report.scores.method))
    lines.insert(len(lines) if report.proven else 0, _certificate(report))
    lines += [f"Lengths: {report.lengths}."] if report.lengths and report.proven else []
    lines += [f"Note: {notice}." for notice in report.notices]
    return Headline(_one_stop(_verdict(report)), warnings, [_one_stop(line) for line in lines])


def _graph(candidates: Sequence[GraphChoice]) -> str:
    """Which float32 graph ships, and why; or why none does."""
    shipped = next((one for one in candidates if one.ships), None)
    if shipped is None:
        return f"Graph: none ships: {candidates[0].reason}"
    return f"Graph: the {shipped.candidate} one ships: {shipped.reason}"


def _verdict(report: Report) -> str:
    verdict = report.verdict
    if not verdict.ok:
        return f"Failed (exit code {verdict.exit_code}): {'; '.join(verdict.reasons)}."
    held = "the certificate held" if report.certificate else f"no certificate: {report.certificate_reason}"
    if not report.gates:
        gates = "the recipe sets no gates"
    elif len(report.gates) == 1:
        gates = f"the gate {report.gates[0].gate} was met"
    else:
        gates = f"all {len(report.gates)} gates were met"
    return f"Passed: {held}, and {gates}."


def _lost_to_random(report: Report, drift: Drift | None) -> str | None:
    """Said plainly and early: a score that loses to chance is the first thing a reader must know."""
    if drift is None or drift.beats_random is not False:
        return None
    method = report.scores.method.capitalize()
    if (pair := against_random(drift)) is None:
        return f"{method} did not beat random removal on {sample_line(drift)}."
    name, slim, control, seeds = pair
    return (
        f"{method} did not beat random removal on {sample_line(drift)}: {name} {slim}, where removing as many "
        f"{units(report.model, 2)} at random gives {control} ({plural(seeds, 'seed')})."
    )


def _drift(drift: Drift | None, reason: str | None, method: str) -> str:
    if drift is None or drift.slim is None:
        return f"Drift: not measured: {(drift.reason if drift else None) or reason}."
    if (pair := against_random(drift)) is not None:
        name, slim, control, seeds = pair
        against = f"; removing as many at random: {control} ({plural(seeds, 'seed')})"
    else:
        value = getattr(drift.slim, drift.headline) if drift.headline else None
        name = FIGURE_NAMES[drift.headline] if drift.headline else "no headline figure"
        slim, against = (f"{value:.3f}" if value is not None else "not measured"), "; no random control"
    won = f": {method} beats every one" if drift.beats_random else ""
    return f"Drift on {sample_line(drift)} ({plural(drift.texts, drift.noun)}): {name} {slim}{against}{won}."


def _removed(report: Report) -> str:
    heads, dense, slim = report.model.heads, report.model.dense, report.model.slim
    if heads.removed == 0:
        return f"Removed nothing: all {whole(heads.total)} {units(report.model, heads.total)} stay."
    share = percent(heads.removed / heads.total)
    unit = units(report.model, heads.total)
    text = f"Removed {whole(heads.removed)} of {whole(heads.total)} {unit} ({share})"
    text += f": parameters {change(dense.parameters, slim.parameters)}, bytes {change(dense.bytes, slim.bytes)}"
    if dense.flops is not None and slim.flops is not None and report.model.flops_shape:
        text += f", FLOPs {change(dense.flops, slim.flops)} at {shape_text(report.model.flops_shape)}"
    return text + "."


def _certificate(report: Report) -> str:
    if not report.certificate:
        return f"Certificate: not made: {report.certificate_reason}."
    failed = [link for link in report.certificate if not link.passed]
    if failed:
        return "Certificate: " + "; ".join(_failed_link(link) for link in failed) + "."
    numbers = sorted({link.link for link in report.certificate})
    text = f"Certificate: {'links' if len(numbers) > 1 else 'link'} {listing(numbers)} held"
    text += f" over {plural(sum(link.cases for link in report.certificate), 'case')}"
    worst = [link for link in report.certificate if link.link in (1, 2) and link.max_abs is not None]
    if worst:
        widest = max(worst, key=lambda link: link.max_abs or 0.0)
        text += f"; the largest difference in float32 is {difference(widest.max_abs or 0.0)}"
    for skip in report.certificate_skipped:
        text += f"; link {skip.link} does not apply ({skip.reason})"
    return text + "."


def _failed_link(link: Link) -> str:
    text = f"link {link.link} FAILED ({link.name}, {link.subject})"
    if link.max_abs is not None:
        text += f": largest difference {difference(link.max_abs)}"
        if link.atol is not None:
            text += f" where {tolerance(link.atol)} is allowed"
    if link.worst_case:
        text += f", in {link.worst_case}"
    return f"{text}: {link.reason}" if link.reason else text


def _one_stop(line: str) -> str:
    """Reasons come with or without a full stop; a line ends in one."""
    return " ".join(line.split()).rstrip(".") + "."

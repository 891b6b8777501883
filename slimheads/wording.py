"""A report's figures in words: how numbers are rounded, and the headline's sentences.

Numbers are rounded for people here and nowhere else; report.json keeps the full ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from slimheads.bench import Interval, Latency
    from slimheads.certificate import Link
    from slimheads.drift import Drift
    from slimheads.report import ModelFacts, Prediction, Report
    from slimheads.snapping import Selection
    from slimheads.treatments import GraphChoice

FIGURE_NAMES = {
    "cosine": "mean cosine of embeddings",
    "cosine_min": "worst cosine",
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity against dense",
    "kl_divergence": "KL divergence, nats a token",
    "top1_agreement": "same most likely token",
}


MINUS = "\u2212"


# Numbers


def whole(number: float) -> str:
    """22713216 -> 22,713,216."""
    return f"{number:,.0f}"


def figures(number: float, count: int = 3) -> str:
    """Three significant figures without an exponent: 0.847, 12.4, 1,240."""
    if number == 0:
        return "0"
    digits = count - 1
    while digits > 0 and abs(number) >= 10 ** (count - digits):
        digits -= 1
    if abs(number) < 0.1:
        return f"{number:.{count}g}"
    return f"{number:,.{digits if abs(number) >= 1 else count}f}"


def milliseconds(number: float) -> str:
    """12.4 ms."""
    return f"{figures(number)} ms"


def size(count: float) -> str:
    """Bytes in decimal units, as disks and hubs show them: 90.4 MB."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{figures(count / 10**power)} {unit}"
    return f"{count:.0f} bytes"


def flops(count: float) -> str:
    """2.79 GFLOP."""
    for unit, power in (("TFLOP", 12), ("GFLOP", 9), ("MFLOP", 6), ("kFLOP", 3)):
        if count >= 10**power:
            return f"{figures(count / 10**power)} {unit}"
    return f"{count:.0f} FLOP"


def percent(share: float) -> str:
    """0.972 -> 97%; small shares keep a decimal."""
    return f"{share:.0%}" if abs(share) >= 0.095 or share == 0 else f"{share:.1%}"


def change(before: float | None, after: float | None) -> str:
    """From 100 to 96.1: 3.9% less, written with a true minus sign."""
    if before is None or after is None or before == 0:
        return "not measured"
    if before == after:
        return "unchanged"
    return signed_percent(after / before - 1)


def signed_percent(share: float) -> str:
    """0.0123 -> +1.2%, with a true minus sign below zero."""
    return f"{MINUS if share < 0 else '+'}{abs(share):.1%}"


def seconds(number: float) -> str:
    """20 ms, 0.4 s, 83 s, 3 min 20 s."""
    if number < 0.1:
        return f"{number * 1000:.0f} ms"
    if number < 10:
        return f"{number:.1f} s"
    if number < 100:
        return f"{number:.0f} s"
    return f"{number // 60:.0f} min {number % 60:.0f} s"


def difference(number: float) -> str:
    """3.6e-06; exact equality is said in words."""
    return "0 (exact)" if number == 0 else f"{number:.1e}"


def tolerance(number: float) -> str:
    """1e-04 as 1e-4."""
    return re.sub(r"e-0*", "e-", f"{number:.0e}" if float(f"{number:.0e}") == number else f"{number:.2g}")


def ratio(number: float) -> str:
    """1.12x."""
    return f"{number:.2f}x"


def span(interval: Interval) -> tuple[str, str, str]:
    """Estimate, low and high with as many decimals as tell them from 1: a bound of 1.003 never reads 1.00."""
    values = (interval.estimate, interval.low, interval.high)
    digits = next((d for d in range(2, 6) if all(float(f"{v:.{d}f}") != 1 or v == 1 for v in values)), 6)
    estimate, low, high = (f"{value:.{digits}f}" for value in values)
    return estimate, low, high


def apart(first: float, second: float) -> tuple[str, str]:
    """Both with three decimals, or with more where three would make different numbers look equal."""
    digits = next((d for d in range(3, 8) if first == second or f"{first:.{d}f}" != f"{second:.{d}f}"), 8)
    return f"{first:.{digits}f}", f"{second:.{digits}f}"


def listing(items: Sequence[object]) -> str:
    """1, 2 and 4."""
    *rest, last = [str(item) for item in items]
    return f"{', '.join(rest)} and {last}" if rest else last


def plural(count: int, noun: str) -> str:
    """1 case, 2 cases."""
    return f"{whole(count)} {noun}{'' if count == 1 else 's'}"


# Sentences


class Headline(NamedTuple):
    """The first lines of every rendering: the verdict, what must be said plainly, and the findings."""

    verdict: str
    warnings: list[str]
    findings: list[str]


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
        same = len({latency_setup(row) for row in report.latency}) == 1
        lines += [f"Latency: {latency_line(row, setup=not same)}." for row in report.latency]
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


def latency_line(row: Latency, *, setup: bool = True) -> str:
    """One measurement's verdict: what was found, how sure it is, and how much of the FLOP ratio it realised."""
    place = f"at {latency_place(row)} ({latency_setup(row)})" if setup else f"at {latency_place(row)}"
    if row.verdict == "not measured" or row.speedup is None:
        return f"not measured {place}: {row.reason}"
    if row.verdict == "inconclusive":
        return f"inconclusive {place}: {row.reason or 'the control does not hold'}"
    estimate, low, high = span(row.speedup)
    interval = f"95% interval {low} to {high}"
    if row.verdict == "no difference shown":
        return f"no difference shown {place}: {estimate}x, {interval}"
    if row.verdict == "slower":
        return f"slower, {estimate}x the dense model's speed ({interval}) {place}"
    realised = f", {percent(row.realised)} of what the deleted arithmetic allows" if row.realised is not None else ""
    return f"{estimate}x faster ({interval}) {place}{realised}"


def latency_place(row: Latency) -> str:
    """1x128, or batch 1 where inputs have no length; of a decoder, prefill 1x128 or decode 1x1 after 512."""
    return f"{row.phase} {shape_text(row.shape)}" if row.phase else shape_text(row.shape)


def latency_setup(row: Latency) -> str:
    """fp32, cpu, 2 threads; before that the graph, where there are several."""
    graph = f"{row.graph}, " if row.graph else ""
    form = "" if row.candidate == "plain" else f" ({row.candidate})"
    return f"{graph}{row.precision}{form}, {row.provider}, {plural(row.threads, 'thread')}"


def setting(row: Prediction) -> str:
    """cpu, 2 threads; before that the graph, where there are several."""
    graph = f"{row.graph}, " if row.graph else ""
    return f"{graph}{row.provider}, {plural(row.threads, 'thread')}"


def prediction_line(rows: Sequence[Prediction]) -> str:
    """How far predicted latencies were from measured ones: the worst of those by the table, and of those by FLOPs."""
    said = []
    for source, name in (("table", "latency table"), ("flops", "FLOPs alone")):
        own = [row for row in rows if row.source == source]
        errors = [row.error for row in own if row.error is not None]
        if errors:
            worst = max(errors, key=abs)
            place = f" at {shape_text(own[0].shape)}" if len(own) == 1 else f", the worst of {len(errors)}"
            said.append(f"slim latency by the {name} is {signed_percent(worst)} off what was measured{place}")
        elif own:
            foreseen = [f"{ratio(row.speedup)} at {shape_text(row.shape)}" for row in own if row.speedup is not None]
            said.append(f"{listing(foreseen or ['nothing'])} by the {name}; nothing conclusive to hold it against")
    return f"Prediction: {'; '.join(said)}."


def selection_line(selection: Selection, unit: str) -> str:
    """What `multiple_of: auto` came to, and what it gained by the latency table."""
    chose = f"Head counts: multiple_of: auto chose {selection.multiple_of}"
    if selection.predicted_gain is None:
        tried = [candidate.multiple_of for candidate in selection.candidates]
        steps = f" (tried: {listing(tried)})" if tried else ""
        return f"{chose}, and shows no gain: {selection.reason}{steps}."
    more = f", with {selection.kept_more} {unit} more kept" if selection.kept_more else ""
    if selection.reason:
        return f"{chose}: {selection.reason}{more}."
    estimate, low, high = span(selection.predicted_gain)
    return f"{chose}: predicted {estimate}x as fast as without ({low} to {high} by the latency table){more}."


def shape_text(shape: Sequence[int]) -> str:
    """Batch x length, after how many tokens in the cache, and what a decoder's encoder saw, where there are such: 1x1
    after 512; the batch alone where inputs have no length.
    """
    if len(shape) == 1:
        return f"batch {shape[0]}"
    text = "x".join(str(number) for number in shape[:2])
    past = f" after {shape[2]}" if len(shape) > 2 and shape[2] else ""
    return text + past + (f", encoder {shape[3]}" if len(shape) > 3 else "")


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
        return f"{method} did not beat random removal on {_sample(drift)}."
    name, slim, control, seeds = pair
    return (
        f"{method} did not beat random removal on {_sample(drift)}: {name} {slim}, where removing as many "
        f"{units(report.model, 2)} at random gives {control} ({plural(seeds, 'seed')})."
    )


def against_random(drift: Drift) -> tuple[str, str, str, int] | None:
    """The headline figure's name, the slim model's value, the control's range over its seeds, and how many they are."""
    if drift.headline is None or drift.slim is None or drift.random_control is None:
        return None
    slim = getattr(drift.slim, drift.headline)
    control = [getattr(figures, drift.headline) for figures in drift.random_control.figures]
    if slim is None or None in control:
        return None
    low, high = min(control), max(control)
    nearest = min((low, high), key=lambda end: abs(end - slim))
    written, _ = apart(slim, nearest)
    digits = len(written.partition(".")[2])
    spread = f"{low:.{digits}f}" if low == high else f"{low:.{digits}f} to {high:.{digits}f}"
    return FIGURE_NAMES[drift.headline], written, spread, len(control)


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
    return f"Drift on {_sample(drift)} ({plural(drift.texts, drift.noun)}): {name} {slim}{against}{won}."


def sample_size(drift: Drift) -> str:
    """125 texts, 3,104 tokens; or 64 images."""
    tokens = "" if drift.tokens is None else f", {whole(drift.tokens)} tokens"
    embedded = "" if drift.embedding in (None, "mean") else f", embedded by {drift.embedding}"
    return plural(drift.texts, drift.noun) + tokens + embedded


def _sample(drift: Drift) -> str:
    return "the built-in sample" if drift.sample == "built-in" else drift.sample


def units(model: ModelFacts, count: int) -> str:
    """What is deleted alone in this model: heads, or KV groups."""
    noun = "KV group" if model.unit == "kv_group" else "head"
    return noun if count == 1 else noun + "s"


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


def site_labels(sites: Sequence[str]) -> tuple[list[str], str]:
    """Row labels and their title: the layer numbers where names differ in nothing else, else the names themselves."""
    split = [site.split(".") for site in sites]
    if len({len(parts) for parts in split}) == 1 and len(sites) > 1:
        differing = [index for index, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1]
        if len(differing) == 1 and all(parts[differing[0]].isdigit() for parts in split):
            return [parts[differing[0]] for parts in split], "layer"
    return list(sites), "site"

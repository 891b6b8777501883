"""What samples are worth: ratios with an interval, the control, and the verdict."""

from __future__ import annotations

from math import sqrt

import numpy as np
from scipy import stats

from slimheads.latency.records import Interval, Timing, Verdict
from slimheads.latency.sampling import Floats

CONTROL_WIDTH = 0.14  # a control interval wider than this cannot vouch for anything: 0.10 for the ratio itself


RESAMPLES = 9999


def timing(samples: Floats, repeats: int = 1, tokens: int | None = None) -> Timing:
    """Summarize samples in milliseconds a run; `repeats` runs make up a sample, and `tokens` are new in each run."""
    p10, median, p90 = (float(value) for value in np.percentile(samples, [10, 50, 90]))
    rate = None if tokens is None else 1e3 * tokens / median
    return Timing(median_ms=median, p10_ms=p10, p90_ms=p90, runs=samples.size * repeats, tokens_per_second=rate)


def ratio_interval(numerator: Floats, denominator: Floats, seed: int = 0) -> Interval:
    """The ratio of medians of paired samples, with the bootstrap interval that the estimate of a repeat falls in (95%).

    Args:
        numerator: times of one session, [sets, rounds]; at least two sets.
        denominator: times of the other in the same rounds, the same shape.
        seed: of the resampling.

    The ratio of medians is taken set by set, and the median of these is the estimate. On a machine whose load changes,
    samples pooled over the sets are a mixture, and the ratio of two mixtures' medians jumps: in A/A runs with a load of
    6 on 4 cores it was off by 12% (root mean square), the median over the sets by 4%.

    Whole sets are resampled, never rounds: rounds of a set share the luck of its sessions (where memory and threads
    came to lie; ratios varied by 2-3% from set to set where the rounds explained 1-2%) and the mood of the machine, so
    that resampling rounds gives intervals that are too narrow. With few sets a percentile interval is too narrow as
    well, and is widened as Student's t is against the normal distribution (the expanded percentile interval of
    Hesterberg, "What Teachers Should Know About the Bootstrap", 2015).

    That interval is for the ratio itself. The estimate of a second measurement strays as far from it as the first one's
    did, so the two lie sqrt(2) times as far apart, and the interval is widened by that: of 10 repeats of MiniLM against
    its half, 6 fell into the first one's unwidened interval.
    """
    ratios = np.log(np.median(numerator, axis=1) / np.median(denominator, axis=1))
    widening = stats.t.ppf(0.975, len(ratios) - 1) * sqrt(len(ratios) / (len(ratios) - 1))
    found = stats.bootstrap(
        (ratios,),
        np.median,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=2 * stats.norm.cdf(widening) - 1,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    middle = np.median(ratios)
    low, high = (middle + sqrt(2) * (end - middle) for end in (found.low, found.high))
    estimate, low, high = (float(np.exp(value)) for value in (middle, low, high))
    return Interval(estimate=estimate, low=low, high=high)


def control_fault(control: Interval) -> str | None:
    """Why a dense-against-dense interval cannot vouch for its measurement, or None where it can."""
    interval = f"dense against itself measured {control.estimate:.3f} [{control.low:.3f}, {control.high:.3f}]"
    if not control.low <= 1 <= control.high:
        return f"{interval}, which misses 1: the machine favoured one session"
    if control.high - control.low > CONTROL_WIDTH:
        return f"{interval}, which is wider than {CONTROL_WIDTH:.2f}: the machine was too noisy"
    return None


def judge(speedup: Interval, control: Interval) -> tuple[Verdict, str | None]:
    """The verdict on a measurement, and the reason where it is inconclusive."""
    if fault := control_fault(control):
        return "inconclusive", fault
    if speedup.low > 1:
        return "faster", None
    return ("slower" if speedup.high < 1 else "no difference shown"), None

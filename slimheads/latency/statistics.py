"""Ratios of samples with their intervals, the check of the control, and the verdict."""

from __future__ import annotations

from math import sqrt

import numpy as np
from scipy import stats

from slimheads.latency.records import Interval, Timing, Verdict
from slimheads.latency.sampling import Floats

CONTROL_WIDTH = 0.14  # of the control's interval, at most: 0.10 for the ratio itself
RESAMPLES = 9999


def timing(samples: Floats, repeats: int = 1, tokens: int | None = None) -> Timing:
    """Summarizes samples in milliseconds per run, of `repeats` runs each; each run makes `tokens` new tokens."""
    p10, median, p90 = (float(value) for value in np.percentile(samples, [10, 50, 90]))
    rate = None if tokens is None else 1e3 * tokens / median
    return Timing(median_ms=median, p10_ms=p10, p90_ms=p90, runs=samples.size * repeats, tokens_per_second=rate)


def ratio_interval(numerator: Floats, denominator: Floats, seed: int = 0) -> Interval:
    """The ratio of medians of paired samples, with the 95% bootstrap interval for the estimate of a repeat.

    Args:
        numerator: times of one session, [sets, rounds]; at least two sets.
        denominator: times of the other in the same rounds, the same shape.
        seed: of the resampling.

    The estimate is the median over the sets of each set's ratio of medians. Samples pooled over the sets are a mixture
    where the machine's load changes, and the ratio of two mixtures' medians is unstable: in A/A runs with a load of 6
    on 4 cores its error was 12% (root mean square), against 4% for the median over the sets.

    Whole sets are resampled, because rounds of one set are correlated through memory placement and background load:
    ratios varied by 2-3% from set to set where the rounds explained 1-2%. Resampling rounds gives intervals that are
    too narrow. With few sets a percentile interval is too narrow as well, and is widened by the ratio of Student's t to
    the normal quantile (the expanded percentile interval of Hesterberg, "What Teachers Should Know About the
    Bootstrap", 2015).

    That interval is for the ratio itself. A second estimate has the same error as the first, so their difference is
    sqrt(2) times as wide, and the interval is widened by that: of 10 repeats of MiniLM against its half, 6 fell into
    the first one's unwidened interval.
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
    """Why the interval of dense against dense is too far from 1 or too wide, or None where it is neither."""
    interval = f"dense vs. dense {control.estimate:.3f} [{control.low:.3f}, {control.high:.3f}]"
    if not control.low <= 1 <= control.high:
        return f"{interval} misses 1: one session was faster throughout"
    if control.high - control.low > CONTROL_WIDTH:
        return f"{interval} is wider than {CONTROL_WIDTH:.2f}: the machine was too noisy"
    return None


def judge(speedup: Interval, control: Interval) -> tuple[Verdict, str | None]:
    """The verdict on a measurement, and the reason where it is inconclusive."""
    if fault := control_fault(control):
        return "inconclusive", fault
    if speedup.low > 1:
        return "faster", None
    return ("slower" if speedup.high < 1 else "no difference shown"), None

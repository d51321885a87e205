"""Paired differences over seeds, with intervals; crossings of curves."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean over seeds.

    t, bootstrap: 95 % intervals, None with one seed. each: the values, in the order of the seeds.
    """

    mean: float
    t: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    each: tuple[float, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """The mean with Student's t interval, and the percentile bootstrap of the mean (10,000 resamples, always the same).

    With three seeds the bootstrap is too narrow (it has 10 different means): t is the one to read.
    """
    x = np.asarray(values, float)
    mean = float(x.mean())
    if len(x) < 2:
        return Estimate(mean, None, None, tuple(x.tolist()))
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    means = x[np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))].mean(axis=1)
    return Estimate(mean, (mean - half, mean + half), _percentiles(means), tuple(x.tolist()))


def ratio_of_means(above: Sequence[float], below: Sequence[float]) -> Estimate | None:
    """mean(above) / mean(below), paired by seed, such as the share of an oracle's gain; the t interval is Fieller's.

    None where the denominator's mean is not above 0: there is no gain to share.
    """
    a, b = np.asarray(above, float), np.asarray(below, float)
    if b.mean() <= 0:
        return None
    ratio, each = float(a.mean() / b.mean()), tuple((a / b).tolist())
    if len(a) < 2:
        return Estimate(ratio, None, None, each)
    picked = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    below_means = b[picked].mean(axis=1)
    positive = below_means > 0
    boot = _percentiles(a[picked].mean(axis=1)[positive] / below_means[positive])
    return Estimate(ratio, _fieller(a, b), boot, each)


def _fieller(a: np.ndarray, b: np.ndarray) -> tuple[float, float] | None:
    """All r for which mean(a - r b) does not differ from 0 by a t test; None where they have no end."""
    n = len(a)
    t2 = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) ** 2 / n
    covariance = np.cov(a, b, ddof=1)
    # (mean_a - r mean_b)^2 <= t2 (var_a - 2 r cov + r^2 var_b), a quadratic in r
    two = b.mean() ** 2 - t2 * covariance[1, 1]
    one = -2 * (a.mean() * b.mean() - t2 * covariance[0, 1])
    zero = a.mean() ** 2 - t2 * covariance[0, 0]
    inside = one**2 - 4 * two * zero
    if two <= 0 or inside < 0:
        return None
    low, high = sorted((-one + sign * np.sqrt(inside)) / (2 * two) for sign in (-1, 1))
    return float(low), float(high)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def crossing(x: Sequence[float], y: Sequence[Any], goal: float) -> float | None:
    """The first x at which the curve, straight between its points, is at `goal` or below; None if it never is."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    if points and points[0][1] <= goal:
        return float(points[0][0])
    for (at, value), (next_at, next_value) in itertools.pairwise(points):
        if next_value <= goal:
            return float(at + (next_at - at) * (value - goal) / (value - next_value))
    return None


def at(x: Sequence[float], y: Sequence[Any], where: float) -> float | None:
    """The curve at `where`; None outside its points."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    if not points or not points[0][0] <= where <= points[-1][0]:
        return None
    return float(np.interp(where, [a for a, _ in points], [b for _, b in points]))

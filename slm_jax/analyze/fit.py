"""A result as the logarithm of a line in the loss (Rho-1, arXiv 2404.07965, Eq 7 and App F)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEAST = 1e-12  # below it the logarithm is held, so that a search may pass where the line is negative


class LogFit(NamedTuple):
    """result = log(a * loss + c). error: root of the mean squared distance; r_squared: share of the variance explained,
    at most 1, None where the results do not vary."""

    a: float
    c: float
    error: float
    r_squared: float | None
    points: int

    def at(self, loss: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        return np.log(np.maximum(self.a * loss + self.c, LEAST))


def fit_log(loss: Float[np.ndarray, "P"], result: Float[np.ndarray, "P"]) -> LogFit | None:
    """Least squares in the result; the sign of a is found, not assumed.

    The paper's text and its drawn axes disagree about that sign. Points that are not finite are left out; None for
    fewer than three, or where all losses are one.
    """
    shown = np.isfinite(loss) & np.isfinite(result)
    loss, result = loss[shown].astype(np.float64), result[shown].astype(np.float64)
    if len(loss) < 3 or np.ptp(loss) == 0:
        return None
    from scipy import optimize  # here: half a second of the start of every stage

    mean, scale, level = loss.mean(), loss.std(), result.mean()
    z, y = (loss - mean) / scale, result - level

    def line(p: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(p[0] * z + p[1], LEAST)) - y

    # exp(y) = p0 z + p1 is a line: solved with the weights that make its errors those of y, it is where the search
    # begins.
    weights = np.exp(-y)
    start = np.linalg.lstsq(np.stack([z * weights, weights], axis=1), np.exp(y) * weights, rcond=None)[0]
    if (start[0] * z + start[1]).min() <= 0:
        start = np.array([0.0, np.exp(y).mean()])
    slope, middle = optimize.least_squares(line, start, xtol=1e-14, ftol=1e-14, gtol=1e-14).x
    residual = line(np.array([slope, middle]))
    return LogFit(
        a=float(np.exp(level) * slope / scale),
        c=float(np.exp(level) * (middle - slope * mean / scale)),
        error=float(np.sqrt(np.mean(residual**2))),
        r_squared=1 - float(np.sum(residual**2)) / float(np.sum(y**2)) if np.ptp(result) > 0 else None,
        points=len(loss),
    )

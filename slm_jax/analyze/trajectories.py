"""How the loss of each token moves over the checkpoints of a run: a line, a class, and what is left around the line.

Rho-1 (arXiv 2404.07965) §2.1 and App D.1. Pure functions of losses [C, T]: C checkpoints in the order of training, T
tokens. No class depends on the order of the tokens.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8, Integer

# A class is an index into CLASSES; NO_CLASS for a token without a finite loss under every checkpoint.
CLASSES = ("H→H", "L→H", "H→L", "L→L")
HIGH, RISING, FALLING, LOW = range(4)
NO_CLASS = -1


class Lines(NamedTuple):
    """The least-squares line through each token's losses, in nats; all arrays are [T].

    mean: of the losses, where the line is in the middle. change: ΔL = L_end - L_start, the line at the last checkpoint
    less the line at the first. variance: the mean squared distance of the losses from the line.
    """

    mean: Float[np.ndarray, "T"]
    change: Float[np.ndarray, "T"]
    variance: Float[np.ndarray, "T"]


def fit_lines(losses: Float[np.ndarray, "C T"]) -> Lines:
    """Fits l = a x + b to each token, with x = 0, ..., C - 1: checkpoints count as evenly spaced, as in the paper.

    NaN where one of a token's losses is not finite. At least two checkpoints.
    """
    count = len(losses)
    assert count >= 2, "a line needs two checkpoints"
    known = np.isfinite(losses).all(axis=0)
    mean, slope, variance = (np.where(known, 0.0, np.nan) for _ in range(3))
    centred = np.arange(count) - (count - 1) / 2

    def checkpoints() -> Iterator[tuple[float, np.ndarray]]:
        # One after the other, so that the sums of a token do not depend on where in the array it stands.
        for x, loss in zip(centred.tolist(), losses, strict=True):
            yield x, np.where(known, loss, 0.0).astype(np.float64)

    for x, loss in checkpoints():
        mean += loss / count
        slope += loss * (x / np.sum(centred**2))
    for x, loss in checkpoints():
        variance += (loss - (mean + slope * x)) ** 2 / count
    return Lines(mean, slope * (count - 1), variance)


def classify(
    losses: Float[np.ndarray, "C T"],
    lines: Lines,
    rise: float = 0.2,
    fall: float = 0.2,
    high: float | None = None,
) -> tuple[Int8[np.ndarray, "T"], float]:
    """The class of each token (App D.1), and the loss that divides high from low.

    Args:
      losses: of the tokens.
      lines: of the same losses.
      rise: a token whose line rises by more than this is L→H.
      fall: one whose line falls by more than this is H→L.
      high: one that does neither is H→H if its last loss is above this, else L→L. None is the mean of the last losses
        of all tokens that have a class.
    """
    change, last = lines.change, losses[-1]
    known = np.isfinite(change)
    # The exact sum: the mean does not depend on the order of the tokens.
    mean = math.fsum(last[known].tolist()) / known.sum() if known.any() else math.nan
    divides = float(mean if high is None else high)
    with np.errstate(invalid="ignore"):
        classes = np.where(last > divides, HIGH, LOW)
        classes[change > rise] = RISING
        classes[change < -fall] = FALLING
    return np.where(known, classes, NO_CLASS).astype(np.int8), divides


def class_counts(classes: Integer[np.ndarray, "T"]) -> list[int]:
    """How many tokens are of each class."""
    return np.bincount(classes[classes >= 0], minlength=len(CLASSES)).tolist()


def class_means(losses: Float[np.ndarray, "C T"], classes: Integer[np.ndarray, "T"]) -> Float[np.ndarray, "K C"]:
    """The mean loss of each class under each checkpoint (Figure 3a); NaN for a class without tokens."""
    means = np.full((len(CLASSES), len(losses)), np.nan)
    for kind in np.unique(classes[classes >= 0]):
        means[kind] = losses[:, classes == kind].mean(axis=1, dtype=np.float64)
    return means


def most_fluctuating(
    classes: Integer[np.ndarray, "T"],
    variance: Float[np.ndarray, "T"],
    kind: int,
    ids: Integer[np.ndarray, "T"],
    count: int,
) -> Integer[np.ndarray, "E"]:
    """Up to `count` tokens of a class with the highest variance around their line, highest first, no vocabulary id
    (`ids`) twice."""
    mine = np.flatnonzero(classes == kind)
    mine = mine[np.argsort(-variance[mine], kind="stable")]
    _, first = np.unique(ids[mine], return_index=True)
    return mine[np.sort(first)][:count]

"""Summarises the judged answers to a question set."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

NORMAL_95 = 1.959964  # standard deviations around the mean that hold 95 % of a normal distribution

Row = dict[str, Any]


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) for a proportion of `right` out of `count`."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracies in [0, 1] with their intervals, and how the outputs ended.

    `accuracy` is pass@1: the fraction of a question's samples that are correct, averaged over questions. `published` is
    the same by the rules of published numbers (`equality.Verdict`), `majority` that of each question's most frequent
    answer. `not_compared` counts comparisons that exceeded their time or memory.
    """

    def accuracy(rights: Sequence[float]) -> dict[str, Any]:
        low, high = wilson(sum(rights), len(rights))
        return {"accuracy": sum(rights) / len(rights), "interval": [low, high]}

    def share(row: Row, verdict: str) -> float:
        return sum(sample[verdict] for sample in row["samples"]) / max(len(row["samples"]), 1)

    samples = [sample for row in rows for sample in row["samples"]]
    summary = {"questions": len(rows), **accuracy([share(row, "correct") for row in rows])}
    summary["published"] = accuracy([share(row, "published") for row in rows])
    if any(len(row["samples"]) > 1 for row in rows):
        summary["majority"] = accuracy([float(row["majority"]["correct"]) for row in rows])
    summary["without_answer"] = sum(not sample["answer"] for sample in samples)
    summary["ended"] = dict(sorted(Counter(sample["ended"] for sample in samples).items()))
    summary["shots"] = {str(shots): count for shots, count in sorted(Counter(row["shots"] for row in rows).items())}
    summary["too_long"] = sum(not row["samples"] for row in rows)
    summary["not_compared"] = sum(row["not_compared"] for row in rows)
    if "programs" in next(iter(samples), {}):
        summary["programs"] = dict(sorted(Counter(end for sample in samples for end in sample["programs"]).items()))
    return summary

"""What was asked and answered, one JSON line a question, kept while the work goes on; and what it sums up to."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax import config as config_lib
from slm_jax.errors import UserError

NORMAL_95 = 1.959964  # quantile of the normal distribution that 95 % lie within, on both sides

Row = dict[str, Any]


class Results:
    """The folder of one set: `about.json` says what its answers depend on, `results.jsonl` holds them.

    Rows come in batches that were answered together, and a batch that was not finished is asked again whole: what
    chance gives an answer depends on its place in the batch.

    Args:
        folder: of the set.
        about: what the answers depend on; plain JSON values.
        batch: questions that are answered together.

    Raises:
        UserError: the folder holds answers that depend on something else.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], batch: int):
        self._folder, self._batch = Path(folder), batch
        now: dict[str, Any] = json.loads(json.dumps(config_lib.to_json(dict(about))))
        path = self._folder / "about.json"
        there = json.loads(path.read_text()) if path.exists() else now
        if other := sorted(name for name in now | there if now.get(name) != there.get(name)):
            name = other[0]
            raise UserError(
                f"{folder} holds answers with {name} = {there.get(name)!r}, now it is {now.get(name)!r}: choose "
                "another solve.output, or delete the folder"
            )
        config_lib.write_json(path, now)

    def rows(self) -> list[Row]:
        """The rows of all finished batches; what a kill cut is removed from the file."""
        path = self._folder / "results.jsonl"
        found: list[Row] = []
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            try:
                found.append(json.loads(line if line.endswith(b"\n") else b""))
            except ValueError:
                break
        complete = bool(found) and found[-1].get("last", False)
        kept = found if complete else found[: len(found) // self._batch * self._batch]
        if len(kept) < len(lines):
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(b"".join(lines[: len(kept)]))
            os.replace(partial, path)
        return kept

    def append(self, rows: Sequence[Row]) -> None:
        with (self._folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share, of `right` out of `count`."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracies in [0, 1] with their intervals, and how the outputs ended.

    `accuracy` is the mean over questions of the share of its samples that are right (pass@1); `published` the same by
    the rules of published numbers (`equality.Verdict`); `majority` that of the most frequent answer of each question.
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
    if "programs" in next(iter(samples), {}):
        summary["programs"] = dict(sorted(Counter(end for sample in samples for end in sample["programs"]).items()))
    return summary

"""Per-token losses that an evaluator keeps while a run trains: score columns of its held-out corpus.

The column of a step is called EVALUATOR-RUN-STEP, where RUN is a hash of the run directory's absolute path: runs that
share a corpus and an evaluator's name do not collide, and a run that starts anew in the same directory overwrites its
own columns. Only the evaluator's rows are finished: a column of all rows is a score like any other.
"""

import hashlib
import os
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from slm_jax.data.corpus import Corpus


class KeptLosses(NamedTuple):
    """Losses of the first N rows of a corpus in nats; NaN where a token has none or does not count."""

    corpus: str
    losses: Float[np.ndarray, "N L"]


def kept_column(run: str | os.PathLike, evaluator: str, step: int) -> str:
    """The name of the column of a run's evaluator at a step."""
    place = os.fspath(run)
    place = place if "://" in place else os.path.abspath(place)
    return f"{evaluator}-{hashlib.sha256(place.encode()).hexdigest()[:6]}-{step}"


def write_kept_losses(run: str | os.PathLike, evaluator: str, step: int, kept: KeptLosses) -> None:
    """Writes the column of a step; a run that was killed after it writes the same values again."""
    name, rows = kept_column(run, evaluator, step), len(kept.losses)
    reference = {"run": os.fspath(run), "evaluator": evaluator, "step": step, "rows": rows}
    # A hash of the parameters would cost too much at each evaluation; this identifies the model as well.
    reference |= {"fingerprint": f"{name} of {rows} rows"}
    Corpus.open(kept.corpus).create_score(name, reference=reference).write(0, {"loss": kept.losses})

"""Reading batches is at least fifty times as fast as what the training step eats, on one core.

    python benchmarks/batches.py --output FILE

`Plan.batch` through `read_ahead` from a corpus on disk, rows shuffled and a score column joined, in tokens per second
against the demo's training step: causal, and filtered, which eats the most. Everything runs on one core.
"""

import os
import tempfile
from pathlib import Path

import measure
import numpy as np
import pyarrow
import step

from slm_jax.data.batches import read_ahead
from slm_jax.data.corpus import Corpus, CorpusWriter
from slm_jax.data.mixture import MixtureComponent
from slm_jax.data.store import SHARD_ROWS, Store
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.experiment.jobs import ONE_CORE
from slm_jax.models.model_config import model_config
from slm_jax.score.selection import Selection
from slm_jax.train.phases import Phase
from slm_jax.train.plan import Plan

BATCH_ROWS, SEQUENCE_LENGTH = 16, 256  # as in the recipe math_web
VOCAB_SIZE = 2048
SELECTION = Selection(score="excess", ratio=0.6, gradient="filtered")


def write_corpus(path: Path, num_rows: int) -> Corpus:
    """Rows of random bytes in segments of about a hundred tokens, with a score column `reference`."""
    rng, vocabulary = np.random.default_rng(0), ByteVocabulary()
    writer = CorpusWriter(Store(path), num_rows, SEQUENCE_LENGTH, vocabulary)
    for begin in range(0, num_rows, SHARD_ROWS):
        shape = (min(SHARD_ROWS, num_rows - begin), SEQUENCE_LENGTH)
        segments = np.cumsum(rng.random(shape) < 0.01, axis=1) + 1
        writer.write(
            {
                "tokens": rng.integers(3, vocabulary.size, shape).astype(np.uint16),
                "segment_ids": segments.astype(np.uint16),
                "loss_mask": np.ones(shape, bool),
                "source_ids": np.zeros(shape, np.uint8),
            }
        )
    corpus = writer.finish(pyarrow.table({"id": ["random:0"]}), ["random"], {"settings": {}})
    column = corpus.create_score("reference", ("loss",), reference={"fingerprint": "random"})
    for start, stop in column.pending():
        column.write(start, {"loss": rng.uniform(0, 15, (stop - start, SEQUENCE_LENGTH)).astype(np.float32)})
    return corpus


def main() -> None:
    arguments = measure.parser(__doc__, repeats=9).parse_args()
    measure.restarted_with(ONE_CORE)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    num_rows, steps = 16384, 5
    if arguments.quick:
        num_rows, steps, arguments.repeats = 2048, 1, 3
    load = measure.load_average()
    rounds = measure.Rounds(arguments.repeats, arguments.clock)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus", num_rows)
        num_batches = num_rows // BATCH_ROWS
        draw = MixtureComponent(corpus.path, epochs=100.0)
        plan = Plan([Phase(num_batches, mixture=[draw], batch_size=BATCH_ROWS, selection=SELECTION)], seed=0)
        trainer = step.Trainer(model_config("demo", vocab_size=VOCAB_SIZE), plan.batch(0))
        causal, filtered = trainer.step(None)[0], trainer.step(SELECTION)[0]

        def read() -> None:
            assert sum(1 for _ in read_ahead(plan.batch, 0, num_batches)) == num_batches

        def train(function) -> None:
            for _ in range(steps):
                function()

        tokens = BATCH_ROWS * SEQUENCE_LENGTH
        cases = [
            measure.Case("batches", read, num_batches * tokens),
            measure.Case("causal step", lambda: train(causal), steps * tokens),
            measure.Case("filtered step", lambda: train(filtered), steps * tokens),
        ]
        values = measure.interleaved(cases, rounds)
    about = {"batch": f"{BATCH_ROWS} x {SEQUENCE_LENGTH}", "corpus_rows": num_rows, "model": "demo"}
    rows = [
        measure.row(name, values[name], baseline, values[baseline], "tokens/s", **about)
        for name, baseline in [("batches", "causal step"), ("batches", "filtered step"), ("causal step", "causal step")]
    ]
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()

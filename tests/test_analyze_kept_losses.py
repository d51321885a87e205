"""Token losses that evaluators keep in training: columns that runs do not take from one another."""

import shutil

import numpy as np
import toy

from slm_jax.analyze.columns import read_kept_losses
from slm_jax.data.corpus import Corpus
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.run_directory import RunDirectory


def train(run, corpus: Corpus, every: int, **settings) -> None:
    held = HeldOut("held", corpus.path, rows=8, batch_size=8, keep_tokens=True)
    toy.train_here(run, [toy.phase(corpus, steps=4)], evaluators=[held], evaluate_every=every, **settings)


def test_runs_that_share_a_corpus_keep_their_own(corpus_copy, tmp_path):
    found = {}
    for seed in (0, 1):
        run = tmp_path / str(seed) / "run"
        train(run, corpus_copy, 2, seed=seed)
        path, losses = read_kept_losses(str(run), "held")
        assert path == corpus_copy.path and losses.steps == [0, 2, 4]
        rows = [row["held/loss"] for row in RunDirectory(run).metrics() if "held/loss" in row]
        np.testing.assert_allclose(np.nanmean(losses.values, axis=(1, 2)), rows, rtol=1e-6)
        found[seed] = losses.values
    assert not np.array_equal(found[0], found[1], equal_nan=True)
    assert len(corpus_copy.score_names()) == 6


def test_columns_that_an_earlier_run_left_are_not_read(corpus_copy, tmp_path):
    run = tmp_path / "run"
    train(run, corpus_copy, 1)
    shutil.rmtree(run)
    train(run, corpus_copy, 2, seed=1)
    assert len(corpus_copy.score_names()) == 5
    _, losses = read_kept_losses(str(run), "held")
    assert losses.steps == [0, 2, 4]
    last = RunDirectory(run).metrics()[-1]["held/loss"]
    np.testing.assert_allclose(np.nanmean(losses.values[-1]), last, rtol=1e-6)


def test_a_name_that_no_column_can_have_is_refused_at_once(corpus_copy, tmp_path):
    held = HeldOut("held out", corpus_copy.path, keep_tokens=True)
    phases = [toy.phase(corpus_copy, steps=4)]
    assert "'held out-" in toy.refusal(toy.train_here, tmp_path / "run", phases, evaluators=[held], evaluate_every=2)

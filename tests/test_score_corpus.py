"""The stage `score`: the column is the reference's loss, made once, for this corpus and this vocabulary."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.checkpoint import read_about, save_params
from slm_jax.data.batches import read_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.scores import ScoreColumn
from slm_jax.data.store import SHARD_ROWS
from slm_jax.models import forward
from slm_jax.models.trained_model import load_model, run_vocabulary
from slm_jax.run_directory import RunDirectory
from slm_jax.score.score_corpus import score
from slm_jax.score.selection import Selection
from slm_jax.score.token_loss import predicted


def score_here(corpus: Corpus, reference: Path, **settings) -> None:
    """`score` in this process, on one device."""
    with toy.one_device():
        score(str(corpus.path), str(reference), **settings)


def read_column(corpus: Corpus, name: str = "reference", statistic: str = "loss") -> np.ndarray:
    column = f"scores/{name}/{statistic}"
    return Corpus.open(corpus.path).read(np.arange(corpus.num_rows), [column])[column]


@pytest.fixture(scope="module")
def scored(corpus, reference, tmp_path_factory) -> Corpus:
    """A copy of the corpus with a finished column of losses and entropies."""
    copy = Corpus.open(shutil.copytree(corpus.path, tmp_path_factory.mktemp("scored") / "corpus"))
    score_here(copy, reference, statistics=("loss", "entropy"))
    return copy


def test_the_column_is_the_softmax_of_the_references_logits(scored, reference):
    """Against all logits at once in float64: the loss is at the token it describes, and 0 where there is none."""
    rows = np.arange(scored.num_rows)
    batch = read_batch([scored], np.zeros(len(rows), np.int64), rows)
    with toy.one_device():
        model = load_model(str(reference), mesh_lib.make_mesh())
    hidden = forward.hidden_states(
        model.params, model.config, *(jnp.asarray(x) for x in (batch.tokens, batch.positions, batch.segment_ids))
    )
    logits = np.asarray(forward.logits(model.params, model.config, hidden), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = np.zeros(batch.tokens.shape)
    loss[:, 1:] = -np.take_along_axis(log_p[:, :-1], batch.tokens[:, 1:, None], -1)[..., 0]
    entropy = np.zeros(batch.tokens.shape)
    entropy[:, 1:] = -(np.exp(log_p) * log_p).sum(-1)[:, :-1]
    has_loss = np.asarray(predicted(jnp.asarray(batch.segment_ids)))
    assert 0.5 < has_loss.mean() < 1
    np.testing.assert_allclose(read_column(scored), np.where(has_loss, loss, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        read_column(scored, statistic="entropy"), np.where(has_loss, entropy, 0), rtol=1e-5, atol=1e-6
    )


def test_entropy_lies_between_none_and_uniform(scored):
    entropy = read_column(scored, statistic="entropy")
    assert entropy.min() >= 0 and entropy.max() <= math.log(toy.MODEL.vocab_size)
    assert entropy.max() > 0.5 * math.log(toy.MODEL.vocab_size)  # after 6 steps it knows little


def test_eight_devices_score_as_one(corpus_copy, scored, reference):
    score(str(corpus_copy.path), str(reference), batch_size=8)
    np.testing.assert_allclose(read_column(corpus_copy), read_column(scored), rtol=1e-5, atol=1e-6)


def test_rows_do_not_depend_on_the_batch_and_its_padding(corpus_copy, scored, reference):
    score_here(corpus_copy, reference, batch_size=36)  # 96 = 2 x 36 + 24
    np.testing.assert_allclose(read_column(corpus_copy), read_column(scored), rtol=1e-5, atol=1e-6)


def test_a_column_names_its_reference_and_its_step(scored, reference):
    about = scored.score("reference").reference
    assert about["run"] == str(reference) and about["step"] == 6
    with toy.one_device():
        model = load_model(str(reference), mesh_lib.make_mesh(), 3)
    assert model.step == 3 and model.fingerprint != about["fingerprint"]


KILLED = """
import os, signal, sys
from slm_jax.__main__ import main
from slm_jax.data.scores import ScoreColumn
write = ScoreColumn.write
def write_or_die(column, start, values):
    if start == 256:
        os.kill(os.getpid(), signal.SIGKILL)
    write(column, start, values)
ScoreColumn.write = write_or_die
main(sys.argv[1:])
"""


def test_killed_in_the_middle_it_scores_only_what_is_missing(reference, tmp_path, monkeypatch):
    """The second chunk of three is lost with the process; a third start has nothing to do."""
    corpus = toy.write_corpus(tmp_path / "corpus", seed=2, rows=2 * SHARD_ROWS + 40)
    arguments = ["score", *toy.settings(score={"corpus": corpus.path, "reference": str(reference), "batch_size": 64})]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    message = toy.refusal(toy.train_here, tmp_path / "run", [toy.phase(corpus, selection=Selection(score="reference"))])
    assert f"half finished ({SHARD_ROWS} of {corpus.num_rows} rows): run the same `score` again" in message

    written, write = [], ScoreColumn.write

    def counted(column: ScoreColumn, start: int, values) -> None:
        written.append(start)
        write(column, start, values)

    monkeypatch.setattr(ScoreColumn, "write", counted)
    for _ in range(2):
        score_here(corpus, reference, batch_size=64)
        assert written == [SHARD_ROWS, 2 * SHARD_ROWS]
    score_here(corpus, reference, batch_size=64, name="whole")
    np.testing.assert_array_equal(read_column(corpus), read_column(corpus, "whole"))


def change_manifest(corpus: Corpus, **vocabulary) -> Corpus:
    path = Path(corpus.path) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["vocabulary"] |= vocabulary
    path.write_text(json.dumps(manifest))
    return Corpus.open(corpus.path)


def test_what_does_not_fit_is_refused(corpus_copy, reference, tmp_path):
    def refused(code: str, corpus: Corpus = corpus_copy, **settings) -> str:
        return toy.refused(code, score_here, corpus, reference, **settings)

    long = toy.write_corpus(tmp_path / "long", rows=4, sequence_length=2 * toy.MODEL.max_length)
    assert "128 tokens" in (line := refused("rows-too-long", long)) and str(reference) in line and "64" in line
    assert "no checkpoint of step 4: it has 3, 6" in toy.refusal(score_here, corpus_copy, reference, step=4)
    assert "holds no checkpoints" in toy.refusal(score_here, corpus_copy, tmp_path)
    assert "entropy" in refused("score-statistics", statistics=("entropy",))
    assert "surprise" in refused("setting-unknown-value", statistics=("loss", "surprise"))
    assert "int8" in refused("setting-unknown-value", dtype="int8")
    assert not (Path(corpus_copy.path) / "scores").exists()
    foreign = change_manifest(corpus_copy, content_hash="0123456789abcdef")
    assert "0123456789ab" in refused("vocabulary-mismatch", foreign)
    assert not (Path(corpus_copy.path) / "scores").exists()


def test_another_reference_or_another_corpus_does_not_mix_into_a_column(corpus_copy, scored, reference, tmp_path):
    score_here(corpus_copy, reference)
    assert "reference" in toy.refused("score-other-settings", score_here, corpus_copy, reference, step=3)
    other = toy.write_corpus(tmp_path / "other", seed=9)
    shutil.copytree(Path(scored.path) / "scores", Path(other.path) / "scores")
    assert "was made for a corpus with fingerprint" in toy.refusal(score_here, other, reference)
    selective = [toy.phase(other, selection=Selection())]
    assert "was made for a corpus with fingerprint" in toy.refusal(toy.train_here, tmp_path / "run", selective)


def test_a_damaged_reference_is_one_line(corpus_copy, reference, tmp_path):
    for part in ("params", "about"):
        run = shutil.copytree(reference, tmp_path / part)
        shutil.rmtree(run / "checkpoints" / "6" / part)
        assert "checkpoint 6 of" in (line := toy.refusal(score_here, corpus_copy, run)) and "cannot be read" in line


def test_a_reference_that_computes_nan_is_refused(corpus_copy, reference, tmp_path):
    with toy.one_device():
        model = load_model(str(reference), mesh_lib.make_mesh())
    scale = model.params["final_norm"]["scale"].at[0].set(jnp.nan)
    about = {name: value for name, value in read_about(reference).items() if name in ("model", "vocabulary_hash")}
    save_params(tmp_path / "run", 0, model.params | {"final_norm": {"scale": scale}}, about)
    line = toy.refused("score-not-finite", score_here, corpus_copy, tmp_path / "run")
    assert str(tmp_path / "run") in line
    assert "0 of 96 rows" in toy.refusal(corpus_copy.score, "reference")


def test_a_reference_that_is_the_model_itself_is_refused(scored, reference, tmp_path):
    """Every excess would be 0; asked for, it trains, and the first excess is."""
    phases = [toy.phase(scored, steps=2, selection=Selection())]
    start = {"init_from": str(reference)}
    message = toy.refused("reference-is-initial-model", toy.train_here, tmp_path / "run", phases, **start)
    assert scored.path in message and "allow_equal_reference" in message
    toy.train_here(tmp_path / "run", phases, **start, allow_equal_reference=True)
    assert len(RunDirectory(tmp_path / "run").metrics()) == 2
    toy.train_here(tmp_path / "third", phases, init_from=str(reference), init_step=3)  # another model of that run
    assert len(RunDirectory(tmp_path / "third").metrics()) == 2


def test_a_run_keeps_the_vocabulary_of_its_model(corpus, reference, tmp_path):
    about = read_about(reference)
    assert run_vocabulary(str(reference), about["vocabulary_hash"]).content_hash == corpus.vocabulary_hash
    assert "ffff" in toy.refused("vocabulary-mismatch", run_vocabulary, str(reference), "ffff")
    line = toy.refused("model-without-vocabulary", run_vocabulary, str(tmp_path), about["vocabulary_hash"])
    assert str(tmp_path) in line

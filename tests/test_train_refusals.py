"""The stage `train`: what stops a run, and what it refuses, each in one line."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from slm_jax import checkpoint, processes
from slm_jax import mesh as mesh_lib
from slm_jax.checkpoint import Checkpoints
from slm_jax.data.corpus import Corpus
from slm_jax.files import to_json
from slm_jax.mesh import MeshConfig
from slm_jax.models.trained_model import load_model
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import Selection
from slm_jax.train.schedules import constant_schedule, cosine_schedule


def poisoned(reference: Path, path: Path, token: int) -> str:
    """A run directory whose model has NaN in one token's embedding."""
    params = load_model(str(reference), mesh_lib.make_mesh(devices=jax.devices()[:1])).params
    params["embed"]["embedding"] = params["embed"]["embedding"].at[token].set(np.nan)
    checkpoints = Checkpoints(path)
    about = to_json(checkpoint.read_about(reference))
    checkpoints.save(1, {"params": params}, about)
    checkpoints.close()
    return str(path)


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_source(corpus, reference, tmp_path):
    other = toy.write_corpus(tmp_path / "other", seed=1, sources=("tainted",), words=["QQ"])
    initial = poisoned(reference, tmp_path / "poisoned", token=3 + ord("Q"))
    phases = [toy.phase(corpus, steps=2), toy.phase(corpus, other, steps=2)]
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is not finite, in source tainted \(\d+ tokens\);"):
        toy.train_here(tmp_path / "run", phases, init_from=initial, checkpoint_every=1)
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps()[-1] == 2  # not of the step that failed
    checkpoints.close()
    assert [step for step, _ in toy.losses(tmp_path / "run")] == [1, 2]


def test_a_gradient_that_is_no_number_stops_the_run(corpus, tmp_path):
    """A rate that throws the parameters to 1e30: the next step must not be taken for training."""
    with pytest.raises(FloatingPointError, match=r"step 2: the (loss|gradient) is not finite.*lower peak"):
        toy.train_here(tmp_path / "run", [toy.phase(corpus)], schedule=constant_schedule(peak=1e30, warmup=0.0))
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps() == [0]  # of the start, not of the step that failed
    checkpoints.close()


def add_column(corpus: Corpus, not_finite: int) -> None:
    """A column `reference` with random losses, of which `not_finite` valid ones are NaN or infinite."""
    valid = corpus.read(np.arange(corpus.num_rows), ["loss_mask"])["loss_mask"]
    valid[:, 0] = False
    loss = np.random.default_rng(0).uniform(0, 9, valid.shape).astype(np.float32)
    places = np.argwhere(valid)
    for i, place in enumerate(places[np.random.default_rng(1).permutation(len(places))[:not_finite]]):
        loss[tuple(place)] = (np.nan, np.inf, -np.inf)[i % 3]
    corpus.create_score("reference", reference={"fingerprint": "another"}).write(0, {"loss": loss})


def test_scores_that_are_no_numbers_are_counted_and_limited(corpus_copy, tmp_path):
    """12 steps of 8 rows read every row once, so every such score once; they never train."""
    add_column(corpus_copy, not_finite=30)
    everything = [toy.phase(corpus_copy, steps=12, selection=Selection(ratio=1.0))]
    toy.train_here(tmp_path / "run", everything, max_nonfinite_scores=0.5)
    rows = [row for row in RunDirectory(tmp_path / "run").metrics() if "loss" in row]
    assert sum(row["nonfinite_scores"] for row in rows) == 30
    assert rows[-1]["tokens_seen"] - rows[-1]["tokens_trained"] == 30
    strict = {"max_nonfinite_scores": 0.0}
    message = toy.refused("scores-not-finite", toy.train_here, tmp_path / "strict", everything, **strict)
    assert message.startswith("step ") and "train.max_nonfinite_scores" in message


def test_a_column_that_is_missing_half_finished_or_lacks_what_is_needed(corpus_copy, tmp_path):
    def refused(code: str, selection: Selection) -> str:
        return toy.refused(code, toy.train_here, tmp_path / "run", [toy.phase(corpus_copy, selection=selection)])

    assert "'reference'" in refused("score-not-found", Selection())
    column = corpus_copy.create_score("reference", reference={"fingerprint": "another"})
    assert "0 of 96 rows" in refused("score-unfinished", Selection())
    column.write(0, {"loss": np.zeros((96, toy.SEQUENCE_LENGTH), np.float32)})
    assert "entropy" in refused("score-no-statistic", Selection(score="entropy"))
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_run_is_refused(corpus, reference, tmp_path, capsys):
    run = shutil.copytree(reference, tmp_path / "run")
    again = {"seed": 100, "checkpoint_every": 3}

    def message(phases=None, **changed) -> str:
        settings = {**again, **changed}
        return toy.refused("resume-other-run", toy.train_here, run, phases or [toy.phase(corpus)], **settings)

    deeper = message(model=dataclasses.replace(toy.MODEL, num_layers=3))
    assert "model.num_layers 2" in deeper and "train.run_dir" in deeper
    assert "seed 100" in message(seed=7)
    manifest = tmp_path / "corpus" / "manifest.json"
    copy = Corpus.open(shutil.copytree(corpus.path, tmp_path / "corpus"))
    vocabulary = json.loads(manifest.read_text())
    vocabulary["vocabulary"]["content_hash"] = "0123456789abcdef"
    manifest.write_text(json.dumps(vocabulary))
    assert "vocabulary" in message([toy.phase(copy)])
    # What may change is used, and said.
    before = toy.losses(run)
    capsys.readouterr()
    toy.train_here(run, [toy.phase(corpus, steps=8)], **again)
    assert "train: phases was [{" in capsys.readouterr().out
    assert toy.losses(run)[:6] == before and toy.losses(run)[-1][0] == 8


def test_a_finished_run_does_not_become_another(corpus, reference, tmp_path, capsys):
    """The same settings give its summary; others, or fewer steps, are refused, and run.json stays what it was."""
    run = shutil.copytree(reference, tmp_path / "run")
    record = (run / "run.json").read_text()
    again = {"seed": 100, "checkpoint_every": 3}
    assert toy.train_here(run, [toy.phase(corpus)], **again)["steps"] == 6
    assert f"{run} already has its 6 steps" in capsys.readouterr().out

    def refused(code: str, steps: int = 6, **changed) -> str:
        return toy.refused(code, toy.train_here, run, [toy.phase(corpus, steps=steps)], **again, **changed)

    assert "schedule" in refused("resume-finished-run", schedule=constant_schedule(peak=1e-4))
    assert "6 steps" in refused("resume-finished-run", steps=4)
    (run / "summary.json").unlink()
    fewer = refused("resume-past-end", steps=4)
    assert "step 6" in fewer and "now has 4" in fewer
    assert (run / "run.json").read_text() == record


def test_a_changed_data_order_is_refused(corpus, reference, tmp_path):
    """Rows are counted in batches of the phase: another batch size would repeat or skip rows."""
    run = shutil.copytree(reference, tmp_path / "run")
    phase = dataclasses.replace(toy.phase(corpus), batch_size=16, steps=9)
    message = toy.refused("resume-other-rows", toy.train_here, run, [phase], seed=100)
    assert "batch_size 8 in phase 0, now 16" in message


def test_two_processes_do_not_train_in_one_directory(corpus, tmp_path):
    with processes.lock(tmp_path / "run" / "lock", "busy"):
        message = toy.refused("in-use", toy.train_here, tmp_path / "run", [toy.phase(corpus)])
    assert str(tmp_path / "run") in message


def test_a_corpus_that_changed_under_the_run_is_refused(tmp_path):
    path = tmp_path / "corpus"
    toy.train_here(tmp_path / "run", [toy.phase(toy.write_corpus(path))])
    shutil.rmtree(path)
    changed = toy.write_corpus(path, seed=5)
    message = toy.refused("resume-input-changed", toy.train_here, tmp_path / "run", [toy.phase(changed)])
    assert f"corpus {path}" in message and changed.fingerprint[:12] in message


def test_the_initial_models_vocabulary_must_be_the_corpus(corpus_copy, reference, tmp_path):
    path = Path(corpus_copy.path) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["vocabulary"]["content_hash"] = "0123456789abcdef"
    path.write_text(json.dumps(manifest))
    phases = [toy.phase(Corpus.open(corpus_copy.path))]
    start = {"init_from": str(reference)}
    message = toy.refused("init-other-vocabulary", toy.train_here, tmp_path / "new", phases, **start)
    assert str(reference) in message and corpus_copy.path in message


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"mesh": MeshConfig(data=3)}, "3 devices"),
        ({"mesh": MeshConfig(data=-1, fsdp=-1)}, "-1"),
        ({"gradient_accumulation_steps": 3}, "8 rows"),
        ({"model": dataclasses.replace(toy.MODEL, max_length=8)}, "16 tokens"),
        ({"model": dataclasses.replace(toy.MODEL, vocab_size=100)}, "259 ids"),
        ({"schedule": cosine_schedule(warmup=7.0)}, "schedule of phase 0 take 7 + 0 steps"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(changed, named, corpus, tmp_path):
    assert named in toy.refusal(toy.train_here, tmp_path / "run", [toy.phase(corpus)], **changed)
    assert not (tmp_path / "run").exists()


def test_more_rows_than_there_are(corpus, tmp_path):
    few = dataclasses.replace(toy.phase(corpus, steps=13).mixture[0], epochs=1.0)
    phase = dataclasses.replace(toy.phase(corpus, steps=13), mixture=[few])
    message = toy.refused("mixture-too-few-rows", toy.train_here, tmp_path / "run", [phase])
    assert "104 rows" in message and "96" in message and "MixtureComponent.epochs = 2" in message

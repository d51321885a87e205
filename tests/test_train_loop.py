"""The stage `train`: exact resume after any kill, phases, and what a checkpoint survives."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.checkpoint import Checkpoints, restore_params
from slm_jax.data.batches import Batch
from slm_jax.data.corpus import Corpus
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.mesh import MeshConfig
from slm_jax.models.trained_model import load_model
from slm_jax.run_directory import RunDirectory
from slm_jax.score.kept_losses import kept_column
from slm_jax.score.selection import Selection
from slm_jax.score.token_loss import batch_loss, predicted
from slm_jax.train.loop import train
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.plan import Plan
from slm_jax.train.schedules import cosine_schedule, over
from slm_jax.train.state import TrainState, state_shapes

RANDOM_HALF = Selection(score="random", ratio=0.5)


def mesh(**axes: int):
    """A mesh on as many devices as the axes name; one by default."""
    config = MeshConfig(**{"data": 1, **axes})
    return mesh_lib.make_mesh(config, jax.devices()[: config.data * config.fsdp * config.model])


def shapes(devices=None) -> TrainState:
    return state_shapes(toy.MODEL, make_optimizer(OptimizerConfig()), devices or mesh())


def saved(run_dir: Path, devices=None) -> tuple[TrainState, dict]:
    """The last checkpoint as numpy, and what it says of itself."""
    wanted, checkpoints = shapes(devices), Checkpoints(run_dir)
    restored = checkpoints.restore(wanted.items())
    checkpoints.close()
    assert restored is not None
    return jax.tree.map(np.asarray, TrainState.of(restored[0])), restored[1]


def parameters(run_dir: Path, step: int):
    return jax.tree.map(np.asarray, restore_params(run_dir, shapes().params, step))


def assert_equal(tree, other) -> None:
    """To the bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def rows_without_time(run_dir: Path) -> list[dict]:
    rows = RunDirectory(run_dir).metrics()
    return [{name: x for name, x in row.items() if name != "tokens_per_second"} for row in rows]


def last_step(run_dir: Path) -> int:
    return max((row["step"] for row in RunDirectory(run_dir).metrics()), default=0)


@pytest.mark.slow
def test_killed_at_random_steps_and_terminated_it_ends_the_same_to_the_bit(corpus, tmp_path):
    """Two kills, each at a random step after the one before (so within, before or after a save), and a SIGTERM; the
    mixture, the random selection, the schedule, the counters and the evaluations all have to come back."""
    other = toy.write_corpus(tmp_path / "other", seed=1, sources=("b", "c"))
    common = (
        *toy.MODEL_SETTINGS,
        "--gin.Phase.mixture=[@one/MixtureComponent(), @two/MixtureComponent()]",
        *(f"--gin.{name}/MixtureComponent.corpus={c.path!r}" for name, c in (("one", corpus), ("two", other))),
        "--gin.two/MixtureComponent.weight=0.5",
        "--gin.Phase.selection=@Selection()",
        "--gin.train.evaluators=[@HeldOut()]",
        *toy.settings(
            Selection={"score": "random"},
            MixtureComponent={"epochs": 100},
            Phase={"steps": 60, "batch_size": 8},
            cosine_schedule={"peak": 1e-2},
            HeldOut={"name": "held", "corpus": other.path, "rows": 16, "batch_size": 8},
            train={"checkpoint_every": 5, "evaluate_every": 10},
        ),
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def start(run_dir: Path) -> toy.Command:
        return toy.Command(tmp_path / "log", "train", *common, *toy.settings(train={"run_dir": str(run_dir)}))

    code, output = start(whole).finish()
    assert code == 0, output
    rng, step = random.Random(), 0
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        step = last_step(broken) + rng.randint(1, 12)
        code, output = start(broken).when(lambda step=step: last_step(broken) >= step, number)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL), output
        assert last_step(broken) < 60, f"the run was over before step {step} was noticed"
    assert "terminated at step" in output and f"step {last_step(broken)}, saved" in output
    assert not (broken / "summary.json").exists()
    code, output = start(broken).finish()
    assert code == 0, output
    assert "from step 0" not in output

    assert_equal(saved(broken)[0], saved(whole)[0])
    rows = rows_without_time(broken)
    assert rows == rows_without_time(whole)
    assert [step for step, _ in toy.losses(broken)] == list(range(1, 61))
    assert [row["step"] for row in rows if "held/loss" in row] == list(range(0, 61, 10))
    counters = [json.loads((run / "summary.json").read_text()) for run in (broken, whole)]
    assert counters[0]["tokens_seen"] == counters[1]["tokens_seen"] == rows[-2]["tokens_seen"]
    assert counters[0]["tokens_trained"] == counters[1]["tokens_trained"] < counters[1]["tokens_seen"]


def test_training_scoring_and_evaluation_import_no_tensorflow(corpus_copy, tmp_path):
    program = """
import sys
from slm_jax.__main__ import main
stages, step = sys.argv[1:], []
while stages:
    end = stages.index("--")
    assert main(stages[:end]) == 0
    stages = stages[end + 1:]
loaded = {"tensorflow", "seqio", "tensorflow_datasets"} & set(sys.modules)
sys.exit(f"imported: {loaded}" if loaded else 0)
"""
    run, held = str(tmp_path / "run"), {"name": "held", "corpus": corpus_copy.path, "batch_size": 8}
    command = [
        *("train", *toy.MODEL_SETTINGS),
        *toy.settings(
            train={"run_dir": run}, Phase={"steps": 2, "batch_size": 8}, MixtureComponent={"corpus": corpus_copy.path}
        ),
        *("--", "score", *toy.settings(score={"corpus": corpus_copy.path, "reference": run}), "--"),
        *("evaluate", *toy.settings(evaluate={"run": run}, HeldOut=held), "--"),
    ]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "held/loss" in json.loads((tmp_path / "run" / "evaluate" / "2.json").read_text())["results"]


def test_a_checkpoint_of_eight_devices_continues_on_one(corpus, tmp_path):
    """Parameters and moments are the same numbers on either mesh, and so is what follows."""
    axes = {"data": 2, "fsdp": 2, "model": 2}
    sharded = train(
        str(tmp_path / "eight"), toy.MODEL, [toy.phase(corpus, steps=3)], toy.SCHEDULE, mesh=MeshConfig(**axes)
    )
    assert sharded["steps"] == 3
    assert_equal(saved(tmp_path / "eight", mesh(**axes))[0], saved(tmp_path / "eight")[0])
    fingerprints = {load_model(str(tmp_path / "eight"), devices).fingerprint for devices in (mesh(**axes), mesh())}
    assert len(fingerprints) == 1

    toy.train_here(tmp_path / "one", [toy.phase(corpus)])
    toy.train_here(tmp_path / "eight", [toy.phase(corpus)])
    (steps, ours), (_, expected) = (np.array(toy.losses(tmp_path / run)).T for run in ("eight", "one"))
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_hosts(corpus, tmp_path, hosts):
    other = toy.write_corpus(tmp_path / "other", seed=1, sources=("b", "c"))
    plan = Plan([toy.phase(corpus, other), toy.phase(other, batch_size=16)], seed=3)
    for step in (7, 0, 5):  # in any order, across the phase boundary
        whole = plan.batch(step)
        shares = np.split(np.arange(len(whole.tokens)), hosts)
        parts = [plan.batch(step, rows) for rows in shares]
        assert_equal(
            Batch(*(np.concatenate(column) for column in zip(*(p[:5] for p in parts), strict=True)), {}), whole
        )
    assert not np.array_equal(plan.batch(0).tokens, plan.batch(1).tokens)


def test_evaluation_changes_nothing(corpus_copy, tmp_path):
    corpus = corpus_copy
    held = HeldOut("held", corpus.path, rows=20, batch_size=8, keep_tokens=True)
    toy.train_here(tmp_path / "with", [toy.phase(corpus)], evaluators=[held], evaluate_every=2)
    toy.train_here(tmp_path / "without", [toy.phase(corpus)])
    assert toy.losses(tmp_path / "with") == toy.losses(tmp_path / "without")
    assert_equal(saved(tmp_path / "with")[0], saved(tmp_path / "without")[0])
    column = Corpus.open(corpus.path).score(kept_column(tmp_path / "with", "held", 6), partial=True)
    assert column.finished().sum() == 20 and column.reference["run"] == str(tmp_path / "with")
    tokens = np.asarray(column.array("loss").read().result())
    assert np.isnan(tokens[20:]).all()
    evaluated = [row for row in RunDirectory(tmp_path / "with").metrics() if "held/loss" in row]
    np.testing.assert_allclose(np.nanmean(tokens), evaluated[-1]["held/loss"], rtol=1e-6)
    assert evaluated[-1]["held/loss"] < evaluated[0]["held/loss"]


def two_phases(corpus: Corpus, other: Corpus):
    return [toy.phase(corpus, steps=3), toy.phase(other, steps=3, selection=RANDOM_HALF, reset_optimizer=True)]


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Corpus:
    return toy.write_corpus(tmp_path_factory.mktemp("other") / "corpus", seed=1, sources=("b", "c"))


def test_two_phases_under_one_schedule(corpus, other, tmp_path):
    """The second phase has its own corpus and objective and forgets the moments, not the learning rate; started at
    the boundary's checkpoint it is the same again."""
    schedule = cosine_schedule(peak=1e-2, warmup=2.0)
    toy.train_here(tmp_path / "run", two_phases(corpus, other), schedule=schedule)
    rows = [row for row in RunDirectory(tmp_path / "run").metrics() if "loss" in row]
    rate = over(schedule, 6)
    np.testing.assert_allclose([row["learning_rate"] for row in rows], [rate(t) for t in range(1, 7)], rtol=1e-6)
    assert [row["phase"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert (
        [row["loss/a"] is None for row in rows]
        == [row["loss/c"] is not None for row in rows]
        == [False] * 3 + [True] * 3
    )
    assert all("selected_share" not in row for row in rows[:3])
    assert all(abs(row["selected_share"] - 0.5) < 0.01 for row in rows[3:])
    state, _ = saved(tmp_path / "run")
    assert [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0] == [3]  # Adam's count

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    (tmp_path / "run" / "summary.json").unlink()  # as a kill leaves it
    toy.train_here(tmp_path / "run", two_phases(corpus, other), schedule=schedule)
    assert toy.losses(tmp_path / "run") == [(row["step"], row["loss"]) for row in rows]
    assert_equal(saved(tmp_path / "run")[0], state)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_all(step: Path) -> None:
    for path in step.rglob("*"):
        if path.is_file():
            halve(path)


DAMAGES = {
    "every file cut": cut_all,
    "parameters gone": lambda step: shutil.rmtree(step / "params"),
    "moments gone": lambda step: shutil.rmtree(step / "rest"),
    "about cut": lambda step: [halve(path) for path in (step / "about").iterdir()],
    "arrays cut": lambda step: [halve(path) for path in (step / "params").rglob("d/*")],
    "empty": lambda step: [shutil.rmtree(path) for path in step.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_cut_off_is_set_aside_and_the_one_before_is_used(damage, reference, tmp_path, capsys):
    run = shutil.copytree(reference, tmp_path / "run")
    for _ in range(2):  # the second time finds the first one's remains
        DAMAGES[damage](run / "checkpoints" / "6")
        state, about = saved(run)
        assert state.step == 3
        assert about["counters"]["tokens_seen"] > 0
        assert "checkpoint 6 in" in capsys.readouterr().out
        shutil.rmtree(run / "checkpoints" / "6", ignore_errors=True)
        shutil.copytree(reference / "checkpoints" / "6", run / "checkpoints" / "6")
    assert saved(run)[0].step == 6


def test_after_a_damaged_checkpoint_the_run_ends_the_same(corpus, reference, tmp_path, capsys):
    run = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "6" / "params")
    (run / "summary.json").unlink()  # as a kill leaves it
    toy.train_here(run, [toy.phase(corpus)], seed=100, checkpoint_every=3)
    output = capsys.readouterr().out
    assert "checkpoint 6 in" in output and "the one before (3) is used" in output and "from step 3" in output
    assert_equal(saved(run)[0], saved(reference)[0])
    assert rows_without_time(run) == rows_without_time(reference)


def test_when_no_checkpoint_can_be_read_nothing_is_started_anew(corpus, reference, tmp_path):
    """Not at the second try either: what may be saved by hand must not be overwritten."""
    run = shutil.copytree(reference, tmp_path / "run")
    for step in (3, 6):
        shutil.rmtree(run / "checkpoints" / str(step) / "params")
    (run / "summary.json").unlink()
    for _ in range(2):
        assert str(run) in toy.refused("checkpoint-damaged", toy.train_here, run, [toy.phase(corpus)], seed=100)
    assert RunDirectory(run).metrics() == RunDirectory(reference).metrics()


def test_starting_from_another_run(corpus, reference, tmp_path):
    """The loss of its first step is that of the other's parameters, of the step asked for, on the first batch."""
    start, phases = {"init_from": str(reference)}, [toy.phase(corpus, steps=2)]
    toy.train_here(tmp_path / "last", phases, **start)
    toy.train_here(tmp_path / "third", phases, **start, init_step=3)
    batch = jax.tree.map(jnp.asarray, Plan(phases, seed=0).batch(0))
    valid = batch.loss_mask & predicted(batch.segment_ids)
    for run, step in (("last", 6), ("third", 3)):
        loss = jax.jit(batch_loss, static_argnums=1)(parameters(reference, step), toy.MODEL, batch)
        np.testing.assert_allclose(toy.losses(tmp_path / run)[0][1], loss[valid].mean(), rtol=1e-6)

    def refused(code: str, **changed) -> str:
        return toy.refused(code, toy.train_here, tmp_path / "new", [toy.phase(corpus)], **{**start, **changed})

    assert "model.mlp_dim" in refused("init-other-model", model=dataclasses.replace(toy.MODEL, mlp_dim=32))
    assert "step 5: it has 3, 6" in refused("checkpoint-not-found", init_step=5)
    assert str(tmp_path) in refused("checkpoint-none", init_from=str(tmp_path))

"""Runs that go on: a branch of another run, a finished run with more phases, an anneal that was not planned; what a
phase and a run keep beside the parameters; and averages of them."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from slm_jax.checkpoint import restore_params
from slm_jax.mesh import make_mesh
from slm_jax.models.trained_model import run_vocabulary
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import Selection
from slm_jax.train.average import DECAYS, average, decay_weights
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.plan import Plan
from slm_jax.train.schedules import Schedule, SchedulePart, anneal_schedule, cosine_schedule, infinite_schedule
from slm_jax.train.state import TrainState, init_state, state_shapes
from slm_jax.train.step import make_step

CONSTANT = infinite_schedule(peak=1e-2, warmup=2.0, cooldown=2.0)


def params(run_dir: Path, step: int | None = None):
    shapes = state_shapes(toy.MODEL, make_optimizer(OptimizerConfig()), make_mesh(devices=jax.devices()[:1])).params
    return jax.tree.map(np.asarray, restore_params(run_dir, shapes, step))


def assert_equal(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def rows(run_dir: Path) -> list[dict]:
    keep = ("step", "loss", "learning_rate", "tokens_seen", "phase")
    return [{name: row[name] for name in keep} for row in RunDirectory(run_dir).metrics() if "loss" in row]


@pytest.fixture(scope="module")
def parent(corpus, tmp_path_factory) -> Path:
    """8 steps under an infinite schedule, with checkpoints 4, 6 and 8."""
    run = tmp_path_factory.mktemp("parent") / "run"
    toy.train_here(run, [toy.phase(corpus, steps=8)], schedule=CONSTANT, checkpoint_every=2, keep_checkpoints=3)
    return run


def test_a_branch_goes_on_to_the_bit_and_its_anneal_needs_no_plan(corpus, parent, tmp_path):
    """From step 6 on, 2 steps as the parent made them; from step 4 on, an anneal that nobody planned."""
    before = rows(parent)
    branch = {"schedule": CONSTANT, "init_from": str(parent), "init_mode": "state"}
    toy.train_here(tmp_path / "same", [toy.phase(corpus, steps=8)], init_step=6, **branch)
    assert rows(tmp_path / "same") == before[6:]
    assert_equal(params(tmp_path / "same"), params(parent))

    anneal = toy.phase(corpus, steps=3, schedule=anneal_schedule(to=1e-4))
    toy.train_here(tmp_path / "annealed", [toy.phase(corpus, steps=4), anneal], init_step=4, **branch)
    annealed = rows(tmp_path / "annealed")
    assert [row["step"] for row in annealed] == [5, 6, 7]
    assert annealed[0]["loss"] == before[4]["loss"]  # the same parameters, the same batch
    steps = 5.5e-3 * (1e-4 / 5.5e-3) ** (np.arange(1, 4) / 3)
    np.testing.assert_allclose([row["learning_rate"] for row in annealed], steps, rtol=1e-5)
    assert annealed[-1]["tokens_seen"] == before[6]["tokens_seen"]
    assert rows(parent) == before


def test_a_finished_run_goes_on_with_more_phases(corpus, parent, tmp_path):
    """As if they had been planned from the start."""
    run = shutil.copytree(parent, tmp_path / "run")
    more = [toy.phase(corpus, steps=8), toy.phase(corpus, steps=2, schedule=anneal_schedule(to=1e-4))]
    toy.train_here(run, more, schedule=CONSTANT)
    toy.train_here(tmp_path / "planned", more, schedule=CONSTANT)
    assert rows(run) == rows(tmp_path / "planned")
    assert_equal(params(run), params(tmp_path / "planned"))


def test_a_branch_that_is_none_is_refused(corpus, parent, tmp_path):
    def refused(code, phases, **settings):
        settings = {"schedule": CONSTANT, "init_from": str(parent), "init_mode": "state"} | settings
        message = toy.refused(code, toy.train_here, tmp_path / "branch", phases, **settings)
        assert not list((tmp_path / "branch").glob("checkpoints/*"))
        return message

    longer = [toy.phase(corpus, steps=9)]
    assert f"step 8 of {parent}" in refused("branch-past-end", [toy.phase(corpus, steps=8)])
    other_batch = [toy.phase(corpus, steps=20, batch_size=16)]
    assert "batch_size 8 in phase 0, now 16" in refused("resume-other-rows", other_batch)
    assert "steps 8 in phase 0, now 4" in refused("resume-other-rows", [toy.phase(corpus, steps=4)] * 3)
    assert "seed 0" in refused("resume-other-run", longer, seed=1)
    assert "'all'" in refused("setting-unknown-value", longer, init_mode="all")
    assert "train.init_from" in refused("train-no-init-from", longer, init_from=None)
    anneal = [toy.phase(corpus, steps=4), toy.phase(corpus, steps=3, schedule=anneal_schedule(to=1e-4))]
    shares = infinite_schedule(peak=1e-2, warmup=0.25, cooldown=0.75, constant=0.3)
    other_rate = refused("branch-other-learning-rate", anneal, init_step=4, schedule=shares)
    assert "at step 4 was 0.0055" in other_rate and "0.003" in other_rate

    (tmp_path / "average").mkdir()
    shutil.copytree(parent / "checkpoints", tmp_path / "average" / "checkpoints")
    no_record = {"init_from": str(tmp_path / "average")}
    assert str(tmp_path / "average") in refused("branch-not-trained", longer, **no_record)


def test_a_dry_run_of_a_branch_checks_where_it_starts(corpus, parent, tmp_path):
    run = shutil.copytree(parent, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "4")
    branch = {"schedule": CONSTANT, "init_from": str(run), "init_mode": "state", "dry_run": True}

    def dry(*phases, **settings):
        toy.train_here(tmp_path / "branch", phases, **branch, **settings)

    longer = toy.phase(corpus, steps=9)
    assert "no checkpoint of step 4" in toy.refused("checkpoint-not-found", dry, longer, init_step=4)
    assert "batch_size" in toy.refused("resume-other-rows", dry, toy.phase(corpus, steps=9, batch_size=16), init_step=6)
    dry(longer, init_step=6)
    assert [path.name for path in (tmp_path / "branch").iterdir()] == ["plan.png"]


def test_pinned_checkpoints_are_written_and_kept(corpus, tmp_path):
    settings = {"checkpoint_every": 0, "keep_checkpoints": 1, "pin_checkpoints": [2, 3]}
    toy.train_here(tmp_path / "run", [toy.phase(corpus)], **settings)
    assert RunDirectory(tmp_path / "run").checkpoint_steps() == [2, 3, 6]


def test_a_wrong_length_does_no_harm_to_a_run(corpus, parent, tmp_path):
    """It is refused, and the right one still continues; a limit on epochs does not change the data."""
    run = shutil.copytree(parent, tmp_path / "run")
    (run / "summary.json").unlink()
    record = (run / "run.json").read_text()
    shorter = [toy.phase(corpus, steps=5)]
    message = toy.refused("resume-past-end", toy.train_here, run, shorter, schedule=CONSTANT)
    assert "step 8" in message and "now has 5" in message and (run / "run.json").read_text() == record
    longer = toy.phase(corpus, steps=9)
    longer = dataclasses.replace(longer, mixture=[dataclasses.replace(longer.mixture[0], epochs=200.0)])
    assert toy.train_here(run, [longer], schedule=CONSTANT)["steps"] == 9


def test_extending_a_decayed_run_names_the_ways(corpus, tmp_path, capsys):
    """Where the learning rate had decayed and no phase re-warms it; not where a new phase brings its schedule."""
    run, decayed = tmp_path / "run", cosine_schedule(peak=1e-3, warmup=2)
    toy.train_here(run, [toy.phase(corpus, steps=4)], schedule=decayed)
    again = shutil.copytree(run, tmp_path / "again")
    capsys.readouterr()
    toy.train_here(run, [toy.phase(corpus, steps=6)], schedule=decayed)
    printed = capsys.readouterr().out
    assert "ended at 10% of its peak learning rate, 0.001" in printed
    assert all(f"@{name}_schedule()" in printed for name in ("cosine", "anneal", "infinite"))
    phases = [toy.phase(corpus, steps=4), toy.phase(corpus, steps=2, schedule=decayed)]
    toy.train_here(again, phases, schedule=decayed)
    assert "Three ways" not in capsys.readouterr().out


def test_a_phase_that_is_held_near_its_start(corpus, tmp_path):
    """Each step adds rate * strength of the distance from the parameters that the phase began with, and a run that is
    ended inside the phase continues with the same ones."""
    pulled = toy.phase(corpus, steps=4, l2_to_init=0.5)
    phases = [toy.phase(corpus, steps=2), pulled]
    toy.train_here(tmp_path / "whole", phases, checkpoint_every=1, keep_checkpoints=9)
    run = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for step in (5, 6):
        shutil.rmtree(run / "checkpoints" / str(step))
    (run / "summary.json").unlink()
    toy.train_here(run, phases)
    assert rows(run) == rows(tmp_path / "whole")
    assert_equal(params(run), params(tmp_path / "whole"))

    toy.train_here(tmp_path / "free", [toy.phase(corpus, steps=2), toy.phase(corpus, steps=4)], checkpoint_every=1)
    start, free, held = params(run, 2), params(tmp_path / "free"), params(run)
    distance = lambda a: float(optax.tree.norm(jax.tree.map(jnp.subtract, a, start)))  # noqa: E731
    assert distance(held) < distance(free)


def test_the_pull_and_the_average_by_hand(corpus):
    """One step with both against the same step without."""
    optimizer, devices = make_optimizer(OptimizerConfig()), make_mesh(devices=jax.devices()[:1])
    rate = optax.constant_schedule(0.1)
    batch = jax.tree.map(jnp.asarray, Plan([toy.phase(corpus)], seed=0).batch(0))
    state = init_state(toy.MODEL, optimizer, devices, seed=0, ema=True)
    start = jax.tree.map(lambda p: p - 1.0, state.params)
    plain = jax.jit(make_step(toy.MODEL, None, optimizer, rate, 0))(state._replace(average=None), batch)[0]
    step = jax.jit(make_step(toy.MODEL, None, optimizer, rate, 0, l2_to_init=0.5, ema=0.75))
    after: TrainState = step(state._replace(start=start), batch)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b - 0.05, atol=1e-6), after.params, plain.params)
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, state.params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.average, expected)
    assert_equal(after.start, start)


def test_the_moving_average_of_a_run_and_the_mean_of_its_checkpoints(corpus, tmp_path):
    """Kept over a restart; made into models that can be trained from and evaluated."""
    settings = {"optimizer": OptimizerConfig(ema=0.5), "checkpoint_every": 1, "keep_checkpoints": 9}
    run = tmp_path / "run"
    toy.train_here(run, [toy.phase(corpus, steps=3)], **settings)
    toy.train_here(run, [toy.phase(corpus, steps=4)], **settings)
    by_hand = params(run, 0)
    for step in range(1, 5):
        by_hand = jax.tree.map(lambda a, p: 0.5 * a + 0.5 * p, by_hand, params(run, step))
    with toy.one_device():
        average(str(run), str(tmp_path / "moving"), moving=True)
        average(str(run), str(tmp_path / "mean"), steps=[2, 4])
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    jax.tree.map(close, params(tmp_path / "moving"), by_hand)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, params(run, 2), params(run, 4))
    jax.tree.map(close, params(tmp_path / "mean"), mean)
    toy.train_here(tmp_path / "on", [toy.phase(corpus, steps=1)], init_from=str(tmp_path / "mean"))
    assert run_vocabulary(str(tmp_path / "mean"), corpus.vocabulary_hash).size == corpus.vocab_size

    with toy.one_device():
        toy.refused("average-moving-decay", average, str(run), str(tmp_path / "x"), moving=True, decay="cosine")
        message = toy.refused("average-output-exists", average, str(run), str(tmp_path / "mean"))
        assert str(tmp_path / "mean") in message
        assert "step 7" in toy.refused("checkpoint-not-found", average, str(run), str(tmp_path / "x"), [7])
    message = toy.refused("resume-other-average", toy.train_here, run, [toy.phase(corpus, steps=5)])
    assert "OptimizerConfig.ema = 0.5, now 0" in message


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("steps", [[2, 4, 6, 8], [3, 4, 9], [5, 6]], ids=str)
def test_weights_of_checkpoints_are_a_decay_of_the_rate(decay, steps):
    """Plain gradient descent at a constant rate, its checkpoints averaged, is one at decaying rates: gradients do not
    depend on the parameters here, so the two can be compared."""
    gradients = np.random.default_rng(0).normal(size=steps[-1] + 1)  # of steps 1 to the last; [0] is not used
    weights = decay_weights(steps, decay)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    checkpoints = np.array([-gradients[1 : step + 1].sum() for step in steps])
    length = (steps[-1] - steps[0]) * len(steps) / (len(steps) - 1)
    rates = [1.0] * steps[0]  # of steps 1 to the first checkpoint; then of each interval the rate where it ends
    for begin, end in itertools.pairwise(steps):
        rates += [float(DECAYS[decay](np.float64((end - steps[0]) / length)))] * (end - begin)
    assert weights @ checkpoints == pytest.approx(-np.dot(rates, gradients[1:]))


def test_equal_weights_of_evenly_spaced_checkpoints_are_a_linear_decay():
    np.testing.assert_allclose(decay_weights([10, 20, 30, 40, 50], "linear"), 0.2)


def test_a_run_without_an_average_says_so(parent, tmp_path):
    with toy.one_device():
        message = toy.refused("average-not-kept", average, str(parent), str(tmp_path / "x"), moving=True)
    assert str(parent) in message and "OptimizerConfig.ema" in message


def test_the_share_that_is_kept_warms_up(corpus, tmp_path):
    """Counted by the metrics of the run, also where it was ended in between."""
    warmup = Schedule([SchedulePart(0.25, 3.0)], start=1.0)
    for steps in (2, 4):
        phase = toy.phase(corpus, steps=steps, selection=Selection("loss"), keep_ratio=warmup)
        phase = (
            dataclasses.replace(phase, keep_ratio=Schedule([SchedulePart(0.5, 2.0)], start=1.0))
            if steps == 2
            else phase
        )
        toy.train_here(tmp_path / "run", [toy.phase(corpus, steps=1), phase])
    shares = [row["selected_share"] for row in RunDirectory(tmp_path / "run").metrics() if "selected_share" in row]
    np.testing.assert_allclose(shares, [0.75, 0.5, 0.25, 0.25], atol=0.01)


def test_dropout_trains_otherwise_and_is_refused_where_it_cannot_be(corpus, tmp_path):
    dropped = dataclasses.replace(toy.MODEL, dropout=0.3)
    phases = [toy.phase(corpus, steps=2)]
    toy.train_here(tmp_path / "run", phases, model=dropped)
    toy.train_here(tmp_path / "parts", phases, model=dropped, gradient_accumulation_steps=2)
    toy.train_here(tmp_path / "plain", phases)
    losses = [toy.losses(tmp_path / name) for name in ("run", "parts", "plain")]
    assert len({loss[0][1] for loss in losses}) == 3
    filtered = toy.phase(corpus, steps=2, selection=Selection("loss", gradient="filtered"))
    message = toy.refused("train-filtered-dropout", toy.train_here, tmp_path / "no", [filtered], model=dropped)
    assert "phase 0" in message and "model.dropout" in message


def test_a_dry_run_draws_the_plan_and_trains_nothing(corpus, shell, tmp_path):
    bindings = toy.settings(
        MixtureComponent={"corpus": corpus.path, "epochs": 100.0}, Phase={"steps": 6, "batch_size": 8}
    )
    code, output, error = shell(
        "train", "--run_dir=run", "--dry_run", *toy.MODEL_SETTINGS, *toy.CONSTANT, *bindings, folder=tmp_path
    )
    assert code == 0, error
    assert "1-6 of 8 rows" in output and "the plan is drawn in run/plan.png" in output
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.png"]

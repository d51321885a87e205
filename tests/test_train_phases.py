"""Phases and the plan of a run: lengths, mixtures, replay, schedules, and what is refused before anything compiles."""

import dataclasses

import numpy as np
import pytest
import toy

from slm_jax.data.corpus import Corpus
from slm_jax.data.mixture import MixtureComponent
from slm_jax.score.selection import Selection
from slm_jax.train import plan_summary
from slm_jax.train.phases import Phase, keep_ratio
from slm_jax.train.plan import Plan
from slm_jax.train.schedules import (
    Schedule,
    SchedulePart,
    anneal_schedule,
    constant_schedule,
    cosine_schedule,
    infinite_schedule,
)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Corpus:
    return toy.write_corpus(tmp_path_factory.mktemp("other") / "corpus", seed=1, sources=("b", "c"))


def rows_of(plan: Plan, corpus: Corpus, steps: range) -> np.ndarray:
    """The rows of a corpus in these batches, in order, by their tokens."""
    known = {row.tobytes(): number for number, row in enumerate(corpus.read(np.arange(corpus.num_rows))["tokens"])}
    tokens = np.concatenate([plan.batch(step).tokens for step in steps]).astype(np.uint16)
    return np.array([known[row.tobytes()] for row in tokens if row.tobytes() in known])


def test_a_length_in_tokens_is_rounded_up_to_whole_steps(corpus):
    draw = MixtureComponent(corpus.path, epochs=100.0)
    batch = 8 * corpus.sequence_length
    plan = Plan([Phase(tokens=2 * batch + 1, mixture=[draw], batch_size=8), Phase(4, mixture=[draw])], seed=0)
    assert [phase.steps for phase in plan.phases] == [3, 4] and plan.total_steps == 7


def test_replay_repeats_the_first_phase_in_its_order_at_an_exact_share(corpus, other):
    """Compute-equivalent: a quarter of every batch, beside fresh rows; a third phase replays on and reads on."""
    replayed = [MixtureComponent(other.path, None, epochs=9.0), MixtureComponent(corpus.path, 0.25, replay="in_order")]
    phases = [
        Phase(6, mixture=[MixtureComponent(corpus.path)], batch_size=8),
        Phase(8, mixture=replayed, batch_size=8),
        Phase(4, mixture=[*replayed, MixtureComponent(corpus.path, 0.5)], batch_size=8),
    ]
    plan = Plan(phases, seed=5)
    first = rows_of(plan, corpus, range(6))
    assert len(set(first)) == 48
    second = rows_of(plan, corpus, range(6, 14))
    np.testing.assert_array_equal(second, first[:16])  # 2 of 8 rows in each of 8 batches
    third = set(rows_of(plan, corpus, range(14, 18)))
    assert third & set(first) == set(first[16:24]) and len(third) == 8 + 16  # 8 again, 16 for the first time


def test_batches_follow_from_seed_and_step_alone(corpus, other):
    share = Schedule([SchedulePart(1.0)], start=0.0)
    phases = [Phase(9, mixture=[MixtureComponent(corpus.path), MixtureComponent(other.path, share)], batch_size=8)]
    plan, again = Plan(phases, seed=3), Plan(phases, seed=3)
    for step in (8, 0, 5):
        whole = plan.batch(step)
        np.testing.assert_array_equal(again.batch(step).tokens, whole.tokens)
        np.testing.assert_array_equal(again.batch(step, np.array([6, 2])).tokens, whole.tokens[[6, 2]])


def test_a_scheduled_share_grows_over_the_phase(corpus, other):
    share = Schedule([SchedulePart(1.0)], start=0.0)
    phases = [
        Phase(
            10,
            mixture=[MixtureComponent(corpus.path, epochs=9.0), MixtureComponent(other.path, share, epochs=9.0)],
            batch_size=8,
        )
    ]
    plan = Plan(phases, seed=3)
    drawn = [len(rows_of(plan, other, range(step, step + 1))) for step in range(10)]
    np.testing.assert_allclose(plan.shares(0)[:, 1], np.arange(1, 11) / (10 + np.arange(1, 11)), 1e-6)
    assert drawn[0] <= 1 and drawn[-1] == 4 and abs(sum(drawn) - 8 * plan.shares(0)[:, 1].sum()) < 1


def test_schedules_of_phases(corpus):
    """The run's applies until a phase sets its own; that one applies to the phases after it too."""
    phase = toy.phase(corpus, steps=10)
    again = cosine_schedule(peak=0.5, warmup=2.0)
    phases = [phase, phase, dataclasses.replace(phase, schedule=again), phase, dataclasses.replace(phase, steps=5)]
    phases[-1] = dataclasses.replace(phases[-1], schedule=anneal_schedule(to=0.005))
    rate = Plan(phases, 0, cosine_schedule(peak=1.0, warmup=2.0)).learning_rate
    found = [float(rate(t)) for t in (1, 2, 11, 20, 21, 22, 40, 45)]
    np.testing.assert_allclose(found, [0.5, 1, 0.55, 0.1, 0.25, 0.5, 0.05, 0.005], rtol=1e-6)


def test_more_phases_do_not_change_an_infinite_schedule_in_steps(corpus):
    phase, schedule = toy.phase(corpus, steps=10), infinite_schedule(peak=1.0, warmup=2.0, cooldown=5.0)
    short, long = Plan([phase], 0, schedule).learning_rate, Plan([phase] * 3, 0, schedule).learning_rate
    assert [float(short(t)) for t in range(11)] == [float(long(t)) for t in range(11)]
    assert float(long(30)) == pytest.approx(0.55)


def test_keep_ratio_rules_its_phase(corpus):
    warmup = Schedule([SchedulePart(0.5, 4.0)], start=1.0)
    selects = toy.phase(corpus, steps=8, selection=Selection("loss", ratio=0.1), keep_ratio=warmup)
    plan = Plan([toy.phase(corpus, steps=3), selects], 0)
    assert plan.phases[1].selection.ratio == 0.875  # what a filtered gradient must have room for: the first step's
    ratio = keep_ratio(plan.phases, 1)
    np.testing.assert_allclose([float(ratio(t)) for t in (4, 5, 7, 11)], [0.875, 0.75, 0.5, 0.5])
    assert keep_ratio(plan.phases, 0) is None


def test_the_plan_as_a_table_and_a_picture(corpus, other, tmp_path):
    phases = [
        Phase(6, mixture=[MixtureComponent(corpus.path)], batch_size=8),
        Phase(
            4,
            mixture=[MixtureComponent(other.path, 0.75), MixtureComponent(corpus.path, 0.25, replay="in_order")],
            batch_size=8,
            selection=Selection("loss", ratio=0.6),
            schedule=cosine_schedule(peak=1.0, warmup=2.0),
            reset_optimizer=True,
        ),
    ]
    plan = Plan(phases, 0, constant_schedule(peak=0.5, warmup=0.0))
    header, first, second = plan_summary.table(plan).splitlines()
    assert "learning rate" in header
    assert "1-6 of 8 rows" in first and f"{6 * 8 * corpus.sequence_length:,}" in first and "0.5 > 0.5 > 0.5" in first
    assert "7-10 of 8 rows" in second and "0.5 > 1 > 0.1" in second and "60% by loss, per batch" in second
    assert "optimizer state reset" in second and f"0.25 {corpus.path} (replay, in order)" in second
    plan_summary.draw(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


SELECTS = {"selection": Selection("loss")}
REFUSED = {  # code -> what the message names, and the phases
    "phase-length": ("3 and Phase.tokens is 1000", lambda one: [Phase(3, 1000.0, mixture=[one])]),
    "setting-out-of-range": ("Phase.tokens is 0.0", lambda one: [Phase(tokens=0.0, mixture=[one])]),
    "mixture-corpus-twice": ("Phase.mixture", lambda one: [Phase(3, mixture=[one, one])]),
    "phase-keep-ratio": (
        "Phase.keep_ratio",
        lambda one: [Phase(3, mixture=[one], keep_ratio=Schedule([SchedulePart(0.5)]))],
    ),
    "mixture-two-remainders": (
        "MixtureComponent.weight",
        lambda one: [Phase(3, mixture=[share(one, None), share(one, None, replay="in_order")])],
    ),
    "mixture-no-remainder": (
        "MixtureComponent.weight",
        lambda one: [Phase(3, mixture=[share(one, None), share(one, 1.5, replay="in_order")])],
    ),
    "mixture-all-zero": ("step 1", lambda one: [Phase(3, mixture=[share(one, Schedule([SchedulePart(0.0)]))])]),
    "mixture-too-few-rows": (
        "replays 16 rows",
        lambda one: [
            Phase(1, mixture=[one], batch_size=8),
            Phase(2, mixture=[MixtureComponent(one.corpus, replay="in_order")], batch_size=8),
        ],
    ),
    "schedule-too-long": (
        "schedule of phase 1",
        lambda one: [
            Phase(9, mixture=[one]),
            Phase(3, mixture=[one], schedule=anneal_schedule(1e-5, steps=4.0)),
        ],
    ),
    "mixture-two-orders": (
        "/corpus",
        lambda one: [Phase(3, mixture=[one]), Phase(3, mixture=[dataclasses.replace(one, order="original")])],
    ),
    "mixture-same-corpus": (
        "/corpus/",
        lambda one: [Phase(3, mixture=[one, MixtureComponent(one.corpus + "/")])],
    ),
}


def share(one: MixtureComponent, weight, replay: str | None = None) -> MixtureComponent:
    return MixtureComponent(one.corpus, weight, replay=replay)


@pytest.mark.parametrize("code", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(code, other):
    named, phases = REFUSED[code]
    one = MixtureComponent(other.path, epochs=100.0)
    assert named in toy.refused(code, lambda: Plan(phases(one), seed=0))


def test_lengths_and_ratios_out_of_range_are_refused(other):
    one = MixtureComponent(other.path, epochs=100.0)
    assert "None" in toy.refused("phase-length", Phase, mixture=[one])
    assert "Phase.l2_to_init is -1.0" in toy.refused("setting-out-of-range", Phase, 3, mixture=[one], l2_to_init=-1.0)
    too_much = Phase(3, mixture=[one], keep_ratio=Schedule([SchedulePart(2.0)]), selection=Selection("loss"))
    assert "Phase.keep_ratio" in toy.refused("phase-keep-ratio", Plan, [too_much], 0)
    warmup = Phase(3, mixture=[one], schedule=cosine_schedule(warmup=5.0))
    assert "schedule of phase 0" in toy.refused("schedule-too-long", Plan, [warmup], 0)
    assert "train.phases" in toy.refused("train-no-phases", Plan, [], 0)


def test_two_schedules_for_the_first_phase_are_refused(corpus):
    phase = dataclasses.replace(toy.phase(corpus), schedule=cosine_schedule())
    assert "train.schedule" in toy.refused("train-two-schedules", Plan, [phase], 0, cosine_schedule())

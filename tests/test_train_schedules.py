"""Learning rates at the points of arXiv 2403.08763, and how schedules follow one another."""

import gin
import numpy as np
import pytest
import toy

from slm_jax.train.schedules import (
    Schedule,
    SchedulePart,
    anneal_schedule,
    constant_schedule,
    cosine_schedule,
    in_turn,
    infinite_schedule,
    over,
    wsd_schedule,
)

QUARTERS = (0, 250, 500, 750, 1000)


def at(scalar, times):
    return [float(scalar(t)) for t in times]


def test_cosine_at_the_papers_points():
    rate = over(cosine_schedule(peak=3e-4, warmup=0.0, final=0.1), 1000)
    np.testing.assert_allclose(at(rate, QUARTERS), [3.0e-4, 2.60459e-4, 1.65e-4, 6.95406e-5, 3.0e-5], rtol=1e-5)


@pytest.mark.parametrize(
    "shape, points",
    [
        ("cosine", [3.0e-4, 2.80230e-4, 2.325e-4, 1.84770e-4, 1.65e-4]),
        ("inverse_sqrt", [3.0e-4, 2.10035e-4, 1.85630e-4, 1.73018e-4, 1.65e-4]),
    ],
)
def test_infinite_at_the_papers_points(shape, points):
    """Cooldown from 3e-4 to 1.65e-4, a constant part, the exponential anneal to 3e-5."""
    rate = over(infinite_schedule(warmup=0.0, cooldown=1000.0, anneal=1000.0, shape=shape), 3000)
    np.testing.assert_allclose(at(rate, QUARTERS), points, rtol=1e-5)
    np.testing.assert_allclose(at(rate, (1001, 1500, 2000)), 1.65e-4, rtol=1e-6)
    annealed = [1.65e-4, 1.07744e-4, 7.03562e-5, 4.59422e-5, 3.0e-5]
    np.testing.assert_allclose(at(rate, [2000 + t for t in QUARTERS]), annealed, rtol=1e-5)


def test_infinite_in_shares_of_what_it_rules():
    rate = over(infinite_schedule(peak=1.0, warmup=0.1, cooldown=0.5, anneal=0.0), 1000)
    np.testing.assert_allclose(at(rate, (50, 100, 350, 600, 1000, 5000)), [0.5, 1, 0.775, 0.55, 0.55, 0.55], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0.1, 100.0])
def test_warmup_is_linear_from_zero_then_the_cosine_begins(warmup):
    rate = over(cosine_schedule(peak=1.0, warmup=warmup, final=0.1), 1000)
    np.testing.assert_allclose(at(rate, (0, 50, 100, 550, 1000)), [0, 0.5, 1, 0.55, 0.1], atol=1e-6)


def test_constant():
    rate = over(constant_schedule(peak=2.0, warmup=10.0), 100)
    np.testing.assert_allclose(at(rate, (5, 10, 11, 100)), [1, 2, 2, 2])


@pytest.mark.parametrize("shape, half", [("linear", 0.5), ("one_minus_sqrt", 1 - 0.5**0.5)])
def test_warmup_stable_decay(shape, half):
    rate = over(wsd_schedule(peak=1.0, warmup=10.0, decay=0.2, final=0.0, shape=shape), 100)
    np.testing.assert_allclose(at(rate, (5, 10, 80, 90, 100)), [0.5, 1, 1, half, 0], atol=1e-6)


def test_schedules_in_turn_rule_their_own_steps():
    """The last step of one takes its end; the next begins again from 0, or where the first ended."""
    first, again = cosine_schedule(peak=1.0, warmup=2.0), cosine_schedule(peak=0.5, warmup=2.0)
    rate = in_turn([(0, first, 10), (10, again, 10), (20, anneal_schedule(to=0.025), 5)])
    np.testing.assert_allclose(at(rate, (2, 10, 11, 12, 20, 25)), [1, 0.1, 0.25, 0.5, 0.05, 0.025], rtol=1e-6)
    assert 0.025 < float(rate(21)) < 0.05


def test_in_turn_on_arrays_and_under_jit():
    import jax

    rate = in_turn([(0, cosine_schedule(), 7), (7, anneal_schedule(to=1e-5), 3)])
    whole = np.asarray(jax.jit(jax.vmap(rate))(np.arange(11)))
    np.testing.assert_allclose(whole, at(rate, range(11)), rtol=1e-6)


@pytest.mark.parametrize(
    "make, code, named",
    [
        (lambda: SchedulePart(1.0, shape="sine"), "setting-unknown-value", "SchedulePart.shape is 'sine'"),
        (lambda: SchedulePart(-1.0), "setting-out-of-range", "SchedulePart.to is -1.0"),
        (lambda: SchedulePart(1.0, -3.0), "setting-out-of-range", "SchedulePart.steps is -3.0"),
        (lambda: Schedule([SchedulePart(1.0), SchedulePart(2.0)]), "schedule-two-remainders", "Schedule.parts"),
        (lambda: Schedule([SchedulePart(1.0)], start=-1.0), "setting-out-of-range", "Schedule.start is -1.0"),
        (lambda: cosine_schedule(peak=0.0), "setting-out-of-range", "cosine_schedule.peak is 0.0"),
        (lambda: over(wsd_schedule(warmup=60.0, decay=50.0), 100), "schedule-too-long", "60 + 0 + 50 steps"),
        (lambda: over(anneal_schedule(to=1e-5), 10), "schedule-exponential-zero", "from 0.0 to 1e-05"),
        (lambda: over(anneal_schedule(to=1e-5, steps=20.0), 10, 1.0), "schedule-too-long", "spans 10"),
    ],
)
def test_what_cannot_be_is_refused(make, code, named):
    assert named in toy.refused(code, make)


def test_settings_of_other_parts_do_not_reach_the_families():
    gin.parse_config("Schedule.start = 1.0\nSchedulePart.steps = 7\nSchedulePart.shape = 'cosine'")
    try:
        made = [cosine_schedule(), constant_schedule(), wsd_schedule(), infinite_schedule(), anneal_schedule()]
    finally:
        gin.clear_config()
    assert made == [cosine_schedule(), constant_schedule(), wsd_schedule(), infinite_schedule(), anneal_schedule()]


def test_two_halves_are_a_whole_at_every_length():
    for total in range(2, 40):
        lengths = Schedule([SchedulePart(1.0, 0.5), SchedulePart(0.1, 0.5)]).lengths(total)
        assert sum(lengths) == total and abs(lengths[0] - lengths[1]) <= 1

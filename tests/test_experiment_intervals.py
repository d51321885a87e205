"""Intervals of paired differences, and readings of curves."""

import numpy as np
import pytest

from slm_jax.experiment.intervals import at, crossing, estimate, ratio_of_means


def test_the_t_interval_is_the_textbooks():
    """Three values: mean 2, standard deviation 1, t(0.975, 2) = 4.3027."""
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.each == (1.0, 2.0, 3.0)
    assert found.t == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert found.bootstrap == pytest.approx((1.0, 3.0)) and found == estimate([1.0, 2.0, 3.0])
    assert estimate([5.0]) == (5.0, None, None, (5.0,))


def test_the_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(1)
    samples = rng.normal(1.0, 0.5, size=(300, 5))
    covered = np.mean([low <= 1.0 <= high for low, high in (estimate(x.tolist()).t for x in samples)])
    assert 0.91 < covered < 0.985
    tops, bottoms = rng.normal(0.7, 0.05, (300, 5)), rng.normal(1.0, 0.05, (300, 5))
    fieller = [ratio_of_means(a.tolist(), b.tolist()).t for a, b in zip(tops, bottoms, strict=True)]
    assert 0.91 < np.mean([low <= 0.7 <= high for low, high in fieller]) < 0.985


def test_a_ratio_needs_something_below():
    found = ratio_of_means([0.5, 0.7], [1.0, 1.0])
    assert found.mean == pytest.approx(0.6) and found.each == pytest.approx((0.5, 0.7))
    assert ratio_of_means([0.5, 0.7], [-0.1, 0.1]) is None  # the oracle gains nothing
    assert ratio_of_means([0.5], [1.0]) == (0.5, None, None, (0.5,))
    assert ratio_of_means([0.5, 0.7], [0.1, 5.0]).t is None  # the gain below may be 0: no interval has ends


def test_crossings_and_readings_are_on_straight_lines():
    x, y = [0, 10, 20, 30], [5.0, 4.0, 3.0, 3.5]
    assert crossing(x, y, 3.5) == 15 and crossing(x, y, 3.0) == 20 and crossing(x, y, 2.9) is None
    assert crossing(x, y, 6.0) == 0 and crossing(x, [None, 4.0, 3.0, None], 3.5) == 15
    assert at(x, y, 5) == 4.5 and at(x, y, 30) == 3.5 and at(x, y, 31) is None

"""Classes of tokens by their losses over checkpoints: the paper's rule at its borders, for any order of the tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.analyze.trajectories import (
    CLASSES,
    FALLING,
    HIGH,
    LOW,
    NO_CLASS,
    RISING,
    class_counts,
    class_means,
    classify,
    fit_lines,
    most_fluctuating,
)


def kinds(losses, **thresholds) -> list[str]:
    losses = np.array(losses, float).T
    found, _ = classify(losses, fit_lines(losses), **thresholds)
    return [CLASSES[kind] if kind != NO_CLASS else "none" for kind in found]


def test_the_worked_check_of_the_paper():
    """l = 1.0, 0.9, 0.8, 0.7: a = -0.1, n = 3, ΔL = -0.3, so H→L."""
    losses = np.array([[1.0], [0.9], [0.8], [0.7]])
    lines = fit_lines(losses)
    np.testing.assert_allclose(lines.change, [-0.3], rtol=1e-12)
    np.testing.assert_allclose(lines.mean - lines.change / 2, [1.0], rtol=1e-12)  # L_start = b
    np.testing.assert_allclose(lines.variance, [0.0], atol=1e-24)
    assert kinds([[1.0, 0.9, 0.8, 0.7]]) == ["H→L"]


def test_a_line_is_that_of_numpy():
    losses = np.random.default_rng(0).normal(3, 1, (7, 50))
    lines = fit_lines(losses.astype(np.float32))
    slope, start = np.polyfit(np.arange(7), losses, 1)
    np.testing.assert_allclose(lines.change, slope * 6, atol=1e-5)
    np.testing.assert_allclose(lines.mean - lines.change / 2, start, atol=1e-5)
    residual = losses - (start + slope * np.arange(7)[:, None])
    np.testing.assert_allclose(lines.variance, np.mean(residual**2, axis=0), atol=1e-5)


def test_a_change_of_exactly_the_threshold_is_no_change():
    """The band is closed: -0.2 <= ΔL <= 0.2."""
    up, down = [0.0, 0.1, 0.2], [0.2, 0.1, 0.0]
    assert kinds([up, down, [5.0, 5.0, 5.0]]) == ["L→L", "L→L", "H→H"]
    past = np.nextafter(0.2, 1)
    assert kinds([[0.0, past / 2, past], [past, past / 2, 0.0]], high=9.0) == ["L→H", "H→L"]
    assert kinds([[1.0, 1.5], [1.5, 1.0]], rise=0.5, fall=0.5) == ["H→H", "L→L"]
    assert kinds([[1.0, 1.5], [1.5, 1.0]], rise=0.5, fall=0.25) == ["H→H", "H→L"]


def test_a_last_loss_equal_to_the_mean_is_low():
    """l_n <= L_mean is L→L; L_mean is of the last losses of all tokens, those that moved among them."""
    assert kinds([[2.0, 2.0], [2.0, 2.0]]) == ["L→L", "L→L"]
    assert kinds([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]]) == ["L→L", "H→H", "L→L"]
    assert kinds([[2.0, 2.0], [9.0, 1.0]]) == ["H→H", "H→L"]  # the mean is 1.5
    assert kinds([[2.0, 2.0], [9.0, 1.0]], high=2.0) == ["L→L", "H→L"]


def test_the_last_loss_decides_not_the_end_of_the_line():
    """ΔL is 0 for both; only the first has its last loss above the mean, though its line ends below."""
    assert kinds([[3.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]]) == ["H→H", "L→L"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_without_a_finite_loss_has_no_class_and_moves_no_other(bad):
    rest = [[1.0, 1.0, 1.0], [3.0, 3.0, 3.0], [2.0, 2.5, 3.0], [4.0, 3.0, 2.0]]
    for place in range(3):
        token = [9.0, 9.0, 9.0]
        token[place] = bad
        assert kinds([*rest, token]) == [*kinds(rest), "none"]
    assert kinds([[bad, bad]]) == ["none"]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_order_of_the_tokens_changes_nothing(checkpoints, tokens, seed):
    """Multiples of 0.1, so that changes of just the threshold and losses of just the mean are common."""
    rng = np.random.default_rng(seed)
    losses = rng.integers(0, 6, (checkpoints, tokens)).astype(np.float32) * np.float32(0.1)
    losses[rng.random(losses.shape) < 0.02] = np.nan
    order = rng.permutation(tokens)
    lines, mixed = fit_lines(losses), fit_lines(losses[:, order])
    found, divides = classify(losses, lines)
    again, same = classify(losses[:, order], mixed)
    np.testing.assert_array_equal(found[order], again)
    assert divides == same or np.isnan([divides, same]).all()
    np.testing.assert_array_equal(lines.variance[order], mixed.variance)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_every_token_is_of_the_class_that_the_rule_names(checkpoints, seed):
    """Against the rule spelled out token by token, in exact steps of a quarter."""
    rng = np.random.default_rng(seed)
    losses = rng.integers(0, 12, (checkpoints, 30)) / 4.0
    change, _ = fit_lines(losses).change, None
    found, divides = classify(losses, fit_lines(losses), rise=0.25, fall=0.25)
    assert divides == pytest.approx(losses[-1].mean(), abs=1e-12)
    for token in range(30):
        moved = RISING if change[token] > 0.25 else FALLING if change[token] < -0.25 else None
        assert found[token] == (moved if moved is not None else HIGH if losses[-1, token] > divides else LOW)
    assert sum(class_counts(found)) == 30


def test_the_mean_of_a_class_and_the_tokens_that_fluctuate_most():
    losses = np.array([[5.0, 5.0, 5.0, 1.0, 0.0], [5.0, 7.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 1.0, np.nan]])
    lines = fit_lines(losses)
    found, _ = classify(losses, lines)
    assert found.tolist() == [HIGH, HIGH, HIGH, LOW, NO_CLASS]
    means = class_means(losses, found)
    np.testing.assert_allclose(means[HIGH], [5.0, 14 / 3, 5.0])
    np.testing.assert_allclose(means[LOW], [1.0, 1.0, 1.0])
    assert np.isnan(means[[RISING, FALLING]]).all()
    ids = np.array([7, 7, 8, 9, 9])
    assert most_fluctuating(found, lines.variance, HIGH, ids, 9).tolist() == [2, 1]  # 0 is the id of 1
    assert most_fluctuating(found, lines.variance, HIGH, ids, 1).tolist() == [2]
    assert most_fluctuating(found, lines.variance, RISING, ids, 3).tolist() == []

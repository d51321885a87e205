"""Learning rates at the points of PAPERS §3.1."""

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.train.schedules import Schedule, learning_rate


def test_cosine_at_the_papers_points():
    rate = learning_rate(Schedule(peak=3e-4, warmup=0, final=0.1), 1000)
    found = [float(rate(t)) for t in (0, 250, 500, 750, 1000)]
    np.testing.assert_allclose(found, [3.0e-4, 2.60459e-4, 1.65e-4, 6.95406e-5, 3.0e-5], rtol=1e-5)


@pytest.mark.parametrize("warmup", [0.1, 100])
def test_warmup_is_linear_from_zero_then_the_cosine_begins(warmup):
    rate = learning_rate(Schedule(peak=1.0, warmup=warmup, final=0.1), 1000)
    np.testing.assert_allclose([float(rate(t)) for t in (0, 50, 100, 550, 1000)], [0, 0.5, 1, 0.55, 0.1], atol=1e-6)


def test_constant():
    rate = learning_rate(Schedule(peak=2.0, kind="constant", warmup=10), 100)
    np.testing.assert_allclose([float(rate(t)) for t in (5, 10, 11, 100)], [1, 2, 2, 2])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "cosinus"}, "known are cosine, constant"),
        ({"peak": -1.0}, "peak is above 0"),
        ({"final": 2.0}, r"final a share of peak in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Schedule(**settings)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="takes 200 steps, the run has 100"):
        learning_rate(Schedule(warmup=200), 100)

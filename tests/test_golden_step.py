"""Three steps of the tiny model give the losses they always gave."""

import jax
import numpy as np
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import make_batch
from slm_jax.score.selection import Selection
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.schedules import cosine_schedule, over
from slm_jax.train.state import init_state
from slm_jax.train.step import make_step

OBJECTIVES = {"causal": None, "selective": Selection(score="excess", ratio=0.6)}


def three_steps(selection: Selection | None) -> tuple[list[float], dict[str, list[float]]]:
    """Losses of steps 1 to 3 on one fixed batch of three segments and some padding; gradient norms, trained tokens."""
    rng = np.random.default_rng(0)
    segment_ids = np.repeat([[1] * 7 + [2] * 6 + [3] * 9 + [0] * 2], 4, axis=0)
    tokens = rng.integers(3, 259, segment_ids.shape)
    scores = {"scores/reference/loss": rng.uniform(3, 8, segment_ids.shape).astype(np.float32)}
    batch = make_batch(tokens, segment_ids, segment_ids > 0, scores=scores)
    optimizer = make_optimizer(OptimizerConfig())
    rate = over(cosine_schedule(peak=1e-2, warmup=1.0), 3)
    state = init_state(toy.MODEL, optimizer, mesh_lib.make_mesh(devices=jax.devices()[:1]), seed=0)
    step, losses, more = jax.jit(make_step(toy.MODEL, selection, optimizer, rate, seed=0)), [], []
    for _ in range(3):
        state, sums = step(state, batch)
        losses.append(float(sums["loss_sum"] / sums["valid_tokens"]))
        more.append({name: float(sums[name]) for name in ("grad_norm", "trained_tokens")})
    return losses, {name: [row[name] for row in more] for name in more[0]}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_three_steps_are_as_they_were(objective, golden):
    now, gradients = three_steps(OBJECTIVES[objective])
    before = golden(f"three_steps_{objective}_gradient", gradients)
    assert gradients["trained_tokens"] == before["trained_tokens"]
    np.testing.assert_allclose(gradients["grad_norm"], before["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(
        now,
        golden(f"three_steps_{objective}", now),
        rtol=1e-5,
        err_msg=(
            "Training is not what it was. If no change to the model's numbers was meant (a refactoring, a faster "
            "kernel, a newer jax), this is a bug: look for it, and leave the tolerance alone. If initialisation, "
            "architecture, loss, selection, optimizer or schedule were changed on purpose, say so in CHANGELOG.md, "
            "for every run of before is no longer comparable, and write the new losses with\n"
            "  python -m pytest tests/test_golden_step.py --update-golden"
        ),
    )

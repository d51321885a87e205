"""Attention at a subset of positions: what the whole gives there, in value and gradient, however they are spread."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.models.attention import attention
from slm_jax.models.position_subset import PositionSubset, fits_quarters, query_subset_attention

SEQUENCES, LENGTH = 2, 512
CAPACITY = SEQUENCES * LENGTH // 2 + 30


def _chosen(how: str) -> jax.Array:
    position = jnp.broadcast_to(jnp.arange(LENGTH), (SEQUENCES, LENGTH))
    if how == "evenly":
        return jax.random.uniform(jax.random.key(0), position.shape) < 0.5
    if how == "late":
        return position >= LENGTH // 2
    return (position < 300) & (jnp.arange(SEQUENCES)[:, None] == 1)  # one sequence has all, the others none


def _inputs():
    keys = jax.random.split(jax.random.key(1), 4)
    query, weights = (jax.random.normal(key, (SEQUENCES, LENGTH, 4, 8)) for key in keys[:2])
    key, value = (jax.random.normal(key, (SEQUENCES, LENGTH, 2, 8)) for key in keys[2:])
    segments = jnp.ones((SEQUENCES, LENGTH), jnp.int32).at[:, 90:].set(2).at[0, 500:].set(0)
    return query, key, value, segments, weights


def _values_and_gradients(inputs, chosen, window, by_quarter):
    """Value at the chosen positions, in place, and gradients of a weighted sum of it."""
    query, key, value, segments, weights = inputs
    subset = PositionSubset.from_mask(chosen, CAPACITY)

    def total(query, key, value):
        settings = {"window": window, "backend": "xla", "by_quarter": by_quarter}
        out = query_subset_attention(subset.gather(query), subset, key, value, segments, **settings)
        return jnp.sum(out * subset.gather(weights)), subset.replace(jnp.zeros_like(query), out)

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)


_at = jax.jit(_values_and_gradients, static_argnums=(2, 3))


@functools.partial(jax.jit, static_argnums=2)
def _whole(inputs, chosen, window):
    query, key, value, segments, weights = inputs

    def total(query, key, value):
        out = jnp.where(chosen[..., None, None], attention(query, key, value, segments, window=window), 0.0)
        return jnp.sum(out * weights), out

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)


@pytest.mark.parametrize(
    "how, window, by_quarter",
    [("evenly", None, True), ("evenly", 200, True), ("evenly", 20, True), ("one", None, False), ("one", 20, False)],
)
def test_equals_the_whole_attention_there(how, window, by_quarter):
    chosen = _chosen(how)
    found, expected = _at(_inputs(), chosen, window, by_quarter), _whole(_inputs(), chosen, window)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_a_quarter_with_more_positions_than_places_does_not_fit():
    """Computed by quarter all the same, the attention would lose positions: the answer must be no."""
    fits = jax.jit(lambda chosen: fits_quarters(PositionSubset.from_mask(chosen, CAPACITY), SEQUENCES, LENGTH))
    assert fits(_chosen("evenly"))
    assert not fits(_chosen("late"))
    mean, deviations = CAPACITY / (SEQUENCES * 4), 1 + math.sqrt(2 * math.log(SEQUENCES * 4))
    places = math.ceil(mean + deviations * math.sqrt(mean * (1 - mean / (LENGTH // 4))))
    full = jnp.zeros((SEQUENCES, LENGTH), bool).at[1, 256 : 256 + places].set(True)
    assert fits(full)
    assert not fits(full.at[1, 383].set(True))

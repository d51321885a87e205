"""Selection: the paper's worked example, exact counts, ties, scopes, nothing excluded, no gradient through scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slm_jax import mesh as mesh_lib
from slm_jax.score.selection import Selection, kept_count, select, token_scores, top_k_oracle

jit_select = jax.jit(select, static_argnums=0)
COLUMN = "scores/reference/loss"
SUBNORMAL = 2.5e-39  # zero on most machines, and so in selection on all
FLOATS = st.floats(-50, 50, width=32) | st.sampled_from([0.0, -0.0, 1.0, SUBNORMAL, -SUBNORMAL])


def test_worked_check_of_the_paper():
    """Rho-1, Eq 3-5: L = [2, .5, 3, 1], L_RM = [1, .6, 2.9, .2]; half of them are 0 and 3, and the loss is 1.5."""
    loss, reference = jnp.array([[2.0, 0.5, 3.0, 1.0]]), jnp.array([[1.0, 0.6, 2.9, 0.2]])
    selection = Selection(ratio=0.5)
    scores = token_scores(selection, loss, {COLUMN: reference}, jax.random.key(0))
    np.testing.assert_allclose(scores, [[1.0, -0.1, 0.1, 0.8]], atol=1e-6)
    chosen = select(selection, scores, jnp.ones((1, 4), bool))
    assert chosen.tolist() == [[True, False, False, True]]
    assert float(jnp.sum(loss * chosen) / jnp.sum(chosen)) == 1.5


@settings(deadline=None, max_examples=150)
@given(
    st.data(),
    st.sampled_from([(1, 1), (3, 11)]),  # few shapes and ratios: each is compiled once
    st.sampled_from([0.0001, 0.5, 0.6, 1.0]),
    st.sampled_from(["batch", "sequence"]),
)
def test_exact_count_and_nothing_excluded(data, shape, ratio, scope):
    """Any scores, any mask: exactly `kept_count` of the valid tokens of each group, none of the others, and no token
    left out scores higher than one taken."""
    scores = data.draw(hnp.arrays(np.float32, shape, elements=FLOATS))
    valid = data.draw(hnp.arrays(bool, shape))
    chosen = np.asarray(jit_select(Selection(ratio=ratio, scope=scope), scores, valid))
    scores = np.where(np.abs(scores) < np.finfo(np.float32).tiny, np.float32(0), scores)
    assert not (chosen & ~valid).any()
    groups = [(scores, valid, chosen)] if scope == "batch" else list(zip(scores, valid, chosen, strict=True))
    for group_scores, group_valid, group_chosen in groups:
        count = int(group_valid.sum())
        expected = min(count, max(1, int(np.floor(count * round(ratio * 10_000) / 10_000 + 0.5))))
        assert group_chosen.sum() == expected
        left_out = group_valid & ~group_chosen
        if left_out.any() and group_chosen.any():
            assert group_scores[left_out].max() <= group_scores[group_chosen].min()


def test_what_only_some_machines_tell_from_zero_is_zero():
    scores = jnp.array([[0.0, SUBNORMAL, -SUBNORMAL, -0.0, 1.0]], jnp.float32)
    chosen = select(Selection(ratio=0.4), scores, jnp.ones((1, 5), bool))
    assert chosen.tolist() == [[True, False, False, False, True]]


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, 30, elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])), st.sampled_from([0.03, 0.5, 0.8]))
def test_ties_go_to_the_lower_position(scores, ratio):
    chosen = np.asarray(jit_select(Selection(ratio=ratio), scores[None], np.ones((1, 30), bool)))[0]
    order = sorted(range(30), key=lambda i: (-scores[i], i))
    assert sorted(order[: chosen.sum()]) == np.flatnonzero(chosen).tolist()


@pytest.mark.parametrize("decimals", [0, 2, 7])
@pytest.mark.parametrize("devices", [1, 8])
def test_equal_to_top_k_to_the_last_tie(decimals, devices):
    """The same set as jax.lax.top_k over the flattened batch, which takes equal values in order of position too."""
    rng = np.random.default_rng(decimals)
    scores, valid = np.round(rng.normal(size=(8, 512)), decimals).astype(np.float32), rng.random((8, 512)) < 0.9
    scores[0, :3] = [-np.inf, -0.0, 0.0]
    with jax.set_mesh(mesh_lib.make_mesh(devices=jax.devices()[:devices])):
        chosen = np.asarray(jit_select(Selection(ratio=0.37), scores, valid))
    np.testing.assert_array_equal(chosen, top_k_oracle(jnp.asarray(scores), jnp.asarray(valid), 0.37))
    # And the oracle is top_k, without our own counting around it.
    _, order = jax.lax.top_k(jnp.where(valid, scores + 0.0, -jnp.inf).reshape(-1), int(chosen.sum()))
    assert sorted(order.tolist()) == np.flatnonzero(chosen).tolist()


@pytest.mark.parametrize(
    "count, ratio, expected",
    [
        *((10, 0.6, 6), (5, 0.6, 3), (4, 0.5, 2), (5, 0.5, 3), (3, 0.1, 1), (0, 0.6, 0), (1, 0.6, 1), (7, 1.0, 7)),
        *((1_048_576, 0.6, 629_146), (2_000_000_000, 0.6, 1_200_000_000)),
    ],
)
def test_kept_count_is_exact(count, ratio, expected):
    """0.6 * 5 is 3.0000000000000004 in floats: a ceiling would keep 4. And int32 must not overflow."""
    assert int(kept_count(jnp.asarray(count, jnp.int32), ratio)) == expected


def test_scopes_on_one_batch():
    """Row 0 has all the high scores: the batch takes them, each sequence and each device its own share."""
    scores = jnp.array([[9.0, 8, 7, 6], [1, 2, 3, 4], [0, 0, 5, 0], [0, 0, 0, 0.5]])
    valid = jnp.ones((4, 4), bool)

    def rows(scope: str) -> list[int]:
        with jax.set_mesh(mesh_lib.make_mesh(devices=jax.devices()[:2])):
            return jit_select(Selection(ratio=0.25, scope=scope), scores, valid).sum(axis=1).tolist()

    assert rows("batch") == [4, 0, 0, 0]
    assert rows("sequence") == [1, 1, 1, 1]
    assert rows("device") == [2, 0, 1, 1]


def test_ratio_is_of_the_valid_tokens():
    """Padding and prompts count neither as kept nor as left out."""
    valid = jnp.zeros((2, 50), bool).at[:, :10].set(True)
    assert int(select(Selection(ratio=0.6), jnp.zeros((2, 50)), valid).sum()) == 12


def test_low_losses_of_the_reference_come_first():
    loss, reference = jnp.array([[1.0, 1, 1, 1]]), jnp.array([[4.0, 1, 3, 2]])
    columns = {COLUMN: reference, "scores/reference/entropy": reference}
    for score in ("reference", "entropy"):
        selection = Selection(score=score, ratio=0.5)
        scores = token_scores(selection, loss, columns, jax.random.key(0))
        assert select(selection, scores, jnp.ones((1, 4), bool)).tolist() == [[False, True, False, True]]


def test_high_own_losses_come_first():
    selection = Selection(score="loss", ratio=0.5)
    scores = token_scores(selection, jnp.array([[4.0, 1, 3, 2]]), {}, jax.random.key(0))
    assert select(selection, scores, jnp.ones((1, 4), bool)).tolist() == [[True, False, True, False]]
    assert selection.columns() == ()


def test_random_depends_on_the_key_alone():
    selection = Selection(score="random", ratio=0.5)
    draw = lambda seed: token_scores(selection, jnp.zeros((4, 100)), {}, jax.random.key(seed))  # noqa: E731
    assert (draw(1) == draw(1)).all()
    assert (draw(1) != draw(2)).any()
    assert int(select(selection, draw(1), jnp.ones((4, 100), bool)).sum()) == 200


def test_threshold():
    selection = Selection(threshold=0.5)
    valid = jnp.array([[True, True, True, False]])
    assert select(selection, jnp.array([[0.5, 0.6, -1, 3]]), valid).tolist() == [[False, True, False, False]]


def test_no_gradient_flows_through_scores():
    reference = jnp.array([[1.0, 0.6, 2.9, 0.2]])
    score = lambda loss: token_scores(Selection(), loss, {COLUMN: reference}, jax.random.key(0)).sum()  # noqa: E731
    assert (jax.grad(score)(jnp.ones((1, 4))) == 0).all()


@pytest.mark.parametrize(
    "code, settings_, named",
    [
        ("setting-out-of-range", {"ratio": 0.0}, "Selection.ratio is 0.0"),
        ("setting-out-of-range", {"ratio": 1.5}, "Selection.ratio is 1.5"),
        ("setting-out-of-range", {"ratio": 60.0}, "at most 1"),
        (
            "setting-unknown-value",
            {"score": "exces"},
            "'excess', 'loss', 'own_entropy', 'difference', 'reference', 'entropy', 'random'",
        ),
        ("setting-unknown-value", {"gradient": "all"}, "'exact', 'filtered'"),
        ("selection-needs-capacity", {"gradient": "filtered", "threshold": 0.0}, "Selection.capacity"),
        ("setting-out-of-range", {"capacity": 2.0}, "Selection.capacity is 2.0"),
        ("setting-unknown-value", {"scope": "global"}, "'batch', 'micro_batch', 'sequence', 'device'"),
    ],
)
def test_wrong_settings_are_refused(code, settings_, named):
    assert named in toy.refused(code, Selection, **settings_)

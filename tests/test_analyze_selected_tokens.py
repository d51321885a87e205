"""Sets of selected tokens, and the fit of a result to a loss: against what can be worked out by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.analyze.selected_tokens import (
    filtering,
    frequency_deciles,
    jaccard,
    losses_on,
    position_bins,
    select,
    shares,
)
from slm_jax.analyze.selection_metrics import fit_log
from slm_jax.score.selection import Selection

REFERENCE = "scores/reference/loss"


def test_the_paper_s_example_of_a_selection():
    """PAPERS: losses 2.0, 0.5, 3.0, 1.0 against 1.0, 0.6, 2.9, 0.2: half of them are the first and the last."""
    loss, reference = np.array([[2.0, 0.5, 3.0, 1.0]], np.float32), np.array([[1.0, 0.6, 2.9, 0.2]], np.float32)
    valid = np.ones((1, 4), bool)
    chosen = select(Selection(ratio=0.5), loss, {REFERENCE: reference}, valid, 4)
    assert chosen.tolist() == [[True, False, False, True]]
    assert losses_on(chosen, loss).tolist() == [[1.5]]


@pytest.mark.parametrize("score", ["excess", "loss", "reference", "random"])
def test_each_batch_selects_its_share_of_what_is_valid(score):
    rng = np.random.default_rng(0)
    loss, reference = (rng.normal(3, 1, (10, 8)).astype(np.float32) for _ in range(2))
    reference[0, 1] = np.nan  # no score, so not selected
    valid = rng.random((10, 8)) < 0.8
    valid[0, 1] = True
    selection = Selection(score=score, ratio=0.4)
    columns = {name: reference for name in selection.columns()}
    chosen = select(selection, loss, columns, valid, 4)
    usable = valid & np.isfinite(reference) if columns else valid
    for first in (0, 4, 8):  # the last batch has two rows
        rows = slice(first, first + 4)
        assert chosen[rows].sum() == int(0.4 * usable[rows].sum() + 0.5)
    assert not chosen[~usable].any()
    np.testing.assert_array_equal(chosen, select(selection, loss, columns, valid, 4))
    other = select(selection, loss, columns, valid, 4, seed=1)
    assert (other != chosen).any() == (score == "random")


def test_tokens_above_a_threshold():
    loss, valid = np.linspace(0, 8, 24, dtype=np.float32).reshape(4, 6), np.ones((4, 6), bool)
    valid[3, 5] = False
    chosen = select(Selection(score="loss", threshold=4.0), loss, {}, valid, 4)
    assert (chosen == (valid & (loss > 4))).all()


def test_what_a_selection_says_of_devices_has_no_meaning_here():
    rng = np.random.default_rng(0)
    loss, valid = rng.normal(3, 1, (6, 8)).astype(np.float32), np.ones((6, 8), bool)
    plain = Selection(score="loss", ratio=0.5)
    for scope in ("micro_batch", "device"):
        changed = dataclasses.replace(plain, scope=scope, gradient="filtered", capacity=0.1)
        np.testing.assert_array_equal(select(changed, loss, {}, valid, 3), select(plain, loss, {}, valid, 3))
    by_row = select(dataclasses.replace(plain, scope="sequence"), loss, {}, valid, 3)
    assert by_row.sum(axis=1).tolist() == [4] * 6


def test_shares_and_overlap():
    chosen = np.array([True, True, False, False, True])
    share, tokens = shares(chosen, np.array([0, 0, 2, 2, -1]), 3)
    assert tokens.tolist() == [2, 0, 2]
    assert share[0] == 1.0 and np.isnan(share[1]) and share[2] == 0.0
    sets = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(jaccard(sets), [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]])


def test_losses_of_sets_under_checkpoints():
    losses = np.array([[1.0, 2.0, 6.0], [0.5, 1.0, 9.0]])
    found = losses_on(np.array([[True, True, False], [False, False, True], [False] * 3]), losses)
    np.testing.assert_allclose(found[:2], [[1.5, 0.75], [6.0, 9.0]])
    assert np.isnan(found[2]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=300), st.randoms(use_true_random=False))
def test_deciles_of_frequency(tokens, random):
    """An id is in one decile, a rarer one in no later decile, and no decile without a large id holds much more than
    a tenth."""
    ids = np.array(tokens)
    decile = frequency_deciles(ids)
    counts = np.bincount(ids)
    by_id = {token: set(decile[ids == token].tolist()) for token in set(tokens)}
    assert all(len(found) == 1 for found in by_id.values())
    ordered = sorted(by_id, key=lambda token: counts[token])
    firsts = [min(by_id[token]) for token in ordered if list(counts).count(counts[token]) == 1]
    assert firsts == sorted(firsts) and set(decile.tolist()) <= set(range(10))
    assert np.bincount(decile).max() <= len(ids) / 10 + 1 + counts.max()
    order = list(range(len(ids)))
    random.shuffle(order)
    np.testing.assert_array_equal(frequency_deciles(ids[order]), decile[order])


def test_positions_count_what_the_model_reads_before_a_token():
    bins, names = position_bins(np.array([[1, 1, 1, 1, 1, 2, 2, 0]]))
    assert names == ["1", "2–3", "4–7"]
    assert bins.tolist() == [[-1, 0, 1, 1, 2, -1, 0, -1]]


def test_how_well_leaving_out_finds_the_noise():
    chosen = np.array([True, True, False, False, False, True])
    noise = np.array([False, True, True, True, False, False])
    found = filtering(chosen, noise, np.ones(6, bool))
    assert found == {"tokens": 6, "noise_share": 0.5, "precision": 2 / 3, "recall": 2 / 3}
    assert filtering(chosen, noise, np.array([False] * 5 + [True])) == {
        "tokens": 1, "noise_share": 0.0, "precision": None, "recall": None}  # fmt: skip


@pytest.mark.parametrize("a, c", [(-1.2, 2.3), (0.8, -0.4), (20.0, -30.0), (-300.0, 2000.0)])
def test_a_logarithm_of_a_line_is_found_again_with_its_sign(a, c):
    loss = np.linspace(2.0, 4.0, 6) if a in (20.0, -300.0) else np.linspace(0.86, 0.98, 5)
    fit = fit_log(loss, np.log(a * loss + c))
    assert fit is not None
    np.testing.assert_allclose([fit.a, fit.c], [a, c], rtol=1e-6)
    assert fit.r_squared == pytest.approx(1) and fit.error < 1e-9 and fit.points == len(loss)
    np.testing.assert_allclose(np.log(fit.a * loss + fit.c), np.log(a * loss + c), rtol=1e-9)


def test_a_fit_is_the_best_of_its_kind():
    rng = np.random.default_rng(1)
    loss = np.linspace(2, 4, 30)
    result = np.log(3 * loss - 2) + rng.normal(0, 0.1, 30)
    fit = fit_log(loss, result)
    assert fit is not None and fit.r_squared is not None and 0.8 < fit.r_squared < 1

    def distance(a: float, c: float) -> float:
        return float(np.mean((np.log(a * loss + c) - result) ** 2))

    best = distance(fit.a, fit.c)
    assert best == pytest.approx(fit.error**2)
    nearby = [(fit.a * (1 + e), fit.c + d) for e in (-0.01, 0, 0.01) for d in (-0.05, 0, 0.05) if e or d]
    assert all(distance(a, c) > best for a, c in nearby)


def test_what_cannot_be_fitted():
    nan = float("nan")
    assert fit_log(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None
    assert fit_log(np.array([1.0, 2.0, nan]), np.array([1.0, 2.0, 3.0])) is None
    assert fit_log(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])) is None
    level = fit_log(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))
    assert level is not None and level.r_squared is None and level.error < 1e-12
    np.testing.assert_allclose([level.a, level.c], [0, np.exp(2.0)], atol=1e-9)

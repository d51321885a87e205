"""The row at a position: exact shares, no repeats within an epoch, pure in (seed, position)."""

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data.batches import read_ahead
from slm_jax.data.mixture import Mixture, MixtureComponent, Scheduled, Supply, pattern, permuted
from slm_jax.errors import UserError

ONE = np.ones(1)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_shares_are_exact_at_every_position(weights):
    """After any n rows corpus i has within less than one of n * share_i; a period is exact."""
    shares = np.array(weights) / sum(weights)
    chosen = pattern(weights)
    counts = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.arange(1, len(chosen) + 1)[:, None] * shares
    assert np.abs(counts - ideal).max() < 1 + 1e-9
    np.testing.assert_allclose(counts[-1], ideal[-1], atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 5))
def test_every_epoch_is_a_permutation(size, seed, epoch):
    order = permuted(np.arange(size), np.full(size, epoch), size, seed)
    assert sorted(order.tolist()) == list(range(size))


def test_epochs_and_seeds_differ_and_the_order_is_pinned():
    order = lambda epoch, seed: permuted(np.arange(12), np.full(12, epoch), 12, seed).tolist()  # noqa: E731
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    # Changing this order changes every experiment that is resumed: a running one would repeat and skip rows.
    assert order(0, 0) == PINNED


PINNED = [7, 11, 5, 4, 10, 8, 3, 9, 1, 6, 0, 2]


def test_rows_do_not_repeat_before_the_corpus_is_used_up():
    mixture = Mixture(
        [MixtureComponent("a"), MixtureComponent("b")], [Supply(30), Supply(10)], seed=1, shares=np.array([3.0, 1.0])
    )
    which, rows = mixture.rows(np.arange(80))
    for corpus, size in ((0, 30), (1, 10)):
        drawn = rows[which == corpus]
        for begin in range(0, len(drawn), size):
            assert sorted(drawn[begin : begin + size].tolist()) == list(range(size))


def test_positions_can_be_asked_for_in_any_order():
    mixture = Mixture(
        [MixtureComponent("a"), MixtureComponent("b")],
        [Supply(1000, 5), Supply(1000)],
        seed=3,
        shares=np.array([0.7, 0.3]),
    )
    positions = np.random.default_rng(0).permutation(500)
    which, rows = mixture.rows(np.arange(500))
    some_which, some_rows = mixture.rows(positions)
    np.testing.assert_array_equal(some_which, which[positions])
    np.testing.assert_array_equal(some_rows, rows[positions])


def test_a_later_phase_goes_on_where_an_earlier_one_stopped():
    draws = [MixtureComponent("a")]
    whole = Mixture(draws, [Supply(100)], seed=2, shares=ONE).rows(np.arange(60))[1]
    later = Mixture(draws, [Supply(100, 40)], seed=2, shares=ONE).rows(np.arange(20))[1]
    np.testing.assert_array_equal(later, whole[40:])


def test_original_order():
    _, rows = Mixture([MixtureComponent("a", order="original", epochs=2)], [Supply(4)], seed=0, shares=ONE).rows(
        np.arange(8)
    )
    assert rows.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_share_that_would_never_be_drawn_is_refused():
    assert "0.0004" in toy.refused("mixture-share-too-small", pattern, [1, 0.0004])


@pytest.mark.parametrize(
    "code, wrong",
    [
        ("setting-unknown-value", {"order": "sorted"}),
        ("setting-out-of-range", {"weight": 0.0}),
        ("setting-out-of-range", {"epochs": -1.0}),
        ("setting-unknown-value", {"replay": "again"}),
    ],
)
def test_wrong_components_are_refused(code, wrong):
    assert str(*wrong.values()) in toy.refused(code, MixtureComponent, "a", **wrong)


def test_read_ahead_hands_errors_over_and_stops():
    def make(number):
        if number == 3:
            raise UserError("row-broken", "row 3 is broken")
        return number

    made = read_ahead(make, 0, 10)
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="row 3 is broken"):
        next(made)
    early = read_ahead(lambda number: number, 0, 1000)
    assert next(early) == 0
    early.close()  # returns: the thread has ended


def test_a_replay_in_order_reads_again_what_was_read_from_the_first_row_on():
    """The order of the first reading, although that was a shuffled one; at its end it begins again."""
    first = Mixture([MixtureComponent("a")], [Supply(100)], seed=2, shares=ONE).rows(np.arange(30))[1]
    draws, shares = [MixtureComponent("b"), MixtureComponent("a", replay="in_order")], np.array([4.0, 1.0])
    which, rows = Mixture(draws, [Supply(50), Supply(100, 0, 30)], seed=2, shares=shares).rows(np.arange(200))
    replayed = rows[which == 1]
    np.testing.assert_array_equal(replayed, np.resize(first, len(replayed)))
    later = Mixture(draws, [Supply(50), Supply(100, 10, 30)], seed=2, shares=shares).rows(np.arange(40))
    np.testing.assert_array_equal(later[1][later[0] == 1], first[10:18])  # another phase replays on


def test_a_shuffled_replay_reads_the_same_rows_in_other_orders():
    first = Mixture([MixtureComponent("a")], [Supply(100)], seed=2, shares=ONE).rows(np.arange(30))[1]
    rows = Mixture([MixtureComponent("a", replay="shuffled")], [Supply(100, 0, 30)], seed=2, shares=ONE).rows(
        np.arange(60)
    )[1]
    assert sorted(rows[:30]) == sorted(rows[30:]) == sorted(first)
    assert len({tuple(order.tolist()) for order in (first, rows[:30], rows[30:])}) == 3


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_scheduled_shares_are_met_within_a_row_at_every_step(num_draws, batch_size, seed):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(num_draws), 50)[np.sort(rng.integers(0, 50, 50))] * rng.uniform(0.1, 3.0)
    places = Scheduled(shares, batch_size)
    ideal = np.cumsum(shares / shares.sum(axis=1, keepdims=True) * batch_size, axis=0)
    counts = places.counts(batch_size * np.arange(1, 51))
    assert np.abs(counts - ideal).max() < 1 + 1e-6
    assert (np.diff(counts, axis=0) >= 0).all() and (counts.sum(axis=1) == batch_size * np.arange(1, 51)).all()


def test_scheduled_positions_can_be_asked_for_in_any_order():
    shares = np.stack([np.linspace(1, 0.5, 20), np.linspace(0, 0.5, 20)], axis=1)
    places, positions = Scheduled(shares, 16), np.random.default_rng(0).permutation(320)
    which = places.which(np.arange(320))
    np.testing.assert_array_equal(places.which(positions), which[positions])
    before = np.cumsum(which[:, None] == np.arange(2), axis=0) - (which[:, None] == np.arange(2))
    np.testing.assert_array_equal(places.counts(positions), before[positions])
    last = which[-16:]
    assert np.abs(np.diff(np.flatnonzero(last == 1))).max() <= 3  # spread over the batch

"""A plain reference over a corpus with metadata: it reads the documents as if there were none."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data.batches import make_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.metadata import Metadata
from slm_jax.data.segments import positions_from_segments
from slm_jax.score.score_corpus import score
from slm_jax.score.strip_metadata import put_back, remove_prefix

RECORDS = [
    {"text": " ".join(toy.WORDS[i % 5 : i % 5 + 3 + i % 4]), "url": f"https://www.farm{i % 3}.org/{i}"}
    for i in range(60)
]


@pytest.fixture(scope="module")
def scored(reference, tmp_path_factory) -> tuple[Corpus, Corpus]:
    """The documents with their hosts and without, each with the column of a reference that knows no hosts."""
    where = tmp_path_factory.mktemp("scored")
    with_hosts = toy.write_documents(where / "hosts", RECORDS, 64, metadata=Metadata())
    plain = toy.write_documents(where / "plain", RECORDS, 64)
    with toy.one_device():
        score(with_hosts.path, str(reference), strip_metadata=True, statistics=("loss", "entropy"))
        score(plain.path, str(reference), statistics=("loss", "entropy"))
    return with_hosts, plain


def by_document(corpus: Corpus, statistic: str) -> dict[str, np.ndarray]:
    """The values of each document's own tokens: those that carry loss."""
    read = corpus.read(np.arange(corpus.num_rows), ["loss_mask", f"scores/reference/{statistic}"])
    found = {}
    for row in corpus.documents().to_pylist():
        place = (row["row"], slice(row["start"], row["start"] + row["length"]))
        found[row["id"]] = read[f"scores/reference/{statistic}"][place][read["loss_mask"][place]]
    return found


@pytest.mark.parametrize("statistic", ["loss", "entropy"])
def test_the_column_is_that_of_the_plain_documents(scored, statistic):
    """Up to where the one or the other is cut at the end of its row."""
    removed, plain = (by_document(corpus, statistic) for corpus in scored)
    compared = 0
    for document, values in plain.items():
        length = min(len(values), len(removed[document]))
        np.testing.assert_allclose(removed[document][:length], values[:length], rtol=1e-5, atol=1e-5)
        compared += length
    assert compared > 0.5 * sum(map(len, plain.values())) and min(map(np.min, filter(len, plain.values()))) > 0


def test_the_prefix_itself_and_the_padding_have_no_loss(scored):
    corpus = scored[0]
    read = corpus.read(np.arange(corpus.num_rows), ["loss_mask", "scores/reference/loss"])
    assert ((read["scores/reference/loss"] > 0) == read["loss_mask"]).all()


def test_the_column_says_what_the_reference_saw(scored, reference, tmp_path):
    hosts, plain = scored
    assert hosts.score("reference").reference["prefix"] == "removed"
    assert "prefix" not in plain.score("reference").reference
    copy = Corpus.open(shutil.copytree(hosts.path, tmp_path / "copy", ignore=shutil.ignore_patterns("scores")))
    with toy.one_device():
        score(copy.path, str(reference))
        line = toy.refusal(score, hosts.path, str(reference), statistics=("loss", "entropy"))
        assert "'prefix': 'removed'" in line and "now {" in line
        line = toy.refused("score-no-metadata", score, plain.path, str(reference), strip_metadata=True)
        assert str(plain.path) in line
    assert copy.score("reference").reference["prefix"] == "seen"
    column = "scores/reference/loss"
    seen, removed = (Corpus.open(Path(c.path)).read(np.arange(c.num_rows), [column])[column] for c in (copy, hosts))
    assert np.abs(seen - removed).max() > 1e-3


@st.composite
def packed(draw):
    """Rows of segments, each with a prefix of zero or more tokens after its first, and padding."""
    rows, length = 3, 12  # one shape, compiled once
    segment_ids, loss_mask = np.zeros((rows, length), np.int64), np.zeros((rows, length), bool)
    for row in range(rows):
        place, number = 0, 0
        while place < length and draw(st.booleans()):
            number += 1
            size, given = draw(st.integers(1, length - place)), draw(st.integers(0, 5))
            segment_ids[row, place : place + size] = number
            loss_mask[row, place + given : place + size] = True
            place += size
    tokens = np.arange(1, rows * length + 1).reshape(rows, length)
    return make_batch(tokens, segment_ids, loss_mask)


@settings(deadline=None, max_examples=40)
@given(packed())
def test_rows_keep_all_but_the_prefix_in_order(batch):
    rows, place = remove_prefix(batch)
    gone = (batch.segment_ids > 0) & ~batch.loss_mask & (batch.positions > 0)
    for row in range(len(batch.tokens)):
        left = np.flatnonzero((batch.segment_ids[row] > 0) & ~gone[row])
        np.testing.assert_array_equal(rows.tokens[row, : len(left)], batch.tokens[row, left])
        np.testing.assert_array_equal(rows.segment_ids[row, : len(left)], batch.segment_ids[row, left])
        np.testing.assert_array_equal(rows.loss_mask[row, : len(left)], batch.loss_mask[row, left])
        assert not rows.segment_ids[row, len(left) :].any()
    np.testing.assert_array_equal(rows.positions, positions_from_segments(rows.segment_ids))
    back = np.asarray(put_back(jnp.asarray(rows.tokens, jnp.float32), jnp.asarray(place)))
    np.testing.assert_array_equal(back, np.where(gone | (batch.segment_ids == 0), 0, batch.tokens))

"""The stage `score` with a reference of another vocabulary: the same text, the same sums, on rows of any length."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.data.batches import read_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.metadata import Metadata
from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.vocabulary import ByteVocabulary, Vocabulary
from slm_jax.score.cross_tokenizer import windows
from slm_jax.score.score_corpus import score

REAL = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl.gz"
LENGTH = 96  # what the reference reads


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents that fit into one row of either vocabulary: real ones where they are, else made ones."""
    if not REAL.exists():
        return [" ".join(np.random.default_rng(i).choice(toy.WORDS, 12)) + f" {i}é." for i in range(300)]
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        first = [json.loads(next(file))["question"][:80] for _ in range(300)]
    return [text for text in first if text.strip()]


@pytest.fixture(scope="module")
def vocabularies(texts) -> dict[str, Vocabulary]:
    sizes = {"small": 400, "large": 1000} if REAL.exists() else {"small": 310, "large": 370}
    return {"bytes": ByteVocabulary(), **{name: train_sentencepiece(texts, size) for name, size in sizes.items()}}


def corpus_of(path: Path, texts, vocabulary: Vocabulary, sequence_length: int = LENGTH, **named) -> Corpus:
    records = [{"text": text, "url": f"https://x{i}.org/"} for i, text in enumerate(texts)]
    return toy.write_documents(path, records, sequence_length, vocabulary=vocabulary, **{"packing": "whole", **named})


@pytest.fixture(scope="module")
def trained(texts, vocabularies, tmp_path_factory) -> tuple[Path, Corpus]:
    """A reference that reads pieces of the small vocabulary, and its own scores of the texts in them."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = corpus_of(folder / "corpus", texts[:60], vocabularies["small"])
    model = dataclasses.replace(toy.MODEL, vocab_size=vocabularies["small"].size, max_length=LENGTH)
    toy.train_here(folder / "run", [toy.phase(corpus, steps=2)], model=model)
    with toy.one_device():
        score(str(corpus.path), str(folder / "run"))
    return folder / "run", corpus


def column(corpus: Corpus, name: str = "reference") -> np.ndarray:
    key = f"scores/{name}/loss"
    return Corpus.open(corpus.path).read(np.arange(corpus.num_rows), [key])[key]


def sums(corpus: Corpus, name: str = "reference") -> dict[str, float]:
    """id -> the loss of a document, all of it in one row."""
    losses, found = column(corpus, name), {}
    for about in corpus.documents().to_pylist():
        start = about["start"]
        found[about["id"]] = float(losses[about["row"], start : start + about["length"]].astype(np.float64).sum())
    return found


@pytest.mark.parametrize("ours", ["large", "bytes"])
def test_a_document_costs_what_it_costs_the_reference(ours, texts, vocabularies, trained, tmp_path):
    """Whole documents, in two vocabularies: the sums over their tokens are those of the reference's own."""
    run, own = trained
    corpus = corpus_of(tmp_path / "corpus", texts[:60], vocabularies[ours])
    with toy.one_device():
        score(str(corpus.path), str(run), cross_tokenizer=True)
    found, expected = sums(corpus), sums(own)
    assert found.keys() == expected.keys() and len(found) == 60
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-5)
    about = Corpus.open(corpus.path).score("reference").reference
    assert about["mapped"] == "from another vocabulary" and about["vocabulary_hash"] == own.vocabulary_hash
    batch = read_batch([corpus], np.zeros(corpus.num_rows, np.int64), np.arange(corpus.num_rows))
    assert (column(corpus)[batch.positions == 0] == 0).all() and np.isfinite(column(corpus)).all()


@pytest.fixture(scope="module")
def cut(texts, vocabularies, trained, tmp_path_factory) -> Corpus:
    """Rows of 40 bytes, cut anywhere, with all they were scored to on one device."""
    corpus = corpus_of(
        tmp_path_factory.mktemp("cut") / "corpus", texts[:40], vocabularies["bytes"], 40, packing="split"
    )
    with toy.one_device():
        score(str(corpus.path), str(trained[0]), cross_tokenizer=True)
    return corpus


def test_rows_that_cut_documents_have_losses_all_the_same(cut, trained, capsys):
    batch = read_batch([cut], np.zeros(cut.num_rows, np.int64), np.arange(cut.num_rows))
    losses, counts = column(cut), batch.loss_mask & (batch.positions > 0)
    begins_within = (batch.positions == 0) & (batch.segment_ids > 0) & batch.loss_mask
    assert begins_within.sum() > 20, "documents go on in another row"
    assert (losses[batch.positions == 0] == 0).all()
    assert np.isfinite(losses[counts]).mean() > 0.99 and (losses[counts & np.isfinite(losses)] > 0).all()


def test_eight_devices_and_other_batches_give_the_same(cut, trained):
    score(str(cut.path), str(trained[0]), name="eight", batch_size=8, cross_tokenizer=True)
    np.testing.assert_allclose(column(cut, "eight"), column(cut), rtol=1e-5, atol=1e-6)


def test_the_prefix_is_read_or_not(texts, vocabularies, trained, tmp_path):
    """Without it, a document costs what the plain one does; the prefix itself has no loss."""
    run, own = trained
    some = texts[:10]
    corpus = corpus_of(tmp_path / "corpus", some, vocabularies["bytes"], 128, metadata=Metadata())
    with toy.one_device():
        for name, removed in (("seen", False), ("removed", True)):
            score(str(corpus.path), str(run), name=name, strip_metadata=removed, cross_tokenizer=True)
    plain, removed, seen = sums(own), sums(corpus, "removed"), sums(corpus, "seen")
    np.testing.assert_allclose([removed[key] for key in removed], [plain[key] for key in removed], rtol=1e-5)
    assert all(abs(seen[key] - removed[key]) > 1e-3 for key in removed)
    assert corpus.score("removed").reference["prefix"] == "removed"


def test_what_it_says_no_to(texts, vocabularies, trained, tmp_path):
    run, own = trained
    corpus = corpus_of(tmp_path / "corpus", texts[:4], vocabularies["large"])
    line = toy.refused("vocabulary-mismatch", score, str(corpus.path), str(run), batch_size=8)
    assert "score.cross_tokenizer = True" in line
    both = {"statistics": ("loss", "entropy"), "cross_tokenizer": True, "batch_size": 8}
    assert "entropy" in toy.refused("score-statistics", score, str(corpus.path), str(run), **both)
    assert not (Path(corpus.path) / "scores").exists()
    with toy.one_device():  # one vocabulary after all: scored as ever
        score(str(own.path), str(run), name="again", cross_tokenizer=True)
    np.testing.assert_array_equal(column(own, "again"), column(own))
    assert "mapped" not in own.score("again").reference


@given(st.lists(st.integers(1, 60), max_size=12), st.integers(2, 16))
def test_windows_hold_every_token_once_with_what_comes_before_it(lengths, length):
    sequences = [np.arange(size) + 100 * i for i, size in enumerate(lengths)]
    rows = windows(sequences, length)
    assert rows.tokens.shape == rows.segment_ids.shape == (len(rows.tokens), length)
    # The text before each token in its segment: all of a short sequence, half a row and more of a long one.
    before = np.zeros(rows.tokens.shape)
    for row, ids in enumerate(rows.segment_ids):
        for segment in set(ids[ids > 0].tolist()):
            places = np.flatnonzero(ids == segment)
            np.testing.assert_array_equal(np.diff(rows.tokens[row, places]), 1)
            before[row, places] = np.arange(len(places))
    for sequence, found, context in zip(
        sequences, rows.gathered(rows.tokens.astype(np.float32)), rows.gathered(before), strict=True
    ):
        np.testing.assert_array_equal(found, sequence)
        place = np.arange(len(sequence))
        short = len(sequence) <= length
        assert (context == place).all() if short else (context >= np.minimum(place, length - length // 2)).all()

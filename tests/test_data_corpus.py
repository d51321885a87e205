"""The table: what is written is read, what is damaged is refused, and score columns belong to one content."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import toy

from slm_jax.data import store as store_module
from slm_jax.data.corpus import COLUMNS, Corpus, CorpusWriter
from slm_jax.data.scores import ScoreName, create_score, open_score
from slm_jax.data.store import SHARD_ROWS, SHARD_VALUES, Store, disk_full_is_an_answer
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.errors import UserError

ROWS, LENGTH = SHARD_ROWS + 44, 8
REFERENCE = {"checkpoint": "small", "fingerprint": "abc", "steps": [1, 2]}


def content(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "tokens": generator.integers(0, 259, (ROWS, LENGTH)).astype(np.uint16),
        "segment_ids": generator.integers(0, 3, (ROWS, LENGTH)).astype(np.uint16),
        "loss_mask": generator.integers(0, 2, (ROWS, LENGTH)).astype(bool),
        "source_ids": generator.integers(0, 2, (ROWS, LENGTH)).astype(np.uint8),
    }


def make(path, seed: int = 0) -> Corpus:
    writer = CorpusWriter(Store(path), ROWS, LENGTH, ByteVocabulary())
    for begin in range(0, ROWS, SHARD_ROWS):
        writer.write({name: column[begin : begin + SHARD_ROWS] for name, column in content(seed).items()})
    return writer.finish(pyarrow.table({"id": ["a:0"]}), ["a", "b"], {"settings": {}})


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return make(tmp_path / "corpus")


def refusal(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def loss(rows: int, value: float) -> dict[str, np.ndarray]:
    return {"loss": np.full((rows, LENGTH), value, np.float32)}


def test_rows_come_back_in_the_order_asked_for(corpus):
    rows = np.array([ROWS - 1, 3, 3, 0])
    read = corpus.read(rows)
    assert list(read) == list(COLUMNS)
    for name, column in content().items():
        assert read[name].dtype == column.dtype
        np.testing.assert_array_equal(read[name], column[rows])
    assert corpus.read(np.array([], np.int64), ["tokens"])["tokens"].shape == (0, LENGTH)
    assert (corpus.num_rows, corpus.sequence_length, corpus.vocab_size) == (ROWS, LENGTH, 259)
    assert corpus.source_names == ("a", "b")
    assert corpus.vocabulary().content_hash == corpus.vocabulary_hash
    assert corpus.documents().to_pylist() == [{"id": "a:0"}]


@pytest.mark.parametrize("row", [-1, ROWS])
def test_rows_outside_are_refused(corpus, row):
    with pytest.raises(IndexError, match=f"row {row} is outside"):
        corpus.read(np.array([0, row]))


def test_unknown_column(corpus):
    assert "'token'" in toy.refused("corpus-no-column", corpus.read, np.array([0]), ["token"])


def test_fingerprint_is_of_the_content(corpus, tmp_path):
    assert make(tmp_path / "same").fingerprint == corpus.fingerprint
    assert make(tmp_path / "other", seed=1).fingerprint != corpus.fingerprint
    moved = shutil.move(tmp_path / "corpus", tmp_path / "moved")
    assert Corpus.open(moved).fingerprint == corpus.fingerprint


@pytest.mark.parametrize("column", COLUMNS)
def test_verify_notices_one_changed_value(corpus, column):
    corpus.verify()
    value = corpus.read(np.array([7]), [column])[column]
    Store(corpus.path).open_array(f"columns/{column}")[7:8].write(
        np.where(value == 0, 1, 0).astype(value.dtype)
    ).result()
    assert corpus.path in toy.refused("corpus-damaged", corpus.verify)


def test_expect_names_both_and_the_remedy(corpus):
    corpus.expect(corpus.fingerprint, "the run")
    message = toy.refused("corpus-mismatch", corpus.expect, "0123456789abcdef", "the run runs/a")
    assert "the run runs/a" in message and "0123456789ab" in message and corpus.fingerprint[:12] in message


def test_a_corpus_that_cannot_be_opened(corpus, tmp_path):
    path = tmp_path / "corpus"
    assert str(tmp_path / "nothing") in toy.refused("corpus-not-found", Corpus.open, tmp_path / "nothing")
    assert "manifest.json" in toy.refused("corpus-not-one", Corpus.open, path / "vocabulary")
    assert "ftp://host/corpus" in toy.refused("path-unsupported", Corpus.open, "ftp://host/corpus")
    manifest = path / "manifest.json"
    good = manifest.read_text()
    for text in (good[:-20], "[]"):
        manifest.write_text(text)
        assert str(manifest) in toy.refused("file-damaged", Corpus.open, path)
    for code, text, named in [
        ("corpus-damaged", good.replace('"num_rows"', '"rows"'), "KeyError('num_rows')"),
        ("corpus-format", json.dumps(json.loads(good) | {"format_version": 99}), "format version 99"),
        ("corpus-damaged", json.dumps(json.loads(good) | {"num_rows": 5}), "5 x 8"),
    ]:
        manifest.write_text(text)
        assert named in toy.refused(code, Corpus.open, path)
    manifest.write_text(good)
    shutil.rmtree(path / "columns" / "loss_mask")
    assert "'loss_mask'" in toy.refused("corpus-damaged", Corpus.open, path)
    manifest.unlink()
    assert str(path) in toy.refused("corpus-unfinished", Corpus.open, path)


def test_a_score_is_written_in_ranges_and_read_beside_the_columns(corpus):
    score = corpus.create_score("small", reference=REFERENCE)
    assert score.pending() == [(0, SHARD_ROWS), (SHARD_ROWS, ROWS)] and not score.complete
    score.write(SHARD_ROWS, loss(44, 2.0))
    score.write(0, loss(10, 1.0))
    assert f"54 of {ROWS} rows" in toy.refused("score-unfinished", corpus.score, "small")
    again = Corpus.open(corpus.path).create_score("small", reference=REFERENCE)
    assert again.finished().sum() == 54 and again.pending() == [(0, SHARD_ROWS)]
    again.write(0, loss(SHARD_ROWS, 1.0))
    assert again.complete and again.pending() == []
    assert corpus.score("small").reference == REFERENCE
    read = corpus.read(np.array([0, ROWS - 1]), ["tokens", "scores/small/loss"])
    assert read["scores/small/loss"][:, 0].tolist() == [1.0, 2.0]
    message = toy.refused("score-no-statistic", corpus.read, np.array([0]), ["scores/small/entropy"])
    assert "'entropy'" in message


def test_marks_of_finished_rows_are_few_files_and_those_of_earlier_columns_are_read(tmp_path):
    """A column of the rows of a large corpus: its marks are read when a run starts."""
    store, rows = Store(tmp_path), 3 * SHARD_VALUES + 100
    column = create_score(store, "large", ("loss",), "float32", REFERENCE, "content", (rows, LENGTH))
    assert len(column.pending()) == -(-rows // SHARD_ROWS) and column.num_finished() == 0
    for begin, end in [(0, 10), (SHARD_VALUES - 5, 2 * SHARD_VALUES + 5), (rows - 100, rows)]:
        column._arrays["finished"][begin:end].write(np.ones(end - begin, np.uint8)).result()
    again = open_score(store, "large", "content", partial=True)
    assert again.num_finished() == again.finished().sum() == 10 + SHARD_VALUES + 10 + 100
    assert again.pending()[0] == (0, SHARD_ROWS) and again.pending()[-1][1] <= rows - 100
    assert len(list((tmp_path / "scores/large/finished").rglob("c/*"))) == 4
    # Earlier versions wrote one file for 256 rows.
    old = create_score(store, "old", ("loss",), "float32", REFERENCE, "content", (ROWS, LENGTH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "SHARD_VALUES", SHARD_ROWS)
        old._arrays["finished"] = store.create_array("scores/old/finished", "uint8", (ROWS,))
    old.write(0, loss(ROWS, 1.0))
    assert len(list((tmp_path / "scores/old/finished").rglob("c/*"))) == 2
    assert open_score(store, "old", "content").complete


def test_names_of_score_arrays():
    assert (
        str(ScoreName("small", "entropy")) == "scores/small/entropy" and str(ScoreName("small")) == "scores/small/loss"
    )
    assert ScoreName.parse("scores/small/entropy") == ("small", "entropy")
    for column in ("tokens", "scores/small", "scores/small/", "scores//loss", "scores/a/b/c"):
        assert repr(column) in toy.refused("corpus-no-column", ScoreName.parse, column)


def test_score_refusals(corpus, tmp_path):
    corpus.create_score("small", ("loss", "entropy"), "float16", reference=REFERENCE)
    assert "'large' (it has small)" in toy.refused("score-not-found", corpus.score, "large")
    changed = {"reference": {"checkpoint": "large"}, "dtype": "float32", "statistics": ("loss",)}
    for key, value in changed.items():
        same = {"statistics": ("loss", "entropy"), "dtype": "float16", "reference": REFERENCE}
        message = toy.refused("score-other-settings", corpus.create_score, "small", **{**same, key: value})
        assert f"with {key} " in message
    assert "'../escape'" in toy.refused("score-name", corpus.create_score, "../escape", reference=REFERENCE)
    assert "'int8'" in toy.refused("score-dtype", corpus.create_score, "a", dtype="int8", reference=REFERENCE)
    another = make(tmp_path / "another", seed=1)
    shutil.copytree(tmp_path / "corpus" / "scores", tmp_path / "another" / "scores")
    message = toy.refused("score-other-corpus", another.score, "small")
    assert corpus.fingerprint[:12] in message and another.fingerprint[:12] in message
    score = corpus.create_score("good", reference=REFERENCE)
    with pytest.raises(IndexError, match="outside the score"):
        score.write(ROWS - 1, loss(2, 0.0))
    with pytest.raises(ValueError, match="holds"):
        score.write(0, {"entropy": np.zeros((1, LENGTH), np.float32)})
    with pytest.raises(ValueError, match="loss is"):
        score.write(0, {"loss": np.zeros((1, LENGTH + 1), np.float32)})


def test_nothing_is_marked_finished_when_the_values_did_not_arrive(corpus):
    score = corpus.create_score("small", reference=REFERENCE)

    class Failing:
        shape, dtype = score.array("loss").shape, score.array("loss").dtype

        def __getitem__(self, rows):
            raise OSError("lost the disk")

    score._arrays["loss"] = Failing()
    with pytest.raises(OSError):
        score.write(0, loss(4, 1.0))
    assert not score.finished().any()


def test_remote_paths_are_the_same_specification(monkeypatch):
    store = Store("gs://a-bucket/corpora/web")
    assert store.local() is None
    assert store._kvstore("columns/tokens") == "gs://a-bucket/corpora/web/columns/tokens/"


def test_no_space_left_is_told_in_one_line():
    for error in (OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: No space left on device")):
        full = pytest.raises(UserError, match="disk full while writing rows: free some")
        with full, disk_full_is_an_answer("rows", "free some"):
            raise error
    with pytest.raises(ValueError, match="something else"), disk_full_is_an_answer("rows", "free some"):
        raise ValueError("something else")


def test_a_flipped_bit_of_the_documents_is_refused(corpus):
    file = Path(corpus.path) / "documents.parquet"
    good = file.read_bytes()
    for place in range(len(good)):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        assert "documents.parquet" in toy.refused("corpus-damaged", Corpus.open(corpus.path).documents)
    file.write_bytes(good)
    assert Corpus.open(corpus.path).documents().num_rows == 1


@pytest.mark.parametrize("key", ["columns/tokens", "columns/loss_mask", "scores/a/loss"])
def test_a_flipped_bit_is_refused_where_it_is_read(corpus, key):
    """A sample of bytes, every bit of each: the content is refused by name, or is what it was."""
    values = np.random.default_rng(1).random((ROWS, LENGTH)).astype(np.float32)
    corpus.create_score("a", reference=REFERENCE).write(0, {"loss": values})
    column = key.removeprefix("columns/")
    expected = {**content(), "scores/a/loss": values}[column]
    file, rows = Path(corpus.path) / key / "c/0/0", np.arange(SHARD_ROWS)
    good, refused = file.read_bytes(), 0
    for place in np.linspace(0, len(good) - 1, 40).astype(int).tolist():
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            file.write_bytes(bad)
            try:
                read = Corpus.open(corpus.path).read(rows, [column])[column]
                np.testing.assert_array_equal(read, expected[:SHARD_ROWS])
            except UserError as error:
                assert error.code == "column-damaged" and corpus.path in str(error) and column in str(error)
                assert f"rows 0 to {SHARD_ROWS - 1}" in str(error)
                refused += 1
    assert refused == 320
    file.write_bytes(good)
    np.testing.assert_array_equal(Corpus.open(corpus.path).read(rows, [column])[column], expected[:SHARD_ROWS])


def test_a_flipped_bit_in_the_marks_of_finished_rows(corpus):
    corpus.create_score("a", reference=REFERENCE).write(0, loss(ROWS, 1.0))
    file = Path(corpus.path) / "scores/a/finished/c/0"
    content = bytearray(file.read_bytes())
    content[0] ^= 4
    file.write_bytes(content)
    assert "finished" in toy.refused("column-damaged", Corpus.open(corpus.path).score, "a")

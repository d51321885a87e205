"""Conditional inference: the same tokens are measured, behind what was put before their document and nothing else."""

import json
from collections import Counter

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax import mesh as mesh_lib
from slm_jax.data.corpus import Corpus
from slm_jax.data.metadata import Metadata
from slm_jax.data.packing import PACKINGS
from slm_jax.data.segments import segments_of
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.evaluate.evaluate import evaluate
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.evaluate.prefix import conditioned, document_prefixes, repack, row_width
from slm_jax.models.trained_model import TrainedModel, load_model
from slm_jax.run_directory import RunDirectory

PREFIX = "URL: a.org\n\n"
HOSTS = ["a.org"] * 7 + ["b.net"] * 2 + ["c.de"]
RECORDS = [
    {"text": " ".join(toy.WORDS[i % 5 : i % 5 + 3 + i % 4]), "url": f"https://{HOSTS[i % 10]}/{i}"} for i in range(40)
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Corpus:
    """Documents of one URL each, the last of which has none, in rows shorter than some of them."""
    records = [*RECORDS, {"text": "no page", "url": ""}]
    return toy.write_documents(tmp_path_factory.mktemp("plain") / "plain", records, 24, "split")


@pytest.fixture(scope="module")
def model(reference) -> TrainedModel:
    with toy.one_device():
        return load_model(str(reference), mesh_lib.make_mesh())


def token_losses(model: TrainedModel, corpus: Corpus, **held_out) -> np.ndarray:
    """The loss of every token of the corpus, NaN where none is measured."""
    with toy.one_device():
        held = HeldOut("held", str(corpus.path), keep_tokens=True, **held_out)
        measure = held.bind(model.config, model.vocabulary_hash, mesh_lib.make_mesh())
        return dict(measure(model.params))["held/tokens"].losses


def by_document(corpus: Corpus, losses: np.ndarray) -> dict[str, np.ndarray]:
    """The measured losses of each document, in the row in which it begins."""
    found = {}
    for row in corpus.documents().to_pylist():
        mine = losses[row["row"], row["start"] : row["start"] + row["length"]]
        found[row["id"]] = mine[~np.isnan(mine)]
    return found


def test_it_is_the_loss_behind_the_metadata_of_a_corpus_that_was_prepared_with_it(model, tmp_path):
    """Document by document, up to where the one or the other is cut at the end of its row."""
    plain = toy.write_documents(tmp_path / "plain", RECORDS, 44)
    with_hosts = toy.write_documents(tmp_path / "hosts", RECORDS, 64, metadata=Metadata())
    put_before = by_document(plain, token_losses(model, plain, metadata=Metadata()))
    prepared = by_document(with_hosts, token_losses(model, with_hosts))
    without = by_document(plain, token_losses(model, plain))
    compared, differs = 0, 0
    for document, losses in prepared.items():
        length = min(len(losses), len(put_before[document]))
        np.testing.assert_allclose(put_before[document][:length], losses[:length], rtol=1e-5, atol=1e-5)
        compared += length
        differs += (np.abs(without[document][:length] - losses[:length]) > 1e-3).sum()
    assert compared > 0.6 * sum(map(len, without.values())) and differs > 0.8 * compared


def test_the_same_tokens_are_measured_and_only_where_a_document_begins_there_is_a_prefix(model, plain):
    without, behind = token_losses(model, plain), token_losses(model, plain, prefix=PREFIX)
    assert (np.isnan(without) == np.isnan(behind)).all()
    rows = plain.read(np.arange(plain.num_rows))
    segments = segments_of(rows["segment_ids"])
    begins = rows["tokens"][segments.row, segments.start] == ByteVocabulary().bos_id
    assert 5 < begins.sum() < len(begins) - 5
    for row, start, length, begin in zip(*segments, begins, strict=True):
        place = (row, slice(start + 1, start + length))
        if begin:
            assert length < 3 or np.abs(without[place] - behind[place]).max() > 1e-3
        else:
            np.testing.assert_allclose(behind[place], without[place], rtol=1e-5, atol=1e-5)


def test_no_prefix_changes_nothing(model, plain):
    """Though the rows are other rows."""
    np.testing.assert_allclose(token_losses(model, plain, prefix=""), token_losses(model, plain), rtol=1e-5, atol=1e-5)


def test_one_host_for_all_is_each_its_own_where_all_have_the_same(model, tmp_path):
    records = [{**record, "url": "http://a.org"} for record in RECORDS[:6]]
    corpus = toy.write_documents(tmp_path / "one", records, 24)
    fixed, own = (token_losses(model, corpus, **held) for held in ({"prefix": PREFIX}, {"metadata": Metadata()}))
    np.testing.assert_array_equal(fixed, own)


def test_the_stage_records_what_was_put_before_the_documents(reference, plain, tmp_path):
    held = [
        HeldOut("none", plain.path),
        HeldOut("fixed", plain.path, prefix=PREFIX),
        HeldOut("right", plain.path, metadata=Metadata(), rows=9),
        HeldOut("wrong", plain.path, metadata=Metadata(form="suffix"), shuffled=True),
    ]
    with toy.one_device():
        evaluate(str(reference), held, output=str(tmp_path / "out.json"))
    record = json.loads((tmp_path / "out.json").read_text())
    ids = ByteVocabulary().encode(PREFIX)
    assert record["prefixes"]["fixed"] == {"text": PREFIX, "ids": ids, "different": 1, "longest": len(ids)}
    assert set(record["prefixes"]) == {"fixed", "right", "wrong"}
    assert 1 < record["prefixes"]["right"]["different"] <= 4
    assert ByteVocabulary().decode(record["prefixes"]["wrong"]["ids"]) == record["prefixes"]["wrong"]["text"]
    assert record["evaluators"][3]["metadata"]["form"] == "suffix" and record["evaluators"][3]["shuffled"]
    assert len({record["results"][f"{name}/loss"] for name in ("none", "fixed", "right", "wrong")}) == 4


def test_in_the_training_loop_it_is_what_the_stage_measures(corpus, plain, tmp_path):
    held = HeldOut("held", plain.path, prefix=PREFIX)
    toy.train_here(tmp_path / "run", [toy.phase(corpus, steps=2)], evaluators=[held], evaluate_every=2)
    (row,) = [row for row in RunDirectory(tmp_path / "run").metrics() if row["step"] == 2 and "held/loss" in row]
    with toy.one_device():
        record = evaluate(str(tmp_path / "run"), [held])
    assert row["held/loss"] == record["results"]["held/loss"]


def test_the_wrong_host_is_another_ones(plain):
    documents = plain.documents()
    right = document_prefixes(documents, Metadata())
    wrong = document_prefixes(documents, Metadata(), shuffled=True)
    assert set(right) == {f"URL: {value}\n\n" for value in ("a.org", "b.net", "c.de", "unknown")}
    assert all(one != other for one, other in zip(right, wrong, strict=True)) and set(wrong) <= set(right)
    assert wrong == document_prefixes(documents, Metadata(), shuffled=True)
    others = Counter(wrong)  # of the 13 documents that are not of a.org, most should be told that they are
    assert others[PREFIX] > 6
    left_out = document_prefixes(documents, Metadata(missing="none"), shuffled=True)
    assert left_out.count("") == 1 and left_out[documents["url"].to_pylist().index(None)] == ""


def test_what_cannot_be_measured_is_refused(model, plain, tmp_path):
    def text(code: str, corpus: Corpus = plain, **held_out) -> str:
        return toy.refused(code, token_losses, model, corpus, **held_out)

    assert "HeldOut held" in text("settings-exclusive", prefix=PREFIX, metadata=Metadata())
    assert "HeldOut.metadata" in text("prefix-shuffled-alone", shuffled=True)
    line = text("prefix-too-long", prefix="x" * 41)
    assert "has 65 tokens with its prefix of up to 41, the model reads 64" in line
    assert "sequence_length = 23 or less" in line
    for metadata in (Metadata(field="topic"), Metadata(top=3)):
        assert "HeldOut.metadata" in text("prefix-needs-url-metadata", metadata=metadata)
    with_hosts = toy.write_documents(tmp_path / "hosts", RECORDS[:4], 44, metadata=Metadata())
    assert with_hosts.path in text("prefix-corpus-has-metadata", with_hosts, prefix=PREFIX)
    no_urls = toy.write_documents(tmp_path / "no_urls", [{"text": "hens", "url": ""}], 44)
    assert "none of the 1 held-out documents" in text("prefix-no-urls", no_urls, metadata=Metadata())
    one_host = toy.write_documents(tmp_path / "one", [RECORDS[0], RECORDS[1]], 44)
    assert "HeldOut.shuffled" in text("prefix-nothing-to-shuffle", one_host, metadata=Metadata(), shuffled=True)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(2, 16),
    st.sampled_from(sorted(PACKINGS)),
    st.data(),
)
def test_repacking_keeps_every_segment_whole_and_in_order(lengths, sequence_length, packing, data):
    pieces = PACKINGS[packing](np.array(lengths), sequence_length)
    shape = (pieces.num_rows, sequence_length)
    segment_ids = np.zeros(shape, np.uint16)
    for row, offset, length, segment in zip(pieces.row, pieces.offset, pieces.length, pieces.segment, strict=True):
        segment_ids[row, offset : offset + length] = segment
    tokens = np.where(segment_ids > 0, np.arange(1, tokens_in(shape) + 1).reshape(shape), 0)
    segments = segments_of(segment_ids)
    np.testing.assert_array_equal(np.stack(segments), np.stack([pieces.row, pieces.offset, pieces.length]))
    prefixes = [[-7] * data.draw(st.integers(0, 5)) for _ in pieces.length]
    needed = max(length + len(prefix) for length, prefix in zip(pieces.length.tolist(), prefixes, strict=True))
    rows = repack(tokens, segments, prefixes, needed + data.draw(st.integers(0, 9)))
    found = segments_of(rows.segment_ids)
    assert len(found.row) == len(prefixes)  # segment ids tell neighbours apart
    for row, start, length, prefix, old in zip(*found, prefixes, zip(*segments, strict=True), strict=True):
        was = tokens[old[0], old[1] : old[1] + old[2]]
        assert rows.tokens[row, start : start + length].tolist() == [was[0], *prefix, *was[1:]]
    np.testing.assert_array_equal(rows.restore(rows.tokens, shape), tokens)
    assert (rows.segment_ids > 0).sum() == sum(pieces.length) + sum(map(len, prefixes))


def tokens_in(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_rows_are_wide_enough_and_no_wider_than_the_model_reads(needed, more):
    width = row_width(needed, needed + more)
    assert needed <= width <= needed + more and (width % 128 == 0 or width == needed)


@pytest.mark.parametrize("how", [{"prefix": PREFIX}, {"metadata": Metadata()}], ids=["prefix", "metadata"])
def test_an_eos_that_begins_a_row_begins_no_document_where_it_is_bos_too(how, monkeypatch, tmp_path):
    """As in the vocabulary of GPT-NeoX."""
    monkeypatch.setattr(ByteVocabulary, "bos_id", ByteVocabulary.eos_id)
    records = [{"text": "x" * 23, "url": "https://a.org/1"}, {"text": "hens", "url": "https://b.net/2"}]
    corpus = toy.write_documents(tmp_path / "corpus", records, 24, "split")
    tokens = corpus.read(np.arange(corpus.num_rows), ["tokens"])["tokens"]
    assert (tokens == ByteVocabulary.eos_id).sum() == 4 and tokens[1][0] == ByteVocabulary.eos_id
    settings = {"prefix": None, "metadata": None} | how
    rows, about = conditioned(corpus, corpus.num_rows, settings["prefix"], settings["metadata"], False, 128)
    length = len(about["ids"])
    assert length > 5 and about["different"] == (1 if "prefix" in how else 2)
    assert (rows.segment_ids > 0).sum() == (tokens != 0).sum() + 2 * length  # both hosts have as many letters

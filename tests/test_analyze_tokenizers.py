"""`analyze tokenizers`: what is counted, that bits per byte are those of `evaluate`, and text that may not compare."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.analyze.tables import of_values, plain
from slm_jax.analyze.tokenizers import Fertility, added, analyze_tokenizers, bits_per_byte, fertility, texts_of
from slm_jax.data.corpus import Corpus
from slm_jax.data.metadata import Metadata
from slm_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary, train_sentencepiece
from slm_jax.data.sources import Source
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.models.trained_model import load_model

REAL = Path(__file__).parents[2] / "shared" / "data"
TEXTS = [
    ("farm", "the pigs eat corn\nand the hens eat corn too, on the farm by the river"),
    ("dorf", "die Schweine fressen Mais und die Hühner picken Körner"),
    ("dorf", "früh am Morgen"),
    ("farm", "12 ducks swim   and quack " * 6),
]
RECORDS = [{"text": text, "url": "", "source": source} for source, text in TEXTS]


@pytest.fixture(scope="module")
def english() -> SentencePieceVocabulary:
    return train_sentencepiece([text for source, text in TEXTS if source == "farm"] * 4, 300)


@pytest.fixture(scope="module")
def corpora(english, tmp_path_factory) -> dict[str, Corpus]:
    """The same documents in bytes and in pieces, cut at row ends."""
    here = tmp_path_factory.mktemp("corpora")
    return {
        "bytes": toy.write_documents(here / "bytes", RECORDS, 24, "split"),
        "English": toy.write_documents(here / "english", RECORDS, 24, "split", vocabulary=english),
    }


def test_tokens_bytes_and_words_are_counted(english):
    counts = fertility(TEXTS, {"bytes": ByteVocabulary(), "English": english})
    german = [text for source, text in TEXTS if source == "dorf"]
    num_bytes = sum(len(text.encode()) for text in german)
    ids = {i for text in german for i in ByteVocabulary().encode(text)}
    assert counts["dorf", "bytes"] == Fertility(2, num_bytes, 12, num_bytes, len(ids))
    assert counts["dorf", "bytes"].per_byte == 1.0
    assert counts["farm", "English"].per_byte < counts["dorf", "English"].per_byte <= 1.0
    assert counts["dorf", "English"].per_word == sum(len(english.encode(text)) for text in german) / 12
    both = added([counts["farm", "English"], counts["dorf", "English"]])
    assert both.documents == 4 and both.words == sum(len(text.split()) for _, text in TEXTS)
    assert fertility([], {"bytes": ByteVocabulary()}) == {}
    assert Fertility(1, 0, 0, 0, 0).per_byte is None


@pytest.mark.parametrize("sequence_length, packing", [(24, "split"), (420, "complete")])
def test_a_corpus_gives_back_its_documents(english, sequence_length, packing, tmp_path):
    """However rows cut them, and without the metadata before them."""
    for number, (vocabulary, metadata) in enumerate([(None, None), (english, None), (None, Metadata(form="host"))]):
        records = [record | {"url": "https://a.org/1"} for record in RECORDS]
        corpus = toy.write_documents(tmp_path / str(number), records, sequence_length, packing, metadata, vocabulary)
        assert sorted(texts_of(corpus)) == sorted(TEXTS)


def test_bits_per_byte_are_those_of_evaluate(corpora, reference, tmp_path):
    path = corpora["bytes"].path
    record = analyze_tokenizers(
        str(tmp_path / "out"), [str(reference)], {name: corpus.path for name, corpus in corpora.items()},
        languages={"dorf": "German", "farm": "English"}, score_missing=True)  # fmt: skip
    (about,) = record["bits_per_byte"]
    with toy.one_device():
        model = load_model(str(reference), mesh_lib.make_mesh())
        held = HeldOut("held", path).bind(model.config, model.vocabulary_hash, mesh_lib.make_mesh())
        measured = dict(held(model.params))
    assert about["by"]["all"] == pytest.approx(measured["held/bits_per_byte"], rel=1e-5)
    assert about["loss"] == pytest.approx(measured["held/loss"], rel=1e-5)
    assert about["by"]["German"] == pytest.approx(about["by"]["dorf"]) and about["vocabulary"] == "bytes"
    total = sum(len(text.encode()) for _, text in TEXTS)
    tokens = corpora["bytes"].read(np.arange(corpora["bytes"].num_rows))
    cut = int(((tokens["segment_ids"][:, 0] > 0) & (tokens["tokens"][:, 0] > 2)).sum())  # pieces that continue
    assert about["covered"] == pytest.approx((total - cut) / total) and cut > 2
    texts = {(entry["text"], entry["vocabulary"]): entry for entry in record["fertility"]}
    assert set(texts) == {(t, v) for t in ("all", "German", "English", "dorf", "farm") for v in ("bytes", "English")}
    assert texts["all", "bytes"]["bytes"] == texts["all", "English"]["bytes"] == total


def test_what_is_written(corpora, english, shell, tmp_path):
    """As a command, with a vocabulary of its own and text from files."""
    (tmp_path / "german.jsonl").write_text(json.dumps({"text": TEXTS[1][1]}) + "\n")
    english.save(tmp_path / "saved")
    code, output, errors = shell(
        "analyze", "tokenizers", "--output=out",
        *toy.settings(analyze_tokenizers={"vocabularies": {"bytes": "bytes", "a|b <i>": "saved"}}),
        *toy.settings(Source={"name": "de", "files": ["german.jsonl"]}),
        "--gin.analyze_tokenizers.sources=[@Source()]", folder=tmp_path)  # fmt: skip
    assert code == 0 and "2 vocabularies, 0 runs; see out/summary.md" in output, errors
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| all | a\\|b &lt;i> | 1 |" in summary and "Bits per byte" not in summary
    with (tmp_path / "out" / "fertility.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["vocabulary"] for row in rows] == ["bytes", "a|b <i>"]
    assert float(rows[0]["tokens_per_byte"]) == 1.0 and float(rows[1]["tokens_per_byte"]) < 1.0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.md", "fertility.csv", "fertility.png", "fertility.svg", "tokenizers.json"}  # fmt: skip
    wrong = toy.settings(analyze_tokenizers={"corpora": ["bytes"]})
    code, _, errors = shell("analyze", "tokenizers", "--output=out", *wrong, folder=tmp_path)
    assert code == 2 and "analyze_tokenizers.corpora" in errors


def test_a_sum_in_bits_over_the_bytes_of_its_tokens():
    losses, num_bytes = np.array([1.0, 3.0, 9.0]) * np.log(2), np.array([2, 0, 5])
    assert bits_per_byte(losses, num_bytes, np.array([True, True, False])) == pytest.approx(2.0)
    assert bits_per_byte(losses, num_bytes, np.array([False, True, False])) is None


def test_tables_say_what_was_not_measured():
    table = of_values(("a", "b", "c", "d", "e", "f"), [("x|y\n<b>", None, float("nan"), 0.12345, 12345, "a&b")])
    assert table.markdown().splitlines()[-1] == "| x\\|y &lt;b> | – | – | 0.123 | 12,345 | a&amp;b |"
    assert (
        table.csv().splitlines()[-2:] == ["x|y", "<b>,,,0.12345,12345,a&b"]
        or '"x|y\n<b>",,,0.12345,12345,a&b' in table.csv()
    )
    values = {"a": np.array([1.0, np.nan]), "b": (np.float32(2), float("inf"), True), 3: None}
    assert plain(values) == {"a": [1.0, None], "b": [2.0, None, True], "3": None}


def test_refusals(corpora, reference, tmp_path):
    def refused(code: str, **settings) -> str:
        return toy.refused(code, analyze_tokenizers, str(tmp_path / "out"), **settings)

    both = {name: corpus.path for name, corpus in corpora.items()}
    refused("tokenizers-nothing")
    refused("tokenizers-nothing", vocabularies={"bytes": "bytes"})
    refused("tokenizers-repeated-vocabulary", corpora={"a": both["bytes"], "b": both["bytes"]})
    other = toy.write_documents(tmp_path / "other", RECORDS[:2], 24, "split")
    line = refused("tokenizers-other-text", corpora={"English": both["English"], "bytes": other.path})
    assert "(4 documents)" in line and other.path in line
    run = [str(reference)]
    line = refused("tokenizers-no-corpus", corpora={"English": both["English"]}, runs=run)
    assert str(reference) in line and "English (" in line
    assert f"{reference.name}-6" in refused("columns-missing", corpora={"bytes": other.path}, runs=run)
    nowhere = str(tmp_path / "nowhere")
    assert nowhere in toy.refusal(analyze_tokenizers, str(tmp_path / "out"), corpora=both, vocabularies={"a": nowhere})
    missing = str(tmp_path / "none.jsonl")
    settings = {"vocabularies": {"bytes": "bytes"}, "sources": [Source("empty", [missing])]}
    assert missing in toy.refusal(analyze_tokenizers, str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL.exists(), reason="the real data sets are not here")
def test_real_german_needs_more_tokens_in_an_english_vocabulary():
    def texts(file: str) -> list[str]:
        from slm_jax.data.sources import read_documents

        source = Source("real", [str(REAL / file)], max_characters=60_000)
        return [row["text"] for row in read_documents(source) if not row["skipped"]]

    text = {"German": texts("de_10kgnad.jsonl.gz"), "English": texts("ag_news_test_en.jsonl.gz")}
    vocabularies = {name: train_sentencepiece(text[name], 1000) for name in text}
    counts = fertility([(name, one) for name in text for one in text[name]], vocabularies)
    for language, other in (("German", "English"), ("English", "German")):
        assert counts[language, language].per_byte < 0.8 * counts[language, other].per_byte

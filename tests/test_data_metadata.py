"""Metadata: what a URL becomes, what is put before a document, and the two corpora that share no document."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.data import metadata as metadata_lib
from slm_jax.data.corpus import Corpus
from slm_jax.data.metadata import Metadata, domain, hashed, host, most_frequent, prefix_tokens, suffix
from slm_jax.data.prepare import prepare
from slm_jax.data.sources import Source, read_documents, text_fraction
from slm_jax.data.vocabularies import VocabularyConfig
from slm_jax.data.vocabulary import ByteVocabulary

BYTES = VocabularyConfig(kind="bytes")
HOSTS = ["en.wikipedia.org"] * 6 + ["www.bbc.co.uk"] * 3 + ["a.example.com"]


@pytest.mark.parametrize(
    "url, expected",
    [
        ("https://en.wikipedia.org/wiki/Hen", "en.wikipedia.org"),
        ("http://www.bbc.co.uk", "www.bbc.co.uk"),
        ("  HTTPS://EN.Wikipedia.ORG./  ", "en.wikipedia.org"),
        ("en.wikipedia.org/wiki/Hen", "en.wikipedia.org"),
        ("//cdn.example.com/a", "cdn.example.com"),
        ("ftp://example.com:2121/file", "example.com"),
        ("example.com:8080", "example.com"),
        ("https://user:pa%40ss@example.com/", "example.com"),
        ("https://example.com?q=a/b", "example.com"),
        ("https://example.com#top", "example.com"),
        ("https://bücher.example/ä b", "bücher.example"),
        ("https://xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("https://हिन्दी.भारत/", "हिन्दी.भारत"),
        ("http://192.168.0.1:80/a", "192.168.0.1"),
        ("http://[2001:DB8::1]:8080/a", "[2001:db8::1]"),
        ("http://[2001:zz]/", None),
        ("", None),
        ("unknown", None),
        ("http://localhost/a", None),
        ("http://", None),
        ("https:///path/only", None),
        ("http://a..b.org", None),
        ("https://two words.org", None),
        ("https://example.com/a\nURL: other.org", None),
        ("mailto:someone@example.com", None),
        ("someone@example.com", None),
        ("javascript:void(0)", None),
    ],
)
def test_the_host_of_a_url(url, expected):
    assert host(url) == expected


@given(st.text())
def test_a_host_is_one_word_and_its_own_host(text):
    found = host(text)
    assert found is None or (
        found == host(found) and not re.search(r"[\s/?#@]", found) and "." in found + "." * (":" in found)
    )


@pytest.mark.parametrize(
    "url, registered, public",
    [
        ("https://news.www.bbc.co.uk/a", "bbc.co.uk", "co.uk"),
        ("https://en.wikipedia.org", "wikipedia.org", "org"),
        ("https://someone.github.io", "github.io", "io"),  # companies that give out names are no registries
        ("https://www.münchen.de", "münchen.de", "de"),
        ("http://192.168.0.1", "192.168.0.1", None),
        ("http://[::1]/", "[::1]", None),
        ("http://printer.internal", None, None),
        ("http://co.uk", None, "co.uk"),
        ("nothing", None, None),
    ],
)
def test_registered_domain_and_suffix_without_network(url, registered, public, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(pathlib.Path, "mkdir", no_network)  # nor is a cache kept
    metadata_lib._extractor.cache_clear()
    metadata_lib._split.cache_clear()
    assert (domain(url), suffix(url)) == (registered, public)


def test_hashed_values_are_stable_and_distinct():
    values = [f"host{i}.example.com" for i in range(2000)]
    strings = [hashed(value) for value in values]
    assert len(set(strings)) == 2000 and all(re.fullmatch(r"[0-9a-z]{8}-[0-9a-z]{4}", string) for string in strings)
    assert hashed("en.wikipedia.org") == "hs7wcba6-q6ax"  # every corpus made with it depends on it


@given(st.lists(st.sampled_from("abcdef") | st.none()), st.integers(1, 7))
def test_most_frequent_does_not_depend_on_the_order(values, top):
    kept, counts = most_frequent(values, top), Counter(value for value in values if value)
    assert kept == most_frequent(values[::-1], top) and len(kept) == min(top, len(counts))
    ranked = [(-counts[value], value) for value in counts]
    assert max([rank for rank in ranked if rank[1] in kept], default=(0, "")) <= min(
        [rank for rank in ranked if rank[1] not in kept], default=(1, "")
    )


@pytest.mark.parametrize(
    "settings, own, expected",
    [
        ({}, "x.org", "URL: x.org\n\n"),
        ({}, None, "URL: unknown\n\n"),
        ({"missing": "none"}, None, ""),
        ({"top": 1}, "rare.org", "URL: unknown\n\n"),
        ({"top": 1, "hashed": True}, "rare.org", "URL: unknown\n\n"),
        ({"hashed": True}, "x.org", f"URL: {hashed('x.org')}\n\n"),
        ({"field": "meta.topic"}, "hens, pigs", "Topic: hens, pigs\n\n"),
        ({"field": "topic", "name": "About"}, "hens", "About: hens\n\n"),
    ],
)
def test_what_stands_before_a_document(settings, own, expected):
    metadata = Metadata(**settings)
    kept = frozenset({"x.org"}) if metadata.top else None
    assert metadata.prefix(metadata.shown(own, kept)) == expected


@pytest.mark.parametrize(
    "settings, code, named",
    [
        ({"form": "path"}, "setting-unknown-value", "'path': it takes one of 'host', 'url', 'domain', 'suffix'"),
        ({"missing": "drop"}, "setting-unknown-value", "'drop'"),
        ({"top": 0}, "setting-out-of-range", "Metadata.top is 0"),
    ],
)
def test_settings_that_make_no_sense(settings, code, named):
    assert named in toy.refused(code, Metadata, **settings)


def record(number: int) -> dict:
    url = f"https://{HOSTS[number % 10]}/{number}"
    url = {7: None, 17: "no page", 27: ""}.get(number, url)
    return {
        "text": f"The story number {number}. " * (number % 4 + 1),
        "url": url,
        "about": {"topic": ["hens", number], "level": None},
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    """400 documents with URLs, three of them without a usable one; text 5 occurs twice."""
    path = tmp_path_factory.mktemp("files") / "web.jsonl"
    records = [*(record(number) for number in range(400)), {**record(5), "url": "https://copy.org"}]
    path.write_text("\n".join(map(json.dumps, records)))
    return Source("web", [str(path)])


@pytest.fixture(scope="module")
def pair(source, tmp_path_factory) -> tuple[Corpus, Corpus]:
    """The corpus with hosts, packed as in the paper, and the plain one of a quarter of the documents."""
    where = tmp_path_factory.mktemp("pair")
    settings = {"vocabulary": BYTES, "sequence_length": 256, "packing": "complete", "processes": 1}
    first = prepare(where / "url", [source], metadata=Metadata(), plain=where / "plain", plain_share=0.25, **settings)
    return first, Corpus.open(where / "plain")


def segments(corpus: Corpus) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, loss mask) of every piece of a document."""
    rows = corpus.read(np.arange(corpus.num_rows))
    found = []
    for tokens, segment, mask in zip(rows["tokens"], rows["segment_ids"], rows["loss_mask"], strict=True):
        found += [(tokens[segment == s], mask[segment == s]) for s in range(1, segment.max() + 1)]
    return found


def test_every_document_is_its_prefix_without_loss_and_its_text_with(pair, source):
    """[BOS] + prefix + text + [EOS], each encoded by itself; at the end of a row less of it."""
    corpus, vocabulary = pair[0], ByteVocabulary()
    rows, table = corpus.read(np.arange(corpus.num_rows)), corpus.documents().to_pylist()
    whole = 0
    for document in table:
        number = int(document["id"].split(":")[1])
        expected = record(number) if number < 400 else {**record(5), "url": "https://copy.org"}
        shown = host(expected["url"] or "") or "unknown"
        assert (document["metadata"], document["url"]) == (shown, expected["url"] or None)
        given = [vocabulary.bos_id, *vocabulary.encode(f"URL: {shown}\n\n")]
        ids = [*given, *vocabulary.encode(expected["text"]), vocabulary.eos_id][: document["length"]]
        place = (document["row"], slice(document["start"], document["start"] + document["length"]))
        assert rows["tokens"][place].tolist() == ids
        assert rows["loss_mask"][place].tolist() == (np.arange(len(ids)) >= len(given)).tolist()
        assert not rows["loss_mask"][place][0] and document["bytes"] == len(expected["text"])
        whole += len(ids) == document["length"] and ids[-1] == vocabulary.eos_id
    assert whole > 0.6 * len(table)
    assert (rows["tokens"][:, 0] == vocabulary.bos_id).all()


def test_no_document_and_no_copy_of_a_text_is_in_both(pair, source):
    ids = [{row["id"] for row in corpus.documents().to_pylist()} for corpus in pair]
    assert not ids[0] & ids[1] and ids[0] | ids[1] == {f"web:{number}" for number in range(401)}
    assert ({"web:5", "web:400"} <= ids[0]) != ({"web:5", "web:400"} <= ids[1])
    assert 0.17 < len(ids[1]) / 401 < 0.33
    assert pair[0].vocabulary_hash == pair[1].vocabulary_hash
    fractions = {f"web:{row['index']}": text_fraction(row["text"]) for row in read_documents(source)}
    assert all((fractions[id_] < 0.25) == (id_ in ids[1]) for id_ in fractions)


def test_the_share_does_not_depend_on_the_part(source):
    half = list(read_documents(Source("web", source.files, part="0/2")))
    plain = sum(text_fraction(row["text"]) < 0.25 for row in half)
    assert text_fraction("The farm has hens.") == 0.29365952259788064  # else one of two corpora, made again, overlaps
    assert 130 < len(half) < 270 and 0.15 < plain / len(half) < 0.35


def test_the_plain_corpus_is_plain(pair):
    rows = pair[1].read(np.arange(pair[1].num_rows))
    assert pair[1].metadata is None and "metadata" not in pair[1].documents().column_names
    assert not prefix_tokens(rows["segment_ids"], rows["loss_mask"]).any()
    assert all(not mask[0] and mask[1:].all() for _, mask in segments(pair[1]))


def test_the_manifest_and_the_report_count(pair, source, tmp_path, capsys):
    corpus = pair[0]
    rows, about = corpus.read(np.arange(corpus.num_rows)), corpus.manifest["metadata"]
    assert corpus.metadata == {
        "form": "host", "field": None, "name": None, "hashed": False, "top": None, "missing": "unknown",
    }  # fmt: skip
    assert about["tokens"] == prefix_tokens(rows["segment_ids"], rows["loss_mask"]).sum() > 0
    shown = corpus.documents()["metadata"].to_pylist()
    assert about["values"] == len(set(shown))
    assert sum(about["without"].values()) == shown.count("unknown")
    everything = prepare(tmp_path / "all", [source], BYTES, 256, processes=1, metadata=Metadata(missing="none"))
    assert everything.manifest["metadata"]["without"] == {"web: no URL": 2, "web: malformed URL": 1}
    assert everything.documents()["metadata"].to_pylist().count(None) == 3
    printed = capsys.readouterr().out
    assert (
        "before each document: 'URL: ...' from the URL" in printed
        and "metadata of their own, web: no URL: 2 documents" in printed
    )
    assert f"metadata: {everything.manifest['metadata']['tokens']:,} tokens, 4 values" in printed


def test_only_the_most_frequent_stay(source, tmp_path):
    corpus = prepare(tmp_path / "top", [source], BYTES, 256, processes=1, metadata=Metadata(top=2))
    shown = Counter(corpus.documents()["metadata"].to_pylist())
    assert set(shown) == {"en.wikipedia.org", "www.bbc.co.uk", "unknown"}
    without = corpus.manifest["metadata"]["without"]
    assert without["web: rare URL"] == 41 and shown["unknown"] == 44 == sum(without.values())
    assert (corpus.manifest["num_documents"], corpus.manifest["skipped"]) == (401, {})


def test_another_field(source, tmp_path):
    metadata = Metadata(field="about.topic")
    corpus = prepare(tmp_path / "topic", [source], BYTES, 256, processes=1, metadata=metadata)
    first = corpus.documents().to_pylist()[0]
    number = int(first["id"].split(":")[1])
    assert first["metadata"] == f"hens, {number}"
    tokens = corpus.read(np.arange(1))["tokens"][0]
    assert ByteVocabulary().decode(tokens).startswith(f"Topic: hens, {number}\n\nThe story number {number}.")


def test_a_document_that_continues_carries_no_prefix(source, tmp_path):
    """Rows shorter than a document: what continues is the rest of it, and nothing is put before that."""
    corpus = prepare(tmp_path / "split", [source], BYTES, 32, processes=1, metadata=Metadata())
    flat = corpus.read(np.arange(corpus.num_rows))
    begins = {(row["row"], row["start"]) for row in corpus.documents().to_pylist()}
    mask, tokens = flat["loss_mask"], flat["tokens"]
    assert (tokens[tuple(np.array(sorted(begins)).T)] == ByteVocabulary().bos_id).all()
    joined = mask[flat["segment_ids"] > 0]
    assert (~joined).sum() == corpus.manifest["metadata"]["tokens"] + 401
    starts = np.flatnonzero(tokens[flat["segment_ids"] > 0] == ByteVocabulary().bos_id)
    without = [np.flatnonzero(document)[0] for document in np.split(joined, starts)[1:]]
    lengths = {len(f"URL: {shown}\n\n") + 1 for shown in [*HOSTS, "unknown", "copy.org"]}
    assert set(without) == lengths  # the loss of every document begins after one prefix, wherever its rows end


def test_the_same_again_and_other_settings(pair, source, capsys):
    where, plain = pathlib.Path(pair[0].path), pathlib.Path(pair[1].path)
    settings = {"vocabulary": BYTES, "sequence_length": 256, "packing": "complete", "processes": 1}
    again = {**settings, "metadata": Metadata(), "plain": plain, "plain_share": 0.25}
    assert prepare(where, [source], **again).fingerprint == pair[0].fingerprint
    assert capsys.readouterr().out.count("is there already") == 2
    for changed, named in [({"metadata": None}, "metadata was {"), ({"plain": None}, "texts was")]:
        assert named in toy.refused("prepare-other-settings", prepare, where, [source], **{**again, **changed})
    other = where.parent / "other"
    message = toy.refused("prepare-other-settings", prepare, other, [source], **{**again, "plain_share": 0.5})
    assert "texts was [0.0, 0.25], now [0.0, 0.5]" in message
    assert not other.exists()  # refused before the first corpus is made, not after
    for changed, code, named in [
        ({"plain_share": 1.0}, "setting-out-of-range", "1.0"),
        ({"plain": other}, "prepare-same-directory", str(other)),
    ]:
        assert named in toy.refused(code, prepare, other, [source], **{**again, **changed})


def test_a_source_that_cannot_have_the_metadata(source, tmp_path):
    def message(source: Source, metadata: Metadata) -> str:
        return toy.refused("metadata-no-field", prepare, tmp_path / "corpus", [source], BYTES, metadata=metadata)

    files = source.files
    line = message(Source("web", files, url_field="link"), Metadata())
    assert "source 'web' has no field 'link' in its first 1,000 records" in line and "Source.url_field" in line
    line = message(Source("web", files, schema="slimpajama"), Metadata(form="domain"))
    assert "source 'web' has no URL in its schema" in line and "schema 'slimpajama'" in line
    assert (
        "no field 'about.kind'" in (line := message(source, Metadata(field="about.kind"))) and "Metadata.field" in line
    )
    assert not (tmp_path / "corpus").exists()
    prepare(
        tmp_path / "corpus", [source], BYTES, metadata=Metadata(field="about.level"), processes=1
    )  # there, but empty


KILLED = """
import os, signal, sys
from slm_jax.data import prepare, prepare_steps
from slm_jax.data.metadata import Metadata
from slm_jax.data.sources import Source
from slm_jax.data.vocabularies import VocabularyConfig
where, file = sys.argv[1:]
create = prepare_steps.create_columns
def create_or_die(store, *rest):
    if store.path.endswith("plain"):
        os.kill(os.getpid(), signal.SIGKILL)
    return create(store, *rest)
prepare_steps.create_columns = create_or_die
prepare.prepare(where + "/url", [Source("web", [file])], VocabularyConfig(kind="bytes"), 256, "complete", processes=1,
                metadata=Metadata(), plain=where + "/plain", plain_share=0.25)
"""


def test_killed_within_the_second_it_continues_there(pair, source, tmp_path, capsys):
    command = [sys.executable, "-c", KILLED, str(tmp_path), source.files[0]]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "half prepared" in toy.refusal(Corpus.open, tmp_path / "plain")
    settings = {"vocabulary": BYTES, "sequence_length": 256, "packing": "complete", "processes": 1}
    where = {"plain": tmp_path / "plain", "plain_share": 0.25}
    prepare(tmp_path / "url", [source], metadata=Metadata(), **where, **settings)
    assert "is there already" in (printed := capsys.readouterr().out) and "1 parts were tokenized before" in printed
    for name, corpus in zip(("url", "plain"), pair, strict=True):
        finished = Corpus.open(tmp_path / name)
        assert (finished.fingerprint, finished.manifest) == (corpus.fingerprint, corpus.manifest)
        assert finished.documents() == corpus.documents()

"""Reading: row schemas, formats, and what is said about input that cannot be read."""

import gzip
import importlib.resources.abc
import json
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from slm_jax.data.seqio_tasks import documents, register_task
from slm_jax.data.sources import SCHEMAS, Source, read_documents
from slm_jax.data.vocabularies import ByteVocabulary, train_sentencepiece
from slm_jax.errors import UserError

# One row per schema, written by hand after the data sets' cards: text, url and source name expected.
ROWS = {
    "plain": ({"text": "a", "url": "https://x.org/1"}, "https://x.org/1", "s"),
    "text": ({"text": "a", "url": "https://x.org/ignored"}, "", "s"),
    "openwebmath": (
        {"text": "a", "url": "https://x.org/2", "date": "2023-01-01", "metadata": '{"extraction_info": {}}'},
        "https://x.org/2",
        "s",
    ),
    "slimpajama": ({"text": "a", "meta": {"redpajama_set_name": "RedPajamaC4"}}, "", "s/RedPajamaC4"),
    "c4": ({"text": "a", "timestamp": "2019-04-25T12:57:54Z", "url": "http://x.org/3"}, "http://x.org/3", "s"),
    "refinedweb": (
        {"content": "a", "url": "http://x.org/4", "dump": "CC", "segment": "1", "image_urls": [["i", "alt"]]},
        "http://x.org/4",
        "s",
    ),
    "dclm": (
        {"text": "a", "url": "http://x.org/5", "metadata": {"WARC-Target-URI": "other"}, "previous_word_count": 1},
        "http://x.org/5",
        "s",
    ),
    "oscar": (
        {"content": "a", "warc_headers": {"warc-target-uri": "http://x.org/6"}, "metadata": {"tlsh": None}},
        "http://x.org/6",
        "s",
    ),
}


def write(path, *lines) -> str:
    content = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode("utf-8")
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return str(path)


def read(*files, **settings) -> list[dict]:
    return [row for row in read_documents(Source("s", list(files), **settings)) if not row["skipped"]]


def refusal(call, *arguments, **settings) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_schema_has_a_row():
    """Those of conversations are in test_data_conversations."""
    assert set(ROWS) == {name for name, schema in SCHEMAS.items() if not (schema.turn or schema.response)}


@pytest.mark.parametrize("schema", ROWS)
def test_row_schema(schema, tmp_path):
    row, url, source = ROWS[schema]
    path = write(tmp_path / "a.jsonl", row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for file in (path, str(tmp_path / "a.parquet")):
        (found,) = read(file, schema=schema)
        assert (found["text"], found["url"], found["source"]) == ("a", url, source)


def test_nested_fields_also_where_meta_is_a_json_string(tmp_path):
    meta = {"redpajama_set_name": "RedPajamaBook"}
    path = write(
        tmp_path / "a.jsonl", {"text": "a", "meta": meta}, {"text": "b", "meta": json.dumps(meta)}, {"text": "c"}
    )
    names = [row["source"] for row in read(path, schema="slimpajama")]
    assert names == ["s/RedPajamaBook", "s/RedPajamaBook", "s"]
    deep = write(tmp_path / "b.jsonl", {"body": {"content": "deep"}, "link": None})
    assert read(deep, text_field="body.content", url_field="link")[0]["text"] == "deep"


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst"])
def test_json_lines_compressed_or_not(ending, tmp_path):
    path = write(tmp_path / f"a{ending}", {"text": "α\u2028β"}, "", {"text": "b"})
    assert [row["text"] for row in read(path)] == ["α\u2028β", "b"]


def test_zstd_of_several_frames_and_text_files(tmp_path):
    frames = [zstandard.compress(json.dumps({"text": str(i) * 300_000}).encode() + b"\n") for i in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [row["text"][0] for row in read(str(tmp_path / "a.jsonl.zst"))] == ["0", "1", "2"]
    (tmp_path / "b.txt").write_text("one\ndocument\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    assert [row["text"] for row in read(str(tmp_path / "*.txt*"), schema="text")] == ["first", "one\ndocument\n"]


def test_parts_are_disjoint_and_complete_whatever_the_name(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"text": f"document {i % 150}"} for i in range(200)])
    halves = [
        [row["text"] for row in read_documents(Source(name, [path], part=part))]
        for name, part in (("train", "0-1/4"), ("held-out", "2-3/4"))
    ]
    assert not set(halves[0]) & set(halves[1])  # copies of one text are in the same half
    assert len(halves[0]) + len(halves[1]) == 200 and min(map(len, halves)) > 60


def test_budgets(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"text": "12345"}] * 10)
    assert len(read(path, max_documents=3)) == 3
    assert len(read(path, max_characters=12)) == 3
    assert [row["index"] for row in read(path)] == list(range(10))


def test_bad_lines_are_skipped_up_to_the_limit(tmp_path):
    bad = ["{", "[1]", "null", {"other": 1}, {"text": 3}, '{"text": "\\ud800"}']
    path = write(tmp_path / "a.jsonl", {"text": "good"}, *bad, {"text": ""}, {"text": None}, {"text": "good"})
    rows = list(read_documents(Source("s", [path], bad_lines=6)))
    assert [row["skipped"] for row in rows if row["skipped"]] == ["unreadable record"] * 6 + ["empty text"] * 2
    message = refusal(read, path, bad_lines=5)
    assert f"{path}:7: not valid Unicode" in message and "bad_lines = 5" in message


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "not JSON"),
        (b'"text"', "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"content": "x", "id": 1}', "no field 'text' (schema 'plain'; fields there: content, id)"),
        (b'{"text": "x", "spans": [[0, 2]]}', "field 'spans' has a span outside the text of 1 characters"),
        (b'{"text": "x", "spans": 3}', "field 'spans' is not a list of [begin, end]"),
    ],
)
def test_a_bad_line_is_named(line, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    message = refusal(read, str(path), bad_lines=0, spans_field="spans")
    assert f"{path}:2: " in message and reason in message


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_cut_off_is_named(ending, tmp_path):
    path = tmp_path / f"a{ending}"
    write(path, *[{"text": os.urandom(500).hex()} for _ in range(1000)])
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is cut off or damaged" in refusal(read, str(path))


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    assert "is not a readable Parquet file" in refusal(read, str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"files": ["/nowhere/a.jsonl"]}, "no such file: /nowhere/a.jsonl"),
        ({"files": ["/nowhere/*.jsonl"]}, "no file matches /nowhere/*.jsonl"),
        ({"files": ["EMPTY"]}, "is empty"),
        ({"files": ["CSV"]}, "ending that is not read"),
        ({"files": ["GOOD", "GOOD"]}, "named twice"),
        ({"files": []}, "files must be a list"),
        ({"files": "GOOD"}, "files must be a list"),
        ({"schema": "wikipedia"}, "schema 'wikipedia' is not one of plain, text"),
        ({"part": "2/2"}, "part '2/2' must be 'K/N'"),
        ({"part": "half"}, "part 'half' must be 'K/N'"),
        ({"max_documents": 0}, "max_documents is 0"),
        ({"name": "a b"}, "name must be letters"),
        ({"files": ["tfds:c4/en:3.1.0:train"], "part": "0/2"}, "slice in TFDS instead"),
        ({"files": ["tfds:c4"]}, "must be one 'tfds:NAME:VERSION:SPLIT'"),
    ],
)
def test_a_source_that_makes_no_sense(settings, reason, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.csv").write_text("text\nx\n")
    names = {"EMPTY": tmp_path / "empty.jsonl", "CSV": tmp_path / "a.csv"}
    names["GOOD"] = write(tmp_path / "good.jsonl", {"text": "x"})
    files = settings.get("files", ["GOOD"])
    files = str(names["GOOD"]) if isinstance(files, str) else [str(names.get(file, file)) for file in files]
    assert reason in refusal(Source(**{"name": "s", **settings, "files": files}).check)


def test_task_gives_the_documents_and_their_ids(tmp_path):
    rows = [{"text": f"Number {i}: ünïcode\n  and spaces", "url": f"http://x.org/{i}"} for i in range(300)]
    path = write(tmp_path / "a.jsonl", *rows[:100], "{", *rows[100:])
    source = Source("s", [path])
    for vocabulary in (ByteVocabulary(), train_sentencepiece([row["text"] for row in rows], 300)):
        task = register_task(source, vocabulary)
        assert register_task(source, vocabulary) is task
        assert list(documents(task)) == list(read_documents(source))
        examples = list(task.get_dataset(sequence_length=None, split="train", shuffle=False).as_numpy_iterator())
        assert len(examples) == 300
        for example, row in zip(examples, rows, strict=True):
            expected = [vocabulary.bos_id, *vocabulary.encode(row["text"]), vocabulary.eos_id]
            assert example["targets"].tolist() == expected
            assert example["url"].decode() == row["url"]


def test_an_error_inside_tf_data_reaches_the_user_as_one_line(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"text": "good"}] * 300, *["{"] * 3)
    task = register_task(Source("s", [path], bad_lines=2), ByteVocabulary())
    assert f"{path}:303: not JSON" in refusal(list, documents(task))


def test_tensorflow_datasets(tmp_path, monkeypatch):
    # TFDS builds data sets with a package that it does not install; reading them needs it not.
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)
    monkeypatch.setitem(sys.modules, "importlib_resources.abc", importlib.resources.abc)
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "meta": {"kind": tfds.features.Text()}})
    split = tf.data.Dataset.from_tensor_slices({"text": ["one", "", "two"], "meta": {"kind": ["x", "x", ""]}})
    tfds.dataset_builders.store_as_tfds_dataset(
        "tiny", version="1.0.0", features=features, split_datasets={"train": split}, data_dir=tmp_path
    )
    seqio.set_tfds_data_dir_override(str(tmp_path))
    try:
        source = Source("s", ["tfds:tiny:1.0.0:train[:100%]"], source_field="meta.kind")
        source.check()
        rows = list(documents(register_task(source, ByteVocabulary())))
    finally:
        seqio.set_tfds_data_dir_override(None)
    missing = register_task(Source("s", ["tfds:no_such_data:1.0.0:train"]), ByteVocabulary())
    assert "no_such_data" in refusal(list, documents(missing))
    found = {(row["text"], row["source"], row["skipped"]) for row in rows}
    assert found == {("one", "s/x", ""), ("", "s/x", "empty text"), ("two", "s", "")}

"""Reading: row schemas, formats, and what is said about input that cannot be read."""

import gzip
import json
import os
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from toy import refused

from slm_jax.data.sources import SCHEMAS, Source, read_documents

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
        content = gzip.compress(content, mtime=0)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return str(path)


def read(*files, **settings) -> list[dict]:
    return [row for row in read_documents(Source("s", list(files), **settings)) if not row["skipped"]]


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
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first", mtime=0))
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
    rows = [row for row in read_documents(Source("s", [path], bad_lines=6)) if row["skipped"]]
    assert [row["skipped"] for row in rows] == [
        "not JSON", "not a JSON object", "not a JSON object", "no field 'text'", "field 'text' is not a string",
        "not valid Unicode", "empty text", "empty text",
    ]  # fmt: skip
    assert [row["problem"].partition(": ")[0] for row in rows] == [f"{path}:{line}" for line in range(2, 10)]
    assert {row["file"] for row in rows} == {path}
    message = refused("source-bad-lines", read, path, bad_lines=5)
    assert f"{path}:7: not valid Unicode" in message and "bad_lines = 5" in message


@pytest.mark.parametrize("value", [0, False, [], {}, 7, 1.5, ["x"]])
def test_a_text_of_another_type_is_a_bad_line_even_if_it_is_falsy(value, tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "good"}, *[{"text": value}] * 40)
    assert f"{path}:12: field 'text' is not a string (it is {value!r})" in refused("source-bad-lines", read, path)
    assert len(read(path, bad_lines=40)) == 1


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "not JSON"),
        (b'"text"', "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 (convert the file, for example with `iconv -f LATIN1 -t UTF-8`)"),
        (b'{"content": "x", "id": 1}', "no field 'text' (schema 'plain'; fields there: content, id)"),
        (b'{"text": "x", "spans": [[0, 2]]}', "field 'spans' has a span outside the text (of 1 characters)"),
        (b'{"text": "x", "spans": 3}', "field 'spans' is not a list of [begin, end]"),
    ],
)
def test_a_bad_line_is_named(line, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    message = refused("source-bad-lines", read, str(path), bad_lines=0, spans_field="spans")
    assert f"{path}:2: " in message and reason in message


def parquet(**columns) -> bytes:
    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), content)
    return content.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("array.json", b'[{"text": "one"}, {"text": "two"}]', "array.json:1: not a JSON object (an array: write one"),
        ("pretty.json", b'{\n  "text": "one"\n}\n', "pretty.json:1: not JSON"),
        ("mac.jsonl", b'{"text": "one"}\r{"text": "two"}\r', "mac.jsonl:1: not JSON (its lines end with CR alone"),
        ("empty.jsonl", b"\n\n", "no records"),
        ("void.jsonl", b'{"text": ""}\n{"text": null}\n', "void.jsonl:1: empty text"),
        ("void.jsonl.gz", gzip.compress(b"", mtime=0), "no records"),
        ("other.parquet", parquet(content=["a", "b"]), "other.parquet:row 1: no field 'text'"),
        ("numbers.parquet", parquet(text=[1, 2]), "numbers.parquet:row 1: field 'text' is not a string (it is 1)"),
        ("none.parquet", parquet(text=pyarrow.array([], pyarrow.string())), "no records"),
        ("latin.txt", "café".encode("latin-1"), "latin.txt: not UTF-8"),
    ],
)
def test_a_file_without_a_single_document_is_refused_by_name(name, content, reason, tmp_path):
    """Its records may be few enough for `bad_lines`: the fault is the file's, and its whole text would be missing."""
    good = write(tmp_path / "good.jsonl", *[{"text": "good"}] * 3)
    (tmp_path / name).write_bytes(content)
    message = refused("source-file-without-document", read, good, str(tmp_path / name))
    assert f"{tmp_path / name} yields no document" in message and reason in message


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}\n', mtime=0), "gzip data: end its name in .gz"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(b'{"text": "a"}\n', mtime=0), mtime=0), "gzip data"),
        ("a.jsonl", zstandard.compress(b'{"text": "a"}\n'), "zstd data: end its name in .zst"),
        ("a.jsonl", parquet(text=["a"]), "Parquet data: end its name in .parquet"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`"),
        ("a.jsonl.gz", gzip.compress('{"text": "a"}\n'.encode("utf-16"), mtime=0), "UTF-16 text"),
        ("a.txt", b"\xfe\xff" + "a".encode("utf-16-be"), "UTF-16 text"),
        ("a.txt", "a".encode("utf-32"), "UTF-32 text"),
    ],
)
def test_a_file_in_another_format_is_refused_with_the_remedy(name, content, what, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name} holds {what}" in refused("file-wrong-format", read, str(tmp_path / name))


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark, two = b"\xef\xbb\xbf", b'{"text": "one"}\n{"text": "\xef\xbb\xbftwo"}\n'
    (tmp_path / "a.jsonl").write_bytes(mark + two)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(mark + two, mtime=0))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(mark + two))
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")]
    # Within a text, U+FEFF is a character like any other.
    assert [row["text"] for row in read(*files, bad_lines=0)] == ["one", "\ufefftwo"] * 3
    (tmp_path / "a.txt").write_bytes(mark + b"one")
    assert [row["text"] for row in read(str(tmp_path / "a.txt"), schema="text")] == ["one"]


def test_an_existing_path_is_no_glob(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    for path in (tmp_path / "part1.jsonl", tmp_path / "part[1].jsonl", folder / "a*.jsonl", folder / "ab.jsonl"):
        write(path, {"text": path.name})

    def names(*files, **settings) -> list[str]:
        return [row["text"] for row in read(*map(str, files), **settings)]

    assert names(tmp_path / "part[1].jsonl") == names("part[1].jsonl", directory=str(tmp_path)) == ["part[1].jsonl"]
    assert names(folder / "a*.jsonl") == ["a*.jsonl"]
    assert names(folder / "*.jsonl") == names("*.jsonl", directory=str(folder)) == ["a*.jsonl", "ab.jsonl"]
    assert names(folder / "*b.jsonl") == ["ab.jsonl"]
    assert names(tmp_path / "part?.jsonl") == ["part1.jsonl"]
    assert names(tmp_path / "**" / "ab.jsonl") == ["ab.jsonl"]
    (tmp_path / "part[1].jsonl").unlink()
    assert names(tmp_path / "part[1].jsonl") == ["part1.jsonl"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"])
def test_lines_and_documents_have_a_limit(ending, tmp_path):
    text = "x" * 1000
    path = tmp_path / f"a{ending}"
    if ending == ".txt":
        path.write_text(text)
    else:
        write(path, {"text": "short"}, {"text": text})
    place = path if ending == ".txt" else f"{path}:2"
    size = 1000 if ending == ".txt" else len(json.dumps({"text": text})) + 1
    assert read(str(path), max_line_bytes=size, max_document_characters=1000)[-1]["text"] == text
    message = refused("file-line-too-long", read, str(path), max_line_bytes=size - 1)
    assert f"{place}: " in message and f"max_line_bytes = {size - 1:,}" in message
    message = refused("source-document-too-long", read, str(path), max_document_characters=999)
    assert f"{place}: " in message and "1,000 characters" in message and "max_document_characters = 999" in message


def test_a_small_file_cannot_fill_the_memory(tmp_path):
    """A line of 2 GB in 2 MB: refused once the limit is read."""
    path = tmp_path / "a.jsonl.gz"
    zeros = gzip.compress(b"0" * (1 << 24), 1, mtime=0)  # several members are one stream
    path.write_bytes(zeros * 128)
    tracemalloc.start()
    message = refused("file-line-too-long", read, str(path), max_line_bytes=1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()
    assert f"{path}:1: " in message


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_file_is_named(ending, tmp_path):
    path = tmp_path / f"a{ending}"
    write(path, *[{"text": os.urandom(500).hex()} for _ in range(1000)])
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refused("file-damaged", read, str(path))


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    assert str(tmp_path / "a.parquet") in refused("file-damaged", read, str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "settings, code, named",
    [
        ({"files": ["/nowhere/a.jsonl"]}, "file-not-found", "no such file: /nowhere/a.jsonl"),
        ({"files": ["/nowhere/*.jsonl"]}, "file-not-found", "no file matches /nowhere/*.jsonl"),
        ({"files": ["EMPTY"]}, "file-empty", "empty.jsonl"),
        ({"files": ["FOLDER"]}, "file-is-directory", "folder.jsonl"),
        ({"files": ["CSV"]}, "file-unknown-ending", "a.csv"),
        ({"files": ["PARQUET"]}, "file-unknown-ending", "a.parquet.gz"),
        ({"files": ["GOOD", "GOOD"]}, "file-named-twice", "good.jsonl"),
        ({"files": []}, "source-files", "()"),
        ({"files": ["GOOD"], "seqio": "some_task"}, "source-files", "seqio"),
        ({"schema": "wikipedia"}, "setting-unknown-value", "'wikipedia': it takes one of 'plain', 'text'"),
        ({"part": "2/2"}, "source-part", "'2/2'"),
        ({"part": "half"}, "source-part", "'half'"),
        ({"max_documents": 0}, "setting-out-of-range", "max_documents is 0"),
        ({"max_line_bytes": 0}, "setting-out-of-range", "max_line_bytes is 0"),
        ({"max_document_characters": -1}, "setting-out-of-range", "max_document_characters is -1"),
        ({"name": "a b"}, "source-name", "'a b'"),
        ({"files": ["tfds:c4"]}, "source-tfds", "'tfds:c4'"),
    ],
)
def test_a_source_that_makes_no_sense(settings, code, named, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1", mtime=0))
    names = {"EMPTY": "empty.jsonl", "FOLDER": "folder.jsonl", "CSV": "a.csv", "PARQUET": "a.parquet.gz"}
    names = {name: tmp_path / file for name, file in names.items()}
    names["GOOD"] = write(tmp_path / "good.jsonl", {"text": "x"})
    files = [str(names.get(file, file)) for file in settings.get("files", ["GOOD"])]
    assert named in refused(code, lambda: Source(**{"name": "s", **settings, "files": files}).check())


def test_parquet_with_text_that_is_not_utf_8_or_a_damaged_page(tmp_path):
    """The row is named and skipped, the file is refused."""
    texts = pyarrow.array([b"caf\xe9", b"good"], pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(text=texts))
    assert [row["text"] for row in read(str(path), bad_lines=1)] == ["good"]
    assert f"{path}:row 1: not UTF-8" in refused("source-bad-lines", read, str(path), bad_lines=0)
    content = bytearray(parquet(text=["one", "two", "three"] * 9))
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    assert str(path) in refused("file-damaged", read, str(path))


def test_a_large_zstd_window_is_not_called_damage(tmp_path):
    line = b'{"text": "a"}\n'
    header = bytes.fromhex("28b52ffd") + bytes(
        [0, (28 - 10) << 3]
    )  # a window of 2^28 bytes, as `zstd --long=28` writes
    (tmp_path / "a.jsonl.zst").write_bytes(header + (len(line) << 3 | 1).to_bytes(3, "little") + line)
    assert "zstd --long" in refused("file-window", read, str(tmp_path / "a.jsonl.zst"))


def test_fields_with_dots_in_their_names_and_fields_in_objects(tmp_path):
    path = write(tmp_path / "a.jsonl", {"page.text": "a", "page": {"body": "b"}})
    assert read(path, text_field="page.text")[0]["text"] == "a" and read(path, text_field="page.body")[0]["text"] == "b"
    assert "'object.field'" in refused("source-bad-lines", read, path, text_field="body", bad_lines=0)
    columns = {"page.text": ["a"], "page": [{"body": "b"}]}
    (tmp_path / "a.parquet").write_bytes(parquet(**columns))
    path = str(tmp_path / "a.parquet")
    assert read(path, text_field="page.text")[0]["text"] == "a" and read(path, text_field="page.body")[0]["text"] == "b"

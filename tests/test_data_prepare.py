"""The stage `prepare` on small and real data: content, determinism, kills, and what it refuses."""

import gzip
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import toy
from toy import refused

from slm_jax.data.corpus import COLUMNS, Corpus
from slm_jax.data.prepare import prepare
from slm_jax.data.segments import positions_from_segments
from slm_jax.data.sources import Source, read_documents
from slm_jax.data.vocabularies import VocabularyConfig
from slm_jax.data.vocabulary import ByteVocabulary

REAL = pathlib.Path(__file__).parents[2] / "shared" / "data"
WORDS = "a river runs under the old stone bridge where 12 boats wait, näher 漢字 and\n  indented lines".split(" ")
BYTES = VocabularyConfig(kind="bytes")


def text(number: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=5 + number % 40))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """5,000 documents without spans, 300 with; 2 lines of the first file are broken, one text is empty."""
    directory = tmp_path_factory.mktemp("files")
    stories = [json.dumps({"text": text(i), "url": f"https://x.org/{i}"}) for i in range(5000)]
    stories[17:17] = ["{broken", '{"text": ""}', "[]"]
    marked = [{"text": text(i) + " CLICK HERE NOW " + text(i + 1)} for i in range(300)]
    for row in marked:
        begin = row["text"].index("CLICK")
        row["spans"] = [[begin, begin + len("CLICK HERE NOW")]]
    with gzip.open(directory / "stories.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(stories))
    (directory / "marked.jsonl").write_text("\n".join(map(json.dumps, marked)))
    return {"stories": str(directory / "stories.jsonl.gz"), "marked": str(directory / "marked.jsonl")}


def sources(files, **settings) -> list[Source]:
    return [Source("stories", [files["stories"]], **settings), Source("marked", [files["marked"]], spans_field="spans")]


def everything(corpus: Corpus) -> dict[str, np.ndarray]:
    return corpus.read(np.arange(corpus.num_rows))


@pytest.fixture(scope="module")
def corpus(files, tmp_path_factory) -> Corpus:
    """Trained vocabulary, one process: what the other runs are compared with."""
    path = tmp_path_factory.mktemp("corpora") / "one"
    return prepare(path, sources(files), VocabularyConfig(size=400), sequence_length=64, processes=1)


def test_every_document_is_there_once_and_whole(corpus, files):
    columns, vocabulary = everything(corpus), corpus.vocabulary()
    flat = columns["tokens"].reshape(-1)[columns["segment_ids"].reshape(-1) > 0]
    table = corpus.documents().to_pylist()
    begin = 0
    originals = {f"stories:{i if i < 17 else i + 3}": text(i) for i in range(5000)}
    with open(files["marked"]) as file:
        originals |= {f"marked:{i}": json.loads(line)["text"] for i, line in enumerate(file)}
    assert sorted(row["id"] for row in table) == sorted(originals)
    for row in table:
        tokens = flat[begin : begin + row["length"]]
        assert (row["row"], row["start"]) == divmod(begin, corpus.sequence_length)
        assert tokens[0] == vocabulary.bos_id and tokens[-1] == vocabulary.eos_id
        assert vocabulary.decode(tokens[1:-1]) == originals[row["id"]]
        assert row["bytes"] == len(originals[row["id"]].encode("utf-8"))
        begin += row["length"]
    assert begin == len(flat) == corpus.manifest["num_tokens"]
    reasons = {"not JSON": 1, "not a JSON object": 1, "empty text": 1}
    assert corpus.manifest["skipped"] == {"stories": {"stories.jsonl.gz": reasons}}
    corpus.verify()


def test_documents_of_the_sources_are_mixed(corpus):
    names = [row["source"] for row in corpus.documents().slice(0, 1000).to_pylist()]
    assert 30 < names.count("marked") < 90  # 300 of 5,300


def test_columns_mean_what_they_say(corpus):
    columns, vocabulary = everything(corpus), corpus.vocabulary()
    used = columns["segment_ids"] > 0
    assert not columns["loss_mask"][~used].any() and (columns["tokens"][~used] == vocabulary.pad_id).all()
    assert (columns["loss_mask"][used] == (columns["tokens"][used] != vocabulary.bos_id)).all()
    begins = used & (positions_from_segments(columns["segment_ids"]) == 0)
    assert (begins | (columns["tokens"] != vocabulary.bos_id)).all()
    bytes_with_loss = vocabulary.token_bytes()[columns["tokens"][columns["loss_mask"]]].sum()
    assert bytes_with_loss == sum(row["bytes"] for row in corpus.documents().to_pylist())


def test_marked_spans_are_their_own_source(corpus):
    assert corpus.source_names == ("stories", "marked", "marked/noise")
    columns, vocabulary = everything(corpus), corpus.vocabulary()
    flat = {name: column[columns["segment_ids"] > 0] for name, column in columns.items()}
    noise = vocabulary.decode(flat["tokens"][flat["source_ids"] == 2])
    assert noise.count("CLICK HERE NOW") == 300
    assert len(noise) < 300 * (len(" CLICK HERE NOW ") + 6)  # little more than the spans themselves
    for source in (0, 1):
        assert "CLICK" not in vocabulary.decode(flat["tokens"][flat["source_ids"] == source])
    counts = corpus.manifest["sources"]
    assert counts["marked"]["documents"] == 300 and counts["marked/noise"]["tokens"] == (flat["source_ids"] == 2).sum()


def test_two_processes_make_the_same_corpus(corpus, files, tmp_path):
    other = prepare(tmp_path / "two", sources(files), VocabularyConfig(size=400), sequence_length=64, processes=2)
    assert other.fingerprint == corpus.fingerprint
    for name, column in everything(corpus).items():
        np.testing.assert_array_equal(column, everything(other)[name])
    assert other.documents() == corpus.documents()
    assert not (tmp_path / "two" / "work").exists()


PROGRAM = """
import sys
from slm_jax.data.prepare import prepare
from slm_jax.data.sources import Source
from slm_jax.data.vocabularies import VocabularyConfig
path, stories, marked = sys.argv[1:]
sources = [Source("stories", [stories]), Source("marked", [marked], spans_field="spans")]
prepare(path, sources, VocabularyConfig(size=400), sequence_length=64, processes=2)
"""  # no main guard on purpose: workers must not run the caller's module again


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again(corpus, files, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    path = tmp_path / "killed"
    command = [sys.executable, str(program), str(path), files["stories"], files["marked"]]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}

    def kill_when(there) -> None:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not there():
            time.sleep(0.002)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        begin = time.monotonic()
        while any(map(works, workers)):  # they end with it
            assert time.monotonic() - begin < 60
            time.sleep(0.02)

    def works(worker: psutil.Process) -> bool:
        try:
            return worker.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    kill_when(lambda: any(path.glob("work/done/tokenize-*")))
    shards = {shard: shard.stat().st_mtime_ns for shard in path.glob("work/done/tokenize-*.json")}
    assert shards and str(path) in toy.refusal(Corpus.open, path)
    arguments = (path, sources(files), VocabularyConfig(size=400))
    message = refused("prepare-other-settings", prepare, *arguments, sequence_length=32)
    assert "sequence_length was 64, now 32" in message and str(path / "work") in message
    kill_when(lambda: (path / "columns" / "source_ids" / "c").exists())
    assert all(shard.stat().st_mtime_ns == written for shard, written in shards.items() if shard.exists())
    finished = prepare(path, sources(files), VocabularyConfig(size=400), sequence_length=64, processes=1)
    assert finished.fingerprint == corpus.fingerprint
    assert finished.documents() == corpus.documents()
    assert finished.manifest == corpus.manifest


def test_the_same_again_says_so_and_anything_else_is_refused(corpus, files, capsys):
    same = prepare(corpus.path, sources(files), VocabularyConfig(size=400), sequence_length=64, processes=2)
    assert same.fingerprint == corpus.fingerprint
    assert "is there already" in capsys.readouterr().out
    for changed, message in [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"vocabulary": BYTES}, "vocabulary was"),
        ({"sources": sources(files)[:1]}, "sources were stories, marked, now stories"),
        ({"sources": sources(files, part="0/2")}, "part of source 'stories' was None, now 0/2"),
        ({"sources": [sources(files)[0], Source("marked", [files["stories"]])]}, "input files of source 'marked'"),
    ]:
        settings = {"sources": sources(files), "vocabulary": VocabularyConfig(size=400), "sequence_length": 64}
        assert message in refused("prepare-other-settings", prepare, corpus.path, **{**settings, **changed})


def test_a_corpus_of_an_earlier_version_lacks_settings_that_are_off(corpus, files, tmp_path, capsys):
    """Its sources say nothing of a template: made the same way, it is there already; else what changed is named."""
    old = shutil.copytree(corpus.path, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    for source in manifest["settings"]["sources"]:
        del source["template"], source["response_field"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    prepare(old, sources(files), VocabularyConfig(size=400), sequence_length=64)
    assert "is there already" in capsys.readouterr().out
    message = refused("prepare-other-settings", prepare, old, sources(files), VocabularyConfig(size=400), 32)
    assert "(sequence_length was 64, now 32)" in message


def test_seed_packing_and_a_given_vocabulary(corpus, files, tmp_path):
    given = VocabularyConfig(path=str(corpus.path))
    complete = prepare(tmp_path / "a", sources(files), given, 64, "complete", seed=3, processes=1)
    assert complete.vocabulary_hash == corpus.vocabulary_hash
    assert complete.documents()["id"].to_pylist() != corpus.documents()["id"].to_pylist()
    columns = everything(complete)
    assert (columns["tokens"][:, 0] == complete.vocabulary().bos_id).all()
    kept, lost = complete.manifest["num_tokens"], complete.manifest["num_discarded_tokens"]
    assert kept + lost == corpus.manifest["num_tokens"] and lost > 0
    assert complete.documents()["length"].to_numpy().sum() == kept


@pytest.mark.parametrize(
    "changed, code, named",
    [
        ({"sequence_length": 1 << 18}, "setting-out-of-range", "262144"),
        ({"sequence_length": 1}, "setting-out-of-range", "sequence_length is 1"),
        ({"packing": "best"}, "setting-unknown-value", "'best': it takes one of 'split', 'complete'"),
        ({"processes": -1}, "setting-out-of-range", "processes is -1"),
        ({"vocabulary": VocabularyConfig(path="/nowhere")}, "vocabulary-not-found", "/nowhere"),
        ({"sources": [Source("a", ["/nowhere.jsonl"])]}, "file-not-found", "source 'a': no such file: /nowhere.jsonl"),
        ({"plain": "elsewhere", "plain_share": 1.0}, "setting-out-of-range", "plain_share is 1.0"),
    ],
)
def test_settings_are_checked_before_anything_is_done(changed, code, named, files, tmp_path):
    settings = {"sources": sources(files), "vocabulary": BYTES, **changed}
    assert named in refused(code, prepare, tmp_path / "corpus", **settings)
    assert not (tmp_path / "corpus").exists()


def test_two_sources_of_one_name(files, tmp_path):
    assert "'stories'" in refused("prepare-same-name", prepare, tmp_path / "c", sources(files)[:1] * 2, BYTES)


def test_bad_input_met_on_the_way(tmp_path):
    def write_lines(*lines) -> pathlib.Path:
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        return tmp_path / "a.jsonl"

    def message(code, *lines, vocabulary=BYTES, **settings) -> str:
        source = Source("a", [str(write_lines(*lines))], **settings)
        return refused(code, prepare, tmp_path / f"c{random.random()}", [source], vocabulary, processes=1)

    assert "a.jsonl:2: not JSON" in message("source-bad-lines", '{"text": "x"}', "{", bad_lines=0)
    assert "a.jsonl:1: empty text" in message("source-file-without-document", '{"text": ""}')
    assert "no field 'content'" in message("source-bad-lines", '{"text": "x"}', schema="refinedweb", bad_lines=0)
    trained = VocabularyConfig()
    assert "the largest possible is" in message("vocabulary-size", '{"text": "x"}', vocabulary=trained)
    assert "a.jsonl:1" in message("source-file-without-document", '{"text": ""}', vocabulary=trained)
    kinds = [json.dumps({"text": "x", "kind": f"k{i}"}) for i in range(256)]
    assert "256 source names" in message("prepare-too-many-sources", *kinds, source_field="kind")
    path = write_lines('{"text": "x"}')
    empty = next(part for part in ("0/2", "1/2") if not list(read_documents(Source("a", [str(path)], part=part))))
    message("prepare-no-documents", '{"text": "x"}', part=empty)


def test_what_is_skipped_is_counted_by_file_and_named_once(tmp_path, capsys):
    for name, lines in {"a": ["{", "[", '{"text": ""}'], "b": ["{", '{"text": 3}']}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(['{"text": "x"}', *lines]))
    made = prepare(tmp_path / "corpus", [Source("s", [f"{tmp_path}/?.jsonl"])], BYTES, 64, processes=1)
    assert made.manifest["skipped"] == {
        "s": {
            "a.jsonl": {"not JSON": 2, "empty text": 1},
            "b.jsonl": {"not JSON": 1, "field 'text' is not a string": 1},
        }
    }
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  skipped")]
    assert len(lines) == 3
    assert "s: not JSON: 3," in lines[2] and f"{tmp_path}/a.jsonl:2: " in lines[2]
    assert f"{tmp_path}/b.jsonl:3: field 'text' is not a string (it is 3)" in lines[1]


def test_two_at_once_are_refused(files, tmp_path):
    import fcntl

    (tmp_path / "work").mkdir()
    with open(tmp_path / "work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert str(tmp_path) in refused("in-use", prepare, tmp_path, sources(files), BYTES)


def test_a_directory_that_cannot_be_written(files, tmp_path):
    (tmp_path / "file").write_text("in the way")
    corpus = tmp_path / "file" / "corpus"
    assert str(corpus) in refused("prepare-not-writable", prepare, corpus, sources(files), BYTES)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_and_then_more_space(files, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        message = refused("disk-full", prepare, disk / "corpus", sources(files), BYTES, 64, processes=1)
        assert str(disk / "corpus" / "work") in message
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        resumed = prepare(disk / "corpus", sources(files), BYTES, sequence_length=64, processes=1)
        assert resumed.fingerprint == prepare(tmp_path / "c", sources(files), BYTES, 64, processes=1).fingerprint
        resumed = None
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(not REAL.exists(), reason="the real data sets are not here")
def test_real_data(tmp_path):
    path = REAL / "gsm8k_test.jsonl.gz"
    corpus = prepare(tmp_path / "gsm8k", [Source("gsm8k", [str(path)])], VocabularyConfig(size=1000), processes=1)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert corpus.manifest["num_documents"] == len(texts) == 1036
    columns, vocabulary = everything(corpus), corpus.vocabulary()
    tokens = columns["tokens"].reshape(-1)
    ends = np.flatnonzero(tokens == vocabulary.eos_id)
    decoded = [vocabulary.decode(part) for part in np.split(tokens, ends + 1)[:-1]]
    assert sorted(decoded) == sorted(texts)
    assert vocabulary.token_bytes()[tokens].sum() == sum(len(text.encode("utf-8")) for text in texts)
    again = prepare(tmp_path / "bytes", [Source("gsm8k", [str(path)], max_documents=20)], BYTES, 128, processes=1)
    assert again.vocabulary_hash == ByteVocabulary().content_hash and set(everything(again)) == set(COLUMNS)

"""A corpus does not depend on how the work is divided: by sizes of tasks, by workers, by deaths of workers."""

import gzip
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import prepare_cases
import pytest
import zstandard
from toy import refused
from worker_tasks import die, die_once, fail, sleep

from slm_jax.data import prepare_steps, prepare_tasks, readers, workers
from slm_jax.data.corpus import Corpus
from slm_jax.data.prepare import prepare
from slm_jax.data.sources import Source
from slm_jax.data.vocabularies import VocabularyConfig
from slm_jax.data.workers import Task, start_workers

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "prepare.json").read_text())
BYTES = VocabularyConfig(kind="bytes")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("inputs")
    prepare_cases.write_inputs(folder)
    return folder


@pytest.fixture
def tiny_tasks(monkeypatch):
    """Every step in many tasks: parts of files, runs that are merged twice, many buckets, blocks written one by one."""
    monkeypatch.setattr(prepare_steps, "MIN_PART_BYTES", 20_000)
    monkeypatch.setattr(prepare_steps, "MAX_PART_BYTES", 20_000)
    monkeypatch.setattr(prepare_steps, "MAX_RUNS", 3)
    monkeypatch.setattr(prepare_tasks, "RUN_TOKENS", 8000)
    monkeypatch.setattr(prepare_tasks, "WRITE_TOKENS", 1)
    monkeypatch.setattr(prepare_tasks, "BUCKET_TOKENS", 2000)
    monkeypatch.setattr(prepare_tasks, "PLAN_DOCUMENTS", 200)
    monkeypatch.setattr(prepare_tasks, "BATCH", 7)


@pytest.mark.parametrize("name", [name for name in GOLDEN if not name.endswith(".plain")])
def test_a_corpus_is_what_it_was_however_the_work_is_divided(name, inputs, tmp_path, tiny_tasks):
    for made, corpus in prepare_cases.made(inputs, tmp_path, [name], processes=1):
        assert prepare_cases.digest(corpus) == GOLDEN[made]
        corpus.verify()


def test_whole_files_are_one_task_each_and_give_the_same(inputs, tmp_path):
    (made,) = prepare_cases.made(inputs, tmp_path, ["split"], processes=1)
    assert prepare_cases.digest(made[1]) == GOLDEN["split"]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".parquet"])
def test_the_parts_of_a_file_are_its_records(ending, inputs, tmp_path):
    path, part_bytes = inputs / "p.parquet", 1
    if ending != ".parquet":
        # Compressed files are cut where a buffer ends, so this one is long.
        rows = [json.dumps({"text": random.Random(number).randbytes(5000).hex()}) for number in range(400)]
        content = "\n".join([*rows[:9], "", "{", " ", *rows[9:]]).encode()
        compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
        path, part_bytes = tmp_path / f"a.jsonl{ending}", 100_000
        path.write_bytes(compress(content))
    whole = [(record.place, record.fields, record.problem) for record in readers.records(str(path), ["text"])]
    parts, found, first = readers.split_file(str(path), part_bytes), [], 0
    for part in parts:
        records = list(readers.records(str(path), ["text"], part=part))
        assert (part.first, part.records) == (first, len(records))
        found += [(record.place, record.fields, record.problem) for record in records]
        first += len(records)
    assert found == whole and len(parts) > 3
    assert sum(part.size for part in parts) <= path.stat().st_size
    assert len(parts) <= readers.MAX_COMPRESSED_PARTS or ending in ("", ".parquet")


def test_bad_lines_are_counted_over_all_parts(inputs, tmp_path, tiny_tasks):
    path = tmp_path / "a.jsonl"
    path.write_text(
        ('{"text": "' + "x" * 2000 + '"}\n') * 9 + "{\n" + ('{"text": "' + "y" * 2000 + '"}\n') * 9 + "[]\n"
    )
    made = prepare(tmp_path / "c", [Source("a", [str(path)], bad_lines=2)], BYTES, processes=1)
    assert made.manifest["skipped"] == {"a": {"a.jsonl": {"not JSON": 1, "not a JSON object": 1}}}
    message = refused(
        "source-bad-lines", prepare, tmp_path / "d", [Source("a", [str(path)], bad_lines=1)], BYTES, processes=1
    )
    assert f"{path}:20: not a JSON object" in message


# ---- Workers


@pytest.fixture
def work(tmp_path) -> pathlib.Path:
    (tmp_path / "lock").touch()
    return tmp_path


def test_a_worker_that_dies_costs_its_task_one_attempt(work):
    tasks = [Task(f"t{number}", f"number {number}", (number,)) for number in range(6)]
    with start_workers(2, None) as pool:
        found = pool.run(work, die_once, tasks, "numbers", 6, " tasks")
        assert [result["number"] for result in found] == list(range(6))
        assert os.getpid() not in {result["pid"] for result in found}
        assert pool.run(work, die_once, tasks, "numbers", 6, " tasks") == found
        assert pool.reused == {"die_once": 6}


def test_a_task_that_kills_every_worker_is_named_and_not_tried_for_ever(work):
    with start_workers(2, None) as pool:
        line = refused("prepare-worker-killed", pool.run, work, die, [Task("t", "records 5 to 9 of a", ())], "", 1, "")
    assert "records 5 to 9 of a" in line
    assert (work / "attempts").read_text() == "x" * workers.DEATHS


def test_a_mistake_in_the_program_is_not_tried_again(work):
    with pytest.raises(ZeroDivisionError), start_workers(2, None) as pool:
        pool.run(work, fail, [Task("t", "it", ())], "", 1, "")
    assert (work / "attempts").read_text() == "x"


def test_a_folder_that_a_worker_does_not_see_is_said_at_once(tmp_path):
    with start_workers(1, None) as pool:
        line = refused("prepare-folder-not-shared", pool.run, tmp_path / "no", fail, [Task("t", "it", ())], "", 1, "")
    assert str(tmp_path / "no") in line


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_workers_end_when_the_parent_fails(work):
    begin = time.monotonic()

    def interrupt() -> None:
        while not all((work / f"{key}.pid").exists() and (work / f"{key}.pid").read_text() for key in "ab"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt), start_workers(2, None) as pool:
        pool.run(work, sleep, [Task(key, key, ()) for key in "ab"], "", 2, "")
    thread.join()
    pids = [int((work / f"{key}.pid").read_text()) for key in "ab"]
    while not all(map(gone, pids)):  # soon: they are being waited for
        assert time.monotonic() - begin < 50
        time.sleep(0.01)


def test_a_file_that_changes_while_it_is_read(inputs, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes((inputs / "a0.jsonl").read_bytes())
    split = readers.split_file

    def split_and_grow(*arguments):
        parts = split(*arguments)
        with path.open("a") as file:
            file.write("\n{}")
        return parts

    monkeypatch.setattr(readers, "split_file", split_and_grow)
    assert str(path) in refused("file-changed", prepare, tmp_path / "c", [Source("a", [str(path)])], BYTES, processes=1)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "bytes"])
def test_a_dry_run_estimates_and_writes_nothing(trained, tmp_path, capsys):
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(2, 9))) for _ in range(2000)]
    for number in range(12):
        rng = random.Random(number)
        lines = [json.dumps({"text": " ".join(rng.choices(words, k=100))}) for _ in range(120 + 160 * (number % 2))]
        (tmp_path / f"{number:02}.jsonl").write_text("\n".join(lines))
    source, config = Source("a", [f"{tmp_path}/*.jsonl"]), VocabularyConfig(size=600) if trained else BYTES
    before = set(tmp_path.rglob("*"))
    assert prepare(tmp_path / "c", [source], config, 128, dry_run=True) is None
    assert set(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "nothing was written" in printed and "12 files" in printed and str(tmp_path / "c" / "work") in printed
    made = prepare(tmp_path / "c", [source], config, 128, processes=1)

    def number(pattern: str) -> float:
        found = re.search(pattern, printed)
        assert found, printed
        return float(found[1].replace(",", ""))

    tokens, documents, rows = (number(rf"([\d,]+) {name}") for name in ("tokens of", "documents in", "rows"))
    assert made.manifest["num_documents"] == pytest.approx(documents, rel=0.02)
    assert made.manifest["num_tokens"] == pytest.approx(tokens, rel=0.1 if trained else 0.02)
    assert made.num_rows == pytest.approx(rows, rel=0.1 if trained else 0.02)
    size = sum(path.stat().st_size for path in (tmp_path / "c").rglob("*") if path.is_file()) / 1e6
    assert size == pytest.approx(number(r"([\d.]+) MB for the corpus"), rel=0.3)


def test_work_files_are_beside_the_corpus_or_where_they_are_told_to_be(inputs, tmp_path):
    source = Source("a", [str(inputs / "a0.jsonl")])
    assert "gs://bucket/c" in refused("prepare-no-work", prepare, "gs://bucket/c", [source], BYTES)
    seen = []

    original = prepare_steps.scan_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "slm_jax.data.prepare.scan_files", lambda work, *rest: (seen.append(work), original(work, *rest))[1]
        )
        prepare(tmp_path / "c", [source], BYTES, processes=1, work=tmp_path / "elsewhere")
    assert seen[0].parent == tmp_path / "elsewhere" and not seen[0].exists()
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "columns",
        "documents.parquet",
        "manifest.json",
        "vocabulary",
    }
    Corpus.open(tmp_path / "c").verify()


def wait_for(path: pathlib.Path) -> None:
    begin = time.monotonic()
    while not path.exists():
        assert time.monotonic() - begin < 120
        time.sleep(0.02)


@pytest.mark.slow
def test_a_cluster_that_loses_workers_makes_the_same_corpus(inputs, tmp_path, monkeypatch, capsys):
    """A scheduler and three workers, of which two are killed while they work."""
    pytest.importorskip("distributed")
    here = pathlib.Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    file = tmp_path / "scheduler.json"
    scheduler = ["scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    worker = ["worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    started: list[subprocess.Popen] = []

    def start(*arguments: str) -> None:
        command = [sys.executable, "-m", "dask", *arguments, "--host", "127.0.0.1"]
        log = (tmp_path / f"{len(started)}.log").open("w")
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log))

    def kill(process: subprocess.Popen, count: int) -> None:
        while len(list((tmp_path / "split" / "work" / "done").glob("tokenize-*"))) < count and process.poll() is None:
            time.sleep(0.005)
        process.kill()

    monkeypatch.setattr(prepare_steps, "MIN_PART_BYTES", 10_000)
    monkeypatch.setattr(prepare_steps, "MAX_PART_BYTES", 10_000)
    try:
        start(*scheduler)
        wait_for(file)
        address = json.loads(file.read_text())["address"]
        for _ in range(3):
            start(*worker)
        killers = [threading.Thread(target=kill, args=(started[1 + n], 1 + 9 * n)) for n in range(2)]
        for killer in killers:
            killer.start()
        (made,) = prepare_cases.made(inputs, tmp_path, ["split"], cluster=address)
        for killer in killers:
            killer.join()
        assert [process.poll() for process in started[:4]] == [None, -signal.SIGKILL, -signal.SIGKILL, None]
        assert prepare_cases.digest(made[1]) == GOLDEN["split"]
        assert f"Dask at {address}" in capsys.readouterr().out

        # Without the scheduler.
        (tmp_path / "lock").touch()
        killer = threading.Thread(target=lambda: (wait_for(tmp_path / "t.pid"), started[0].kill()))
        killer.start()
        with start_workers(1, address) as pool:
            line = refused("prepare-cluster-lost", pool.run, tmp_path, sleep, [Task("t", "it", ())], "", 1, "")
        killer.join()
        assert address in line and capsys.readouterr().err.count("Traceback") == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
    source = Source("a", [str(inputs / "a0.jsonl")])
    assert address in refused("prepare-no-cluster", prepare, tmp_path / "gone", [source], BYTES, cluster=address)

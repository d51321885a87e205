"""Small corpora, a small model, and two ways to run a stage: in this process, or as a command in one of its own."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np
import pyarrow
import pytest

from slm_jax import mesh as mesh_lib
from slm_jax import messages
from slm_jax.__main__ import main
from slm_jax.data.corpus import Corpus, CorpusWriter
from slm_jax.data.metadata import Metadata
from slm_jax.data.mixture import MixtureComponent
from slm_jax.data.packing import pack_split
from slm_jax.data.prepare import prepare
from slm_jax.data.sources import Source
from slm_jax.data.store import SHARD_ROWS, Store
from slm_jax.data.vocabularies import VocabularyConfig
from slm_jax.data.vocabulary import ByteVocabulary, Vocabulary
from slm_jax.errors import UserError
from slm_jax.models.model_config import ModelConfig
from slm_jax.run_directory import RunDirectory
from slm_jax.train.loop import train
from slm_jax.train.phases import Phase
from slm_jax.train.schedules import constant_schedule

SEQUENCE_LENGTH = 16
WORDS = "the farm has hens and pigs that eat corn while 12 ducks swim".split()
# 260 ids for 259, so that a mesh can halve them.
MODEL = ModelConfig(
    260, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64, max_length=64
)
# The same model on the command line.
MODEL_SETTINGS = tuple(
    f"--gin.model.{name}={getattr(MODEL, name)!r}"
    for name in (
        "vocab_size",
        "num_layers",
        "embed_dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "mlp_dim",
        "max_length",
    )
)
# Depends on no number of steps, so that runs of all lengths share one compiled step.
SCHEDULE = constant_schedule(peak=1e-2, warmup=0.0)
CONSTANT = ("--gin.train.schedule=@constant_schedule()",)  # on the command line


def write_corpus(
    path: Path, seed: int = 0, rows: int = 96, sequence_length: int = SEQUENCE_LENGTH, sources=("a", "b"), words=WORDS
) -> Corpus:
    """A corpus of `rows` rows of bytes: short documents of common words, in turn from the sources."""
    rng, vocabulary = random.Random(seed), ByteVocabulary()
    documents: list[list[int]] = []
    while sum(map(len, documents)) < rows * sequence_length:
        text = " ".join(rng.choices(words, k=rng.randint(1, 6)))
        documents.append([vocabulary.bos_id, *vocabulary.encode(text), vocabulary.eos_id])
    pieces = pack_split(np.array([len(document) for document in documents]), sequence_length)
    shape = (pieces.num_rows, sequence_length)
    columns = {
        "tokens": np.zeros(shape, np.uint16),
        "segment_ids": np.zeros(shape, np.uint16),
        "source_ids": np.zeros(shape, np.uint8),
    }
    for document, start, length, row, offset, segment in zip(*pieces[:6], strict=True):
        place = (row, slice(offset, offset + length))
        columns["tokens"][place] = documents[document][start : start + length]
        columns["segment_ids"][place] = segment
        columns["source_ids"][place] = document % len(sources)
    columns["loss_mask"] = (columns["segment_ids"] > 0) & (columns["tokens"] != vocabulary.bos_id)
    writer = CorpusWriter(Store(path), rows, sequence_length, vocabulary)
    for begin in range(0, rows, SHARD_ROWS):
        writer.write({name: column[begin : min(begin + SHARD_ROWS, rows)] for name, column in columns.items()})
    return writer.finish(
        pyarrow.table({"id": ["a:0"], "row": [0], "start": [0], "url": [""]}), list(sources), {"settings": {}}
    )


def write_score(corpus: Corpus, name: str, loss: np.ndarray, step: int = 0, dtype: str = "float32", **more) -> None:
    """A finished column of losses [rows, L] that no model made; `more`: other statistics."""
    about = {"run": "none", "step": step, "fingerprint": f"model of {name}"}
    column = corpus.create_score(name, ("loss", *more), dtype, reference=about)
    column.write(0, {"loss": loss, **more})


def write_documents(
    path: Path,
    records: Sequence[Mapping[str, str]],
    sequence_length: int,
    packing: str = "complete",
    metadata: Metadata | None = None,
    vocabulary: Vocabulary | None = None,
) -> Corpus:
    """The corpus that `prepare` makes of records with text, url and maybe a source; in bytes by default."""
    # One file per source, in a folder that goes when they are read.
    by_source: dict[str, list[str]] = {}
    for record in records:
        name, _, kind = record.get("source", "web").partition("/")
        by_source.setdefault(name, []).append(json.dumps({**record, "kind": kind}))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        sources = []
        for name, lines in by_source.items():
            Path(folder, f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
            sources.append(Source(name, [f"{folder}/{name}.jsonl"], source_field="kind"))
        config = VocabularyConfig(kind="bytes")
        if vocabulary is not None:
            vocabulary.save(f"{folder}/vocabulary")
            config = VocabularyConfig(path=f"{folder}/vocabulary")
        return prepare(path, sources, config, sequence_length, packing, processes=1, metadata=metadata)


def phase(*corpora: Corpus, steps: int = 6, batch_size: int = 8, **settings: Any) -> Phase:
    """A phase that draws from the corpora in equal shares."""
    mixture = [MixtureComponent(corpus.path, epochs=100.0) for corpus in corpora]
    return Phase(steps, mixture=mixture, batch_size=batch_size, **settings)


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """While this lasts, stages that would take all devices take the first."""
    here = functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "make_mesh", here)
        yield


def train_here(run_dir: Path, phases: Sequence[Phase], **settings: Any) -> dict[str, Any]:
    """`train` in this process, on one device."""
    with one_device():
        return train(str(run_dir), phases=phases, **{"model": MODEL, "schedule": SCHEDULE, **settings})


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of every row of a training step."""
    return [(row["step"], row["loss"]) for row in RunDirectory(run_dir).metrics() if "loss" in row]


def refusal(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The one line that the call refuses with."""
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    line, *behind = str(error.value).splitlines()
    assert all("In call to configurable" in other for other in behind)  # gin's addition; the command line drops it
    return line


def refused(code: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The one line with which a call is refused; its code must be `code`."""
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    line, *rest = str(error.value).splitlines()
    assert all("In call to configurable" in other for other in rest)  # gin adds it; the command line drops it
    assert error.value.code == code, f"{error.value.code}: {line}"
    return line


def settings(**named: Any) -> list[str]:
    """Arguments of a command: settings(train={"seed": 1}) is ["--gin.train.seed=1"]."""
    return [f"--gin.{owner}.{name}={value!r}" for owner, values in named.items() for name, value in values.items()]


_processes = multiprocessing.get_context("forkserver")
PRELOADED = ["slm_jax.__main__", "slm_jax.train.loop", "slm_jax.evaluate.evaluate", "tensorboardX"]
_processes.set_forkserver_preload(PRELOADED)


class Command:
    """`slm-jax ARGUMENTS` in a process of its own, forked from one that has imported everything but started no device.

    environment: variables for it alone; devices: how many the CPU is shown as, one by default; errors: file for its
    standard error, which the log has by default.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        devices: int | None = None,
        errors: Path | None = None,
    ):
        self.log = log
        where = (str(log), str(errors or log), str(folder or log.parent), dict(environment or {}), devices)
        self._process = _processes.Process(target=_run_logged, args=(arguments, *where))
        self._process.start()

    def finish(self) -> tuple[int, str]:
        """Exit code (-9 if killed) and output. One that hangs is killed, so that the other tests go on."""
        self._process.join(300)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"still running after 300 s:\n{self.log.read_text()[-2000:]}")
        assert self._process.exitcode is not None
        return self._process.exitcode, self.log.read_text()

    def when(self, there: Callable[[], bool], signal_number: int) -> tuple[int, str]:
        """Sends the signal as soon as the condition holds."""
        while self._process.is_alive() and not there():
            time.sleep(0.002)
        if self._process.is_alive():
            os.kill(self._process.pid, signal_number)
        return self.finish()


def _run_logged(
    arguments: Sequence[str], log: str, errors: str, folder: str, environment: Mapping[str, str], devices: int | None
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it, and so their children
    if devices:
        jax.config.update("jax_num_cpu_devices", devices)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1 if errors == log else os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.exit(messages.command(lambda: main(arguments)))


class Shell:
    """Runs commands one after the other in one other process, as their users do: on one device and without the type
    checks of these tests, which run before gin and miss the arguments that it is about to give."""

    def __init__(self):
        self._pool = ProcessPoolExecutor(1, _processes)

    def __call__(self, *arguments: str, folder: Path) -> tuple[int, str, str]:
        """Exit code, output and errors of `slm-jax ARGUMENTS` in the folder."""
        return self._pool.submit(_run_captured, arguments, str(folder)).result()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module gives in that process."""
        return self._pool.submit(_call, function, *arguments).result()

    def close(self) -> None:
        self._pool.shutdown()


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    gin.clear_config()  # settings of the command before
    return function(*arguments)


def _run_captured(arguments: Sequence[str], folder: str) -> tuple[int, str, str]:
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = main(arguments)
        except Exception:  # what the interpreter would do
            code = 1
            traceback.print_exc()
    return code, output.getvalue(), errors.getvalue()

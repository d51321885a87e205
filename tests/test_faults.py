"""Files and paths that are damaged, missing or of another kind: the command ends with one line and its code.

The table grows by kind: each entry breaks one thing that a stage reads or writes.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy

from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece

DEEP = b'{"a": ' * 100_000
NOT_JSON = {"nested": DEEP, "UTF-16": '{"a": 1}'.encode("utf-16"), "Latin-1": b'{"a": "\xe4"}', "list": b"[]"}


def train(at: SimpleNamespace, run_dir: str | Path | None = None) -> list[str]:
    """The command that made the run, for as many steps: it is finished, and nothing is trained."""
    wanted = {
        "train": {"run_dir": str(at.run if run_dir is None else run_dir), "seed": 100, "checkpoint_every": 3},
        "MixtureComponent": {"corpus": str(at.corpus), "epochs": 100.0},
        "Phase": {"steps": 6, "batch_size": 8},
        "constant_schedule": {"peak": 1e-2, "warmup": 0.0},
    }
    return ["train", *toy.MODEL_SETTINGS, *toy.CONSTANT, *toy.settings(**wanted)]


def report(at: SimpleNamespace) -> list[str]:
    return ["analyze", "report", str(at.run), f"--output={at.folder}/report"]


def held_out(at: SimpleNamespace) -> list[str]:
    settings = toy.settings(HeldOut={"name": "held", "corpus": str(at.corpus), "rows": 8, "batch_size": 8})
    return ["evaluate", f"--run={at.run}", *settings]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.fixture
def at(corpus, reference, tmp_path) -> SimpleNamespace:
    """Copies of a corpus and of a finished run, named as the run names it."""
    run = shutil.copytree(reference, tmp_path / "run")
    copy = shutil.copytree(corpus.path, tmp_path / "corpus")
    return SimpleNamespace(folder=tmp_path, run=run, corpus=copy)


Case = tuple[str, str, Callable[[SimpleNamespace], list[str]], Callable[[SimpleNamespace], object]]
CASES: dict[str, Case] = {
    # --- where a run is to be written: code, what the line names, command, what is broken
    "run_dir is a file": (
        "os-", "plain", lambda at: train(at, at.folder / "plain"), lambda at: (at.folder / "plain").write_text("")
    ),
    "run_dir below a file": (
        "os-", "plain", lambda at: train(at, at.folder / "plain" / "run"),
        lambda at: (at.folder / "plain").write_text(""),
    ),
    "run_dir is a dangling link": (
        "os-", "link", lambda at: train(at, at.folder / "link"), lambda at: os.symlink("nowhere", at.folder / "link")
    ),
    "run_dir is a circle of links": (
        "os-", "link", lambda at: train(at, at.folder / "link"), lambda at: os.symlink("link", at.folder / "link")
    ),
    "run_dir with a name of 256 characters": (
        "os-enametoolong", "n" * 256, lambda at: train(at, at.folder / ("n" * 256)), lambda at: None
    ),
    "run_dir is a URL": ("run-dir-remote", "gs://bucket/run", lambda at: train(at, "gs://bucket/run"), lambda at: None),
    **{
        f"run_dir {name}": (
            "run-dir-wildcard", name, lambda at, name=name: train(at, at.folder / name), lambda at: None
        )
        for name in ("br[x]", "a*b", "a?b", "a\\b")
    },
    # --- a corpus
    **{
        f"manifest {kind}": (
            "file-damaged", "manifest.json", train,
            lambda at, content=content: (at.corpus / "manifest.json").write_bytes(content),
        )
        for kind, content in NOT_JSON.items()
    },
    "manifest is a circle of links": (
        "file-unreadable", "manifest.json", train,
        lambda at: ((at.corpus / "manifest.json").unlink(), (at.corpus / "manifest.json").symlink_to("manifest.json")),
    ),
    "a column is cut": (
        "column-damaged", "tokens", held_out, lambda at: cut(at.corpus / "columns" / "tokens" / "c" / "0" / "0")
    ),
    "a file of a column is missing": (
        "column-damaged", "loss_mask", held_out,
        lambda at: (at.corpus / "columns" / "loss_mask" / "c" / "0" / "0").unlink(),
    ),
    "the description of a column is damaged": (
        "file-damaged", "tokens", train,
        lambda at: (at.corpus / "columns" / "tokens" / "zarr.json").write_bytes(DEEP),
    ),
    "documents are cut": (
        "corpus-damaged", "documents.parquet",
        lambda at: ["analyze", "inspect", str(at.run), f"--corpus={at.corpus}", "--gin.Selection.score='loss'"],
        lambda at: cut(at.corpus / "documents.parquet"),
    ),
    "the vocabulary is another": (
        "vocabulary-changed", "corpus", held_out,
        lambda at: train_sentencepiece(["a few words of text"] * 9, 290).save(at.corpus / "vocabulary"),
    ),
    "the vocabulary's description is Latin-1": (
        "file-damaged", "iconv -f LATIN1", held_out,
        lambda at: (at.corpus / "vocabulary" / "vocabulary.json").write_bytes(NOT_JSON["Latin-1"]),
    ),
    # --- a run
    **{
        f"run.json {kind}": (
            "file-damaged", "run.json", train, lambda at, content=content: (at.run / "run.json").write_bytes(content)
        )
        for kind, content in NOT_JSON.items()
    },
    "summary.json is empty": (
        "file-damaged", "summary.json", train, lambda at: (at.run / "summary.json").write_text("{}")
    ),
    "summary.json is nested": (
        "file-damaged", "summary.json", report, lambda at: (at.run / "summary.json").write_bytes(DEEP)
    ),
    "the run is a model of another kind": (
        "resume-other-run", "run", train, lambda at: (at.run / "run.json").write_text('{"settings": {"model": {}}}')
    ),
    "the newest checkpoint is empty": (
        "checkpoint-damaged", "checkpoint 7", held_out, lambda at: (at.run / "checkpoints" / "7").mkdir()
    ),
    "the run's vocabulary is another": (
        "vocabulary-mismatch", "run", lambda at: ["generate", f"--run={at.run}", "--prompt=a"],
        lambda at: train_sentencepiece(["a few words of text"] * 9, 290).save(at.run / "vocabulary"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_one_line_with_its_code(name, at, shell):
    code, named, command, break_ = CASES[name]
    break_(at)
    before = sorted(at.folder.iterdir())
    exit_code, _, errors = shell(*command(at), folder=at.folder)
    lines = [line for line in errors.splitlines() if line and "%|" not in line]  # no progress bars
    assert exit_code == 1 and len(lines) == 1 and lines[0].startswith("slm-jax "), errors[-2000:]
    line = lines[0]
    assert f"[{code}" in line and named in line, line
    assert sorted(at.folder.iterdir()) == before  # no new run, and no folder `gs:`


def test_a_corpus_may_move_or_be_named_otherwise(at, shell, capsys):
    """The same content under another path, absolute or relative, is the same corpus."""
    here, there = at.corpus, at.folder / "moved"
    shell(*train(at), folder=at.folder)  # the run was made from another copy
    here.rename(there)
    for path in (str(there), "moved"):
        at.corpus = path
        exit_code, output, errors = shell(*train(at), folder=at.folder)
        assert exit_code == 0 and "already has its 6 steps" in output, errors
    assert len(json.loads((at.run / "run.json").read_text())["starts"]) == 1

"""Corpora, score columns and runs that an early commit wrote still open, and runs continue from them to the bit.

fixtures/format_1/README.md says what the files are and how they were made. What a command records is compared with what
it records now, so the settings below say the same as fixtures/format_1/settings, in today's names.
"""

import json
import platform
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from slm_jax.analyze.columns import read_kept_losses
from slm_jax.analyze.runs import read_run
from slm_jax.data.corpus import Corpus
from slm_jax.run_directory import RunDirectory

MODEL = """
model.vocab_size = 260
model.num_layers = 1
model.embed_dim = 4
model.num_heads = 2
model.num_kv_heads = 1
model.head_dim = 2
model.mlp_dim = 8
model.max_length = 64
"""
PREPARE = """
prepare.corpus = 'corpora/conditioned'
prepare.plain = 'corpora/plain'
prepare.plain_share = 0.4
prepare.sources = [@farm/Source(), @harbour/Source()]
prepare.vocabulary = @VocabularyConfig()
prepare.metadata = @Metadata()
prepare.sequence_length = 32
prepare.processes = 1
farm/Source.name = 'farm'
farm/Source.files = ['texts/farm.jsonl']
harbour/Source.name = 'harbour'
harbour/Source.files = ['texts/harbour.jsonl']
harbour/Source.spans_field = 'spans'
VocabularyConfig.kind = 'bytes'
Metadata.form = 'suffix'
Metadata.top = 2
"""
SCORE = """
score.corpus = 'corpora/conditioned'
score.reference = 'runs/reference'
score.statistics = ('loss', 'entropy')
score.dtype = 'float32'
score.batch_size = 4
"""
SELECTIVE = """
train.run_dir = 'runs/selective'
train.phases = [@first/Phase(), @second/Phase()]
train.schedule = @constant_schedule()
train.optimizer = @OptimizerConfig()
train.gradient_accumulation_steps = 2
train.checkpoint_every = 2
train.keep_checkpoints = 1
train.evaluate_every = 2
train.evaluators = [@HeldOut(), @Samples()]
constant_schedule.peak = 0.01
constant_schedule.warmup = 0.0
OptimizerConfig.ema = 0.5
first/Phase.steps = 2
first/Phase.batch_size = 4
first/Phase.mixture = [@first/MixtureComponent()]
first/MixtureComponent.corpus = 'corpora/conditioned'
first/Phase.selection = @first/Selection()
first/Phase.keep_ratio = @sinking/Schedule()
sinking/Schedule.start = 1.0
sinking/Schedule.parts = [@sinking/SchedulePart()]
sinking/SchedulePart.to = 0.5
second/Phase.steps = 4
second/Phase.batch_size = 4
second/Phase.mixture = [@fresh/MixtureComponent(), @replayed/MixtureComponent()]
second/Phase.selection = @CombinedSelection()
second/Phase.l2_to_init = 0.5
fresh/MixtureComponent.corpus = 'corpora/plain'
fresh/MixtureComponent.weight = @rising/Schedule()
fresh/MixtureComponent.epochs = 50
rising/Schedule.start = 0.5
rising/Schedule.parts = [@rising/SchedulePart()]
rising/SchedulePart.to = 0.75
replayed/MixtureComponent.corpus = 'corpora/conditioned'
replayed/MixtureComponent.weight = None
replayed/MixtureComponent.replay = 'in_order'
replayed/MixtureComponent.epochs = 50
CombinedSelection.parts = [@surprising/Selection(), @certain/Selection()]
CombinedSelection.keeps = 'union'
surprising/Selection.score = 'excess'
surprising/Selection.ratio = 0.4
certain/Selection.score = 'entropy'
certain/Selection.ratio = 0.3
HeldOut.name = 'held'
HeldOut.corpus = 'corpora/plain'
HeldOut.rows = 6
HeldOut.batch_size = 2
HeldOut.keep_tokens = True
Samples.name = 'samples'
Samples.vocabulary = 'corpora/plain'
Samples.prompts = ['', 'The hens']
Samples.sampling = @Sampling()
Sampling.max_new_tokens = 8
"""
CHILD = """
train.run_dir = 'runs/child'
train.init_from = 'runs/selective'
train.init_step = 4
train.init_mode = 'state'
train.phases = [@first/Phase(), @second/Phase(), @third/Phase()]
third/Phase.steps = 1
third/Phase.batch_size = 4
third/Phase.mixture = [@fresh/MixtureComponent()]
third/Phase.schedule = @anneal_schedule()
anneal_schedule.to = 0.001
"""
FROM_PARAMETERS = """
train.run_dir = 'runs/tuned'
train.init_from = 'runs/child'
train.phases = [@Phase()]
train.schedule = @constant_schedule()
Phase.steps = 1
Phase.batch_size = 4
Phase.mixture = [@MixtureComponent()]
MixtureComponent.corpus = 'corpora/plain'
"""
DYNAMICS = """
analyze_dynamics.run = 'runs/selective'
analyze_dynamics.trace = 'held'
analyze_dynamics.rows = 6
"""

FORMAT_1 = Path(__file__).parent / "fixtures" / "format_1"
EXPECTED = json.loads((FORMAT_1 / "expected.json").read_text())
CPU = Path("/proc/cpuinfo")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A working directory with the files; the paths in them are relative to it."""
    shutil.copytree(FORMAT_1 / "texts", tmp_path / "texts")
    with tarfile.open(FORMAT_1 / "files.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def command(folder, shell):
    """command(stage, settings, ...): the output of a stage that ends well."""

    def run(stage: str, *settings: str) -> str:
        (folder / "settings.gin").write_text("".join(settings))
        code, output, error = shell(*stage.split(), "--gin_file=settings.gin", folder=folder)
        assert code == 0, error
        return output

    return run


def training(run: Path) -> list[list[float]]:
    names = ("step", "loss", "grad_norm", "tokens_trained")
    return [[row[name] for name in names] for row in RunDirectory(run).metrics() if "loss" in row]


def held_out(run: Path) -> list[list[float]]:
    return [[row["step"], row["held/loss"]] for row in RunDirectory(run).metrics() if "held/loss" in row]


def assert_as_recorded(run: Path, expected: dict) -> None:
    """To the bit where jax and CPU are those of the fixtures. XLA compiles for the CPU at hand: on another, the
    tolerance of the golden step."""
    avx512 = CPU.exists() and "avx512f" in CPU.read_text()
    same = jax.__version__ == EXPECTED["jax"] and platform.machine() == "x86_64" and avx512 == EXPECTED["avx512"]
    for now, before in ((training(run), expected["losses"]), (held_out(run), expected["held_out"])):
        assert [row[0] for row in now] == [row[0] for row in before]
        np.testing.assert_allclose(now, before, rtol=0 if same else 1e-5)


def files(path: Path) -> dict[Path, bytes]:
    """What a directory holds, without locks."""
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "lock"}


@pytest.mark.parametrize("name", EXPECTED["corpora"])
def test_a_corpus_and_its_column_hold_what_they_held(name, folder):
    corpus, expected = Corpus.open(folder / "corpora" / name), EXPECTED["corpora"][name]
    assert (corpus.fingerprint, corpus.num_rows) == (expected["fingerprint"], expected["rows"])
    corpus.verify()
    for column, values in corpus.read(np.arange(3)).items():
        np.testing.assert_array_equal(values, expected["first_rows"][column])
    assert corpus.documents().num_rows == expected["documents"]
    assert (corpus.metadata is not None) == (name == "conditioned")
    assert corpus.vocabulary().size == 259
    assert corpus.score("reference").reference["prefix" if name == "conditioned" else "run"]
    for statistic, about in expected["scores"].items():
        path = f"scores/reference/{statistic}"
        values = corpus.read(np.arange(corpus.num_rows), [path])[path]
        assert values.dtype == np.float32 and values[0].tolist() == about["first_row"]
        assert values.mean(dtype=np.float64) == pytest.approx(about["mean"], rel=1e-12)


def test_the_same_commands_find_corpora_and_column_complete(command, folder):
    before = files(folder / "corpora")
    assert command("prepare", PREPARE).count("is there already") == 2
    assert "is complete already" in command("score", SCORE)
    assert files(folder / "corpora") == before


def test_the_unfinished_run_resumes(command, folder, monkeypatch):
    run = folder / "runs" / "selective"
    assert "from step 4" in command("train", MODEL, SELECTIVE)
    assert_as_recorded(run, EXPECTED["runs"]["selective"])
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2
    # Kept as files up to step 4, from there on as columns of the corpus.
    assert {int(path.stem) for path in (run / "token_losses" / "held").iterdir()} == {0, 2, 4}
    monkeypatch.chdir(folder)
    path, kept = read_kept_losses("runs/selective", "held")
    assert (path, kept.steps, kept.values.shape) == ("corpora/plain", [0, 2, 4, 6], (4, 6, 32))
    np.testing.assert_allclose(np.nanmean(kept.values, axis=(1, 2)), [row[1] for row in held_out(run)], rtol=1e-6)
    assert {int(path.stem) for path in (run / "samples" / "samples").iterdir()} == {0, 2, 4, 6}


def test_the_finished_run_is_finished(command, folder):
    before = files(folder / "runs")
    assert_as_recorded(folder / "runs" / "child", EXPECTED["runs"]["child"])
    assert "already has its 7 steps" in command("train", MODEL, SELECTIVE, CHILD)
    assert files(folder / "runs") == before


def test_other_runs_start_from_these(command, folder):
    """With the whole state of the unfinished one, as runs/child did, and with the parameters of the finished one."""
    shutil.rmtree(folder / "runs" / "child")
    command("train", MODEL, SELECTIVE, CHILD)
    assert_as_recorded(folder / "runs" / "child", EXPECTED["runs"]["child"])
    command("train", MODEL, FROM_PARAMETERS)
    ((_, loss),) = toy.losses(folder / "runs" / "tuned")
    assert abs(loss - EXPECTED["runs"]["child"]["losses"][-1][1]) < 0.1  # a new model: ln 260 = 5.56


def test_analyses_read_the_runs(command, folder):
    selective, child = (read_run(str(folder / "runs" / name)) for name in ("selective", "child"))
    assert (selective.done, selective.planned, selective.finished) == (4, 6, False)
    assert (child.done, child.planned, child.finished) == (7, 7, True)
    command("analyze report runs/selective runs/child")
    losses = (folder / "report" / "tables" / "losses_by_source.csv").read_text()
    assert "selective" in losses and "child" in losses
    assert (folder / "report" / "report.html").stat().st_size > 1000
    command("analyze dynamics", DYNAMICS)
    assert (folder / "runs" / "selective" / "dynamics" / "dynamics.json").is_file()

"""The command line: exit codes, and one line for a mistake instead of a traceback."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from slm_jax import settings
from slm_jax.__main__ import STAGES
from slm_jax.checkpoint import Checkpoints
from slm_jax.run_directory import RunDirectory


@pytest.fixture
def run(shell, tmp_path):
    """Runs a command; returns exit code, output and the last line of errors. Whatever went wrong, there is no
    traceback."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code, output, errors = shell(*arguments, folder=tmp_path)
        assert "Traceback" not in errors, errors
        return code, output, (errors.splitlines() or [""])[-1]

    return run


def train_command(run_dir: Path, corpus: str, **more: dict) -> list[str]:
    """`train` as in `toy.train_here`, for 6 steps."""
    wanted = {
        "train": {"run_dir": str(run_dir)},
        "MixtureComponent": {"corpus": corpus, "epochs": 100},
        "Phase": {"steps": 6, "batch_size": 8},
        "constant_schedule": {"peak": 1e-2, "warmup": 0},
    }
    for owner, values in more.items():
        wanted[owner] = wanted.get(owner, {}) | values
    return ["train", *toy.MODEL_SETTINGS, *toy.CONSTANT, *toy.settings(**wanted)]


def unwrapped(text: str) -> str:
    """Where lines end does not matter."""
    return " ".join(text.split())


def test_the_module_is_a_command(tmp_path):
    """In a fresh process, as it is typed: exit codes reach the shell."""
    for arguments, code in (["--help"], 0), (["experiment", "other"], 1), (["evaluat"], 2):
        command = [sys.executable, "-m", "slm_jax", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert all(stage in unwrapped(done.stdout) for stage in STAGES) if code == 0 else done.stderr
    assert not list(tmp_path.iterdir())


def test_without_a_stage(run):
    code, output, _ = run()
    assert code == 2 and output == ""
    code, output, _ = run("--help")
    assert code == 0 and all(stage in unwrapped(output) for stage in STAGES)


def test_unknown_stage(run):
    code, _, error = run("trian")
    assert code == 2 and "trian: error: no such stage: there are prepare, train" in error


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_setting_of_a_stage(stage, run):
    code, output, _ = run(*stage.split(), "--help")
    assert code == 0
    stage = stage.replace(" ", "_")
    for module in STAGES.values():
        importlib.import_module(module)
    reached = settings.reached_by(stage)
    for configurable in reached:
        for setting in settings.settings_of(configurable):
            assert f"\n  {configurable}.{setting.declaration}\n" in output + "\n"
    assert reached[0] == stage and settings.settings_of(stage)
    assert {"train": "Selection", "evaluate": "HeldOut", "prepare": "Source"}.get(stage, stage) in reached


@pytest.mark.parametrize(
    "arguments, code, messages",
    [
        (["train", "--xyzzy=1"], 2, ["unknown argument '--xyzzy=1'", "--gin.NAME=VALUE", "--run_dir=TEXT"]),
        (["train", "--sead=1"], 2, ["unknown argument '--sead=1': did you mean --seed=1?"]),
        (["train", "--run_dirs=r"], 2, ["unknown argument '--run_dirs=r': did you mean --run_dir=r?"]),
        (["train", "more"], 2, ["unknown argument 'more'"]),
        (["train", "--gin.train.run_dir"], 2, ["unknown argument '--gin.train.run_dir'"]),
        (["train", "--gin_file=nowhere.gin"], 2, ["nowhere.gin", "--gin_file", "[gin-no-file]"]),
        (["train", "--gin.trian.seed=1"], 2, ["'trian'", "'train'", "[gin-unknown-name]"]),
        (["train", "--gin.train.sed=1"], 2, ["'train.sed'", "'seed'", "[gin-unknown-name]"]),
        (["train", "--gin.model.layers=1"], 2, ["'model.layers'", "'num_layers'", "[gin-unknown-name]"]),
        (["train", "--gin.train.phases=[@Phas()]"], 2, ["'Phas'", "'Phase'", "[gin-unknown-name]"]),
        (["train", "--gin.train.micro_batches=2"], 2, ["'train.gradient_accumulation_steps'", "[gin-renamed]"]),
        (["train", "--gin.train.seed=mine"], 2, ["quotes", "[gin-syntax]"]),
        (["train", "--run_dir=r", "--gin.train.seed='x'"], 2, ["train.seed is 'x'", "[setting-type]"]),
        (["train", "--lr=1e-3"], 2, ["'--lr=1e-3'", "did you mean --gin.cosine_schedule.peak=1e-3?"]),
        (["train", "--batch_size=8"], 2, ["did you mean --gin.Phase.batch_size=8?"]),
        (["train", "--dryrun"], 2, ["did you mean --dry_run?"]),
        (["train", "--gin.Phase.steps=1", "--gin.MixtureComponent.corpus='c'"], 2, ["train needs 'run_dir'"]),
        (["train", "--gin.train.run_dir='r'"], 1, ["Phase.steps", "[phase-length]"]),
        (
            ["train", "--run_dir=r", "--gin.Phase.steps=1"],
            2,
            ["MixtureComponent needs 'corpus'", "--gin.MixtureComponent.NAME=VALUE"],
        ),
        (["train", "--gin.train.run_dir='r'", "--gin.Phase.steps=1"], 2, ["MixtureComponent needs 'corpus'"]),
        (["score", "--gin.score.name='n'"], 2, ["score needs 'corpus'"]),
        (["score", "--gin.score.corpus='c'"], 1, ["external_logprobs", "[score-source]"]),
        (["score", "--gin.score.corpus='c'", "--gin.score.reference='r'"], 1, ["/c", "[corpus-not-found]"]),
        (["score", "--corpus=it's", "--reference=r"], 1, ["/it's", "[corpus-not-found]"]),
        (["evaluate", "--gin.evaluate.run='r'"], 2, ["HeldOut needs", "'name'", "'corpus'"]),
        (["experiment", "other"], 1, ["no recipe 'other'", "known are demo, demo_quick"]),
        (["experiment", "demo", "--data=nowhere"], 1, ["experiment.data nowhere is not a folder"]),
    ],
)
def test_mistakes_are_one_line(arguments, code, messages, run, tmp_path):
    got, _, error = run(*arguments)
    assert error.startswith(f"slm-jax {arguments[0]}: error: ")
    for message in messages:
        assert message in error
    assert got == code
    assert not list(tmp_path.iterdir())


def test_runs_are_words_and_settings_may_hold_spaces(run):
    """In any order; the later of two settings wins."""
    settings = ["--gin.analyze_report.output='a b'", "--output=c d"]
    code, _, error = run("analyze", "report", settings[0], "no run", "other", settings[1])
    assert code == 1 and "no run has" in error and "[run-not-trained]" in error
    code, _, error = run("experiment", "--gin.experiment.overrides=['a = 1']", "one", "--recipe=the other")
    assert code == 1 and "no recipe 'the other'" in error
    code, _, error = run("train", "a run")
    assert code == 2 and "unknown argument 'a run'" in error


def test_words_are_files_or_the_run_where_one_is_meant(run):
    code, _, error = run("prepare", "no file.txt", "other.txt", "--corpus=c")
    assert code == 1 and "source 'text': no such file: no file.txt" in error
    code, _, error = run("generate", "nowhere", "--prompt=The")
    assert code == 1 and "nowhere" in error
    code, _, error = run("prepare", "a.txt", "--corpus=c", "--gin.Source.name=mine")
    assert code == 1 and "source 'mine'" in error
    code, _, error = run("init", "mine", "--noisy=no such.txt", "--clean=['a.txt', 'b.txt']")
    assert code == 1 and "no such file: no such.txt" in error


def test_help_on_a_name(run):
    code, output, _ = run("help", "Selection")
    assert code == 0 and "Selection.ratio: float = 0.6" in output and "model.size" not in output
    code, output, _ = run("help", "sizes")
    assert code == 0 and "tinyllama_1_1b  1,100.0M" in output
    code, output, _ = run("help", "analyze", "report")
    assert code == 0 and "analyze_report.output" in output
    code, _, error = run("help", "Selecton")
    assert code == 2 and "did you mean 'Selection'?" in error


@pytest.mark.parametrize(
    "bindings, messages",
    [
        (["Phase.selection=@Selection()", "Selection.ratio=1.5"], ["Selection.ratio", "1.5"]),
        (["Phase.selection=@Selection()", "Selection.ratio=0"], ["Selection.ratio", "0"]),
        (
            ["Phase.selection=@Selection()", "Selection.score='exces'"],
            ["Selection.score is 'exces'"],
        ),
        (["train.mesh=@MeshConfig()", "MeshConfig.data=3"], ["3 devices", "MeshConfig"]),
        (["train.gradient_accumulation_steps=3"], ["8 rows"]),
        (["model.max_length=8"], ["16 tokens"]),
        (["model.size='huge'"], ["'huge'", "demo"]),
        (["model.num_heads=3"], ["num_heads", "num_kv_heads"]),
        (["MixtureComponent.order='sorted'"], ["MixtureComponent.order is 'sorted'"]),
        (["MixtureComponent.weight=0"], ["MixtureComponent", "above 0"]),
        (["MixtureComponent.epochs=0.1"], ["draws 48 rows", "[mixture-too-few-rows]"]),
        (["Phase.schedule=0.1"], ["Phase.schedule", "0.1", "[setting-type]"]),
        (["Phase.selection='loss'"], ["Phase.selection", "'loss'", "[setting-type]"]),
        (["Phase.steps='2'"], ["Phase.steps is '2'", "[setting-type]"]),
        (["train.gradient_accumulation_steps=0"], ["train.gradient_accumulation_steps is 0", "[setting-out-of-range]"]),
        (["train.seed=-1"], ["train.seed is -1", "[setting-out-of-range]"]),
        (["Phase.steps=0"], ["Phase.steps is 0", "[setting-out-of-range]"]),
        (
            ["infinite_schedule.shape='sine'", "train.schedule=@infinite_schedule()"],
            ["infinite_schedule.shape is 'sine'", "[setting-unknown-value]"],
        ),
    ],
)
def test_values_that_cannot_be_are_one_line(bindings, messages, corpus, run, tmp_path):
    command = [*train_command(tmp_path / "run", corpus.path), *(f"--gin.{binding}" for binding in bindings)]
    code, _, error = run(*command)
    assert all(message in error for message in messages) and code == (2 if "[setting-" in error else 1)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_is_one_line(corpus, run, tmp_path):
    code, _, error = run(*train_command(tmp_path / "run", corpus.path, constant_schedule={"peak": 1e30}))
    assert code == 1 and error.startswith("slm-jax train: error: step 2: the ") and "is not finite" in error


def test_a_train_run_leaves_what_it_was_made_with(corpus, run, tmp_path):
    run_dir = tmp_path / "run"
    code, output, _ = run(*train_command(run_dir, corpus.path))
    assert code == 0 and f"see {run_dir}/summary.json" in output
    about = json.loads((run_dir / "run.json").read_text())
    assert about["identity"]["corpora"] == {corpus.path: corpus.fingerprint}
    assert about["identity"]["vocabulary_hash"] == corpus.vocabulary_hash
    assert about["identity"]["model"]["embed_dim"] == 32 and about["identity"]["seed"] == 0
    [start] = about["starts"]
    assert start["versions"]["jax"] and start["device_kind"] == "cpu" and about["settings"]["phases"][0]["steps"] == 6
    assert {"commit", "command", "python", "platform", "num_devices"} <= set(start)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["tokens_seen"] == summary["tokens_trained"] > 0
    assert list((run_dir / "tensorboard").iterdir())

    # config.gin alone makes the same run again.
    again = tmp_path / "again"
    code, _, _ = run("train", f"--gin_file={run_dir}/config.gin", f"--gin.train.run_dir={str(again)!r}")
    assert code == 0 and toy.losses(again) == toy.losses(run_dir)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("free", [20_000, 300_000])
def test_a_full_disk_and_then_more_space(free, corpus, shell, tmp_path):
    """Full at the first files, and full within a checkpoint: one line; with space again the same command continues.

    Of saves under way TensorStore may complain above that line; no frame of ours is shown."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={free}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    command = train_command(disk / "run", corpus.path, train={"checkpoint_every": 1})
    try:
        code, _, errors = shell(*command, folder=tmp_path)
        assert code == 1 and "/slm_jax/" not in errors, errors
        assert errors.splitlines()[-1].startswith("slm-jax train: error: disk full while writing")
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        code, output, errors = shell(*command, folder=tmp_path)
        assert code == 0 and "done, 6 steps" in output, errors
        toy.train_here(tmp_path / "run", [toy.phase(corpus)])
        assert toy.losses(disk / "run") == toy.losses(tmp_path / "run")
        assert [row["step"] for row in RunDirectory(disk / "run").metrics()] == [1, 2, 3, 4, 5, 6]
        checkpoints = Checkpoints(disk / "run")
        assert checkpoints.steps()[-1] == 6
        checkpoints.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)

"""The stage `experiment`, its jobs run in one process: from a recipe to results and a report."""

import contextlib
import gzip
import io
import json
import os
import random
import re
import time
from pathlib import Path

import pytest
import toy

from slm_jax.__main__ import main
from slm_jax.data.corpus import Corpus

RECIPE = """\
Recipe.name = 'toy'
Recipe.question = 'Does it run?'
Recipe.seeds = [0, 1]
Recipe.settings = {{'train': '''
    {model}
    constant_schedule.peak = 0.01
    train.schedule = @constant_schedule()
    Phase.steps = 4
    Phase.batch_size = 8
    MixtureComponent.corpus = 'crawl'
    MixtureComponent.epochs = 50
    train.evaluators = [@target/HeldOut(), @answers/ExactAnswers()]
    train.evaluate_every = 2
    target/HeldOut.name = 'target'
    target/HeldOut.corpus = 'target'
    answers/ExactAnswers.name = 'answers'
    answers/ExactAnswers.vocabulary = 'crawl'
    answers/ExactAnswers.file = 'questions.jsonl'
    ExactAnswers.max_new_tokens = 2
'''}}
Recipe.measures = ['target/loss', 'answers/accuracy']
Recipe.keep_runs = False
Recipe.oracle = 'oracle'
Recipe.shared = [@labels/SharedStage()]
labels/SharedStage.stage = 'experiment label'
labels/SharedStage.settings = "experiment_label.corpus = 'crawl'"
Recipe.arms = [@causal/Arm(), @random/Arm(), @oracle/Arm()]
random/Arm.settings = '''
    Phase.selection = @Selection()
    Selection.score = 'random'
'''
oracle/Arm.settings = '''
    Phase.selection = @Selection()
    Selection.score = 'reference'
    Selection.reference = %labels
    Selection.threshold = -0.5
'''
oracle/Arm.seeds = [0]
"""


def run_here(*arguments: str, failing: str = "") -> tuple[int, str, list[str]]:
    """`slm-jax experiment` with its jobs run one after the other in this process; those whose name has `failing` in it
    fail. Returns exit code, output and the names of the jobs that ran."""
    from slm_jax.experiment import run_experiment

    ran: list[str] = []

    def run_jobs(jobs, lanes, environment, finished, deadline):
        failed: dict[str, str] = {}
        for job in jobs:
            if deadline is not None and time.monotonic() > deadline:
                failed[job.name] = "out of time"
            elif failing and failing in job.name:
                failed[job.name] = "the hens are loose"
            elif not any(name in failed for name in job.after):
                ran.append(job.name)
                assert main(list(job.command)) == 0, job.name
                finished(job, 1.0)
        return failed

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(run_experiment, "run_jobs", run_jobs)
        patch.setattr(run_experiment, "lanes_here", lambda: (1, {}))
        with contextlib.redirect_stderr(output):
            code = main(["experiment", *arguments])
    return code, output.getvalue(), ran


@pytest.fixture
def run(shell, tmp_path):
    toy.write_corpus(tmp_path / "crawl", sources=("a", "a/noise"))
    toy.write_corpus(tmp_path / "target", seed=1, rows=8)
    (tmp_path / "questions.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    model = "\n    ".join(setting.removeprefix("--gin.").replace("=", " = ") for setting in toy.MODEL_SETTINGS)
    (tmp_path / "toy.gin").write_text(RECIPE.format(model=model))

    def run(*arguments: str, **more: str) -> tuple[int, str, list[str]]:
        return shell.call(_in_folder, str(tmp_path), arguments, more)

    return run


def _in_folder(folder: str, arguments: tuple[str, ...], more: dict[str, str]) -> tuple[int, str, list[str]]:
    os.chdir(folder)
    return run_here(*arguments, **more)


def test_from_recipe_to_report_with_a_stop_between(run, tmp_path: Path):
    results = tmp_path / "experiments" / "results" / "toy"
    code, output, ran = run("toy.gin", "--dry_run")
    assert code == 0 and ran == [] and not results.exists()
    assert "5 runs of 3 arms" in output and "4 steps, 512 tokens each" in output and "TFLOP" in output

    code, output, ran = run("toy.gin", "--budget_s=0")
    assert code == 0 and ran == [] and "out of time" in output

    code, output, ran = run("toy.gin", failing="seed1")
    assert code == 1 and "seed1/causal" in output and "the hens are loose" in output
    assert ran == ["labels", "seed0/causal", "seed0/random", "seed0/oracle"]

    code, output, ran = run("--recipe=toy.gin")
    assert code == 0 and ran == ["seed1/causal", "seed1/random"] and "5 of 5 runs" in output
    assert not (tmp_path / "runs/experiments/toy/seed0/causal").exists()  # results are kept, runs are not

    summary = json.loads((results / "summary.json").read_text())
    assert summary["runs"] == summary["runs_planned"] == 5
    arms = summary["variants"][""]
    assert arms["oracle"]["selection"]["planted"]["mean"] == 0.0
    assert arms["random"]["difference"]["target/loss"]["t"] and "recovered" in arms["random"]
    result = json.loads((results / "random-seed1.json").read_text())
    assert result["evaluations"]["step"] == [0, 2, 4] and result["final"]["answers/accuracy"] in (0.0, 1.0)
    assert result["tokens_trained"] / result["tokens_seen"] == pytest.approx(0.6, abs=0.01)
    assert result["samples"]["answers"]["shown"][0]["answer"] == "2"
    starts = [json.loads((results / f"{arm}-seed0.json").read_text())["evaluations"]["target/loss"][0] for arm in arms]
    assert len(set(starts)) == 1  # from the same start

    code, output, ran = run("toy.gin", "--work=elsewhere")  # another machine with the same results
    assert code == 0 and ran == []

    code, output, ran = run("toy.gin", "--gin.Recipe.question='Again?'", "--report")
    assert code == 0 and "Again?" in (results / "report.html").read_text()

    code, output, ran = run("toy.gin", "--gin.experiment.overrides=['Phase.steps = 5']")
    assert code == 1 and "other settings" in output and ran == []


def test_mistakes_are_one_line(run):
    code, output, _ = run("no_such_recipe")
    assert code == 1 and "no recipe 'no_such_recipe'" in output and len(output.splitlines()) == 1
    code, output, _ = run("toy.gin", "--data=nowhere")
    assert code == 1 and "nowhere" in output
    code, output, _ = run("toy.gin", "other.gin")
    assert (code == 2 and "other.gin" in output) or "toy.gin" in output


def test_corpora_keep_the_labels(run, tmp_path: Path):
    run("toy.gin", failing="seed")
    assert Corpus.open(tmp_path / "crawl").score_names() == ["labels"]


REAL_TEXT = """\
include 'configs/experiments/ladder_3.gin'
Recipe.name = 'toy_text'
Recipe.seeds = [0]
Recipe.variants = {'': ""}
Recipe.shared = [
    @crawl/SharedStage(), @clean/SharedStage(), @base_text/SharedStage(), @target/SharedStage(), @general/SharedStage(),
    @base/SharedStage(), @reference/SharedStage(), @score/SharedStage(), @base_score/SharedStage(),
    @score_clean/SharedStage(), @base_score_clean/SharedStage(), @best_documents/SharedStage(), @filtered/SharedStage()]
Recipe.arms = [@causal/Arm(), @both_min_mixed/Arm(), @document_filter/Arm()]
Recipe.groups = {'others': ['both_min_mixed', 'document_filter']}
Recipe.thresholds = [@on_mixture/Threshold()]
on_mixture/Threshold.against = 'others'
"""
SMALL = (
    *(setting.removeprefix("--gin.") for setting in toy.MODEL_SETTINGS if "vocab_size" not in setting),
    *("VocabularyConfig.size = 320", "prepare.sequence_length = 32", "Phase.steps = 2", "Phase.batch_size = 8"),
    *(
        "train.log_every = 1",
        "train.evaluate_every = 2",
        "HeldOut.rows = 8",
        "target/HeldOut.rows = 8",
        "general/HeldOut.rows = 8",
    ),
)


@pytest.mark.slow
def test_a_recipe_on_real_text(shell, tmp_path: Path):
    """From a base model, by two references, one of which is that model, on a mixture; and a document filter. The files
    that the recipe names hold nonsense."""
    draw, data = random.Random(0), tmp_path / "data"
    data.mkdir()
    words = ["".join(draw.choices("abdeilmnorstu", k=draw.randint(2, 7))) for _ in range(300)]
    parts = Path(__file__).parents[1] / "configs/experiments/parts/real_text.gin"
    for name in {*re.findall(r"'(\w+\.jsonl\.gz)'", parts.read_text())}:
        texts = [" ".join(draw.choices(words, k=60)) for _ in range(60)]
        lines = [json.dumps({"text": text, "url": None}) + "\n" for text in texts]
        (data / name).write_bytes(gzip.compress("".join(lines).encode()))
    (tmp_path / "toy_text.gin").write_text(REAL_TEXT)
    arguments = [str(tmp_path / "toy_text.gin"), f"--data={data}", f"--work={tmp_path}/work", f"--results={tmp_path}/r"]
    arguments += [f"--gin.experiment.overrides={list(SMALL)}"]
    code, output, ran = shell.call(_in_folder, str(parts.parents[3]), tuple(arguments), {})
    assert code == 0 and "3 of 3 runs" in output, output
    assert {*ran} >= {"crawl", "base_text", "seed0/base", "seed0/base_score_clean", "seed0/filtered"}
    summary = json.loads((tmp_path / "r/toy_text/summary.json").read_text())
    assert "both_min_mixed against " in str(summary["verdicts"])
    result = json.loads((tmp_path / "r/toy_text/both_min_mixed-seed0.json").read_text())
    training = json.loads((tmp_path / "r/toy_text/causal-seed0.json").read_text())["flops"]["training"]
    # Scored by two references; only one of them had to be trained, for as many steps as an arm.
    assert result["flops"]["reference"] == pytest.approx(training) and result["flops"]["scoring"] > 0
    assert {*result["selected"]} >= {"gsm8k", "math", "noisy_en"}

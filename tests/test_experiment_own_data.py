"""`slm-jax init` and `run`: from files of text to a report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from slm_jax.experiment.own_data import choose

ROOT = Path(__file__).parents[1]
ARMS = ("causal", "selective", "random")
README = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def texts(tmp_path):
    """A folder with a little noisy and clean text, and the settings of `init` that name it."""
    for name in ("noisy", "clean"):
        rows = [{"text": f"{name} {number}: " + " ".join(toy.WORDS)} for number in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: [str(tmp_path / f"{name}.jsonl")] for name in ("noisy", "clean")}


def test_sizes_follow_text_and_machine():
    laptop, pod = choose(2e6, 1e14), choose(3e11, 1e22)
    assert (laptop.size, laptop.vocabulary, laptop.length) == ("demo", 2048, 256)
    assert (pod.size, pod.vocabulary) == ("pythia_1b", 32000)
    assert pod.peak < laptop.peak and laptop.steps >= 20
    # No more than four passes over the text, and no more than the time allows.
    assert laptop.steps * laptop.batch_size * laptop.length <= 4 * 2e6 / 3.5
    slower, faster = choose(1e9, 1e13), choose(1e9, 1e15)
    assert slower.size == "demo" and faster.steps > slower.steps


def test_the_recipe_is_one(texts, tmp_path, shell):
    """`init` writes it and plans it; what is measured on is not trained on."""
    files = [f"--{name}={paths[0]}" for name, paths in texts.items()]
    code, output, errors = shell("init", "mine", *files, folder=tmp_path)
    assert code == 0 and "next: slm-jax run mine" in output, errors
    for line in ("model demo", "1 x prepare noisy_held", "1 x score score", *(f"1 x train {arm}" for arm in ARMS)):
        assert line in output, output
    text = (tmp_path / "mine/recipe.gin").read_text()
    assert text.count("Source.part = '9/10'") == text.count("Source.part = '0-8/10'") == 1
    assert "[init-exists]" in shell("init", "mine", *files, folder=tmp_path)[2]
    code, _, errors = shell("init", "other", "--noisy=nowhere.txt", files[1], folder=tmp_path)
    assert code == 1 and "no such file: nowhere.txt" in errors and "[file-not-found]" in errors
    assert "[run-no-recipe]" in shell("run", "other", folder=tmp_path)[2]


@pytest.mark.slow
def test_from_text_to_report(texts, tmp_path, shell):
    """Two commands; the second continues where it was, which is nowhere when all is done."""
    files = [f"--{name}={paths[0]}" for name, paths in texts.items()]
    code, output, errors = shell("init", "mine", *files, folder=tmp_path)
    assert code == 0 and "next: slm-jax run mine" in output, errors
    small = ["Phase.steps = 4", "train.evaluate_every = 2", "model.num_layers = 1", "model.embed_dim = 32"]
    command = ("run", "mine", f"--gin.run.overrides={small!r}")
    code, output, errors = shell(*command, folder=tmp_path)
    assert code == 0 and "3 of 3 runs" in output, errors
    assert (tmp_path / "mine/results/mine/report.html").is_file()
    assert "3 of 3 runs" in shell(*command, folder=tmp_path)[1]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["readme", "init"])
def test_the_script_runs(source, texts, tmp_path, shell):
    """README's script of at most 25 lines, and the one that `init --python` writes, with few steps."""
    if source == "readme":
        assert README
        script = README[1]
        assert len(script.splitlines()) <= 25
    else:
        files = [f"--{name}={paths[0]}" for name, paths in texts.items()]
        assert shell("init", "mine", *files, "--python", folder=tmp_path)[0] == 0
        script = (tmp_path / "mine/run.py").read_text()
    script = re.sub(r"steps=\d+|Phase\(\d+", lambda found: re.sub(r"\d+", "2", found[0]), script)
    script = re.sub(r"size=\d+\)", "size=300)", script).replace("data/", "")
    script = re.sub(r"model_config\((.\w+.)\)", r"model_config(\1, num_layers=1, embed_dim=32, mlp_dim=48)", script)
    (tmp_path / "run.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "run.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine/report/report.html").is_file()

"""Every command of the tutorials runs, in its order, with little text; the page on models has a test of its own."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
import toy

from slm_jax import config
from slm_jax.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
RECIPES = {"own_data": None, "continual": "shift", "metadata": "urls"}  # page -> folder of configs/runs that it follows

# What makes a command small, by its stage.
SMALL = {
    "prepare": toy.settings(
        prepare={"sequence_length": 64, "processes": 1}, Source={"max_characters": 20_000, "bad_lines": 0},
        VocabularyConfig={"size": 300},
    ),
    "train": toy.settings(
        Phase={"steps": 2, "batch_size": 8}, MixtureComponent={"epochs": 1000.0}, HeldOut={"rows": 4},
        train={"checkpoint_every": 2},
    ),
    "generate": toy.settings(Sampling={"max_new_tokens": 4}),
    "analyze": [],
    "score": [],
    "init": [],
    "run": ["--dry_run"],  # tests/test_experiment_own_data.py runs it
}  # fmt: skip
# Settings of the page or its recipe that would win over those, and what they become.
SHRUNK = {
    "own_data": {"train": ["--gin.held/HeldOut.rows=4"]},
    "continual": {"train": ["--gin.first/Phase.steps=2", "--gin.second/Phase.steps=2"]},
    "metadata": {"train": ["--gin.conditioned/Phase.steps=2", "--gin.cooldown/Phase.steps=1"]},
}


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / "tutorials" / f"{page}.md").read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for its_language, block in found if its_language == language]


def commands(page: str) -> list[list[str]]:
    """Words of the `slm-jax` commands in the page's blocks."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", "").splitlines()]
    assert lines and all(line.startswith("slm-jax ") for line in lines), lines
    return [shlex.split(line)[1:] for line in lines]


def write_documents(path: Path, seed: str) -> None:
    words = random.Random(seed)
    lines = [
        {"text": " ".join(words.choices(toy.WORDS, k=words.randint(20, 60))), "url": f"https://www.{i % 7}.org/{i}"}
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path, request) -> Path:
    """Where a user would be: the recipes, and text under the names that the page reads."""
    page, recipe = request.param, RECIPES[request.param]
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "data").mkdir()
    names = ["noisy.jsonl", "clean.jsonl"]
    if recipe:
        texts = [path.read_text() for path in (ROOT / "configs" / "runs" / recipe).glob("*.gin")]
        names = [name for text in texts for name in re.findall(r"'(\w+\.jsonl)\.gz'", text)]
        for path in (tmp_path / "configs" / "runs" / recipe).glob("*.gin"):
            path.write_text(path.read_text().replace(".jsonl.gz'", ".jsonl'"))
    else:
        (tmp_path / "mine.gin").write_text(blocks(page, "gin")[0])
    for name in names:
        write_documents(tmp_path / "data" / name, name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("folder", RECIPES, indirect=True)
def test_every_command_of_a_page_runs(folder, shell, request):
    page = request.node.callspec.params["folder"]
    trained = []
    for command in commands(page):
        stage = command[0]
        more = [*SMALL[stage], *SHRUNK[page].get(stage, ())]
        code, output, errors = shell(*command, *more, folder=folder)
        assert code == 0, f"{' '.join(command)}\n{output}\n{errors}"
        trained += [argument for argument in command if argument.startswith("--run_dir=")]
    for run_dir in trained:
        rows = RunDirectory(folder / run_dir.removeprefix("--run_dir=")).metrics()
        assert any("loss" in row for row in rows)


@pytest.mark.parametrize("page", ["continual", "metadata"])
def test_what_a_page_shows_of_settings_can_be_set(page, tmp_path):
    for number, block in enumerate(blocks(page, "gin")):
        (tmp_path / f"{number}.gin").write_text(block)
        config.load([str(tmp_path / f"{number}.gin")])
    config.load()

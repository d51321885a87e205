"""Every run file of configs/runs/ideas trains: a few steps of the toy model on a toy corpus with its columns."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import toy

from slm_jax.data.corpus import Corpus
from slm_jax.run_directory import RunDirectory

IDEAS = Path(__file__).parents[1] / "configs" / "runs" / "ideas"
RUNS = sorted(path.stem for path in IDEAS.glob("*.gin") if path.read_text().startswith("# slm-jax train "))


@pytest.fixture(scope="module")
def scored(corpus, tmp_path_factory) -> Corpus:
    """The corpus with the columns that the files name."""
    scored = Corpus.open(shutil.copytree(corpus.path, tmp_path_factory.mktemp("ideas") / "corpus"))
    rng, shape = np.random.default_rng(0), (corpus.num_rows, corpus.sequence_length)
    for name in ("base", "reference"):
        toy.write_score(scored, name, rng.uniform(0, 3, shape).astype(np.float32))
    marks = scored.create_score("repeats", ("weight",), reference={"run": "by hand"})
    marks.write(0, {"weight": np.where(rng.random(shape) < 0.2, 0.01, 1.0).astype(np.float32)})
    return scored


@pytest.mark.parametrize("name", RUNS)
def test_ideas_train(name, scored, reference, tmp_path, shell):
    text = (IDEAS / f"{name}.gin").read_text()
    assert f"--gin_file=configs/runs/ideas/{name}.gin" in text and f"'runs/ideas/{name}'" in text
    start = toy.settings(train={"init_from": str(reference)}) if "fine_tuning" in text else []
    code, output, errors = shell(
        *("train", f"--gin_file={IDEAS / f'{name}.gin'}", *toy.MODEL_SETTINGS, *toy.CONSTANT, *start),
        *toy.settings(
            train={"run_dir": str(tmp_path / "run"), "evaluators": (), "checkpoint_every": 0},
            Phase={"steps": 3, "batch_size": 8},
            MixtureComponent={"corpus": scored.path},
        ),
        folder=tmp_path,
    )
    assert code == 0, output + errors
    assert len([row for row in RunDirectory(tmp_path / "run").metrics() if "loss" in row]) == 3


def test_the_page_has_every_idea():
    """The table of ideas names each run file, and no other."""
    page = (IDEAS.parents[2] / "docs" / "tutorials" / "new_idea.md").read_text()
    named = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and ".gin`" in line}
    assert named == {f"{name}.gin" for name in RUNS} - {"fine_tuning_causal.gin"}

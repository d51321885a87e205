"""`train --dry_run` names all inputs that are missing, and plans for more devices than are here."""

import dataclasses

import pytest
import toy

from slm_jax import config
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.mesh import MeshConfig
from slm_jax.score.selection import Selection
from slm_jax.train.loop import train
from slm_jax.train.missing import missing_inputs


@pytest.fixture
def folder(tmp_path):
    """A recipe's folder: the run's file was read, the others make what it reads."""
    (tmp_path / "crawl.gin").write_text("prepare.corpus = 'crawl'\n")
    (tmp_path / "score.gin").write_text("score.corpus = 'crawl'\n")
    (tmp_path / "reference.gin").write_text("train.run_dir = 'base'\n")
    run = "# slm-jax import --source=there\n#   --target=given\ntrain.seed = 1\n"
    (tmp_path / "run.gin").write_text(run)
    config.load([str(tmp_path / "run.gin")])
    yield tmp_path
    config.load()


def test_all_that_is_missing_is_named_at_once(folder, corpus):
    phase = toy.phase(corpus, selection=Selection(reference="nobody"))
    missing_corpus = dataclasses.replace(phase.mixture[0], corpus="crawl")
    phases = [phase, dataclasses.replace(phase, mixture=[missing_corpus])]
    assert missing_inputs(phases, [HeldOut("held", "target")], "base") == [
        f"corpus crawl: slm-jax prepare --gin_file={folder}/crawl.gin",
        "corpus target",
        f"score column nobody of {corpus.path}",
        f"score column nobody of crawl: slm-jax score --gin_file={folder}/score.gin",
        f"model base: slm-jax train --gin_file={folder}/reference.gin",
    ]
    assert missing_inputs([], [], "given") == ["model given: slm-jax import --source=there --target=given"]
    assert missing_inputs([toy.phase(corpus)], [HeldOut("held", corpus.path)], None) == []


def test_a_dry_run_refuses_with_the_list(corpus, tmp_path, capsys):
    phase = toy.phase(corpus, selection=Selection(reference="nobody"))
    text = toy.refused("train-missing-inputs", train, str(tmp_path / "run"), toy.MODEL, [phase], dry_run=True)
    assert text.startswith("1 of its inputs are missing") and "score column nobody of " in capsys.readouterr().out


def test_a_plan_for_a_pod(corpus, tmp_path, capsys):
    """Of 64 devices eight are here: the plan is printed and checked as there."""
    arguments = (str(tmp_path / "run"), toy.MODEL)
    mesh = MeshConfig(data=16, fsdp=4)
    phase = toy.phase(corpus, batch_size=64)
    assert train(*arguments, [phase], mesh=mesh, dry_run=True) == {}
    printed = capsys.readouterr().out
    assert "data 16 x fsdp 4 x model 1 devices, more than are here" in printed and "64 rows" in printed
    assert "64 shards" in toy.refused("batch-size", train, *arguments, [toy.phase(corpus)], mesh=mesh, dry_run=True)
    assert "needs 64 devices" in toy.refused("mesh-shape", train, *arguments, [phase], mesh=mesh)

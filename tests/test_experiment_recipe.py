"""From recipes to tasks: what is repeated, in which order, with which settings."""

import dataclasses
import importlib
import os
import re
from pathlib import Path

import pytest
import toy

from slm_jax import config
from slm_jax.__main__ import STAGES
from slm_jax.experiment.planning import expand, gin_file, needed, train_costs, write_gin_files
from slm_jax.experiment.recipe import Arm, Recipe, SharedStage, Threshold, statements
from slm_jax.experiment.run_experiment import RECIPES, load_recipe

SHARED = (
    SharedStage("experiment world", per=["variant"], name="text"),
    SharedStage("prepare", "VocabularyConfig.path = None", name="clean"),
    SharedStage("prepare", "Source.directory = %text", name="crawl"),
    SharedStage("train", "MixtureComponent.corpus = %clean", per=["seed"], name="reference"),
    SharedStage("score", "score.corpus = %crawl\nscore.reference = %reference", name="score"),
    SharedStage("prepare", name="unread"),
)
ARMS = (Arm(name="causal"), Arm("Selection.reference = %score", name="selective", seeds=[0]))
RECIPE = Recipe(
    "toy",
    "Does it run?",
    ARMS,
    settings={"train": "MixtureComponent.corpus = %crawl", "prepare": "VocabularyConfig.path = %clean"},
    shared=SHARED,
    variants={"none": "", "noise": "experiment_world.share = 0.5"},
    seeds=[0, 1],
)


@pytest.fixture
def tasks():
    return expand(RECIPE, Path("work"), ["train.log_every = 2"], "data")


def test_a_stage_is_repeated_over_what_it_reads(tasks):
    """Its own dimensions and those of what its settings name; a later setting hides an earlier one, so the reference
    does not read the crawl."""
    assert [name for name in tasks if "seed1" in name] == [
        "seed1/reference",
        "none/seed1/score",
        "noise/seed1/score",
        "none/seed1/causal",
        "noise/seed1/causal",
    ]
    assert {name for name in tasks if name.endswith("clean")} == {"clean"}
    assert tasks["seed0/reference"].after == ("clean",)
    assert tasks["none/crawl"].after == ("none/text", "clean")
    assert set(tasks["none/seed0/selective"].after) == {"none/crawl", "none/seed0/score"}
    names = list(tasks)
    assert all(names.index(read) < names.index(name) for name, task in tasks.items() for read in task.after)
    assert names.index("noise/seed0/selective") < names.index("none/seed1/causal")  # a whole seed first


def test_only_what_a_missing_arm_reads_is_needed(tasks):
    found = [task.name for task in needed(tasks, ["none/seed1/causal"])]
    assert sorted(found) == ["clean", "none/crawl", "none/seed1/causal", "none/text"]


def test_the_settings_of_a_task_are_one_gin_file(tasks):
    lines = tasks["noise/seed0/selective"].text.splitlines()
    assert lines == [
        "# slm-jax train",
        "crawl = 'work/noise/crawl'",
        "score = 'score-seed0'",
        "selective = 'work/noise/seed0/selective'",
        "seed = 0",
        "Source.directory = 'data'",
        "MixtureComponent.corpus = %crawl",
        "experiment_world.share = 0.5",
        "Selection.reference = %score",
        "train.run_dir = 'work/noise/seed0/selective'",
        "train.seed = %seed",
        "train.log_every = 2",
    ]
    assert "seed = 101" in tasks["seed1/reference"].text  # not the seed of an arm
    assert "score.name = 'score-seed1'" in tasks["noise/seed1/score"].text


def test_an_arm_may_run_in_some_variants_only():
    arms = [ARMS[0], dataclasses.replace(ARMS[1], variants=["noise"])]
    names = expand(dataclasses.replace(RECIPE, arms=arms), Path("work"))
    assert [name for name in names if name.endswith("selective")] == ["noise/seed0/selective"]


def test_statements_override_earlier_ones():
    found = statements("# why\na.b = 1\nc/d = [\n  @x(),\n  @y()]\n", "include 'e.gin'\na.b = 2")
    assert found == ["c/d = [\n@x(),\n@y()]", "include 'e.gin'", "a.b = 2"]


def test_a_result_belongs_to_settings_and_not_to_places(tasks):
    def digests(recipe: Recipe = RECIPE, work: str = "work", overrides=("train.log_every = 2",), data="data"):
        return {name: task.digest for name, task in expand(recipe, Path(work), overrides, data).items()}

    before = {name: task.digest for name, task in tasks.items()}
    assert digests(work="elsewhere", data="other") == before
    assert not set(digests(overrides=()).values()) & set(before.values())
    changed = dataclasses.replace(SHARED[3], settings=SHARED[3].settings + "\nPhase.steps = 3")
    after = digests(dataclasses.replace(RECIPE, shared=[*SHARED[:3], changed, *SHARED[4:]]))
    assert {name for name in before if after[name] != before[name]} == {
        name for name in before if name.endswith(("reference", "score", "selective"))
    }
    assert before["none/seed0/causal"] != before["noise/seed0/causal"]


def _check(name: str, folder: str) -> None:
    """Loads a recipe, builds the phases of its train tasks, and has gin read the settings of every task."""
    os.chdir(RECIPES.parents[1])  # includes are looked up from here
    for module in STAGES.values():
        importlib.import_module(module)
    recipe = load_recipe(name)
    tasks = list(expand(recipe, Path(folder)).values())
    write_gin_files(tasks, Path(folder))
    costs = train_costs(tasks, Path(folder))
    assert {task.name for task in tasks if task.stage == "train"} == set(costs)
    assert any(task.item.name == recipe.baseline for task in tasks)
    for task in {task.item.name: task for task in tasks}.values():
        config.load([str(gin_file(Path(folder), task))])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.gin")), ids=lambda path: path.stem)
def test_the_recipes_of_the_project_can_be_planned(path, shell, tmp_path):
    first, second, *_ = path.read_text().splitlines()
    assert first.removesuffix(" --data=FOLDER") == f"# slm-jax experiment {path.stem}" and second.startswith("# ")
    shell.call(_check, path.stem, str(tmp_path))


def test_the_example_of_the_documentation_can_be_planned(shell, tmp_path):
    page = (RECIPES.parents[1] / "docs" / "experiments.md").read_text()
    (tmp_path / "mine.gin").write_text(re.findall(r"```gin\n(.*?)```", page, re.DOTALL)[0])
    shell.call(_check, str(tmp_path / "mine.gin"), str(tmp_path))


def test_recipes_that_make_no_sense_are_refused():
    refused = toy.refused
    assert "causal" in refused("experiment-name-taken", Recipe, "r", "q", [ARMS[0], ARMS[0]])
    assert "best" in refused("experiment-unknown-arm", Recipe, "r", "q", ARMS, oracle="best")
    assert "crowl" in refused("experiment-unknown-stage", Recipe, "r", "q", [Arm(after=["crowl"], name="causal")])
    refused("experiment-bad-name", Arm, name="a b")
    refused("experiment-bad-threshold", Threshold, "better", "selective", "target/loss", name="t")
    refused("experiment-bad-threshold", Threshold, "cheaper", "a", "m", "tokens", at_least=0.5, name="t")
    assert "lost" in refused("experiment-unknown-arm", Recipe, "r", "q", ARMS, groups={"both": ["causal", "lost"]})
    refused("setting-unknown-value", Threshold, "better", "a", "m", at_most=0, comparison="much", name="t")
    claim = Threshold("better", "selective", "target/loss", at_most=0.0, variants=["foreign"], name="t")
    assert "foreign" in refused("experiment-unknown-variant", dataclasses.replace, RECIPE, thresholds=[claim])
    assert "foreign" in refused(
        "experiment-unknown-variant", Recipe, "r", "q", [Arm(variants=["foreign"], name="a")], baseline="a"
    )
    half = Threshold("half", "selective", "target/loss", "recovered", at_least=0.5, name="t")
    assert "oracle" in refused("experiment-bad-threshold", dataclasses.replace, RECIPE, thresholds=[half])
    ring = [SharedStage("prepare", f"Source.directory = %{b}", name=a) for a, b in ("ab", "ba")]
    refused("experiment-circular", expand, dataclasses.replace(RECIPE, shared=ring, settings={}, arms=ARMS[:1]), Path())
    odd = dataclasses.replace(RECIPE, shared=[*SHARED, SharedStage("generate", name="odd")])
    refused("experiment-unknown-stage", expand, odd, Path())

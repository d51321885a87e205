"""The demo's recipe from text to report, at toy size: its stages run one after the other in one process."""

import json
import os
from pathlib import Path

import pytest
import toy
from test_experiment import run_here

from slm_jax.data.corpus import Corpus

OVERRIDES = [
    *(setting.removeprefix("--gin.") for setting in toy.MODEL_SETTINGS if "vocab_size" not in setting),
    "model.max_length = 512",
    "experiment_world.documents = 60",
    "experiment_world.held_out = 16",
    "prepare.sequence_length = 64",
    "prepare.processes = 1",
    "VocabularyConfig.size = 500",
    "Phase.steps = 4",
    "MixtureComponent.epochs = 50",
    "train.evaluate_every = 4",
    "HeldOut.rows = 8",
    "ExactAnswers.questions = 4",
    "Samples.per_prompt = 2",
    "Sampling.max_new_tokens = 4",
]
ARMS = {"causal", "selective", "random", "oracle"}


def _demo(folder: str) -> tuple[int, str, list[str]]:
    os.chdir(folder)
    # Where the recipe binds in a scope, the override needs the scope too.
    scoped = {"target": "HeldOut.rows = 8", "general": "HeldOut.rows = 8", "shown": "HeldOut.rows = 8"}
    scoped |= {"answers": "ExactAnswers.questions = 4", "texts": "Samples.per_prompt = 2"}
    overrides = [*OVERRIDES, *(f"{scope}/{setting}" for scope, setting in scoped.items())]
    return run_here("demo", f"--gin.experiment.overrides={overrides!r}")


@pytest.mark.slow
def test_the_demo_from_text_to_report_and_once_more(shell, tmp_path: Path):
    code, output, ran = shell.call(_demo, str(tmp_path))
    assert code == 0, output
    assert {"text", "crawl", "clean", "target", "general", "labels"} < {*ran} and len(ran) == 12
    results = tmp_path / "experiments" / "results" / "demo"
    found = {arm: json.loads((results / f"{arm}-seed0.json").read_text()) for arm in ARMS}
    assert len({result["tokens_seen"] for result in found.values()}) == 1  # the same batches
    assert len({result["evaluations"]["target/loss"][0] for result in found.values()}) == 1  # and the same start
    assert found["causal"]["tokens_trained"] == found["causal"]["tokens_seen"]
    for arm in ("selective", "random"):
        assert found[arm]["tokens_trained"] / found[arm]["tokens_seen"] == pytest.approx(0.6, abs=0.01)
    assert all(0 <= result["samples"]["texts"]["noisy"] <= 1 for result in found.values())
    assert all(result["samples"]["texts"]["texts"] == 8 for result in found.values())

    # ---- The oracle knows what was planted; the reference is scored for the selective run alone.
    crawl = Corpus.open(tmp_path / "runs/experiments/demo/crawl")
    assert {"crawl/stories/noise", "crawl/general/noise"} <= {*crawl.source_names}
    planted = {name: about for name, about in found["oracle"]["selected"].items() if name.endswith("/noise")}
    assert planted and all(about["selected"] == 0 for about in planted.values())
    assert found["selective"]["flops"]["scoring"] > 0 == found["causal"]["flops"]["scoring"]

    # ---- The page opens with a noisy passage, and says what the models write and what it is evidence for.
    page = (results / "report.html").read_text()
    assert 'class="kept noise"' in page or 'class="dropped noise"' in page
    headings = ["Tokens that train", "What the models write", "Arms", "Findings", "Figures"]
    headings += ["What this is evidence for"]
    places = [page.index(f"<h2>{each}</h2>") for each in headings]
    assert places == sorted(places) and 'src="http' not in page

    code, output, ran = shell.call(_demo, str(tmp_path))
    assert code == 0 and ran == []

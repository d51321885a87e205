"""The main job from text to report, as a command, at toy size."""

import json
import os
from pathlib import Path

import pytest
import toy

from slm_jax.run_directory import RunDirectory

REAL = Path(__file__).parents[2] / "shared" / "data"
RUN = {"target_loss", "target_bits_per_byte", "general_loss", "tokens_seen", "tokens_trained", "steps", "seconds"}
RUN |= {"training_flops", "scoring_flops"}
OVERRIDES = [
    *(setting.removeprefix("--gin.") for setting in toy.MODEL_SETTINGS if "vocab_size" not in setting),
    "prepare.sequence_length = 64",
    "prepare.processes = 1",
    "VocabularyConfig.size = 500",
    "Phase.steps = 6",
    "Phase.batch_size = 8",
    "MixtureComponent.epochs = 50",
    "train.evaluate_every = 3",
    "HeldOut.rows = 16",
    "HeldOut.batch_size = 16",
    "trace/HeldOut.rows = 16",
]


def demo(folder: Path, **settings) -> str:
    """Runs `slm-jax demo` in the folder; returns its output."""
    settings = {"overrides": OVERRIDES, **settings}
    command = toy.Command(folder / "log", "demo", *toy.settings(demo=settings), folder=folder)
    code, output = command.finish()
    assert code == 0, output + "".join(log.read_text() for log in folder.glob("runs/*/logs/*.log"))
    return output


@pytest.mark.slow
def test_the_demo_from_text_to_report_and_once_more(tmp_path):
    workplace = tmp_path
    output = demo(workplace, size=120)
    here = workplace / "runs" / "demo"
    assert "demo: done; open runs/demo/report.html" in output
    summary = json.loads((here / "summary.json").read_text())
    assert set(summary) == {"runs", "steps_to_causal_target_loss", "selection", "corpus", "reference"}
    assert set(summary["runs"]) == {"causal", "selective", "random"}
    assert set(summary["steps_to_causal_target_loss"]) == {"selective", "random"}
    assert {"noise_selected_share", "clean_selected_share"} <= set(summary["selection"])
    assert all(0 <= share <= 1 for share in summary["selection"].values())
    for run in (*summary["runs"].values(), summary["reference"]):
        assert set(run) == RUN and None not in run.values() and run["steps"] == 6
    seen = {run["tokens_seen"] for run in summary["runs"].values()}
    assert len(seen) == 1  # the same batches
    assert summary["runs"]["causal"]["tokens_trained"] == summary["runs"]["causal"]["tokens_seen"]
    for name in ("selective", "random"):
        share = summary["runs"][name]["tokens_trained"] / summary["runs"][name]["tokens_seen"]
        assert abs(share - 0.6) < 0.01
    start = [RunDirectory(here / name).metrics()[0]["target/loss"] for name in summary["runs"]]
    assert len(set(start)) == 1  # and from the same start
    report = (here / "report.html").read_text()
    assert "<html" in report and 'src="http' not in report and "selective" in report
    does_nothing_again(workplace)


def does_nothing_again(workplace: Path) -> None:
    """A second call."""
    results = {
        path: path.stat().st_mtime_ns
        for pattern in ("*/columns/tokens/zarr.json", "*/checkpoints/6/params/*", "crawl/scores/reference/loss/c/*/*")
        for path in (workplace / "runs" / "demo").glob(pattern)
    }
    assert len(results) > 9
    before = (workplace / "runs" / "demo" / "summary.json").read_text()
    demo(workplace, size=120)
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert (workplace / "runs" / "demo" / "summary.json").read_text() == before


def test_a_failing_stage_is_named_with_its_reason(tmp_path):
    wrong = toy.settings(demo={"overrides": ["Phase.stps = 6"], "size": 10})
    code, output = toy.Command(tmp_path / "log", "demo", *wrong).finish()
    assert code == 1
    *_, line = output.splitlines()
    assert line.startswith("slm-jax demo: error: the stage crawl failed: ") and "did you mean 'steps'?" in line
    assert "(all of it: runs/demo/logs/crawl.log)" in line and (tmp_path / "runs/demo/logs/crawl.log").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real data sets are not here")
def test_real_text(tmp_path):
    few = ["Source.max_documents = 20"]
    demo(
        tmp_path,
        recipe="math_web",
        data=str(REAL),
        stages=["selective", "causal"],
        overrides=OVERRIDES + few,
    )
    summary = json.loads((tmp_path / "runs" / "math_web" / "summary.json").read_text())
    assert set(summary["runs"]) == {"causal", "selective"}
    assert len(summary["corpus"]["sources"]) == 8 and "selection" not in summary
    assert os.path.getsize(tmp_path / "runs" / "math_web" / "report.html") > 1000

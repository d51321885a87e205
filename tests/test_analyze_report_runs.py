"""The report on runs: its numbers are those of their files, seeds are grouped, and unfinished runs are marked."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser as browsers
import numpy as np
import pytest
import toy

from slm_jax.analyze.report_runs import analyze_report, mixture_in_words, objective_in_words, schedule_in_words
from slm_jax.analyze.runs import group_seeds, read_run, short_names, turns, valleys
from slm_jax.analyze.tables import Cell, Table
from slm_jax.data.corpus import Corpus
from slm_jax.evaluate import flops
from slm_jax.evaluate.flops import run_flops
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.files import to_json
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import Selection

HOSTILE = "<img src=x onerror=alert(1)>|`$a$"
STEP_FLOPS = toy.MODEL.flops_per_token(toy.SEQUENCE_LENGTH) * toy.SEQUENCE_LENGTH * 8


@pytest.fixture(scope="module")
def runs(corpus, reference, tmp_path_factory) -> Path:
    """`causal` with two seeds, `selective`, `stopped` in its second start at step 4 of 6, and one of a hostile name."""
    here = tmp_path_factory.mktemp("compare")
    table = Corpus.open(shutil.copytree(corpus.path, here / "corpus"))
    about = {"run": str(reference), "step": 3, "fingerprint": "f", "parameters": toy.MODEL.parameter_count()}
    loss = np.random.default_rng(0).uniform(2, 6, (table.num_rows, table.sequence_length)).astype(np.float32)
    table.create_score("reference", reference=about).write(0, {"loss": loss})
    settings = {"evaluators": [HeldOut("target", table.path, rows=16)], "evaluate_every": 2, "checkpoint_every": 3}
    for name, seed in (("causal", 0), ("seed1/causal", 1)):
        toy.train_here(here / name, [toy.phase(table)], seed=seed, **settings)
    toy.train_here(here / "selective", [toy.phase(table, selection=Selection(ratio=0.5))], **settings)
    stopped = shutil.copytree(here / "causal", here / "stopped")
    (stopped / "summary.json").unlink()
    shutil.rmtree(stopped / "checkpoints" / "6")
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 4]
    (stopped / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 5, "lo')
    change(stopped, lambda run: run["starts"].append(run["starts"][0]))
    shutil.copytree(here / "selective", here / HOSTILE)
    return here


def change(run: Path, how: Any) -> None:
    about = json.loads((run / "run.json").read_text())
    how(about)
    (run / "run.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def report(runs, shell) -> Path:
    """The folder that the command writes."""
    names = ["causal", "selective", "seed1/causal", "stopped", HOSTILE]
    code, output, errors = shell("analyze", "report", *names, "--output=report", folder=runs)
    assert code == 0, errors
    assert output.splitlines()[0].startswith("report: causal (2 seeds), selective, stopped (unfinished), <img")
    return runs / "report"


def table_of(report: Path, name: str) -> dict[str, dict[str, str]]:
    with (report / "tables" / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {row[next(iter(row))]: row for row in rows}


def last(run: Path, name: str) -> float:
    return [row[name] for row in RunDirectory(run).metrics() if name in row][-1]


def test_losses_are_means_over_seeds_with_their_range(runs, report):
    found = table_of(report, "results")
    assert list(found) == ["causal (2 seeds)", "selective", "stopped (unfinished)", HOSTILE]
    for heading, name in (("target loss", "target/loss"), ("target bits per byte", "target/bits_per_byte")):
        seeds = [last(runs / "causal", name), last(runs / "seed1" / "causal", name)]
        line = found["causal (2 seeds)"]
        assert float(line[heading]) == pytest.approx(np.mean(seeds), rel=1e-12)
        assert [float(line[f"{heading}, {edge}"]) for edge in ("lowest", "highest")] == sorted(seeds)
        assert float(found["selective"][heading]) == last(runs / "selective", name)
    step_6 = [row for row in RunDirectory(runs / "selective").metrics() if "loss" in row][-1]
    assert float(found["selective"]["training loss"]) == step_6["loss"]
    assert float(found["stopped (unfinished)"]["target loss"]) == last(runs / "stopped", "target/loss")
    every = table_of(report, "every_run")
    assert set(every) == {"causal", "selective", "seed1/causal", "stopped (unfinished)", HOSTILE}
    assert float(every["seed1/causal"]["target loss"]) == last(runs / "seed1" / "causal", "target/loss")
    page = text_of(report)
    difference = last(runs / "selective", "target/loss") - float(found["causal (2 seeds)"]["target loss"])
    assert f"{difference:+.3f}".replace("-", "−") in page
    sources = table_of(report, "losses_by_source")
    assert set(sources) == {"training, a", "training, b", "target, a", "target, b"}
    assert float(sources["target, a"]["selective"]) == last(runs / "selective", "target/loss/a")


def text_of(report: Path) -> str:
    page = (report / "report.html").read_text()
    body = re.sub(r"<style.*?</style>", "", page.split("<body>")[1].split("<script")[0], flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_what_runs_were_and_how_far_they_came(report):
    page, found = text_of(report), table_of(report, "settings")
    assert found["causal"]["seed"] == "0, 1" and found["causal"]["state"] == "finished"
    assert found["stopped"]["state"] == "unfinished: step 4 of 6; resumed, 2 starts"
    assert found["selective"]["trains on"] == "50% by excess, per batch, column reference"
    assert found["causal"]["rows from"].startswith("100 % ")
    assert found["causal"]["learning rate as used"] == "0.01 throughout"
    assert "Not finished: stopped (unfinished: step 4 of 6" in page
    assert "2 layers of 32, 2 heads, vocabulary 260" in page and "random parameters" in page


def test_costs_count_scoring_and_the_reference(runs, report):
    found = table_of(report, "results")
    causal, selective, stopped = (found[name] for name in ("causal (2 seeds)", "selective", "stopped (unfinished)"))
    flops = 6 * STEP_FLOPS / 1e12
    for line, training, scoring in ((causal, 1, 0), (selective, 1, 1 / 3), (stopped, 4 / 6, 0)):
        assert float(line["TFLOP training"]) == pytest.approx(training * flops)
        assert float(line["TFLOP scoring"]) == pytest.approx(scoring * flops)
    assert float(selective["TFLOP reference"]) == pytest.approx(flops / 2)  # its checkpoint of step 3
    assert int(float(stopped["steps"])) == 4
    summary = json.loads((runs / "selective" / "summary.json").read_text())
    assert float(selective["tokens trained"]) == summary["tokens_trained"] < float(selective["tokens seen"])
    assert float(selective["seconds"]) == summary["seconds"]
    assert 0 < float(stopped["seconds"]) < float(table_of(report, "results")["causal (2 seeds)"]["seconds, highest"])


def test_flops_of_what_is_known(runs, tmp_path):
    settings = json.loads((runs / "selective" / "run.json").read_text())["settings"]
    [phase] = settings["phases"]

    def with_(**selection: Any) -> dict[str, Any]:
        return settings | {"phases": [phase | {"selection": phase["selection"] | selection}]}

    assert run_flops(settings, 2).training == pytest.approx(2 * STEP_FLOPS)
    filtered = run_flops(with_(gradient="filtered", score="loss"))
    assert filtered.training == pytest.approx(6 * STEP_FLOPS * 2 / 3) and filtered.scoring == 0
    assert run_flops(settings | {"gradient_accumulation_steps": 2}).training == pytest.approx(6 * STEP_FLOPS * 4 / 3)
    assert run_flops(with_(scope="sequence") | {"gradient_accumulation_steps": 2}).training == pytest.approx(
        6 * STEP_FLOPS
    )
    long = settings | {"phases": [phase | {"steps": 600}]}
    rows = Corpus.open(phase["mixture"][0]["corpus"]).num_rows
    assert run_flops(long).scoring == pytest.approx(rows / 8 * STEP_FLOPS / 3)  # a row is scored once
    assert run_flops(settings).reference == pytest.approx(3 * STEP_FLOPS)
    about = Corpus.open(phase["mixture"][0]["corpus"]).score(phase["selection"]["reference"]).reference
    own = run_flops(settings, start=(about["run"], about["step"]))  # its start, which causal training needs as well
    assert own.reference == 0 and own.scoring == run_flops(settings).scoring
    gone = run_flops(with_(reference="gone"))
    assert gone.training == run_flops(settings).training and gone.scoring is None and gone.reference is None
    nowhere = settings | {"phases": [phase | {"mixture": [phase["mixture"][0] | {"corpus": str(tmp_path)}]}]}
    assert run_flops(nowhere) == (None, None, None)


def test_a_reference_that_was_imported_cost_nobody_knows_what(tmp_path):
    imported = {"settings": {"model": to_json(toy.MODEL)}, "identity": {}, "starts": [], "imported": {}}
    (tmp_path / "run.json").write_text(json.dumps(imported))
    assert flops._trained({"run": str(tmp_path), "step": 0}) is None
    assert str(tmp_path) in toy.refused("run-not-trained", read_run, str(tmp_path))


def test_groups_are_of_seeds_and_nothing_else(runs):
    causal, other, selective = (read_run(str(runs / name)) for name in ("causal", "seed1/causal", "selective"))

    def sizes(*of: Any) -> list[int]:
        return [len(group.runs) for group in group_seeds(of)]

    assert sizes(causal, selective, other) == [2, 1]
    assert sizes(causal, replace(causal, path="copy")) == [1, 1]  # the same seed again
    assert sizes(causal, replace(other, path="elsewhere/name")) == [2]  # equal but for the seed, whatever the name
    longer = causal.settings | {"phases": [causal.settings["phases"][0] | {"batch_size": 16}]}
    assert sizes(causal, replace(other, settings=longer)) == [1, 1]
    assert sizes(causal, replace(other, summary={}, rows=other.rows[:-2])) == [1, 1]
    # Under seed folders each has its own reference and start; elsewhere those make another experiment.
    own = [replace(run, identity=run.identity | {"init_from": f"base{run.seed}"}) for run in (causal, other)]
    assert sizes(*own) == [2]
    assert sizes(own[0], replace(own[1], path="elsewhere/causal")) == [1, 1]
    [group] = group_seeds([own[1], own[0]])
    assert group.name == "causal" and group.label == "causal (2 seeds)"


def extended(folder: Path, causal: Path) -> Path:
    """A run of 6 steps whose cosine had ended, extended by 3: its rate jumped. A line of its metrics is damaged."""
    run = Path(shutil.copytree(causal, folder / "longer"))
    cosine = {"start": 0.0, "parts": [{"to": 0.01, "steps": 1, "shape": "linear"}]}
    cosine["parts"].append({"to": 0.001, "steps": None, "shape": "cosine"})

    def change_plan(about: dict[str, Any]) -> None:
        about["settings"]["phases"][0]["steps"] = 9
        about["settings"]["schedule"] = cosine
        about["starts"].append(about["starts"][0])

    change(run, change_plan)
    rates = [0.01, 0.008, 0.005, 0.003, 0.002, 0.001, 0.004, 0.002, 0.001]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    rows += [trained[-1] | {"step": step} for step in (7, 8, 9)]
    lines = [json.dumps(row | {"learning_rate": rates[row["step"] - 1]} if "loss" in row else row) for row in rows]
    lines[4] = lines[4][:20]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = json.loads((run / "summary.json").read_text()) | {"steps": 9}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_what_makes_numbers_less_comparable_is_said(runs, tmp_path):
    """A rate that rose again after its decay, a damaged line, and a comparison of 9 steps with 6."""
    run = extended(tmp_path, runs / "causal")
    analyze_report([str(runs / "causal"), str(run)], str(tmp_path / "report"))
    page, settings = text_of(tmp_path / "report"), table_of(tmp_path / "report", "settings")
    assert "had fallen to 0.001 at step 6 and rose again to 0.004" in page
    assert "1 damaged line in metrics.jsonl" in page and "learning rate as used" in page
    [used] = [row["learning rate as used"] for name, row in settings.items() if "longer" in name]
    assert used.startswith("0.01 at step 1") and used.endswith("0.001 at step 6, 0.004 at step 7, 0.001 at step 9")
    assert (
        "differ in their number of steps" in page
        and " †" in (tmp_path / "report" / "tables" / "results.md").read_text()
    )
    analyze_report([str(runs / "causal"), str(runs / "selective")], str(tmp_path / "equal"))
    assert "†" not in text_of(tmp_path / "equal") and "rose again" not in text_of(tmp_path / "equal")


def test_turns_of_a_curve():
    assert turns([0.0, 1.0, 2.0, 2.0, 1.0, 1.5]) == [0, 2, 3, 4, 5] and turns([]) == [] and turns([1.0]) == [0]
    assert valleys([0.0, 2.0, 1.0, 3.0, 1.0]) == [(2, 3)] and valleys([0.0, 1.0, 2.0, 1.0]) == []
    assert valleys([3.0, 1.0, 1.0, 2.0, 1.0]) == [(2, 3)]


def test_a_rate_that_a_phase_or_a_schedule_raises_again_is_no_fault(runs, tmp_path):
    run = read_run(str(extended(tmp_path, runs / "causal")))
    assert run.unplanned_rise() == (6, 0.001, 0.004)
    [phase] = run.settings["phases"]
    two = run.settings | {"phases": [phase | {"steps": 6}, phase | {"steps": 3}]}
    assert replace(run, settings=two).unplanned_rise() is None
    wave = [{"to": to, "steps": 3, "shape": "linear"} for to in (0.01, 0.001, 0.004)]
    assert replace(run, settings=run.settings | {"schedule": {"start": 0.0, "parts": wave}}).unplanned_rise() is None


def test_names_leave_out_what_is_the_same():
    assert short_names(["runs/a/x", "runs/b/x/", "runs/b/y"]) == ["a/x", "b/x", "b/y"]
    assert short_names(["runs/a", "runs/a/b"]) == ["a", "a/b"]
    assert short_names(["one"]) == ["one"]


def test_what_the_stage_evaluate_found_is_there_too(runs, tmp_path):
    run = Path(shutil.copytree(runs / "selective", tmp_path / "run"))
    (run / "evaluate").mkdir()
    for step, loss in ((3, 5.5), (6, 4.25)):
        record = {"step": step, "results": {"held/loss": loss, "held/loss/a": 1.0, "held/none": None}}
        (run / "evaluate" / f"{step}.json").write_text(json.dumps(record))
    analyze_report([str(run)], str(tmp_path / "report"))
    found = table_of(tmp_path / "report", "results")["run"]
    assert found["held loss (evaluate, step 6)"] == "4.25" and "held loss (evaluate, step 3)" not in found
    assert "held, a (evaluate, step 6)" in table_of(tmp_path / "report", "losses_by_source")
    (run / "evaluate" / "half.json").write_text('{"step": 9, "resu')
    assert "half.json" in toy.refused("file-damaged", analyze_report, [str(run)], str(tmp_path / "report"))


def test_phases_mixtures_and_schedules_in_words():
    draw = {"corpus": "runs/crawl", "weight": 0.5, "replay": None}
    ramp = {"start": 0.0, "parts": [{"to": 1.0, "steps": None, "shape": "linear"}]}
    phase = {
        "mixture": [draw, draw | {"corpus": "runs/clean", "replay": "in_order"}],
        "selection": {"score": "loss", "ratio": 0.6, "threshold": None, "scope": "sequence", "gradient": "filtered"},
        "keep_ratio": ramp,
        "reset_optimizer": True,
        "l2_to_init": 0.1,
    }
    assert mixture_in_words(phase) == "50 % crawl + 50 % clean (replay, in order)"
    words = "60% by loss, per sequence, filtered gradient, ratio 0 to 1 linear over the rest, optimizer state reset, "
    assert objective_in_words(phase) == f"{words}L2 penalty 0.1 towards the parameters at the start of the phase"
    assert mixture_in_words({"mixture": [draw | {"weight": None}, draw | {"weight": 0.05}]}).startswith("the rest ")
    high = phase["selection"] | {"threshold": 2.0, "capacity": 0.5}
    above = phase | {"selection": high, "reset_optimizer": False, "l2_to_init": 0}
    assert objective_in_words(above) == "above 2 by loss, per sequence, filtered gradient"
    legs = [{"to": 0.003, "steps": 0.05, "shape": "linear"}, {"to": 1e-4, "steps": 100, "shape": "cosine"}]
    assert schedule_in_words({"start": None, "parts": legs}) == (
        "from the value reached to 0.003 linear over 5 %, to 0.0001 cosine over 100 steps"
    )


def test_tables_as_markdown_and_csv():
    cells = [Cell("1.500", "−0.200", "better", "1.400 to 1.600", 1.5, (1.4, 1.6)), Cell("–")]
    table = Table("t", ["run", "loss", "b|c"], [("a <b> | c", cells), ("plain", [Cell("2.000", value=2.0), Cell("3")])])
    assert table.markdown().splitlines() == [
        "| run | loss | b\\|c |",
        "| --- | ---: | ---: |",
        "| a &lt;b> \\| c | 1.500 (1.400 to 1.600; −0.200) | – |",
        "| plain | 2.000 | 3 |",
    ]
    assert table.csv().splitlines() == [
        'run,loss,"loss, lowest","loss, highest",b|c',
        "a <b> | c,1.5,1.4,1.6,",
        "plain,2.0,2.0,2.0,3",
    ]


def test_figures_are_files_and_stand_alone(report):
    figures = sorted(path.stem for path in (report / "figures").glob("*.svg"))
    assert {"target_loss_over_gflop", "training_loss", "learning_rate", "selected_and_unselected_selective"} <= set(
        figures
    )
    for name in figures:
        svg = (report / "figures" / f"{name}.svg").read_text()
        assert svg.startswith("<?xml") and "currentColor" not in svg and "#123456" not in svg
        assert (report / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (report / "report.html").read_text()
    assert page.count("<svg") == len(figures) == page.count('download="') / 2
    loads = re.findall(r'(?:src|href)="(?!#)([^"]{0,20})', page)
    assert set(loads) == {"data:image/png;base6", "data:image/svg+xml;b"}
    assert not re.search(r"<(link|img|iframe|object)\b|@import|https?://", page.replace("http://www.w3.org", ""))
    assert len(re.findall(r"<script", page)) == 2  # the page's own and the copies


def test_the_same_runs_give_the_same_page(runs, report, tmp_path, monkeypatch):
    monkeypatch.chdir(runs)
    analyze_report(["causal", "selective", "seed1/causal", "stopped", HOSTILE], str(tmp_path / "again"))
    assert (tmp_path / "again" / "report.html").read_text() == (report / "report.html").read_text()


@pytest.mark.parametrize(
    "code, names",
    [("report-no-runs", []), ("run-not-trained", ["corpus"]), ("run-damaged", ["damaged"])],
)
def test_refusals(code, names, runs, tmp_path):
    (runs / "damaged").mkdir(exist_ok=True)
    (runs / "damaged" / "run.json").write_text('{"settings": {}}')
    line = toy.refused(code, analyze_report, [str(runs / name) for name in names], str(tmp_path / "report"))
    assert all(str(runs / name) in line for name in names)
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_only_begun(runs, tmp_path):
    """Started, and no step done: it is in the report, with nothing measured."""
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(runs / "causal" / "run.json", begun)
    analyze_report([str(begun)], str(tmp_path / "report"))
    assert "unfinished: step 0 of 6" in text_of(tmp_path / "report")
    assert table_of(tmp_path / "report", "results")["begun (unfinished)"]["steps"] == "0.0"


def test_in_a_browser(report, tmp_path):
    """Nothing complains, a name that looks like markup is text, tables can be copied, and paper is white."""
    with browsers.chromium(tmp_path) as driver:
        driver.get((report / "report.html").as_uri())
        assert HOSTILE in driver.find_element("css selector", "main").text
        assert not driver.find_elements("css selector", "main img")
        line = driver.find_element("css selector", '.copies[data-table="results"]')
        for button, form in zip(line.find_elements("css selector", "button"), ("Markdown", "CSV"), strict=True):
            button.click()
            browsers.until(lambda form=form: line.find_element("css selector", "output").text == f"{form} copied")
        driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
        copied = driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
        assert copied == (report / "tables" / "results.csv").read_text()
        media = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        assert driver.execute_script(style) == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
        assert not line.is_displayed()
        assert browsers.complaints(driver) == []

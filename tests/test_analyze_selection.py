"""`analyze selection`: from metrics and columns of runs that trained, and from runs that are only written down."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import toy

from slm_jax.analyze.analyze_selection import analyze_selection
from slm_jax.analyze.columns import read_rows
from slm_jax.analyze.plots import running_mean
from slm_jax.analyze.runs import read_run
from slm_jax.analyze.selection_metrics import of_runs
from slm_jax.data.corpus import Corpus
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.run_directory import RunDirectory
from slm_jax.score.score_corpus import score
from slm_jax.score.selection import Selection

SOURCES = ("farm", "farm/noise", "other")
BATCH = 8


@pytest.fixture(scope="module")
def crawl(reference, tmp_path_factory) -> Corpus:
    """A scored corpus with noise that it knows of."""
    path = tmp_path_factory.mktemp("crawl") / "crawl"
    corpus = toy.write_corpus(path, seed=4, rows=20, sources=SOURCES)
    with toy.one_device():
        score(corpus.path, str(reference))
    return corpus


@pytest.fixture(scope="module")
def runs(crawl, corpus, reference, tmp_path_factory) -> dict[str, Path]:
    """A selective run with checkpoints 0, 2 and 4, and the reference's own, a causal one with 3 and 6."""
    settings = {"evaluators": [HeldOut("target", corpus.path, rows=8, batch_size=8)], "evaluate_every": 1}
    settings |= {"checkpoint_every": 2, "keep_checkpoints": 5}
    selective = toy.phase(crawl, steps=4, batch_size=BATCH, selection=Selection(ratio=0.5))
    run = tmp_path_factory.mktemp("runs") / "selective"
    toy.train_here(run, [selective], **settings)
    return {"selective": run, "run": reference}


@pytest.fixture(scope="module")
def found(crawl, runs, tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("found") / "selection"
    toy.write_score(crawl, "second", np.random.default_rng(0).normal(3, 1, (20, 16)).astype(np.float32))
    dynamics = folder / "dynamics"
    dynamics.mkdir(parents=True)
    kinds = np.tile(np.arange(16) % 5 - 1, (20, 1)).astype(np.int8)
    np.save(dynamics / "classes.npy", kinds)
    (dynamics / "dynamics.json").write_text(json.dumps({"fingerprint": crawl.fingerprint}))
    with toy.one_device():
        record = analyze_selection(
            [str(run) for run in runs.values()], corpus=crawl.path, score_missing=True, references=["second"],
            dynamics=str(dynamics), output=str(folder))  # fmt: skip
    return record, folder


def losses(corpus: Corpus, name: str) -> np.ndarray:
    """Of the valid tokens."""
    column = f"scores/{name}/loss"
    return corpus.read(np.arange(corpus.num_rows), [column])[column][read_rows(corpus.path, None).valid]


def test_metrics_are_those_of_training(found, runs):
    record, _ = found
    rows, about = RunDirectory(runs["selective"]).metrics(), record["runs"]["selective"]
    results = [row["target/loss"] for row in rows if "target/loss" in row]
    assert about["downstream"]["values"] == pytest.approx(results) and about["downstream"]["steps"] == list(range(5))
    assert about["last_downstream"] == results[-1] and about["steps"] == 4
    assert about["kept"] == pytest.approx(0.5, abs=0.01) and record["runs"]["run"]["kept"] == 1.0
    curve = record["runs"]["selective"]["training"]["selected_loss"]
    logged = [row["selected_loss"] for row in RunDirectory(runs["selective"]).metrics() if row.get("selected_loss")]
    assert curve["values"] == pytest.approx(logged) and curve["steps"] == [1, 2, 3, 4]
    causal = record["runs"]["run"]
    assert causal["training"]["selected_loss"]["values"] == causal["downstream"]["values"] == []
    shares = record["runs"]["selective"]["selected_by_source"]
    assert set(shares) == set(SOURCES) and all(0 <= share <= 1 for share in shares.values())
    assert [(entry["score"], entry["ratio"]) for entry in record["ratio_sweep"]] == [("excess", 0.5)]


def test_each_checkpoint_selects_as_training_would(found, crawl):
    """Against a sort: of each batch of the run's size the half with the highest excess."""
    record, _ = found
    tokens, rows = record["tokens"], read_rows(crawl.path, None)
    reference = losses(crawl, "reference")
    batch = np.nonzero(rows.valid)[0] // BATCH
    assert tokens["checkpoints"] == [0, 2, 4] and tokens["batch_size"] == BATCH and tokens["tokens"] == len(reference)
    sets = []
    for place, step in enumerate(tokens["checkpoints"]):
        loss = losses(crawl, f"selective-{step}")
        chosen = np.zeros(len(loss), bool)
        for number in np.unique(batch):
            mine = np.flatnonzero(batch == number)
            order = np.argsort(-(loss - reference)[mine], kind="stable")
            chosen[mine[order[: int(0.5 * len(mine) + 0.5)]]] = True
        sets.append(chosen)
        assert tokens["selected_share"][place] == pytest.approx(chosen.mean())
    for of in range(3):
        for under, step in enumerate(tokens["checkpoints"]):
            loss = losses(crawl, f"selective-{step}").astype(np.float64)
            assert tokens["loss_of_selected"][of][under] == pytest.approx(loss[sets[of]].mean(), rel=1e-6)
            assert tokens["loss_of_unselected"][of][under] == pytest.approx(loss[~sets[of]].mean(), rel=1e-6)
            both, either = (sets[of] & sets[under]).sum(), (sets[of] | sets[under]).sum()
            assert tokens["overlap"]["checkpoints"]["jaccard"][of][under] == pytest.approx(both / either)
    causal = losses(crawl, "run-6").astype(np.float64)
    assert tokens["fixed_tokens"]["run"]["selected"][-1] == pytest.approx(causal[sets[-1]].mean(), rel=1e-6)
    assert tokens["fixed_tokens"]["run"]["unselected"][-1] == pytest.approx(causal[~sets[-1]].mean(), rel=1e-6)
    sources = rows.source_ids[rows.valid]
    for number, name in enumerate(SOURCES):
        assert tokens["share_by_source"][name][-1] == pytest.approx(sets[-1][sources == number].mean())
    noise = sources == 1
    caught = (noise & ~sets[-1]).sum()
    everything = tokens["noise"]["all tokens"]
    assert everything["recall"] == pytest.approx(caught / noise.sum())
    assert everything["precision"] == pytest.approx(caught / (~sets[-1]).sum())
    assert tokens["noise"]["farm"]["tokens"] == (sources < 2).sum()


def test_shares_are_of_all_tokens(found):
    """Weighted by their tokens, the shares of the groups are the share of all; classes leave out tokens without one."""
    tokens = found[0]["tokens"]
    assert set(tokens["shares"]) == {"source", "frequency", "position", "class"}
    for name, groups in tokens["shares"].items():
        counted = sum(group["tokens"] for group in groups)
        assert counted == tokens["tokens"] if name != "class" else counted < tokens["tokens"]
        if name != "class":
            mean = sum(group["share"] * group["tokens"] for group in groups) / counted
            assert mean == pytest.approx(tokens["selected_share"][-1])
    assert tokens["overlap"]["scores"]["names"] == ["excess", "loss", "reference", "random"]
    assert tokens["overlap"]["references"]["names"] == ["reference", "second"]
    share = tokens["selected_share"][-1]
    assert tokens["overlap"]["by_chance"] == pytest.approx(share / (2 - share))


def test_fits_are_of_the_results_at_the_checkpoints(found, runs):
    fits = found[0]["tokens"]["fits"]
    assert [fit["selected_by"] for fit in fits] == [0, 2, 4]
    rows = RunDirectory(runs["selective"]).metrics()
    results = {row["step"]: row["target/loss"] for row in rows if "target/loss" in row}
    for fit in fits:
        assert fit["selected"]["steps"] == [2, 4]
        assert fit["selected"]["result"] == pytest.approx([results[2], results[4]])
        assert fit["selected"]["fit"] is None  # of two points
    own = found[0]["runs"]["selective"]["fits"]["selected"]["fit"]  # of the four steps of training
    assert own["points"] == 4 and own["r_squared"] <= 1 and math.isfinite(own["a"])


def test_what_is_written(found):
    record, folder = found
    assert json.loads((folder / "selection.json").read_text()) == record
    summary = (folder / "summary.md").read_text()
    drawn = set(re.findall(r"!\[[^]]*\]\((\w+)\.png\)", summary))
    assert drawn == {"training", "fixed_tokens", "perplexity", "fit", "shares", "overlap"}
    assert drawn == {path.stem for path in folder.glob("*.png")} == {path.stem for path in folder.glob("*.svg")}
    for heading in ("Share selected by frequency", "Noise that is dropped", "Overlap between references"):
        assert f"\n## {heading}" in summary
    assert "nan" not in summary and "None" not in summary


def write_run(path: Path, ratio: float | None, results: list[tuple[int, float]], score: str = "excess") -> str:
    """A run that never was."""
    selection = None if ratio is None else {"score": score, "ratio": ratio}
    path.mkdir()
    settings = {"phases": [{"selection": selection, "batch_size": 4, "steps": results[-1][0]}], "evaluators": []}
    (path / "run.json").write_text(json.dumps({"identity": {}, "settings": settings, "starts": []}))
    rows = []
    for step, value in results:
        rows.append({"step": step, "target/loss": value})
        row = {"step": step, "loss": value + 1, "tokens_seen": 10 * step, "tokens_trained": 10 * step}
        if ratio is not None:
            row |= {"selected_loss": value + 2, "unselected_loss": None, "tokens_trained": int(10 * step * ratio)}
        rows.append(row)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_metrics_alone_and_a_sweep_over_seeds(tmp_path, shell):
    """As a command, of runs without checkpoints, one of them under way."""
    curve = [(0, 6.0), (10, 4.0), (20, 3.0), (30, 2.5)]
    names = [
        write_run(tmp_path / "a60", 0.6, curve),
        write_run(tmp_path / "b60", 0.6, [(step, value + 0.25) for step, value in curve]),
        write_run(tmp_path / "c40", 0.4, curve[:3]),
        write_run(tmp_path / "causal", None, curve),
        write_run(tmp_path / "random", 0.6, curve, "random"),
    ]
    code, output, errors = shell("analyze", "selection", *names, "--output=out", folder=tmp_path)
    assert code == 0 and "5 runs, 3 figures; see out/summary.md" in output, errors
    record = json.loads((tmp_path / "out" / "selection.json").read_text())
    sweep = {(entry["score"], entry["ratio"]): entry for entry in record["ratio_sweep"]}
    both = sweep["excess", 0.6]
    assert both["runs"] == ["a60", "b60"] and (both["lowest"], both["mean"], both["highest"]) == (2.5, 2.625, 2.75)
    assert sweep["excess", 0.4]["mean"] == 3.0 and sweep["all tokens", 1.0]["mean"] == 2.5
    assert sweep["random", 0.6]["mean"] == 2.5
    assert "tokens" not in record and record["runs"]["c40"]["kept"] == 0.4
    assert record["runs"]["a60"]["fits"]["unselected"]["fit"] is None
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"training", "fit", "ratio_sweep"}


def test_results_of_evaluate_count_too(tmp_path):
    run = write_run(tmp_path / "a60", 0.6, [(0, 6.0), (10, 4.0)])
    (tmp_path / "a60" / "evaluate").mkdir()
    for step, value in ((10, 0.25), (20, 0.5)):
        result = {"step": step, "results": {"gsm8k/accuracy": value}}
        (tmp_path / "a60" / "evaluate" / f"{step}.json").write_text(json.dumps(result))
    record = analyze_selection([run], downstream="gsm8k/accuracy")
    assert record["runs"]["a60"]["downstream"] == {"steps": [10, 20], "values": [0.25, 0.5]}
    (tmp_path / "a60" / "evaluate" / "20.json").write_text("{")
    assert "20.json" in toy.refused("file-damaged", analyze_selection, [run], downstream="gsm8k/accuracy")


def test_what_was_measured_before_a_run_selected_is_in_no_fit(tmp_path):
    """A causal phase, then a selective one: its losses of selected tokens begin at step 60."""
    run = Path(write_run(tmp_path / "late", 0.6, [(step, 5 - step / 100) for step in range(0, 110, 10)]))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if "selected_loss" not in row or row["step"] >= 60]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    fit = of_runs([read_run(str(run))], "target/loss")["runs"]["late"]["fits"]["selected"]
    assert min(fit["steps"]) >= 60


def test_a_running_mean_looks_back_only():
    assert running_mean(np.array([1.0, 3.0, 5.0, 9.0]), 2).tolist() == [1.0, 2.0, 4.0, 7.0]
    assert running_mean(np.array([]), 1).tolist() == []


def test_refusals(runs, crawl, corpus, tmp_path):
    run = str(runs["selective"])

    def refused(code: str, *names: str, **settings) -> str:
        return toy.refused(code, analyze_selection, names, **{"output": str(tmp_path / "none"), **settings})

    refused("selection-no-runs")
    assert str(tmp_path) in refused("run-not-trained", str(tmp_path))
    assert "'selective'" in refused("selection-repeated-run", run, run)
    line = refused("selection-unknown-metric", run, downstream="other/loss")
    assert "'other/loss'" in line and "target/loss" in line and "selected_share" not in line
    assert "'surprise'" in refused("setting-unknown-value", run, scores=["surprise"])
    assert "analyze_selection.corpus" in refused("selection-needs-corpus", run, references=["second"])
    line = refused("columns-missing", run, corpus=corpus.path, selection=Selection(score="loss"))
    assert "3 of the 3" in line and "'selective-0'" in line
    settings = {"corpus": crawl.path, "score_missing": True}
    assert str(tmp_path) in refused("classes-not-found", run, dynamics=str(tmp_path), **settings)
    np.save(tmp_path / "classes.npy", np.zeros((3, 16), np.int8))
    (tmp_path / "dynamics.json").write_text(json.dumps({"fingerprint": crawl.fingerprint}))
    line = refused("classes-too-few-rows", run, dynamics=str(tmp_path), **settings)
    assert "analyze_selection.rows = 3" in line

    def message(**given) -> str:  # of other modules
        return toy.refusal(analyze_selection, [run], **{"output": str(tmp_path / "none"), **given})

    assert "analyze_selection.batch_size is 0" in message(batch_size=0)
    line = message(references=["third"], **settings)
    assert "analyze_selection.references = 'third'" in line and "no score 'third'" in line
    line = message(scores=["excess", "entropy"], **settings)
    assert "analyze_selection.scores = 'entropy'" in line and "no statistic 'entropy'" in line
    (tmp_path / "dynamics.json").write_text(json.dumps({"fingerprint": "0" * 64}))
    assert "000000000000" in message(dynamics=str(tmp_path), **settings)
    assert not (tmp_path / "none").exists()

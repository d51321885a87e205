"""What a demo found: summary.json, and the curves and passages of its report, read from corpora and run directories."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.analyze.report import write_report
from slm_jax.data.corpus import Corpus
from slm_jax.data.token_text import TokenText
from slm_jax.evaluate.flops import run_flops
from slm_jax.files import write_json
from slm_jax.run_directory import RunDirectory

PASSAGES = 6


def write_summary(here: Path, trained: Sequence[str]) -> dict[str, Any]:
    """Writes `summary.json` and `report.html` into `here` from the runs `trained` in it; returns the summary."""
    rows = {name: RunDirectory(here / name).metrics() for name in trained if name != "base"}
    compared = [name for name in rows if name != "reference"]
    curves = {name: _curves(rows[name]) for name in compared}
    summary: dict[str, Any] = {"runs": {name: _run(here / name, rows[name]) for name in compared}}
    if "causal" in compared:
        goal = summary["runs"]["causal"]["target_loss"]
        others = [name for name in compared if name != "causal" and not name.startswith("continual")]
        summary["steps_to_causal_target_loss"] = {name: steps_to(curves[name], goal) for name in others}
    if "continual_causal" in compared:
        goal = summary["runs"]["continual_causal"]["target_loss"]
        others = [name for name in compared if name.startswith("continual") and name != "continual_causal"]
        summary["steps_to_continual_causal_target_loss"] = {name: steps_to(curves[name], goal) for name in others}
    corpus = Corpus.open(_settings(here / [*compared, *rows][0])["phases"][0]["mixture"][0]["corpus"])
    if "selective" in compared and (shares := _shares(rows["selective"], corpus)):
        summary["selection"] = shares
    summary["corpus"] = {
        "path": str(corpus.path),
        "fingerprint": corpus.fingerprint,
        "rows": corpus.num_rows,
        "sequence_length": corpus.sequence_length,
        "vocabulary": corpus.vocab_size,
        "sources": list(corpus.source_names),
    }
    summary["reference"] = _run(here / "reference", rows["reference"]) if "reference" in rows else None
    write_json(here / "summary.json", summary)
    passages = _passages(here / "selective", corpus) if "selective" in compared else []
    write_report(here / "report.html", summary, curves, passages)
    return summary


def _run(run_dir: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    finished = json.loads((run_dir / "summary.json").read_text())
    last = {name: value for row in rows for name, value in row.items() if value is not None}
    flops = run_flops(_settings(run_dir))
    return {
        "target_loss": last.get("target/loss"),
        "target_bits_per_byte": last.get("target/bits_per_byte"),
        "general_loss": last.get("general/loss"),
        "tokens_seen": int(finished["tokens_seen"]),
        "tokens_trained": int(finished["tokens_trained"]),
        "steps": finished["steps"],
        "seconds": round(finished["seconds"], 1),
        "training_flops": flops.training,
        "scoring_flops": flops.scoring,
    }


def _settings(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())["settings"]


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    evaluated = [row for row in rows if "target/loss" in row]
    trained = [row for row in rows if "loss" in row]
    return {
        "steps": [row["step"] for row in evaluated],
        "target_loss": [row["target/loss"] for row in evaluated],
        "general_loss": [row.get("general/loss") for row in evaluated],
        "train_steps": [row["step"] for row in trained],
        "loss": [row["loss"] for row in trained],
        "selected_loss": [row.get("selected_loss") for row in trained],
        "unselected_loss": [row.get("unselected_loss") for row in trained],
    }


def steps_to(curve: dict[str, list[Any]], goal: float) -> int | None:
    """The first step at which the curve, read as straight lines between evaluations, is at `goal` or below; None if
    it never is."""
    points = list(zip(curve["steps"], curve["target_loss"], strict=True))
    for (step, loss), (next_step, next_loss) in itertools.pairwise(points):
        if next_loss <= goal:
            return round(step + (next_step - step) * (loss - goal) / (loss - next_loss)) if loss > goal else step
    return None


def _shares(rows: Sequence[dict[str, Any]], corpus: Corpus) -> dict[str, float] | None:
    """Shares kept over the second half of the run, of noise and of what stands around it; None without noise.

    Every logged step counts alike; steps hold nearly equal numbers of each kind.
    """
    noise = [name for name in corpus.source_names if name.endswith("/noise")]
    if not noise:
        return None
    logged = [row for row in rows if "selected_loss" in row]
    clean_name = "crawl/noisy_stories"

    def share(name: str, part: Sequence[dict[str, Any]]) -> float:
        return float(
            np.mean([row[f"selected_share/{name}"] for row in part if row[f"selected_share/{name}"] is not None])
        )

    first, second = logged[: max(1, len(logged) // 10)], logged[len(logged) // 2 :]
    return {
        "noise_selected_share": share(noise[0], second),
        "clean_selected_share": share(clean_name, second),
        "noise_selected_share_first_tenth": share(noise[0], first),
        "clean_selected_share_first_tenth": share(clean_name, first),
    }


def _passages(run_dir: Path, corpus: Corpus) -> list[dict[str, Any]]:
    """Documents of the traced rows, each token with its final loss and the share of evaluations that selected it.

    Selected means: among the 60 % (the run's ratio) of the traced rows' tokens with the highest excess loss then.
    """
    traces = sorted((run_dir / "token_losses" / "trace").glob("*.npy"), key=lambda path: int(path.stem))
    selection = _settings(run_dir)["phases"][0]["selection"]
    losses = np.stack([np.load(path, allow_pickle=False) for path in traces])  # [evaluations, rows, L]
    rows = np.arange(losses.shape[1])
    columns = corpus.read(rows)
    reference = corpus.read(rows, [f"scores/{selection['reference']}/loss"])[f"scores/{selection['reference']}/loss"]
    excess = losses - reference
    valid = np.isfinite(excess[0])
    floor = np.quantile(excess[:, valid], 1 - selection["ratio"], axis=1)
    selected = np.mean(excess >= floor[:, None, None], axis=0)
    table, reader = corpus.documents().to_pylist(), TokenText(corpus.vocabulary())
    documents = {(about["row"], about["start"]): about for about in table}
    passages = []
    for row in rows.tolist():
        for segment in range(1, int(columns["segment_ids"][row].max()) + 1):
            places = np.flatnonzero(columns["segment_ids"][row] == segment)
            about = documents.get((row, int(places[0])))
            if about is None or len(places) < 24:
                continue  # the end of a document that began in another row
            tokens = _tokens(
                corpus,
                reader,
                {name: column[row][places] for name, column in columns.items()},
                losses[-1][row][places],
                reference[row][places],
                selected[row][places],
                valid[row][places],
            )
            passages.append(
                {"title": about["source"], "url": about["url"], "source": about["source"], "tokens": tokens}
            )
    return _varied(passages)


def _tokens(corpus, reader: TokenText, columns, loss, reference, selected, valid) -> list[dict[str, Any]]:
    has_noise = any(name.endswith("/noise") for name in corpus.source_names)
    texts = reader.texts(columns["tokens"].tolist())
    return [
        {
            "text": texts[i],
            "loss": float(loss[i]) if valid[i] else None,
            "ref_loss": float(reference[i]) if valid[i] else None,
            "excess": float(loss[i] - reference[i]) if valid[i] else None,
            "selected": float(selected[i]) if valid[i] else 0.0,
            "valid": bool(valid[i]),
            "noise": corpus.source_names[columns["source_ids"][i]].endswith("/noise") if has_noise else None,
        }
        for i in range(len(loss))
    ]


def _varied(passages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to PASSAGES, in turn from the sources, those with noise first."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for passage in sorted(passages, key=lambda p: -sum(bool(token["noise"]) for token in p["tokens"])):
        by_source.setdefault(passage["source"], []).append(passage)
    turns = max((len(group) for group in by_source.values()), default=0)
    ordered = [group[turn] for turn in range(turns) for group in by_source.values() if turn < len(group)]
    return ordered[:PASSAGES]

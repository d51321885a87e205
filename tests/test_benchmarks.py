"""What the benchmarks share, without a clock: order of rounds, medians, ratios, rows. And that each script starts."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = (
    "step",
    "parts",
    "selection",
    "scoring",
    "prepare",
    "batches",
    "start",
    "torch_step",
    "generation",
    "gpu",
    "fingerprints",
)


@pytest.fixture
def load(monkeypatch):
    """load(name): a script of benchmarks/ as a module; their folder is first on the path, as when one is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("measure", *SCRIPTS):
        sys.modules.pop(name, None)


@pytest.fixture
def measure(load):
    return load("measure")


def test_rounds_run_every_case_once_and_turn_around(measure):
    calls = []
    cases = [measure.Case(name, lambda name=name: calls.append(name)) for name in "abc"]
    values = measure.interleaved(cases, measure.Rounds(3), warmups=1)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert sorted(rounds) == ["abc", "abc", "cba", "cba"]
    assert all(one != other for one, other in itertools.pairwise(rounds))
    assert {name: len(value) for name, value in values.items()} == {"a": 3, "b": 3, "c": 3}  # the warm-up is not one


def test_values_are_seconds_or_amounts_per_second(measure, monkeypatch):
    now = iter([0.0, 2.0, 2.0, 6.0])
    monkeypatch.setitem(measure.CLOCKS, "wall", lambda: next(now))
    cases = [measure.Case("seconds", lambda: None), measure.Case("tokens per second", lambda: None, 100)]
    assert measure.interleaved(cases, measure.Rounds(1), warmups=0) == {"seconds": [2.0], "tokens per second": [25.0]}


def test_ratio_is_the_median_of_the_ratios_of_the_same_round(measure):
    # The machine is ten times slower in the second round and twice in the third: the ratio does not see it.
    values = {"ours": [1.0, 10.0, 2.2], "theirs": [2.0, 20.0, 4.0]}
    first, second = measure.compared(values, "theirs", "s", vocab_size=8)
    assert (first["name"], first["ratio"]) == ("theirs", 1.0)
    assert second == {
        "name": "ours",
        "baseline": "theirs",
        "ratio": 0.5,
        "median": 2.2,
        "repeats": 3,
        "settings": {"unit": "s", "ratio_range": [0.5, pytest.approx(0.55)], "vocab_size": 8},
    }
    assert measure.fastest(values) == "ours"


def test_report_writes_complete_rows_and_prints_each(measure, tmp_path, capsys):
    values = {"ours": [1.0, 3.0, 2.0], "theirs": [4.0, 4.0, 4.0]}
    rows = measure.compared(values, "theirs", "s", vocab_size=8, batch="4 x 512")
    measure.report(rows, tmp_path / "new" / "rows.json", load=0.5)
    written = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert [row["name"] for row in written] == ["theirs", "ours"]
    for row in written:
        assert set(row) == {"name", "baseline", "ratio", "median", "repeats", "settings"}
        assert row["settings"]["machine"]["load_before"] == 0.5
        assert row["settings"]["machine"]["device"]
    printed = capsys.readouterr().out
    assert "| ours | theirs | **0.500** | 0.250 to 0.750 | 2 s | 3 |" in printed
    assert printed.count("vocab_size 8, batch 4 x 512") == 1  # a setting that all rows share is printed once


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_states_its_claim_and_arguments(load, script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as exit_:
        load(script).main()
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert f"python benchmarks/{script}.py" in shown
    assert all(argument in shown for argument in ("--output", "--repeats", "--clock", "--quick"))


def test_no_gpu_is_one_line(load, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as exit_:
        load("gpu").main()
    assert exit_.value.code == "gpu: skipped, no GPU here: JAX runs on cpu"


def test_no_torch_is_one_line(load, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["torch_step"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        load("torch_step").main()
    assert exit_.value.code.startswith("torch_step: skipped, torch and transformers not installed")

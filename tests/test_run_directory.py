"""What a run directory says: read while it is incomplete, of an older version, or damaged."""

import json
import subprocess
import sys

import pytest
import toy

from slm_jax.metrics import MetricsWriter
from slm_jax.run_directory import RunDirectory


def test_an_empty_directory_says_nothing(tmp_path):
    run = RunDirectory(tmp_path / "none")
    assert run.record() == run.settings() == run.identity() == {} and run.starts() == []
    assert run.metrics() == run.checkpoint_steps() == run.evaluations() == []
    assert run.planned_steps() is None and run.summary() is None


def test_old_keys_are_read(tmp_path):
    run = RunDirectory(tmp_path)
    phases = [{"steps": 3, "batch_rows": 8}, {"steps": 4, "batch_rows": 8}]
    run.run_json.write_text(json.dumps({"settings": {"phases": phases}, "identity": {"initial": "a"}}))
    assert run.settings()["phases"][0]["batch_size"] == 8 and run.identity() == {"init_from": "a"}
    assert run.planned_steps() == 7
    run.metrics_jsonl.write_text('{"step": 1, "unusable_scores": 3}\n')
    assert run.metrics() == [{"step": 1, "nonfinite_scores": 3}]
    (tmp_path / "solve" / "7").mkdir(parents=True)
    assert run.math(7) == tmp_path / "solve" / "7" and run.math(8) == tmp_path / "math" / "8"


def test_steps_are_in_order(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (10, 9, 100):
        (run.checkpoints / str(step)).mkdir(parents=True)
        file = run.token_losses / "held" / f"{step}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (run.checkpoints / "damaged-11").mkdir()
    assert run.checkpoint_steps() == [9, 10, 100] == list(run.token_losses_files("held"))


def test_rows_after_a_damaged_line_are_kept(tmp_path, capsys):
    """Also when the run resumes, which rewrites the file; the damage is reported once."""
    run = RunDirectory(tmp_path)
    rows = [{"step": step, "loss": 1.5} for step in range(1, 6)]
    lines = [json.dumps(row) for row in rows]
    lines[2] = lines[2][:7]
    run.metrics_jsonl.write_text("\n".join([*lines, '{"step": 6, "lo']))
    left = [row for row in rows if row["step"] != 3]
    assert run.metrics() == RunDirectory(tmp_path).metrics() == left
    assert capsys.readouterr().out == f"{run.metrics_jsonl}, line 3, is damaged: it is skipped\n"
    writer = MetricsWriter(tmp_path, 4)
    writer.write(5, {"loss": 2.5})
    writer.close()
    assert run.metrics() == [*left[:-1], {"step": 5, "loss": 2.5}]
    assert capsys.readouterr().out == ""


def test_a_damaged_record_is_named(tmp_path):
    run = RunDirectory(tmp_path)
    for file, read in ((run.run_json, run.record), (run.summary_json, run.summary)):
        file.write_text("{")
        assert str(file) in toy.refused("file-damaged", read)


@pytest.mark.parametrize("name, value", [("identity", []), ("settings", "x"), ("starts", {}), ("settings", None)])
def test_parts_of_another_type_are_damage(name, value, tmp_path):
    run = RunDirectory(tmp_path)
    run.run_json.write_text(json.dumps({name: value}))
    assert f"run.json is damaged ({name})" in toy.refused("file-damaged", run.record)


def test_reading_starts_no_jax():
    code = "import sys, slm_jax.run_directory; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""JSON lines: one command at a time, continued after a kill, and finished results of other settings kept."""

import json
from pathlib import Path

import pytest
import toy

from slm_jax import jsonl
from slm_jax.jsonl import ResumableJsonl, open_result

LINES = [{"place": place} for place in range(3)]


def write(path: Path, about: dict, rows: list[dict] = LINES, total: int = 3) -> int:
    """Appends what is missing of the rows; returns how many there were."""
    with open_result(str(path), about, total) as file:
        done = file.done
        if rows[done:]:
            file.append(rows[done:])
    return done


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_second_command_is_refused_while_the_file_is_written(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_result(str(path), {"seed": 1}, 3) as file:
        file.append(LINES[:1])
        for about in ({"seed": 1}, {"seed": 2}):
            assert str(path) in toy.refused("in-use", write, path, about)
        file.append(LINES[1:])
    assert read(path) == LINES
    assert write(path, {"seed": 1}) == 3


def test_killed_before_the_last_renaming(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    path = tmp_path / "out.jsonl"
    write(path, {"seed": 1}, LINES[:1])
    with (
        monkeypatch.context() as patch,
        open_result(str(path), {"seed": 1}, 3) as file,
        pytest.raises(KeyboardInterrupt),
    ):
        patch.setattr(jsonl.os, "replace", killed)
        file.append(LINES[1:])
    assert not path.exists() and read(tmp_path / "out.jsonl.partial") == LINES
    assert write(path, {"seed": 1}) == 3
    assert read(path) == LINES and not (tmp_path / "out.jsonl.partial").exists()


def test_finished_results_of_other_settings_are_kept(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    write(path, {"seed": 1})
    assert capsys.readouterr().out == ""
    write(path, {"seed": 2}, [{"place": 9}])
    kept = tmp_path / "out.before1.jsonl"
    assert capsys.readouterr().out == f"{path} was made with other settings: it is now {kept}\n"
    assert read(kept) == LINES and json.loads((tmp_path / "out.before1.about.json").read_text()) == {"seed": 1}
    assert write(path, {"seed": 1}) == 0  # what is only begun is replaced
    assert write(path, {"seed": 2}) == 0
    assert capsys.readouterr().out == f"{path} was made with other settings: it is now {tmp_path}/out.before2.jsonl\n"
    assert read(path) == read(kept) == read(tmp_path / "out.before2.jsonl") == LINES


@pytest.mark.parametrize("cut", [1, 5, 14])
def test_a_result_goes_on_after_its_last_whole_row(cut, tmp_path):
    path, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    write(path, {"seed": 1}, LINES[:2])
    partial.write_bytes(partial.read_bytes()[:-cut])
    assert write(path, {"seed": 1}) == (2 if cut == 1 else 1)
    assert read(path) == LINES


def test_a_result_is_made_again_from_its_first_damaged_row(tmp_path):
    path, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    write(path, {"seed": 1}, LINES[:2])
    partial.write_text("{damaged\n" + partial.read_text().splitlines()[1] + "\n")
    assert write(path, {"seed": 1}) == 0
    assert read(path) == LINES


def test_files_that_are_no_results_are_refused(tmp_path):
    (tmp_path / "out.jsonl").write_text("{}\n")
    assert "out.jsonl" in toy.refused("jsonl-foreign-file", write, tmp_path / "out.jsonl", {})
    assert "out.json" in toy.refused("jsonl-ending", write, tmp_path / "out.json", {})


def test_a_log_keeps_what_is_whole(tmp_path):
    """Rows of two writers, after one that a kill cut short and one that was damaged."""
    log = ResumableJsonl(tmp_path / "deep" / "log.jsonl")
    assert log.rows() == []
    log.append(LINES[:2])
    log.path.write_text("damaged\n" + log.path.read_text()[:-3])
    other = ResumableJsonl(log.path)
    assert other.rows() == log.rows() == LINES[:1]
    other.append(LINES[1:2])
    log.append([])
    log.append(LINES[2:])
    assert log.rows() == LINES

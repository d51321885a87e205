"""Files of results: one command at a time, continued after a kill, and finished ones of other settings kept."""

import json
from pathlib import Path

import pytest
import toy

from slm_jax.evaluate import lines
from slm_jax.evaluate.lines import open_lines

LINES = [{"place": place} for place in range(3)]


def write(path: Path, about: dict, rows: list[dict] = LINES, total: int = 3) -> int:
    """Appends what is missing of the rows; returns how many there were."""
    with open_lines(str(path), about, total) as file:
        done = file.done
        if rows[done:]:
            file.append(rows[done:])
    return done


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_second_command_is_refused_while_the_file_is_written(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_lines(str(path), {"seed": 1}, 3) as file:
        file.append(LINES[:1])
        for about in ({"seed": 1}, {"seed": 2}):
            line = toy.refusal(write, path, about)
            assert line == f"another command writes {path}: wait for it, or end it"
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
        open_lines(str(path), {"seed": 1}, 3) as file,
        pytest.raises(KeyboardInterrupt),
    ):
        patch.setattr(lines.os, "replace", killed)
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

"""Files are whole or not there; JSON of any version is read; a lock keeps others out."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import toy

from slm_jax import files
from slm_jax.files import parse_json_lines, read_json, write_array, write_json, write_json_lines


def test_json_is_whole_or_not_there(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Point:
        x: int
        where: Path

    path = tmp_path / "deep" / "a.json"
    write_json(path, {"points": (Point(1, Path("p")),), 2: None})
    assert read_json(path) == {"points": [{"x": 1, "where": "p"}], "2": None}

    def lost(*_) -> None:
        raise OSError("the machine went down")

    monkeypatch.setattr(files.os, "replace", lost)
    with pytest.raises(OSError):
        write_json(path, [])
    assert read_json(path)["2"] is None


def test_what_is_written_is_read(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", [{"text": "half a pair \ud83d"}, {"x": 1}])
    rows = [row for _, row in parse_json_lines((tmp_path / "a.jsonl").read_bytes())]
    assert rows == [{"text": "half a pair \ud83d"}, {"x": 1}]
    write_array(tmp_path / "b.npy", np.arange(3))
    assert np.load(tmp_path / "b.npy").tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", [b'{"a": 1', b"[1]", b"\xff\xfe", b""])
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    assert str(tmp_path / "a.json") in toy.refused("file-damaged", read_json, tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"", []),
        (b'{"a": 1}\n\n{"a": 2}\n', [(1, {"a": 1}), (3, {"a": 2})]),
        (b'{"a": 1}\n{"a": 2}', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'{"a": 1}\n{"a"', [(1, {"a": 1})]),
        (b'{"a": 1}\n{"a"\n{"a": 3}\n', [(1, {"a": 1}), (2, None), (3, {"a": 3})]),
        (b'\x00\x00\n[3]\n{"a": 3}\n', [(1, None), (2, None), (3, {"a": 3})]),
    ],
)
def test_damaged_lines_are_told_from_a_cut_end(content, rows):
    assert list(parse_json_lines(content)) == rows


def test_a_lock_keeps_others_out(tmp_path):
    with files.lock(tmp_path / "deep" / "lock", "busy"):
        assert toy.refused("in-use", files.lock(tmp_path / "deep" / "lock", "busy").__enter__) == "busy"
    with files.lock(tmp_path / "deep" / "lock", "busy"):
        pass


def test_results_of_other_settings_get_the_next_free_name(tmp_path, capsys):
    for place in range(2):
        (tmp_path / "a.json").write_text(json.dumps({"place": place}))
        files.move_aside(tmp_path / "a", ".json")
        assert f"{tmp_path}/a.before{place + 1}.json" in capsys.readouterr().out
        assert read_json(tmp_path / f"a.before{place + 1}.json") == {"place": place}
    assert not (tmp_path / "a.json").exists()

"""A fault of a command is one line on standard error and an exit code; messages of libraries are in a log it names."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toy
from test_main import train_command
from test_processes import start

from slm_jax.messages import FAILED, INTERRUPTED
from slm_jax.run_directory import RunDirectory


def one_line(errors: Path, *words: str) -> str:
    """The only line of standard error, which must contain the words. Of a process that was killed or aborted, a shell
    prints it after the end: it may take a moment."""
    deadline = toy.time.monotonic() + 20
    while not errors.read_text() and toy.time.monotonic() < deadline:
        toy.time.sleep(0.02)
    text = errors.read_text()
    assert text.count("\n") == 1 and text.startswith("slm-jax train: error: "), text
    assert all(word in text for word in words), text
    return text


def log_of(line: str) -> str:
    """What libraries printed, in the log that the line names."""
    return Path(re.findall(r"libraries' messages are in (\S+?)[\s)]", line + " ")[-1]).read_text()


def steps_done(run_dir: Path) -> int:
    return max((row["step"] for row in RunDirectory(run_dir).metrics()), default=0)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, INTERRUPTED), (signal.SIGKILL, -signal.SIGKILL)], ids=str)
def test_a_signal_to_a_run(number, code, corpus, tmp_path):
    arguments = train_command(tmp_path / "run", corpus.path, Phase={"steps": 100_000}, MixtureComponent={"epochs": 1e9})
    command = toy.Command(tmp_path / "log", *arguments, errors=tmp_path / "errors")
    found, _ = command.when(lambda: steps_done(tmp_path / "run") > 3, number)
    assert found == code
    word = "interrupted" if number == signal.SIGINT else "killed"
    one_line(tmp_path / "errors", word, "the same command continues")


@pytest.mark.slow
@pytest.mark.parametrize("number, victim", [(signal.SIGINT, 0), (signal.SIGINT, 1), (signal.SIGKILL, 1)], ids=str)
def test_a_signal_to_one_process_of_two(number, victim, corpus, tmp_path):
    """The first process says it; so does the shell of a killed one."""
    run = tmp_path / "run"
    arguments = train_command(run, corpus.path, Phase={"steps": 100_000}, MixtureComponent={"epochs": 1e9})
    pair = start(tmp_path, *arguments, errors=True)
    pair[victim].when(lambda: steps_done(run) > 3, number)
    codes = [command.finish()[0] for command in pair]
    if number == signal.SIGINT:
        assert codes == [INTERRUPTED, INTERRUPTED]
        one_line(tmp_path / "errors0", "interrupted", "the same command continues")
        assert not (tmp_path / "errors1").read_text()
    else:
        assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
        assert log_of(one_line(tmp_path / "errors0", "the same command", "continues"))


def test_nothing_reads_the_output(corpus, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "slm_jax", *train_command(tmp_path / "run", corpus.path)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == FAILED
    (tmp_path / "errors").write_text(done.stderr)
    one_line(tmp_path / "errors", "nothing reads its output")

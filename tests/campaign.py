"""Faults and hostile inputs by the hundred: `make campaign SEED=1`, some 20 minutes on two cores; no test.

Every case ends in one of three ways. It is held if the results are those of the same command without the fault, to the
bit, or if the command refuses: an exit code other than 0, one line on standard error, no traceback. Anything else has
failed: a wrong result with exit code 0, more lines, fewer, an unexpected exception, or no end.
Inputs that a fault turned into other valid inputs have no wrong result and are not tried: a digit changed in a text.

A seed gives the same cases, apart from the moments of signals, which depend on how fast the machine is.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import conftest  # noqa: F401 (the environment of the tests: the CPU, quick compilation)
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import test_configurable
import toy
from test_main import train_command
from test_processes import start

from slm_jax import checkpoint, messages
from slm_jax.__main__ import main
from slm_jax.data.corpus import Corpus
from slm_jax.evaluate.math.sandbox import Sandbox
from slm_jax.run_directory import RunDirectory

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- campaign -->\n", "<!-- end of campaign -->\n"
LONGEST = 120  # seconds of a case
FILES = 260  # hostile files
Case = tuple[str, Callable[[], str]]  # what is tried, and a function that says what went wrong; '' if it held


class Slow(Exception):
    """A case has no end."""


def judged(code: int, errors: str, output: str, same: Callable[[], bool]) -> str:
    """What is wrong with how a command ended; '' if nothing is."""
    lines = errors.splitlines()
    if "Traceback" in errors + output:
        return f"traceback: {[line for line in lines if re.match('[A-Za-z.]+(Error|Exception|Stop|Interrupt)', line)]}"
    if code == 0:
        return "" if same() else "exit code 0 and another result"
    if len(lines) != 1 or not lines[0].startswith("slm-jax"):
        return f"exit code {code} and {len(lines)} lines: {errors[:300]}"
    return f"unexpected: {lines[0]}" if "[unexpected]" in lines[0] else ""


def here(*arguments: str) -> tuple[int, str, str]:
    """The command in this process: exit code, standard error, output. As in a process of its own, what libraries print
    on standard error is not of it."""
    output, errors, log = io.StringIO(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(log), pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "_own", errors)
        try:
            code = main(arguments)
        except Slow:
            raise
        except BaseException:
            code = 1
            traceback.print_exc(file=errors)
    return code, errors.getvalue(), output.getvalue()


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The content with one of several kinds of damage, and the name of the kind."""
    place = rng.randrange(len(content) + 1)
    flipped = bytearray(content)
    flipped[place % len(content)] ^= 1 << rng.randrange(8)
    kinds = {
        "empty": b"",
        "cut": content[:place],
        "bit": bytes(flipped),
        "zeros": content[:place] + bytes(50) + content[place + 50 :],
        "noise": content[:place] + rng.randbytes(30) + content[place + 30 :],
        "noise only": rng.randbytes(400),
        "twice": content + content,
        "utf-16": content.decode("latin-1").encode("utf-16"),
        "deep": b"[" * 100_000,
        "object deep": b'{"a":' * 100_000,
        "nan": b'{"a": NaN}',
        "cr": content.replace(b"\n", b"\r"),
        "bad utf-8": content[:place] + b"\xff\xfe\xc3(" + content[place:],
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "page": b"<!DOCTYPE html><html><body>404</body></html>",
        "gzip": b"\x1f\x8b\x08\x00" + rng.randbytes(40),
    }
    kind = rng.choice(list(kinds))
    return kind, kinds[kind]


def other_type(value: Any, rng: random.Random) -> Any:
    """A JSON value like this one, in which one value has another type."""
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        return value | {key: other_type(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], other_type(value[place], rng), *value[place + 1 :]]
    others = [v for v in ("x", -3, 10**30, 1.5, None, [], {}, ["x"], {"a": 1}) if type(v) is not type(value)]
    return rng.choice(others)


def wrecked(path: Path, rng: random.Random) -> str:
    """Makes a file of another kind of the file: a folder, a pipe, a link to nothing, no permission."""
    path.unlink()
    kind = rng.choice(["folder", "pipe", "link to nothing", "link to itself", "missing"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to(path if kind == "link to itself" else path.with_name("nothing"))
    return kind


# --- The kinds of faults.


class Campaign:
    """What the cases share: a corpus with a score, a run of 6 steps with checkpoints 3 and 6, an exported model."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.count = folder, seed, 0
        self.corpus = toy.write_corpus(folder / "corpus")
        losses = np.random.default_rng(0).random((96, toy.SEQUENCE_LENGTH), np.float32)
        toy.write_score(self.corpus, "ref", losses)
        self.excess = {"score": "excess", "reference": "ref", "ratio": 0.5}
        code, errors, _ = here(*self.train(folder / "run"))
        assert code == 0, errors
        code, errors, _ = here("export", f"--source={folder}/run", f"--target={folder}/exported")
        assert code == 0, errors
        records = [{"text": f"{' '.join(toy.WORDS[: i % 9 + 2])} {i}"} for i in range(40)]
        (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "a.parquet")
        (folder / "a.txt").write_text("\n\n".join(record["text"] for record in records))
        (folder / "a.gin").write_text("\n".join(a.removeprefix("--gin.") for a in self.train(folder / "g")[1:]))
        self.final = self.result(folder / "run")

    def train(self, run: Path, *more: str, corpus: Path | None = None, steps: int = 6) -> list[str]:
        settings = {"checkpoint_every": 3, "keep_checkpoints": 3}
        command = train_command(run, str(corpus or self.folder / "corpus"), train=settings, Phase={"steps": steps})
        return [*command, "--gin.Phase.selection=@Selection()", *toy.settings(Selection=self.excess), *more]

    def result(self, run: Path) -> tuple[list[Any], str]:
        """What a run computed: losses, and the fingerprints of its last checkpoint."""
        about = checkpoint.read_about(run)
        return toy.losses(run), json.dumps([about["step"], about["fingerprints"]])

    def same(self, run: Path) -> bool:
        return self.result(run) == self.final

    def new(self, *copied: str) -> Path:
        """A new folder with copies of some of the shared ones."""
        self.count += 1
        place = self.folder / f"case{self.count}"
        place.mkdir()
        for name in copied:
            source = self.folder / name
            shutil.copytree(source, place / name) if source.is_dir() else shutil.copy(source, place / name)
        return place

    def settings(self, rng: random.Random) -> Iterator[Case]:
        """Values of the wrong type, out of range or of no known choice, over the whole surface, on the command line or
        in a gin file; a setting that the run does not read must be named."""
        names = {owner: name for name, owner, *_ in test_configurable.surface()}
        for owner, setting, value, _ in rng.sample(list(test_configurable.wrong_values()), 500):
            if value.__class__ in (object, list, type):
                value = rng.choice([[7, None], {"b": [1]}, -(10**40)])  # what gin can write
            binding = f"{names[owner]}.{setting}={value!r}".replace("=nan", "=1e999")
            others = ["--gin.train.optimizer=@OptimizerConfig()", "--gin.train.dry_run=True"]
            given = any(f".{names[owner]}.{setting}=" in argument for argument in self.train(self.folder, *others))
            in_file = not given and rng.random() < 0.5  # the command line overrides a file

            def attempt(binding=binding, in_file=in_file, others=others) -> str:
                place = self.new()
                if in_file:
                    (place / "s.gin").write_text(binding + "\n")
                more = [*others, f"--gin_file={place}/s.gin" if in_file else f"--gin.{binding}"]
                code, errors, output = here(*self.train(place / "run"), *more)
                return judged(code, errors, output, lambda: "no effect" in output)

            yield binding, attempt

    def files(self, rng: random.Random) -> Iterator[Case]:
        """Texts, Parquet, gin, manifests, run records and models that are damaged, hostile, or no files at all."""
        targets = ["a.jsonl", "a.parquet", "a.txt", "a.gin", "corpus/manifest.json", "corpus/documents.parquet"]
        targets += ["run/run.json", "run/summary.json", "run/metrics.jsonl", "run/config.gin"]
        targets += ["exported/config.json", "exported/model.safetensors", "exported/generation_config.json"]
        for number in range(FILES):
            target = targets[number % len(targets)]
            how = rng.choice(
                ["bytes", "bytes", "kind", "value"] if target.endswith(".json") else ["bytes"] * 4 + ["kind"]
            )
            draw = rng.random()
            yield f"{target}: {how} {number}", lambda target=target, how=how, draw=draw: self.file(target, how, draw)

    def file(self, target: str, how: str, draw: float) -> str:
        rng = random.Random(draw)
        place = self.new(target.split("/")[0])
        path, before = place / target, (self.folder / target).read_bytes()
        if how == "bytes":
            kind, content = damaged(before, rng)
            path.write_bytes(content)
        elif how == "value":
            kind, content = "value", json.dumps(other_type(json.loads(before), rng)).encode()
            path.write_bytes(content)
        else:
            kind, content = wrecked(path, rng), None
        what, changed = target.split("/")[-1], content != before
        if target.startswith("a.") and what != "a.gin":
            source = [
                f"--gin.Source.files=[{str(path)!r}]",
                "--gin.Source.name='a'",
                "--gin.prepare.sources=[@Source()]",
            ]
            shape = ["--gin.prepare.sequence_length=16", f"--corpus={place}/out"]
            code, errors, output = here("prepare", *source, *shape)
            # Damage that leaves readable records beside it is counted and named; other text is other text.
            said = "skipped" in output or kind in (
                "twice",
                "bit",
                "cut",
                "noise",
                "zeros",
                "pointer",
                "page",
                "nan",
                "cr",
            )
            return self.named(kind, judged(code, errors, output, lambda: said or not changed))
        if what in ("a.gin", "config.gin"):
            code, errors, output = here("train", f"--gin_file={path}", f"--run_dir={place}/new", "--dry_run")
            return self.named(kind, judged(code, errors, output, lambda: True))
        if target.startswith("corpus"):
            if "documents" in target:
                code, errors, output = here(
                    "analyze",
                    "inspect",
                    f"{self.folder}/run",
                    f"--corpus={place}/corpus",
                    f"--output={place}/page.html",
                    "--gin.Selection.score='loss'",
                )
                return self.named(kind, judged(code, errors, output, lambda: not changed or "documents" in output))
            code, errors, output = here(*self.train(place / "new", corpus=place / "corpus"))
            return self.named(kind, judged(code, errors, output, lambda: self.same(place / "new")))
        if target.startswith("run"):
            code, errors, output = here("analyze", "report", f"{place}/run", f"--output={place}/report")
            if code == 0:
                code, errors, output = here(*self.train(place / "run", steps=7))
            return self.named(kind, judged(code, errors, output, lambda: True))
        code, errors, output = here(
            "import", f"--source={place}/exported", f"--target={place}/model", f"--vocabulary={self.folder}/run"
        )

        def same() -> bool:
            ours, theirs = (checkpoint.read_about(run) for run in (place / "model", self.folder / "run"))
            data = what.endswith(".safetensors") and kind in (
                "bit",
                "noise",
                "zeros",
            )  # other weights are other weights
            return data or kind in ("bit", "value") or ours["params_fingerprint"] == theirs["params_fingerprint"]

        return self.named(kind, judged(code, errors, output, same))

    def named(self, kind: str, problem: str) -> str:
        return problem and f"{kind}: {problem}"

    def bits(self, rng: random.Random) -> Iterator[Case]:
        """One bit of a column, a score, a checkpoint, documents or metrics; then training continues to its end."""
        files = [p for top in ("corpus", "run/checkpoints") for p in (self.folder / top).rglob("*") if p.is_file()]
        files = [p for p in sorted(files) if p.suffix != ".json" or "checkpoints" in str(p)]
        for number in range(130):
            path = rng.choice([p for p in files if p.stat().st_size])
            bit = rng.randrange(8 * path.stat().st_size)
            yield (
                f"{path.relative_to(self.folder)} bit {bit} ({number})",
                lambda path=path, bit=bit: self.bit(path, bit),
            )

    def bit(self, path: Path, bit: int) -> str:
        place, relative = self.new("corpus", "run"), path.relative_to(self.folder)
        content = bytearray((place / relative).read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        (place / relative).write_bytes(content)
        (place / "run" / "summary.json").unlink()
        if "checkpoints" not in str(relative) or bit % 2:
            shutil.rmtree(place / "run" / "checkpoints" / "6")  # continues from step 3
        os.rename(self.folder / "corpus", self.folder / "intact")
        os.symlink(place / "corpus", self.folder / "corpus")  # a run knows its corpus by its path
        try:
            code, errors, output = here(*self.train(place / "run"))
        finally:
            os.unlink(self.folder / "corpus")
            os.rename(self.folder / "intact", self.folder / "corpus")
        return judged(code, errors, output, lambda: self.same(place / "run"))

    def programs(self, rng: random.Random) -> Iterator[Case]:
        """Programs in the sandbox that read, write, spread, or use what they should not."""
        secret = self.folder / "secret.txt"
        secret.write_text("a-secret-word")
        hostile = [
            "print(open({secret!r}).read())",
            "import os\nfor n in range(64):\n    try: print(os.read(n, 100))\n    except OSError: pass",
            "import os; print(os.listdir({folder!r}))",
            "open({out!r}, 'w').write('x')",
            "import os; os.symlink({folder!r}, 'l'); print(open('l/secret.txt').read())",
            "import os; os.makedirs('/' + 'a/' * {depth}); open({out!r}, 'w').write('x')",
            "x = bytearray({size}); x[::4096] = b'x' * len(x[::4096])",
            "import os\nfor _ in range({forks}): os.fork()\nx = [bytearray(10**7) for _ in range({size} // 10**8)]",
            "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
            "import os\nfor n in range({size} // 1000): os.close(os.open(str(n), os.O_CREAT))",
            "import os\nfor n in range({depth}): os.mkdir('d'); os.chdir('d')",
            "import ctypes; print(ctypes.CDLL(None).syscall({number}, {a}, {b}, {c}, 0))",
            "import ctypes\nfor n in range({number}, {number} + 20): print(ctypes.CDLL(None).syscall(n, {a}, 0, 0))",
            "import os, signal\nos.kill(-1, {sig})",
            "import os; os.kill(os.getppid(), {sig}); os.kill(1, {sig}); print('here')",
            "import os; os.killpg(0, {sig})",
            "import sys; sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
            "print('x' * {size})",
            "while True: print('x' * 1000)",
            "import ctypes; ctypes.string_at({a})",
            "import os; os.setsid() if not os.fork() else None\nwhile True: pass",
            "import socket; socket.create_connection(('127.0.0.1', {number}), 1)",
            "import os; os.execv('/bin/sh', ['sh', '-c', 'cat {secret}; touch {out}'])",
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); x = bytearray({size})",
            "import os; print(open('/proc/self/environ').read(), dict(os.environ))",
            "import os; os.mkfifo('f'); open('f')",
            "import sympy; print(sympy.factorint(10**{depth} + 7))",
            "import mmap; [mmap.mmap(-1, {size} // 100) for _ in range(100)]",
            "\x00\x01 not a program {size}",
            "import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()",
        ]
        for number in range(150):
            values = {"secret": str(secret), "folder": str(self.folder), "out": str(self.folder / "escaped")}
            values |= {
                "size": rng.randrange(10**6, 10**11),
                "depth": rng.randrange(10, 5000),
                "forks": rng.randrange(1, 4),
            }
            values |= {"number": rng.randrange(460), "sig": rng.randrange(1, 65)}
            values |= {name: rng.choice([0, 1, -1, 4096, 2**31, 2**63 - 1]) for name in "abc"}
            program = hostile[number % len(hostile)]
            for name, value in values.items():
                program = program.replace("{" + name + "!r}", repr(value)).replace("{" + name + "}", str(value))
            yield program.replace("\n", "; ")[:200], lambda program=program: self.program(program)

    def program(self, program: str) -> str:
        os.environ["SECRET"] = "a-secret-word"
        begin = time.monotonic()
        [ran] = Sandbox(seconds=2).run_all([program])
        if time.monotonic() - begin > 20:
            return "it did not end"
        if "a-secret-word" in ran.output + ran.error or (self.folder / "escaped").exists():
            return f"it escaped: {ran}"
        return "" if len(ran.output) <= 20_000 and "\n" not in ran.error.strip() else f"more than one line: {ran}"

    # --- Processes: each case starts commands of its own.

    def command(self, place: Path, *arguments: str) -> toy.Command:
        return toy.Command(place / "log", *arguments, errors=place / "errors")

    def finish(self, place: Path, command: toy.Command, same: Callable[[], bool]) -> str:
        code, output = command.finish()
        return judged(code, (place / "errors").read_text(), output, same)

    def signals(self, rng: random.Random) -> Iterator[Case]:
        """SIGKILL, SIGTERM or SIGINT at a random moment of train, score or prepare; then the same command."""
        for number in range(60):
            kind, stage = rng.choice(["KILL", "TERM", "INT"]), rng.choice(["train", "train", "score", "prepare"])
            after = rng.random()
            yield f"SIG{kind} {stage} {number}", lambda k=kind, s=stage, a=after: self.signal(k, s, a)

    def signal(self, kind: str, stage: str, after: float) -> str:
        place = self.new("corpus", "a.jsonl")
        stages = {
            "train": (self.train(place / "out"), lambda: self.same(place / "out")),
            "score": (
                ["score", f"--corpus={place}/corpus", f"--reference={self.folder}/run", "--gin.score.name='new'"],
                lambda: self.scored(place / "corpus"),
            ),
            "prepare": (
                [
                    *("prepare", f"--corpus={place}/out", "--gin.prepare.sequence_length=16", "--gin.Source.name='a'"),
                    *(f"--gin.Source.files=[{str(self.folder / 'a.jsonl')!r}]", "--gin.prepare.sources=[@Source()]"),
                ],
                lambda: self.prepared(place / "out"),
            ),
        }
        arguments, same = stages[stage]
        wait = after * {"train": 5.0, "score": 4.0, "prepare": 1.5}[stage]
        command = self.command(place, *arguments)
        begun: list[float] = []

        def due() -> bool:
            if not begun and (place / "errors").exists():
                begun.append(time.monotonic())
            return bool(begun) and time.monotonic() - begun[0] > wait

        code, output = command.when(due, getattr(signal, f"SIG{kind}"))
        time.sleep(0.2)  # the line of a killed process comes after its end
        errors = (place / "errors").read_text()
        if "Traceback" in errors + output or len(errors.splitlines()) > 1:
            return f"stopped: {errors[:300]}"
        if code == 0 and "terminated" not in output and not same():
            return "stopped: exit code 0 and another result"
        return self.finish(place, self.command(place, *arguments), same)

    def scored(self, corpus: Path) -> bool:
        if not hasattr(self, "_scored"):
            place = self.new("corpus")
            code, errors, _ = here(
                "score", f"--corpus={place}/corpus", f"--reference={self.folder}/run", "--gin.score.name='new'"
            )
            assert code == 0, errors
            self._scored = Corpus.open(place / "corpus").score("new").array("loss").read().result()
        return np.array_equal(Corpus.open(corpus).score("new").array("loss").read().result(), self._scored)

    def prepared(self, corpus: Path) -> bool:
        if not hasattr(self, "_prepared"):
            place = self.new()
            command = ["prepare", f"--corpus={place}/out", "--gin.prepare.sequence_length=16", "--gin.Source.name='a'"]
            code, errors, _ = here(
                *command, f"--gin.Source.files=[{str(self.folder / 'a.jsonl')!r}]", "--gin.prepare.sources=[@Source()]"
            )
            assert code == 0, errors
            self._prepared = Corpus.open(place / "out").fingerprint
        return Corpus.open(corpus).fingerprint == self._prepared

    def disks(self, rng: random.Random) -> Iterator[Case]:
        """A disk that is full after a random number of bytes; with more space the same command continues."""
        for number in range(25):
            size = rng.randrange(8_000, 2_000_000)
            yield f"disk of {size} bytes ({number})", lambda size=size: self.disk(size)

    def disk(self, size: int) -> str:
        place = self.new()
        mounted = place / "disk"
        mounted.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mounted], check=True)
        try:
            arguments = self.train(mounted / "run")
            if problem := self.finish(place, self.command(place, *arguments), lambda: self.same(mounted / "run")):
                return f"full: {problem}"
            subprocess.run(["mount", "-o", "remount,size=64m", mounted], check=True)
            return self.finish(place, self.command(place, *arguments), lambda: self.same(mounted / "run"))
        finally:
            subprocess.run(["umount", "-l", mounted], check=True)

    def pairs(self, rng: random.Random) -> Iterator[Case]:
        """Two processes of one run: the second has another setting or corpus, or one of them gets a signal."""
        toy.write_corpus(self.folder / "other", seed=1)
        odds = [
            "train.seed=3",
            "constant_schedule.peak=2e-2",
            "Phase.steps=7",
            "Phase.batch_size=16",
            "Selection.ratio=0.6",
        ]
        odds += [f"MixtureComponent.corpus={str(self.folder / 'other')!r}", "train.seed='x'", "trian.seed=1"]
        for setting in odds:
            yield f"second process: {setting}", lambda setting=setting: self.pair(setting)
        for victim in (0, 1):
            for kind in ("KILL", "INT"):
                yield f"SIG{kind} to process {victim}", lambda v=victim, k=kind: self.pair_signal(v, k)

    def pair(self, setting: str) -> str:
        place = self.new()
        pair = start(place, *self.train(place / "run"), second=(f"--gin.{setting}",), errors=True)
        codes = [command.finish()[0] for command in pair]
        errors = "".join((place / f"errors{n}").read_text() for n in (0, 1))
        return judged(0 if 0 in codes else codes[0], errors, "", lambda: False)

    def pair_signal(self, victim: int, kind: str) -> str:
        place = self.new()
        run = RunDirectory(place / "run")
        arguments = self.train(place / "run", steps=100_000)
        pair = start(place, *arguments, "--gin.MixtureComponent.epochs=1e9", errors=True)
        pair[victim].when(lambda: len(run.metrics()) > 3, getattr(signal, f"SIG{kind}"))
        codes = [command.finish()[0] for command in pair]
        time.sleep(0.5)
        errors = [(place / f"errors{n}").read_text() for n in (0, 1)]
        if 0 in codes or "Traceback" in "".join(errors) or not any(errors) or any(e.count("\n") > 1 for e in errors):
            return f"exit codes {codes}, {errors}"
        return ""


KINDS = {
    "settings": "wrong settings",
    "files": "hostile and damaged files",
    "bits": "flipped bits",
    "programs": "hostile programs",
    "signals": "SIGKILL, SIGTERM, SIGINT",
    "disks": "full disks",
    "pairs": "two processes at odds",
}


def run_kind(campaign: Campaign, kind: str, most: int) -> dict[str, Any]:
    """Tries the cases of a kind; prints those that failed."""
    rng, tried, failed, begin = random.Random(f"{campaign.seed} {kind}"), 0, [], time.monotonic()

    def too_slow(*_: Any) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, too_slow)
    for what, attempt in list(getattr(campaign, kind)(rng))[:most]:
        signal.alarm(LONGEST)
        try:
            problem = attempt()
        except Slow:
            problem = f"no end within {LONGEST} s"
        except Exception as error:
            problem = f"the campaign itself: {type(error).__name__}: {str(error)[:300]}"
        finally:
            signal.alarm(0)
        tried += 1
        if problem:
            failed.append(f"{what}: {problem}")
            print(f"FAILED {kind}: {what}: {problem}", flush=True)
        shutil.rmtree(campaign.folder / f"case{campaign.count}", ignore_errors=True)
    seconds = round(time.monotonic() - begin)
    print(f"{kind}: {tried} tried, {tried - len(failed)} held, {len(failed)} failed, {seconds} s", flush=True)
    return {"tried": tried, "failed": failed, "seconds": seconds, "seed": campaign.seed, "date": str(date.today())}


def table(results: dict[str, Any]) -> str:
    rows = [(words, results[kind]) for kind, words in KINDS.items() if kind in results]
    lines = ["| fault | tried | held | failed | seconds |", "|---|---|---|---|---|"]
    for words, row in rows:
        tried, failed = row["tried"], len(row["failed"])
        lines.append(f"| {words} | {tried} | {tried - failed} | {failed} | {row['seconds']} |")
    tried, failed = (sum(count) for count in zip(*((r["tried"], len(r["failed"])) for _, r in rows), strict=True))
    lines.append(f"| all | {tried} | {tried - failed} | {failed} | {sum(row['seconds'] for _, row in rows)} |")
    return "\n".join(lines) + "\n"


def write_page(results: dict[str, Any]) -> None:
    """Replaces the table of docs/reliability.md."""
    days, seeds = (sorted({str(row[name]) for row in results.values()}) for name in ("date", "seed"))
    machine = f"{os.cpu_count()} cores, {os.uname().machine}, jax {jax.__version__}, Python {sys.version.split()[0]}"
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    about = f"{', '.join(days)}, seed {', '.join(seeds)}, {machine}:\n\n"
    PAGE.write_text(head + BEGIN + about + table(results) + END + rest.split(END)[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of them, with commas")
    parser.add_argument("--most", type=int, default=10_000, help="cases of a kind")
    parser.add_argument("--results", default="build/campaign.json", help="kinds of several runs gather here")
    parser.add_argument("--page", action="store_true", help="write the table of all results into docs/reliability.md")
    given = parser.parse_args()
    toy._processes.set_forkserver_preload(["__main__", *toy.PRELOADED])
    kept = Path(given.results).resolve()
    kept.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="slm-jax-campaign-") as folder, toy.one_device():
        campaign = Campaign(Path(folder), given.seed)
        for kind in given.kinds.split(","):
            results[kind] = run_kind(campaign, kind, given.most)
            kept.write_text(json.dumps(results, indent=2))
    print(table(results))
    if given.page:
        write_page(results)
    sys.exit(any(row["failed"] for row in results.values()))

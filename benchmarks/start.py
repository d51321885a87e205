"""From the start of the process to the first finished step of the demo's model, and to an answer without JAX.

    python benchmarks/start.py --output FILE

Seconds until `slm-jax train` has written the metrics of step 1, against a Python that imports jax and asks for its
devices: without kept programs, and with those of an earlier command. And of `train --help` and a mistake in a setting.
A run that imports TensorFlow is refused.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import batches
import measure

DEVICES = "import jax; jax.devices()"
TRAIN = """
import sys
from slm_jax.__main__ import main
code = main(sys.argv[1:])
sys.exit(code or ("TensorFlow was imported" if "tensorflow" in sys.modules else 0))
"""
POLL_SECONDS = 0.005


class Run:
    """A run of one step, in a process of its own. `cache`: the user's cache folder; None keeps no programs."""

    def __init__(self, folder: Path, corpus: str, cache: Path | None = None):
        self._folder, self._log = folder, folder.with_suffix(".log")
        settings = {
            "train.run_dir": str(folder),
            "Phase.steps": 1,
            "MixtureComponent.corpus": corpus,
            "cosine_schedule.warmup": 0.0,
        }
        self._arguments = ["train", *(f"--gin.{name}={value!r}" for name, value in settings.items())]
        own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
        others = {name: value for name, value in os.environ.items() if name not in own}
        keep = {"XDG_CACHE_HOME": str(cache)} if cache else {"JAX_ENABLE_COMPILATION_CACHE": "0"}
        self._environment = {**others, **keep}

    def to_first_step(self) -> None:
        """Returns when the first step is written down."""
        process = self._start()
        while process.poll() is None and not self._has_step():
            time.sleep(POLL_SECONDS)
        process.kill()
        process.wait()
        assert self._has_step(), self._log.read_text()

    def to_end(self) -> None:
        """Runs to the end, which shows what was imported on the way."""
        if self._start().wait():
            sys.exit(f"the run failed: {self._log.read_text().splitlines()[-1]}")

    def _start(self) -> subprocess.Popen:
        shutil.rmtree(self._folder, ignore_errors=True)
        with self._log.open("w") as log:
            command = [sys.executable, "-c", TRAIN, *self._arguments]
            return subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)

    def _has_step(self) -> bool:
        try:
            rows = [json.loads(line) for line in (self._folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, json.JSONDecodeError):  # not there yet, or half a line
            return False
        return any(row["step"] == 1 and "loss" in row for row in rows)


def answer(*arguments: str, code: int) -> None:
    command = [sys.executable, "-m", "slm_jax", "train", *arguments]
    assert subprocess.run(command, capture_output=True).returncode == code


def main() -> None:
    arguments = measure.parser(__doc__, repeats=5).parse_args()
    if arguments.quick:
        arguments.repeats = 1
    load = measure.load_average()
    rounds = measure.Rounds(arguments.repeats, arguments.clock)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        corpus = batches.write_corpus(folder / "corpus", 64).path
        cold, cached = Run(folder / "run", corpus), Run(folder / "run", corpus, cache=folder / "cache")
        cached.to_end()
        cases = [
            measure.Case("import jax", lambda: subprocess.run([sys.executable, "-c", DEVICES], check=True)),
            measure.Case("first step", cold.to_first_step),
            measure.Case("first step, programs cached", cached.to_first_step),
            measure.Case("--help", lambda: answer("--help", code=0)),
            measure.Case("a mistake", lambda: answer("--run_dir=r", "--gin.Selection.ratio=1.5", code=2)),
        ]
        values = measure.interleaved(cases, rounds)
    rows = measure.compared(values, "import jax", "s", model="demo", batch="16 x 256")
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()

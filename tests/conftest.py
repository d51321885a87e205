"""What all tests share: the CPU, shown to JAX as eight devices, and runs that many tests start from.

Most of the time of a toy run is compilation: XLA optimizes little and writes fusions as it did before, which makes that
several times as fast, and programs compiled once are kept for the session, also for other workers and for the
processes that tests start. The environment is set before any backend starts; workers and children inherit it.
"""

import importlib.metadata
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
FUSIONS = "--xla_cpu_use_fusion_emitters=false"
if importlib.metadata.version("jax").startswith("0.10."):  # later ones end when they meet a flag that they have no more
    os.environ["XLA_FLAGS"] = f"{FUSIONS} {os.environ.get('XLA_FLAGS', '').replace(FUSIONS, '')}".strip()
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="slm_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis  # noqa: E402
import inspector_pages  # noqa: E402
import jax  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
import toy  # noqa: E402

from slm_jax.data.corpus import Corpus  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no mistake
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of several workers begins with its share of the slow tests: the last tests to run are quick ones."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = iter([item for item in items if not item.get_closest_marker("slow")])
    size, ordered = len(items) // workers, []
    for worker in range(workers):  # the tests of one worker after those of another
        mine = slow[worker::workers]
        ordered += [*mine, *itertools.islice(rest, size - len(mine))]
    items[:] = [*ordered, *rest]


@pytest.fixture(autouse=True, scope="module")
def not_too_much_memory() -> Iterator[None]:
    """Several workers share a machine, and the programs that one has loaded come to gigabytes; the files of compiled
    ones stay."""
    yield
    if psutil.Process().memory_info().rss > 5 << 29:
        jax.clear_caches()


def pytest_unconfigure() -> None:
    if OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """96 rows of two sources. Tests that add columns take a copy."""
    return toy.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture
def corpus_copy(corpus, tmp_path) -> Corpus:
    return Corpus.open(shutil.copytree(corpus.path, tmp_path / "corpus"))


@pytest.fixture(scope="session")
def reference(corpus, tmp_path_factory) -> Path:
    """The run directory of a model trained for 6 steps on `corpus`, with checkpoints 3 and 6."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    toy.train_here(run_dir, [toy.phase(corpus)], seed=100, checkpoint_every=3)
    return run_dir


@pytest.fixture(scope="session")
def inspected(tmp_path_factory, reference, shell) -> inspector_pages.Made:
    return inspector_pages.make(tmp_path_factory.mktemp("inspector"), reference, shell)


@pytest.fixture(scope="session")
def shell() -> Iterator[toy.Shell]:
    shell = toy.Shell()
    yield shell
    shell.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew instead of comparing")


@pytest.fixture
def golden(request) -> Callable[[str, Any], Any]:
    """golden(name, now): the JSON value kept as tests/golden/NAME.json; `now` becomes it when asked for."""

    def kept(name: str, now: Any) -> Any:
        path = Path(__file__).parent / "golden" / f"{name}.json"
        if request.config.getoption("--update-golden"):
            path.write_text(json.dumps(now, indent=2) + "\n")
        return json.loads(path.read_text())

    return kept

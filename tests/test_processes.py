"""Two processes of four devices each do what one of eight does, in all stages they share; they end together."""

import base64
import dataclasses
import json
import re
import shutil
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.checkpoint import Checkpoints
from slm_jax.data.corpus import Corpus
from slm_jax.data.metadata import Metadata
from slm_jax.data.scores import ScoreColumn
from slm_jax.evaluate.generate import generate
from slm_jax.evaluate.generation import Sampling
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.mesh import MeshConfig
from slm_jax.run_directory import RunDirectory
from slm_jax.score.kept_losses import kept_column
from slm_jax.score.score_corpus import score
from slm_jax.score.selection import Selection
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.phases import Phase
from slm_jax.train.state import TrainState, init_state, state_shapes

PREFIX = "URL: a.org\n\n"
AXES = MeshConfig(data=2, fsdp=2, model=2)
MESH = ("--gin.train.mesh=@MeshConfig()", *toy.settings(MeshConfig=dataclasses.asdict(AXES)))


def start(folder: Path, *arguments: str, second: tuple[str, ...] = (), errors: bool = False) -> list[toy.Command]:
    """The command in two processes; `second`: arguments that only the second is given; `errors`: standard error has
    files of its own, errors0 and errors1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def command(index: int) -> toy.Command:
        names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        log, apart = folder / f"log{index}", folder / f"errors{index}" if errors else None
        return toy.Command(log, *arguments, *(second if index else ()), environment=names, devices=4, errors=apart)

    return [command(0), command(1)]


def finish(pair: list[toy.Command]) -> tuple[list[int], str, str]:
    """Both exit codes, and the output of either."""
    (first, output), (second, other) = (command.finish() for command in pair)
    return [first, second], output, other


@pytest.fixture(scope="session")
def corpus(corpus, tmp_path_factory) -> Corpus:
    """A copy: the runs below keep token losses in it."""
    return Corpus.open(shutil.copytree(corpus.path, tmp_path_factory.mktemp("kept") / "corpus"))


def last_step(run_dir: Path) -> int:
    return max((row["step"] for row in RunDirectory(run_dir).metrics()), default=0)


def phase(corpus: Corpus, steps: int) -> Phase:
    return toy.phase(corpus, steps=steps, selection=Selection(score="loss", ratio=0.5, scope="batch"))


def held_out(corpus: Corpus) -> HeldOut:
    return HeldOut("held", corpus.path, rows=16, batch_size=8, keep_tokens=True, prefix=PREFIX)


def command(corpus: Corpus, run_dir: Path, steps: int) -> tuple[str, ...]:
    """Trains `phase` with the evaluator `held_out`, on the command line."""
    return (
        "train",
        *toy.MODEL_SETTINGS,
        *toy.CONSTANT,
        *MESH,
        "--gin.Phase.selection=@Selection()",
        "--gin.train.evaluators=[@HeldOut()]",
        *toy.settings(
            Selection={"score": "loss", "ratio": 0.5, "scope": "batch"},
            MixtureComponent={"corpus": corpus.path, "epochs": 100.0},
            Phase={"steps": steps, "batch_size": 8},
            constant_schedule={"peak": 1e-2, "warmup": 0.0},
            HeldOut=dataclasses.asdict(held_out(corpus)),
            train={"run_dir": str(run_dir), "checkpoint_every": 4, "evaluate_every": 1000},
        ),
    )


def restored(run_dir: Path, config: MeshConfig, num_devices: int) -> TrainState:
    """The last checkpoint in this process, on another mesh, as numpy."""
    devices = mesh_lib.make_mesh(config, jax.devices()[:num_devices])
    shapes = state_shapes(toy.MODEL, make_optimizer(OptimizerConfig()), devices)
    with Checkpoints(run_dir) as checkpoints:
        found = checkpoints.restore(shapes.items())
    assert found is not None
    return jax.tree.map(np.asarray, TrainState.of(found[0]))


@pytest.mark.slow
def test_two_processes_train_as_one_through_a_kill_and_a_termination(corpus, tmp_path):
    """One of the two is killed, both are started again, one gets a SIGTERM, and one process alone ends the run.

    What is computed twice is equal to the bit. One process computes the same to rounding: sums over devices are taken
    in another order.
    """
    run, alone = tmp_path / "run", tmp_path / "alone"
    arguments = command(corpus, run, steps=1000)
    pair = start(tmp_path, *arguments)
    pair[1].when(lambda: last_step(run) >= 6, signal.SIGKILL)
    codes, output, _ = finish(pair)
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL, output
    before = toy.losses(run)

    pair = start(tmp_path, *arguments)
    pair[1].when(lambda: last_step(run) >= len(before) + 2, signal.SIGTERM)
    codes, output, other = finish(pair)
    assert codes == [0, 0], output + other
    steps = last_step(run)
    assert f"train: terminated at step {steps}, saved; the same command continues" in output
    assert "train:" not in other  # one process speaks
    assert "from step 4," in output and len(before) > 4
    assert toy.losses(run)[: len(before)] == before
    rows = RunDirectory(run).metrics()
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))
    assert [row["step"] for row in rows if "held/loss" in row] == [0]
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [(start["num_processes"], start["num_devices"]) for start in starts] == [(2, 8), (2, 8)]

    there, *elsewhere = (restored(run, *place) for place in ((AXES, 8), (MeshConfig(fsdp=4), 4), (MeshConfig(), 1)))
    assert there.step == steps
    for state in elsewhere:
        jax.tree.map(np.testing.assert_array_equal, state, there)
    for folder in (run, alone):
        settings = {"evaluators": [held_out(corpus)], "evaluate_every": 1000, "checkpoint_every": 1000}
        toy.train_here(folder, [phase(corpus, steps + 2)], **settings)
    ours, expected = toy.losses(run), toy.losses(alone)
    np.testing.assert_allclose(ours[:20], expected[:20], rtol=1e-5)  # rounding grows with the steps
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    for step in (0, steps + 2):
        columns = (corpus.score(kept_column(folder, "held", step), partial=True) for folder in (run, alone))
        ours, expected = (np.asarray(column.array("loss")[:16].read().result()) for column in columns)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_score_as_one(reference, tmp_path):
    """Though each takes the metadata out of its own rows."""
    records = [{"text": " ".join(toy.WORDS[: i % 9 + 1]), "url": f"https://a{i % 3}.org"} for i in range(60)]
    corpus = toy.write_documents(tmp_path / "corpus", records, 64, metadata=Metadata())
    settings = {"corpus": corpus.path, "reference": str(reference), "batch_size": 8, "strip_metadata": True}
    mesh = (part.replace("train.mesh", "score.mesh") for part in MESH)
    codes, output, other = finish(start(tmp_path, "score", *mesh, *toy.settings(score={**settings, "name": "two"})))
    assert codes == [0, 0], output + other
    score(**settings, mesh=AXES, name="one")
    two, one = (corpus.score(name) for name in ("two", "one"))
    assert two.reference == one.reference  # fingerprints included
    np.testing.assert_array_equal(two.array("loss").read().result(), one.array("loss").read().result())


def test_a_mistake_that_one_process_finds_ends_all_with_one_line(corpus, tmp_path):
    run = tmp_path / "run"
    with processes.lock(run / "lock", "busy"):
        codes, output, other = finish(start(tmp_path, *command(corpus, run, 6)))
    assert codes == [1, 1]
    assert (output + other).count("error: another process is training in") == 1 and "Traceback" not in output + other
    elsewhere = tuple(toy.settings(MixtureComponent={"corpus": str(tmp_path / "nowhere")}))
    codes, output, other = finish(start(tmp_path, *command(corpus, run, 6), second=elsewhere))
    assert codes == [1, 1]
    assert f"slm-jax train: error: no corpus at {tmp_path / 'nowhere'}" in output and "(process 1)" in output
    assert "Traceback" not in output + other


def test_processes_at_odds_end_before_the_first_step(corpus, tmp_path):
    """Other settings in one of them, and settings that one cannot read: one line, which the first process prints."""
    run = tmp_path / "run"
    for setting, code, named in (
        ("--gin.train.seed=1", 1, "differ in seed, here 1, in process 0 0"),
        ("--gin.train.sed=1", 2, "'train.sed'"),
    ):
        codes, output, other = finish(start(tmp_path, *command(corpus, run, 6), second=(setting,)))
        assert codes == [code, code], output + other
        assert (output + other).count("slm-jax train: error: ") == 1 and named in output and "(process 1)" in output
        assert "Traceback" not in output + other and not (run / "checkpoints").exists()


def test_two_commands_do_not_write_one_column(corpus_copy, reference, monkeypatch):
    """The second comes while the first writes."""
    refusals, write = [], ScoreColumn.write

    def write_and_score(column: ScoreColumn, begin: int, values) -> None:
        refusals.append(toy.refusal(score, corpus_copy.path, str(reference), batch_size=8))
        write(column, begin, values)

    monkeypatch.setattr(ScoreColumn, "write", write_and_score)
    score(corpus_copy.path, str(reference), batch_size=8)
    assert refusals and all("another process is scoring" in line for line in refusals)
    assert corpus_copy.score("reference").complete


def test_optimizer_moments_live_where_their_parameters_do():
    state = init_state(toy.MODEL, make_optimizer(OptimizerConfig()), mesh_lib.make_mesh(AXES), seed=0)
    places, structure = jax.tree.map(lambda x: x.sharding, state.params), jax.tree.structure(state.params)
    assert len([place for place in jax.tree.leaves(places) if {"fsdp", "model"} <= set(place.spec)]) >= 7

    def is_moment(tree) -> bool:
        return jax.tree.structure(tree) == structure

    moments = [tree for tree in jax.tree.leaves(state.opt_state, is_leaf=is_moment) if is_moment(tree)]
    assert len(moments) == 2  # Adam's
    for moment in moments:
        assert jax.tree.map(lambda x: x.sharding, moment) == places


ALONE = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS"]
ALONE += ["OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"]


@pytest.fixture
def environment(monkeypatch):
    for name in ALONE:
        monkeypatch.delenv(name, raising=False)

    def setenv(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return setenv


def test_a_process_that_is_alone_starts_nothing(environment, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
    processes.start(preemptible=True)
    environment(SLURM_STEP_NODELIST="node7", SLURM_NTASKS="1")  # JAX would hide all GPUs but one
    processes.start(preemptible=True)
    assert processes.first() and processes.count() == 1
    assert (
        processes.on_first(lambda: "here") == "here" and processes.everywhere(True) and not processes.everywhere(False)
    )


@pytest.mark.parametrize(
    "variables, count",
    [
        ({"SLURM_STEP_NODELIST": "node[1-4]", "SLURM_NTASKS": "32"}, 32),
        ({"OMPI_MCA_orte_hnp_uri": "1;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, 6),
    ],
)
def test_a_job_is_found_by_its_environment(variables, count, environment, monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: True)  # libtpu is here
    environment(**variables)
    assert processes._count_found() == count


def test_a_tpu_vm_asks_its_metadata(environment, monkeypatch):
    answers = {
        "worker-network-endpoints": "u:0:10.0.0.2,u:1:10.0.0.3",
        "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n",
    }
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(processes, "_tpu_metadata", answers.__getitem__)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    assert processes._count_found() == 4


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476"},
        {"JAX_COORDINATOR_ADDRESS": "10.0.0.2", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
        {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
    ],
)
def test_variables_that_name_no_job_are_refused(variables, environment):
    environment(**variables)
    message = toy.refused("processes-incomplete", processes.start, preemptible=True)
    assert all(f"{name}={value}" in message for name, value in variables.items())
    assert "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID" in message


@pytest.mark.slow
def test_two_processes_generate_as_one(reference, tmp_path):
    """The model, the rows and the cache are split over both; a stop that the text tells is heard by both."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in toy.WORDS))
    sampling = Sampling(max_new_tokens=20, temperature=1.0, stop=["a", "e"], seed=1)
    names = {"run": str(reference), "prompts": str(tmp_path / "prompts.jsonl"), "batch_size": 8}
    generate(**names, sampling=sampling, output=str(tmp_path / "one.jsonl"), mesh=AXES)
    output = str(tmp_path / "two.jsonl")
    settings = toy.settings(
        generate={**names, "output": output}, Sampling=dataclasses.asdict(sampling), MeshConfig=dataclasses.asdict(AXES)
    )
    codes, output, other = finish(start(tmp_path, "generate", "--gin.generate.mesh=@MeshConfig()", *settings))
    assert codes == [0, 0], output + other
    assert "generate: see" in output and "generate:" not in other
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    assert '"ended": "stop"' in (tmp_path / "two.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_inspect_as_one(reference, shell, tmp_path):
    records = [{"text": f"{i} hens and 12 ducks", "url": ""} for i in range(20)]
    corpus = toy.write_documents(tmp_path / "corpus", records, 32)
    arguments = ["analyze", "inspect", str(reference), f"--corpus={corpus.path}", "--gin.Selection.score='loss'"]
    codes, output, _ = finish(start(tmp_path, *arguments, f"--output={tmp_path}/two.html"))
    assert codes == [0, 0], output
    assert shell(*arguments, f"--output={tmp_path}/one.html", folder=tmp_path)[0] == 0
    two, one = ((tmp_path / f"{name}.html").read_text() for name in ("two", "one"))
    places = [match.span(1) for match in re.finditer(r'"loss":\{"type":"Float32","data":"([^"]*)"', one)]
    assert len(places) == 2  # checkpoints 3 and 6
    for place in places:
        losses = [np.frombuffer(base64.b64decode(page[slice(*place)]), np.float32) for page in (one, two)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
    head = places[0][0]
    assert one[:head] == two[:head]

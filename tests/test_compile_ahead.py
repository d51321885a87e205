"""Stage `compile`: real steps for TPUs that are not here, what they need, and one line for what cannot be."""

import importlib
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import toy

from slm_jax import config
from slm_jax.__main__ import STAGES
from slm_jax.chips import GIB, chip_of
from slm_jax.compile import topology
from slm_jax.compile.compile_ahead import compile_ahead
from slm_jax.compile.costs import Memory, Work, refused, verdict
from slm_jax.compile.programs import bound_run, score_step, train_steps
from slm_jax.mesh import MeshConfig, make_mesh

RUNS = Path(__file__).parents[1] / "configs" / "runs"
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def work(mesh: MeshConfig | None = None, **changes) -> Work:
    settings = {"rows": 64, "length": 16, "gradient_accumulation_steps": 1, "training": True} | changes
    return Work("train", toy.MODEL, make_mesh(mesh or MeshConfig(data=4, fsdp=2)), **settings)


def memory(weights: float = 1, activations: float = 0, temporaries: float = 1) -> Memory:
    """In GiB; temporaries without the gradients, which are as large as the weights."""
    return Memory(*(x * GIB for x in (weights, 2 * weights, 0, activations, weights + temporaries, 0)))


@pytest.mark.parametrize(
    "needed, changes, said",
    [
        (memory(), {}, "fits with 11.00 GiB to spare"),
        # 3 of 16 GiB stay whatever the batch: 22 / 2 is within 0.9 of the rest
        (memory(0.75, 10, 12), {}, "9.00 GiB over: set train.gradient_accumulation_steps = 2"),
        (
            memory(0.75, 10, 12),
            {"gradient_accumulation_steps": 2},
            "9.00 GiB over: set train.gradient_accumulation_steps = 4",
        ),
        (memory(0.75, 10, 12), {"rows": 24}, "9.00 GiB over: set train.gradient_accumulation_steps = 3"),
        (memory(0.75, 1000), {}, "set train.gradient_accumulation_steps = 8"),  # a row at a time, then one sees
        (memory(0.75, 10, 12), {"rows": 8}, "set MeshConfig.model"),
        (memory(6), {}, "set MeshConfig.fsdp = 8"),
        (memory(6), {"mesh": MeshConfig(fsdp=8)}, "take a topology of 24 chips or more"),
        (Memory(GIB, 0, 0, 0, 20 * GIB, 0), {"training": False}, "5.00 GiB over: set score.batch_size = 32"),
    ],
)
def test_a_verdict_says_the_first_thing_to_change(needed, changes, said):
    assert said in verdict(needed, 16 * GIB, work(**changes))


def test_what_the_compiler_says_when_memory_runs_out():
    early = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (84.00G) exceeds available HBM (15.75G)."
    late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.0M of 15.75G hbm."
    nothing = ({}, {}, {})
    assert [refused(nothing, text).total for text in (early, late)] == [84 * GIB, GIB / 2]
    assert refused(nothing, "INTERNAL: temporaries (1.0G)") is None


def described(files: list[str], bindings: list[str], sequence_length: int | None) -> dict:
    """What would be compiled for 8 chips."""
    for module in STAGES.values():
        importlib.import_module(module)
    config.load(files, bindings)
    run = bound_run(topology.topology_devices("v5e:2x4")[0], sequence_length)
    steps = list(train_steps(run))
    return {
        "train": [(step.work.rows, step.work.length, step.work.gradient_accumulation_steps) for step in steps],
        "score": score_step(run).work.rows,
        "columns": list(steps[0].batch.scores),
        "embedding": steps[0].weights["embed"]["embedding"].shape,
        "mesh": dict(run.mesh.shape),
    }


@needs_libtpu
def test_it_compiles_what_the_settings_of_train_and_score_describe(shell):
    """Defaults and scopes too; two phases that differ in their data alone are one program."""
    files, bindings = [str(RUNS / "meco/1_6b/meco.gin")], ["MeshConfig.fsdp=4"]
    found = shell.call(described, files, bindings, 128)
    assert found["train"] == [(512, 128, 8)] and found["score"] == 64 and found["columns"] == []
    assert found["embedding"] == (128256, 2048) and found["mesh"] == {"data": 2, "fsdp": 4, "model": 1}
    files, bindings = [str(RUNS / "rho1/math_1b/selective.gin")], ["MeshConfig.fsdp=8", "score.batch_size=32"]
    found = shell.call(described, files, bindings, 128)
    assert found["score"] == 32 and found["columns"] == ["scores/reference/loss"]


@needs_libtpu
def test_rows_are_those_of_the_corpus_where_it_is_here(corpus, shell):
    bindings = [f"MixtureComponent.corpus={corpus.path!r}", "Phase.steps=3", "Phase.batch_size=8"]
    found = shell.call(described, [], bindings, None)
    assert found["train"] == [(8, corpus.sequence_length, 1)] and found["embedding"][0] == corpus.vocab_size


@needs_libtpu
@pytest.mark.parametrize(
    "bindings, messages",
    [
        ([], ["compile.sequence_length", "corpus nowhere", "[compile-no-corpus]"]),
        (["compile.sequence_length=64"], ["model.vocab_size", "corpus nowhere", "[compile-no-corpus]"]),
        (["compile.sequence_length=9999", "model.vocab_size=99"], ["model.max_length = 2048", "[model-max-length]"]),
        (["compile.sequence_length=64", "model.vocab_size=99", "Phase.batch_size=3"], ["batch of 3 rows"]),
    ],
)
def test_what_is_not_known_is_one_line(bindings, messages, shell, tmp_path):
    settings = ["MixtureComponent.corpus='nowhere'", "Phase.steps=3", *bindings]
    command = ["compile", "--topology=v5e:2x4", *(f"--gin.{setting}" for setting in settings)]
    code, _, errors = shell(*command, folder=tmp_path)
    assert code == 1 and errors.splitlines()[-1].startswith("slm-jax compile: error: ")
    assert all(message in errors for message in messages)


def test_mistakes_are_found_before_anything_is_compiled(tmp_path, monkeypatch):
    (tmp_path / "file").touch()

    def refused(code: str, output: Path, **settings) -> str:
        return toy.refused(code, compile_ahead, "v5e:4x4", str(output), **settings)

    for output in (tmp_path / "file" / "plan.json", tmp_path):
        assert f"compile.output {output}" in refused("compile-output", output)
    assert "'trian'" in refused("setting-unknown-value", tmp_path / "plan.json", programs=("trian",))
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
    assert "pip install libtpu" in refused("compile-no-compiler", tmp_path / "plan.json")


@pytest.mark.parametrize("here", [True, False])
def test_libtpu_is_told_that_there_is_no_tpu_and_only_then(here, monkeypatch):
    """JAX sets the variable when it finds no chip; a host with chips is asked what it is."""
    for name in topology.NO_HOST:
        monkeypatch.setenv(name, "")  # so that what is set here is gone after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "0" if here else "1")
    topology.silence_missing_chips()
    assert {name: os.environ.get(name) for name in topology.NO_HOST} == (
        dict.fromkeys(topology.NO_HOST) if here else topology.NO_HOST
    )


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v9:2x2", "four"])
def test_an_unknown_topology_is_one_line(name, tmp_path, shell):
    code, _, errors = shell("compile", f"--topology={name}", folder=tmp_path)
    assert code == 1 and f"error: topology {name!r} is unknown" in errors.splitlines()[-1]
    assert errors.splitlines()[-1].endswith("[compile-unknown-topology]")


@needs_libtpu
def test_chips_without_a_data_sheet_are_one_line():
    message = toy.refused("compile-unknown-chip", topology.topology_devices, "v3:2x2")
    assert "'v3:2x2'" in message and "'TPU v3'" in message and "slm_jax/chips.py" in message


@needs_libtpu
def test_chips_of_every_kind():
    for name, kind, count in (
        ("v4:2x2x4", "TPU v4", 16),
        ("v5e:4x4", "TPU v5 lite", 16),
        ("v5p:2x2x4", "TPU v5", 16),
        ("v6e:16x16", "TPU v6 lite", 256),
    ):
        devices, chip = topology.topology_devices(name)
        assert (devices[0].device_kind, len(devices), chip) == (kind, count, chip_of(kind))


@needs_libtpu
@pytest.mark.pods
def test_what_does_not_fit_fits_after_the_change_that_was_advised(tmp_path, shell):
    """Scoring 256 million tokens at once on 4 chips; the plan is written, and the command fails."""

    def compiled(rows: int) -> tuple[int, str, dict]:
        run = {"MixtureComponent": {"corpus": "nowhere"}, "Phase": {"steps": 1}, "score": {"batch_size": rows}}
        what = {
            "compile": {"sequence_length": 2048, "programs": ("score",)},
            "model": {"vocab_size": 260, "num_layers": 1},
        }
        command = ["compile", "--topology=v5e:2x2", "--output=plans/plan.json", *toy.settings(**run, **what)]
        code, output, errors = shell(*command, folder=tmp_path)
        return code, output + errors, json.loads((tmp_path / "plans" / "plan.json").read_text())

    code, said, plan = compiled(2**17)
    advice = re.search(r"error: score does not fit, .* GiB over: set score.batch_size = (\d+) ", said)
    assert code == 1 and not plan["fits"] and advice, said
    code, said, plan = compiled(int(advice[1]))
    assert code == 0 and plan["fits"] and "GiB to spare" in said, said


@needs_libtpu
@pytest.mark.slow
def test_tinyllama_with_a_batch_of_a_million_tokens_fits_16_chips_of_v5e(tmp_path, shell):
    """As its users do it, with the very file that they train with; but each micro-batch chooses for itself, which saves
    a forward pass and a third of the compilation (`make pods` compiles the file as it is)."""
    gin_file = RUNS / "rho1/math_1b/selective.gin"
    changes = toy.settings(compile={"programs": ("train",)}, Selection={"scope": "micro_batch"})
    command = ["compile", f"--gin_file={gin_file}", "--topology=v5e:4x4", *changes]
    code, output, errors = shell(*command, folder=tmp_path)
    assert code == 0, errors
    plan = json.loads((tmp_path / "plan.json").read_text())
    [step] = plan["steps"]
    assert plan["fits"] and "GiB to spare" in step["verdict"] and step["verdict"] in output
    assert plan["chips"] == 16 and step["rows"] * step["length"] == 2**20

    needed, parameters = step["memory"], plan["parameters"]
    assert needed["weights"] == pytest.approx(4 * parameters / 16, rel=0.01)
    assert needed["moments"] == pytest.approx(8 * parameters / 16, rel=0.01)
    assert needed["activations"] == 22 * 512 / 16 / 4 * 2048 * 2048 * 2  # each layer's input, of one micro-batch
    # Gradients too, and more than nothing is left of them at the peak.
    assert needed["temporaries"] > needed["weights"] and needed["total"] < needed["available"]

    # A forward pass and a backward pass that makes it again: 4 / 3 of the model's products where all are in layers; the
    # head's are counted as if there were 3, and half of attention's square is.
    assert 1.15 < step["flops"]["total"] / step["flops"]["model"] < 1.4
    assert 0.5 < step["mfu_at_most"] < 0.8 and step["bound_by"] == "products"

    assert {x["axes"] for x in step["collectives"]} == {"fsdp"}
    gathered = sum(x["bytes"] for x in step["collectives"] if x["kind"] in ("all-gather", "collective-permute"))
    layers = 2 * (parameters - 2 * 32000 * 2048) * 15 / 16  # bfloat16, of each chip the others' part
    # Each micro-batch gathers all layers four times, at most, and sums float32 gradients once.
    assert 3 * 4 * layers < gathered < 7 * 4 * layers

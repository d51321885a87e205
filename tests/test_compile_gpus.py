"""Stage `compile` for GPUs that are not here: their kernels, memory and traffic, and which sums stay in float32."""

import dataclasses
import importlib.util
import json
import os
import re

import jax
import pytest
import toy

from slm_jax import chips
from slm_jax.compile import costs, topology
from slm_jax.compile.costs import Work
from slm_jax.compile.hlo import Program
from slm_jax.compile.programs import Run, train_steps
from slm_jax.mesh import MeshConfig, make_mesh
from slm_jax.models.attention import chosen_backend
from slm_jax.score.selection import Selection
from slm_jax.train.phases import Phase

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="JAX's compiler for GPUs is not installed"
)
MODEL = dataclasses.replace(toy.MODEL, compute_dtype="bfloat16", num_kv_heads=1, remat="full")


def program(selection: Selection) -> Program:
    """A train step for two H100s."""
    mesh = make_mesh(MeshConfig(fsdp=2), topology.topology_devices("h100:2")[0])
    phase = Phase(1, mixture=[toy.MixtureComponent("nowhere")], batch_size=8, selection=selection)
    [step] = train_steps(Run(MODEL, [phase], mesh, 64, {}, {}))
    return Program(step.compile().as_text())


@needs_compiler
@pytest.mark.parametrize("gradient", ["exact", "filtered"])
def test_a_step_for_gpus_has_cudnn_attention_and_sums_gradients_in_float32(gradient):
    """Each layer's attention forward, forward again and backward; no other product is one of [L, L]."""
    found = program(Selection(score="loss", ratio=0.5, gradient=gradient))
    runs = list(found.executions())
    kernels = [re.search(r'custom_call_target="__cudnn\$fmha(\w+)"', run.instruction.attributes) for run in runs]
    calls = [kernel[1] for kernel in kernels if kernel]
    assert sorted(name.endswith("Backward") for name in calls) == [False, False, True], calls
    products = [run.instruction.result[0].shape for run in runs if run.instruction.opcode == "dot"]
    assert products and not any(shape[-2:] == (64, 64) for shape in products)
    sums = {
        (run.instruction.opcode.removesuffix("-start"), array.dtype)
        for run in runs
        if re.match(r"all-reduce(-start)?$|reduce-scatter(-start)?$|scatter$", run.instruction.opcode)
        for array in run.instruction.result
        if not array.dtype.startswith("s")  # of integers: tokens counted, tokens placed
    }
    assert sums >= {("reduce-scatter", "f32"), ("scatter", "f32")} and {dtype for _, dtype in sums} == {"f32"}


@needs_compiler
def test_a_plan_for_gpus(tmp_path, shell):
    """As for TPUs; of an H100's 80 GB JAX takes three quarters."""
    run = {"MixtureComponent": {"corpus": "nowhere"}, "Phase": {"steps": 1, "batch_size": 8}, "MeshConfig": {"fsdp": 2}}
    what = toy.settings(**run, compile={"sequence_length": 128}, model={"compute_dtype": "bfloat16", "max_length": 128})
    command = ["compile", "--topology=h100:2", "--gin.train.mesh=@MeshConfig()", *toy.MODEL_SETTINGS, *what]
    code, output, errors = shell(*command, folder=tmp_path)
    assert code == 0, errors
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["chip"]["kind"] == "NVIDIA H100 80GB HBM3" and plan["chips"] == 2
    train, score = plan["steps"]
    assert train["fits"] and score["fits"] and "compile: everything fits" in output
    assert train["memory"]["available"] == 0.75 * chips.CHIPS["H100"].memory
    model = plan["model"]
    pairs = 128 * 128 / 2 * 4 * model["num_heads"] * model["head_dim"]  # of one GPU's rows
    assert train["flops"]["attention"] == (2 + 2 + 5) * 2 * pairs * model["num_layers"]
    assert score["flops"]["attention"] == 2 * 2 * pairs * model["num_layers"]
    assert {x["axes"] for x in train["collectives"]} == {"fsdp"} and train["mfu_at_most"] > 0


@needs_compiler
@pytest.mark.parametrize("name", ["t4:1", "h100:1"])
def test_products_are_counted_however_a_gpu_computes_them(name):
    """By cuBLAS or in a kernel of XLA's own."""
    mesh = make_mesh(devices=topology.topology_devices(name)[0])
    sharding = jax.NamedSharding(mesh, jax.P())
    left, right = (jax.ShapeDtypeStruct(shape, "float32", sharding=sharding) for shape in ((256, 512), (512, 128)))
    traced = jax.jit(lambda x, y: x @ y).trace(left, right)
    found = Program(traced.lower(lowering_platforms=("cuda",)).compile().as_text())
    assert costs.products(found, Work("x", MODEL, mesh, 8, 64, 1, training=True)).counted == 2 * 256 * 512 * 128


@needs_compiler
def test_the_kernel_is_chosen_for_the_gpu_that_is_compiled_for():
    for name, head_dim, backend in (
        ("a100:1", 128, "cudnn"),
        ("l4:1", 128, "cudnn"),
        ("h100:1", 136, "xla"),
        ("t4:1", 64, "xla"),
    ):
        devices, chip = topology.topology_devices(name)
        assert chips.chip_of(devices[0].device_kind).compute_capability == chip.compute_capability > 0
        with jax.set_mesh(make_mesh(devices=devices)):
            assert chosen_backend("auto", 128, head_dim, "bfloat16") == backend


@needs_compiler
def test_gpus_of_every_kind(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    for name, gpu in topology.GPUS.items():
        devices, chip = topology.topology_devices(f"{name}:3")
        assert [device.device_kind for device in devices] == [gpu.kind] * 3
        known = chips.chip_of(gpu.kind)
        assert known and chip == dataclasses.replace(known, memory=0.9 * known.memory)


@pytest.mark.parametrize("number", ["", "0", "9", "2x8", "two"])
def test_gpus_of_no_machine_are_one_line(number):
    message = toy.refused("compile-unknown-topology", topology.topology_devices, f"h100:{number}")
    assert f"'h100:{number}'" in message and "1 to 8 GPUs" in message


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
    message = toy.refused("compile-no-compiler", topology.topology_devices, "h100:1")
    assert "pip install 'jax[cuda13]'" in message


@pytest.mark.parametrize("driver, said", [("nowhere", "1"), ("/dev/null", None)])
def test_jax_is_told_that_there_is_no_gpu_and_only_then(driver, said, monkeypatch):
    """It would print a traceback of the version that a library does not tell."""
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")  # so that what is set here is gone after the test
    monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    monkeypatch.setattr(topology, "NVIDIA_DEVICES", (driver,))
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "0")
    topology.silence_missing_chips()
    assert os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") == said


@pytest.mark.parametrize(
    "kind, peak",
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA GH200 480GB", 989e12)],
)
def test_chips_by_the_names_that_jax_gives_them(kind, peak):
    assert chips.chip_of(kind).peak_flops == peak
    assert chips.chip_of("cpu") is None and chips.chip_of("NVIDIA L40S") is None

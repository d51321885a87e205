"""Chips that are not attached: the devices of a named topology, to compile for but not to run on."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from slm_jax.chips import Chip, chip_of
from slm_jax.errors import UserError

# Answers to libtpu's questions to the metadata server of a TPU host.
NO_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
GPU_HOST = 8  # maximum number of GPUs of one machine
# Variables that hold the fraction of a GPU's memory that JAX takes: today's name and the old one.
MEMORY_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # made by the driver


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Properties that XLA needs of a GPU: number of multiprocessors, their clock in GHz, MiB of L2 cache."""

    kind: str  # as JAX names it
    multiprocessors: int
    clock: float
    l2_cache: int


GPUS = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 108, 1.41, 40),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 108, 1.41, 40),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 1.98, 50),
    "h200": Gpu("NVIDIA H200", 132, 1.98, 50),
    "t4": Gpu("Tesla T4", 40, 1.59, 4),
    "l4": Gpu("NVIDIA L4", 58, 2.04, 48),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 128, 2.52, 72),
}
# Of a multiprocessor by compute capability: threads, float32 units, KiB of shared memory, KiB that a block may take.
MULTIPROCESSORS = {
    7.5: (1024, 64, 64, 64),
    8.0: (2048, 64, 164, 163),
    8.9: (1536, 128, 100, 99),
    9.0: (2048, 128, 228, 227),
}


def topology_devices(topology: str) -> tuple[list[Any], Chip]:
    """The chips of a topology such as 'v5e:4x4' (TPUs) or 'h100:8' (GPUs of one machine), as devices to compile for.
    Of a GPU's memory only the part that JAX takes for programs counts.

    Raises:
      UserError: `compile-no-compiler`: the compiler for them is not installed; `compile-unknown-topology`;
        `compile-unknown-chip`.
    """
    if topology.split(":")[0] in GPUS:
        return _gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compile-no-compiler", "compile needs the TPU compiler: pip install libtpu (it needs no TPU)")
    # libtpu reads these when it is loaded. It then looks for no host, and takes no lock: no chip will be used.
    for name, value in (NO_HOST | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(name, value)
    # The two cores of a v4 chip act as one device, as on an attached v4.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise _unknown(topology, str(error).splitlines()[0]) from error
    kind = devices[0].device_kind
    chip = chip_of(kind)
    if chip is None:
        raise UserError(
            "compile-unknown-chip",
            f"topology {topology!r} has chips of kind {kind!r}: add their data sheet to slm_jax/chips.py",
        )
    return devices, chip


def _unknown(topology: str, reason: str) -> UserError:
    return UserError(
        "compile-unknown-topology",
        f"topology {topology!r} is unknown ({reason}): take one like v5e:4x4 or v5p:4x4x4, "
        f"or 1 to {GPU_HOST} GPUs of one machine, like h100:8 ({', '.join(GPUS)})",
    )


def _gpus(topology: str) -> tuple[list[Any], Chip]:
    name, _, number = topology.partition(":")
    if not re.fullmatch(rf"[1-{GPU_HOST}]", number):
        raise _unknown(topology, f"{number or 'no number of'} GPUs")
    gpu = GPUS[name]
    chip = chip_of(gpu.kind)
    assert chip, gpu
    # ---- The GPU as XLA's GpuTargetConfigProto, in text format.
    threads, units, shared, block = MULTIPROCESSORS[chip.compute_capability]
    major, minor = str(chip.compute_capability).split(".")
    # Instructions of this generation only.
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major == "9" else ""
    target = f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
      core_count: {gpu.multiprocessors} clock_rate_ghz: {gpu.clock} l2_cache_size: {gpu.l2_cache << 20}
      device_memory_size: {chip.memory:.0f} memory_bandwidth: {chip.memory_bandwidth:.0f}
      threads_per_core_limit: {threads} fpus_per_core: {units}
      shared_memory_per_core: {shared << 10} shared_memory_per_block_optin: {block << 10}
      shared_memory_per_block: {48 << 10} registers_per_core_limit: {1 << 16} registers_per_block_limit: {1 << 16}
      threads_per_warp: 32 threads_per_block_limit: 1024
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      block_dim_limit_x: {2**31 - 1} block_dim_limit_y: {2**16 - 1} block_dim_limit_z: {2**16 - 1}
      name: "{gpu.kind}" device_vendor: "NVIDIA Corporation"
      driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
    }}
    platform_name: "CUDA" device_description_str: "{gpu.kind}" dnn_version_info {{ major: 9 minor: 12 }}
    """
    try:
        described = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{number}", target_config=target)
    except NotImplementedError as error:
        small = [f"jax-cuda13-{part}=={jax.__version__}" for part in ("pjrt", "plugin")] + ["nvidia-cudnn-cu13"]
        raise UserError(
            "compile-no-compiler",
            "compile needs JAX's compiler for GPUs, which needs no GPU: pip install --no-deps "
            f"{' '.join(small)}, or with all of CUDA pip install 'jax[cuda13]'",
        ) from error
    share = next((float(os.environ[name]) for name in MEMORY_FRACTION if os.environ.get(name)), 0.75)
    return described.devices, dataclasses.replace(chip, memory=share * chip.memory)


def silence_missing_chips() -> None:
    """Keeps installed compilers from printing errors on machines without a TPU or GPU.

    If libtpu is installed, JAX looks for a TPU, and libtpu prints several lines about a host that is not described. JAX
    notices at import that no chip is attached: only then is anything set here. Without a driver, CUDA's libraries do
    not tell JAX their versions, and it prints each failure.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        for name, value in NO_HOST.items():
            os.environ.setdefault(name, value)
    if not any(os.path.exists(device) for device in NVIDIA_DEVICES):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

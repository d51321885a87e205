"""TPUs that are not here: what a chip of each kind has, and the devices of a named topology to compile for."""

import dataclasses
import importlib.util
import os
from typing import Any

import jax

from slm_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip: memory in bytes, bandwidths in bytes/s. Its peak FLOP/s stands in metrics.PEAK_FLOPS.

    memory: what libtpu leaves to a program. link_bandwidth: of all its links to other chips, in one direction.
    Bandwidths are those of the vendor's data sheets.
    """

    memory: float
    memory_bandwidth: float
    link_bandwidth: float


CHIPS = {
    "TPU v4": Chip(30.75 * GIB, 1228e9, 300e9),
    "TPU v5 lite": Chip(15.75 * GIB, 819e9, 200e9),
    "TPU v5": Chip(95.74 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Chip(31.25 * GIB, 1640e9, 448e9),
}
# Answers to what libtpu would ask of the metadata server of a TPU host.
NO_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}


def topology_devices(topology: str) -> tuple[list[Any], Chip]:
    """The chips of a topology such as 'v5e:4x4', as devices that one can compile for but not run on.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compile needs the TPU compiler: pip install libtpu (it needs no TPU)")
    # libtpu reads these when it is loaded: it looks for no host, and takes no lock, since no chip will be used.
    for name, value in (NO_HOST | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # The two cores of a v4 chip work as one, as they do where a v4 is attached.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"topology {topology!r} is unknown ({reason}): take one like v5e:4x4 or v5p:4x4x4") from error
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise UserError(f"topology {topology!r} has chips of kind {kind!r}: known are {', '.join(CHIPS)}")
    return devices, CHIPS[kind]


def say_there_is_no_tpu() -> None:
    """Lets a libtpu that is installed for compiling start in silence where there is no TPU.

    JAX looks for one whenever libtpu is there, and libtpu then complains, over several lines, about a host that nobody
    described. JAX itself notes, when it is imported, that no chip is attached: only then is anything set here.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        for name, value in NO_HOST.items():
            os.environ.setdefault(name, value)

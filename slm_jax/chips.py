"""Data sheets of accelerators: speed, memory and bandwidths of one chip, by the name that JAX gives it."""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip: dense bfloat16 FLOP/s, memory in bytes, bandwidths in bytes/s.

    memory: of a TPU, what libtpu leaves to a program; of a GPU, all of it.
    link_bandwidth: of all links to other chips together, in one direction.
    compute_capability: NVIDIA's version number of a GPU's features; 0 for others.
    """

    peak_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    compute_capability: float = 0.0


CHIPS = {  # pattern in JAX's `device_kind` -> chip; the first match counts
    r"TPU v4": Chip(275e12, 30.75 * GIB, 1228e9, 300e9),
    r"TPU v5 ?lite|TPU v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9),
    r"TPU v5": Chip(459e12, 95.74 * GIB, 2765e9, 600e9),
    r"TPU v6": Chip(918e12, 31.25 * GIB, 1640e9, 448e9),
    r"A100.*40GB": Chip(312e12, 39.4 * GIB, 1555e9, 300e9, 8.0),
    r"A100": Chip(312e12, 79.2 * GIB, 2039e9, 300e9, 8.0),
    r"H100": Chip(989e12, 79.1 * GIB, 3352e9, 450e9, 9.0),
    r"H200": Chip(989e12, 140.4 * GIB, 4800e9, 450e9, 9.0),
    r"B200": Chip(2250e12, 178.3 * GIB, 8000e9, 900e9, 10.0),
    r"Tesla T4": Chip(65e12, 14.6 * GIB, 320e9, 16e9, 7.5),  # of float16: it has no bfloat16
    r"NVIDIA L4$": Chip(121e12, 22.1 * GIB, 300e9, 32e9, 8.9),
    r"RTX 4090": Chip(165e12, 23.6 * GIB, 1008e9, 32e9, 8.9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of this kind; None if its data sheet is not in CHIPS."""
    return next((chip for pattern, chip in CHIPS.items() if re.search(pattern, device_kind)), None)

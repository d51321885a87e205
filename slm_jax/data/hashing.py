"""Hashes that decide orders, defined here to the bit so that no library version can change a running experiment."""

import hashlib
import json
from typing import Any

import numpy as np


def salt(*words: Any) -> np.uint64:
    """64 bits of the SHA-256 of JSON values."""
    digest = hashlib.sha256(json.dumps(words).encode("utf-8")).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def mix(values: np.ndarray) -> np.ndarray:
    """One step of splitmix64: a permutation of uint64; every bit of the input reaches every bit of the output."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))

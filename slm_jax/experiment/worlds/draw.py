"""Random draws that are the same on every version of Python: the standard library promises that of `random()` alone."""

import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def pick_two(rng: random.Random, items: Sequence[Item]) -> tuple[Item, Item]:
    """Two of `items`, from different places."""
    first = int(rng.random() * len(items))
    second = int(rng.random() * (len(items) - 1))
    return items[first], items[second + (second >= first)]


def number(rng: random.Random, low: int, high: int) -> int:
    """An integer from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))


def characters(rng: random.Random, alphabet: str, count: int) -> str:
    return "".join(pick(rng, alphabet) for _ in range(count))

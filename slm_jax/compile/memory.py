"""Memory of a chip by kind, whether it suffices, and what to change if it does not."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from slm_jax.chips import GIB
from slm_jax.compile.hlo import Program
from slm_jax.mesh import batch_shards
from slm_jax.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program processes: a batch of `rows` x `length` tokens in `gradient_accumulation_steps` micro-batches."""

    name: str
    model: ModelConfig
    mesh: Mesh
    rows: int
    length: int
    gradient_accumulation_steps: int
    training: bool  # False for scoring

    @property
    def rows_at_once(self) -> int:
        """Rows that one chip holds at a time."""
        return self.rows // batch_shards(self.mesh) // self.gradient_accumulation_steps


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    activations: what the forward pass keeps of each layer for the backward pass.
    temporaries: everything else at the peak: gradients, logits, gathered weights, what one layer needs.
    other: the program, and the padding of arrays.
    """

    weights: float
    moments: float
    batch: float
    activations: float
    temporaries: float
    other: float

    @property
    def total(self) -> float:
        return sum(dataclasses.asdict(self).values())


def tree_bytes(tree: Any) -> float:
    """Bytes of a tree of sharded shapes on one chip."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def measured(held: tuple[Any, Any, Any], compiled: Any, activations: float) -> Memory:
    """Memory of a compiled program that holds weights, moments and batch; the state, updated in place, counts once."""
    weights, moments, batch = (tree_bytes(tree) for tree in held)
    stats = compiled.memory_analysis()
    results = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    padding = max(0.0, stats.argument_size_in_bytes - weights - moments - batch)
    other = padding + results + stats.generated_code_size_in_bytes
    kept = min(activations, stats.temp_size_in_bytes)
    return Memory(weights, moments, batch, kept, stats.temp_size_in_bytes - kept, other)


def refused(held: tuple[Any, Any, Any], message: str) -> Memory | None:
    """Memory of a program that the compiler refused for its memory, from its message; None for another message."""
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    weights, moments, batch = (tree_bytes(tree) for tree in held)
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    said = float(number) * 1024.0 ** (1 + "KMGT".index(unit))
    temporaries = said if found[1] else max(0.0, said - weights - moments - batch)
    return Memory(weights, moments, batch, 0.0, temporaries, 0.0)


def kept_activations(program: Program, work: Work) -> float:
    """Bytes of the largest set of arrays that a loop carries and that have an entry for every layer and token."""
    start = (work.model.num_layers, work.rows_at_once, work.length)
    carried = (
        sum(array.bytes for array in run.instruction.result if array.shape[:3] == start)
        for run in program.executions()
        if run.instruction.opcode == "while"
    )
    return max(carried, default=0.0)


def verdict(memory: Memory, room: float, work: Work) -> str:
    """One sentence: what is left, or what is missing and the first change that should free it."""
    spare = (room - memory.total) / GIB
    if spare >= 0:
        return f"fits with {spare:.2f} GiB to spare"
    return f"does not fit, {-spare:.2f} GiB over: {_remedy(memory, room, work)}"


def _remedy(memory: Memory, room: float, work: Work) -> str:
    """The cheapest change that should suffice, by arithmetic on the measured memory; compiling again will tell."""
    gradients = memory.weights if work.training else 0.0
    state = memory.weights + memory.moments + gradients
    fsdp, chips = work.mesh.shape["fsdp"], work.mesh.size // work.mesh.shape["model"]
    if state > 0.7 * room:
        wider = [n for n in range(fsdp + 1, chips + 1) if chips % n == 0 and state * fsdp / n <= 0.7 * room]
        if wider:
            return f"set MeshConfig.fsdp = {wider[0]} to split weights and moments over more chips"
        return f"take a topology of {work.mesh.size * math.ceil(state * fsdp / chips / (0.7 * room))} chips or more"
    if work.training and work.model.remat != "full":
        return "set model.remat = 'full' to keep less of each layer"
    shrinking = memory.activations + memory.temporaries - gradients
    left = room - (memory.total - shrinking)
    rows = work.rows // batch_shards(work.mesh)
    fitting = [n for n in range(work.gradient_accumulation_steps + 1, rows + 1) if rows % n == 0]
    fitting = [n for n in fitting if shrinking * work.gradient_accumulation_steps / n <= 0.9 * left] or fitting[-1:]
    if not fitting:
        return "a single row is too much for a chip: take shorter rows, or set MeshConfig.model to split each layer"
    return (
        f"set train.gradient_accumulation_steps = {fitting[0]}"
        if work.training
        else f"set score.batch_size = {work.rows // fitting[0]}"
    )

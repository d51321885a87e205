"""What a compiled program needs of a chip: FLOPs, bytes sent by collective and axis, memory by kind.

And whether the memory suffices, or what to change if it does not.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax.chips import GIB
from slm_jax.compile.hlo import Array, Instruction, Program
from slm_jax.mesh import batch_shards
from slm_jax.models.model_config import ModelConfig

# Matrix products of attention kernels. The backward pass recomputes logits: in splash for queries, and again for keys
# and values, in cuDNN once.
KERNEL_PRODUCTS = {
    r"splash_m[hq]a_fwd": 2,
    r"splash_m[hq]a_dq": 3,
    r"splash_m[hq]a_dkv": 4,
    r"dot_product_attention_fwd": 2,
    r"dot_product_attention_bwd": 5,
}
KERNEL_CALLS = ("tpu_custom_call", "__cudnn$fmha")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


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


# ---- Products


@dataclasses.dataclass(frozen=True)
class Products:
    """FLOPs of one chip in matrix products, 2 for each multiplication and addition.

    counted: read from the program, each loop body times its trip count.
    attention: of kernels, whose products the program does not show.
    head: of loops whose length depends on the data.
    """

    counted: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.counted + self.attention + self.head


def products(program: Program, work: Work) -> Products:
    """FLOPs of a program. Its loops of unknown length visit the tokens that have a loss. All tokens are assumed to have
    one: one product with the head forward and, when training, two backward."""
    # One product of an attention kernel: all rows and heads of a chip, and for each query the keys that it sees.
    model, window = work.model, min(work.model.sliding_window or work.length, work.length)
    pairs = window * work.length - window**2 / 2
    of_kernel = 2.0 * pairs * work.rows_at_once * model.num_heads / work.mesh.shape["model"] * model.head_dim

    counted = opaque = 0.0
    dynamic = False
    for run in program.executions():
        now = product_flops(run.instruction, program.operands(run))
        counted += run.times * now * run.counted
        dynamic |= now > 0 and not run.counted
        if any(call in run.instruction.attributes for call in KERNEL_CALLS):
            found = (n for kernel, n in KERNEL_PRODUCTS.items() if re.search(kernel, run.instruction.where))
            opaque += run.times * next(found, 0) * of_kernel
    tokens = work.rows * work.length / work.mesh.size
    head = 2.0 * model.embed_dim * model.padded_vocab_size * tokens * (3 if work.training else 1)
    return Products(counted, opaque, head if dynamic else 0.0)


def product_flops(instruction: Instruction, operands: list[Array]) -> float:
    """FLOPs of a matrix product, 0 for anything else. On TPU every product is a convolution, on GPU some are calls of
    cuBLAS."""
    if instruction.opcode == "dot" or "__cublas$" in instruction.attributes:
        contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', instruction.attributes)
        sizes = [operands[0].shape[int(axis)] for axis in re.findall(r"\d+", contracted[1])] if contracted else []
        return 2.0 * math.prod(instruction.result[0].shape) * math.prod(sizes)
    if instruction.opcode != "convolution":
        return 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, instruction
    left, right = (dict(zip(label, x.shape, strict=True)) for label, x in zip(labels.groups(), operands, strict=False))
    out = dict(zip(labels[3], instruction.result[0].shape, strict=True))
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    named = dict(part.split("=") for part in window[1].split()) if window else {}
    # Pairs of output and kernel position that read an element, not padding or a hole. Batched products are
    # convolutions whose kernel mostly reads padding, which is no work.
    reached = 1
    for axis in (label for label in out if label.isdigit()):
        at = {name: value.split("x")[int(axis)] for name, value in named.items()}
        stride, dilation, holes = (int(at.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        low = int(at.get("pad", "0_0").split("_")[0])
        position = np.arange(out[axis])[:, None] * stride + np.arange(right[axis])[None] * dilation - low
        inside = (position >= 0) & (position <= (left[axis] - 1) * holes) & (position % holes == 0)
        reached *= int(np.sum(inside))
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2.0 * reached * right["i"] * right["o"] * left["b"] / (int(groups[1]) if groups else 1)


# ---- Collectives


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one chip sends in one run of the program, by one kind of collective over some axes of the mesh."""

    kind: str
    axes: str
    bytes: float
    count: int


def traffic(program: Program, mesh: Mesh) -> list[Traffic]:
    """Bytes that each chip sends, by kind of collective and axis, largest first.

    Collectives are assumed to be rings over their n chips: a gather sends each shard n - 1 times, a reduction of b
    bytes sends 2 b (n - 1) / n, a permutation sends its operand once.
    """
    total: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0])
    seen = set()
    for run in program.executions():
        kind = run.instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and run.home.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # TPU writes it as a reduction, of which each chip keeps its slice
        if kind not in COLLECTIVES:
            continue
        # A gather that overlaps with other work is written as pieces, each fused with part of that work: count one.
        channel = re.search(r"channel_id=(\d+)", run.instruction.attributes)
        piece = (run.caller, channel[1] if channel else run.instruction.name)
        if run.home != run.caller and piece in seen:
            continue
        seen.add(piece)

        # The axes of the mesh along which members of a group differ.
        groups = _groups(run.instruction.attributes, mesh.size)  # [groups, chips of a group]
        varied = set()
        for group in groups:
            places = np.array(np.unravel_index(group, mesh.devices.shape))
            varied |= {name for name, along in zip(mesh.axis_names, places, strict=True) if len(set(along)) > 1}
        axes = " and ".join(name for name in mesh.axis_names if name in varied)

        chips = groups.shape[1]
        share = {"collective-permute": 1, "all-gather": chips - 1, "all-reduce": 2 * (chips - 1) / chips}
        sent = sum(x.bytes for x in program.operands(run)) * share.get(kind, (chips - 1) / chips)
        total[kind, axes][0] += run.times * sent
        total[kind, axes][1] += run.times
    found = [Traffic(kind, axes, sent, int(count)) for (kind, axes), (sent, count) in total.items() if sent]
    return sorted(found, key=lambda x: -x.bytes)


def _groups(attributes: str, num_chips: int) -> np.ndarray:
    """[groups, chips of a group] of the chips that exchange data, numbered as the mesh numbers them."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes)
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if pairs or listed:
        found = (pairs or listed)[1]  # pyright: ignore[reportOptionalSubscript]
        return np.array([[int(chip) for chip in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found)])
    strided = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if strided:
        shape, dims, order = ([int(x) for x in part.split(",")] if part else [] for part in strided.groups())
        chips = np.arange(math.prod(dims)).reshape(dims)
        return np.transpose(chips, order or None).reshape(shape)
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    named = re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}", attributes)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        over = re.findall(r"'([^']+)'", named[4])
        dims, axes = ([int(x) for x in part.split(",")] if part else [] for part in (named[2], named[3]))
        chips = np.transpose(np.arange(math.prod(sizes.values())).reshape(dims or [-1]), axes or None)
        chips = chips.reshape(tuple(sizes.values()))
        chips = np.moveaxis(chips, [list(sizes).index(name) for name in over], range(-len(over), 0))
        return chips.reshape(-1, math.prod(sizes[name] for name in over))
    # Empty groups mean all chips; a notation that is not parsed above must not pass as that.
    assert "replica_groups={}" in attributes or "replica_groups=" not in attributes, attributes
    return np.arange(num_chips)[None]


# ---- Memory


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
    """One sentence: what is left, or what is missing and the cheapest change that should free it, by arithmetic on the
    measured memory; compiling again will tell."""
    spare = (room - memory.total) / GIB
    if spare >= 0:
        return f"fits with {spare:.2f} GiB to spare"
    missing = f"does not fit, {-spare:.2f} GiB over: "

    # ---- The state: split it over more chips.
    gradients = memory.weights if work.training else 0.0
    state = memory.weights + memory.moments + gradients
    fsdp, chips = work.mesh.shape["fsdp"], work.mesh.size // work.mesh.shape["model"]
    if state > 0.7 * room:
        wider = [n for n in range(fsdp + 1, chips + 1) if chips % n == 0 and state * fsdp / n <= 0.7 * room]
        if wider:
            return f"{missing}set MeshConfig.fsdp = {wider[0]} to split weights and moments over more chips"
        enough = work.mesh.size * math.ceil(state * fsdp / chips / (0.7 * room))
        return f"{missing}take a topology of {enough} chips or more"

    # ---- What grows with the rows: keep less of it, or take fewer rows at a time.
    if work.training and work.model.remat != "full":
        return f"{missing}set model.remat = 'full' to keep less of each layer"
    shrinking = memory.activations + memory.temporaries - gradients
    left = room - (memory.total - shrinking)
    rows = work.rows // batch_shards(work.mesh)
    fitting = [n for n in range(work.gradient_accumulation_steps + 1, rows + 1) if rows % n == 0]
    fitting = [n for n in fitting if shrinking * work.gradient_accumulation_steps / n <= 0.9 * left] or fitting[-1:]
    if not fitting:
        remedy = "take shorter rows, or set MeshConfig.model to split each layer"
        return f"{missing}a single row is too much for a chip: {remedy}"
    if work.training:
        return f"{missing}set train.gradient_accumulation_steps = {fitting[0]}"
    return f"{missing}set score.batch_size = {work.rows // fitting[0]}"

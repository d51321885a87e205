"""FLOPs of a compiled program, and the bytes that it sends, by collective and axis."""

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

from slm_jax.compile.hlo import Array, Execution, Instruction, Program
from slm_jax.compile.memory import Work

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
class Traffic:
    """Bytes that one chip sends in one run of the program, by one kind of collective over some axes of the mesh."""

    kind: str
    axes: str
    bytes: float
    count: int


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
    counted = opaque = 0.0
    dynamic = False
    for run in program.executions():
        now = product_flops(run.instruction, program.operands(run))
        counted += run.times * now * run.counted
        dynamic |= now > 0 and not run.counted
        if any(call in run.instruction.attributes for call in KERNEL_CALLS):
            opaque += run.times * _kernel_flops(run.instruction.where, work)
    tokens = work.rows * work.length / work.mesh.size
    head = 2.0 * work.model.embed_dim * work.model.padded_vocab_size * tokens * (3 if work.training else 1)
    return Products(counted, opaque, head if dynamic else 0.0)


def _kernel_flops(name: str, work: Work) -> float:
    """FLOPs of one call of an attention kernel: all rows and heads of a chip, and for each query its visible keys."""
    number = next((number for kernel, number in KERNEL_PRODUCTS.items() if re.search(kernel, name)), 0)
    length, window = work.length, min(work.model.sliding_window or work.length, work.length)
    pairs = window * length - window**2 / 2
    heads = work.model.num_heads / work.mesh.shape["model"]
    return 2.0 * number * pairs * work.rows_at_once * heads * work.model.head_dim


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
    reached = 1
    for axis in (label for label in out if label.isdigit()):
        at = {name: value.split("x")[int(axis)] for name, value in named.items()}
        reached *= _reached(left[axis], right[axis], out[axis], at)
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2.0 * reached * right["i"] * right["o"] * left["b"] / (int(groups[1]) if groups else 1)


def _reached(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Number of pairs of output and kernel position, along one axis, that read an element, not padding or a hole.

    Batched products are convolutions whose kernel mostly reads padding, which is no work.
    """
    stride, dilation, holes = (int(window.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    position = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * dilation - low
    return int(np.sum((position >= 0) & (position <= (size - 1) * holes) & (position % holes == 0)))


def traffic(program: Program, mesh: Mesh) -> list[Traffic]:
    """Bytes that each chip sends, by kind of collective and axis, largest first.

    Collectives are assumed to be rings over their n chips: a gather sends each shard n - 1 times, a reduction of b
    bytes sends 2 b (n - 1) / n, a permutation sends its operand once.
    """
    total: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0])
    seen = set()
    for run in program.executions():
        kind = _kind(run)
        if kind is None:
            continue
        # A gather that overlaps with other work is written as pieces, each fused with part of that work: count one.
        channel = re.search(r"channel_id=(\d+)", run.instruction.attributes)
        piece = (run.caller, channel[1] if channel else run.instruction.name)
        if run.home != run.caller and piece in seen:
            continue
        seen.add(piece)
        groups = _groups(run.instruction.attributes, mesh.size)
        sent = _sent(kind, sum(x.bytes for x in program.operands(run)), len(groups[0]))
        entry = total[kind, _axes(groups, mesh)]
        entry[0] += run.times * sent
        entry[1] += run.times
    found = [Traffic(kind, axes, sent, int(count)) for (kind, axes), (sent, count) in total.items() if sent]
    return sorted(found, key=lambda x: -x.bytes)


def _kind(run: Execution) -> str | None:
    kind = run.instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and run.home.startswith("all-reduce-scatter"):
        return "reduce-scatter"  # TPU writes it as a reduction, of which each chip keeps its slice
    return kind if kind in COLLECTIVES else None


def _sent(kind: str, operand_bytes: float, chips: int) -> float:
    if kind == "collective-permute":
        return operand_bytes
    if kind == "all-gather":
        return operand_bytes * (chips - 1)
    return operand_bytes * (chips - 1) / chips * (2 if kind == "all-reduce" else 1)


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


def _axes(groups: np.ndarray, mesh: Mesh) -> str:
    """The axes of the mesh along which members of a group differ."""
    varied = set()
    for group in groups:
        places = np.array(np.unravel_index(group, mesh.devices.shape))
        varied |= {name for name, along in zip(mesh.axis_names, places, strict=True) if len(set(along)) > 1}
    return " and ".join(name for name in mesh.axis_names if name in varied)

"""The device mesh, and one table that says how every parameter is sharded over it.

Axes: `data` replicates the parameters, `fsdp` splits parameters and batch, `model` splits heads, hidden units and
vocabulary. The batch is split over `data` and `fsdp`. The table serves optimizer moments too.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from slm_jax.configurable import AtLeast, configurable
from slm_jax.errors import UserError

P = PartitionSpec
AXES = ("data", "fsdp", "model")
BATCH = P(("data", "fsdp"))

# The first pattern that matches a path decides. Parameters of layers are stacked: their first axis is the layer.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding$", P("model", "fsdp")),  # [V, D]
    (r"head/kernel$", P("fsdp", "model")),  # [D, V]
    (r"attention/(query|key|value)/kernel$", P(None, "fsdp", "model", None)),  # [layer, D, H, K]
    (r"attention/(query|key|value)/bias$", P(None, "model", None)),  # [layer, H, K]
    (r"attention/out/kernel$", P(None, "model", None, "fsdp")),  # [layer, H, K, D]
    (r"mlp/(gate|up)/kernel$", P(None, "fsdp", "model")),  # [layer, D, F]
    (r"mlp/(gate|up)/bias$", P(None, "model")),  # [layer, F]
    (r"mlp/down/kernel$", P(None, "model", "fsdp")),  # [layer, F, D]
    (r"(attention/out|mlp/down)/bias$", P()),
    (r"norm/(scale|bias)$", P()),
)
# Optimizer arrays that do not have the shape of a parameter: Adafactor's factored moments, Muon's coefficients.
REPLICATED = re.compile(r"(^|/)(v|v_row|v_col)/|/ns_coeffs$")


@configurable
@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh. One axis may be -1: it takes all remaining devices.

    Attributes:
      data: devices along which batches are split and parameters replicated.
      fsdp: devices along which batches are split and parameters sharded.
      model: devices along which matrices are sharded (tensor parallelism).
    """

    data: Annotated[int, AtLeast(-1)] = -1
    fsdp: Annotated[int, AtLeast(-1)] = 1
    model: Annotated[int, AtLeast(-1)] = 1


def make_mesh(config: MeshConfig | None = None, devices: Any = None) -> Mesh:
    """The mesh over `devices` (default: all).

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(config or MeshConfig(), len(devices))
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise UserError(
            "mesh-shape", f"mesh {shape} needs {math.prod(sizes)} devices, {len(devices)} are here: change MeshConfig"
        )
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        array = over_slices(sizes, devices)
    else:  # an axis may be shorter than a dimension of the torus, such as 16 of v5p:4x8x8
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(config: MeshConfig, num_devices: int) -> list[int]:
    """The length of each axis."""
    sizes = [config.data, config.fsdp, config.model]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        shape = dict(zip(AXES, sizes, strict=True))
        raise UserError("mesh-shape", f"mesh {shape}: sizes are positive, and one at most is -1: change MeshConfig")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, num_devices // -math.prod(sizes))
    return sizes


def planned_mesh(config: MeshConfig | None = None) -> Mesh | AbstractMesh:
    """The mesh of `make_mesh`, or its shape alone where it takes more devices than are here.

    Raises:
      UserError: as `make_mesh`.
    """
    sizes = _sizes(config or MeshConfig(), jax.device_count())
    if math.prod(sizes) > jax.device_count():
        return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)
    return make_mesh(config)


def over_slices(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of several slices (TPU slices or GPU hosts) as an array of the mesh's shape.

    The network between slices is slow, so they are laid out along the first axis that their number divides: `data`, if
    possible.

    Raises:
      UserError: their number divides no axis.
    """
    slices = len({device.slice_index for device in devices})
    along = next((number for number, size in enumerate(sizes) if size % slices == 0), None)
    if along is None:
        raise UserError(
            "mesh-shape",
            f"{slices} slices or hosts split no axis of the mesh: set MeshConfig.data to a multiple of {slices}",
        )
    between = [slices if number == along else 1 for number in range(len(sizes))]
    within = [size // number for size, number in zip(sizes, between, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of pieces into which the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, what: str, gradient_accumulation_steps: int = 1) -> None:
    """Refuses a batch that the mesh cannot split evenly; `what` names it in the message."""
    pieces = batch_shards(mesh) * gradient_accumulation_steps
    if batch_size < 1 or batch_size % pieces:
        raise UserError(
            "batch-size",
            f"{what}: a batch of {batch_size} rows does not split into {batch_shards(mesh)} shards (data x fsdp) of "
            f"{gradient_accumulation_steps} micro-batches: take a multiple of {pieces}",
        )


def path_name(path: tuple[Any, ...]) -> str:
    """'layers/mlp/up/kernel' from a pytree key path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def partition_spec(path: str, ndim: int) -> PartitionSpec:
    """How the table shards an array. Scalars (step, optimizer counts) and `REPLICATED` are not split.

    Raises:
      KeyError: no pattern matches; a new parameter needs a line in RULES.
    """
    if ndim == 0 or REPLICATED.search(path):
        return P()
    for pattern, spec in RULES:
        if re.search(pattern, path):
            return spec
    raise KeyError(f"no sharding rule matches parameter {path!r}: add a line to slm_jax.mesh.RULES")


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of parameters or a train state.

    Raises:
      UserError: an axis of the mesh does not divide the dimension it should split.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = partition_spec(name, len(leaf.shape))
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    "mesh-shape",
                    f"mesh axis {axis} of {mesh.shape[axis]} does not divide {name} of shape {tuple(leaf.shape)}: "
                    f"choose MeshConfig.{axis} so that it divides {size}",
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def sharded_shapes(tree: Any, mesh: Mesh) -> Any:
    """ShapeDtypeStructs of a tree with the shardings of the table: what to allocate, or to restore into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        tree_shardings(tree, mesh),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The rows of a batch are split over data and fsdp, its other axes are whole."""
    return NamedSharding(mesh, BATCH)


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Pins the sharding of an activation; the identity where no mesh is set (tests, notebooks)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def num_shards() -> int:
    """The number of pieces into which the mesh that is set splits the rows of a batch; 1 if none is set."""
    return axis_size("data") * axis_size("fsdp")


def axis_size(name: str) -> int:
    """Size of an axis of the mesh that is set; 1 if none is set."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def by_shard(x: jax.Array) -> jax.Array:
    """[B, L, ...] to [S, N, ...]: the N = B L / S tokens of each of the `num_shards` shards as one row.

    Sorting, gathering and counting along the second axis then stay within a device.
    """
    shards = num_shards()
    return _split_first(x.reshape(shards, x.shape[0] * x.shape[1] // shards, *x.shape[2:]))


def to_rows(x: jax.Array, length: int) -> jax.Array:
    """[S, N, ...] back to [B, L, ...]: the inverse of `by_shard` for rows of `length`."""
    return _split_first(x.reshape(-1, length, *x.shape[2:]))


def _split_first(x: jax.Array) -> jax.Array:
    """Splits the first axis over data and fsdp, and leaves the others as they are (heads may be split)."""
    return constrain(x, P(*BATCH, *(P.UNCONSTRAINED,) * (x.ndim - 1)))


def sum_over_shards(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum of [S, ...] over its first axis, of which each shard holds one entry.

    The result is sharded by `spec`, which names fsdp: a device receives only the piece that it keeps.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.sum(x, axis=0)
    split = tuple(spec).index("fsdp")

    def reduce(part: jax.Array) -> jax.Array:
        return jax.lax.psum(jax.lax.psum_scatter(part[0], "fsdp", scatter_dimension=split, tiled=True), "data")

    within_shard = [None if axis == "fsdp" else axis for axis in spec]
    return jax.shard_map(reduce, in_specs=P(*BATCH, *within_shard), out_specs=spec)(x)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Indices of the rows of a global batch that lie on this process's devices, ascending."""
    shards = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = {index[0].indices(batch_size)[:2] for index in shards if index is not None}
    return np.concatenate([np.arange(start, stop) for start, stop in sorted(spans)])


def to_devices(mesh: Mesh, batch_size: int, read: Callable[[np.ndarray], Any]) -> Any:
    """A batch as global arrays of `batch_size` rows, split over data and fsdp.

    Args:
      read: indices of rows of the batch -> a tree of numpy arrays that hold these rows, [rows, ...]. Each process reads
        only the rows that lie on its own devices.
    """
    rows, sharding = local_rows(mesh, batch_size), batch_sharding(mesh)
    place = {row: position for position, row in enumerate(rows.tolist())}

    def put(local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return local[place[start] : place[start] + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    return jax.tree.map(put, read(rows))


def map_rows(
    compute: Callable[[Any], Any],
    read: Callable[[np.ndarray], Any],
    num_rows: int,
    batch_size: int,
    mesh: Mesh,
    done: Callable[[int], Any] = lambda rows: None,
) -> Any:
    """Maps a function over rows, `batch_size` at a time, spread over the devices of the mesh.

    Args:
      compute: a batch on devices -> a tree of arrays [batch_size, ...]; called with the mesh set.
      read: indices of rows, 0 to num_rows - 1 -> a tree of numpy arrays [rows, ...], as for `to_devices`.
      num_rows: at least 1. The last batch repeats the last row until it is full, so that one program serves all.
      done: called after each batch with its number of new rows.

    Returns:
      The tree of numpy arrays [num_rows, ...], whole on every process.
    """
    pieces = []
    with jax.set_mesh(mesh):
        for first in range(0, num_rows, batch_size):
            rows = np.minimum(np.arange(first, first + batch_size), num_rows - 1)
            found = to_host(compute(to_devices(mesh, batch_size, lambda mine, rows=rows: read(rows[mine]))))
            pieces.append(jax.tree.map(lambda x, first=first: x[: num_rows - first], found))
            done(min(batch_size, num_rows - first))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


def to_host(tree: Any) -> Any:
    """Global arrays as numpy arrays, whole on every process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)
    return jax.tree.map(np.asarray, tree)

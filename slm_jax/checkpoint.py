"""Checkpoints through Orbax: saved asynchronously, restored onto any mesh, with fallback from damaged ones.

A checkpoint holds items, which are pytrees of arrays, and `about`, a description in JSON with their fingerprints. The
items of a train run are those of `TrainState.items` (train/state.py); `save` in train/loop.py writes its description.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from slm_jax import processes
from slm_jax.errors import UserError
from slm_jax.mesh import path_name
from slm_jax.run_directory import RunDirectory

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every save at length; failures are raised anyway
_mentioned: set[tuple[str, int]] = set()  # checkpoints already reported by this process to lack fingerprints


class Checkpoints:
    """`run_dir/checkpoints/<step>/`: items of the state, `params` among them, and `about`, a JSON description.

    keep: number of latest checkpoints to keep; those of the steps in `milestones` are always kept.
    """

    def __init__(self, run_dir: str | os.PathLike, keep: int = 2, milestones: Sequence[int] = ()):
        policy = ocp.checkpoint_managers.preservation_policy
        self.directory = RunDirectory(run_dir).checkpoints.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(
                    [policy.LatestN(keep), policy.CustomSteps(list(milestones))]
                ),
                enable_async_checkpointing=True,
            ),
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: dict[str, Any], about: dict[str, Any]) -> None:
        """Starts saving and returns; the arrays may then be donated. A saved step is not saved again."""
        about = about | _fingerprints(items)
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**saves, about=ocp.args.JsonSave(about)))

    def restore(self, shapes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(items, about) of the newest readable checkpoint, in the given shapes and shardings, or None.

        Newer ones that cannot be read are renamed to `damaged-<step>`, with a message.

        Raises:
          UserError: `checkpoint-damaged`: no checkpoint can be read; all are left as they are.
        """
        restores = {name: ocp.args.StandardRestore(item) for name, item in shapes.items()}
        arguments = ocp.args.Composite(**restores, about=ocp.args.JsonRestore())
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            restored, why = None, "another process cannot read it"
            try:
                restored = self._manager.restore(step, args=arguments)
            except Exception as error:
                why = _first_line(error)
            # Fingerprints are computed by all processes together, so all must have restored.
            if not processes.everywhere(restored is not None):
                damaged[step] = why
                continue
            assert restored is not None
            if changed := _changed(
                {name: restored[name] for name in shapes}, restored["about"], self.directory.parent, step
            ):
                damaged[step] = changed
                continue
            self._set_aside(damaged, step)
            return {name: restored[name] for name in shapes}, restored["about"]
        if damaged:
            step, why = next(iter(damaged.items()))
            raise UserError(
                "checkpoint-damaged",
                f"no checkpoint in {self.directory} can be read ({step}: {why}): delete the run directory to start "
                "again",
            )
        return None

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        def move() -> None:
            for step, why in damaged.items():
                aside = self.directory / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
                print(
                    f"checkpoint {step} in {self.directory} cannot be read ({why}): it is now {aside.name}, and "
                    f"the one before ({used}) is used"
                )

        if damaged:
            processes.on_first(move)
            self._manager.reload()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # Processes finish a save together. If one was lost, interrupted or found a mistake, waiting for it would
        # never end. Only a non-finite loss is found by all processes at once.
        if processes.count() == 1 or error is None or isinstance(error, FloatingPointError):
            self.close()

    def close(self) -> None:
        """Waits for unfinished saves."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(run_dir: str | os.PathLike, step: int, params: Any, about: dict[str, Any]) -> None:
    """Saves parameters alone, and waits until they are on disk. Host memory holds only the largest array, or a gigabyte
    of arrays, at a time; `Checkpoints` would hold all of them."""
    gigabytes = 1 + max(leaf.nbytes for leaf in jax.tree.leaves(params)) // 10**9
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=gigabytes, save_device_host_concurrent_gb=gigabytes)
    handlers = {"params": handler, "about": ocp.JsonCheckpointHandler()}
    about = about | _fingerprints({"params": params})
    items = ocp.args.Composite(params=ocp.args.PyTreeSave(params), about=ocp.args.JsonSave(about))
    with ocp.CheckpointManager(RunDirectory(run_dir).checkpoints.absolute(), item_handlers=handlers) as manager:
        manager.save(step, args=items)
        manager.wait_until_finished()


def read_about(run_dir: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """The description that was saved with a checkpoint (model, vocabulary hash, run and more), and its `step`.

    Raises:
      UserError: `checkpoint-none`: the directory holds no checkpoint; `checkpoint-not-found`: not that step.
    """
    with _open(run_dir) as manager:
        step = _pick(run_dir, manager, step)
        return _read(run_dir, manager, step, about=ocp.args.JsonRestore()) | {"step": step}


def saved_steps(run_dir: str | os.PathLike) -> list[int]:
    """The steps of the checkpoints of a run directory; UserError `checkpoint-none` if there are none."""
    with _open(run_dir) as manager:
        _pick(run_dir, manager, None)
        return sorted(manager.all_steps())


def restore_items(run_dir: str | os.PathLike, shapes: dict[str, Any], step: int | None = None) -> dict[str, Any]:
    """Items of one checkpoint, the last by default, in the given shapes and shardings.

    Raises:
      UserError: `checkpoint-damaged`: it cannot be read, or its arrays are not those that were saved.
    """
    with _open(run_dir) as manager:
        step = _pick(run_dir, manager, step)
        about = _read(run_dir, manager, step, about=ocp.args.JsonRestore())
        items = {
            name: _read(run_dir, manager, step, **{name: ocp.args.StandardRestore(item)})
            for name, item in shapes.items()
        }
        if changed := _changed(items, about, run_dir, step):
            before = [other for other in sorted(manager.all_steps()) if other < step]
            remedy = f"name the one before, {before[-1]}" if before else "make it again"
            raise UserError("checkpoint-damaged", f"checkpoint {step} of {run_dir} is damaged ({changed}): {remedy}")
        return items


def restore_params(run_dir: str | os.PathLike, shapes: Any, step: int | None = None) -> Any:
    """Parameters only, in the given shapes and shardings."""
    return restore_items(run_dir, {"params": shapes}, step)["params"]


def _read(run_dir: str | os.PathLike, manager: ocp.CheckpointManager, step: int, **item: Any) -> Any:
    """One item of a checkpoint."""
    (name,) = item
    try:
        return manager.restore(step, args=ocp.args.Composite(**item))[name]
    except Exception as error:
        raise UserError(
            "checkpoint-damaged",
            f"checkpoint {step} of {run_dir} cannot be read ({_first_line(error)}): name another step",
        ) from error


def _open(run_dir: str | os.PathLike) -> ocp.CheckpointManager:
    directory = RunDirectory(run_dir).checkpoints.absolute()
    if not directory.is_dir():
        raise UserError(
            "checkpoint-none", f"{run_dir} holds no checkpoints: name the run directory of a finished or stopped train"
        )
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True))


def _pick(run_dir: str | os.PathLike, manager: ocp.CheckpointManager, step: int | None) -> int:
    steps = sorted(manager.all_steps())
    if not steps:
        raise UserError("checkpoint-none", f"{run_dir} holds no finished checkpoint: let its train run reach one")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise UserError(
            "checkpoint-not-found",
            f"{run_dir} has no checkpoint of step {step}: it has {', '.join(map(str, steps))}",
        )
    return step


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _fingerprints(items: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint records of its arrays."""
    found = {name: params_fingerprint(item) for name, item in items.items()}
    return {"params_fingerprint": found["params"], "fingerprints": found}


def _changed(items: dict[str, Any], about: dict[str, Any], where: str | os.PathLike, step: int) -> str:
    """Names the first item whose arrays are not those that were saved; empty if there is none."""
    saved = {"params": about.get("params_fingerprint")} | about.get("fingerprints", {})
    if (place := (str(where), step)) not in _mentioned and any(saved.get(name) is None for name in items):
        _mentioned.add(place)
        print(f"checkpoint {step} in {where} is from an earlier version and lacks fingerprints: not all is checked")
    for name, item in items.items():
        if saved.get(name) and saved[name] != params_fingerprint(item):
            return f"its {name} differ from what was saved"
    return ""


def params_fingerprint(params: Any) -> str:
    """A hash of the parameters' bits that is the same on every mesh, because integer sums modulo 2^32 commute.

    Cheap enough to compute at every start. It distinguishes models; it does not protect against forgery.
    """

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{path_name(path)} {leaf.shape} {jax.device_get(_hash_words(leaf)).tolist()}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _hash_words(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    bits = leaf.astype(jnp.uint32)
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    words = []
    for odd in (0x9E3779B1, 0x85EBCA77):
        word = (bits ^ (index * jnp.uint32(odd))) * jnp.uint32(0xC2B2AE3D)
        word = (word ^ (word >> 15)) * jnp.uint32(odd)
        words.append(word ^ (word >> 13))
    # One reduction of both words: XLA makes it a vectorized loop, on a CPU 26 times as fast as two sums.
    zero = jnp.uint32(0)
    sums = jax.lax.reduce(tuple(words), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(leaf.ndim)))
    return jnp.stack(sums)

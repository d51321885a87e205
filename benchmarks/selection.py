"""Selecting a share of the tokens costs less than sorting their scores: on one device, and on eight.

    python benchmarks/selection.py --output FILE

`select_share` against a selection by `jax.lax.top_k`, which gives the same mask (checked). On eight devices, which are
simulated on one CPU, the scores lie sharded by rows; that the top-k gathers them all on every device is part of its
cost.
"""

from functools import partial

import jax
import jax.numpy as jnp
import measure
import numpy as np
from jax.sharding import Mesh

from slm_jax import mesh as mesh_lib
from slm_jax.score.selection import kept_count, select_share

ROWS = 16
RATIO = 0.6


def top_k_share(scores: jax.Array, valid: jax.Array, ratio: float) -> jax.Array:
    """The baseline: sort all scores, scatter True to the positions of the highest."""
    flat = jnp.where(valid, scores, -jnp.inf).reshape(-1)
    _, order = jax.lax.top_k(flat, flat.size)
    within = jnp.arange(flat.size) < kept_count(jnp.sum(valid, dtype=jnp.int32), ratio)
    return jnp.zeros(flat.shape, bool).at[order].set(within).reshape(scores.shape)


def compare(devices: Mesh, num_scores: int, rounds: measure.Rounds, calls: int) -> list[measure.Row]:
    """Rows of seconds for `calls` selections among `num_scores`."""
    rng, shape = np.random.default_rng(0), (ROWS, num_scores // ROWS)
    arrays = (rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.95)
    sharding = mesh_lib.batch_sharding(devices)
    scores, valid = (jax.device_put(array, sharding) for array in arrays)

    def compiled(function):
        with jax.set_mesh(devices):
            return jax.jit(partial(function, ratio=RATIO), out_shardings=sharding).lower(scores, valid).compile()

    ours, sorting = compiled(select_share), compiled(top_k_share)
    assert bool(jnp.array_equal(ours(scores, valid), sorting(scores, valid))), "the two select different tokens"

    def case(name, function) -> measure.Case:
        def run() -> None:
            for _ in range(calls):  # one after the other, as each step waits for its own
                jax.block_until_ready(function(scores, valid))

        return measure.Case(name, run)

    values = measure.interleaved([case("lax.top_k", sorting), case("select_share", ours)], rounds, warmups=2)
    values = {name: [seconds / calls for seconds in times] for name, times in values.items()}
    return measure.compared(values, "lax.top_k", "s", scores=num_scores, devices=devices.size, ratio=RATIO)


def main() -> None:
    arguments = measure.parser(__doc__, repeats=9).parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    sizes = {4096: 20, 65536: 5, 1048576: 1}
    if arguments.quick:
        sizes, arguments.repeats = {4096: 5, 65536: 2}, 3
    load, rows = measure.load_average(), []
    rounds = measure.Rounds(arguments.repeats, arguments.clock)
    for number in sorted({1, min(8, jax.device_count())}):
        devices = mesh_lib.make_mesh(devices=jax.devices()[:number])
        for num_scores, calls in sizes.items():
            rows += compare(devices, num_scores, rounds, calls)
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()

"""Fingerprints of a checkpoint cost less than one per cent of the start of a run.

    python benchmarks/fingerprints.py --output FILE

A resumed run compares the fingerprint of its parameters and optimizer state, float32, with those that were saved.
Seconds of that, programs compiled before and not, against what else happens until the first step is done: the
checkpoint is restored, fingerprints included, and the step is compiled and called. Importing is left out.
"""

import tempfile

import jax
import measure
import numpy as np

from slm_jax import mesh as mesh_lib
from slm_jax.checkpoint import Checkpoints, params_fingerprint
from slm_jax.data.batches import make_batch
from slm_jax.models.model_config import ModelConfig
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.state import TrainState, init_state, state_shapes
from slm_jax.train.step import compile_step, make_step

# 102 million parameters; the moments are twice as many numbers.
MODEL = ModelConfig(32_000, num_layers=12, embed_dim=640, num_heads=10, num_kv_heads=10, mlp_dim=1792)


def compare(model: ModelConfig, length: int, folder: str, rounds: measure.Rounds) -> list[measure.Row]:
    devices, optimizer = mesh_lib.make_mesh(devices=jax.devices()[:1]), make_optimizer(OptimizerConfig())
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, length))
    batch = make_batch(tokens, np.ones((1, length), np.int32), np.ones((1, length), bool))
    shapes = state_shapes(model, optimizer, devices)

    def to_first_step() -> dict[str, jax.Array]:
        jax.clear_caches()
        with Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore(shapes.items())
        assert restored is not None
        step = make_step(model, None, optimizer, lambda _: 1e-3, 0, 1)
        return compile_step(step, devices, shapes)(TrainState.of(restored[0]), batch)[1]

    def fingerprints(forget: bool) -> None:
        if forget:
            jax.clear_caches()
        for item in state.items().values():
            params_fingerprint(item)

    with jax.set_mesh(devices):
        state = init_state(model, optimizer, devices, seed=0)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, state.items(), {"counters": {}})
        cases = [
            measure.Case("checkpoint to first step", to_first_step),
            measure.Case("fingerprints", lambda: fingerprints(forget=False)),
            measure.Case("fingerprints, programs not compiled", lambda: fingerprints(forget=True)),
        ]
        values = measure.interleaved(cases, rounds)
    return measure.compared(values, "checkpoint to first step", "s", parameters=model.parameter_count())


def main() -> None:
    arguments = measure.parser(__doc__, repeats=3).parse_args()
    load = measure.load_average()
    model = ModelConfig(256) if arguments.quick else MODEL
    rounds = measure.Rounds(1 if arguments.quick else arguments.repeats, arguments.clock)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(model, 64 if arguments.quick else 256, folder, rounds)
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()

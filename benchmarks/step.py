"""Selective steps, exact and filtered, cost no more than causal ones: step time and memory.

    python benchmarks/step.py --output FILE

One optimizer step with the state donated, as in training: gradient, AdamW, clipping. The causal step is measured under
all three settings of `remat`; the fastest of them is the baseline, and exact takes the same setting. Filtered keeps
each layer's input alone, as `remat` full does, so it is also compared with the causal step of `full`. Memory is that
of XLA's temporaries: what a step needs besides state and batch. Random tokens, one segment a row, float32.
On CPU, filtered leaves out attention's other queries where the selected tokens are spread over the rows; --crowded is
where they are not, as on real text of many sources.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import measure
import numpy as np

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import Batch, make_batch
from slm_jax.models.model_config import ModelConfig, model_config
from slm_jax.score.selection import Selection
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.schedules import constant_schedule, over
from slm_jax.train.state import TrainState, init_state, state_shapes
from slm_jax.train.step import compile_step, make_step

REMATS = ("none", "dots", "full")
LEAN = "causal, remat full"
COLUMN = "scores/reference/loss"
Compiled = tuple[Callable[[], jax.Array], float]  # a step to call, and the MiB of its temporaries


class Trainer:
    """Compiled steps of one model that take turns with one state, as it is donated to each of them."""

    def __init__(self, model: ModelConfig, batch: Batch):
        self.model, self.devices = model, mesh_lib.make_mesh(devices=jax.devices()[:1])
        self.optimizer = make_optimizer(OptimizerConfig())
        self.rate = over(constant_schedule(peak=1e-4, warmup=0.0), 1_000_000)
        self.shapes = state_shapes(model, self.optimizer, self.devices)
        self.state: TrainState = init_state(model, self.optimizer, self.devices, seed=0)
        rows = batch.tokens.shape[0]
        self.batch = mesh_lib.to_devices(self.devices, rows, lambda _: batch)

    def step(self, selection: Selection | None, **changes: Any) -> Compiled:
        """The step of the model with these changes; each call returns the sum of the losses."""
        model = dataclasses.replace(self.model, **changes)
        function = make_step(model, selection, self.optimizer, self.rate, 0)
        with jax.set_mesh(self.devices):
            compiled = compile_step(function, self.devices, self.shapes).lower(self.state, self.batch).compile()

        def run() -> jax.Array:
            self.state, sums = compiled(self.state, self.batch)
            jax.block_until_ready(self.state)
            return sums["loss_sum"]

        return run, compiled.memory_analysis().temp_size_in_bytes / 2**20


def random_batch(rows: int, length: int, vocab_size: int, crowded: bool = False) -> Batch:
    """Random tokens, one segment a row, and a score column; `crowded`: the first row trains more than the last."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (rows, length))
    losses = rng.uniform(0.0, 2 * np.log(vocab_size), (rows, length))
    scores = {COLUMN: losses + np.linspace(0, 5, rows)[:, None] if crowded else losses}
    return make_batch(tokens, np.ones((rows, length), np.int32), np.ones((rows, length), bool), scores=scores)


def compare(
    model: ModelConfig, rows: int, length: int, ratios: Sequence[float], rounds: measure.Rounds, crowded: bool
) -> list[measure.Row]:
    """Rows of step time (seconds) and of memory (MiB)."""
    trainer = Trainer(model, random_batch(rows, length, model.vocab_size, crowded))
    steps = {f"causal, remat {remat}": trainer.step(None, remat=remat) for remat in REMATS}
    best = measure.fastest(_times(steps, rounds._replace(repeats=max(2, rounds.repeats // 2))))
    remat = best.split()[-1]
    for gradient in ("exact", "filtered"):
        for ratio in ratios:
            selection = Selection(score="excess", ratio=ratio, gradient=gradient)
            steps[f"{gradient} {ratio}"] = trainer.step(selection, remat=remat)
    about = {"vocab_size": model.vocab_size, "batch": f"{rows} x {length}", "parameters": model.parameter_count()}
    about |= {"selection": "crowded" if crowded else "spread"}
    times = _times(steps, rounds)
    memory = {f"{name}: memory": [mebibytes] for name, (_, mebibytes) in steps.items()}
    result = measure.compared(times, best, "s", **about)
    if best != LEAN:
        lean = [name for name in steps if name.startswith("filtered")]
        result += [measure.row(name, times[name], LEAN, times[LEAN], "s", **about) for name in lean]
    return [*result, *measure.compared(memory, f"{best}: memory", "MiB", **about)]


def _times(steps: dict[str, Compiled], rounds: measure.Rounds) -> measure.Values:
    return measure.interleaved([measure.Case(name, run) for name, (run, _) in steps.items()], rounds)


def main() -> None:
    parser = measure.parser(__doc__, repeats=5)
    parser.add_argument("--size", default="small", help="named model size (default: %(default)s)")
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[8192, 32000, 131072])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4, 0.6, 0.7])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--crowded", action="store_true", help="rows differ in how many of their tokens train")
    arguments = parser.parse_args()
    measure.restarted_with(measure.KEEP_MEMORY)
    if arguments.quick:
        arguments.size, arguments.vocab_sizes, arguments.ratios = "demo", [8192], [0.6]
        arguments.length, arguments.repeats = 128, 3
    load, rows = measure.load_average(), []
    rounds = measure.Rounds(arguments.repeats, arguments.clock)
    for vocab_size in arguments.vocab_sizes:
        model = model_config(arguments.size, vocab_size=vocab_size)
        rows += compare(model, arguments.rows, arguments.length, arguments.ratios, rounds, arguments.crowded)
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()

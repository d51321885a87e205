"""On one GPU, at the shape of TinyLlama-1.1B in bfloat16: at least half of the matrix rate, and filtered is faster.

    python benchmarks/gpu.py --output FILE

Model FLOPs utilisation (MFU) of the causal, exact and filtered step against the rate of a large bfloat16 matrix product
that takes its turn in the same rounds; then tokens per second against the causal step, under each setting of `remat`
that the GPU has memory for. Exact takes the setting `full`. FLOPs are those of the model, recomputation not counted;
filtered counts a whole forward pass and the backward pass of its ratio.
"""

import sys

import jax
import jax.numpy as jnp
import measure
import step

from slm_jax.models.model_config import ModelConfig, model_config
from slm_jax.score.selection import Selection

MATRIX = "matrix product"
RATIOS = (0.4, 0.6, 0.7)


def matrix_product(size: int, calls: int) -> measure.Case:
    """`calls` products of random bfloat16 matrices, each the next one's input; measured in FLOP/s."""
    left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    right /= size**0.5  # keeps the numbers in range

    @jax.jit
    def run(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, calls, lambda _, x: x @ right, left)

    return measure.Case(MATRIX, lambda: run(left, right), 2.0 * size**3 * calls)


def compare(model: ModelConfig, rows: int, length: int, size: int, rounds: measure.Rounds) -> list[measure.Row]:
    """Rows of FLOP/s against the matrix product, then of tokens per second against causal."""
    trainer = step.Trainer(model, step.random_batch(rows, length, model.vocab_size))
    steps = {}
    for remat in step.REMATS:
        run, mebibytes = trainer.step(None, remat=remat)
        if mebibytes < _free_mebibytes():
            steps[f"causal, remat {remat}"] = (run, mebibytes, 1.0)
    if step.LEAN not in steps:
        sys.exit(f"gpu: {rows} rows of {length} tokens do not fit: take fewer --rows")
    for gradient in ("exact", "filtered"):
        for ratio in RATIOS:
            selection = Selection(score="excess", ratio=ratio, gradient=gradient)
            share = (1 + 2 * ratio) / 3 if gradient == "filtered" else 1.0
            steps[f"{gradient} {ratio}"] = (*trainer.step(selection, remat="full"), share)
    tokens, flops = rows * length, model.flops_per_token(length) * rows * length
    cases = [measure.Case(name, run, flops * share) for name, (run, _, share) in steps.items()]
    rates = measure.interleaved([matrix_product(size, 32), *cases], rounds, warmups=2)
    about = {"batch": f"{rows} x {length}", "parameters": model.parameter_count(), "compute": model.compute_dtype}
    about |= {"attention": model.attention}
    speeds = {name: [rate / (flops * share) * tokens for rate in rates[name]] for name, (_, _, share) in steps.items()}
    memory = {f"{name}: memory": [mebibytes] for name, (_, mebibytes, _) in steps.items()}
    result = measure.compared(rates, MATRIX, "FLOP/s", **about)
    for baseline in (name for name in speeds if name.startswith("causal")):
        result += measure.compared(speeds, baseline, "tokens/s", **about)
    return [*result, *measure.compared(memory, f"{step.LEAN}: memory", "MiB", **about)]


def _free_mebibytes() -> float:
    stats = jax.devices()[0].memory_stats() or {}
    return (stats.get("bytes_limit", float("inf")) - stats.get("bytes_in_use", 0)) / 2**20


def main() -> None:
    parser = measure.parser(__doc__, repeats=7)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit(f"gpu: skipped, no GPU here: JAX runs on {jax.default_backend()}")
    model = model_config("tinyllama_1_1b", compute_dtype="bfloat16")
    if arguments.quick:
        model, arguments.repeats = model_config("small", vocab_size=32000, compute_dtype="bfloat16"), 3
    load = measure.load_average()
    rounds = measure.Rounds(arguments.repeats, arguments.clock)
    rows = compare(model, arguments.rows, arguments.length, 8192, rounds)
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()

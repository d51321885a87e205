"""Scoring a batch is as fast as a plain forward pass.

    python benchmarks/scoring.py --output FILE

`score_batch`, which the stage `score` runs, in tokens per second against the same model's forward pass: hidden states
and all logits at once, which is what a model returns. Two more for comparison: that pass with a log-softmax over the
logits and the target picked from it, which scores too, and one that ends at the hidden states.
"""

from functools import partial

import jax
import jax.numpy as jnp
import measure
import numpy as np

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import Batch, make_batch
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig, model_config
from slm_jax.score.score_corpus import score_batch


def hidden_pass(params: Params, batch: Batch, model: ModelConfig) -> jax.Array:
    return forward.hidden_states(params, model, batch.tokens, batch.positions, batch.segment_ids)


def forward_pass(params: Params, batch: Batch, model: ModelConfig) -> jax.Array:
    return forward.logits(params, model, hidden_pass(params, batch, model))


def naive_scores(params: Params, batch: Batch, model: ModelConfig) -> jax.Array:
    logits = jax.nn.log_softmax(forward_pass(params, batch, model)[:, :-1])
    picked = jnp.take_along_axis(logits, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(-picked, ((0, 0), (1, 0)))


def scores(params: Params, batch: Batch, model: ModelConfig, statistics: tuple[str, ...]) -> dict[str, jax.Array]:
    return score_batch(params, model, batch, statistics)


def compare(model: ModelConfig, rows: int, length: int, rounds: measure.Rounds) -> list[measure.Row]:
    """Rows of tokens per second and of MiB of temporaries; the plain pass' logits count as its memory."""
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (rows, length))
    devices = mesh_lib.make_mesh(devices=jax.devices()[:1])
    local = make_batch(tokens, np.ones((rows, length), np.int32), np.ones((rows, length), bool))
    batch = mesh_lib.to_devices(devices, rows, lambda _: local)
    params = jax.jit(partial(forward.init_params, model))(jax.random.key(0))
    functions = {
        "forward pass": forward_pass,
        "score_batch": partial(scores, statistics=("loss",)),
        "score_batch with entropy": partial(scores, statistics=("loss", "entropy")),
        "forward pass, log-softmax": naive_scores,
        "forward pass, no head": hidden_pass,
    }
    with jax.set_mesh(devices):
        compiled = {
            name: jax.jit(partial(f, model=model)).lower(params, batch).compile() for name, f in functions.items()
        }
    ours, naive = (compiled[name](params, batch) for name in ("score_batch", "forward pass, log-softmax"))
    assert float(jnp.max(jnp.abs(ours["loss"] - naive))) < 1e-3, "the two ways to score differ"
    del ours, naive
    cases = [measure.Case(name, partial(f, params, batch), rows * length) for name, f in compiled.items()]
    about = {"vocab_size": model.vocab_size, "batch": f"{rows} x {length}", "parameters": model.parameter_count()}
    values = measure.interleaved(cases, rounds)
    analyses = {f"{name}: memory": f.memory_analysis() for name, f in compiled.items()}
    memory = {name: [(a.temp_size_in_bytes + a.output_size_in_bytes) / 2**20] for name, a in analyses.items()}
    return [
        *measure.compared(values, "forward pass", "tokens/s", **about),
        *measure.compared(memory, "forward pass: memory", "MiB", **about),
    ]


def main() -> None:
    parser = measure.parser(__doc__, repeats=9)
    parser.add_argument("--size", default="small", help="named model size (default: %(default)s)")
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[8192, 32000])
    arguments = parser.parse_args()
    measure.restarted_with(measure.KEEP_MEMORY)
    shape = (8, 512)
    if arguments.quick:
        arguments.size, arguments.vocab_sizes, arguments.repeats, shape = "demo", [2048], 3, (8, 128)
    load, rows = measure.load_average(), []
    rounds = measure.Rounds(arguments.repeats, arguments.clock)
    for vocab_size in arguments.vocab_sizes:
        rows += compare(model_config(arguments.size, vocab_size=vocab_size), *shape, rounds)
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()

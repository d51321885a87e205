"""Where the time of a step goes: forward pass, head, backward pass and optimizer, as shares of the causal step.

    python benchmarks/parts.py --output FILE

The parts are timed as programs of their own and overlap: `losses` holds the forward pass, each gradient holds losses of
its own, a step is its gradient and the optimizer. Shapes as in step.py, `remat` full. It proves no claim; where a claim
of step.py does not hold, it shows why.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import measure
import scoring
import step

from slm_jax.data.batches import Batch
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig, model_config
from slm_jax.score.selection import Selection, filtered_capacity
from slm_jax.score.token_loss import batch_loss
from slm_jax.train.state import TrainState
from slm_jax.train.step import micro_batch_gradient

RATIO = 0.6


def gradient(params: Params, batch: Batch, model: ModelConfig, kind: str) -> Params:
    """The gradient that a step of this kind takes, without optimizer and metrics."""
    selection = None if kind == "causal" else Selection(score="excess", ratio=RATIO, gradient=kind)
    capacity = filtered_capacity(selection, batch.tokens.shape) if selection else 0
    return micro_batch_gradient(params, model, selection, capacity, batch, None, jax.random.key(0))[0]


def compare(model: ModelConfig, rows: int, length: int, rounds: measure.Rounds) -> list[measure.Row]:
    """Rows of seconds."""
    trainer = step.Trainer(model, step.random_batch(rows, length, model.vocab_size))
    params, batch, optimizer = trainer.state.params, trainer.batch, trainer.optimizer
    functions = {
        "forward pass": partial(scoring.hidden_pass, model=model),
        "losses": lambda params, batch: batch_loss(params, model, batch),
        **{f"{kind} gradient": partial(gradient, model=model, kind=kind) for kind in ("causal", "exact", "filtered")},
    }
    # Parameters of their own: those of the trainer are donated to its steps.
    params = jax.tree.map(jnp.copy, params)
    with jax.set_mesh(trainer.devices):
        compiled = {name: jax.jit(function).lower(params, batch).compile() for name, function in functions.items()}
    cases = [measure.Case(name, partial(function, params, batch)) for name, function in compiled.items()]

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, grads: Params) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(state.step + 1, jax.tree.map(lambda p, u: p - 1e-4 * u, state.params, updates), opt_state)

    grads = jax.tree.map(lambda x: 1e-3 * x, params)

    def optimize() -> Params:
        trainer.state = update(trainer.state, grads)
        return trainer.state.params

    cases.append(measure.Case("optimizer", optimize))
    cases.append(measure.Case("causal step", trainer.step(None)[0]))
    about = {"vocab_size": model.vocab_size, "batch": f"{rows} x {length}", "ratio": RATIO}
    return measure.compared(measure.interleaved(cases, rounds), "causal step", "s", **about)


def main() -> None:
    parser = measure.parser(__doc__, repeats=5)
    parser.add_argument("--size", default="small", help="named model size (default: %(default)s)")
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[8192, 32000])
    arguments = parser.parse_args()
    measure.restarted_with(measure.KEEP_MEMORY)
    shape = (4, 512)
    if arguments.quick:
        arguments.size, arguments.vocab_sizes, arguments.repeats, shape = "demo", [2048], 3, (4, 128)
    load, rows = measure.load_average(), []
    rounds = measure.Rounds(arguments.repeats, arguments.clock)
    for vocab_size in arguments.vocab_sizes:
        model = dataclasses.replace(model_config(arguments.size, vocab_size=vocab_size), remat="full")
        rows += compare(model, *shape, rounds)
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()

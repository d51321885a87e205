"""The two programs of generation: one reads the prompts of a batch, the other makes their next tokens."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer

from slm_jax import mesh
from slm_jax.evaluate.sampling import Sampling, choose, row_keys
from slm_jax.models import forward
from slm_jax.models.cache import Cache, place
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig

STEPS = 16  # tokens that one call of `advance` makes for each row, at most
NOTHING = -1  # stands in for the tokens of a row that has ended


class Rows(NamedTuple):
    """Rows under way. `tokens` were chosen last and are not in the cache yet; `positions` are theirs."""

    cache: Cache
    tokens: Int[Array, "B"]
    positions: Int[Array, "B"]
    done: Bool[Array, "B"]
    places: Integer[Array, "B"]  # in the list of all prompts
    number: Int[Array, ""]  # how many tokens each row has made


class Drawing(NamedTuple):
    """The numbers of a Sampling; None where `choose` takes None."""

    seed: ArrayLike
    temperature: ArrayLike | None
    top_p: ArrayLike | None

    @classmethod
    def of(cls, sampling: Sampling) -> "Drawing":
        temperature = None if sampling.temperature == 0 else np.float32(sampling.temperature)
        return cls(
            np.uint32(sampling.seed), temperature, None if sampling.top_p is None else np.float32(sampling.top_p)
        )


class Choice(NamedTuple):
    """What a program is compiled for: the model, ids that may be chosen (from 0), the one that ends, and top_k."""

    model: ModelConfig
    num_ids: int
    eos_id: int
    top_k: int | None


@functools.partial(jax.jit, static_argnames=("choice", "slots"))
def begin(
    params: Params,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    places: Integer[Array, "B"],
    drawing: Drawing,
    *,
    choice: Choice,
    slots: int,
) -> tuple[Rows, Int[Array, "B 1"]]:
    """Reads prompts, padded on the right, and chooses the first new token of each."""
    hidden, cache = forward.prefill(params, choice.model, tokens, lengths, slots)
    number = jnp.zeros((), jnp.int32)
    chosen = _next(params, hidden, places, number, drawing, choice)
    return _placed(Rows(cache, chosen, lengths, chosen == choice.eos_id, places, number + 1)), chosen[:, None]


@functools.partial(jax.jit, static_argnames="choice", donate_argnames="rows")
def advance(
    params: Params, rows: Rows, stopped: Bool[Array, "B"], steps: Int[Array, ""], drawing: Drawing, *, choice: Choice
) -> tuple[Rows, Int[Array, "B T"]]:
    """Makes the next tokens of each row, NOTHING in rows that have ended: `steps` of them, or until all have.

    stopped: rows that need no more tokens. steps: at most STEPS, of which the array has place.
    """
    rows = rows._replace(done=rows.done | stopped)
    made = jnp.full((len(rows.tokens), STEPS), NOTHING)

    def goes_on(state: tuple[Rows, jax.Array, jax.Array]) -> jax.Array:
        rows, _, step = state
        return (step < steps) & ~jnp.all(rows.done)

    def make(state: tuple[Rows, jax.Array, jax.Array]) -> tuple[Rows, jax.Array, jax.Array]:
        rows, made, step = state
        hidden, cache = forward.decode(params, choice.model, rows.tokens, rows.positions, rows.cache)
        chosen = _next(params, hidden, rows.places, rows.number, drawing, choice)
        made = made.at[:, step].set(jnp.where(rows.done, NOTHING, chosen))
        # A row that has ended stands still: its position stays within its slots.
        tokens = jnp.where(rows.done, rows.tokens, chosen)
        positions = jnp.where(rows.done, rows.positions, rows.positions + 1)
        done = rows.done | (chosen == choice.eos_id)
        return _placed(Rows(cache, tokens, positions, done, rows.places, rows.number + 1)), made, step + 1

    rows, made, _ = jax.lax.while_loop(goes_on, make, (rows, made, jnp.zeros((), jnp.int32)))
    return _placed(rows), made


def _next(
    params: Params,
    hidden: Float[Array, "B D"],
    places: Integer[Array, "B"],
    number: Int[Array, ""],
    drawing: Drawing,
    choice: Choice,
) -> Int[Array, "B"]:
    """The token behind these hidden states."""
    logits = forward.logits(params, choice.model, hidden[:, None])[:, 0, : choice.num_ids]
    seed, temperature, top_p = jax.tree.map(jnp.asarray, drawing)
    return choose(logits, row_keys(seed, places, number), temperature, choice.top_k, top_p)


def _placed(rows: Rows) -> Rows:
    """Pinned, so that what comes out of one call goes into the next."""
    whole = {
        name: mesh.constrain(getattr(rows, name), mesh.BATCH) for name in ("tokens", "positions", "done", "places")
    }
    return rows._replace(**whole, cache=place(rows.cache), number=mesh.constrain(rows.number, mesh.P()))

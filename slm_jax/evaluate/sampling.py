"""How the next token is chosen."""

import dataclasses
import math
from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from slm_jax import config as config_lib
from slm_jax.errors import UserError


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How prompts are continued.

    Attributes:
      max_new_tokens: maximum number of tokens to generate, unless EOS or a stop text comes first.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample from the k most likely tokens only.
      top_p: sample from the smallest set of most likely tokens whose probabilities, after temperature and top_k, sum
        to at least p (nucleus sampling, arXiv 1904.09751).
      stop: texts that end a continuation; they are removed from it.
      seed: together with a prompt's position in the list, decides every random draw.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        config_lib.at_least(1, **{"Sampling.max_new_tokens": self.max_new_tokens})
        config_lib.at_least(0, **{"Sampling.seed": self.seed})
        if self.seed >= 2**32:
            raise UserError(f"Sampling.seed {self.seed} is too large: take one below {2**32}")
        if not (isinstance(self.temperature, (int, float)) and 0 <= self.temperature < math.inf):
            raise UserError(
                f"Sampling.temperature {self.temperature!r}: take 0 (the most likely token) or a number above"
            )
        if self.top_k is not None:
            config_lib.at_least(1, **{"Sampling.top_k": self.top_k})
        if self.top_p is not None and not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise UserError(f"Sampling.top_p {self.top_p!r} is outside (0, 1]")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise UserError(
                    f"Sampling.{name} {getattr(self, name)} means nothing at temperature 0, which takes the most "
                    "likely token: set Sampling.temperature above 0"
                )
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"Sampling.stop takes a list of texts, none of them empty; it was given {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))  # gin gives a list


def row_keys(seed: Integer[Array, ""], places: Integer[Array, "B"], number: Int[Array, ""]) -> jax.Array:
    """The key of each row's new token of this number: of seed and place alone, whatever rows are beside it."""
    key = jax.random.key(seed)
    return jax.vmap(lambda place: jax.random.fold_in(jax.random.fold_in(key, place), number))(places)


def choose(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    temperature: Float[Array, ""] | None,
    top_k: int | None,
    top_p: Float[Array, ""] | None,
) -> Int[Array, "B"]:
    """One token of each row; see Sampling. Of equally likely tokens the one with the lowest id comes first.

    Args:
      logits: float32.
      keys: of each row.
      temperature: None takes the most likely token.
      top_k: None for all.
      top_p: None for all.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    draw = jax.vmap(jax.random.categorical)
    if top_k is None and top_p is None:
        return draw(keys, logits)
    likely, tokens = jax.lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
    if top_p is not None:
        probability = jax.nn.softmax(likely, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        likely = jnp.where((before < top_p).at[:, 0].set(True), likely, -jnp.inf)
    return jnp.take_along_axis(tokens, draw(keys, likely)[:, None], axis=-1)[:, 0]

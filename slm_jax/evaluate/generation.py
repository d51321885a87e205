"""Text generation: sampling settings, the two compiled programs, the text of a row while it grows, and the Generator.

A batch of prompts, padded on the right, is read once (`read_prompts`) and then decoded with a cache of keys and values,
up to STEPS tokens per call (`decode_steps`). The host looks for stop strings between calls.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer

from slm_jax import mesh as mesh_lib
from slm_jax.configurable import Count, NotNegative, PositiveShare, Seed, configurable
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.errors import UserError
from slm_jax.evaluate.prefix import KERNEL_ROWS
from slm_jax.models import forward
from slm_jax.models.cache import Cache, place
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig

STEPS = 16  # tokens that one call of `decode_steps` makes per row, at most
NO_TOKEN = -1  # fills the tokens of a row that has ended
SHORTEST = 32  # tokens of the shortest rows that prompts are padded to; longer ones go to the next power of two
REPLACEMENT = "\ufffd"  # a decoder writes it for a byte that is not, or not yet, a character
CONTEXT = 16  # last tokens of the prompt that are decoded together with the new ones


@configurable
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

    max_new_tokens: Count = 256
    temperature: NotNegative = 0.0
    top_k: Count | None = None
    top_p: PositiveShare | None = None
    stop: Sequence[str] = ()
    seed: Seed = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise UserError(
                    "sampling-greedy",
                    f"Sampling.{name} = {getattr(self, name)} has no effect at temperature 0, which takes the most "
                    "likely token: set Sampling.temperature above 0",
                )
        if not all(self.stop):
            raise UserError("sampling-invalid-stop", f"Sampling.stop is {self.stop!r}: set a list of non-empty strings")


def sample_tokens(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    temperature: Float[Array, ""] | None,
    top_k: int | None,
    top_p: Float[Array, ""] | None,
) -> Int[Array, "B"]:
    """One token per row, drawn with its own key; see Sampling. Without a temperature the most likely one. Of equally
    likely tokens the one with the lowest id comes first."""
    if temperature is None:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    draw = jax.vmap(jax.random.categorical)
    if top_k is None and top_p is None:
        return draw(keys, logits)
    likely, tokens = jax.lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))  # [B, V] -> [B, K]
    if top_p is not None:
        probability = jax.nn.softmax(likely, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        likely = jnp.where((before < top_p).at[:, 0].set(True), likely, -jnp.inf)
    return jnp.take_along_axis(tokens, draw(keys, likely)[:, None], axis=-1)[:, 0]


def row_keys(seed: Integer[Array, ""], places: Integer[Array, "B"], number: Int[Array, ""]) -> jax.Array:
    """The random key of new token `number` of each row: of the seed and the row's place in the list of prompts alone,
    so that a draw does not depend on the other rows of its batch."""
    key = jax.random.key(seed)
    return jax.vmap(lambda place: jax.random.fold_in(jax.random.fold_in(key, place), number))(places)


class StaticSettings(NamedTuple):
    """What a program is compiled for: the model, the number of ids that may be sampled, the EOS id, and top_k."""

    model: ModelConfig
    num_ids: int
    eos_id: int
    top_k: int | None


class TracedSettings(NamedTuple):
    """The numbers of a Sampling that a compiled program takes as arguments; None as in `sample_tokens`."""

    seed: ArrayLike
    temperature: ArrayLike | None
    top_p: ArrayLike | None


class DecodeState(NamedTuple):
    """A batch in generation. `tokens` were sampled last and are not yet in the cache; `positions` are theirs."""

    cache: Cache
    tokens: Int[Array, "B"]
    positions: Int[Array, "B"]
    done: Bool[Array, "B"]
    places: Integer[Array, "B"]  # in the list of all prompts
    number: Int[Array, ""]  # tokens that each row has made


Carry = tuple[DecodeState, jax.Array, jax.Array]  # of the decoding loop: the state, tokens made [B, T], steps taken


@functools.partial(jax.jit, static_argnames=("static", "slots"))
def read_prompts(
    params: Params,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    places: Integer[Array, "B"],
    traced: TracedSettings,
    *,
    static: StaticSettings,
    slots: int,
) -> tuple[DecodeState, Int[Array, "B 1"]]:
    """Reads prompts, padded on the right, into a cache of `slots` tokens per row; samples each row's first token."""
    hidden, cache = forward.prefill(params, static.model, tokens, lengths, slots)
    done = jnp.zeros(lengths.shape, bool)
    state = DecodeState(cache, tokens[:, 0], lengths - 1, done, places, jnp.zeros((), jnp.int32))
    state, chosen = _with_next_tokens(params, hidden, state, traced, static)
    return state, chosen[:, None]


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def decode_steps(
    params: Params,
    state: DecodeState,
    stopped: Bool[Array, "B"],
    steps: Int[Array, ""],
    traced: TracedSettings,
    *,
    static: StaticSettings,
) -> tuple[DecodeState, Int[Array, "B T"]]:
    """Makes the next `steps` tokens of each row, at most STEPS, or fewer if all rows end before; NO_TOKEN in rows that
    have ended.

    stopped: rows that need no more tokens, because the host has found a stop string.
    """
    state = state._replace(done=state.done | stopped)
    made = jnp.full((len(state.tokens), STEPS), NO_TOKEN)

    def unfinished(carry: Carry) -> jax.Array:
        return (carry[2] < steps) & ~jnp.all(carry[0].done)

    def one_step(carry: Carry) -> Carry:
        state, made, step = carry
        hidden, cache = forward.decode(params, static.model, state.tokens, state.positions, state.cache)
        state, chosen = _with_next_tokens(params, hidden, state._replace(cache=cache), traced, static)
        return state, made.at[:, step].set(chosen), step + 1

    state, made, _ = jax.lax.while_loop(unfinished, one_step, (state, made, jnp.zeros((), jnp.int32)))
    return _pinned(state), made


def _with_next_tokens(
    params: Params, hidden: Float[Array, "B D"], state: DecodeState, traced: TracedSettings, static: StaticSettings
) -> tuple[DecodeState, Int[Array, "B"]]:
    """Samples each row's next token from the hidden state of its last one; NO_TOKEN in rows that have ended."""
    logits = forward.logits(params, static.model, hidden[:, None])[:, 0, : static.num_ids]  # [B, D] -> [B, V]
    seed, temperature, top_p = jax.tree.map(jnp.asarray, traced)
    chosen = sample_tokens(logits, row_keys(seed, state.places, state.number), temperature, static.top_k, top_p)
    # A row that has ended keeps its token and position, so that it stays within its slots of the cache.
    tokens = jnp.where(state.done, state.tokens, chosen)
    positions = jnp.where(state.done, state.positions, state.positions + 1)
    done = state.done | (chosen == static.eos_id)
    after = DecodeState(state.cache, tokens, positions, done, state.places, state.number + 1)
    return _pinned(after), jnp.where(state.done, NO_TOKEN, chosen)


def _pinned(state: DecodeState) -> DecodeState:
    """With explicit shardings, so that the output of one call is an input of the next without a transfer."""
    rows = {name: mesh_lib.constrain(getattr(state, name), mesh_lib.BATCH) for name in state._fields[1:5]}
    return state._replace(**rows, cache=place(state.cache), number=mesh_lib.constrain(state.number, mesh_lib.P()))


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What a prompt was continued with.

    Attributes:
      text: up to EOS or the stop string, without either and without the bytes of an unfinished last character.
      tokens: all that were made, including EOS or the token that completed the stop string.
      ended: 'eos', 'stop', or 'length'.
    """

    text: str
    tokens: list[int]
    ended: str


class GrowingText:
    """One row: takes its tokens as they come, decodes them and finds the end.

    Stop strings are looked for in the text, so they may begin and end within tokens. Where one is found does not depend
    on how many tokens come at a time.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], stop: Sequence[str]):
        self._vocabulary, self._stop = vocabulary, stop
        # Decoded with the new tokens: decoders drop a space before the first word, and a character that the prompt
        # ends within belongs to the text that completes it.
        self._context = list(prompt[-CONTEXT:])
        self._before = vocabulary.decode(self._context)
        self.tokens: list[int] = []
        self._text = ""
        self.ended: str | None = None

    def add(self, tokens: Sequence[int]) -> None:
        """Appends the next tokens; those after the end are dropped."""
        if self.ended:
            return
        first, eos = len(self.tokens), self._vocabulary.eos_id
        tokens = list(tokens)
        if eos in tokens:
            tokens = tokens[: tokens.index(eos) + 1]
            self.ended = "eos"
        self.tokens += tokens
        self._text = self._decode(len(self.tokens))
        if self._first_stop(self._text) is not None:
            # The text ends with the token that completes a stop string: try the new tokens one by one.
            texts = ((count, self._decode(count)) for count in range(first + 1, len(self.tokens) + 1))
            count, text = next((count, text) for count, text in texts if self._first_stop(text) is not None)
            self.tokens, self._text, self.ended = self.tokens[:count], text[: self._first_stop(text)], "stop"

    def stable_prefix(self) -> str:
        """The text that no later token changes: without half a character or what may begin a stop string."""
        text = _without_half(self._text)
        if not self.ended:
            longest = max(map(len, self._stop), default=1) - 1
            for begin in range(max(0, len(text) - longest), len(text)):
                if any(stop.startswith(text[begin:]) for stop in self._stop):
                    return text[:begin]
        return text

    def finish(self) -> Continuation:
        """The continuation; ended by its length where nothing else ended it."""
        return Continuation(_without_half(self._text), self.tokens, self.ended or "length")

    def _decode(self, count: int) -> str:
        made = [token for token in self.tokens[:count] if token != self._vocabulary.eos_id]
        text = self._vocabulary.decode(self._context + made)
        before = self._before if text.startswith(self._before) else _without_half(self._before)
        return text[len(before) :]

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop string begins; None without one."""
        return min((begin for stop in self._stop if (begin := text.find(stop)) >= 0), default=None)


def _without_half(text: str) -> str:
    """Without the bytes, three at most, of an unfinished last character."""
    return text[:-3] + text[-3:].rstrip(REPLACEMENT)


@dataclasses.dataclass
class GenerationStats:
    """Tokens read and made, and the seconds that compiling, reading and decoding took."""

    compile_seconds: float = 0.0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0


class Generator:
    """A model that continues prompts.

    Prompts of several lengths share a batch, padded on the right. Sizes of batches, prompts and caches are rounded up,
    so that few programs are compiled.

    Args:
        params: the model's, sharded as by `mesh.tree_shardings`.
        model: its config.
        vocabulary: ids outside it are never sampled.
        mesh: the devices.
        batch_size: maximum number of rows that are continued together; divides over the mesh, else a UserError.
    """

    def __init__(self, params: Params, model: ModelConfig, vocabulary: Vocabulary, mesh: Mesh, batch_size: int = 8):
        mesh_lib.check_batch(mesh, batch_size, "generate")
        assert model.vocab_size is not None
        self.model, self.vocabulary, self.mesh, self.batch_size = model, vocabulary, mesh, batch_size
        self.stats = GenerationStats()
        self._num_ids = min(model.vocab_size, vocabulary.size)
        self._programs: dict[Hashable, Callable[..., Any]] = {}
        self._in_compute_dtype = jax.jit(lambda params: forward.in_compute_dtype(params, model))
        self.load(params)

    def load(self, params: Params) -> None:
        """Replaces the parameters by others of the same model; nothing is compiled again."""
        with jax.set_mesh(self.mesh):
            self._params = self._in_compute_dtype(params)

    def unload(self) -> None:
        """Frees the memory of the parameters until `load` is called."""
        self._params = {}

    def encode(self, text: str, prefix: str = "") -> list[int]:
        """[BOS] + prefix + text, tokenized separately as in training (`tokenize_document`)."""
        parts = [self.vocabulary.encode(part) for part in (prefix, text) if part]
        return [self.vocabulary.bos_id, *itertools.chain.from_iterable(parts)]

    def complete(self, texts: Sequence[str], sampling: Sampling, prefix: str = "") -> list[Continuation]:
        """Continues texts, each after BOS and the prefix."""
        return self.continue_ids([self.encode(text, prefix) for text in texts], sampling)

    def continue_ids(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, first_place: int = 0
    ) -> list[Continuation]:
        """Continues prompts of ids as given: BOS is the caller's.

        Args:
            prompts: ids, at least one each.
            sampling: how.
            first_place: index of the first prompt in the list that these are a part of. Draws depend on the seed and on
                this index, not on the other rows.

        Raises:
            UserError: a prompt is empty, has an id that the model does not embed, or leaves no room for new tokens.
        """
        for number, prompt in enumerate(prompts):
            self.check(prompt, sampling, f"prompt {number + 1} of {len(prompts)}")
        found: dict[int, Continuation] = {}
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # a batch pads to its longest
        rows = self._num_rows(len(prompts))
        for begin in range(0, len(order), rows):
            numbers = order[begin : begin + rows]
            texts = [GrowingText(self.vocabulary, prompts[number], sampling.stop) for number in numbers]
            batch = [(prompts[number], first_place + number) for number in numbers]
            batch += batch[:1] * (rows - len(batch))  # rows that fill the last batch; their tokens are dropped
            for _ in self._write(batch, texts, sampling, STEPS):
                pass
            found |= {number: text.finish() for number, text in zip(numbers, texts, strict=True)}
        return [found[number] for number in range(len(prompts))]

    def stream(self, prompt: Sequence[int], sampling: Sampling, place: int = 0) -> Iterator[str | Continuation]:
        """Continues one prompt: yields pieces of the text as they are made, and finally the continuation."""
        self.check(prompt, sampling, "the prompt")
        growing, shown = GrowingText(self.vocabulary, prompt, sampling.stop), 0
        for _ in self._write([(prompt, place)] * self._num_rows(1), [growing], sampling, 1):
            if len(text := growing.stable_prefix()) > shown:
                yield text[shown:]
                shown = len(text)
        finished = growing.finish()
        if len(finished.text) > shown:
            yield finished.text[shown:]
        yield finished

    def check(self, prompt: Sequence[int], sampling: Sampling, what: str) -> None:
        """Refuses a prompt that cannot be continued; `what` names it in the message."""
        embedded, longest = self.model.vocab_size, self.model.max_length
        assert embedded is not None
        if not len(prompt):
            raise UserError("prompt-empty", f"{what} has no token: begin it with BOS")
        if strange := [token for token in prompt if not 0 <= token < embedded]:
            raise UserError(
                "prompt-unknown-id",
                f"{what} has the id {strange[0]}, the model embeds 0 to {embedded - 1}: encode it with the model's "
                "vocabulary",
            )
        needed, room = len(prompt) + sampling.max_new_tokens, longest - len(prompt)
        if needed > longest:
            remedy = f"set Sampling.max_new_tokens = {room} or less, or shorten it" if room > 0 else "shorten it"
            raise UserError(
                "prompt-too-long",
                f"{what} has {len(prompt)} tokens, with {sampling.max_new_tokens} new ones {needed}; the model reads "
                f"{longest} (model.max_length): {remedy}",
            )

    def _write(
        self, batch: Sequence[tuple[Sequence[int], int]], texts: Sequence[GrowingText], sampling: Sampling, steps: int
    ) -> Iterator[None]:
        """Extends the texts of the first rows of a batch of (prompt, place); yields after the first token of each row
        and then after every call of `decode_steps`, which makes `steps` tokens."""
        # The batch as arrays: prompts [B, L] padded on the right, sizes rounded up.
        lengths = np.array([len(prompt) for prompt, _ in batch], np.int32)
        tokens = np.zeros((len(batch), power_of_two(max(SHORTEST, int(lengths.max())))), np.int32)
        for row, (prompt, _) in enumerate(batch):
            tokens[row, : len(prompt)] = prompt
        # Every new token reads all slots: a power of two, or three quarters of one where that suffices.
        needed = max(tokens.shape[1], int(lengths.max()) + sampling.max_new_tokens)
        slots = power_of_two(needed)
        slots = slots * 3 // 4 if needed <= slots * 3 // 4 else slots
        places = np.array([place for _, place in batch], np.uint32)

        # The prompts, and the first new tokens.
        temperature = None if sampling.temperature == 0 else np.float32(sampling.temperature)
        top_p = None if sampling.top_p is None else np.float32(sampling.top_p)
        traced = TracedSettings(np.uint32(sampling.seed), temperature, top_p)
        static = StaticSettings(self.model, self._num_ids, self.vocabulary.eos_id, sampling.top_k)
        reading = static  # attention kernels take rows of a multiple of KERNEL_ROWS; shorter ones gain nothing by them
        if tokens.shape[1] % KERNEL_ROWS:
            reading = static._replace(model=dataclasses.replace(self.model, attention="xla"))
        arrays = self._to_devices((tokens, lengths, places))
        state, made, seconds = self._call(read_prompts, *arrays, traced, static=reading, slots=slots)
        self.stats.prompt_tokens += int(lengths[: len(texts)].sum())
        self.stats.prefill_seconds += seconds

        # The others, until all rows have ended.
        while True:
            for text, new in zip(texts, made, strict=False):
                text.add(new[new != NO_TOKEN].tolist())
            yield
            left = sampling.max_new_tokens - max(len(text.tokens) for text in texts)
            if not left or all(text.ended for text in texts):
                return
            stopped = np.ones(len(batch), bool)  # rows that fill the batch need no more than their first token
            stopped[: len(texts)] = [text.ended is not None for text in texts]
            stopped, count = self._to_devices(stopped), np.int32(min(steps, left))
            state, made, seconds = self._call(decode_steps, state, stopped, count, traced, static=static)
            self.stats.new_tokens += int((made[: len(texts)] != NO_TOKEN).sum())
            self.stats.decode_seconds += seconds

    def _call(
        self, program: Any, *arguments: Any, **settings: Hashable
    ) -> tuple[DecodeState, Integer[np.ndarray, "B T"], float]:
        """The state, the new tokens, and the seconds without compilation, which is counted apart."""
        leaves, tree = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (program, tuple(sorted(settings.items())), tree, shapes)
        with jax.set_mesh(self.mesh):
            start = time.perf_counter()
            if key not in self._programs:
                self._programs[key] = program.lower(self._params, *arguments, **settings).compile()
                self.stats.compile_seconds += time.perf_counter() - start
                start = time.perf_counter()
            state, made = self._programs[key](self._params, *arguments)
            made = mesh_lib.to_host(made)
        return state, made, time.perf_counter() - start

    def _num_rows(self, prompts: int) -> int:
        """Rows of the batches for this many prompts: a power of two per shard, at most batch_size."""
        shards = mesh_lib.batch_shards(self.mesh)
        return min(self.batch_size, shards * power_of_two(-(-prompts // shards)))

    def _to_devices(self, arrays: Any) -> Any:
        rows = len(jax.tree.leaves(arrays)[0])
        return mesh_lib.to_devices(self.mesh, rows, lambda mine: jax.tree.map(lambda x: x[mine], arrays))


def power_of_two(number: int) -> int:
    """The smallest one that is at least `number`."""
    return 1 << (number - 1).bit_length()

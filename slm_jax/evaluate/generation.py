"""Continuations of prompts: a batch of rows at a time, with a cache of keys and values."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Integer

from slm_jax import mesh as mesh_lib
from slm_jax.data.vocabularies import Vocabulary
from slm_jax.errors import UserError
from slm_jax.evaluate import decoding
from slm_jax.evaluate.continuation import Continuation, Writing
from slm_jax.evaluate.decoding import NOTHING, STEPS, Choice, Drawing, Rows
from slm_jax.evaluate.sampling import Sampling
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig

Complete = Callable[[Sequence[str], Sampling], list[Continuation]]
SHORTEST = 32  # tokens of the shortest rows that prompts are padded to; others are padded to the next power of two
KERNEL_ROWS = 128  # attention kernels take rows of a multiple of so many tokens; shorter ones gain nothing from them


@dataclasses.dataclass
class Speed:
    """What took how long, in seconds: compiling, reading prompts, and making tokens."""

    compiling: float = 0.0
    prompt_tokens: int = 0
    reading: float = 0.0
    new_tokens: int = 0
    making: float = 0.0


class Generator:
    """A model that continues prompts.

    Prompts of several lengths share a batch, padded on the right. Sizes of batches, prompts and caches are rounded up,
    so that few programs are compiled.

    Args:
        params: of the model, sharded as `mesh.tree_shardings` says.
        model: its config.
        vocabulary: its vocabulary; ids that it does not have are never chosen.
        mesh: the devices.
        batch_size: rows that are continued together, at most.

    Raises:
        UserError: the mesh does not split so many rows.
    """

    def __init__(self, params: Params, model: ModelConfig, vocabulary: Vocabulary, mesh: Mesh, batch_size: int = 8):
        mesh_lib.check_batch(mesh, batch_size, "generate")
        assert model.vocab_size is not None
        self.model, self.vocabulary, self.mesh, self.batch_size = model, vocabulary, mesh, batch_size
        self.speed = Speed()
        self._num_ids = min(model.vocab_size, vocabulary.size)
        self._programs: dict[Hashable, Callable[..., Any]] = {}
        self._in_compute_dtype = jax.jit(lambda params: forward.in_compute_dtype(params, model))
        self.load(params)

    def load(self, params: Params) -> None:
        """Other parameters of the same model from here on; nothing is compiled again."""
        with jax.set_mesh(self.mesh):
            self._params = self._in_compute_dtype(params)

    def unload(self) -> None:
        """Frees the memory of the parameters, until others are loaded."""
        self._params = {}

    def complete(self, texts: Sequence[str], sampling: Sampling, prefix: str = "") -> list[Continuation]:
        """Continues texts, each behind BOS and the prefix; see `continue_ids`."""
        return self.continue_ids([self.encode(text, prefix) for text in texts], sampling)

    def encode(self, text: str, prefix: str = "") -> list[int]:
        """[BOS] + prefix + text, tokenized apart as in training (`tokenize_document`)."""
        prefix_ids = self.vocabulary.encode(prefix) if prefix else []
        return [self.vocabulary.bos_id, *prefix_ids, *(self.vocabulary.encode(text) if text else [])]

    def continue_ids(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, first_place: int = 0
    ) -> list[Continuation]:
        """Continues prompts of ids as given: BOS is the caller's.

        Args:
            prompts: ids, at least one each.
            sampling: how.
            first_place: where the first prompt stands in the list of which these are a part: what chance gives a row
                depends on the seed and on its place in the list, not on the rows beside it.

        Raises:
            UserError: a prompt has no token, an id that the model does not embed, or no room for the new tokens.
        """
        for number, prompt in enumerate(prompts):
            self.check(prompt, sampling, f"prompt {number + 1} of {len(prompts)}")
        found: dict[int, Continuation] = {}
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # a batch pads to its longest
        rows = self._num_rows(len(prompts))
        for begin in range(0, len(order), rows):
            numbers = order[begin : begin + rows]
            writings = [Writing(self.vocabulary, prompts[number], sampling.stop) for number in numbers]
            batch = [(prompts[number], first_place + number) for number in numbers]
            batch += batch[:1] * (rows - len(batch))  # what fills the last batch is left out of the result
            for _ in self._write(batch, writings, sampling, STEPS):
                pass
            found |= {number: writing.finish() for number, writing in zip(numbers, writings, strict=True)}
        return [found[number] for number in range(len(prompts))]

    def stream(self, prompt: Sequence[int], sampling: Sampling, place: int = 0) -> Iterator[str | Continuation]:
        """Continues one prompt: yields pieces of the text as they are made, and at last the continuation."""
        self.check(prompt, sampling, "the prompt")
        writing, shown = Writing(self.vocabulary, prompt, sampling.stop), 0
        for _ in self._write([(prompt, place)] * self._num_rows(1), [writing], sampling, 1):
            if len(text := writing.settled()) > shown:
                yield text[shown:]
                shown = len(text)
        finished = writing.finish()
        if len(finished.text) > shown:
            yield finished.text[shown:]
        yield finished

    def check(self, prompt: Sequence[int], sampling: Sampling, what: str) -> None:
        """Refuses a prompt that cannot be continued; `what` names it."""
        embedded, longest = self.model.vocab_size, self.model.max_length
        assert embedded is not None
        if not len(prompt):
            raise UserError(f"{what} has no token: begin it with BOS")
        if strange := [token for token in prompt if not 0 <= token < embedded]:
            raise UserError(
                f"{what} has the id {strange[0]}, the model embeds 0 to {embedded - 1}: encode it with its vocabulary"
            )
        needed, room = len(prompt) + sampling.max_new_tokens, longest - len(prompt)
        if needed > longest:
            remedy = f"set Sampling.max_new_tokens = {room} or less, or shorten it" if room > 0 else "shorten it"
            raise UserError(
                f"{what} has {len(prompt)} tokens, with {sampling.max_new_tokens} new ones {needed}; the model reads "
                f"{longest} (model.max_length): {remedy}"
            )

    def _write(
        self, batch: Sequence[tuple[Sequence[int], int]], writings: Sequence[Writing], sampling: Sampling, steps: int
    ) -> Iterator[None]:
        """Fills the writings of the first rows of a batch of prompts and places; yields after the first token of each
        and then every so many steps."""
        lengths = np.array([len(prompt) for prompt, _ in batch], np.int32)
        tokens = np.zeros((len(batch), _power_of_two(max(SHORTEST, int(lengths.max())))), np.int32)
        for row, (prompt, _) in enumerate(batch):
            tokens[row, : len(prompt)] = prompt
        slots = _slots(max(tokens.shape[1], int(lengths.max()) + sampling.max_new_tokens))
        drawing = Drawing.of(sampling)
        choice = Choice(self.model, self._num_ids, self.vocabulary.eos_id, sampling.top_k)
        reads = choice._replace(model=_for_width(self.model, tokens.shape[1]))
        given = self._to_devices((tokens, lengths, np.array([place for _, place in batch], np.uint32)))
        state, made, seconds = self._call(decoding.begin, *given, drawing, choice=reads, slots=slots)
        self.speed.prompt_tokens += int(lengths[: len(writings)].sum())
        self.speed.reading += seconds
        while True:
            for writing, new in zip(writings, made, strict=False):
                writing.add(new[new != NOTHING].tolist())
            yield
            left = sampling.max_new_tokens - max(len(writing) for writing in writings)
            if not left or all(writing.ended for writing in writings):
                return
            stopped = np.ones(len(batch), bool)  # what fills the batch needs no more than its first token
            stopped[: len(writings)] = [writing.ended is not None for writing in writings]
            stopped, count = self._to_devices(stopped), np.int32(min(steps, left))
            state, made, seconds = self._call(decoding.advance, state, stopped, count, drawing, choice=choice)
            self.speed.new_tokens += int((made[: len(writings)] != NOTHING).sum())
            self.speed.making += seconds

    def _call(
        self, program: Any, *arguments: Any, **settings: Hashable
    ) -> tuple[Rows, Integer[np.ndarray, "B T"], float]:
        """Rows, their new tokens, and the seconds it took without compilation."""
        leaves, tree = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (program, tuple(sorted(settings.items())), tree, shapes)
        with jax.set_mesh(self.mesh):
            start = time.perf_counter()
            if key not in self._programs:
                self._programs[key] = program.lower(self._params, *arguments, **settings).compile()
                self.speed.compiling += time.perf_counter() - start
                start = time.perf_counter()
            state, made = self._programs[key](self._params, *arguments)
            made = mesh_lib.to_host(made)
        return state, made, time.perf_counter() - start

    def _num_rows(self, prompts: int) -> int:
        """Rows of the batches for so many prompts: a power of two for each shard, which suffices, or all allowed."""
        shards = mesh_lib.batch_shards(self.mesh)
        return min(self.batch_size, shards * _power_of_two(-(-prompts // shards)))

    def _to_devices(self, arrays: Any) -> Any:
        rows = len(jax.tree.leaves(arrays)[0])
        return mesh_lib.to_devices(self.mesh, rows, lambda mine: jax.tree.map(lambda x: x[mine], arrays))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (number - 1).bit_length()


def _slots(number: int) -> int:
    """The smallest power of two, or three quarters of one, that is no less: every new token reads all slots."""
    above = _power_of_two(number)
    return above * 3 // 4 if number <= above * 3 // 4 else above


def _for_width(model: ModelConfig, width: int) -> ModelConfig:
    return model if width % KERNEL_ROWS == 0 else dataclasses.replace(model, attention="xla")

"""Continuations: what the uncached forward would choose, whatever rows are beside a row and wherever they lie."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_families import FAMILIES
from toy import refusal, refused

from slm_jax import mesh as mesh_lib
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.evaluate.generation import Generator, Sampling, decode_steps
from slm_jax.mesh import MeshConfig
from slm_jax.models import forward

VOCABULARY = ByteVocabulary()
MODEL = dataclasses.replace(FAMILIES["llama"], vocab_size=62)  # even, so that a mesh can halve it
MODELS = FAMILIES | {
    "a padded vocabulary": dataclasses.replace(MODEL, vocab_size=61, vocab_multiple=8),
    "bfloat16": dataclasses.replace(MODEL, compute_dtype="bfloat16"),
}
PROMPTS = [np.random.default_rng(n).integers(3, 61, n).tolist() for n in (5, 1, 30, 12, 7)]
GREEDY = Sampling(max_new_tokens=20)
DRAWN = Sampling(max_new_tokens=20, temperature=1.3, top_p=0.95, seed=7)


def random_params(model):
    """All of them, biases too, so large that one token stands out."""
    rng = np.random.default_rng(0)

    def random(path, leaf):
        around = 1.0 if mesh_lib.path_name(path).endswith("scale") else 0.0
        return jnp.asarray(around + 0.2 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(random, forward.param_shapes(model))


def generator(model=MODEL, batch_size=4, devices=1, axes=None):
    mesh = mesh_lib.make_mesh(axes, jax.devices()[:devices])
    params = random_params(model)
    return Generator(jax.device_put(params, mesh_lib.tree_shardings(params, mesh)), model, VOCABULARY, mesh, batch_size)


@pytest.fixture(scope="module")
def alone():
    """A generator on one device."""
    return generator()


@pytest.fixture(scope="module")
def expected(alone):
    """What it gives to all prompts."""
    return {sampling: alone.continue_ids(PROMPTS, sampling) for sampling in (GREEDY, DRAWN)}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_uncached_forward(name):
    """Each is the most likely one after the prompt and the tokens before it, read in one row."""
    model = MODELS[name]
    prompts = [*PROMPTS, PROMPTS[2] + PROMPTS[3]]  # the longest has 42, in a batch of rows of 64
    made = generator(model, batch_size=8).continue_ids(prompts, GREEDY)
    length = max(map(len, prompts)) + GREEDY.max_new_tokens
    tokens, segments = np.zeros((2, len(prompts), length), np.int32)
    for row, (prompt, continuation) in enumerate(zip(prompts, made, strict=True)):
        ids = prompt + continuation.tokens
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        assert continuation.ended == ("eos" if ids[-1] == VOCABULARY.eos_id else "length")
        assert continuation.ended == "eos" or len(continuation.tokens) == GREEDY.max_new_tokens
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)

    @jax.jit
    def uncached(params, *row):
        return forward.logits(params, model, forward.hidden_states(params, model, *row))

    logits = np.asarray(uncached(random_params(model), tokens, positions, segments))
    for row, (prompt, continuation) in enumerate(zip(prompts, made, strict=True)):
        before = logits[row, len(prompt) - 1 : len(prompt) - 1 + len(continuation.tokens)]
        chosen = np.take_along_axis(before, np.array(continuation.tokens)[:, None], -1)[:, 0]
        # The products of one token and of a row are rounded apart: to 8 bits in bfloat16, where two logits may tie.
        slack = 0.1 if model.compute_dtype == "bfloat16" else 1e-4
        assert (before.max(-1) - chosen <= slack).all()
        assert before.std(-1).min() > 5 * slack
        assert (before.argmax(-1) == continuation.tokens).mean() >= (0.9 if slack == 0.1 else 1)


def test_rows_do_not_depend_on_their_batch(alone, expected):
    """Ragged and padded, or alone: in one list, one after the other, with another size of batches."""
    one_by_one = generator(batch_size=1)
    for sampling, whole in expected.items():
        for place, prompt in enumerate(PROMPTS):
            assert alone.continue_ids([prompt], sampling, first_place=place) == [whole[place]]
        assert one_by_one.continue_ids(PROMPTS, sampling) == whole
    assert len({tuple(continuation.tokens) for continuation in expected[GREEDY]}) == len(PROMPTS)


def test_eight_devices_continue_as_one(expected):
    several = generator(batch_size=8, devices=8)
    for sampling, whole in expected.items():
        assert several.continue_ids(PROMPTS, sampling) == whole


def test_a_mesh_with_all_axes_continues_as_one_device_and_the_cache_stays_where_it_is(expected):
    """No device sends keys and values of its rows and heads (of 2 layers, in 64 slots) to another."""
    several = generator(batch_size=8, devices=8, axes=MeshConfig(data=2, fsdp=2, model=2))
    for sampling, whole in expected.items():
        assert several.continue_ids(PROMPTS, sampling) == whole
    programs = [program.as_text() for key, program in several._programs.items() if key[0] is decode_steps]
    assert len(programs) == 2
    for text in programs:
        sent = re.findall(r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text)
        assert len(sent) > 5 and not [shape for shape in sent if "64" in shape]
        assert "f32[2,2,1,64,8]" in text


def test_a_token_is_written_in_place(alone, expected):
    """A copy of the cache for each token, or even for each layer, would cost more than all the rest."""
    programs = [program.as_text() for key, program in alone._programs.items() if key[0] is decode_steps]
    programs = [text for text in programs if "f32[2,4,2," in text]  # other tests may have made some for fewer rows
    assert programs
    for text in programs:  # layers, rows, heads, slots, and features
        made = re.findall(r"= f32\[2,4,2,\d+,8\]\S* ([\w-]+)\(", text)
        written = [operation for operation in made if operation in ("scatter", "dynamic-update-slice")]  # XLA's ways
        assert len(written) == 2  # keys and values
        assert set(made) - set(written) == {"parameter", "get-tuple-element", "fusion"}


def test_few_programs_are_compiled(alone, expected):
    """Two for a size of batch and prompts, used again for others of these sizes."""
    before = dict(alone._programs)
    alone.continue_ids([prompt[:3] for prompt in PROMPTS], GREEDY)
    alone.continue_ids([prompt[:2] for prompt in PROMPTS], dataclasses.replace(DRAWN, temperature=0.7, seed=1))
    assert alone._programs == before


def test_one_step_follows_the_softmax(alone):
    """The frequency of each token in many draws, at a temperature."""
    count = 2000
    wide = generator(batch_size=count)
    drawn = wide.continue_ids([PROMPTS[0]] * count, Sampling(max_new_tokens=1, temperature=2.0, seed=3))
    tokens = jnp.asarray([PROMPTS[0]])
    place = jnp.arange(tokens.shape[1])[None]
    params = random_params(MODEL)
    hidden = forward.hidden_states(params, MODEL, tokens, place, jnp.ones_like(tokens))
    probability = np.asarray(jax.nn.softmax(forward.logits(params, MODEL, hidden)[0, -1] / 2.0))
    found = np.bincount([continuation.tokens[0] for continuation in drawn], minlength=62) / count
    assert (np.abs(found - probability) < 4.5 * np.sqrt(probability / count) + 1e-3).all()
    assert 0.02 < probability.max() < 0.9 and (found > 0).sum() > 20


def test_a_seed_is_repeated_and_another_one_is_another(alone, expected):
    assert alone.continue_ids(PROMPTS, DRAWN) == expected[DRAWN]
    other = alone.continue_ids(PROMPTS, dataclasses.replace(DRAWN, seed=8))
    assert all(a.tokens != b.tokens for a, b in zip(other, expected[DRAWN], strict=True))
    same = alone.continue_ids([PROMPTS[0]] * 4, DRAWN)
    assert len({tuple(continuation.tokens) for continuation in same}) == 4


def test_only_ids_of_the_vocabulary_are_made():
    """A model may embed more ids than its vocabulary has."""
    wide = generator(dataclasses.replace(MODEL, vocab_size=300), batch_size=1000)
    made = wide.continue_ids([[1]] * 1000, Sampling(max_new_tokens=1, temperature=100.0))
    tokens = [continuation.tokens[0] for continuation in made]
    assert 250 < max(tokens) < VOCABULARY.size and len(set(tokens)) > 200


def test_a_stop_ends_the_text_before_it(alone, expected):
    """In the middle of what would follow; the tokens end with the one that completes it."""
    whole = max(expected[DRAWN], key=lambda continuation: len(continuation.tokens))
    prompt = PROMPTS[expected[DRAWN].index(whole)]
    stop = VOCABULARY.decode(whole.tokens[5:8])
    stopping = dataclasses.replace(DRAWN, stop=["never", stop])
    place = PROMPTS.index(prompt)
    [continuation] = alone.continue_ids([prompt], stopping, first_place=place)
    assert continuation.ended == "stop" and continuation.tokens == whole.tokens[:8]
    assert continuation.text == VOCABULARY.decode(whole.tokens[:5])
    [*pieces, last] = alone.stream(prompt, stopping, place)
    assert "".join(pieces) == continuation.text and last == continuation


def test_a_stream_is_the_continuation_in_pieces(alone, expected):
    for place, prompt in enumerate(PROMPTS):
        [*pieces, last] = alone.stream(prompt, DRAWN, place)
        assert last == expected[DRAWN][place] and "".join(pieces) == last.text
        assert len(pieces) > 1 or len(last.text) < 2


def test_texts_stand_behind_bos_and_prefix(alone, expected):
    prefix = [VOCABULARY.bos_id, *VOCABULARY.encode("! ")]
    prompts = [prefix + VOCABULARY.encode(text) for text in ("#", "", "$%")]
    assert alone.complete(["#", "", "$%"], GREEDY, prefix="! ") == alone.continue_ids(prompts, GREEDY)
    assert alone.complete([""], GREEDY) == alone.continue_ids([[VOCABULARY.bos_id]], GREEDY)


def test_prompts_that_cannot_be_continued_are_refused(alone):
    def text(code, *prompts):
        return refused(code, alone.continue_ids, prompts, GREEDY)

    long = text("prompt-too-long", [1], [5] * 45)
    assert "prompt 2 of 2 has 45 tokens" in long and "reads 64" in long and "Sampling.max_new_tokens = 19" in long
    assert "Sampling.max_new_tokens" not in text("prompt-too-long", [5] * 64)
    assert "prompt 1 of 1" in text("prompt-empty", [])
    unknown = text("prompt-unknown-id", [62])
    assert "prompt 1 of 1" in unknown and "62" in unknown and "0 to 61" in unknown
    assert "-1" in text("prompt-unknown-id", [1, -1])
    assert alone.continue_ids([], GREEDY) == []
    assert "a batch of 3 rows does not split into 8 shards" in refusal(generator, batch_size=3, devices=8)

"""How a token is chosen, on logits alone; and where a text ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import refused

from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.evaluate.generation import GrowingText, Sampling, row_keys, sample_tokens

COUNT = 4000
LOGITS = jnp.log(jnp.array([0.4, 0.05, 0.3, 0.05, 0.2]))
BYTES = ByteVocabulary()


def frequencies(temperature=1.0, top_k=None, top_p=None):
    """Of each token in many draws from LOGITS."""
    keys = row_keys(jnp.uint32(5), jnp.arange(COUNT), jnp.int32(0))
    nucleus = None if top_p is None else jnp.float32(top_p)
    drawn = sample_tokens(jnp.tile(LOGITS, (COUNT, 1)), keys, jnp.float32(temperature), top_k, nucleus)
    return np.bincount(np.asarray(drawn), minlength=5) / COUNT


@pytest.mark.parametrize(
    ("setting", "weights"),
    [
        ({}, [0.4, 0.05, 0.3, 0.05, 0.2]),
        ({"temperature": 0.5}, [0.16, 0.0025, 0.09, 0.0025, 0.04]),
        ({"top_k": 3}, [4, 0, 3, 0, 2]),
        ({"top_k": 4}, [0.4, 0.05, 0.3, 0, 0.2]),  # of two that are as likely, the lower id
        ({"top_k": 50}, [0.4, 0.05, 0.3, 0.05, 0.2]),
        ({"top_p": 0.69}, [4, 0, 3, 0, 0]),
        ({"top_p": 0.71}, [4, 0, 3, 0, 2]),
        ({"top_p": 1.0}, [0.4, 0.05, 0.3, 0.05, 0.2]),
        ({"top_k": 3, "top_p": 0.5}, [4, 0, 3, 0, 0]),  # 4/9 do not reach a half
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0, 0]),  # 4/7 do
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e-3}, [1, 0, 0, 0, 0]),
    ],
)
def test_frequencies_are_the_probabilities(setting, weights):
    expected = np.array(weights) / np.sum(weights)
    found = frequencies(**setting)
    assert (found[expected == 0] == 0).all()
    assert (np.abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / COUNT) + 1e-12).all()


def test_of_equally_likely_tokens_the_first_is_the_most_likely():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0]])
    keys = row_keys(jnp.uint32(0), jnp.zeros(1, jnp.int32), jnp.int32(0))
    for temperature, top_k, top_p in ((None, None, None), (1.0, 1, None), (1.0, None, 1e-6)):
        given = [None if x is None else jnp.float32(x) for x in (temperature, top_p)]
        assert sample_tokens(logits, keys, given[0], top_k, given[1]).tolist() == [1]


def test_keys_differ_between_seeds_places_and_tokens_and_not_with_the_batch():
    def keys(seed, places, number):
        return jax.random.key_data(row_keys(jnp.uint32(seed), jnp.array(places), jnp.int32(number))).tolist()

    seen = [key for seed in (0, 1) for number in (0, 1) for key in map(tuple, keys(seed, [0, 1, 2], number))]
    assert len(set(seen)) == 12
    assert keys(1, [2], 1)[0] == keys(1, [0, 1, 2], 1)[2]


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"max_new_tokens": 0}, "setting-out-of-range"),
        ({"temperature": -1}, "setting-out-of-range"),
        ({"temperature": float("nan")}, "setting-out-of-range"),
        ({"top_k": 0, "temperature": 1.0}, "setting-out-of-range"),
        ({"top_p": 1.5, "temperature": 1.0}, "setting-out-of-range"),
        ({"top_p": 0.9}, "sampling-greedy"),
        ({"top_k": 5}, "sampling-greedy"),
        ({"stop": ("",)}, "sampling-invalid-stop"),
        ({"seed": -1}, "setting-out-of-range"),
        ({"seed": 2**32}, "setting-out-of-range"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, code):
    name, value = next(iter(given.items()))
    text = refused(code, Sampling, **given)
    assert f"Sampling.{name}" in text and str(value) in text


def write(tokens, stop=(), prompt=(1,), at_a_time=1, vocabulary=BYTES):
    """The continuation, and all that `stable_prefix` said on the way."""
    writing, said = GrowingText(vocabulary, list(prompt), stop), []
    for begin in range(0, len(tokens), at_a_time):
        writing.add(tokens[begin : begin + at_a_time])
        said.append(writing.stable_prefix())
    return writing.finish(), said


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab\né😀", max_size=12),
    st.sampled_from([1, 2, 5, 100]),
    st.lists(st.text("ab\né😀", min_size=1, max_size=3), max_size=2),
)
def test_stops_are_found_in_the_text_whatever_the_steps(text, at_a_time, stops):
    """As if the whole text were searched after each byte: the first stop that is complete, and of two the longer one
    that ends there too. What was said before the end is true at the end."""
    tokens = [*BYTES.encode(text), BYTES.eos_id]
    found, said = write(tokens, stops, at_a_time=at_a_time)
    assert all(found.text.startswith(earlier) for earlier in said)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        assert (found.text, found.tokens, found.ended) == (text, tokens, "eos")
        return
    end, begin = min(ends)
    assert (found.text, found.ended) == (text[:begin], "stop")
    assert found.tokens == BYTES.encode(text[:end])


def test_what_may_begin_a_stop_is_held_back():
    _, said = write(BYTES.encode("one\nQ: two"), ["\nQ:", "\n\n"])
    assert said == ["o", "on", "one", "one", "one", "one", "one", "one", "one", "one"]
    _, said = write(BYTES.encode("a\nb"), ["\nQ:", "\n\n"])
    assert said == ["a", "a", "a\nb"]


def test_half_characters_are_not_shown():
    found, said = write(BYTES.encode("é😀")[:-1])
    assert said == ["", "é", "é", "é", "é"] and found.text == "é" and len(found.tokens) == 5
    assert found.ended == "length"


def test_a_character_that_the_prompt_begins_belongs_to_the_continuation():
    first, *rest = BYTES.encode("é!")
    assert write(rest, prompt=[*BYTES.encode("caf"), first])[0].text == "é!"
    assert write(BYTES.encode("a!"), prompt=[*BYTES.encode("caf"), first])[0].text == "a!"


def test_the_space_before_a_first_word_stays():
    """SentencePiece drops it when it decodes the continuation alone."""
    vocabulary = train_sentencepiece(["the hens eat corn and the pigs eat corn"] * 9, 290)
    whole = vocabulary.encode("the hens eat corn")
    for cut in range(1, len(whole)):
        found, _ = write(whole[cut:], prompt=[vocabulary.bos_id, *whole[:cut]], vocabulary=vocabulary)
        assert vocabulary.decode(whole[:cut]) + found.text == "the hens eat corn"
    assert write(whole, prompt=[vocabulary.bos_id], vocabulary=vocabulary)[0].text == "the hens eat corn"


def test_nothing_follows_an_end():
    tokens = [*BYTES.encode("a"), BYTES.eos_id, *BYTES.encode("b")]
    found, _ = write(tokens, at_a_time=3)
    assert (found.text, found.tokens, found.ended) == ("a", tokens[:2], "eos")
    assert write(tokens, at_a_time=1)[0] == found
    # A stop and EOS among the same tokens: what came first.
    assert write(tokens, ["a"], at_a_time=3)[0].ended == "stop"

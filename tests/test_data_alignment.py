"""Two vocabularies over one text: losses carried from the tokens of one to those of the other, nothing lost."""

import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data.alignment import Aligned, Aligner, carried
from slm_jax.data.sentencepiece_vocabulary import MODEL_FILE, SentencePieceVocabulary, train_sentencepiece
from slm_jax.data.tokenizer_files import tokenizer_files
from slm_jax.data.vocabulary import ByteVocabulary, Vocabulary

WORDS = "ducks swim under the old stone bridge, näher 漢字 😀\n  while geese and hens wait for some corn".split(" ")
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=12)) + f" {i}\n" for i in range(300)]


def trained(**named) -> SentencePieceVocabulary:
    """As others make them: with a space before the text that is not part of it."""
    model = io.BytesIO()
    named = {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False, **named}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in TEXTS),
        model_writer=model,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        **named,
    )
    return SentencePieceVocabulary(model.getvalue())


@pytest.fixture(scope="module")
def vocabularies() -> dict[str, Vocabulary]:
    return {
        "bytes": ByteVocabulary(),
        "small": train_sentencepiece(TEXTS, 320),
        "large": train_sentencepiece(TEXTS, 400),
        "spaced": trained(vocab_size=380),
    }


def document(vocabulary: Vocabulary, text: str) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([vocabulary.bos_id, *vocabulary.encode(text), vocabulary.eos_id])
    return tokens, np.arange(len(tokens)) > 0


class OneControl(ByteVocabulary):
    """As of GPT-NeoX and Qwen: what begins a document also ends it."""

    @property
    def bos_id(self) -> int:
        return self.eos_id


def test_a_reference_begins_with_its_bos_where_ours_is_eos_too(vocabularies):
    ours, theirs = OneControl(), vocabularies["large"]
    tokens, mask = document(ours, "ducks")
    assert tokens[0] == tokens[-1]
    ids = Aligner(ours, theirs).align(tokens, mask).ids.tolist()
    assert ids == [theirs.bos_id, *theirs.encode("ducks"), theirs.eos_id]
    assert Aligner(ours, theirs).align(tokens[1:], mask[1:]).ids.tolist() == ids  # from within a document


def test_spaces_that_a_model_takes_away_shift_nothing(vocabularies):
    theirs = trained(vocab_size=380, remove_extra_whitespaces=True)
    text = "   ducks  swim "
    ids, offsets = theirs.encode_with_offsets(text)
    assert ids == theirs.encode(text)
    shown = [text[begin:end] for begin, end in offsets]
    assert "".join(shown) == text.lstrip()[: len("".join(shown))] and shown[0].strip() in "ducks"
    tokens, mask = document(vocabularies["bytes"], text)
    aligned = Aligner(vocabularies["bytes"], theirs).align(tokens, mask)
    losses = carried(np.arange(float(len(aligned.ids))), aligned)
    assert np.isnan(losses[1:4]).all() and losses[4] > 0  # three spaces that it does not read


def test_what_tokenizer_json_cannot_say_is_left_to_the_model_file(vocabularies):
    assert {"tokenizer.json", MODEL_FILE} <= set(tokenizer_files(vocabularies["spaced"]))
    for changed in ({"model_type": "unigram"}, {"remove_extra_whitespaces": True}):
        files = set(tokenizer_files(trained(vocab_size=320, **changed)))
        assert MODEL_FILE in files and "tokenizer.json" not in files


def test_by_hand():
    """ab|c of ours, a|bc of theirs, and EOS: half of what bc costs is b's."""
    spans = [np.array(x) for x in ([[0, 1], [1, 2], [2, 4], [4, 5]], [[0, 1], [1, 3], [3, 4], [4, 5]])]
    losses = carried(np.array([np.nan, 2.0, 3.0, 0.5]), Aligned(np.arange(4), *spans))
    np.testing.assert_array_equal(losses, [np.nan, 3.5, 1.5, 0.5])


def test_what_is_read_and_where_it_stands(vocabularies):
    """A character of four bytes is four tokens of one vocabulary and one or some of the other."""
    ours, theirs = vocabularies["bytes"], vocabularies["large"]
    tokens, mask = document(ours, "a 😀 b")
    aligned = Aligner(ours, theirs).align(tokens, mask)
    assert aligned.ids.tolist() == [theirs.bos_id, *theirs.encode("a 😀 b"), theirs.eos_id]
    np.testing.assert_array_equal(aligned.ours, np.stack([np.arange(10), np.arange(10) + 1], axis=1))
    assert aligned.theirs[0].tolist() == [0, 1] and aligned.theirs[-1].tolist() == [9, 10]
    same = carried(np.arange(10.0), Aligner(ours, ours).align(tokens, mask))
    # Its bytes share one span in either vocabulary, so they share what it costs.
    np.testing.assert_allclose(same[1:], [1, 2, 4.5, 4.5, 4.5, 4.5, 7, 8, 9], rtol=1e-12)


PAIRS = [(a, b) for a in ("bytes", "small", "large", "spaced") for b in ("bytes", "small", "large", "spaced")]


@pytest.mark.parametrize("ours, theirs", PAIRS)
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_sums_are_preserved_and_every_token_has_its_share(vocabularies, ours, theirs, data):
    """Against bytes one by one: each byte has its part of each of their tokens over it, ours takes that of its own."""
    text = data.draw(st.text(alphabet="ab \nduck0é漢😀▁\ufffd", min_size=1, max_size=30))
    if ours == "spaced":
        text = text.replace("▁", "_").replace("\ufffd", "?")
    tokens, mask = document(vocabularies[ours], text)
    aligned = Aligner(vocabularies[ours], vocabularies[theirs]).align(tokens, mask)
    losses = np.random.default_rng(len(text)).random(len(aligned.ids)) * 9
    found = carried(losses, aligned)
    read = ~np.isnan(found[1:])
    np.testing.assert_array_equal(read, aligned.ours[1:, 1] > aligned.ours[1:, 0])
    if "\ufffd" not in text:
        assert read[1:].all() and (read[0] or ours == "spaced"), (
            "only the space that is put before a text may be nothing"
        )
        np.testing.assert_allclose(np.nansum(found), losses[1:].sum(), rtol=1e-12)
    by_byte = np.zeros(int(aligned.theirs.max()))
    for (begin, end), loss in list(zip(aligned.theirs, losses, strict=True))[1:]:
        if end > begin:
            by_byte[begin:end] += loss / (end - begin)
        else:
            by_byte[min(begin, len(by_byte) - 1)] += loss
    expected = [by_byte[begin:end].sum() for begin, end in aligned.ours[1:]]
    np.testing.assert_allclose(found[1:][read], np.array(expected)[read], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["small", "spaced"])
def test_the_same_vocabulary_changes_nothing(vocabularies, name):
    vocabulary = vocabularies[name]
    tokens, mask = document(vocabulary, "12 ducks swim under the bridge")
    aligned = Aligner(vocabulary, vocabulary).align(tokens, mask)
    np.testing.assert_array_equal(aligned.ids, tokens)
    losses = np.random.default_rng(0).random(len(tokens))
    np.testing.assert_allclose(carried(losses, aligned)[1:], losses[1:], rtol=1e-12)


def test_a_piece_from_the_middle_of_a_document(vocabularies):
    """It has no BOS, theirs gets one; a character cut at either end is not read, and nothing else is lost."""
    ours, theirs = vocabularies["bytes"], vocabularies["large"]
    tokens, mask = document(ours, "漢 ducks 漢")
    piece = slice(2, len(tokens) - 2)  # BOS and the first byte before it, the last byte and EOS after it
    aligned = Aligner(ours, theirs).align(tokens[piece], mask[piece])
    assert aligned.ids.tolist() == [theirs.bos_id, *theirs.encode(" ducks ")]
    losses = np.random.default_rng(0).random(len(aligned.ids))
    found = carried(losses, aligned)
    assert np.flatnonzero(np.isnan(found)).tolist() == [0, 1, 9, 10]
    np.testing.assert_allclose(np.nansum(found), losses[1:].sum(), rtol=1e-12)


@pytest.mark.parametrize("name", ["small", "large", "spaced"])
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 90), st.integers(0, 90))
def test_any_piece_of_any_document(vocabularies, name, first, length):
    """Cut where a row happens to end: whatever the bytes at its ends, what is read is read once."""
    ours, theirs = vocabularies[name], vocabularies["bytes"]
    tokens, mask = document(ours, "".join(TEXTS[:2]))
    piece = slice(first, first + length)
    aligned = Aligner(ours, theirs).align(tokens[piece], mask[piece])
    losses = np.ones(len(aligned.ids))
    found = carried(losses, aligned)
    np.testing.assert_allclose(np.nansum(found), max(0, len(aligned.ids) - 1), rtol=1e-9)
    assert np.isnan(found).sum() <= 1 + 2 * 3  # BOS, and a cut character at each end


def test_no_token_of_theirs_crosses_the_end_of_a_prompt(vocabularies):
    ours, theirs = vocabularies["bytes"], vocabularies["large"]
    tokens, mask = document(ours, " ducks ducks")
    mask[: 1 + 8] = False  # up to the second d
    aligned = Aligner(ours, theirs).align(tokens, mask)
    assert aligned.ids.tolist() == [theirs.bos_id, *theirs.encode(" ducks d"), *theirs.encode("ucks"), theirs.eos_id]
    assert 9 in aligned.theirs[:, 1]


def test_an_eos_within_a_document_is_theirs_too(vocabularies):
    ours, theirs = vocabularies["small"], vocabularies["bytes"]
    tokens = np.array([ours.bos_id, *ours.encode("a b"), ours.eos_id, *ours.encode("c"), ours.eos_id])
    aligned = Aligner(ours, theirs).align(tokens, np.ones(len(tokens), bool))
    assert aligned.ids.tolist() == [1, *theirs.encode("a b"), 2, *theirs.encode("c"), 2]
    found = carried(np.arange(7.0), aligned)
    at = np.flatnonzero(tokens == ours.eos_id)
    assert found[at].tolist() == [4, 6] and np.nansum(found) == pytest.approx(sum(range(1, 7)))


def test_unknown_and_padding_stand_for_nothing():
    ours = trained(vocab_size=120, byte_fallback=False)
    tokens, mask = document(ours, "ducks Ж ducks")
    unknown = tokens == ours.unk_id
    assert unknown.sum() == 1
    aligned = Aligner(ours, ByteVocabulary()).align(tokens, mask)
    found = carried(np.ones(len(aligned.ids)), aligned)
    np.testing.assert_array_equal(np.isnan(found[1:]), unknown[1:])

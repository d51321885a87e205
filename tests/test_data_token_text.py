"""The characters that a token represents, from the ids alone, are those that the text's encoding gives."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.token_text import CONTEXT, TokenText
from slm_jax.data.vocabulary import ByteVocabulary

STORY = "The quick brown fox   jumps over 1234 lazy dogs.\n\n\tNaïve café: x = f(y) + 2;\nשלום 漢字 😀\n"
VOCABULARIES = {
    "bytes": ByteVocabulary(),
    "sentencepiece": train_sentencepiece([STORY.replace("fox", f"fox number {n}") for n in range(50)], 400),
}
any_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
any_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd") | st.sampled_from(" \n▁foxThe09")
)


@any_vocabulary
@given(text=any_text)
@example(text="👩‍👩‍👧‍👦 family, 🇩🇪 flag, e\u0301 and é" * 3)
@example(text="漢字かな交じり文 한국어 " * 9)
@example(text="  two  spaces \n\n\n newlines\r\n\ttab ")
@example(text="▁ ▁▁ literal U+2581 " * 4)
def test_spans_are_those_of_the_encoding(vocabulary, text):
    ids, offsets = vocabulary.encode_with_offsets(text)
    found, spans = TokenText(vocabulary).spans(ids)
    assert found == text and spans.tolist() == [list(offset) for offset in offsets]
    assert "".join(TokenText(vocabulary).texts(ids)) == text


@any_vocabulary
def test_control_ids_stand_between_characters(vocabulary):
    one, two = vocabulary.encode("a é"), vocabulary.encode(" b")
    ids = [vocabulary.bos_id, *one, vocabulary.eos_id, vocabulary.bos_id, *two, vocabulary.pad_id]
    text, spans = TokenText(vocabulary).spans(ids)
    assert text == "a é b"
    places = [0, len(one) + 1, len(one) + 2, len(ids) - 1]
    assert spans[places].tolist() == [[0, 0], [3, 3], [3, 3], [5, 5]]
    pieces = [vocabulary.piece(ids[place]) for place in places]
    texts = TokenText(vocabulary).texts(ids)
    assert [texts[place] for place in places] == pieces and texts[1] in ("a", "a ")


@any_vocabulary
def test_bytes_that_are_no_character_are_one_span_with_what_follows(vocabulary):
    """A row may begin or end within a character."""
    ids = VOCABULARIES["bytes"].encode("日x日") if vocabulary.kind == "bytes" else vocabulary.encode("日x日")
    assert len(ids) == 7  # 日 falls back to bytes in both
    text, spans = TokenText(vocabulary).spans(ids[1:-1])
    assert text.startswith("\ufffd") and "x" in text and text.endswith("\ufffd")
    assert text == vocabulary.decode(ids[1:-1])
    assert spans[0].tolist() == spans[2].tolist() and spans[-1][1] == len(text)
    assert (np.diff(spans[:, 1]) >= 0).all()


def test_a_vocabulary_that_drops_the_first_space():
    """As SentencePiece models from elsewhere do: their first piece carries a space that is not in the text."""

    class Llama(ByteVocabulary):
        def decode(self, ids):
            return super().decode(ids).removeprefix(" ")

    vocabulary = Llama()
    words = "the farm has hens and pigs that eat corn while 12 ducks swim"
    ids = vocabulary.encode(" " + words)
    assert len(ids) > 3 * CONTEXT
    text, spans = TokenText(vocabulary).spans(ids)
    assert text == words and spans[0].tolist() == [0, 0] and spans[-1].tolist() == [len(words) - 1, len(words)]
    assert (np.diff(spans[1:, 0]) == 1).all()

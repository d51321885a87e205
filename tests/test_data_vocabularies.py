"""Vocabularies lose nothing and account for every byte."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_families import sentencepiece_of_llama
from toy import refused

from slm_jax.data.preprocess import tokenize_document
from slm_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary, train_sentencepiece
from slm_jax.data.vocabularies import load_vocabulary
from slm_jax.data.vocabulary import ByteVocabulary

STORY = "The quick brown fox   jumps over 1234 lazy dogs.\n\n\tNaïve café: x = f(y) + 2;\nשלום 漢字 😀\n"
TEXTS = [STORY.replace("fox", f"fox number {number}") for number in range(50)]
VOCABULARIES = {"bytes": ByteVocabulary(), "sentencepiece": train_sentencepiece(TEXTS, 400)}

any_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
any_text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t\r▁foxThe09"), max_size=40)


@any_vocabulary
@given(text=any_text)
@example(text="👩‍👩‍👧‍👦 family, 🇩🇪 flag, e\u0301 and é")
@example(text="漢字かな交じり文 한국어")
@example(text="\u200fשלום عليكم\u202e")
@example(text="  two  spaces \n\n\n newlines\r\n\ttab ")
@example(text="\x00\x01\x1b\x7f\x85\u2028\ufeff")
@example(text="▁ ▁▁ literal U+2581 ⁇ \ufffd")
@example(text="<s></s><pad><unk><0x41>")
def test_round_trip_bytes_and_offsets(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.token_bytes()[ids].sum() == len(text.encode("utf-8"))
    assert vocabulary.bos_id not in ids and vocabulary.eos_id not in ids and vocabulary.pad_id not in ids
    same_ids, offsets = vocabulary.encode_with_offsets(text)
    assert same_ids == ids
    covered = [begin for begin, end in offsets for begin in range(begin, end)]
    assert sorted(set(covered)) == list(range(len(text)))
    for token, (begin, end) in zip(ids, offsets, strict=True):
        assert begin < end
        piece = vocabulary.decode([token])
        assert (
            piece == text[begin:end] or (end - begin == 1 and len(text[begin].encode("utf-8")) > 1) or piece == "\ufffd"
        )


@any_vocabulary
def test_control_ids_stand_for_no_bytes_and_decode_to_nothing(vocabulary):
    control = [vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id]
    assert control[0] == 0
    assert vocabulary.token_bytes()[control].sum() == 0
    assert vocabulary.decode([vocabulary.bos_id, *vocabulary.encode("a b"), vocabulary.eos_id, 0]) == "a b"
    assert len(vocabulary.token_bytes()) == vocabulary.size
    assert all(vocabulary.piece(token) for token in range(vocabulary.size))


@any_vocabulary
def test_saved_and_loaded(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "saved")
    loaded = load_vocabulary(tmp_path / "saved")
    assert loaded.content_hash == vocabulary.content_hash and loaded.encode(STORY) == vocabulary.encode(STORY)


def test_training_is_deterministic_and_writes_a_model_file(tmp_path):
    again = train_sentencepiece(TEXTS, 400, tmp_path / "again.model")
    assert again.content_hash == VOCABULARIES["sentencepiece"].content_hash
    assert load_vocabulary(tmp_path / "again.model").content_hash == again.content_hash
    assert len(again.encode("12345")) == 5  # single digits


def test_long_documents_are_trained_on():
    long = " ".join(["unforgettable"] * 2000)  # SentencePiece's own default drops texts above 4192 bytes
    assert len(train_sentencepiece([long], 285).encode("unforgettable")) < 4


@pytest.mark.parametrize(
    "texts, size, code, named",
    [
        (["abc"], 300, "vocabulary-size", "size 300 is too large for this text: the largest possible is 267"),
        (["abc"], 100, "vocabulary-size", "size 100 is too small: bytes and characters of this text need 264"),
        ([], 300, "vocabulary-no-text", ""),
        (["", ""], 300, "vocabulary-no-text", ""),
    ],
)
def test_training_says_what_is_possible(texts, size, code, named):
    assert named in refused(code, train_sentencepiece, texts, size)


def test_loading_says_what_is_wrong(tmp_path):
    def message(code, path) -> str:
        text = refused(code, load_vocabulary, path)
        assert str(path) in text
        return text

    message("vocabulary-not-found", tmp_path / "nothing")
    message("vocabulary-not-found", tmp_path / "nothing.model")
    (tmp_path / "wrong.model").write_bytes(b"not a model")
    message("vocabulary-not-sentencepiece", tmp_path / "wrong.model")
    message("vocabulary-not-found", tmp_path)
    VOCABULARIES["sentencepiece"].save(tmp_path)
    (tmp_path / "sentencepiece.model").write_bytes(train_sentencepiece(TEXTS, 350).model)
    message("vocabulary-damaged", tmp_path)
    (tmp_path / "vocabulary.json").write_text('{"kind": "words"}')
    assert "'words'" in message("vocabulary-unknown-kind", tmp_path)


@any_vocabulary
def test_spans_mark_the_tokens_that_overlap_them(vocabulary):
    text = "The quick 漢 brown fox"
    document = tokenize_document(text, [[10, 11], [18, 21]], vocabulary)
    assert document.tokens[0] == vocabulary.bos_id and document.tokens[-1] == vocabulary.eos_id
    assert document.loss_mask.tolist() == [False] + [True] * (len(document.tokens) - 1)
    assert not document.noise[0] and not document.noise[-1]
    noise, clean = (vocabulary.decode(document.tokens[document.noise == wanted]) for wanted in (True, False))
    assert "漢" in noise and "fox" in noise and "quick" not in noise
    assert "漢" not in clean and "x" not in clean and "quick" in clean
    assert not tokenize_document(text, [], vocabulary).noise.any()
    assert not tokenize_document(text, [[4, 4]], vocabulary).noise.any()


def test_a_prefix_does_not_merge_with_the_text_and_its_spans():
    vocabulary = VOCABULARIES["sentencepiece"]
    prefix, text = "The qui", "ck brown fox"
    assert vocabulary.encode(prefix + text) != vocabulary.encode(prefix) + vocabulary.encode(text)
    document = tokenize_document(text, [[9, 12]], vocabulary, prefix)
    given = [vocabulary.bos_id, *vocabulary.encode(prefix)]
    assert document.tokens.tolist() == [*given, *vocabulary.encode(text), vocabulary.eos_id]
    assert document.loss_mask.tolist() == [i >= len(given) for i in range(len(document.tokens))]
    assert vocabulary.decode(document.tokens[document.noise]).strip() == "fox"


def test_the_light_modules_import_no_tensorflow_and_no_jax():
    modules = (
        "corpus metadata packing prepare prepare_estimate prepare_steps prepare_tasks preprocess readers scores".split()
    )
    modules += "seqio_records seqio_tasks sorted_runs sources store vocabularies workers".split()
    program = "import sys, " + ", ".join(f"slm_jax.data.{module}" for module in modules)
    program += "\nprint(sorted({'tensorflow', 'seqio', 'tensorflow_datasets', 'jax'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_seqio_has_the_same_ids():
    from slm_jax.data.seqio_tasks import to_seqio_vocabulary

    for vocabulary in VOCABULARIES.values():
        theirs = to_seqio_vocabulary(vocabulary)
        assert (theirs.bos_id, theirs.eos_id, theirs.pad_id) == (vocabulary.bos_id, vocabulary.eos_id, 0)
        assert theirs.vocab_size == vocabulary.size
        assert list(theirs.encode(STORY)) == vocabulary.encode(STORY)
        assert np.array(theirs.encode_tf(STORY)).tolist() == vocabulary.encode(STORY)


def test_a_literal_space_symbol_and_a_model_that_puts_a_space_before_texts():
    """SentencePiece reads U+2581 as a space. Cut there, each part would gain the space that begins a text."""
    import sentencepiece

    model = sentencepiece_of_llama()
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=model), SentencePieceVocabulary(model)
    for text in ("The\u2581fox", "\u2581", "fox\u2581\u2581 dogs", "\u2581The fox 漢\u2581"):
        ids, offsets = ours.encode_with_offsets(text)
        assert ours.encode(text) == ids == theirs.encode(text)
        assert ours.decode(ids) == text.replace("\u2581", " ")
        assert {place for begin, end in offsets for place in range(begin, end)} == set(range(len(text)))
    assert ours.decode(ours.encode("The\u2581fox")) == "The fox"


def test_a_model_without_padding_pads_with_unknown(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "llama"), vocab_size=330, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    vocabulary = load_vocabulary(tmp_path / "llama.model")
    assert isinstance(vocabulary, SentencePieceVocabulary)
    assert vocabulary.pad_id == vocabulary.unk_id == 0
    assert vocabulary.decode(vocabulary.encode("The quick fox")) == "The quick fox"

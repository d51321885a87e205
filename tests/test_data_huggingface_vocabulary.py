"""Vocabularies of Hugging Face: the ids of transformers, every byte accounted for, and no control token from a text."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_families import FAMILIES, HARD, SPECIAL, STORY, TEXTS, save, sentencepiece_of_llama
from tokenizers import Tokenizer
from toy import refused

from slm_jax.data.huggingface_vocabulary import BYTE_CHARACTERS, HuggingFaceVocabulary
from slm_jax.data.prepare import prepare
from slm_jax.data.preprocess import tokenize_document
from slm_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary, train_sentencepiece
from slm_jax.data.seqio_tasks import to_seqio_vocabulary
from slm_jax.data.sources import Source
from slm_jax.data.tokenizer_files import tokenizer_files
from slm_jax.data.vocabularies import VocabularyConfig, load_vocabulary
from slm_jax.data.vocabulary import ByteVocabulary

any_family = pytest.mark.parametrize("family", FAMILIES)
BYTE_LEVEL = ("gpt_neox", "llama_3", "qwen")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {family: save(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def vocabularies(directories):
    return {family: load_vocabulary(directory) for family, directory in directories.items()}


@any_family
def test_ids_and_texts_are_those_of_transformers(family, directories, vocabularies):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directories[family])
    ours = vocabularies[family]
    for text in [*HARD, SPECIAL]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text[:50]
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text[:50]
    assert ours.eos_id == theirs.eos_token_id
    assert ours.bos_id == (theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id)
    assert ours.size == len(theirs)


def test_control_ids(vocabularies):
    ids = {
        family: [vocabulary.piece(token) for token in (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)]
        for family, vocabulary in vocabularies.items()
    }
    assert ids == {
        "gpt_neox": ["<|endoftext|>"] * 3,
        "llama_3": ["<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>"],
        "qwen": ["<|im_end|>", "<|im_end|>", "<|endoftext|>"],
        "llama_2": ["<s>", "</s>", "<unk>"],
    }


@any_family
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t\rfoxThe09<|s/>"), max_size=40))
@settings(max_examples=50, deadline=None)
@example(text=SPECIAL)
@example(text=STORY)
@example(text="e\u0301 and é, 👩‍👩‍👧‍👦")
@example(text="漢字かな交じり文 한국어")
def test_every_byte_is_accounted_for_and_no_text_is_a_control_token(family, vocabularies, text):
    vocabulary = vocabularies[family]
    ids = vocabulary.encode(text)
    sizes = vocabulary.token_bytes()[ids]
    assert (sizes > 0).all()
    assert not {vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id} & set(ids)
    decoded = vocabulary.decode(ids)
    if family == "llama_3":
        assert decoded == text
    if family in BYTE_LEVEL:
        assert sizes.sum() == len(decoded.encode("utf-8"))
    else:  # the space before every text is not part of it
        assert sizes.sum() == len(decoded.encode("utf-8")) + (text != "")
    same_ids, offsets = vocabulary.encode_with_offsets(text)
    assert same_ids == ids
    covered = {place for begin, end in offsets for place in range(begin, end)}
    assert covered == set(range(len(text))) or family in ("gpt_neox", "qwen")  # NFC moves what it composes
    assert all(begin < end for begin, end in offsets) or text == ""


def test_merges_that_would_make_a_control_token_are_left_out(directories, tmp_path):
    """A conversion may have made them of the vocabulary, which holds control tokens like any other piece."""
    content = json.loads((directories["llama_2"] / "tokenizer.json").read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    new = [piece for piece in ("<", "/", ">", "s>", "</") if piece not in vocab]
    vocab |= {piece: len(vocab) + number for number, piece in enumerate(new)}
    merges[:0] = [["s", ">"], ["<", "s>"], ["<", "/"], ["</", "s>"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(directories["llama_2"] / "tokenizer_config.json", tmp_path)
    vocabulary = load_vocabulary(tmp_path)
    assert Tokenizer.from_str(json.dumps(content | {"added_tokens": []})).encode("a</s><s>").ids[-2:] == [2, 1]
    assert [vocabulary.piece(token) for token in vocabulary.encode("a</s><s>")[-4:]] == ["</", "s>", "<", "s>"]


@any_family
def test_spans_mark_the_tokens_that_overlap_them(family, vocabularies):
    vocabulary = vocabularies[family]
    document = tokenize_document("The quick 漢 brown fox", [[10, 11], [18, 21]], vocabulary)
    assert (document.tokens[0], document.tokens[-1]) == (vocabulary.bos_id, vocabulary.eos_id)
    noise, clean = (vocabulary.decode(document.tokens[document.noise == wanted]) for wanted in (True, False))
    assert "漢" in noise and "fox" in noise and "quick" not in noise
    assert "漢" not in clean and "x" not in clean and "quick" in clean


@any_family
def test_pieces_are_readable_and_ids_beyond_them_say_nothing(family, vocabularies):
    vocabulary = vocabularies[family]
    assert all(vocabulary.piece(token) for token in range(vocabulary.size))
    text = "The fox 漢 café"
    pieces = [vocabulary.piece(token) for token in vocabulary.encode(text)]
    parts = [piece for piece in pieces if piece.startswith("<0x")]  # of a character
    assert all(piece.strip("▁") in text for piece in pieces if piece not in parts)
    assert len(parts) in (0, 3) and "▁fox" in pieces
    control = [vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id]
    assert vocabulary.token_bytes()[control].sum() == 0 and len(vocabulary.token_bytes()) == vocabulary.size
    ids = [
        vocabulary.bos_id,
        *vocabulary.encode("a b"),
        vocabulary.eos_id,
        vocabulary.size + 7,
    ]  # of a padded embedding
    assert vocabulary.decode(np.array(ids)) == "a b"


@any_family
def test_it_is_found_wherever_it_lies_and_saved_whole(family, directories, vocabularies, tmp_path):
    vocabulary = vocabularies[family]
    vocabulary.save(tmp_path / "model" / "vocabulary")
    for path in (directories[family] / "tokenizer.json", tmp_path / "model", tmp_path / "model" / "vocabulary"):
        found = load_vocabulary(path)
        assert isinstance(found, HuggingFaceVocabulary) and found.content_hash == vocabulary.content_hash
        assert found.encode(STORY) == vocabulary.encode(STORY)
        assert (found.bos_id, found.eos_id, found.pad_id) == (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        kept = (tmp_path / "model" / "vocabulary" / name).read_bytes()
        assert kept == (directories[family] / name).read_bytes()


def test_the_hash_is_that_of_the_content(directories, vocabularies, tmp_path):
    """Not of the file: what newer versions of the library write more, or of padding and the like, is the same."""
    written = json.loads((directories["llama_3"] / "tokenizer.json").read_text())
    older = json.loads(json.dumps(written))
    older["model"]["merges"] = [" ".join(pair) for pair in older["model"]["merges"]]
    older["model"] = {name: value for name, value in older["model"].items() if value not in (None, False)}
    older |= {"padding": {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "!"}, "post_processor": None}  # fmt: skip
    other = json.loads(json.dumps(written))
    other["model"]["merges"].pop()
    for name, content in (("older", older), ("other", other)):
        shutil.copytree(directories["llama_3"], tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content, indent=1))
    vocabulary, again = vocabularies["llama_3"], load_vocabulary(tmp_path / "older")
    assert again.content_hash == vocabulary.content_hash and again.encode(STORY) == vocabulary.encode(STORY)
    assert load_vocabulary(tmp_path / "other").content_hash != vocabulary.content_hash
    names = json.loads((tmp_path / "older" / "tokenizer_config.json").read_text()) | {"eos_token": "<|eot_id|>"}
    (tmp_path / "older" / "tokenizer_config.json").write_text(json.dumps(names))
    assert load_vocabulary(tmp_path / "older").content_hash != vocabulary.content_hash
    assert len({vocabulary.content_hash for vocabulary in vocabularies.values()}) == len(FAMILIES)


def test_bos_and_eos_may_be_named_by_number(directories, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((directories["qwen"] / "tokenizer.json").read_bytes())
    known = load_vocabulary(directories["qwen"])
    numbers = {"eos_token_id": [known.pad_id, known.eos_id], "bos_token_id": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(numbers))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": known.eos_id, "eos_token_id": 3}))
    vocabulary = load_vocabulary(tmp_path)
    assert (vocabulary.bos_id, vocabulary.eos_id) == (known.eos_id, known.pad_id)


def test_what_cannot_be_read_is_refused(directories, tmp_path):
    def with_(code, change, family="llama_3") -> str:
        directory = tmp_path / "changed"
        shutil.copytree(directories[family], directory, dirs_exist_ok=True)
        content = json.loads((directory / "tokenizer.json").read_text())
        change(content, content["model"])
        (directory / "tokenizer.json").write_text(json.dumps(content))
        line = refused(code, load_vocabulary, directory)
        assert line.startswith(f"{directory}/tokenizer.json")
        return line

    assert "Unigram" in with_("vocabulary-unknown-kind", lambda _, model: model.update(type="Unigram"))
    assert "WordPiece" in with_("vocabulary-unknown-kind", lambda _, model: model.update(type="WordPiece"))
    with_("vocabulary-incomplete", lambda _, model: model["vocab"].pop("Ġ"))
    with_("vocabulary-incomplete", lambda _, model: model.update(byte_fallback=False), "llama_2")
    with_("vocabulary-incomplete", lambda _, model: model["vocab"].pop("<0xF4>"), "llama_2")
    with_("vocabulary-damaged", lambda content, _: content.update(normalizer={"type": "Magic"}))
    with_("vocabulary-damaged", lambda content, _: content.update(model=[]))

    def a_word_is_special(content, model):
        assert model["ignore_merges"]
        word = next(piece for piece in model["vocab"] if len(piece) > 1 and piece.isascii() and piece.isalpha())
        content["added_tokens"].append({**content["added_tokens"][0], "content": word, "id": model["vocab"][word]})

    with_("vocabulary-control-token", a_word_is_special)
    shutil.copy(directories["llama_3"] / "tokenizer.json", tmp_path)
    assert str(tmp_path) in refused("vocabulary-no-eos", load_vocabulary, tmp_path)
    assert "nothing.json" in refused("vocabulary-not-found", load_vocabulary, tmp_path / "nothing.json")
    vocabulary = load_vocabulary(directories["llama_3"])
    vocabulary.save(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_bytes((directories["qwen"] / "tokenizer.json").read_bytes())
    assert str(tmp_path / "saved") in refused("vocabulary-damaged", load_vocabulary, tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refused("vocabulary-damaged", load_vocabulary, tmp_path / "saved")


def test_bytes_that_a_vocabulary_lacks_are_counted_where_they_occur(directories, tmp_path):
    """SmolLM2 has pieces for 235 of the 256 bytes; the others never or hardly ever occur in UTF-8."""
    content = json.loads((directories["llama_3"] / "tokenizer.json").read_text())
    lacking = [0x00, 0x1B, 0xC0, 0xC1, 0xF1, 0xF2, 0xF3, *range(0xF4, 0x100)]
    names = [character for character, byte in BYTE_CHARACTERS.items() if byte in lacking]
    last = max(content["model"]["vocab"].values())
    for number, name in enumerate(names):  # their ids stay, with pieces that no text spells
        content["model"]["vocab"][f"unused {number}"] = content["model"]["vocab"].pop(name)
    assert max(content["model"]["vocab"].values()) == last
    shutil.copytree(directories["llama_3"], tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content))
    whole, lacks = load_vocabulary(directories["llama_3"]), load_vocabulary(tmp_path / "model")
    for text in [*HARD[:9], HARD[10]]:
        assert lacks.encode(text) == whole.encode(text) and lacks.unspelled(text) == whole.unspelled(text) == ""
    rare = "\U000e0000"  # F3 A0 80 80
    text = f"one\x00 two {rare}{rare} three 😀"
    assert lacks.unspelled(text) == f"\x00{rare}{rare}" and whole.unspelled(text) == ""
    assert len(lacks.encode(text)) == len(whole.encode(text)) - 3  # the three bytes, and nothing else
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (text, "four \x00", "five")))
    config = VocabularyConfig(path=str(tmp_path / "model"))
    made = prepare(tmp_path / "corpus", [Source("s", [str(tmp_path / "a.jsonl")])], config, 64, processes=1)
    assert made.manifest["unspelled"] == {"U+0000": 2, "U+E0000": 2}
    config = VocabularyConfig(path=str(directories["llama_3"]))
    made = prepare(tmp_path / "whole", [Source("s", [str(tmp_path / "a.jsonl")])], config, 64, processes=1)
    assert "unspelled" not in made.manifest


@pytest.mark.parametrize("family", ["gpt_neox", "llama_2"])
def test_seqio_has_the_same_ids(family, vocabularies):
    vocabulary = vocabularies[family]
    theirs = to_seqio_vocabulary(vocabulary)
    assert (theirs.bos_id, theirs.eos_id, theirs.pad_id) == (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
    assert theirs.vocab_size == vocabulary.size
    ids = vocabulary.encode(STORY)
    assert list(theirs.encode(STORY)) == ids == np.array(theirs.encode_tf(STORY)).tolist()
    assert theirs.decode(ids) == vocabulary.decode(ids) == theirs.decode_tf(np.array(ids)).numpy().decode()


OURS = {
    "bytes": ByteVocabulary(),
    "sentencepiece": train_sentencepiece(TEXTS, 400),
    "sentencepiece of Llama": SentencePieceVocabulary(sentencepiece_of_llama()),
}


@pytest.mark.parametrize("name", OURS)
def test_any_vocabulary_can_be_given_to_transformers(name, tmp_path):
    """The ids stay what they are there, and an import knows the vocabulary again."""
    vocabulary = OURS[name]
    for file, content in tokenizer_files(vocabulary).items():
        (tmp_path / file).write_bytes(content)
    assert load_vocabulary(tmp_path).content_hash == vocabulary.content_hash
    (tmp_path / "vocabulary.json").unlink()
    as_theirs = load_vocabulary(tmp_path)
    assert isinstance(as_theirs, HuggingFaceVocabulary) and as_theirs.size == vocabulary.size
    np.testing.assert_array_equal(as_theirs.token_bytes(), vocabulary.token_bytes())
    for text in [*HARD, SPECIAL]:
        ids = vocabulary.encode(text)
        assert as_theirs.encode(text) == ids and as_theirs.decode(ids) == vocabulary.decode(ids) == text
        assert as_theirs.encode_with_offsets(text)[1] == vocabulary.encode_with_offsets(text)[1]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HARD, SPECIAL]:
        ids = vocabulary.encode(text)
        assert theirs.encode(text, split_special_tokens=True) == [vocabulary.bos_id, *ids]
        assert theirs.decode(ids) == text


@any_family
def test_an_exported_tokenizer_puts_bos_first(family, vocabularies, tmp_path):
    """As in training, also where it had none of its own; without special tokens the ids stay what they are."""
    vocabulary = vocabularies[family]
    for file, content in tokenizer_files(vocabulary).items():
        (tmp_path / file).write_bytes(content)
    assert load_vocabulary(tmp_path).content_hash == vocabulary.content_hash
    expected = [vocabulary.bos_id, *vocabulary.encode(STORY)]
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(STORY).ids == expected
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(STORY)["input_ids"] == expected
    assert theirs.encode(STORY, add_special_tokens=False) == expected[1:]


def test_a_directory_with_a_sentencepiece_model(directories, tmp_path):
    """Read by SentencePiece itself: as transformers reads it, where no text begins with a space."""
    ours = OURS["sentencepiece of Llama"]
    (tmp_path / "tokenizer.model").write_bytes(ours.model)
    vocabulary = load_vocabulary(tmp_path)
    assert vocabulary.content_hash == ours.content_hash
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HARD, SPECIAL]:
        if not text.startswith(" "):
            ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert vocabulary.encode(text) == ids, text[:50]
    shutil.copy(directories["llama_2"] / "tokenizer.json", tmp_path)  # which transformers would read first
    assert load_vocabulary(tmp_path).kind == "huggingface"

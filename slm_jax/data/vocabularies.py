"""Vocabularies: text to ids and back, without TensorFlow; training a SentencePiece vocabulary.

A vocabulary is lossless when `decode(encode(text)) == text` for every text. Bytes are; so is every vocabulary that
`train_sentencepiece` makes. A `.model` file from elsewhere may normalise the text, as its author decided.
"""

import hashlib
import io
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, SupportsIndex, runtime_checkable

import gin
import numpy as np
import sentencepiece
from jaxtyping import Int

from slm_jax.data.store import Store
from slm_jax.errors import UserError

if TYPE_CHECKING:
    import seqio

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece

MODEL_FILE = "sentencepiece.model"
DESCRIPTION_FILE = "vocabulary.json"
_TAKEN = "a .model or tokenizer.json file, a corpus, a model directory, or a saved vocabulary"


@gin.configurable
@dataclass(frozen=True)
class VocabularyConfig:
    """The vocabulary of a corpus.

    Attributes:
      path: a corpus, a model directory (of a run, an import, or Hugging Face), a directory written by `save`, a
        SentencePiece `.model` file or a `tokenizer.json`; None trains one, or uses bytes.
      kind: 'sentencepiece' or 'bytes'; used only if `path` is None.
      size: number of ids of a vocabulary to train.
      train_characters: how many characters of the corpus to train on, in a random but reproducible order of documents.
    """

    path: str | None = None
    kind: str = "sentencepiece"
    size: int = 2048
    train_characters: int = 20_000_000


@runtime_checkable
class Vocabulary(Protocol):
    """What the project asks of a vocabulary. `encode` adds no BOS and no EOS; ids are in [0, size)."""

    kind: str
    size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int | None
    content_hash: str

    def encode(self, text: str) -> list[int]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Also the [begin, end) characters of `text` each id stands for; all bytes of one character share its span."""
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids`; control ids (padding, BOS, EOS) give nothing."""
        ...

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        """UTF-8 bytes each id stands for, 0 for control ids: bits per byte = loss sum / ln 2 / sum(token_bytes)."""
        ...

    def piece(self, token: SupportsIndex) -> str:
        """A readable form of one id."""
        ...

    def files(self) -> dict[str, bytes]:
        """Name -> content of the files that `save` writes and `load_vocabulary` reads."""
        ...

    def save(self, directory: str | os.PathLike) -> None: ...


class ByteVocabulary:
    """Every UTF-8 byte is an id: 0 padding, 1 BOS, 2 EOS, byte b is 3 + b."""

    kind: str = "bytes"
    size: int = 259
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int | None = None
    _first = 3

    def __init__(self):
        self.content_hash = hashlib.sha256(b"bytes: pad 0, bos 1, eos 2, first byte 3").hexdigest()

    def encode(self, text: str) -> list[int]:
        return [self._first + byte for byte in text.encode("utf-8")]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        offsets = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode("utf-8")]
        return self.encode(text), offsets

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return bytes(i - self._first for i in map(int, ids) if i >= self._first).decode("utf-8", errors="replace")

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        return (np.arange(self.size) >= self._first).astype(np.int64)

    def piece(self, token: SupportsIndex) -> str:
        byte = int(token) - self._first
        if byte < 0:
            return ("<pad>", "<s>", "</s>")[token]
        return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"

    def files(self) -> dict[str, bytes]:
        return _files(self, {})

    def save(self, directory: str | os.PathLike) -> None:
        _save(self, directory)


class SentencePieceVocabulary:
    """A SentencePiece model, held as the bytes of its `.model` file."""

    kind: str = "sentencepiece"

    def __init__(self, model: bytes, name: str = "the SentencePiece model"):
        """`name` is what an error message calls the model."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{name} is not a SentencePiece model: pass the .model file that was trained") from error
        self.model = model
        self.size: int = self._processor.get_piece_size()
        self.content_hash = hashlib.sha256(model).hexdigest()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.unk_id: int | None = self._processor.unk_id()
        # Padding is never looked at, so a model without it (Llama's) pads with its unknown id.
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self._processor.unk_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{name} has no BOS or no EOS piece: train it with bos_id and eos_id")
        self._space_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode("utf-8")]
        self._byte_fallback = all(self._processor.is_byte(i) for i in self._space_ids)

    def encode(self, text: str) -> list[int]:
        if not self._byte_fallback or SPACE not in text:
            return self._processor.encode(text)
        # SentencePiece would turn a literal U+2581 into a space; as bytes it survives.
        first, *rest = [self._processor.encode(part) for part in text.split(SPACE)]
        return first + [i for part in rest for i in (*self._space_ids, *part)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets, begin = [], [], 0
        parts = text.split(SPACE) if self._byte_fallback else [text]
        for number, part in enumerate(parts):
            if number:
                ids += self._space_ids
                offsets += [(begin, begin + 1)] * len(self._space_ids)
                begin += 1
            first = len(offsets)
            # The pieces' own begin and end count bytes or characters, by version; their surfaces make up the text, but
            # for spaces before and behind it, which some models take away.
            pieces = self._processor.encode(part, return_type="proto").pieces
            end, begin = begin + len(part), begin + max(0, part.find("".join(piece.surface for piece in pieces)))
            for piece in pieces:
                ids.append(piece.id)
                offsets.append((begin, begin + len(piece.surface)))
                begin = offsets[-1][1]
            # A character that fell back to bytes is given to the last of them only: give it to all.
            for i in reversed(range(first, len(offsets) - 1)):
                if offsets[i][0] == offsets[i][1]:
                    offsets[i] = offsets[i + 1]
            begin = end
        return ids, offsets

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        return np.array([self._bytes_of(i) for i in range(self.size)], np.int64)

    def _bytes_of(self, token: int) -> int:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return 0
        if self._processor.is_byte(token):
            return 1
        return len(self._processor.id_to_piece(token).replace(SPACE, " ").encode("utf-8"))

    def piece(self, token: SupportsIndex) -> str:
        return self._processor.id_to_piece(int(token))

    def files(self) -> dict[str, bytes]:
        return _files(self, {MODEL_FILE: self.model})

    def save(self, directory: str | os.PathLike) -> None:
        _save(self, directory)


def _files(vocabulary: Vocabulary, more: dict[str, bytes]) -> dict[str, bytes]:
    description = {"kind": vocabulary.kind, "size": vocabulary.size, "content_hash": vocabulary.content_hash}
    # The description comes last: where it lies, the rest lies too.
    return {**more, DESCRIPTION_FILE: (json.dumps(description, indent=2) + "\n").encode("utf-8")}


def _save(vocabulary: Vocabulary, directory: str | os.PathLike) -> None:
    store = Store(directory)
    for name, content in vocabulary.files().items():
        store.write(name, content)


def load_vocabulary(path: str | os.PathLike) -> Vocabulary:
    """The vocabulary at `path`: a corpus, a model directory or a directory (or gs://, s3:// URL) written by `save`; a
    SentencePiece `.model` file; a `tokenizer.json`, or a directory of Hugging Face that holds one or a tokenizer.model.

    Raises:
        UserError: nothing there, or damaged.
    """
    path = os.fspath(path)
    if path.endswith(".model"):
        try:
            return SentencePieceVocabulary(pathlib.Path(path).expanduser().read_bytes(), path)
        except OSError as error:
            raise UserError(f"vocabulary {path}: {error.strerror}; pass {_TAKEN}") from error
    if path.endswith(".json"):
        from slm_jax.data.huggingface_vocabulary import read_vocabulary

        if vocabulary := read_vocabulary(Store(os.path.dirname(path) or "."), os.path.basename(path)):
            return vocabulary
        raise UserError(f"vocabulary {path}: no such file; pass {_TAKEN}")
    store = Store(path)
    if (local := store.local()) is not None and not local.is_dir():
        raise UserError(f"vocabulary {path}: no such directory; pass {_TAKEN}")
    for directory in ("", "vocabulary/"):
        if description := store.read_json(directory + DESCRIPTION_FILE):
            return _from_files(description, Store(f"{path}/{directory}"), f"{path}/{directory}".rstrip("/"))
    return _from_elsewhere(store)


def _from_files(description: dict, store: Store, where: str) -> Vocabulary:
    kind = description.get("kind")
    if kind == "bytes":
        vocabulary = ByteVocabulary()
    elif kind == "sentencepiece":
        vocabulary = SentencePieceVocabulary(store.read(MODEL_FILE) or b"", f"{where}/{MODEL_FILE}")
    elif kind == "huggingface":
        from slm_jax.data.huggingface_vocabulary import TOKENIZER_FILE, read_vocabulary

        vocabulary = read_vocabulary(store, description=description)
        if vocabulary is None:
            raise UserError(f"vocabulary {where}: lost its {TOKENIZER_FILE}; restore it or make it again")
    else:
        known = "sentencepiece, huggingface, bytes"
        raise UserError(f"vocabulary {where}: kind {kind!r} is not known to this version ({known})")
    if vocabulary.content_hash != description.get("content_hash"):
        raise UserError(f"vocabulary {where}: its content changed since it was saved; restore it or make it again")
    return vocabulary


def _from_elsewhere(store: Store) -> Vocabulary:
    """Of a directory of Hugging Face: what transformers would read first."""
    from slm_jax.data.huggingface_vocabulary import read_vocabulary

    if vocabulary := read_vocabulary(store):
        return vocabulary
    if model := store.read("tokenizer.model"):
        return SentencePieceVocabulary(model, f"{store.path}/tokenizer.model")
    raise UserError(
        f"vocabulary {store.path}: holds no {DESCRIPTION_FILE}, tokenizer.json or tokenizer.model; pass {_TAKEN}"
    )


def train_sentencepiece(
    texts: Iterable[str], size: int, path: str | os.PathLike | None = None
) -> SentencePieceVocabulary:
    """Trains a lossless BPE vocabulary: byte fallback, single digits, newlines and runs of spaces as they stand.

    The same texts in the same order give the same model.
    Ids: 0 padding, 1 unknown (never used), 2 BOS, 3 EOS, 4 newline.

    Args:
        texts: documents.
        size: number of ids.
        path: also write the `.model` file there.

    Raises:
        UserError: no text, or `size` too small or too large for it; the message names the limit.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=1 << 30,  # the default silently drops every text above 4192 bytes
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), size) from error
    vocabulary = SentencePieceVocabulary(model.getvalue())
    if path is not None:
        pathlib.Path(path).write_bytes(vocabulary.model)
    return vocabulary


def _training_error(message: str, size: int) -> Exception:
    if found := re.search(r"less than or equal to (\d+)|value <= (\d+)", message):
        largest = found[1] or found[2]
        return UserError(f"vocabulary size {size} is too large for this text: the largest possible is {largest}")
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(f"vocabulary size {size} is too small: bytes and characters of this text need {found[1]}")
    if "sentences_.empty()" in message:
        return UserError("no text to train a vocabulary on: all documents are empty")
    return RuntimeError(message)


def to_seqio(vocabulary: Vocabulary) -> "seqio.Vocabulary":
    """The same vocabulary, id for id, for seqio Tasks. Imports TensorFlow."""
    import seqio

    if vocabulary.kind == "bytes":

        class Bytes(seqio.ByteVocabulary):  # seqio's has no BOS, and EOS where ours has BOS
            bos_id = property(lambda self: vocabulary.bos_id)
            eos_id = property(lambda self: vocabulary.eos_id)
            unk_id = property(lambda self: None)

        return Bytes()
    if vocabulary.kind == "huggingface":
        return _seqio_of(vocabulary)
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / MODEL_FILE
        path.write_bytes(vocabulary.files()[MODEL_FILE])
        result = seqio.SentencePieceVocabulary(str(path))
        result.load_model()  # keeps the content, so the file may go
    return result


def _seqio_of(vocabulary: Vocabulary) -> "seqio.Vocabulary":
    """Encodes in Python also within tf.data: nothing of TensorFlow reads a tokenizer.json."""
    import seqio
    import tensorflow as tf

    class HuggingFace(seqio.Vocabulary):
        bos_id = property(lambda self: vocabulary.bos_id)
        eos_id = property(lambda self: vocabulary.eos_id)
        unk_id = property(lambda self: vocabulary.unk_id)
        pad_id = property(lambda self: vocabulary.pad_id)
        _base_vocab_size = property(lambda self: vocabulary.size)

        def _encode(self, s):
            return vocabulary.encode(s)

        def _decode(self, ids):
            return vocabulary.decode(ids)

        def _encode_tf(self, s):
            def ids(s):
                return np.array(vocabulary.encode(s.numpy().decode("utf-8")), np.int32)

            return tf.ensure_shape(tf.py_function(ids, [s], tf.int32), [None])

        def _decode_tf(self, ids):
            return tf.ensure_shape(tf.py_function(lambda ids: vocabulary.decode(ids.numpy()), [ids], tf.string), [])

    return HuggingFace()

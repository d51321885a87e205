"""A vocabulary maps text to ids and back. The byte vocabulary is here, each other kind has its own file;
`slm_jax.data.vocabularies.load_vocabulary` loads any of them.

A vocabulary is lossless when `decode(encode(text)) == text` for every text. Bytes are, and so is every vocabulary that
`train_sentencepiece` makes. A model from elsewhere may normalise the text.
"""

import abc
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int

from slm_jax.data.store import Store

DESCRIPTION_FILE = "vocabulary.json"
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class Vocabulary(abc.ABC):
    """Maps text to ids in [0, size) and back.

    Attributes:
        kind: 'bytes', 'sentencepiece' or 'huggingface'.
        size: number of ids.
        bos_id: id that begins a document.
        eos_id: id that ends a document.
        pad_id: id of padding.
        unk_id: id of what the vocabulary cannot write; None where no id means unknown.
        content_hash: equal for vocabularies that give the same ids.
    """

    kind: str
    size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int | None
    content_hash: str

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS."""

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        """`encode` of several texts, as arrays; faster if the library encodes batches."""
        return [np.array(self.encode(text), np.int32) for text in texts]

    @abc.abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and the characters [begin, end) of each; all bytes of one character share its span."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids`; control ids (padding, BOS, EOS) add nothing."""

    @abc.abstractmethod
    def token_bytes(self) -> Int[np.ndarray, "V"]:
        """UTF-8 bytes of each id, 0 for control ids: bits per byte = loss sum / ln 2 / sum(token_bytes)."""

    @abc.abstractmethod
    def piece(self, token: SupportsIndex) -> str:
        """A readable form of one id."""

    def control_id(self, text: str) -> int | None:
        """The control token written as `text`, such as "<|im_start|>", or None. `encode` never returns it."""
        return None

    def unspelled(self, text: str) -> str:
        """The characters of `text` that no id spells, which `encode` therefore drops."""
        return ""

    def description(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": self.size, "content_hash": self.content_hash}

    def model_files(self) -> dict[str, bytes]:
        """Name -> content of the files that define the vocabulary."""
        return {}

    def files(self) -> dict[str, bytes]:
        """Name -> content of what `save` writes. The description comes last: if it is there, the others are."""
        description = json.dumps(self.description(), indent=2) + "\n"
        return {**self.model_files(), DESCRIPTION_FILE: description.encode("utf-8")}

    def save(self, directory: str | os.PathLike) -> None:
        store = Store(directory)
        for name, content in self.files().items():
            store.write(name, content)


class ByteVocabulary(Vocabulary):
    """Every UTF-8 byte is an id: 0 padding, 1 BOS, 2 EOS, byte b is 3 + b."""

    kind, size, pad_id, bos_id, eos_id, unk_id = "bytes", 259, 0, 1, 2, None
    content_hash = hashlib.sha256(b"bytes: pad 0, bos 1, eos 2, first byte 3").hexdigest()
    _first = 3

    def encode(self, text: str) -> list[int]:
        return [self._first + byte for byte in text.encode("utf-8")]

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + self._first for text in texts]

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

"""SentencePiece vocabularies: read from a `.model` file or a `tokenizer.bin` of llama2.c, or trained on a text."""

import hashlib
import io
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import sentencepiece
from jaxtyping import Int

from slm_jax.data.vocabulary import SPACE, Vocabulary
from slm_jax.errors import UserError

MODEL_FILE = "sentencepiece.model"
_BIN_TOKEN = struct.Struct("<fI")
_BIN_CONTROL = {0: "<unk>", 1: "<s>", 2: "</s>"}
_BIN_FIRST_BYTE = 3


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model, held as the bytes of its `.model` file."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "the SentencePiece model"):
        """Error messages call the model `name`."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                "vocabulary-not-sentencepiece",
                f"{name} is not a SentencePiece model: pass the .model file that the training wrote",
            ) from error
        self.model = model
        self.size = self._processor.get_piece_size()
        self.content_hash = hashlib.sha256(model).hexdigest()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.unk_id = self._processor.unk_id()
        # Padding is never read, so a model without it (Llama's) pads with its unknown id.
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self._processor.unk_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(
                "vocabulary-no-eos", f"{name} has no BOS or no EOS piece: train it with a bos_id and an eos_id"
            )
        # SentencePiece reads a literal U+2581 as a space. Written in bytes it survives, but the text must be cut there,
        # and a model that puts a space before a text would put one before each part: there we keep SentencePiece's ids.
        space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode("utf-8")]
        adds_no_space = SPACE not in "".join(self._processor.encode("a", out_type=str))
        self._space_ids = space if adds_no_space and all(map(self._processor.is_byte, space)) else []

    def encode(self, text: str) -> list[int]:
        if not self._space_ids or SPACE not in text:
            return self._processor.encode(text)
        first, *rest = [self._processor.encode(part) for part in text.split(SPACE)]
        return first + [i for part in rest for i in (*self._space_ids, *part)]

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        found = self._processor.encode(list(texts), out_type="numpy", num_threads=1)
        for number, text in enumerate(texts):
            if self._space_ids and SPACE in text:
                found[number] = np.array(self.encode(text), np.int32)
        return found

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets, begin = [], [], 0
        for number, part in enumerate(text.split(SPACE) if self._space_ids else [text]):
            if number:
                ids += self._space_ids
                offsets += [(begin, begin + 1)] * len(self._space_ids)
                begin += 1
            first = len(offsets)
            # Depending on the version, begin and end of a piece count bytes or characters. Its surface is reliable: the
            # surfaces make up the text, except for spaces at its ends that some models remove.
            pieces = self._processor.encode(part, return_type="proto").pieces
            end, begin = begin + len(part), begin + max(0, part.find("".join(piece.surface for piece in pieces)))
            for piece in pieces:
                ids.append(piece.id)
                offsets.append((begin, begin + len(piece.surface)))
                begin = offsets[-1][1]
            # Only the last byte of a character that fell back to bytes has a surface: all of them share its span.
            for i in reversed(range(first, len(offsets) - 1)):
                if offsets[i][0] == offsets[i][1]:
                    offsets[i] = offsets[i + 1]
            begin = end
        return ids, offsets

    def control_id(self, text: str) -> int | None:
        token = self._processor.piece_to_id(text)
        return token if self._processor.is_control(token) else None

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        def bytes_of(token: int) -> int:
            if self._processor.is_control(token) or self._processor.is_unknown(token):
                return 0
            if self._processor.is_byte(token):
                return 1
            return len(self._processor.id_to_piece(token).replace(SPACE, " ").encode("utf-8"))

        return np.array([bytes_of(token) for token in range(self.size)], np.int64)

    def piece(self, token: SupportsIndex) -> str:
        return self._processor.id_to_piece(int(token))

    def model_files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self.model}


def train_sentencepiece(
    texts: Iterable[str], size: int, path: str | os.PathLike | None = None
) -> SentencePieceVocabulary:
    """Trains a lossless BPE vocabulary: byte fallback, single digits, newlines and runs of spaces kept as they are.

    The same texts in the same order give the same model.
    Ids: 0 padding, 1 unknown (never used), 2 BOS, 3 EOS, 4 newline.

    Args:
        texts: documents.
        size: number of ids.
        path: if given, where to write the `.model` file.

    Raises:
        UserError: no text, or a `size` that this text does not allow; the message names the limit.
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
        message, why = str(error), ""
        if found := re.search(r"less than or equal to (\d+)|value <= (\d+)", message):
            why = f"is too large for this text: the largest possible is {found[1] or found[2]}"
        elif found := re.search(r"required_chars\. \d+ vs (\d+)", message):
            why = f"is too small: bytes and characters of this text need {found[1]}"
        elif "sentences_.empty()" in message:
            raise UserError("vocabulary-no-text", "no text to train a vocabulary on: all are empty") from error
        if not why:
            raise
        raise UserError("vocabulary-size", f"vocabulary size {size} {why}") from error
    vocabulary = SentencePieceVocabulary(model.getvalue())
    if path is not None:
        pathlib.Path(path).write_bytes(vocabulary.model)
    return vocabulary


def read_tokenizer_bin(path: pathlib.Path) -> SentencePieceVocabulary:
    """The vocabulary of a `tokenizer.bin` of llama2.c, id for id, as the SentencePiece model that it was made from.

    The file holds the bytes of its longest token (32 bits), then for each token a score (float32), its number of bytes
    (32 bits), and the bytes. Unlike a `.model` file it does not mark control tokens and bytes: Llama's order tells
    them, 0 unknown, 1 BOS, 2 EOS, then the 256 bytes.

    Raises:
        UserError: it is missing, damaged, or not a tokenizer of Llama's kind.
    """
    from sentencepiece import sentencepiece_model_pb2

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            "vocabulary-not-found", f"vocabulary {path}: {error.strerror}; pass the tokenizer.bin or tokenizer.model"
        ) from error
    tokens, at = [], 4
    try:
        while at < len(content):
            score, length = _BIN_TOKEN.unpack_from(content, at)
            at += _BIN_TOKEN.size + length
            if at > len(content):
                raise ValueError(at)
            tokens.append((score, content[at - length : at].decode("utf-8")))
    except (struct.error, ValueError) as error:
        raise UserError(
            "vocabulary-damaged", f"{path} is no tokenizer.bin of llama2.c, or damaged: pass the one of its model"
        ) from error
    if len(tokens) < _BIN_FIRST_BYTE + 256:
        raise UserError(
            "vocabulary-damaged",
            f"{path} is no tokenizer.bin of llama2.c: it has {len(tokens)} tokens, fewer than there are bytes",
        )
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = proto.SentencePiece
    for token, (score, text) in enumerate(tokens):
        byte = token - _BIN_FIRST_BYTE
        if token in _BIN_CONTROL:
            piece, kind = _BIN_CONTROL[token], kinds.CONTROL if token else kinds.UNKNOWN
        elif byte < 256:
            piece, kind = f"<0x{byte:02X}>", kinds.BYTE
            if text not in (piece, chr(byte)):  # versions of the format differ in how they write bytes
                raise UserError(
                    "vocabulary-damaged",
                    f"{path}: token {token} is {text!r}, not the byte {byte}: it is no tokenizer of Llama's kind",
                )
        else:
            piece, kind = text.replace(" ", SPACE), kinds.NORMAL
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return SentencePieceVocabulary(proto.SerializeToString(), str(path))

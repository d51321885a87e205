"""The `tokenizer.bin` of llama2.c as the SentencePiece vocabulary that it was made of.

The file is the bytes of its longest token (32 bits), then for each token a score (float32), the number of its bytes
(32 bits) and these. It says less than a `.model` file: which tokens are control tokens or bytes is known by their
place, as Llama has them: 0 unknown, 1 BOS, 2 EOS, and then the 256 bytes.
"""

import struct
from pathlib import Path

from slm_jax.data.vocabularies import SPACE, SentencePieceVocabulary
from slm_jax.errors import UserError

_TOKEN = struct.Struct("<fI")
_CONTROL = {0: "<unk>", 1: "<s>", 2: "</s>"}
_FIRST_BYTE = 3


def read_tokenizer_bin(path: Path) -> SentencePieceVocabulary:
    """The vocabulary of a `tokenizer.bin`, id for id.

    Raises:
        UserError: it is missing, damaged, or not of Llama's kind.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = proto.SentencePiece
    special = {0: kinds.UNKNOWN, 1: kinds.CONTROL, 2: kinds.CONTROL}
    for token, (score, content) in enumerate(_tokens(path)):
        byte = token - _FIRST_BYTE
        if token in _CONTROL:
            piece, kind = _CONTROL[token], special[token]
        elif byte < 256:
            piece, kind = f"<0x{byte:02X}>", kinds.BYTE
            if content not in (piece, chr(byte)):  # its versions differ in how they write them
                raise UserError(
                    f"{path}: token {token} is {content!r}, not the byte {byte}: no tokenizer of Llama's kind"
                )
        else:
            piece, kind = content.replace(" ", SPACE), kinds.NORMAL
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return SentencePieceVocabulary(proto.SerializeToString(), str(path))


def _tokens(path: Path) -> list[tuple[float, str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"vocabulary {path}: {error.strerror}; pass the tokenizer.bin or tokenizer.model") from error
    found, at = [], 4
    try:
        while at < len(content):
            score, length = _TOKEN.unpack_from(content, at)
            at += _TOKEN.size + length
            if at > len(content):
                raise ValueError(at)
            found.append((score, content[at - length : at].decode("utf-8")))
    except (struct.error, ValueError) as error:
        raise UserError(
            f"{path} is no tokenizer.bin of llama2.c, or damaged: pass the one its model came with"
        ) from error
    if len(found) < _FIRST_BYTE + 256:
        raise UserError(f"{path} is no tokenizer.bin of llama2.c: it has {len(found)} tokens")
    return found

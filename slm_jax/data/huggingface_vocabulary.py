"""A vocabulary from a `tokenizer.json` of Hugging Face: byte-level BPE (Llama 3, Qwen, GPT-NeoX) and BPE with byte
fallback (Llama 2, TinyLlama, Mistral).

Text cannot say control tokens. Those that `tokenizer.json` marks as special, and BOS, EOS and padding, are never looked
for in a text: "</s>" within a document is four characters, as with `split_special_tokens` of transformers. Added tokens
that are not special (GPT-NeoX's runs of spaces) are ordinary vocabulary and are found.

BOS, EOS, padding and unknown are those that `tokenizer_config.json` beside it names, else `special_tokens_map.json`,
else by their numbers `generation_config.json` and `config.json`. Where there is no BOS (Qwen), EOS stands in its place,
as between the documents that such models were trained on; GPT-NeoX names one token as both. Padding that nothing names
is unknown, else EOS: it is never looked at.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from jaxtyping import Int

from slm_jax.data.store import Store
from slm_jax.data.vocabularies import DESCRIPTION_FILE, SPACE
from slm_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
_NAMES, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_KEPT = (_NAMES, _MAP, "chat_template.jinja")  # what transformers reads beside it: kept for an export
_ROLES = ("bos", "eos", "pad", "unk")
# What decides ids; the rest of tokenizer.json adds control tokens, pads and cuts, none of which is asked of it here.
_CONTENT = ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")


class HuggingFaceVocabulary:
    """A BPE tokenizer of Hugging Face's library, held as the bytes of its `tokenizer.json`.

    Args:
        tokenizer: content of `tokenizer.json`.
        ids: 'bos_id', 'eos_id' and the like, as far as they are known.
        beside: name -> content of the files beside it, which come along when it is saved.
        name: what an error message calls it.

    Raises:
        UserError: damaged, of another kind than BPE, not able to say every text, or without EOS.
    """

    kind: str = "huggingface"

    def __init__(self, tokenizer: bytes, ids: dict[str, int], beside: dict[str, bytes], name: str = TOKENIZER_FILE):
        content = _content(tokenizer, name)
        self._tokenizer_file, self._beside = tokenizer, beside
        self.eos_id = _eos(ids, name)
        self.bos_id = ids.get("bos_id", self.eos_id)
        self.unk_id = ids.get("unk_id")
        self.pad_id = ids.get("pad_id", self.eos_id if self.unk_id is None else self.unk_id)
        self._control = {token["id"] for token in content["added_tokens"] if token.get("special")}
        self._control |= {self.bos_id, self.eos_id, self.pad_id, *(() if self.unk_id is None else (self.unk_id,))}
        named = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        canonical = json.dumps(_without_defaults(content | named), sort_keys=True, separators=(",", ":"))
        self.content_hash = hashlib.sha256(canonical.encode("utf-8")).hexdigest()
        self._byte_level = _is_byte_level(content, name)
        self._added = {token["id"]: token["content"] for token in content["added_tokens"]}
        self._tokenizer = _load(content, self._control, name)
        self.size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        for token in sorted(self._control):
            text = self._tokenizer.id_to_token(token)
            if text and token in self.encode(text):
                raise UserError(f"{name}: a text can say its control token {text!r}, so it is not read")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = list(encoding.offsets)
        for i in reversed(range(len(offsets) - 1)):  # a space that the tokenizer put there itself
            if offsets[i][0] == offsets[i][1]:
                offsets[i] = offsets[i + 1]
        return encoding.ids, offsets

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        kept = [i for i in map(int, ids) if i not in self._control]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        return np.array([len(self._bytes(i) or b"") for i in range(self.size)], np.int64)

    def _bytes(self, token: int) -> bytes | None:
        """What an id stands for; None for control ids and numbers that the vocabulary leaves out."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._control:
            return None
        if token in self._added:
            return self._added[token].encode("utf-8")
        if self._byte_level and BYTE_CHARACTERS.keys() >= set(piece):
            return bytes(BYTE_CHARACTERS[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode("utf-8")

    def piece(self, token: SupportsIndex) -> str:
        content = self._bytes(int(token))
        if content is None:
            return self._tokenizer.id_to_token(int(token)) or f"<{int(token)}>"
        try:
            return content.decode("utf-8").replace(" ", SPACE)
        except UnicodeDecodeError:  # part of a character
            return "".join(f"<0x{byte:02X}>" for byte in content)

    def files(self) -> dict[str, bytes]:
        description = {"kind": self.kind, "size": self.size, "content_hash": self.content_hash}
        description |= {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id, "unk_id": self.unk_id}
        last = {DESCRIPTION_FILE: (json.dumps(description, indent=2) + "\n").encode("utf-8")}
        return {TOKENIZER_FILE: self._tokenizer_file, **self._beside, **last}

    def save(self, directory: str | os.PathLike) -> None:
        store = Store(directory)
        for name, content in self.files().items():
            store.write(name, content)


def read_vocabulary(
    store: Store, file: str = TOKENIZER_FILE, description: dict[str, Any] | None = None
) -> HuggingFaceVocabulary | None:
    """The vocabulary of a directory that holds a `tokenizer.json`; None where there is none.

    Args:
        store: the directory.
        file: how the `tokenizer.json` is called there.
        description: what `save` wrote beside it; without it, BOS, EOS and padding are looked up as said above.

    Raises:
        UserError: as HuggingFaceVocabulary.
    """
    tokenizer, where = store.read(file), f"{store.path}/{file}"
    if tokenizer is None:
        return None
    beside = {name: content for name in _KEPT if (content := store.read(name)) is not None}
    if description is None:
        ids = _named_ids(store, _content(tokenizer, where))
    else:
        ids = {f"{role}_id": description[f"{role}_id"] for role in _ROLES}
    ids = {name: token for name, token in ids.items() if token is not None}
    return HuggingFaceVocabulary(tokenizer, ids, beside, where)


def _named_ids(store: Store, content: dict[str, Any]) -> dict[str, int]:
    known = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    found: dict[str, int] = {}
    for file in (_NAMES, _MAP):
        names = store.read_json(file) or {}
        for role in _ROLES:
            name = names.get(f"{role}_token")
            name = name.get("content") if isinstance(name, dict) else name
            if name in known:
                found.setdefault(f"{role}_id", known[name])
    for file in ("generation_config.json", "config.json"):
        numbers = store.read_json(file) or {}
        for role in _ROLES:
            number = numbers.get(f"{role}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int) and number in known.values():
                found.setdefault(f"{role}_id", number)
    return found


def _content(tokenizer: bytes, name: str) -> dict[str, Any]:
    """The parts of a `tokenizer.json` that decide ids, with merges as pairs, as its newer versions have them."""
    try:
        whole = json.loads(tokenizer)
        content = {part: whole.get(part) for part in _CONTENT}
        content["added_tokens"] = content["added_tokens"] or []
        model = dict(content["model"], dropout=None)
        merges = model.get("merges", ())
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in merges]
        kind = model.get("type", "BPE")
        assert isinstance(model["vocab"], (dict, list))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{name} is not a tokenizer.json of Hugging Face: pass the file that `tokenizers` saved"
        ) from error
    if kind != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"{name} is a tokenizer of type {kind}: BPE is read, on bytes or with byte fallback")
    return content | {"model": model}


def _is_byte_level(content: dict[str, Any], name: str) -> bool:
    """Whether pieces are written in bytes; otherwise unknown characters fall back to bytes.

    Raises:
        UserError: neither, or bytes are missing: some texts could not be said.
    """
    byte_level = any('"ByteLevel"' in json.dumps(content[part]) for part in ("pre_tokenizer", "decoder"))
    bytes_said = BYTE_CHARACTERS if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    missing = [piece for piece in bytes_said if piece not in content["model"]["vocab"]]
    if missing or not (byte_level or content["model"].get("byte_fallback")):
        raise UserError(f"{name} cannot say every text: it is neither on all 256 bytes nor falls back to them")
    return byte_level


def _eos(ids: dict[str, int], name: str) -> int:
    if "eos_id" not in ids:
        raise UserError(f"{name}: nothing beside it names EOS: put eos_token into a {_NAMES} there")
    return ids["eos_id"]


def _without_defaults(value: Any) -> Any:
    """Without what is null or false: newer versions of the library write more of it."""
    if isinstance(value, dict):
        return {name: _without_defaults(item) for name, item in value.items() if item is not None and item is not False}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _load(content: dict[str, Any], control: set[int], name: str) -> tokenizers.Tokenizer:
    """The tokenizer, without the means to make a control token of a text."""
    model = content["model"]
    unsaid = {piece for piece, token in model["vocab"].items() if token in control}
    merges = [merge for merge in model["merges"] if "".join(merge) not in unsaid]
    added = [token | {"special": token["id"] in control} for token in content["added_tokens"]]
    whole = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, **content}
    whole |= {"added_tokens": added, "model": model | {"merges": merges}}
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(whole))
    except Exception as error:  # the library raises nothing more specific
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} cannot be read by tokenizers {tokenizers.__version__}: {reason}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def _byte_characters() -> dict[str, int]:
    """How byte-level BPE writes each byte as one character: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()

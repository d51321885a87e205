"""A vocabulary from a `tokenizer.json` of Hugging Face: byte-level BPE (Llama 3, Qwen, GPT-NeoX) and BPE with byte
fallback (Llama 2, TinyLlama, Mistral).

No text becomes a control token. Tokens that `tokenizer.json` marks as special, and BOS, EOS and padding, are never
searched for in a text: "</s>" within a document is four characters, as with `split_special_tokens` of transformers.
Added tokens that are not special (GPT-NeoX's runs of spaces) are ordinary vocabulary and are found.

BOS, EOS, padding and unknown are those that `tokenizer_config.json` beside it names, else `special_tokens_map.json`,
else the numbers in `generation_config.json` and `config.json`. Without a BOS (Qwen), EOS serves as BOS, as between the
documents that such models were trained on; GPT-NeoX names one token as both. Without padding, unknown or else EOS pads:
it is never read.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from jaxtyping import Int

from slm_jax.data.store import Store
from slm_jax.data.vocabulary import SPACE, Vocabulary
from slm_jax.errors import UserError
from slm_jax.files import parse_object

TOKENIZER_FILE = "tokenizer.json"
_NAMES, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_KEPT = (_NAMES, _MAP, "chat_template.jinja")  # what transformers reads beside it: kept for an export
_ROLES = ("bos", "eos", "pad", "unk")
# The parts that decide ids. The rest of tokenizer.json adds control tokens, pads and truncates, which we never ask for.
_CONTENT = ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")
_NEEDED_BYTES = {*range(0x20, 0x7F), *b"\t\n"}  # without these no English text can be spelled


class HuggingFaceVocabulary(Vocabulary):
    """A BPE tokenizer of Hugging Face's library, held as the bytes of its `tokenizer.json`.

    Args:
        tokenizer: content of `tokenizer.json`, without a byte order mark.
        ids: 'bos_id', 'eos_id' and the like, as far as they are known.
        beside: name -> content of the files beside it, which are saved with it.
        name: how error messages call it.

    Raises:
        UserError: damaged, not BPE, unable to spell ordinary text, or without EOS.
    """

    kind = "huggingface"

    def __init__(self, tokenizer: bytes, ids: dict[str, int], beside: dict[str, bytes], name: str = TOKENIZER_FILE):
        content = _content(tokenizer, name)
        self._tokenizer_file, self._beside = tokenizer, beside
        if "eos_id" not in ids:
            raise UserError(
                "vocabulary-no-eos", f"{name}: no file beside it names EOS: put eos_token into a {_NAMES} there"
            )
        self.eos_id = ids["eos_id"]
        self.bos_id = ids.get("bos_id", self.eos_id)
        self.unk_id = ids.get("unk_id")
        self.pad_id = ids.get("pad_id", self.eos_id if self.unk_id is None else self.unk_id)
        self._control = {token["id"] for token in content["added_tokens"] if token.get("special")}
        self._control |= {self.bos_id, self.eos_id, self.pad_id, *(() if self.unk_id is None else (self.unk_id,))}
        named = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        canonical = json.dumps(_without_defaults(content | named), sort_keys=True, separators=(",", ":"))
        self.content_hash = hashlib.sha256(canonical.encode("utf-8")).hexdigest()
        # Byte-level pieces are written in bytes; in other tokenizers, unknown characters fall back to bytes.
        vocab, self._missing = content["model"]["vocab"], set[int]()
        self._byte_level = any('"ByteLevel"' in json.dumps(content[part]) for part in ("pre_tokenizer", "decoder"))
        if self._byte_level:
            # SmolLM2 and others lack bytes that hardly occur in UTF-8: see `unspelled`.
            self._missing = {byte for character, byte in BYTE_CHARACTERS.items() if character not in vocab}
            complete = self._missing.isdisjoint(_NEEDED_BYTES)
        else:
            fallback = content["model"].get("byte_fallback")
            complete = fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
        if not complete:
            raise UserError(
                "vocabulary-incomplete",
                f"{name} cannot spell every text: it is neither byte-level nor falls back to bytes; use another",
            )
        self._spelled = bytes(set(range(256)) - self._missing)
        self._markers = {t["content"]: t["id"] for t in content["added_tokens"] if t["id"] in self._control}
        self._added = {token["id"]: token["content"] for token in content["added_tokens"]}
        self._tokenizer = _load(content, self._control, name, drop_unknown=self._byte_level)
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        for token in sorted(self._control):
            text = self._tokenizer.id_to_token(token)
            if text and token in self.encode(text):
                raise UserError(
                    "vocabulary-control-token", f"{name}: the text {text!r} becomes a control token; use another"
                )

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = list(encoding.offsets)
        for i in reversed(range(len(offsets) - 1)):  # a space that the tokenizer itself put there
            if offsets[i][0] == offsets[i][1]:
                offsets[i] = offsets[i + 1]
        return encoding.ids, offsets

    def control_id(self, text: str) -> int | None:
        return self._markers.get(text)

    def unspelled(self, text: str) -> str:
        if not self._missing or not text.encode("utf-8").translate(None, self._spelled):
            return ""
        return "".join(character for character in text if not self._missing.isdisjoint(character.encode("utf-8")))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        kept = [i for i in map(int, ids) if i not in self._control]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        return np.array([len(self._bytes(i) or b"") for i in range(self.size)], np.int64)

    def _bytes(self, token: int) -> bytes | None:
        """The bytes of an id; None for control ids and numbers that the vocabulary leaves out."""
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

    def description(self) -> dict[str, Any]:
        return super().description() | {f"{role}_id": getattr(self, f"{role}_id") for role in _ROLES}

    def model_files(self) -> dict[str, bytes]:
        return {TOKENIZER_FILE: self._tokenizer_file, **self._beside}


def read_tokenizer_json(
    store: Store, file: str = TOKENIZER_FILE, description: dict[str, Any] | None = None
) -> HuggingFaceVocabulary | None:
    """The vocabulary of a directory with a `tokenizer.json`; None without one.

    Args:
        store: the directory.
        file: the name of the `tokenizer.json` there.
        description: what `save` wrote beside it; without it, the files beside it name BOS, EOS and padding.

    Raises:
        UserError: as HuggingFaceVocabulary.
    """
    tokenizer, where = store.read(file), f"{store.path}/{file}"
    if tokenizer is None:
        return None
    # transformers reads no byte order mark, which an export would otherwise pass on.
    tokenizer = tokenizer.removeprefix(codecs.BOM_UTF8)
    beside = {
        name: content.removeprefix(codecs.BOM_UTF8) for name in _KEPT if (content := store.read(name)) is not None
    }
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
    """The parts of a `tokenizer.json` that decide ids, with merges as pairs, as newer versions write them."""
    remedy = "pass the file that `tokenizers` saved"
    try:
        whole = parse_object(tokenizer, name, remedy)
    except UserError as error:
        raise UserError("vocabulary-damaged", str(error)) from error
    try:
        content: dict[str, Any] = {part: whole.get(part) for part in _CONTENT}
        content["added_tokens"] = content["added_tokens"] or []
        model = dict(content["model"], dropout=None)
        merges = model.get("merges", ())
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in merges]
        kind = model.get("type", "BPE")
        assert isinstance(model["vocab"], (dict, list))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise UserError(
            "vocabulary-damaged",
            f"{name} is not a tokenizer.json of Hugging Face: {remedy}",
        ) from error
    if kind != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(
            "vocabulary-unknown-kind",
            f"{name} is a tokenizer of type {kind}; only BPE is read, byte-level or with byte fallback",
        )
    return content | {"model": model}


def _without_defaults(value: Any) -> Any:
    """Without nulls and false: newer versions of the library write more of them."""
    if isinstance(value, dict):
        return {name: _without_defaults(item) for name, item in value.items() if item is not None and item is not False}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _load(content: dict[str, Any], control: set[int], name: str, drop_unknown: bool) -> tokenizers.Tokenizer:
    """The tokenizer, without the merges that would make a control token from a text."""
    model = content["model"] | ({"unk_token": None} if drop_unknown else {})
    unsaid = {piece for piece, token in model["vocab"].items() if token in control}
    merges = [merge for merge in model["merges"] if "".join(merge) not in unsaid]
    added = [token | {"special": token["id"] in control} for token in content["added_tokens"]]
    whole = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, **content}
    whole |= {"added_tokens": added, "model": model | {"merges": merges}}
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(whole))
    except Exception as error:  # the library raises nothing more specific
        reason = str(error).splitlines()[0]
        raise UserError(
            "vocabulary-damaged", f"{name} cannot be read by tokenizers {tokenizers.__version__}: {reason}"
        ) from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def _byte_characters() -> dict[str, int]:
    """How byte-level BPE writes each byte as one character: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()

"""The tokenizer.json and tokenizer_config.json with which transformers reads any of our vocabularies."""

import json
from typing import Any

import tokenizers

from slm_jax.data.huggingface_vocabulary import BYTE_CHARACTERS, TOKENIZER_FILE
from slm_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary
from slm_jax.data.vocabulary import SPACE, ByteVocabulary, Vocabulary


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Name -> content, including `vocabulary.files()`, by which an import recognises the vocabulary.

    In transformers they give the ids of `vocabulary.encode`, after BOS if special tokens are asked for. One text
    differs: a literal U+2581 becomes a space there. For a SentencePiece model that is not plain BPE (unigram, or one
    that normalises) there is only its own file, since tokenizer.json would give other ids.
    """
    files = vocabulary.files()
    if isinstance(vocabulary, SentencePieceVocabulary):
        if not _is_plain_bpe(vocabulary):
            return files
        tokenizer = _of_sentencepiece(vocabulary)
    elif isinstance(vocabulary, ByteVocabulary):
        tokenizer = _of_bytes(vocabulary)
    else:
        return files | _with_bos(vocabulary, files)
    names = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id}
    if vocabulary.unk_id is not None:
        names["unk_token"] = vocabulary.unk_id
    if vocabulary.pad_id not in names.values():
        names["pad_token"] = vocabulary.pad_id
    config: dict[str, Any] = {name: vocabulary.piece(token) for name, token in names.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["model_input_names"] = ["input_ids", "attention_mask"]
    return {TOKENIZER_FILE: _json(tokenizer), "tokenizer_config.json": _json(config), **files}


def _with_bos(vocabulary: Vocabulary, files: dict[str, bytes]) -> dict[str, bytes]:
    """A tokenizer.json of Hugging Face that puts BOS first, as in training, and its configuration; nothing where it
    does already. Tokenizers without a BOS of their own (Qwen) put none, and some add EOS."""
    tokenizer = tokenizers.Tokenizer.from_str(files[TOKENIZER_FILE].decode("utf-8"))
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    if tokenizer.encode("a").ids == [vocabulary.bos_id, *plain] and config.get("add_bos_token") is not False:
        return {}
    bos = vocabulary.piece(vocabulary.bos_id)
    content = json.loads(files[TOKENIZER_FILE])
    before = content.get("post_processor") or {}
    kept = [part for part in before.get("processors", [before]) if part.get("type") == "ByteLevel"]  # trims offsets
    content["post_processor"] = {"type": "Sequence", "processors": [*kept, _bos_first(bos, vocabulary.bos_id)]}
    # Classes of single families would build their own post-processor.
    config = {name: value for name, value in config.items() if name not in ("add_bos_token", "add_eos_token")}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos}
    return {TOKENIZER_FILE: _json(content), "tokenizer_config.json": _json(config)}


def _proto(vocabulary: SentencePieceVocabulary) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model)  # pyright: ignore[reportAttributeAccessIssue]


def _is_plain_bpe(vocabulary: SentencePieceVocabulary) -> bool:
    model = _proto(vocabulary)
    normal, trained = model.normalizer_spec, model.trainer_spec
    changes = normal.precompiled_charsmap or normal.remove_extra_whitespaces or not normal.escape_whitespaces
    return trained.model_type == trained.BPE and not changes and not trained.treat_whitespace_as_suffix


def _of_sentencepiece(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    model = _proto(vocabulary)
    kinds = model.SentencePiece
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    prefixed = model.normalizer_spec.add_dummy_prefix
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    added = [
        _added(number, piece.piece, piece.type != kinds.USER_DEFINED)
        for number, piece in enumerate(model.pieces)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
    ]
    return _tokenizer(
        added,
        vocabulary.bos_id,
        normalizer={"type": "Sequence", "normalizers": [*before, replace]},
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "vocab": ids,
            "merges": _merges(normal, ids),
            "unk_token": vocabulary.piece(vocabulary.unk_id or 0),
            "fuse_unk": True,
            "byte_fallback": True,
        },
    )


def _merges(normal: dict[str, float], ids: dict[str, int]) -> list[list[str]]:
    """All pairs that make a piece; SentencePiece joins the pair whose piece has the highest score."""
    pairs = [
        (score, ids[piece[:cut]], ids[piece[cut:]], [piece[:cut], piece[cut:]])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [pair for *_, pair in sorted(pairs, key=lambda item: (-item[0], item[1], item[2]))]


def _of_bytes(vocabulary: ByteVocabulary) -> dict[str, Any]:
    first = vocabulary.size - 256
    control = [vocabulary.piece(token) for token in range(first)]
    ids = {piece: token for token, piece in enumerate(control)}
    ids |= {character: first + byte for character, byte in BYTE_CHARACTERS.items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return _tokenizer(
        [_added(token, piece, True) for token, piece in enumerate(control)],
        vocabulary.bos_id,
        pre_tokenizer=level,
        decoder=level,
        model={"vocab": ids, "merges": []},
    )


def _added(token: int, content: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": special}


def _tokenizer(added: list[dict[str, Any]], bos_id: int, *, model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    bos = next(token["content"] for token in added if token["id"] == bos_id)
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    shape = {"type": "BPE", "dropout": None, "ignore_merges": False, "fuse_unk": False, "byte_fallback": False}
    return {
        "version": "1.0",
        **empty,
        "added_tokens": added,
        "post_processor": _bos_first(bos, bos_id),
        **parts,
        "model": shape | model,
    }


def _bos_first(bos: str, bos_id: int) -> dict[str, Any]:
    one = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    two = [*one, one[0], {"Sequence": {"id": "B", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": one,
        "pair": two,
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")

"""Which vocabulary to use, and the loader for all kinds."""

import os
import pathlib
from dataclasses import dataclass
from typing import Annotated

from slm_jax.configurable import Count, OneOf, configurable
from slm_jax.data.huggingface_vocabulary import TOKENIZER_FILE, read_tokenizer_json
from slm_jax.data.sentencepiece_vocabulary import MODEL_FILE, SentencePieceVocabulary
from slm_jax.data.store import Store
from slm_jax.data.vocabulary import DESCRIPTION_FILE, ByteVocabulary, Vocabulary
from slm_jax.errors import UserError

_TAKEN = "pass a .model or tokenizer.json file, a corpus, a model directory, or a saved vocabulary"


@configurable
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
    kind: Annotated[str, OneOf(("sentencepiece", "bytes"))] = "sentencepiece"
    size: Count = 2048
    train_characters: Count = 20_000_000


def load_vocabulary(path: str | os.PathLike) -> Vocabulary:
    """The vocabulary at `path`: a corpus, a model directory or a directory (or gs://, s3:// URL) written by `save`; a
    SentencePiece `.model` file; a `tokenizer.json`, or a Hugging Face directory with one or with a tokenizer.model.

    Raises:
        UserError: nothing there, or damaged.
    """
    path = os.fspath(path)
    if path.endswith(".model"):
        try:
            return SentencePieceVocabulary(pathlib.Path(path).expanduser().read_bytes(), path)
        except OSError as error:
            raise UserError("vocabulary-not-found", f"vocabulary {path}: {error.strerror}; {_TAKEN}") from error
    if path.endswith(".json"):
        if vocabulary := read_tokenizer_json(Store(os.path.dirname(path) or "."), os.path.basename(path)):
            return vocabulary
        raise UserError("vocabulary-not-found", f"vocabulary {path}: no such file; {_TAKEN}")
    store = Store(path)
    if (local := store.local()) is not None and not local.is_dir():
        raise UserError("vocabulary-not-found", f"vocabulary {path}: no such directory; {_TAKEN}")
    for directory in ("", "vocabulary/"):
        if description := store.read_json(directory + DESCRIPTION_FILE):
            return _saved(description, Store(f"{path}/{directory}"))
    # A directory of Hugging Face: in the order in which transformers looks.
    if vocabulary := read_tokenizer_json(store):
        return vocabulary
    if model := store.read("tokenizer.model"):
        return SentencePieceVocabulary(model, f"{store.path}/tokenizer.model")
    raise UserError(
        "vocabulary-not-found",
        f"vocabulary {store.path}: holds no {DESCRIPTION_FILE}, {TOKENIZER_FILE} or tokenizer.model; {_TAKEN}",
    )


def _saved(description: dict, store: Store) -> Vocabulary:
    """What `Vocabulary.save` wrote."""
    kind, where = description.get("kind"), f"vocabulary {store.path}"
    if kind == "bytes":
        vocabulary = ByteVocabulary()
    elif kind == "sentencepiece":
        vocabulary = SentencePieceVocabulary(store.read(MODEL_FILE) or b"", f"{store.path}/{MODEL_FILE}")
    elif kind == "huggingface":
        vocabulary = read_tokenizer_json(store, description=description)
    else:
        known = "sentencepiece, huggingface, bytes"
        raise UserError("vocabulary-unknown-kind", f"{where}: kind {kind!r} is unknown to this version ({known})")
    if vocabulary is None:
        raise UserError("vocabulary-damaged", f"{where}: its {TOKENIZER_FILE} is missing; restore it or make it again")
    if vocabulary.content_hash != description.get("content_hash"):
        raise UserError(
            "vocabulary-damaged", f"{where}: its content changed since it was saved; restore it or make it again"
        )
    return vocabulary

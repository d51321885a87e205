"""How many tokens a vocabulary needs for a text, and how many bits a model needs for its bytes."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from slm_jax.data.corpus import Corpus
from slm_jax.data.store import SHARD_ROWS
from slm_jax.data.vocabularies import Vocabulary


class Fertility(NamedTuple):
    """Counts of texts under one vocabulary. words: runs of anything but white space; they mean little for languages
    that are written without spaces. ids: how many different ones occur."""

    documents: int
    bytes: int
    words: int
    tokens: int
    ids: int

    @property
    def per_byte(self) -> float | None:
        """Tokens for each byte of UTF-8."""
        return self.tokens / self.bytes if self.bytes else None

    @property
    def per_word(self) -> float | None:
        return self.tokens / self.words if self.words else None


def fertility(
    texts: Iterable[tuple[str, str]], vocabularies: Mapping[str, Vocabulary]
) -> dict[tuple[str, str], Fertility]:
    """Encodes every text, given as (source, text), with every vocabulary; without BOS and EOS.

    Returns:
      (source, name of the vocabulary) -> counts.
    """
    counts: dict[tuple[str, str], Fertility] = {}
    seen: dict[tuple[str, str], set[int]] = {}
    for source, text in texts:
        num_bytes, words = len(text.encode("utf-8")), len(text.split())
        for name, vocabulary in vocabularies.items():
            ids, key = vocabulary.encode(text), (source, name)
            seen.setdefault(key, set()).update(ids)
            one = Fertility(1, num_bytes, words, len(ids), len(seen[key]))
            counts[key] = added([counts[key], one]) if key in counts else one
    return counts


def added(parts: Iterable[Fertility]) -> Fertility:
    """The counts of several texts together; `ids` are those of the part that has most."""
    columns = list(zip(*parts, strict=True))
    documents, num_bytes, words, tokens = (sum(column) for column in columns[:4])
    return Fertility(documents, num_bytes, words, tokens, max(columns[4]))


def texts_of(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """(source, text) of each document of a corpus as far as its rows hold it, without BOS, EOS and metadata."""
    vocabulary, num_bytes = corpus.vocabulary(), corpus.vocabulary().token_bytes()
    pieces: list[int] = []
    source = ""
    for first in range(0, corpus.num_rows, SHARD_ROWS):
        rows = np.arange(first, min(first + SHARD_ROWS, corpus.num_rows))
        columns = corpus.read(rows)
        for row in range(len(rows)):
            tokens, segments = columns["tokens"][row], columns["segment_ids"][row]
            for begin, end in _runs(segments):
                if tokens[begin] == vocabulary.bos_id and pieces:
                    yield source, vocabulary.decode(pieces)
                    pieces = []
                if tokens[begin] == vocabulary.bos_id:
                    source = corpus.source_names[columns["source_ids"][row, begin]]
                # Metadata carries no loss; in a piece that continues a document everything is text.
                kept = columns["loss_mask"][row, begin:end] & (num_bytes[tokens[begin:end]] > 0)
                pieces += tokens[begin:end][kept].tolist()
    if pieces:
        yield source, vocabulary.decode(pieces)


def _runs(segments: Integer[np.ndarray, "L"]) -> list[tuple[int, int]]:
    """[begin, end) of each segment of a row."""
    edges = np.flatnonzero(np.diff(segments, prepend=0, append=0))
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges) if segments[a] > 0]


def bits_per_byte(
    losses: Float[np.ndarray, "T"],
    num_bytes: Integer[np.ndarray, "T"],
    members: Bool[np.ndarray, "T"],
) -> float | None:
    """Loss sum in bits over the bytes that the same tokens stand for: comparable between vocabularies."""
    total = int(num_bytes[members].sum())
    return float(losses[members].sum(dtype=np.float64)) / math.log(2) / total if total else None

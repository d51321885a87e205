"""A document -> token ids, which of them carry loss, and which of them are noise."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from slm_jax.data.vocabularies import Vocabulary


class DocumentTokens(NamedTuple):
    """One tokenised document: [BOS] + prefix + text + [EOS], all arrays [T].

    Attributes:
        tokens: ids.
        loss_mask: False on BOS and prefix, True on text and EOS (MeCo, arXiv 2501.01956, section 2).
        noise: True on the tokens of the text that overlap a marked span.
    """

    tokens: Integer[np.ndarray, "T"]
    loss_mask: Bool[np.ndarray, "T"]
    noise: Bool[np.ndarray, "T"]


def token_dtype(vocabulary: Vocabulary) -> np.dtype:
    """The smallest type of the `tokens` column that holds every id."""
    return np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)


def tokenize_document(
    text: str, spans: Sequence[Sequence[int]], vocabulary: Vocabulary, prefix: str = ""
) -> DocumentTokens:
    """Tokenises one document.

    Args:
        text: the document.
        spans: [begin, end) characters of the text that are noise; empty for most documents.
        vocabulary: gives the ids.
        prefix: what stands before the text. It is tokenised apart from it: the ids of the text do not depend on it.
    """
    if spans:
        ids, offsets = vocabulary.encode_with_offsets(text)
        noisy = _overlap(offsets, spans)
    else:
        ids = vocabulary.encode(text)
        noisy = np.zeros(len(ids), bool)
    given = [vocabulary.bos_id, *(vocabulary.encode(prefix) if prefix else ())]  # not predicted
    tokens = np.array([*given, *ids, vocabulary.eos_id], token_dtype(vocabulary))
    loss_mask = np.arange(len(tokens)) >= len(given)
    return DocumentTokens(tokens, loss_mask, np.pad(noisy, (len(given), 1)))


def _overlap(offsets: list[tuple[int, int]], spans: Sequence[Sequence[int]]) -> np.ndarray:
    """Which [begin, end) of `offsets` share a character with one of `spans`."""
    last = max((end for _, end in offsets), default=0)
    marked = np.zeros(last + 1, np.int64)
    for begin, end in spans:
        marked[begin:end] = 1
    before = np.concatenate([[0], np.cumsum(marked)])  # marked characters before each character
    begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    return before[ends] > before[begins]

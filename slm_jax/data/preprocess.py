"""A document -> its token ids, and which of them carry loss or are noise."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from slm_jax.data.vocabulary import Vocabulary


class DocumentTokens(NamedTuple):
    """One tokenized document: [BOS] + prefix + text + [EOS], all arrays [T].

    Attributes:
        tokens: ids.
        loss_mask: False on BOS and prefix, True on text and EOS (MeCo, arXiv 2501.01956, section 2); in a conversation,
            True on the responses and the EOS after each.
        noise: True on tokens of the text that overlap a marked span.
    """

    tokens: Integer[np.ndarray, "T"]
    loss_mask: Bool[np.ndarray, "T"]
    noise: Bool[np.ndarray, "T"]


def token_dtype(vocabulary: Vocabulary) -> np.dtype:
    """The smallest type of the `tokens` column that holds every id."""
    return np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)


def tokenize_document(
    text: str,
    spans: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    prefix: str = "",
    loss_spans: Sequence[Sequence[int]] | None = None,
    markers: Sequence[tuple[int, int]] = (),
) -> DocumentTokens:
    """Tokenizes one document.

    Args:
        text: the document.
        spans: [begin, end) characters of the text that are noise; empty for most documents.
        vocabulary: gives the ids.
        prefix: comes before the text and is tokenized apart from it, so that the ids of the text do not depend on it.
        loss_spans: the `LossSpan`s of the text, in order; None if all of it carries loss. No token crosses the border
            of one: where the vocabulary would join both sides, they are tokenized apart, like a prompt that ends
            there.
        markers: character ranges [begin, end) that become a control token if the vocabulary has one, and are
            text otherwise.
    """
    if loss_spans is not None:
        ids, offsets = encode_within(
            text, {border for begin, end, _ in loss_spans for border in (begin, end)}, vocabulary, markers
        )
    elif spans:
        ids, offsets = vocabulary.encode_with_offsets(text)
    else:
        ids, offsets = vocabulary.encode(text), []
    noisy = _overlap(offsets, spans) if spans else np.zeros(len(ids), bool)
    has_loss = np.ones(len(ids), bool) if loss_spans is None else _overlap(offsets, loss_spans)
    given = [vocabulary.bos_id, *(vocabulary.encode(prefix) if prefix else ())]  # without loss
    tokens = np.array([*given, *ids, vocabulary.eos_id], token_dtype(vocabulary))
    ends_with_loss = loss_spans is None or any(end == len(text) for _, end, _ in loss_spans)
    loss_mask = np.concatenate([np.zeros(len(given), bool), has_loss, [ends_with_loss]])
    noise = np.concatenate([np.zeros(len(given), bool), noisy, [False]])
    # A response within a conversation ends in its own EOS.
    if inner := [end for _, end, ends in loss_spans or () if ends]:
        at = len(given) + np.searchsorted([begin for begin, _ in offsets], inner)
        tokens = np.insert(tokens, at, vocabulary.eos_id)
        loss_mask, noise = np.insert(loss_mask, at, True), np.insert(noise, at, False)
    return DocumentTokens(tokens, loss_mask, noise)


def tokenize_batch(rows: Sequence[Mapping[str, Any]], vocabulary: Vocabulary) -> list[DocumentTokens]:
    """`tokenize_document` of rows with text, spans, loss_spans and prefix, faster."""
    simple = [row for row in rows if not row["spans"] and row["loss_spans"] is None]
    encoded = iter(vocabulary.encode_batch([row["text"] for row in simple]))
    prefixes = {"": np.empty(0, np.int32)}  # many documents have the same
    dtype, found = token_dtype(vocabulary), []
    for row in rows:
        prefix = row["prefix"]
        if row["spans"] or row["loss_spans"] is not None:
            spans = (row["spans"], vocabulary, prefix, row["loss_spans"], row.get("markers", ()))
            found.append(tokenize_document(row["text"], *spans))
            continue
        if prefix not in prefixes:
            prefixes[prefix] = np.array(vocabulary.encode(prefix), np.int32)
        given = 1 + len(prefixes[prefix])
        parts = ([vocabulary.bos_id], prefixes[prefix], next(encoded), [vocabulary.eos_id])
        tokens = np.concatenate(parts, dtype=dtype, casting="unsafe")
        loss_mask = np.ones(len(tokens), bool)
        loss_mask[:given] = False
        found.append(DocumentTokens(tokens, loss_mask, np.zeros(len(tokens), bool)))
    return found


def encode_within(
    text: str, borders: set[int], vocabulary: Vocabulary, markers: Sequence[tuple[int, int]] = ()
) -> tuple[list[int], list[tuple[int, int]]]:
    """`Vocabulary.encode_with_offsets`, but no token crosses a border, given in characters: the text is cut at those
    borders that a token would cross. `markers` as in `tokenize_document`."""
    ids, offsets, at = [], [], 0
    for begin, end in [*markers, (len(text), len(text))]:
        control = vocabulary.control_id(text[begin:end])
        if control is None and end > begin:
            continue
        between = {border - at for border in borders if at < border < begin}
        more, places = _encode_within(text[at:begin], between, vocabulary)
        ids += more
        offsets += [(at + first, at + last) for first, last in places]
        if control is not None:
            ids.append(control)
            offsets.append((begin, end))
        at = end
    return ids, offsets


def _encode_within(text: str, borders: set[int], vocabulary: Vocabulary) -> tuple[list[int], list[tuple[int, int]]]:
    every, cuts = np.array(sorted(borders), np.int64), set[int]()
    while True:
        ids, offsets = [], []
        ends = sorted(cuts | {len(text)})
        for begin, end in zip([0, *ends], ends, strict=False):
            more, places = vocabulary.encode_with_offsets(text[begin:end])
            ids += more
            offsets += [(begin + first, begin + last) for first, last in places]
        begins, lasts = np.array(offsets, np.int64).reshape(-1, 2).T
        first, after = np.searchsorted(every, begins, side="right"), np.searchsorted(every, lasts, side="left")
        if (first >= after).all():
            return ids, offsets
        cuts |= {int(border) for a, b in zip(first, after, strict=True) for border in every[a:b]}


def _overlap(offsets: list[tuple[int, int]], spans: Sequence[Sequence[int]]) -> np.ndarray:
    """Which [begin, end) of `offsets` share a character with one of `spans`, given by their first two numbers."""
    last = max((end for _, end in offsets), default=0)
    marked = np.zeros(last + 1, np.int64)
    for begin, end, *_ in spans:
        marked[begin:end] = 1
    before = np.concatenate([[0], np.cumsum(marked)])  # marked characters before each character
    begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    return before[ends] > before[begins]

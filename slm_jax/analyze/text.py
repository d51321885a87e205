"""Tokens as the text they stand for, and documents as pages of shaded tokens that no text can break out of."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from slm_jax.analyze.columns import Rows
from slm_jax.analyze.page import visible
from slm_jax.data.vocabularies import Vocabulary
from slm_jax.evaluate.prefix import segments_of

CUT = "\ufffd"  # how decoding shows bytes that are no character yet


class Segment(NamedTuple):
    """One document of a row, or the piece of it that the row holds: its row, the places of its tokens, where it is
    from."""

    row: int
    start: int
    length: int
    source: str
    url: str


def token_texts(vocabulary: Vocabulary, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text: together they are the decoded text. The bytes of one character are given to the
    last of them; control tokens add nothing."""
    ids, texts = [int(token) for token in tokens], []
    begin = shown = 0  # decoded anew from `begin`; up to `shown` it was given out
    for end in range(1, len(ids) + 1):
        before, now = vocabulary.decode(ids[begin:shown]), vocabulary.decode(ids[begin:end])
        if now.endswith(CUT) and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        begin, shown = shown, end
    return texts


def one_line(text: str) -> str:
    """For tables and legends: also without line ends."""
    return visible(text).replace("\n", "↵").replace("\t", "⇥")


def readable(vocabulary: Vocabulary, token: int) -> str:
    """One token for tables and legends: its text, or its name where it has none of its own."""
    text = vocabulary.decode([token])
    return one_line(text if text and CUT not in text else vocabulary.piece(token))


def segments(rows: Rows) -> list[Segment]:
    """All documents and pieces in the rows, in their order."""
    found, names = segments_of(rows.segment_ids), rows.table.source_names
    documents = rows.table.documents().select(["row", "start", "url"])
    documents = documents.filter(pyarrow.array(np.asarray(documents["row"]) < len(rows.valid))).to_pylist()
    urls = {(about["row"], about["start"]): about["url"] or "" for about in documents}
    return [
        Segment(row, start, length, names[rows.source_ids[row, start]], urls.get((row, start), ""))
        for row, start, length in zip(*(x.tolist() for x in found), strict=True)
    ]


def varied(found: Sequence[Segment], count: int, least_tokens: int = 16) -> list[Segment]:
    """Up to `count` segments, in turn from the sources; those that are long enough to read first."""
    by_source: dict[str, list[Segment]] = {}
    for segment in sorted(found, key=lambda segment: segment.length < least_tokens):
        by_source.setdefault(segment.source, []).append(segment)
    turns = max((len(group) for group in by_source.values()), default=0)
    return [group[turn] for turn in range(turns) for group in by_source.values() if turn < len(group)][:count]


def context(rows: Rows, vocabulary: Vocabulary, row: int, place: int, width: int = 24) -> tuple[str, str, str]:
    """The text before a token, the token's own, and the text behind it, within its document."""
    inside = np.flatnonzero(rows.segment_ids[row] == rows.segment_ids[row, place])
    window = inside[(inside >= place - width) & (inside <= place + width // 2)]
    texts = token_texts(vocabulary, rows.tokens[row, window].tolist())
    middle = int(np.searchsorted(window, place))
    own = texts[middle] or vocabulary.piece(int(rows.tokens[row, place]))
    return visible("".join(texts[:middle])), visible(own), visible("".join(texts[middle + 1 :]))


def passages(
    rows: Rows,
    vocabulary: Vocabulary,
    chosen: Sequence[Segment],
    style: Callable[[int, int], tuple[str, str]],
    limit: int,
) -> Iterator[dict[str, Any]]:
    """Segments, cut after `limit` tokens, for a page: `source`, `url`, and of each token its `text`, and what `style`
    says of its row and place: the name of the class that shades it and the note that explains it."""
    num_bytes = vocabulary.token_bytes()
    for segment in chosen:
        places = range(segment.start, segment.start + min(segment.length, limit))
        tokens = rows.tokens[segment.row, list(places)].tolist()
        spans = []
        for place, token, text in zip(places, tokens, token_texts(vocabulary, tokens), strict=True):
            mark, note = style(segment.row, place)
            text = visible(text) if num_bytes[token] else vocabulary.piece(token)
            spans.append({"text": text, "mark": mark, "note": note, "line": "\n" in text})
        yield {"source": segment.source, "url": visible(segment.url), "tokens": spans}

"""Documents of a corpus as passages of tokens for a page."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from slm_jax.analyze.columns import Rows
from slm_jax.analyze.page import visible
from slm_jax.data.segments import segments_of
from slm_jax.data.token_text import TokenText


class Segment(NamedTuple):
    """One document of a row, or the piece of it that the row holds."""

    row: int
    start: int
    length: int
    source: str
    url: str
    begins: bool  # false for a piece that continues a document


def segments(rows: Rows) -> list[Segment]:
    """All documents and pieces in the rows, in their order."""
    found, names = segments_of(rows.segment_ids), rows.table.source_names
    documents = rows.table.documents().select(["row", "start", "url"])
    documents = documents.filter(pyarrow.array(np.asarray(documents["row"]) < len(rows.valid))).to_pylist()
    begun = {(about["row"], about["start"]): about["url"] or "" for about in documents}
    return [
        Segment(row, start, length, names[rows.source_ids[row, start]], begun.get(at, ""), at in begun)
        for row, start, length in found.each()
        for at in [(row, start)]
    ]


def varied(found: Sequence[Segment], count: int, least_tokens: int = 16) -> list[Segment]:
    """Up to `count` segments, in turn from the sources; those that are long enough to read first."""
    by_source: dict[str, list[Segment]] = {}
    for segment in sorted(found, key=lambda segment: segment.length < least_tokens):
        by_source.setdefault(segment.source, []).append(segment)
    turns = max((len(group) for group in by_source.values()), default=0)
    return [group[turn] for turn in range(turns) for group in by_source.values() if turn < len(group)][:count]


def context(rows: Rows, reader: TokenText, row: int, place: int, width: int = 24) -> tuple[str, str, str]:
    """The text before a token, the token's own, and the text after it, within its document."""
    inside = np.flatnonzero(rows.segment_ids[row] == rows.segment_ids[row, place])
    window = inside[(inside >= place - width) & (inside <= place + width // 2)]
    text, spans = reader.spans(rows.tokens[row, window].tolist())
    begin, end = spans[np.searchsorted(window, place)]
    own = text[begin:end] or rows.table.vocabulary().piece(int(rows.tokens[row, place]))
    return visible(text[:begin]), visible(own), visible(text[end:])


def passages(
    rows: Rows,
    chosen: Sequence[Segment],
    style: Callable[[int, int], tuple[str, str]],
    limit: int,
) -> Iterator[dict[str, Any]]:
    """Segments, cut after `limit` tokens, for a page: `source`, `url`, and for each token its `text`, and what `style`
    says of its row and place: the class that shades it and the note that explains it."""
    reader = TokenText(rows.table.vocabulary())
    for segment in chosen:
        places = range(segment.start, segment.start + min(segment.length, limit))
        spans = []
        for place, text in zip(places, reader.texts(rows.tokens[segment.row, list(places)].tolist()), strict=True):
            mark, note = style(segment.row, place)
            spans.append({"text": visible(text), "mark": mark, "note": note, "line": "\n" in text})
        yield {"source": segment.source, "url": visible(segment.url), "tokens": spans}

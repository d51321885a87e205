"""Documents, losses and predictions as the page of the inspector: compact arrays, and a script that draws them."""

import base64
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute
from jaxtyping import Bool, Float, Int

from slm_jax.analyze.page import render, script_json
from slm_jax.data.corpus import Corpus
from slm_jax.data.segments import segments_of
from slm_jax.data.token_text import TokenText
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.score.selection import CombinedSelection, Selection, in_words
from slm_jax.score.token_loss import predicted

SCRIPTS = tuple(f"inspector_{part}.js.html.j2" for part in ("data", "text", "panel", "controls"))


class Predictions(NamedTuple):
    """What a model predicts at each position from the earlier tokens of the segment. Meaningless at the first token of
    a segment. tokens: the ids of highest probability, the likeliest first."""

    loss: Float[np.ndarray, "N L"]  # nats; 0 where a token has no predecessor
    tokens: Int[np.ndarray, "N L K"]
    probabilities: Float[np.ndarray, "N L K"]


class Column(NamedTuple):
    """What a model says of the rows at one step. `origin` says in words where it comes from."""

    step: int
    origin: str
    loss: Float[np.ndarray, "N L"]  # nats; NaN where a token has none
    predictions: Predictions | None = None
    selected: Bool[np.ndarray, "N L"] | None = None


class Model(NamedTuple):
    name: str
    columns: Sequence[Column]  # in the order of their steps


class Rows(NamedTuple):
    """Rows of a corpus and what they hold."""

    corpus: str
    numbers: Int[np.ndarray, " N"]
    tokens: Int[np.ndarray, "N L"]
    segment_ids: Int[np.ndarray, "N L"]
    loss_mask: Bool[np.ndarray, "N L"]
    source_ids: Int[np.ndarray, "N L"]
    source_names: Sequence[str]
    documents: dict[tuple[int, int], dict[str, Any]]  # (row, place of the first token) -> id, source, url
    vocabulary: Vocabulary
    reference: Float[np.ndarray, "N L"] | None
    selection: str  # in words; "" for none

    @classmethod
    def of(
        cls,
        table: Corpus,
        name: str,
        numbers: np.ndarray,
        block: dict[str, np.ndarray],
        reference: np.ndarray | None,
        selection: Selection | CombinedSelection | None,
    ) -> "Rows":
        """Rows that were read from a corpus, which the page calls `name`."""
        note = f"Selection: {in_words(selection)}." if selection else ""
        if selection and selection.parts[0].scope == "batch":
            note += " The rows of this page are the batch: in training, others were in it."
        documents = table.documents()
        row = pyarrow.compute.field("row")
        here = documents.filter((row >= int(numbers[0])) & (row <= int(numbers[-1])))
        return cls(
            corpus=name,
            numbers=numbers,
            tokens=block["tokens"].astype(np.int64),
            segment_ids=block["segment_ids"].astype(np.int64),
            loss_mask=block["loss_mask"],
            source_ids=block["source_ids"].astype(np.int64),
            source_names=table.source_names,
            documents={(about["row"], about["start"]): about for about in here.to_pylist()},
            vocabulary=table.vocabulary(),
            reference=reference,
            selection=note,
        )


def inspector_page(rows: Rows, models: Sequence[Model]) -> str:
    """The page as HTML that needs nothing else. Its script reads one array over all shown tokens for each number."""
    documents, places, spans = _documents(rows)
    flat = lambda values: values.reshape(-1, *values.shape[2:])[places]  # noqa: E731
    ids, vocabulary = flat(rows.tokens), rows.vocabulary
    counts = flat(rows.loss_mask & np.asarray(predicted(rows.segment_ids.astype(np.int32))))
    # The page holds the pieces of the ids that occur, in their order; an id is written as its place among them.
    predicted_ids = [flat(c.predictions.tokens).reshape(-1) for m in models for c in m.columns if c.predictions]
    occurring = np.unique(np.concatenate([ids, *predicted_ids]))
    small = np.uint16 if len(occurring) <= 1 << 16 else np.uint32
    reference = None if rows.reference is None else flat(rows.reference)
    losses = [flat(column.loss) for model in models for column in model.columns]

    def scale(values: Sequence[np.ndarray]) -> float:
        """Where the shades end, the same for all checkpoints: 98 % of the values are below."""
        together = np.concatenate(values)
        together = together[np.isfinite(together)]
        return max(0.5, math.ceil(2 * float(np.quantile(together, 0.98))) / 2) if len(together) else 1.0

    # ---- Each model's checkpoints
    shown = []
    for model in models:
        columns = []
        for column in model.columns:
            top = None
            if column.predictions and column.predictions.tokens.shape[-1]:
                likeliest = np.searchsorted(occurring, flat(column.predictions.tokens).reshape(-1))
                probabilities = flat(column.predictions.probabilities)
                top = {
                    "number": probabilities.shape[-1],
                    "piece": _packed(likeliest.astype(small)),
                    "probability": _packed(np.round(probabilities * 0xFFFF).astype(np.uint16).reshape(-1)),
                }
            columns.append(
                {
                    "step": column.step,
                    "origin": column.origin,
                    "loss": _packed(flat(column.loss).astype(np.float32)),
                    "selected": None if column.selected is None else _packed(flat(column.selected).astype(np.uint8)),
                    "top": top,
                }
            )
        shown.append({"name": model.name, "columns": columns})

    data = {
        "corpus": rows.corpus,
        "rows": [int(rows.numbers[0]), int(rows.numbers[-1])],
        "sources": list(rows.source_names),
        "selection": rows.selection,
        "documents": documents,
        "tokens": {
            "id": _packed(ids.astype(np.uint32)),
            "piece": _packed(np.searchsorted(occurring, ids).astype(small)),
            "begin": _packed(spans[:, 0].astype(np.uint32)),
            "end": _packed(spans[:, 1].astype(np.uint32)),
            "source": _packed(flat(rows.source_ids).astype(np.uint8)),
            "counts": _packed(counts.astype(np.uint8)),
        },
        "reference": None if reference is None else _packed(reference),
        "scale": {
            "loss": scale(losses if reference is None else [*losses, reference]),
            "excess": scale([np.zeros(0)] if reference is None else [np.abs(loss - reference) for loss in losses]),
        },
        "models": shown,
        # A model may embed more ids than its vocabulary has.
        "pieces": [vocabulary.piece(id_) if id_ < vocabulary.size else f"<{id_}>" for id_ in occurring.tolist()],
    }
    return render("inspector.html.j2", SCRIPTS, title=f"Tokens of {rows.corpus}", data=script_json(data))


def _documents(rows: Rows) -> tuple[list[dict[str, Any]], Int[np.ndarray, " T"], Int[np.ndarray, "T 2"]]:
    """The documents (or the parts of them that are in these rows), the places of their tokens in the flattened rows,
    and [begin, end) of each token in its document's text, in the UTF-16 units that scripts count in."""
    found: list[dict[str, Any]] = []
    places, spans = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    first, reader = 0, TokenText(rows.vocabulary)
    for row, start, length in segments_of(rows.segment_ids).each():
        text, characters = reader.spans(rows.tokens[row, start : start + length].tolist())
        units = np.cumsum([0, *(2 if ord(character) > 0xFFFF else 1 for character in text)])
        about = rows.documents.get((int(rows.numbers[row]), start))
        found.append(
            {
                "id": about["id"] if about else "",
                "url": (about["url"] or "") if about else "",
                "row": int(rows.numbers[row]),
                "source": int(rows.source_ids[row, start]),
                "first": first,
                "last": first + length,
                "text": text,
            }
        )
        first += length
        places.append(row * rows.tokens.shape[1] + np.arange(start, start + length))
        spans.append(units[characters])
    return found, np.concatenate(places), np.concatenate(spans)


def _packed(values: np.ndarray) -> dict[str, str]:
    """The name of a JavaScript typed array, without its 'Array', and its bytes in base64."""
    kind = {"f": "Float", "u": "Uint"}[values.dtype.kind] + str(8 * values.dtype.itemsize)
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    return {"type": kind, "data": base64.b64encode(little.tobytes()).decode("ascii")}

"""Log-probs that an API or another engine gave, as a column of the corpus.

A file has one record per document, JSON lines (.gz, .zst) or Parquet. It names the document: `id` or `custom_id` as in
documents.parquet, or `index`, its place there. What it scored stands in the record itself, in `choices` [0], or in
`response.body.choices` [0]:
    token_ids [n], logprobs [n]                     plain
    prompt_logprobs [n], maybe prompt_token_ids     vLLM: of each token {id: {"logprob": x}}, or null
    logprobs {tokens [n], token_logprobs [n]}       completions with echo: the tokens as text

The engine scored a whole document; the model that trains sees what a row holds of it. So behind a cut these losses know
more of what came before than the model does, and a reference of the stage `score` would.
"""

import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from slm_jax.data import readers
from slm_jax.data.corpus import Corpus
from slm_jax.data.readers import BadRecord
from slm_jax.data.segments import positions_from_segments
from slm_jax.errors import UserError
from slm_jax.metrics import progress

ID_FIELDS = ("custom_id", "id", "index")
FIELDS = (*ID_FIELDS, "token_ids", "logprobs", "prompt_token_ids", "prompt_logprobs", "tokens", "token_logprobs")
NESTED = ("response", "choices")
TOGETHER = 256  # documents whose tokens are read at a time
CONTROL = re.compile(r"\s*(<.*>|\[.*\])?\s*", re.DOTALL)  # how engines name BOS and EOS: </s>, <|endoftext|>, [EOS]
ROUNDING = 1e-2  # a log-prob may be so much above 0


class Answer(NamedTuple):
    """What an engine said of the tokens of one document, each list [n].

    logprobs: a number, None where there is none, or the numbers of several ids. ids, texts: the tokens; None where it
    does not say.
    """

    logprobs: list[Any]
    ids: list[int] | None = None
    texts: list[str] | None = None


class LogProbs:
    """The losses of a corpus' tokens that files have.

    Attributes:
        about: names the files, as the reference of a column.
    """

    def __init__(self, pattern: str, table: Corpus, strip_metadata: bool, max_unaligned: float):
        """Reads the files and checks them against the corpus, token by token.

        Args:
            pattern: path or glob.
            table: the corpus.
            strip_metadata: the documents were scored without the metadata before them.
            max_unaligned: the share of tokens that may be without a loss.

        Raises:
            UserError: no such file, or more tokens without a loss.
        """
        self._table, self._without_prefix = table, strip_metadata
        self._paths = readers.resolve([pattern], "score.external_logprobs")
        self._documents = table.documents()
        self._numbers = {name: number for number, name in enumerate(self._documents["id"].to_pylist())}
        self._counts, self._first = Counter[str](), dict[str, str]()
        self._sizes, self._vocabulary = None, None
        with tempfile.TemporaryFile() as file:  # as large as the column, wherever temporary files lie
            self._losses = np.memmap(file, np.float32, "w+", shape=(table.num_rows, table.sequence_length))
        self._losses[:] = np.nan
        self._read()
        without, tokens = self._without_loss()
        self._report(without, tokens, max_unaligned)
        self.about = {
            "files": [os.path.basename(path) for path in self._paths],
            "fingerprint": _hash(self._paths),
            "context": "the whole document",
            "tokens_without_loss": without / max(tokens, 1),
        }

    def chunks(self, ranges: Sequence[tuple[int, int]]) -> Generator[dict[str, np.ndarray], None, None]:
        """The losses of ranges of rows; 0 where a token has no predecessor in its row, NaN where there is none."""
        for start, stop in ranges:
            segments = self._table.read(np.arange(start, stop), ["segment_ids"])["segment_ids"]
            yield {"loss": np.where(positions_from_segments(segments) == 0, np.float32(0), self._losses[start:stop])}

    def _read(self) -> None:
        seen: set[int] = set()
        with progress(len(self._documents), 0, "read", "document") as bar:
            for group in _groups(self._answers(seen)):
                picked = self._documents.take(pyarrow.array([number for number, _ in group]))
                columns = self._table.read_documents(picked, ("tokens", "loss_mask"))
                places = picked["row"].to_numpy() * self._table.sequence_length + picked["start"].to_numpy()
                for (number, answer), read, place in zip(group, columns, places.tolist(), strict=True):
                    kept = read["loss_mask"] | (np.arange(len(read["tokens"])) == 0) | (not self._without_prefix)
                    losses = self._aligned(answer, read["tokens"][kept].tolist(), number)
                    self._losses.reshape(-1)[place + np.flatnonzero(kept)[: len(losses)]] = losses
                bar.update(len(group))
        self._counts["documents are not there"] = len(self._documents) - len(seen)

    def _answers(self, seen: set[int]) -> Iterable[tuple[int, Answer]]:
        """Number of the document and what was said of it, for every record that says something."""
        for path in self._paths:
            for record in readers.records(path, (*FIELDS, *NESTED)):
                try:
                    if record.fields is None:
                        raise BadRecord(record.problem)
                    number = self._number(record.fields)
                    if number in seen:
                        raise UserError(f"{record.place}: document {self._name(number)!r} was there before: keep one")
                    answer = answer_of(record.fields)
                except BadRecord as problem:
                    self._note("records cannot be used", f"{record.place}: {problem}")
                    continue
                seen.add(number)
                yield number, answer

    def _number(self, fields: dict[str, Any]) -> int:
        given = {name: fields[name] for name in ID_FIELDS if fields.get(name) is not None}
        for name, value in given.items():
            if name != "index" and isinstance(value, str) and value in self._numbers:
                return self._numbers[value]
            if name == "index" and isinstance(value, int) and 0 <= value < len(self._documents):
                return value
        said = ", ".join(f"{name} {value!r}" for name, value in given.items()) or "no id, custom_id or index"
        raise BadRecord(f"{said} names no document of the corpus")

    def _name(self, number: int) -> str:
        return self._documents["id"][number].as_py()

    def _aligned(self, answer: Answer, tokens: list[int], number: int) -> np.ndarray:
        """The losses of the tokens, with NaN for the first, up to the first that is another than the corpus'.

        The engine read them from BOS on or from behind it: whichever fits further.
        """
        texts = self._texts(tokens) if answer.texts is not None else None
        given = len(answer.logprobs)
        from_bos, behind = (_agreeing(answer, tokens, texts, offset) for offset in (0, 1))
        losses = from_bos if len(from_bos) >= 1 + len(behind) else [math.nan, *behind]
        if len(losses) < len(tokens):
            begins_behind = losses is not from_bos
            place = len(losses) - begins_behind
            what = "documents end before their last token" if place >= given else "documents have other tokens"
            there = answer.ids or answer.texts
            shows = f"{there[place]!r} for " if there and place < given else "not "
            self._note(what, f"{self._name(number)} at token {len(losses)}: {shows}{tokens[len(losses)]}")
        return np.array(losses, np.float32)

    def _texts(self, tokens: list[int]) -> list[str] | None:
        """The text that each token stands for; a part of a character shows as U+FFFD."""
        if self._vocabulary is None or self._sizes is None:
            self._vocabulary = self._table.vocabulary()
            self._sizes = self._vocabulary.token_bytes()
        sizes = self._sizes[tokens]
        content = self._vocabulary.decode(tokens).encode("utf-8")
        if sizes.sum() == len(content) + 1:  # the space that the vocabulary puts before a text
            sizes[np.flatnonzero(sizes)[0]] -= 1
        ends = np.cumsum(sizes)
        pieces = [content[begin:end] for begin, end in zip(ends - sizes, ends, strict=True)]
        return [piece.decode("utf-8", "replace") for piece in pieces]

    def _note(self, what: str, example: str) -> None:
        self._counts[what] += 1
        self._first.setdefault(what, example)

    def _without_loss(self) -> tuple[int, int]:
        """Tokens that can train and have no loss here, and all that can train."""
        without, tokens = 0, 0
        for begin in range(0, self._table.num_rows, TOGETHER):
            rows = np.arange(begin, min(begin + TOGETHER, self._table.num_rows))
            read = self._table.read(rows, ["loss_mask", "segment_ids"])
            counts = read["loss_mask"] & (positions_from_segments(read["segment_ids"]) > 0)
            without, tokens = without + int((counts & np.isnan(self._losses[rows])).sum()), tokens + int(counts.sum())
        return without, tokens

    def _report(self, without: int, tokens: int, limit: float) -> None:
        reasons = [
            f"{count:,} {what}" + (f" (first: {self._first[what]})" if what in self._first else "")
            for what, count in self._counts.items()
            if count
        ]
        said = f"{without:,} of {tokens:,} tokens have no loss there" + ("; " if reasons else "") + ", ".join(reasons)
        if without > limit * tokens:
            raise UserError(
                f"score.external_logprobs {', '.join(self._paths)}: {said}. Score what is missing too, or allow "
                f"a share with "
                f"score.max_unaligned (now {limit:g})"
            )
        print(f"score: {said}")


def answer_of(fields: dict[str, Any]) -> Answer:
    """What a record says, in whichever shape.

    Raises:
        BadRecord: in none of them, or numbers that cannot be log-probs.
    """
    inner = _read(fields.get("response")) or fields
    inner = _read(inner["body"]) if isinstance(inner.get("body"), dict) else inner
    choices = _read(inner.get("choices"))
    inner = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else inner
    logprobs, listed = _read(inner.get("logprobs")), _read(inner.get("prompt_logprobs"))
    echoed = logprobs if isinstance(logprobs, dict) else inner
    if isinstance(listed, list):
        answer = Answer([_several(entry) for entry in listed], _read(inner.get("prompt_token_ids")))
    elif isinstance(_read(echoed.get("token_logprobs")), list):
        answer = Answer(_read(echoed["token_logprobs"]), None, _read(echoed.get("tokens")))
    elif isinstance(logprobs, list):
        answer = Answer(logprobs, _read(inner.get("token_ids")))
    else:
        raise BadRecord(f"no log-probs (fields there: {', '.join(sorted(inner)) or 'none'})")
    names_itself = any(isinstance(entry, dict) for entry in answer.logprobs)
    told = answer.ids if answer.ids is not None else answer.texts
    if not isinstance(told, list) and not names_itself:
        raise BadRecord("log-probs without token ids: nothing says that these are the tokens of the corpus")
    if isinstance(told, list) and len(told) != len(answer.logprobs):
        raise BadRecord(f"{len(told)} tokens and {len(answer.logprobs)} log-probs")
    if answer.texts is not None and not all(isinstance(text, str) for text in answer.texts):
        raise BadRecord("tokens that are no text")
    for entry in answer.logprobs:
        for value in entry.values() if isinstance(entry, dict) else (entry,):
            if value is not None and (not isinstance(value, int | float) or value > ROUNDING):
                raise BadRecord(f"{value!r} is no log-prob: that is a number up to 0")
    return answer


def _read(value: Any) -> Any:
    """Parquet has nested values as JSON too."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value


def _several(entry: Any) -> dict[str, Any] | None:
    """{id: log-prob} of a token, from {id: {"logprob": x}}, {id: x} or pairs of them."""
    pairs = entry.items() if isinstance(entry, dict) else entry
    try:
        return None if entry is None else {str(k): v["logprob"] if isinstance(v, dict) else v for k, v in pairs}
    except (TypeError, ValueError, KeyError):
        raise BadRecord("prompt_logprobs are not of the form {id: {'logprob': x}}") from None


def _agreeing(answer: Answer, tokens: list[int], texts: list[str] | None, offset: int) -> list[float]:
    """The losses of the engine's tokens, from the first on, as long as they are the corpus' from `offset` on."""
    losses = []
    for place, token in enumerate(tokens[offset : offset + len(answer.logprobs)]):
        value = answer.logprobs[place]
        if answer.ids is not None and answer.ids[place] != token:
            break
        if answer.texts is not None and not _same_text(answer.texts[place], texts, place + offset):
            break
        if isinstance(value, dict):
            if str(token) not in value:
                break
            value = value[str(token)]
        losses.append(math.nan if value is None or not math.isfinite(value) else -float(value))
    return losses


def _same_text(theirs: str, ours: list[str] | None, place: int) -> bool:
    """Engines show BOS and EOS by names of their own, or as nothing, parts of characters as they like, and the first
    space or not. What stands for other text than EOS is no EOS: an answer may go on where a document ends."""
    if ours is None:
        return False
    text = ours[place]
    shown = theirs.lstrip(" ") == text.lstrip(" ") if place == 1 else theirs == text
    return shown or "\ufffd" in text or (text == "" and bool(CONTROL.fullmatch(theirs)))


def _groups(answers: Iterable[tuple[int, Answer]]) -> Iterable[list[tuple[int, Answer]]]:
    remaining = iter(answers)
    while group := list(itertools.islice(remaining, TOGETHER)):
        yield group


def _hash(paths: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

"""Log-probs from an API or another engine as a column of the corpus.

A file has one record per document, as JSON lines (.gz, .zst) or Parquet. A record names its document by `id` or
`custom_id`, as in documents.parquet, or by `index`, its row there. The scores are in the record itself, in `choices`
[0], or in `response.body.choices` [0]:
    token_ids [n], logprobs [n]                     plain
    prompt_logprobs [n], maybe prompt_token_ids     vLLM: {id: {"logprob": x}} for each token, or null
    logprobs {tokens [n], token_logprobs [n]}       completions with echo: the tokens as text

The engine scored a whole document, the model in training sees only the part of it that is in a row. So after a cut,
these losses are based on more context than the model has, and than a reference of the stage `score` would have.
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
READ_AT_ONCE = 256  # documents, or rows
CONTROL = re.compile(r"\s*(<.*>|\[.*\])?\s*", re.DOTALL)  # how engines name BOS and EOS: </s>, <|endoftext|>, [EOS]
ROUNDING = 1e-2  # how far above 0 a log-prob may be


class Answer(NamedTuple):
    """An engine's scores of the n tokens of one document.

    logprobs: for each token a number, None, or {id: number} of several ids. ids, texts: the tokens, if the engine
    reports them so.
    """

    logprobs: list[Any]
    ids: list[int] | None = None
    texts: list[str] | None = None


class LogProbs:
    """Losses of the tokens of a corpus, from files.

    Attributes:
        about: describes the files in the column's manifest.
    """

    def __init__(self, pattern: str, table: Corpus, strip_metadata: bool, max_unaligned: float):
        """Reads the files and checks them against the corpus, token by token.

        Args:
            pattern: path or glob.
            table: the corpus.
            strip_metadata: the documents were scored without the metadata before them.
            max_unaligned: maximum fraction of tokens without a loss.

        Raises:
            UserError: there is no such file, or more tokens have no loss.
        """
        self._table, self._without_prefix = table, strip_metadata
        self._paths = readers.resolve([pattern], "score.external_logprobs")
        self._documents = table.documents()
        self._ids: list[str] = self._documents["id"].to_pylist()
        self._numbers = {name: number for number, name in enumerate(self._ids)}
        self._counts, self._first = Counter[str](), dict[str, str]()
        self._sizes, self._vocabulary = None, None
        # As large as the column, so next to it unless the corpus is in a bucket; it is removed with the process.
        with tempfile.TemporaryFile(dir=None if "://" in table.path else table.path) as file:
            self._losses = np.memmap(file, np.float32, "w+", shape=(table.num_rows, table.sequence_length))
        self._losses[:] = np.nan
        self._read()
        without_loss = self._check(max_unaligned)
        self.about = {
            "files": [os.path.basename(path) for path in self._paths],
            "fingerprint": _hash(self._paths),
            "context": "the whole document",
            "tokens_without_loss": without_loss,
        }

    def chunks(self, ranges: Sequence[tuple[int, int]]) -> Generator[dict[str, np.ndarray], None, None]:
        """The losses of ranges of rows; 0 where a token has no predecessor in its row, NaN where it has no loss."""
        for start, stop in ranges:
            segments = self._table.read(np.arange(start, stop), ["segment_ids"])["segment_ids"]
            yield {"loss": np.where(positions_from_segments(segments) == 0, np.float32(0), self._losses[start:stop])}

    def _read(self) -> None:
        seen: set[int] = set()
        with progress(len(self._documents), 0, "read", "document") as bar:
            answers = iter(self._answers(seen))
            while group := list(itertools.islice(answers, READ_AT_ONCE)):
                picked = self._documents.take(pyarrow.array([number for number, _ in group]))
                columns = self._table.read_documents(picked, ("tokens", "loss_mask"))
                places = picked["row"].to_numpy() * self._table.sequence_length + picked["start"].to_numpy()
                for (number, answer), read, place in zip(group, columns, places.tolist(), strict=True):
                    kept = read["loss_mask"] | (np.arange(len(read["tokens"])) == 0) | (not self._without_prefix)
                    losses = self._aligned(answer, read["tokens"][kept].tolist(), number)
                    self._losses.reshape(-1)[place + np.flatnonzero(kept)[: len(losses)]] = losses
                bar.update(len(group))
        self._counts["documents are missing"] = len(self._documents) - len(seen)

    def _answers(self, seen: set[int]) -> Iterable[tuple[int, Answer]]:
        """(number of the document, its scores) of each usable record."""
        for path in self._paths:
            for record in readers.records(path, (*FIELDS, *NESTED)):
                try:
                    if record.fields is None:
                        raise BadRecord(record.problem)
                    number = self._number(record.fields)
                    if number in seen:
                        name = self._ids[number]
                        raise UserError(
                            "logprobs-twice", f"{record.place}: document {name!r} has an earlier record: keep one"
                        )
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
            if name == "index" and type(value) is int and 0 <= value < len(self._documents):
                return value
        said = ", ".join(f"{name} {value!r}" for name, value in given.items()) or "no id, custom_id or index"
        raise BadRecord(f"{said} names no document of the corpus")

    def _aligned(self, answer: Answer, tokens: list[int], number: int) -> np.ndarray:
        """The losses of the tokens, NaN for the first, up to the first token that differs from the corpus.

        The engine read the document with BOS or without it: whichever agrees for more tokens.
        """
        texts = self._texts(tokens) if answer.texts is not None else None
        given = len(answer.logprobs)
        with_bos, without = (_agreeing(answer, tokens, texts, offset) for offset in (0, 1))
        losses = with_bos if len(with_bos) >= 1 + len(without) else [math.nan, *without]
        if len(losses) < len(tokens):
            place = len(losses) - (losses is not with_bos)
            what = "documents end before their last token" if place >= given else "documents have other tokens"
            given_tokens = answer.ids or answer.texts
            instead = f"{given_tokens[place]!r} for " if given_tokens and place < given else "not "
            self._note(what, f"{self._ids[number]} at token {len(losses)}: {instead}{tokens[len(losses)]}")
        return np.array(losses, np.float32)

    def _texts(self, tokens: list[int]) -> list[str] | None:
        """The text of each token; a part of a character is U+FFFD."""
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

    def _check(self, limit: float) -> float:
        """The fraction of the tokens that can train without a loss; prints it and its reasons, or refuses it."""
        without, tokens = 0, 0
        for begin in range(0, self._table.num_rows, READ_AT_ONCE):
            rows = np.arange(begin, min(begin + READ_AT_ONCE, self._table.num_rows))
            read = self._table.read(rows, ["loss_mask", "segment_ids"])
            counts = read["loss_mask"] & (positions_from_segments(read["segment_ids"]) > 0)
            without, tokens = without + int((counts & np.isnan(self._losses[rows])).sum()), tokens + int(counts.sum())
        reasons = [
            f"{count:,} {what}" + (f" (first: {self._first[what]})" if what in self._first else "")
            for what, count in self._counts.items()
            if count
        ]
        said = f"{without:,} of {tokens:,} tokens have no loss" + ("; " if reasons else "") + ", ".join(reasons)
        if without > limit * tokens:
            raise UserError(
                "logprobs-unaligned",
                f"score.external_logprobs {', '.join(self._paths)}: {said}. Score the missing documents too, or raise "
                f"score.max_unaligned (now {limit:g})",
            )
        print(f"score: {said}")
        return without / max(tokens, 1)


def answer_of(fields: dict[str, Any]) -> Answer:
    """The scores of a record, in any of the three formats.

    Raises:
        BadRecord: it has another format, or numbers that cannot be log-probs.
    """
    response = _read(fields.get("response"))
    inner = response if isinstance(response, dict) else fields
    body = _read(inner.get("body"))
    inner = body if isinstance(body, dict) else inner
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
        raise BadRecord(f"no log-probs (its fields: {', '.join(sorted(inner)) or 'none'})")
    names_itself = any(isinstance(entry, dict) for entry in answer.logprobs)
    reported = answer.ids if answer.ids is not None else answer.texts
    if not isinstance(reported, list) and not names_itself:
        raise BadRecord("log-probs without token ids: they may be of other tokens than the corpus has")
    if isinstance(reported, list) and len(reported) != len(answer.logprobs):
        raise BadRecord(f"{len(reported)} tokens, but {len(answer.logprobs)} log-probs")
    if answer.texts is not None and not all(isinstance(text, str) for text in answer.texts):
        raise BadRecord("tokens that are not text")
    for entry in answer.logprobs:
        for value in entry.values() if isinstance(entry, dict) else (entry,):
            if value is not None and (not isinstance(value, int | float) or value > ROUNDING):
                raise BadRecord(f"{value!r} is not a log-prob, a number up to 0")
    return answer


def _read(value: Any) -> Any:
    """Parses a text as JSON, since Parquet files may hold nested values so."""
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
    """The losses of the engine's first tokens, as long as they equal the corpus' tokens from `offset` on."""
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
    """Whether the texts are of one token. Engines have their own names for BOS and EOS, or none; show parts of
    characters in various ways; and may drop the first space. Other text than a name is not EOS: an answer may continue
    after the end of the document."""
    if ours is None:
        return False
    text = ours[place]
    shown = theirs.lstrip(" ") == text.lstrip(" ") if place == 1 else theirs == text
    return shown or "\ufffd" in text or (text == "" and bool(CONTROL.fullmatch(theirs)))


def _hash(paths: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

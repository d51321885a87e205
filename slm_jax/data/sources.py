"""Where documents come from: sources, the row schemas of public corpora, and reading their files."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gin
import numpy as np

from slm_jax.data import conversations, readers
from slm_jax.data.conversations import TEMPLATES, Turn
from slm_jax.data.hashing import mix, salt
from slm_jax.data.readers import BadRecord
from slm_jax.errors import UserError


class Schema(NamedTuple):
    """Dotted paths of the fields of a record; a path goes into objects, and into objects written as JSON strings.

    Records that are conversations have either a list of turns in the place of the text, and `turn` names who speaks and
    what; or what was asked in the place of the text, and the answer in `response`.
    """

    text: str = "text"
    url: str | None = "url"
    source: str | None = None
    turn: tuple[str, str] | None = None
    response: str | None = None


SCHEMAS = {
    "plain": Schema(),
    # One document per .txt file.
    "text": Schema(url=None),
    # open-web-math/open-web-math, Parquet: url, text, date, metadata (a JSON string).
    "openwebmath": Schema(),
    # cerebras/SlimPajama-627B, .jsonl.zst: text, meta.redpajama_set_name; no URL. Mirrors write meta as a JSON string.
    "slimpajama": Schema(url=None, source="meta.redpajama_set_name"),
    # allenai/c4, .json.gz: text, timestamp, url.
    "c4": Schema(),
    # tiiuae/falcon-refinedweb, Parquet: content (not text), url, timestamp, dump, segment, image_urls.
    "refinedweb": Schema(text="content"),
    # mlfoundations/dclm-baseline-1.0, .jsonl.zst: text, url, metadata, and scores of its filters.
    "dclm": Schema(),
    # OSCAR 22.01 and 23.01, .jsonl.zst: content, warc_headers, metadata.
    "oscar": Schema(text="content", url="warc_headers.warc-target-uri"),
    # allenai/tulu-v2-sft-mixture and most chat data since: messages [{role, content}], dataset, id.
    "messages": Schema(text="messages", url=None, turn=("role", "content")),
    # teknium/OpenHermes-2.5 and ShareGPT: conversations [{from, value}].
    "conversations": Schema(text="conversations", url=None, turn=("from", "value")),
    "prompt_response": Schema(text="prompt", url=None, response="response"),
}

FIRST_RECORDS = 1000  # enough to tell a field that is absent from one that is rare
_TFDS = re.compile(r"tfds:(?P<name>[^:]+:\d+\.\d+\.\d+):(?P<split>.+)")


@gin.configurable
@dataclass(frozen=True)
class Source:
    """Documents of one origin.

    Attributes:
      name: name of the source in the corpus: letters, digits, '.', '_' and '-'.
      files: paths or globs of .jsonl, .json (JSON lines), .parquet and .txt files, plain or compressed (.gz, .zst); or
        one 'tfds:NAME:VERSION:SPLIT'.
      directory: folder that relative paths start from; the working directory by default.
      schema: which fields hold what: a key of `SCHEMAS`.
      text_field: field of the text, as a dotted path (`meta.content`), in place of the schema's.
      url_field: field of the URL, likewise.
      source_field: field that divides the source, likewise: documents with a value in it get the source name
        NAME/VALUE.
      response_field: field of the response, likewise.
      template: how a conversation is written: a key of `TEMPLATES`, for schemas of conversations. Only the responses,
        and the EOS after them, carry loss.
      part: 'K/N' keeps the documents whose text hashes to K modulo N, 'J-K/N' those from J to K. Parts of the same
        files are disjoint, whatever the sources are called, and copies of a text fall into the same part.
      max_documents: stop after this many documents, in the order of the files.
      max_characters: stop after this many characters, in the order of the files.
      spans_field: field with [[begin, end], ...] in characters of the text; tokens in these spans get the source
        NAME/noise.
      bad_lines: number of unreadable records that are skipped and counted before the source is refused.
    """

    name: str
    files: Sequence[str]
    directory: str = ""
    schema: str = "plain"
    text_field: str | None = None
    url_field: str | None = None
    source_field: str | None = None
    response_field: str | None = None
    template: str | None = None
    part: str | None = None
    max_documents: int | None = None
    max_characters: int | None = None
    spans_field: str | None = None
    bad_lines: int = 10

    @property
    def tfds(self) -> tuple[str, str] | None:
        """Name and split, where the documents come from TensorFlow Datasets."""
        found = _TFDS.fullmatch(self.files[0]) if len(self.files) == 1 else None
        return (found["name"], found["split"]) if found else None

    def fields(self) -> Schema:
        schema = SCHEMAS[self.schema]
        return Schema(
            self.text_field or schema.text,
            self.url_field or schema.url,
            self.source_field or schema.source,
            schema.turn,
            self.response_field or schema.response,
        )

    def paths(self) -> list[str]:
        return (
            []
            if self.tfds
            else readers.resolve([os.path.join(self.directory, file) for file in self.files], f"source {self.name!r}")
        )

    def check(self) -> None:
        """Raises UserError for settings that make no sense and for files that are missing."""
        where = f"source {self.name!r}"
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(f"{where}: name must be letters, digits, '.', '_' and '-'")
        if isinstance(self.files, str) or not self.files:
            raise UserError(f"{where}: files must be a list of paths or globs, not {self.files!r}")
        if self.schema not in SCHEMAS:
            raise UserError(f"{where}: schema {self.schema!r} is not one of {', '.join(SCHEMAS)}")
        for field in ("max_documents", "max_characters"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise UserError(f"{where}: {field} is {getattr(self, field)}; use a positive number or None")
        self._check_template(where)
        _part(self)
        if self.tfds and (self.part or self.max_documents or self.max_characters or self.spans_field):
            raise UserError(
                f"{where}: part, max_documents, max_characters and spans_field are for files; "
                "slice in TFDS instead, such as tfds:NAME:VERSION:train[:50%]"
            )
        if any(str(file).startswith("tfds:") for file in self.files) and not self.tfds:
            raise UserError(f"{where}: {self.files[0]!r} must be one 'tfds:NAME:VERSION:SPLIT', alone in the list")
        self.paths()

    def _check_template(self, where: str) -> None:
        fields, known = self.fields(), ", ".join(TEMPLATES)
        has_turns = fields.turn or fields.response
        if self.template is None and has_turns:
            raise UserError(f"{where}: schema {self.schema!r} has conversations: say with template which of {known}")
        if self.template is not None and self.template not in TEMPLATES:
            raise UserError(f"{where}: template {self.template!r} is not one of {known}")
        if self.template and not has_turns:
            raise UserError(
                f"{where}: a template is for conversations, schema {self.schema!r} has a text: take the schema "
                "messages, conversations or prompt_response, or name a response_field"
            )
        if self.template and (self.spans_field or self.tfds):
            raise UserError(f"{where}: neither spans_field nor TFDS goes with a template: leave one of them out")


def has_field(source: Source, path: str) -> bool:
    """Whether one of the `FIRST_RECORDS` of a source has the field, be it empty. TFDS has not looked yet: True."""
    found = (record for file in source.paths() for record in readers.records(file, [path.split(".")[0]]))
    first = itertools.islice(found, FIRST_RECORDS)
    return bool(source.tfds) or any(
        record.fields is not None and _field(record.fields, path) is not _MISSING for record in first
    )


def read_documents(source: Source, field: str | None = None) -> Iterator[dict[str, Any]]:
    """Reads the files of a source, in order, without TensorFlow.

    Args:
        source: what to read.
        field: dotted path of one more field of the records, a text, a number or a list of them.

    Yields:
        text; url ('' for none); field (as text, '' for none); source (NAME or NAME/VALUE); spans (JSON); loss_spans
        (JSON; '' where all of the text has loss); index (number of the record in the source); skipped (why this record
        gives no document, '' for documents); bytes_read (of all files so far).

    Raises:
        UserError: a file cannot be read, or more than `bad_lines` records cannot.
    """
    fields = source.fields()
    paths = (fields.text, fields.url, fields.source, fields.response, source.spans_field, field)
    columns = [path.split(".")[0] for path in paths if path]
    first, last, parts = _part(source)
    index, bad, taken, characters, bytes_before = -1, 0, 0, 0, 0
    for path in source.paths():
        for record in readers.records(path, columns):
            index += 1
            row = {"text": "", "url": "", "field": "", "source": source.name, "spans": "[]", "index": index}
            row |= {"loss_spans": "", "skipped": "", "bytes_read": bytes_before + record.bytes_read}
            try:
                row |= _document(record, source, fields, field)
            except BadRecord as problem:
                bad += 1
                row["skipped"] = "unreadable record"
                if bad > source.bad_lines:
                    raise UserError(
                        f"{record.place}: {problem}; source {source.name!r} allows bad_lines = {source.bad_lines}: "
                        "repair the file, name the right fields, or allow more"
                    ) from None
            if row["skipped"]:
                yield row
                continue
            if parts > 1 and not first <= _text_hash(row["text"]) % parts <= last:
                continue
            yield row
            taken += 1
            characters += len(row["text"])
            if taken == source.max_documents or (source.max_characters and characters >= source.max_characters):
                return
        bytes_before += os.path.getsize(path)


def _document(record: readers.Record, source: Source, fields: Schema, field: str | None) -> dict[str, Any]:
    if record.fields is None:
        raise BadRecord(record.problem)
    text = _field(record.fields, fields.text)
    if text is _MISSING:
        there = ", ".join(sorted(record.fields)) or "none"
        raise BadRecord(f"no field {fields.text!r} (schema {source.schema!r}; fields there: {there})")
    if not text:
        return {"skipped": "empty text"}
    loss_spans = ""
    if source.template:
        text, learned = conversations.written(_turns(record.fields, text, fields), TEMPLATES[source.template])
        loss_spans = json.dumps(learned)
        if not text:
            return {"skipped": "no response"}
    if not isinstance(text, str):
        raise BadRecord(f"field {fields.text!r} is not a string")
    url = _field(record.fields, fields.url) if fields.url else None
    value = _field(record.fields, fields.source) if fields.source else None
    more = _as_text(_field(record.fields, field)) if field else ""
    for string in (text, url, value, more):
        if isinstance(string, str) and not _is_unicode(string):
            raise BadRecord("not valid Unicode (half of a surrogate pair)")
    spans = _field(record.fields, source.spans_field) if source.spans_field else None
    return {
        "text": text,
        "url": url if isinstance(url, str) else "",
        "field": more,
        "source": f"{source.name}/{value}" if isinstance(value, str) and value else source.name,
        "spans": json.dumps(_checked_spans(spans, len(text), source.spans_field)),
        "loss_spans": loss_spans,
    }


def _turns(record: dict[str, Any], value: Any, fields: Schema) -> list[Turn]:
    """The conversation of a record; nothing where a response says nothing."""
    if fields.response is None:
        assert fields.turn is not None
        turns = conversations.turns_of(value, fields.turn)
    else:
        response = _field(record, fields.response)
        if not isinstance(value, str) or not isinstance(response, str | None):
            raise BadRecord(f"fields {fields.text!r} and {fields.response!r} are not both strings")
        turns = [Turn("user", value), Turn("assistant", response or "")]
    return [] if any(turn.role == "assistant" and not turn.content.strip() for turn in turns) else turns


_MISSING = object()


def _field(fields: Any, path: str) -> Any:
    for key in path.split("."):
        if isinstance(fields, str):  # some mirrors write nested objects as JSON
            try:
                fields = json.loads(fields)
            except ValueError:
                return _MISSING
        if not isinstance(fields, dict) or key not in fields:
            return _MISSING
        fields = fields[key]
    return fields


def _as_text(value: Any) -> str:
    """A text on one line, of a text, a number, or a list of them; '' for everything else."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(_as_text, value)))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return " ".join(str(value).split()) if isinstance(value, str) or is_number else ""


def _checked_spans(spans: Any, length: int, field: str | None) -> list[list[int]]:
    if spans is None or spans is _MISSING:
        return []
    try:
        spans = [[int(begin), int(end)] for begin, end in spans]
    except (TypeError, ValueError):
        raise BadRecord(f"field {field!r} is not a list of [begin, end]") from None
    if any(not 0 <= begin <= end <= length for begin, end in spans):
        raise BadRecord(f"field {field!r} has a span outside the text of {length} characters")
    return spans


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _part(source: Source) -> tuple[int, int, int]:
    if source.part is None:
        return 0, 0, 1
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)/(\d+)", source.part)
    first, last, parts = (int(found[1] or found[2]), int(found[2]), int(found[3])) if found else (1, 0, 0)
    if not first <= last < parts:
        raise UserError(
            f"source {source.name!r}: part {source.part!r} must be 'K/N' with K < N, such as '0/2', or 'J-K/N'"
        )
    return first, last, parts


def text_fraction(text: str) -> float:
    """A number in [0, 1) that a text hashes to; tells nothing of the `part` that it falls into."""
    return int(mix(np.array([_text_hash(text)], np.uint64) ^ salt("fraction"))[0] >> np.uint64(11)) / (1 << 53)


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")

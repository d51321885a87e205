"""Where documents come from: sources, the row schemas of public corpora, and reading them."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np

from slm_jax.configurable import Count, Natural, OneOf, configurable
from slm_jax.data import conversations, readers
from slm_jax.data.conversations import TEMPLATES, Turn
from slm_jax.data.hashing import mix, salt
from slm_jax.data.readers import BadRecord
from slm_jax.errors import UserError


class Schema(NamedTuple):
    """Dotted paths of the fields of a record; a path enters objects, and objects written as JSON strings.

    A record that is a conversation has in place of the text either a list of turns, of which `turn` names the fields
    for the speaker and the words, or a prompt, whose answer is in `response`.
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
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TFDS = re.compile(r"tfds:(?P<name>[^:]+:\d+\.\d+\.\d+):(?P<split>.+)")


@configurable
@dataclass(frozen=True)
class Source:
    """Documents of one origin: files, a data set of TensorFlow Datasets, or a seqio Task or Mixture.

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
      max_line_bytes: maximum decompressed size of a line of JSON, or of a text file; larger ones are refused.
      max_document_characters: maximum length of a document; longer ones are refused.
      seqio: name of a registered seqio Task or Mixture to read instead of files. The text is its feature `targets`,
        unless text_field names another.
      seqio_module: Python module to import first, which registers the Task or Mixture.
      seqio_split: split of the Task or Mixture to read.
    """

    name: str
    files: Sequence[str] = ()
    directory: str = ""
    schema: Annotated[str, OneOf(SCHEMAS)] = "plain"
    text_field: str | None = None
    url_field: str | None = None
    source_field: str | None = None
    response_field: str | None = None
    template: Annotated[str, OneOf(TEMPLATES)] | None = None
    part: str | None = None
    max_documents: Count | None = None
    max_characters: Count | None = None
    spans_field: str | None = None
    bad_lines: Natural = 10
    max_line_bytes: Count = readers.MAX_LINE_BYTES
    max_document_characters: Count = 20_000_000
    seqio: str | None = None
    seqio_module: str | None = None
    seqio_split: str = "train"

    @property
    def tfds(self) -> tuple[str, str] | None:
        """Name and split, where the documents come from TensorFlow Datasets."""
        found = _TFDS.fullmatch(self.files[0]) if len(self.files) == 1 else None
        return (found["name"], found["split"]) if found else None

    @property
    def has_files(self) -> bool:
        return not (self.tfds or self.seqio)

    @property
    def origin(self) -> str:
        """The origin of documents that are not in files."""
        return f"seqio {self.seqio}" if self.seqio else self.files[0]

    def fields(self) -> Schema:
        schema = SCHEMAS[self.schema]
        text = "targets" if self.seqio and self.schema == "plain" else schema.text
        return Schema(
            self.text_field or text,
            self.url_field or schema.url,
            self.source_field or schema.source,
            schema.turn,
            self.response_field or schema.response,
        )

    def paths(self) -> list[str]:
        """The files; none for TFDS and seqio."""
        if not self.has_files:
            return []
        return readers.resolve([os.path.join(self.directory, file) for file in self.files], f"source {self.name!r}")

    def described(self) -> dict[str, Any]:
        """The settings that determine the documents, as JSON, but for the content of the files."""
        settings = {**asdict(self), "files": list(self.files), "directory": None}
        for limit in ("max_line_bytes", "max_document_characters"):
            del settings[limit]
        if self.seqio is None:  # as before there were these settings
            for name in ("seqio", "seqio_module", "seqio_split"):
                del settings[name]
        return settings

    def check(self) -> None:
        """Raises UserError for invalid settings and for files or Tasks that are missing."""
        where = f"source {self.name!r}"
        if not NAME.fullmatch(self.name):
            raise UserError("source-name", f"{where}: name must be letters, digits, '.', '_' and '-'")
        if bool(self.files) == bool(self.seqio):
            raise UserError("source-files", f"{where}: set either files, which is {self.files!r}, or seqio")
        has_conversations = self.fields().turn or self.fields().response
        if self.template is None and has_conversations:
            raise UserError(
                "source-template",
                f"{where}: schema {self.schema!r} has conversations: set template to one of {', '.join(TEMPLATES)}",
            )
        if self.template and not has_conversations:
            raise UserError(
                "source-template",
                f"{where}: a template is for conversations, but schema {self.schema!r} has texts: use the schema "
                "messages, conversations or prompt_response, or name a response_field",
            )
        if self.template and self.spans_field:
            raise UserError("source-template", f"{where}: spans_field does not go with a template: remove one of them")
        if any(str(file).startswith("tfds:") for file in self.files) and not self.tfds:
            raise UserError(
                "source-tfds", f"{where}: {self.files[0]!r} must be one 'tfds:NAME:VERSION:SPLIT', alone in the list"
            )
        _part(self)
        self.paths()
        if self.seqio:
            from slm_jax.data.seqio_records import registered

            registered(self.seqio, self.seqio_module, self.seqio_split, where)


def has_field(source: Source, path: str) -> bool:
    """Whether any of the first `FIRST_RECORDS` of a source has the field, even if empty."""
    found = (record for _, records in _inputs(source, [path, path.split(".")[0]]) for record in records)
    first = itertools.islice(found, FIRST_RECORDS)
    return any(record.fields is not None and _field(record.fields, path) is not _MISSING for record in first)


def _inputs(source: Source, columns: Sequence[str]) -> Iterator[tuple[str, Iterator[readers.Record]]]:
    """(name, records) of each file, Task or data set."""
    if not source.has_files:
        yield source.origin, task_or_tfds_records(source, columns)
    for path in source.paths():
        yield path, readers.records(path, columns, source.max_line_bytes)


def task_or_tfds_records(source: Source, columns: Sequence[str]) -> Iterator[readers.Record]:
    """The records of a source without files. Imports TensorFlow."""
    from slm_jax.data.seqio_records import registered, task_records, tfds_records

    if source.seqio:
        task = registered(source.seqio, source.seqio_module, source.seqio_split, f"source {source.name!r}")
        return task_records(task, source.seqio_split, columns)
    assert source.tfds is not None
    return tfds_records(*source.tfds, columns)


def columns_of(source: Source, field: str | None) -> list[str]:
    """The top-level fields of the records that a source needs; `field` as in `read_records`."""
    fields = source.fields()
    paths = (fields.text, fields.url, fields.source, fields.response, source.spans_field, field)
    return [name for path in paths if path for name in {path, path.split(".")[0]}]


@dataclass
class Tally:
    """Counts of the records of one file, or of a part of it, by outcome.

    Attributes:
        file: its name.
        taken: documents so far for `Source.max_documents`, those of earlier files included.
        characters: likewise for `Source.max_characters`.
        records: number of records.
        documents: how many of them gave a document, in `Source.part` or not.
        bad: place and reason of each record that cannot be read.
        skipped: reason -> [number of records that gave no document, place and reason of the first].
    """

    file: str
    taken: int = 0
    characters: int = 0
    records: int = 0
    documents: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)
    skipped: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def reached(self, source: Source) -> bool:
        """Whether the source takes no more documents."""
        limit = source.max_characters
        return self.taken == source.max_documents or (limit is not None and self.characters >= limit)

    def join(self, later: "Tally") -> None:
        """Adds the tally of a later part of the file."""
        self.taken, self.characters = later.taken, later.characters
        self.records, self.documents = self.records + later.records, self.documents + later.documents
        self.bad += later.bad
        for reason, (count, first) in later.skipped.items():
            self.skipped.setdefault(reason, [0, first])[0] += count


def read_documents(source: Source, field: str | None = None) -> Iterator[dict[str, Any]]:
    """Reads a source in order. Imports TensorFlow only for TFDS and seqio.

    Args:
        source: what to read.
        field: as in `read_records`.

    Yields:
        The rows of `read_records`.

    Raises:
        UserError: as `read_records` and `check_tally`.
    """
    index, tally = 0, Tally("")
    for file, records in _inputs(source, columns_of(source, field)):
        tally = Tally(file, tally.taken, tally.characters, bad=tally.bad)
        yield from read_records(source, records, tally, index, field)
        if tally.reached(source):
            return
        check_tally(source, tally)
        index += tally.records


def read_records(
    source: Source, records: Iterable[readers.Record], tally: Tally, index: int, field: str | None = None
) -> Iterator[dict[str, Any]]:
    """Makes documents of records, until the source takes no more.

    Args:
        source: says how.
        records: of one file, or of a part of it.
        tally: counts what becomes of them.
        index: number of the first record in the source.
        field: dotted path of one more field of the records, a text, a number or a list of them.

    Yields:
        text; url ('' for none); field (as text, '' for none); source (NAME or NAME/VALUE); spans (list of [begin,
        end]); loss_spans (list of LossSpan; None where all of the text carries loss); markers (of conversations, see
        there); index (number of the record in the source); skipped (the kind of reason why this record gives no
        document, '' for documents); problem (place and reason of a skipped record); file.

    Raises:
        UserError: a document is too long, or more than `bad_lines` records are unreadable.
    """
    fields, (first, last, parts) = source.fields(), _part(source)
    empty = {"text": "", "url": "", "field": "", "source": source.name, "spans": [], "loss_spans": None}
    empty |= {"markers": []}
    for record in records:
        row = empty | {"index": index + tally.records, "skipped": "", "problem": "", "file": tally.file}
        tally.records += 1
        try:
            row |= _document(record, source, fields, field)
        except BadRecord as error:
            row |= _skipped(record.place, str(error))
            tally.bad.append(row["problem"])
            check_bad_lines(source, tally.bad)
        if row["skipped"]:
            tally.skipped.setdefault(row["skipped"], [0, row["problem"]])[0] += 1
            yield row
            continue
        tally.documents += 1
        if len(row["text"]) > source.max_document_characters:
            raise UserError(
                "source-document-too-long",
                f"{record.place}: a document of {len(row['text']):,} characters is longer than "
                f"max_document_characters = {source.max_document_characters:,}: split it, or raise the limit",
            )
        if parts > 1 and not first <= text_hash(row["text"]) % parts <= last:
            continue
        tally.taken += 1
        tally.characters += len(row["text"])
        yield row
        if tally.reached(source):
            return


def check_bad_lines(source: Source, bad: Sequence[str]) -> None:
    """Refuses more unreadable records than the source allows."""
    if len(bad) > source.bad_lines:
        raise UserError(
            "source-bad-lines",
            f"{bad[source.bad_lines]}; source {source.name!r} allows bad_lines = {source.bad_lines}: repair the file, "
            "name the right fields, or allow more",
        )


def check_tally(source: Source, tally: Tally) -> None:
    """Refuses a file that gives no document at all, which is not an accident as a few unreadable lines may be."""
    if not tally.documents:
        problem = next((first for _, first in tally.skipped.values()), "no records")
        raise UserError(
            "source-file-without-document",
            f"source {source.name!r}: {tally.file} yields no document ({problem}): repair it, or remove it from the "
            "source",
        )


def _skipped(place: str, problem: str) -> dict[str, str]:
    """The kind of a problem is its text before the details in parentheses."""
    return {"skipped": problem.partition(" (")[0], "problem": f"{place}: {problem}"}


def _document(record: readers.Record, source: Source, fields: Schema, field: str | None) -> dict[str, Any]:
    if record.fields is None:
        raise BadRecord(record.problem)
    text = _field(record.fields, fields.text)
    if text is _MISSING:
        there = ", ".join(sorted(record.fields)) or "none"
        nested = "; a field in an object is written with a dot, 'object.field'"
        nested = nested if any(isinstance(value, dict) for value in record.fields.values()) else ""
        raise BadRecord(f"no field {fields.text!r} (schema {source.schema!r}; fields there: {there}{nested})")
    loss_spans, markers = None, []
    # Types come before emptiness: 0, false and {} are mistakes, and only null is as empty as "".
    if source.template:
        turns = _turns(record.fields, text, fields)
        if turns is None:
            return _skipped(record.place, "empty text")
        text, loss_spans = conversations.written(turns, TEMPLATES[source.template])
        markers = conversations.markers(turns, TEMPLATES[source.template])
        if not text:
            return _skipped(record.place, "no response")
    elif not isinstance(text, str | None):
        raise BadRecord(f"field {fields.text!r} is not a string (it is {repr(text)[:40]})")
    if not text:
        return _skipped(record.place, "empty text")
    url = _field(record.fields, fields.url) if fields.url else None
    value = _field(record.fields, fields.source) if fields.source else None
    more = _as_text(_field(record.fields, field)) if field else ""
    for string in (text, url, value, more):
        if isinstance(string, str):
            try:
                string.encode("utf-8")
            except UnicodeEncodeError:
                raise BadRecord("not valid Unicode (half of a surrogate pair)") from None
    return {
        "text": text,
        "url": url if isinstance(url, str) else "",
        "field": more,
        "source": f"{source.name}/{value}" if isinstance(value, str) and value else source.name,
        "spans": _spans(record.fields, source.spans_field, len(text)) if source.spans_field else [],
        "loss_spans": loss_spans,
        "markers": markers,
    }


def _turns(record: dict[str, Any], value: Any, fields: Schema) -> list[Turn] | None:
    """The conversation of a record; no turns where a response is empty, None where there is no conversation."""
    if fields.response is None:
        assert fields.turn is not None
        if value in (None, "", []):
            return None
        turns = conversations.turns_of(value, fields.turn)
    else:
        response = _field(record, fields.response)
        if not isinstance(value, str) or not isinstance(response, str | None):
            raise BadRecord(f"fields {fields.text!r} and {fields.response!r} are not both strings")
        if not value:
            return None
        turns = [Turn("user", value), Turn("assistant", response or "")]
    return [] if any(turn.role == "assistant" and not turn.content.strip() for turn in turns) else turns


_MISSING = object()


def _field(fields: Any, path: str) -> Any:
    if isinstance(fields, dict) and path in fields:  # a name with dots in it
        return fields[path]
    for key in path.split("."):
        if isinstance(fields, str):  # some mirrors write nested objects as JSON
            try:
                fields = json.loads(fields)
            except (ValueError, RecursionError):
                return _MISSING
        if not isinstance(fields, dict) or key not in fields:
            return _MISSING
        fields = fields[key]
    return fields


def _as_text(value: Any) -> str:
    """A text on one line, from a text, a number, or a list of them; '' for everything else."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(_as_text, value)))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return " ".join(str(value).split()) if isinstance(value, str) or is_number else ""


def _spans(record: dict[str, Any], field: str, length: int) -> list[list[int]]:
    spans = _field(record, field)
    if spans is None or spans is _MISSING:
        return []
    try:
        spans = [[int(begin), int(end)] for begin, end in spans]
    except (TypeError, ValueError):
        raise BadRecord(f"field {field!r} is not a list of [begin, end]") from None
    if any(not 0 <= begin <= end <= length for begin, end in spans):
        raise BadRecord(f"field {field!r} has a span outside the text (of {length} characters)")
    return spans


def _part(source: Source) -> tuple[int, int, int]:
    if source.part is None:
        return 0, 0, 1
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)/(\d+)", source.part)
    first, last, parts = (int(found[1] or found[2]), int(found[2]), int(found[3])) if found else (1, 0, 0)
    if not first <= last < parts:
        raise UserError(
            "source-part",
            f"source {source.name!r}: part {source.part!r} must be 'K/N' with K < N, such as '0/2', or 'J-K/N'",
        )
    return first, last, parts


def text_fraction(text: str) -> float:
    """A number in [0, 1) that a text hashes to, independent of the `part` that the text falls into."""
    return int(mix(np.array([text_hash(text)], np.uint64) ^ salt("fraction"))[0] >> np.uint64(11)) / (1 << 53)


def text_hash(text: str) -> int:
    """A 64-bit hash of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")

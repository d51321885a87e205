"""Stage `analyze tokenizers`: vocabularies compared on the same text, by the tokens and the bits that it takes."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from slm_jax import config as config_lib
from slm_jax import processes
from slm_jax.analyze import plots, tables
from slm_jax.analyze.columns import Rows, read_losses, read_rows, score_columns
from slm_jax.checkpoint import read_about, saved_steps
from slm_jax.configurable import Natural, configurable
from slm_jax.data.corpus import Corpus
from slm_jax.data.segments import segments_of
from slm_jax.data.sources import Source, read_documents
from slm_jax.data.store import SHARD_ROWS
from slm_jax.data.vocabularies import load_vocabulary
from slm_jax.data.vocabulary import ByteVocabulary, Vocabulary
from slm_jax.errors import UserError
from slm_jax.files import write_json, write_text
from slm_jax.metrics import progress

BYTES = "bytes"  # the vocabulary that needs no file
ALL = "all"


@configurable
def analyze_tokenizers(
    output: str,
    runs: Sequence[str] = (),
    corpora: dict[str, str] | None = None,
    vocabularies: dict[str, str] | None = None,
    sources: Sequence[Source] = (),
    languages: dict[str, str] | None = None,
    step: Natural | None = None,
    score_missing: bool = False,
) -> dict[str, Any]:
    """Compares vocabularies on the same text: tokens per byte and per word, and bits per byte of models.

    `slm-jax analyze tokenizers [RUN ...]`. Writes tokenizers.json, summary.md, fertility.csv, bits_per_byte.csv and
    figures as PNG and SVG. Words are what white space separates: in languages written without spaces they mean little.

    Args:
      output: folder for the results.
      runs: run directories; each is measured on the corpus that has its vocabulary.
      corpora: {name: corpus} of the same held-out documents, each in another vocabulary, which the name is for.
      vocabularies: {name: path} of more vocabularies: a corpus, a saved vocabulary, a .model file, or the word bytes.
      sources: texts to count tokens of, read from files; those of the first corpus by default.
      languages: {source: language}, to sum up by language: {'gnad': 'German', 'books': 'English'}.
      step: checkpoint of the runs; None is the last.
      score_missing: score the corpora that have no column <folder of the run>-<step> yet, as the stage `score` does.
    """
    opened = {name: Corpus.open(path) for name, path in (corpora or {}).items()}
    known: dict[str, Vocabulary] = {name: corpus.vocabulary() for name, corpus in opened.items()}
    for name, path in (vocabularies or {}).items():
        known[name] = ByteVocabulary() if path == BYTES else load_vocabulary(path)
    if not known or not (sources or opened):
        raise UserError(
            "tokenizers-nothing",
            "there is nothing to compare: set analyze_tokenizers.corpora, or analyze_tokenizers.vocabularies and "
            "analyze_tokenizers.sources",
        )
    for source in sources:
        source.check()
    config_lib.print_unused()
    # ---- The same documents in all corpora, each in another vocabulary
    contents = {}
    for name, corpus in opened.items():
        documents = corpus.documents()
        contents[name] = dict(zip(documents["id"].to_pylist(), documents["bytes"].to_pylist(), strict=True))
    for first, other in itertools.pairwise(contents):
        if contents[first] != contents[other]:
            one, two = len(contents[first]), len(contents[other])
            raise UserError(
                "tokenizers-other-text",
                f"corpora {opened[first].path} ({one:,} documents) and {opened[other].path} ({two:,}) do not hold "
                "the same text: prepare both from the same sources with the same seed",
            )
    if len({corpus.vocabulary_hash for corpus in opened.values()}) < len(opened):
        raise UserError(
            "tokenizers-repeated-vocabulary",
            "analyze_tokenizers.corpora: two have the same vocabulary: name one corpus for each",
        )
    languages = languages or {}
    measured = [_measured(run, opened, languages, step, score_missing) for run in runs]

    def analyze() -> dict[str, Any]:
        record = tables.plain(
            {
                "bits_per_byte": measured,
                "fertility": _fertility(sources, opened, known, languages),
                "vocabularies": {name: vocabulary.size for name, vocabulary in known.items()},
            }
        )
        _write(Path(output), record)
        print(f"analyze tokenizers: {len(known)} vocabularies, {len(measured)} runs; see {output}/summary.md")
        return record

    return processes.on_first(analyze)


# ---- Bits per byte of runs


def _measured(
    run: str, opened: Mapping[str, Corpus], languages: Mapping[str, str], step: int | None, score_missing: bool
) -> dict[str, Any]:
    """Bits per byte of a run on the corpus of its vocabulary, by source and language."""
    step = saved_steps(run)[-1] if step is None else step
    vocabulary_hash = read_about(run, step)["vocabulary_hash"]
    name = next((name for name, corpus in opened.items() if corpus.vocabulary_hash == vocabulary_hash), None)
    if name is None:
        there = ", ".join(f"{name} ({corpus.vocabulary_hash[:12]})" for name, corpus in opened.items()) or "none"
        raise UserError(
            "tokenizers-no-corpus",
            f"{run} was trained with vocabulary {vocabulary_hash[:12]}, which no corpus of analyze_tokenizers.corpora "
            f"has: there are {there}",
        )
    rows = read_rows(opened[name].path, None)
    # [N, L] -> [T]
    losses = read_losses(rows, score_columns(rows.table, run, [step], score_missing)).values[0][rows.valid]
    num_bytes = rows.table.vocabulary().token_bytes()[rows.tokens[rows.valid]]
    return {
        "vocabulary": name,
        "ids": rows.table.vocab_size,
        "run": run,
        "step": step,
        "tokens": len(losses),
        "loss": float(losses.mean(dtype=np.float64)),
        "covered": float(num_bytes.sum()) / sum(rows.table.documents()["bytes"].to_pylist()),
        "by": {group: bits_per_byte(losses, num_bytes, members) for group, members in _groups(rows, languages)},
    }


def bits_per_byte(
    losses: Float[np.ndarray, "T"], num_bytes: Integer[np.ndarray, "T"], members: Bool[np.ndarray, "T"]
) -> float | None:
    """The sum of the losses in bits over the bytes of the same tokens, which compares between vocabularies."""
    total = int(num_bytes[members].sum())
    return float(losses[members].sum(dtype=np.float64)) / math.log(2) / total if total else None


def _groups(rows: Rows, languages: Mapping[str, str]) -> Iterator[tuple[str, Bool[np.ndarray, "T"]]]:
    """(name, members) of all tokens, of each language and of each source."""
    of, names = rows.source_ids[rows.valid], rows.table.source_names
    spoken = np.array([_language(name, languages) for name in names])[of]
    yield ALL, np.ones(len(of), bool)
    for language in dict.fromkeys(_language(name, languages) for name in names):
        if language:
            yield language, spoken == language
    if len(names) > 1:
        for number, name in enumerate(names):
            yield name, of == number


def _language(source: str, languages: Mapping[str, str]) -> str:
    return languages.get(source, languages.get(source.partition("/")[0], ""))


# ---- Tokens of texts


class Fertility(NamedTuple):
    """Counts of texts under one vocabulary. words: separated by white space; ids: how many different ones occur."""

    documents: int
    bytes: int
    words: int
    tokens: int
    ids: int

    @property
    def per_byte(self) -> float | None:
        """Tokens per byte of UTF-8."""
        return self.tokens / self.bytes if self.bytes else None

    @property
    def per_word(self) -> float | None:
        return self.tokens / self.words if self.words else None


MEASURED = ("documents", "bytes", "words", "tokens", "tokens_per_byte", "tokens_per_word", "ids_used")


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
        columns = corpus.read(np.arange(first, min(first + SHARD_ROWS, corpus.num_rows)))
        for row, start, length in segments_of(columns["segment_ids"]).each():
            tokens = columns["tokens"][row, start : start + length]
            if tokens[0] == vocabulary.bos_id:
                if pieces:
                    yield source, vocabulary.decode(pieces)
                pieces, source = [], corpus.source_names[columns["source_ids"][row, start]]
            # Metadata carries no loss; in a piece that continues a document everything is text.
            kept = columns["loss_mask"][row, start : start + length] & (num_bytes[tokens] > 0)
            pieces += tokens[kept].tolist()
    if pieces:
        yield source, vocabulary.decode(pieces)


def _fertility(
    sources: Sequence[Source],
    corpora: Mapping[str, Corpus],
    vocabularies: Mapping[str, Vocabulary],
    languages: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One entry for each text and vocabulary: all texts, each language, each source."""

    # ---- Counts of every source under every vocabulary
    if sources:
        documents = (row for source in sources for row in read_documents(source))
        texts = ((row["source"], row["text"]) for row in documents if not row["skipped"])
    else:
        texts = texts_of(next(iter(corpora.values())))

    def watched() -> Iterator[tuple[str, str]]:
        with progress(0, 0, "encode", "document") as bar:
            bar.total = None
            for text in texts:
                yield text
                bar.update()

    counts = fertility(watched(), vocabularies)
    names = list(dict.fromkeys(source for source, _ in counts))
    if not names:
        raise UserError("tokenizers-no-text", "there is no text to count tokens of: name other sources or corpora")

    # ---- Summed up: all texts, each language, each source
    groups = {ALL: names}
    for name in names:
        if language := _language(name, languages):
            groups.setdefault(language, []).append(name)
    groups |= {name: [name] for name in names if len(names) > 1}
    entries = []
    for group, members in groups.items():
        for name in vocabularies:
            total = added(counts[member, name] for member in members)
            values = (*total[:4], total.per_byte, total.per_word, total.ids)
            entries.append({"text": group, "vocabulary": name, **dict(zip(MEASURED, values, strict=True))})
    return entries


# ---- Results


def _write(folder: Path, record: dict[str, Any]) -> None:
    counts, measured = record["fertility"], record["bits_per_byte"]
    headings = ("text", "vocabulary", *MEASURED)
    table = tables.of_values(headings, [[entry[name] for name in headings] for entry in counts])
    write_text(folder / "fertility.csv", table.csv())
    _draw(folder, "fertility", "tokens per byte", [(e["text"], e["vocabulary"], e["tokens_per_byte"]) for e in counts])
    parts = ["# Vocabularies on the same text\n", "## Tokens\n", table.markdown(), "![fertility](fertility.png)\n"]
    if measured:
        headings = ("vocabulary", "ids", "run", "step", "loss per token", "bytes covered", *measured[0]["by"])
        names = ("vocabulary", "ids", "run", "step", "loss", "covered")
        rows = [[*(about[name] for name in names), *about["by"].values()] for about in measured]
        table = tables.of_values(headings, rows)
        write_text(folder / "bits_per_byte.csv", table.csv())
        values = [
            (group, f"{about['vocabulary']} ({Path(about['run']).name})", value)
            for about in measured
            for group, value in about["by"].items()
        ]
        _draw(folder, "bits_per_byte", "bits per byte", values)
        parts += ["## Bits per byte\n", table.markdown(), "![bits per byte](bits_per_byte.png)\n"]
        parts += [
            "Bits per byte compares between vocabularies, loss per token does not. The first tokens of pieces that "
            "continue a document in the next row are not covered, because no model predicts them.\n"
        ]
    write_text(folder / "summary.md", "\n".join(parts))
    write_json(folder / "tokenizers.json", record)


def _draw(folder: Path, name: str, label: str, entries: Sequence[tuple[str, str, float | None]]) -> None:
    """Bars of (text, vocabulary, value)."""
    texts = list(dict.fromkeys(text for text, _, _ in entries))
    vocabularies = list(dict.fromkeys(vocabulary for _, vocabulary, _ in entries))
    values = np.full((len(texts), len(vocabularies)), np.nan)
    for text, vocabulary, value in entries:
        values[texts.index(text), vocabularies.index(vocabulary)] = np.nan if value is None else value
    with plots.files(folder, name, width=max(5.4, 0.45 * values.size + 1.5)) as (axes,):
        plots.groups(axes, texts, vocabularies, values)
        axes.set(ylabel=label)
        plots.legend(axes, place="above", columns=min(4, len(vocabularies)))

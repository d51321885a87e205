"""Stage `analyze tokenizers`: vocabularies compared on the same text, by the tokens and the bits that it takes."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
import numpy as np

from slm_jax import config as config_lib
from slm_jax import processes
from slm_jax.analyze import figures, tables
from slm_jax.analyze.columns import Rows, read_losses, read_rows, score_columns
from slm_jax.analyze.fertility import Fertility, added, bits_per_byte, fertility, texts_of
from slm_jax.checkpoint import read_about, saved_steps
from slm_jax.data.corpus import Corpus
from slm_jax.data.sources import Source, read_documents
from slm_jax.data.vocabularies import ByteVocabulary, Vocabulary, load_vocabulary
from slm_jax.errors import UserError
from slm_jax.files import write_json, write_text
from slm_jax.metrics import progress

BYTES = "bytes"  # the vocabulary that needs no file
ALL = "all"
MEASURED = ("documents", "bytes", "words", "tokens", "tokens_per_byte", "tokens_per_word", "ids_used")


@gin.configurable
def analyze_tokenizers(
    output: str,
    runs: Sequence[str] = (),
    corpora: dict[str, str] | None = None,
    vocabularies: dict[str, str] | None = None,
    sources: Sequence[Source] = (),
    languages: dict[str, str] | None = None,
    step: int | None = None,
    score_missing: bool = False,
) -> dict[str, Any]:
    """Compares vocabularies on the same text: tokens per byte and per word, and bits per byte of models.

    `slm-jax analyze tokenizers [RUN ...]`. Writes tokenizers.json, summary.md, fertility.csv, bits_per_byte.csv and
    figures as PNG and SVG. Words are what white space divides: for languages written without spaces they mean little.

    Args:
      output: folder for the results.
      runs: run directories; each is measured on the corpus that has its vocabulary.
      corpora: {name: corpus} of the same held-out documents, each in another vocabulary, whose name it is.
      vocabularies: {name: path} of more vocabularies: a corpus, a saved vocabulary, a .model file, or the word bytes.
      sources: texts to count tokens of, read from files; those of the first corpus by default.
      languages: {source: language}, to sum up by language: {'gnad': 'German', 'books': 'English'}.
      step: checkpoint of the runs; None is the last.
      score_missing: score the corpora that have no column <folder of the run>-<step> yet, as the stage `score` does.
    """
    corpora, languages = _named(corpora, "corpora"), _named(languages, "languages")
    opened = {name: Corpus.open(path) for name, path in corpora.items()}
    known = {name: _vocabulary(path) for name, path in _named(vocabularies, "vocabularies").items()}
    known = {name: corpus.vocabulary() for name, corpus in opened.items()} | known
    texts = config_lib.as_list(sources, Source, "analyze_tokenizers.sources")
    if not known or not (texts or opened):
        raise UserError(
            "analyze_tokenizers: there is nothing to compare: name analyze_tokenizers.corpora, or "
            "analyze_tokenizers.vocabularies and analyze_tokenizers.sources"
        )
    for source in texts:
        source.check()
    config_lib.print_unused()
    _check_same_text(opened)
    measured = [_measured(run, opened, corpora, languages, step, score_missing) for run in runs]

    def analyze() -> dict[str, Any]:
        counts = _fertility(texts, opened, known, languages)
        record = {"bits_per_byte": measured, "fertility": counts, "vocabularies": {n: v.size for n, v in known.items()}}
        _write(Path(output), tables.plain(record))
        print(f"analyze tokenizers: {len(known)} vocabularies, {len(measured)} runs; see {output}/summary.md")
        return tables.plain(record)

    return processes.on_first(analyze)


def _named(values: Any, setting: str) -> dict[str, str]:
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(x, str) for pair in values.items() for x in pair):
        raise UserError(f"analyze_tokenizers.{setting} takes names with texts, {{'a': 'b'}}; it was given {values!r}")
    return values


def _vocabulary(path: str) -> Vocabulary:
    return ByteVocabulary() if path == BYTES else load_vocabulary(path)


def _check_same_text(corpora: Mapping[str, Corpus]) -> None:
    """Refuses corpora that do not hold the same documents: their numbers would not compare."""
    contents = {}
    for name, corpus in corpora.items():
        documents = corpus.documents()
        contents[name] = dict(zip(documents["id"].to_pylist(), documents["bytes"].to_pylist(), strict=True))
    for first, other in itertools.pairwise(contents):
        if contents[first] != contents[other]:
            one, two = len(contents[first]), len(contents[other])
            raise UserError(
                f"corpora {corpora[first].path} ({one:,} documents) and {corpora[other].path} ({two:,}) do not hold "
                "the same text: prepare both from the same sources with the same seed"
            )
    hashes = {corpus.vocabulary_hash: name for name, corpus in corpora.items()}
    if len(hashes) < len(corpora):
        raise UserError("analyze_tokenizers.corpora: two have the same vocabulary: name each vocabulary once")


def _measured(
    run: str,
    opened: Mapping[str, Corpus],
    corpora: Mapping[str, str],
    languages: Mapping[str, str],
    step: int | None,
    score_missing: bool,
) -> dict[str, Any]:
    """Bits per byte of a run on the corpus of its vocabulary, by source and language."""
    step = saved_steps(run)[-1] if step is None else step
    vocabulary_hash = read_about(run, step)["vocabulary_hash"]
    name = next((name for name, corpus in opened.items() if corpus.vocabulary_hash == vocabulary_hash), None)
    if name is None:
        there = ", ".join(f"{name} ({corpus.vocabulary_hash[:12]})" for name, corpus in opened.items()) or "none"
        raise UserError(
            f"{run} was trained with vocabulary {vocabulary_hash[:12]}, which no corpus of analyze_tokenizers.corpora "
            f"has: there are {there}"
        )
    rows = read_rows(corpora[name], None)
    losses = read_losses(rows, score_columns(rows.table, run, [step], score_missing)).values[0][rows.valid]
    num_bytes = rows.table.vocabulary().token_bytes()[rows.tokens[rows.valid]]
    found = {group: bits_per_byte(losses, num_bytes, members) for group, members in _groups(rows, languages)}
    total = sum(rows.table.documents()["bytes"].to_pylist())
    return {
        "vocabulary": name,
        "ids": rows.table.vocab_size,
        "run": run,
        "step": step,
        "tokens": len(losses),
        "loss": float(losses.mean(dtype=np.float64)),
        "covered": float(num_bytes.sum()) / total,
        "by": found,
    }


def _groups(rows: Rows, languages: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
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


def _fertility(
    sources: Sequence[Source],
    corpora: Mapping[str, Corpus],
    vocabularies: Mapping[str, Vocabulary],
    languages: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One entry for each text and vocabulary: all texts, each language, each source."""
    if sources:
        documents = (row for source in sources for row in read_documents(source))
        texts = ((row["source"], row["text"]) for row in documents if not row["skipped"])
    else:
        texts = texts_of(next(iter(corpora.values())))
    with progress(0, 0, "encode", "document") as bar:
        bar.total = None
        counts = fertility(_watched(texts, bar), vocabularies)
    names = list(dict.fromkeys(source for source, _ in counts))
    if not names:
        raise UserError("analyze_tokenizers: there is no text to count tokens of: name other sources or corpora")
    groups = {ALL: names}
    for name in names:
        if language := _language(name, languages):
            groups.setdefault(language, []).append(name)
    groups |= {name: [name] for name in names if len(names) > 1}
    return [
        {"text": group, "vocabulary": name, **_entry(added(counts[member, name] for member in members))}
        for group, members in groups.items()
        for name in vocabularies
    ]


def _watched(texts: Iterator[tuple[str, str]], bar: Any) -> Iterator[tuple[str, str]]:
    for text in texts:
        yield text
        bar.update()


def _entry(counts: Fertility) -> dict[str, Any]:
    values = (*counts[:4], counts.per_byte, counts.per_word, counts.ids)
    return dict(zip(MEASURED, values, strict=True))


def _write(folder: Path, record: dict[str, Any]) -> None:
    counts, measured = record["fertility"], record["bits_per_byte"]
    headings = ("text", "vocabulary", *MEASURED)
    rows = [[entry[name] for name in headings] for entry in counts]
    table = tables.of_values(headings, rows)
    write_text(folder / "fertility.csv", table.csv())
    parts = ["# Vocabularies on the same text\n", "## Tokens\n", table.markdown()]
    _draw(folder, "fertility", counts, list(record["vocabularies"]), "tokens per byte")
    parts += ["![fertility](fertility.png)\n"]
    if measured:
        groups = list(measured[0]["by"])
        headings = ("vocabulary", "ids", "run", "step", "loss per token", "bytes covered", *groups)
        names = ("vocabulary", "ids", "run", "step", "loss", "covered")
        rows = [[*(about[name] for name in names), *about["by"].values()] for about in measured]
        table = tables.of_values(headings, rows)
        write_text(folder / "bits_per_byte.csv", table.csv())
        entries = [
            {"text": group, "vocabulary": about["vocabulary"] + f" ({Path(about['run']).name})", "value": value}
            for about in measured
            for group, value in about["by"].items()
        ]
        labels = list(dict.fromkeys(entry["vocabulary"] for entry in entries))
        _draw(folder, "bits_per_byte", entries, labels, "bits per byte", "value")
        parts += ["## Bits per byte\n", table.markdown(), "![bits per byte](bits_per_byte.png)\n"]
        parts += [
            "Loss per token does not compare between vocabularies, bits per byte does. Not covered are the first "
            "tokens of pieces that continue a document in the next row: no model predicts them.\n"
        ]
    write_text(folder / "summary.md", "\n".join(parts))
    write_json(folder / "tokenizers.json", record)


def _draw(
    folder: Path,
    name: str,
    entries: Sequence[dict[str, Any]],
    vocabularies: Sequence[str],
    label: str,
    value: str = "tokens_per_byte",
) -> None:
    texts = list(dict.fromkeys(entry["text"] for entry in entries))
    values = np.full((len(texts), len(vocabularies)), np.nan)
    for entry in entries:
        found = entry[value]
        values[texts.index(entry["text"]), vocabularies.index(entry["vocabulary"])] = np.nan if found is None else found
    with figures.drawn(folder, name, width=max(5.4, 0.45 * values.size + 1.5)) as (axes,):
        figures.groups(axes, texts, vocabularies, values)
        axes.set(ylabel=label)
        axes.legend(
            frameon=False, fontsize=9, ncols=min(4, len(vocabularies)), loc="lower left", bbox_to_anchor=(0, 1.0)
        )

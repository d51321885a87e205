"""Inputs and settings of `prepare` of every kind, and digests of what it makes of them.

    PYTHONPATH=. python tests/prepare_cases.py > tests/golden/prepare.json

golden/prepare.json was written by the version that made corpora of format 1 in one process: what a corpus holds depends
on the inputs and settings alone, not on how the work is divided.
"""

import gzip
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard

from slm_jax.data.corpus import COLUMNS, Corpus
from slm_jax.data.metadata import Metadata
from slm_jax.data.prepare import prepare
from slm_jax.data.sources import Source
from slm_jax.data.vocabularies import VocabularyConfig

WORDS = "a river runs under the old stone bridge where 12 boats wait, näher 漢字 and\n  indented lines".split(" ")
HOSTS = ["en.wikipedia.org", "www.bbc.co.uk", "math.org", "x.y.museum"]
BYTES = VocabularyConfig(kind="bytes")


def record(name: str, number: int) -> dict[str, Any]:
    rng = random.Random(f"{name} {number}")
    url = f"https://{rng.choice(HOSTS)}/{number}" if number % 7 else rng.choice(["", "no page"])
    text = " ".join(rng.choices(WORDS, k=1 + rng.randrange(40)))
    return {"text": text, "url": url, "kind": rng.choice(["x", "y", ""]), "topic": rng.choice([["t", 3], "u v", None])}


def lines(name: str, count: int) -> list[str]:
    """JSON lines of `count` documents, among them empty ones, broken ones and empty lines."""
    found = [json.dumps(record(name, number), ensure_ascii=number % 2 == 0) for number in range(count)]
    found[count // 2 : count // 2] = ["{broken", '{"text": ""}', "", "  ", '{"text": null}', "[]"]
    return found


def write_inputs(folder: Path) -> None:
    (folder / "a0.jsonl").write_text("\n".join(lines("a0", 700)), encoding="utf-8")
    (folder / "a1.jsonl.gz").write_bytes(gzip.compress("\n".join(lines("a1", 300)).encode(), mtime=0))
    content = "\n".join(lines("a2", 200)).encode()
    frames = [zstandard.ZstdCompressor().compress(part) for part in (content[:5000], content[5000:])]
    (folder / "a2.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.Table.from_pylist([{**record("p", number), "topic": "p"} for number in range(500)])
    pyarrow.parquet.write_table(table, folder / "p.parquet", row_group_size=120)
    for number in range(20):
        (folder / f"t{number:02}.txt").write_text(record("t", number)["text"], encoding="utf-8")
    marked = []
    for number in range(150):
        text = record("m", number)["text"]
        cuts = sorted(random.Random(number).choices(range(len(text) + 1), k=4))
        marked.append({"text": text, "spans": [cuts[:2], cuts[2:]]})
    (folder / "marked.jsonl").write_text("\n".join(map(json.dumps, marked)))
    chats = []
    for number in range(120):
        roles = ["system", "user", "assistant", "user", "assistant"][number % 2 : 3 + number % 3]
        turns = [{"role": role, "content": record(f"c{role}", number)["text"]} for role in roles]
        chats.append({"messages": turns if number % 11 else []})
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> settings of `prepare`."""

    def source(name: str, *files: str, **settings: Any) -> Source:
        return Source(name, [str(folder / file) for file in files], **settings)

    a = source("a", "a?.jsonl*")
    every = [a, source("p", "p.parquet", source_field="kind"), source("t", "t*.txt", schema="text")]
    every += [source("m", "marked.jsonl", spans_field="spans")]
    chats = source("c", "chats.jsonl", schema="messages", template="chatml")
    both = {"sequence_length": 64, "packing": "complete", "vocabulary": BYTES}
    return {
        "split": {"sources": every, "sequence_length": 48, "vocabulary": VocabularyConfig(size=400)},
        "complete": {"sources": every, "sequence_length": 48, "packing": "complete", "vocabulary": BYTES, "seed": 3},
        "whole": {"sources": every, "sequence_length": 48, "packing": "whole", "vocabulary": BYTES},
        "long_rows": {"sources": every, "sequence_length": 1000, "packing": "whole", "vocabulary": BYTES},
        "rows_within_documents": {"sources": [a], "sequence_length": 5, "vocabulary": BYTES},
        "small_sample": {
            "sources": every[:2],
            "sequence_length": 64,
            "vocabulary": VocabularyConfig(size=320, train_characters=20_000),
        },
        "conversations": {
            "sources": [chats, every[3]],
            "sequence_length": 128,
            "packing": "whole",
            "vocabulary": BYTES,
        },
        "conversations_cut": {
            "sources": [source("c", "chats.jsonl", schema="messages", template="plain")],
            "sequence_length": 32,
            "vocabulary": BYTES,
        },
        "part": {"sources": [source("a", "a?.jsonl*", part="1-2/4")], "sequence_length": 64, "vocabulary": BYTES},
        "max_documents": {
            "sources": [source("a", "a?.jsonl*", max_documents=850), source("p", "p.parquet", max_documents=130)],
            "sequence_length": 64,
            "vocabulary": VocabularyConfig(size=330),
        },
        "max_characters": {
            "sources": [source("a", "a?.jsonl*", max_characters=90_000, part="0/2")],
            "sequence_length": 64,
            "vocabulary": BYTES,
        },
        "hosts_and_plain": {"sources": [a], "metadata": Metadata(), "plain_share": 0.3, **both},
        "top": {
            "sources": [a, every[1]],
            "metadata": Metadata(form="domain", top=2, hashed=True, missing="none"),
            "sequence_length": 64,
            "vocabulary": VocabularyConfig(size=400),
        },
        "topics": {"sources": [a], "metadata": Metadata(field="topic"), "seed": 1, **both},
    }


def made(folder: Path, where: Path, names: list[str] | None = None, **more: Any) -> Iterator[tuple[str, Corpus]]:
    """The corpora of the cases; the plain ones too."""
    for name, settings in cases(folder).items():
        if names is not None and name not in names:
            continue
        plain = {"plain": where / f"{name}.plain"} if "plain_share" in settings else {}
        yield name, prepare(where / name, **settings, **plain, **more)
        if plain:
            yield f"{name}.plain", Corpus.open(plain["plain"])


def digest(corpus: Corpus) -> dict[str, str]:
    """Digests of the columns, of the documents and of what the manifest counts."""
    columns = corpus.read(np.arange(corpus.num_rows))
    found = {name: hashlib.sha256(np.ascontiguousarray(columns[name])).hexdigest() for name in COLUMNS}
    later = ("fingerprint", "format_version", "documents_crc32")  # what format 1 had otherwise, or not at all
    counts = {key: value for key, value in corpus.manifest.items() if key not in later}
    # The content of compressed files depends on the versions of libraries.
    counts["settings"] = {key: value for key, value in counts["settings"].items() if key != "sources"}
    for name, value in (("documents", corpus.documents().to_pylist()), ("counts", counts)):
        found[name] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary) / "inputs"
        inputs.mkdir()
        write_inputs(inputs)
        import contextlib
        import sys

        with contextlib.redirect_stdout(sys.stderr):
            found = {name: digest(corpus) for name, corpus in made(inputs, Path(temporary), processes=1)}
    print(json.dumps(found, indent=2))

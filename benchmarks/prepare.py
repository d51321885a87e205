"""How much of the speed of SentencePiece alone preparing a corpus keeps, and what it costs besides.

    python benchmarks/prepare.py --output FILE [--text FILE.jsonl ...]

Processor seconds of the stage `prepare`, from files to a finished corpus, against those of SentencePiece's `encode` of
the same texts in batches, with the same vocabulary and without anything else. The first row is of the tasks that read
and tokenize, the second of the whole stage, with the start of its processes, on the same files; then both on ten times
as many, which are links to the same files. `parent_share` is the part of the processor time that the parent takes,
`memory_mb` what the largest worker held in memory, by task. Without --text it writes text of words of random frequency.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import sentencepiece

from slm_jax.data.prepare import prepare
from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.sources import Source, read_documents
from slm_jax.data.vocabularies import VocabularyConfig
from slm_jax.data.workers import Workers, peak_memory_mb

TRAINING_DOCUMENTS, BASELINE_DOCUMENTS, BATCH = 2000, 4000, 500


def write_text(path: Path, documents: int) -> None:
    """Documents of about 700 tokens: words of random letters, frequent ones more often, as in a language."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 10))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(100, 700)))
            file.write(json.dumps({"text": text, "url": f"https://example.org/{number}"}) + "\n")


def baseline(files: Sequence[str], model: Path) -> float:
    """Tokens per processor second of `encode`."""
    rows = (row["text"] for row in read_documents(Source("text", files)) if not row["skipped"])
    texts = list(itertools.islice(rows, BASELINE_DOCUMENTS))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens, begin = 0, time.process_time()
    for first in range(0, len(texts), BATCH):
        tokens += sum(map(len, processor.encode(texts[first : first + BATCH], out_type="numpy", num_threads=1)))
    return tokens / (time.process_time() - begin)


def run(files: Sequence[str], model: Path, processes: int, corpus: Path) -> dict[str, Any]:
    """Prepares the files once: tokens per processor second, and costs by task."""
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    original = Workers.run

    def recorded(self, work, function, *rest):
        results = original(self, work, function, *rest)
        tasks[function.__name__] += results
        return results

    def seconds() -> tuple[float, float]:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time(), children.ru_utime + children.ru_stime

    Workers.run = recorded
    before, wall = seconds(), time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            made = prepare(corpus, [Source("text", files)], VocabularyConfig(path=str(model)), processes=processes)
    finally:
        Workers.run = original
    own, children = (after - earlier for after, earlier in zip(seconds(), before, strict=True))
    tokens = made.manifest["num_tokens"]
    return {
        "tokens": tokens,
        "documents": made.manifest["num_documents"],
        "tokenize": tokens / sum(result["cpu_seconds"] for result in tasks["tokenize"]),
        "prepare": tokens / (own + children),
        "parent_share": round(own / (own + children), 4),
        "wall_seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": {name: round(sum(r["cpu_seconds"] for r in results), 2) for name, results in tasks.items()},
        "memory_mb": {name: max(result["memory_mb"] for result in results) for name, results in tasks.items()},
        "parent_mb": peak_memory_mb(),
    }


def main() -> None:
    parser: argparse.ArgumentParser = measure.parser(__doc__, repeats=1)
    parser.add_argument("--text", nargs="+", default=[], help="files of JSON lines with the field text")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=max(2, os.cpu_count() or 1))
    parser.add_argument("--links", type=int, default=10, help="how many times the files are read in the last two rows")
    arguments = parser.parse_args()
    documents = 20_000
    if arguments.quick:
        documents, arguments.vocab_size, arguments.links = 600, 1024, 2
    load, rows = measure.load_average(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = [Path(file).absolute() for file in arguments.text] or [folder / "text.jsonl"]
        if not arguments.text:
            write_text(files[0], documents)
        texts = (row["text"] for row in read_documents(Source("text", list(map(str, files)))) if not row["skipped"])
        train_sentencepiece(itertools.islice(texts, TRAINING_DOCUMENTS), arguments.vocab_size, folder / "text.model")
        for links in (1, arguments.links):
            linked = []
            for number, file in itertools.product(range(links), files):
                linked.append(folder / f"{links}.{number:03}.{file.name}")
                linked[-1].symlink_to(file)
            # Before and after, since a machine's speed drifts.
            speeds = [baseline(list(map(str, files)), folder / "text.model")]
            found = run(list(map(str, linked)), folder / "text.model", arguments.processes, folder / f"corpus{links}")
            speeds.append(baseline(list(map(str, files)), folder / "text.model"))
            about = {name: value for name, value in found.items() if name not in ("tokenize", "prepare")}
            for name in ("tokenize", "prepare"):
                title = f"{name}, {found['documents']} documents"
                base = [sum(speeds) / 2]
                rows.append(measure.row(title, [found[name]], "sentencepiece", base, "tokens/s", **about))
    measure.report(rows, arguments.output, load, "cpu")


if __name__ == "__main__":
    main()

"""How much of the speed of SentencePiece alone preparing a corpus keeps.

    python benchmarks/prepare.py --text FILE.jsonl.gz --output FILE

The stage `prepare`, from files to a finished corpus, in tokens per second against `encode` of the same texts with the
same vocabulary: one process against one thread, a process per core against SentencePiece's own threads on as many.
Reading, shuffling, packing, hashing and writing are part of the stage, and so is the start of its processes.
The import of TensorFlow, seconds of every start, is not counted. Without --text it reads generated text.
"""

import contextlib
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import measure
import sentencepiece

from slm_jax.data.prepare import prepare
from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.sources import Source, read_documents
from slm_jax.data.vocabularies import VocabularyConfig
from slm_jax.experiment.worlds.write_world import experiment_world

TRAINING_DOCUMENTS = 2000


def compare(
    files: Sequence[str], vocab_size: int, processes: int, folder: Path, rounds: measure.Rounds
) -> list[measure.Row]:
    """Rows of tokens per second for 1 and for `processes` processes, each against as many threads."""
    source = Source("text", files)
    texts = [document["text"] for document in read_documents(source) if not document["skipped"]]
    spread = itertools.islice(texts, 0, None, max(1, len(texts) // TRAINING_DOCUMENTS))
    model = train_sentencepiece(spread, vocab_size, folder / "vocabulary.model").model
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    num_tokens = sum(len(ids) for ids in processor.encode(texts, num_threads=processes))
    numbers = itertools.count()

    def stage(processes: int) -> Callable[[], None]:
        def run() -> None:
            config = VocabularyConfig(path=str(folder / "vocabulary.model"))
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                prepare(folder / f"corpus{next(numbers)}", [source], config, processes=processes)

        return run

    cases = []
    for count in sorted({1, processes}):
        cases.append(measure.Case(f"sentencepiece, {count} threads", _encode(processor, texts, count), num_tokens))
        cases.append(measure.Case(f"prepare, {count} processes", stage(count), num_tokens))
    values = measure.interleaved(cases, rounds)
    about = {
        "tokens": num_tokens,
        "characters": sum(map(len, texts)),
        "documents": len(texts),
        "vocab_size": vocab_size,
    }
    pairs = [(f"prepare, {n} processes", f"sentencepiece, {n} threads") for n in sorted({1, processes})]
    rows = [measure.row(name, values[name], base, values[base], "tokens/s", **about) for name, base in pairs]
    return rows + [measure.row(base, values[base], base, values[base], "tokens/s", **about) for _, base in pairs]


def _encode(processor: sentencepiece.SentencePieceProcessor, texts: list[str], threads: int) -> Callable[[], None]:
    """One text after the other, as anybody would; or all at once by SentencePiece's threads."""
    if threads == 1:
        return lambda: [None for text in texts if processor.encode(text) is None]
    return lambda: [None for ids in processor.encode(texts, num_threads=threads) if ids is None]


def main() -> None:
    parser = measure.parser(__doc__, repeats=3)
    parser.add_argument("--text", nargs="+", default=[], help="files of JSON lines with the field text, or .txt")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    documents = 40_000
    if arguments.quick:
        documents, arguments.vocab_size, arguments.repeats = 3000, 1024, 1
    load = measure.load_average()
    rounds = measure.Rounds(arguments.repeats, arguments.clock)
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.text:
            experiment_world(folder, documents=documents, kinds=["noise"], share=0.36)
        files = arguments.text or [f"{folder}/crawl.jsonl"]
        rows = compare(files, arguments.vocab_size, arguments.processes, Path(folder), rounds)
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()

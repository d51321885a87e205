"""Stage `experiment filter`: the documents of a corpus that a reference likes best, as text: what selection by
document instead of by token would train on."""

from pathlib import Path

import numpy as np

from slm_jax.config import print_unused
from slm_jax.configurable import PositiveShare, configurable
from slm_jax.data.corpus import Corpus
from slm_jax.files import write_json_lines

TOGETHER = 512  # documents read at a time


@configurable
def experiment_filter(corpus: str, score: str, output: str, keep: PositiveShare = 0.5) -> None:
    """Writes `documents.jsonl`: the documents with the lowest mean loss under a reference, as many as hold `keep` of
    the tokens, in their old order.

    Args:
      corpus: corpus directory.
      score: name of its score column.
      output: folder.
      keep: share of the tokens.
    """
    print_unused()
    table = Corpus.open(corpus)
    documents, vocabulary, column = table.documents(), table.vocabulary(), f"scores/{score}/loss"
    means, lines = [], []
    for begin in range(0, len(documents), TOGETHER):
        some = documents.slice(begin, TOGETHER)
        for about, read in zip(
            some.to_pylist(), table.read_documents(some, ("tokens", "loss_mask", column)), strict=True
        ):
            losses = read[column][read["loss_mask"]]
            means.append(float(losses.mean()) if len(losses) else np.inf)
            text = vocabulary.decode(read["tokens"][read["loss_mask"]].tolist())
            lines.append({"text": text, "url": about["url"], "source": about["source"].split("/")[-1]})
    lengths = documents["length"].to_numpy()
    best = np.argsort(means, kind="stable")
    kept = np.sort(best[np.cumsum(lengths[best]) <= keep * lengths.sum()])
    write_json_lines(Path(output) / "documents.jsonl", (lines[number] for number in kept if lines[number]["text"]))
    print(f"experiment filter: {len(kept):,} of {len(documents):,} documents in {output}/documents.jsonl")

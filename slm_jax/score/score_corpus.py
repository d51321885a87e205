"""Stage `score`: the losses of a frozen reference model on every token of a corpus, as a column of the corpus."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.configurable import Count, Natural, OneOf, Share, configurable
from slm_jax.data.batches import Batch, make_batch, read_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.scores import ScoreColumn, check_column
from slm_jax.errors import UserError
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import progress
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.trained_model import check_fits, load_model, run_vocabulary
from slm_jax.score.cross_tokenizer import CrossTokenizerScorer
from slm_jax.score.external_logprobs import LogProbs
from slm_jax.score.strip_metadata import put_back, remove_prefix
from slm_jax.score.token_loss import batch_loss, token_loss_and_entropy

STATISTICS = ("loss", "entropy")
Ranges = Sequence[tuple[int, int]]  # of rows: first, and the one after the last
Chunks = Generator[dict[str, np.ndarray], None, None]  # statistic -> values [rows, L] of one range of rows


class ColumnSource(NamedTuple):
    """Where the values of a column come from.

    about: for the column's manifest. description: for the user. chunks: ranges of rows -> the values of each range.
    """

    about: dict[str, Any]
    description: str
    chunks: Callable[[Ranges], Chunks]


def score_batch(params: Params, model: ModelConfig, batch: Batch, statistics: Sequence[str]) -> dict[str, jax.Array]:
    """The named statistics of each token, float32 [B, L]; 0 where a token has no predecessor in its segment."""
    if "entropy" not in statistics:
        return {"loss": batch_loss(params, model, batch)}
    hidden = forward.hidden_states(params, model, batch.tokens, batch.positions, batch.segment_ids)
    head = forward.head_matrix(params, model)
    loss, entropy = token_loss_and_entropy(hidden, head, batch.tokens, batch.segment_ids, model.vocab_size)
    return {"loss": loss, "entropy": entropy}


@configurable
def score(
    corpus: str,
    reference: str | None = None,
    name: str = "reference",
    step: Natural | None = None,
    statistics: Sequence[Annotated[str, OneOf(STATISTICS)]] = ("loss",),
    dtype: Annotated[str, OneOf(("float16", "float32"))] = "float32",
    batch_size: Count = 16,
    mesh: MeshConfig | None = None,
    strip_metadata: bool = False,
    cross_tokenizer: bool = False,
    external_logprobs: str | None = None,
    max_unaligned: Share = 0.01,
) -> None:
    """Scores every token of a corpus with a frozen reference model and adds the result as a column.

    If interrupted, the same command continues with the missing rows. A second command that writes the same column is
    refused, unless the corpus is in a bucket, where nothing can be locked.

    Args:
      corpus: corpus directory; gains `scores/<name>/`.
      reference: run directory of the reference; None with `external_logprobs`.
      name: name of the column.
      step: checkpoint of the reference; None takes the last.
      statistics: `loss` (nats) and, on request, `entropy` of the reference's next-token distribution (nats).
      dtype: float16 or float32, of the column. float16 has three digits: it can change which of two tokens is selected
        if their scores differ by less.
      batch_size: rows scored at a time, over all devices.
      mesh: how devices share the work.
      strip_metadata: remove the metadata from documents before the reference reads them, for a reference trained on
        plain documents. The column records it.
      cross_tokenizer: for a reference with another vocabulary than the corpus: it reads the same text in its own
        tokens, and its losses are mapped to the corpus' tokens through the bytes that both cover. The column records
        it.
      external_logprobs: JSON lines (plain, .gz, .zst) or Parquet, or a glob of them, with log-probabilities that an
        API or another engine assigned to each document's tokens; slm_jax/score/external_logprobs.py describes the
        format. They are checked token by token against the corpus; tokens that do not align have no loss. The column
        records the files and their hash.
      max_unaligned: maximum fraction of tokens without a loss in `external_logprobs`.
    """
    # Settings, and the source of the values.
    if (reference is None) == (external_logprobs is None):
        raise UserError(
            "score-source",
            f"score takes either reference (a run) or external_logprobs (files), not {reference!r} and "
            f"{external_logprobs!r}",
        )
    if "loss" not in statistics:
        raise UserError("score-statistics", f"score.statistics {tuple(statistics)}: take 'loss', or 'loss', 'entropy'")
    if external_logprobs is not None and tuple(statistics) != ("loss",):
        raise UserError("score-statistics", "score.external_logprobs has losses only: set score.statistics = ('loss',)")
    table = Corpus.open(corpus)
    if strip_metadata and table.metadata is None:
        raise UserError(
            "score-no-metadata",
            f"score.strip_metadata: corpus {corpus} has no metadata to strip: leave the setting out",
        )
    if reference is None:
        assert external_logprobs is not None
        source = _from_files(table, external_logprobs, strip_metadata, max_unaligned)
    else:
        source = _from_model(table, reference, step, statistics, batch_size, mesh, strip_metadata, cross_tokenizer)
    if table.metadata is not None:
        source.about["prefix"] = "removed" if strip_metadata else "seen"
    check_column(name, dtype)

    # The rows that are missing, chunk by chunk; the first process alone writes.
    where = Path(corpus) / "scores" / name
    with contextlib.ExitStack() as stack:
        if "://" not in corpus:
            busy = f"another process is scoring {where}: wait for it to finish, or choose another score.name"
            stack.enter_context(processes.lock(where / "lock", busy))

        def open_column() -> ScoreColumn:
            return table.create_score(name, tuple(statistics), dtype, reference=source.about)

        pending = processes.on_first(lambda: open_column().pending())
        if not pending:
            print(f"score: column {where} is complete already")
            return
        rows_left = sum(stop - start for start, stop in pending)
        print(f"score: {rows_left} of {table.num_rows} rows of {corpus} {source.description} -> {where}")
        column, chunks = open_column(), stack.enter_context(contextlib.closing(source.chunks(pending)))
        with progress(rows_left, 0, "score", "row") as bar:
            for (start, stop), values in zip(pending, chunks, strict=True):
                if processes.first():
                    column.write(start, values)
                bar.update(stop - start)
    print(f"score: done, {where}")


def _from_files(table: Corpus, files: str, strip_metadata: bool, max_unaligned: float) -> ColumnSource:
    """Log-probs from files, which the first process alone reads; the others yield nothing for it to write."""
    config_lib.print_unused()
    found: list[LogProbs] = []

    def read() -> dict[str, Any]:
        found.append(LogProbs(files, table, strip_metadata, max_unaligned))
        return found[0].about

    def chunks(pending: Ranges) -> Chunks:
        yield from found[0].chunks(pending) if found else ({} for _ in pending)

    return ColumnSource(processes.on_first(read), f"from {files}", chunks)


def _from_model(
    table: Corpus,
    reference: str,
    step: int | None,
    statistics: Sequence[str],
    batch_size: int,
    mesh: MeshConfig | None,
    strip_metadata: bool,
    cross_tokenizer: bool,
) -> ColumnSource:
    """The statistics of a reference, which reads rows of the corpus, or their text in its own tokens."""
    devices = mesh_lib.make_mesh(mesh)
    mesh_lib.check_batch(devices, batch_size, "score")
    config_lib.print_unused()
    model = load_model(reference, devices, step)
    about = {
        "run": reference,
        "step": model.step,
        "fingerprint": model.fingerprint,
        "vocabulary_hash": model.vocabulary_hash,
        "parameters": model.config.parameter_count(),
    }
    mapped = None
    if cross_tokenizer and model.vocabulary_hash != table.vocabulary_hash:
        if tuple(statistics) != ("loss",):
            raise UserError(
                "score-statistics",
                "score.cross_tokenizer maps losses only, an entropy is one of the reference's own tokens: take "
                "score.statistics = ('loss',)",
            )
        theirs = run_vocabulary(reference, model.vocabulary_hash)
        mapped = CrossTokenizerScorer(table.vocabulary(), theirs, model.config, table.sequence_length, strip_metadata)
        about["mapped"] = "from another vocabulary"
    else:
        or_else = ", or map its losses onto the corpus' tokens with score.cross_tokenizer = True"
        check_fits(model.config, model.vocabulary_hash, table, f"reference {reference}", or_else)

    @jax.jit
    def compute(params: Params, rows: tuple[Batch, jax.Array | None]) -> dict[str, jax.Array]:
        batch, place = rows
        scored = score_batch(params, model.config, batch, statistics)
        return scored if place is None else {name: put_back(value, place) for name, value in scored.items()}

    def on_mesh(read: Callable[[np.ndarray], tuple[Batch, np.ndarray | None]], num_rows: int) -> dict[str, np.ndarray]:
        scored = mesh_lib.map_rows(lambda rows: compute(model.params, rows), read, num_rows, batch_size, devices)
        for name, values in scored.items():
            if wrong := values.size - int(np.isfinite(values).sum()):
                raise UserError(
                    "score-not-finite",
                    f"{wrong:,} of {values.size:,} values of {name} by step {model.step} of {reference} are NaN or "
                    "infinite: score with another checkpoint",
                )
        return scored

    def losses(tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        return on_mesh(lambda rows: (make_batch(tokens[rows], segment_ids[rows]), None), len(tokens))["loss"]

    def read(rows: np.ndarray) -> tuple[Batch, np.ndarray | None]:
        batch = read_batch([table], np.zeros(len(rows), np.int64), rows)
        return remove_prefix(batch) if strip_metadata else (batch, None)

    def chunks(pending: Ranges) -> Chunks:
        if mapped:
            yield from mapped.chunks(table, pending, losses)
        else:
            for start, stop in pending:
                yield on_mesh(lambda rows, start=start: read(start + rows), stop - start)

    return ColumnSource(about, f"by {reference} (step {model.step})", chunks)

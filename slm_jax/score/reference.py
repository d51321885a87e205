"""Stage `score`: a frozen reference over the rows of a corpus -> a column."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin
import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.checkpoint import params_fingerprint, read_about, restore_params
from slm_jax.data.batches import Batch, make_batch, read_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.scores import ScoreColumn, check_column
from slm_jax.data.vocabularies import DESCRIPTION_FILE, Vocabulary, load_vocabulary
from slm_jax.errors import UserError
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import progress
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.score.cross_tokenizer import CrossTokenizerScorer
from slm_jax.score.external_logprobs import LogProbs
from slm_jax.score.strip_metadata import put_back, remove_prefix
from slm_jax.score.token_loss import batch_loss, token_loss_and_entropy

STATISTICS = ("loss", "entropy")
Ranges = Sequence[tuple[int, int]]  # of rows
Chunks = Generator[dict[str, np.ndarray], None, None]  # the statistics of each range of rows


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A checkpoint in memory: parameters sharded over the mesh, and what they are."""

    params: Params
    config: ModelConfig
    vocabulary_hash: str
    step: int
    fingerprint: str


def load_model(run: str, mesh: Mesh, step: int | None = None) -> TrainedModel:
    """The checkpoint of a train run (its last one, or that of `step`) on the given mesh."""
    about = read_about(run, step)
    config = ModelConfig.from_json(about["model"])
    shapes = forward.param_shapes(config)
    shapes = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        mesh_lib.tree_shardings(shapes, mesh),
    )
    params = restore_params(run, shapes, about["step"])
    return TrainedModel(params, config, about["vocabulary_hash"], about["step"], params_fingerprint(params))


def run_vocabulary(run: str, vocabulary_hash: str) -> Vocabulary:
    """The vocabulary that a model directory (a train run, an imported model) keeps beside its checkpoints.

    Raises:
      UserError: it keeps none, as runs of earlier versions, or one that is not its model's.
    """
    where = Path(run) / "vocabulary"
    if not (where / DESCRIPTION_FILE).exists():
        raise UserError(
            f"{run} keeps no vocabulary: copy the folder `vocabulary` of the corpus it was trained on there"
        )
    vocabulary = load_vocabulary(where)
    if vocabulary.content_hash != vocabulary_hash:
        raise UserError(
            f"{where} has the hash {vocabulary.content_hash[:12]}, the model of {run} was trained with "
            f"{vocabulary_hash[:12]}: copy its corpus' folder `vocabulary` there"
        )
    return vocabulary


def fitting_vocabulary(path: str, vocabulary_hash: str, what: str) -> Vocabulary:
    """The vocabulary at `path` (a corpus, a model directory, a saved one), for `what` measures a model.

    Raises:
      UserError: it is not the one that the model was trained with.
    """
    vocabulary = load_vocabulary(path)
    if vocabulary.content_hash != vocabulary_hash:
        raise UserError(
            f"{what}: vocabulary {path} has the hash {vocabulary.content_hash[:12]}, the model was trained with "
            f"{vocabulary_hash[:12]}: name a corpus that it was trained on"
        )
    return vocabulary


def check_fits(model: ModelConfig, vocabulary_hash: str, corpus: Corpus, what: str, or_else: str = "") -> None:
    """Refuses a corpus of another vocabulary or with rows longer than the model's; `or_else`: one more remedy."""
    if vocabulary_hash != corpus.vocabulary_hash:
        raise UserError(
            f"{what} was trained with vocabulary {vocabulary_hash[:12]}, corpus {corpus.path} has "
            f"{corpus.vocabulary_hash[:12]}: prepare the corpus with the model's vocabulary (VocabularyConfig.path)"
            f"{or_else}"
        )
    check_rows(model, corpus, what)


def check_rows(model: ModelConfig, corpus: Corpus, what: str) -> None:
    """Refuses rows longer than the model's and ids beyond its embedding."""
    if corpus.sequence_length > model.max_length:
        raise UserError(
            f"rows of corpus {corpus.path} have {corpus.sequence_length} tokens, {what} reads "
            f"{model.max_length}: prepare "
            "it with a smaller sequence_length or raise model.max_length"
        )
    if model.vocab_size is not None and corpus.vocab_size > model.vocab_size:
        raise UserError(
            f"corpus {corpus.path} has {corpus.vocab_size} ids, {what} embeds {model.vocab_size}: set "
            f"model.vocab_size = {corpus.vocab_size}"
        )


def score_batch(params: Params, model: ModelConfig, batch: Batch, statistics: Sequence[str]) -> dict[str, jax.Array]:
    """The named statistics of each token, float32 [B, L]: 0 where a token has no predecessor in its segment."""
    if "entropy" not in statistics:
        return {"loss": batch_loss(params, model, batch)}
    hidden = forward.hidden_states(params, model, batch.tokens, batch.positions, batch.segment_ids)
    head = forward.head_matrix(params, model)
    loss, entropy = token_loss_and_entropy(hidden, head, batch.tokens, batch.segment_ids, model.vocab_size)
    return {"loss": loss, "entropy": entropy}


@gin.configurable
def score(
    corpus: str,
    reference: str | None = None,
    name: str = "reference",
    step: int | None = None,
    statistics: Sequence[str] = ("loss",),
    dtype: str = "float32",
    batch_size: int = 16,
    mesh: MeshConfig | None = None,
    strip_metadata: bool = False,
    cross_tokenizer: bool = False,
    external_logprobs: str | None = None,
    max_unaligned: float = 0.01,
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
    if (reference is None) == (external_logprobs is None):
        raise UserError(
            f"score takes reference, a run, or external_logprobs, log-probs; it was given {reference!r} and "
            f"{external_logprobs!r}"
        )
    unknown = sorted(set(statistics) - set(STATISTICS))
    if unknown or "loss" not in statistics:
        raise UserError(f"score.statistics {tuple(statistics)}: takes 'loss' and, beside it, 'entropy'")
    table = Corpus.open(corpus)
    if strip_metadata and table.metadata is None:
        raise UserError(f"score.strip_metadata: corpus {corpus} carries no metadata to be removed: leave it out")
    if reference is None:
        assert external_logprobs is not None
        origin = _file(table, external_logprobs, statistics, strip_metadata, max_unaligned)
    else:
        origin = _model(table, reference, step, statistics, batch_size, mesh, strip_metadata, cross_tokenizer)
    if table.metadata is not None:
        origin.about["prefix"] = "removed" if strip_metadata else "seen"
    check_column(name, dtype)
    where = Path(corpus) / "scores" / name
    with contextlib.ExitStack() as stack:
        if "://" not in corpus:
            busy = f"another process is scoring {where}: wait for it, or choose another score.name"
            stack.enter_context(processes.lock(where / "lock", busy))

        def open_column() -> ScoreColumn:
            return table.create_score(name, tuple(statistics), dtype, reference=origin.about)

        pending = processes.on_first(lambda: open_column().pending())
        if not pending:
            print(f"score: column {where} is complete already")
            return
        rows_left = sum(stop - start for start, stop in pending)
        print(f"score: {rows_left} of {table.num_rows} rows of {corpus} {origin.said} -> {where}")
        _write(open_column(), pending, stack.enter_context(contextlib.closing(origin.chunks(pending))))
    print(f"score: done, {where}")


class Origin(NamedTuple):
    """Where a column comes from, as its manifest records it and in words; and what ranges of rows of it hold."""

    about: dict[str, Any]
    said: str
    chunks: Callable[[Ranges], Chunks]


def _write(column: ScoreColumn, pending: Ranges, chunks: Chunks) -> None:
    with progress(sum(stop - start for start, stop in pending), 0, "score", "row") as bar:
        for (start, stop), values in zip(pending, chunks, strict=True):
            if processes.first():
                column.write(start, values)
            bar.update(stop - start)


def _file(table: Corpus, files: str, statistics: Sequence[str], strip_metadata: bool, max_unaligned: float) -> Origin:
    """The first process alone reads."""
    if tuple(statistics) != ("loss",):
        raise UserError("score.external_logprobs has losses alone: leave the entropy out")
    config_lib.print_unused()
    found: list[LogProbs] = []

    def read() -> dict[str, Any]:
        found.append(LogProbs(files, table, strip_metadata, max_unaligned))
        return found[0].about

    about = processes.on_first(read)
    return Origin(about, f"from {files}", lambda pending: found[0].chunks(pending) if found else _nothing(pending))


def _nothing(pending: Ranges) -> Chunks:
    for _ in pending:
        yield {}


def _model(
    table: Corpus,
    reference: str,
    step: int | None,
    statistics: Sequence[str],
    batch_size: int,
    mesh: MeshConfig | None,
    strip_metadata: bool,
    cross_tokenizer: bool,
) -> Origin:
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
            raise UserError("score.cross_tokenizer maps losses: an entropy is of the reference's own tokens")
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
        return mesh_lib.map_rows(lambda rows: compute(model.params, rows), read, num_rows, batch_size, devices)

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

    return Origin(about, f"by {reference} (step {model.step})", chunks)

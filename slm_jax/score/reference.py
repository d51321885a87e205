"""Stage `score`: a frozen reference over the rows of a corpus -> a column."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import gin
import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.checkpoint import params_fingerprint, read_about, restore_params
from slm_jax.data.batches import Batch, read_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.scores import ScoreColumn, check_column
from slm_jax.data.vocabularies import DESCRIPTION_FILE, Vocabulary, load_vocabulary
from slm_jax.errors import UserError
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import progress
from slm_jax.models import forward
from slm_jax.models.config import ModelConfig
from slm_jax.models.forward import Params
from slm_jax.score.token_loss import batch_loss, token_loss_and_entropy
from slm_jax.score.without_prefix import put_back, remove_prefix

STATISTICS = ("loss", "entropy")


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


def check_fits(model: ModelConfig, vocabulary_hash: str, corpus: Corpus, what: str) -> None:
    """Refuses a corpus of another vocabulary or with rows longer than the model's."""
    if vocabulary_hash != corpus.vocabulary_hash:
        raise UserError(
            f"{what} was trained with vocabulary {vocabulary_hash[:12]}, corpus {corpus.path} has "
            f"{corpus.vocabulary_hash[:12]}: prepare the corpus with the model's vocabulary (VocabularyConfig.path)"
        )
    check_rows(model, corpus, what)


def check_rows(model: ModelConfig, corpus: Corpus, what: str) -> None:
    """Refuses rows longer than the model's and ids beyond its embedding."""
    if corpus.row_length > model.max_length:
        raise UserError(
            f"rows of corpus {corpus.path} have {corpus.row_length} tokens, {what} reads {model.max_length}: prepare "
            "it with a smaller row_length or raise model.max_length"
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
    reference: str,
    name: str = "reference",
    step: int | None = None,
    statistics: Sequence[str] = ("loss",),
    dtype: str = "float32",
    batch_rows: int = 16,
    mesh: MeshConfig | None = None,
    without_prefix: bool = False,
) -> None:
    """Scores every token of a corpus with a frozen reference model and adds the result as a column.

    Killed and started again, it goes on with the rows that are missing. A second command that writes the same column is
    refused, unless the corpus lies in a bucket, where nothing can be locked.

    Args:
      corpus: corpus directory. Gains `scores/<name>/`.
      reference: run directory of the reference.
      name: of the column.
      step: checkpoint of the reference; None is its last.
      statistics: `loss` (nats) and, on request, `entropy` of the reference's next-token distribution (nats).
      dtype: float16 or float32, of the column.
      batch_rows: rows scored at a time, over all devices.
      mesh: how devices share the work.
      without_prefix: for a reference trained on plain documents: it reads the documents of a corpus that carries
        metadata without them. The column says whether the prefix was seen or removed.
    """
    unknown = sorted(set(statistics) - set(STATISTICS))
    if unknown or "loss" not in statistics:
        raise UserError(f"score.statistics {tuple(statistics)}: takes 'loss' and, beside it, 'entropy'")
    table = Corpus.open(corpus)
    devices = mesh_lib.make_mesh(mesh)
    mesh_lib.check_batch(devices, batch_rows, "score")
    config_lib.print_unused()
    model = load_model(reference, devices, step)
    check_fits(model.config, model.vocabulary_hash, table, f"reference {reference}")
    if without_prefix and table.metadata is None:
        raise UserError(f"score.without_prefix: corpus {corpus} carries no metadata to be removed: leave it out")
    about = {
        "run": reference,
        "step": model.step,
        "fingerprint": model.fingerprint,
        "vocabulary_hash": model.vocabulary_hash,
        "parameters": model.config.parameter_count(),
    }
    if table.metadata is not None:
        about["prefix"] = "removed" if without_prefix else "seen"
    check_column(name, dtype)
    where = Path(corpus) / "scores" / name
    with contextlib.ExitStack() as stack:
        if "://" not in corpus:
            busy = f"another process is scoring {where}: wait for it, or choose another score.name"
            stack.enter_context(processes.lock(where / "lock", busy))

        def open_column() -> ScoreColumn:
            return table.create_score(name, tuple(statistics), dtype, reference=about)

        pending = processes.on_first(lambda: open_column().pending())
        if not pending:
            print(f"score: column {where} is complete already")
            return
        rows_left = sum(stop - start for start, stop in pending)
        print(f"score: {rows_left} of {table.num_rows} rows of {corpus} by {reference} (step {model.step}) -> {where}")
        stack.enter_context(jax.set_mesh(devices))
        _score_rows(table, open_column(), pending, model, devices, batch_rows, without_prefix)
    print(f"score: done, {where}")


def _score_rows(
    table: Corpus,
    column: ScoreColumn,
    pending: Sequence[tuple[int, int]],
    model: TrainedModel,
    mesh: Mesh,
    batch_rows: int,
    removed: bool,
) -> None:
    """Chunk by chunk; all devices share a batch, and the first process writes a chunk whole."""

    @jax.jit
    def compute(params: Params, batch: Batch, place: jax.Array | None) -> dict[str, jax.Array]:
        scored = score_batch(params, model.config, batch, column.statistics)
        return scored if place is None else {name: put_back(value, place) for name, value in scored.items()}

    mine = mesh_lib.local_rows(mesh, batch_rows)
    with progress(sum(stop - start for start, stop in pending), 0, "score", "row") as bar:
        for start, stop in pending:
            rows = np.arange(start, stop)
            pieces = []
            for first in range(0, len(rows), batch_rows):
                piece = rows[first : first + batch_rows]
                padded = np.pad(piece, (0, batch_rows - len(piece)), mode="edge")
                batch = read_batch([table], np.zeros(len(mine), np.int64), padded[mine])
                read = remove_prefix(batch) if removed else (batch, None)
                scored = compute(model.params, *mesh_lib.to_devices(mesh, batch_rows, mine, read))
                pieces.append({name: x[: len(piece)] for name, x in mesh_lib.to_host(scored).items()})
            if processes.first():
                column.write(start, {n: np.concatenate([piece[n] for piece in pieces]) for n in pieces[0]})
            bar.update(stop - start)

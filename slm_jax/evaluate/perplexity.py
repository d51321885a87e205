"""Loss and bits per byte on held-out rows: an evaluator for the training loop."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slm_jax import mesh as mesh_lib
from slm_jax.configurable import Count, configurable
from slm_jax.data.batches import make_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.metadata import Metadata
from slm_jax.data.scores import check_column
from slm_jax.errors import UserError
from slm_jax.evaluate.prefix import Repacked, conditioned
from slm_jax.metrics import mean
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.trained_model import check_fits
from slm_jax.score.kept_losses import KeptLosses, kept_column
from slm_jax.score.token_loss import batch_loss, predicted

# Called on parameters, yields (name, value): a number; KeptLosses, which the loop stores as a score column; or a list
# of JSON values, which it stores as lines.
Measure = Callable[[Params], Iterator[tuple[str, Any]]]


@configurable
@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Loss and bits per byte on held-out rows of a corpus.

    With `prefix` or `metadata` the corpus is plain, and the loss is that of the same tokens as without. Choose rows
    shorter than those of training, so that no position is new to the model.

    Attributes:
      name: prefix of the metrics: `NAME/loss`, `NAME/bits_per_byte`.
      corpus: path of the corpus.
      rows: number of rows, from the first; None takes all.
      batch_size: rows that go through the model at a time.
      keep_tokens: while a run trains, also keep the loss of every token in score columns of the corpus; analyses find
        them by the run and this evaluator's name.
      prefix: text placed after the BOS of every document, such as "URL: en.wikipedia.org" and an empty line.
      metadata: in place of `prefix`, each document's own metadata.
      shuffled: use another document's metadata instead.
    """

    name: str
    corpus: str
    rows: Count | None = None
    batch_size: Count = 16
    keep_tokens: bool = False
    prefix: str | None = None
    metadata: Metadata | None = None
    shuffled: bool = False

    def __post_init__(self) -> None:
        if self.prefix is not None and self.metadata is not None:
            raise UserError(
                "settings-exclusive", f"HeldOut {self.name}: prefix and metadata exclude each other: remove one"
            )
        if self.shuffled and self.metadata is None:
            raise UserError(
                "prefix-shuffled-alone", f"HeldOut {self.name}: shuffled has no effect alone: set HeldOut.metadata"
            )

    def bind(self, model: ModelConfig, vocabulary_hash: str, mesh: Mesh) -> Measure:
        """Opens and checks the corpus; the returned function of parameters yields (name, value)."""
        table = Corpus.open(self.corpus)
        if self.keep_tokens:
            check_column(kept_column("", self.name, 0), "float32")
        check_fits(model, vocabulary_hash, table, "the model")
        mesh_lib.check_batch(mesh, self.batch_size, f"HeldOut {self.name}")
        num_rows = self._num_rows(table)
        repacked = self._conditioned(table, model)[0]
        compute = jax.jit(lambda params, batch: batch_loss(params, model, batch))
        token_bytes = table.vocabulary().token_bytes()

        def run(params: Params) -> Iterator[tuple[str, Any]]:
            batch = table.read(np.arange(num_rows))
            valid = batch["loss_mask"] & np.asarray(predicted(jnp.asarray(batch["segment_ids"], jnp.int32)))
            tokens, segment_ids = repacked[:2] if repacked else (batch["tokens"], batch["segment_ids"])
            losses = mesh_lib.map_rows(
                lambda batch: compute(params, batch),
                lambda rows: make_batch(tokens[rows], segment_ids[rows]),
                *(len(tokens), self.batch_size, mesh),
            )
            # Losses of the tokens where the corpus has them, with or without a prefix.
            if repacked:
                losses = repacked.restore(losses, valid.shape)  # [R, W] -> [N, L]
            # Of all tokens, and of each source's.
            parts = {"": valid}
            if len(table.source_names) > 1:
                names = enumerate(table.source_names)
                parts |= {f"/{source}": valid & (batch["source_ids"] == number) for number, source in names}
            for name, mine in parts.items():
                total, num_bytes = losses[mine].sum(dtype=np.float64), int(token_bytes[batch["tokens"][mine]].sum())
                yield f"{self.name}/loss{name}", mean(total, int(mine.sum()))
                yield f"{self.name}/bits_per_byte{name}", mean(total / math.log(2), num_bytes)
            if self.keep_tokens:
                kept = np.where(valid, losses, np.nan).astype(np.float32)
                yield f"{self.name}/tokens", KeptLosses(self.corpus, kept)

        return run

    def about(self, model: ModelConfig, vocabulary_hash: str) -> dict[str, Any]:
        """The corpus, down to its first ids: a perplexity depends on whether there is a BOS."""
        table = Corpus.open(self.corpus)
        first = table.read(np.zeros(1, np.int64), ["tokens"])["tokens"][0, :8].tolist()
        return {"fingerprint": table.fingerprint, "rows": table.num_rows, "first_ids": first}

    def about_prefix(self, model: ModelConfig) -> dict[str, Any] | None:
        """The text after BOS: the first document's prefix with its ids, and the number of different prefixes."""
        return self._conditioned(Corpus.open(self.corpus), model)[1]

    def _num_rows(self, table: Corpus) -> int:
        return table.num_rows if self.rows is None else min(self.rows, table.num_rows)

    def _conditioned(self, table: Corpus, model: ModelConfig) -> tuple[Repacked | None, dict[str, Any] | None]:
        if self.prefix is None and self.metadata is None:
            return None, None
        num_rows = self._num_rows(table)
        return conditioned(table, num_rows, self.prefix, self.metadata, self.shuffled, model.max_length)

"""Loading a trained model from a model directory, and checking that a vocabulary or a corpus fits it."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from slm_jax.checkpoint import params_fingerprint, read_about, restore_params
from slm_jax.data.corpus import Corpus
from slm_jax.data.vocabularies import load_vocabulary
from slm_jax.data.vocabulary import DESCRIPTION_FILE, Vocabulary
from slm_jax.errors import UserError
from slm_jax.models.forward import Params, param_shapes
from slm_jax.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A checkpoint in memory; the parameters are sharded over the mesh."""

    params: Params
    config: ModelConfig
    vocabulary_hash: str
    step: int
    fingerprint: str


def load_model(run: str, mesh: Mesh, step: int | None = None) -> TrainedModel:
    """Loads the checkpoint of `step`, by default the last one, from a model directory onto the mesh.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, or the mesh does not divide its shapes.
    """
    about = read_about(run, step)
    config = ModelConfig.from_json(about["model"])
    params = restore_params(run, param_shapes(config, mesh), about["step"])
    # Restoring compared the parameters with the fingerprint that was saved, if any.
    fingerprint = about.get("params_fingerprint") or params_fingerprint(params)
    return TrainedModel(params, config, about["vocabulary_hash"], about["step"], fingerprint)


def run_vocabulary(run: str, vocabulary_hash: str) -> Vocabulary:
    """The vocabulary that a model directory keeps beside its checkpoints.

    Raises:
      UserError: it has none (runs of early versions), or not the one that its model was trained with.
    """
    where = Path(run) / "vocabulary"
    if not (where / DESCRIPTION_FILE).exists():
        raise UserError(
            "model-without-vocabulary",
            f"{run} keeps no vocabulary: copy the folder `vocabulary` of the corpus it was trained on into it",
        )
    return fitting_vocabulary(str(where), vocabulary_hash, run)


def fitting_vocabulary(path: str, vocabulary_hash: str, what: str) -> Vocabulary:
    """The vocabulary at `path`: a corpus, a model directory, or a saved vocabulary; `what` names the model in messages.

    Raises:
      UserError: it has another hash than the one that the model was trained with.
    """
    vocabulary = load_vocabulary(path)
    if vocabulary.content_hash != vocabulary_hash:
        raise UserError(
            "vocabulary-mismatch",
            f"{what}: the vocabulary {path} has the hash {vocabulary.content_hash[:12]}, the model was trained with "
            f"{vocabulary_hash[:12]}: take the vocabulary of a corpus that it was trained on",
        )
    return vocabulary


def check_fits(model: ModelConfig, vocabulary_hash: str, corpus: Corpus, what: str, or_else: str = "") -> None:
    """Refuses a corpus with another vocabulary than the model's, and what `check_rows` refuses; `or_else` adds a
    remedy to the message."""
    if vocabulary_hash != corpus.vocabulary_hash:
        raise UserError(
            "vocabulary-mismatch",
            f"{what} was trained with vocabulary {vocabulary_hash[:12]}, corpus {corpus.path} has "
            f"{corpus.vocabulary_hash[:12]}: prepare the corpus with the model's vocabulary (VocabularyConfig.path)"
            f"{or_else}",
        )
    check_rows(model, corpus, what)


def check_rows(model: ModelConfig, corpus: Corpus, what: str) -> None:
    """Refuses a corpus whose rows are longer than the model reads or whose ids exceed its embedding."""
    if corpus.sequence_length > model.max_length:
        raise UserError(
            "rows-too-long",
            f"rows of corpus {corpus.path} have {corpus.sequence_length} tokens, {what} reads {model.max_length}: "
            "prepare it with a smaller sequence_length or raise model.max_length",
        )
    if model.vocab_size is not None and corpus.vocab_size > model.vocab_size:
        raise UserError(
            "vocabulary-too-large",
            f"corpus {corpus.path} has {corpus.vocab_size} ids, {what} embeds {model.vocab_size}: set "
            f"model.vocab_size = {corpus.vocab_size}",
        )

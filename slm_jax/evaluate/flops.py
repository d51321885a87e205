"""What a run cost in floating-point operations, from its run directory: training, scoring, and its references."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from slm_jax.data.corpus import Corpus
from slm_jax.data.scores import ScoreName
from slm_jax.errors import UserError
from slm_jax.models.model_config import ModelConfig
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import competes_across_micro_batches, histories, selection_of


class Flops(NamedTuple):
    """Floating-point operations; None where a corpus or a reference is gone, so that they cannot be known.

    Attributes:
      training: of the run, including the steps that it inherited from another.
      scoring: forward passes of its references over the rows it selected from, each row counted once.
      reference: the training of its references, except one that the run started from, which costs nothing more.
    """

    training: float | None
    scoring: float | None
    reference: float | None


def run_flops(
    settings: Mapping[str, Any], steps: int | None = None, start: tuple[str | None, int | None] = (None, None)
) -> Flops:
    """The cost of a train run with these settings (as in run.json), or of its first `steps`.

    Args:
      settings: of run.json.
      steps: None counts all of them.
      start: run directory and step of the checkpoint that the run started from.
    """
    training = _training(settings, steps)
    try:
        rows, references = _scored(settings, steps)
    except UserError:  # a corpus is not where it was, or has lost a column
        return Flops(training, None, None)
    scoring, trained = 0.0, []
    for about, length in references:
        # Two operations per parameter and token where the reference's own settings are gone.
        own = _settings(about)
        a_row = 2.0 * (about.get("parameters") or 0) * length
        if own:
            a_row = ModelConfig.from_json(own["model"]).flops_per_token(length) * length / 3
        scoring += a_row * rows
        if (about.get("run"), about.get("step")) != start:
            trained.append(_trained(about))
    return Flops(training, scoring, None if None in trained else sum(filter(None, trained), 0.0))


def _trained(about: Mapping[str, Any]) -> float | None:
    """The training of the model that made a score column; None for an import, or where its directory is gone."""
    settings = _settings(about)
    return _training(settings, about.get("step")) if "phases" in settings else None


def _settings(about: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the run that a reference comes from; {} where its directory is gone."""
    return RunDirectory(about["run"]).settings() if about.get("run") else {}


def _first_phases(settings: Mapping[str, Any], steps: int | None) -> list[tuple[dict[str, Any], int]]:
    """The phases, each with how many of its steps are among the first `steps`."""
    found, left = [], float("inf") if steps is None else steps
    for phase in settings["phases"]:
        found.append((phase, int(min(left, phase["steps"]))))
        left -= found[-1][1]
    return [(phase, done) for phase, done in found if done]


def _training(settings: Mapping[str, Any], steps: int | None) -> float | None:
    """Of all steps, or the first ones; None where a corpus is gone."""
    model, total = ModelConfig.from_json(settings["model"]), 0.0
    for phase, done in _first_phases(settings, steps):
        try:
            length = Corpus.open(phase["mixture"][0]["corpus"]).sequence_length
            selection = selection_of(phase["selection"])
        except UserError:
            return None
        # A forward pass is a third of a step. A filtered backward pass costs the selected share; where tokens compete
        # across micro-batches, one more forward pass selects them; a history of the run is one more each.
        backward = selection.ratio if selection and selection.gradient == "filtered" else 1.0
        several = settings.get("gradient_accumulation_steps", 1) > 1
        twice = several and selection and competes_across_micro_batches(selection)
        forward = (2 if twice else 1) + len(histories(selection))
        passes = (forward + 2 * backward) / 3
        total += model.flops_per_token(length) * length * phase["batch_size"] * done * passes
    return total


def _scored(settings: Mapping[str, Any], steps: int | None) -> tuple[int, list[tuple[dict[str, Any], int]]]:
    """How many rows were selected from by a score column, at most all there are; and the references of the columns,
    each once, with the length of the rows that they read."""
    read, corpora, references = 0, {}, {}
    for phase, done in _first_phases(settings, steps):
        selection = selection_of(phase["selection"])
        columns = selection.columns() if selection else ()
        columns += tuple((phase.get("weighting") or {}).get("columns", ()))
        names = {ScoreName.parse(column).name for column in columns}
        if not names:
            continue
        read += phase["batch_size"] * done
        for component in phase["mixture"]:
            table = corpora.setdefault(component["corpus"], Corpus.open(component["corpus"]))
            for name in names:
                about = table.score(name).reference
                if "labels" in about:  # known, not computed: an oracle's column costs nothing
                    continue
                references[str(about.get("fingerprint") or name)] = (about, table.sequence_length)
    return min(read, sum(table.num_rows for table in corpora.values())), list(references.values())

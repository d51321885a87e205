"""What a run cost in floating point operations, from what its directory says: training, scoring, its references."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError
from slm_jax.files import read_json
from slm_jax.models.model_config import ModelConfig
from slm_jax.score.selection import competes_across_micro_batches, selection_of


class Flops(NamedTuple):
    """Floating point operations; None for what cannot be known any more: a corpus or a reference has gone.

    training: of the run, the steps that it inherited from another included.
    scoring: forward passes of its references over the rows it selected from, each row counted once.
    reference: the training of its references.
    """

    training: float | None
    scoring: float | None
    reference: float | None


def run_flops(settings: Mapping[str, Any], steps: int | None = None) -> Flops:
    """Of a train run with these settings (as in run.json), or of its first `steps`."""
    training = _known(lambda: _training(settings, steps))
    scored = _known(lambda: _scored(settings, steps))
    if scored is None:
        return Flops(training, None, None)
    rows, references = scored
    scoring = sum((_forward_flops(about, length) * rows for about, length in references), 0.0)
    trained = [_known(lambda about=about: _trained(about)) for about, _ in references]
    return Flops(training, scoring, None if None in trained else sum(filter(None, trained), 0.0))


def _known(find: Callable[[], Any]) -> Any:
    """What `find` finds; None where a corpus is not where it was, or has lost a column."""
    try:
        return find()
    except UserError:
        return None


def _training(settings: Mapping[str, Any], steps: int | None) -> float:
    return sum((_phase(settings, phase, done) for phase, done in _phases(settings, steps)), 0.0)


def _phases(settings: Mapping[str, Any], steps: int | None) -> list[tuple[dict[str, Any], int]]:
    """The phases, each with how many of its steps are among the first `steps`."""
    found, left = [], steps if steps is not None else float("inf")
    for phase in settings["phases"]:
        done = int(min(left, phase["steps"]))
        found.append((phase, done))
        left -= done
    return [(phase, done) for phase, done in found if done]


def _phase(settings: Mapping[str, Any], phase: Mapping[str, Any], steps: int) -> float:
    """Of the steps of a phase: a forward pass is a third of a step. A filtered backward pass is of the selected share,
    and where tokens compete across micro-batches, a forward pass more decides."""
    model = ModelConfig.from_json(settings["model"])
    length = _sequence_length(phase)
    selection = selection_of(phase["selection"])
    backward = selection.ratio if selection and selection.gradient == "filtered" else 1.0
    forward = (
        2
        if selection and competes_across_micro_batches(selection) and settings.get("gradient_accumulation_steps", 1) > 1
        else 1
    )
    return model.flops_per_token(length) * length * phase["batch_size"] * steps * (forward + 2 * backward) / 3


def _sequence_length(phase: Mapping[str, Any]) -> int:
    return Corpus.open(phase["mixture"][0]["corpus"]).sequence_length


def _scored(settings: Mapping[str, Any], steps: int | None) -> tuple[int, list[tuple[dict[str, Any], int]]]:
    """How many rows were selected from by a column, no more than there are, and the models behind the columns, each
    once, with the length of the rows that they read."""
    read, corpora, references = 0, {}, {}
    for phase, done in _phases(settings, steps):
        selection = selection_of(phase["selection"])
        names = {column.split("/")[1] for column in selection.columns()} if selection else ()
        if not names:
            continue
        read += phase["batch_size"] * done
        for draw in phase["mixture"]:
            table = corpora.setdefault(draw["corpus"], Corpus.open(draw["corpus"]))
            for name in names:
                about = table.score(name).reference
                references[str(about.get("fingerprint") or name)] = (about, table.sequence_length)
    return min(read, sum(table.num_rows for table in corpora.values())), list(references.values())


def _forward_flops(about: Mapping[str, Any], length: int) -> float:
    """Of one row of a reference: two for each parameter where its own settings have gone."""
    settings = _settings(about)
    if settings is None:
        return 2.0 * (about.get("parameters") or 0) * length
    return ModelConfig.from_json(settings["model"]).flops_per_token(length) * length / 3


def _trained(about: Mapping[str, Any]) -> float | None:
    settings = _settings(about)
    return _training(settings, about.get("step")) if settings and "phases" in settings else None  # not of an import


def _settings(about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of the train run that a reference comes from, where its directory still lies there."""
    path = Path(about.get("run") or "") / "run.json"
    return read_json(path)["settings"] if path.is_file() else None

"""The plan of a run: its phases with their corpora opened and checked, and the content of every batch."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from slm_jax.data.batches import Batch, read_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.mixture import Mixture, Supply
from slm_jax.data.scores import ScoreName
from slm_jax.errors import UserError
from slm_jax.train.phases import Phase, first_steps, history_lag, learning_rate, values
from slm_jax.train.schedules import Schedule, over
from slm_jax.train.step import NUM_SOURCES


class Plan:
    """step -> phase, learning rate, batch.

    Attributes:
      corpora: path -> corpus; all share vocabulary and sequence length.
      phases: resolved, so that each has its length in steps.
      first_steps: steps before each phase, [P + 1].
      total_steps: length of the run.
      lag: Selection.lag, if the run holds a lagged history of its parameters, else 0.
      learning_rate: t -> the rate of the t-th step, t counted from 1.
      source_names: of all corpora; `Batch.source_ids` counts in this list.

    Raises:
      UserError: corpora of different vocabularies or sequence lengths, a score column that is missing, unfinished or of
        another corpus, more rows asked for than the corpora have, schedules that do not fit their phases.
    """

    def __init__(self, phases: Sequence[Phase], seed: int, schedule: Schedule | None = None):
        if not phases:
            raise UserError("train-no-phases", "train.phases is empty: give it at least one Phase")
        # --- Corpora: opened once, and fit to be mixed
        paths = dict.fromkeys(component.corpus for phase in phases for component in phase.mixture)
        self.corpora = {path: Corpus.open(path) for path in paths}
        if len({corpus.path for corpus in self.corpora.values()}) < len(paths):
            raise UserError(
                "mixture-same-corpus", f"two of {', '.join(paths)} are the same corpus: write its path in one way"
            )
        for path, corpus in self.corpora.items():
            if corpus.vocabulary_hash != self.corpus.vocabulary_hash:
                raise UserError(
                    "mixture-other-vocabulary",
                    f"corpora {self.corpus.path} and {path} have different vocabularies: prepare both with one "
                    "(VocabularyConfig.path)",
                )
            if corpus.sequence_length != self.corpus.sequence_length:
                raise UserError(
                    "mixture-other-length",
                    f"corpora {self.corpus.path} and {path} have rows of {self.corpus.sequence_length} and "
                    f"{corpus.sequence_length} tokens: prepare both with one prepare.sequence_length",
                )
        # --- Phases and the learning rate over them
        self.phases = tuple(phase.resolved(self.corpus.sequence_length) for phase in phases)
        self.first_steps = first_steps(self.phases)
        self.total_steps = int(self.first_steps[-1])
        self.lag = history_lag(self.phases)
        self.learning_rate = learning_rate(self.phases, schedule)
        # --- Sources of all corpora as one list
        self.source_names = tuple(dict.fromkeys(n for corpus in self.corpora.values() for n in corpus.source_names))
        if len(self.source_names) > NUM_SOURCES:
            raise UserError(
                "mixture-too-many-sources",
                f"the corpora have {len(self.source_names)} sources, but a run can have {NUM_SOURCES}: merge some",
            )
        self._source_maps = {
            path: np.array([self.source_names.index(name) for name in corpus.source_names], np.int32)
            for path, corpus in self.corpora.items()
        }
        # --- Score columns that the selections read
        for phase in self.phases:
            for column, component in itertools.product(phase.score_columns, phase.mixture):
                name, statistic = ScoreName.parse(column)
                available = self.corpora[component.corpus].score(name).statistics
                if statistic not in available:
                    raise UserError(
                        "score-no-statistic",
                        f"column {name} of corpus {component.corpus} has {', '.join(available)}, but the phase needs "
                        f"{statistic}: score it under another name with score.statistics = ('{statistic}',)",
                    )
        # --- Rows
        self._mixtures = _mixtures(self.phases, {path: corpus.num_rows for path, corpus in self.corpora.items()}, seed)

    @property
    def corpus(self) -> Corpus:
        """Any of the corpora; they share vocabulary and sequence length."""
        return next(iter(self.corpora.values()))

    def references(self) -> dict[str, str | None]:
        """CORPUS/COLUMN -> fingerprint of the model that computed it, for each score column that the phases read."""
        found = {}
        for phase in self.phases:
            for column, component in itertools.product(phase.score_columns, phase.mixture):
                score = self.corpora[component.corpus].score(ScoreName.parse(column).name)
                found[f"{component.corpus}/{column}"] = score.reference.get("fingerprint")
        return found

    def phase_index(self, step: int) -> int:
        """The phase of a step (0-based)."""
        return int(np.searchsorted(self.first_steps, step, side="right")) - 1

    def depends_on_rate_at(self, step: int) -> bool:
        """Whether learning rates after `step` steps depend on the rate at that step."""
        if step >= self.total_steps:
            return False
        index = self.phase_index(step)
        begins = self.phases[index].schedule if step == self.first_steps[index] else None
        return begins is None or begins.start is None

    def shares(self, number: int) -> Float[np.ndarray, "N D"]:
        """The share of the rows of each component of a phase, at each of its steps."""
        return _shares(self.phases[number])

    def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """The batch of a step (0-based), or only some of its rows; the same on every host."""
        index = self.phase_index(step)
        phase, mixture = self.phases[index], self._mixtures[index]
        first = (step - int(self.first_steps[index])) * phase.batch_size
        which, corpus_rows = mixture.rows(first + (np.arange(phase.batch_size) if rows is None else rows))
        paths = [component.corpus for component in phase.mixture]
        return read_batch(
            [self.corpora[path] for path in paths],
            which,
            corpus_rows,
            phase.score_columns,
            [self._source_maps[path] for path in paths],
        )


def _shares(phase: Phase) -> Float[np.ndarray, "N D"]:
    """The share of each component at each step of the phase; each row sums to 1.

    Raises:
      UserError: two components take the remainder, the remainder is negative, or all weights are 0 at a step.
    """
    steps, names = phase.num_steps, [component.corpus for component in phase.mixture]
    columns = []
    for component in phase.mixture:
        weight = component.weight
        if isinstance(weight, Schedule):
            scheduled = values(over(weight, steps, owner=f"MixtureComponent.weight of {component.corpus}"), steps)
            # Rounded, so that the last bit of a platform's arithmetic does not decide which row is where.
            columns.append(np.round(scheduled, 6))
        else:
            columns.append(np.full(steps, float(weight or 0.0)))  # pyright: ignore[reportArgumentType] (a Schedule is above)
    weights = np.stack(columns, axis=1)  # [N, D]
    remainders = [d for d, component in enumerate(phase.mixture) if component.weight is None]
    if len(remainders) > 1:
        raise UserError(
            "mixture-two-remainders",
            f"two of {', '.join(names)} have MixtureComponent.weight = None, the remainder of 1: give one a number",
        )
    if remainders:
        weights[:, remainders[0]] = 1 - weights.sum(axis=1)
    if weights.min() < 0:
        raise UserError(
            "mixture-no-remainder",
            f"MixtureComponent.weight of {names[remainders[0]]} is the remainder of 1, which is negative: lower the "
            "other weights",
        )
    total = weights.sum(axis=1, keepdims=True)
    if not (total > 0).all():
        step = int(np.argmin(total[:, 0] > 0)) + 1
        raise UserError(
            "mixture-all-zero",
            f"all weights of the mixture of {', '.join(names)} are 0 at step {step} of the phase: let one "
            "MixtureComponent start above 0",
        )
    return weights / total


def _mixtures(phases: Sequence[Phase], sizes: dict[str, int], seed: int) -> list[Mixture]:
    """The rows of each phase. Fresh rows continue where earlier phases ended, replayed rows where replays ended."""
    read, replayed, orders = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0), {}
    mixtures = []
    for phase in phases:
        components, supplies = [], []
        for component in phase.mixture:
            path, size = component.corpus, sizes[component.corpus]
            if component.replay:
                supplies.append(Supply(size, replayed[path], min(read[path], size) or None))
                components.append(dataclasses.replace(component, order=orders.get(path, component.order)))
                continue
            if orders.get(path, component.order) != component.order:
                raise UserError(
                    "mixture-two-orders",
                    f"corpus {path} is read in two orders, which would repeat rows: give all its MixtureComponents the "
                    "same order",
                )
            supplies.append(Supply(size, read[path]))
            components.append(component)
        shares = _shares(phase)
        scheduled = any(isinstance(component.weight, Schedule) for component in components)
        mixture = Mixture(components, supplies, seed, shares if scheduled else shares[0], phase.batch_size)
        taken = mixture.counts(np.array([phase.num_steps * phase.batch_size]))[0].tolist()
        for component, supply, count in zip(components, supplies, taken, strict=True):
            drawn = supply.taken + count
            if drawn > supply.period * component.epochs:
                verb = f"replays {drawn} rows of" if component.replay else f"draws {drawn} rows from"
                there = f"of which {supply.seen} were read before" if supply.seen else f"which has {supply.size}"
                raise UserError(
                    "mixture-too-few-rows",
                    f"the run {verb} corpus {component.corpus}, {there}: take fewer steps or set "
                    f"MixtureComponent.epochs = {-(-drawn // supply.period)}",
                )
        for component, count in zip(components, taken, strict=True):
            (replayed if component.replay else read)[component.corpus] += count
            orders[component.corpus] = component.order
        mixtures.append(mixture)
    return mixtures

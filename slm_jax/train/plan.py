"""The plan of a run: its phases with their corpora opened and checked, and what stands in every batch."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from slm_jax.data.batches import Batch, read_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.mixture import Mixture, MixtureComponent, Supply
from slm_jax.errors import UserError
from slm_jax.train.phases import Phase, first_steps, learning_rate, values
from slm_jax.train.schedules import Schedule, over
from slm_jax.train.step import NUM_SOURCES


class Plan:
    """step -> phase, learning rate, batch.

    Attributes:
      phases: resolved, so that each has its length in steps.
      learning_rate: t -> the rate of the t-th step, t counted from 1.

    Raises:
      UserError: corpora of different vocabularies or row lengths, a score column that is missing, unfinished or of
        another corpus, more rows asked for than the corpora have, schedules that do not fit their phases.
    """

    def __init__(self, phases: Sequence[Phase], seed: int, schedule: Schedule | None = None):
        if not phases:
            raise UserError("the run has no phases: give train.phases at least one Phase")
        paths = dict.fromkeys(draw.corpus for phase in phases for draw in phase.mixture)
        self.corpora = {path: Corpus.open(path) for path in paths}
        if len({corpus.path for corpus in self.corpora.values()}) < len(paths):
            raise UserError(f"of {', '.join(paths)} two are the same corpus: write its path in one way")
        self._check_corpora()
        self.phases = tuple(phase.resolved(self.corpus.sequence_length) for phase in phases)
        self.first_steps = first_steps(self.phases)
        self.total_steps = int(self.first_steps[-1])
        self.learning_rate = learning_rate(self.phases, schedule)
        self.source_names = tuple(dict.fromkeys(n for corpus in self.corpora.values() for n in corpus.source_names))
        if len(self.source_names) > NUM_SOURCES:
            raise UserError(
                f"the corpora have {len(self.source_names)} sources, {NUM_SOURCES} are possible: merge some"
            )
        self._source_maps = {
            path: np.array([self.source_names.index(name) for name in corpus.source_names], np.int32)
            for path, corpus in self.corpora.items()
        }
        self._check_columns()
        self._mixtures = _mixtures(self.phases, {path: corpus.num_rows for path, corpus in self.corpora.items()}, seed)

    @property
    def corpus(self) -> Corpus:
        """Any of the corpora; they share vocabulary and row length."""
        return next(iter(self.corpora.values()))

    def references(self) -> dict[str, str | None]:
        """Fingerprint of the model behind each score column that the phases read."""
        return {
            f"{draw.corpus}/{column}": self.corpora[draw.corpus]
            .score(column.split("/")[1])
            .reference.get("fingerprint")
            for phase in self.phases
            for column in phase.score_columns
            for draw in phase.mixture
        }

    def _check_corpora(self) -> None:
        for path, corpus in self.corpora.items():
            if corpus.vocabulary_hash != self.corpus.vocabulary_hash:
                raise UserError(
                    f"corpora {self.corpus.path} and {path} have different vocabularies: prepare both with one "
                    "(VocabularyConfig.path)"
                )
            if corpus.sequence_length != self.corpus.sequence_length:
                raise UserError(
                    f"corpora {self.corpus.path} and {path} have rows of {self.corpus.sequence_length} and "
                    f"{corpus.sequence_length} tokens: prepare both with one sequence_length"
                )

    def _check_columns(self) -> None:
        for phase in self.phases:
            for column in phase.score_columns:
                _, name, statistic = column.split("/")
                for draw in phase.mixture:
                    available = self.corpora[draw.corpus].score(name).statistics
                    if statistic not in available:
                        raise UserError(
                            f"column {name} of corpus {draw.corpus} has {', '.join(available)} but the phase needs "
                            f"{statistic}: score it under another name with score.statistics = ('{statistic}',)"
                        )

    def phase_index(self, step: int) -> int:
        """The phase that the step (0-based) belongs to."""
        return int(np.searchsorted(self.first_steps, step, side="right")) - 1

    def depends_on_rate_at(self, step: int) -> bool:
        """Whether what comes after so many steps depends on the learning rate there."""
        if step >= self.total_steps:
            return False
        index = self.phase_index(step)
        begins = self.phases[index].schedule if step == self.first_steps[index] else None
        return begins is None or begins.start is None

    def shares(self, number: int) -> Float[np.ndarray, "N D"]:
        """The share of each draw of a phase at each of its steps."""
        return _shares(self.phases[number])

    def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """The batch of a step (0-based), or only its given rows; the same whoever asks."""
        index = self.phase_index(step)
        phase, mixture = self.phases[index], self._mixtures[index]
        first = (step - int(self.first_steps[index])) * phase.batch_size
        which, corpus_rows = mixture.rows(first + (np.arange(phase.batch_size) if rows is None else rows))
        paths = [draw.corpus for draw in phase.mixture]
        return read_batch(
            [self.corpora[path] for path in paths],
            which,
            corpus_rows,
            phase.score_columns,
            [self._source_maps[path] for path in paths],
        )


def _shares(phase: Phase) -> Float[np.ndarray, "N D"]:
    """The share of each draw at each step of the phase.

    Raises:
      UserError: two draws that take what the others leave, nothing left, or no share above 0 at a step.
    """
    steps, names = phase.num_steps, [draw.corpus for draw in phase.mixture]
    rest = [draw.weight is None for draw in phase.mixture]
    weights = np.stack([_weights(draw, steps) for draw in phase.mixture], axis=1)
    if sum(rest) > 1:
        raise UserError(
            f"of {', '.join(names)} two have MixtureComponent.weight = None, what the others leave: give one a number"
        )
    if sum(rest):
        weights[:, rest.index(True)] = 1 - weights.sum(axis=1)
    if weights.min() < 0:
        raise UserError(
            f"MixtureComponent.weight of {names[rest.index(True)]} takes what the others leave of 1, which is below 0"
        )
    total = weights.sum(axis=1, keepdims=True)
    if not (total > 0).all():
        step = int(np.argmin(total[:, 0] > 0)) + 1
        raise UserError(
            f"at step {step} of a phase no MixtureComponent has a share above 0: let one of them begin above it"
        )
    return weights / total


def _weights(draw: MixtureComponent, steps: int) -> Float[np.ndarray, " N"]:
    """The draw's own share at each step; 0 where it takes what the others leave."""
    if isinstance(draw.weight, Schedule):
        # Rounded, so that no platform's last bit decides which row stands where.
        return np.round(values(over(draw.weight, steps, owner=f"MixtureComponent.weight of {draw.corpus}"), steps), 6)
    if not isinstance(draw.weight, int | float | None):
        raise UserError(
            f"MixtureComponent.weight of {draw.corpus} is {draw.weight!r}: it takes a number, None or a @Schedule()"
        )
    return np.full(steps, float(draw.weight or 0.0))


def _mixtures(phases: Sequence[Phase], sizes: dict[str, int], seed: int) -> list[Mixture]:
    """The rows of each phase: fresh ones go on where earlier phases ended, replayed ones where replays did."""
    read, replayed, orders = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0), {}
    mixtures = []
    for phase in phases:
        draws, supplies = [], []
        for draw in phase.mixture:
            size = sizes[draw.corpus]
            if draw.replay:
                order = orders.get(draw.corpus, draw.order)
                supplies.append(Supply(size, replayed[draw.corpus], min(read[draw.corpus], size) or None))
                draws.append(dataclasses.replace(draw, order=order))
            else:
                if orders.get(draw.corpus, draw.order) != draw.order:
                    raise UserError(
                        f"corpus {draw.corpus} is read in two orders, which would repeat rows: give its "
                        f"MixtureComponents one order"
                    )
                supplies.append(Supply(size, read[draw.corpus]))
                draws.append(draw)
        changing = any(isinstance(draw.weight, Schedule) for draw in draws)
        shares = _shares(phase)
        mixture = Mixture(draws, supplies, seed, shares if changing else shares[0], phase.batch_size)
        taken = mixture.counts(np.array([phase.num_steps * phase.batch_size]))[0]
        for draw, supply, count in zip(draws, supplies, taken.tolist(), strict=True):
            _check_supply(draw, supply, count)
        for draw, count in zip(draws, taken.tolist(), strict=True):
            (replayed if draw.replay else read)[draw.corpus] += count
            orders[draw.corpus] = draw.order
        mixtures.append(mixture)
    return mixtures


def _check_supply(draw: MixtureComponent, supply: Supply, count: int) -> None:
    drawn = supply.taken + count
    if drawn <= supply.period * draw.epochs:
        return
    what = f"replays {drawn} rows of" if draw.replay else f"draws {drawn} rows from"
    there = f"of which {supply.seen} were read before" if supply.seen else f"which has {supply.size}"
    raise UserError(
        f"the run {what} corpus {draw.corpus}, {there}: take fewer steps or allow MixtureComponent.epochs = "
        f"{-(-drawn // supply.period)}"
    )

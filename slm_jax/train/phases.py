"""A run is a list of phases under one schedule; the step alone decides what happens."""

import dataclasses
from collections.abc import Sequence

import gin
import numpy as np

from slm_jax.config import as_list, at_least
from slm_jax.data.batches import Batch, read_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.mixture import Draw, Mixture
from slm_jax.errors import UserError
from slm_jax.score.selection import Selection
from slm_jax.train.objective import NUM_SOURCES


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Phase:
    """`steps` steps of `batch_rows` rows drawn from `mixture` (default: one Draw).

    selection: None trains on every token (causal), else on the selected ones. reset_optimizer: forget the moments when
    the phase begins.
    """

    steps: int
    mixture: Sequence[Draw] = ()
    batch_rows: int = 16
    selection: Selection | None = None
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        at_least(1, **{"Phase.steps": self.steps, "Phase.batch_rows": self.batch_rows})
        draws = as_list(self.mixture, Draw, "Phase.mixture") or [Draw()]  # pyright: ignore[reportCallIssue] (gin's)
        object.__setattr__(self, "mixture", tuple(draws))
        if len({draw.corpus for draw in draws}) < len(draws):
            raise UserError("Phase.mixture names a corpus twice: give it one Draw with the sum of the shares")

    @property
    def score_columns(self) -> tuple[str, ...]:
        return self.selection.columns() if self.selection else ()


class Plan:
    """The phases of a run with their corpora opened and checked: step -> phase, step -> batch.

    Raises:
      UserError: corpora of different vocabularies or row lengths, a score column that is missing, unfinished or of
        another corpus, more rows asked for than the corpora have.
    """

    def __init__(self, phases: Sequence[Phase], seed: int):
        if not phases:
            raise UserError("the run has no phases: give train.phases at least one Phase")
        self.phases = tuple(phases)
        self.first_steps = np.cumsum([0, *(phase.steps for phase in phases)])
        self.total_steps = int(self.first_steps[-1])
        paths = dict.fromkeys(draw.corpus for phase in phases for draw in phase.mixture)
        self.corpora = {path: Corpus.open(path) for path in paths}
        self._check_corpora()
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
        self._mixtures = self._draw_rows(seed)

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
            if corpus.row_length != self.corpus.row_length:
                raise UserError(
                    f"corpora {self.corpus.path} and {path} have rows of {self.corpus.row_length} and "
                    f"{corpus.row_length} tokens: prepare both with one row_length"
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

    def _draw_rows(self, seed: int) -> list[Mixture]:
        drawn = dict.fromkeys(self.corpora, 0)
        mixtures = []
        for phase in self.phases:
            paths = [draw.corpus for draw in phase.mixture]
            sizes = [self.corpora[path].num_rows for path in paths]
            mixture = Mixture(phase.mixture, sizes, [drawn[path] for path in paths], seed)
            taken = mixture.counts(np.array([phase.steps * phase.batch_rows]))[0]
            for draw, count, size in zip(phase.mixture, taken.tolist(), sizes, strict=True):
                drawn[draw.corpus] += count
                if drawn[draw.corpus] > size * draw.epochs:
                    raise UserError(
                        f"the run draws {drawn[draw.corpus]} rows from corpus {draw.corpus}, which has {size}: take "
                        f"fewer steps or allow Draw.epochs = {-(-drawn[draw.corpus] // size)}"
                    )
            mixtures.append(mixture)
        return mixtures

    def phase_index(self, step: int) -> int:
        """The phase that the step (0-based) belongs to."""
        return int(np.searchsorted(self.first_steps, step, side="right")) - 1

    def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """The batch of a step (0-based), or only its given rows; the same whoever asks."""
        index = self.phase_index(step)
        phase, mixture = self.phases[index], self._mixtures[index]
        first = (step - int(self.first_steps[index])) * phase.batch_rows
        which, corpus_rows = mixture.rows(first + (np.arange(phase.batch_rows) if rows is None else rows))
        paths = [draw.corpus for draw in phase.mixture]
        return read_batch(
            [self.corpora[path] for path in paths],
            which,
            corpus_rows,
            phase.score_columns,
            [self._source_maps[path] for path in paths],
        )

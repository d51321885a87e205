"""Score columns: float arrays [num_rows, sequence_length] that a reference model adds to a corpus, in ranges of rows.

scores/NAME/manifest.json   corpus fingerprint, reference, statistics, dtype
scores/NAME/STATISTIC       zarr3 array [num_rows, sequence_length]; NaN where nothing was written
scores/NAME/finished        zarr3 array [num_rows] of 0 and 1; set after the values are on disk
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from slm_jax.data.store import SHARD_ROWS, SHARD_VALUES, Store, read_result
from slm_jax.errors import UserError

FORMAT_VERSION = 1


class ScoreName(NamedTuple):
    """The array of one statistic as a column of a corpus: `str(ScoreName("reference", "loss"))` is
    "scores/reference/loss"."""

    name: str
    statistic: str = "loss"

    def __str__(self) -> str:
        return f"scores/{self.name}/{self.statistic}"

    @classmethod
    def parse(cls, column: str) -> "ScoreName":
        """The parts of "scores/NAME/STATISTIC".

        Raises:
            UserError: `column` has another form.
        """
        if not (found := re.fullmatch(r"scores/([^/]+)/([^/]+)", column)):
            raise UserError("corpus-no-column", f"{column!r} is no column: name a score as scores/NAME/STATISTIC")
        return cls(*found.groups())


class ScoreColumn:
    """One score of a corpus, from `Corpus.score` (finished) or `Corpus.create_score` (to be written).

    Attributes:
        name: as given to `Corpus.create_score`.
        statistics: likewise.
        reference: likewise.
        num_rows: rows of the corpus.
        chunk_rows: write multiples of this many rows where possible: they share a file.
    """

    chunk_rows = SHARD_ROWS

    def __init__(self, store: Store, name: str, manifest: Mapping[str, Any]):
        self.name = name
        self._path = f"{store.path}/scores/{name}"
        self.statistics: tuple[str, ...] = tuple(manifest["statistics"])
        self.reference: dict[str, Any] = manifest["reference"]
        self._arrays = {}
        for key in (*self.statistics, "finished"):
            array = store.open_array(str(ScoreName(name, key)))
            if array is None:
                raise UserError(
                    "score-damaged",
                    f"score {name!r} of {store.path} has lost {key!r}: delete scores/{name} and score again",
                )
            store.say_if_unchecked(array)
            self._arrays[key] = array
        self.num_rows: int = self._arrays["finished"].shape[0]

    def array(self, statistic: str):
        """The TensorStore array of one statistic."""
        if statistic not in self.statistics:
            raise UserError(
                "score-no-statistic",
                f"score {self.name!r} has no statistic {statistic!r}: it has {', '.join(self.statistics)}",
            )
        return self._arrays[statistic]

    def read(self, statistic: str, rows: int) -> Float[np.ndarray, "rows L"]:
        """The first rows of one statistic; UserError `column-damaged`."""
        self.array(statistic)
        return self._read(statistic, 0, rows)

    def _read(self, key: str, begin: int, end: int) -> np.ndarray:
        where = f"column {key} of {self._path}, among rows {begin} to {end - 1},"
        return read_result(self._arrays[key][begin:end].read(), where, f"delete {self._path} and score again")

    def _marks(self) -> Iterator[Bool[np.ndarray, "rows"]]:
        """Which rows have been written, some files of marks at a time."""
        step = 4 * SHARD_VALUES
        for begin in range(0, self.num_rows, step):
            yield self._read("finished", begin, min(begin + step, self.num_rows)) > 0

    def finished(self) -> Bool[np.ndarray, "N"]:
        """Which rows have been written."""
        return np.concatenate([*self._marks(), np.empty(0, bool)])

    def num_finished(self) -> int:
        """How many rows have been written."""
        return sum(int(np.count_nonzero(marks)) for marks in self._marks())

    @property
    def complete(self) -> bool:
        return self.num_finished() == self.num_rows

    def pending(self) -> list[tuple[int, int]]:
        """Row ranges [begin, end) still to be written, each a whole chunk."""
        begins = np.arange(0, self.num_rows, self.chunk_rows)
        unfinished = np.logical_or.reduceat(~self.finished(), begins) if len(begins) else np.empty(0, bool)
        return [(begin, min(begin + self.chunk_rows, self.num_rows)) for begin in begins[unfinished].tolist()]

    def write(self, start: int, values: Mapping[str, Float[np.ndarray, "B L"]]) -> None:
        """Writes rows [start, start + B) of every statistic; returns when they are on disk and marked as finished."""
        if set(values) != set(self.statistics):
            raise ValueError(f"score {self.name!r} holds {sorted(self.statistics)}, got {sorted(values)}")
        end = start + len(next(iter(values.values())))
        if start < 0 or end > self.num_rows:
            raise IndexError(f"rows {start} to {end} are outside the score {self.name!r} of {self.num_rows} rows")
        writing = []
        for name, value in values.items():
            array = self._arrays[name]
            if value.shape != (end - start, array.shape[1]):
                raise ValueError(f"{name} is {value.shape}, not {(end - start, array.shape[1])}")
            writing.append(array[start:end].write(np.asarray(value, array.dtype.numpy_dtype)))
        for future in writing:
            future.result()
        # Only now: a kill in between loses these rows, but never marks rows that are not on disk.
        self._arrays["finished"][start:end].write(np.ones(end - start, np.uint8)).result()


def score_names(store: Store) -> list[str]:
    """Names of the columns, finished or not, sorted."""
    found = (re.fullmatch(r"scores/([^/]+)/manifest\.json", key) for key in store.keys("scores/"))
    return sorted(match[1] for match in found if match)


def open_score(store: Store, name: str, fingerprint: str, partial: bool = False) -> ScoreColumn:
    """Opens a column made for the content `fingerprint`, else UserError. See `Corpus.score`."""
    manifest = _manifest(store, name)
    if manifest is None:
        raise UserError(
            "score-not-found",
            f"corpus {store.path} has no score {name!r} (it has {', '.join(score_names(store)) or 'none'}): "
            "make it with the stage `score`",
        )
    _check_corpus(store, name, manifest, fingerprint)
    column = ScoreColumn(store, name, manifest)
    finished = column.num_finished()
    if finished < column.num_rows and not partial:
        raise UserError(
            "score-unfinished",
            f"score {name!r} of {store.path} is half finished ({finished} of {column.num_rows} rows): "
            "run the same `score` again to continue",
        )
    return column


def check_column(name: str, dtype: str) -> None:
    """Refuses invalid names and types of columns."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError("score-name", f"score name {name!r}: use letters, digits, '.', '_' and '-'")
    if dtype not in ("float16", "float32"):
        raise UserError("score-dtype", f"score {name!r}: dtype {dtype!r} is not one of float16, float32")


def create_score(
    store: Store,
    name: str,
    statistics: tuple[str, ...],
    dtype: str,
    reference: dict[str, Any],
    fingerprint: str,
    shape: tuple[int, int],
) -> ScoreColumn:
    """Creates a column, or reopens one started with the same arguments. See `Corpus.create_score`."""
    check_column(name, dtype)
    wanted = {"statistics": list(statistics), "dtype": dtype, "reference": json.loads(json.dumps(reference))}
    manifest = _manifest(store, name)
    if manifest is None:
        for statistic in statistics:
            store.create_array(str(ScoreName(name, statistic)), dtype, shape)
        store.create_array(str(ScoreName(name, "finished")), "uint8", shape[:1])
        manifest = {"format_version": FORMAT_VERSION, "corpus_fingerprint": fingerprint, **wanted}
        store.write_json(f"scores/{name}/manifest.json", manifest)
    _check_corpus(store, name, manifest, fingerprint)
    for key, value in wanted.items():
        was = manifest[key]
        if key == "reference" and "fingerprint" in value:  # the same model may have moved
            was, value = ({of: about.get(of) for of in ("fingerprint", "prefix")} for about in (was, value))
        if was != value:
            raise UserError(
                "score-other-settings",
                f"score {name!r} of {store.path} was started with {key} {was}, now {value}: "
                f"choose another name or delete {store.path}/scores/{name}",
            )
    return ScoreColumn(store, name, manifest)


def _manifest(store: Store, name: str) -> dict[str, Any] | None:
    path = f"scores/{name}/manifest.json"
    manifest = store.read_json(path)
    if manifest is not None and manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            "score-format",
            f"{store.path}/{path} has a format unknown to this version: delete it and score again",
        )
    return manifest


def _check_corpus(store: Store, name: str, manifest: dict[str, Any], fingerprint: str) -> None:
    made_for = manifest["corpus_fingerprint"]
    if made_for != fingerprint:
        raise UserError(
            "score-other-corpus",
            f"score {name!r} was made for a corpus with fingerprint {made_for[:12]}, {store.path} has "
            f"{fingerprint[:12]}: score this corpus again",
        )

"""Records from seqio Tasks, Mixtures and TensorFlow Datasets. TensorFlow is imported when a function is called."""

import contextlib
import difflib
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from slm_jax.data.readers import Record
from slm_jax.errors import UserError


def import_seqio() -> Any:
    """The seqio module, imported in silence and without taking the GPU."""
    # TensorFlow's libraries write to file descriptor 2 while they are imported, and no setting stops them.
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        import seqio
        import tensorflow as tf

        # Otherwise TensorFlow would take all of the memory that jax needs. Once it has begun, it is too late.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return seqio


def registered(name: str, module: str | None, split: str, owner: str) -> Any:
    """The seqio Task or Mixture `name`, after importing the module that registers it.

    Raises:
        UserError: no such module, name or split.
    """
    seqio = import_seqio()
    if module is not None:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(
                "seqio-module-not-found", f"{owner}: {error}: check seqio_module = {module!r} and PYTHONPATH"
            ) from error
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "set seqio_module to the module that registers it"
        raise UserError("seqio-unknown-task", f"{owner}: no seqio Task or Mixture is called {name!r}: {hint}")
    found = seqio.get_mixture_or_task(name)
    if split not in found.splits:
        raise UserError(
            "seqio-unknown-split", f"{owner}: {name!r} has no split {split!r}: it has {', '.join(found.splits)}"
        )
    return found


def task_records(task: Any, split: str, columns: Sequence[str]) -> Iterator[Record]:
    """The examples of a Task or Mixture, once and in its own order.

    A feature that the Task tokenises is read as text: what the Task keeps as NAME_pretokenized, else its ids decoded.
    """
    seqio = import_seqio()
    how: dict[str, Any] = {"split": split, "shuffle": False, "seed": 0, "num_epochs": 1, "trim_output_features": False}
    if isinstance(task, seqio.Mixture):
        # A Mixture keeps only the features that it is asked for, and all its Tasks must have them.
        parts = [part.get_dataset(sequence_length=None, **how) for part in task.tasks if split in part.splits]
        common = set.intersection(*(set(part.element_spec) for part in parts))
        wanted = {*columns, *(f"{name}_pretokenized" for name in columns)}
        how |= {"passthrough_features": sorted(common & wanted)}
    decoders = {name: feature.vocabulary.decode for name, feature in task.output_features.items()}

    def fields(example: dict[str, Any]) -> dict[str, Any]:
        texts = {name: example.pop(f"{name}_pretokenized") for name in decoders if f"{name}_pretokenized" in example}
        for name, decode in decoders.items():
            if name in columns and name not in texts and np.issubdtype(np.asarray(example.get(name)).dtype, np.integer):
                texts[name] = decode(example[name].tolist())
        return example | texts

    dataset = task.get_dataset(sequence_length=None, **how)
    yield from _records(map(fields, dataset.as_numpy_iterator()), columns, f"seqio {task.name}")


def tfds_records(name: str, split: str, columns: Sequence[str]) -> Iterator[Record]:
    """The examples of a data set of TensorFlow Datasets, in its own order.

    Raises:
        UserError: it is not there.
    """
    seqio = import_seqio()
    import tensorflow_datasets as tfds

    try:
        dataset = seqio.TfdsDataSource(name, splits={"train": split}).get_dataset("train", shuffle=False)
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError("tfds-not-found", f"tfds:{name}: {reason} Check name, version and TFDS_DATA_DIR") from error
    yield from _records(dataset.as_numpy_iterator(), columns, f"tfds:{name}:{split}")


def _records(examples: Iterable[dict[str, Any]], columns: Sequence[str], name: str) -> Iterator[Record]:
    import tensorflow as tf

    number = 0
    try:
        for number, example in enumerate(examples, 1):
            try:
                # Features that nobody asked for (images) are named only.
                fields = {key: _plain(value) if key in columns else None for key, value in example.items()}
                yield Record(f"{name}:{number}", fields, "", 0)
            except UnicodeDecodeError:
                yield Record(f"{name}:{number}", None, "not UTF-8", 0)
    except tf.errors.OpError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError("seqio-task-failed", f"{name} failed after {number} examples: {reason}") from error


def _plain(value: Any) -> Any:
    """Text, numbers, lists and dictionaries of them, from numpy."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return _plain(value.tolist()) if isinstance(value, np.ndarray | np.generic) else value

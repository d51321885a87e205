"""The seqio Task of a source, and the documents read through it. TensorFlow is imported when a function is called."""

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from slm_jax.data.sources import Source, read_documents
from slm_jax.data.vocabularies import Vocabulary, to_seqio
from slm_jax.errors import UserError

if TYPE_CHECKING:
    import seqio


def register_task(source: Source, vocabulary: Vocabulary, field: str | None = None) -> "seqio.Task":
    """Registers a source as a seqio Task; registering the same again gives the same Task. `field` as in
    `read_documents`.

    Its examples hold `targets`, the ids [BOS] + text + [EOS], beside text, url, source, spans and index. `prepare`
    reads the documents before tokenisation (`documents`) and tokenises outside of tf.data: four times as fast.
    """
    with _native_log_aside():
        import seqio
        import tensorflow as tf

        # On a GPU, TensorFlow would take all of the memory that jax needs.
        tf.config.set_visible_devices([], "GPU")
    content = json.dumps({**asdict(source), "files": source.paths() or source.files, "directory": None}, sort_keys=True)
    digest = hashlib.sha256((content + vocabulary.content_hash + (field or "")).encode("utf-8")).hexdigest()[:16]
    name = f"slm_jax.{source.name.replace('-', '_')}.{digest}"
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    data: Any  # seqio's own sources do not fit the protocol that it asks for
    if source.tfds:
        tfds_name, split = source.tfds
        data, mapping = seqio.TfdsDataSource(tfds_name, splits={"train": split}), [_tfds_rows(source, field)]
    else:
        data, mapping = seqio.FunctionDataSource(_dataset_function(source, field), splits=["train"]), []
    return seqio.TaskRegistry.add(
        name,
        source=data,
        preprocessors=[
            *mapping,
            seqio.CacheDatasetPlaceholder(),  # what stands before it gives the documents, in batches
            lambda dataset: dataset.unbatch(),
            lambda dataset: dataset.filter(lambda row: row["skipped"] == ""),
            _add_targets,
            seqio.preprocessors.tokenize,
            _bos_and_eos(vocabulary),
        ],
        output_features={"targets": seqio.Feature(vocabulary=to_seqio(vocabulary), add_eos=False)},
    )


@contextlib.contextmanager
def _native_log_aside() -> Iterator[None]:
    """TensorFlow's libraries log to file descriptor 2 while they are imported, and no setting stops them."""
    if "tensorflow" in sys.modules:
        yield
        return
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def documents(task: "seqio.Task") -> Iterator[dict[str, Any]]:
    """The rows of `read_documents`, read through a Task that `register_task` made; same errors."""
    import tensorflow_datasets as tfds

    try:
        dataset = task.preprocess_precache(task.source.get_dataset("train", shuffle=False))
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"source {task.source}: {reason} Check name, version and TFDS_DATA_DIR") from error
    for batch in dataset.as_numpy_iterator():
        for values in zip(*batch.values(), strict=True):
            values = [value.decode("utf-8") if isinstance(value, bytes) else int(value) for value in values]
            row = dict(zip(batch, values, strict=True))
            if error := row.pop("error"):
                raise UserError(error)
            yield row


_STRINGS = ("text", "url", "field", "source", "spans", "loss_spans", "skipped", "error")
_NUMBERS = ("index", "bytes_read")
_BATCH = 128  # one element of tf.data's generators costs near a millisecond, whatever it holds


def _dataset_function(source: Source, field: str | None):
    """The rows of `read_documents` as a tf.data.Dataset of batches.

    An error travels as a last row: raised inside tf.data, it would reach the user wrapped in pages of TensorFlow's own.
    """
    import tensorflow as tf

    def rows() -> Iterator[dict[str, Any]]:
        try:
            for row in read_documents(source, field):
                yield row | {"error": ""}
        except UserError as error:
            yield dict.fromkeys(_STRINGS, "") | dict.fromkeys(_NUMBERS, 0) | {"skipped": "error", "error": str(error)}

    def batches() -> Iterator[dict[str, list]]:
        remaining = rows()
        while batch := list(itertools.islice(remaining, _BATCH)):
            yield {key: [row[key] for row in batch] for key in batch[0]}

    signature = {key: tf.TensorSpec((None,), tf.string) for key in _STRINGS}
    signature |= {key: tf.TensorSpec((None,), tf.int64) for key in _NUMBERS}

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None):
        return tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(2)

    return dataset


def _tfds_rows(source: Source, field: str | None):
    """Features of a TFDS data set -> the rows of `read_documents`."""
    import tensorflow as tf

    fields = source.fields()

    def string(features, path: str | None):
        for key in path.split(".") if path else ():
            features = features.get(key, {})
        return features if isinstance(features, tf.Tensor) and features.dtype == tf.string else tf.constant("")

    def row(index, features):
        text, value = string(features, fields.text), string(features, fields.source)
        return {
            "text": text,
            "url": string(features, fields.url),
            "field": string(features, field),
            "source": tf.where(value == "", source.name, tf.strings.join([source.name, "/", value])),
            "spans": "[]",
            "loss_spans": "",
            "index": index,
            "skipped": tf.where(text == "", "empty text", ""),
            "bytes_read": tf.constant(0, tf.int64),
            "error": "",
        }

    return lambda dataset: dataset.enumerate().map(row).batch(_BATCH)


def _add_targets(dataset):
    return dataset.map(lambda row: row | {"targets": row["text"]})


def _bos_and_eos(vocabulary: Vocabulary):
    import tensorflow as tf

    def add(row):
        return row | {"targets": tf.concat([[vocabulary.bos_id], row["targets"], [vocabulary.eos_id]], axis=0)}

    return lambda dataset: dataset.map(add)

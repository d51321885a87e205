"""Sources and vocabularies as seqio knows them, for users of T5X and MaxText. TensorFlow is imported when a function is
called."""

import hashlib
import itertools
import json
import pathlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from slm_jax.data.sentencepiece_vocabulary import MODEL_FILE
from slm_jax.data.seqio_records import import_seqio
from slm_jax.data.sources import Source, read_documents
from slm_jax.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    import seqio

_BATCH = 128  # one element of tf.data's generators costs about a millisecond, whatever it holds


def to_seqio_task(source: Source, vocabulary: Vocabulary, name: str | None = None) -> "seqio.Task":
    """Registers a source as a seqio Task with the split 'train'.

    Its examples hold `targets`, the ids [BOS] + text + [EOS] as int32 [T], beside the strings text, url and source and
    the int64 index, in the order of the files. Registering the same source again returns the same Task.

    Args:
        source: any source: files, TFDS, or another Task.
        vocabulary: gives the ids.
        name: of the Task; derived from the source and the vocabulary by default.
    """
    seqio = import_seqio()
    import tensorflow as tf

    if name is None:
        about = {**asdict(source), "files": source.paths() or list(source.files), "directory": None}
        content = json.dumps(about, sort_keys=True) + vocabulary.content_hash
        name = f"slm_jax.{source.name.replace('-', '_')}.{hashlib.sha256(content.encode('utf-8')).hexdigest()[:16]}"
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    types = {"text": tf.string, "url": tf.string, "source": tf.string, "index": tf.int64}

    def batches() -> Iterator[dict[str, list]]:
        documents = (row for row in read_documents(source) if not row["skipped"])
        while batch := list(itertools.islice(documents, _BATCH)):
            yield {key: [row[key] for row in batch] for key in types}

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None):
        signature = {key: tf.TensorSpec((None,), kind) for key, kind in types.items()}
        return tf.data.Dataset.from_generator(batches, output_signature=signature).unbatch()

    def add_targets(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"targets": row["text"]}

    def add_bos_and_eos(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"targets": tf.concat([[vocabulary.bos_id], row["targets"], [vocabulary.eos_id]], axis=0)}

    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=["train"]),
        preprocessors=[
            seqio.map_over_dataset(add_targets),
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.tokenize,
            seqio.map_over_dataset(add_bos_and_eos),
        ],
        output_features={"targets": seqio.Feature(vocabulary=to_seqio_vocabulary(vocabulary), add_eos=False)},
    )


def to_seqio_vocabulary(vocabulary: Vocabulary) -> "seqio.Vocabulary":
    """The same vocabulary, id for id.

    A SentencePiece model is seqio's own and runs within the graph. There is no TensorFlow code for the others: they
    are called as Python from within tf.data.
    """
    seqio = import_seqio()
    import tensorflow as tf

    if vocabulary.kind == "sentencepiece":
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / MODEL_FILE
            path.write_bytes(vocabulary.files()[MODEL_FILE])
            result = seqio.SentencePieceVocabulary(str(path))
            result.load_model()  # keeps the content, so the file may go
        return result

    class Wrapped(seqio.Vocabulary):
        bos_id = property(lambda self: vocabulary.bos_id)
        eos_id = property(lambda self: vocabulary.eos_id)
        unk_id = property(lambda self: vocabulary.unk_id)
        pad_id = property(lambda self: vocabulary.pad_id)
        _base_vocab_size = property(lambda self: vocabulary.size)

        def _encode(self, s):
            return vocabulary.encode(s)

        def _decode(self, ids):
            return vocabulary.decode(ids)

        def _encode_tf(self, s):
            def ids(s):
                return np.array(vocabulary.encode(s.numpy().decode("utf-8")), np.int32)

            return tf.ensure_shape(tf.py_function(ids, [s], tf.int32), [None])

        def _decode_tf(self, ids):
            return tf.ensure_shape(tf.py_function(lambda ids: vocabulary.decode(ids.numpy()), [ids], tf.string), [])

    return Wrapped()

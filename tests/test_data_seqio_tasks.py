"""seqio both ways: registered Tasks, Mixtures and TFDS as sources, and any source as a Task."""

import importlib.resources.abc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy import refused

from slm_jax.data.corpus import Corpus
from slm_jax.data.prepare import prepare
from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.seqio_tasks import to_seqio_task
from slm_jax.data.sources import Source, has_field, read_documents
from slm_jax.data.vocabularies import VocabularyConfig
from slm_jax.data.vocabulary import ByteVocabulary

BYTES = VocabularyConfig(kind="bytes")
# A user's own module: two Tasks, one that keeps its texts and one that has token ids alone, and a Mixture.
MODULE = """
import functools, seqio, tensorflow as tf
def texts(first, split, shuffle_files=False, seed=None):
    rows = [f"{first} hen {i} naïve 漢" for i in range(6 if split == "train" else 2)]
    return tf.data.Dataset.from_tensor_slices({"inputs": [r.upper() for r in rows], "targets": rows, "link":
        [f"https://{first}.org/{i}" for i, _ in enumerate(rows)], "image": tf.zeros([len(rows), 2, 2])})
for name, first, kept in (("farm_texts", "red", True), ("farm_ids", "blue", False)):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(functools.partial(texts, first), splits=["train", "validation"]),
        preprocessors=[functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=kept),
                       seqio.preprocessors.append_eos],
        output_features={"inputs": seqio.Feature(seqio.ByteVocabulary()),
                         "targets": seqio.Feature(seqio.ByteVocabulary())},
    )
seqio.MixtureRegistry.add("farm_mixture", [("farm_texts", 1), ("farm_ids", 2)])
"""
RED, BLUE = ([f"{first} hen {i} naïve 漢" for i in range(6)] for first in ("red", "blue"))


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "farm_seqio_tasks.py").write_text(MODULE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "farm_seqio_tasks"


def texts(**settings) -> list[str]:
    return [row["text"] for row in read_documents(Source("farm", **settings))]


def test_a_registered_task_is_a_source(module):
    assert texts(seqio="farm_texts", seqio_module=module) == RED
    assert texts(seqio="farm_ids", seqio_module=module) == BLUE  # decoded, without the EOS that the Task appends
    assert texts(seqio="farm_texts", seqio_module=module, seqio_split="validation") == RED[:2]
    assert texts(seqio="farm_texts", text_field="inputs") == [text.upper() for text in RED]
    assert texts(seqio="farm_ids", max_documents=2) == BLUE[:2]
    halves = [texts(seqio="farm_ids", part=part) for part in ("0/2", "1/2")]
    assert sorted(halves[0] + halves[1]) == BLUE and all(halves)
    rows = list(read_documents(Source("farm", seqio="farm_texts", url_field="link"), "inputs"))
    assert [row["url"] for row in rows] == [f"https://red.org/{i}" for i in range(6)]
    assert [row["field"] for row in rows] == [text.upper() for text in RED]
    pairs = Source("farm", seqio="farm_ids", text_field="inputs", response_field="targets", template="plain")
    pairs.check()
    assert next(read_documents(pairs))["text"] == f"User:\n{BLUE[0].upper()}\n\nAssistant:\n{BLUE[0]}"


def test_a_mixture_is_a_source(module):
    """Its order is its own: the same each time, every example once."""
    found = texts(seqio="farm_mixture", seqio_module=module)
    assert sorted(found) == sorted(RED + BLUE) and found not in (RED + BLUE, BLUE + RED)
    assert texts(seqio="farm_mixture") == found
    rows = read_documents(Source("farm", seqio="farm_mixture", url_field="link"))
    assert {row["url"] for row in rows} == {f"https://{first}.org/{i}" for first in ("red", "blue") for i in range(6)}
    assert has_field(Source("farm", seqio="farm_mixture"), "link")
    assert not has_field(Source("farm", seqio="farm_mixture"), "nothing")


def test_a_corpus_from_a_task_is_that_from_the_same_texts(module, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in BLUE))
    of_file = prepare(tmp_path / "file", [Source("farm", [str(file)])], BYTES, 64, processes=1)
    source = Source("farm", seqio="farm_ids", seqio_module=module)
    of_task = prepare(tmp_path / "task", [source], BYTES, 64, processes=1)
    assert of_task.fingerprint == of_file.fingerprint
    assert "source farm: seqio farm_ids" in capsys.readouterr().out
    prepare(tmp_path / "task", [source], BYTES, 64, processes=1)
    assert "is there already" in capsys.readouterr().out
    other = Source("farm", seqio="farm_ids", seqio_module=module, seqio_split="validation")
    message = refused("prepare-other-settings", prepare, tmp_path / "task", [other], BYTES, 64)
    assert "seqio_split of source 'farm' was train, now validation" in message


@pytest.mark.parametrize(
    "settings, code, named",
    [
        ({"seqio": "farm_textes"}, "seqio-unknown-task", "'farm_texts'"),
        ({"seqio": "zzz"}, "seqio-unknown-task", "seqio_module"),
        ({"seqio": "farm_ids", "seqio_module": "no_such_module"}, "seqio-module-not-found", "'no_such_module'"),
        ({"seqio": "farm_ids", "seqio_split": "test"}, "seqio-unknown-split", "'test': it has train, validation"),
    ],
)
def test_a_task_that_is_not_there(settings, code, named, module):
    list(read_documents(Source("farm", seqio="farm_ids", seqio_module=module)))
    assert named in refused(code, Source("farm", **settings).check)


def test_a_task_that_yields_other_features_is_refused(module):
    source = Source("farm", seqio="farm_ids", seqio_module=module, text_field="text")
    message = refused("source-file-without-document", list, read_documents(source))
    assert "no field 'text'" in message and "fields there: image, inputs, link, targets" in message


@pytest.fixture(scope="module")
def tfds(tmp_path_factory):
    """The data set tiny:1.0.0 of three rows."""
    # TFDS builds data sets with a package that it does not install; reading does not need it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "importlib_resources", importlib.resources)
        patch.setitem(sys.modules, "importlib_resources.abc", importlib.resources.abc)
        import seqio
        import tensorflow as tf
        import tensorflow_datasets as tfds

        features = tfds.features.FeaturesDict(
            {
                "text": tfds.features.Text(),
                "meta": {"kind": tfds.features.Text()},
                "spans": tfds.features.Tensor(shape=(1, 2), dtype=np.int64),
            }
        )
        rows = {"text": ["one", "", "two"], "meta": {"kind": ["x", "x", ""]}, "spans": np.array([[[0, 1]]] * 3)}
        split = tf.data.Dataset.from_tensor_slices(rows)
        folder = tmp_path_factory.mktemp("tfds")
        tfds.dataset_builders.store_as_tfds_dataset(
            "tiny", version="1.0.0", features=features, split_datasets={"train": split}, data_dir=folder
        )
        seqio.set_tfds_data_dir_override(str(folder))
        yield "tiny:1.0.0"
        seqio.set_tfds_data_dir_override(None)


def test_tensorflow_datasets(tfds):
    source = Source("s", [f"tfds:{tfds}:train[:100%]"], source_field="meta.kind")
    source.check()
    found = {(row["text"], row["source"], row["skipped"]) for row in read_documents(source)}
    assert found == {("one", "s/x", ""), ("", "s", "empty text"), ("two", "s", "")}
    marked = Source("s", [f"tfds:{tfds}:train"], spans_field="spans", max_documents=1)
    ((text, spans),) = ((row["text"], row["spans"]) for row in read_documents(marked) if not row["skipped"])
    assert text in ("one", "two") and spans == [[0, 1]]
    missing = Source("s", ["tfds:no_such_data:1.0.0:train"])
    assert "no_such_data" in refused("tfds-not-found", list, read_documents(missing))


def test_a_task_over_tfds_is_a_source_and_tfds_a_task(tfds):
    import seqio

    seqio.TaskRegistry.add(
        "tiny_task",
        source=seqio.TfdsDataSource(tfds, splits={"train": "train"}),
        preprocessors=[
            seqio.map_over_dataset(lambda row: {"targets": row["text"]}),
            seqio.preprocessors.tokenize,
        ],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=False)},
    )
    rows = list(read_documents(Source("s", seqio="tiny_task")))
    assert sorted(row["text"] for row in rows if not row["skipped"]) == ["one", "two"]
    assert [row["skipped"] for row in rows if row["skipped"]] == ["empty text"]
    task = to_seqio_task(Source("tiny", [f"tfds:{tfds}:train"]), ByteVocabulary())
    examples = task.get_dataset(sequence_length=None, split="train", shuffle=False).as_numpy_iterator()
    found = {example["text"].decode(): example["targets"].tolist() for example in examples}
    assert found == {text: [1, *(3 + byte for byte in text.encode()), 2] for text in ("one", "two")}


@pytest.mark.parametrize("vocabulary", ["bytes", "sentencepiece"])
def test_any_source_is_a_task_with_our_ids(vocabulary, tmp_path):
    rows = [{"text": f"Number {i}: ünïcode\n  and spaces", "url": f"http://x.org/{i}"} for i in range(300)]
    lines = [json.dumps(row) for row in rows]
    lines.insert(100, "{")
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = Source("s", [str(tmp_path / "a.jsonl")])
    vocabulary = ByteVocabulary() if vocabulary == "bytes" else train_sentencepiece([row["text"] for row in rows], 300)
    task = to_seqio_task(source, vocabulary)
    assert to_seqio_task(source, vocabulary) is task
    assert to_seqio_task(source, vocabulary, name=f"mine_{vocabulary.kind}").name == f"mine_{vocabulary.kind}"
    examples = list(task.get_dataset(sequence_length=None, split="train", shuffle=False).as_numpy_iterator())
    assert len(examples) == 300
    for example, row in zip(examples, rows, strict=True):
        expected = [vocabulary.bos_id, *vocabulary.encode(row["text"]), vocabulary.eos_id]
        assert example["targets"].tolist() == expected
        assert (example["url"].decode(), example["source"].decode()) == (row["url"], "s")
    # And back: a Task of ours is a source like any other.
    assert texts(seqio=task.name) == [row["text"] for row in rows]


def test_an_error_within_a_task_reaches_the_user_as_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 300 + "{\n" * 3)
    task = to_seqio_task(Source("s", [str(path)], bad_lines=2), ByteVocabulary())
    message = refused("seqio-task-failed", list, read_documents(Source("s", seqio=task.name)))
    assert task.name in message and f"{path}:303: not JSON" in message


PROGRAM = """
import sys
from slm_jax.data.prepare import prepare
from slm_jax.data.metadata import Metadata
from slm_jax.data.sources import Source
from slm_jax.data.vocabularies import VocabularyConfig
folder = sys.argv[1]
names = {"lines": "a.jsonl.gz", "table": "a.parquet", "text": "a.txt"}
sources = [Source(name, [f"{folder}/{file}"]) for name, file in names.items()]
prepare(f"{folder}/corpus", sources, VocabularyConfig(size=290), sequence_length=64, processes=1)
prepare(f"{folder}/url", sources[:1], VocabularyConfig(kind="bytes"), 64, processes=2, metadata=Metadata(top=1))
print(sorted({name.partition(".")[0] for name in sys.modules} & {"tensorflow", "seqio", "tensorflow_datasets", "jax"}))
"""


def test_files_are_prepared_without_tensorflow(tmp_path):
    import gzip

    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"the hens eat corn number {i}", "url": f"https://x.org/{i}"} for i in range(50)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("one text file")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert Corpus.open(tmp_path / "corpus").manifest["num_documents"] == 101

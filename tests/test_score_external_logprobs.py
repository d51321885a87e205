"""Log-probs from files: every shape gives one column; what does not align has no loss, is counted and limited."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import toy

from slm_jax.data.corpus import Corpus
from slm_jax.data.metadata import Metadata
from slm_jax.data.readers import BadRecord
from slm_jax.data.segments import positions_from_segments
from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.score.external_logprobs import answer_of
from slm_jax.score.score_corpus import score

TEXTS = [
    " ".join(np.random.default_rng(i).choice(toy.WORDS, 3 + i % 9)) + (" é漢😀" if i % 5 == 0 else "")
    for i in range(40)
]


def make(path: Path, vocabulary=None, **named) -> Corpus:
    records = [{"text": text, "url": f"https://x{i}.org/"} for i, text in enumerate(TEXTS)]
    return toy.write_documents(path, records, 32, vocabulary=vocabulary, **{"packing": "split", **named})


@pytest.fixture(scope="module")
def bytes_corpus(tmp_path_factory) -> Corpus:
    return make(tmp_path_factory.mktemp("bytes") / "corpus")


@pytest.fixture(scope="module")
def pieces_corpus(tmp_path_factory) -> Corpus:
    return make(tmp_path_factory.mktemp("pieces") / "corpus", train_sentencepiece(TEXTS, 300))


@pytest.fixture(params=["bytes", "pieces"])
def corpus(request, bytes_corpus, pieces_corpus) -> Corpus:
    """Documents cut over rows of 32 tokens."""
    return {"bytes": bytes_corpus, "pieces": pieces_corpus}[request.param]


def scored(corpus: Corpus, keep=slice(None)) -> list[tuple[str, list[int], list[float | None]]]:
    """id, ids and log-probs of every document, in an order of their own; the first token of each has none."""
    table = corpus.documents()
    found = []
    for about, read in zip(table.to_pylist(), corpus.read_documents(table), strict=True):
        ids = read["tokens"].tolist()[keep]
        logprobs = (-np.random.default_rng(about["row"] * 99 + about["start"]).random(len(ids)) * 9).tolist()
        found.append((about["id"], ids, [None, *logprobs[1:]]))
    return found[::-1]


def texts_of(corpus: Corpus, ids: list[int]) -> list[str]:
    """As engines show tokens: parts of characters in their own way, BOS and EOS by name."""
    vocabulary = corpus.vocabulary()
    names = {vocabulary.bos_id: "<s>", vocabulary.eos_id: "</s>"}
    return [names.get(token) or vocabulary.decode([token]) for token in ids]


SHAPES = {
    "plain": lambda corpus, name, ids, logprobs: {"id": name, "token_ids": ids, "logprobs": logprobs},
    "vllm": lambda corpus, name, ids, logprobs: {
        "custom_id": name,
        "prompt_token_ids": ids,
        "prompt_logprobs": [
            x if x is None else {"7777": {"logprob": -0.1}, str(i): {"logprob": x, "rank": 2, "decoded_token": "?"}}
            for i, x in zip(ids, logprobs, strict=True)
        ],
    },
    "vllm without ids, as a response": lambda corpus, name, ids, logprobs: {
        "id": "cmpl-1",
        "custom_id": name,
        "choices": [
            {"index": 0, "prompt_logprobs": [x if x is None else {i: x} for i, x in zip(ids, logprobs, strict=True)]}
        ],
    },
    "echo in a batch": lambda corpus, name, ids, logprobs: {
        "id": "batch_1",
        "custom_id": name,
        "response": {
            "status_code": 200,
            "body": {
                "choices": [
                    {
                        "logprobs": {
                            "tokens": texts_of(corpus, ids),
                            "token_logprobs": logprobs,
                            "text_offset": [0] * len(ids),
                        }
                    }
                ]
            },
        },
    },
}


def write(path: Path, records) -> str:
    content = "\n".join(map(json.dumps, records)).encode("utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def column(corpus: Corpus, name: str = "reference") -> np.ndarray:
    key = f"scores/{name}/loss"
    return Corpus.open(corpus.path).read(np.arange(corpus.num_rows), [key])[key]


def expected(corpus: Corpus, answers, begin: int = 0) -> np.ndarray:
    """The losses where they belong, from token `begin` of each document on."""
    flat = np.full(corpus.num_rows * corpus.sequence_length, np.nan, np.float32)
    places = {
        about["id"]: about["row"] * corpus.sequence_length + about["start"] for about in corpus.documents().to_pylist()
    }
    for name, _, logprobs in answers:
        values = [math.nan if x is None else -x for x in logprobs]
        flat[places[name] + begin : places[name] + begin + len(values)] = values
    rows = flat.reshape(corpus.num_rows, -1)
    segments = corpus.read(np.arange(corpus.num_rows))["segment_ids"]
    return np.where(positions_from_segments(segments) == 0, 0, rows)


def at(corpus: Corpus, **named) -> None:
    score(str(corpus.path), **named)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_column(corpus, shape, tmp_path):
    """Cut over rows: the engine has a loss for a token that begins a row, the model has none, so it is 0."""
    answers = scored(corpus)
    file = write(tmp_path / "lp.jsonl.gz", (SHAPES[shape](corpus, *answer) for answer in answers))
    at(corpus, external_logprobs=file, name=shape.split(",")[0].replace(" ", "_"))
    found = column(corpus, shape.split(",")[0].replace(" ", "_"))
    np.testing.assert_array_equal(found, expected(corpus, answers))
    about = corpus.score(shape.split(",")[0].replace(" ", "_")).reference
    assert about["files"] == ["lp.jsonl.gz"] and len(about["fingerprint"]) == 64 and about["tokens_without_loss"] == 0
    assert about["context"] == "the whole document"


@pytest.mark.parametrize("shape", SHAPES)
def test_read_from_behind_bos_the_first_token_has_no_loss(bytes_corpus, shape, tmp_path):
    """Engines that put no BOS before: one token less of each document, the others where they belong."""
    answers = scored(bytes_corpus, slice(1, None))
    file = write(tmp_path / "lp.jsonl", (SHAPES[shape](bytes_corpus, *answer) for answer in answers))
    line = toy.refused("logprobs-unaligned", at, bytes_corpus, external_logprobs=file, name="behind")
    assert file in line and "score.max_unaligned (now 0.01)" in line
    assert not (Path(bytes_corpus.path) / "scores" / "behind").exists(), "nothing is half there"
    name = f"behind_{len(shape)}"
    at(bytes_corpus, external_logprobs=file, name=name, max_unaligned=0.1)
    np.testing.assert_array_equal(column(bytes_corpus, name), expected(bytes_corpus, answers, 1))


def test_parquet_by_number_in_several_files(bytes_corpus, tmp_path):
    numbers = {name: number for number, name in enumerate(bytes_corpus.documents()["id"].to_pylist())}
    answers = scored(bytes_corpus)
    records = [{"index": numbers[name], "token_ids": ids, "logprobs": logprobs} for name, ids, logprobs in answers]
    for i in range(2):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[i::2]), tmp_path / f"{i}.parquet")
    at(bytes_corpus, external_logprobs=str(tmp_path / "*.parquet"), name="parquet")
    np.testing.assert_array_equal(column(bytes_corpus, "parquet"), expected(bytes_corpus, answers))
    maps = pyarrow.map_(pyarrow.string(), pyarrow.float64())
    told = [
        {"id": n, "prompt_logprobs": [x and [(str(i), x)] for i, x in zip(ids, lp, strict=True)]}
        for n, ids, lp in answers
    ]
    schema = pyarrow.schema([("id", pyarrow.string()), ("prompt_logprobs", pyarrow.list_(maps))])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(told, schema), tmp_path / "maps.parquet")
    at(bytes_corpus, external_logprobs=str(tmp_path / "maps.parquet"), name="maps")
    np.testing.assert_array_equal(column(bytes_corpus, "maps"), expected(bytes_corpus, answers))


def test_what_does_not_align_is_counted_named_and_left_without_loss(bytes_corpus, tmp_path, capsys):
    """One other token: losses before it stay, those after it have another context. And losses that are missing."""
    answers = scored(bytes_corpus)
    records = [SHAPES["plain"](bytes_corpus, *answer) for answer in answers]
    was = records[3]["token_ids"][5]
    records[3]["token_ids"][5] = 99
    records[4]["logprobs"], records[4]["token_ids"] = (
        records[4]["logprobs"][:-1],
        records[4]["token_ids"][:-1],
    )  # no EOS
    records[5]["logprobs"][2] = -math.inf
    records[6]["id"] = "web:1000"
    records[7] = {"custom_id": [], "error": "too long"}
    file = write(tmp_path / "lp.jsonl", records[:-1])
    line = toy.refused("logprobs-unaligned", at, bytes_corpus, external_logprobs=file, name="few")
    sizes = [len(ids) for _, ids, _ in answers]
    for part in (
        "3 documents are missing",
        f"1 documents have other tokens (first: {answers[3][0]} at token 5: 99 for {was})",
        f"1 documents end before their last token (first: {answers[4][0]} at token {sizes[4] - 1}: not 2)",
        f"2 records cannot be used (first: {file}:7: id 'web:1000' names no document of the corpus)",
    ):
        assert part in line
    at(bytes_corpus, external_logprobs=file, name="few", max_unaligned=0.9)
    found = column(bytes_corpus, "few")
    for number in (6, 7, 39):
        answers[number][2][:] = [None] * sizes[number]
    answers[3][2][5:] = [None] * (sizes[3] - 5)
    answers[4][2][-1] = answers[5][2][2] = None
    np.testing.assert_array_equal(found, expected(bytes_corpus, answers))
    read = bytes_corpus.read(np.arange(bytes_corpus.num_rows))
    counts = read["loss_mask"] & (positions_from_segments(read["segment_ids"]) > 0)
    said = f"score: {np.isnan(found[counts]).sum():,} of {counts.sum():,} tokens have no loss"
    assert said in capsys.readouterr().out
    share = bytes_corpus.score("few").reference["tokens_without_loss"]
    assert share == np.isnan(found[counts]).sum() / counts.sum() > 0.05


@pytest.mark.parametrize("shown, stands", [("</s>", True), ("<|endoftext|>", True), ("", True), (" generated", False)])
def test_what_was_generated_is_no_end_of_a_document(shown, stands, bytes_corpus, tmp_path):
    """An API that echoes a prompt gives one token more than it has."""
    name, ids, logprobs = scored(bytes_corpus)[0]
    assert ids[-1] == bytes_corpus.vocabulary().eos_id
    text = [*texts_of(bytes_corpus, ids)[:-1], shown]
    path = write(tmp_path / "file.jsonl", [{"id": name, "tokens": text, "token_logprobs": logprobs}])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        score(bytes_corpus.path, name=f"shown{len(shown)}", external_logprobs=path, max_unaligned=1.0)
    tokens = bytes_corpus.read(np.arange(bytes_corpus.num_rows))["tokens"]
    known = column(bytes_corpus, f"shown{len(shown)}") > 0
    assert known.sum() > 40 and known[tokens == ids[-1]].sum() == stands


def test_again_is_the_same_column_and_another_file_is_not(bytes_corpus, tmp_path, capsys):
    answers = scored(bytes_corpus)
    records = [SHAPES["plain"](bytes_corpus, *answer) for answer in answers]
    file = write(tmp_path / "lp.jsonl", records)
    at(bytes_corpus, external_logprobs=file, name="twice")
    at(bytes_corpus, external_logprobs=file, name="twice")
    assert "is complete already" in capsys.readouterr().out
    other = write(tmp_path / "other.jsonl", records[::-1])
    assert "reference" in toy.refused("score-other-settings", at, bytes_corpus, external_logprobs=other, name="twice")
    doubled = write(tmp_path / "doubled.jsonl", [*records, records[0]])
    line = toy.refused("logprobs-twice", at, bytes_corpus, external_logprobs=doubled, name="doubled")
    assert f"{doubled}:41" in line and repr(answers[0][0]) in line


def test_scored_without_the_prefix(tmp_path):
    corpus = make(tmp_path / "corpus", metadata=Metadata())
    vocabulary, table = corpus.vocabulary(), corpus.documents()
    records, begins = [], {}
    for about, read in zip(table.to_pylist(), corpus.read_documents(table, ("tokens", "loss_mask")), strict=True):
        ids = [vocabulary.bos_id, *read["tokens"][read["loss_mask"]].tolist()]
        begins[about["id"]] = len(read["tokens"]) - len(ids) + 1
        records.append({"id": about["id"], "token_ids": ids, "logprobs": [None, *[-1.5] * (len(ids) - 1)]})
    file = write(tmp_path / "lp.jsonl", records)
    assert "documents have other tokens" in toy.refused("logprobs-unaligned", at, corpus, external_logprobs=file)
    at(corpus, external_logprobs=file, strip_metadata=True)
    read = corpus.read(np.arange(corpus.num_rows))
    found, counts = column(corpus), read["loss_mask"] & (positions_from_segments(read["segment_ids"]) > 0)
    assert (found[counts] == 1.5).all() and corpus.score("reference").reference["prefix"] == "removed"
    assert min(begins.values()) > 10


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"text": "x"}, "(its fields: text)"),
        ({"logprobs": [None, -1.0]}, "log-probs without token ids"),
        ({"token_ids": [1], "logprobs": [None, -1.0]}, "1 tokens, but 2 log-probs"),
        ({"token_ids": [1, 2], "logprobs": [None, 2.3]}, "2.3 is not a log-prob"),
        ({"token_ids": [1, 2], "logprobs": [None, "-1"]}, "'-1' is not a log-prob"),
        ({"prompt_logprobs": [None, [1, 2]]}, "not of the form {id: {'logprob': x}}"),
        ({"prompt_logprobs": [None, {"5": {"rank": 1}}]}, "not of the form {id: {'logprob': x}}"),
        ({"prompt_logprobs": [None, {"5": {"logprob": None}}, {"6": {"logprob": "x"}}]}, "'x' is not a log-prob"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "log-probs without token ids"),
        ({"response": {"body": {"error": "x"}}}, "(its fields: error)"),
        ({"tokens": ["a", None], "token_logprobs": [None, -1.0]}, "tokens that are not text"),
        ({"logprobs": "[" * 100_000}, "no log-probs"),
        ({"response": "[1, 2]"}, "no log-probs"),
        ({"response": [1], "body": 3, "choices": "x"}, "no log-probs"),
        ({"choices": []}, "(its fields: choices)"),
    ],
)
def test_a_record_that_says_nothing(fields, reason):
    with pytest.raises(BadRecord) as error:
        answer_of(fields)
    assert reason in str(error.value)


def test_what_it_says_no_to(bytes_corpus, tmp_path):
    empty = write(tmp_path / "none.jsonl", [{"id": "nobody", "token_ids": [], "logprobs": []}])
    assert "no such file: nowhere.jsonl" in toy.refusal(at, bytes_corpus, external_logprobs="nowhere.jsonl")
    line = toy.refused("logprobs-unaligned", at, bytes_corpus, external_logprobs=empty)
    assert "1 records cannot be used" in line and "40 documents are missing" in line
    both = {"external_logprobs": empty, "statistics": ("loss", "entropy")}
    assert "external_logprobs" in toy.refused("score-statistics", at, bytes_corpus, **both)
    assert "'run'" in toy.refused("score-source", at, bytes_corpus, reference="run", external_logprobs=empty)
    toy.refused("score-no-metadata", at, bytes_corpus, external_logprobs=empty, strip_metadata=True)
    assert not (Path(bytes_corpus.path) / "scores" / "reference").exists()

"""Multiple choice and samples in the training loop, and what likelihoods say, worked by hand."""

import functools
import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.evaluate.evaluate import evaluate
from slm_jax.evaluate.generation import Sampling
from slm_jax.evaluate.likelihood import Likelihood, Likelihoods, Pair, encode_pair, head_ids, widths
from slm_jax.evaluate.multiple_choice import Estimate, MultipleChoice, Scored, estimate, measures, read_questions
from slm_jax.evaluate.samples import Samples
from slm_jax.mesh import MeshConfig
from slm_jax.models import forward
from slm_jax.models.trained_model import TrainedModel, load_model
from slm_jax.run_directory import RunDirectory

QUESTIONS = [
    {"question": "Who swims?", "choices": ["hens", "ducks", "pigs that eat"], "answer": "ducks"},
    {"question": "Who eats?", "choices": ["pigs", "corn"], "answer": "A"},
    {"question": "How many?", "choices": ["12", "corn", "the farm"], "answer": 2},
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture(scope="module")
def model(reference) -> TrainedModel:
    with toy.one_device():
        return load_model(str(reference), mesh_lib.make_mesh())


@functools.partial(jax.jit, static_argnums=1)
def log_p_of_all(params, config, tokens, length):
    """[V] at each place of one row, of which `length` tokens are read."""
    places = jnp.arange(tokens.shape[1])[None]
    hidden = forward.hidden_states(params, config, tokens, places, (places < length).astype(jnp.int32))
    return jax.nn.log_softmax(forward.logits(params, config, hidden))[0]


def log_p(model: TrainedModel, ids: Sequence[int]) -> np.ndarray:
    """Of the token after each of the ids, from all logits."""
    row = np.pad(ids, (0, model.config.max_length - len(ids)))[None]
    return np.asarray(log_p_of_all(model.params, model.config, row, len(ids)), np.float64)[: len(ids)]


def by_hand(model: TrainedModel, pair: Pair) -> Likelihood:
    """One text alone in its row."""
    ids = [*pair.context, *pair.continuation][-model.config.max_length - 1 :]
    after, targets = log_p(model, ids[:-1])[-len(pair.continuation) :], np.array(pair.continuation)
    greedy = bool((after.argmax(axis=1) == targets).all())
    dropped = len(pair.context) + len(pair.continuation) - len(ids)
    return Likelihood(float(after[np.arange(len(targets)), targets].sum()), greedy, dropped)


@pytest.mark.parametrize("axes", [None, MeshConfig(data=2, fsdp=2, model=2)], ids=["one device", "eight devices"])
def test_likelihoods_are_those_of_each_text_alone(model, reference, axes):
    """Of texts longer than what the model reads too, and of continuations that greedy decoding gives."""
    rng = np.random.default_rng(0)
    lengths = ((1, 1), (5, 9), (40, 25), (70, 2), (1, 64))
    pairs = [Pair(*(rng.integers(3, 259, number).tolist() for number in each)) for each in lengths]
    for context in ([1], [1, 100, 101]):
        greedy: list[int] = []
        while len(greedy) < 3:
            greedy.append(int(log_p(model, [*context, *greedy])[-1].argmax()))
        pairs.append(Pair(context, greedy))
    mesh = mesh_lib.make_mesh(axes, jax.devices() if axes else jax.devices()[:1])
    there = load_model(str(reference), mesh) if axes else model
    found: dict[int, Likelihood] = {}
    with jax.set_mesh(mesh):
        for batch in Likelihoods(model.config, mesh, batch_tokens=256)(there.params, pairs):
            assert not set(batch) & set(found)
            found |= batch
    expected = [by_hand(model, pair) for pair in pairs]
    assert [found[i][1:] for i in range(len(pairs))] == [each[1:] for each in expected]
    assert [each.greedy for each in expected][-2:] == [True, True] and expected[3].dropped == 7
    totals = [found[i].total for i in range(len(pairs))]
    np.testing.assert_allclose(totals, [each.total for each in expected], rtol=1e-5)


def test_a_continuation_longer_than_what_the_model_reads_is_refused(model):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    measure, pair = Likelihoods(model.config, mesh, 256), Pair([1], [5] * 65)
    line = toy.refused("continuation-too-long", lambda: list(measure(model.params, [pair])))
    assert "65 tokens" in line and "reads 64" in line


def test_few_widths():
    assert widths(64) == [64] and widths(128) == [128] and widths(200) == [128, 200]
    assert widths(2048) == [128, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(width % 128 == 0 for width in widths(8192))


def test_context_and_continuation_are_cut_as_lm_eval_cuts_them():
    """Together tokenized, the blank goes to the continuation, not to the head."""
    vocabulary = train_sentencepiece(["the hens eat corn and the pigs eat corn. "] * 30, 300)
    head = head_ids(vocabulary, "URL: a.org\n\n")
    assert head == [vocabulary.bos_id, *vocabulary.encode("URL: a.org\n\n")]
    pair = encode_pair(vocabulary, head, "the hens eat ", "corn")
    assert pair.context == [*head, *vocabulary.encode("the hens eat")]
    assert pair.continuation == vocabulary.encode("the hens eat corn")[len(vocabulary.encode("the hens eat")) :]
    assert vocabulary.decode(pair.continuation) == " corn"
    assert encode_pair(vocabulary, head, "", "corn") == (head, vocabulary.encode("corn"))


def test_what_likelihoods_say_by_hand():
    """log p of each choice, its characters, the right one: raw the first question is right, per character none is."""
    found = measures([Scored([-2.0, -3.0], [2, 6], 0), Scored([-1.0, -4.0, -2.0], [1, 2, 1], 2)])
    assert found["accuracy"] == Estimate(0.5, 0.5)
    assert found["accuracy_per_character"] == Estimate(0.0, 0.0)  # -1 against -0.5; -2 against -1 and -2
    assert found["margin"].mean == (1.0 - 1.0) / 2 and found["margin"].stderr == pytest.approx(1.0)
    assert found["margin_per_character"].mean == (-0.5 - 1.0) / 2
    assert found["gold_loss"].mean == 2.0 and found["gold_loss_per_character"].mean == 1.5
    assert estimate([1.0, 2.0, 3.0, 6.0]) == Estimate(3.0, pytest.approx(math.sqrt(14 / 3 / 4)))
    assert estimate([2.0]) == Estimate(2.0, None)


def test_questions_are_read_with_their_answers(questions, tmp_path):
    assert [question.gold for question in read_questions(str(questions), None, "here")] == [1, 0, 2]
    assert [question.text for question in read_questions(str(questions), 2, "here")] == ["Who swims?", "Who eats?"]
    packed = tmp_path / "questions.jsonl.gz"
    packed.write_bytes(gzip.compress(questions.read_bytes()))
    assert read_questions(str(packed), None, "here") == read_questions(str(questions), None, "here")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "choices": ["a", "b"], "answer": "c"},
        {"question": "q", "choices": ["a", "b"], "answer": 2},
        {"question": "q", "choices": ["a"], "answer": 0},
        {"question": "q", "choices": "ab", "answer": "a"},
        {"question": 3, "choices": ["a", "b"], "answer": "a"},
        {"choices": ["a", "b"], "answer": "a"},
    ],
)
def test_what_is_no_question_is_named(row, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(row) + "\n")
    line = toy.refused("record-invalid", read_questions, str(path), None, "MultipleChoice mine")
    assert line.startswith("MultipleChoice mine: ") and "bad.jsonl:2" in line


def test_mistakes(questions, corpus, tmp_path):
    def message(**fields) -> str:
        settings = {"name": "mine", "questions": str(questions), "vocabulary": str(corpus.path), **fields}
        mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
        return toy.refusal(lambda: MultipleChoice(**settings).bind(toy.MODEL, ByteVocabulary().content_hash, mesh))

    assert "no such file: nowhere.jsonl" in message(questions="nowhere.jsonl")
    assert "MultipleChoice.limit is 0" in message(limit=0)
    train_sentencepiece(["the hens eat corn. "] * 30, 290).save(tmp_path / "other")
    assert "the model was trained with" in message(vocabulary=str(tmp_path / "other"))
    (tmp_path / "none.jsonl").write_text("\n")
    none = str(tmp_path / "none.jsonl")
    assert none in toy.refused("no-records", read_questions, none, None, "MultipleChoice mine")
    assert "prompts" in toy.refused("setting-empty", Samples, "s", "v", prompts=())


def test_in_the_loop_they_change_nothing_and_are_what_the_stage_measures(corpus, questions, tmp_path):
    choice = MultipleChoice("mc", str(questions), str(corpus.path))
    samples = Samples("text", str(corpus.path), ["the", "", "pigs"], "URL: a.org\n\n", Sampling(12), batch_size=4)
    evaluators = [choice, samples]
    toy.train_here(tmp_path / "with", [toy.phase(corpus, steps=4)], evaluators=evaluators, evaluate_every=2)
    toy.train_here(tmp_path / "without", [toy.phase(corpus, steps=4)])
    assert toy.losses(tmp_path / "with") == toy.losses(tmp_path / "without")

    rows = [row for row in RunDirectory(tmp_path / "with").metrics() if "mc/accuracy" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    names = {f"mc/{name}{suffix}" for name in ("accuracy", "margin", "gold_loss") for suffix in ("", "_per_character")}
    names |= {"text/longest_loop", *(f"text/distinct_{n}" for n in (1, 2, 3, 4))}
    assert all(set(row) == {"step", *names} for row in rows)
    assert len({row["mc/gold_loss"] for row in rows}) == 3
    texts = {int(path.stem): path.read_text() for path in (tmp_path / "with" / "samples" / "text").glob("*.jsonl")}
    assert sorted(texts) == [0, 2, 4]
    with toy.one_device():
        record = evaluate(str(tmp_path / "with"), evaluators, output=str(tmp_path / "out.json"))
    assert {name: rows[-1][name] for name in names} == record["results"]
    assert (tmp_path / "out.text.texts.jsonl").read_text() == texts[4]
    lines = [json.loads(line) for line in texts[4].splitlines()]
    assert [line["prompt"] for line in lines] == ["the", "", "pigs"] and all(0 < line["tokens"] <= 12 for line in lines)
    assert record["measured"]["mc"]["first_ids"] == [1, *ByteVocabulary().encode("Questio")]
    assert record["measured"]["text"]["first_ids"] == [1, *ByteVocabulary().encode("URL: a.")]

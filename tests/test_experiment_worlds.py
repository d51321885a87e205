"""The generated corpora: right sums, exact noise spans, the same bytes for the same seed."""

import itertools
import json
import operator
import random
import re
from pathlib import Path

import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.data.corpus import Corpus
from slm_jax.experiment.worlds.filter_documents import experiment_filter
from slm_jax.experiment.worlds.general import general_text
from slm_jax.experiment.worlds.label import experiment_label
from slm_jax.experiment.worlds.plant import BOILERPLATE, KINDS, Planter, noise_in
from slm_jax.experiment.worlds.stories import clean_story
from slm_jax.experiment.worlds.write_world import experiment_world, question

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "x": operator.mul}


def without(text: str, spans: list[tuple[int, int]]) -> str:
    for start, end in reversed(spans):
        text = text[:start] + text[end:]
    return text


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_arithmetic_is_right_and_told():
    rng = random.Random(5)
    for _ in range(400):
        story = clean_story(rng)
        assert story.steps
        numbers = {int(n) for n in re.findall(r"\d+", story.text)}
        for step in story.steps:
            assert OPERATORS[step.operator](step.left, step.right) == step.result >= 0, story
            assert step.result in numbers, story
        for left, sign, right, result in re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)", story.text):
            assert OPERATORS[sign](int(left), int(right)) == int(result), story
        assert 2 <= len(re.findall(r"[.?](?= |$)", story.text)) <= 15, story
        assert not set("{}|") & set(story.text), story


def test_stories_vary():
    rng = random.Random(0)
    assert len({clean_story(rng).text for _ in range(1000)}) > 990


@given(
    text=st.text(alphabet="ab 7.=?\n\u00e9\U0001f600"),
    seed=st.integers(0, 999),
    share=st.floats(0, 0.9),
    kinds=st.lists(st.sampled_from(KINDS[:3]), min_size=1, max_size=3, unique=True),
)
def test_spans_cover_exactly_what_was_added(text: str, seed: int, share: float, kinds: list[str]):
    planted, spans = Planter(random.Random(seed), kinds, share).plant(text)
    assert without(planted, spans) == text
    assert all(start < end and planted[start] == " " for start, end in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
def test_the_share_holds_over_all_documents(kind: str, share: float):
    rng = random.Random(1)
    texts = [clean_story(rng).text for _ in range(200)]
    planter = Planter(random.Random(2), [kind], share)
    planted = [planter.plant(text) for text in texts]
    added = sum(end - start for _, spans in planted for start, end in spans)
    assert added / sum(len(text) for text, _ in planted) == pytest.approx(share, abs=0.003)
    if share:
        places = [(text[start:end].strip(), text[:start]) for text, spans in planted for start, end in spans]
        if kind == "boilerplate":
            assert {piece for piece, _ in places} <= set(BOILERPLATE) and len(set(BOILERPLATE)) == 200
        if kind == "noise":
            assert all(noise_in(piece) == [(0, len(piece))] for piece, _ in places)
    assert not any(noise_in(text) for text in texts)


def test_a_wrong_result_is_marked_and_only_it():
    rng = random.Random(3)
    planter = Planter(random.Random(4), ["wrong"], 0.5)
    right = wrong = 0
    for _ in range(200):
        story = clean_story(rng)
        stated = {story.text[start:end] for start, end in story.results}
        assert stated and stated <= {str(step.result) for step in story.steps}
        altered, spans = planter.plant(story.text, story.results)
        marked = {span[0] for span in spans}
        for found in re.finditer(r"(\d+) ([-+x/]) (\d+) = (\d+)", altered):
            is_right = OPERATORS[found[2]](int(found[1]), int(found[3])) == int(found[4])
            assert is_right != (found.start(4) in marked)
        right, wrong = right + len(story.results) - len(spans), wrong + len(spans)
        assert all(altered[start:end].isdigit() for start, end in spans)
    assert 0.4 < wrong / (right + wrong) < 0.6


def test_general_text_is_filled_and_has_styles():
    rng = random.Random(4)
    texts = [general_text(rng) for _ in range(300)]
    assert len({style for style, _ in texts}) >= 5
    assert all(text and not set("{}") & set(text) for _, text in texts)


WORLD_FILES = ("clean", "clean_general", "crawl", "general", "questions", "target")


def world(folder: Path, **settings) -> dict[str, list[dict]]:
    experiment_world(str(folder), **{"documents": 60, "held_out": 20, **settings})
    return {name: read(folder / f"{name}.jsonl") for name in WORLD_FILES}


def test_a_world_differs_in_what_is_planted_alone(tmp_path: Path):
    clean, again = world(tmp_path / "a"), world(tmp_path / "b")
    noisy = world(tmp_path / "c", kinds=["noise", "boilerplate"], share=0.4)
    assert clean == again and clean != world(tmp_path / "d", seed=1)
    assert {name: len(lines) for name, lines in clean.items() if name != "questions"} == {
        "clean": 30,
        "clean_general": 30,
        "crawl": 60,
        "general": 20,
        "target": 20,
    }
    assert all(clean[name] == noisy[name] for name in WORLD_FILES if name != "crawl")
    assert [without(line["text"], line["noise"]) for line in noisy["crawl"]] == [
        line["text"] for line in clean["crawl"]
    ]
    assert not any(line["noise"] for line in clean["crawl"]) and all(line["noise"] for line in noisy["crawl"][5:])
    targets = [
        line["text"] for name in ("clean", "crawl", "target") for line in clean[name] if line["source"] != "general"
    ]
    assert len(set(targets)) == len(targets)
    toy.refused("setting-unknown-value", world, tmp_path / "e", target="novels")
    toy.refused("setting-unknown-value", world, tmp_path / "e", kinds=["rot"], share=0.1)
    toy.refused("setting-out-of-range", world, tmp_path / "e", kinds=["noise"], share=1.0)
    toy.refused("world-wrong-mixed", world, tmp_path / "e", kinds=["noise", "wrong"], share=0.1)


def test_questions_end_before_the_last_result():
    assert question("Now 12 + 5 = 17 hens. Then 17 - 3 = 14.") == {
        "prompt": "Now 12 + 5 = 17 hens. Then 17 - 3 =",
        "answer": "14",
    }
    assert question("It takes 3 x 4 = 12 hours.\n#### 12") == {
        "prompt": "It takes 3 x 4 = 12 hours.\n####",
        "answer": "12",
    }
    assert question("No sums here, 12 hens.") is None


def test_tasks_of_reasoning_gym_are_a_target(tmp_path: Path):
    pytest.importorskip("reasoning_gym")
    found = world(tmp_path / "a", target="gsm", kinds=["wrong"], share=0.5, general_share=0.0)
    assert found == world(tmp_path / "b", target="gsm", kinds=["wrong"], share=0.5, general_share=0.0)
    texts = [line["text"] for line in found["target"]]
    assert len(found["questions"]) >= 15 and not any("Give the result" in text for text in texts)
    for asked in found["questions"]:
        (text,) = [text for text in texts if text.startswith(asked["prompt"])]
        assert text[len(asked["prompt"]) :].lstrip().startswith(asked["answer"])


def test_labels_are_a_column_that_an_oracle_selects_by(tmp_path: Path):
    corpus = toy.write_corpus(tmp_path / "corpus", sources=("a", "a/noise", "b"))
    experiment_label(corpus.path, "planted")
    experiment_label(corpus.path, "planted")  # complete already
    read_back = Corpus.open(corpus.path).read(np.arange(corpus.num_rows), ["source_ids", "scores/planted/loss"])
    assert np.array_equal(read_back["scores/planted/loss"] == 1, read_back["source_ids"] == 1)
    assert set(np.unique(read_back["scores/planted/loss"])) == {0.0, 1.0}
    experiment_label(corpus.path, "more", sources=["b"])
    more = Corpus.open(corpus.path).read(np.arange(corpus.num_rows), ["source_ids", "scores/more/loss"])
    assert np.array_equal(more["scores/more/loss"] == 0, more["source_ids"] == 0)
    assert "'c'" in toy.refused("label-unknown-source", experiment_label, corpus.path, "less", sources=["c"])


def test_a_filter_keeps_the_documents_with_the_lowest_loss(tmp_path: Path):
    texts = [f"{word} hens eat corn" for word in ("one", "two", "six", "ten")]
    records = [{"text": text, "url": f"u{i}"} for i, text in enumerate(texts)]
    corpus = toy.write_documents(tmp_path / "corpus", records, 32, packing="split")
    losses = np.zeros((corpus.num_rows, corpus.sequence_length), np.float32)
    table = corpus.documents().to_pylist()
    order = []
    for number, about in enumerate(table):
        places = about["row"] * corpus.sequence_length + about["start"] + np.arange(about["length"])
        losses.reshape(-1)[places[places < losses.size]] = (3, 1, 2, 0)[number]
        order.append(about["url"])
    toy.write_score(corpus, "reference", losses)
    experiment_filter(corpus.path, "reference", str(tmp_path / "kept"), keep=0.5)
    kept = read(tmp_path / "kept" / "documents.jsonl")
    assert [line["url"] for line in kept] == [order[1], order[3]]
    assert [line["text"] for line in kept] == [texts[int(line["url"][1:])] for line in kept]
    toy.refused("setting-out-of-range", experiment_filter, corpus.path, "reference", "x", keep=0.0)

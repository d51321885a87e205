"""The generated corpora: right sums, exact noise spans, the same bytes for the same seed."""

import itertools
import json
import operator
import random
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from slm_jax.demo.corpora import general_document, noisy_document, write_demo_corpora
from slm_jax.demo.noise import inject_noise
from slm_jax.demo.stories import clean_story

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
    assert len({clean_story(rng).text for _ in range(2000)}) > 1980


@given(text=st.text(alphabet="ab 7.\n\u00e9\U0001f600"), seed=st.integers(0, 999), rate=st.floats(0, 1))
def test_noise_spans_cover_exactly_what_was_injected(text: str, seed: int, rate: float):
    noisy, spans = inject_noise(text, random.Random(seed), rate)
    assert without(noisy, spans) == text
    assert all(start < end for start, end in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert len(spans) <= text.count(" ")
    if rate == 1.0:
        assert len(spans) == text.count(" ")


def test_noisy_document_is_its_story_plus_noise():
    rng = random.Random(3)
    shares = []
    for _ in range(200):
        story = clean_story(rng)
        document = noisy_document(rng, story)
        assert without(document.text, document.noise) == story.text
        shares.append(1 - len(story.text) / len(document.text))
    assert 0.1 < sum(shares) / len(shares) < 0.2  # of the characters; noise takes more tokens per character


def test_general_documents_are_filled_and_not_stories():
    rng = random.Random(4)
    documents = [general_document(rng) for _ in range(300)]
    assert len({d.url.split("/")[2] for d in documents}) >= 5
    for document in documents:
        assert document.text and not set("{}") & set(document.text) and document.noise == []


def test_corpora(tmp_path: Path):
    paths = write_demo_corpora(tmp_path / "a", seed=1, size=400)
    corpora = {name: read(path) for name, path in paths.items()}
    assert {name: len(lines) for name, lines in corpora.items()} == {
        "clean_train": 200,
        "noisy_train": 400,
        "target_test": 40,
        "general_test": 40,
    }
    assert all(list(line) == ["text", "url", "source", "noise"] for lines in corpora.values() for line in lines)
    assert all(re.match(r"https://[a-z-]+\.example/", line["url"]) for lines in corpora.values() for line in lines)

    stories = [without(line["text"], line["noise"]) for line in corpora["noisy_train"] if line["source"] != "general"]
    assert 120 < len(stories) < 280
    trained = stories + [line["text"] for line in corpora["clean_train"]]
    tested = [line["text"] for line in corpora["target_test"]]
    assert len(set(trained + tested)) == len(trained + tested)


def test_corpora_depend_on_the_seed_alone(tmp_path: Path):
    first = write_demo_corpora(tmp_path / "a", seed=1, size=50)
    again = write_demo_corpora(tmp_path / "b", seed=1, size=50)
    other = write_demo_corpora(tmp_path / "c", seed=2, size=50)
    for name in first:
        assert first[name].read_bytes() == again[name].read_bytes()
        assert first[name].read_bytes() != other[name].read_bytes()

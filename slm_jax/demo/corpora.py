"""The generated corpora of the demo: clean stories, a crawl that holds noisy ones, and held-out text of two kinds."""

import json
import random
from pathlib import Path
from typing import NamedTuple

from slm_jax.experiment.worlds.draw import number, pick
from slm_jax.experiment.worlds.general import general_text
from slm_jax.experiment.worlds.noise import inject_noise
from slm_jax.experiment.worlds.stories import Story, clean_story

NOISE_RATE = 0.045  # of the blanks of a story
GENERAL_SHARE = 0.38  # of the documents of the noisy corpus


class Document(NamedTuple):
    """One line of a JSONL file; `noise` are [start, end) character spans of `text`."""

    text: str
    url: str
    source: str
    noise: list[tuple[int, int]]


def _url(rng: random.Random, host: str, topic: str) -> str:
    return f"https://{host}.example/{number(rng, 2009, 2023)}/{topic.replace(' ', '-')}-{number(rng, 100, 9999)}"


def clean_document(rng: random.Random, story: Story) -> Document:
    return Document(story.text, _url(rng, "arithmetic-stories", story.place), "clean_stories", [])


def noisy_document(rng: random.Random, story: Story) -> Document:
    text, spans = inject_noise(story.text, rng, NOISE_RATE)
    host = pick(rng, ("story-forum", "farm-stories", "homework-board", "daily-sums"))
    return Document(text, _url(rng, host, story.place), "noisy_stories", spans)


def general_document(rng: random.Random) -> Document:
    style, text = general_text(rng)
    return Document(text, _url(rng, f"{style}-pages", style), "general", [])


def write_demo_corpora(directory: Path, seed: int, size: int) -> dict[str, Path]:
    """Writes the four JSONL files and returns their paths by name; `size` counts the documents of the noisy corpus.

    clean_train:  size / 2 clean stories, for the reference
    noisy_train:  size documents, noisy stories and general text (38 %) in random order; of the tokens (SentencePiece,
      512 to 2048 pieces) 50 to 55 % are clean text, 15 to 17 % injected noise and 30 to 33 % general text
    target_test:  size / 10 clean stories
    general_test: size / 10 general texts
    No story occurs twice, in one file or in two. The same seed and size give the same bytes.
    """
    rng = random.Random(f"slm_jax demo {seed}")
    told: set[str] = set()

    def new_story() -> Story:
        story = clean_story(rng)
        while story.text in told:
            story = clean_story(rng)
        told.add(story.text)
        return story

    def crawled() -> Document:
        return general_document(rng) if rng.random() < GENERAL_SHARE else noisy_document(rng, new_story())

    tests = max(1, size // 10)
    corpora = {
        "clean_train": [clean_document(rng, new_story()) for _ in range(size // 2)],
        "noisy_train": [crawled() for _ in range(size)],
        "target_test": [clean_document(rng, new_story()) for _ in range(tests)],
        "general_test": [general_document(rng) for _ in range(tests)],
    }
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.jsonl" for name in corpora}
    for name, documents in corpora.items():
        with paths[name].open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in documents)
    return paths

"""Stage `experiment world`: text whose every character is known to be worth learning or not.

A world has a target (short arithmetic texts), general text of other styles, and a crawl that holds both with planted
text in them. It is the same for the same settings on every machine.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from slm_jax.config import print_unused
from slm_jax.configurable import AtLeast, Below, Count, Natural, OneOf, Seed, Share, configurable
from slm_jax.errors import UserError
from slm_jax.experiment.worlds.draw import number
from slm_jax.experiment.worlds.general import general_text
from slm_jax.experiment.worlds.plant import KINDS, RESULT, Planter, Span
from slm_jax.experiment.worlds.stories import clean_story
from slm_jax.files import write_json_lines

TASKS = 1000  # of reasoning-gym at a time


class Document(NamedTuple):
    """A line of a JSONL file. noise: [start, end) characters of `text` that were planted."""

    text: str
    url: str
    source: str
    noise: list[Span]


class Target(NamedTuple):
    """A target text. results: [start, end) characters of the calculations' results that it states."""

    text: str
    results: list[Span]


@configurable
def experiment_world(
    output: str,
    target: Annotated[str, OneOf(("stories", "gsm"))] = "stories",
    documents: Count = 4000,
    held_out: Natural = 400,
    general_share: Share = 0.38,
    kinds: Sequence[Annotated[str, OneOf(KINDS)]] = (),
    share: Annotated[float, AtLeast(0), Below(1)] = 0.0,
    seed: Seed = 0,
) -> None:
    """Writes the text of a world into a folder.

    clean.jsonl         half as many target documents as the crawl has documents
    clean_general.jsonl the same number of general documents
    target.jsonl        held-out target documents
    general.jsonl       held-out general documents
    questions.jsonl     prompt and answer: held-out target documents up to their last calculation's result
    crawl.jsonl         target and general documents with planted text; `noise` has its characters

    No target document occurs twice. All files but the crawl, and the crawl's text without what is planted, are the same
    whatever is planted.

    Args:
      output: folder.
      target: 'stories', generated here, or 'gsm': the GSM-symbolic tasks of the package reasoning-gym, with their
        solutions.
      documents: in the crawl.
      held_out: documents in each held-out file.
      general_share: share of the crawl's documents that are general text.
      kinds: what is planted, of `noise`, `boilerplate`, `foreign` and `wrong`.
      share: of the crawl's characters that are planted (of `wrong`: of its results).
      seed: of everything.
    """
    print_unused()
    folder = Path(output)
    new_target = _distinct(_targets(target, seed))
    planter = Planter(random.Random(f"planted {seed}"), kinds, share)
    rng, other_rng = random.Random(f"general {seed}"), random.Random(f"crawl {seed}")

    def target_document(planter: Planter | None = None) -> Document:
        text, spans = next(new_target)
        text, spans = planter.plant(text, spans) if planter else (text, [])
        return Document(text, _url(other_rng, target), target, spans)

    def general_document(planter: Planter | None = None) -> Document:
        style, text = general_text(rng)
        text, spans = planter.plant(text) if planter else (text, [])
        return Document(text, _url(rng, f"{style}-pages"), "general", spans)

    def crawled() -> Document:
        return (general_document if other_rng.random() < general_share else target_document)(planter)

    files = {
        "target": [target_document() for _ in range(held_out)],
        "general": [general_document() for _ in range(held_out)],
        "clean": [target_document() for _ in range(documents // 2)],
        "clean_general": [general_document() for _ in range(documents // 2)],
        "crawl": [crawled() for _ in range(documents)],
    }
    for name, lines in files.items():
        write_json_lines(folder / f"{name}.jsonl", (line._asdict() for line in lines))
    write_json_lines(folder / "questions.jsonl", filter(None, (question(line.text) for line in files["target"])))
    what = f"{share:.0%} {', '.join(kinds)} planted" if kinds else "nothing planted"
    print(f"experiment world: {documents:,} documents in {folder}/crawl.jsonl, {what}")


def question(text: str) -> dict[str, str] | None:
    """A text up to its last calculation's result, and the result; None where it spells out none."""
    found = list(RESULT.finditer(text))
    return {"prompt": text[: found[-1].start(1)].rstrip(), "answer": found[-1][1]} if found else None


def _targets(target: str, seed: int) -> Iterator[Target]:
    rng = random.Random(f"target {seed}")
    if target == "stories":
        while True:
            story = clean_story(rng)
            yield Target(story.text, story.results)
    try:
        from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import GSMSymbolicDataset, GSMSymbolicDatasetConfig
    except ImportError as error:
        raise UserError(
            "world-package-missing",
            "experiment_world.target 'gsm' needs the package reasoning-gym: install slm_jax[experiments]",
        ) from error
    while True:  # a block at a time: a dataset draws the templates of all its tasks when it is made
        for task in GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=number(rng, 0, 2**31), size=TASKS)):
            asked = task["question"].split(" Give the result")[0]
            text = f"{asked}\n{task['metadata']['answer_cot']}"
            yield Target(text, [found.span(1) for found in RESULT.finditer(text)])


def _distinct(targets: Iterator[Target]) -> Iterator[Target]:
    seen: set[str] = set()
    for target in targets:
        if target.text not in seen:
            seen.add(target.text)
            yield target


def _url(rng: random.Random, host: str) -> str:
    return f"https://{host}.example/{number(rng, 2009, 2023)}/{number(rng, 100, 99999)}"

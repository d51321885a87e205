"""The table of answer pairs: each is judged as it should be, both ways round, and every percent question is one."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slm_jax.evaluate.math.answers import asks_percent, extract
from slm_jax.evaluate.math.equality import Grader

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "data" / "answer_pairs.jsonl").open(encoding="utf-8")]
KINDS = sorted({pair["kind"] for pair in PAIRS})


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    grader = Grader()
    yield grader
    grader.close()


def judged(grader: Grader, pair: dict[str, Any]) -> bool:
    answer = extract(pair["answer"]) if pair["kind"] == "extraction" else pair["answer"]
    percent = None if pair["question"] is None else asks_percent(pair["question"])
    return grader.grade(answer, pair["gold"], percent).correct


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_judged_as_it_should_be(grader, kind):
    wrong = [pair for pair in PAIRS if pair["kind"] == kind and judged(grader, pair) is not pair["equal"]]
    assert not wrong
    assert grader.symbolic.lost == 0


def test_the_table_is_large_enough_and_names_no_pair_twice():
    assert len(PAIRS) >= 600 and len(KINDS) >= 20
    assert len({(pair["answer"], pair["gold"], pair["question"]) for pair in PAIRS}) == len(PAIRS)
    assert all({pair["equal"] for pair in PAIRS if pair["kind"] == kind} == {True, False} for kind in KINDS)


def test_equality_is_symmetric(grader):
    """But for a comma, which means in an answer what it means in the gold answer."""
    for pair in PAIRS:
        if pair["kind"] != "extraction" and "," not in pair["answer"] + pair["gold"]:
            turned = {**pair, "answer": pair["gold"], "gold": pair["answer"]}
            assert judged(grader, turned) is pair["equal"], turned


@pytest.mark.parametrize(
    "question, percent",
    [
        ("What percent of 50 is 10?", True),
        ("By what percentage did it rise?", True),
        ("What is the probability? Express your answer as a percent.", True),
        ("He keeps 20% of it. What per cent is left?", True),
        ("What is 10% of 50?", False),
        ("Sixteen is 64$\\%$ of what number?", False),
        ("What is $\\frac{1}{4}\\%$ of 120?", False),
        ("A large percentage of them leave. How many stay?", False),
        ("What is left after a 10 percent discount?", False),
        ("How many?", False),
    ],
)
def test_questions_that_ask_for_percent(question, percent):
    assert asks_percent(question) is percent


@pytest.mark.slow
def test_every_difference_from_math_verify_is_explained():
    """A note where math-verify's verdict on the same texts is another one, and only there."""
    math_verify = pytest.importorskip("math_verify")
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    formula = [math_verify.LatexExtractionConfig()]

    def read(text: str) -> Any:
        return math_verify.parse(f"${text}$", formula, parsing_timeout=0)  # type: ignore

    def says(pair: dict[str, Any]) -> bool:
        whole_output = pair["kind"] == "extraction"
        answer = math_verify.parse(pair["answer"], parsing_timeout=0) if whole_output else read(pair["answer"])  # type: ignore
        return math_verify.verify(read(pair["gold"]), answer, timeout_seconds=0)

    unexplained = [pair for pair in PAIRS if (says(pair) is not pair["equal"]) is not bool(pair["note"])]
    assert not unexplained
    assert all("math-verify" in pair["note"] for pair in PAIRS if pair["note"])

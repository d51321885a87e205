"""Records to questions and gold answers, and questions to few-shot prompts."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import toy

from slm_jax.evaluate.math import prompts
from slm_jax.evaluate.math.answers import extract, extract_choice
from slm_jax.evaluate.math.prompts import (
    CHOICES,
    MATHQA,
    PROBLEMS,
    STYLES,
    WORDS,
    choices_text,
    few_shot,
    fitting,
    read_examples,
)
from slm_jax.evaluate.math.questions import SETS, Question, find_file, read_questions

REAL = Path(__file__).parents[2] / "shared" / "data"


def read(name: str, folder: Path, *records: dict) -> list[Question]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_questions(name, str(path))


@pytest.mark.parametrize(
    "name, record, text, gold",
    [
        ("gsm8k", {"question": "q", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}, "q", "1004"),
        ("math", {"problem": "p", "solution": r"so \boxed{\frac{1}{2}}"}, "p", r"\frac{1}{2}"),
        ("math", {"problem": "p", "solution": "so 2", "answer": "2"}, "p", "2"),
        ("svamp", {"Body": "Ann has 2 pens", "Question": "How many?", "Answer": 2.0}, "Ann has 2 pens. How many?", "2"),
        ("svamp", {"Body": "Ann has 2.", "Question": "How many?", "Answer": 2.5}, "Ann has 2. How many?", "2.5"),
        ("svamp", {"question": "q", "answer": "3"}, "q", "3"),
        ("asdiv", {"body": "b", "question": "q", "answer": "9 (apples)"}, "b q", "9"),
        ("mawps", {"input": "q", "target": 7.0}, "q", "7"),
        ("gsm_hard", {"input": "q", "code": "", "target": -9867630.0}, "q", "-9867630"),
        ("ocw", {"problem": "p", "solution": "s", "answer": r"so \boxed{4.5e33}"}, "p", "4.5e33"),
        ("ocw", {"problem": "p", "solution": "s", "answer": "1.6"}, "p", "1.6"),
        (
            "tabmwp",
            {"question": "Is it?", "answer": "yes", "choices": ["yes", "no"], "table": "a | 1", "table_title": "T"},
            'Read the following table regarding "T" and answer a question:\na | 1\nIs it? Please select from the '
            "following options: yes, no (Yes or No)",
            "yes",
        ),
        (
            "tabmwp",
            {"question": "q", "answer": "5", "choices": None, "table": "a | 1", "table_title": None},
            "Read the following table and answer a question:\na | 1\nq",
            "5",
        ),
        (
            "mathqa",
            {"Problem": "p", "options": "a ) 1 : 2 , b ) 3 , c ) 4", "correct": "b"},
            ("p", "1 : 2", "3", "4"),
            "B",
        ),
        (
            "mathqa",
            {"question": "p", "options": "['a ) a ) 1 cm', 'b ) 2']", "answer": "a"},
            ("p", "a ) 1 cm", "2"),
            "A",
        ),
        ("mmlu_stem", {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 2}, ("q", "w", "x", "y", "z"), "C"),
        ("sat_math", {"question": "q", "options": "A) $1$ B) (2) C) 3", "answer": "C"}, ("q", "$1$", "(2)", "3"), "C"),
        ("sat_math", {"question": "q", "options": "A. 1,190 B. 19", "answer": "B"}, ("q", "1,190", "19"), "B"),
        ("sat_math", {"question": "q", "options": ["(A)1", "(B)2"], "label": "A"}, ("q", "1", "2"), "A"),
    ],
)
def test_records_of_the_public_files(name, record, text, gold, tmp_path):
    [question] = read(name, tmp_path, record)
    choice = isinstance(text, tuple)
    assert question.text == (choices_text(text[0], text[1:]) if choice else text)
    assert (question.gold, question.choice, question.number) == (gold, choice, 0)


def test_what_is_not_asked(tmp_path):
    stem = {"question": "q", "choices": ["x", "y"], "answer": 0, "subject": "machine_learning"}
    assert len(read("mmlu_stem", tmp_path, stem, stem | {"subject": "philosophy"}, stem)) == 2
    problem = {"problem": "p", "solution": r"\boxed{1}"}
    assert len(read("math500", tmp_path, problem | {"in_math500": True}, problem | {"in_math500": False}, problem)) == 2
    asdiv = [{"question": "q", "answer": answer} for answer in ("1 (h); 30 (min)", "2", "3")]
    assert [(question.gold, question.number) for question in read("asdiv", tmp_path, *asdiv)] == [("2", 0), ("3", 1)]
    percents = [{"question": text, "answer": "1"} for text in ("What percent?", "10% of what?", "How many?")]
    assert [question.percent for question in read("svamp", tmp_path, *percents)] == [True, False, False]


def test_float_golds_keep_all_their_digits(tmp_path):
    values = [18.0, 0.1, 2.0107e-06, 123456789.123, 4503599627370497.0, 12345678901234567.0]
    golds = [question.gold for question in read("gsm_hard", tmp_path, *({"input": "q", "target": v} for v in values))]
    assert golds[0] == "18" and golds[4] == "4503599627370497" and [float(gold) for gold in golds] == values


def test_files_are_found_in_all_their_forms(tmp_path):
    record = {"question": "q", "answer": "#### 1"}
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(record) + "\n")
    assert find_file("gsm8k", str(tmp_path)) == str(tmp_path / "gsm8k" / "test.jsonl")
    (tmp_path / "eval").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record] * 3), tmp_path / "eval" / "gsm8k_test.parquet")
    found = find_file("gsm8k", str(tmp_path))
    assert found == str(tmp_path / "eval" / "gsm8k_test.parquet")
    assert len(read_questions("gsm8k", found)) == 3 and len(read_questions("gsm8k", found, limit=2)) == 2


def test_mistakes_about_files(tmp_path):
    assert "'gsm9k'" in toy.refused("math-unknown-set", find_file, "gsm9k", str(tmp_path))
    line = toy.refused("math-set-not-found", find_file, "svamp", str(tmp_path))
    assert f"of svamp in {tmp_path}" in line and "svamp_test" in line
    line = toy.refused("record-invalid", read, "gsm8k", tmp_path, {"question": "q", "solution": "1"})
    assert "gsm8k.jsonl:1" in line and "'answer'" in line
    record = {"question": "q", "options": "A) 1 B) 2", "answer": "C"}
    line = toy.refused("record-invalid", read, "sat_math", tmp_path, record)
    assert "sat_math.jsonl:1" in line and "'C'" in line
    record = {"question": "q", "choices": ["a", "b"], "answer": "a"}
    assert "mmlu_stem.jsonl:1" in toy.refused("record-invalid", read, "mmlu_stem", tmp_path, record)
    assert "asdiv" in toy.refused("no-records", read, "asdiv", tmp_path, {"question": "q", "answer": "1;2"})
    (tmp_path / "bad.jsonl").write_text("{")
    assert "bad.jsonl:1" in toy.refused("record-invalid", read_questions, "gsm8k", str(tmp_path / "bad.jsonl"))


COUNTS = {"gsm8k": 1036, "math": 4033, "math500": 404, "svamp": 1000, "asdiv": 2214, "mawps": 1981, "mathqa": 1000}
COUNTS |= {"mmlu_stem": 2977, "sat_math": 32, "ocw": 272, "gsm_hard": 1036}


@pytest.mark.parametrize("name", COUNTS)
def test_real_files(name):
    """Every record is a question; every choice has all its options, and a right one among them."""
    if not REAL.exists():
        pytest.skip(f"{REAL} is not here")
    questions = read_questions(name, find_file(name, str(REAL)))
    assert len(questions) == COUNTS[name] and all(question.gold and question.text for question in questions)
    if questions[0].choice:
        least = 5 if name == "mathqa" else 4
        for question in questions:
            options = question.text.rpartition("Explain your answer.\n")[2]
            assert all(f"({letter}) " in options for letter in "ABCDE"[:least]) and f"({question.gold})" in options


RIGHT = {
    "words": "7 38 155 30 48 24 6 100".split(),
    "problems": ["[2, 3]", "40", r"2\sqrt{13}", r"\frac{1}{9}"],
    "choices": list("CABD"),
    "mathqa": list("DBCE"),
}


@pytest.mark.parametrize("style", RIGHT)
def test_our_examples_say_their_answers_where_they_are_looked_for(style):
    examples = STYLES[style].examples
    find = extract if style in ("words", "problems") else extract_choice
    assert [find(example.solution) for example in examples] == RIGHT[style]
    assert not any(stop in STYLES[style].show(example) for stop in prompts.STOP for example in examples)


def test_examples_are_as_many_as_published():
    assert [len(examples) for examples in (WORDS, PROBLEMS, CHOICES, MATHQA)] == [8, 4, 4, 4]
    assert {name: SETS[name].style for name in ("gsm8k", "math", "sat_math", "mathqa", "gsm_hard")} == {
        "gsm8k": "words",
        "math": "problems",
        "sat_math": "choices",
        "mathqa": "mathqa",
        "gsm_hard": "words",
    }


def test_prompts_end_where_the_solution_begins():
    words, problems = STYLES["words"], STYLES["problems"]
    prompt = few_shot(words, words.examples[:1], "How many?")
    assert prompt.text.endswith("The answer is 7.\n\n\nQuestion: How many?\nAnswer:") and prompt.shots == 1
    assert prompt.text.startswith("Question: A bakery bakes") and "\nAnswer: The bakery bakes" in prompt.text
    prompt = few_shot(problems, problems.examples[:2], "Find $x$.")
    assert prompt.text.endswith("I hope it is correct.\n\n\nProblem:\nFind $x$.\nSolution:")
    assert "\nSolution:\nThe left side factors" in prompt.text
    assert few_shot(words, (), "q").text == "Question: q\nAnswer:"


def test_examples_that_have_no_room_are_left_out_from_the_front():
    style, question = STYLES["words"], "How many?"
    texts = [few_shot(style, style.examples[first:], question).text for first in range(9)]
    for first, text in enumerate(texts):
        prompt = fitting(style, style.examples, question, lambda other, text=text: len(other) <= len(text))
        assert prompt is not None and prompt.text == text and prompt.shots == 8 - first
        if first < 8:
            smaller = fitting(style, style.examples, question, lambda other, text=text: len(other) < len(text))
            assert smaller is not None and smaller.shots == 7 - first
    assert fitting(style, style.examples, question, lambda text: len(text) < len(texts[-1])) is None


def test_examples_of_the_user(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"question": "1+1?", "solution": "It is 2. The answer is 2."}]))
    [example] = read_examples(path)
    assert STYLES["words"].show(example) == "Question: 1+1?\nAnswer: It is 2. The answer is 2."
    for content in ("[", "{}", "[]", "[{}]", '[{"question": "q", "solution": 1}]'):
        path.write_text(content)
        assert str(path) in toy.refused("math-examples-invalid", read_examples, path)
    assert "nowhere.json" in toy.refused("math-examples-unreadable", read_examples, "nowhere.json")

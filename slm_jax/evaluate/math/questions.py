"""Question sets of mathematics: reads the records of their files as questions with a gold answer.

Texts are composed as in the harness that Rho-1 (arXiv 2404.07965, appendix E) evaluates with. Fields are those of the
public files; where a field has several names, a record may use any.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from slm_jax.data import readers
from slm_jax.errors import UserError
from slm_jax.evaluate.math.answers import asks_percent, last_boxed
from slm_jax.evaluate.math.examples import choices_text

ENDINGS = (".jsonl.gz", ".jsonl", ".jsonl.zst", ".parquet", ".json")
STEM_SUBJECTS = frozenset(
    "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning".split()
)


class Question(NamedTuple):
    """A question of a set.

    Attributes:
        text: as the model reads it.
        gold: the right answer; the letter of a choice.
        choice: whether it is multiple choice.
        percent: whether it asks for percent, so that 0.5 counts as 50%.
        number: its index in the set, from 0.
    """

    text: str
    gold: str
    choice: bool = False
    percent: bool = False
    number: int = 0


class _NoField(Exception):
    pass


Fields = Mapping[str, Any]


def _field(record: Fields, *names: str) -> str:
    value = next((record[name] for name in names if record.get(name) is not None), None)
    if value is None:
        raise _NoField(" or ".join(map(repr, names)))
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value).strip()  # of a float: all digits that it has


def _gsm8k(record: Fields) -> Question:
    return Question(_field(record, "question"), _field(record, "answer").rpartition("####")[2].strip().replace(",", ""))


def _math(record: Fields) -> Question:
    gold = last_boxed(_field(record, "solution"))
    return Question(_field(record, "problem"), (_field(record, "answer") if gold is None else gold).strip())


def _math500(record: Fields) -> Question | None:
    return _math(record) if record.get("in_math500", True) else None


def _svamp(record: Fields) -> Question:
    if "Body" not in record:
        return _plain(record)
    body = _field(record, "Body")
    return Question(
        f"{body if body.endswith('.') else body + '.'} {_field(record, 'Question')}", _field(record, "Answer")
    )


def _asdiv(record: Fields) -> Question | None:
    answer = _field(record, "answer")
    text = f"{_field(record, 'body')} {_field(record, 'question')}" if "body" in record else _field(record, "question")
    return None if ";" in answer else Question(text, re.sub(r"\(.*?\)", "", answer).strip())


def _plain(record: Fields) -> Question:
    return Question(_field(record, "question", "input"), _field(record, "answer", "target"))


def _tabmwp(record: Fields) -> Question:
    title = f'regarding "{record["table_title"]}" ' if record.get("table_title") else ""
    text = f"Read the following table {title}and answer a question:\n{_field(record, 'table')}\n"
    text += _field(record, "question")
    if record.get("choices"):
        text += f" Please select from the following options: {', '.join(map(str, record['choices']))}"
    return Question(text, _field(record, "answer"))


def _ocw(record: Fields) -> Question:
    answer = _field(record, "answer")
    boxed = last_boxed(answer)
    return Question(_field(record, "question", "problem"), answer if boxed is None else boxed.strip())


def _choice(record: Fields, choices: list[str], letter: str) -> Question:
    if len(choices) < 2 or not "A" <= letter.upper() < "ABCDEFGHIJK"[len(choices)]:
        raise ValueError(f"{len(choices)} choices, of which {letter!r} is the right one")
    return Question(choices_text(_field(record, "question", "Problem"), choices), letter.upper(), choice=True)


def _options(record: Fields) -> list[str]:
    """The choices of one text: 'a ) 12 , b ) 16', 'A. 12 B. 16', "['a ) 12', 'b ) 16']", or a list of '(A)12'."""
    options = record.get("options") or ""
    text = options if isinstance(options, str) else " ".join(map(str, options))
    found, begin = [], None
    for letter in "ABCDE":
        mark = re.compile(rf"(?:^|[\s,'\"\[])\(?{letter}\s?[).]\s*", re.IGNORECASE).search(text, begin or 0)
        if mark is None:
            break
        if begin is not None:
            found.append(text[begin : mark.start()])
        begin = mark.end()
    return [option.strip(" ,'\"[]\n") for option in [*found, text[begin:]]]


def _mathqa(record: Fields) -> Question:
    return _choice(record, _options(record), _field(record, "answer", "correct"))


def _mmlu_stem(record: Fields) -> Question | None:
    if record.get("subject", "machine_learning") not in STEM_SUBJECTS:
        return None
    place = _field(record, "answer_index", "answer")
    return _choice(record, list(map(str, record.get("choices") or ())), "ABCDEFGHIJ"[int(place)])


def _sat_math(record: Fields) -> Question:
    return _choice(record, _options(record), _field(record, "answer", "label"))


class QuestionSet(NamedTuple):
    """How a set is read.

    Attributes:
        read: turns a record into a question; None for a record that is left out.
        style: of the prompt, a key of `prompts.STYLES`.
        files: possible names of its file, without ending; by default NAME_test and NAME/test.
    """

    read: Callable[[Fields], Question | None]
    style: str
    files: tuple[str, ...] = ()


SETS = {
    "gsm8k": QuestionSet(_gsm8k, "words"),
    "math": QuestionSet(_math, "problems"),
    "math500": QuestionSet(_math500, "problems", ("math500_test", "math_oai/test", "math_test")),
    "svamp": QuestionSet(_svamp, "words"),
    "asdiv": QuestionSet(_asdiv, "words"),
    "mawps": QuestionSet(_plain, "words"),
    "tabmwp": QuestionSet(_tabmwp, "words"),
    "mathqa": QuestionSet(_mathqa, "mathqa"),
    "mmlu_stem": QuestionSet(_mmlu_stem, "choices"),
    "sat_math": QuestionSet(_sat_math, "choices"),
    "ocw": QuestionSet(_ocw, "problems", ("ocw_courses_test", "ocw_test", "ocw/test")),
    "gsm_hard": QuestionSet(_plain, "words"),
}


def find_file(name: str, folder: str) -> str:
    """The file of a set in a folder, or in its subfolder `eval`.

    Raises:
        UserError: no such set, or no such file.
    """
    if name not in SETS:
        raise UserError("math-unknown-set", f"no question set {name!r}: known are {', '.join(SETS)}")
    stems = SETS[name].files or (f"{name}_test", f"{name}/test")
    paths = [os.path.join(folder, place, stem + end) for stem in stems for place in ("", "eval") for end in ENDINGS]
    found = next(filter(os.path.isfile, paths), None)
    if found is None:
        raise UserError(
            "math-set-not-found",
            f"no questions of {name} in {folder}: put {stems[0]}{ENDINGS[0]} there, or one of {', '.join(ENDINGS)}",
        )
    return found


def read_questions(name: str, path: str, limit: int | None = None) -> list[Question]:
    """The questions of a set, in the order of its file.

    Args:
        name: a key of `SETS`.
        path: its file, JSON lines or Parquet, compressed or not.
        limit: maximum number of questions.

    Raises:
        UserError: a record cannot be read or lacks a field, or there is no question.
    """
    found: list[Question] = []
    for record in readers.records(path, ()):
        if limit is not None and len(found) == limit:
            break
        if record.fields is None:
            raise UserError("record-invalid", f"{record.place} is {record.problem}: write one JSON object per line")
        try:
            question = SETS[name].read(record.fields)
        except _NoField as error:
            raise UserError("record-invalid", f"{record.place}: a record of {name} needs the field {error}") from error
        except (ValueError, IndexError, TypeError) as error:
            raise UserError("record-invalid", f"{record.place} is not a record of {name}: {error}") from error
        if question is not None:
            found.append(_completed(question, len(found)))
    if not found:
        raise UserError("no-records", f"{path} has no questions of {name}: check the file")
    return found


def _completed(question: Question, number: int) -> Question:
    """Adds its number, the allowed answers where there are two, and whether it asks for percent."""
    text = question.text
    if not question.choice and question.gold.lower() in ("yes", "no"):
        text += " (Yes or No)"
    elif not question.choice and question.gold.lower() in ("true", "false"):
        text += " (True or False)"
    return question._replace(text=text, percent=asks_percent(text), number=number)

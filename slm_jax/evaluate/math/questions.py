"""Question sets of mathematics: reads the records of their files as questions with a gold answer.

Texts are composed as in the harness that Rho-1 (arXiv 2404.07965, appendix E) evaluates with. Fields are those of the
public files; where a field has several names, a record may use any.
"""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from slm_jax.data import readers
from slm_jax.errors import UserError
from slm_jax.evaluate.math.answers import asks_percent, last_boxed
from slm_jax.evaluate.math.prompts import choices_text

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


def parsed(name: str, record: Fields) -> Question | None:
    """A record of a set as a question; None for a record that is left out."""
    match name:
        # ---- Answers to be worked out
        case "gsm8k":
            gold = _field(record, "answer").rpartition("####")[2].strip().replace(",", "")
            return Question(_field(record, "question"), gold)
        case "math" | "math500":
            if name == "math500" and not record.get("in_math500", True):
                return None
            boxed = last_boxed(_field(record, "solution"))
            return Question(_field(record, "problem"), (_field(record, "answer") if boxed is None else boxed).strip())
        case "svamp" if "Body" in record:
            body = _field(record, "Body")
            text = f"{body if body.endswith('.') else body + '.'} {_field(record, 'Question')}"
            return Question(text, _field(record, "Answer"))
        case "asdiv":
            answer, text = _field(record, "answer"), _field(record, "question")
            text = f"{_field(record, 'body')} {text}" if "body" in record else text
            return None if ";" in answer else Question(text, re.sub(r"\(.*?\)", "", answer).strip())
        case "tabmwp":
            title = f'regarding "{record["table_title"]}" ' if record.get("table_title") else ""
            text = f"Read the following table {title}and answer a question:\n{_field(record, 'table')}\n"
            text += _field(record, "question")
            if record.get("choices"):
                text += f" Please select from the following options: {', '.join(map(str, record['choices']))}"
            return Question(text, _field(record, "answer"))
        case "ocw":
            answer = _field(record, "answer")
            boxed = last_boxed(answer)
            return Question(_field(record, "question", "problem"), answer if boxed is None else boxed.strip())
        case "svamp" | "mawps" | "gsm_hard":
            return Question(_field(record, "question", "input"), _field(record, "answer", "target"))

    # ---- Choices
    if name == "mmlu_stem":
        if record.get("subject", "machine_learning") not in STEM_SUBJECTS:
            return None
        choices = list(map(str, record.get("choices") or ()))
        letter = "ABCDEFGHIJ"[int(_field(record, "answer_index", "answer"))]
    else:
        choices = _options(record)
        letter = _field(record, "answer", "correct" if name == "mathqa" else "label")
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


class QuestionSet(NamedTuple):
    """How a set is read.

    Attributes:
        style: of the prompt, a key of `prompts.STYLES`.
        files: possible names of its file, without ending; by default NAME_test and NAME/test.
    """

    style: str
    files: tuple[str, ...] = ()


SETS = {
    "gsm8k": QuestionSet("words"),
    "math": QuestionSet("problems"),
    "math500": QuestionSet("problems", ("math500_test", "math_oai/test", "math_test")),
    "svamp": QuestionSet("words"),
    "asdiv": QuestionSet("words"),
    "mawps": QuestionSet("words"),
    "tabmwp": QuestionSet("words"),
    "mathqa": QuestionSet("mathqa"),
    "mmlu_stem": QuestionSet("choices"),
    "sat_math": QuestionSet("choices"),
    "ocw": QuestionSet("problems", ("ocw_courses_test", "ocw_test", "ocw/test")),
    "gsm_hard": QuestionSet("words"),
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
    """The first `limit` questions of a set, or all, in the order of its file of JSON lines or Parquet.

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
            question = parsed(name, record.fields)
        except _NoField as error:
            raise UserError("record-invalid", f"{record.place}: a record of {name} needs the field {error}") from error
        except (ValueError, IndexError, TypeError) as error:
            raise UserError("record-invalid", f"{record.place} is not a record of {name}: {error}") from error
        if question is None:
            continue
        # The allowed answers where there are two.
        gold, text = "" if question.choice else question.gold.lower(), question.text
        text += " (Yes or No)" if gold in ("yes", "no") else " (True or False)" if gold in ("true", "false") else ""
        found.append(question._replace(text=text, percent=asks_percent(text), number=len(found)))
    if not found:
        raise UserError("no-records", f"{path} has no questions of {name}: check the file")
    return found

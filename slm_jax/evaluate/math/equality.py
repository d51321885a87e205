"""Whether an answer is the right one. What is compared here is normalised (`answers.normalise`).

By what is written, in this order: the same text; numbers; the parts of lists, sets, tuples, intervals, unions and
matrices; the sides of equations and inequalities; and what is left symbolically.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from slm_jax.evaluate.math.answers import normalise
from slm_jax.evaluate.math.symbolic import TOLERANCE, Symbolic

LONGEST_SYMBOLIC = 150  # characters of an expression that the parser is asked about
MOST_PARTS = 40  # of a list that is compared
DEEPEST = 6  # lists in lists
MOST_LOST = 2  # comparisons that run out of time, before an answer is taken for wrong

_NUMBER = re.compile(r"(-?)(\d{1,300})(\.\d{1,300})?(?:(?:\\times|\\cdot)10\^\{?(-?\d{1,3})\}?|[eE]([-+]?\d{1,3}))?")
_FRACTION = re.compile(r"(-?)(\d{1,300})?\\frac\{(-?)(\d{1,300})\}\{(\d{1,300})\}")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", re.DOTALL)
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![a-zA-Z])|[<>]")
_FLIPPED = {">": "<", r"\ge": r"\le"}
_NUMERAL = re.compile(r"-?[0-9A-Z]+_\d+")  # in a base
_WORD = re.compile(r"[A-Za-z][a-z]{3,}[A-Za-z]*|[A-Za-z]+\d+")
_LETTERS = frozenset("abcdfghjklmnopqrstuvwxyzABCDFGHIJKLMNOPQRSTUVWXYZ")
_CANCELLING = r"\\(?:sin|cos|tan|cot|sec|csc|log|ln|sum|int)|/|frac|-"  # may remove a variable
_OPEN, _CLOSE = "([{", ")]}"


class Verdict(NamedTuple):
    """correct: by the rules of docs/math_evaluation.md. published: by those that published numbers were made with,
    where whole numbers and fractions, too, may be a ten thousandth off, and all 100 times too large or too small."""

    correct: bool
    published: bool


class Rules(NamedTuple):
    """exact: whole numbers and fractions must be equal, and only numbers written with a point come near enough.
    percent: 0.5 and 50 are the same."""

    exact: bool
    percent: bool


class Grader:
    """Compares answers; holds the process of `Symbolic`, so close it.

    not_compared: what the graded answers would have needed, and what ended the process; the same for the same answers,
    whatever was graded before.
    """

    def __init__(self, symbolic: Symbolic | None = None):
        self.symbolic = symbolic or Symbolic()
        self.not_compared = 0
        self._lost: set[tuple[str, str, bool]] = set()  # of the present answer

    def close(self) -> None:
        self.symbolic.close()

    def grade(self, answer: str, gold: str, percent: bool = False) -> Verdict:
        """The verdict about an answer as it was written.

        percent: the question asks for percent, so that 0.5 is 50; a percent sign in one of the two says the same.
        """
        other = normalise(gold)
        one = normalise(answer, thousands="," not in other)
        if not one or not other:
            return Verdict(False, False)
        self._lost.clear()
        percent = percent or "%" in answer or "%" in gold
        correct = self.equal(one, other, Rules(exact=True, percent=percent))
        published = correct or self.equal(one, other, Rules(exact=False, percent=True))
        self.not_compared += len(self._lost)
        return Verdict(correct, published)

    def equal(self, one: str, other: str, rules: Rules, depth: int = 0) -> bool:
        """Whether two normalised answers are equal."""
        one, other = without_parentheses(one), without_parentheses(other)
        if one == other:
            return True
        if not one or not other:  # a part of a list, as in "(1,2),,(3,4)"
            return False
        numbers = number(one), number(other)
        if numbers[0] and numbers[1]:
            return same_numbers(numbers[0], numbers[1], rules)
        if depth == DEEPEST or not (balanced(one) and balanced(other)):
            return False
        if any(kind.fullmatch(text) for kind in (_WORD, _NUMERAL) for text in (one, other)):
            return one.lower() == other.lower()
        for kind in (self._lists, self._unions, self._relations, self._brackets, self._matrices):
            verdict = kind(one, other, rules, depth + 1)
            if verdict is not None:
                return verdict
        return self._same_expressions(one, other, any(value and not value.exact for value in numbers))

    def _lists(self, one: str, other: str, rules: Rules, depth: int) -> bool | None:
        """1,2 and {2,1}: in any order."""
        if not any(len(parts(text, ",")) > 1 or is_set(text) or r"\pm" in text for text in (one, other)):
            return None
        return self._unordered([members(text) for text in (one, other)], rules, depth)

    def _unions(self, one: str, other: str, rules: Rules, depth: int) -> bool | None:
        both = [parts(text, r"\cup") for text in (one, other)]
        return self._unordered(both, rules, depth) if max(map(len, both)) > 1 else None

    def _relations(self, one: str, other: str, rules: Rules, depth: int) -> bool | None:
        """lhs = rhs is the same as rhs = lhs and, moved to one side, as its negative; inequalities may be turned."""
        both = [(parts(text, "="), relations(text)) for text in (one, other)]
        if all(len(sides) == 2 for sides, _ in both):
            differences = [f"{left}-({right})" for (left, right), _ in both]
            turned = f"-({differences[0]})"
            return any(self._same_expressions(first, differences[1]) for first in (differences[0], turned))
        if any(len(sides) > 1 for sides, _ in both):
            last, other_last = (sides[-1] for sides, _ in both)
            numeric = [len(sides) == 1 or not re.search(r"[a-zA-Z]", sides[0]) for sides, _ in both]
            return all(numeric) and self.equal(last, other_last, rules, depth)
        if not any(signs for _, (_, signs) in both):
            return None
        (sides, signs), (others, other_signs) = (found for _, found in both)
        return signs == other_signs and all(self.equal(a, b, rules, depth) for a, b in zip(sides, others, strict=True))

    def _brackets(self, one: str, other: str, rules: Rules, depth: int) -> bool | None:
        """Tuples and intervals: the same brackets, and the parts in order."""
        both = [enclosed(text) for text in (one, other)]
        if not any(len(inner) > 1 for inner in both):
            return None
        if one[0] + one[-1] != other[0] + other[-1] or len(both[0]) != len(both[1]):
            return False
        return all(self.equal(a, b, rules, depth) for a, b in zip(*both, strict=True))

    def _matrices(self, one: str, other: str, rules: Rules, depth: int) -> bool | None:
        both = [_MATRIX.fullmatch(text) for text in (one, other)]
        if not any(both):
            return None
        if both[0] is None or both[1] is None:
            return False
        cells = [[row.split("&") for row in re.sub(r"\\\\$", "", found[1]).split("\\\\")] for found in both if found]
        if [len(row) for row in cells[0]] != [len(row) for row in cells[1]]:
            return False
        flat = [[normalise(cell) for row in rows for cell in row] for rows in cells]
        return all(self.equal(a, b, rules, depth) for a, b in zip(*flat, strict=True))

    def _unordered(self, both: list[list[str]], rules: Rules, depth: int) -> bool:
        ones, others = both
        if len(ones) != len(others) or len(ones) > MOST_PARTS:
            return False
        left = list(others)
        for part in ones:
            place = next((place for place, text in enumerate(left) if self.equal(part, text, rules, depth)), None)
            if place is None:
                return False
            del left[place]
        return True

    def _same_expressions(self, one: str, other: str, approximately: bool = False) -> bool:
        if max(len(one), len(other)) > LONGEST_SYMBOLIC or not all(_readable(text) for text in (one, other)):
            return False
        if _variables(one) != _variables(other) and not re.search(_CANCELLING, one + other):
            return False
        if len(self._lost) >= MOST_LOST:
            return False
        pair = (_for_parser(one), _for_parser(other), approximately)
        same = self.symbolic.same(*pair)
        if same is None:
            self._lost.add(pair)
        return bool(same)


class Number(NamedTuple):
    value: Fraction
    exact: bool  # written without a point and without a power of ten


def number(text: str) -> Number | None:
    """A number written as digits, as a power of ten, as a fraction or a mixed number; None for anything else."""
    if found := _NUMBER.fullmatch(text):
        sign, whole, decimals, power, exponent = found.groups()
        value = Fraction(whole + (decimals or "")) * Fraction(10) ** int(power or exponent or 0)
        return Number(-value if sign else value, decimals is None and power is None and exponent is None)
    if found := _FRACTION.fullmatch(text):
        sign, whole, inner_sign, numerator, denominator = found.groups()
        if int(denominator) and not (whole and inner_sign):
            value = int(whole or 0) + Fraction(int(numerator), int(denominator))
            return Number(-value if bool(sign) != bool(inner_sign) else value, True)
    return None


def same_numbers(one: Number, other: Number, rules: Rules) -> bool:
    """Within a relative `TOLERANCE`, of the second or, with percent, of it 100 times larger or smaller."""
    for factor in (1, 100, Fraction(1, 100)) if rules.percent else (1,):
        wanted = other.value * factor
        if one.value == wanted:
            return True
        if rules.exact and one.exact and other.exact:
            continue
        if abs(one.value - wanted) <= Fraction(TOLERANCE) * max(abs(one.value), abs(wanted)):
            return True
    return False


def balanced(text: str) -> bool:
    """Whether every brace is closed, and every parenthesis and bracket by one or the other ([0,1) is an interval)."""
    stack = []
    for place, sign in enumerate(text):
        if sign in "{}" and place and text[place - 1] == "\\":
            continue
        if sign in _OPEN:
            stack.append(sign)
        elif sign in _CLOSE and (not stack or (stack.pop() == "{") != (sign == "}")):
            return False
    return not stack


def parts(text: str, separator: str) -> list[str]:
    """The text, cut at what separates it outside of all brackets and matrices."""
    depth, begin, found, place = 0, 0, [], 0
    while place < len(text):
        if text.startswith(("\\begin", "\\end"), place):
            depth += 1 if text.startswith("\\begin", place) else -1
        elif text[place] in _OPEN + _CLOSE:
            depth += 1 if text[place] in _OPEN else -1
        elif depth == 0 and text.startswith(separator, place):
            found.append(text[begin:place])
            begin = place = place + len(separator)
            continue
        place += 1
    return [*found, text[begin:]]


def is_set(text: str) -> bool:
    return text.startswith("\\{") and text.endswith("\\}")


def members(text: str) -> list[str]:
    """The members of a list or a set; a\\pm b is two."""
    inner = text[2:-2] if is_set(text) else text
    found = []
    for part in parts(inner, ","):
        signs = ("+", "-") if part.count(r"\pm") == 1 else ("",)
        found += [re.sub(r"^\+", "", re.sub(r"\\pm *", sign, part) if sign else part) for sign in signs]
    return found


def enclosed(text: str) -> list[str]:
    """The parts of what stands in one pair of parentheses or brackets; one or none where nothing does."""
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]" or not balanced(text[1:-1]):
        return []
    return parts(text[1:-1], ",")


def without_parentheses(text: str) -> str:
    """(a) is a; (a,b) stays."""
    while text.startswith("(") and text.endswith(")") and len(enclosed(text)) == 1 and text[1:-1]:
        text = text[1:-1]
    return text


def relations(text: str) -> tuple[list[str], list[str]]:
    """Sides and signs of a chain of inequalities, turned so that the first sign is < or \\le."""
    sides: list[str] = []
    signs: list[str] = []
    begin = 0
    for found in _RELATION.finditer(text):
        sides.append(text[begin : found.start()].strip())
        signs.append(found[0])
        begin = found.end()
    sides.append(text[begin:].strip())
    if signs and signs[0] in _FLIPPED:
        sides.reverse()
        signs = [_FLIPPED.get(sign, sign) for sign in reversed(signs)]
    return sides, signs


def _readable(text: str) -> bool:
    """Not empty, with brackets that close, and with a digit, a command or a letter for a variable in it."""
    return bool(re.search(r"[0-9a-zA-Z]", text)) and balanced(text) and not re.search(r"[^\x20-\x7e]", text)


def _variables(text: str) -> frozenset[str]:
    """Letters that stand for themselves, without i and e."""
    return _LETTERS & set(re.sub(r"\\[a-zA-Z]+", "", text))


def _for_parser(text: str) -> str:
    """x(x+1) is a product, unless the letter is one that functions have."""
    return re.sub(r"(?<![a-zA-Z\\{])([a-eijk-zA-Z])\(", r"\1\\cdot(", text)

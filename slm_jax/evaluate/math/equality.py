"""Decides whether an answer is right, after both sides have been normalised (`answers.normalise`).

In this order: the same text; numbers; times of day; words; conditions on a variable; the parts of lists, sets, tuples,
intervals, unions and matrices; the sides of equations and inequalities; and the rest symbolically.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from slm_jax.evaluate.math.answers import NAME, normalise
from slm_jax.evaluate.math.symbolic import TOLERANCE, How, Symbolic

RULES_VERSION = 2  # raise it with every change that changes a verdict: results keep it, and are made again under others
LONGEST_SYMBOLIC = 150  # characters of an expression that is passed to the parser
MOST_PARTS = 40  # of a list that is compared
DEEPEST = 6  # lists in lists
MOST_LOST = 2  # comparisons that run out of time before an answer counts as wrong

_NUMBER = re.compile(r"(-?)(\d{1,300})(\.\d{1,300})?(?:(?:\\times|\\cdot)10\^\{?(-?\d{1,3})\}?|[eE]([-+]?\d{1,3}))?")
_REPEATING = re.compile(r"(-?)(\d{0,300})\.(\d{0,300})\\(?:overline|dot)\{(\d{1,300})\}")
_FRACTION = re.compile(r"(-?)(\d{1,300})?\\frac\{(-?)(\d{1,300})\}\{(\d{1,300})\}")
_TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))?(am|pm)?")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", re.DOTALL)
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![a-zA-Z])|[<>]")
_FLIPPED = {">": "<", r"\ge": r"\le"}
_BUILDER = re.compile(r"\\\{[a-z](?:\\in\\mathbb\{R\})?(?::|\||\\mid *|\\vert *)(.*)\\\}")
_NUMERAL = re.compile(r"-?[0-9A-Z]+(?:\.[0-9A-Z]+)?_\d+")  # in a base
_WORD = re.compile(r"[A-Za-z][a-z]{3,}[A-Za-z]*|[A-Za-z]+\d+|[A-Z][A-Za-z]+")
_HAS_WORD = re.compile(r"(?<![\\a-zA-Z])[A-Za-z][a-z]{3,}(?![a-zA-Z{(])")
# Short words that would pass for products of variables: "on" is not n times o.
_SHORT_WORDS = frozenset(
    "no on yes not ton all any odd and are as at be but by can day do for go had has he her him his how if in is it "
    "its low man map may men new net now of off old one or our out own red saw she six so sum ten the to too top two "
    "up us use via was way we who why won you tie win lie dog god cat act bus car arc ray set sit tea eat pie sun mon "
    "tue wed thu fri sat jan feb mar apr jun jul aug sep oct nov dec".split()
)
_TEXT_ONLY = re.compile(r"(?:\s|[$,;.()]|\\[ ,;!]|\\(?:text[a-z]*|mbox|mathrm|hbox)\s*\{[^{}]*\})+")
_LETTERS = frozenset("abcdfghjklmnopqrstuvwxyzABCDFGHIJKLMNOPQRSTUVWXYZ")
_CANCELLING = r"\\(?:sin|cos|tan|cot|sec|csc|log|ln|sum|int)|/|frac|-"  # may remove a variable
_OPEN, _CLOSE = "([{", ")]}"


class Verdict(NamedTuple):
    """correct: by the rules of docs/math_evaluation.md. published: by the rules of published numbers, which also accept
    whole numbers and fractions that are off by a ten thousandth, and every number that is off by a factor of 100."""

    correct: bool
    published: bool


class Rules(NamedTuple):
    """exact: whole numbers and fractions must be equal, and only numbers with a decimal point may be near.
    factors: the answer may be the gold answer times any of these. words: letters are words in any case, no product.
    """

    exact: bool = True
    factors: tuple[int | Fraction, ...] = (1,)
    words: bool = False


class Grader:
    """Compares answers. It owns the process of `Symbolic`, so close it.

    not_compared: comparisons that the graded answers needed and that ended the process; it does not depend on what
    was graded before.
    """

    def __init__(self, symbolic: Symbolic | None = None):
        self.symbolic = symbolic or Symbolic()
        self.not_compared = 0
        self._lost: set[tuple[str, str, How]] = set()  # of the present answer

    def close(self) -> None:
        self.symbolic.close()

    def grade(self, answer: str, gold: str, percent: bool | None = None) -> Verdict:
        """The verdict about an answer as it was written.

        percent: whether the question asks for percent; None if it is unknown. Then, and if it does, 0.5 and 50% are
        equal: the percent sign of only one of the two is taken at its word.
        """
        other = normalise(gold, names=True)
        one = normalise(answer, thousands="," not in other, names=True)
        if not one or not other:
            return Verdict(False, False)
        self._lost.clear()
        signs = [bool(re.search(r"%|per ?cent", text)) for text in (answer, gold)]
        factors = (1,) if percent is False or signs[0] == signs[1] else (1, 100 if signs[0] else Fraction(1, 100))
        words = any(_TEXT_ONLY.fullmatch(text) and "{" in text for text in (answer, gold))
        correct = self.equal(one, other, Rules(True, factors, words))
        published = correct or self.equal(one, other, Rules(False, (1, 100, Fraction(1, 100)), words))
        self.not_compared += len(self._lost)
        return Verdict(correct, published)

    def equal(self, one: str, other: str, rules: Rules, depth: int = 0) -> bool:
        """Whether two normalised answers are equal."""
        one, other = _unnamed(without_parentheses(one), without_parentheses(other))
        if one == other:
            return True
        if not one or not other:  # a part of a list, as in "(1,2),,(3,4)"
            return False
        numbers = number(one), number(other)
        if numbers[0] and numbers[1]:
            return same_numbers(numbers[0], numbers[1], rules)
        times = time_of_day(one), time_of_day(other)
        if times[0] and times[1]:
            return times[0] == times[1]
        if depth == DEEPEST or not (balanced(one) and balanced(other)):
            return False
        for text in (one, other):  # a word, or a numeral in a base, is no product of variables
            known = _WORD.fullmatch(text) or _NUMERAL.fullmatch(text) or text.lower() in _SHORT_WORDS
            if known or (rules.words and text.isalpha()):
                return one.lower() == other.lower()
        for kind in (self._variables, self._unordered, self._relations, self._ordered):
            verdict = kind(one, other, rules, depth + 1)
            if verdict is not None:
                return verdict
        near = any(value and not value.exact for value in numbers)
        return self._same_expressions(one, other, "near" if near else "equal")

    def _variables(self, one: str, other: str, rules: Rules, depth: int) -> bool | None:
        """Conditions on a variable: x>=6 is [6,oo), and x<2 or x>3 a union of two. Values of variables: x=1,y=-2 is
        (x,y)=(1,-2), in any order, and (1,-2). None if the answers are neither."""
        texts = (one, other)
        limits = [condition(text) for text in texts]
        if any(limits) and all(found or text[0] in "([" for found, text in zip(limits, texts, strict=True)):
            if limits[0] and limits[1] and limits[0][0] != limits[1][0]:  # of different variables
                return False
            intervals = [found[1] if found else text for found, text in zip(limits, texts, strict=True)]
            return self.equal(intervals[0], intervals[1], rules, depth)
        named = [assignments(text) for text in texts]
        if named[0] and named[1]:
            if named[0].keys() != named[1].keys():
                return False
            return all(self.equal(value, named[1][name], rules, depth) for name, value in named[0].items())
        values = [list(found.values()) if found else enclosed(text) for found, text in zip(named, texts, strict=True)]
        if any(named) and len(values[0]) == len(values[1]):
            return all(self.equal(a, b, rules, depth) for a, b in zip(*values, strict=True))
        return None

    def _unordered(self, one: str, other: str, rules: Rules, depth: int) -> bool | None:
        """Unions, and lists and sets: 1,2 and {2,1}; None if the answers are neither."""
        both = [parts(text, r"\cup") for text in (one, other)]
        if max(map(len, both)) > 1:
            both = [pieces if len(pieces) > 1 else parts(pieces[0], ",") for pieces in both]  # [1,2] or [3,4]
        elif any(len(parts(text, ",")) > 1 or is_set(text) or r"\pm" in text for text in (one, other)):
            both = [members(text) for text in (one, other)]
        else:
            return None
        ones, left = both
        if len(ones) != len(left) or len(ones) > MOST_PARTS:
            return False
        for part in ones:
            place = next((place for place, text in enumerate(left) if self.equal(part, text, rules, depth)), None)
            if place is None:
                return False
            del left[place]
        return True

    def _relations(self, one: str, other: str, rules: Rules, depth: int) -> bool | None:
        """Equations and chains of inequalities, which may be turned; None if the answers are neither.

        Two equations are equal if their differences lhs - rhs are, up to the sign; of several variables, up to a
        factor. An equation is equal to a value if it ends with it and says nothing of a variable."""
        both = [parts(text, "=") for text in (one, other)]
        if all(len(sides) == 2 for sides in both):
            first, second = (f"{left}-({right})" for left, right in both)
            if len(_letters(first)) > 1:
                return self._same_expressions(first, second, "proportional")
            return any(self._same_expressions(text, second) for text in (first, f"-({first})"))
        if any(len(sides) > 1 for sides in both):
            values = [len(sides) == 1 or not re.search(r"[a-zA-Z]", sides[0]) or _is_name(sides[0]) for sides in both]
            return all(values) and self.equal(both[0][-1], both[1][-1], rules, depth)
        (sides, signs), (others, other_signs) = relations(one), relations(other)
        if not signs and not other_signs:
            return None
        return signs == other_signs and all(self.equal(a, b, rules, depth) for a, b in zip(sides, others, strict=True))

    def _ordered(self, one: str, other: str, rules: Rules, depth: int) -> bool | None:
        """Tuples and intervals: the same brackets, and equal parts in order. Matrices: equal cells. None if the answers
        are neither."""
        inner = [enclosed(text) for text in (one, other)]
        if any(len(found) > 1 for found in inner):
            if one[0] + one[-1] != other[0] + other[-1] or len(inner[0]) != len(inner[1]):
                return False
            return all(self.equal(a, b, rules, depth) for a, b in zip(*inner, strict=True))
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

    def _same_expressions(self, one: str, other: str, how: How = "equal") -> bool:
        if max(len(one), len(other)) > LONGEST_SYMBOLIC or not all(_readable(text) for text in (one, other)):
            return False
        if _letters(one) != _letters(other) and not re.search(_CANCELLING, one + other):
            return False
        if len(self._lost) >= MOST_LOST:
            return False
        pair = (_for_parser(one), _for_parser(other), how)
        same = self.symbolic.same(*pair)
        if same is None:
            self._lost.add(pair)
        return bool(same)


class Number(NamedTuple):
    value: Fraction
    exact: bool  # written without a point and without a power of ten


def number(text: str) -> Number | None:
    """A number in digits, with a power of ten, as a fraction, a mixed number or a repeating decimal; or None."""
    if found := _NUMBER.fullmatch(text):
        sign, whole, decimals, power, exponent = found.groups()
        value = Fraction(whole + (decimals or "")) * Fraction(10) ** int(power or exponent or 0)
        return Number(-value if sign else value, decimals is None and power is None and exponent is None)
    if found := _FRACTION.fullmatch(text):
        sign, whole, inner_sign, numerator, denominator = found.groups()
        if int(denominator) and not (whole and inner_sign):
            value = int(whole or 0) + Fraction(int(numerator), int(denominator))
            return Number(-value if bool(sign) != bool(inner_sign) else value, True)
    if found := _REPEATING.fullmatch(text):
        sign, whole, once, period = found.groups()
        value = Fraction(
            int(whole + once + period or 0) - int(whole + once or 0), (10 ** len(period) - 1) * 10 ** len(once)
        )
        return Number(-value if sign else value, True)
    return None


def same_numbers(one: Number, other: Number, rules: Rules) -> bool:
    """Whether the first is within a relative `TOLERANCE` of the second times one of the factors."""
    for factor in rules.factors:
        wanted = other.value * factor
        if one.value == wanted:
            return True
        if rules.exact and one.exact and other.exact:
            continue
        if abs(one.value - wanted) <= Fraction(TOLERANCE) * max(abs(one.value), abs(wanted)):
            return True
    return False


def time_of_day(text: str) -> tuple[int, str] | None:
    """Seconds, and 'day' where they are those of a day; 2:30 alone may be a time of night, or no time at all."""
    text = {"noon": "12pm", "12noon": "12pm", "midnight": "12am", "12midnight": "12am"}.get(text.lower(), text)
    found = _TIME.fullmatch(text)
    if not found or not (found[2] or found[4]):
        return None
    hour, minute, second = (int(part or 0) for part in found.groups()[:3])
    if minute > 59 or second > 59 or (found[4] and not 1 <= hour <= 12):
        return None
    hour = hour % 12 + 12 * (found[4] == "pm") if found[4] else hour
    return 3600 * hour + 60 * minute + second, "day" if found[4] or hour == 0 or 12 < hour < 24 else ""


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
    """The parts within one pair of parentheses or brackets; [] if the text is not in one."""
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


def condition(text: str) -> tuple[str, str] | None:
    """A variable and the interval, or union of intervals, that inequalities leave to it; None for anything else.

    x>=6 is ('x', '[6,\\infty)'); x<2,x>3 is a union, and x>2,x<3 an interval.
    """
    builder = _BUILDER.fullmatch(text)
    pieces = parts(builder[1] if builder else text, ",")
    names, intervals = set[str](), []  # brackets and ends
    for piece in pieces:
        sides, signs = relations(piece)
        if len(signs) == 1 and _is_name(sides[0]) != _is_name(sides[1]):  # x<3 is -oo<x<3
            if _is_name(sides[0]):
                sides, signs = [r"-\infty", *sides], ["<", *signs]
            else:
                sides, signs = [*sides, r"\infty"], [*signs, "<"]
        if len(sides) != 3 or not re.search("[a-zA-Z]", sides[1]) or _letters(sides[0] + sides[2]):
            return None
        low, name, high = sides
        names.add(name)
        if r"\ne" in signs:
            bound = low if signs[0] == r"\ne" else high
            intervals += [("(", r"-\infty", bound, ")"), ("(", bound, r"\infty", ")")]
        else:
            closed = [sign == r"\le" and "infty" not in end for sign, end in zip(signs, (low, high), strict=True)]
            intervals.append(("[" if closed[0] else "(", low, high, "]" if closed[1] else ")"))
    if len(names) != 1:
        return None
    if len(intervals) == 2:  # conditions that overlap hold together: x>2 and x<3
        below, above = sorted(intervals, key=lambda interval: "infty" in interval[2])
        end, start = number(below[2]), number(above[1])
        if "infty" in below[1] and "infty" in above[2] and end and start and start.value < end.value:
            intervals = [(*above[:2], *below[2:])]
    return names.pop(), r"\cup".join(f"{left}{low},{high}{right}" for left, low, high, right in intervals)


def assignments(text: str) -> dict[str, str] | None:
    """The values of x=1,y=2 or (x,y)=(1,2); None for anything else.

    Values of neighbours in the alphabet come in its order, others as they are written: (m,b) is the point of m=1,b=2.
    """
    sides = parts(text, "=")
    if len(sides) == 2:
        names, values = map(enclosed, sides)
        return dict(zip(names, values, strict=True)) if len(names) == len(values) > 1 else None
    pairs = [_named(part) for part in parts(text, ",")]
    found = {pair[0]: pair[1] for pair in pairs if pair}
    if len(found) < max(len(pairs), 2):
        return None
    ordered = sorted(found)
    neighbours = "".join(ordered) in "abcdefghijklmnopqrstuvwxyz"
    return {name: found[name] for name in ordered} if neighbours else found


def _is_name(text: str) -> bool:
    return bool(re.fullmatch(NAME, text)) and text not in (r"\pi", r"\infty", r"\emptyset", "e")


def _named(text: str) -> tuple[str, str] | None:
    """Name and value of x=5 and of 5=x."""
    sides = parts(text, "=")
    if len(sides) != 2 or not all(sides):
        return None
    if _is_name(sides[0]):
        return sides[0], sides[1]
    return (sides[1], sides[0]) if _is_name(sides[1]) else None


def _unnamed(one: str, other: str) -> tuple[str, str]:
    """Both values, where they have the same name or only one has one: x=5 and 5, but not x=5 and y=5."""
    names = _named(one), _named(other)
    if names[0] and names[1]:
        return (names[0][1], names[1][1]) if names[0][0] == names[1][0] else (one, other)
    if names[0] and "=" not in other:
        return names[0][1], other
    if names[1] and "=" not in one:
        return one, names[1][1]
    return one, other


def _readable(text: str) -> bool:
    """Whether a text is a formula: ASCII, a digit or a letter, brackets that close, and neither a word nor "1 2"."""
    formula = re.search(r"[0-9a-zA-Z]", text) and not re.search(r"[^\x20-\x7e]|\d \d", text)
    return bool(formula) and balanced(text) and not _HAS_WORD.search(text)


def _letters(text: str) -> frozenset[str]:
    """The letters outside of commands, without i and e."""
    return _LETTERS & set(re.sub(r"\\[a-zA-Z]+", "", text))


def _for_parser(text: str) -> str:
    """x(x+1) is a product, unless the letter is one that functions have."""
    return re.sub(r"(?<![a-zA-Z\\{])([a-eijk-zA-Z])\(", r"\1\\cdot(", text)

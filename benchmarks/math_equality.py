"""Which library should say whether two answers are equal: MATH's gold answers, written in other ways and changed.

Every gold answer is written in other ways, by rules that keep its value, and changed a little, by rules that do not.
A good grader accepts all of the first and none of the second, whatever it is given, and lets nothing be evaluated.

    python benchmarks/math_equality.py --data=folder --golds=1000

`slm_jax` is the grader of `solve`; `math-verify` its parse and verify on the same texts; `sympy` its parse_expr, which
evaluates Python, behind a rewriting of LaTeX by regular expressions.
"""

import argparse
import contextlib
import logging
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from slm_jax.data.readers import records
from slm_jax.evaluate.math.equality import Grader

SECONDS = 5  # for one pair

_INTEGER_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_ROOT = re.compile(r"(?<![\d^])(\d+) ?\\sqrt\{(\d+)\}")
_PI = re.compile(r"(?<![\d^c])(\d+) ?\\pi(?!\^)")
_TERM = r"(?:\d+|[a-z]|\d+ ?[a-z]|\d*[a-z]\^\d|\d* ?\\sqrt\{\d+\}|\d* ?\\pi)"
_SUM = re.compile(rf"({_TERM}) ([+-]) ({_TERM})")
_POINT = re.compile(r"\(([^,()]+),([^,()]+)\)")


def golds(folder: str) -> list[str]:
    """The different gold answers of MATH, training and test."""
    found: dict[str, None] = {}
    for name in ("math_train.jsonl.gz", "math_test.jsonl.gz"):
        for record in records(str(Path(folder) / name), ()):
            assert record.fields is not None
            found[record.fields["answer"].strip()] = None
    return [gold for gold in found if gold]


def equivalents(gold: str) -> Iterator[tuple[str, str]]:
    """(rule, another way of writing it)."""
    if found := _INTEGER_FRACTION.fullmatch(gold):
        sign, numerator, denominator = found[1], int(found[2]), int(found[3])
        yield "slash", f"{sign}{numerator}/{denominator}"
        yield "minus inside", f"\\frac{{{sign}{numerator}}}{{{denominator}}}"
        if denominator and len(str(float(Fraction(numerator, denominator)))) < 8:
            yield "decimal", f"{sign}{float(Fraction(numerator, denominator))}"
    if _INTEGER_FRACTION.search(gold):
        doubled = _INTEGER_FRACTION.sub(lambda m: f"{m[1]}\\frac{{{2 * int(m[2])}}}{{{2 * int(m[3])}}}", gold)
        yield "not reduced", doubled
        yield "displayed", re.sub(r"\\[dt]?frac", r"\\dfrac", gold)
    if _ROOT.search(gold):
        yield "into the root", _ROOT.sub(lambda m: f"\\sqrt{{{int(m[1]) ** 2 * int(m[2])}}}", gold)
        yield "root first", _ROOT.sub(r"\\sqrt{\2} \\cdot \1", gold)
    if _PI.search(gold):
        yield "pi first", _PI.sub(r"\\pi \\cdot \1", gold)
    if found := _SUM.fullmatch(gold):
        yield "turned", f"{found[3]} + {found[1]}" if found[2] == "+" else f"-{found[3]} + {found[1]}"
    if found := re.fullmatch(r"(\d*)\(([^()]*)\)\(([^()]*)\)", gold):
        yield "factors turned", f"{found[1]}({found[3]})({found[2]})"
    if gold[0] in "([" and gold[-1] in ")]" and "\\" not in gold:
        yield "sized", f"\\left{gold[:-1]}\\right{gold[-1]}"
    if "pmatrix" in gold:
        yield "square matrix", gold.replace("pmatrix", "bmatrix")
    if re.fullmatch(r"-?\d+", gold):
        yield "point zero", f"{gold}.0"
        yield "named", f"x = {gold}"
        if len(gold.lstrip("-")) > 3 and not gold.startswith("0"):
            yield "commas", f"{int(gold):,}"
    if gold.count("=") == 1 and len(gold.split("=")[0].strip()) > 3 and "text" not in gold:
        yield "sides turned", " = ".join(reversed(gold.split("=")))


def near_misses(gold: str) -> Iterator[tuple[str, str]]:
    """(rule, something near it that is not equal)."""
    digits = list(re.finditer(r"\d+", gold))
    if digits and not re.search("text|mbox|approx", gold):
        at = digits[0 if "." in gold else len(gold) % len(digits)]
        for rule, change in (("one more", 1), ("one less", -1)):
            other = str(abs(int(at[0]) + change)).zfill(len(at[0]) if at[0][0] == "0" else 0)
            near = "." in gold and int(at[0]) > 999  # decimals may be a ten thousandth off
            if int(other) != int(at[0]) and not near and not (int(at[0]) == 0 and "." not in gold):
                yield rule, gold[: at.start()] + other + gold[at.end() :]
        if "." not in gold and int(at[0]):
            yield "ten times", gold[: at.start()] + at[0] + "0" + gold[at.end() :]
    if re.match(r"[\d\\]", gold) and not re.search(r"text|mbox|begin|left|pm|[()=,+:{_]|.-", gold) and gold != "0":
        yield "sign", f"-{gold}"
    if (found := _INTEGER_FRACTION.fullmatch(gold)) and found[2] != found[3]:
        yield "upside down", f"{found[1]}\\frac{{{found[3]}}}{{{found[2]}}}"
    if (found := _POINT.fullmatch(gold)) and found[1].strip() != found[2].strip():
        yield "turned", f"({found[2]},{found[1]})"
    if re.fullmatch(r"\([^()]*,[^()]*\)", gold):
        yield "closed", f"[{gold[1:]}"
    if "\\sqrt{" in gold and "\\sqrt{1}" not in gold:
        yield "no root", gold.replace("\\sqrt{", "{", 1)
    if re.search(r"\d ?\\pi", gold):
        yield "no pi", gold.replace("\\pi", "", 1)
    if re.fullmatch(r"[^=y]*(?<![a-zA-Z\\])x(?![a-zA-Z])[^=y]*", gold) and "\\in" not in gold:
        yield "other variable", re.sub(r"(?<![a-zA-Z\\])x(?![a-zA-Z])", "y", gold)
    if " + " in gold:
        yield "minus", gold.replace(" + ", " - ", 1)


def pairs(gold: str) -> Iterator[tuple[str, str, bool]]:
    """(rule, answer, whether it equals the gold)."""
    for rule, answer in equivalents(gold):
        if answer != gold:
            yield rule, answer, True
    for rule, answer in near_misses(gold):
        if answer != gold:
            yield rule, answer, False


def math_verify_says() -> Callable[[str, str], bool]:
    import math_verify

    logging.disable()
    read = [math_verify.LatexExtractionConfig()]

    def same(gold: str, answer: str) -> bool:
        both = [math_verify.parse(f"${text}$", read, parsing_timeout=0) for text in (gold, answer)]  # type: ignore
        return math_verify.verify(both[0], both[1], timeout_seconds=0)

    return same


def sympy_says() -> Callable[[str, str], bool]:
    import sympy
    from sympy.parsing import sympy_parser

    rules = (*sympy_parser.standard_transformations, sympy_parser.implicit_multiplication_application)

    def read(text: str) -> Any:
        text = re.sub(r"\\left|\\right|\\%|\^\\circ", "", text)
        for _ in range(3):
            text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
            text = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", re.sub(r"\^\{([^{}]*)\}", r"^(\1)", text))
        text = text.replace("\\pi", " pi ").replace("\\cdot", "*").replace("\\infty", " oo ").replace("^", "**")
        if "\\" in text or "__" in text:
            raise ValueError(f"not rewritten: {text}")
        return sympy_parser.parse_expr(text, transformations=rules)

    def same(gold: str, answer: str) -> bool:
        both = [read(text) for text in (gold, answer)]
        if any(isinstance(value, tuple) for value in both):
            return len(both[0]) == len(both[1]) and all(sympy.simplify(a - b) == 0 for a, b in zip(*both, strict=True))
        return sympy.simplify(both[0] - both[1]) == 0

    return same


class _TooLong(BaseException):
    pass


def _end(*_: Any) -> None:
    raise _TooLong


def measure(
    name: str,
    same: Callable[[str, str], bool],
    asked: Sequence[tuple[str, str, str, bool]],
    close: Callable[[], None] = lambda: None,
) -> None:
    """Prints what is accepted of both kinds, and the time; and what was wrong, by rule."""
    wrong: dict[str, list[tuple[str, str]]] = {}
    accepted = {True: 0, False: 0}
    same("x+1", "1+x")  # starts what takes its time to start
    begin, signal_before = sum(os.times()[:4]), signal.signal(signal.SIGALRM, _end)
    for rule, gold, answer, equal in asked:
        said = False
        signal.alarm(SECONDS)
        with contextlib.suppress(Exception, _TooLong):
            said = same(gold, answer)
        signal.alarm(0)
        accepted[equal] += said
        if said is not equal:
            wrong.setdefault(f"{rule} {'refused' if equal else 'accepted'}", []).append((gold, answer))
    signal.signal(signal.SIGALRM, signal_before)
    total = {kind: sum(equal is kind for *_, equal in asked) for kind in (True, False)}
    close()
    milliseconds = 1000 * (sum(os.times()[:4]) - begin) / len(asked)
    print(f"{name}: accepts {accepted[True]} of {total[True]} equal ones, {accepted[False]} of {total[False]} others")
    print(f"    {milliseconds:.1f} ms of processor time a pair")
    for rule, examples in sorted(wrong.items(), key=lambda item: -len(item[1])):
        print(f"    {rule}: {len(examples)}, such as {examples[0][0]!r} and {examples[0][1]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of math_train.jsonl.gz and math_test.jsonl.gz")
    parser.add_argument("--golds", type=int, default=1000, help="how many gold answers, drawn at random")
    arguments = parser.parse_args()
    chosen = random.Random(0).sample(golds(arguments.data), arguments.golds)
    asked = [(rule, gold, answer, equal) for gold in chosen for rule, answer, equal in pairs(gold)]
    grader = Grader()
    measure("slm_jax", lambda gold, answer: grader.grade(answer, gold).correct, asked, grader.close)
    for name, make in (("math-verify", math_verify_says), ("sympy", sympy_says)):
        try:
            same = make()
        except ImportError:
            print(f"{name}: skipped, not installed")
            continue
        measure(name, same, asked)


if __name__ == "__main__":
    main()

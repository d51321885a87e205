"""What counts as equal, on written cases and on MATH's gold answers; and that no text harms the grader."""

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slm_jax.evaluate.math.answers import LONGEST, extract
from slm_jax.evaluate.math.equality import Grader, Verdict, balanced, number, parts, relations
from slm_jax.evaluate.math.symbolic import Symbolic

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    grader = Grader()
    yield grader
    grader.close()


EQUAL = [
    # numbers
    ("1,234", "1234"),
    ("18.00", "18"),
    ("0.33333", "1/3"),
    ("1.5", r"\frac32"),
    (r"1\frac12", "1.5"),
    (r"4.5\times 10^{33}", "4.5e33"),
    (r"50\%", "0.5"),
    ("33.3%", r"\frac{333}{1000}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{4}{8}", r"\frac{1}{2}"),
    (r"\sqrt{2}", "1.41421"),
    # lists and sets, in any order
    (r"\{1, 2\}", "2, 1"),
    (r"3 \pm \sqrt{2}", r"3-\sqrt2, 3+\sqrt2"),
    (r"45^\circ,135^\circ", r"45^\circ, 135^\circ"),
    # tuples, intervals, unions
    (r"\left( \frac{1}{2}, 3 \right)", "(0.5,3)"),
    (r"(-\infty, 3]", "(-oo,3]"),
    (r"[0,1) \cup (2,3)", r"(2,3)\cup[0,1)"),
    (r"x \in [-2, 7]", "[-2,7]"),
    # matrices
    (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{bmatrix}0.5\\2\\\end{bmatrix}"),
    # equations and inequalities
    ("x = 5", "5"),
    ("y=2x+3", "y = 3 + 2x"),
    ("x^2+y^2=4", "4=y^2+x^2"),
    ("2x-y+3=0", "y-2x-3=0"),
    ("2+3=5", "5"),
    ("x>3", "3<x"),
    (r"-2 \le x \leq 5", r"5 \geq x \geq -2"),
    # symbols
    ("x(x+2)", "x^2+2x"),
    (r"\frac{x+2}{7}", r"\frac{x}{7} + \frac{2}{7}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
    ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}"),
    ("2*x**3", "2x^3"),
    ("-5i+6", "6 - 5i"),
    ("(1+i)(1-i)", "2"),
    (r"e^{i\pi}", "-1"),
    (r"\sin^2 x+\cos^2 x", "1"),
    ("0.5x", r"\frac{x}{2}"),
    (r"\binom{5}{2}", "10"),
    ("5!", "120"),
    # words
    (r"\text{Sunday}", "sunday"),
    ("24_{5}", "24_5"),
]
DIFFERENT = [
    ("", "5"),
    ("5", ""),
    ("0.333", "1/3"),
    ("10000", "10001"),
    (r"\frac{10000}{10001}", r"\frac{9999}{10000}"),
    ("50", "0.5"),
    (r"\frac{1}{2^{98}}", r"-\frac{1}{2^{98}}"),
    (r"10^{-20}", r"2 \cdot 10^{-20}"),
    ("24_5", "24_6"),
    ("-24_5", "-24_50"),
    ("05:00", "-05:00"),
    ("2:30 a.m.", "2:30 p.m."),
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    (r"[-\infty,2)", r"(-\infty,2)"),
    ("(1,2)", "(1,2,3)"),
    ("1,2", "1,2,2"),
    (r"[0,1)\cup(2,3)", "[0,1)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    ("2x=5", "5"),
    ("2x+1=5", "x+1=5"),
    ("x<3", r"x \le 3"),
    ("x<3", "x>3"),
    ("x", "X"),
    ("x+1", "y+1"),
    (r"\sqrt{x^2}", "x"),
    (r"\frac{1}{0}", r"\frac{2}{0}"),
    ("Monday", "Sunday"),
    ("none", "0"),
    (r"1.414x", r"\sqrt{2}x"),
    ("5+", "5"),
    ("((5", "5+0"),
    # a part is missing
    (r"(2,12)\cup", r"(2,12)\cup(12,102)"),
    (",(3,4)", "(1,2),(3,4)"),
    ("(1,2),,(3,4)", "(1,2),(3,4),(5,6)"),
    (r"\pm", "(1,2),(3,4)"),
    (r"\begin{pmatrix}(1,2)&\end{pmatrix}", r"\begin{pmatrix}(1,2)&(3,4)\end{pmatrix}"),
]


@pytest.mark.parametrize("one, other", EQUAL)
def test_equal(grader, one, other):
    assert grader.grade(one, other).correct and grader.grade(other, one).correct


def test_a_comma_means_what_it_means_in_the_gold_answer(grader):
    assert grader.grade("45,135", r"45^\circ, 135^\circ").correct and not grader.grade("45,136", "45135").correct
    assert grader.grade("45,135", "45135").correct and grader.grade("45,135", "45,135").correct


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_different(grader, one, other):
    assert not grader.grade(one, other).correct and not grader.grade(other, one).correct


def test_published_rules_are_looser_and_nothing_else(grader):
    """Whole numbers and fractions a ten thousandth off, and anything 100 times off."""
    for one, other in (
        ("10000", "10001"),
        ("50", "0.5"),
        ("1800", "18"),
        (r"\frac{10000}{10001}", "1"),
        ("(1,50)", "(1,0.5)"),
    ):
        assert grader.grade(one, other) == Verdict(correct=False, published=True)
    assert grader.grade("1000", "1001") == grader.grade("x+1", "x+2") == Verdict(False, False)
    assert grader.grade("0.5", "50%", percent=True).correct and not grader.grade("0.5", "51%", percent=True).published
    assert grader.grade("0.5", "50", percent=True) == Verdict(correct=False, published=True)
    assert grader.grade("0.5", "50%", percent=False) == Verdict(correct=False, published=True)


def test_golds_written_in_other_ways_and_near_misses(grader, monkeypatch):
    """All of the first are right and none of the second, of 400 gold answers of MATH."""
    if not REAL.exists():
        pytest.skip(f"{REAL} is not here")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import math_equality

    wrong, count = [], {True: 0, False: 0}
    for gold in random.Random(1).sample(math_equality.golds(str(REAL)), 400):
        for rule, answer, equal in math_equality.pairs(gold):
            count[equal] += 1
            if grader.grade(answer, gold).correct is not equal:
                wrong.append((rule, gold, answer))
    sys.modules.pop("math_equality")
    assert not wrong
    assert count[True] > 500 and count[False] > 1200
    assert grader.symbolic.lost == 0


NUMBERS = ["18", "-7", "3.5", "120", "1,000", "42", "7", "99"]
PARTED = [
    *("(1,2),(3,4)", r"(2,12)\cup(12,102)", r"(-\infty,0]\cup[1,3)\cup(5,\infty)", r"\{(1,2),(3,4)\}", "1,2,-3"),
    *("(1,2),(3,4),(5,6)", r"(1\pm\sqrt{2},3)", "[0,1)", r"((1,2),3)", r"\begin{pmatrix}(1,2)&3\\4&(5,6)\end{pmatrix}"),
]
SEEDS = [text for pair in EQUAL + DIFFERENT for text in pair] + NUMBERS * 40 + PARTED * 16
SIGNS = r"0123456789+-*/^_=<>()[]{}\$%,.:;! &|~abcxyzinE" + "\n\t\x00√π∞½"
PIECES = (
    r"\frac{ \sqrt{ \left( \begin{pmatrix} \end{pmatrix} \cup \pm \text{ ^{ \pi \infty \boxed{ ** 9**9**9 !!!! \le "
    r"\cdot \overline{ \log \sum_{i=1}^{ \int \binom{99}{ e^ (((( }}}} __import__('os') \lim_{x\to0}"
).split()


def mutated(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 4)):
        begin = rng.randint(0, len(text))
        end = rng.randint(begin, min(len(text), begin + rng.choice([3, 3, 12])))
        middle = rng.choice(["", ",", rng.choice(SIGNS), rng.choice(PIECES), 2 * text[begin:], rng.choice(SEEDS)])
        text = text[:begin] + middle + text[end:]
    return text


def test_ten_thousand_mutated_strings_neither_crash_nor_hang():
    rng, grader = random.Random(0), Grader(Symbolic(seconds=0.5))
    for number_ in range(10_000):
        gold = rng.choice(SEEDS)
        text = rng.choice(["The answer is ", r"\boxed{", ""]) + mutated(rng, gold)
        verdict = grader.grade(extract(text), gold)
        assert verdict in (Verdict(True, True), Verdict(False, True), Verdict(False, False)), (number_, text)
    assert grader.symbolic.lost <= 30
    grader.close()


@pytest.mark.parametrize(
    "sign", ["9", "(", "{", "\\frac", "^", ",", "[1,", "\\{", "x=", "-", "a ", "\\text{", ".", "1,000"]
)
def test_long_strings_of_one_kind(grader, sign):
    for count in (LONGEST // len(sign), 20_000 // len(sign)):
        assert not grader.grade(extract(sign * count), "7").published
        assert not grader.grade(sign * count, r"\frac{x}{7}").published


def test_what_explodes_costs_its_time_and_no_more():
    """The process that computes it is ended by the kernel, and the next question finds another one."""
    grader = Grader(Symbolic(seconds=0.5))
    assert not grader.grade("9^{9^{9^{9}}}x", "x+3").published
    assert grader.symbolic.lost >= 1
    assert grader.grade("3+x", "x+3").correct
    lost = grader.symbolic.lost
    bombs = ",".join(f"9^{{9^{{9^{{{digit}}}}}}}x" for digit in range(5, 9))
    assert not grader.grade(bombs, "x+1,x+2,x+3,x+4").published
    assert grader.symbolic.lost - lost <= 3  # it gives up, however many there are
    assert grader.grade("4+x", "x+4").correct
    grader.close()


def test_a_killed_process_is_replaced(grader):
    assert grader.grade("x+11", "11+x").correct
    process = grader.symbolic._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    grader.grade("x+12", "12+x")
    assert grader.grade("x+13", "13+x").correct
    assert grader.symbolic._process is not process


def test_an_interrupted_comparison_leaves_no_answer_for_the_next(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    symbolic = Symbolic()
    with monkeypatch.context() as patch:
        patch.setattr("slm_jax.evaluate.math.symbolic.select.select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            symbolic.same("x+1", "1+x")
    assert symbolic._process is None
    assert not symbolic.same("x+1", "x+2") and symbolic.same("x+1", "1+x")
    symbolic.close()


def test_no_text_is_evaluated(tmp_path):
    """What Python would run is refused as it is by the parser, and would be if it were let through."""
    target = tmp_path / "touched"
    symbolic = Symbolic()
    for attack in (
        f"__import__('os').system('touch {target}')",
        f'open("{target}", "w")',
        rf"\text{{__import__('os').mkdir('{target}')}}",
        rf"\operatorname{{__import__('os').mkdir('{target}')}}(x)",
        f"x_{{__import__('os').mkdir('{target}')}}",
        rf"\gcd(__import__('os').mkdir('{target}'), 4)",
    ):
        assert not symbolic.same(attack, "x") and not symbolic.same("x", attack)
        assert not Grader(symbolic).grade(attack, "x").published
    assert not target.exists() and symbolic.lost == 0
    symbolic.close()


@pytest.mark.parametrize(
    "text, value", [("12", 12), ("-1.5", -1.5), (r"\frac{-3}{4}", -0.75), (r"-2\frac{1}{2}", -2.5), ("2e3", 2000)]
)
def test_numbers(text, value):
    found = number(text)
    assert found is not None and float(found.value) == value


@pytest.mark.parametrize("text", ["", "x", r"\frac{1}{0}", "1.2.3", "9e9999999", "9" * 301, "-", "1/2/3"])
def test_no_numbers(text):
    assert number(text) is None


def test_pieces():
    assert parts(r"1,(2,3),\{4,5\},\begin{pmatrix}6,7\end{pmatrix}", ",")[1:3] == ["(2,3)", r"\{4,5\}"]
    assert len(parts(r"1,(2,3),\{4,5\},\begin{pmatrix}6,7\end{pmatrix}", ",")) == 4
    assert balanced("[0,1)") and balanced(r"\{1") and not balanced("(1}") and not balanced("{1") and not balanced(")(")
    assert relations("5>x>2") == (["2", "x", "5"], ["<", "<"])

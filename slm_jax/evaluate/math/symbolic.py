"""Decides in a killable subprocess whether two expressions in LaTeX are the same mathematics.

A model's output is passed to a parser and a computer algebra system, and `9^{9^{9^{9}}}` is an answer like any other.
Both therefore run in a process with little memory, which the kernel ends when a comparison has used up its time; it is
then started again. Nothing in it evaluates Python: the parser is a grammar (latex2sympy2_extended), and the function
of sympy that would evaluate the numbers in it is replaced.

Run as a program, this file is that process: it reads JSON lines `[first, second, how]` and answers each with `true`,
`false` or `null` (an expression is unreadable).
"""

import contextlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

MEMORY_BYTES = 2 << 30
DIGITS = 30  # of values that are compared
PATIENCE = 10  # wall-clock limit as a multiple of the CPU limit, for a busy machine
TOLERANCE = 1e-4

# near: within a relative TOLERANCE. proportional: one is a constant multiple of the other, but for zero.
How = Literal["equal", "near", "proportional"]


class Symbolic:
    """The process, started when it is first needed.

    Args:
        seconds: CPU time for one comparison.
    """

    def __init__(self, seconds: float = 3.0):
        self.seconds = seconds
        self.lost = 0  # comparisons that ended the process: time, memory
        self.refused = 0  # expressions that the parser does not read
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[str, str, How], bool | None] = {}

    def same(self, first: str, second: str, how: How = "equal") -> bool | None:
        """Whether the two are equal; False if the parser cannot read one of them, None if the comparison ended the
        process."""
        question = (first, second, how)
        if question in self._known:
            return self._known[question]
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        answer = ""  # stays empty where the process ends instead of answering
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(question).encode() + b"\n")
                process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], PATIENCE * (self.seconds + 1))
            answer = process.stdout.readline().decode().strip() if ready else ""
        finally:  # also when interrupted: an answer that is left in the pipe would be taken for the next one's
            if not answer:
                self.close()
        self.lost += answer == ""
        self.refused += answer == "null"
        self._known[question] = answer == "true" if answer else None
        return self._known[question]

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-B", os.path.abspath(__file__), str(self.seconds)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert process.stdout
        ready = False
        try:
            ready = process.stdout.readline().strip() == b"ready"
        finally:
            if not ready:
                process.kill()
                process.communicate()
        if not ready:
            raise RuntimeError("the process that compares answers does not start: is math-verify installed?")
        return process


def _serve(seconds: float) -> None:
    """Answers questions until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for kind, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    compare = _comparison()
    compare("x+x", "2x", "equal")  # imports what the first comparison would spend its time on
    print("ready", file=answers)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of CPU; at its end SIGPROF, unhandled, ends the process
        try:
            answer = compare(*json.loads(line))
        except Exception:  # a parser and an algebra system may raise anything
            answer = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers)


def _comparison() -> Callable[[str, str, How], bool]:
    import sympy
    import sympy.physics.units  # simplifying needs it, and it has texts evaluated while it is imported
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy.core import random
    from sympy.parsing import sympy_parser

    def only_numbers(text: str, *_: Any, **__: Any) -> Any:
        if re.fullmatch(r"\d+|\d*\.\d+", text):
            return sympy.Rational(text)
        raise ValueError("texts are not evaluated here")

    # sympify, which the grammar's numbers go through, would have Python evaluate any text.
    sympy_parser.parse_expr = sympy_parser.eval_expr = only_numbers
    conversion = ConversionConfig(lowercase_symbols=False)

    @lru_cache(1000)
    def read(text: str) -> Any:
        found = latex2sympy(text, is_real=False, normalization_config=None, conversion_config=conversion)
        if not isinstance(found, sympy.Expr):
            raise ValueError("not an expression")
        imaginary = [symbol for symbol in found.free_symbols if str(symbol) == "i"]
        return found.subs({symbol: sympy.I for symbol in imaginary})

    def compare(one: str, other: str, how: How) -> bool:
        both = [read(one), read(other)]
        symbols = sorted(both[0].free_symbols | both[1].free_symbols, key=str)
        somewhere = {symbol: sympy.Rational(17 + 5 * i, 13 + 3 * i) for i, symbol in enumerate(symbols)}
        values = [sympy.N(expression.subs(somewhere), DIGITS) for expression in both]
        if any(value.is_number and not value.is_finite for value in values):
            return False
        random.seed(0)  # `equals` tries random values
        if how == "proportional":  # f = c g if and only if f(x) g(p) = g(x) f(p) for one p where neither is zero
            at = [expression.subs(somewhere) for expression in both]
            return (
                not any(abs(value) < TOLERANCE for value in values)
                and (both[0] * at[1]).equals(both[1] * at[0]) is True
            )
        if all(value.is_number for value in values):
            difference, size = abs(values[0] - values[1]), max(map(abs, values))
            if how == "near":
                return not symbols and bool(difference <= TOLERANCE * size)
            if difference > 10.0 ** (5 - DIGITS) * size:
                return False  # most wrong answers end here, before anything is simplified
        return both[0].equals(both[1]) is True

    return compare


if __name__ == "__main__":
    _serve(float(sys.argv[1]))

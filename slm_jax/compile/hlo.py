"""Parses the text of a compiled program (HLO) into instructions, and counts how often each of them runs.

The body of a scan appears once in the text, and XLA's own cost analysis counts it once. Here every instruction comes
with the product of the trip counts of the loops around it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

DTYPE_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}  # the names of others contain their bits: f32, s8, f8e4m3fn


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of an array, as one chip holds it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * DTYPE_BYTES.get(self.dtype, int(bits[0]) / 8 if bits else 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = result opcode(operands), attributes`; operands are names within the same computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str  # the text between the brackets: a constant's value, a parameter's number
    attributes: str
    is_root: bool  # its value is the result of the computation

    def called(self, role: str) -> list[str]:
        """Computations named as `role=%name` or `role={%name, ...}`."""
        found = re.search(rf"\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []

    @property
    def index(self) -> int:
        """The element that a get-tuple-element takes."""
        found = re.search(r"\bindex=(\d+)", self.attributes)
        assert found, self
        return int(found[1])

    @property
    def where(self) -> str:
        """JAX's name of the operation that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else self.name


Computation = dict[str, Instruction]  # by name


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction and how often a run of the program executes it.

    `home` is the computation that contains it, `caller` the one that is scheduled: for an instruction of a fusion, the
    computation that contains the fusion. `counted` is False within a loop whose trip count depends on the data: such a
    loop counts as one iteration.
    """

    instruction: Instruction
    times: int
    home: str
    caller: str
    counted: bool


class Program:
    """A compiled program, parsed from its text."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry, current = "", {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
                continue
            # Layouts contain brackets too, but no type contains a space, a lower-case word and a bracket in a row.
            found = re.match(r"\s{2,}(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)
            if not found:
                continue
            end, depth = found.end(), 1
            while depth and end < len(line):
                depth += {"(": 1, ")": -1}.get(line[end], 0)
                end += 1
            inside = line[found.end() : end - 1]
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            _, name, result, opcode = found.groups()
            is_root = found[1] is not None
            current[name] = Instruction(name, opcode, _arrays(result), operands, inside, line[end:], is_root)

    def executions(self) -> Iterator[Execution]:
        """Every instruction that runs, from the entry down."""
        return self._walk(self.entry, 1, None, True)

    def operands(self, execution: Execution) -> list[Array]:
        """Types of the operands."""
        home = self.computations[execution.home]
        return [array for name in execution.instruction.operands if name in home for array in home[name].result]

    def trip_count(self, loop: Instruction, home: str) -> int | None:
        """Trip count of a `while` in the computation `home`; None if it depends on the data.

        On some platforms XLA writes it down. On others it follows from the loop: one element of its state starts at a
        constant (0 if it comes from further outside), grows by a constant and stays below a constant.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition, body = (self.computations[loop.called(role)[0]] for role in ("condition", "body"))

        # ---- The condition: counter < limit
        test = _root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, limit = (_source(condition, name) for name in test.operands)
        if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
            return None
        place = counter.index

        # ---- The body: what is added to the counter
        step, grown = 0, _source(body, _root(body).operands[place])
        while grown.opcode == "add":
            terms = [_source(body, name) for name in grown.operands]
            constants = [term for term in terms if term.opcode == "constant"]
            if len(constants) != 1:
                return None
            step += int(constants[0].inside)
            grown = next(term for term in terms if term is not constants[0])
        if step < 1 or grown.opcode != "get-tuple-element" or grown.index != place:
            return None

        # ---- Where the counter starts
        carried = _source(self.computations[home], loop.operands[0])
        start = _source(self.computations[home], carried.operands[place]) if carried.opcode == "tuple" else None
        first = int(start.inside) if start and start.opcode == "constant" else 0
        return max(0, -(-(int(limit.inside) - first) // step))

    def _walk(self, home: str, times: int, caller: str | None, counted: bool) -> Iterator[Execution]:
        for instruction in self.computations[home].values():
            yield Execution(instruction, times, home, caller or home, counted)
            if instruction.opcode == "while":
                turns = self.trip_count(instruction, home)
                known, turns = turns is not None, 1 if turns is None else turns
                yield from self._walk(instruction.called("body")[0], times * turns, None, counted and known)
            elif instruction.opcode == "fusion":
                for fused in instruction.called("calls"):
                    yield from self._walk(fused, times, caller or home, counted)
            elif instruction.opcode in ("call", "async-start", "conditional"):  # of a condition, every branch
                for role in ("to_apply", "calls", "branch_computations", "true_computation", "false_computation"):
                    for called in instruction.called(role):
                        yield from self._walk(called, times, None, counted)


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _source(computation: Computation, name: str) -> Instruction:
    """The instruction that computes a value, through copies."""
    instruction = computation[name]
    while instruction.opcode == "copy":
        instruction = computation[instruction.operands[0]]
    return instruction


def _arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, which may be a tuple."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    return tuple(Array(dtype, tuple(int(size) for size in shape.split(",") if size)) for dtype, shape in found)

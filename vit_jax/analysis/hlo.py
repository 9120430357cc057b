"""Parser of XLA's HLO text, `compiled.as_text()`: computations, instructions, loops."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_NUMBER = re.compile(r"(?:[suf]|c)(\d+)")  # f32, u8, f8e4m3fn, f4e2m1fn, c64


def bytes_of(dtype: str) -> float:
    """Bytes of an element, by XLA's name of its type.

    Raises:
      ValueError: no such type.
    """
    match = _NUMBER.match(dtype)
    if dtype not in _BITS and match is None:
        raise ValueError(f"no element type {dtype!r}")
    return (_BITS[dtype] if dtype in _BITS else int(match[1])) / 8


# Attributes with the names of computations that are run.
CALLS = ("calls", "to_apply", "branch_computations", "true_computation", "false_computation")
CALLS += ("called_computations",)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](\{[^}]*\})?")
_NAMES = re.compile(r"%([\w.-]+)")
# A layout in a TPU's fast memory; TPU layouts have tiles, while on a GPU S(1) is something else.
_FAST = re.compile(r"\{[^}]*T\([^}]*S\(1\)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    resident: bool = False  # in a TPU's fast memory, where reading it costs next to nothing

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return 0.0 if self.resident else bytes_of(self.dtype) * self.size

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape op(operands), attributes`."""

    name: str
    shape: str
    op: str
    rest: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The result's arrays; several if it is a tuple."""
        return tuple(
            Array(dtype, tuple(int(n) for n in dims.split(",") if n), bool(_FAST.match(layout)))
            for dtype, dims, layout in _ARRAY.findall(self.shape)
        )

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands."""
        depth = 1
        for end, character in enumerate(self.rest):
            depth += (character in "({") - (character in ")}")
            if not depth:
                return tuple(_NAMES.findall(self.rest[:end]))
        return tuple(_NAMES.findall(self.rest))

    def called(self, *keys: str) -> list[str]:
        """The computations named by any of these attributes."""
        pattern = rf"\b(?:{'|'.join(keys)})=(?:\{{([^}}]*)\}}|(%[\w.-]+))"
        found = re.findall(pattern, self.rest)
        return [name for several, one in found for name in _NAMES.findall(several or one)]

    @property
    def number(self) -> int | None:
        """The integer in a parameter's or constant's parentheses, if it is one."""
        text = self.rest.partition(")")[0]
        return int(text) if re.fullmatch(r"-?\d+", text) else None

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the text after the operands."""
        match = re.search(pattern, self.rest)
        return match and match[1]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and its entry computation."""

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def _named(self) -> dict[str, dict[str, Instruction]]:
        return {
            computation: {each.name: each for each in instructions}
            for computation, instructions in self.computations.items()
        }

    def find(self, computation: str, name: str) -> Instruction | None:
        """Looks up an instruction of a computation by its name."""
        return self._named[computation].get(name)

    def root(self, computation: str) -> Instruction:
        """The root instruction, whose result is the computation's."""
        return next(each for each in self.computations[computation] if each.root)

    def trips(self, loop: Instruction) -> int | None:
        """The trip count of a `while` that counts from zero to a constant; else None."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        (body,), (condition,) = loop.called("body"), loop.called("condition")
        compare = self.root(condition)
        if compare.op != "compare" or compare.attribute(r"direction=(\w+)") != "LT":
            return None
        left, right = (self.find(condition, name) for name in compare.operands[:2])
        if left is None or right is None or right.op != "constant" or right.number is None:
            return None
        update = self.find(body, self.root(body).operands[int(left.attribute(r"index=(\d+)") or 0)])
        while update is not None and update.op == "copy":
            update = self.find(body, update.operands[0])
        step = 1
        if update is not None and update.op == "add":
            added = [self.find(body, name) for name in update.operands[:2]]
            steps = [a.number for a in added if a is not None and a.op == "constant"]
            step = next((n for n in steps if n), 1)
        return -(-right.number // step)

    def launched(
        self, name: str | None = None, times: int = 1, known: bool = True
    ) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Yields (computation, instruction, times a step, whether that count is known).

        Enters loops, calls and all branches of conditionals; loops of unknown length count once.
        """
        name = self.entry if name is None else name
        for each in self.computations.get(name, ()):
            if each.op == "while":
                (body,), trips = each.called("body"), self.trips(each)
                yield from self.launched(body, times * (trips or 1), known and trips is not None)
            elif each.op in ("call", "conditional", "async-start"):
                for called in each.called(*CALLS):
                    yield from self.launched(called, times, known and each.op != "conditional")
            else:
                yield name, each, times, known


def parse(hlo: str) -> Module:
    """Parses a program's HLO text."""
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, ""
    for line in hlo.splitlines():
        if current is None:
            match = _COMPUTATION.match(line)
            if match:
                current = computations.setdefault(match[1], [])
                entry = match[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            root, name, shape, op, rest = match.groups()
            current.append(Instruction(name, shape, op, rest, bool(root)))
    return Module(computations, entry)

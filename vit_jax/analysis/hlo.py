"""A compiled program as XLA writes it, `compiled.as_text()`: computations, instructions, loops."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](\{[^}]*\})?")
_NAMES = re.compile(r"%([\w.-]+)")
_SMALL = re.compile(r"\{[^}]*S\(1\)")  # a layout in a TPU's own memory, beside the large one


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    resident: bool = False  # in a TPU's fast memory, where reading it costs next to nothing

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return 0.0 if self.resident else float(BYTES.get(self.dtype, 0)) * self.size

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
        """What it results in; several arrays where that is a tuple."""
        return tuple(
            Array(dtype, tuple(int(n) for n in dims.split(",") if n), bool(_SMALL.match(layout)))
            for dtype, dims, layout in _ARRAY.findall(self.shape)
        )

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """The names of the instructions that it reads."""
        depth = 1
        for end, character in enumerate(self.rest):
            depth += (character in "({") - (character in ")}")
            if not depth:
                return tuple(_NAMES.findall(self.rest[:end]))
        return tuple(_NAMES.findall(self.rest))

    def called(self, *keys: str) -> list[str]:
        """The computations that it names under one of these attributes."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=\{{?(%[\w.%, -]+)", self.rest)
        return [name for names in found for name in _NAMES.findall(names)]

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in what follows the operands."""
        match = re.search(pattern, self.rest)
        return match and match[1]


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by their names, and which one it starts with."""

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def _named(self) -> dict[str, dict[str, Instruction]]:
        return {
            computation: {each.name: each for each in instructions}
            for computation, instructions in self.computations.items()
        }

    def find(self, computation: str, name: str) -> Instruction | None:
        """An instruction of a computation by its name."""
        return self._named[computation].get(name)

    def root(self, computation: str) -> Instruction:
        """What a computation results in."""
        return next(each for each in self.computations[computation] if each.root)

    def trips(self, loop: Instruction) -> int:
        """How often a `while` runs, where it counts from zero to a constant; 1 where not seen."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        (body,), (condition,) = loop.called("body"), loop.called("condition")
        compare = self.root(condition)
        if compare.op != "compare":
            return 1
        left, right = (self.find(condition, name) for name in compare.operands[:2])
        if left is None or right is None or right.op != "constant":
            return 1
        bound, index = _constant(right), left.attribute(r"index=(\d+)")
        update = self.find(body, self.root(body).operands[int(index or 0)])
        while update is not None and update.op == "copy":
            update = self.find(body, update.operands[0])
        step = 1
        if update is not None and update.op == "add":
            added = [self.find(body, name) for name in update.operands[:2]]
            step = next((_constant(a) for a in added if a is not None and a.op == "constant"), 1)
        return -(-bound // step)

    def launched(self, name: str | None = None, times: int = 1) -> Iterator[tuple]:
        """Yields (computation, instruction, times a step), loops, calls and branches entered."""
        name = self.entry if name is None else name
        for each in self.computations.get(name, ()):
            if each.op == "while":
                (body,) = each.called("body")
                yield from self.launched(body, times * self.trips(each))
            elif each.op in ("call", "conditional", "async-start"):
                for called in each.called(
                    "calls", "to_apply", "branch_computations", "called_computations"
                ):
                    yield from self.launched(called, times)
            else:
                yield name, each, times


def parse(hlo: str) -> Module:
    """Reads a program's text."""
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


def _constant(each: Instruction) -> int:
    return int(each.rest.partition(")")[0])

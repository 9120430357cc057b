"""What a compiled program moves between devices, read from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterable

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_NAMES = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: all-gather, reduce-scatter, all-reduce, collective-permute or all-to-all.
      group: devices that take part together.
      times: how often a step runs it.
      bytes: what each device sends each time, with the ring algorithms that move the least.
    """

    kind: str
    group: int
    times: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str
    root: bool

    def called(self, *keys: str) -> list[str]:
        found = re.findall(rf"\b(?:{'|'.join(keys)})=\{{?(%[\w.%, -]+)", self.rest)
        return [name for names in found for name in _NAMES.findall(names)]


def read_collectives(hlo: str) -> list[Collective]:
    """Returns the collectives of a program's HLO text, `compiled.as_text()`, loops unrolled.

    What hides a collective on TPU is looked through: a fusion of an all-reduce with the slice that
    follows is a reduce-scatter; parts of one that runs beside other work share its channel; a
    product that is summed around a ring is a loop of permutes.

    Raises:
      ValueError: the groups of a collective cannot be read.
    """
    computations, entry = _parse(hlo)
    found: dict[tuple[str, str], Collective] = {}

    def visit(name: str, times: int, fused: bool = False, scattered: bool = False) -> None:
        for each in computations.get(name, ()):
            kind = next((k for k in _KINDS if each.op in (k, f"{k}-start")), None)
            if kind is not None:
                kind = "reduce-scatter" if scattered and kind == "all-reduce" else kind
                channel = re.search(r"channel_id=(\d+)", each.rest)
                key = (kind, channel[1]) if fused and channel else (name, each.name)
                if key not in found:
                    found[key] = _collective(kind, each, times)
            elif each.op == "while":
                (body,), (condition,) = each.called("body"), each.called("condition")
                trips = _trips(each, computations[body], computations[condition])
                visit(body, times * trips)
            elif each.op == "fusion":
                for called in each.called("calls"):
                    visit(called, times, True, called.startswith("all-reduce-scatter"))
            else:
                for called in each.called("calls", "to_apply", "branch_computations"):
                    visit(called, times, fused, scattered)

    visit(entry, 1)
    return list(found.values())


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
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
            current.append(_Instruction(name, shape, op, rest, bool(root)))
    return computations, entry


def _collective(kind: str, each: _Instruction, times: int) -> Collective:
    arrays = [
        _BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(each.shape)
    ]
    if kind == "collective-permute":
        return Collective(kind, 2, times, float(arrays[0]))
    group = _group(each.rest)
    total = float(sum(arrays))
    if kind == "all-gather" and each.op.endswith("-start"):  # the shape lists what goes in as well
        total /= 1 + 1 / group
    if kind == "reduce-scatter" and "reduce-scatter" in each.op:  # what comes out is one part
        total *= group
    passes = 2 if kind == "all-reduce" else 1
    return Collective(kind, group, times, passes * total * (group - 1) / group)


def _group(rest: str) -> int:
    """Devices of a group, of any of the forms in which XLA writes them."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return match[1].count(",") + 1
    match = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", rest)
    if match:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        group = 1
        for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2]):
            group *= int(part) if part else sizes[name]
        return group
    raise ValueError(f"no replica groups in {rest[:200]!r}")


def _trips(loop: _Instruction, body: list[_Instruction], condition: list[_Instruction]) -> int:
    """How often a loop runs, where it counts from zero to a constant; 1 where that is not seen."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(match[1])
    compare = next((each for each in condition if each.root and each.op == "compare"), None)
    if compare is None:
        return 1
    known = {each.name: each for each in condition}
    left, right = (known.get(name) for name in _NAMES.findall(compare.rest)[:2])
    if left is None or right is None or right.op != "constant":
        return 1
    bound, index = _constant(right), re.search(r"index=(\d+)", left.rest)
    known = {each.name: each for each in body}
    root = next(each for each in body if each.root)
    update = known.get(_NAMES.findall(root.rest)[int(index[1]) if index else 0])
    while update is not None and update.op == "copy":
        update = known.get(_NAMES.findall(update.rest)[0])
    step = 1
    if update is not None and update.op == "add":
        added = [known.get(name) for name in _NAMES.findall(update.rest)[:2]]
        step = next((_constant(a) for a in added if a is not None and a.op == "constant"), 1)
    return -(-bound // step)


def _constant(each: _Instruction) -> int:
    return int(each.rest.partition(")")[0])


def by_kind(collectives: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """Returns kind -> (how many a step, bytes that each device sends a step)."""
    totals: dict[str, tuple[int, float]] = {}
    for each in collectives:
        count, size = totals.get(each.kind, (0, 0.0))
        totals[each.kind] = (count + each.times, size + each.times * each.bytes)
    return totals

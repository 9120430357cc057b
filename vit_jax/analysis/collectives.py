"""Communication between devices in a compiled program, read from its HLO text."""

import dataclasses
import re
from collections.abc import Iterable

from vit_jax.analysis.hlo import CALLS, Array, Instruction, bytes_of, parse

_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: all-gather, reduce-scatter, all-reduce, collective-permute or all-to-all.
      group: number of devices in each group.
      times: how often a step runs it.
      bytes: sent by each device each time, with bandwidth-optimal ring algorithms.
    """

    kind: str
    group: int
    times: int
    bytes: float


def read_collectives(hlo: str) -> list[Collective]:
    """Returns the collectives in a program's HLO text, `compiled.as_text()`, with loops unrolled.

    TPU-specific forms are recognised: an all-reduce fused with the following slice is a
    reduce-scatter; the parts of an asynchronous collective share its channel; a product summed
    around a ring is a loop of permutes.

    Raises:
      ValueError: the groups of a collective cannot be read.
    """
    module = parse(hlo)
    found: dict[tuple[str, str], Collective] = {}

    def visit(name: str, times: int, fused: bool = False, scattered: bool = False) -> None:
        for each in module.computations.get(name, ()):
            kind = next((k for k in _KINDS if each.op in (k, f"{k}-start")), None)
            if kind is not None:
                kind = "reduce-scatter" if scattered and kind == "all-reduce" else kind
                channel = re.search(r"channel_id=(\d+)", each.rest)
                key = (kind, channel[1]) if fused and channel else (name, each.name)
                if key not in found:
                    sources = [module.find(name, operand) for operand in each.operands]
                    given = [array for source in sources for array in source.arrays]
                    found[key] = _collective(kind, given, each, times)
            elif each.op == "while":
                (body,) = each.called("body")
                visit(body, times * (module.trips(each) or 1))
            elif each.op == "fusion":
                for called in each.called("calls"):
                    visit(called, times, True, called.startswith("all-reduce-scatter"))
            else:
                for called in each.called(*CALLS):
                    visit(called, times, fused, scattered)

    visit(module.entry, 1)
    return list(found.values())


def _collective(kind: str, given: Iterable[Array], each: Instruction, times: int) -> Collective:
    """Builds a collective from each device's input arrays: result shapes are written variously."""
    total = sum(bytes_of(array.dtype) * array.size for array in given)
    if kind == "collective-permute":
        return Collective(kind, 2, times, float(total))
    group = _group(each.rest)
    moved = total * (group - 1) * {"all-gather": 1, "all-reduce": 2 / group}.get(kind, 1 / group)
    return Collective(kind, group, times, float(moved))


def _group(rest: str) -> int:
    """Parses the size of a device group, in any of the forms that XLA writes."""
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


def by_kind(collectives: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """Sums up collectives: kind -> (how many a step, bytes that each device sends a step)."""
    totals: dict[str, tuple[int, float]] = {}
    for each in collectives:
        count, size = totals.get(each.kind, (0, 0.0))
        totals[each.kind] = (count + each.times, size + each.times * each.bytes)
    return totals

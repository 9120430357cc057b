"""Roofline model of a compiled program: a lower bound of its time, kernel by kernel.

A kernel takes as long as the slower of two: its products at the rate of large ones, or its reads
and writes at the memory's bandwidth. Inefficiencies of the program itself show up as kernels that
only move arrays. How well a kernel is implemented is not known, as XLA autotunes on a real GPU. So
this is a bound, not a measurement.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable

import numpy as np

from vit_jax.analysis.chips import Chip
from vit_jax.analysis.hlo import Array, Instruction, Module, parse

# Instructions that launch nothing: they only name existing data.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all add-dependency opt-barrier "
    "partition-id replica-id async-update".split()
)
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-")
# Instructions that read one element of the operand for each of the result.
_ELEMENTWISE = frozenset(
    "bitcast reshape transpose convert copy negate multiply add subtract divide maximum minimum "
    "tanh exponential rsqrt sqrt select compare tuple".split()
)
_SLICES = ("slice", "dynamic-slice", "gather")

# Scope of an instruction's `op_name` -> part of the model; the first match counts, so the innermost
# come first. Scopes are set by `jax.named_scope` in the model and the step.
PARTS = {
    "teacher": "teacher",
    "optimizer": "optimiser",
    "mixing": "mixing",
    "norm": "norms",
    "attend": "attention",
    "qkv": "QKV",
    "attention_out": "attention's output",
    "mlp": "MLP",
    "patches": "patches",
    "head": "head and loss",
    "resnet": "ResNet",
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel launch of a step, or several equal ones in a loop.

    Attributes:
      name: of the instruction.
      op_name: its origin in the Python program, as recorded by JAX.
      times: how often a step runs it.
      products: FLOPs of its matrix products, by the dtype of the operands.
      read: bytes read, each array once, and only the elements used.
      written: bytes written.
      arrays: its inputs and outputs, as text.
      known: whether the figures are complete: not for unknown custom calls, in loops of unknown
        length, or in branches.
    """

    name: str
    op_name: str
    times: int
    products: tuple[tuple[str, float], ...]
    read: float
    written: float
    arrays: str
    known: bool = True

    @property
    def flops(self) -> float:
        return sum((flops for _, flops in self.products), 0.0)

    @property
    def bytes(self) -> float:
        return self.read + self.written

    @property
    def part(self) -> str:
        return part_of(self.op_name)

    @property
    def direction(self) -> str:
        if "transpose(" in self.op_name:
            return "back"
        forward = self.part not in ("optimiser", "other") or "jvp(" in self.op_name
        return "forward" if forward else "update"

    def seconds(self, chip: Chip) -> float:
        """Time of all its runs in a step."""
        products = sum(flops / chip.rate(dtype) for dtype, flops in self.products)
        return self.times * (max(products, self.bytes / chip.copies) + chip.launch)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The kernels of a program, and the time that a chip takes for them."""

    kernels: tuple[Kernel, ...]
    chip: Chip

    @functools.cached_property
    def seconds(self) -> float:
        return sum((kernel.seconds(self.chip) for kernel in self.kernels), 0.0)

    @property
    def launches(self) -> int:
        return sum(kernel.times for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        return sum((kernel.times * kernel.bytes for kernel in self.kernels), 0.0)

    @property
    def flops(self) -> float:
        return sum((kernel.times * kernel.flops for kernel in self.kernels), 0.0)

    @property
    def unknown(self) -> int:
        """Number of kernels with incomplete figures."""
        return sum(not kernel.known for kernel in self.kernels)

    @property
    def ceiling(self) -> float:
        """Upper bound of the utilisation: FLOP/s over the rate of large bfloat16 products."""
        return self.flops / self.chip.products / self.seconds

    def by(self, key: Callable[[Kernel], str]) -> dict[str, float]:
        """Seconds by `key(kernel)`, largest first."""
        sums: dict[str, float] = {}
        for kernel in self.kernels:
            sums[key(kernel)] = sums.get(key(kernel), 0.0) + kernel.seconds(self.chip)
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def dearest(self, count: int = 5) -> list[tuple[Kernel, int, float]]:
        """The slowest kernels, with equal ones merged: (one of them, how many, seconds)."""
        alike: dict[tuple, list[Kernel]] = {}
        for kernel in self.kernels:
            alike.setdefault((kernel.part, kernel.direction, kernel.arrays), []).append(kernel)
        rows = [
            (group[0], sum(each.times for each in group), sum(k.seconds(self.chip) for k in group))
            for group in alike.values()
        ]
        return sorted(rows, key=lambda each: -each[2])[:count]


def tell(kernel: Kernel, count: int, seconds: float) -> str:
    """Formats one of the slowest kernels as a line."""
    where = f"{kernel.part}, {kernel.direction}"
    return f"{seconds * 1e3:.3g} ms, {count} x {where}: {kernel.arrays}"


def part_of(op_name: str) -> str:
    """The part of the model that an instruction belongs to, by the scopes in its name."""
    words = set(re.findall(r"\w+", op_name))
    return next((part for scope, part in PARTS.items() if scope in words), "other")


def read_kernels(hlo: str) -> list[Kernel]:
    """Returns the kernels that a step launches, from a program's HLO text, `compiled.as_text()`.

    Communication between devices is left out: see `read_collectives`.
    """
    module = parse(hlo)
    kernels = []
    for computation, each, times, known in module.launched():
        if each.op in _FREE or each.op.endswith("-done") or each.op.startswith(_COLLECTIVES):
            continue
        read, written = _traffic(module, computation, each)
        products = _products(module, computation, each)
        if not (read or written or products):
            continue
        inputs = [module.find(computation, name) for name in each.operands]
        arrays = [array for source in inputs if source for array in source.arrays]
        kernels.append(
            Kernel(
                each.name,
                _op_name(module, each),
                times,
                tuple(products.items()),
                read,
                written,
                f"{_list(arrays)} -> {_list(_results(each))}",
                known and (each.op != "custom-call" or bool(products)),
            )
        )
    return kernels


def _results(each: Instruction) -> tuple[Array, ...]:
    """The result arrays of an instruction, without the workspace of cuBLAS and cuDNN."""
    *results, last = each.arrays
    works = re.search(r'custom_call_target="__cu(blas|dnn)\$', each.rest)
    if works and results and last.dtype in ("s8", "u8") and len(last.shape) == 1:
        return tuple(results)
    return each.arrays


def _list(arrays: Iterable[Array]) -> str:
    """Lists the large arrays, with counts."""
    counts: dict[str, int] = {}
    for array in arrays:
        if array.size >= 2**16:
            counts[str(array)] = counts.get(str(array), 0) + 1
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.items()) or "little"


def _op_name(module: Module, each: Instruction) -> str:
    """The instruction's op_name, or that of a fused one if it has none or none of a known part."""
    own = each.attribute(r'op_name="([^"]*)"') or ""
    if part_of(own) != "other":
        return own
    for computation in each.called("calls"):
        for inner in reversed(module.computations[computation]):
            name = inner.attribute(r'op_name="([^"]*)"') or ""
            if part_of(name) != "other":
                return name
    return own


def _traffic(module: Module, computation: str, each: Instruction) -> tuple[float, float]:
    """Bytes that an instruction reads and writes."""
    sources = [module.find(computation, name) for name in each.operands]
    fused = each.called("calls")
    if not fused:
        if each.op == "dynamic-update-slice":
            part = sources[1].arrays[0].bytes
            return part, part
        whole = sum((array.bytes for array in _results(each)), 0.0)
        if each.op in _SLICES:
            return whole, whole
        if each.op == "copy-start":  # (to, from, context)
            return sources[0].arrays[0].bytes, each.arrays[0].bytes
        read = {s.name: sum(a.bytes for a in s.arrays) for s in sources if s is not None}
        return sum(read.values(), 0.0), whole
    inside = fused[0]
    used = _used(module, inside)
    parameters = {p.number: p for p in module.computations[inside] if p.op == "parameter"}
    read: dict[str, float] = {}
    for number, source in enumerate(sources):
        if source is None or number not in parameters:
            continue
        whole = sum(array.bytes for array in source.arrays)
        share = used(parameters[number].name)
        read[source.name] = min(read.get(source.name, 0.0) + share * whole, whole)
    return sum(read.values(), 0.0), _written(module, inside)


def _used(module: Module, computation: str) -> Callable[[str], float]:
    """Returns a function: instruction -> fraction of its elements that the computation uses."""
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for each in module.computations[computation]:
        for place, name in enumerate(each.operands):
            users.setdefault(name, []).append((each, place))

    @functools.cache
    def used(name: str) -> float:
        own = module.find(computation, name)
        if own.root:
            return 1.0
        size = sum(array.size for array in own.arrays)
        needed = 0.0
        for user, place in users.get(name, ()):
            if user.op in _SLICES and place == 0:
                needed += used(user.name) * user.arrays[0].size
            elif user.op == "dynamic-update-slice" and place == 0:
                continue  # written in place
            elif user.op in _ELEMENTWISE:
                needed += used(user.name) * size
            elif (inner := user.called("calls")) and user.op == "fusion":
                parameter = next(
                    p
                    for p in module.computations[inner[0]]
                    if p.op == "parameter" and p.number == place
                )
                needed += _used(module, inner[0])(parameter.name) * size
            else:
                needed += size
        return min(needed / size, 1.0) if size else 0.0

    return used


def _written(module: Module, computation: str) -> float:
    """Bytes that a fusion writes; for in-place updates, only the updated part."""
    root = module.root(computation)
    ends = [root] if root.op != "tuple" else [module.find(computation, n) for n in root.operands]
    total = 0.0
    for end in ends:
        size = sum(array.bytes for array in end.arrays)
        while end.op in ("bitcast", "copy", "reshape") and end.operands:
            end = module.find(computation, end.operands[0])
        if end.op == "dynamic-update-slice":
            size = module.find(computation, end.operands[1]).arrays[0].bytes
        total += size
    return total


def _products(module: Module, computation: str, each: Instruction) -> dict[str, float]:
    """FLOPs of an instruction's products, including fused ones, by operand dtype."""
    sources = [module.find(computation, name) for name in each.operands]
    sums: dict[str, float] = {}
    target = each.attribute(r'custom_call_target="([^"]*)"') or ""
    labels = each.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    if each.op == "dot":
        dims = _numbers(each.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        summed = math.prod(sources[0].arrays[0].shape[d] for d in dims)
        sums[sources[0].arrays[0].dtype] = 2.0 * each.arrays[0].size * summed
    elif labels:
        sums[sources[0].arrays[0].dtype] = _convolution(target, labels, sources, each)
    elif target.startswith("__cudnn$fmha"):
        q, k = sources[0].arrays[0], sources[1].arrays[0]  # [b t h d], [b s h d]
        count = 5 if target.endswith("Backward") else 2  # scores are computed anew on the way back
        sums[q.dtype] = 2.0 * count * q.size * k.shape[1]
    elif target.startswith("__cublas$"):
        given = each.attribute(r'"lhs_contracting_dimensions":\[([\d",]*)\]')
        lhs = sources[0].arrays[0]
        summed = math.prod(lhs.shape[d] for d in _numbers(given.replace('"', "")))
        sums[lhs.dtype] = 2.0 * each.arrays[0].size * summed
    elif each.op in ("fusion", "fusion-start"):
        for called in each.called("calls"):
            for inner in module.computations[called]:
                for dtype, flops in _products(module, called, inner).items():
                    sums[dtype] = sums.get(dtype, 0.0) + flops
    return sums


def _convolution(target: str, labels: str, sources: list[Instruction], each: Instruction) -> float:
    """FLOPs of a convolution, without padding; TPU programs also write products as convolutions."""
    x, kernel, y = sources[0].arrays[0], sources[1].arrays[0], each.arrays[0]
    if target.endswith("BackwardFilter"):  # (x, dy) -> dk
        kernel, y = y, kernel
    elif target.endswith("BackwardInput"):  # (dy, k) -> dx
        x, y = y, x
    of_x, of_kernel, of_y = re.split("_|->", labels)
    window = each.attribute(r"window=\{([^}]*)\}") or ""
    given = {key: value.split("x") for key, _, value in (w.partition("=") for w in window.split())}
    flops = 2.0 * y.shape[of_y.index("b")] * y.shape[of_y.index("f")]
    flops *= kernel.shape[of_kernel.index("i")]
    for i in range(len(of_y) - 2):
        sizes = (a.shape[of.index(str(i))] for a, of in ((x, of_x), (kernel, of_kernel), (y, of_y)))
        pad = int(given["pad"][i].partition("_")[0]) if "pad" in given else 0
        steps = (
            int(given[k][i]) if k in given else 1 for k in ("stride", "lhs_dilate", "rhs_dilate")
        )
        flops *= _valid(*sizes, pad, *steps)
    return flops


@functools.cache
def _valid(
    x: int, kernel: int, y: int, pad: int, stride: int, dilate_x: int, dilate_kernel: int
) -> int:
    """Number of (output, kernel) positions along an axis that meet an element of x, not padding."""
    place = np.arange(y)[:, None] * stride + np.arange(kernel) * dilate_kernel - pad
    return int(((place >= 0) & (place < x * dilate_x) & (place % dilate_x == 0)).sum())


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]

"""What the tables of weights are made of: rows of our names, theirs, and the axes between.

A row's layout reads `their axes -> our axes` in einops' notation, for one block where the name has
a `{}` for its index. Several of their arrays make one of ours joined along `t`: Google's query, key
and value [d h k] are stacked to `t d h k`, Hugging Face's [(h k) d] concatenated to `(t h k) d`.
Where several rows give the same parameter, they are spellings: the first one is what is written.
A name that starts with / does not take the dialect's prefix.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import einops
import numpy as np
from jaxtyping import Float32

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters, and where it is in a file.

    Attributes:
      ours: "blocks/attention/qkv/kernel"; what is `in_stack` has a leading depth axis.
      theirs: one name or several; without a `{}`, blocks are stacked in the file too.
      layout: as the module's docstring says; empty where nothing changes.
      parts: how much of `t` each of `theirs` holds.
      says: fields of the config that this spelling stands for.
      first, digits: the number of block 0 in a file, and how many digits it has at the least.
      any_rank: whether files may have axes of 1 beside those of the layout.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: str = ""
    parts: tuple[int, ...] = ()
    says: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    first: int = 0
    digits: int = 1
    any_rank: bool = False

    @property
    def in_stack(self) -> bool:
        return self.ours.startswith("blocks/") or "/rest/" in self.ours

    @property
    def per_block(self) -> bool:
        return "{}" in self.theirs[0]

    def keys(self, prefix: str, block: int | str = 0) -> list[str]:
        """The full names of one block's arrays."""
        if isinstance(block, int):
            block = f"{block + self.first:0{self.digits}}"
        names = (name.replace("{}", block) for name in self.theirs)
        return [name[1:] if name.startswith("/") else prefix + name for name in names]

    def joined(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of one block's arrays together, as the left side of the layout has it."""
        if self.stacked:
            return (len(shapes), *shapes[0])
        if not shapes[0]:
            return ()
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def pieces(self, joint: np.ndarray) -> list[np.ndarray]:
        """Views of the single arrays of a file, out of all of them together."""
        if self.stacked:
            return list(joint)
        if len(self.theirs) == 1:
            return [joint]
        parts = self.parts or (1,) * len(self.theirs)
        return np.split(joint, np.cumsum(parts)[:-1] * (joint.shape[0] // sum(parts)))

    def axes(self, shapes: Sequence[Shape]) -> dict[str, int]:
        """Solves the sizes of our axes from the shapes of a file, where each stands alone.

        Raises:
          ValueError: the shapes have another number of axes.
        """
        left, right = _sides(self.layout)
        shape = self.joined(shapes)
        if len(shape) != len(left) or any(len(s) != len(shapes[0]) for s in shapes):
            raise ValueError(f"{len(left) - self.stacked} axes")
        sizes = {group[0]: n for group, n in zip(left, shape, strict=True) if len(group) == 1}
        return {axis: n for axis, n in sizes.items() if [axis] in right}

    def shapes(self, ours: Shape) -> list[Shape]:
        """The shapes in the file of one block of a parameter of shape `ours`."""
        if not self.layout:
            return [ours]
        left, right = _sides(self.layout)
        sizes = {group[0]: n for group, n in zip(right, ours, strict=True) if group}
        shape = tuple(math.prod(sizes.get(axis, 1) for axis in group) for group in left)
        if self.stacked:
            return [shape[1:]] * len(self.theirs)
        parts = self.parts or (1,) * len(self.theirs)
        return [(shape[0] // sum(parts) * part, *shape[1:]) if shape else () for part in parts]

    def fits(self, shape: Shape, expected: Shape) -> bool:
        """Whether an array of a file has the shape that it should have."""
        if self.any_rank:
            shape, expected = (tuple(n for n in each if n != 1) for each in (shape, expected))
        return shape == expected

    def read(self, joint: Float32[np.ndarray, "..."], out: Float32[np.ndarray, "..."]) -> None:
        """Rearranges one block's arrays, joined and contiguous, into `out`, contiguous too."""
        left, right = _sides(self.layout)
        if [axis for group in right for axis in group] == left[-1] + left[0] and len(left) == 2:
            # OpenCV transposes a matrix 8 times faster than NumPy.
            cv2.transpose(joint, dst=out.reshape(joint.shape[::-1]))
        else:
            sizes = {group[0]: n for group, n in zip(right, out.shape, strict=True) if group}
            out[...] = einops.rearrange(joint, self.layout, **sizes)

    def write(self, array: np.ndarray) -> list[np.ndarray]:
        """The inverse of `read`: contiguous arrays as the file has them."""
        if self.layout:
            left, right = self.layout.split(" -> ")
            array = einops.rearrange(array, f"{right} -> {left}")
        return [np.ascontiguousarray(piece) for piece in self.pieces(array)]

    @property
    def plain(self) -> bool:
        """Whether one of their arrays has the bytes of ours."""
        if not self.layout:
            return True
        left, right = ([axis for group in side for axis in group] for side in _sides(self.layout))
        return len(self.theirs) == 1 and left == right

    @property
    def stacked(self) -> bool:
        return len(self.theirs) > 1 and self.layout.startswith("t ")


@functools.cache
def _sides(layout: str) -> tuple[list[list[str]], list[list[str]]]:
    """`(t h) d -> d t h` -> [[t h] [d]], [[d] [t] [h]]; an axis of 1 is an empty group."""

    def groups(side):
        for inner, name in re.findall(r"\(([^)]*)\)|(\S+)", side):
            yield inner.split() if inner else [] if name == "1" else [name]

    left, right = layout.split(" -> ")
    return list(groups(left)), list(groups(right))


class Found(NamedTuple):
    """A row whose names are in a file: of `depth` blocks, under `prefix`, one block's `shapes`."""

    row: Row
    prefix: str
    depth: int | None
    shapes: list[tuple[int, ...]]

    def keys(self) -> list[str]:
        if not self.row.per_block:
            return self.row.keys(self.prefix)
        return [key for i in range(self.depth or 0) for key in self.row.keys(self.prefix, i)]

    def label(self) -> str:
        """The names, all blocks in one: blocks.{0..11}.attn.qkv.weight."""
        first, last = self.row.first, self.row.first + (self.depth or 1) - 1
        return " + ".join(self.row.keys(self.prefix, f"{{{first}..{last}}}"))


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one code base names the parameters of a model.

    Attributes:
      name: what the user calls it.
      markers: keys, after the prefix, one of which every file of it has and no other's.
      rows: see `Row`.
      leftover: patterns of full names that are no part of the encoder and may be left alone.
      prefixes: what may stand before every name; the first one is written.
      family: of the models, as in models/config.py `FAMILIES`.
      resnet_style: what its ResNets compute, those before patches and those that stand alone.
      aliases: pattern of other spellings of a part of a name -> how the rows have it.
    """

    name: str
    markers: tuple[str, ...]
    rows: tuple[Row, ...]
    leftover: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    family: str = "vit"
    resnet_style: str = "v1"
    aliases: tuple[str, str] | None = None

    def prefix(self, keys: Iterable[str]) -> str | None:
        """What stands before a marker in `keys`, None where all markers are missing."""
        keys = {self.spelt(key) for key in keys}
        found = (p for p in self.prefixes for marker in self.markers if p + marker in keys)
        return next(found, None)

    def spelt(self, key: str) -> str:
        """A name of a file as the rows have it."""
        return re.sub(*self.aliases, key) if self.aliases else key

    def may_leave(self, key: str) -> bool:
        return any(re.match(pattern, key) for pattern in self.leftover)

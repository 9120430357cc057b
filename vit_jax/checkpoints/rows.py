"""Rows of the weight name tables: our name, the file's names, and how the axes are rearranged.

A row's layout reads `their axes -> our axes` in einops notation, for a single block if the name has
a `{}` for its index. Several of the file's arrays are joined into one of ours along `t`: Google's
query, key and value [d h k] are stacked to `t d h k`, Hugging Face's [(h k) d] are concatenated to
`(t h k) d`. Several rows for the same parameter are alternative spellings; the first is written.
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
      ours: path of our parameter, "blocks/attention/qkv/kernel"; with a leading depth axis if
        `in_stack`.
      theirs: one name or several; without a `{}`, blocks are stacked in the file, too.
      layout: see the module's docstring; empty if nothing changes.
      parts: how much of `t` each of `theirs` holds.
      says: config fields that this spelling implies.
      only: config fields of the models that are written so; any spelling is read.
      first, digits: the index of block 0 in a file, and the minimum number of its digits.
      branches: how many of our blocks are one of the file's, which numbers them at `[]`.
      any_rank: whether files may have additional axes of 1.
      shared: whether keys and values may have fewer heads than queries (grouped-query attention);
        they are repeated for each.
      whole: whether the layout has the depth axis, too.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: str = ""
    parts: tuple[int, ...] = ()
    says: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    first: int = 0
    digits: int = 1
    branches: int = 1
    any_rank: bool = False
    shared: bool = False
    whole: bool = False

    @property
    def in_stack(self) -> bool:
        return not self.whole and (self.ours.startswith("blocks/") or "/rest/" in self.ours)

    @property
    def per_block(self) -> bool:
        return "{}" in self.theirs[0]

    def keys(self, prefix: str, block: int | str = 0) -> list[str]:
        """The full names of one block's arrays in the file."""
        branch = f"{{0..{self.branches - 1}}}"
        if isinstance(block, int):
            block, branch = divmod(block, self.branches)
            block = f"{block + self.first:0{self.digits}}"
        names = (name.replace("{}", block).replace("[]", str(branch)) for name in self.theirs)
        return [name[1:] if name.startswith("/") else prefix + name for name in names]

    def joined(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of one block's joined arrays, as on the left side of the layout."""
        if self.stacked:
            return (len(shapes), *shapes[0])
        if not shapes[0]:
            return ()
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def pieces(self, joint: np.ndarray) -> list[np.ndarray]:
        """Splits the joined array into views for the file's arrays."""
        if self.stacked:
            return list(joint)
        if len(self.theirs) == 1:
            return [joint]
        parts = self.parts or (1,) * len(self.theirs)
        return np.split(joint, np.cumsum(parts)[:-1] * (joint.shape[0] // sum(parts)))

    def axes(self, shapes: Sequence[Shape]) -> dict[str, int]:
        """Returns the sizes of our axes, by name, where the file's shapes determine them.

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
        """The shapes in the file for one block of a parameter with shape `ours`."""
        if not self.layout:
            return [ours]
        left, right = _sides(self.layout)
        sizes = {group[0]: n for group, n in zip(right, ours, strict=True) if group}
        shape = tuple(math.prod(sizes.get(axis, 1) for axis in group) for group in left)
        if self.stacked:
            return [shape[1:]] * len(self.theirs)
        parts = self.parts or (1,) * len(self.theirs)
        return [(shape[0] // sum(parts) * part, *shape[1:]) if shape else () for part in parts]

    def fits(self, shape: Shape, expected: Shape, head_dim: int | None = None) -> bool:
        """Whether an array's shape in the file is the expected one, or of heads that are shared."""
        if self.shared and head_dim and shape and shape[1:] == expected[1:]:
            return shape[0] % head_dim == 0 < shape[0] and expected[0] % shape[0] == 0
        if self.any_rank:
            shape, expected = (tuple(n for n in each if n != 1) for each in (shape, expected))
        return shape == expected

    def read(self, joint: Float32[np.ndarray, "..."], out: Float32[np.ndarray, "..."]) -> None:
        """Rearranges one block's joined arrays into `out`; both are contiguous."""
        left, right = _sides(self.layout)
        if [axis for group in right for axis in group] == left[-1] + left[0] and len(left) == 2:
            # OpenCV transposes a matrix 8 times faster than NumPy.
            cv2.transpose(joint, dst=out.reshape(joint.shape[::-1]))
        else:
            sizes = {group[0]: n for group, n in zip(right, out.shape, strict=True) if group}
            out[...] = einops.rearrange(joint, self.layout, **sizes)

    def write(self, array: np.ndarray) -> list[np.ndarray]:
        """The inverse of `read`: contiguous arrays for the file."""
        if self.layout:
            left, right = self.layout.split(" -> ")
            array = einops.rearrange(array, f"{right} -> {left}")
        return [np.ascontiguousarray(piece) for piece in self.pieces(array)]

    @property
    def plain(self) -> bool:
        """Whether the file's array has the same bytes in the same order as ours."""
        if not self.layout:
            return True
        left, right = ([axis for group in side for axis in group] for side in _sides(self.layout))
        return len(self.theirs) == 1 and left == right

    @property
    def stacked(self) -> bool:
        return len(self.theirs) > 1 and self.layout.startswith("t ")

    @property
    def heads_apart(self) -> bool:
        """Whether the file's array has an axis for the heads."""
        return ["h"] in _sides(self.layout)[0]

    def in_flax(self) -> "Row":
        """A PyTorch row as Flax has it: other separators and leaves, kernels [in, out]."""
        leaf = {"kernel": "kernel", "scale": "scale", "pos_embed": "embedding"}
        ends = {".weight": f"/{leaf.get(self.ours.rpartition('/')[2])}"}
        theirs = tuple(_in_flax(name, ends) for name in self.theirs)
        return dataclasses.replace(
            self, theirs=theirs, layout=_FLAX_LAYOUTS.get(self.layout, self.layout)
        )


# Of PyTorch's layers -> of Flax's.
_FLAX_LAYOUTS = {
    "d c p q -> p q c d": "p q c d -> p q c d",
    "o i -> i o": "i o -> i o",
    "(t h k) d -> d t h k": "t d (h k) -> d t h k",
    "(t h k) -> t h k": "t (h k) -> t h k",
    "d (h k) -> h k d": "(h k) d -> h k d",
}


def _in_flax(name: str, ends: Mapping[str, str]) -> str:
    for end, flax in ends.items():
        if name.endswith(end):
            name = name.removesuffix(end) + flax
    return name.replace(".", "/")


@functools.cache
def _sides(layout: str) -> tuple[list[list[str]], list[list[str]]]:
    """Parses `(t h) d -> d t h` to [[t h] [d]], [[d] [t] [h]]; an axis of 1 is an empty group."""

    def groups(side):
        for inner, name in re.findall(r"\(([^)]*)\)|(\S+)", side):
            yield inner.split() if inner else [] if name == "1" else [name]

    left, right = layout.split(" -> ")
    return list(groups(left)), list(groups(right))


def layer_rows(
    ours: str, theirs: str, names: Mapping[str, str], layouts: Mapping[str, str]
) -> list[Row]:
    """A row for each parameter of a layer; `names` maps kernel, bias and scale to their names."""
    return [
        Row(f"{ours}/{leaf}", (f"{theirs}{names[leaf]}",), layout)
        for leaf, layout in layouts.items()
    ]


def norm_rows(ours: str, theirs: str, scale: str = ".weight", bias: str = ".bias") -> list[Row]:
    """A norm's scale and bias, `scale` and `bias` being the ends of the file's names."""
    return layer_rows(
        ours, theirs, {"scale": scale, "bias": bias}, {"scale": "d -> d", "bias": "d -> d"}
    )


TORCH = {"kernel": ".weight", "bias": ".bias"}


def linear_rows(ours: str, theirs: str) -> list[Row]:
    """A linear layer of PyTorch, with its kernel [out in]."""
    return layer_rows(ours, theirs, TORCH, {"kernel": "o i -> i o", "bias": "o -> o"})


def conv_rows(theirs: str) -> list[Row]:
    """The patch embedding as a convolution of PyTorch, with its kernel [out in h w]."""
    layouts = {"kernel": "d c p q -> p q c d", "bias": "d -> d"}
    return layer_rows("patch_embed", theirs, TORCH, layouts)


def torch_attention(
    ours: str, qkv: Sequence[str], out: str, parts: Sequence[int] = ()
) -> list[Row]:
    """Attention with PyTorch projections [out in]: one fused, or several in the order q, k, v."""
    weights = tuple(f"{name}weight" for name in qkv)
    biases = tuple(f"{name}bias" for name in qkv)
    return [
        Row(f"{ours}/qkv/kernel", weights, "(t h k) d -> d t h k", tuple(parts)),
        Row(f"{ours}/qkv/bias", biases, "(t h k) -> t h k", tuple(parts)),
        Row(f"{ours}/out/kernel", (f"{out}.weight",), "d (h k) -> h k d"),
        Row(f"{ours}/out/bias", (f"{out}.bias",), "d -> d"),
    ]


class Found(NamedTuple):
    """A row found in a file: under `prefix`, with `depth` blocks of arrays of shapes `shapes`."""

    row: Row
    prefix: str
    depth: int | None
    shapes: list[tuple[int, ...]]

    def keys(self) -> list[str]:
        if not self.row.per_block:
            return self.row.keys(self.prefix)
        return [key for i in range(self.depth or 0) for key in self.row.keys(self.prefix, i)]

    def label(self, before: str = "") -> str:
        """The names after `before`, with all blocks in one: blocks.{0..11}.attn.qkv.weight."""
        first = self.row.first
        last = first + max((self.depth or 1) // self.row.branches, 1) - 1
        return " + ".join(
            before + key for key in self.row.keys(self.prefix, f"{{{first}..{last}}}")
        )


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The naming scheme of a code base.

    Attributes:
      name: for the user.
      markers: keys, after the prefix; every file of this dialect has one of them, no other has.
      unless: a key, after the prefix, that no file of this dialect has.
      rows: see `Row`.
      leftover: patterns of full names that are not part of the encoder and may be ignored.
      prefixes: what may precede every name; the first one is written.
      family: of the models, as in models/config.py `FAMILIES`.
      resnet_style: the styles of its ResNets: in hybrids, and as classifiers.
      aliases: pattern of other spellings of a part of a name -> the spelling in the rows.
    """

    name: str
    markers: tuple[str, ...]
    rows: tuple[Row, ...]
    leftover: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    family: str = "vit"
    resnet_style: str = "v1"
    aliases: tuple[str, str] | None = None
    unless: str | None = None

    def prefix(self, keys: Iterable[str]) -> str | None:
        """Returns the prefix before a marker in `keys`, None if all markers are missing."""
        keys = {self.spelt(key) for key in keys}
        found = (p for p in self.prefixes for marker in self.markers if p + marker in keys)
        return next((p for p in found if self.unless is None or p + self.unless not in keys), None)

    def spelt(self, key: str) -> str:
        """Replaces aliases in a name of a file by the rows' spelling."""
        return re.sub(*self.aliases, key) if self.aliases else key

    def may_leave(self, key: str) -> bool:
        return any(re.match(pattern, key) for pattern in self.leftover)

    def in_flax(self) -> "Dialect":
        """The scheme of the same model in Flax, from that of its PyTorch version."""
        rows = (row for row in self.rows if not row.ours.startswith("attention_pool/"))
        return dataclasses.replace(
            self,
            markers=tuple(_in_flax(marker, {".weight": "/kernel"}) for marker in self.markers),
            rows=tuple(row.in_flax() for row in rows if len(row.theirs) != 2),
            leftover=tuple(pattern.replace(r"\.", "/") for pattern in self.leftover),
            prefixes=tuple(prefix.replace(".", "/") for prefix in self.prefixes),
        )

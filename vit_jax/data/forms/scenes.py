"""Scenes with a class for each pixel, made on the spot: digits or fractals pasted on a canvas."""

import dataclasses
import functools
import hashlib
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from vit_jax.data.forms.arrays import ArraySource, check_split, digits
from vit_jax.data.forms.fractals import SPLITS, FractalSource, read_options
from vit_jax.data.masks import MOST
from vit_jax.errors import UserError, nearest

ALGORITHM = 1  # to be raised when any image or mask changes
KINDS = ("digits", "fractals")
# Lowest and highest value, and the one when not given.
_OPTIONS = {
    "size": (16, 1024, 32),
    "objects": (1, 100, 3),
    "examples": (1, 1_000_000, 1000),
    "seed": (0, 2**32 - 1, 0),
}
_CLASSES = (1, MOST - 1, 10)  # of fractals, beside the background
# From this brightness on a pixel is an object's; the background goes up to the other.
_OBJECT, _BACKGROUND = 64, 96


@dataclasses.dataclass(frozen=True)
class SceneSource:
    """Grey images of `objects` pictures each, at random places and sizes, later ones on top.

    A picture is from a third to two thirds as high as the canvas, and wholly on it. Of its pixels
    those of at least a quarter of full brightness are pasted, and they are what the mask has: 1 +
    their class, and 0 for the background. That is slow noise, which is up to half as bright again
    as the darkest pixels of objects: brightness alone does not tell them apart.
    """

    kind: str
    size: int
    objects: int
    examples: int
    seed: int
    classes: int
    split: str

    masks = True

    @property
    def label_names(self) -> tuple[str, ...]:
        return ("background", *self._pictures(8).label_names)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the options, the split and what is pasted."""
        identity = (ALGORITHM, *dataclasses.astuple(self), self._pictures(8).fingerprint)
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": uint8 [size size 1], "label": uint8 [size size], "name": str}."""
        if not 0 <= index < self.examples:
            raise IndexError(
                f"scenes: {self.split} has images 0 to {self.examples - 1}, found {index}"
            )
        key = (self.seed, KINDS.index(self.kind), SPLITS.index(self.split), int(index))
        random = np.random.Generator(np.random.PCG64(key))
        image = _noise(self.size, random)
        mask = np.zeros_like(image)
        low, high = max(8, self.size // 3), self.size * 2 // 3
        for number in range(self.objects):
            side = low + int(random.random() * (high - low + 1))
            top, left = (int(random.random() * (self.size - side + 1)) for _ in range(2))
            chosen = random.random()
            picture, label = self._picture(int(index) * self.objects + number, side, chosen)
            here = slice(top, top + side), slice(left, left + side)
            lit = picture >= _OBJECT
            image[here][lit] = picture[lit]
            mask[here][lit] = 1 + label
        name = f"scenes:{self.kind},size={self.size},seed={self.seed}/{self.split}/{index}"
        return {"image": image[..., None], "label": mask, "name": name}

    def mask_size(self, index: int) -> tuple[int, int]:
        return self.size, self.size

    def _picture(
        self, number: int, side: int, chosen: float
    ) -> tuple[UInt8[np.ndarray, "s s"], int]:
        """One of the split's digits, or a fractal that no other object shows; and its class."""
        pictures = self._pictures(side)
        if self.kind == "digits":
            at = int(chosen * len(pictures))
        else:
            at = int(chosen * self.classes) + self.classes * number
        found = pictures[at]
        picture = found["image"][..., 0]
        if len(picture) != side:
            picture = cv2.resize(picture, (side, side), interpolation=cv2.INTER_LINEAR)
        return picture, found["label"]

    def _pictures(self, side: int) -> ArraySource | FractalSource:
        """What is pasted; fractals are drawn at their size in the scene."""
        if self.kind == "digits":
            return _digits(self.split)
        held_out = self.examples * self.objects
        return FractalSource(self.classes, side, False, self.seed, held_out, self.split)


def scenes(argument: str, split: str) -> SceneSource:
    """Opens `digits` or `fractals`, and then `size=32,objects=3,examples=1000,seed=0`.

    Splits `train`, `val` and `test` have `examples` scenes each, of the digits or fractals that
    are in this split. Fractals have `classes=10` of them, those that `fractals` has by this seed.

    Raises:
      UserError: an unknown kind, option or split, or a value out of range.
    """
    where = f"scenes:{argument}"
    kind, _, rest = argument.partition(",")
    if kind not in KINDS:
        raise UserError(f"the source {where} is of {kind!r}; {nearest(kind, KINDS)}")
    check_split(where, split, SPLITS)
    known = _OPTIONS if kind == "digits" else {**_OPTIONS, "classes": _CLASSES}
    options = {"classes": 10, **read_options(f"the source {where}", rest, known)}
    if kind == "digits":
        _digits(split)  # what is missing is said now
    return SceneSource(kind, split=split, **options)


@functools.cache
def _digits(split: str) -> ArraySource:
    return digits("", split)


def _noise(size: int, random: np.random.Generator) -> UInt8[np.ndarray, "{size} {size}"]:
    """Slow noise: a grid of 5 x 5 levels, and smooth between them."""
    levels = (_BACKGROUND * random.random((5, 5))).astype(np.uint8)
    return cv2.resize(levels, (size, size), interpolation=cv2.INTER_LINEAR)

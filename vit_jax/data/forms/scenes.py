"""Scenes of digits or fractals pasted on a canvas, made on the spot, with masks or boxes."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int16, UInt8

from vit_jax.data.boxes import Boxes
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
LABELS = ("masks", "boxes")
_VISIBLE = 0.25  # the least share of an object's pixels that others leave, for it to have a box


@dataclasses.dataclass(frozen=True)
class SceneSource:
    """Grey images of `objects` pictures each, at random places and sizes, later ones on top.

    A picture is from a third to two thirds as high as the canvas, and wholly on it. Of its pixels
    those of at least a quarter of full brightness are pasted, and they are what the mask has: 1 +
    their class, and 0 for the background. That is slow noise, which is up to half as bright again
    as the darkest pixels of objects: brightness alone does not tell them apart.

    With `labels` "boxes", the label is not the mask, but the box of the pixels of each object that
    no later one hides, in the order in which they are pasted; an object of which less than a
    quarter is left has none. There is no class of the background then.
    """

    kind: str
    size: int
    objects: int
    examples: int
    seed: int
    classes: int
    split: str
    labels: str = "masks"

    @property
    def masks(self) -> bool:
        return self.labels == "masks"

    @property
    def boxes(self) -> bool:
        return self.labels == "boxes"

    @property
    def label_names(self) -> tuple[str, ...]:
        return ("background",) * self.masks + self._pictures(8).label_names

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the options, the split and what is pasted."""
        *fields, labels = dataclasses.astuple(self)
        what = () if self.masks else (labels,)  # masks came first, and keep theirs
        identity = (ALGORITHM, *fields, self._pictures(8).fingerprint, *what)
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": uint8 [size size 1], "label": uint8 [size size] or Boxes, "name"}."""
        if not 0 <= index < self.examples:
            raise IndexError(
                f"scenes: {self.split} has images 0 to {self.examples - 1}, found {index}"
            )
        key = (self.seed, KINDS.index(self.kind), SPLITS.index(self.split), int(index))
        random = np.random.Generator(np.random.PCG64(key))
        image = _noise(self.size, random)
        mask, whose = np.zeros_like(image), np.full(image.shape, -1, np.int16)
        classes, counts = [], []
        low, high = max(8, self.size // 3), self.size * 2 // 3
        for number in range(self.objects):
            side = low + int(random.random() * (high - low + 1))
            top, left = (int(random.random() * (self.size - side + 1)) for _ in range(2))
            chosen = random.random()
            picture, label = self._picture(int(index) * self.objects + number, side, chosen)
            here = slice(top, top + side), slice(left, left + side)
            lit = picture >= _OBJECT
            image[here][lit] = picture[lit]
            mask[here][lit], whose[here][lit] = 1 + label, number
            classes.append(label)
            counts.append(int(np.count_nonzero(lit)))
        name = f"scenes:{self.kind},size={self.size},seed={self.seed}/{self.split}/{index}"
        label = _visible(whose, classes, counts) if self.boxes else mask
        return {"image": image[..., None], "label": label, "name": name}

    def mask_size(self, index: int) -> tuple[int, int]:
        return self.size, self.size

    image_size_of = mask_size

    def boxes_of(self, index: int) -> Boxes:
        return self[index]["label"]

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
    `labels=boxes` gives boxes, not masks.

    Raises:
      UserError: an unknown kind, option or split, or a value out of range.
    """
    where = f"scenes:{argument}"
    kind, *rest = argument.split(",")
    if kind not in KINDS:
        raise UserError(f"the source {where} is of {kind!r}; {nearest(kind, KINDS)}")
    check_split(where, split, SPLITS)
    known = _OPTIONS if kind == "digits" else {**_OPTIONS, "classes": _CLASSES}
    said = [each.removeprefix("labels=") for each in rest if each.startswith("labels=")]
    if len(said) > 1:
        raise UserError(f"the source {where} says labels twice")
    if said and said[0] not in LABELS:
        raise UserError(f"the source {where}: labels is {said[0]!r}; {nearest(said[0], LABELS)}")
    rest = ",".join(each for each in rest if not each.startswith("labels="))
    options = {"classes": 10, **read_options(f"the source {where}", rest, known)}
    if kind == "digits":
        _digits(split)  # what is missing is said now
    return SceneSource(kind, split=split, labels=(said or ["masks"])[0], **options)


def _visible(
    whose: Int16[np.ndarray, "h w"], classes: Sequence[int], counts: Sequence[int]
) -> Boxes:
    """The boxes of objects, by the number of the one that each pixel shows, and their pixels."""
    corners, kept, area = [], [], []
    for number, (label, count) in enumerate(zip(classes, counts, strict=True)):
        rows, columns = np.nonzero(whose == number)
        if len(rows) and len(rows) >= _VISIBLE * count:
            corners.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            kept.append(label)
            area.append(len(rows))
    return Boxes.of(corners, kept, area=area)


@functools.cache
def _digits(split: str) -> ArraySource:
    return digits("", split)


def _noise(size: int, random: np.random.Generator) -> UInt8[np.ndarray, "{size} {size}"]:
    """Slow noise: a grid of 5 x 5 levels, and smooth between them."""
    levels = (_BACKGROUND * random.random((5, 5))).astype(np.uint8)
    return cv2.resize(levels, (size, size), interpolation=cv2.INTER_LINEAR)

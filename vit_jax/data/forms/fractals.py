"""Labelled images made by a formula, without end: random iterated function systems.

As in FractalDB, "Pre-training without Natural Images" (Kataoka et al., 2020, arXiv 2101.08515): a
class is a system of affine maps, an example its attractor with the parameters disturbed. Systems
are drawn, and pictures coloured, as in "Improving Fractal Pre-training" (Anderson & Farrell, 2021,
arXiv 2110.03091). Points are moved by sums, products and quotients of uniform doubles alone, which
no version of NumPy rounds in its own way.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import re
import threading
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float64, Int64, UInt8

from vit_jax.errors import UserError, nearest

ALGORITHM = 1  # to be raised when any image changes
SPLITS = ("train", "val", "test")
# Lowest and highest value, and the one when not given.
_OPTIONS = {
    "classes": (1, 1_000_000, None),
    "size": (8, 1024, 64),
    "color": (0, 1, 1),
    "seed": (0, 2**32 - 1, 0),
    "held_out": (1, 1_000_000, 10),
}
_JITTER, _NORM = 0.1, 0.98  # how far a factor is from 1 at most; a disturbed map's largest stretch
_ORBIT, _WORD = 24, 32  # steps of an orbit, letters of the longest word
_LEAST = 0.02  # determinant by which a map is chosen at least: lines need points too


@dataclasses.dataclass(frozen=True)
class FractalSource:
    """Images 0, 1, ... of a split, endless (below 2**62); image i shows class i % classes."""

    classes: int
    size: int
    color: bool
    seed: int
    held_out: int
    split: str

    @property
    def label_names(self) -> tuple[str, ...]:
        return _names(self.classes)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the options, the split and the formula."""
        return hashlib.sha256(repr((ALGORITHM, *dataclasses.astuple(self))).encode()).hexdigest()[
            :16
        ]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": uint8 [size size 3 or 1], "label": int, "name": str}."""
        end = 2**62 if self.split == "train" else self.classes * self.held_out
        if not 0 <= index < end:
            raise IndexError(f"fractals: {self.split} has images 0 to {end - 1}, found {index}")
        label, random = int(index % self.classes), _stream(self.seed, self.split, index)
        share = 0.7 + 0.3 * random.random(2)
        corner = (1 - share) * random.random(2)
        maps = disturb(system(self.seed, label), random)
        counts, _ = histogram(maps, self.size, random, share, corner)
        flips = np.where(random.random(2) < 0.5, -1, 1)
        counts = counts[:: flips[0], :: flips[1]]
        counts = counts.T if random.random() < 0.5 else counts
        image = paint(counts, random) if self.color else shade(counts)[..., None]
        name = f"fractals:classes={self.classes},seed={self.seed}/{self.split}/{index}"
        return {"image": image, "label": label, "name": name}


class FiniteFractals(FractalSource):
    """The same with an end: `held_out` images of each class."""

    def __len__(self) -> int:
        return self.classes * self.held_out


def open_fractals(argument: str, split: str) -> FractalSource | FiniteFractals:
    """Opens `classes=1000,size=64,color=true,seed=0,held_out=10`, of which only `classes` must be.

    Split `train` has no end; `val` and `test` have `held_out` images of each class. A class depends
    on nothing but its number and the seed.

    Raises:
      UserError: an unknown option or split, or a value out of range.
    """
    where = f"the source fractals:{argument}"
    if split not in SPLITS:
        raise UserError(f"{where} has no split {split!r}; {nearest(split, SPLITS)}")
    options: dict[str, Any] = read_options(where, argument, _OPTIONS)
    if options["classes"] is None:
        raise UserError(f"{where} does not say how many; expected such as fractals:classes=1000")
    kind = FractalSource if split == "train" else FiniteFractals
    return kind(**options | {"color": bool(options["color"])}, split=split)


def read_options(
    where: str, argument: str, known: Mapping[str, tuple[int, int, int | None]]
) -> dict[str, int | None]:
    """Reads `NAME=VALUE,...`, by each name's lowest and highest value and the one when not given.

    Raises:
      UserError: an unknown option, one that is there twice, or a value out of range.
    """
    found: dict[str, int] = {}
    for option in argument.split(",") if argument else ():
        name, _, value = option.partition("=")
        if name not in known:
            raise UserError(f"{where} has no option {name!r}; {nearest(name, known)}")
        if name in found:
            raise UserError(f"{where} says {name} twice")
        low, high, _ = known[name]
        expected = "true or false" if name == "color" else f"an integer from {low} to {high}"
        values = {"true": "1", "false": "0"} if name == "color" else {value: value}
        digits = values.get(value, "")
        number = int(digits) if re.fullmatch("[0-9]{1,18}", digits) else -1
        if not low <= number <= high:
            raise UserError(f"{where}: {name} is {value!r}; expected {expected}")
        found[name] = number
    return {name: row[2] for name, row in known.items()} | found


@functools.lru_cache
def _names(classes: int) -> tuple[str, ...]:
    return tuple(f"fractal{label}" for label in range(classes))


def _stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    # PCG64 by name, as what `default_rng` stands for may change.
    purpose = ("class", *SPLITS).index(purpose)
    return np.random.Generator(np.random.PCG64((seed, purpose, *key)))


@functools.cache
def system(seed: int, label: int) -> Float64[np.ndarray, "n 2 3"]:
    """The 2 to 8 contractions x -> A x + b of a class, each [A b]; read-only.

    The singular values s1 >= s2 of all A have a sum of s1 + 2 s2 within [(5 + n) / 2, (6 + n) / 2].
    Each pair is drawn from what leaves the later ones room, so that none is rejected. That sum does
    not see the offsets b: one system in a hundred is a line, or dust, which lights less than 8 % of
    an image of 64 x 64. It is drawn again.
    """
    for attempt in itertools.count():
        random = _stream(seed, "class", label, attempt)
        uniform = lambda low, high: low + (high - low) * random.random()  # noqa: B023, E731
        n = 2 + int(7 * random.random())
        left, maps = uniform((5 + n) / 2, (6 + n) / 2), np.empty((n, 2, 3))
        for i in range(n):
            later = 3 * (n - 1 - i)  # what the maps after this can take
            s1 = uniform(max(0, (left - later) / 3), min(1, left))
            s2 = uniform(max(0, (left - later - s1) / 2), min(s1, (left - s1) / 2))
            if i == n - 1:
                s2 = uniform(max(0, (left - 1) / 2), left / 3)
                s1 = left - 2 * s2
            left -= s1 + 2 * s2
            s2 = s2 if random.random() < 0.5 else -s2
            turns = [uniform(-math.pi, math.pi) for _ in range(2)]
            (cu, su), (cv, sv) = ((math.cos(turn), math.sin(turn)) for turn in turns)
            maps[i, 0] = cu * s1 * cv - su * s2 * sv, -cu * s1 * sv - su * s2 * cv, uniform(-1, 1)
            maps[i, 1] = su * s1 * cv + cu * s2 * sv, -su * s1 * sv + cu * s2 * cv, uniform(-1, 1)
        if np.count_nonzero(histogram(maps, 64, random)[0]) >= 0.08 * 64**2:
            maps.flags.writeable = False
            return maps


def disturb(
    maps: Float64[np.ndarray, "n 2 3"], random: np.random.Generator
) -> Float64[np.ndarray, "n 2 3"]:
    """Scales each parameter by a factor of its own; what then stretches too much is shrunk."""
    maps = maps * (1 + _JITTER * (2 * random.random(maps.shape) - 1))
    (a, b), (c, d) = np.moveaxis(maps[:, :, :2], 0, 2)
    norm = (np.sqrt((a + d) ** 2 + (b - c) ** 2) + np.sqrt((a - d) ** 2 + (b + c) ** 2)) / 2
    maps[:, :, :2] *= (_NORM / np.maximum(norm, _NORM))[:, None, None]
    return maps


def histogram(
    maps: Float64[np.ndarray, "n 2 3"],
    size: int,
    random: np.random.Generator,
    share: Any = (1.0, 1.0),
    corner: Any = (0.0, 0.0),
) -> tuple[Int64[np.ndarray, "size size"], Float64[np.ndarray, "2 2"]]:
    """Counts points of the attractor in every pixel.

    It is the union of its own images under words of maps. So a few points of it, where random
    orbits end, go through many random words, all with all at once: one large product, where
    a step of one orbit each would be many small ones.

    Returns:
      the counts [y x], and the [low high] of the points' x and y, which are stretched over `share`
      of each side of the image, from `corner` on.
    """
    n, words, points = len(maps), 128 + 2 * size, 16 + size * 5 // 4
    det = maps[:, 0, 0] * maps[:, 1, 1] - maps[:, 0, 1] * maps[:, 1, 0]
    chance = np.maximum(np.abs(det), _LEAST)
    chance = np.append(chance / chance.sum(), 1)
    below = np.append(0, np.cumsum(chance[:-1]))
    table = np.stack([*maps, np.eye(2, 3)], axis=-1)  # map n is the identity

    # From the first map's fixed point, which the attractor has.
    (a, b, e), (c, d, f) = maps[0]
    ends = np.array([[(1 - d) * e + b * f], [(1 - a) * f + c * e]]) / ((1 - a) * (1 - d) - b * c)
    letters = np.searchsorted(below[1:-1], random.random((_ORBIT, points)), side="right")
    for step in np.moveaxis(table.take(letters, axis=2), 2, 0):
        ends = step[:, 0] * ends[0] + step[:, 1] * ends[1] + step[:, 2]
    x, y = ends.astype(np.float32)

    # A word's letters are the digits of a number, as in arithmetic coding, and the numbers are
    # spread evenly. A word ends when it has its share of the measure: longer ones would send all
    # points into one pixel, shorter ones would repeat each other.
    number, measure = (np.arange(words) + random.random(words)) / words, np.ones(words)
    word = table[:, :, n:]
    for _ in range(_WORD):
        going = measure * words > 1
        if np.count_nonzero(going) < words // 16:
            break
        letters = np.where(going, np.searchsorted(below[1:-1], number, side="right"), n)
        number = (number - below[letters]) / chance[letters]
        measure *= chance[letters]
        step = table.take(letters, axis=2, mode="clip")
        shift, word = word[:, 2], word[:, :1] * step[0] + word[:, 1:2] * step[1]
        word[:, 2] += shift
    word = word.astype(np.float32)[..., None]

    *sides, spare, bins = _scratch(words, points)
    box = np.empty((2, 2))
    for i, (side, (a, b, e)) in enumerate(zip(sides, word, strict=True)):
        np.multiply(a, x, out=side)
        side += np.multiply(b, y, out=spare)
        side += e
        box[i] = side.min(), side.max()
        side -= side.min()
        side *= np.float32((share[i] * size - 0.01) / max(float(side.max()), 1e-9))
        side += np.float32(corner[i] * size)
        np.floor(side, out=side)
    sides[1] *= np.float32(size)
    np.copyto(bins, np.add(*sides, out=spare), casting="unsafe")
    return np.bincount(bins.ravel(), minlength=size * size).reshape(size, size), box


_LOCAL = threading.local()


def _scratch(*shape: int) -> list[np.ndarray]:
    """This thread's three float32 arrays and int64 one: mapping new ones costs more than sums."""
    if getattr(_LOCAL, "shape", None) != shape:
        _LOCAL.arrays = [np.empty(shape, t) for t in (*[np.float32] * 3, np.int64)]
        _LOCAL.shape = shape
    return _LOCAL.arrays


def shade(counts: Int64[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Grey by the root of the counts: 0 for none, then 64 to 255, for 4 times the mean or more."""
    most = 1 + 4 * int(counts.sum()) // np.count_nonzero(counts)
    levels = 64 + 191 * np.sqrt(np.arange(most + 1) / most)
    levels[0] = 0
    return levels.astype(np.uint8).take(counts, mode="clip")


def paint(
    counts: Int64[np.ndarray, "h w"], random: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Colours the counts by a random range of hues, on slow noise in a darker one."""
    noise = (256 * random.random((5, 5))).astype(np.uint8)
    noise = cv2.resize(noise, (32, 32), interpolation=cv2.INTER_CUBIC)
    noise = cv2.resize(noise, counts.shape, interpolation=cv2.INTER_LINEAR)
    colors = np.empty((256, 1, 3), np.uint8)  # of the noise, then from 64 on of the counts
    for part, rich, dark, bright in ((slice(64), 0.0, 0.1, 0.6), (slice(64, 256), 0.4, 0.7, 1.0)):
        hue, turn, saturation, value = random.random(4)
        ramp = np.linspace(0, 1, len(colors[part]))
        colors[part, 0, 0] = (256 * (1 + hue + (turn - 0.5) * ramp)).astype(np.int64) % 256
        colors[part, 0, 1] = int(255 * (rich + (1 - rich) * saturation))
        colors[part, 0, 2] = 255 * (dark + (bright - dark) * value) * (0.4 + 0.6 * ramp)
    colors = cv2.cvtColor(colors, cv2.COLOR_HSV2RGB_FULL)
    grey = shade(counts)
    return cv2.applyColorMap(np.where(grey, grey, noise >> 2), colors)

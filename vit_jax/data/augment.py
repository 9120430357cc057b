"""RandAugment and random erasing of uint8 images: TensorFlow's pixels, without TensorFlow."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from vit_jax.data.images import Image
from vit_jax.errors import UserError

_F32 = np.float32
_GREY = 128  # of pixels that come from outside of the image
_VALUES = np.arange(256)
_STRIP = 32  # rows at a time, where float32 copies of all would leave the cache


def _look_up(image: Image, table: np.ndarray) -> Image:
    """Replaces each value by that of a table [256], or [256 c] with one for each channel."""
    table = table.astype(np.uint8).reshape(1, 256, -1)
    return cv2.LUT(image, table).reshape(image.shape)


def _look_up_each(image: Image, make: Callable[[np.ndarray], np.ndarray]) -> Image:
    """Replaces each value by that of a table made of its channel's histogram [256]."""
    bins = [cv2.calcHist([image], [i], None, [256], [0, 256]) for i in range(image.shape[2])]
    tables = [make(counts.ravel().astype(np.int64)) for counts in bins]
    return _look_up(image, np.stack(tables, axis=-1))


def _blend(dull: np.ndarray | int, image: np.ndarray, factor: float) -> UInt8[np.ndarray, "..."]:
    """Returns dull + factor (image - dull), in float32, clipped and rounded down."""
    dull, out = np.asarray(dull, _F32), image.astype(_F32)
    out -= dull
    out *= _F32(factor)
    out += dull
    return out.clip(0, 255, out=out).astype(np.uint8)


def _project(image: Image, *rows: Sequence[Any]) -> Image:
    """Takes the pixel at rows @ (x, y, 1) for that at (x, y): the nearest one, grey from outside.

    TensorFlow rounds the position half away from zero, OpenCV to even: it gets it rounded.
    """
    h, w, c = image.shape
    x, y = np.arange(w, dtype=_F32), np.arange(h, dtype=_F32)[:, None]
    positions = []
    for by_x, by_y, shift in _F32(rows):
        position = by_x * x + by_y * y
        position += shift
        position += np.copysign(np.nextafter(_F32(0.5), _F32(0)), position)
        positions.append(np.trunc(position, out=position))
    fill = (cv2.BORDER_CONSTANT, (_GREY,) * c)
    return cv2.remap(image, *positions, cv2.INTER_NEAREST, None, *fill).reshape(image.shape)


def autocontrast(image: Image, _: None = None) -> Image:
    """Stretches each channel to 0 to 255, rounded down."""

    def table(counts):
        low, high = _F32(np.flatnonzero(counts)[[0, -1]])
        if low == high:
            return _VALUES
        scale = _F32(255) / (high - low)
        return (_VALUES.astype(_F32) * scale + -low * scale).clip(0, 255)

    return _look_up_each(image, table)


def equalize(image: Image, _: None = None) -> Image:
    """Spreads the values of each channel evenly, as Pillow does."""

    def table(counts):
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        below = np.cumsum(counts) - counts
        return np.minimum((below + step // 2) // step, 255) if step else _VALUES

    return _look_up_each(image, table)


def invert(image: Image, _: None = None) -> Image:
    """Turns v into 255 - v."""
    return 255 - image


def posterize(image: Image, bits: int) -> Image:
    """Keeps the upper `bits` bits, and one bit if that is none or more than 8."""
    shift = 8 - bits if 0 < bits <= 8 else 7  # as uint8, and as TensorFlow limits it
    return _look_up(image, _VALUES >> shift << shift)


def solarize(image: Image, threshold: int) -> Image:
    """Inverts what is not below `threshold` modulo 256: of 256, that is all, not nothing.

    In the reference the threshold becomes uint8 unchecked (google-research/big_vision, issue 110).
    """
    return _look_up(image, np.where(_VALUES < threshold % 256, _VALUES, 255 - _VALUES))


def solarize_add(image: Image, addition: int) -> Image:
    """Adds to what is below 128."""
    return _look_up(image, np.where(_VALUES < 128, (_VALUES + addition).clip(0, 255), _VALUES))


def color(image: Image, factor: float) -> Image:
    """Blends with the grey image (0); a grey image stays itself."""
    if image.shape[2] == 1:
        return image
    out = np.empty_like(image)
    for top in range(0, len(image), _STRIP):
        part = image[top : top + _STRIP]
        channels = zip(cv2.split(part), _F32([0.2989, 0.587, 0.114]), strict=True)
        red, green, blue = (channel * _F32(1 / 255) * share for channel, share in channels)
        grey = ((red + green + blue) * _F32(255.5)).astype(np.uint8)  # tf.image.rgb_to_grayscale
        out[top : top + _STRIP] = _blend(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), part, factor)
    return out


def contrast(image: Image, factor: float) -> Image:
    """Blends with the value h w / 256, at most 255 (0), whatever the image shows.

    The reference adds up a histogram's counts where it means their mean: 196 at 224 x 224.
    """
    grey = min(image.shape[0] * image.shape[1] // 256, 255)
    return _look_up(image, _blend(grey, _VALUES, factor))


def brightness(image: Image, factor: float) -> Image:
    """Blends with black (0)."""
    return _look_up(image, _blend(0, _VALUES, factor))


def sharpness(image: Image, factor: float) -> Image:
    """Blends with the image smoothed inside its border (0).

    Nine shares are added in TensorFlow's order: by another, some are rounded down to one less.
    """
    out, (h, w, c) = image.copy(), image.shape
    for top in range(0, h - 2 if w > 2 else 0, _STRIP):
        part = image[top : top + _STRIP + 2]
        outer, centre = (part * (_F32(share) / _F32(13)) for share in (1, 5))
        smooth = np.zeros((len(part) - 2, w - 2, c), _F32)
        for y, x in np.ndindex(3, 3):
            smooth += (centre if y == x == 1 else outer)[y : y + len(smooth), x : x + w - 2]
        inside = (slice(top + 1, top + 1 + len(smooth)), slice(1, w - 1))
        out[inside] = _blend(smooth.astype(np.uint8), image[inside], factor)
    return out


def rotate(image: Image, degrees: float) -> Image:
    """Rotates around the centre, against the clock where `degrees` is positive."""
    angle = _F32(degrees) * _F32(math.pi / 180)
    cos, sin = _F32(math.cos(angle)), _F32(math.sin(angle))
    bottom, right = (_F32(side - 1) for side in image.shape[:2])
    x = (right - (cos * right - sin * bottom)) / _F32(2)
    y = (bottom - (sin * right + cos * bottom)) / _F32(2)
    return _project(image, (cos, -sin, x), (sin, cos, y))


def shear_x(image: Image, slope: float) -> Image:
    """Moves row y to the left by slope y pixels."""
    return _project(image, (1, slope, 0), (0, 1, 0))


def shear_y(image: Image, slope: float) -> Image:
    """Moves column x up by slope x pixels."""
    return _project(image, (1, 0, 0), (slope, 1, 0))


def translate_x(image: Image, pixels: float) -> Image:
    """Moves the image to the left."""
    return _project(image, (1, 0, pixels), (0, 1, 0))


def translate_y(image: Image, pixels: float) -> Image:
    """Moves the image up."""
    return _project(image, (1, 0, 0), (0, 1, pixels))


def cutout(image: Image, where: tuple[int, int, int]) -> Image:
    """Greys the square of (half its side, row, column), as far as it lies in the image."""
    half, *centre = where
    image = image.copy()
    image[tuple(slice(max(i - half, 0), i + half) for i in centre)] = _GREY
    return image


# In the reference's order: the operation, its argument at a level, whether that changes sign.
OPS: dict[str, tuple[Callable, Callable[[float], Any], bool]] = {
    "AutoContrast": (autocontrast, lambda level: None, False),
    "Equalize": (equalize, lambda level: None, False),
    "Invert": (invert, lambda level: None, False),
    "Rotate": (rotate, lambda level: level / 10 * 30, True),
    "Posterize": (posterize, lambda level: int(level / 10 * 4), False),
    "Solarize": (solarize, lambda level: int(level / 10 * 256), False),
    "Color": (color, lambda level: level / 10 * 1.8 + 0.1, False),
    "Contrast": (contrast, lambda level: level / 10 * 1.8 + 0.1, False),
    "Brightness": (brightness, lambda level: level / 10 * 1.8 + 0.1, False),
    "Sharpness": (sharpness, lambda level: level / 10 * 1.8 + 0.1, False),
    "ShearX": (shear_x, lambda level: level / 10 * 0.3, True),
    "ShearY": (shear_y, lambda level: level / 10 * 0.3, True),
    "TranslateX": (translate_x, lambda level: level / 10 * 100, True),
    "TranslateY": (translate_y, lambda level: level / 10 * 100, True),
    "Cutout": (cutout, lambda level: int(level / 10 * 40), False),
    "SolarizeAdd": (solarize_add, lambda level: int(level / 10 * 110), False),
}


def _expect(sound: bool, setting: str, value: Any, expected: str) -> None:
    if not sound:
        raise UserError(f"{setting} is {value!r}; expected {expected}")


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """RandAugment (arXiv 1909.13719) as in AugReg (arXiv 2106.10270) and big_vision.

    Theirs is that of TPU EfficientNet, with other arguments than most; these are its pixels, bit
    by bit. A magnitude of 0 does change images. A grey image is what three equal channels become.

    Attributes:
      layers: how many operations follow one another, each any of OPS, equally likely.
      magnitude: strength of the operations; 10 was meant to be the most, AugReg takes up to 20.
    """

    layers: int = 2
    magnitude: int = 10

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            sound = isinstance(value, int) and value >= 0
            _expect(sound, f"rand_augment.{name}", value, "a whole number, 0 or more")

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        """Draws for each layer: the operation, the sign if it has one, cutout's row and column."""
        for _ in range(self.layers):
            function, argument, signed = tuple(OPS.values())[random.integers(len(OPS))]
            value = argument(self.magnitude)
            if signed and random.random() < 0.5:
                value = -value
            if function is cutout:
                value = (value, *(int(random.integers(side)) for side in image.shape[:2]))
            image = function(image, value)
        return image


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """Random erasing (arXiv 1708.04896) as in timm and DeiT, on uint8 pixels.

    timm fills with N(0, 1) after normalisation. Here that is 255 (mean + std N(0, 1)), rounded and
    clipped to 0 to 255: with the defaults, 32% of the noise is black or white.

    Attributes:
      probability: of erasing a box, if one of ten random ones is smaller than the image.
      area: (low, high) of the box's share of the image, uniform.
      ratio: (low, high) of its height / width, log-uniform; timm's high is 1 / 0.3.
      fill: "noise" is drawn for each pixel and channel (timm's pixel), "mean" is `mean` (const).
      mean, std: what normalisation subtracts and divides by, as shares of 255: one number, or one
        for each channel.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: str = "noise"
    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5

    def __post_init__(self):
        for name, value, expected in (
            ("probability", (0, self.probability, 1), "a number from 0 to 1"),
            ("area", (1e-9, *self.area, 1), "(low, high), 0 < low <= high <= 1"),
            ("ratio", (1e-9, *self.ratio, 1e9), "(low, high), 0 < low <= high"),
            ("mean", (-1e9, np.min(self.mean), np.max(self.mean), 1e9), "finite numbers"),
            ("std", (0, np.min(self.std), np.max(self.std), 1e9), "finite numbers, 0 or more"),
        ):
            sound = len(value) == (3 if name == "probability" else 4)
            sound = sound and all(low <= high for low, high in itertools.pairwise(value))
            _expect(sound, f"random_erasing.{name}", getattr(self, name), expected)
        sound = self.fill in ("noise", "mean")
        _expect(sound, "random_erasing.fill", self.fill, "'noise' or 'mean'")

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        """Draws whether to erase; for each try area, ratio; the row, the column; the noise."""
        h, w, c = image.shape
        for name in ("mean", "std"):
            value = getattr(self, name)
            _expect(np.size(value) in (1, c), f"random_erasing.{name}", value, f"1 or {c} numbers")
        if random.random() >= self.probability:
            return image
        for _ in range(10):
            area = random.uniform(*self.area) * h * w
            ratio = math.exp(random.uniform(*map(math.log, self.ratio)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < h and width < w:
                top, left = random.integers(h - height + 1), random.integers(w - width + 1)
                noise = random.standard_normal((height, width, c)) if self.fill == "noise" else 0
                fill = np.rint(255 * (np.asarray(self.mean) + np.asarray(self.std) * noise))
                image = image.copy()
                image[top : top + height, left : left + width] = fill.clip(0, 255)
                break
        return image

"""Colour jitter, TrivialAugment and 3-Augment: torchvision's and DeiT III's pixels, by Pillow."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageFilter
import PIL.ImageOps

from vit_jax.data.images import Image
from vit_jax.errors import UserError

Picture = PIL.Image.Image  # of mode L or RGB


def _with_pillow(
    image: Image, change: Callable[[Picture], Picture]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Changes an image [h w 1] or [h w 3] by Pillow."""
    picture = PIL.Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    return np.asarray(change(picture)).reshape(image.shape)


def adjust_brightness(picture: Picture, factor: float) -> Picture:
    """Blends with black (0)."""
    return PIL.ImageEnhance.Brightness(picture).enhance(factor)


def adjust_contrast(picture: Picture, factor: float) -> Picture:
    """Blends with the mean of the grey image (0)."""
    return PIL.ImageEnhance.Contrast(picture).enhance(factor)


def adjust_saturation(picture: Picture, factor: float) -> Picture:
    """Blends with the grey image (0)."""
    return PIL.ImageEnhance.Color(picture).enhance(factor)


def adjust_hue(picture: Picture, shift: float) -> Picture:
    """Turns the hue by a share of the circle, of 256 steps, as torchvision by int(255 share)."""
    if picture.mode == "L":
        return picture
    hue, *others = picture.convert("HSV").split()
    turned = hue.point([(value + int(shift * 255)) % 256 for value in range(256)])
    return PIL.Image.merge("HSV", (turned, *others)).convert("RGB")


_ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Colour jitter as in torchvision: up to four adjustments, in random order.

    Attributes:
      brightness: strength b: the brightness is times a factor uniform in max(0, 1 - b) to 1 + b.
      contrast: strength of the contrast, likewise.
      saturation: strength of the saturation, likewise; timm's `color_jitter` is all three.
      hue: strength of the hue, which turns by a uniform share of the circle in +-hue, up to 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            most = 0.5 if name == "hue" else math.inf
            if not (0 <= value <= most and value < math.inf):
                raise UserError(
                    f"color_jitter.{name} is {value}; expected a number from 0"
                    + (" to 0.5" if name == "hue" else " up")
                )

    def adjusted(self, picture: Picture, random: np.random.Generator) -> Picture:
        """Draws the order, and the four factors; a strength of 0 leaves out its adjustment."""
        order, shares = random.permutation(4), random.random(4)
        strengths = self.brightness, self.contrast, self.saturation
        ranges = [(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
        ranges.append((-self.hue, self.hue))
        for i in order.tolist():
            low, high = ranges[i]
            if low < high:
                picture = _ADJUST[i](picture, float(low + shares[i] * (high - low)))
        return picture

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        return _with_pillow(image, lambda picture: self.adjusted(picture, random))


@dataclasses.dataclass(frozen=True)
class ThreeAugment:
    """3-Augment of DeiT III (arXiv 2204.07118): grey, solarised or blurred, then colour jitter.

    The three are equally likely. Values from 128 are inverted; the standard deviation of the blur
    is uniform in 0.1 to 2 pixels. The paper's crop and flip are options of their own.

    Attributes:
      jitter: strength of the colour jitter's brightness, contrast and saturation.
    """

    jitter: float = 0.3

    def __post_init__(self):
        if not 0 <= self.jitter < math.inf:
            raise UserError(f"three_augment.jitter is {self.jitter}; expected a number from 0 up")

    def changed(self, picture: Picture, random: np.random.Generator) -> Picture:
        """Draws which of the three; the radius, if it is the blur; then as `ColorJitter`."""
        which = random.integers(3)
        if which == 0:
            picture = picture.convert("L").convert(picture.mode)
        elif which == 1:
            picture = PIL.ImageOps.solarize(picture)
        else:
            picture = picture.filter(PIL.ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return ColorJitter(*(self.jitter,) * 3).adjusted(picture, random)

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        return _with_pillow(image, lambda picture: self.changed(picture, random))


def _moved(picture: Picture, *rows: int | float) -> Picture:
    """Takes the pixel at rows @ (x, y, 1) for that at (x, y): the nearest one, black outside."""
    return picture.transform(picture.size, PIL.Image.Transform.AFFINE, rows)


def _sharpened(picture: Picture, factor: float) -> Picture:
    return PIL.ImageEnhance.Sharpness(picture).enhance(factor)


BINS = 31  # magnitudes, from none to the most
# The operation of a magnitude, the magnitude of the first and the last bin, whether it has a sign.
OPS: dict[str, tuple[Callable[[Picture, float], Picture], int | float, int | float, bool]] = {
    "Identity": (lambda picture, _: picture, 0, 0, False),
    "ShearX": (lambda picture, m: _moved(picture, 1, m, 0, 0, 1, 0), 0, 0.99, True),
    "ShearY": (lambda picture, m: _moved(picture, 1, 0, 0, m, 1, 0), 0, 0.99, True),
    "TranslateX": (lambda picture, m: _moved(picture, 1, 0, -int(m), 0, 1, 0), 0, 32, True),
    "TranslateY": (lambda picture, m: _moved(picture, 1, 0, 0, 0, 1, -int(m)), 0, 32, True),
    "Rotate": (lambda picture, m: picture.rotate(m), 0, 135, True),
    "Brightness": (lambda picture, m: adjust_brightness(picture, 1 + m), 0, 0.99, True),
    "Color": (lambda picture, m: adjust_saturation(picture, 1 + m), 0, 0.99, True),
    "Contrast": (lambda picture, m: adjust_contrast(picture, 1 + m), 0, 0.99, True),
    "Sharpness": (lambda picture, m: _sharpened(picture, 1 + m), 0, 0.99, True),
    "Posterize": (lambda picture, m: PIL.ImageOps.posterize(picture, round(m)), 8, 2, False),
    "Solarize": (PIL.ImageOps.solarize, 255, 0, False),
    "AutoContrast": (lambda picture, _: PIL.ImageOps.autocontrast(picture), 0, 0, False),
    "Equalize": (lambda picture, _: PIL.ImageOps.equalize(picture), 0, 0, False),
}


def trivial_augment(image: Image, random: np.random.Generator) -> Image:
    """TrivialAugment (arXiv 2103.10158) of the wide space, as torchvision's TrivialAugmentWide.

    One of OPS, equally likely, at one of BINS magnitudes, equally likely. Draws the operation, the
    bin, and the sign if it has one.
    """
    operation, first, last, signed = tuple(OPS.values())[random.integers(len(OPS))]
    magnitude = float(first + (last - first) * random.integers(BINS) / (BINS - 1))
    if signed and random.random() < 0.5:
        magnitude = -magnitude
    return _with_pillow(image, lambda picture: operation(picture, magnitude))

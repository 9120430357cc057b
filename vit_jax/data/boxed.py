"""Boxes drawn on images, with names."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jaxtyping import Float, Integer, UInt8

from vit_jax.data.images import Image
from vit_jax.data.masks import default_palette

_LEAST = 512  # pixels of the longer side, to which smaller images are enlarged


def boxed(
    image: Image,
    corners: Float[np.ndarray, "n 4"],
    classes: Integer[np.ndarray, " n"],
    texts: Sequence[str],
    *,
    least: int = _LEAST,
) -> UInt8[np.ndarray, "_h _w 3"]:
    """Draws boxes on an image, each in the colour of its class, with a text on top.

    Args:
      corners: x0 y0 x1 y1 of each box, in pixels; the first is drawn last, over the others.
      least: a smaller image is enlarged, by a whole number, up to so many pixels.
    """
    gray = image.shape[2] < 3
    page = PIL.Image.fromarray(image[..., 0] if gray else image[..., :3]).convert("RGB")
    factor = max(1, least // max(page.size))
    page = page.resize((page.width * factor, page.height * factor), PIL.Image.Resampling.NEAREST)
    size = max(12, round(max(page.size) / 60))  # of letters, in pixels
    draw, font = PIL.ImageDraw.Draw(page), PIL.ImageFont.load_default(size)
    palette = default_palette(int(classes.max(initial=0)) + 2)[1:]  # without black
    for box, label, text in list(zip(corners, classes, texts, strict=True))[::-1]:
        colour = palette[label]
        x0, y0, x1, y1 = (float(value) * factor for value in box)
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), None, colour, max(2, size // 6))
        text = "".join(drawable(c, font) for c in text)
        if not text:
            continue
        width, height = font.getlength(text) + 4, size + 4
        left = min(max(x0, 0), max(page.width - width, 0))
        top = y0 - height if y0 >= height else max(y0, 0)  # inside, where there is no room above
        draw.rectangle((left, top, left + width, top + height), colour)
        bright = np.dot(colour, (0.299, 0.587, 0.114)) > 128
        draw.text((left + 2, top + 1), text, (0, 0, 0) if bright else (255, 255, 255), font)
    return np.asarray(page)


def drawable(character: str, font: Any) -> str:
    """A character that the font has: itself, without accents, or "?"."""
    if character.isascii():
        return character if character.isprintable() else " "
    missing = bytes(font.getmask("\uffff"))
    for each in (character, unicodedata.normalize("NFKD", character)[0]):
        if each.isascii() or bytes(font.getmask(each)) != missing:
            return each
    return "" if unicodedata.combining(character) else "?"

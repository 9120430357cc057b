"""Masks: a class for each pixel, as PNG files and in memory, with their palettes."""

import io
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from vit_jax.data.images import MAX_PIXELS, BadImage, Image, damaged, pillow_orientation
from vit_jax.errors import UserError

Mask = UInt8[np.ndarray, "_h _w"]  # a class for each pixel
IGNORED = 255  # of a mask: of no class
MOST = 255  # classes, 0 to 254
Palette = tuple[tuple[int, int, int], ...]  # the colour of each class, RGB of 0 to 255
Colours = Mapping[int, int]  # 65536 R + 256 G + B -> class

_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _INDEXED, _RGBA = 0, 2, 3, 6  # kinds of a PNG
_KINDS = {_RGB: "RGB", 4: "grey with transparency", _RGBA: "RGB with transparency"}
# Black, and the seven colours of Okabe and Ito, which all kinds of sight tell apart.
_FIRST = (
    *((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115)),
    *((240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)),
)


def header(data: bytes) -> tuple[int, int, int, int]:
    """The (h, w, bits, kind) of a PNG, from its first 26 bytes.

    Raises:
      UserError: it is another image or none.
      BadImage: it is cut off, or claims more pixels than any image may have.
    """
    if data[:8] != _PNG[: len(data)] or not data:
        raise UserError(
            "it is no PNG; masks are indexed or grey PNG files, which keep the number of each class"
        )
    if len(data) < 26:
        raise BadImage("it is cut off")
    w, h, bits, kind = struct.unpack_from(">IIBB", data, 16)
    if h * w > MAX_PIXELS:
        raise BadImage(f"it claims {h} x {w} pixels")
    return h, w, bits, kind


def decode_mask(data: bytes, colours: Colours | None = None) -> Mask:
    """Decodes a PNG to the numbers in it: the indices of a palette, or grey values of any depth.

    Args:
      colours: the class of each colour, of an RGB mask, or of a palette or grey. An alpha channel
        may be there if nothing is transparent.

    Raises:
      BadImage: a damaged file.
      UserError: no PNG, or one that is turned by EXIF, has numbers above 255, or is of colours
        without `colours` or with one that is not in it.
    """
    _, _, bits, kind = header(data)
    if kind in _KINDS and (kind not in (_RGB, _RGBA) or colours is None):
        raise UserError(
            f"it is {_KINDS[kind]}, and the class of a pixel is a number: save it as an indexed "
            "or grey PNG (of RGB, colours=FILE, a table of names and r, g, b, says which is which)"
        )
    with damaged(data), PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
        opened.load()
        turned = pillow_orientation(opened)
        found = np.asarray(opened)  # bits of one are bool
        deep = colours is None or opened.mode.startswith("I")  # which Pillow makes no RGB of
        rgb = None if deep else np.asarray(opened.convert("RGB"))
    if turned != 1:
        raise UserError(f"it is turned by EXIF (orientation {turned}): save it upright")
    if kind == _RGBA and found[..., 3].min(initial=255) < 255:
        raise UserError("it is RGB with transparency: save it without transparency")
    if rgb is not None:
        return _by_colour(rgb, colours)
    if kind == _GREY and bits < 8:  # which Pillow spreads over 0 to 255
        return found.astype(np.uint8) // {1: 1, 2: 85, 4: 17}[bits]
    if found.max(initial=0) > IGNORED:
        raise UserError(
            f"it has the number {found.max()} (it is of 16 bits), and classes go to {MOST - 1}"
        )
    found = found.astype(np.uint8)
    return found if colours is None else _by_colour(np.stack([found] * 3, -1), colours)


def _by_colour(pixels: UInt8[np.ndarray, "h w 3"], colours: Colours) -> Mask:
    packed = pixels.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    known = np.array(sorted(colours), np.int32)
    at = np.searchsorted(known, packed).clip(max=len(known) - 1)
    if not (fits := known[at] == packed).all():
        colour = pixels[~fits][0].tolist()
        raise UserError(
            f"it has the colour {colour}, which the table of colours does not name (what is of no "
            "class is called ignored there)"
        )
    return np.array([colours[key] for key in known.tolist()], np.uint8)[at]


def check_classes(name: str, mask: Mask, k: int) -> None:
    """Raises a UserError if a mask has a class of k and above."""
    if (odd := mask[(mask >= k) & (mask != IGNORED)]).size:
        raise UserError(
            f"{name} has the class {odd[0]} in its mask, but there are {k}, 0 to {k - 1} (255 is "
            "of none)"
        )


def palette_of(data: bytes) -> list[tuple[int, int, int]] | None:
    """The colours of an indexed PNG, as many as it has; None of another."""
    if header(data)[3] != _INDEXED:
        return None
    with damaged(data), PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
        flat = opened.getpalette("RGB") or []
    return [tuple(flat[i : i + 3]) for i in range(0, len(flat), 3)]


def default_palette(k: int) -> Palette:
    """Colours for k classes: black, the seven of Okabe and Ito, then those of Pascal VOC."""
    return (*_FIRST, *map(_voc, range(len(_FIRST), max(k, len(_FIRST)))))[:k]


def voc_palette(k: int) -> Palette:
    """The colours of Pascal VOC: bit by bit, of the highest first, of a class's number."""
    return tuple(map(_voc, range(k)))


def _voc(number: int) -> tuple[int, int, int]:
    found = [0, 0, 0]
    for shift in range(7, -1, -1):
        for channel in range(3):
            found[channel] |= (number >> channel & 1) << shift
        number >>= 3
    return tuple(found)


def encode_mask(mask: Mask, palette: Sequence[Sequence[int]]) -> bytes:
    """Encodes as a PNG of 8-bit indices; 255 is white unless the palette has it."""
    picture = PIL.Image.fromarray(mask, "L")
    flat = [value for colour in palette for value in colour]
    picture.putpalette(flat + [255] * (768 - len(flat)))
    out = io.BytesIO()
    picture.save(out, "PNG", bits=8)
    return out.getvalue()


def overlay(image: Image, mask: Mask, palette: Sequence[Sequence[int]]) -> Image:
    """The image, half covered by the colours of the classes; RGB."""
    table = np.full((256, 3), 255, np.uint16)
    table[: len(palette)] = palette
    return ((image.astype(np.uint16) + table[mask] + 1) // 2).astype(np.uint8)

"""Image files: bytes to pixels and back."""

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg
from jaxtyping import UInt8

from vit_jax.errors import UserError, nearest

Image = UInt8[np.ndarray, "h w c"]
JPEG_MODES = ("accurate", "fast")
# Of more pixels Pillow suspects a decompression bomb, and refuses.
MAX_PIXELS = 178_956_970
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow knows more; for EPS it would start a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

_ORIENTATION = 0x0112  # the EXIF tag
_MAGIC = {
    re.compile(pattern, re.DOTALL): name
    for pattern, name in {
        rb"\xff\xd8\xff": "JPEG",
        rb"\x89PNG\r\n\x1a\n": "PNG",
        rb"RIFF....WEBP": "WEBP",
        rb"GIF8[79]a": "GIF",
        rb"BM.{4}\0{4}....[\x0c(4@lx|8]\0{3}": "BMP",  # the sizes of its second header
        rb"II[*+]\0|MM\0[*+]": "TIFF",
        rb"P[1-6][\s#]": "PPM",
        rb"....ftyp(avi[fs]|mi[fa]f1.{4}.*avif)": "AVIF",
    }.items()
}


def sniff(start: bytes) -> str | None:
    """Which of FORMATS the first bytes of a file (32 are enough) are of, None for any other."""
    for magic, name in _MAGIC.items():
        if magic.match(start):
            return name
    return None


class BadImage(UserError):
    """Bytes that are no readable image."""


def check_jpeg(mode: str) -> None:
    """Raises a UserError unless `mode` is one of JPEG_MODES."""
    if mode not in JPEG_MODES:
        raise UserError(f"data jpeg {mode!r}: {nearest(mode, JPEG_MODES)}")


def decode(data: bytes, jpeg: str = "accurate", exif: bool = False) -> Image:
    """Decodes a JPEG, PNG, WebP, GIF (its first frame), BMP, TIFF or PPM.

    Grey images have one channel, all others three: transparency is dropped, CMYK becomes RGB, and
    of 16 bits the upper 8 are kept.

    Args:
      jpeg: "accurate" gives the pixels of Pillow, OpenCV and TensorFlow's INTEGER_ACCURATE, "fast"
        those of TensorFlow's default (INTEGER_FAST), in 5% less time. CMYK, and files with faults
        that Pillow passes over, are always decoded accurately.
      exif: whether to turn the image as its EXIF orientation says; a TIFF is turned in any case.

    Raises:
      BadImage: bytes that are no image, cut off or damaged, or more than MAX_PIXELS.
    """
    image = _decode_jpeg(data, jpeg) if data[:3] == b"\xff\xd8\xff" else None
    if image is not None and not exif:
        return image
    with _damaged(), PIL.Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        if image is None:
            return from_pillow(opened, exif)
        orientation = opened.getexif().get(_ORIENTATION, 1)
    return _turned(image, orientation)


@contextlib.contextmanager
def _damaged() -> Iterator[None]:
    """Says as a BadImage what Pillow's readers raise on damaged bytes."""
    try:
        yield
    except PIL.UnidentifiedImageError:
        raise BadImage("it is of no known format, or empty") from None
    except (
        *(OSError, ValueError, TypeError, SyntaxError, LookupError, ArithmeticError, EOFError),
        *(AttributeError, RuntimeError, struct.error, zlib.error),
        PIL.Image.DecompressionBombError,
    ) as error:
        raise BadImage(f"{type(error).__name__}: {error}") from None


def decode_box(
    data: bytes, box: Callable[[int, int], tuple[int, int, int, int]], jpeg: str, exif: bool = False
) -> Image:
    """Decodes the (top, left, height, width) that `box(h, w)` asks for; `decode`'s very pixels.

    Of most JPEG files the rows below it are not decoded, so damage there is not seen either.
    """
    at = None if exif else _height_at(data)
    if at is None:
        image = decode(data, jpeg, exif)
        top, left, height, width = box(*image.shape[:2])
    else:
        h, w = struct.unpack_from(">HH", data, at)
        top, left, height, width = box(h, w)
        # Chroma is interpolated from one more of its rows, two of the image's.
        image = _decode_rows(data, jpeg, at, top + height + 2)
        image = decode(data, jpeg) if image is None else image
    return image[top : top + height, left : left + width]


def _decode_rows(data: bytes, mode: str, at: int, rows: int) -> Image | None:
    """The first rows of a JPEG: said to have no more, libjpeg stops there. None if in doubt."""
    h, w, channels = struct.unpack_from(">HHB", data, at)
    if rows >= h or h * w > MAX_PIXELS:
        return None
    image = np.empty((rows, w, channels), np.uint8)
    colours = "GRAY" if channels == 1 else "RGB"
    try:
        shorter = b"".join((data[:at], struct.pack(">H", rows), data[at + 2 :]))
        simplejpeg.decode_jpeg(shorter, colours, fastdct=mode == "fast", buffer=image)
    except ValueError as error:  # of the first thing amiss, which are to be the rows left over
        if not str(error).endswith("extraneous bytes before marker 0xd9"):
            return None
    return image


def _height_at(data: bytes) -> int | None:
    """Where a JPEG says its height; None for progressive ones, CMYK, or with restart markers."""
    at = 2
    while data[:3] == b"\xff\xd8\xff" and at + 10 < len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if kind in (0xC0, 0xC1):
            return at + 5 if data[at + 9] in (1, 3) else None
        if kind == 0xDD or (0xC2 <= kind <= 0xDA and kind not in (0xC4, 0xD8)):
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _decode_jpeg(data: bytes, mode: str) -> Image | None:
    """None where Pillow is to decide: CMYK, too large, or with faults that others pass over."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS or colours in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(
            data, "GRAY" if colours == "Gray" else "RGB", fastdct=mode == "fast"
        )
    except ValueError:
        return None


def _turned(image: Image, orientation: int) -> UInt8[np.ndarray, "new_h new_w c"]:
    """Undoes an EXIF orientation of 1 to 8."""
    turns = {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}.get(orientation, 0)
    image = np.rot90(image, turns)
    if orientation in (2, 4, 5, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def read_image(image: Any, jpeg: str = "accurate", exif: bool = False) -> Image:
    """Reads a path, encoded bytes, a Pillow image or an array into uint8 [h w c].

    Grey stays grey; see `decode`.

    Raises:
      UserError: a file that is missing or no image, or an array of another kind.
    """
    if isinstance(image, (str, os.PathLike)):
        try:
            with open(image, "rb") as file:
                return decode(file.read(), jpeg, exif)
        except FileNotFoundError:
            raise UserError(f"there is no image file {os.fspath(image)!r}") from None
        except (OSError, ValueError, BadImage) as error:
            raise BadImage(f"{os.fspath(image)!r} is no readable image: {error}") from None
    if isinstance(image, bytes):
        return decode(image, jpeg, exif)
    if isinstance(image, PIL.Image.Image):
        with _damaged():
            return from_pillow(image, exif)
    sound = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size
    if not sound or image.ndim not in (2, 3):
        found = (
            f"{image.dtype} {list(image.shape)}"
            if hasattr(image, "dtype")
            else type(image).__name__
        )
        raise UserError(f"expected a path, a Pillow image or uint8 [h w c] pixels, found {found}")
    return image if image.ndim == 3 else image[..., None]


def from_pillow(image: PIL.Image.Image, exif: bool = False) -> Image:
    """The pixels of a Pillow image: grey with one channel, all else as RGB."""
    if exif:
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        pixels = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
    else:
        grey = image.mode in ("L", "LA", "La", "1")
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def encode(image: Image, quality: int | None = None) -> bytes:
    """A JPEG of that quality (1 to 100, chroma at half resolution), or, with None, a PNG."""
    grey = image.shape[2] == 1
    if quality is None:
        out = io.BytesIO()
        PIL.Image.fromarray(image[..., 0] if grey else image).save(out, "PNG")
        return out.getvalue()
    image = np.ascontiguousarray(image)
    if grey:
        return simplejpeg.encode_jpeg(image, quality, colorspace="GRAY", colorsubsampling="Gray")
    return simplejpeg.encode_jpeg(image, quality, colorsubsampling="420")

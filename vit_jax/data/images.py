"""Image files: bytes to pixels and back."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg
from jaxtyping import UInt8

from vit_jax.data.headers import bare, height_at, jpeg_orientation, unread
from vit_jax.data.headers import sniff as sniff
from vit_jax.errors import UserError, check_refused, nearest

Image = UInt8[np.ndarray, "h w c"]
JPEG_MODES = ("accurate", "fast")
# Above this, Pillow refuses an image as a decompression bomb.
MAX_PIXELS = 178_956_970
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif"),
)
# Pillow reads more, but for EPS it would start a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

_ORIENTATION = 0x0112  # the EXIF tag
# Tags of a TIFF.
_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 258, 259, 262
_PLANAR, _SUB_IFDS, _SAMPLE_FORMAT = 284, 330, 339
_BROKEN = (
    *(OSError, ValueError, TypeError, SyntaxError, LookupError, ArithmeticError, EOFError),
    *(AttributeError, RuntimeError, struct.error, zlib.error),
)


class BadImage(UserError):
    """Bytes that cannot be read as an image."""


def check_jpeg(mode: str) -> None:
    """Raises a UserError unless `mode` is one of JPEG_MODES."""
    if mode not in JPEG_MODES:
        raise UserError(f"data jpeg {mode!r}: {nearest(mode, JPEG_MODES)}")


def decode(data: bytes, jpeg: str = "accurate", exif: bool = False) -> Image:
    """Decodes a JPEG, PNG, WebP, GIF (its first frame), BMP, TIFF, PPM or AVIF.

    Grey images have one channel, all others three: transparency is dropped, CMYK and others become
    RGB, and of 16 bits the upper 8 are kept (a PPM is scaled by its maximum). Damaged texts,
    profiles and EXIF are ignored.

    Args:
      jpeg: "accurate" gives the pixels of Pillow, OpenCV and TensorFlow's INTEGER_ACCURATE, "fast"
        those of TensorFlow's default (INTEGER_FAST), in 5% less time. CMYK, and files with errors
        that Pillow tolerates, are always decoded accurately.
      exif: whether to apply the EXIF orientation; for a TIFF it always is.

    Raises:
      BadImage: the bytes are not an image, cut off or damaged, have more than MAX_PIXELS pixels, or
        pixels of unknown scale: floats, 32 bits, or signed.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return _by_pillow(data, exif)
    image = _decode_jpeg(data, jpeg)
    if image is None:
        image = _by_pillow(data, False)
    return turned(image, _orientation(data)) if exif else image


def _by_pillow(data: bytes, exif: bool) -> Image:
    """Decodes any of FORMATS, ignoring damaged metadata."""

    def opened(data):
        with damaged(data), PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return from_pillow(image, exif)

    try:
        return opened(data)
    except BadImage as error:
        without = bare(data)
        if without is None or len(without) == len(data):
            raise
        try:
            return opened(without)
        except BadImage:
            raise error from None


def _orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 if it cannot be read."""
    orientation = jpeg_orientation(data)
    if orientation is not None:
        return orientation
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return pillow_orientation(image)
    except (*_BROKEN, PIL.Image.DecompressionBombError):
        return 1


def pillow_orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of an image that Pillow has opened; 1 if it is unreadable."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1


def upright_size(file: io.IOBase) -> tuple[int, int]:
    """The (h, w) of an image file, turned upright, from its header. BadImage: it has none."""
    with damaged(file.read(512)):
        file.seek(0)
        with PIL.Image.open(file, formats=FORMATS) as opened:
            w, h = opened.size
            if opened.format == "TIFF":  # whose size may be that of the upright picture already
                w, h = opened.tag_v2[256], opened.tag_v2[257]
            # For a PNG without EXIF, Pillow would decode the image to look for it at the end.
            turns = opened.format != "PNG" or "exif" in opened.info
            orientation = pillow_orientation(opened) if turns else 1
    return (w, h) if _TURNS.get(orientation, (0, False))[0] % 2 else (h, w)


@contextlib.contextmanager
def damaged(data: bytes = b"") -> Iterator[None]:
    """Turns the errors of Pillow's readers into a BadImage."""
    try:
        yield
    except BadImage:
        raise
    except PIL.UnidentifiedImageError:
        raise BadImage(f"it is {unread(data)}") from None
    except (*_BROKEN, PIL.Image.DecompressionBombError) as error:
        raise BadImage(f"{type(error).__name__}: {error}") from None


def decode_box(
    data: bytes, box: Callable[[int, int], tuple[int, int, int, int]], jpeg: str, exif: bool = False
) -> Image:
    """Decodes the box (top, left, height, width) = `box(h, w)`, with the same pixels as `decode`.

    For most JPEG files the rows below the box are not decoded, so damage there is not noticed.
    """
    at = height_at(data)
    if at is None:
        image = decode(data, jpeg, exif)
        top, left, height, width = box(*image.shape[:2])
        return image[top : top + height, left : left + width]
    orientation = _orientation(data) if exif else 1
    h, w = struct.unpack_from(">HH", data, at)
    top, left, height, width = _as_stored(box, orientation, h, w)
    # Chroma is interpolated from one more of its rows, which is two of the image's.
    image = _decode_rows(data, jpeg, at, top + height + 2)
    image = decode(data, jpeg) if image is None else image
    return turned(image[top : top + height, left : left + width], orientation)


def _decode_rows(data: bytes, mode: str, at: int, rows: int) -> Image | None:
    """Decodes the first rows of a JPEG, by changing the height in its header; None if it fails."""
    h, w, channels = struct.unpack_from(">HHB", data, at)
    if rows >= h or h * w > MAX_PIXELS:
        return None
    image = np.empty((rows, w, channels), np.uint8)
    colours = "GRAY" if channels == 1 else "RGB"
    try:
        shorter = b"".join((data[:at], struct.pack(">H", rows), data[at + 2 :]))
        simplejpeg.decode_jpeg(shorter, colours, fastdct=mode == "fast", buffer=image)
    except ValueError as error:  # the first warning, which should be about the remaining rows
        if not str(error).endswith("extraneous bytes before marker 0xd9"):
            return None
    return image


def _decode_jpeg(data: bytes, mode: str) -> Image | None:
    """Decodes a JPEG; None if Pillow has to: CMYK, too large, or with errors."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS or colours in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(
            data, "GRAY" if colours == "Gray" else "RGB", fastdct=mode == "fast"
        )
    except ValueError:
        return None


# EXIF orientation -> quarter turns to the left, then whether to mirror left and right.
_TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False)}
_TURNS |= {7: (1, True), 8: (1, False)}


def turned(image: Image, orientation: int) -> UInt8[np.ndarray, "new_h new_w c"]:
    """Applies an EXIF orientation of 1 to 8; any other is ignored."""
    if orientation not in _TURNS:
        return image
    turns, mirrored = _TURNS[orientation]
    image = np.rot90(image, turns)
    return np.ascontiguousarray(image[:, ::-1] if mirrored else image)


def _as_stored(
    box: Callable[[int, int], tuple[int, int, int, int]], orientation: int, h: int, w: int
) -> tuple[int, int, int, int]:
    """The box in the stored image of h x w of a box in the upright image."""
    turns, mirrored = _TURNS.get(orientation, (0, False))
    h, w = (w, h) if turns % 2 else (h, w)
    top, left, height, width = box(h, w)
    left = w - left - width if mirrored else left
    for _ in range(turns):
        top, left, height, width = left, h - top - height, width, height
        h, w = w, h
    return top, left, height, width


def read_image(image: Any, jpeg: str = "accurate", exif: bool = False) -> Image:
    """Reads a path, encoded bytes, a Pillow image or an array into uint8 [h w c].

    Grey images stay grey; see `decode`. Arrays may have any number of channels.

    Raises:
      UserError: a file that is missing or not an image, or an array of another dtype or shape.
    """
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        try:
            with open(path, "rb") as file:
                return decode(file.read(), jpeg, exif)
        except FileNotFoundError:
            raise UserError(f"there is no image file {path!r}") from None
        except IsADirectoryError:
            raise UserError(
                f"{path!r} is a folder: name the image files in it, or take vit_jax.find_images"
            ) from None
        except (OSError, ValueError, BadImage) as error:
            check_refused(error, path)
            raise BadImage(f"{path!r} is no readable image: {error}") from None
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode(bytes(image), jpeg, exif)
    if isinstance(image, PIL.Image.Image):
        with damaged():
            return from_pillow(image, exif)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or not image.size:
        raise _no_pixels(image)
    if image.ndim not in (2, 3):
        raise _no_pixels(image)
    return image if image.ndim == 3 else image[..., None]


def _no_pixels(image: Any) -> UserError:
    """The error for an object that is not an image, with a hint."""
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if shape is None or dtype is None:
        found, hint = type(image).__name__, ""
    else:
        found, hint = f"{dtype} {list(shape)}", ""
        if not isinstance(image, np.ndarray):
            found, hint = f"{type(image).__name__} {found}", "; np.asarray makes one"
        elif dtype.kind == "f":
            hint = (
                "; of floats from 0 to 1, (255 * image).round().astype('uint8') makes them, of "
                "floats from 0 to 255, image.round().astype('uint8')"
            )
        elif dtype == np.uint16:
            hint = "; (image >> 8).astype('uint8') keeps the upper 8 of 16 bits"
        elif dtype.kind == "b":
            hint = "; 255 * image.astype('uint8') makes them of black and white"
        elif dtype.kind in "iu" and dtype != np.uint8:
            hint = "; image.astype('uint8') makes them, where all are of 0 to 255"
        elif len(shape) == 4:
            hint = "; of several images, take one at a time"
    return UserError(
        f"expected a path, an image file's bytes, a Pillow image or an array of uint8 [h w c] "
        f"pixels, found {found}{hint}"
    )


def from_pillow(image: PIL.Image.Image, exif: bool = False) -> Image:
    """The pixels of a Pillow image: grey as one channel, all others as RGB.

    Raises:
      BadImage: pixels of unknown scale, or that Pillow reads wrong.
    """
    if not isinstance(image.info.get("xmp", b""), (bytes, str)):
        del image.info["xmp"]  # not a string, so Pillow would fail to look for an orientation in it
    tags = getattr(image, "tag_v2", {})
    _check_depth(image, tags)
    image.load()  # Pillow applies the orientation of a TIFF here
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        pixels = np.asarray(image).astype(np.int64)
        pixels = pixels << 4 if tags.get(_BITS) == (12,) else pixels
        pixels = 65535 - pixels if tags.get(_PHOTOMETRIC) == 0 else pixels
        pixels = np.clip(pixels >> 8, 0, 255).astype(np.uint8)
    else:
        grey = image.mode in ("L", "LA", "La", "1")
        plain = image.convert("LA") if image.mode == "La" else image
        pixels = np.asarray(plain.convert("L" if grey else "RGB"))
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return turned(pixels, pillow_orientation(image)) if exif else pixels


def _check_depth(image: PIL.Image.Image, tags: Any) -> None:
    """Raises a BadImage if the pixels have no known scale, or Pillow reads them wrong."""
    bits, kinds = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
    name = {"F": "float32", "I": "int32"}.get(image.mode)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        name = None  # of 16 bits
    elif 2 in kinds or (image.mode == "I" and image.format == "TIFF"):
        name = f"{'int' if 2 in kinds else 'uint'}{bits[0]}"
    if name:
        raise BadImage(
            f"it has {name} pixels, and nothing says which of them is white: save it with unsigned "
            "pixels of 8 or 16 bits"
        )
    if tags.get(_PLANAR) == 2 and tags.get(_COMPRESSION, 1) == 1 and set(bits) != {8}:
        raise BadImage(
            f"it is a TIFF of {bits[0]}-bit colours in planes, which Pillow reads wrong: save it "
            "compressed, or with the colours of each pixel together"
        )
    if tags.get(_SUBFILE, 0) & 1 and (_SUB_IFDS in tags or getattr(image, "n_frames", 1) > 1):
        raise BadImage(
            "its first picture is the preview of another, as in a camera's raw file: save the "
            "picture itself as JPEG, PNG or TIFF"
        )
    if image.format == "PNG" and image.mode == "P" and image.palette is None:
        raise BadImage("its palette is missing")


def encode(image: Image, quality: int | None = None) -> bytes:
    """Encodes as JPEG with `quality` (1 to 100, chroma at half resolution), or as PNG if None."""
    grey = image.shape[2] == 1
    if quality is None:
        out = io.BytesIO()
        PIL.Image.fromarray(image[..., 0] if grey else image).save(out, "PNG")
        return out.getvalue()
    image = np.ascontiguousarray(image)
    if grey:
        return simplejpeg.encode_jpeg(image, quality, colorspace="GRAY", colorsubsampling="Gray")
    return simplejpeg.encode_jpeg(image, quality, colorsubsampling="420")

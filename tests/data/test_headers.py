"""What surrounds the pixels of a file: it may be damaged, long or odd, and does no harm."""

import io
import struct
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest
from made import chunk, noise, png_of, refused, saved, turned

from vit_jax.data import images
from vit_jax.data.headers import jpeg_orientation, sniff
from vit_jax.data.images import FORMATS, SUFFIXES, BadImage, decode, read_image

RGB = noise(8, 9, 3)
LONG = zlib.compress(bytes(3 << 20))


def png(*before, after=b""):
    """RGB as a PNG, with more chunks before its pixels and after."""
    return png_of(9, 8, b"".join(b"\0" + row.tobytes() for row in RGB), b"".join(before), after)


PNGS = {
    "plain": png(),
    "3 MB of profile": png(chunk(b"iCCP", b"x\0\0" + LONG)),
    "3 MB of text": png(chunk(b"zTXt", b"x\0\0" + LONG)),
    "3 MB of text behind": png(after=chunk(b"zTXt", b"x\0\0" + LONG)),
    "3 MB of international text": png(chunk(b"iTXt", b"x\0\1\0\0\0" + LONG)),
    "70 MB of texts": png(*[chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 20)))] * 70),
    "a wrong checksum of text": png(chunk(b"tEXt", b"x\0y", 1)),
    "a wrong checksum of EXIF": png(chunk(b"eXIf", b"MM\0*", 1)),
    "no profile": png(chunk(b"iCCP", b"")),
    "a profile compressed otherwise": png(chunk(b"iCCP", b"x\0\1y")),
    "short gamma": png(chunk(b"gAMA", b"\0")),
    "short transparency": png(chunk(b"tRNS", b"\0")),
    "a short animation": png(chunk(b"acTL", b"\0")),
    "something unknown": png(chunk(b"t\xffst", b"")),
    "EXIF of no kind": png(chunk(b"eXIf", b"garbage")),
    "more bytes": png() + b"more" * 999,
}


@pytest.mark.filterwarnings("ignore:Invalid APNG", "ignore:Corrupt EXIF")
def test_a_png_is_its_pixels():
    for name, data in PNGS.items():
        for exif in (True,) if name == "70 MB of texts" else (False, True):
            np.testing.assert_array_equal(decode(data, exif=exif), RGB, err_msg=name)


def test_what_turns_a_png_is_kept_beside_what_is_dropped():
    turn = chunk(b"eXIf", turned(3).tobytes().removeprefix(b"Exif\0\0"))
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='3' tiff:Orientation=\"3\"/>"
    for turning in (turn, chunk(b"iTXt", xmp)):
        data = png(turning, chunk(b"zTXt", b"x\0\0" + LONG))
        np.testing.assert_array_equal(decode(data), RGB)
        np.testing.assert_array_equal(decode(data, exif=True), RGB[::-1, ::-1])


def test_a_png_damaged_where_it_matters_is_refused():
    def palette(chunk):
        return png_of(4, 1, b"\0\0\1\2\3", chunk, kind=3)

    bad, whole = [], png()
    header, pixels = whole.index(b"IHDR"), whole.index(b"IDAT")
    for at in (header + 5, header + 18, *range(pixels + 4, pixels + 100, 11)):
        bad.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    colours = chunk(b"PLTE", bytes(range(12)))
    np.testing.assert_array_equal(decode(palette(colours)).ravel(), range(12))
    renamed = colours.replace(b"PLTE", b"pLTE")  # one bit of its name
    bad += map(palette, (b"", colours[:-1] + b"\0", renamed))
    odd = png(chunk(b"zTXt", b"x\0\0" + LONG))  # bare, it is no better
    bad.append(odd[: odd.index(b"IDAT") + 30])
    refused(decode, [(data, "") for data in bad], BadImage)


def ordinary(kind, mode="RGB", **options):
    return saved(PIL.Image.fromarray(RGB).convert(mode), kind, **options)


ORDINARY = {kind: ordinary(kind) for kind in FORMATS}


def test_bytes_behind_a_picture_do_no_harm():
    for kind, data in ORDINARY.items():
        assert sniff(data[:32]) == kind
        for more in (b"more\xff\xd9" * 99, bytes(5000)):
            np.testing.assert_array_equal(decode(data + more, exif=True), decode(data))


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


SEGMENTS = {
    "megabytes of profile": b"".join(
        segment(0xE2, b"ICC_PROFILE\0" + bytes([i + 1, 60]) + bytes(60_000)) for i in range(60)
    ),
    "a short profile": segment(0xE2, b"ICC_PROFILE\0"),
    "a short JFIF": segment(0xE0, b"JFIF"),
    "a short Adobe": segment(0xEE, b"Adobe"),
    "a garbled Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x05abc"),
    "a garbled MPF": segment(0xE2, b"MPF\0garbage"),
    "EXIF of no kind": segment(0xE1, b"Exif\0\0garbage"),
    "a comment": segment(0xFE, b"\xff" * 60_000),
}


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO", "ignore:Corrupt EXIF")
def test_segments_of_a_jpeg_do_no_harm():
    for name, segments in SEGMENTS.items():
        for mode in ("L", "RGB", "CMYK"):
            data = ordinary("JPEG", mode)
            odd = data[:2] + segments + data[2:]
            for exif in (False, True):
                np.testing.assert_array_equal(decode(odd, exif=exif), decode(data), err_msg=name)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_orientation_that_cannot_be_read_is_upright():
    contents = (b"", b"garbage", b"II*\0", b"II*\0\xff\0\0\0", b"XX*\0\0\0\0\0")
    jpeg = ordinary("JPEG")
    for content in (*contents, b"Exif\0\0II*\0\x08\0\0\0\1"):
        block = segment(0xE1, b"Exif\0\0" + content)
        found = decode(jpeg[:2] + block + jpeg[2:], exif=True)
        np.testing.assert_array_equal(found, decode(jpeg))
        for kind, options in (("WEBP", {"lossless": True}), ("PNG", {})):
            data = ordinary(kind, exif=content, **options)
            np.testing.assert_array_equal(decode(data, exif=True), RGB)


def exif_block(order="<", kind=3, number=1, value=6, before=0):
    """A sound EXIF block: orientation behind other tags."""
    entries = [(256 + i, 4, 1, 7) for i in range(before)]
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, before + 1)
    for entry in entries:
        block += struct.pack(f"{order}HHII", *entry)
    value = struct.pack(f"{order}H", value) if kind == 3 else struct.pack(f"{order}I", value)
    return (
        block + struct.pack(f"{order}HHI", 0x0112, kind, number) + value.ljust(4, b"\0") + bytes(4)
    )


XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="8"/>'
BLOCKS = {
    "none": (b"", 1),
    "little": (segment(0xE1, b"Exif\0\0" + exif_block()), 6),
    "big, behind others": (segment(0xE1, b"Exif\0\0" + exif_block(">", before=9)), 6),
    "nine": (segment(0xE1, b"Exif\0\0" + exif_block(value=9)), 9),
    "long": (segment(0xE1, b"Exif\0\0" + exif_block(kind=4)), None),
    "twice": (segment(0xE1, b"Exif\0\0" + exif_block()) * 2, None),
    "XMP": (segment(0xE1, XMP), None),
    "cut short": (segment(0xE1, b"Exif\0\0" + exif_block(before=9)[:40]), None),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Possibly corrupt EXIF")
def test_the_orientation_of_a_jpeg_is_pillow_s():
    whole = ordinary("JPEG", quality=95)
    for name, (block, expected) in BLOCKS.items():
        data = whole[:2] + block + whole[2:]
        assert jpeg_orientation(data) == expected, name
        with PIL.Image.open(io.BytesIO(data)) as image:
            upright = np.asarray(PIL.ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(decode(data, exif=True), upright, err_msg=name)


# -- Formats --------------------------------------------------------------------------------------


def test_of_several_pictures_the_first_one_is_read():
    options = dict(save_all=True)
    options["append_images"] = [PIL.Image.fromarray(255 - RGB), PIL.Image.fromarray(RGB // 2)]
    for kind in ("WEBP", "PNG", "TIFF"):
        data = saved(RGB, kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
        with PIL.Image.open(io.BytesIO(data)) as image:
            assert image.n_frames == 3
        for exif in (False, True):
            np.testing.assert_array_equal(decode(data, exif=exif), RGB)


def test_avif_is_read_and_turned():
    y, x, c = np.mgrid[:40, :60, :3]
    smooth = (128 + 90 * np.sin(x / 9 + c) * np.cos(y / 7)).astype(np.uint8)
    data = saved(smooth, "AVIF", quality=95, exif=turned(6))
    found = decode(data)
    assert found.shape == (40, 60, 3) and np.abs(found.astype(int) - smooth).mean() < 3
    np.testing.assert_array_equal(decode(data, exif=True), np.rot90(found, -1))


def test_a_name_says_nothing(tmp_path):
    for name in ("a.jfif", "a.jpe", "a.tif", "a", "a.avif", "a.txt"):
        (tmp_path / name).write_bytes(ORDINARY["PNG"])
        np.testing.assert_array_equal(read_image(tmp_path / name), RGB)
        assert name.endswith(SUFFIXES) == (name not in ("a", "a.txt"))


def test_what_is_no_image_is_named():
    cases = [
        (b"", "empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which is not read: save it as JPEG or PNG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC, which"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp41", "a video, or another"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL, which"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL, which"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000, which"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing, which"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<svg/>", "an SVG drawing, which"),
        (b"%PDF-1.7\n", "a PDF, which"),
        (b"8BPS\0\1", "a Photoshop file, which"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(40), "a camera's raw file, which"),
        (b"<!DOCTYPE html><html>404 Not Found</html>", "a web page, not an image"),
        (b"\r\n  <HTML><head>", "a web page, not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a pointer of Git LFS"),
        (b"PK\3\4" + bytes(30), "an archive, not an image"),
        (b"\x93NUMPY\1\0", "an array of NumPy, not an image"),
        (bytes(100), "zeros from its start"),
        (b"not a picture", "of no known format"),
        (ORDINARY["PNG"].replace(b"IHDR", b"IHDD"), "PNG, but damaged"),
        (ORDINARY["TIFF"][:6], "TIFF, but damaged"),
        (b"\xff\xd8\xff<html>", "JPEG, but damaged"),
    ]
    refused(decode, [(data, f"^it is {what}") for data, what in cases], BadImage)


def test_ordinary_pictures_are_not_stripped_of_anything(monkeypatch):
    monkeypatch.setattr(images, "bare", None)  # only where the first try failed
    for kind in FORMATS:
        decode(cv2.imencode(".png", RGB)[1].tobytes() if kind == "PNG" else ORDINARY[kind])

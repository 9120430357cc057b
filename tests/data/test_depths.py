"""Pixels of every depth and kind: of a stated scale, or refused. TIFFs are written by hand."""

import io
import itertools
import struct
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest
from made import refused

from vit_jax.data.images import BadImage, decode, from_pillow, read_image
from vit_jax.errors import UserError

RANDOM = np.random.default_rng(0)
GREY8, GREY16 = (RANDOM.integers(0, 2**n, (5, 6), t) for n, t in ((8, np.uint8), (16, np.uint16)))
RGB8, RGB16 = (RANDOM.integers(0, 2**n, (5, 6, 3), t) for n, t in ((8, np.uint8), (16, np.uint16)))
FOUR8, FOUR16 = (
    RANDOM.integers(0, 2**n, (5, 6, 4), t) for n, t in ((8, np.uint8), (16, np.uint16))
)
TWO8 = RANDOM.integers(1, 256, (5, 6, 2), np.uint8)
GREY12 = RANDOM.integers(0, 4096, (5, 6), np.uint16)
PACKED12 = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in GREY12.reshape(-1, 2).tolist())
MINIMUM_IS_WHITE, MINIMUM_IS_BLACK, RGB, CMYK, YCBCR, LAB = 0, 1, 2, 5, 6, 8
SWAPPED = np.ascontiguousarray(RGB8[..., [0, 2, 1]])


def by_black(pixels):
    """RGB of CMYK."""
    return (255.0 - pixels[..., :3]) * (255.0 - pixels[..., 3:]) / 255


UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def tiff(pixels, photometric, kind=UNSIGNED, order="<", data=None, **tags):
    """A TIFF of one strip, or one for each colour where `planes`; tags as t274=[6]."""
    h, w, *c = pixels.shape
    (c,) = c or [1]
    planes = c if tags.pop("planes", False) else 1
    if data is None:
        pixels = pixels.astype(pixels.dtype.newbyteorder(order))
        data = (np.moveaxis(pixels, -1, 0) if planes > 1 else pixels).tobytes()
    data += b"\0" * (len(data) % 2)
    bits = 8 * pixels.dtype.itemsize
    entries = {256: [w], 257: [h], 258: [bits] * c, 259: [1], 262: [photometric], 277: [c]}
    entries |= {284: [2 if planes > 1 else 1], 278: [h], 339: [kind] * c}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    size = len(data) // planes
    entries |= {273: [8 + i * size for i in range(planes)], 279: [size] * planes}
    directory, beyond = struct.pack(f"{order}H", len(entries)), b""
    after = 8 + len(data) + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        raw = struct.pack(f"{order}{len(values)}H", *values)
        if len(raw) > 4:
            raw, beyond = struct.pack(f"{order}I", after + len(beyond)), beyond + raw
        directory += struct.pack(f"{order}HHI", tag, 3, len(values)) + raw.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return start + data + directory + bytes(4) + beyond


WHITE, BLACK = MINIMUM_IS_WHITE, MINIMUM_IS_BLACK
DEFLATED = {"data": zlib.compress(GREY16.tobytes()), "t259": [8]}
TINTED = np.stack([GREY8, GREY8, np.full_like(GREY8, 7)], axis=-1)
TABLE = {"t320": [v << 8 for v in range(256)] * 2 + [7 << 8] * 256}
TIMES = (TWO8[..., 0] * 255.0 / TWO8[..., 1]).clip(0, 255)
READ = {
    "16 bits": (GREY16, BLACK, {}, GREY16 >> 8),
    "16 bits, deflated": (GREY16, BLACK, DEFLATED, GREY16 >> 8),
    "8 bits, 0 is white": (GREY8, WHITE, {}, 255 - GREY8),
    "16 bits, 0 is white": (GREY16, WHITE, {}, 255 - (GREY16 >> 8)),
    "12 bits": (GREY12, BLACK, {"data": PACKED12, "t258": [12]}, GREY12 >> 4),
    "rgb, 16 bits": (RGB16, RGB, {}, RGB16 >> 8),
    "rgba, 16 bits": (FOUR16, RGB, {"t338": [2]}, FOUR16[..., :3] >> 8),
    "rgb and something, 16 bits": (FOUR16, RGB, {"t338": [0]}, FOUR16[..., :3] >> 8),
    "rgb in planes": (RGB8, RGB, {"planes": True}, RGB8),
    "grey and alpha": (TWO8, BLACK, {"t338": [2]}, TWO8[..., 0]),
    "grey times alpha": (TWO8, BLACK, {"t338": [1]}, TIMES),
    "a palette": (GREY8, 3, TABLE, TINTED),
    "cmyk": (FOUR8, CMYK, {}, by_black(FOUR8)),
    "cmyk, 16 bits": (FOUR16, CMYK, {}, by_black(FOUR16 >> 8)),
    "ycbcr": (RGB8, YCBCR, {"t530": [1, 1]}, cv2.cvtColor(SWAPPED, cv2.COLOR_YCrCb2RGB)),
    "upside down": (RGB8, RGB, {"t274": [3]}, RGB8[::-1, ::-1]),
    "a preview alone": (RGB8, RGB, {"t254": [1]}, RGB8),
}


@pytest.mark.parametrize("name", READ)
def test_a_tiff_has_the_upper_eight_bits(name):
    pixels, photometric, tags, expected = READ[name]
    expected = np.asarray(expected, float).reshape(*expected.shape[:2], -1)
    for order in "<>":
        if name == "16 bits, deflated":
            tags = tags | {"data": zlib.compress(pixels.astype(f"{order}u2").tobytes())}
        data = tiff(pixels, photometric, order=order, **tags)
        if order == ">" and name in ("16 bits, 0 is white", "12 bits"):
            with pytest.raises(BadImage, match="TIFF, but damaged or of a kind that is not read"):
                decode(data)
            continue
        found = decode(data)
        assert found.dtype == np.uint8 and found.shape == expected.shape
        # Of products and quotients, rounding is the library's.
        atol = 1.01 if name in ("grey times alpha", "cmyk", "cmyk, 16 bits", "ycbcr") else 0
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_lab_has_its_colours():
    lab = np.stack(np.meshgrid([40, 128, 220], [110, 128, 150], [118, 128, 140]), axis=-1)
    lab = lab.reshape(9, 3, 3).astype(np.uint8)
    stored = lab.copy()
    stored[..., 1:] ^= 128  # a TIFF has a and b with a sign
    expected = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).astype(int)
    assert np.abs(decode(tiff(stored, LAB)) - expected).max() <= 6  # OpenCV adapts no white point


SCALE = "and nothing says which of them is white: save it with unsigned pixels of 8 or 16 bits"
UNIT8, RAW = GREY8 / np.float32(255), {"t254": [1], "t330": [8]}
REFUSED = [
    (UNIT8, BLACK, FLOAT, {}, f"float32 pixels, {SCALE}"),
    (UNIT8, WHITE, FLOAT, {}, f"float32 pixels, {SCALE}"),
    (GREY8 / 255.0, BLACK, FLOAT, {}, "a kind that is not read; save it"),
    (RGB8 / np.float32(255), RGB, FLOAT, {}, "a kind that is not read; save it"),
    (GREY8.astype(np.int8), BLACK, SIGNED, {}, f"int8 pixels, {SCALE}"),
    (GREY16.astype(np.int16), BLACK, SIGNED, {}, f"int16 pixels, {SCALE}"),
    (GREY8.astype(np.int32), BLACK, SIGNED, {}, f"int32 pixels, {SCALE}"),
    (GREY8.astype(np.uint32), BLACK, UNSIGNED, {}, f"uint32 pixels, {SCALE}"),
    (RGB16, RGB, UNSIGNED, {"planes": True}, "16-bit colours in planes"),
    (np.zeros((5, 6, 5), np.uint8), BLACK, UNSIGNED, {}, "not read"),
    (RGB8, RGB, UNSIGNED, RAW, "the preview of another, as in a camera's raw file"),
]


def test_a_tiff_of_no_known_scale_is_refused():
    for pixels, photometric, kind, tags, why in REFUSED:
        data = tiff(pixels, photometric, kind, **tags)
        with pytest.raises(BadImage, match=why):
            decode(data)
        if "not read" not in why:
            with PIL.Image.open(io.BytesIO(data)) as image, pytest.raises(BadImage, match=why):
                read_image(image)


def test_sixteen_bits_are_opencv_s_upper_eight():
    for kind, pixels in itertools.product((".tiff", ".png"), (GREY16, RGB16, FOUR16)):
        data = cv2.imencode(kind, pixels)[1].tobytes()
        colours = pixels[..., 2::-1] if pixels.ndim == 3 else pixels[..., None]
        np.testing.assert_array_equal(decode(data), (colours >> 8).astype(np.uint8))


def test_a_ppm_is_scaled_by_its_maximum():
    for header, values, dtype, expected in [
        (b"P5 3 1 255", [0, 100, 255], "u1", [0, 100, 255]),
        (b"P5 3 1 100", [0, 50, 100], "u1", [0, 128, 255]),
        (b"P5 3 1 1023", [0, 512, 1023], ">u2", [0, 128, 255]),
        (b"P5 3 1 4095", [0, 1000, 4095], ">u2", [0, 62, 255]),
        (b"P5 3 1 65535", [255, 256, 65535], ">u2", [0, 1, 255]),
        (b"P6 1 1 1023", [0, 512, 1023], ">u2", [0, 128, 255]),
        (b"P6 1 1 65535", [0, 25700, 65535], ">u2", [0, 100, 255]),
    ]:
        found = decode(header + b"\n" + np.array(values, dtype).tobytes())
        assert found.shape == ((1, 1, 3) if b"P6" in header else (1, 3, 1))
        np.testing.assert_array_equal(found.ravel(), expected)
        plain = header.replace(b"P5", b"P2").replace(b"P6", b"P3")
        text = plain + b"\n" + " ".join(map(str, values)).encode() + b"\n"
        np.testing.assert_array_equal(decode(text).ravel(), expected)


def test_other_depths_are_refused():
    floats = b"\n1 1\n-1.0\n" + np.ones(3, np.float32).tobytes()
    twelve = bytearray(cv2.imencode(".jpg", RGB8)[1].tobytes())
    twelve[twelve.index(b"\xff\xc0") + 4] = 12
    cases = [(b"Pf" + floats, "float32 pixels"), (b"PF" + floats, "a PFM of floats")]
    cases += [(bytes(twelve), "JPEG of 12 bits, which is not read: save it with 8")]
    cases += [
        (PIL.Image.fromarray(GREY8).convert(m), f"(float|int)32 pixels, {SCALE}") for m in "FI"
    ]
    refused(read_image, cases, BadImage)


def test_pillow_s_modes_of_sixteen_bits():
    for mode, dtype in {"I;16": "=u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2"}.items():
        image = PIL.Image.frombytes(mode, (6, 5), GREY16.astype(dtype).tobytes())
        np.testing.assert_array_equal(read_image(image)[..., 0], GREY16 >> 8)


def test_pillow_s_other_modes():
    rgb, grey = PIL.Image.fromarray(RGB8), PIL.Image.fromarray(GREY8)
    opaque = PIL.Image.new("L", (6, 5), 255)
    for mode in ("RGBA", "RGBX", "RGBa", "CMYK"):
        np.testing.assert_array_equal(from_pillow(rgb.convert(mode)), RGB8)
    for image in (PIL.Image.merge("LA", [grey, opaque]), grey.convert("LA").convert("La")):
        np.testing.assert_array_equal(from_pillow(image), GREY8[..., None])
    for mode in ("HSV", "YCbCr"):
        found = from_pillow(rgb.convert(mode)).astype(int)
        assert found.shape == (5, 6, 3) and np.abs(found - RGB8).mean() < 3
    palette = PIL.Image.fromarray(GREY8)
    palette.putpalette(bytes(v for i in range(256) for v in (i, 255 - i, 9)))
    expected = np.stack([GREY8, 255 - GREY8, np.full_like(GREY8, 9)], axis=-1)
    for image in (palette, palette.convert("PA")):
        np.testing.assert_array_equal(from_pillow(image), expected)
    bits = GREY8 > 127
    np.testing.assert_array_equal(from_pillow(PIL.Image.fromarray(bits))[..., 0], 255 * bits)


def test_what_else_is_given_is_told_what_to_become():
    import jax.numpy as jnp

    anything = "expected a path, an image file's bytes, .*found "
    cases = [
        (RGB8 / 255, r"float64 \[5, 6, 3\]; of floats from 0 to 1, \(255 \* image\)"),
        (RGB8.astype(np.float32), r"float32 .* floats from 0 to 255, image\.round\(\)\.astype"),
        (RGB16, r"uint16 \[5, 6, 3\]; \(image >> 8\)"),
        (GREY8 > 9, r"bool \[5, 6\]; 255 \* image"),
        (GREY8.astype(int), r"int64 \[5, 6\]; image\.astype\('uint8'\)"),
        (RGB8[None], r"uint8 \[1, 5, 6, 3\]; of several images, take one at a time"),
        (RGB8[:0], r"uint8 \[0, 6, 3\]"),
        (GREY8[0], r"uint8 \[6\]"),
        ([[0, 1]], "list"),
        (None, "NoneType"),
        (jnp.asarray(GREY8), r"ArrayImpl uint8 \[5, 6\]; np\.asarray makes one"),
    ]
    for image, why in cases:
        with pytest.raises(UserError, match=anything + why) as caught:
            read_image(image)
        assert not isinstance(caught.value, BadImage)

"""Pixels of every depth and kind: of a stated scale, or refused. TIFFs are written by hand."""

import io
import struct
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest

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
ORDERS = {"little": "<", "big": ">"}
MINIMUM_IS_WHITE, MINIMUM_IS_BLACK, RGB, CMYK, YCBCR, LAB = 0, 1, 2, 5, 6, 8
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


READ = {
    "16 bits": (GREY16, MINIMUM_IS_BLACK, {}, GREY16 >> 8),
    "16 bits, deflated": (
        *(GREY16, MINIMUM_IS_BLACK),
        {"data": zlib.compress(GREY16.tobytes()), "t259": [8]},
        GREY16 >> 8,
    ),
    "8 bits, 0 is white": (GREY8, MINIMUM_IS_WHITE, {}, 255 - GREY8),
    "16 bits, 0 is white": (GREY16, MINIMUM_IS_WHITE, {}, 255 - (GREY16 >> 8)),
    "12 bits": (GREY12, MINIMUM_IS_BLACK, {"data": PACKED12, "t258": [12]}, GREY12 >> 4),
    "rgb, 16 bits": (RGB16, RGB, {}, RGB16 >> 8),
    "rgba, 16 bits": (FOUR16, RGB, {"t338": [2]}, FOUR16[..., :3] >> 8),
    "rgb and something, 16 bits": (FOUR16, RGB, {"t338": [0]}, FOUR16[..., :3] >> 8),
    "rgb in planes": (RGB8, RGB, {"planes": True}, RGB8),
    "grey and alpha": (TWO8, MINIMUM_IS_BLACK, {"t338": [2]}, TWO8[..., 0]),
    "grey times alpha": (
        *(TWO8, MINIMUM_IS_BLACK, {"t338": [1]}),
        (TWO8[..., 0] * 255.0 / TWO8[..., 1]).clip(0, 255),
    ),
    "a palette": (
        *(GREY8, 3, {"t320": [v << 8 for v in range(256)] * 2 + [7 << 8] * 256}),
        np.stack([GREY8, GREY8, np.full_like(GREY8, 7)], axis=-1),
    ),
    "cmyk": (
        *(FOUR8, CMYK, {}),
        (255.0 - FOUR8[..., :3]) * (255.0 - FOUR8[..., 3:]) / 255,
    ),
    "cmyk, 16 bits": (
        *(FOUR16, CMYK, {}),
        (255.0 - (FOUR16[..., :3] >> 8)) * (255.0 - (FOUR16[..., 3:] >> 8)) / 255,
    ),
    "ycbcr": (
        *(RGB8, YCBCR, {"t530": [1, 1]}),
        cv2.cvtColor(np.ascontiguousarray(RGB8[..., [0, 2, 1]]), cv2.COLOR_YCrCb2RGB),
    ),
    "upside down": (RGB8, RGB, {"t274": [3]}, RGB8[::-1, ::-1]),
    "a preview alone": (RGB8, RGB, {"t254": [1]}, RGB8),
}
ONLY_LITTLE = ("16 bits, deflated", "16 bits, 0 is white", "12 bits")


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", READ)
def test_a_tiff_has_the_upper_eight_bits(name, order):
    pixels, photometric, tags, expected = READ[name]
    data = tiff(pixels, photometric, order=order, **tags)
    if order == ">" and name in ONLY_LITTLE[1:]:
        with pytest.raises(BadImage, match="TIFF, but damaged or of a kind that is not read"):
            decode(data)
        return
    if name in ONLY_LITTLE and order == ">":
        data = tiff(
            *(pixels, photometric),
            **{**tags, "data": zlib.compress(pixels.astype(">u2").tobytes()), "order": order},
        )
    found = decode(data)
    assert found.dtype == np.uint8
    expected = np.asarray(expected, float).reshape(*expected.shape[:2], -1)
    assert found.shape == expected.shape
    # Of products and quotients, rounding is the library's.
    atol = 1.01 if name in ("grey times alpha", "cmyk", "cmyk, 16 bits", "ycbcr") else 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_lab_has_its_colours():
    lab = np.stack(np.meshgrid([40, 128, 220], [110, 128, 150], [118, 128, 140]), axis=-1)
    lab = lab.reshape(9, 3, 3).astype(np.uint8)
    stored = lab.copy()
    stored[..., 1:] ^= 128  # a TIFF has a and b with a sign
    expected = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).astype(int)
    found = decode(tiff(stored, LAB))
    assert np.abs(found - expected).max() <= 6  # OpenCV adapts no white point


SCALE = "and nothing says which of them is white: save it with unsigned pixels of 8 or 16 bits"
REFUSED = {
    "float32": (GREY8 / np.float32(255), MINIMUM_IS_BLACK, FLOAT, {}, f"float32 pixels, {SCALE}"),
    "float32, 0 is white": (
        *(GREY8 / np.float32(255), MINIMUM_IS_WHITE, FLOAT, {}),
        f"float32 pixels, {SCALE}",
    ),
    "float64": (GREY8 / 255.0, MINIMUM_IS_BLACK, FLOAT, {}, "a kind that is not read; save it"),
    "float32 rgb": (RGB8 / np.float32(255), RGB, FLOAT, {}, "a kind that is not read; save it"),
    "int8": (GREY8.astype(np.int8), MINIMUM_IS_BLACK, SIGNED, {}, f"int8 pixels, {SCALE}"),
    "int16": (GREY16.astype(np.int16), MINIMUM_IS_BLACK, SIGNED, {}, f"int16 pixels, {SCALE}"),
    "int32": (GREY8.astype(np.int32), MINIMUM_IS_BLACK, SIGNED, {}, f"int32 pixels, {SCALE}"),
    "uint32": (GREY8.astype(np.uint32), MINIMUM_IS_BLACK, UNSIGNED, {}, f"uint32 pixels, {SCALE}"),
    "16 bits in planes": (RGB16, RGB, UNSIGNED, {"planes": True}, "16-bit colours in planes"),
    "five channels": (np.zeros((5, 6, 5), np.uint8), MINIMUM_IS_BLACK, UNSIGNED, {}, "not read"),
    "the preview of a raw file": (
        *(RGB8, RGB, UNSIGNED, {"t254": [1], "t330": [8]}),
        "the preview of another, as in a camera's raw file",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tiff_of_no_known_scale_is_refused(name, tmp_path):
    pixels, photometric, kind, tags, why = REFUSED[name]
    data = tiff(pixels, photometric, kind, **tags)
    with pytest.raises(BadImage, match=why):
        decode(data)
    (tmp_path / "image.tif").write_bytes(data)
    if "not read" in why:
        return
    with PIL.Image.open(tmp_path / "image.tif") as image, pytest.raises(BadImage, match=why):
        read_image(image)


def test_sixteen_bits_are_opencv_s_upper_eight():
    for kind, pixels in ((".tiff", GREY16), (".tiff", RGB16), (".png", FOUR16), (".png", GREY16)):
        data = cv2.imencode(kind, pixels)[1].tobytes()
        colours = pixels[..., 2::-1] if pixels.ndim == 3 else pixels[..., None]
        np.testing.assert_array_equal(decode(data), (colours >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    "header, values, dtype, expected",
    [
        (b"P5 3 1 255", [0, 100, 255], "u1", [0, 100, 255]),
        (b"P5 3 1 100", [0, 50, 100], "u1", [0, 128, 255]),
        (b"P5 3 1 1023", [0, 512, 1023], ">u2", [0, 128, 255]),
        (b"P5 3 1 4095", [0, 1000, 4095], ">u2", [0, 62, 255]),
        (b"P5 3 1 65535", [255, 256, 65535], ">u2", [0, 1, 255]),
        (b"P6 1 1 1023", [0, 512, 1023], ">u2", [0, 128, 255]),
        (b"P6 1 1 65535", [0, 25700, 65535], ">u2", [0, 100, 255]),
    ],
)
def test_a_ppm_is_scaled_by_its_maximum(header, values, dtype, expected):
    found = decode(header + b"\n" + np.array(values, dtype).tobytes())
    assert found.shape == ((1, 1, 3) if b"P6" in header else (1, 3, 1))
    np.testing.assert_array_equal(found.ravel(), expected)
    plain = header.replace(b"P5", b"P2").replace(b"P6", b"P3")
    text = plain + b"\n" + " ".join(map(str, values)).encode() + b"\n"
    np.testing.assert_array_equal(decode(text).ravel(), expected)


@pytest.mark.parametrize("magic, why", [(b"Pf", "float32 pixels"), (b"PF", "a PFM of floats")])
def test_a_pfm_is_refused(magic, why):
    with pytest.raises(BadImage, match=why):
        decode(magic + b"\n1 1\n-1.0\n" + np.ones(3, np.float32).tobytes())


def test_twelve_bit_jpeg_is_refused():
    data = bytearray(cv2.imencode(".jpg", RGB8)[1].tobytes())
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(BadImage, match="JPEG of 12 bits, which is not read: save it with 8"):
        decode(bytes(data))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pillow_s_own_modes_without_a_scale_are_refused(mode):
    with pytest.raises(BadImage, match=f"(float|int)32 pixels, {SCALE}"):
        read_image(PIL.Image.fromarray(GREY8).convert(mode))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_pillow_s_modes_of_sixteen_bits(mode):
    dtype = {"I;16L": "<u2", "I;16B": ">u2"}.get(mode, "=u2")
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


@pytest.mark.parametrize(
    "image, why",
    [
        (RGB8 / 255, r"float64 \[5, 6, 3\]; of floats from 0 to 1, \(255 \* image\)"),
        (RGB8.astype(np.float32), r"float32 .* floats from 0 to 255, image\.round\(\)\.astype"),
        (RGB16, r"uint16 \[5, 6, 3\]; \(image >> 8\)"),
        (GREY8 > 9, r"bool \[5, 6\]; 255 \* image"),
        (GREY8.astype(int), r"int64 \[5, 6\]; image\.astype\('uint8'\)"),
        (RGB8[None], r"uint8 \[1, 5, 6, 3\]; of several images, take one at a time"),
        (RGB8[:0], r"uint8 \[0, 6, 3\]"),
    ],
)
def test_an_array_of_another_kind_is_told_what_to_become(image, why):
    with pytest.raises(UserError, match=f"found {why}") as caught:
        read_image(image)
    assert not isinstance(caught.value, BadImage)


def test_pixels_of_an_array_like_object_are_asked_for():
    import jax.numpy as jnp

    with pytest.raises(UserError, match=r"found ArrayImpl uint8 \[5, 6\]; np\.asarray makes one"):
        read_image(jnp.asarray(GREY8))
    for data in (bytearray, memoryview):
        out = io.BytesIO()
        PIL.Image.fromarray(RGB8).save(out, "PNG")
        np.testing.assert_array_equal(read_image(data(out.getvalue())), RGB8)

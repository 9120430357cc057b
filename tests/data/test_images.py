"""Decoding against TensorFlow's pixels, Pillow's, and files damaged in every way.

The files in files/jpeg were made once, by Pillow, of a picture of waves and noise: their names
give the sampling of the chroma and the quality; ycck.jpg is cmyk.jpg with the transform of its
Adobe marker changed from 0 to 2.
"""

import hashlib
import io
import itertools
import pathlib
import resource

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import noise, png_of, saved, turned, written

from vit_jax.data.images import BadImage, decode, encode, read_image
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError

JPEG = pathlib.Path(__file__).parent / "files" / "jpeg"
CLEAN = (JPEG / "420_q60.jpg").read_bytes()
QUANTISATION, FRAME, SCAN = (
    CLEAN.index(marker) for marker in (b"\xff\xdb", b"\xff\xc0", b"\xff\xda")
)

# The first 16 hex digits of the SHA-256 of TensorFlow 2.21.0's pixels:
#   for path in sorted(pathlib.Path("tests/data/files/jpeg").iterdir()):
#       for method in ("", "INTEGER_ACCURATE"):  # "" is the default
#           pixels = tf.io.decode_jpeg(path.read_bytes(), dct_method=method).numpy()
#           print(path.name, pixels.shape, hashlib.sha256(pixels.tobytes()).hexdigest()[:16])
TENSORFLOW = {
    "420_q60.jpg": ((33, 47, 3), "96fdc789a627219f", "b4cbe3be353ce25e"),
    "420_q95.jpg": ((17, 31, 3), "8bce79b599ceae0b", "8e037e84fa9247ed"),
    "422_q95.jpg": ((33, 29, 3), "f2fad480f6642301", "62639e4c84751829"),
    "444_q60.jpg": ((40, 31, 3), "d3100973f0539d42", "9c2409f7ba4271c2"),
    "cmyk.jpg": ((17, 23, 3), "2f7930eb19cfeb0c", "4ea64f584e48f93c"),
    "grey_q95.jpg": ((31, 45, 1), "4bf9b49ae5c348fc", "0b8b9ccbba166015"),
    "progressive_q60.jpg": ((33, 47, 3), "96fdc789a627219f", "b4cbe3be353ce25e"),
    "rgb_q95.jpg": ((17, 23, 3), "ce50b0be15661b72", "2545c22c8df96981"),
    "ycck.jpg": ((17, 23, 3), "cefe413f6465d253", "27ba0836a00107a2"),
}
# Of these Pillow decides, which knows one way of decoding alone.
CMYK = ("cmyk.jpg", "ycck.jpg")


def by_pillow(data, exif=False):
    with PIL.Image.open(io.BytesIO(data)) as image:
        image = PIL.ImageOps.exif_transpose(image) if exif else image
        pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def assert_sound(pixels):
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size
    assert pixels.shape[2] in (1, 3)


# -- JPEG ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENSORFLOW)
def test_jpeg_has_the_pixels_of_tensorflow_and_if_accurate_of_pillow(name):
    data, (shape, *hashes) = (JPEG / name).read_bytes(), TENSORFLOW[name]
    for jpeg in ("fast", "accurate"):
        found = decode(data, jpeg)
        assert found.shape == shape
        expected = hashes[jpeg == "accurate" or name in CMYK]
        assert hashlib.sha256(found.tobytes()).hexdigest().startswith(expected)
    np.testing.assert_array_equal(found, by_pillow(data))


# Some of ImageNet's files have such bytes, which TensorFlow and Pillow pass over.
def test_extraneous_bytes_before_a_marker_are_passed_over():
    for place in (QUANTISATION, FRAME, SCAN, len(CLEAN) - 2):
        data = CLEAN[:place] + b"\0\0\0" + CLEAN[place:]
        np.testing.assert_array_equal(decode(data), decode(CLEAN))
        fast = decode(data, "fast").astype(int)  # by Pillow, which does not know this way
        assert np.abs(fast - decode(CLEAN, "fast")).max() <= 8


# -- Other formats -------------------------------------------------------------------------------


def lossless():
    """Name -> (bytes, the pixels that they must give)."""
    rgb, alpha = noise(13, 17, 3), noise(13, 17, 1)[..., ::-1, :]
    rgba = PIL.Image.fromarray(np.concatenate([rgb, alpha], axis=2))
    grey = PIL.Image.fromarray(rgb[..., 0])
    colours, indices = noise(6, 3), rgb[..., 0] % 6
    palette, other = PIL.Image.fromarray(indices), PIL.Image.fromarray(5 - indices)
    palette.putpalette(colours.tobytes())
    other.putpalette(colours.tobytes())
    bits = rgb[..., :1] >> 7
    two = dict(save_all=True, append_images=[other])
    return {
        "png grey": (saved(grey, "PNG"), rgb[..., :1]),
        "png rgb": (saved(rgb, "PNG"), rgb),
        "png rgba": (saved(rgba, "PNG"), rgb),
        "png palette": (saved(palette, "PNG"), colours[indices]),
        "png transparent": (saved(palette, "PNG", transparency=2), colours[indices]),
        "png 1 bit": (saved(bits > 0, "PNG"), bits * 255),
        "png grey alpha": (saved(PIL.Image.merge("LA", [grey, grey]), "PNG"), rgb[..., :1]),
        "webp": (saved(rgb, "WEBP", lossless=True), rgb),
        "webp rgba": (saved(rgba, "WEBP", lossless=True, exact=True), rgb),
        "gif, the first frame": (saved(palette, "GIF", **two), colours[indices]),
        "bmp": (saved(rgb, "BMP"), rgb),
        "tiff": (saved(rgb, "TIFF"), rgb),
        "tiff lzw": (saved(grey, "TIFF", compression="tiff_lzw"), rgb[..., :1]),
        "tiff cmyk": (saved(PIL.Image.fromarray(255 - rgb).convert("CMYK"), "TIFF"), 255 - rgb),
    }


LOSSLESS = lossless()


def test_other_formats():
    for name, (data, expected) in LOSSLESS.items():
        found = decode(data)
        assert_sound(found)
        if name in ("png 1 bit", "png grey alpha"):  # grey, but Pillow makes colours of them
            expected = np.broadcast_to(expected, found.shape)
        np.testing.assert_array_equal(found, expected, err_msg=name)
    smooth = PIL.Image.open(JPEG / "444_q60.jpg").convert("RGB")
    for quality in (20, 90):
        data = saved(smooth, "WEBP", quality=quality)
        np.testing.assert_array_equal(decode(data), by_pillow(data))


# -- EXIF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation(kind):
    for orientation, mode in itertools.product(range(10), ("L", "RGB")):  # 0 and 9 mean nothing
        image = PIL.Image.fromarray(noise(11, 18, 3)).convert(mode)
        data = saved(image, kind, exif=turned(orientation))
        as_stored, upright = by_pillow(data), by_pillow(data, exif=True)
        assert as_stored.shape[:2] == (11, 18)
        assert upright.shape[:2] == ((18, 11) if orientation in (5, 6, 7, 8) else (11, 18))
        np.testing.assert_array_equal(decode(data), as_stored)
        opened = read_image(PIL.Image.open(io.BytesIO(data)), exif=True)
        for found in (decode(data, exif=True), opened):
            np.testing.assert_array_equal(found, upright)


# -- Damage --------------------------------------------------------------------------------------


def changed(start, values):
    return CLEAN[:start] + bytes(values) + CLEAN[start + len(values) :]


PNG = LOSSLESS["png rgb"][0]
BAD = {
    "a JPEG's first bytes": CLEAN[:3],
    **{f"JPEG cut at {share}%": CLEAN[: len(CLEAN) * share // 100] for share in range(10, 100, 15)},
    "JPEG without its end": CLEAN[:-2],
    **{f"PNG cut at {share}%": PNG[: len(PNG) * share // 100] for share in range(10, 100, 20)},
    "JPEG of a wrong precision": changed(FRAME + 4, [247]),
    "JPEG with its frame flipped": changed(FRAME + 2, [255 - b for b in CLEAN[FRAME + 2 : SCAN]]),
    "JPEG without tables": CLEAN[:QUANTISATION] + CLEAN[FRAME:],
    "JPEG of size zero": changed(FRAME + 5, [0, 0, 0, 0]),
    "PNG of size zero": png_of(0, 0),
    "PNG without pixels": png_of(30, 40),
}


def test_bad_bytes_are_refused():
    modes = itertools.product(("fast", "accurate"), (False, True))
    for (name, data), (jpeg, exif) in itertools.product(BAD.items(), modes):
        with pytest.raises(BadImage, match=r"\w") as caught:
            pytest.fail(f"{name}, {jpeg}: {decode(data, jpeg, exif).shape}")
        assert isinstance(caught.value, UserError)


def test_a_decompression_bomb_is_refused_before_memory_is_taken():
    size = [0xEA, 0x60, 0xEA, 0x60]  # 60,000 x 60,000: 10.8 GB of pixels
    for data in (png_of(60_000, 60_000), changed(FRAME + 5, size)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(BadImage, match="decompression bomb"):
            decode(data)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # in KiB


WHOLE = {
    "jpeg": CLEAN,
    "progressive": (JPEG / "progressive_q60.jpg").read_bytes(),
    "cmyk": (JPEG / "cmyk.jpg").read_bytes(),
    "png": PNG,
    "png palette": LOSSLESS["png transparent"][0],
    "webp": saved(PIL.Image.open(JPEG / "444_q60.jpg"), "WEBP", quality=50),
    "webp lossless": LOSSLESS["webp rgba"][0],
    "gif": LOSSLESS["gif, the first frame"][0],
}
KINDS = st.sampled_from(["set", "cut", "insert"])
CHANGES = st.lists(st.tuples(KINDS, st.integers(0, 1500), st.binary(max_size=4)), max_size=5)
MODES = st.sampled_from(["fast", "accurate"])


def check_changed(name, changes, jpeg, exif):
    data = WHOLE[name]
    for kind, place, content in changes:
        place %= len(data) + 1
        kept = {"set": place + len(content), "cut": len(data), "insert": place}[kind]
        data = data[:place] + content + data[kept:]
    try:
        assert_sound(decode(data, jpeg, exif))
    except BadImage as error:
        assert str(error)


changed_files = given(st.sampled_from(sorted(WHOLE)), CHANGES, MODES, st.booleans())
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
test_whatever_happens_to_a_file_it_is_an_image_or_refused = few(changed_files(check_changed))
many = settings(few, max_examples=1000)  # for what happens seldom
test_whatever_seldom_happens_to_a_file = pytest.mark.slow(many(changed_files(check_changed)))


# -- Paths and objects ---------------------------------------------------------------------------


def test_an_image_is_read_from_anything(tmp_path):
    path = tmp_path / "image.png"  # names say nothing
    path.write_bytes(CLEAN)
    for given_ in (path, str(path), CLEAN, bytearray(CLEAN), memoryview(CLEAN)):
        for jpeg in ("fast", "accurate"):
            np.testing.assert_array_equal(read_image(given_, jpeg), decode(CLEAN, jpeg))
    np.testing.assert_array_equal(read_image(PIL.Image.open(path)), decode(CLEAN))
    pixels = noise(4, 5, 3)
    np.testing.assert_array_equal(read_image(pixels), pixels)
    for grey in (pixels[..., 0], pixels[..., :1]):
        np.testing.assert_array_equal(read_image(grey), pixels[..., :1])


def test_a_path_is_named_when_nothing_can_be_read(tmp_path):
    written(tmp_path / "text.jpg", "text")
    cases = [
        ("missing.png", r"there is no image file '.*missing\.png'"),
        ("", r"is a folder: name the image files in it"),
        ("text.jpg", r"text\.jpg' is no readable image: it is of no known format"),
    ]
    for name, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            Preprocess((8, 8))(str(tmp_path / name))
        # Only such an image may be skipped by data.on_corrupt.
        assert isinstance(caught.value, BadImage) == (name == "text.jpg")
    with pytest.raises(BadImage, match="it is empty"):
        read_image(b"")
    with pytest.raises(UserError):  # of a damaged file
        read_image(PIL.Image.open(io.BytesIO(CLEAN[:-60])))


# -- Encoding ------------------------------------------------------------------------------------


def test_png_keeps_every_pixel():
    for shape in [(13, 17, 1), (13, 17, 3), (1, 1, 3)]:
        data = encode(noise(*shape))
        assert data.startswith(b"\x89PNG")
        np.testing.assert_array_equal(decode(data), noise(*shape))


def test_jpeg_keeps_a_smooth_image_nearly():
    for channels, (quality, least) in itertools.product((1, 3), ((75, 30), (95, 36))):
        y, x, c = np.mgrid[:61, :83, :channels]
        image = (128 + 80 * np.sin(x / 15 + c) + 40 * np.cos(y / 11 - c)).astype(np.uint8)
        for view in (image, image[::-1, ::-1]):
            data = encode(view, quality)
            with PIL.Image.open(io.BytesIO(data)) as opened:
                assert opened.format == "JPEG" and opened.mode == ("L" if channels == 1 else "RGB")
            found = decode(data)
            assert found.shape == image.shape
            error = np.square(found - view.astype(float)).mean()
            assert 10 * np.log10(255**2 / error) > least
        assert len(encode(image, 95)) > len(encode(image, 40))

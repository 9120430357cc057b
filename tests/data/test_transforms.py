"""Transforms against OpenCV, Pillow, and pixels and filters written out by hand."""

import dataclasses
import hashlib
import json

import cv2
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from vit_jax.data.transforms import (
    Preprocess,
    RandomAffine,
    centre_crop,
    flip,
    read_image,
    resize,
    to_channels,
)
from vit_jax.errors import UserError


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def cv2_channel(channel, size, method):
    return cv2.resize(channel, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def pillow_channel(channel, size, method):
    kind = PIL.Image.Resampling[method.removesuffix("_antialias").upper()]
    return np.asarray(PIL.Image.fromarray(channel).resize((size[1], size[0]), kind))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(6, 20), (5, 4), (22, 34)])
@pytest.mark.parametrize(
    "method, reference",
    [
        ("bilinear", cv2_channel),
        ("bilinear_antialias", pillow_channel),
        ("bicubic_antialias", pillow_channel),
    ],
)
def test_resize_is_that_of_its_library(method, reference, size, channels):
    image = noise(11, 17, channels)
    found = resize(image, size, method)
    assert found.shape == (*size, channels) and found.dtype == np.uint8
    for i in range(channels):
        expected = reference(np.ascontiguousarray(image[..., i]), size, method)
        np.testing.assert_array_equal(found[..., i], expected)


def keys(x):
    """Keys' cubic, a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def triangle(x):
    return max(0.0, 1 - abs(x))


def weights(old, new, method):
    """[new old]: what each old pixel of a line gives to each new one, by TensorFlow's formulas."""
    scale, out = old / new, np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale
        if method == "bilinear":
            left = int(np.floor(centre - 0.5))
            share = centre - 0.5 - left
            out[i, max(left, 0)] += 1 - share
            out[i, min(left + 1, old - 1)] += share
            continue
        for j in range(old):
            if method == "area":
                out[i, j] = max(0.0, min((i + 1) * scale, j + 1) - max(i * scale, j))
            else:
                kernel = triangle if method == "bilinear_antialias" else keys
                out[i, j] = kernel((j + 0.5 - centre) / max(scale, 1))
        out[i] /= out[i].sum()
    return out


def filtered(image, size, method):
    """An image [h w c] resized by those weights, in float64."""
    down, across = (weights(old, new, method) for old, new in zip(image.shape, size, strict=False))
    return np.einsum("yh,hwc,xw->yxc", down, image, across)


SIZES = [(6, 20), (25, 9), (5, 4), (11, 6), (13, 17), (22, 34)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["bilinear", "area", "bilinear_antialias", "bicubic_antialias"])
def test_resize_in_float32_is_the_filter_itself(method, size, channels):
    image = noise(11, 17, channels)
    found = resize(image.astype(np.float32), size, method)
    assert found.shape == (*size, channels) and found.dtype == np.float32
    np.testing.assert_allclose(found, filtered(image, size, method), rtol=0, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_area_in_uint8_is_the_filter_rounded(size, channels):
    image = noise(11, 17, channels)
    found = resize(image, size, "area")
    assert found.shape == (*size, channels) and found.dtype == np.uint8
    assert np.abs(found - filtered(image, size, "area")).max() < 0.501


@pytest.mark.parametrize(
    "method, expected",
    [
        ("bilinear", [110, 40]),  # the two pixels around each centre
        ("area", [80, 60]),  # all four
        # Weighted by the distance to the centre, in units of four pixels: 5/8, 7/8, 7/8, 5/8, 3/8,
        # 1/8 of 3.5, and Keys' cubic (a = -1/2) at the same distances and at 9/8 and 11/8.
        ("bilinear_antialias", [74, 61]),
        ("bicubic_antialias", [73, 61]),
    ],
)
def test_resize_of_one_row_to_a_quarter(method, expected):
    row = np.array([20, 120, 100, 80, 0, 40, 40, 160], np.uint8)
    assert resize(row[None, :, None], (1, 2), method).ravel().tolist() == expected


def test_resize_leaves_an_image_of_the_right_size_alone():
    image = noise(5, 7, 3)
    np.testing.assert_array_equal(resize(image, (5, 7), "bicubic_antialias"), image)


def test_to_channels():
    image = noise(5, 7, 3)
    np.testing.assert_array_equal(to_channels(image, 3), image)
    grey = image[..., :1]
    np.testing.assert_array_equal(to_channels(grey, 3), np.stack([grey[..., 0]] * 3, axis=-1))
    luminance = image @ np.array([0.299, 0.587, 0.114])
    found = to_channels(image, 1)
    assert found.shape == (5, 7, 1)
    assert np.abs(found[..., 0] - luminance).max() <= 0.51
    with pytest.raises(UserError, match="4 channels does not fit a model of 3"):
        to_channels(noise(5, 7, 4), 3)


class Fixed(np.random.Generator):
    """Draws chosen values instead of random ones in [0, 1)."""

    def __init__(self, values):
        super().__init__(np.random.PCG64(0))
        self.values = values

    def uniform(self, low=0.0, high=1.0, size=None):
        return low + (high - low) * np.broadcast_to(np.array(self.values, float), size)

    def random(self):
        return self.values


@pytest.mark.parametrize("channels", [1, 3])
def test_an_affine_map_that_may_change_nothing_changes_nothing(channels):
    image = noise(9, 14, channels)
    np.testing.assert_array_equal(RandomAffine()(image, np.random.default_rng(1)), image)
    middle = RandomAffine(degrees=40.0, translate=0.3, scale=(0.5, 1.5), shear=20.0)
    np.testing.assert_array_equal(middle(image, Fixed(0.5)), image)


@pytest.mark.parametrize("value, down, right", [(1.0, 2, 3), (0.0, -2, -3)])
def test_translation_is_a_share_of_each_side_and_black_comes_in(value, down, right):
    image = noise(8, 12, 3)
    padded = np.pad(image, ((2, 2), (3, 3), (0, 0)))
    expected = padded[2 - down : 10 - down, 3 - right : 15 - right]
    found = RandomAffine(translate=0.25)(image, Fixed(value))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value, turns", [(0.0, 1), (1.0, -1)])
def test_rotation_by_ninety_degrees(value, turns):
    image = noise(7, 7, 3)
    found = RandomAffine(degrees=90.0)(image, Fixed(value))
    np.testing.assert_array_equal(found, np.rot90(image, turns))


def test_scale_zooms_about_the_centre():
    image = noise(9, 13, 1)
    found = RandomAffine(scale=(2.0, 2.0))(image, Fixed(0.3))
    np.testing.assert_array_equal(found[::2, ::2], image[2:7, 3:10])
    found = RandomAffine(scale=(0.5, 3.0))(image, Fixed(0.0))
    inside = np.zeros((9, 13, 1), np.uint8)
    inside[2:7, 3:10] = image[::2, ::2]
    np.testing.assert_array_equal(found, inside)


def test_shear_moves_rows_sideways():
    image = noise(5, 9, 1)
    found = RandomAffine(shear=45.0)(image, Fixed(1.0))  # by one pixel a row, none in the middle
    for row, shift in enumerate([-2, -1, 0, 1, 2]):
        expected = np.pad(image[row, :, 0], 2)[2 - shift : 11 - shift]
        np.testing.assert_array_equal(found[row, :, 0], expected)


def warp(image, linear, offset):
    """Bilinear, black outside, pixel by pixel: what lies at p moves to linear @ p + offset."""
    h, w, _ = image.shape
    out = np.zeros(image.shape)
    inverse = np.linalg.inv(linear)

    def at(y, x):
        return image[y, x] if 0 <= y < h and 0 <= x < w else 0

    for y in range(h):
        for x in range(w):
            source_x, source_y = inverse @ (np.array([x, y]) - offset)
            left, top = int(np.floor(source_x)), int(np.floor(source_y))
            fx, fy = source_x - left, source_y - top
            upper = (1 - fx) * at(top, left) + fx * at(top, left + 1)
            lower = (1 - fx) * at(top + 1, left) + fx * at(top + 1, left + 1)
            out[y, x] = (1 - fy) * upper + fy * lower
    return out


@pytest.mark.parametrize("draws", [(0.8, 0.3, 0.9, 0.2, 0.95), (0.1, 0.7, 0.35, 0.9, 0.4)])
def test_all_of_an_affine_map_at_once(draws):
    y, x = np.mgrid[:24, :36]
    channels = [100 + 60 * np.sin(x / 9) + 40 * np.cos(y / 7), 3 * x + 2 * y]
    image = np.stack(channels, axis=-1).round().astype(np.uint8)
    found = RandomAffine(degrees=30.0, translate=0.1, scale=(0.6, 1.3), shear=15.0)(
        image, Fixed(draws)
    )

    angle, shift_x, shift_y, zoom, shear = np.array(draws)
    turn, slant = np.pi * (2 * angle - 1) * 30 / 180, np.tan(np.pi * (2 * shear - 1) * 15 / 180)
    cos, sin = np.cos(turn), np.sin(turn)
    linear = (0.6 + 0.7 * zoom) * np.array([[cos, slant * cos - sin], [sin, slant * sin + cos]])
    centre = np.array([17.5, 11.5])
    offset = (
        centre - linear @ centre + 0.1 * np.array([2 * shift_x - 1, 2 * shift_y - 1]) * [36, 24]
    )
    # OpenCV rounds positions to 1/32 pixel, which shows at the black edge.
    assert np.abs(found - warp(image, linear, offset)).max() < 5
    assert np.abs(found - warp(image, linear, offset)).mean() < 0.5


def test_randomness_comes_from_the_generator_alone():
    image = noise(8, 8, 1)
    affine = RandomAffine(degrees=20.0, translate=0.1, scale=(0.8, 1.2), shear=10.0)
    once, again, other = (affine(image, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()


@pytest.mark.parametrize("scale", [(0.0, 1.0), (1.2, 0.8), (-1.0, 1.0)])
def test_a_scale_that_is_no_range_is_refused(scale):
    with pytest.raises(UserError, match=r"affine\.scale is"):
        RandomAffine(scale=scale)


def test_flip_mirrors_left_and_right_half_of_the_time():
    image = noise(4, 6, 3)
    np.testing.assert_array_equal(flip(image, Fixed(0.49)), np.fliplr(image))
    np.testing.assert_array_equal(flip(image, Fixed(0.51)), image)


@pytest.mark.parametrize("left_over, offset", [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2)])
def test_centre_crop_rounds_half_a_pixel_to_even(left_over, offset):
    image = noise(6 + left_over, 9, 1)
    np.testing.assert_array_equal(centre_crop(image, (6, 9)), image[offset : offset + 6])
    turned = image.swapaxes(0, 1).astype(np.float32)
    found = centre_crop(turned, (9, 6))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, turned[:, offset : offset + 6])


@pytest.mark.parametrize("method", ["bilinear", "bicubic_antialias"])
@pytest.mark.parametrize(
    "shape, image_size, aspect, crop, resized, top, left",
    [
        ((33, 25), (8, 8), "keep", 0.8, (13, 10), 2, 1),  # 10 * 33 / 25 = 13.2
        ((25, 33), (8, 8), "keep", 0.8, (10, 13), 1, 2),
        ((30, 30), (8, 8), "keep", 0.8, (10, 10), 1, 1),
        ((19, 10), (8, 8), "keep", 0.8, (19, 10), 6, 1),  # no resizing at all; 5.5 to even
        ((8, 47), (8, 8), "keep", 1.0, (8, 47), 0, 20),  # 19.5 to even
        ((7, 9), (8, 8), "keep", 0.9, (8, 10), 0, 1),  # 8 / 0.9 = 8.9 rounded down, 10.3 too
        ((33, 25), (6, 8), "keep", 0.75, (13, 10), 4, 1),  # 8 x 10, from 2.5 times its size
        ((25, 33), (6, 8), "keep", 0.75, (8, 11), 1, 2),  # 33 / 3.125 = 10.56 rounded
        ((33, 25), (8, 8), "squash", 0.8, (10, 10), 1, 1),
        ((33, 25), (6, 8), "squash", 0.75, (8, 10), 1, 1),
        ((33, 25), (6, 8), "squash", 1.0, (6, 8), 0, 0),
    ],
)
def test_aspect_and_crop(shape, image_size, aspect, crop, resized, top, left, method):
    image = noise(*shape, 3)
    preprocess = Preprocess(image_size, resize=method, aspect=aspect, crop=crop)
    expected = resize(image, resized, method)
    h, w = image_size
    expected = expected[top : top + h, left : left + w]
    np.testing.assert_array_equal(preprocess.pixels(image), expected)


@pytest.mark.parametrize(
    "shape, short, crop, resized, digest",
    [
        ((37, 53), 16, 14, (16, 23), "17275b313f5e2b34"),
        ((53, 37), 16, 14, (23, 16), "aba7e76249494779"),
        ((21, 64), 14, 12, (14, 43), "34da97cafb1903ce"),
        ((64, 21), 14, 12, (43, 14), "437924880babc6d2"),
        ((30, 45), 20, 18, (20, 30), "1d872ef13f325701"),
        ((50, 75), 20, 17, (20, 30), "525923b59f83f42e"),
    ],
)
def test_small_is_resize_small_and_central_crop(shape, short, crop, resized, digest):
    """From TensorFlow 2.21: factor = float32(short) / min(h, w), the sizes rounded, then
    tf.image.resize(method="area"), cast to uint8, and the centre with its offsets rounded down."""
    image = (np.arange(np.prod((*shape, 3))).reshape(*shape, 3) * 7 % 251).astype(np.uint8)
    fields = dict(resize="area", resize_dtype="truncated", aspect="small", crop=crop / short)
    found = Preprocess((crop, crop), **fields)
    assert found._resized(*shape) == resized
    assert hashlib.sha256(found.pixels(image).tobytes()).hexdigest()[:16] == digest


def test_a_crop_that_is_no_whole_share_gives_the_size_that_was_meant():
    for size, box in ((384, 448), (224, 256), (518, 592), (71, 97), (480, 547)):
        assert Preprocess((size, size), crop=size / box)._resized(9, 9) == (box, box)


def test_float32_resizes_float32():
    image = noise(11, 17, 1)
    preprocess = Preprocess((4, 6), aspect="keep", crop=0.7, resize_dtype="float32")
    found = preprocess.pixels(image)
    assert found.shape == (4, 6, 3) and found.dtype == np.float32
    expected = filtered(np.repeat(image, 3, axis=2), (5, 8), "bilinear")
    expected = expected[0:4, 1:7]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(preprocess(image), expected / 127.5 - 1, rtol=0, atol=1e-5)
    assert (found != found.round()).mean() > 0.9
    same = Preprocess((11, 17), in_channels=1, resize_dtype="float32").pixels(image)
    assert same.dtype == np.float32
    np.testing.assert_array_equal(same, image)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_normalise(kind, dtype):
    pixels = kind(np.array([0, 51, 128, 255], dtype))
    found = Preprocess((8, 8)).normalise(pixels)
    assert type(found) is type(pixels) and found.dtype == np.float32
    np.testing.assert_allclose(found, [-1.0, -0.6, 1 / 255, 1.0], rtol=0, atol=1e-7)
    found = Preprocess((8, 8), mean=0.25, std=0.125).normalise(pixels)
    np.testing.assert_allclose(found, [-2.0, -0.4, 8 * 128 / 255 - 2, 6.0], atol=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_normalise_by_channel(kind):
    preprocess = Preprocess((8, 8), mean=(0.5, 0.25, 0.2), std=(0.5, 0.125, 0.1))
    pixels = kind(np.array([[[[51, 51, 51]], [[255, 0, 102]]]], np.uint8))
    found = preprocess.normalise(pixels)
    assert type(found) is type(pixels) and found.dtype == np.float32
    expected = [[[[-0.6, -0.4, 0.0]], [[1.0, -2.0, 2.0]]]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    one = dataclasses.replace(preprocess, mean=(0.25,), std=(0.125,))
    np.testing.assert_allclose(one.normalise(pixels)[..., 1], found[..., 1])


def test_preprocess_squashes_then_normalises():
    grey = np.array([[0, 10, 40, 60], [20, 30, 80, 100]], np.uint8)
    found = Preprocess((1, 2), in_channels=3, resize="area")(grey)
    assert found.shape == (1, 2, 3) and found.dtype == np.float32
    expected = [[[15 / 127.5 - 1] * 3, [70 / 127.5 - 1] * 3]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(resize="bicubic"), r"data resize 'bicubic'.*'bicubic_antialias'\?"),
        (dict(aspect="sqush"), r"data aspect 'sqush'.*'squash'\?"),
        (dict(aspect="border"), r"data aspect 'border'.*known: keep, small, squash"),
        (dict(resize_dtype="float"), r"data resize_dtype 'float'.*'float32'\?"),
        (dict(crop=0.0), r"data crop is 0\.0; it must be above 0 and at most 1"),
        (dict(crop=1.01), r"data crop is 1\.01"),
        (dict(crop=float("nan")), "data crop is nan"),
        (dict(mean=(0.5, 0.4)), r"data mean is \[0\.5, 0\.4\]; expected one .* of the 3 channels"),
        (dict(mean=(0.1, 0.2, 0.3), in_channels=1), "data mean .* each of the 1 channels"),
        (dict(mean=()), r"data mean is \[\]"),
        (dict(mean=float("inf")), "data mean is inf; expected one finite number"),
        (dict(std=0.0), r"data std is 0\.0; expected one positive number"),
        (dict(std=(0.2, -0.2, 0.2)), r"data std is \[0\.2, -0\.2, 0\.2\]"),
        (dict(std=(0.2, float("nan"), 0.2)), "data std is"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Preprocess((8, 8), **fields)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((8, 12)),
        Preprocess(
            (224, 224),
            resize="bicubic_antialias",
            aspect="keep",
            crop=0.875,
            resize_dtype="float32",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
    ],
)
def test_preprocessing_goes_through_json(preprocess):
    found = Preprocess(**json.loads(json.dumps(dataclasses.asdict(preprocess))))
    assert found == preprocess and hash(found) == hash(preprocess)


def test_a_record_without_the_newer_fields_squashes_in_uint8():
    old = '{"image_size": [8, 12], "in_channels": 1, "resize": "area", "mean": 0.5, "std": 0.2}'
    found = Preprocess(**json.loads(old))
    newer = ("squash", 1.0, "uint8", "accurate", False)
    assert dataclasses.astuple(found) == ((8, 12), 1, "area", *newer, 0.5, 0.2)


PALETTE = [200, 10, 0, 0, 20, 30, 0, 0, 255]


def pictures():
    """Name -> (Pillow image, what it should be read as)."""
    rgb = noise(5, 7, 3)
    palette = PIL.Image.fromarray(rgb[..., 0] % 3)
    palette.putpalette(PALETTE)
    transparent = PIL.Image.fromarray(np.concatenate([rgb, noise(5, 7, 1)], axis=2))
    return {
        "L": (PIL.Image.fromarray(rgb[..., 0]), rgb[..., :1]),
        "RGB": (PIL.Image.fromarray(rgb), rgb),
        "RGBA": (transparent, rgb),
        "P": (palette, np.array(PALETTE, np.uint8).reshape(3, 3)[rgb[..., 0] % 3]),
    }


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_pictures_and_their_files_are_read_alike(tmp_path, mode):
    picture, expected = pictures()[mode]
    assert picture.mode == mode
    path = tmp_path / "picture.png"
    picture.save(path)
    for given in (picture, path, str(path)):
        np.testing.assert_array_equal(read_image(given), expected)
    found = Preprocess((5, 7))(path)
    assert found.shape == (5, 7, 3)
    np.testing.assert_allclose(found, np.broadcast_to(expected, (5, 7, 3)) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_arrays_are_read_as_they_are(shape):
    pixels = noise(*shape)
    expected = pixels if pixels.ndim == 3 else pixels[:, :, None]
    np.testing.assert_array_equal(read_image(pixels), expected)


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "cut short", "a folder"])
def test_a_file_that_is_no_image_is_refused(tmp_path, kind):
    path = tmp_path / "picture.png"
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.touch()
    elif kind == "cut short":
        PIL.Image.fromarray(noise(50, 70, 3)).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "a folder":
        path.mkdir()
    message = {"missing": "there is no image file", "a folder": "is a folder: name the image"}
    message = message.get(kind, "is no readable image")
    with pytest.raises(UserError, match=message) as raised:
        Preprocess((8, 8))(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "image, found",
    [
        (np.zeros((4, 5, 3), np.float32), r"found float32 \[4, 5, 3\]"),
        (np.zeros((4, 5), int), r"found int64 \[4, 5\]"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"found uint8 \[2, 4, 5, 3\]"),
        (np.zeros(4, np.uint8), r"found uint8 \[4\]"),
        ([[0, 1]], "found list"),
        (None, "found NoneType"),
    ],
)
def test_other_inputs_are_refused(image, found):
    with pytest.raises(UserError, match=f"expected a path, an image file's bytes, .*{found}"):
        Preprocess((8, 8))(image)


@pytest.mark.parametrize(
    "shape, channels, hint",
    [
        ((3, 20, 30), 3, r"image\.transpose\(1, 2, 0\) puts them last"),
        ((1, 20, 30), 1, r"image\.transpose\(1, 2, 0\) puts them last"),
        ((6, 20, 30), 6, r"image\.transpose\(1, 2, 0\) puts them last"),
        ((20, 30, 4), 3, r"image\[\.\.\., :3\] leaves the last one out, if that is transparency"),
        ((20, 30, 2), 1, r"image\[\.\.\., :1\] leaves the last one out"),
        ((20, 30, 6), 3, "of several grey images, take one at a time"),
    ],
)
def test_channels_that_are_none_are_refused(shape, channels, hint):
    preprocess = Preprocess((8, 8), channels)
    with pytest.raises(UserError, match=rf"found \[{', '.join(map(str, shape))}\]; .*{hint}"):
        preprocess(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_a_model_s_own_number_of_channels_is_read(channels):
    pixels = noise(8, 8, channels)
    found = Preprocess((8, 8), channels)(pixels)
    np.testing.assert_allclose(found, pixels / 127.5 - 1, rtol=0, atol=1e-6)

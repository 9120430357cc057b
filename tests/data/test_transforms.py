"""Transforms against OpenCV, Pillow, and pixels and filters written out by hand."""

import dataclasses
import hashlib
import json

import cv2
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from made import noise, refused

from vit_jax.data.transforms import (
    Preprocess,
    RandomAffine,
    centre_crop,
    flip,
    resize,
    to_channels,
)
from vit_jax.errors import UserError


def cv2_channel(channel, size, method):
    return cv2.resize(channel, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def pillow_channel(channel, size, method):
    kind = PIL.Image.Resampling[method.removesuffix("_antialias").upper()]
    return np.asarray(PIL.Image.fromarray(channel).resize((size[1], size[0]), kind))


LIBRARIES = {"bilinear": cv2_channel, "bilinear_antialias": pillow_channel}
LIBRARIES["bicubic_antialias"] = pillow_channel
SIZES = [(6, 20), (25, 9), (5, 4), (11, 6), (13, 17), (22, 34)]


def same_for(found, image, size, dtype):
    assert found.shape == (*size, image.shape[2]) and found.dtype == dtype


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_resize_is_that_of_its_library_or_the_filter_itself(size, channels):
    image = noise(11, 17, channels)
    for method, reference in LIBRARIES.items():
        found = resize(image, size, method)
        same_for(found, image, size, np.uint8)
        for i in range(channels):
            expected = reference(np.ascontiguousarray(image[..., i]), size, method)
            np.testing.assert_array_equal(found[..., i], expected)
    for method in (*LIBRARIES, "area"):
        found = resize(image.astype(np.float32), size, method)
        same_for(found, image, size, np.float32)
        np.testing.assert_allclose(found, filtered(image, size, method), rtol=0, atol=1e-3)
    found = resize(image, size, "area")
    same_for(found, image, size, np.uint8)
    assert np.abs(found - filtered(image, size, "area")).max() < 0.501


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


def test_resize_of_one_row_to_a_quarter():
    row = np.array([20, 120, 100, 80, 0, 40, 40, 160], np.uint8)[None, :, None]
    for method, expected in {
        "bilinear": [110, 40],  # the two pixels around each centre
        "area": [80, 60],  # all four
        # Weighted by the distance to the centre, in units of four pixels: 5/8, 7/8, 7/8, 5/8, 3/8,
        # 1/8 of 3.5, and Keys' cubic (a = -1/2) at the same distances and at 9/8 and 11/8.
        "bilinear_antialias": [74, 61],
        "bicubic_antialias": [73, 61],
    }.items():
        assert resize(row, (1, 2), method).ravel().tolist() == expected
        np.testing.assert_array_equal(resize(row, (1, 8), method), row)  # of the right size


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


def test_an_affine_map_that_may_change_nothing_changes_nothing():
    for channels in (1, 3):
        image = noise(9, 14, channels)
        np.testing.assert_array_equal(RandomAffine()(image, np.random.default_rng(1)), image)
        middle = RandomAffine(degrees=40.0, translate=0.3, scale=(0.5, 1.5), shear=20.0)
        np.testing.assert_array_equal(middle(image, Fixed(0.5)), image)


def test_each_part_of_an_affine_map_by_itself():
    """Shares of each side, by which black comes in; quarter turns; about the centre; rows."""
    image = noise(8, 12, 3)
    padded = np.pad(image, ((2, 2), (3, 3), (0, 0)))
    for value, down, right in [(1.0, 2, 3), (0.0, -2, -3)]:
        expected = padded[2 - down : 10 - down, 3 - right : 15 - right]
        found = RandomAffine(translate=0.25)(image, Fixed(value))
        np.testing.assert_array_equal(found, expected)
    image = noise(7, 7, 3)
    for value, turns in [(0.0, 1), (1.0, -1)]:
        found = RandomAffine(degrees=90.0)(image, Fixed(value))
        np.testing.assert_array_equal(found, np.rot90(image, turns))
    image = noise(9, 13, 1)
    found = RandomAffine(scale=(2.0, 2.0))(image, Fixed(0.3))
    np.testing.assert_array_equal(found[::2, ::2], image[2:7, 3:10])
    found, inside = RandomAffine(scale=(0.5, 3.0))(image, Fixed(0.0)), np.zeros_like(image)
    inside[2:7, 3:10] = image[::2, ::2]
    np.testing.assert_array_equal(found, inside)
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
    cases = [(scale, r"affine\.scale is") for scale in [(0.0, 1.0), (1.2, 0.8), (-1.0, 1.0)]]
    refused(lambda scale: RandomAffine(scale=scale), cases)


def test_flip_mirrors_left_and_right_half_of_the_time():
    image = noise(4, 6, 3)
    np.testing.assert_array_equal(flip(image, Fixed(0.49)), np.fliplr(image))
    np.testing.assert_array_equal(flip(image, Fixed(0.51)), image)


def test_centre_crop_rounds_half_a_pixel_to_even():
    for left_over, offset in [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2)]:
        image = noise(6 + left_over, 9, 1)
        np.testing.assert_array_equal(centre_crop(image, (6, 9)), image[offset : offset + 6])
        lying = image.swapaxes(0, 1).astype(np.float32)
        found = centre_crop(lying, (9, 6))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, lying[:, offset : offset + 6])


def test_aspect_and_crop():
    for shape, image_size, aspect, crop, resized, top, left in [
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
    ]:
        (h, w), image = image_size, noise(*shape, 3)
        for method in ("bilinear", "bicubic_antialias"):
            preprocess = Preprocess(image_size, resize=method, aspect=aspect, crop=crop)
            expected = resize(image, resized, method)[top : top + h, left : left + w]
            np.testing.assert_array_equal(preprocess.pixels(image), expected)


def test_small_is_resize_small_and_central_crop():
    """From TensorFlow 2.21: factor = float32(short) / min(h, w), the sizes rounded, then
    tf.image.resize(method="area"), cast to uint8, and the centre with its offsets rounded down."""
    for shape, short, crop, resized, digest in [
        ((37, 53), 16, 14, (16, 23), "17275b313f5e2b34"),
        ((53, 37), 16, 14, (23, 16), "aba7e76249494779"),
        ((21, 64), 14, 12, (14, 43), "34da97cafb1903ce"),
        ((64, 21), 14, 12, (43, 14), "437924880babc6d2"),
        ((30, 45), 20, 18, (20, 30), "1d872ef13f325701"),
        ((50, 75), 20, 17, (20, 30), "525923b59f83f42e"),
    ]:
        image = (np.arange(np.prod((*shape, 3))).reshape(*shape, 3) * 7 % 251).astype(np.uint8)
        fields = dict(resize="area", resize_dtype="truncated", aspect="small", crop=crop / short)
        found = Preprocess((crop, crop), **fields)
        assert found._resized(*shape) == resized
        assert hashlib.sha256(found.pixels(image).tobytes()).hexdigest()[:16] == digest
    # A crop that is no whole share gives the size that was meant.
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


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_normalise(kind):
    for dtype in (np.uint8, np.float32) if kind is np.asarray else (np.uint8,):
        pixels = kind(np.array([0, 51, 128, 255], dtype))
        found = Preprocess((8, 8)).normalise(pixels)
        assert type(found) is type(pixels) and found.dtype == np.float32
        np.testing.assert_allclose(found, [-1.0, -0.6, 1 / 255, 1.0], rtol=0, atol=1e-7)
        found = Preprocess((8, 8), mean=0.25, std=0.125).normalise(pixels)
        np.testing.assert_allclose(found, [-2.0, -0.4, 8 * 128 / 255 - 2, 6.0], atol=1e-6)
    by_channel = Preprocess((8, 8), mean=(0.5, 0.25, 0.2), std=(0.5, 0.125, 0.1))
    pixels = kind(np.array([[[[51, 51, 51]], [[255, 0, 102]]]], np.uint8))
    found = by_channel.normalise(pixels)
    assert type(found) is type(pixels) and found.dtype == np.float32
    expected = [[[[-0.6, -0.4, 0.0]], [[1.0, -2.0, 2.0]]]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    one = dataclasses.replace(by_channel, mean=(0.25,), std=(0.125,))
    np.testing.assert_allclose(one.normalise(pixels)[..., 1], found[..., 1])


def test_preprocess_squashes_then_normalises():
    grey = np.array([[0, 10, 40, 60], [20, 30, 80, 100]], np.uint8)
    found = Preprocess((1, 2), in_channels=3, resize="area")(grey)
    assert found.shape == (1, 2, 3) and found.dtype == np.float32
    expected = [[[15 / 127.5 - 1] * 3, [70 / 127.5 - 1] * 3]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_preprocessing_that_cannot_be_is_refused():
    cases = [
        (dict(resize="bicubic"), r"data resize 'bicubic'.*'bicubic_antialias'\?"),
        (dict(aspect="sqush"), r"data aspect 'sqush'.*'squash'\?"),
        (dict(aspect="border"), r"data aspect 'border'.*known: keep, small, squash"),
        (dict(resize_dtype="float"), r"data resize_dtype 'float'.*'float32'\?"),
        (dict(jpeg="acurate"), r"data jpeg 'acurate'.*'accurate'\?"),
        (dict(jpeg="quick"), "data jpeg 'quick': known: accurate, fast"),
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
    ]
    refused(lambda fields: Preprocess((8, 8), **fields), cases)


def test_preprocessing_goes_through_json():
    fields = dict(resize="bicubic_antialias", aspect="keep", crop=0.875, resize_dtype="float32")
    fields |= dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    for preprocess in (Preprocess((8, 12)), Preprocess((224, 224), **fields)):
        found = Preprocess(**json.loads(json.dumps(dataclasses.asdict(preprocess))))
        assert found == preprocess and hash(found) == hash(preprocess)
    # A record without the newer fields squashes in uint8.
    old = '{"image_size": [8, 12], "in_channels": 1, "resize": "area", "mean": 0.5, "std": 0.2}'
    newer = ("squash", 1.0, "uint8", "accurate", False)
    expected = ((8, 12), 1, "area", *newer, 0.5, 0.2, None, None)
    assert dataclasses.astuple(Preprocess(**json.loads(old))) == expected


def test_channels_are_those_of_the_model_or_told_what_to_become():
    last, first = (
        r"image\[\.\.\., :{}\] leaves the last one out",
        r"image\.transpose\(1, 2, 0\) puts",
    )
    for shape, channels, hint in [
        ((3, 20, 30), 3, f"{first} them last"),
        ((1, 20, 30), 1, f"{first} them last"),
        ((6, 20, 30), 6, f"{first} them last"),
        ((20, 30, 4), 3, f"{last.format(3)}, if that is transparency"),
        ((20, 30, 2), 1, last.format(1)),
        ((20, 30, 6), 3, "of several grey images, take one at a time"),
    ]:
        message = rf"found \[{', '.join(map(str, shape))}\]; .*{hint}"
        with pytest.raises(UserError, match=message):
            Preprocess((8, 8), channels)(np.zeros(shape, np.uint8))
    for channels in (1, 2, 3, 4, 6):
        pixels = noise(8, 8, channels)
        found = Preprocess((8, 8), channels)(pixels)
        np.testing.assert_allclose(found, pixels / 127.5 - 1, rtol=0, atol=1e-6)

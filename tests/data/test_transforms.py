"""Transforms against OpenCV, Pillow, and pixels written out by hand."""

import cv2
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from vit_jax.data.transforms import Preprocess, RandomAffine, flip, read_image, resize, to_channels
from vit_jax.errors import UserError


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def cv2_channel(channel, size, method):
    flag = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}[method]
    return cv2.resize(channel, (size[1], size[0]), interpolation=flag)


def pillow_channel(channel, size, method):
    kind = PIL.Image.Resampling[method.removesuffix("_antialias").upper()]
    return np.asarray(PIL.Image.fromarray(channel).resize((size[1], size[0]), kind))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(6, 20), (5, 4), (22, 34)])
@pytest.mark.parametrize(
    "method, reference",
    [
        ("bilinear", cv2_channel),
        ("area", cv2_channel),
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


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_normalise(kind):
    pixels = kind(np.array([0, 51, 128, 255], np.uint8))
    found = Preprocess((8, 8)).normalise(pixels)
    assert type(found) is type(pixels) and found.dtype == np.float32
    np.testing.assert_allclose(found, [-1.0, -0.6, 1 / 255, 1.0], rtol=0, atol=1e-7)
    found = Preprocess((8, 8), mean=0.25, std=0.125).normalise(pixels)
    np.testing.assert_allclose(found, [-2.0, -0.4, 8 * 128 / 255 - 2, 6.0], atol=1e-6)


def test_preprocess_squashes_then_normalises():
    grey = np.array([[0, 10, 40, 60], [20, 30, 80, 100]], np.uint8)
    found = Preprocess((1, 2), in_channels=3, resize="area")(grey)
    assert found.shape == (1, 2, 3) and found.dtype == np.float32
    expected = [[[15 / 127.5 - 1] * 3, [70 / 127.5 - 1] * 3]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_unknown_resize_is_refused():
    with pytest.raises(UserError, match=r"data resize 'bicubic'.*'bicubic_antialias'\?"):
        Preprocess((8, 8), resize="bicubic")


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
    message = "there is no image file" if kind == "missing" else "is no readable image"
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
    with pytest.raises(UserError, match=f"expected a path, a Pillow image or uint8.*{found}"):
        Preprocess((8, 8))(image)

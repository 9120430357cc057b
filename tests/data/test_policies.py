"""Colour jitter, TrivialAugment and 3-Augment against their definitions, written out in NumPy."""

import dataclasses
import math

import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
import pytest
from conftest import DIGITS
from made import noise, refused

from vit_jax.data import policies
from vit_jax.data.config import Split
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.policies import OPS, ColorJitter, ThreeAugment, trivial_augment
from vit_jax.data.transforms import Preprocess, random_crop
from vit_jax.errors import UserError
from vit_jax.training.config_file import load_config

PICTURE = noise(24, 31, 3)
GREY = PICTURE[..., :1]


def grey(image):
    """ITU-R 601 in 16 bits, rounded."""
    weighted = image.astype(np.int64) @ np.array([19595, 38470, 7471]) + 2**15
    return (weighted >> 16)[..., None]


def blend(dull, image, factor):
    """Float32, clipped, rounded down."""
    dull, factor = np.asarray(dull, np.float32), np.float32(factor)
    return (dull + factor * (image.astype(np.float32) - dull)).clip(0, 255).astype(np.uint8)


def hue(image, shift):
    """torchvision's definition: the uint8 hue of Pillow's HSV overflows."""
    hsv = np.array(PIL.Image.fromarray(image).convert("HSV"))
    hsv[..., 0] += np.int32(shift * 255).astype(np.uint8)
    return np.asarray(PIL.Image.fromarray(hsv, "HSV").convert("RGB"))


def written_out(image):
    """The adjustments of an image, by name: its new pixels for a factor."""
    luma = grey(image) if image.shape[2] == 3 else image
    return {
        "brightness": lambda factor: blend(0, image, factor),
        "contrast": lambda factor: blend(int(luma.mean() + 0.5), image, factor),
        "saturation": lambda factor: blend(luma, image, factor),
        "hue": lambda shift: hue(image, shift) if image.shape[2] == 3 else image,
    }


def applied(function, image, value):
    """The operation of Pillow images, of pixels."""
    return policies._with_pillow(image, lambda picture: function(picture, value))


@pytest.mark.parametrize("image", [PICTURE, GREY], ids=["colour", "grey"])
def test_adjustments_are_torchvisions_definitions(image):
    values = dict.fromkeys(("brightness", "contrast", "saturation"), (0.0, 0.55, 1.0, 1.3, 2.9))
    values["hue"] = (-0.5, -0.31, 0.0, 0.1, 0.5)
    for name, expected in written_out(image).items():
        for value in values[name]:
            found = applied(getattr(policies, f"adjust_{name}"), image, value)
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, expected(value), err_msg=f"{name} {value}")


def test_a_third_of_the_hue_circle_makes_red_green_and_green_blue():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]]], np.uint8)
    turned = applied(policies.adjust_hue, colours, 1 / 3 + 1e-6).astype(int)
    np.testing.assert_allclose(turned[0, :, :], np.roll(colours[0], 1, -1), atol=6)


def jittered(jitter, image, random):
    """The order and the factors by the documented draws."""
    order, shares = random.permutation(4), random.random(4)
    for i in order:
        name, strength = list(dataclasses.asdict(jitter).items())[i]
        low = max(0, 1 - strength) if name != "hue" else -strength
        high = 1 + strength if name != "hue" else strength
        if strength:
            image = written_out(image)[name](low + shares[i] * (high - low))
    return image


@pytest.mark.parametrize("image", [PICTURE, GREY], ids=["colour", "grey"])
def test_color_jitter_draws_an_order_and_factors_around_one(image):
    orders = set()
    for seed in range(60):
        jitter = ColorJitter(0.4, 1.5, 0.3, 0.1) if seed % 2 else ColorJitter(0.4, 0.4)
        found = jitter(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, jittered(jitter, image, np.random.default_rng(seed)))
        orders.add(tuple(np.random.default_rng(seed).permutation(4)))
    assert len(orders) > 18  # of 24
    np.testing.assert_array_equal(ColorJitter()(image, np.random.default_rng(0)), image)


def test_three_augment_is_one_of_three_then_a_jitter():
    counts = dict.fromkeys(range(3), 0)
    for seed in range(200):
        random = np.random.default_rng(seed)
        which = int(random.integers(3))
        counts[which] += 1
        if seed > 40:
            continue
        if which == 0:
            expected = grey(PICTURE).astype(np.uint8).repeat(3, axis=2)
        elif which == 1:
            expected = np.where(PICTURE < 128, PICTURE, 255 - PICTURE)
        else:
            blur = PIL.ImageFilter.GaussianBlur(0.1 + random.random() * 1.9)
            expected = np.asarray(PIL.Image.fromarray(PICTURE).filter(blur))
        expected = jittered(ColorJitter(0.3, 0.3, 0.3), expected, random)
        found = ThreeAugment()(PICTURE, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, expected)
    assert min(counts.values()) > 45  # 67 each, 3.3 s.d.
    assert ThreeAugment()(GREY, np.random.default_rng(0)).shape == GREY.shape


def gathered(image, *rows):
    """The pixel that the centre of each one comes from; 0 outside."""
    y, x = (axis + 0.5 for axis in np.mgrid[: image.shape[0], : image.shape[1]])
    (a, b, c), (d, e, f) = rows
    left, top = (np.floor(v).astype(int) for v in (a * x + b * y + c, d * x + e * y + f))
    inside = (top >= 0) & (top < image.shape[0]) & (left >= 0) & (left < image.shape[1])
    out = np.zeros_like(image)
    out[inside] = image[top[inside], left[inside]]
    return out


def geometry(image, name, m):
    if name == "ShearX":
        return gathered(image, (1, m, 0), (0, 1, 0))
    if name == "ShearY":
        return gathered(image, (1, 0, 0), (m, 1, 0))
    if name == "TranslateX":
        return gathered(image, (1, 0, -math.trunc(m)), (0, 1, 0))
    if name == "TranslateY":
        return gathered(image, (1, 0, 0), (0, 1, -math.trunc(m)))
    turn = np.deg2rad(m)  # against the clock, around the centre of the image
    (cos, sin), (h, w) = (np.cos(turn), np.sin(turn)), image.shape[:2]
    x, y = w / 2 - cos * w / 2 + sin * h / 2, h / 2 - sin * w / 2 - cos * h / 2
    return gathered(image, (cos, -sin, x), (sin, cos, y))


# torchvision's TrivialAugmentWide(num_magnitude_bins=31): the first, the eleventh and the last.
MAGNITUDES = {
    "Identity": (0, 0, 0),
    **dict.fromkeys(("ShearX", "ShearY"), (0, 0.33, 0.99)),
    **dict.fromkeys(("TranslateX", "TranslateY"), (0, 32 / 3, 32)),
    "Rotate": (0, 45, 135),
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0, 0.33, 0.99)),
    "Posterize": (8, 6, 2),
    "Solarize": (255, 170, 0),
    **dict.fromkeys(("AutoContrast", "Equalize"), (0, 0, 0)),
}
SIGNED = set(MAGNITUDES) - {"Identity", "Posterize", "Solarize", "AutoContrast", "Equalize"}


def test_the_space_of_trivial_augment_is_torchvisions():
    assert list(OPS) == list(MAGNITUDES)
    for name, (_, first, last, signed) in OPS.items():
        third = first + (last - first) / 3
        assert (first, third, last) == pytest.approx(MAGNITUDES[name]), name
        assert signed == (name in SIGNED)
    white = np.full((1, 1, 1), 255, np.uint8)
    kept = [int(applied(OPS["Posterize"][0], white, 8 - i / 5)[0, 0, 0]) for i in range(31)]
    expected = 256 - 2 ** np.round(np.arange(31) / 5).astype(int)
    assert kept == expected.tolist()


@pytest.mark.parametrize("image", [PICTURE, GREY], ids=["colour", "grey"])
def test_operations_of_trivial_augment_have_these_pixels(image):
    adjust = written_out(image)
    factors = {"Brightness": "brightness", "Color": "saturation", "Contrast": "contrast"}
    for name, (operation, _, last, signed) in OPS.items():
        for m in (0.0, 0.37 * last, -last) if signed else (170.0,):
            found = applied(operation, image, 4.0 if name == "Posterize" else m)
            if name in factors:
                expected = adjust[factors[name]](1 + m)
            elif name == "Posterize":
                expected = image & 0xF0
            elif name == "Solarize":
                expected = np.where(image < 170, image, 255 - image)
            elif name in ("Rotate", *list(OPS)[1:5]):
                expected = geometry(image, name, m)
            elif name == "Identity":
                expected = image
            else:
                expected = np.asarray(pillow(name, image, m)).reshape(image.shape)
            np.testing.assert_array_equal(found, expected, err_msg=f"{name} {m}")


def pillow(name, image, m):
    picture = PIL.Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    if name == "Sharpness":
        smooth = np.asarray(picture.filter(PIL.ImageFilter.SMOOTH)).reshape(image.shape)
        return blend(smooth, image, 1 + m)
    return getattr(PIL.ImageOps, name.lower())(picture)


def test_trivial_augment_draws_one_operation_at_one_of_31_magnitudes():
    seen = set()
    for seed in range(80):
        random = np.random.default_rng(seed)
        name = list(MAGNITUDES)[random.integers(14)]
        first, _, last = MAGNITUDES[name]
        m = first + (last - first) * random.integers(31) / 30
        if name in SIGNED:
            m *= -1 if random.random() < 0.5 else 1
        found = trivial_augment(PICTURE, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, applied(OPS[name][0], PICTURE, m), err_msg=name)
        seen.add(name)
    assert len(seen) == 14


def test_they_follow_the_flip_and_come_before_the_erasing():
    images = noise(4, 6, 8, 3)
    source = ArraySource(images, np.zeros(4, np.int32), ("a",))
    jitter = ColorJitter(0.2, hue=0.2)
    split = Split("", "", trivial_augment=True, color_jitter=jitter, erasing=0.5)
    read = BatchReader.of(source, split, Preprocess((6, 8)), seed=3)
    found = read(np.arange(4), np.arange(4))["image"]
    for row, image in enumerate(images):
        random = np.random.default_rng((3, row))
        expected = jitter(trivial_augment(image, random), random)
        same = (found[row] == expected).all(axis=-1)
        assert same.all() or 0.5 < same.mean() < 1  # a box is erased
    split = Split("", "", random_crop=True, crop_padding=4, three_augment=ThreeAugment())
    floats = Preprocess((6, 8), resize_dtype="float32")  # in evaluation
    read = BatchReader.of(source, split, floats, seed=3).in_uint8()
    random = np.random.default_rng((3, 0))
    expected = ThreeAugment()(random_crop(images[0], (6, 8), random, 4), random)
    np.testing.assert_array_equal(read(np.arange(4), np.arange(4))["image"][0], expected)


def test_what_cannot_be_is_refused_in_a_sentence():
    def read(split, channels):
        source = ArraySource(noise(2, 4, 4, channels), np.zeros(2, np.int32), ("a",))
        BatchReader.of(source, split, Preprocess((4, 4), channels))

    cases = [
        (ColorJitter, dict(brightness=-0.1), r"color_jitter\.brightness is -0\.1; expected a num"),
        (ColorJitter, dict(contrast=math.nan), r"color_jitter\.contrast is nan"),
        (ColorJitter, dict(hue=0.6), r"color_jitter\.hue is 0\.6; expected .* to 0\.5"),
        (ThreeAugment, dict(jitter=math.inf), r"three_augment\.jitter is inf"),
        (
            Split,
            dict(source="", split="", trivial_augment=True, three_augment=ThreeAugment()),
            "data.train has trivial_augment and three_augment, .* leave one",
        ),
    ]
    refused(lambda make, fields: make(**fields), cases)
    for channels in (2, 4):
        message = f"data.train.color_jitter is for images of 1 or 3 channels, .* have {channels}"
        with pytest.raises(UserError, match=message):
            read(Split("", "", flip=True, color_jitter=ColorJitter(0.1)), channels)
    with pytest.raises(UserError, match=r"data\.val is evaluated as it is: trivial_a"):
        load_config(DIGITS, ["--config.data.val.trivial_augment=True"])
    with pytest.raises(UserError, match=r"crop_padding is 4; expected 0 or, with random_crop"):
        load_config(DIGITS, ["--config.data.train.crop_padding=4"])
    flags = ["color_jitter.hue=0.1", "three_augment.jitter=0.2"]
    train = load_config(DIGITS, [f"--config.data.train.{flag}" for flag in flags]).data.train
    assert train.color_jitter == ColorJitter(hue=0.1)
    assert train.three_augment == ThreeAugment(0.2)

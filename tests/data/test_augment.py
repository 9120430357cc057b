"""RandAugment against TensorFlow's pixels and Pillow, random erasing against its distribution."""

import hashlib
import math

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest
from made import refused

from vit_jax.data import augment
from vit_jax.data.augment import OPS, RandAugment, RandomErasing
from vit_jax.data.transforms import Preprocess


def picture(h=24, w=31):
    y, x, c = np.mgrid[:h, :w, :3]
    values = (3 * x * x + 5 * y * y + 7 * x * y * (c + 1)) // (4 + c)
    return (values % (230 - 40 * c) + 10 * (c + 1)).astype(np.uint8)


# The first 8 digits of the sha256 of picture() after each operation, by TensorFlow 2.21.0, eager
# and in a graph alike. The expressions, with f for tf.float32 and "cut" for a cast to uint8:
#   blend(a, b, k) = cut(clip(f(a) + k * (f(b) - f(a)), 0, 255))
#   color: blend(grayscale_to_rgb(rgb_to_grayscale(i)), i, k)       brightness: blend(0, i, k)
#   contrast: blend(cut(f(sum(histogram_fixed_width(grey, [0, 255], 256))) / 256), i, k)
#   sharpness: blend(cut(depthwise_conv2d(f(i), [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13, VALID))
#     with i's own border, i, k)
#   autocontrast: scale = 255 / (hi - lo); cut(clip(f(i) * scale + -lo * scale, 0, 255))
#   equalize: clip([0, (cumsum(histogram) + step // 2) // step], 0, 255)[i]
#   posterize: left_shift(right_shift(i, 8 - bits), 8 - bits)       invert: 255 - i
#   solarize: where(i < threshold, i, 255 - i)
#   solarize_add: where(i < 128, cut(clip(int64(i) + addition, 0, 255)), i)
#   the rest: raw_ops.ImageProjectiveTransformV3(NEAREST, CONSTANT) of i and a channel of ones, 128
#     where that became 0; transforms [1, s, 0, 0, 1, 0, 0, 0] (shear_x), [1, 0, 0, s, 1, 0, 0, 0],
#     [1, 0, p, 0, 1, 0, 0, 0] (translate_x), [1, 0, 0, 0, 1, p, 0, 0]; for rotate, of
#     c, s = cos, sin(f(degrees) * (pi / 180)): [c, -s, ((w - 1) - (c * (w - 1) - s * (h - 1))) / 2,
#     s, c, ((h - 1) - (s * (w - 1) + c * (h - 1))) / 2, 0, 0]
#   cutout (half a side, row, column): where(pad(zeros, ones) == 0, 128, i)
PINS = {
    "autocontrast": {None: "b66fea3e"},
    "equalize": {None: "953b6778"},
    "invert": {None: "723d3dd8"},
    "rotate": {15.0: "add3bc94", -45.0: "b2080153", 60.0: "27f56892"},
    "posterize": {0: "a2f2ce4b", 2: "522af0bf", 6: "8f2b8c90", 12: "a2f2ce4b"},
    "solarize": {128: "4e332e4c", 200: "7c68a368", 256: "723d3dd8", 384: "4e332e4c"},
    "color": {0.1: "95afc878", 0.55: "9d4cb8b7", 1.9: "0828ff90", 2.8: "1d761fbc"},
    "contrast": {0.1: "0984428e", 0.55: "1b95555b", 1.9: "51c54f10", 2.8: "ce415dec"},
    "brightness": {0.1: "2a5046d1", 0.55: "ee619968", 1.9: "6d850d2a", 2.8: "d9a009b3"},
    "sharpness": {0.1: "dcf58355", 0.55: "3f5348c6", 1.9: "c83fd6f0", 2.8: "55b7aa1c"},
    "shear_x": {0.15: "96df2671", -0.45: "3acbebd0", 0.5: "9a45b17d"},
    "shear_y": {0.15: "79c53d9f", -0.45: "1e2547af", 0.5: "9c60b3e8"},
    "translate_x": {10.0: "e7ca7acb", -7.0: "053a5aae", 2.5: "2044914f"},
    "translate_y": {10.0: "17143e8f", -7.0: "335fa4f7", 2.5: "a15f3537"},
    "cutout": {(4, 3, 29): "d86a866f", (20, 12, 15): "706dc6e1", (0, 5, 5): "980d6854"},
    "solarize_add": {55: "ec8e9ad6", 110: "c0ad7d6f", 165: "6d744906"},
}


@pytest.mark.parametrize("name", PINS)
def test_operations_have_the_pixels_of_tensorflow(name):
    image, operation = picture(), getattr(augment, name)
    for argument, pin in PINS[name].items():
        found = operation(image, argument)
        assert hashlib.sha256(found.tobytes()).hexdigest()[:8] == pin, argument
        np.testing.assert_array_equal(image, picture())  # and are given back another image
        cut = np.concatenate([image, image], 1)[:, ::2]  # what crops and flips give: a view
        np.testing.assert_array_equal(operation(cut, argument), operation(cut.copy(), argument))
        grey = image[..., 1:2]
        as_colour = operation(np.repeat(grey, 3, axis=2), argument)
        np.testing.assert_array_equal(operation(grey, argument), as_colour[..., :1])


def test_any_shape_and_a_constant_image_pass():
    for shape in [(1, 1, 3), (2, 5, 1), (40, 1, 3), (70, 35, 3)]:
        image = np.full(shape, 77, np.uint8)
        for operation, argument, _ in OPS.values():
            value = argument(10)
            value = (value, 0, 0) if operation is augment.cutout else value
            assert operation(image, value).shape == shape
        for operation in (augment.autocontrast, augment.equalize, lambda i: augment.color(i, 1.9)):
            np.testing.assert_array_equal(operation(image), image)


def test_table_operations_are_pillows_and_enhancements_but_for_its_rounding():
    image = picture()
    pillow = PIL.Image.fromarray(image)
    names = [("equalize", ()), ("invert", ())]
    names += [("posterize", (bits,)) for bits in range(1, 9)]
    names += [("solarize", (level,)) for level in (0, 1, 100, 255)]  # at 256, Pillow inverts none
    for name, value in names:
        expected = getattr(PIL.ImageOps, name)(pillow, *value)
        np.testing.assert_array_equal(getattr(augment, name)(image, *value), np.asarray(expected))
    # Pillow stretches in float64 here, TensorFlow in float32: the rounding down may differ.
    stretched = np.asarray(PIL.ImageOps.autocontrast(pillow)).astype(int)
    assert np.abs(augment.autocontrast(image) - stretched).max() <= 1
    # Pillow rounds luminance and smoothed pixels, where TensorFlow rounds them down.
    for name in ("Color", "Brightness", "Sharpness"):
        for factor in (0.1, 0.55, 1.0, 1.45, 1.9, 2.8):
            expected = np.asarray(getattr(PIL.ImageEnhance, name)(pillow).enhance(factor))
            most = 0 if name == "Brightness" or factor == 1 else math.ceil(abs(factor - 1))
            found = OPS[name][0](image, factor).astype(int)
            assert np.abs(found - expected).max() <= most, (name, factor)


def test_contrast_blends_with_what_the_size_gives():
    black = np.zeros((224, 224, 3), np.uint8)
    assert np.unique(augment.contrast(black, 0.1)) == 176  # 0.9 of 224 * 224 / 256 = 196
    assert np.unique(augment.contrast(np.zeros((300, 280, 3), np.uint8), 0.1)) == 229  # of 255


def test_directions():
    image = picture(25, 25)
    np.testing.assert_array_equal(augment.rotate(image, 90.0), np.rot90(image))
    np.testing.assert_array_equal(augment.translate_x(image, 4.0)[:, :-4], image[:, 4:])
    np.testing.assert_array_equal(augment.translate_y(image, 4.0)[:-4], image[4:])
    assert (augment.translate_y(image, 4.0)[-4:] == 128).all()
    np.testing.assert_array_equal(augment.shear_x(image, 0.5)[8, :-4], image[8, 4:])
    np.testing.assert_array_equal(augment.shear_y(image, 0.5)[:-4, 8], image[4:, 8])


ENHANCE, SHEAR, SHIFT = (0.1, 1, 1.9, 2.8, 3.7), (0, 0.15, 0.3, 0.45, 0.6), (0, 50, 100, 150, 200)
ARGUMENTS = {  # at levels 0, 5, 10, 15 and 20, in the order of the reference
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), (None,) * 5),
    "Rotate": (0, 15, 30, 45, 60),
    "Posterize": (0, 2, 4, 6, 8),
    "Solarize": (0, 128, 256, 384, 512),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), ENHANCE),
    **dict.fromkeys(("ShearX", "ShearY"), SHEAR),
    **dict.fromkeys(("TranslateX", "TranslateY"), SHIFT),
    "Cutout": (0, 20, 40, 60, 80),
    "SolarizeAdd": (0, 55, 110, 165, 220),
}
SIGNED = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}


def test_levels_become_these_arguments():
    assert list(OPS) == list(ARGUMENTS)
    for name, (operation, argument, signed) in OPS.items():
        assert operation.__name__.replace("_", "") == name.lower()
        assert tuple(map(argument, (0, 5, 10, 15, 20))) == pytest.approx(ARGUMENTS[name])
        assert signed == (name in SIGNED)


def chi_square(counts):
    counts = np.asarray(counts)
    return ((counts - counts.mean()) ** 2).sum() / counts.mean()


def test_operations_and_signs_are_drawn_evenly(monkeypatch):
    seen, n = {name: [] for name in OPS}, 3200

    def record(name):
        return lambda image, value: (seen[name].append(value), image)[1]

    spies = {name: (record(name), *rest) for name, (_, *rest) in OPS.items()}
    monkeypatch.setattr(augment, "OPS", spies)
    RandAugment(n, 15)(picture(), np.random.default_rng(0))
    assert sum(map(len, seen.values())) == n
    assert chi_square([len(values) for values in seen.values()]) < 37.7  # 1 in 1000, of 15
    for name, values in seen.items():
        if name in SIGNED:
            assert 0.36 < np.mean(np.array(values) > 0) < 0.64  # 4 standard deviations
            values = [abs(value) for value in values]
        assert values == [pytest.approx(ARGUMENTS[name][3])] * len(values)


def test_cutout_is_centred_anywhere(monkeypatch):
    monkeypatch.setattr(augment, "OPS", {"Cutout": OPS["Cutout"]})
    image, random, n = np.zeros((10, 12, 3), np.uint8), np.random.default_rng(0), 1000
    shares = sum(RandAugment(1, 1)(image, random)[..., 0] == 128 for _ in range(n)) / n
    rows, columns = ((np.abs(np.arange(s)[:, None] - np.arange(s) + 0.5) < 4) for s in (10, 12))
    expected = np.outer(rows.mean(1), columns.mean(1))  # those of -4 to +3 around the centre
    assert np.abs(shares - expected).max() < 5 * math.sqrt(0.25 / n)


def test_rand_augment_depends_on_nothing_but_the_generator():
    image = picture()
    assert RandAugment(0, 10)(image, np.random.default_rng(0)) is image
    seen = set()
    for seed in range(40):
        found = RandAugment(2, 15)(image, np.random.default_rng(seed))
        assert found.shape == image.shape and found.dtype == np.uint8
        random, expected = np.random.default_rng(seed), image
        for _ in range(2):  # the documented order
            name = list(ARGUMENTS)[random.integers(16)]
            value = OPS[name][1](15)
            if name in SIGNED:
                value *= -1 if random.random() < 0.5 else 1
            if name == "Cutout":
                value = (60, int(random.integers(24)), int(random.integers(31)))
            expected = OPS[name][0](expected, value)
        np.testing.assert_array_equal(found, expected)
        seen.add(found.tobytes())
    assert len(seen) > 15  # at this size, much becomes all grey
    grey = RandAugment(2, 15)(image[..., :1], np.random.default_rng(0))
    assert grey.shape == (24, 31, 1)


def boxes(n, h=100, w=100, **settings):
    """(top, left, height, width) of n random boxes, None where there is none."""
    image, random, found = np.full((h, w, 1), 7, np.uint8), np.random.default_rng(0), []
    erase = RandomErasing(fill="mean", **settings)
    for _ in range(n):
        erased = erase(image, random)[..., 0] != 7
        y, x = (np.flatnonzero(erased.any(axis)) for axis in (1, 0))
        assert erased.sum() == y.size * x.size  # a box, and nothing else
        found.append((y[0], x[0], y.size, x.size) if y.size else None)
    return found


def test_a_quarter_is_erased_and_none_or_all_if_so_asked():
    assert 0.195 < np.mean([box is not None for box in boxes(1000, 16, 16)]) < 0.305  # 4 s.d.
    assert set(boxes(100, 16, 16, probability=0.0)) == {None}
    assert None not in boxes(300, 60, 80, probability=1.0)
    assert boxes(1, 8, 8, probability=1.0, area=(1.0, 1.0)) == [None]  # no box is small enough
    image, random = np.zeros((9, 9, 3), np.uint8), np.random.default_rng(0)
    found = RandomErasing(1.0, fill="mean", mean=(0.2, 0.4, 1.5))(image, random)
    assert set(map(tuple, found.reshape(-1, 3).tolist())) == {(0, 0, 0), (51, 102, 255)}


def test_boxes_are_spread_over_their_ranges():
    box = np.array(boxes(1000, probability=1.0))
    share, ratio = box[:, 2] * box[:, 3] / 1e4, box[:, 2] / box[:, 3]
    assert 0.018 < share.min() < 0.025 and 0.32 < share.max() < 0.34
    assert 0.28 < ratio.min() < 0.32 and 3.1 < ratio.max() < 3.5
    box = np.array(boxes(1000, probability=1.0, area=(0.05, 0.25)))  # all of which fit
    share, ratio = box[:, 2] * box[:, 3] / 1e4, box[:, 2] / box[:, 3]
    room = 101 - box[:, 2:]
    place = (box[:, :2] + np.random.default_rng(1).random(room.shape)) / room
    places = [np.log(ratio / 0.3) / np.log(11), (share - 0.05) / 0.2, *place.T]
    for values in places:  # 1 in 1000, of 9
        assert chi_square(np.histogram(values.clip(0, 1), bins=10, range=(0, 1))[0]) < 27.9


def test_noise_is_that_of_normalised_pixels():
    erase = RandomErasing(1.0, area=(0.9, 0.95), ratio=(1.0, 1.0))
    image = np.zeros((300, 300, 3), np.uint8)
    noise = erase(image, np.random.default_rng(0))[20:-20, 20:-20]
    assert not image.any()
    values = Preprocess((260, 260)).normalise(noise)
    clipped = np.random.default_rng(1).standard_normal(10**5).clip(-1, 1)
    assert abs(values.mean()) < 0.01 and abs(values.std() - clipped.std()) < 0.01
    for end in (0, 255):
        assert 0.15 < (noise == end).mean() < 0.17
    red, green = values[..., 0], values[..., 1]
    for one, other in ((red[1:], red[:-1]), (red[:, 1:], red[:, :-1]), (red, green)):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    mean, std = (0.485, 0.456, 0.406), (0.1, 0.05, 0.02)
    erase = RandomErasing(1.0, area=(0.9, 0.95), ratio=(1.0, 1.0), mean=mean, std=std)
    noise = erase(image, np.random.default_rng(0))[20:-20, 20:-20].reshape(-1, 3) / 255
    np.testing.assert_allclose(noise.mean(0), mean, atol=2e-3)
    np.testing.assert_allclose(noise.std(0), std, rtol=0.02)


def test_wrong_settings_are_named():
    expected = "random_erasing.mean .* expected 1 or 1 numbers"
    cases = [
        (RandAugment, dict(layers=-1), "rand_augment.layers is -1; expected a whole number"),
        (RandAugment, dict(magnitude=-3), "rand_augment.magnitude is -3"),
        (RandomErasing, dict(probability=1.5), "random_erasing.probability is 1.5; expected a num"),
        (RandomErasing, dict(probability=math.nan), "random_erasing.probability is nan"),
        (RandomErasing, dict(area=(0.5, 0.2)), r"random_erasing.area is \(0.5, 0.2\)"),
        (RandomErasing, dict(area=(0.5, 1.2)), "0 < low <= high <= 1"),
        (RandomErasing, dict(ratio=(0.0, 1.0)), "random_erasing.ratio"),
        (RandomErasing, dict(ratio=(1.0, math.inf)), "random_erasing.ratio"),
        (RandomErasing, dict(fill="grey"), "random_erasing.fill is 'grey'; expected 'noise' or"),
        (RandomErasing, dict(mean=math.inf), "random_erasing.mean is inf"),
        (RandomErasing, dict(std=(0.1, -0.1, 0.1)), "random_erasing.std"),
        (boxes, dict(n=1, mean=(0.1, 0.1, 0.1)), expected),
    ]
    refused(lambda make, fields: make(**fields), cases)


def test_boxes_of_a_high_ratio_are_high():
    box = np.array(boxes(20, probability=1.0, area=(0.05, 0.25), ratio=(2.0, 3.0)))
    assert (box[:, 2] > 1.5 * box[:, 3]).all()

"""Random crops against TensorFlow's, as distributions and as pixels."""

import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from made import noise, refused, saved, turned, written

from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.images import BadImage, decode, decode_box
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.transforms import InceptionCrop, Preprocess, random_crop, resize

FILES = pathlib.Path(__file__).parent / "files"
DRAWS = 20_000
SOME = 4_000  # of ours; as many of ours as of TensorFlow's are in the slow test
RATIO = (3 / 4, 4 / 3)

# In boxes.jsonl, {(h, w, least area): (means, deciles of the area)} of as many draws of TensorFlow
# 2.21.0. The means are of the area as a share of the image's, width / height, top and left as
# shares of the largest ones possible, and whether the box is the whole image:
#   @tf.function
#   def box(_):
#       begin, size, _ = tf.image.sample_distorted_bounding_box(
#           [h, w, 3], tf.zeros([0, 0, 4]), seed=1, aspect_ratio_range=(3 / 4, 4 / 3),
#           area_range=(least, 1.0), min_object_covered=0, max_attempts=100,
#           use_image_if_no_bounding_boxes=True)
#       return tf.concat([begin[:2], size[:2]], 0)
#   tf.random.set_seed(0)
#   boxes = tf.function(lambda: tf.map_fn(box, tf.range(20_000), parallel_iterations=1))()
#   top, left, height, width = boxes.numpy().T.astype(int)
#   area, rows, columns = height * width, h - height, w - width
#   means = [area / (h * w), width / height, top / np.maximum(rows, 1),
#            left / np.maximum(columns, 1), area == h * w]
#   print([x.mean() for x in means])
#   print(np.quantile(area, np.arange(1, 10) / 10, method="inverted_cdf"))
TENSORFLOW = {
    (each["h"], each["w"], each["least"]): (each["means"], each["deciles"])
    for each in map(json.loads, (FILES / "boxes.jsonl").read_text().splitlines())
}


def statistics(boxes, h, w):
    """[5 n]: what the means above are of; and the areas in pixels."""
    top, left, height, width = np.array(boxes).T
    area, rows, columns = height * width, h - height, w - width
    offsets = top / np.maximum(rows, 1), left / np.maximum(columns, 1)
    return np.array([area / (h * w), width / height, *offsets, area == h * w]), area


def differences(boxes, h, w, least):
    """What differs from TensorFlow, in units of what is tolerated: four standard errors.

    That is of the difference of two samples of their sizes, in 112 numbers: chance alone would
    exceed it in one of a hundred runs, had they other seeds.
    """
    means, deciles = TENSORFLOW[h, w, least]
    values, area = statistics(boxes, h, w)
    tolerance = 4 * np.sqrt(1 / DRAWS + 1 / len(boxes))
    found = np.abs(values.mean(axis=1) - means) / (tolerance * values.std(axis=1) + 1 / DRAWS)
    for i, decile in enumerate(deciles):
        share = (i + 1) / 10
        below, upto = (area < decile).mean(), (area <= decile).mean()  # areas are often the same
        beyond = max(below - share, share - upto, 0) / (tolerance * math.sqrt(share * (1 - share)))
        found = np.append(found, beyond)
    return found


def torchvision_box(h, w, least, random):
    """The box of torchvision's RandomResizedCrop: the area and the ratio's logarithm are drawn."""
    for _ in range(10):
        area = h * w * random.uniform(least, 1.0)
        ratio = math.exp(random.uniform(*np.log(RATIO)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= w and 0 < height <= h:
            return random.integers(h - height + 1), random.integers(w - width + 1), height, width
    side = min(h, w)
    return (h - side) // 2, (w - side) // 2, side, side


def check_boxes(h, w, least, draws):
    crop, random = InceptionCrop(area=(least, 1.0), ratio=RATIO), np.random.default_rng(0)
    boxes = [crop.box(h, w, random) for _ in range(draws)]
    assert differences(boxes, h, w, least).max() < 1

    top, left, height, width = np.array(boxes).T
    assert min(top.min(), left.min()) >= 0 and min(height.min(), width.min()) > 0
    assert (top + height <= h).all() and (left + width <= w).all()
    area, whole = height * width / (h * w), (height == h) & (width == w)
    assert area.min() >= least and area.max() <= 1
    # The width is rounded to pixels.
    sound = (width > RATIO[0] * height - 0.51) & (width < RATIO[1] * height + 0.51)
    assert (sound | whole).all()


def test_boxes_are_distributed_as_tensorflow_s():
    for h, w, least in list(TENSORFLOW)[::2] + list(TENSORFLOW)[-1:]:
        check_boxes(h, w, least, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("h, w, least", TENSORFLOW)
def test_many_boxes_are_distributed_as_tensorflow_s(h, w, least):
    check_boxes(h, w, least, DRAWS)


def test_torchvision_s_boxes_would_be_found_out():
    assert TENSORFLOW[375, 500, 0.05][0][0] == pytest.approx(0.342, abs=0.002)
    random = np.random.default_rng(0)
    boxes = [torchvision_box(375, 500, 0.05, random) for _ in range(SOME)]
    assert statistics(boxes, 375, 500)[0][0].mean() == pytest.approx(0.417, abs=0.01)
    beyond = differences(boxes, 375, 500, 0.05)
    assert beyond[0] > 4 and beyond[5:].max() > 4  # the mean of the area, and its deciles


def test_boxes_keep_to_their_ranges():
    for area, ratio, (h, w) in [
        ((0.3, 0.5), (0.5, 2.0), (60, 90)),
        ((0.25, 0.25), (1.0, 1.0), (64, 64)),
        ((0.9, 1.0), (0.9, 1.1), (31, 33)),
        ((0.05, 1.0), (3 / 4, 4 / 3), (7, 5)),
    ]:
        crop, random = InceptionCrop(area, ratio), np.random.default_rng(0)
        for _ in range(300):
            top, left, height, width = crop.box(h, w, random)
            assert 0 <= top <= h - height and 0 <= left <= w - width and min(height, width) > 0
            assert area[0] * h * w <= height * width <= area[1] * h * w
            assert ratio[0] * height - 0.51 < width < ratio[1] * height + 0.51
    for shape in [(1000, 10), (3, 400), (1, 1)]:  # where none fits it is the whole image
        whole = InceptionCrop(area=(0.5, 1.0)).box(*shape, np.random.default_rng(0))
        assert whole == (0, 0, *shape)


def test_the_box_is_cut_out_and_comes_from_the_generator_alone():
    image, crop = pixels(37, 53), InceptionCrop()
    found = [crop(image, np.random.default_rng(seed)) for seed in (5, 5, 6)]
    top, left, height, width = crop.box(37, 53, np.random.default_rng(5))
    np.testing.assert_array_equal(found[0], image[top : top + height, left : left + width])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_ranges_that_are_none_are_refused():
    cases = [
        (dict(area=(0.0, 1.0)), r"inception_crop\.area is \(0\.0, 1\.0\); .* 0 < low <= high <= 1"),
        (dict(area=(0.5, 0.2)), r"inception_crop\.area is \(0\.5, 0\.2\)"),
        (dict(area=(0.5, 1.1)), r"inception_crop\.area is \(0\.5, 1\.1\)"),
        (dict(area=(float("nan"), 1.0)), r"inception_crop\.area is \(nan, 1\.0\)"),
        (dict(ratio=(0.0, 1.0)), r"inception_crop\.ratio is .*\(low, high\), 0 < low <= high$"),
        (dict(ratio=(2.0, 0.5)), r"inception_crop\.ratio is \(2\.0, 0\.5\)"),
        (dict(ratio=(-2.0, 0.5)), r"inception_crop\.ratio is \(-2\.0, 0\.5\)"),
    ]
    refused(lambda fields: InceptionCrop(**fields), cases)


def pixels(h, w):
    """uint8 [h w 1]."""
    y, x = np.mgrid[:h, :w]
    return ((7 * y * y + 13 * x + 29 * y * x) % 256).astype(np.uint8)[..., None]


# float32 [3 16 16] of TensorFlow 2.21.0, with image = pixels(37, 53):
#   boxes = [tf.image.resize(tf.slice(image, (t, l, 0), (h, w, 1)), (16, 16), "bilinear")
#            for t, l, h, w in BOXES]
#   np.save("tests/data/files/bilinear.npy", tf.stack(boxes).numpy()[..., 0])
BOXES = [(3, 5, 30, 41), (20, 0, 9, 12), (0, 29, 37, 16)]


def test_boxes_are_resized_as_by_tensorflow():
    for (top, left, h, w), expected in zip(BOXES, np.load(FILES / "bilinear.npy"), strict=True):
        box = pixels(37, 53)[top : top + h, left : left + w]
        rounded = Preprocess((16, 16), in_channels=1, resize="bilinear").pixels(box)[..., 0]
        assert rounded.dtype == np.uint8
        assert np.abs(rounded - np.rint(expected)).max() <= 1
        exact = Preprocess((16, 16), in_channels=1, resize_dtype="float32").pixels(box)[..., 0]
        assert exact.dtype == np.float32
        np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-3)


def test_the_reader_squashes_the_box_whatever_the_model_does():
    images = np.stack([pixels(40, 30), 255 - pixels(40, 30)])
    source = ArraySource(images, np.arange(2, dtype=np.int32), ("a", "b"))
    crop, positions, indices = InceptionCrop(), np.array([7, 8, 9]), np.array([1, 0, 1])
    for fields in (dict(), dict(aspect="keep", crop=0.9)):
        preprocess = Preprocess((6, 8), in_channels=1, **fields)
        read = BatchReader(source, preprocess, seed=3, inception_crop=crop)
        found = read(positions, indices)["image"]
        for row, position, index in zip(found, positions, indices, strict=True):
            top, left, h, w = crop.box(40, 30, np.random.default_rng((3, int(position))))
            box = images[index, top : top + h, left : left + w]
            np.testing.assert_array_equal(row, resize(box, (6, 8), "bilinear"))
        assert (found[0] != found[2]).any()


def test_a_random_crop_may_reach_into_a_reflected_border():
    image, size, seen = noise(4, 5, 2), (4, 5), set()
    bordered = image[[2, 1, 0, 1, 2, 3, 2, 1]][:, [2, 1, 0, 1, 2, 3, 4, 3, 2]]  # by 2 on each side
    for seed in range(200):
        found = random_crop(image, size, np.random.default_rng(seed), 2)
        crops = {(y, x): bordered[y : y + 4, x : x + 5] for y, x in np.ndindex(5, 5)}
        (place,) = (place for place, crop in crops.items() if (crop == found).all())
        seen.add(place)
    assert len(seen) == 25
    pixels = Preprocess(size, 2).pixels(image, np.random.default_rng(7), 2)
    np.testing.assert_array_equal(pixels, random_crop(image, size, np.random.default_rng(7), 2))


def test_a_random_crop_is_uniform_over_all_places():
    image, draws = np.arange(35, dtype=np.uint8).reshape(5, 7, 1), 3_000
    corners, random = [], np.random.default_rng(0)
    for _ in range(draws):
        found = random_crop(image, (3, 4), random)
        top, left = divmod(int(found[0, 0, 0]), 7)
        corners.append((top, left))
        assert (found == image[top : top + 3, left : left + 4]).all()
    places, counts = np.unique(corners, axis=0, return_counts=True)
    assert places.tolist() == [[top, left] for top in range(3) for left in range(4)]
    expected = draws / 12
    assert np.abs(counts - expected).max() < 4 * math.sqrt(expected * 11 / 12)
    np.testing.assert_array_equal(random_crop(image, (5, 7), random), image)


def test_preprocessing_cuts_anywhere_with_a_generator():
    shapes = [((60, 45), "keep", (26, 20))]  # 16 / 0.8 = 20, and 20 * 60 / 45 = 26.7 rounded down
    shapes += [((45, 60), "keep", (20, 26)), ((60, 45), "squash", (20, 20))]
    for (shape, aspect, resized), dtype in itertools.product(
        shapes, ("uint8", "float32", "truncated")
    ):
        image = pixels(*shape)
        preprocess = Preprocess((16, 16), 1, aspect=aspect, crop=0.8, resize_dtype=dtype)
        whole = resize(image if dtype == "uint8" else image.astype(np.float32), resized, "bilinear")
        whole = np.floor(whole).astype(np.uint8) if dtype == "truncated" else whole
        seen = set()
        for seed in range(20):
            found = preprocess.pixels(image, np.random.default_rng(seed))
            down, right = np.random.default_rng(seed).random(2)
            top, left = (
                math.floor(u * (n - 15)) for u, n in zip((down, right), resized, strict=True)
            )
            np.testing.assert_array_equal(found, whole[top : top + 16, left : left + 16])
            assert found.dtype == preprocess.pixel_dtype
            seen.add((top, left))
        assert len(seen) > 10
        top, left = ((n - 16) // 2 for n in resized)
        centre = whole[top : top + 16, left : left + 16]
        np.testing.assert_array_equal(preprocess.pixels(image), centre)


def test_preprocessing_decodes_as_it_says(tmp_path):
    data = saved(pixels(24, 32), "JPEG", quality=90, exif=turned(3))
    for jpeg in ("fast", "accurate"):
        plain, upright = (Preprocess((24, 32), 1, jpeg=jpeg, exif=exif) for exif in (False, True))
        for given in (written(tmp_path / "turned.jpg", data), data):
            np.testing.assert_array_equal(plain.read(given), decode(data, jpeg))
            np.testing.assert_array_equal(upright.read(given), decode(data, jpeg)[::-1, ::-1])
        expected = decode(data, jpeg)[::-1, ::-1] / 127.5 - 1
        np.testing.assert_allclose(upright(data), expected, rtol=0, atol=1e-6)
    assert (decode(data, "fast") != decode(data, "accurate")).any()


def test_a_box_of_a_damaged_jpeg_is_refused_where_the_whole_is():
    data = max((path.read_bytes() for path in (FILES / "jpeg").glob("*.jpg")), key=len)
    refusals, cuts = 0, range(2, len(data), 23)
    for cut in cuts:
        try:
            whole = decode(data[:cut], "accurate")
        except BadImage:
            refusals += 1
            with pytest.raises(BadImage):
                decode_box(data[:cut], lambda h, w: (0, 0, 4, 4), "accurate")
        else:
            found = decode_box(data[:cut], lambda h, w: (0, 0, 4, 4), "accurate")
            np.testing.assert_array_equal(found, whole[:4, :4])
    assert refusals > 0.9 * len(cuts)


# A view of the whole for each orientation: quarter turns, and whether mirrored then.
TURNS = ((0, 0), (0, 1), (2, 0), (2, 1), (3, 1), (3, 0), (1, 1), (1, 0))


def check_box(data, whole, jpeg="fast", exif=False):
    h, w, _ = whole.shape
    for top, left, height, width in itertools.product((0, 3), (0, 5), (1, 8, h - 3), (1, w - 5)):
        asked = []

        def box(*size, asked=asked, numbers=(top, left, height, width)):
            asked.append(size)
            return numbers

        found = decode_box(data, box, jpeg, exif)
        np.testing.assert_array_equal(found, whole[top : top + height, left : left + width])
        assert asked == [(h, w)]


@pytest.mark.parametrize("path", sorted((FILES / "jpeg").glob("*.jpg")), ids=lambda path: path.stem)
def test_a_box_of_a_jpeg_is_cut_out_of_the_very_same_pixels(path):
    """Rows below the box are not decoded, where the file allows it; nothing else may change."""
    data = path.read_bytes()
    for jpeg in ("fast", "accurate"):
        check_box(data, decode(data, jpeg), jpeg)
    if path.name not in ("420_q60.jpg", "grey_q95.jpg", "progressive_q60.jpg"):
        return
    for orientation, (turns, mirrored) in enumerate(TURNS, 1):
        exif = turned(orientation).tobytes()
        lying = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
        whole = decode(lying, "fast", exif=True)
        stored = np.rot90(decode(lying, "fast"), turns)
        np.testing.assert_array_equal(whole, stored[:, ::-1] if mirrored else stored)
        check_box(lying, whole, exif=True)

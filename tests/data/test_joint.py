"""An image and its mask move together: pixels that say their own place and class keep both."""

import numpy as np
import pytest
from made import refused
from test_scenes import Masks, changed

from vit_jax.data.config import Split
from vit_jax.data.joint import common_size, mask_sizes, rounded_up
from vit_jax.data.pipeline import BatchReader, eval_batches, train_batches
from vit_jax.data.policies import ColorJitter
from vit_jax.data.transforms import InceptionCrop, Preprocess, resize, resize_mask
from vit_jax.errors import UserError

ROW, TWO = np.arange(1), np.array([2])


def wide(side=64):
    """Eight broad columns of classes, each 20 brighter than the last, from 40 on."""
    mask = np.broadcast_to(np.arange(side, dtype=np.uint8) // (side // 8), (side, side))
    return changed(image=40 + 20 * mask[..., None], label=np.ascontiguousarray(mask))


@pytest.mark.parametrize(
    "changes",
    [
        dict(random_scale=(0.5, 2.0)),
        dict(random_scale=(0.5, 2.0), flip=True, color_jitter=ColorJitter(0.0)),
        dict(inception_crop=InceptionCrop((0.1, 0.9))),
        dict(random_crop=True, aspect="keep", crop=0.5),
        dict(flip=True),
    ],
    ids=lambda changes: "+".join(changes),
)
def test_every_pixel_keeps_its_class(changes):
    """Where the image is not between two classes it says the mask's; padding is of no class."""
    how = Preprocess((32, 32), 1, mean=0.1, std=0.3)
    read = BatchReader.of(wide(), Split("x", "y", **changes), how, seed=3)
    many = np.arange(24)
    batch = read(many, many % 5)
    image, label = batch["image"][..., 0].astype(int), batch["label"]
    assert label.dtype == np.uint8 and label.shape == (24, 32, 32)
    outside = label == 255
    assert (image[outside] == 26).all()  # 0.1 * 255, rounded
    assert outside.any() == ("random_scale" in changes)
    if outside.any():  # where the whole image is smaller, and nowhere else
        whole = ~outside.any(axis=(1, 2))
        assert 0 < whole.sum() < 24
    level, between = np.divmod(image - 40, 20)
    sure = ~outside & (between == 0)
    assert sure.mean() > 0.5 and (level[sure] == label[sure]).all()
    near = np.abs((image - 40) / 20 - label.astype(int))
    assert near[~outside].max() <= 0.5 + 0.05  # the rounding of a brightness
    assert len({row.tobytes() for row in label}) >= (2 if changes == dict(flip=True) else 12)


def test_a_scaled_crop_is_the_one_written_out():
    how = Preprocess((8, 12), 1, mean=0.5)
    read = BatchReader.of(Masks(), Split("x", "y", random_scale=(0.5, 2.0)), how, seed=7)
    for position in range(6):
        batch = read(np.array([position]), TWO)
        random = np.random.default_rng((7, position))
        factor = 0.5 + 1.5 * random.random()
        size = round(8 * factor), round(12 * factor)
        mask = Masks().all[2]
        image = resize((10 * mask[..., None]), size, "bilinear")[..., 0]
        mask = resize_mask(mask, size)
        label, pixels = np.full((8, 12), 255), np.full((8, 12), 128)
        down, right = random.random(2)
        # Of a larger one, the part at a random place; a smaller one, at a random place.
        if factor >= 1:
            top, left = int(down * (size[0] - 8 + 1)), int(right * (size[1] - 12 + 1))
            label, pixels = (x[top : top + 8, left : left + 12] for x in (mask, image))
        else:
            top, left = int(down * (8 - size[0] + 1)), int(right * (12 - size[1] + 1))
            label[top : top + size[0], left : left + size[1]] = mask
            pixels[top : top + size[0], left : left + size[1]] = image
        np.testing.assert_array_equal(batch["label"][0], label)
        np.testing.assert_array_equal(batch["image"][0, ..., 0], pixels)


def test_batches_depend_on_the_seed_and_the_step_alone():
    split = Split("x", "y", random_scale=(0.5, 2.0), flip=True, color_jitter=ColorJitter(0.4))
    read = BatchReader.of(Masks(), split, Preprocess((8, 12), 1), seed=1)
    with train_batches(read, 3, start_step=0, stop_step=4) as found:
        whole = list(found)
    rows = slice(1, 3)
    with train_batches(read, 3, start_step=2, stop_step=4, rows=rows, threads=2) as found:
        for step, batch in zip((2, 3), found, strict=True):
            for key in ("image", "label", "index"):
                np.testing.assert_array_equal(batch[key], whole[step][key][rows])


def test_whole_masks_keep_their_size():
    """Of the global batch the largest, rounded up, whichever rows a process reads."""
    sizes = [(40, 20), (70, 33), (10, 97), (5, 5), (64, 64)]

    class Sizes(Masks):
        def __getitem__(self, i):
            mask = np.random.default_rng(i).integers(0, 8, sizes[i], np.uint8)
            return {"image": 9 * mask[..., None], "label": mask, "name": f"scene {i}"}

    source, how = Sizes(), Preprocess((16, 16), 1)
    read = BatchReader.of(source, Split("x", "y"), how, whole_masks=True)
    with eval_batches(read, 4, rows=slice(0, 1)) as found:
        first = next(found)
    assert first["label"].shape == (1, 96, 128)  # (70, 97) of the other rows
    with eval_batches(read, 4) as found:
        one, two = list(found)
    assert one["size"].tolist() == [list(size) for size in sizes[:4]]
    assert one["size"].dtype == np.int32 and one["label"].dtype == np.uint8
    for row, (h, w) in enumerate(sizes[:4]):
        mask = source[row]["label"]
        np.testing.assert_array_equal(one["label"][row, :h, :w], mask)
        assert (one["label"][row] != 255).sum() == mask.size
        expected = resize(9 * mask[..., None], (16, 16), "bilinear")
        np.testing.assert_array_equal(one["image"][row], expected)
    assert two["label"].shape == (4, 64, 64) and two["size"].tolist()[1:] == [[1, 1]] * 3
    assert (two["label"][1:] == 255).all()
    assert [rounded_up(n) for n in (1, 32, 33, 48, 49, 96, 97, 1000, 1024, 1025)] == [
        *(32, 32, 64, 64, 64, 96, 128, 1024, 1024, 1536),
    ]
    assert common_size(mask_sizes(source, np.array([-1]))) == (32, 32)


def test_what_does_not_move_with_a_mask_is_refused():
    how, plain = Preprocess((6, 10), 1), Split("x", "y")
    keep = Preprocess((6, 10), 1, aspect="keep")
    cases = [
        (dict(random_scale=(2.0, 0.5)), r"random_scale is \(2.0, 0.5\); expected \(low, high\)"),
        (dict(random_scale=(0.0, 1.0)), "random_scale is"),
        (
            dict(random_scale=(0.5, 1.0), inception_crop=InceptionCrop()),
            "inception_crop and random_scale exclude each other",
        ),
        (dict(random_crop=True, crop_padding=1), "crop_padding is not for labels that are masks"),
    ]
    refused(lambda given: BatchReader.of(Masks(), Split("x", "y", **given), how), cases)
    with pytest.raises(UserError, match=r"aspect='keep' and crop=1\.0 cut parts of the image off"):
        BatchReader.of(Masks(), plain, keep, whole_masks=True)

    class Labels(Masks):
        masks = False

    with pytest.raises(UserError, match="random_scale is for images with masks"):
        BatchReader.of(Labels(), Split("x", "y", random_scale=(0.5, 1.0)), how)

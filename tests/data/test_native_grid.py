"""The grid of an image at its native size, and its patches in a batch."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from vit_jax.data.config import Split
from vit_jax.data.native import cut, native_grid
from vit_jax.data.pipeline import BatchReader, eval_batches, train_batches
from vit_jax.data.transforms import InceptionCrop, Preprocess, resize
from vit_jax.errors import UserError

NATIVE = Preprocess((16, 16), 3, max_patches=12, patch_size=(4, 4), mean=(0.1, 0.2, 0.3))


def by_definition(h, w, patch, most):
    """Of every scale at which a side is a whole number of patches, the largest that fits."""
    best = (Fraction(0), (0, 0))
    for side, pixels in ((h, patch[0]), (w, patch[1])):
        for count in range(1, most + 1):
            scale = Fraction(count * pixels, side)
            grid = math.ceil(h * scale / patch[0]), math.ceil(w * scale / patch[1])
            if grid[0] * grid[1] <= most:
                best = max(best, (scale, grid))
    return best[1]


def test_the_largest_grid_that_fits():
    random = np.random.default_rng(0)
    for _ in range(300):
        h, w = (int(side) for side in np.exp(random.uniform(0, 7, 2)).astype(int))
        patch = (16, 16) if random.random() < 0.7 else (8, 14)
        most = int(random.integers(1, 80))
        assert native_grid(h, w, patch, most) == by_definition(h, w, patch, most), (h, w, most)


@pytest.mark.parametrize(
    "size, most, grid",
    [
        ((256, 256), 256, (16, 16)),
        ((480, 640), 256, (14, 18)),
        ((1, 1), 256, (16, 16)),
        ((2, 5000), 9, (1, 9)),
        ((64, 64), 1, (1, 1)),
    ],
)
def test_grids(size, most, grid):
    assert native_grid(*size, (16, 16), most) == grid


def test_patches_are_cut_row_by_row():
    image = np.arange(8 * 12 * 3, dtype=np.float32).reshape(8, 12, 3)
    patches, grid = cut(image, (4, 6), 5)
    assert grid == (2, 2) and patches.shape == (5, 72) and not patches[4].any()
    np.testing.assert_array_equal(patches[2].reshape(4, 6, 3), image[4:, :6])


class Shapes:
    """Images of different shapes, and one that is none."""

    label_names, fingerprint = ("a", "b"), ""
    sizes = ((8, 30), (40, 10), (9, 9), (3, 50), (16, 12))

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        pixels = random.integers(0, 256, (*self.sizes[index], 3), np.uint8)
        return {"image": pixels, "label": index % 2}


def test_a_batch_of_patches():
    read = BatchReader.of(Shapes(), Split("x", "y"), NATIVE)
    with eval_batches(read, 4) as batches:
        first, last = batches
    assert first["image"].shape == (4, 12, 48) and first["image"].dtype == np.uint8
    assert last["mask"].tolist() == [True, False, False, False]
    assert last["grid"][1:].tolist() == [[1, 1]] * 3 and not last["image"][1:].any()
    for row, (h, w) in enumerate(Shapes.sizes[:4]):
        gh, gw = first["grid"][row].tolist()
        assert (gh, gw) == by_definition(h, w, (4, 4), 12)
        whole = resize(Shapes()[row]["image"], (4 * gh, 4 * gw), "bilinear")
        rows = [whole[4 * y : 4 * y + 4] for y in range(gh)]
        wanted = [row[:, 4 * x : 4 * x + 4].ravel() for row in rows for x in range(gw)]
        np.testing.assert_array_equal(first["image"][row, : gh * gw], wanted)
        # Normalised as patches or as an image, and by one image alone.
        alone = cut(NATIVE(Shapes()[row]["image"]), (4, 4), 12)[0][: gh * gw]
        np.testing.assert_array_equal(NATIVE.normalise(first["image"])[row, : gh * gw], alone)


def test_augmented_batches_depend_on_their_step_alone():
    split = Split("x", "y", inception_crop=InceptionCrop(ratio=(0.2, 5.0)), flip=True)
    read = BatchReader.of(Shapes(), split, NATIVE, seed=3)
    with train_batches(read, 4, start_step=0, stop_step=4) as batches:
        whole = list(batches)
    with train_batches(read, 4, start_step=2, stop_step=4, threads=1) as batches:
        for one, other in zip(batches, whole[2:], strict=True):
            for name in ("image", "grid", "label"):
                np.testing.assert_array_equal(one[name], other[name])
    assert len({tuple(grid) for batch in whole for grid in batch["grid"]}) > 3


@pytest.mark.parametrize(
    "preprocess, split, says",
    [
        (dict(crop=0.9), {}, "data crop is 0.9, and with model.max_patches"),
        (dict(aspect="keep"), {}, "data aspect is 'keep', and with model.max_patches"),
        ({}, dict(random_crop=True), "data.train.random_crop is not for"),
    ],
)
def test_what_is_of_one_shape_is_refused(preprocess, split, says):
    with pytest.raises(UserError, match=says):
        how = dataclasses.replace(NATIVE, **preprocess)
        BatchReader.of(Shapes(), Split("x", "y", **split), how)

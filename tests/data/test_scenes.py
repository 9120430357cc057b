"""Scenes: pure functions of their index, masks that are where the pixels are, splits apart."""

import hashlib
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
from made import refused

from vit_jax.data.classes import Matched, Relabelled, with_labels
from vit_jax.data.config import Split
from vit_jax.data.forms.arrays import digits
from vit_jax.data.forms.fractals import SPLITS, FractalSource, open_fractals
from vit_jax.data.forms.scenes import scenes
from vit_jax.data.pipeline import BatchReader, eval_batches
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import Preprocess, resize, resize_mask
from vit_jax.errors import UserError

SMALL = ("digits,size=16,examples=20", "fractals,size=24,examples=20,classes=3")
# Without digits, whose library takes long to import.
PICTURES = """
import hashlib, sys
from vit_jax.data.forms.fractals import open_fractals
from vit_jax.data.forms.scenes import scenes

def digest(example):
    return hashlib.sha256(example["image"].tobytes() + bytes(example["label"])).hexdigest()

print(digest(scenes(sys.argv[1], "val")[7]), digest(open_fractals("classes=7", "train")[2**32 + 3]))
assert not {"jax", "flax"} & set(sys.modules)
"""


def digest(example):
    return hashlib.sha256(example["image"].tobytes() + bytes(example["label"])).hexdigest()


def test_a_scene_depends_on_nothing_but_its_index():
    for argument in SMALL:
        source = scenes(argument, "val")
        expected = digest(source[7])
        source[3]
        copy = pickle.dumps(source)
        assert len(copy) < 300 and pickle.loads(copy) == source
        assert digest(source[7]) == digest(pickle.loads(copy)[7]) == expected
        assert len({digest(example) for example in source}) == len(source) == 20
        for wrong in (-1, 20):
            with pytest.raises(IndexError, match=f"val has images 0 to 19, found {wrong}"):
                source[wrong]
    # And nothing but it in another process; nor does a fractal.
    other = subprocess.run([sys.executable, "-c", PICTURES, SMALL[1]], capture_output=True)
    fractal = digest(open_fractals("classes=7", "train")[2**32 + 3])
    assert other.stdout.decode().split() == [expected, fractal], other.stderr.decode()


def test_an_example_has_a_class_for_each_pixel():
    for argument, size, names in [
        (SMALL[0], 16, [str(i) for i in range(10)]),
        (SMALL[1], 24, [f"fractal{i}" for i in range(3)]),
    ]:
        source, seen, noisy = scenes(argument, "train"), set(), []
        assert source.masks and source.label_names == ("background", *names)
        for example in source:
            image, mask = example["image"], example["label"]
            assert image.dtype == np.uint8 and image.shape == (size, size, 1)
            assert mask.dtype == np.uint8 and mask.shape == (size, size)
            # Objects are a quarter as bright as can be and more, the background is noise up to 95.
            assert image[mask > 0].min() >= 64 and image[mask == 0].max() < 96
            noisy.append((image[..., 0] >= 64) & (mask == 0))
            seen |= set(np.unique(mask))
        assert seen == set(range(len(names) + 1))
        assert 0.02 < np.mean(noisy)


def test_the_last_object_is_a_digit_of_its_split_under_its_mask():
    """Found by trying all digits of the split at all places and sizes."""
    source = scenes("digits,size=16,objects=1,examples=4", "val")
    known = digits("", "val")
    for example in source:
        image, mask = example["image"][..., 0], example["label"]
        found = []
        for picture, label in zip(known.images[..., 0], known.labels, strict=True):
            for side in (8, 9, 10):
                big = cv2.resize(picture, (side, side), interpolation=cv2.INTER_LINEAR)
                lit, there = np.argwhere(big >= 64), np.argwhere(mask > 0)
                top, left = there.min(axis=0) - lit.min(axis=0)
                if min(top, left) < 0 or max(top, left) + side > 16:
                    continue
                expected = np.zeros((16, 16), np.uint8)
                expected[top : top + side, left : left + side][big >= 64] = 1 + label
                pasted = image[top : top + side, left : left + side]
                if (expected == mask).all() and (pasted[big >= 64] == big[big >= 64]).all():
                    found.append(label)
        assert found


def test_the_splits_share_no_picture(monkeypatch):
    """Digits are those of the split, and no fractal is there twice."""
    images = {split: {image.tobytes() for image in digits("", split).images} for split in SPLITS}
    assert not images["train"] & images["test"] and not images["train"] & images["val"]
    original, used = FractalSource.__getitem__, []

    def get(self, index):
        used.append((self.split, index))
        return original(self, index)

    monkeypatch.setattr(FractalSource, "__getitem__", get)
    for split in SPLITS:
        list(scenes("fractals,size=16,examples=9,objects=4,classes=3", split))
    assert len(set(used)) == 3 * 36 and {split for split, _ in used[:36]} == {"train"}
    # They are those of the source `fractals` by the same seed.
    ours = scenes("fractals,seed=5,classes=4", "test")._pictures(32)
    theirs = open_fractals("classes=4,size=32,color=false,seed=5", "test")
    assert (ours[6]["image"] == theirs[6]["image"]).all()


def test_the_fingerprint_tells_all_options_and_splits_apart():
    more = ["", ",size=33", ",objects=2", ",examples=9", ",seed=1"]
    arguments = [kind + option for kind in ("digits", "fractals") for option in more]
    prints = {scenes(a, split).fingerprint for a in arguments for split in SPLITS}
    assert len(prints) == 30 and scenes("fractals,classes=9", "val").fingerprint not in prints
    same = scenes("digits,seed=0,examples=1000,objects=3,size=32", "val")
    assert same.fingerprint == scenes("digits", "val").fingerprint


def test_wrong_arguments_are_named():
    cases = [
        ("digit", r"is of 'digit'; did you mean 'digits'\?"),
        ("", "is of ''; known: digits, fractals"),
        ("digits,object=2", r"no option 'object'; did you mean 'objects'\?"),
        ("digits,classes=3", "no option 'classes'; known: examples, objects, seed, size"),
        ("digits,size=8", "size is '8'; expected an integer from 16 to 1024"),
        ("digits,objects=0", "objects is '0'; expected an integer from 1 to 100"),
        ("digits,seed=1,seed=2", "says seed twice"),
        ("fractals,classes=0", "classes is '0'"),
    ]
    cases = [(f"scenes:{a}", "train", f"the source scenes:{a}.*{message}") for a, message in cases]
    cases += [("scenes:digits", "tests", r"no split 'tests'; did you mean 'test'\?")]
    refused(open_source, cases)


# Masks in batches


def test_a_mask_is_resized_about_the_same_centres_as_its_image():
    """Of an image whose pixels are their own coordinate, bilinear gives where a centre comes from.

    The nearest pixel is at most half a pixel from there.
    """
    for old, new in [((12, 9), (24, 27)), ((30, 21), (10, 7)), ((16, 10), (9, 13))]:
        for axis in (0, 1):
            mask = np.indices(old, np.uint8)[axis]
            image = resize(mask[..., None].astype(np.float32), new, "bilinear")[..., 0]
            found = resize_mask(mask, new)
            assert found.dtype == np.uint8 and found.shape == new
            assert np.abs(found - image).max() <= 0.5 + 1e-4
        labels = np.random.default_rng(0).integers(0, 5, old, np.uint8)
        # OpenCV's nearest about half-pixel centres, but for centres on an edge.
        nearest = cv2.INTER_NEAREST_EXACT
        theirs = cv2.resize(labels, new[::-1], interpolation=nearest)
        assert (resize_mask(labels, new) == theirs).all()
    mask = np.array([[0, 1], [2, 3]], np.uint8)
    double = mask.repeat(2, 0).repeat(2, 1)
    assert resize_mask(mask, (4, 4)).tolist() == double.tolist()
    assert resize_mask(double, (2, 2)).tolist() == mask.tolist()


class Masks:
    """An image whose pixels are 10 times the mask's classes."""

    masks, label_names, fingerprint = True, tuple("abcdefgh"), ""

    def __init__(self, change=lambda example: example, size=(12, 20)):
        self.change = change
        self.all = np.random.default_rng(0).integers(0, 8, (5, *size), np.uint8)

    def __len__(self):
        return len(self.all)

    def __getitem__(self, i):
        image = (10 * self.all[i][..., None]).astype(np.uint8)
        return self.change({"image": image, "label": self.all[i], "name": f"scene {i}"})


def test_masks_in_batches_and_padding():
    read = BatchReader(Masks(), Preprocess((12, 20), 1))
    with eval_batches(read, 4) as batches:
        one, two = list(batches)
    assert one["label"].dtype == np.uint8 and one["label"].shape == (4, 12, 20)
    np.testing.assert_array_equal(one["label"], Masks().all[:4])
    assert two["mask"].tolist() == [True, False, False, False]
    np.testing.assert_array_equal(two["label"][0], Masks().all[4])
    assert (two["label"][1:] == 255).all()


def test_a_mask_is_cropped_as_its_image():
    """Its pixels are their own row or column, so that the nearest is at most a half away."""
    for how in (dict(aspect="keep"), dict(aspect="small"), dict(aspect="squash", crop=0.75)):
        for axis in (0, 1):
            mask = np.indices((16, 32), np.uint8)[axis]
            source = changed(image=7 * mask[..., None], label=mask)
            source.label_names = tuple(map(str, range(32)))
            batch = BatchReader(source, Preprocess((24, 24), 1, **how))(np.arange(1), np.arange(1))
            image, label = batch["image"][0, ..., 0], batch["label"][0]
            assert (
                np.abs(image / 7 - label.astype(float)).max() <= 0.5 + 0.5 / 7 + 1e-6
            )  # uint8 is rounded
            assert len(np.unique(label)) > 7


def changed(**fields):
    return Masks(lambda example: {**example, **fields})


def test_a_wrong_mask_is_one_sentence():
    cases = [
        ("label", np.full((12, 20), 8, np.uint8), "scene 2 has the class 8 in its mask, but there"),
        ("label", np.zeros((20, 12), np.uint8), r"12 x 20 pixels .* its mask of 20 x 12; it lies"),
        ("label", np.zeros((12, 20), np.int32), r"the mask int32 \[12, 20\]; expected uint8"),
        ("label", 3, r"scene 2 has the mask 3; expected uint8 \[12, 20\]"),
    ]
    how, row, two = Preprocess((6, 10), 1), np.arange(1), np.array([2])
    refused(lambda key, value: BatchReader(changed(**{key: value}), how)(row, two), cases)
    for changes in (dict(trivial_augment=True), dict(erasing=0.5)):
        with pytest.raises(UserError, match=f"data: {min(changes)} is not for labels that are mas"):
            BatchReader.of(Masks(), Split("x", "y", **changes), how)


def test_masks_by_other_classes():
    source = Masks()
    turned = with_labels(source, source.label_names[::-1])
    assert isinstance(turned, Relabelled) and turned.masks
    np.testing.assert_array_equal(turned[1]["label"], 7 - source.all[1])
    two = Matched(("a", "b"), (), (4, 5), "")
    found = Relabelled(changed(label=np.array([[0, 1, 255]], np.uint8)), two)[0]
    assert found["label"].tolist() == [[4, 5, 255]]
    with pytest.raises(UserError, match="scene 0 has the class 2 in its mask"):
        Relabelled(changed(label=np.array([[2]], np.uint8)), two)[0]

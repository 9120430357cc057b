"""Scenes: pure functions of their index, masks that are where the pixels are, splits apart."""

import hashlib
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest

from vit_jax.data.classes import Matched, Relabelled, with_labels
from vit_jax.data.forms.arrays import digits
from vit_jax.data.forms.fractals import SPLITS, FractalSource, open_fractals
from vit_jax.data.forms.scenes import scenes
from vit_jax.data.pipeline import BatchReader, Split, eval_batches
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import Preprocess, resize, resize_mask
from vit_jax.errors import UserError

SMALL = ("digits,size=16,examples=20", "fractals,size=24,examples=20,classes=3")
PICTURES = """
import hashlib, sys
from vit_jax.data.forms.scenes import scenes
for argument in sys.argv[1:]:
    found = scenes(argument, "val")[7]
    print(hashlib.sha256(found["image"].tobytes() + found["label"].tobytes()).hexdigest())
assert not {"jax", "flax"} & set(sys.modules)
"""


def digest(example):
    return hashlib.sha256(example["image"].tobytes() + example["label"].tobytes()).hexdigest()


def test_a_scene_depends_on_nothing_but_its_index():
    sources = [scenes(argument, "val") for argument in SMALL]
    expected = [digest(source[7]) for source in sources]
    for source, one in zip(sources, expected, strict=True):
        source[3]
        copy = pickle.dumps(source)
        assert len(copy) < 300 and pickle.loads(copy) == source
        assert digest(source[7]) == digest(pickle.loads(copy)[7]) == one
        assert len({digest(example) for example in source}) == len(source) == 20
        for wrong in (-1, 20):
            with pytest.raises(IndexError, match=f"val has images 0 to 19, found {wrong}"):
                source[wrong]
    other = subprocess.run([sys.executable, "-c", PICTURES, *SMALL], capture_output=True)
    assert other.stdout.decode().split() == expected, other.stderr.decode()


@pytest.mark.parametrize("argument, size, classes", [(SMALL[0], 16, 10), (SMALL[1], 24, 3)])
def test_an_example_has_a_class_for_each_pixel(argument, size, classes):
    source, seen = scenes(argument, "train"), set()
    names = [f"fractal{i}" for i in range(3)] if classes == 3 else [str(i) for i in range(10)]
    assert source.masks and source.label_names == ("background", *names)
    for example in source:
        image, mask = example["image"], example["label"]
        assert image.dtype == np.uint8 and image.shape == (size, size, 1)
        assert mask.dtype == np.int32 and mask.shape == (size, size)
        # Objects are a quarter as bright as can be and more, the background is noise up to 95.
        assert image[mask > 0].min() >= 64 and image[mask == 0].max() < 96
        seen |= set(np.unique(mask))
    assert seen == set(range(classes + 1))
    bright = np.stack([example["image"][..., 0] >= 64 for example in source])
    assert 0.02 < np.mean(bright & (np.stack([e["label"] for e in source]) == 0))


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
                expected = np.zeros((16, 16), np.int32)
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


@pytest.mark.parametrize(
    "argument, split, message",
    [
        ("digit", "train", "is of 'digit'; did you mean 'digits'?"),
        ("", "train", "is of ''; known: digits, fractals"),
        ("digits,object=2", "train", "no option 'object'; did you mean 'objects'?"),
        ("digits,classes=3", "train", "no option 'classes'; known: examples, objects, seed, size"),
        ("digits,size=8", "train", "size is '8'; expected an integer from 16 to 1024"),
        ("digits,objects=0", "train", "objects is '0'; expected an integer from 1 to 100"),
        ("digits,seed=1,seed=2", "train", "says seed twice"),
        ("fractals,classes=0", "train", "classes is '0'"),
        ("digits", "tests", "no split 'tests'; did you mean 'test'?"),
    ],
)
def test_wrong_arguments_are_named(argument, split, message):
    with pytest.raises(UserError) as error:
        open_source(f"scenes:{argument}", split)
    assert f"the source scenes:{argument}" in str(error.value) and message in str(error.value)


# Masks in batches


@pytest.mark.parametrize(
    "old, new", [((12, 9), (24, 27)), ((30, 21), (10, 7)), ((16, 10), (9, 13))]
)
def test_a_mask_is_resized_about_the_same_centres_as_its_image(old, new):
    """Of an image whose pixels are their own coordinate, bilinear gives where a centre comes from.

    The nearest pixel is at most half a pixel from there.
    """
    for axis in (0, 1):
        mask = np.indices(old, np.int32)[axis]
        image = resize(mask[..., None].astype(np.float32), new, "bilinear")[..., 0]
        found = resize_mask(mask, new)
        assert found.dtype == np.int32 and found.shape == new
        assert np.abs(found - image).max() <= 0.5 + 1e-4
    labels = np.random.default_rng(0).integers(0, 5, old, np.int32)
    # OpenCV's nearest about half-pixel centres, but for centres on an edge.
    theirs = cv2.resize(labels.astype(np.uint8), new[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    assert np.mean(resize_mask(labels, new) == theirs) == 1


def test_a_mask_doubled_and_halved_by_hand():
    mask = np.array([[0, 1], [2, 3]], np.int32)
    double = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert resize_mask(mask, (4, 4)).tolist() == double
    assert resize_mask(np.array(double, np.int32), (2, 2)).tolist() == mask.tolist()


class Masks:
    """An image whose pixels are 10 times the mask's classes."""

    masks, label_names, fingerprint = True, tuple("abcdefgh"), ""

    def __init__(self, change=lambda example: example, size=(12, 20)):
        self.change = change
        self.all = np.random.default_rng(0).integers(0, 8, (5, *size), np.int32)

    def __len__(self):
        return len(self.all)

    def __getitem__(self, i):
        image = (10 * self.all[i][..., None]).astype(np.uint8)
        return self.change({"image": image, "label": self.all[i], "name": f"scene {i}"})


def test_masks_in_batches_and_padding():
    read = BatchReader(Masks(), Preprocess((12, 20), 1))
    with eval_batches(read, 4) as batches:
        one, two = list(batches)
    assert one["label"].dtype == np.int32 and one["label"].shape == (4, 12, 20)
    np.testing.assert_array_equal(one["label"], Masks().all[:4])
    assert two["mask"].tolist() == [True, False, False, False]
    np.testing.assert_array_equal(two["label"][0], Masks().all[4])
    assert not two["label"][1:].any()


@pytest.mark.parametrize(
    "how", [dict(aspect="keep"), dict(aspect="small"), dict(aspect="squash", crop=0.75)]
)
def test_a_mask_is_cropped_as_its_image(how):
    """Its pixels are their own row or column, so that the nearest is at most a half away."""
    for axis in (0, 1):
        mask = np.indices((16, 32), np.int32)[axis]
        example = {"image": (7 * mask[..., None]).astype(np.uint8), "label": mask}
        source = Masks(lambda _, example=example: example)
        source.label_names = tuple(map(str, range(32)))
        batch = BatchReader(source, Preprocess((24, 24), 1, **how))(np.arange(1), np.arange(1))
        image, label = batch["image"][0, ..., 0], batch["label"][0]
        assert np.abs(image / 7 - label).max() <= 0.5 + 0.5 / 7 + 1e-6  # uint8 is rounded
        assert len(np.unique(label)) > 7


def changed(**fields):
    return Masks(lambda example: {**example, **fields})


@pytest.mark.parametrize(
    "source, message",
    [
        (changed(label=np.full((12, 20), 8, np.int32)), "scene 2 has the label 8 in its mask"),
        (changed(label=np.full((12, 20), -1, np.int32)), "label -1 in its mask, but there are 8"),
        (changed(label=np.zeros((20, 12), np.int32)), r"int32 \[20, 12\]; expected .*\[12, 20\]"),
        (changed(label=np.zeros((12, 20))), "has the mask float64"),
        (changed(label=3), r"scene 2 has the mask 3; expected int32 \[12, 20\]"),
        (changed(image=b"GIF"), "scene 2 is an image file, but masks go with pixels"),
    ],
)
def test_a_wrong_mask_is_one_sentence(source, message):
    read = BatchReader(source, Preprocess((6, 10), 1))
    with pytest.raises(UserError, match=message):
        read(np.arange(1), np.array([2]))


@pytest.mark.parametrize("changes", [dict(flip=True), dict(random_crop=True), dict(erasing=0.5)])
def test_no_augmentation_moves_a_mask(changes):
    with pytest.raises(UserError, match=f"data: {min(changes)} is not for labels that are masks"):
        BatchReader.of(Masks(), Split("x", "y", **changes), Preprocess((6, 10), 1))


def test_masks_by_other_classes():
    source = Masks()
    turned = with_labels(source, source.label_names[::-1])
    assert isinstance(turned, Relabelled) and turned.masks
    np.testing.assert_array_equal(turned[1]["label"], 7 - source.all[1])
    two = Matched(("a", "b"), (), (4, 5), "")
    wrong = Relabelled(changed(label=np.array([[0, 9, -1]], np.int32)), two)
    assert wrong[0]["label"].tolist() == [[4, -1, -1]]

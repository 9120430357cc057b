"""The sources against scikit-learn's own arrays and hand-made `.npz` files."""

import collections
import hashlib

import jaxtyping
import numpy as np
import pytest
from sklearn.datasets import load_digits

from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError

SIZES = {"train": 1259, "val": 179, "test": 359}


def examples(images, labels):
    """How often each (pixels, label) occurs."""
    return collections.Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


@pytest.mark.parametrize("split", SIZES)
def test_digits_are_grey_bytes_of_eight_by_eight(split):
    source = open_source("digits", split)
    assert len(source) == SIZES[split]
    assert source.images.shape == (SIZES[split], 8, 8, 1)
    assert (source.images.min(), source.images.max()) == (0, 255)
    assert source.label_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    example = source[7]
    assert example["image"].dtype == np.uint8
    assert example["image"].tobytes() == source.images[7].tobytes()
    assert example["label"] == source.labels[7]


def test_the_splits_of_digits_share_no_example_and_leave_none_out():
    bunch = load_digits()
    sixteenths = bunch.images.astype(int)
    expected = examples(((sixteenths * 255 + 8) // 16).astype(np.uint8), bunch.target)
    found = collections.Counter()
    for split in SIZES:
        source = open_source("digits", split)
        found += examples(source.images, source.labels)
    assert found == expected
    assert found.total() == 1797


@pytest.mark.parametrize("split, share", [("train", 0.7), ("val", 0.1), ("test", 0.2)])
def test_every_class_of_digits_is_split_alike(split, share):
    whole = np.bincount(load_digits().target)
    part = np.bincount(open_source("digits", split).labels)
    assert np.abs(part - share * whole).max() <= 1  # train gets what two roundings leave


@pytest.mark.parametrize(
    "split, labels, fingerprint",
    [
        ("train", "331743d25dc52d5f", "7c530078f37eced3"),
        ("val", "52864482b037e228", "f4acc0520a2afe8d"),
        ("test", "bf7e26db5dd00503", "0af4eaefb5c5d1a0"),
    ],
)
def test_the_splits_of_digits_never_change(split, labels, fingerprint):
    """Published accuracies, and runs that resume, hang on these very examples in this order."""
    source = open_source("digits", split)
    assert hashlib.sha256(source.labels.astype("<i4").tobytes()).hexdigest()[:16] == labels
    assert source.fingerprint == fingerprint


@pytest.mark.parametrize(
    "spec, split, message",
    [
        ("digit", "train", r"no source 'digit'; did you mean 'digits'\?"),
        ("/x/y.jpg", "train", "a path alone names no source .it is not there."),
        ("tests", "train", "a path alone names no source .*folder:PATH"),
        ("floder:/x", "train", "no source 'floder'; did you mean 'folder'"),
        ("folder:/x", "train", "there is no such folder"),
        ("digits", "tset", r"source digits has no split 'tset'; did you mean 'test'\?"),
        ("digits", "", "no split ''; known: test, train, val"),
        ("digits:8x8", "train", "takes no argument, found digits:8x8"),
    ],
)
def test_an_unknown_source_split_or_argument_is_named(spec, split, message):
    with pytest.raises(UserError, match=message):
        open_source(spec, split)


def contents(**changes):
    """What a good file holds; a change of None leaves an array out."""
    random = np.random.default_rng(0)
    arrays = {
        "train_images": random.integers(0, 256, (6, 4, 5, 3), np.uint8),
        "train_labels": np.array([2, 0, 1, 1, 0, 2]),
        "val_images": random.integers(0, 256, (2, 4, 5, 3), np.uint8),
        "val_labels": np.array([3, 0]),
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def saved(tmp_path, **changes):
    path = tmp_path / "cells.npz"
    np.savez_compressed(path, **contents(**changes))
    return f"arrays:{path}"


@pytest.mark.parametrize("split", ["train", "val"])
def test_arrays_come_back_from_the_file(tmp_path, split):
    source = open_source(saved(tmp_path), split)
    expected = contents()
    np.testing.assert_array_equal(source.images, expected[f"{split}_images"])
    np.testing.assert_array_equal(source.labels, expected[f"{split}_labels"])
    assert source.labels.dtype == np.int32
    # Class 3 occurs in val alone, and both splits must count the same classes.
    assert source.label_names == ("0", "1", "2", "3")


def test_grey_arrays_need_no_channel_axis(tmp_path):
    grey = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
    source = open_source(saved(tmp_path, train_images=grey), "train")
    assert source.images.shape == (6, 4, 5, 1)
    assert source[5]["image"].tobytes() == grey[5].tobytes()


@pytest.mark.parametrize(
    "dtype",
    [
        np.int8,
        np.int64,
        np.uint8,
    ],
)
def test_labels_may_be_of_any_integer_type(tmp_path, dtype):
    labels = np.array([2, 0, 1, 1, 0, 2], dtype)
    source = open_source(saved(tmp_path, train_labels=labels), "train")
    assert source.labels.tolist() == [2, 0, 1, 1, 0, 2]


def test_labels_may_be_a_column(tmp_path):
    labels = np.array([[2], [0], [1], [1], [0], [2]])
    source = open_source(saved(tmp_path, train_labels=labels), "train")
    assert source.labels.tolist() == [2, 0, 1, 1, 0, 2]


@pytest.mark.parametrize("kind", ["U", "S"])
def test_arrays_may_name_their_classes(tmp_path, kind):
    names = ["lymphocyte", "monocyte", "neutrophil", "none"]
    source = open_source(saved(tmp_path, label_names=np.array(names, kind)), "train")
    assert source.label_names == tuple(names)


@pytest.mark.parametrize(
    "changes, split, message",
    [
        ({}, "trian", r"has no split 'trian'; did you mean 'train'\?"),
        ({}, "test", "has no split 'test'; known: train, val"),
        ({"train_labels": None}, "train", "holds train_images but no train_labels"),
        ({"train_images": np.zeros((6, 4, 5))}, "train", r"float64 \[6, 4, 5\]; expected uint8"),
        ({"train_images": np.zeros((6, 20), np.uint8)}, "train", r"uint8 \[6, 20\]; expected"),
        ({"train_labels": np.zeros(6)}, "train", r"float64 \[6\]; expected integers"),
        ({"train_labels": np.zeros((6, 2), int)}, "train", r"int64 \[6, 2\]; expected integers"),
        ({"train_images": np.zeros((6, 3, 5, 8), np.uint8)}, "train", r"looks like \[n c h w\]"),
        ({"label_names": np.array(["a", "b", "a", "c"])}, "train", "has a class twice"),
        (
            {"train_images": None, "val_images": None},
            "train",
            "holds .*train_labels.*; expected SPL",
        ),
        ({"train_labels": np.array([0, 1, 2, -1, 0, 0])}, "train", "labels from -1 to 2"),
        ({"label_names": np.array(["a", "b"])}, "train", "labels from 0 to 2 do not fit 2 class"),
        (
            {"train_images": np.zeros((0, 4, 5, 3), np.uint8), "train_labels": np.zeros(0, int)},
            "train",
            "at least one example",
        ),
        ({"train_labels": np.array([0] * 6, object)}, "train", "no readable .npz: Object arrays"),
        ({"label_names": np.array(["a", None])}, "train", "no readable .npz: Object arrays"),
        (
            {"train_labels": np.array([0, 1, 2, 2**32, 0, 0]), "label_names": np.array([*"abc"])},
            "train",
            "labels from",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, changes, split, message):
    with pytest.raises(UserError, match=message):
        open_source(saved(tmp_path, **changes), split)


def test_images_and_labels_must_be_as_many(tmp_path):
    # With shapes enforced, as in all other tests, the signature would complain first.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(UserError, match="6 images but 5 labels"):
            open_source(saved(tmp_path, train_labels=np.zeros(5, int)), "train")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def unreadable(path, kind):
    np.savez(path, **contents())
    whole = path.read_bytes()
    if kind == "text":
        path.write_text("image,label\n")
    elif kind == "a single array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "one bit changed":
        at = whole.index(contents()["train_images"].tobytes())
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.unlink()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "there is no such file"),
        ("text", "no readable .npz"),
        ("a folder", "no readable .npz"),
        ("a single array", "no readable .npz"),
        ("empty", "no readable .npz"),
        ("cut short", "no readable .npz"),
        ("one bit changed", "no readable .npz"),
    ],
)
def test_a_file_that_is_no_npz_is_refused(tmp_path, kind, message):
    path = tmp_path / "cells.npz"
    unreadable(path, kind)
    with pytest.raises(UserError, match=f"arrays:{path}.*{message}"):
        open_source(f"arrays:{path}", "train")


def source(images=None, labels=(0, 1, 1), names=("a", "b", "c")):
    images = np.zeros((3, 2, 4, 1), np.uint8) if images is None else images
    return ArraySource(images, np.array(labels, np.int32), names)


def test_the_fingerprint_changes_with_the_examples_and_only_with_them():
    pixel = np.zeros((3, 2, 4, 1), np.uint8)
    pixel[2, 1, 3, 0] = 1
    turned = np.zeros((3, 4, 2, 1), np.uint8)
    sources = [
        source(),
        source(pixel),
        source(turned),
        source(labels=(0, 1, 2)),
        source(labels=(1, 0, 1)),
        source(names=("a", "b", "d")),
        source(names=("a", "b", "c", "d")),
    ]
    assert len({each.fingerprint for each in sources}) == len(sources)
    # Strides are no part of the examples.
    strided = np.zeros((3, 2, 8, 1), np.uint8)[:, :, ::2]
    assert source(strided).fingerprint == source().fingerprint

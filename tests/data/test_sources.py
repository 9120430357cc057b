"""The sources against scikit-learn's own arrays and hand-made `.npz` files."""

import collections
import hashlib
import io

import numpy as np
import pytest
from made import refused
from sklearn.datasets import load_digits

from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


def examples(images, labels):
    """How often each (pixels, label) occurs."""
    return collections.Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def test_digits_are_split_into_grey_bytes_that_never_change():
    """Published accuracies, and runs that resume, hang on these very examples in this order."""
    bunch, found = load_digits(), collections.Counter()
    whole = np.bincount(bunch.target)
    for split, n, share, digest, fingerprint in [
        ("train", 1259, 0.7, "331743d25dc52d5f", "7c530078f37eced3"),
        ("val", 179, 0.1, "52864482b037e228", "f4acc0520a2afe8d"),
        ("test", 359, 0.2, "bf7e26db5dd00503", "0af4eaefb5c5d1a0"),
    ]:
        source = open_source("digits", split)
        assert len(source) == n and source.images.shape == (n, 8, 8, 1)
        assert (source.images.min(), source.images.max()) == (0, 255)
        assert source.label_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
        example = source[7]
        assert example["image"].dtype == np.uint8
        assert example["image"].tobytes() == source.images[7].tobytes()
        assert example["label"] == source.labels[7]
        part = np.bincount(source.labels)
        assert np.abs(part - share * whole).max() <= 1  # train gets what two roundings leave
        assert hashlib.sha256(source.labels.astype("<i4").tobytes()).hexdigest()[:16] == digest
        assert source.fingerprint == fingerprint
        found += examples(source.images, source.labels)
    # They share none and leave none out.
    sixteenths = bunch.images.astype(int)
    assert found == examples(((sixteenths * 255 + 8) // 16).astype(np.uint8), bunch.target)
    assert found.total() == 1797


def test_an_unknown_source_split_or_argument_is_named():
    cases = [
        ("digit", "train", r"no source 'digit'; did you mean 'digits'\?"),
        ("/x/y.jpg", "train", "a path alone names no source .it is not there."),
        ("tests", "train", "a path alone names no source .*folder:PATH"),
        ("floder:/x", "train", "no source 'floder'; did you mean 'folder'"),
        ("folder:/x", "train", "there is no such folder"),
        ("digits", "tset", r"source digits has no split 'tset'; did you mean 'test'\?"),
        ("digits", "", "no split ''; known: test, train, val"),
        ("digits:8x8", "train", "takes no argument, found digits:8x8"),
    ]
    refused(open_source, cases)


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


def test_arrays_come_back_from_the_file(tmp_path):
    expected, spec = contents(), saved(tmp_path)
    for split in ("train", "val"):
        source = open_source(spec, split)
        np.testing.assert_array_equal(source.images, expected[f"{split}_images"])
        np.testing.assert_array_equal(source.labels, expected[f"{split}_labels"])
        assert source.labels.dtype == np.int32
        # Class 3 occurs in val alone, and both splits must count the same classes.
        assert source.label_names == ("0", "1", "2", "3")
    # Grey ones need no channel axis, labels may be of any integer type, or a column.
    grey = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
    source = open_source(saved(tmp_path, train_images=grey), "train")
    assert source.images.shape == (6, 4, 5, 1)
    assert source[5]["image"].tobytes() == grey[5].tobytes()
    labels = expected["train_labels"]
    for other in (*map(labels.astype, (np.int8, np.int64, np.uint8)), labels[:, None]):
        source = open_source(saved(tmp_path, train_labels=other), "train")
        assert source.labels.tolist() == labels.tolist()
    names = ["lymphocyte", "monocyte", "neutrophil", "none"]
    for kind in "US":
        source = open_source(saved(tmp_path, label_names=np.array(names, kind)), "train")
        assert source.label_names == tuple(names)


def test_parts_of_arrays_are_all_of_them_once(tmp_path):
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    spec = saved(tmp_path, train_images=images, train_labels=np.arange(100) % 3)
    parts = [open_source(spec, f"train[{part}]") for part in (":80%", "80%:")]
    assert all(10 < len(part) < 90 for part in parts)
    numbers = np.concatenate([part.images.ravel() for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    assert sorted(numbers) == [*range(100)] and (labels == numbers % 3).all()


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    large, letters = np.array([0, 1, 2, 2**32, 0, 0]), np.array([*"abc"])
    none = {"train_images": np.zeros((0, 4, 5, 3), np.uint8), "train_labels": np.zeros(0, int)}
    cases = [
        ({}, r"has no split 'trian'; did you mean 'train'\?", "trian"),
        ({}, "has no split 'test'; known: train, val", "test"),
        ({}, r"split 'train\[:5\]': expected NAME", "train[:5]"),
        ({}, r"has no image in split 'train\[:1%\]'", "train[:1%]"),
        ({"train_labels": None}, "holds train_images but no train_labels"),
        ({"train_images": np.zeros((6, 4, 5))}, r"float64 \[6, 4, 5\]; expected uint8"),
        ({"train_images": np.zeros((6, 20), np.uint8)}, r"uint8 \[6, 20\]; expected"),
        ({"train_labels": np.zeros(6)}, r"float64 \[6\]; expected integers"),
        ({"train_labels": np.zeros((6, 2), int)}, r"int64 \[6, 2\]; expected integers"),
        ({"train_images": np.zeros((6, 3, 5, 8), np.uint8)}, r"looks like \[n c h w\]"),
        ({"label_names": np.array(["a", "b", "a", "c"])}, "has a class twice"),
        ({"train_images": None, "val_images": None}, "holds .*train_labels.*; expected SPL"),
        ({"train_labels": np.array([0, 1, 2, -1, 0, 0])}, "labels from -1 to 2"),
        ({"label_names": np.array(["a", "b"])}, "labels from 0 to 2 do not fit 2 class"),
        (none, "at least one example"),
        ({"train_labels": np.array([0] * 6, object)}, "no readable .npz: Object arrays"),
        ({"label_names": np.array(["a", None])}, "no readable .npz: Object arrays"),
        ({"train_labels": large, "label_names": letters}, "labels from"),
    ]
    cases = [(changes, *(split or ["train"]), message) for changes, message, *split in cases]
    refused(lambda changes, split: open_source(saved(tmp_path, **changes), split), cases)


def test_images_and_labels_must_be_as_many(tmp_path, as_users_have_it):
    with pytest.raises(UserError, match="6 images but 5 labels"):
        open_source(saved(tmp_path, train_labels=np.zeros(5, int)), "train")


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    single, path = io.BytesIO(), tmp_path / "cells.npz"
    np.save(single, np.zeros(3))
    np.savez(path, **contents())
    whole = path.read_bytes()
    at = whole.index(contents()["train_images"].tobytes())
    changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]  # one bit
    message = f"arrays:{path}.*no readable .npz"
    for data in (b"image,label\n", single.getvalue(), b"", whole[: len(whole) // 2], changed):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_source(f"arrays:{path}", "train")
    path.unlink()
    with pytest.raises(UserError, match=f"arrays:{path}.*there is no such file"):
        open_source(f"arrays:{path}", "train")
    path.mkdir()
    with pytest.raises(UserError, match=f"{path}: Is a directory: expected a file"):
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

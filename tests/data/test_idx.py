"""MNIST's files: every byte at its place."""

import gzip

import numpy as np
import pytest
from made import refused

from vit_jax.data.forms.idx import idx_splits
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


def idx(array):
    """As LeCun's page says it: 0, 0, the type, the rank; big-endian sizes; the bytes."""
    array = np.asarray(array, np.uint8)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


IMAGES = np.arange(5 * 2 * 3).reshape(5, 2, 3)


def mnist(root, prefix="", test="t10k", joint="-", pack=bytes, labels=(3, 1, 26, 1, 3)):
    ending = ".gz" if pack is gzip.compress else ""
    for split, of in ((f"{prefix}train", slice(0, 3)), (f"{prefix}{test}", slice(3, 5))):
        for kind, array in (("images", IMAGES[of]), ("labels", np.array(labels)[of])):
            name = f"{split}-{kind}{joint}idx{array.ndim}-ubyte{ending}"
            (root / name).write_bytes(pack(idx(array)))
    return root


@pytest.mark.parametrize(
    "form",
    [{}, {"pack": gzip.compress}, {"joint": "."}, {"prefix": "emnist-letters-", "test": "test"}],
)
def test_images_and_labels_are_those_of_the_files(tmp_path, caplog, form):
    spec = f"idx:{mnist(tmp_path, **form)}"
    train, test = open_source(spec, "train"), open_source(spec, "test")
    np.testing.assert_array_equal(np.concatenate([train.images, test.images])[..., 0], IMAGES)
    assert train.label_names == test.label_names == ("1", "3", "26")
    assert train.labels.tolist() == [1, 0, 2] and test.labels.tolist() == [0, 1]
    assert train[2]["image"].shape == (2, 3, 1) and train[2]["label"] == 2
    assert ("transposed" in caplog.text) == ("prefix" in form)
    assert idx_splits(str(tmp_path)) == ("train", "test")


def test_parts_and_several_sets(tmp_path):
    mnist(mnist(tmp_path, "emnist-letters-"), "emnist-digits-")
    with pytest.raises(
        UserError, match=r"several sets .'emnist-digits', 'emnist-letters'.: say wh"
    ):
        open_source(f"idx:{tmp_path}", "train")
    spec = f"idx:{tmp_path}/emnist-letters"
    parts = [open_source(spec, f"train[{part}]").images for part in (":70%", "70%:")]
    assert sorted(np.concatenate(parts)[:, 0, 0, 0].tolist()) == [0, 6, 12]
    with pytest.raises(UserError, match="no set 'emnist-leters'; did you mean 'emnist-letters'"):
        open_source(f"idx:{tmp_path}/emnist-leters", "train")


def test_colour_and_packed_beside_unpacked(tmp_path):
    mnist(mnist(tmp_path, pack=gzip.compress))
    colours = np.arange(3 * 2 * 2 * 3).reshape(3, 2, 2, 3)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(colours))
    source = open_source(f"idx:{tmp_path}", "train")
    np.testing.assert_array_equal(source.images, colours)


IMAGE = "train-images-idx3-ubyte"


def test_damaged_files_are_refused(tmp_path):
    whole = idx(IMAGES)
    cases = [
        (IMAGE, whole[:-1], "has 29 bytes behind its header, which says .5, 2, 3."),
        (IMAGE, whole + b"x", "has 31 bytes behind"),
        (IMAGE, whole[:9], "cut off in its header"),
        (IMAGE, b"", "begins with nothing"),
        (IMAGE, idx(IMAGES[0, 0]), "begins with 00 00 08 01; expected 00 00 08 03"),
        (IMAGE, b"\0\0\x0d" + whole[3:], "begins with 00 00 0d 03"),
        (IMAGE, whole, "has 5 images, but .* 3 labels"),
        (IMAGE, gzip.compress(whole, mtime=0)[:-9], "cannot be read"),
        ("train-images.idx3-ubyte", whole, "two files of one kind"),
    ]

    def opened(name, data):
        (mnist(tmp_path) / name).write_bytes(data)
        open_source(f"idx:{tmp_path}", "train")

    refused(opened, cases)
    (tmp_path / "train-images.idx3-ubyte").unlink()
    with pytest.raises(UserError, match="no split 'val'"):
        open_source(f"idx:{tmp_path}", "val")
    (tmp_path / IMAGE).unlink()
    (tmp_path / "empty").mkdir()
    cases = [("", "has no images or labels beside it"), ("empty", "no files such as")]
    cases += [("a/b", "no such folder")]
    refused(lambda path: open_source(f"idx:{tmp_path / path}", "train"), cases)

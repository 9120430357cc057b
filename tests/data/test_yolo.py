"""Images and label files as of Ultralytics' data.yaml, with what people's have in them."""

import logging
import pickle

import numpy as np
import pytest
from made import noise, refused, saved, turned, written

from vit_jax.data import storage
from vit_jax.data.config import Split
from vit_jax.data.describe import report
from vit_jax.data.forms.yolo import label_path
from vit_jax.data.images import BadImage
from vit_jax.data.inputs import find_images
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import open_source, open_splits, splits_of, understood
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError

H, W = 30, 40
YAML = "train: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
LINES = "0 0.5 0.5 0.25 0.4\n1 .1 .2 .1 .2\n"


def photo(i, **options):
    return saved(noise(H, W, 3, seed=i), "JPEG", **options)


def made(root, yaml=YAML, labels=LINES, count=3, name="data.yaml"):
    """images/SPLIT/N.jpg, and labels/SPLIT/N.txt but for the first."""
    for split, start in {"train": 0, "val": 50}.items():
        for i in range(count):
            written(root / "images" / split / f"{i}.jpg", photo(start + i))
            if i:
                written(root / "labels" / split / f"{i}.txt", labels)
    written(root / name, yaml)
    return f"yolo:{root}"


def test_the_folders_of_ultralytics(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vit_jax")
    spec = made(tmp_path)
    assert splits_of(spec) == ["train", "val"] and understood(str(tmp_path)) == spec
    source = open_source(spec, "train")
    assert source.boxes and source.label_names == ("cat", "dog") and len(source) == 3
    assert source.category_ids is None and source.box_counts.tolist() == [0, 2, 2]
    example = source[1]
    assert example["image"] == photo(1) and example["size"] == (H, W)
    np.testing.assert_allclose(example["label"].corners, [[15, 9, 25, 21], [2, 3, 6, 9]], rtol=1e-6)
    np.testing.assert_allclose(example["label"].area, [120, 24], rtol=1e-5)
    assert example["label"].classes.tolist() == [0, 1] and not example["label"].crowd.any()
    np.testing.assert_array_equal(source.boxes_of(1).corners, example["label"].corners)
    assert source.image_size_of(1) == (H, W) and len(source.boxes_of(0)) == 0
    assert "images without a file of boxes: 1, such as images/train/0.jpg" in caplog.text
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.boxes_of(2).corners, source.boxes_of(2).corners)
    assert find_images(spec, split="val").names[0] == str(tmp_path / "images" / "val" / "0.jpg")
    file = open_source(f"{spec}/data.yaml", "train")
    assert file.fingerprint == source.fingerprint
    parts = [open_source(spec, part) for part in ("train[:50%]", "train[50%:]")]
    assert sum(map(len, parts)) == 3
    lines = "\n".join(report(open_splits(spec)))
    assert "boxes         4 in 2 images, up to 2 in one; images without any: 1" in lines
    written(tmp_path / "labels" / "train" / "0.txt", "")
    written(tmp_path / "labels" / "train" / "2.txt", "0 .5 .5 .25 .5\n")
    other = open_source(spec, "train")
    assert other.fingerprint != source.fingerprint and other.box_counts.tolist() == [0, 2, 1]
    assert "file of boxes" not in other.how and "images without boxes: 1" in other.how
    written(tmp_path / "photos" / "data.yaml", "cameras: [left, right]")
    assert understood(str(tmp_path / "photos")).startswith("folder:")
    cases = [("test", "has no split 'test'; known: train, val"), ("all", "has no split 'all'")]
    refused(lambda split: open_source(spec, split), cases)
    with pytest.raises(UserError, match="has boxes for labels, which records do not hold"):
        prepare(str(tmp_path), str(tmp_path / "out"), split="train")


def test_boxes_are_shares_of_the_upright_image(tmp_path, monkeypatch):
    spec = made(tmp_path)
    written(tmp_path / "images" / "train" / "1.jpg", photo(1, exif=turned(6)))
    written(tmp_path / "images" / "train" / "2.jpg", b"\xff\xd8\xffbroken")
    source = open_source(spec, "train")
    assert source.image_size_of(1) == (W, H) and source[1]["size"] == (W, H)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "opened", None)  # the size is known
        np.testing.assert_allclose(source.boxes_of(1).corners[0], [11.25, 12, 18.75, 28], rtol=1e-6)
    one = np.arange(1, 2)
    batch = BatchReader.of(source, Split("x", "y"), Preprocess((100, 100)))(one, one)
    np.testing.assert_allclose(batch["label"][0, 0], [0, 37.5, 30, 62.5, 70], rtol=1e-5)
    for read in (source.boxes_of, source.__getitem__):
        with pytest.raises(BadImage, match=r"images/train/2\.jpg: "):
            read(2)
    read = BatchReader.of(source, Split("x", "y"), Preprocess((9, 9)), on_corrupt="skip")
    assert read(one + 1, one + 1)["corrupt"].tolist() == [True]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("path: .\n", None),
        ("path: /nowhere/datasets/pets\n", "there is no .*nowhere.*, and images are below"),
        ("path: ../elsewhere\n", "and images are below"),
        ("nc: 2\n", None),
    ],
)
def test_the_path_in_the_yaml(tmp_path, yaml, message, caplog):
    caplog.set_level(logging.INFO, "vit_jax")
    source = open_source(made(tmp_path / "pets", yaml + YAML), "train")
    assert len(source) == 3 and source.box_counts.tolist() == [0, 2, 2]
    assert (" below " in source.how) == (message is not None)
    if message is None:
        written(tmp_path / "conf" / "pets.yaml", f"path: ../pets\n{YAML}")
        beside = open_source(f"yolo:{tmp_path / 'conf' / 'pets.yaml'}", "val")
        assert len(beside) == 3 and beside.box_counts.tolist() == [0, 2, 2]


def test_splits_are_folders_or_lists_of_them_or_of_images(tmp_path):
    made(tmp_path)
    listed = "./images/train/1.jpg\r\n\r\nimages\\val\\2.jpg\r\n"
    written(tmp_path / "some.txt", "\ufeff" + listed)
    written(tmp_path / "images" / "more.txt", "train/2.jpg\nimages/val/0.jpg\n")
    yaml = "train: [images/train, images/val/]\nval: some.txt\ntest: images/more.txt\nnames: [a, b]"
    made(tmp_path, yaml)
    spec = f"yolo:{tmp_path}"
    found = {split: list(open_source(spec, split).names) for split in splits_of(spec)}
    assert len(found["train"]) == 6
    assert found["val"] == ["images/train/1.jpg", "images/val/2.jpg"]
    assert found["test"] == ["images/train/2.jpg", "images/val/0.jpg"]
    written(tmp_path / "some.txt", listed + "images/val/9.jpg\n")
    with pytest.raises(
        UserError, match=r"1 of the 3 images in .*some.txt are not there, such as im"
    ):
        open_source(spec, "val")


def test_exports_with_two_folders_up(tmp_path):
    """Roboflow's data.yaml says ../train/images, and lies beside train."""
    for name in ("train", "valid"):
        for i in range(2):
            written(tmp_path / name / "images" / f"{i}.jpg", photo(i))
            written(tmp_path / name / "labels" / f"{i}.txt", LINES)
    yaml = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: ['a', 'b']"
    written(tmp_path / "data.yaml", yaml)
    spec = f"yolo:{tmp_path}"
    source = open_source(spec, "val")
    assert list(source.names) == ["valid/images/0.jpg", "valid/images/1.jpg"]
    assert source.box_counts.tolist() == [2, 2]
    assert "../valid/images is not there, and valid/images is taken" in source.how
    with pytest.raises(UserError, match=r"there is no .*test/images"):
        open_source(spec, "test")


def test_folders_without_a_yaml(tmp_path, caplog):
    spec = made(tmp_path)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(UserError, match=r"no data.yaml, nor images/, labels/ and classes.txt"):
        open_source(spec, "train")
    written(tmp_path / "classes.txt", "cat\r\ndog\r\n\r\n")
    assert splits_of(spec) == ["train", "val"]
    source = open_source(spec, "val")
    assert source.label_names == ("cat", "dog") and source.box_counts.tolist() == [0, 2, 2]
    for i in range(2):  # Label Studio
        written(tmp_path / "flat" / "images" / f"{i}.jpg", photo(i))
        written(tmp_path / "flat" / "labels" / f"{i}.txt", LINES)
    written(tmp_path / "flat" / "labels" / "classes.txt", "cat\ndog")
    flat = open_source(f"yolo:{tmp_path / 'flat'}", "all")
    assert flat.box_counts.tolist() == [2, 2] and "without an image" not in flat.how


def test_labels_are_in_the_last_folder_of_that_name():
    cases = {
        "images/1.jpg": "labels/1.txt",
        "/a/images/b/images/c/1.b.JPG": "/a/images/b/labels/c/1.b.txt",
        "a/myimages/1.png": "a/myimages/1.txt",
        "train/1.png": "train/1.txt",
        "/images/1.png": "/labels/1.txt",
    }
    assert {image: label_path(image) for image in cases} == cases


def test_names_with_capitals_and_labels_beside(tmp_path):
    for i in range(2):
        written(tmp_path / "all" / f"{i}.JPG", photo(i))
        written(tmp_path / "all" / f"{i}.txt", LINES)
    written(tmp_path / "all" / "9.txt", LINES)
    written(tmp_path / "set.yaml", "train: all\nnames: [x, y]\n")
    source = open_source(f"yolo:{tmp_path}", "train")
    assert source.box_counts.tolist() == [2, 2]
    assert "files of boxes without an image: 1, such as all/9.txt" in source.how
    written(tmp_path / "all" / "1.png", saved(noise(5, 5, 3), "PNG"))
    with pytest.raises(
        UserError, match=r"1\.JPG and all/1\.png would both have the boxes of all/1"
    ):
        open_source(f"yolo:{tmp_path}", "train")


def test_lines_of_other_kinds(tmp_path):
    lines = (
        "\ufeff0 0.5 0.5 0.5 0.5\r\n"
        "1 0.25 0.1 0.75 0.1 0.75 0.9\r\n"  # an outline
        "1.0 0.1 0.2 0.3 0.2 0.3 0.4 0.1 0.4\r\n"
        "\r\n"
        "0 0.5 0.5 0.5 0.5\r\n"  # again
        "0 0.5 0.5 0 0.5\r\n"
        "1 1.004 0.5 0.5 -0.0\r\n"
        "0 0.9 0.5 0.4 1.002\r\n"
    )
    source = open_source(made(tmp_path, labels=lines), "train")
    expected = [[10, 7.5, 30, 22.5], [10, 3, 30, 27], [4, 6, 12, 12], [28, 0, 44, 30]]
    np.testing.assert_allclose(source.boxes_of(1).corners, expected, rtol=1e-5)
    assert source.boxes_of(1).classes.tolist() == [0, 1, 1, 0]
    for text in (
        "boxes around outlines: 4, such as",
        "lines that are there twice (taken once): 2, such as",
        "boxes without width or height (ignored): 4, such as",
        "boxes a little beyond 0 to 1 (cut there): 4, such as",
        "labels/train/1.txt, line 5",
    ):
        assert text in source.how, source.how


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 .5 .5 .1 .1", r"is of class 2, but there are 2, 0 to 1: are all named\?"),
        ("-1 .5 .5 .1 .1", "is of class -1"),
        ("0.5 .5 .5 .1 .1", "is of class 0.5"),
        ("0 .5 .5 .1 .1 .98", "has a sixth number, a confidence, as detections have"),
        ("0 .5 .5 .1", "has 4 numbers; expected class x y width height"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "has 8 numbers; .*keypoints need kpt_shape"),
        ("0 120 80 40 30", "has 120, beyond 0 to 1: .*divide pixels"),
        ("0 .5 .5 .1 1.02", "has 1.02, beyond"),
        ("0 .1 .1 .2 .1 .2 -0.3", "has -0.3, beyond"),
        ("0 nan .5 .1 .1", "no finite number"),
        ("cat .5 .5 .1 .1", "'cat .5 .5 .1 .1' has more than numbers"),
        ("0,.5,.5,.1,.1", "has more than numbers"),
        ("\n\n0 .5 .5 .1", "3 has 4 numbers"),
    ],
)
def test_a_line_that_is_no_box_is_refused(tmp_path, line, message):
    spec = made(tmp_path, labels=line)
    with pytest.raises(UserError, match=r"labels/train/1\.txt, line.*" + message):
        open_source(spec, "train")


def test_keypoints(tmp_path):
    line = "1 .5 .5 .5 .5" + " .1 .2 2" * 3
    spec = made(tmp_path, f"kpt_shape: [3, 3]\n{YAML}", line)
    source = open_source(spec, "train")
    assert source.boxes_of(1).corners.tolist() == [[10, 7.5, 30, 22.5]]
    assert "of keypoints, the boxes alone" in source.how
    made(tmp_path, f"kpt_shape: [4, 3]\n{YAML}", line)
    with pytest.raises(
        UserError, match=r"has 14 numbers; expected .* 12 of keypoints, by kpt_shape"
    ):
        open_source(spec, "train")


TRAIN = "train: images/train\n"


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("", "is no YAML file: it is empty"),
        ("train: [images", "is no YAML: "),
        ("- a\n- b", "has no keys; expected train, val and names"),
        ("names: [a, b]", "names no images"),
        (TRAIN, "has no names of classes; expected names"),
        (f"{TRAIN}nc: 3\nnames: [a, b]", "nc is 3, and there are 2 names"),
        (f"{TRAIN}names: [a, a]", "two classes called 'a'"),
        (f"{TRAIN}names: [yes, no]", "reads the name of class 0 as True: put it in quotes"),
        (f"{TRAIN}names: {{0: a, 2: b}}", "names has the numbers 0, 2; expected all from 0 to 1"),
        (f"{TRAIN}names: {{cat: 0}}", "expected numbers and names"),
        (f"{TRAIN}names: cat", "names is 'cat'; expected a list"),
        (f"{TRAIN}names: [a, '']", "class 1 is called ''"),
        ("train: 3\nnames: [a]", "train is 3; expected a folder"),
        ("train: https://x/y.zip\nnames: [a]", "on the web: fetch it"),
        (f"path: 3\n{TRAIN}names: [a]", "path is 3; expected a folder"),
        ("path: x\ntrain: y\nnames: [a]", "there is no .*x/y: `path` in .* is the folder"),
        ("train: data.yaml\nnames: [a]", "is no folder, and no list of images"),
        (f"{TRAIN}names: [a, b]\nkpt_shape: 17", "kpt_shape is 17"),
    ],
)
def test_what_is_wrong_in_a_yaml_is_named(tmp_path, yaml, message):
    spec = made(tmp_path, yaml)
    with pytest.raises(UserError, match=message):
        open_source(spec, "train")


def test_other_refusals(tmp_path):
    spec = made(tmp_path, f"{TRAIN}nc: 2")
    source = open_source(spec, "train")
    assert source.label_names == ("0", "1") and "nothing names the classes" in source.how
    for i in range(1, 3):
        (tmp_path / "labels" / "train" / f"{i}.txt").unlink()
    written(tmp_path / "other.yaml", YAML)
    cases = [
        (
            spec,
            r"none of its 3 images has a file of boxes: that of .*0\.jpg would be .*labels/train/0",
        ),
        (f"yolo:{tmp_path / 'none'}", "there is no file or folder"),
        (f"yolo:{tmp_path / 'images' / 'train' / '0.jpg'}", r"is no \.yaml file, and no folder"),
    ]
    refused(lambda spec: open_source(spec, "train"), cases)
    (tmp_path / "data.yaml").rename(tmp_path / "more.yaml")
    with pytest.raises(UserError, match=r"has more\.yaml, other\.yaml: name one, yolo:.*/"):
        open_source(spec, "train")

"""Boxes move with their images: what is painted in a box is found under the moved one."""

import dataclasses
import json
import logging
import pickle

import numpy as np
import pytest
from made import refused, saved, turned, written

from vit_jax.data.boxes import Boxes, outlined
from vit_jax.data.classes import Matched, Relabelled, with_labels
from vit_jax.data.config import DataConfig, Split
from vit_jax.data.contents import check_splits
from vit_jax.data.describe import first_lines, report
from vit_jax.data.forms import scenes as scenes_file
from vit_jax.data.forms.scenes import scenes
from vit_jax.data.order import Growth
from vit_jax.data.pictures import as_read, default_reader, stored
from vit_jax.data.pipeline import BatchReader, eval_batches, train_batches
from vit_jax.data.policies import ColorJitter
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import InceptionCrop, Preprocess, RandomAffine
from vit_jax.errors import UserError

TWO = np.array([2])
GREY = Preprocess((32, 48), 1, mean=0.0)  # so that padding is black


class Painted:
    """Black images with a white box each, of whole pixels."""

    boxes, label_names, fingerprint = True, ("a", "b", "c"), "painted"
    sizes = ((40, 56), (64, 64), (30, 90), (100, 41), (32, 48))

    def __init__(self, **change):
        self.change = change

    def __len__(self):
        return len(self.sizes)

    def boxes_of(self, i):
        if "label" in self.change:
            return self.change["label"]
        h, w = self.sizes[i]
        random = np.random.default_rng(i)
        x0, y0 = random.integers(0, w // 2), random.integers(0, h // 2)
        x1, y1 = x0 + random.integers(8, w // 2), y0 + random.integers(8, h // 2)
        return Boxes.of([[x0, y0, x1, y1]], [i % 3])

    def __getitem__(self, i):
        image, boxes = np.zeros((*self.sizes[i], 1), np.uint8), self.boxes_of(i)
        for x0, y0, x1, y1 in [] if self.change else boxes.corners.astype(int).tolist():
            image[y0:y1, x0:x1] = 255
        return {"image": image, "label": boxes, "name": f"painted {i}", **self.change}


def seen(image):
    """The corners of what is at least half white, and how much of each side is uncertain."""
    rows, columns = np.nonzero(image[..., 0] >= 128)
    if not len(rows):
        return None
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)


@pytest.mark.parametrize(
    "changes",
    [
        dict(random_scale=(0.4, 2.5)),
        dict(random_scale=(0.4, 2.5), flip=True, color_jitter=ColorJitter(0.0)),
        dict(inception_crop=InceptionCrop((0.1, 0.9)), flip=True),
        dict(random_crop=True, aspect="keep", crop=0.5),
        dict(aspect="small", crop=0.6),
        dict(aspect="keep", random_scale=(0.5, 2.0)),
        dict(flip=True),
        dict(),
    ],
    ids=lambda changes: "+".join(changes) or "none",
)
def test_what_is_in_a_box_stays_in_it(changes):
    read = BatchReader.of(Painted(), Split("x", "y", **changes), GREY, seed=3)
    many = np.arange(60)
    batch = read(many, many % 5)
    image, label = batch["image"], batch["label"]
    assert label.dtype == np.float32 and label.shape == (60, 100, 5)
    assert (label[:, 1:, 0] == -1).all() and (label[:, 1:, 1:] == 0).all()
    kept = label[:, 0, 0] >= 0
    assert (label[kept, 0, 0] == many[kept] % 5 % 3).all()
    for pixels, (_, *corners) in zip(image[kept], label[kept, 0], strict=True):
        x0, y0, x1, y1 = corners
        assert 0 <= x0 < x1 <= 48 and 0 <= y0 < y1 <= 32
        found = seen(pixels)
        # At most a pixel, which may be half white, where a side is in between.
        assert found is not None and np.abs(found - corners).max() <= 1.0, (found, corners)
    lost = [(at, found) for at in many[~kept] if (found := seen(image[at])) is not None]
    for _, (x0, y0, x1, y1) in lost:  # a corner of it, or a line
        assert min(x1 - x0, y1 - y0) <= 2 or (x1 - x0) * (y1 - y0) < 0.12 * 48 * 32
    assert kept.sum() >= (60 if not set(changes) - {"flip"} else 25)
    assert len({row.tobytes() for row in label}) >= (5 if set(changes) <= {"aspect", "crop"} else 8)


def test_a_scaled_crop_is_the_one_written_out():
    """The rows are those of NumPy, written out from the same random numbers."""
    corners = [[0, 0, 20, 12], [3, 2, 9, 11], [16, 0, 20.5, 4], [-4, 5, 2, 9], [19.5, 0, 20, 12]]
    every = Boxes.of(corners, [0, 1, 2, 0, 1], crowd=[False, False, False, False, False])

    class Small(Painted):
        sizes = ((12, 20),) * 5

    source, how = Small(label=every), Preprocess((8, 12), 1, mean=0.5)
    read = BatchReader.of(source, Split("x", "y", random_scale=(0.5, 2.0), flip=True), how, seed=7)
    dropped = 0
    for position in range(12):
        batch = read(np.array([position]), TWO)
        random = np.random.default_rng((7, position))
        factor = 0.5 + 1.5 * random.random()
        h, w = round(8 * factor), round(12 * factor)
        down, right = random.random(2)
        top = int(down * (abs(h - 8) + 1)) * (1 if h > 8 else -1)
        left = int(right * (abs(w - 12) + 1)) * (1 if w > 12 else -1)
        mirror = random.random() < 0.5
        expected = []
        for label, (x0, y0, x1, y1) in zip(every.classes, corners, strict=True):
            x0, x1 = (min(max(x, 0), 20) * w / 20 - left for x in (x0, x1))
            y0, y1 = (min(max(y, 0), 12) * h / 12 - top for y in (y0, y1))
            before = (x1 - x0) * (y1 - y0)
            x0, x1, y0, y1 = max(x0, 0), min(x1, 12), max(y0, 0), min(y1, 8)
            if x1 - x0 >= 1 and y1 - y0 >= 1 and (x1 - x0) * (y1 - y0) >= 0.1 * before:
                x0, x1 = (12 - x1, 12 - x0) if mirror else (x0, x1)
                expected.append([label, x0, y0, x1, y1])
        found = batch["label"][0]
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-4)
        assert (found[len(expected) :, 0] == -1).all()
        dropped += 5 - len(expected)
    assert dropped > 10


def test_what_too_little_is_left_of_is_dropped():
    boxes = Boxes.of([[0, 0, 10, 10], [-9, 0, 1, 10], [-8.9, 0, 1.1, 10], [5, 5, 5.5, 9]], range(4))
    assert boxes.cut(20, 20).classes.tolist() == [0, 1, 2]
    assert boxes.moved(-0.5, 0).cut(20, 20).classes.tolist() == [0]
    tall = Boxes.of([[0, -95, 4, 5], [0, -90, 4, 10]], [0, 1])
    assert tall.cut(50, 50).classes.tolist() == [1]  # a tenth is left
    found = boxes.resized((10, 10), (20, 40))
    np.testing.assert_allclose(found.area, boxes.area * 8)
    assert len(boxes[np.zeros(4, bool)]) == 0 == len(Boxes.of([], []).cut(5, 5))


def test_the_largest_are_kept_and_that_is_said_once(caplog):
    side = np.arange(1, 9)
    corners = np.stack([side * 0, side * 0, side * 4, side * 2], 1)[[3, 0, 7, 5, 1, 6, 2, 4]]
    many = Boxes.of(corners, np.arange(8) % 3)
    source = Painted(label=many)
    source.box_counts = np.array([8, 8, 2, 8, 0])
    read = BatchReader.of(source, Split("x", "y"), Preprocess((64, 64), 1), max_boxes=4)
    rows = np.array([1, 1])
    batch = read(rows, rows)
    assert batch["label"].shape == (2, 4, 5)
    widths = batch["label"][0, :, 3] - batch["label"][0, :, 1]
    assert widths.tolist() == [32, 24, 28, 20]  # in the order of the source
    assert caplog.text.count("painted 1 has 8 boxes: of an image the 4 largest are") == 1
    assert "(data.max_boxes); 3 have more" in caplog.text
    with pytest.raises(UserError, match=r"data\.max_boxes is 0; it must be at least 1"):
        DataConfig(max_boxes=0)


def test_crowds_are_left_out_of_training_alone():
    boxes = Boxes.of([[0, 0, 20, 20], [4, 4, 9, 9]], [1, 2], crowd=[True, False], area=[50, 12])
    source = Painted(label=boxes)
    label = BatchReader.of(source, Split("x", "y"), GREY)(TWO, TWO)["label"][0]
    assert label[:, 0].tolist() == [2, *[-1] * 99]
    assert len(source.boxes_of(2)) == 2 and source.boxes_of(2).area.tolist() == [50, 12]


def test_batches_depend_on_the_seed_and_the_step_alone():
    split = Split("x", "y", random_scale=(0.5, 2.0), flip=True)
    growth = Growth((16, 32), 4)
    read = BatchReader.of(Painted(), split, Preprocess((32, 32), 1), seed=1, growth=growth)
    with train_batches(read, 3, start_step=0, stop_step=4) as found:
        whole = list(found)
    assert [batch["image"].shape[1] for batch in whole] == [16, 16, 32, 32]
    assert max(batch["label"][..., 1:].max() for batch in whole[:2]) <= 16
    rows = slice(1, 3)
    with train_batches(read, 3, start_step=2, stop_step=4, rows=rows, threads=2) as found:
        for step, batch in zip((2, 3), found, strict=True):
            for key in ("image", "label", "index"):
                np.testing.assert_array_equal(batch[key], whole[step][key][rows])


def test_images_are_evaluated_whole():
    """Squashed, upright, with their own sizes; boxes are asked of the source."""
    files = Painted(image=saved(np.zeros((20, 30, 1), np.uint8), "JPEG", exif=turned(6)))
    for source, sizes in ((Painted(), list(Painted.sizes)), (files, [(30, 20)] * 5)):
        read = BatchReader.of(source, Split("x", "y"), GREY, whole_boxes=True)
        with eval_batches(read, 4) as found:
            one, two = list(found)
        assert one["label"].shape == (4, 1, 5) and (one["label"][..., 0] == -1).all()
        assert one["size"].dtype == np.int32
        assert [tuple(size) for size in (*one["size"], two["size"][0])] == sizes
        assert two["mask"].tolist() == [True, False, False, False]
        assert one["image"].shape == (4, 32, 48, 1)
    # What is found in an image is at the same place as its box, which is as large as it.
    with eval_batches(BatchReader.of(Painted(), Split("x", "y"), GREY, whole_boxes=True), 5) as got:
        batch = next(got)
    for i, (h, w) in enumerate(batch["size"]):
        scale = np.array([w / 48, h / 32] * 2)
        there = Painted().boxes_of(i).corners[0]
        assert np.abs(seen(batch["image"][i]) * scale - there).max() <= scale.max()


def test_what_is_wrong_is_one_sentence():
    boxes = Boxes.of([[0, 0, 2, 2]], [3])
    back = Boxes.of([[5, 0, 2, 2]], [0])
    nan = Boxes.of([[0, 0, np.nan, 2]], [0])
    cases = [
        ("label", boxes, "painted 2 has a box of class 3, but there are 3, 0 to 2"),
        ("label", nan, "painted 2 has a box with corners that are no numbers"),
        ("label", back, "painted 2 has a box whose corners are not x0, y0, x1, y1, the smaller"),
        ("label", 5, r"painted 2 has the label 5; expected vit_jax\.data\.boxes\.Boxes"),
        ("size", (90, 30), r"painted 2 is of 30 x 90 pixels .* of 90 x 30: EXIF turns the photogr"),
        ("size", (60, 180), "of 60 x 180: was it resized afterwards"),
    ]
    how, plain = Preprocess((6, 10), 1), Split("x", "y")
    refused(lambda k, v: BatchReader.of(Painted(**{k: v}), plain, how)(TWO, TWO), cases)
    cases = [
        (
            dict(affine=RandomAffine()),
            "data: affine is not for labels that are boxes, .*boxes move with",
        ),
        (dict(erasing=0.5), "data: erasing is not for labels that are boxes"),
        (dict(random_crop=True, crop_padding=1), "crop_padding is not for labels that are boxes"),
    ]
    refused(lambda given: BatchReader.of(Painted(), Split("x", "y", **given), how), cases)
    keep = Preprocess((6, 10), 1, aspect="keep")
    with pytest.raises(UserError, match=r"data: boxes are evaluated whole, but aspect='keep'"):
        BatchReader.of(Painted(), plain, keep, whole_boxes=True)


def test_boxes_by_other_classes():
    source = Painted()
    source.category_ids = (18, 3, 44)
    other = with_labels(source, ("c", "a", "b"))
    assert other.boxes and other.category_ids == (44, 18, 3)
    for i in range(5):
        expected = [(i % 3 + 1) % 3]
        assert other.boxes_of(i).classes.tolist() == expected
        assert other[i]["label"].classes.tolist() == expected
        np.testing.assert_array_equal(other.boxes_of(i).corners, source.boxes_of(i).corners)
    fewer = Relabelled(source, Matched(("a", "b", "c"), ("x", "y"), (1, 1, 0), ""))
    assert fewer.category_ids is None and fewer.boxes_of(1).classes.tolist() == [1]
    assert fewer.boxes_of(2).classes.tolist() == [0]


def test_a_function_of_the_user_may_give_boxes(tmp_path, monkeypatch):
    path = tmp_path / "own.py"
    path.write_text(
        "import numpy as np\n"
        "from vit_jax.data.boxes import Boxes\n"
        "class Own:\n"
        "    boxes, label_names, fingerprint = True, ('a',), 'x'\n"
        "    def __len__(self): return 3\n"
        "    def boxes_of(self, i): return Boxes.of([[0, 0, 1 + i, 2]], [0])\n"
        "    def __getitem__(self, i):\n"
        "        return {'image': np.zeros((4, 5, 1), np.uint8), 'label': self.boxes_of(i)}\n"
        "class Wrong(Own):\n"
        "    def __getitem__(self, i): return {**super().__getitem__(i), 'label': 0}\n"
        "def own(split): return Own()\n"
        "def wrong(split): return Wrong()\n"
    )
    source = pickle.loads(pickle.dumps(open_source(f"python:{path}:own", "train")))
    assert source.boxes and source.boxes_of(2).corners.tolist() == [[0, 0, 3, 2]]
    batch = BatchReader.of(source, Split("x", "y"), Preprocess((4, 5), 1))(TWO, TWO)
    assert batch["label"][0, 0].tolist() == [0, 0, 0, 3, 2]
    with pytest.raises(UserError, match=r"label is int 0; expected vit_jax\.data\.boxes\.Boxes"):
        open_source(f"python:{path}:wrong", "train")


# Scenes


def test_the_boxes_of_scenes_are_around_their_masks():
    spec = "scenes:digits,size=32,examples=30"
    masks = open_source(spec, "train")
    source = open_source(f"{spec},labels=boxes", "train")
    assert source.boxes and not source.masks and not masks.boxes
    assert source.label_names == tuple("0123456789") and source.image_size_of(3) == (32, 32)
    assert len({source.fingerprint, masks.fingerprint}) == 2
    counts = []
    for i, example in enumerate(source):
        theirs, boxes = masks[i], example["label"]
        np.testing.assert_array_equal(example["image"], theirs["image"])
        np.testing.assert_array_equal(source.boxes_of(i).corners, boxes.corners)
        counts.append(len(boxes))
        for (x0, y0, x1, y1), label, area in zip(
            boxes.corners.astype(int), boxes.classes, boxes.area, strict=True
        ):
            inside = theirs["label"][y0:y1, x0:x1] == 1 + label
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges) and inside.sum() >= area > 0
    assert 2 < np.mean(counts) <= 3
    alone, one = (open_source(f"{spec},objects=1{more}", "val") for more in ("", ",labels=boxes"))
    for i in range(5):
        rows, columns = np.nonzero(alone[i]["label"])
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert one[i]["label"].corners.tolist() == [expected]
        assert one[i]["label"].classes.tolist() == [alone[i]["label"].max() - 1]


def test_the_same_boxes_in_other_forms_are_the_same_batches(tmp_path):
    """Scenes, and their images in files with the same boxes as COCO and as YOLO have them."""
    source, entries = open_source("scenes:digits,size=32,labels=boxes,examples=6", "train"), []
    for i, example in enumerate(source):
        written(tmp_path / "images" / "train" / f"{i}.png", saved(example["image"], "PNG"))
        lines, boxes = "", example["label"]
        for label, (x0, y0, x1, y1) in zip(boxes.classes.tolist(), boxes.corners, strict=True):
            x, y, w, h = (float(each) for each in (x0, y0, x1 - x0, y1 - y0))
            lines += f"{label} {(x + w / 2) / 32} {(y + h / 2) / 32} {w / 32} {h / 32}\n"
            entries.append(dict(id=len(entries), image_id=i, category_id=90 - label))
            entries[-1]["bbox"] = [x, y, w, h]
        written(tmp_path / "labels" / "train" / f"{i}.txt", lines)
    images = [dict(id=i, file_name=f"{i}.png", height=32, width=32) for i in range(6)]
    categories = [dict(id=90 - label, name=str(label)) for label in range(10)]
    found = json.dumps(dict(images=images, annotations=entries, categories=categories))
    written(tmp_path / "annotations" / "instances_train.json", found)
    written(tmp_path / "data.yaml", f"train: images/train\nnames: {list(source.label_names)}")
    theirs = [open_source(f"{kind}:{tmp_path}", "train") for kind in ("coco", "yolo")]
    assert theirs[0].label_names == source.label_names[::-1]  # by their ids
    split, many = Split("x", "y", random_scale=(0.5, 2.0), flip=True), np.arange(12)
    ours, *batches = (
        BatchReader.of(with_labels(each, source.label_names), split, Preprocess((24, 24), 1))(
            many, many % 6
        )
        for each in (source, *theirs)
    )
    for batch in batches:
        np.testing.assert_array_equal(batch["image"], ours["image"])
        np.testing.assert_allclose(batch["label"], ours["label"], atol=1e-4)


def test_an_object_hidden_to_below_a_quarter_has_no_box():
    whose = np.full((6, 8), -1, np.int16)
    whose[0, :4], whose[2:4, 1:3], whose[5, 7] = 0, 1, 2
    found = scenes_file._visible(whose, [5, 6, 7, 8], [16, 17, 1, 3])
    assert found.classes.tolist() == [5, 7]  # a quarter is left of 0, less of 1, nothing of 3
    assert found.corners.tolist() == [[0, 0, 4, 1], [7, 5, 8, 6]] and found.area.tolist() == [4, 1]


def test_wrong_labels_of_scenes_are_named():
    cases = [
        ("digits,labels=box", r"labels is 'box'; did you mean 'boxes'\?"),
        ("digits,labels=boxes,labels=masks", "says labels twice"),
        ("digits,labels=boxes,side=3", "no option 'side'"),
    ]
    refused(lambda argument: scenes(argument, "train"), cases)
    assert scenes("digits,labels=masks,size=20", "val") == scenes("digits,size=20", "val")


# Reports


def test_a_report_counts_boxes_and_says_what_is_odd(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    corners = [[0, 0, 9, 9], [0, 0, 9, 9], [1, 1, 99, 99], [2, 2, 2.5, 9], [0, 0, 40, 40]]
    odd = Boxes.of(corners, [0, 0, 1, 1, 0], crowd=[False] * 4 + [True])
    lines = "\n".join(report({"train": Painted(label=odd)}))
    for text in (
        "classes       3 of boxes: in 0 to 5 images each",
        "boxes         25 in 5 images, up to 5 in one",
        "a: 15, b: 10, c: 0",
        "h 7 to 98, median 9; w 0 to 98, median 9",
        "around crowds, which are not learned: 5",
        "there twice, with the same class and corners: 5",
        "reaching beyond their image by more than a pixel, and cut there: 7",
        "with a side of less than a pixel: 5",
        "60% are small (below 32 x 32 pixels), 20% medium, 20% large (from 96 x 96)",
    ):
        assert text in lines, f"{text}\n{lines}"
    empty = "\n".join(report({"val": Painted(label=Boxes.of([], []))}))
    assert "0 in 0 images, up to 0 in one; images without any: 5" in empty
    assert "in boxes" in first_lines({"train": Painted()})[0]
    assert check_splits({"data.train": Painted(label=Boxes.of([[0, 0, 1, 1]], [0]))}) == []
    with pytest.raises(UserError, match="has boxes for labels, which records do not hold"):
        prepare("scenes:digits,labels=boxes,examples=3", str(tmp_path / "out"), split="train")


def test_pictures_show_the_boxes():
    source = Painted()
    read, how = default_reader(source)
    assert how == "224 x 224, upright" and not read.flip
    tiles = stored(source, [0, 1])
    assert [tile.title for tile in tiles] == ["a", "b"]
    read = dataclasses.replace(read, preprocess=Preprocess((40, 56), 1))
    (tile,) = as_read(read, [0], tiles[:1])
    colours = {tuple(each) for each in tile.image.reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), (255, 255, 255), (230, 159, 0)}
    drawn = outlined(
        np.zeros((9, 9, 3), np.uint8),
        np.array([[2, 3, 6, 8]], np.float32),
        np.full((1, 3), 7, np.uint8),
    )
    expected = np.zeros((9, 9), int)
    expected[3:8, 2:6] = 7
    expected[4:7, 3:5] = 0
    assert (drawn == expected[..., None]).all()

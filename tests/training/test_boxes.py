"""Objective detection: COCO's metrics and files, drawn boxes, and a run from end to end."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import DIGITS, TINY
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_resume import logged

from vit_jax.checkpoints.opened import read_model
from vit_jax.data.boxed import boxed
from vit_jax.data.boxes import Boxes
from vit_jax.data.detections import Detections, coco
from vit_jax.data.masks import default_palette
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation import boxes
from vit_jax.training.loop import train

NAMES = ("cat", "dog", "never")


def drawn(seed=0, images=6):
    """Boxes of two of three classes, some of crowds and of areas of their own; and found ones."""
    random, truth, found = np.random.default_rng(seed), [], []
    for _ in range(images):
        n = int(random.integers(0, 6))
        at, side = random.random((n, 2)) * 300, 4 + random.random((n, 2)) ** 3 * 200
        corners = np.concatenate([at, at + side], axis=1)
        area = side.prod(axis=1) * random.uniform(0.3, 1, n)
        truth.append(Boxes.of(corners, random.integers(0, 2, n), random.random(n) < 0.2, area))
        near = np.repeat(corners + random.normal(0, 1.5, (n, 4)), 2, axis=0)
        classes = np.where(random.random(2 * n) < 0.8, truth[-1].classes.repeat(2), 1)
        scores = random.random(2 * n).astype(np.float32)
        far = random.random((3, 2)) * 300
        near = np.concatenate([near, np.concatenate([far, far + 30], axis=1)])
        found.append(
            Detections(
                near.astype(np.float32),
                np.append(classes, [0, 1, 2]).astype(np.int32),
                np.append(scores, [0.5, 0.1, 0.2]).astype(np.float32),
            )
        )
    return truth, found


def test_metrics_are_those_of_pycocotools_on_files(tmp_path, capsys):
    """Written as COCO's JSON, read by pycocotools, and summed up by it."""
    truth, found = drawn()
    values = boxes.metrics(truth, found, NAMES)
    sizes, ids = [(500, 400)] * len(truth), (3, 7, 90)
    names = [f"{i}.jpg" for i in range(len(truth))]
    (tmp_path / "found.json").write_text(coco(names, sizes, found, NAMES, ids))
    told = json.loads((tmp_path / "found.json").read_text())
    annotations = [
        {
            "id": 100 * i + j + 1,
            "image_id": i + 1,
            "category_id": ids[each.classes[j]],
            "bbox": [*each.corners[j, :2].tolist(), *each.sides[j].tolist()],
            "area": float(each.area[j]),
            "iscrowd": int(each.crowd[j]),
        }
        for i, each in enumerate(truth)
        for j in range(len(each))
    ]
    assert {each["iscrowd"] for each in annotations} == {0, 1}
    (tmp_path / "truth.json").write_text(json.dumps({**told, "annotations": annotations}))
    capsys.readouterr()
    theirs = COCO(str(tmp_path / "truth.json"))
    run = COCOeval(theirs, theirs.loadRes(told["annotations"]), "bbox")
    run.evaluate(), run.accumulate(), run.summarize()
    for name, value in zip(boxes.METRICS, run.stats, strict=False):
        assert values[name] == pytest.approx(value, abs=1e-4), name
    assert 0.1 < values["map"] < values["ap50"] < 1
    one = COCOeval(theirs, theirs.loadRes(told["annotations"]), "bbox")
    one.params.catIds = [7]
    one.evaluate(), one.accumulate(), one.summarize()
    assert values["ap/dog"] == pytest.approx(one.stats[0], abs=1e-4)
    assert "ap/never" not in values and "ap/cat" in values
    capsys.readouterr()
    boxes.metrics(truth, found, NAMES)
    assert capsys.readouterr() == ("", "")


def test_metrics_counted_by_hand():
    """Of two cats one is found; in a crowd of dogs nothing is wrong, and nothing is missed."""
    cats = Boxes.of([[0, 0, 40, 40], [50, 0, 90, 40]], [0, 0])
    dogs = Boxes.of([[0, 0, 200, 200], [210, 0, 250, 40]], [1, 1], [True, False])
    found = [
        Detections.of(
            np.array([[0, 0, 40, 30.0], [0, 0, 0, 0]]), np.array([0, -1]), np.array([0.9, 0])
        ),
        Detections.of(
            np.array([[10, 10, 50, 50], [210, 0, 250, 40.0]]),
            np.array([1, 1]),
            np.array([0.9, 0.8]),
        ),
    ]
    assert [len(each) for each in found] == [1, 2]
    values = boxes.metrics([cats, dogs], found, NAMES)
    # The cat's box has an IoU of 3/4: it is right for the first 6 of 10. Precision is 1 up to a
    # recall of 1/2, which are 51 of the 101 places.
    cat = 51 / 101
    wanted = {"map": (0.6 * cat + 1) / 2, "ap50": (cat + 1) / 2, "ap75": (cat + 1) / 2}
    wanted |= {"ap_medium": wanted["map"], "ap/cat": 0.6 * cat, "ap/dog": 1.0}
    wanted |= dict.fromkeys(("ar10", "ar100"), (0.3 + 1) / 2)
    # One box a image: the first is in the crowd, which is one.
    wanted["ar1"] = (0.3 + 0) / 2
    assert values == pytest.approx(wanted)
    assert boxes.metrics([cats[:0]], [found[0]], NAMES) == {}
    nothing = boxes.metrics([cats], [Detections.of(*(x[:0] for x in NOTHING))], NAMES)
    assert nothing["map"] == nothing["ar100"] == 0


NOTHING = np.zeros((1, 4)), np.zeros(1, int), np.zeros(1)


def test_boxes_are_drawn_where_they_are_in_the_colours_of_their_classes():
    image = np.full((40, 60, 1), 7, np.uint8)
    corners, colours = np.array([[10, 5, 50, 35.0], [0, 0, 60, 40]]), default_palette(4)
    page = boxed(image, corners, np.array([2, 0]), ["", ""])
    assert page.shape == (320, 480, 3) and (page[100, 100] == 7).all()  # 8 times as large
    for place in ((40, 240), (279, 240), (160, 80), (160, 399)):
        assert tuple(page[place]) == colours[3], place
    for place in ((0, 240), (319, 240), (160, 0), (160, 479)):
        assert tuple(page[place]) == colours[1], place
    named = boxed(image, corners[:1], np.array([2]), ["猫 cat 0.90"])
    label = named[24:40, 80:100]  # above the box
    assert (label == colours[3]).all(axis=-1).any() and (label == 255).any()
    whole = boxed(np.zeros((600, 700, 3), np.uint8), corners[:0], np.zeros(0, int), [])
    assert whole.shape == (600, 700, 3) and not whole.any()


# A run. ------------------------------------------------------------------------------------------

SCENES = "scenes:fractals,classes=2,size=16,objects=1,examples=20,labels=boxes"
# Few locations, of maps of 8x8 and less: what the tests compile is not optimised.
FLAGS = [
    *(flag for flag in TINY if "representation" not in flag),
    *("--config.model.representation_size=None", "--config.model.image_size=16"),
    *("--config.model.patch_size=8", "--config.model.pyramid=32", "--config.model.towers=1"),
    *("--config.batch_size=16", "--config.optim.lr=0.01", "--config.optim.ema=0.5"),
    *("--config.objective=detection", "--config.data.max_boxes=3", "--config.eval.every=12"),
    *("--config.data.train.affine=None", f"--config.data.train.source={SCENES}"),
    *(f"--config.data.val.source={SCENES}", "--config.data.test=None"),
]


def config_of(*flags):
    return load_config(DIGITS, [*FLAGS, *flags])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("boxes") / "run"
    return workdir, train(config_of(), workdir)


def test_a_run_learns_and_resumes_bit_for_bit(run, tmp_path):
    workdir = run[0]
    lines = [line for line in logged(workdir) if "train/loss" in line]
    assert lines[-1]["train/loss"] < 0.8 * lines[0]["train/loss"]
    parts = ("class_loss", "box_loss", "centerness_loss")
    for line in lines:
        assert sum(line[f"train/{name}"] for name in parts) == pytest.approx(line["train/loss"])
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "24")
    train(config_of(), again)
    assert logged(again) == logged(workdir)
    jax.tree.map(np.testing.assert_array_equal, read_model(again)[1], read_model(workdir)[1])

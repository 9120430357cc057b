"""Objective detection: COCO's metrics and files, drawn boxes, and a run from end to end."""

import dataclasses
import functools
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import DIGITS, ROOT, TINY, fails
from jax import jit
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_resume import logged
from tiny_models import as_float32, random_params
from tiny_models import run as run_model

import vit_jax
from vit_jax.__main__ import main
from vit_jax.analysis import found as found_module
from vit_jax.analysis.found import write_found
from vit_jax.analysis.preflight import open_plan
from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.opened import open_model, read_model
from vit_jax.data.boxed import boxed
from vit_jax.data.boxes import Boxes
from vit_jax.data.detections import Detections, coco
from vit_jax.data.images import encode
from vit_jax.data.masks import default_palette
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.launch.page import write_report
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.training import detection
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation import boxes
from vit_jax.training.evaluation.evaluate import evaluate_run
from vit_jax.training.evaluation.evaluators import Knn
from vit_jax.training.evaluation.predict import Predictor
from vit_jax.training.loop import train
from vit_jax.training.model import model_config
from vit_jax.training.objectives import Augment
from vit_jax.training.optim import OptimConfig, make_optimizer
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import MeshConfig, make_layout, make_mesh, to_devices
from vit_jax.training.state import abstract_state, make_state
from vit_jax.training.steps import make_train_step

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


# A step. -----------------------------------------------------------------------------------------

CONFIG = ViTConfig(
    image_size=16,
    patch_size=8,
    in_channels=1,
    width=8,
    depth=1,
    mlp_dim=8,
    num_heads=1,
    num_classes=2,
    pool="locations",
    pyramid=32,
    towers=1,
)
PREPROCESS = Preprocess((16, 16), in_channels=1, mean=0.4, std=0.3)


def batch():
    """Eight images of no to three boxes, two of which must not count."""
    random = np.random.default_rng(1)
    label = np.full((8, 3, 5), -1, np.float32)
    for row in range(8):
        n = row % 4
        at = random.random((n, 2)) * 6
        label[row, :n, 0] = random.integers(0, 2, n)
        label[row, :n, 1:] = np.concatenate([at, at + 3 + random.random((n, 2)) * 7], axis=1)
    images = random.integers(0, 256, (8, 16, 16, 1), np.uint8)
    return {"image": images, "label": label, "mask": np.arange(8) % 5 != 2}


@functools.cache
def stepped(accumulate=1, **sizes):
    """The parameters and the metrics after a step of SGD."""
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: 4 if sizes else 1])
    optimizer = make_optimizer(OptimConfig(0.1, name="sgd", momentum=0.0), lambda step: 0.1)
    abstract = abstract_state(CONFIG, optimizer, ema=False, mesh=mesh)
    step = make_train_step(
        structure(CONFIG)[0],
        optimizer,
        lambda step: 0.1,
        PREPROCESS,
        num_classes=2,
        objective="detection",
        augment=Augment(),
        accumulate=accumulate,
        layout=make_layout(mesh, CONFIG.dtype),
    )
    params = as_float32(random_params(CONFIG))
    state = make_state(abstract, CONFIG, optimizer, seed=0, params=params)
    state, metrics = jit(step)(state, to_devices(batch(), 8, mesh))
    return state.params, {name: float(value) for name, value in metrics.items()}


def test_a_step_divides_by_the_locations_of_the_whole_batch():
    rows = batch()
    params = as_float32(random_params(CONFIG))
    outputs = run_model(CONFIG, params, PREPROCESS.normalise(rows["image"]))
    real = jnp.asarray(rows["label"][rows["mask"]])
    sums = detection.sums(CONFIG, outputs[rows["mask"]], real)
    count = float(detection.positives(CONFIG, real).sum())
    assert count > 6
    _, metrics = stepped()
    for name, each in sums.items():
        assert metrics[name] == pytest.approx(float(each.sum()) / count, rel=1e-4), name
    assert set(metrics) == {*sums, "grad_norm", "param_norm", "lr"}


def test_a_mesh_and_micro_batches_compute_the_same():
    params, metrics = stepped()
    ours, found = stepped(2, data=2, fsdp=2)
    assert found == pytest.approx(metrics, rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, params)


def test_half_precision_has_a_loss_in_float32():
    rows = batch()
    inputs, label = PREPROCESS.normalise(rows["image"]), jnp.asarray(rows["label"])
    losses = []
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, dtype=dtype)
        outputs = run_model(config, as_float32(random_params(CONFIG)), inputs)
        losses.append(detection.sums(config, outputs, label)["loss"])
        assert losses[-1].dtype == jnp.float32
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
    assert (losses[0] != losses[1]).any()


# A run. ------------------------------------------------------------------------------------------

SCENES = "scenes:fractals,classes=2,size=16,objects=1,examples=20,labels=boxes"
# Few locations, of maps of 8x8 and less: what the tests compile is not optimised.
FLAGS = [
    *(flag for flag in TINY if "representation" not in flag),
    *("--config.model.representation_size=None", "--config.model.image_size=16"),
    *("--config.model.patch_size=8", "--config.model.pyramid=32", "--config.model.towers=1"),
    *("--config.batch_size=16", "--config.optim.lr=0.01", "--config.optim.ema=0.5"),
    *("--config.optim.accumulate=1", "--config.eval.every=12", "--config.checkpoint.every=12"),
    *("--config.objective=detection", "--config.data.max_boxes=3"),
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


def test_evaluation_is_of_the_boxes_that_the_loaded_model_finds(run, monkeypatch):
    workdir, result = run
    source, vit = open_source(SCENES, "val"), vit_jax.load(workdir)
    assert vit.objective == "detection" and vit.labels == source.label_names
    images = [source[i]["image"] for i in range(len(source))]
    found = [vit.detect(image) for image in images[:4]] + vit.detect(images[4:])
    truth = [source.boxes_of(i) for i in range(len(source))]
    wanted = boxes.metrics(truth, found, source.label_names)
    again = evaluate_run(workdir, config_of("--config.eval.batch_size=7"))
    for results in (result, again):
        ours = {k.removeprefix("val/"): v for k, v in results.items() if k.startswith("val/")}
        assert ours == pytest.approx(wanted, abs=1e-3)
    assert {"map", "ap50", "ar100", "ap/fractal0", "ap/fractal1"} < wanted.keys()
    assert all(0 <= value <= 1 for value in wanted.values())

    # The same of many images at once; in pixels of an image of another size, which is squashed.
    large = np.repeat(np.repeat(images[0], 2, axis=0), 3, axis=1)
    batches = list(Predictor(vit, "boxes", batch_size=8, threshold=0.05)([*images[:9], large]))
    for answer, expected in zip(batches, found[:9], strict=False):
        np.testing.assert_allclose(answer.boxes.corners, expected.corners, atol=2e-3)
        np.testing.assert_array_equal(answer.boxes.classes, expected.classes)
    assert batches[9].size == (32, 48) and batches[9].pixels is None
    first, grown = found[0].corners, batches[9].boxes.corners
    assert len(first) and grown.max() > 16
    # Bilinear halving of doubled pixels is not the image itself: the best box is near it.
    np.testing.assert_allclose(grown[0], first[0] * [3, 2, 3, 2], atol=6)
    sure = vit.detect(images[0], threshold=float(found[0].scores[0]) - 1e-4)
    assert 1 <= len(sure) < len(found[0])


def test_a_damaged_image_has_no_boxes_to_find(run, monkeypatch):
    """With on_corrupt=skip it counts neither as found nor as missed."""
    source = open_source(SCENES, "val")
    kept = [source[i] for i in range(3)]
    truth = [each["label"] for each in kept]
    found = boxes.Gathered()
    rows = {"corners": np.zeros((4, 2, 4)), "classes": np.full((4, 2), -1)}
    for row in (0, 2):
        rows["corners"][row, 0] = truth[row].corners[0]
        rows["classes"][row, 0] = truth[row].classes[0]
    rows |= {"scores": np.ones((4, 2)), "mask": np.array([True, False, True, False])}
    found.add(0, rows)
    assert boxes.metrics(*found.beside(source), source.label_names)["map"] == pytest.approx(1)


def test_a_head_is_kept_by_a_run_of_the_same_classes(run, tiny_run):
    source = open_source(SCENES, "train")
    flags = [f"--config.init_from={run[0]}", "--config.model.variant=None"]
    data = TrainingData.of(source)
    assert make_plan(config_of(*flags), data, open_model(run[0])).keep_head
    other = [*flags, "--config.model.towers=2"]
    assert not make_plan(config_of(*other), data, open_model(run[0])).keep_head
    # Of another model the head is new, and its class token stays.
    flags = [f"--config.init_from={tiny_run[0]}", "--config.model.variant=None"]
    plan = make_plan(config_of(*flags), data, open_model(tiny_run[0]))
    model = plan.card.config
    assert (model.pool, model.pyramid, model.has_class_token) == ("locations", 32, True)
    assert plan.card.preprocess.exif and plan.card.preprocess.aspect == "squash"
    config = config_of(*flags, "--config.model.pyramid=None")
    assert make_plan(config, data, open_model(tiny_run[0])).card.config.pyramid == 256
    # A classifier has to pool again, and has no pyramid.
    of_images, flags = TrainingData(tuple("0123456789")), [f"--config.init_from={run[0]}"]
    with pytest.raises(UserError, match=r"'locations', a head on a pyramid.*model\.pool=gap"):
        make_plan(load_config(f"{DIGITS}:finetune", flags), of_images, open_model(run[0]))
    whole = load_config(f"{DIGITS}:finetune", [*flags, "--config.model.pool=gap"])
    model = make_plan(whole, of_images, open_model(run[0])).card.config
    assert (model.pool, model.pyramid) == ("gap", None)


def test_ids_of_categories_go_with_the_classes(run, tmp_path):
    """Under whatever order the model has them, and into its card."""
    data = TrainingData(("cat", "dog"), boxes=True, category_ids=(17, 3))
    turned = tmp_path / "classes.csv"
    turned.write_text("dog\ncat\n")
    card = make_plan(config_of(), data).card
    assert card.category_ids == (17, 3) and ModelCard.from_json(card.to_json()) == card
    card = make_plan(config_of(f"--config.data.train.classes={turned}"), data).card
    assert card.labels == ("dog", "cat") and card.category_ids == (3, 17)
    merged = tmp_path / "merged.csv"
    merged.write_text("cat,pet\ndog,pet\n")
    card = make_plan(config_of(f"--config.data.train.classes={merged}"), data).card
    assert card.labels == ("pet",) and card.category_ids is None
    for wrong in ((1,), (1, 1, 2), (1, 1), (1, "2")):
        with pytest.raises(ValueError, match="category_ids"):
            ModelCard.from_json(
                {**make_plan(config_of(), data).card.to_json(), "category_ids": wrong}
            )
    assert vit_jax.load(run[0]).category_ids is None


def test_the_batch_of_a_preflight_has_boxes():
    config = config_of("--config.data.train.source=folder:nowhere", "--config.model.num_classes=3")
    plan, source, _ = open_plan(config)
    program = make_program(plan, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert source is None and plan.card.config.num_classes == 3
    label = program.batch["label"]
    assert (label.shape, label.dtype) == ((16, 3, 5), jnp.float32)


def test_a_report_and_the_screen_have_these_metrics(run, tmp_path, monkeypatch):
    shutil.copytree(run[0], tmp_path / "run")
    monkeypatch.setattr(found_module, "DRAWN", 0.1)  # of a model that is never surer
    assert write_found(tmp_path / "run") == "pictures.png"
    page = np.asarray(PIL.Image.open(tmp_path / "run" / "pictures.png"))
    source, vit, some = open_source(SCENES, "val"), vit_jax.load(run[0]), 0
    for place, number in enumerate(np.linspace(0, len(source) - 1, 6).round().astype(int)):
        each = source[int(number)]
        boxes_of = each["label"], vit.detect(each["image"], threshold=0.1)
        assert boxes_of[0].corners.size
        for column, known in enumerate(boxes_of):
            names = [vit.labels[label] for label in known.classes]
            if column:
                names = [f"{n} {s:.2f}" for n, s in zip(names, known.scores, strict=True)]
                some += len(names)
            drawn = boxed(each["image"], known.corners, known.classes, names, least=384)
            y, x = 60 + place // 2 * 396, 12 + place % 2 * (2 * 396 + 12) + column * 396
            # A box at the edge of a pixel may be drawn on either side of it.
            assert (page[y : y + 384, x : x + 384] == drawn).mean() > 0.99
    assert some
    write_report([str(tmp_path / "run")], str(tmp_path / "report.html"))
    report = (tmp_path / "report.html").read_text()
    assert "val/map" in report and 'src="data:image/jpeg;base64,' in report
    lines = "\n".join(vit_jax.training.console.measured(run[1]))
    assert re.search(r"^val map 0\.\d+, ap50 0\.\d+, ", lines, re.M)
    assert re.search(r"^val ap fractal0 0\.\d+, fractal1 0\.\d+$", lines, re.M)


BOXES = TrainingData(("0", "1"), boxes=True)
REFUSED = [
    (["--config.augment.mixup=0.2"], BOXES, "augment.mixup mixes the labels of whole images"),
    (["--config.augment.dice=0.5"], BOXES, "augment.dice is for masks"),
    (["--config.augment.focal=2.0"], BOXES, "augment.focal is not for objective detection"),
    (["--config.eval.flip=True"], BOXES, "eval.flip averages what a model says of whole images"),
    (["--config.eval.windows=own"], BOXES, "eval.windows is own, and objective detection"),
    (["--config.objective=softmax"], BOXES, "has boxes for labels.*: set .*=detection"),
    ([], TrainingData(("0", "1")), "has no boxes, which objective detection learns"),
    ([], TrainingData(("0", "1"), masks=True), "has masks for labels, which objective detection"),
    (["--config.model.pool=gap"], BOXES, "'gap', but objective detection has a head on a pyramid"),
    (["--config.model.pyramid=24"], BOXES, "it must be 32, 64, 96"),
    (["--config.data.max_boxes=0"], BOXES, "max_boxes is 0"),
]


@pytest.mark.parametrize("flags, data, message", REFUSED, ids=str)
def test_what_does_not_go_together_is_refused(flags, data, message):
    with pytest.raises(UserError, match=message):
        make_plan(config_of(*flags), data)


def test_a_metric_that_boxes_do_not_have_is_refused_at_the_beginning(tmp_path):
    for metric in ("val/loss", "val/accuracy", "val/ap/cat"):
        with pytest.raises(UserError, match=rf"{metric}, but val has map, .*fractal1\nwhile read"):
            train(config_of(f"--config.checkpoint.best={metric}"), tmp_path / "run")


def test_other_objectives_start_from_a_detector(run):
    """Its pyramid and its head are left behind."""
    card = ModelCard.read(run[0])
    config = dataclasses.replace(config_of(), objective="masked_colour", model={})
    with pytest.raises(UserError, match=r"masked_colour has no place for: set .*pool=gap"):
        model_config(config, card.config, 0)
    for objective, classes in (("masked_colour", 0), ("softmax", 3)):
        other = dataclasses.replace(config, objective=objective, model={"pool": "gap"})
        found = model_config(other, card.config, classes)
        assert (found.pool, found.pyramid, found.num_classes) == ("gap", None, classes)


def test_other_models_and_labels_are_refused(run, tiny_run, tmp_path, monkeypatch):
    config = dataclasses.replace(config_of(), model={"variant": "R50x1"})
    with pytest.raises(UserError, match=r"a head on a pyramid .*the model is a ResNet: take a ViT"):
        model_config(config, None, 3)
    with pytest.raises(UserError, match="is of the classes of boxes, and this model's objective"):
        evaluate_run(tiny_run[0], config_of())
    with pytest.raises(UserError, match="is of the classes of whole images, and this model's"):
        evaluate_run(run[0], load_config(DIGITS))
    with pytest.raises(UserError, match=r"predict --out=FOLDER` writes boxes"):
        evaluate_run(run[0], config_of(), needed_by="--predictions")
    near = Knn(train=config_of().data.train, test=config_of().data.val, type="knn")
    few = dataclasses.replace(config_of().eval, evaluators={"near": near})
    with pytest.raises(UserError, match=r"eval\.evaluators\.near: .* no features of whole images"):
        evaluate_run(run[0], dataclasses.replace(config_of(), eval=few))
    whole = load_config(DIGITS, [f"--config.data.val.source={SCENES}"])
    with pytest.raises(UserError, match="has boxes for labels, which objective detection reads"):
        evaluate_run(tiny_run[0], whole)
    plain = config_of("--config.data.val.source=digits")
    with pytest.raises(UserError, match="has no boxes, which detection needs: name a source"):
        evaluate_run(run[0], plain)
    file, image = tmp_path / "none.json", np.zeros((16, 16, 1), np.uint8)
    (tmp_path / "1.png").write_bytes(encode(image))
    found = dict(images=[dict(id=1, file_name="1.png")], annotations=[])
    file.write_text(json.dumps({**found, "categories": [dict(id=1, name="fractal0")]}))
    flags = f"--config.data.val.source=coco:{file}", "--config.data.val.split=all"
    with pytest.raises(UserError, match=r"data\.val: coco:.* all: no image has a box to compare"):
        evaluate_run(run[0], config_of(*flags))
    vit = vit_jax.load(run[0])
    other = dataclasses.replace(vit, objective="softmax")
    for ask in (lambda: other.detect(image), lambda: Predictor(other, "boxes")):
        with pytest.raises(UserError, match="boxes: they are of models trained with objective det"):
            ask()
    for threshold in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match="threshold is"):
            vit.detect(image, threshold)
    with pytest.raises(UserError, match="gives boxes, not a class for each image"):
        vit.predict(image)
    # At the beginning of a run, before anything is compiled.
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(UserError, match=r"measured by pycocotools: .*install.*\[detection\]"):
        train(config_of(), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


# The command. ------------------------------------------------------------------------------------

SIZES = [(40, 33), (16, 16), (7, 90)]


def test_a_coco_file_and_overlays(run, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        file = tmp_path / "pets" / ("dogs" if i > 1 else "") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(random.integers(0, 256, (*size, 1), np.uint8)))
    (tmp_path / "pets" / "broken.jpg").write_bytes(b"\xff\xd8\xff damaged")
    caplog.set_level("INFO", "vit_jax")
    command = ["predict", f"--model={run[0]}", "--batch-size=8", "pets"]
    assert main([*command, "--out=out", "--overlay"]) == 3  # one cannot be read
    told = re.search(r"out/boxes.json: (\d+) boxes with a score of at least 0.05", caplog.text)
    assert told and "those of 0.5 and above are drawn" in caplog.text
    out = tmp_path / "out"
    assert sorted(str(each.relative_to(out)) for each in out.rglob("*.*")) == [
        *("0.overlay.png", "1.overlay.png", "boxes.json", "dogs/2.overlay.png"),
    ]
    found = json.loads((out / "boxes.json").read_text())
    assert found["categories"] == [{"id": 1, "name": "fractal0"}, {"id": 2, "name": "fractal1"}]
    assert [tuple(each.values()) for each in found["images"]] == [
        *((1, "0.png", 40, 33), (2, "1.png", 16, 16), (3, "dogs/2.png", 7, 90)),
    ]
    assert len(found["annotations"]) == int(told[1]) > 0
    vit = vit_jax.load(run[0])
    for number, name in enumerate(("0.png", "1.png", "dogs/2.png"), 1):
        each, rows = vit.detect(f"pets/{name}"), []
        for row in found["annotations"]:
            if row["image_id"] == number:
                x, y, w, h = row["bbox"]
                rows.append([x, y, x + w, y + h, row["score"], row["category_id"] - 1])
        ours = np.column_stack([each.corners, each.scores, each.classes])
        np.testing.assert_allclose(np.array(rows).reshape(-1, 6), ours, atol=5e-3)
        h, w = SIZES[number - 1]
        assert (ours[:, :4] >= 0).all() and (ours[:, :4] <= [w, h, w, h]).all()
    # It is a COCO file of boxes, which can be read as labels.
    source = open_source("coco:out/boxes.json,images=pets", "all")
    assert len(source.boxes_of(2)) == len(vit.detect("pets/dogs/2.png"))

    def refused(message, *argv):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        assert re.search(message, fails(capsys, *argv))
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

    refused("out/boxes.json is there already, and nothing is overwritten", *command, "--out=out")
    refused("--topk=2 names classes of images, and boxes", *command, "--topk=2", "--out=new")
    refused("--windows=own is for masks", *command, "--windows=own", "--out=new")
    (tmp_path / "more").mkdir()
    shutil.copy("pets/0.png", "more/0.png")
    refused("more/0.png and pets/0.png would both be 0.png", *command, "more", "--out=new")
    refused("threshold is 1; expected a score", *command, "--threshold=1", "--out=new")
    refused("gives boxes, not a class for each image", *command)
    refused("gives boxes, not a class for each image", *command, "--out=new.csv")
    refused("--threshold=0.5 is for boxes", *command, "--threshold=0.5", "--out=new.csv")
    assert main([*command[:-1], "pets/1.png", "--threshold=0.9999", "--out=few"]) == 0
    assert json.loads((tmp_path / "few" / "boxes.json").read_text())["annotations"] == []
    assert main(["inspect", str(run[0])]) == 0
    assert "outputs:        boxes, their classes and scores" in capsys.readouterr().out


def test_the_recipe_is_of_scenes_or_of_a_source_and_a_model():
    spec = f"{ROOT}/configs/detect.py"
    small = load_config(spec)
    assert small.detects and "labels=boxes" in small.data.train.source
    config = load_config(f"{spec}:B/16,scenes:fractals,size=64,labels=boxes,TRAIN,VAL")
    assert config.data.val.source == "scenes:fractals,size=64,labels=boxes"
    assert config.data.val.split == "VAL"
    assert config.model == {"variant": "B/16", "image_size": (512, 512)}

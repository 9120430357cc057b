"""Objective segmentation: losses and metrics of pixels against loops, and a run from end to end."""

import base64
import dataclasses
import functools
import io
import itertools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import DIGITS, ROOT, TINY
from jax import jit
from test_resume import logged
from tiny_models import as_float32, random_params
from tiny_models import run as run_model

import vit_jax
from vit_jax.analysis.found import write_found
from vit_jax.analysis.preflight import open_plan
from vit_jax.checkpoints.fit import place
from vit_jax.checkpoints.opened import open_model, read_model
from vit_jax.data.config import Split
from vit_jax.data.images import BadImage
from vit_jax.data.masks import default_palette
from vit_jax.data.pipeline import BatchReader, eval_batches
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.launch.page import write_report
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.dense import stretched
from vit_jax.training import segmentation
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation import masks, windows
from vit_jax.training.evaluation.evaluate import evaluate_run
from vit_jax.training.evaluation.evaluators import Knn
from vit_jax.training.loop import train
from vit_jax.training.model import model_config
from vit_jax.training.objectives import Augment
from vit_jax.training.optim import OptimConfig, make_optimizer
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import MeshConfig, make_layout, make_mesh, to_devices
from vit_jax.training.state import abstract_state, make_state
from vit_jax.training.steps import make_train_step

K = 3


def bilinear(x, size):
    """[gh gw k] -> [h w k]: linear between the patches' centres, along one axis and the other."""
    for axis, new in enumerate(size):
        old = x.shape[axis]
        centres = [(np.arange(n) + 0.5) / n for n in (new, old)]
        x = np.apply_along_axis(lambda row, at=centres: np.interp(*at, row), axis, x)
    return x


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def drawn(seed=0, b=4, grid=(2, 3), size=(8, 12)):
    """Random logits, and masks in which some pixels do not count, of the last image none."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(b, *grid, K)).astype(np.float32)
    labels = random.integers(0, K, (b, *size)).astype(np.uint8)
    labels[random.random(labels.shape) < 0.3] = 255
    labels[-1] = 255
    return logits, labels


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (1, 2)])
def test_logits_are_interpolated_between_centres(size):
    logits, _ = drawn()
    wanted = np.stack([bilinear(each, size) for each in logits.astype(np.float64)])
    found = jit(functools.partial(stretched, size=size))(logits)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    # The same in the corner of more, where every image has a size of its own.
    own = np.array([size, (3, 4), (9, 1), (2, 9)])
    found = jit(functools.partial(stretched, size=(9, 13)))(logits, own=own)
    for each, x, (h, w) in zip(found, logits, own.tolist(), strict=True):
        np.testing.assert_allclose(each[:h, :w], bilinear(x, (h, w)), atol=1e-5)


@pytest.mark.parametrize(
    "how", [{}, dict(dice=0.5), dict(smoothing=0.1, weights=(1.0, 2.0, 0.5), focal=1.5)], ids=str
)
def test_losses_are_sums_over_the_pixels_that_count(how):
    logits, labels = drawn()
    found = jit(functools.partial(segmentation.sums, **how))(logits, labels)
    for i, (x, y) in enumerate(zip(logits.astype(np.float64), labels, strict=True)):
        x, there = bilinear(x, y.shape), y != 255
        x, y = x[there], y[there]
        targets = np.eye(K)[y] * (1 - how.get("smoothing", 0)) + how.get("smoothing", 0) / K
        p, dice = np.exp(log_softmax(x)), 0.0
        losses = -targets * log_softmax(x) * (1 - p) ** how.get("focal", 0)
        losses = losses * np.array(how.get("weights", np.ones(K)))
        if len(y) and "dice" in how:
            shares = [
                2 * p[y == c, c].sum() / (p[:, c].sum() + (y == c).sum()) for c in np.unique(y)
            ]
            dice = len(y) * (1 - np.mean(shares))
            assert found["dice"][i] == pytest.approx(dice, rel=1e-5)
        assert found["loss"][i] == pytest.approx(losses.sum() + 0.5 * dice, rel=1e-5)
        assert found["pixel_accuracy"][i] == (x.argmax(axis=1) == y).sum()
    assert ("dice" in found) == ("dice" in how)


def test_dice_is_nothing_where_the_masks_are_found():
    _, labels = drawn()
    labels = jnp.asarray(labels)
    sure = 50.0 * jax.nn.one_hot(labels, K)
    np.testing.assert_allclose(segmentation.soft_dice(sure, labels), 0, atol=1e-6)
    wrong = 50.0 * jax.nn.one_hot((labels.astype(int) + 1) % K, K)
    np.testing.assert_allclose(segmentation.soft_dice(wrong, labels), [1, 1, 1, 0], atol=1e-6)
    gradient = jax.grad(lambda x: segmentation.soft_dice(x, labels).sum())(sure)
    assert np.isfinite(gradient).all()


CONFIG = ViTConfig(
    image_size=(8, 12),
    patch_size=(4, 4),
    in_channels=2,
    width=16,
    depth=2,
    mlp_dim=32,
    num_heads=2,
    num_classes=K,
    pool="none",
    pyramid=8,
    class_token=True,
)
PREPROCESS = Preprocess((8, 12), in_channels=2, mean=0.4, std=0.3)
BATCH = 16


def batch():
    """Eleven images, each with another share of pixels that count, and five that must not."""
    random = np.random.default_rng(1)
    labels = random.integers(0, K, (BATCH, 8, 12)).astype(np.uint8)
    labels[random.random(labels.shape) < np.linspace(0, 1, BATCH)[:, None, None]] = 255
    return {
        "image": random.integers(0, 256, (BATCH, 8, 12, 2), np.uint8),
        "label": labels,
        "mask": random.permutation(BATCH) < 11,
    }


@functools.cache
def stepped(accumulate=1, dtype="float32", **sizes):
    """The parameters and the metrics after a step of SGD."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    mesh = make_mesh(MeshConfig(**sizes), None if sizes else jax.devices()[:1])
    optimizer = make_optimizer(OptimConfig(0.1, name="sgd", momentum=0.0), lambda step: 0.1)
    abstract = abstract_state(config, optimizer, ema=False, mesh=mesh)
    step = make_train_step(
        structure(config)[0],
        optimizer,
        lambda step: 0.1,
        PREPROCESS,
        num_classes=K,
        objective="segmentation",
        augment=Augment(dice=0.5),
        accumulate=accumulate,
        layout=make_layout(mesh, config.dtype),
    )
    params = as_float32(random_params(CONFIG))
    state = make_state(abstract, config, optimizer, seed=0, params=params)
    state, metrics = jit(step)(state, to_devices(batch(), BATCH, mesh))
    return state.params, {name: float(value) for name, value in metrics.items()}


def test_a_step_divides_by_the_pixels_of_the_whole_batch():
    rows = batch()
    logits = run_model(
        CONFIG, as_float32(random_params(CONFIG)), PREPROCESS.normalise(rows["image"])
    )
    real = rows["label"][rows["mask"]]
    sums = segmentation.sums(logits[rows["mask"]], jnp.asarray(real), dice=0.5)
    total, hits = (float(sums[name].sum()) for name in ("loss", "pixel_accuracy"))
    pixels = (real != 255).sum()
    _, metrics = stepped()
    assert metrics["loss"] == pytest.approx(total / pixels, rel=1e-5)
    assert metrics["pixel_accuracy"] == pytest.approx(hits / pixels, rel=1e-6)
    assert set(metrics) == {
        *("loss", "pixel_accuracy", "dice", "grad_norm", "param_norm", "lr"),
    }


@pytest.mark.parametrize("accumulate, sizes", [(4, dict(data=2, fsdp=2, tensor=2))], ids=str)
def test_a_mesh_and_micro_batches_compute_the_same(accumulate, sizes):
    params, metrics = stepped()
    ours, found = stepped(accumulate, **sizes)
    assert found == pytest.approx(metrics, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, params)


def test_half_precision_has_a_loss_in_float32():
    (_, exact), (_, half) = stepped(), stepped(dtype="bfloat16")
    assert half["loss"] == pytest.approx(exact["loss"], rel=0.02) and half["loss"] != exact["loss"]


def test_metrics_are_of_all_pixels_that_count():
    logits, labels = drawn(size=(256, 5))  # in two strips
    own = np.array([(256, 5), (130, 4), (7, 5), (1, 1)], np.int32)
    for each, (h, w) in zip(labels, own, strict=True):
        each[h:], each[:, w:] = 255, 255
    confusion, loss = np.zeros((K, K), int), 0.0
    for x, y, (h, w) in zip(logits, labels, own, strict=True):
        x, y = log_softmax(bilinear(x, (h, w))), y[:h, :w]
        for truth, row in zip(y[y != 255], x[y != 255], strict=True):
            confusion[truth, row.argmax()] += 1
            loss -= row[truth]
    sums = jit(masks.pixel_sums)(logits, labels, own)
    np.testing.assert_array_equal(sums["confusion"], confusion)
    assert sums["loss"] == pytest.approx(loss, rel=1e-5)

    names = ("a", "b", "c", "never")
    confusion = np.pad(confusion, (0, 1))
    found = masks.metrics(*masks.added([{"confusion": confusion, "loss": loss}] * 2), names)
    right, all_ = np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)
    iou = {f"iou/{n}": right[i] / (all_[i] - right[i]) for i, n in enumerate(names[:3])}
    wanted = {"miou": np.mean(list(iou.values())), "loss": loss / confusion.sum(), **iou}
    wanted["pixel_accuracy"] = right.sum() / confusion.sum()
    assert found == pytest.approx(wanted)


def patch_logits(images):
    """[b 4 6 2] -> [b 2 2 K]: of patches of 2x3 pixels, not linear in them."""
    means = images.reshape(-1, 2, 2, 2, 3, 2).astype(jnp.float32).mean(axis=(2, 4))
    return jnp.sin(means @ np.array([[1.0, 2.0, 3.0], [0.5, -1.0, 0.2]], np.float32))


@pytest.mark.parametrize("stride", [0.5, 0.7, 1.0])
def test_windows_are_averaged_up_to_the_border(stride):
    """As by mmsegmentation: the last window of a row ends with the image."""
    own, window = np.array([(4, 6), (9, 6), (7, 17), (11, 13)], np.int32), (4, 6)
    images = np.random.default_rng(0).integers(0, 9, (4, 12, 17, 2)).astype(np.uint8)
    run = functools.partial(windows.averaged, patch_logits, window=window, stride=stride)
    found = jit(run)(images, own=own)
    for each, image, (h, w) in zip(found, images, own.tolist(), strict=True):
        sums, counts = np.zeros((h, w, K)), np.zeros((h, w, 1))
        tops, lefts = (
            range(0, max(side - box, 0) + step, step)
            for side, box, step in zip(
                (h, w), window, windows.step_sizes(window, stride), strict=True
            )
        )
        for top, left in itertools.product(tops, lefts):
            top, left = min(top, h - 4), min(left, w - 6)
            here = np.s_[top : top + 4, left : left + 6]
            logits = np.asarray(patch_logits(image[here][None]))[0]
            sums[here] += bilinear(logits, window)
            counts[here] += 1
        assert counts.min() >= 1
        np.testing.assert_allclose(each[:h, :w], sums / counts, atol=1e-5)


def test_images_for_windows_cover_the_model_in_their_own_shape():
    how = Preprocess((16, 24), 1)
    sizes = [(16, 24), (32, 24), (8, 100), (50, 60)]
    assert [how.covering(*size, own=False) for size in sizes] == [
        *((16, 24), (32, 24), (16, 200), (20, 24)),
    ]
    assert [how.covering(*size, own=True) for size in sizes] == [
        *((16, 24), (32, 24), (16, 200), (50, 60)),
    ]

    @dataclasses.dataclass
    class Source:
        label_names, masks, fingerprint = ("a", "b"), True, ""

        def __len__(self):
            return len(sizes)

        def __getitem__(self, index):
            mask = np.full(sizes[index], index % 2, np.uint8)
            return {"image": 200 * mask[..., None] + 20, "label": mask}

    split = Split("x", "y")
    read = BatchReader.of(Source(), split, how, whole_masks=True, windows="scaled")
    with eval_batches(read, 5, rows=slice(1, 5)) as batches:
        found = next(batches)
    assert found["image"].shape == (4, 32, 256, 1) and found["label"].shape == (4, 64, 128)
    assert found["scaled"].tolist() == [[32, 24], [16, 200], [20, 24], [16, 24]]
    assert found["size"].tolist() == [[32, 24], [8, 100], [50, 60], [1, 1]]
    for image, (h, w), value in zip(
        found["image"], found["scaled"], (220, 20, 220, 0), strict=True
    ):
        assert (image[:h, :w] == value).all() and image.sum(dtype=int) == value * h * w


SCENES = "scenes:digits,size=16,examples=50"
FLAGS = [
    *(flag for flag in TINY if "representation" not in flag),
    *("--config.model.representation_size=None", "--config.model.image_size=16"),
    *("--config.objective=segmentation", "--config.augment.dice=0.5"),
    *("--config.data.train.affine=None", f"--config.data.train.source={SCENES}"),
    *(f"--config.data.val.source={SCENES}", "--config.data.test=None"),
]


def config_of(*flags):
    return load_config(DIGITS, [*FLAGS, *flags])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("masks") / "run"
    return workdir, train(config_of(), workdir)


def test_a_run_learns_and_resumes_bit_for_bit(run, tmp_path):
    workdir = run[0]
    losses = [line["val/loss"] for line in logged(workdir) if "val/loss" in line]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "24")
    train(config_of(), again)
    assert logged(again) == logged(workdir)
    jax.tree.map(np.testing.assert_array_equal, read_model(again)[1], read_model(workdir)[1])


def test_evaluation_is_of_the_loaded_model_over_all_pixels(run):
    workdir, result = run
    again = evaluate_run(workdir, config_of("--config.eval.batch_size=56"))
    slid = evaluate_run(workdir, config_of("--config.eval.windows=scaled"))  # one window each
    source, vit = open_source(SCENES, "val"), vit_jax.load(workdir)
    assert vit.objective == "segmentation" and vit.labels == source.label_names
    images = jnp.stack([vit.preprocess(source[i]["image"]) for i in range(len(source))])
    logits = np.asarray(jit(vit.model)(images), np.float64)
    labels = np.stack([source[i]["label"] for i in range(len(source))])
    log_p = log_softmax(np.stack([bilinear(each, (16, 16)) for each in logits]))
    found = log_p.argmax(axis=-1)
    wanted = {"pixel_accuracy": (found == labels).mean()}
    wanted["loss"] = -np.take_along_axis(log_p, labels[..., None].astype(int), axis=-1).mean()
    for c, name in enumerate(source.label_names):
        both, either = (found == c) & (labels == c), (found == c) | (labels == c)
        wanted[f"iou/{name}"] = both.sum() / either.sum()
    wanted["miou"] = np.mean([wanted[f"iou/{name}"] for name in source.label_names])
    for results in (result, again, slid):
        ours = {k.removeprefix("val/"): v for k, v in results.items() if k.startswith("val/")}
        assert ours == pytest.approx(wanted, abs=2e-4)


def test_any_model_is_a_start_and_keeps_its_class_token(run, tiny_run, tmp_path):
    opened = open_model(tiny_run[0])
    flags = [f"--config.init_from={tiny_run[0]}", "--config.model.variant=None"]
    source = open_source(SCENES, "train")
    plan = make_plan(config_of(*flags), TrainingData.of(source), opened)
    model = plan.card.config
    assert (model.pool, model.has_class_token, model.grid) == ("none", True, (8, 8))
    assert model.representation_size is None and plan.card.labels == source.label_names
    lines = place(opened, model, head="fresh")[1]
    status = {line.name: line.status for line in lines}
    assert status["head/kernel"] == "fresh" and status["cls_token"] == "kept"
    assert "4x4 -> 8x8" in status["pos_embed"]

    # Colours go with the classes, under whatever names the model has them.
    named = dataclasses.replace(
        TrainingData.of(source), palette=tuple((i, 0, 0) for i in range(11))
    )
    turned = tmp_path / "classes.csv"
    turned.write_text("".join(f"{name}\n" for name in reversed(source.label_names)))
    again = make_plan(config_of(*flags, f"--config.data.train.classes={turned}"), named, opened)
    assert again.card.labels == source.label_names[::-1]
    assert again.card.palette == tuple((i, 0, 0) for i in reversed(range(11)))
    assert plan.card.palette is None

    # A run of the same classes goes on with its head; a classifier has to pool again.
    begun = open_model(run[0])
    flags = [f"--config.init_from={run[0]}", "--config.model.variant=None"]
    assert make_plan(config_of(*flags), TrainingData.of(source), begun).keep_head
    of_images = TrainingData(tuple("0123456789"))
    whole = load_config(f"{DIGITS}:finetune", flags[:1])
    with pytest.raises(UserError, match=r"'none', a head on each patch.*model\.pool=gap"):
        make_plan(whole, of_images, begun)
    whole = load_config(f"{DIGITS}:finetune", [flags[0], "--config.model.pool=gap"])
    assert make_plan(whole, of_images, begun).card.config.pool == "gap"


def test_the_batch_of_a_preflight_has_masks():
    config = config_of("--config.data.train.source=folder:nowhere", "--config.model.num_classes=3")
    plan, source, _ = open_plan(config)
    program = make_program(plan, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert source is None and plan.card.config.num_classes == 3
    label = program.batch["label"]
    assert (label.shape, label.dtype) == ((32, 16, 16), jnp.uint8)


def test_a_report_has_these_metrics_and_what_is_found(run, tmp_path, monkeypatch, caplog):
    shutil.copytree(run[0], tmp_path / "run")
    assert write_found(tmp_path / "run") == "pictures.png"
    source, vit = open_source(SCENES, "val"), vit_jax.load(run[0])
    page = np.asarray(PIL.Image.open(tmp_path / "run" / "pictures.png"))
    palette = np.array(vit.palette or default_palette(11), np.uint8)
    numbers = np.linspace(0, len(source) - 1, 6).round().astype(int).tolist()
    shown = [source[i] for i in numbers]
    for at, each in enumerate(shown):
        masks = palette[each["label"]], palette[vit.segment(each["image"])]
        panels = np.broadcast_to(each["image"], (16, 16, 3)), *masks
        for column, panel in enumerate(panels):  # 24 times as large, two images in a row
            y, x = 60 + at // 2 * 396, 12 + at % 2 * (3 * 396 + 12) + column * 396
            np.testing.assert_array_equal(page[y : y + 384, x : x + 384][12::24, ::24], panel)
    told = write_report([str(tmp_path / "run")], str(tmp_path / "report.html"))
    report = (tmp_path / "report.html").read_text()
    assert "miou" in report and "; img-src data:" in report
    assert f"- run: {tmp_path}/run/pictures.png" in told.replace("\\", "")
    jpeg = base64.b64decode(re.search(r'src="data:image/jpeg;base64,([^"]+)"', report)[1])
    small = np.asarray(PIL.Image.open(io.BytesIO(jpeg)).resize(page.shape[1::-1]), int)
    assert small.shape == page.shape and np.abs(small - page).mean() < 8

    # What cannot be read is passed over; and where nothing can be drawn, that is all that is said.
    def damaged(self, index):
        if index == numbers[0]:
            raise BadImage("it is cut off")
        return shown[numbers.index(index)] | ({"image": b""} if index == numbers[2] else {})

    monkeypatch.setattr(type(source), "__getitem__", damaged)
    write_found(tmp_path / "run")
    less = np.asarray(PIL.Image.open(tmp_path / "run" / "pictures.png"))
    np.testing.assert_array_equal(less[60:444, 12:1188], page[60:444, 1212:2388])
    np.testing.assert_array_equal(less[60:444, 1212:2388], page[456:840, 1212:2388])
    assert less.shape[1] == page.shape[1] and not caplog.messages
    (tmp_path / "run" / "data.json").write_text("{")
    assert write_found(tmp_path / "run") is None and len(caplog.messages) == 1
    assert re.search(
        "pictures.png is not drawn: .*data.json is damaged", caplog.text.split("  ")[-1]
    )
    (tmp_path / "run" / "pictures.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write_report([str(tmp_path / "run")], str(tmp_path / "report.html"))
    assert "pictures.png is not on the page" in caplog.text
    assert "data:" not in (tmp_path / "report.html").read_text()


MASKS = TrainingData(("0", "1"), masks=True)
REFUSED = [
    (["--config.augment.mixup=0.2"], MASKS, "augment.mixup mixes the labels of whole images"),
    (["--config.eval.flip=True"], MASKS, "eval.flip averages what a model says of whole images"),
    (["--config.objective=softmax"], MASKS, "augment.dice is for masks"),
    (
        ["--config.objective=softmax", "--config.augment.dice=0"],
        MASKS,
        "has masks for labels, which objective softmax does not learn: set .*=segmentation",
    ),
    ([], TrainingData(("0", "1")), "has no masks, which objective segmentation learns"),
    ([], TrainingData(tuple(map(str, range(256))), masks=True), "256 classes, and masks tell"),
    (
        ["--config.objective=softmax", "--config.eval.windows=own"],
        MASKS,
        "eval.windows is own, and objective softmax is of whole images",
    ),
    (["--config.eval.stride=0"], MASKS, "eval.stride is 0.0; expected a number in"),
    (["--config.model.pool=gap"], MASKS, "'gap', but objective segmentation has a head on each"),
    (["--config.model.representation_size=8"], MASKS, "has a linear head on the patches"),
    (["--config.augment.class_weights=inverse"], MASKS, "give a number for each class"),
]


@pytest.mark.parametrize("flags, data, message", REFUSED, ids=str)
def test_what_does_not_go_together_is_refused(flags, data, message):
    with pytest.raises(UserError, match=message):
        assert make_plan(config_of(*flags), data).class_weights


def test_no_resnet_and_no_other_model_is_evaluated(run, tiny_run):
    config = dataclasses.replace(config_of(), model={"variant": "R50x1"})
    with pytest.raises(UserError, match="the model is a ResNet: take a ViT"):
        model_config(config, None, 3)
    with pytest.raises(UserError, match="is of the classes of pixels, and this model's objective"):
        evaluate_run(tiny_run[0], config_of())
    with pytest.raises(
        UserError, match="--pictures is of images that are classified, and objective"
    ):
        evaluate_run(run[0], config_of(), needed_by="--pictures")
    near = Knn(train=config_of().data.train, test=config_of().data.val, type="knn")
    few = dataclasses.replace(config_of().eval, evaluators={"near": near})
    with pytest.raises(UserError, match=r"eval\.evaluators\.near: .* no features of whole images"):
        evaluate_run(run[0], dataclasses.replace(config_of(), eval=few))
    with pytest.raises(UserError, match=r"predict --out=FOLDER` writes masks"):
        evaluate_run(run[0], config_of(), needed_by="--predictions")
    with pytest.raises(UserError, match="is of the classes of whole images, and this model's"):
        evaluate_run(run[0], load_config(DIGITS))


def test_the_recipe_is_of_scenes_or_of_a_source_and_a_model():
    spec = f"{ROOT}/configs/segment.py"
    assert load_config(spec).model["image_size"] == (48, 48)
    config = load_config(f"{spec}:B/16,scenes:fractals,size=64,TRAIN,VAL")
    assert config.data.val.source == "scenes:fractals,size=64" and config.data.val.split == "VAL"
    assert config.model == {"variant": "B/16", "image_size": (512, 512)}

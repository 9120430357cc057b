"""Training, evaluation and prediction on images of any shape, against each image by itself."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
from conftest import fails, write_config
from flax import nnx
from tiny_models import as_float32, random_params, relative_error

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.opened import open_model
from vit_jax.checkpoints.store import Store
from vit_jax.data.transforms import Preprocess
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.native import packed as packed_images
from vit_jax.training.config_file import load_config
from vit_jax.training.distill import DistillConfig, Teacher
from vit_jax.training.loop import train
from vit_jax.training.steps import class_loss

SIZES = ((30, 12), (12, 33), (20, 20), (9, 50), (64, 16), (14, 15))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of pictures of different shapes."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, size in enumerate(SIZES * 3):
        path = root / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    model = dict(variant="Ti/16", width=16, depth=2, mlp_dim=32, num_heads=2, image_size=16)
    model |= dict(patch_size=4, max_patches=20, pool="gap", dropout=0.1)
    split = dict(source=f"folder:{folder}", split="all")
    crop = dict(inception_crop=dict(area=(0.3, 1.0)), flip=True)
    return write_config(
        tmp_path_factory.mktemp("config") / "native.py",
        f"model={model}, data=dict(train={split | crop}, val={split}, same_images=True), "
        "batch_size=8, total_steps=4, optim=dict(lr=1e-2), checkpoint=dict(every=2), "
        "eval=dict(every=2, batch_size=16), mesh=dict(fsdp=2, tensor=2)",
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A finished run on eight devices, which split images, parameters and heads."""
    workdir = tmp_path_factory.mktemp("run") / "native"
    return workdir, train(load_config(config), workdir)


def test_a_step_is_as_of_each_image_by_itself():
    """The loss and the gradient of a padded batch: the means of those of its images, unpadded."""
    sizes = dict(image_size=(16, 24), patch_size=4, width=16, depth=1, mlp_dim=24, num_heads=2)
    sizes |= dict(num_classes=3, pool="map", registers=1, max_patches=26)
    whole = ViTConfig(**sizes, native_resize="bicubic_antialias_aspect")
    params = jax.tree.map(jnp.asarray, as_float32(random_params(whole)))
    random, shapes = np.random.default_rng(0), ((2, 6), (5, 4))

    def gradients(config, batch):
        preprocess = Preprocess(
            config.image_size, max_patches=config.max_patches, patch_size=config.patch_size
        )
        batch = jax.tree.map(jnp.asarray, batch)
        loss_of = class_loss(structure(config)[0], preprocess, "softmax", 3, 0.1, None)
        weight = jnp.float32(max(int(batch["mask"].sum()), 1))
        with jax.default_matmul_precision("highest"):
            step = jax.jit(jax.value_and_grad(lambda p: loss_of(p, batch, None, weight)[0]))
            return step(params)

    batch = {
        "image": random.integers(0, 256, (3, 26, 48), np.uint8),  # padding is not black
        "grid": np.array([*shapes, (1, 1)], np.int32),
        "label": np.array([0, 2, 1], np.int32),
        "mask": np.array([True, True, False]),
    }
    loss, found = gradients(whole, batch)
    losses, grads = [], []
    for row, (h, w) in enumerate(shapes):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        one["image"] = one["image"][:, : h * w]
        alone = gradients(dataclasses.replace(whole, max_patches=h * w), one)
        losses.append(alone[0])
        grads.append(alone[1])
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-6)
    wanted = jax.tree.map(lambda *each: np.mean(np.float64(each), axis=0), *grads)
    for got, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.abs(got - right).max() < 2e-5 * max(np.abs(right).max(), 0.05)
    assert np.abs(wanted["pos_embed"]).max() > 1e-3


def test_a_resumed_run_ends_bit_identical(run, config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    assert train(load_config(config), workdir).keys() == run[1].keys()
    shapes = {"params": structure(vit_jax.load(workdir).config)[1]}
    one, other = (Store(each).restore(4, shapes) for each in (workdir, run[0]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), one, other)


def logits_of(model, paths):
    """Without the padding of batches: all at once."""
    packed = packed_images([model.preprocess(path) for path in paths], model.config)
    graphdef, params = nnx.split(model.model)
    return np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, packed))


def test_evaluation_and_prediction(run, folder, capsys):
    """18 images in batches of 16: the last one has padding in its rows, too."""
    workdir, results = run
    model = vit_jax.load(workdir)
    paths = sorted(folder.glob("*/*.png"))
    logits = logits_of(model, paths)
    labels = np.array(["ab".index(path.parent.name) for path in paths])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert results["val/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert results["val/accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean())

    probabilities = np.asarray(jax.nn.softmax(logits)).max(axis=-1)
    assert main(["predict", f"--model={workdir}", "--topk=1", str(folder)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == list(map(str, paths))
    found = [line["labels"][0] for line in lines]
    assert [name for name, _ in found] == ["ab"[i] for i in logits.argmax(-1)]
    np.testing.assert_allclose([share for _, share in found], probabilities, rtol=1e-4)
    one = [answer[0][1] for answer in model.predict(paths[:2])]
    np.testing.assert_allclose(one, probabilities[:2], rtol=1e-4)

    features = np.stack(list(vit_jax.features(model, paths, batch_size=8)))
    kernel, bias = model.model.head.kernel[...], model.model.head.bias[...]
    assert relative_error(features @ kernel + bias, np.float64(logits)) < 2e-5


def test_other_models_at_native_size(folder, config, tmp_path, capsys):
    """Any model, by `max_patches`: at an image of its own grid it says what it always did."""
    fields = dict(image_size=16, patch_size=4, width=16, depth=1, mlp_dim=16, num_heads=2)
    plain = vit_jax.create("Ti/16", **fields, num_classes=2)
    plain.head.kernel[...] = jax.random.normal(jax.random.key(0), plain.head.kernel.shape)
    path = tmp_path / "plain.safetensors"
    vit_jax.save(plain, path)
    native = vit_jax.load(path, max_patches=16)
    assert "images of any shape, at most 16 patches" in repr(native)
    square = native.preprocess(folder / "a" / "02.png")
    assert square.shape == (16, 16, 3)
    np.testing.assert_allclose(native.model([square]), plain(square[None]), atol=1e-5)

    command = ["evaluate", f"--model={path}", f"--config={config}", "--json"]
    data = ["--config.data.val.classes=in_order"]
    assert main([*command, "--max-patches=16", *data]) == 0
    measured = json.loads(capsys.readouterr().out)["val/loss"]
    paths = sorted(folder.glob("*/*.png"))
    labels = np.array(["ab".index(each.parent.name) for each in paths])
    logits = logits_of(native, paths)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert measured == pytest.approx(float(losses.mean()), rel=1e-5)

    back = vit_jax.load(path, image_size=(8, 20))
    assert back.config.max_patches is None and back.preprocess(paths[0]).shape == (8, 20, 3)


@pytest.mark.parametrize(
    "flag, says",
    [
        ("augment.mixup=0.2", "augment.mixup is 0.2, which is for images of one shape"),
        ("augment.cutmix=1.0", "augment.cutmix is 1.0, which is for images of one shape"),
        ("augment.image_sizes=8,16", r"augment.image_sizes is \(8, 16\), which is for"),
        ("objective=masked_colour", "objective is 'masked_colour', which is for images"),
        ("eval.crops=5", "eval.crops is 5, which is for images of one shape"),
        ("eval.flip=True", "eval.flip is True, which is for images of one shape"),
        ("data.val.crop=0.9", "data crop is 0.9, and with model.max_patches"),
        ("model.patch_dropout=0.5", "model.patch_dropout 0.5 is not"),
    ],
)
def test_what_is_of_one_shape_is_refused(flag, says, config, tmp_path):
    flags = [f"--config.{flag}"]
    with pytest.raises(vit_jax.errors.UserError, match=says):
        train(load_config(config, flags), tmp_path / "run")


def test_what_is_of_one_grid_is_refused(run, tmp_path, capsys):
    workdir, _ = run
    model = vit_jax.load(workdir)
    with pytest.raises(vit_jax.errors.UserError, match="each image has its own"):
        next(vit_jax.features(model, [], dense=True))
    with pytest.raises(vit_jax.errors.UserError, match="each image has its own"):
        vit_jax.save(model, tmp_path / "model.stablehlo")
    with pytest.raises(vit_jax.errors.UserError, match="give one of them"):
        vit_jax.load(workdir, image_size=16, max_patches=9)
    with pytest.raises(vit_jax.errors.UserError, match="any shape, and a teacher sees"):
        Teacher.of(DistillConfig(teacher="it"), open_model(workdir), model.card)
    error = fails(capsys, "evaluate", f"--workdir={workdir}", "--max-patches=9")
    assert "--max-patches=9: a run is evaluated" in error

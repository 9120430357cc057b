"""Growing images: the step of a size is that of a model of that size, with resized positions."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from conftest import DIGITS, TINY, fails
from tiny_models import as_float32, random_params

from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.store import Store
from vit_jax.data.config import Split
from vit_jax.data.order import Growth
from vit_jax.data.pipeline import BatchReader, train_batches
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import Preprocess
from vit_jax.models import posembed
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.training import growth, loop
from vit_jax.training.config_file import load_config
from vit_jax.training.loop import train
from vit_jax.training.metrics import TIMING_KEYS, read_metrics
from vit_jax.training.objectives import Augment
from vit_jax.training.optim import OptimConfig, make_optimizer
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.sharding import MeshConfig, make_layout, make_mesh, to_devices
from vit_jax.training.state import abstract_state, make_state
from vit_jax.training.steps import make_train_step

CONFIG = ViTConfig(
    image_size=24, patch_size=4, width=16, depth=2, mlp_dim=32, num_heads=2, num_classes=5
)


def test_phases_are_equally_long():
    grown = Growth((16, 24, 32), 10)
    assert [grown(step) for step in range(12)] == [16] * 4 + [24] * 3 + [32] * 5
    assert grown.starts == (0, 4, 7)
    for total in range(3, 40):
        grown = Growth((1, 2, 3), total)
        sides = [grown(step) for step in range(total)]
        assert sides == sorted(sides) and set(sides) == {1, 2, 3}
        counts = np.bincount(sides)[1:]
        assert counts.max() - counts.min() <= 1
        assert [sides.index(side) for side in (1, 2, 3)] == list(grown.starts)


def test_batches_have_the_size_of_their_step():
    source = open_source("digits", "train")
    split = Split("digits", "train", trivial_augment=True)
    read = BatchReader.of(source, split, Preprocess((8, 8), 1), growth=Growth((4, 8), 5))

    def batches(read, start):
        with train_batches(read, 3, start_step=start, stop_step=5) as found:
            return [batch["image"] for batch in found]

    found = batches(read, 0)
    assert [image.shape[1:] for image in found] == [(4, 4, 1)] * 3 + [(8, 8, 1)] * 2
    for start, side in ((0, 4), (3, 8)):
        own = batches(BatchReader.of(source, split, Preprocess((side, side), 1)), start)
        for one, other in zip(found[start : start + 2], own, strict=False):
            np.testing.assert_array_equal(one, other)
    for one, other in zip(batches(read, 2), found[2:], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", posembed.RESIZE_METHODS)
def test_a_table_is_resized_as_in_fine_tuning(method):
    params, new = as_float32(random_params(CONFIG)), growth.at_size(CONFIG, 16)
    found = growth.fit(CONFIG, new, method)(params)
    expected = posembed.resize(params["pos_embed"], (6, 6), (4, 4), 1, method)
    np.testing.assert_allclose(found["pos_embed"], expected, atol=1e-6)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert found["cls_token"] is params["cls_token"]
    assert growth.fit(CONFIG, CONFIG, method)(params) is params


def test_tables_of_rows_and_of_layers_are_resized():
    fields = dict(position="learned2d_added", position_at="layers", registers=1)
    old = ViTConfig(**{**vars(CONFIG), **fields})
    params = as_float32(random_params(old))
    found = growth.fit(old, growth.at_size(old, 12), "bicubic")(params)["blocks"]
    for name in ("pos_embed_row", "pos_embed_column"):
        for layer, table in enumerate(params["blocks"][name]):
            expected = posembed.resize(table, (6, 1), (3, 1), 0, "bicubic")
            np.testing.assert_allclose(found[name][layer], expected, atol=1e-6)
    prefix = found["pos_embed_prefix"]
    np.testing.assert_array_equal(prefix, params["blocks"]["pos_embed_prefix"])


def stepped(model, params, batch, mesh, fit=None, of=None):
    """The parameters after a step of gradient descent at a rate of 1, and its loss."""
    optimizer = make_optimizer(OptimConfig(1.0, name="sgd", momentum=0.0), lambda step: 1.0)
    abstract = abstract_state(of or model, optimizer, ema=False, mesh=mesh)
    state = make_state(abstract, of or model, optimizer, seed=0, params=params)
    step = make_train_step(
        structure(model)[0],
        optimizer,
        lambda step: 1.0,
        Preprocess(model.image_size),
        num_classes=5,
        objective="softmax",
        augment=Augment(mixup=0.5),
        layout=make_layout(mesh, "float32"),
        fit=fit,
    )
    state, metrics = jax.jit(step)(state, to_devices(batch, 8, mesh))
    return jax.device_get((state.params, metrics["loss"]))


def test_a_step_is_that_of_the_smaller_model_and_gradients_pass_the_resizing():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    small, params = growth.at_size(CONFIG, 16), as_float32(random_params(CONFIG))
    random = np.random.default_rng(0)
    batch = {
        "image": random.integers(0, 256, (8, 16, 16, 3), np.uint8),
        "label": random.integers(0, 5, 8).astype(np.int32),
        "mask": np.ones(8, bool),
    }
    resize = growth.fit(CONFIG, small, "bilinear")
    found, loss = stepped(small, params, batch, mesh, resize, CONFIG)
    own = {
        **params,
        "pos_embed": posembed.resize(params["pos_embed"], (6, 6), (4, 4), 1, "bilinear"),
    }
    after, expected = stepped(small, own, batch, mesh)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    down = posembed.resize(np.eye(37), (6, 6), (4, 4), 1, "bilinear")
    gradient = down.T @ (own["pos_embed"] - after["pos_embed"])
    np.testing.assert_allclose(params["pos_embed"] - found["pos_embed"], gradient, atol=1e-5)
    assert np.abs(gradient).max() > 1e-3
    for tree in (found, after):
        tree.pop("pos_embed")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, after)


FLAGS = [
    *TINY,
    *("--config.augment.image_sizes=4,8", "--config.augment.mixup=0.5"),
    *("--config.augment.mix_off=0.25", "--config.model.patch_dropout=0.5"),
    *("--config.data.train.repeats=2", "--config.data.train.trivial_augment=True"),
    *("--config.data.test=None", "--config.data.val=None", "--config.optim.accumulate=1"),
]


def logged(workdir):
    lines = read_metrics(workdir)
    return [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines]


def weights(workdir):
    shapes, store = structure(ModelCard.read(workdir).config)[1], Store(workdir)
    return jax.tree.leaves(store.restore(24, {"params": shapes, "ema": shapes}))


def test_a_run_with_all_of_it_resumes_bit_identical(tmp_path, caplog, compiled_once):
    caplog.set_level("INFO", "vit_jax")
    config = load_config(DIGITS, [*FLAGS, "--config.checkpoint.keep=3"])
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(config, whole)
    for told in (
        "each image 2 times in a batch, 1 of 2 images in an epoch",
        "8 of 16 patches of a training image",
        "images of 4x4 from step 1, 8x8 from step 13",
        "mixup and cutmix end after step 18",
        "compiling the training step for images of 8x8 pixels",
    ):
        assert told in caplog.text
    assert caplog.text.count("compiling the training step") == 2
    shutil.copytree(whole, resumed)
    for step in (20, 24):
        shutil.rmtree(resumed / "checkpoints" / str(step))
    caplog.clear()
    train(config, resumed)  # from step 16
    assert "resuming" in caplog.text and "at step 16 of 24" in caplog.text
    for one, other in zip(weights(whole), weights(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert logged(resumed) == logged(whole)


def test_an_extended_run_says_what_begins_again(caplog):
    caplog.set_level("INFO", "vit_jax")
    config = load_config(DIGITS, FLAGS)  # of 24 steps
    plan = make_plan(config, TrainingData(tuple("0123456789")))
    for at, said in ((10, "from 8x8 to 4x4"), (16, "mixup and cutmix are on again, until step 18")):
        before = dataclasses.replace(config, total_steps=at)
        loop._extend(dataclasses.replace(plan, resume_step=at), before)
        assert said in caplog.text
    assert caplog.text.count("shrink") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["augment.image_sizes=8,4"], "augment.image_sizes is (8, 4); expected sides in pixels"),
        (
            ["augment.image_sizes=4,6"],
            "augment.image_sizes ends at 6x6, and model.image_size is 8x8",
        ),
        (["augment.image_sizes=3,8"], "augment.image_sizes has 3: an image of 3x3 pixels does not"),
        (
            ["augment.image_sizes=4,8", "model.position=relative"],
            "augment.image_sizes is not for model.position 'relative'",
        ),
        (
            ["augment.image_sizes=2,4,6,8", "total_steps=3"],
            "augment.image_sizes has 4 sizes for a run of 3 steps: each needs one at least",
        ),
        (
            ["augment.mixup=0.1", "augment.mix_off=99"],
            "augment.mix_off of 99 steps leaves none of the run of 24",
        ),
        (
            ["data.train.repeats=32", "augment.mixup=0.1"],
            "repeats is 32, as large as batch_size: mixup and cutmix would mix an image",
        ),
        (
            [
                "model.patch_dropout=0.5",
                "objective=masked_colour",
                "model.representation_size=None",
            ],
            "needs all patches: set model.patch_dropout to 0",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_step(capsys, tmp_path, flags, message):
    flags = [*TINY, *(f"--config.{flag}" for flag in flags)]
    said = fails(capsys, "train", f"--config={DIGITS}", f"--workdir={tmp_path}/run", *flags)
    assert message in said
    assert not (tmp_path / "run" / "config.json").exists()

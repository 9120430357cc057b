"""LoRA: a step against finite differences in NumPy, and what a run leaves behind."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DIGITS, TINY
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from models import numpy_vit
from tiny_models import random_images, random_params, relative_error, run

import vit_jax
from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.store import Store
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import create, structure
from vit_jax.models.lora import Lora, is_adapter, merged
from vit_jax.training.config_file import load_config
from vit_jax.training.loop import train
from vit_jax.training.objectives import Augment
from vit_jax.training.optim import OptimConfig, make_optimizer
from vit_jax.training.sharding import make_layout, make_mesh, MeshConfig
from vit_jax.training.state import TrainState
from vit_jax.training.steps import make_train_step
from vit_jax.training.trainable import trainable

EVERY = Lora(2, 6.0, ("qkv", "out", "fc1", "fc2"))
SMALL = ViTConfig(
    image_size=(4, 6), patch_size=(2, 3), in_channels=2, width=8, depth=2, mlp_dim=12, num_heads=2,
    num_classes=3, pool="map", lora=EVERY,
)


def written_out(params, lora):
    """The plain parameters: each kernel plus alpha / rank A B, one matrix at a time."""
    flat = {name: np.array(value) for name, value in flatten_dict(params, sep="/").items()}
    s = lora.alpha / lora.rank
    for name in [n for n in flat if n.endswith("lora_a")]:
        layer = name.removesuffix("/lora_a")
        a, b = flat.pop(name), flat.pop(f"{layer}/lora_b")
        stacked = layer.startswith("blocks/")
        kernels = flat[f"{layer}/kernel"] if stacked else flat[f"{layer}/kernel"][None]
        for kernel, a1, b1 in zip(kernels, a if stacked else a[None], b if stacked else b[None]):
            if layer.endswith("qkv"):
                for part in range(3):
                    for head in range(kernel.shape[2]):
                        kernel[:, part, head] += s * a1[:, part] @ b1[part, :, head]
            elif layer.endswith("out"):
                for head in range(len(kernel)):
                    kernel[head] += s * a1[head] @ b1
            else:
                kernel += s * a1 @ b1
    return unflatten_dict(flat, sep="/")


def loss_of(params, images, labels):
    """Mean cross-entropy, float64."""
    plain = written_out(params, EVERY)
    logits = numpy_vit.forward(plain, images, pool="map", position="learned")["logits"]
    logits = logits - logits.max(axis=-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.mean([log[label] for log, label in zip(logs, labels, strict=True)])


@functools.cache
def stepped(scan=None, fsdp=1, tensor=1, accumulate=1):
    """Parameters before and after a step of SGD at a rate of 1, images and labels."""
    config, lr = dataclasses.replace(SMALL, scan=scan), 1.0
    params, random = random_params(config), np.random.default_rng(3)
    pixels = random.integers(0, 256, (4, *config.image_size, 2)).astype(np.uint8)
    preprocess = Preprocess(config.image_size, 2)
    labels = np.array([0, 2, 1, 2], np.int32)
    mesh = make_mesh(MeshConfig(1, fsdp, tensor), jax.devices()[: fsdp * tensor])
    graphdef, shapes = structure(config)
    learning = trainable((), shapes)
    optim = OptimConfig(lr, name="sgd", momentum=0.0)
    optimizer = learning.optimizer(make_optimizer(optim, lambda step: lr))
    step = make_train_step(
        graphdef, optimizer, lambda step: lr, preprocess, num_classes=3, objective="softmax",
        augment=Augment(), accumulate=accumulate, layout=make_layout(mesh, "float32"),
        trainable=learning,
    )
    started = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = TrainState(jnp.zeros((), jnp.int32), started, optimizer.init(started), None)
    batch = {"image": pixels, "label": labels, "mask": np.ones(4, bool)}
    with jax.default_matmul_precision("highest"):
        state, _ = jax.jit(step)(state, batch)
    after = flatten_dict(jax.device_get(state.params), sep="/")
    images = np.asarray(preprocess.normalise(pixels.astype(np.float32)), np.float64)
    return flatten_dict(params, sep="/"), after, images, labels


def test_a_step_follows_the_gradient_of_the_written_out_model():
    """Of A, B and the head, by central differences of the float64 loss; the rest stays."""
    before, after, images, labels = stepped()
    random = np.random.default_rng(0)
    for name, value in before.items():
        moved = np.float64(after[name]) - value
        if not (is_adapter(name) or name.startswith("head/")):
            np.testing.assert_array_equal(after[name], value.astype(np.float32), err_msg=name)
            continue
        for index in random.choice(value.size, min(value.size, 8), replace=False):
            losses = []
            for sign in (1, -1):
                changed = value.copy()
                changed.flat[index] += sign * 1e-5
                params = unflatten_dict({**before, name: changed}, sep="/")
                losses.append(loss_of(params, images, labels))
            gradient = (losses[0] - losses[1]) / 2e-5
            np.testing.assert_allclose(-moved.flat[index], gradient, atol=1e-5, err_msg=name)
        assert np.abs(moved).max() > 1e-3, name

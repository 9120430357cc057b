"""Training and evaluation steps, on one device and on meshes, against losses, AdamW and ranks
written out here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_jax.data.transforms import Preprocess
from vit_jax.models.config import ViTConfig
from vit_jax.models.vit import structure
from vit_jax.training.optim import OptimConfig, make_optimizer
from vit_jax.training.sharding import (
    MeshConfig,
    make_mesh,
    to_devices,
)
from vit_jax.training.state import abstract_state, make_state
from vit_jax.training.steps import make_train_step

CONFIG = ViTConfig(
    image_size=(8, 12),
    patch_size=(4, 4),
    in_channels=2,
    width=16,
    depth=2,
    mlp_dim=32,
    num_heads=2,
    num_classes=7,
)
PREPROCESS = Preprocess((8, 12), in_channels=2, mean=0.4, std=0.3)
BATCH, SMOOTHING = 16, 0.1
LRS = [0.02, 0.01, 0.03]
# Gradients of key biases are zero but for rounding: a small eps would blow that up.
OPTIM = OptimConfig(1.0, weight_decay=0.2, grad_clip=2.5, b1=0.8, b2=0.95, eps=1e-3, ema=0.7)

# Halves the time spent on compiling, which is most of this file's.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.cache
def initial():
    """Parameters without the head's telling zeros."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        noise = random.normal(size=leaf.shape) * 0.25
        return (noise + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, structure(CONFIG)[1])


def batch(step):
    """Eleven real examples and five that must not count."""
    random = np.random.default_rng(step)
    return {
        "image": random.integers(0, 256, (BATCH, 8, 12, 2), np.uint8),
        "label": random.integers(0, 7, BATCH).astype(np.int32),
        "mask": random.permutation(BATCH) < 11,
        "index": np.arange(BATCH),
    }


def logits_of(params, pixels, key=None):
    images = (pixels.astype(np.float32) / 255 - 0.4) / 0.3
    return nnx.merge(structure(CONFIG)[0], params)(jnp.asarray(images), key=key)


def cross_entropy(logits, labels, smoothing):
    """The mean over the batch, from sums of exponentials."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - jnp.log(jnp.exp(shifted).sum(axis=1, keepdims=True))
    right = log_p[jnp.arange(len(labels)), labels]
    return -jnp.mean((1 - smoothing) * right + smoothing * log_p.mean(axis=1))


@functools.cache
def reference():
    """Three steps of clipped AdamW and a running average, over the real rows alone."""

    def loss_and_logits(params, pixels, labels):
        logits = logits_of(params, pixels)
        return cross_entropy(logits, labels, SMOOTHING), logits

    differentiate = jit(jax.value_and_grad(loss_and_logits, has_aux=True))
    structure_of, paths = jax.tree.structure(initial()), jax.tree_util.tree_leaves_with_path
    is_kernel = [path[-1].key == "kernel" for path, _ in paths(initial())]
    params = [leaf.astype(np.float64) for leaf in jax.tree.leaves(initial())]
    m, v = [0.0] * len(params), [0.0] * len(params)
    ema, steps = list(params), []
    for t, lr in enumerate(LRS):
        rows = batch(t)
        real = rows["mask"]
        tree = jax.tree.unflatten(structure_of, [p.astype(np.float32) for p in params])
        labels = rows["label"][real]
        (loss, logits), grads = differentiate(tree, rows["image"][real], labels)
        grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        for i, grad in enumerate(grads):
            grad = grad * min(1.0, 2.5 / norm)
            m[i] = 0.8 * m[i] + 0.2 * grad
            v[i] = 0.95 * v[i] + 0.05 * grad**2
            update = m[i] / (1 - 0.8 ** (t + 1)) / (np.sqrt(v[i] / (1 - 0.95 ** (t + 1))) + 1e-3)
            params[i] = params[i] - lr * (update + 0.2 * is_kernel[i] * params[i])
            ema[i] = 0.7 * ema[i] + 0.3 * params[i]
        hits = np.asarray(logits).argmax(axis=1) == labels
        metrics = dict(loss=float(loss), accuracy=hits.mean(), grad_norm=norm, lr=lr)
        unflatten = functools.partial(jax.tree.unflatten, structure_of)
        steps.append((unflatten(list(params)), unflatten(list(ema)), metrics))
    return steps


def mesh_of(**sizes):
    """A mesh of these sizes, or of a single device."""
    if sizes:
        return make_mesh(MeshConfig(**sizes))
    return make_mesh(MeshConfig(), jax.devices()[:1])


def start(mesh, config=CONFIG, optim=OPTIM):
    """The abstract state, and the state itself with the parameters of `initial`."""
    optimizer = make_optimizer(optim, lambda step: jnp.array(LRS)[step])
    abstract = abstract_state(config, optimizer, ema=optim.ema is not None, mesh=mesh)
    return abstract, make_state(abstract, config, optimizer, seed=0, params=initial())


def stepper(abstract, *, config=CONFIG, optim=OPTIM, donate=0, **options):
    """The step as the training loop compiles it."""

    def schedule(step):
        return jnp.array(LRS)[step]

    options = dict(accumulate=1, label_smoothing=SMOOTHING, seed=0, objective="softmax") | options
    step = make_train_step(
        structure(config)[0],
        make_optimizer(optim, schedule),
        schedule,
        PREPROCESS,
        num_classes=7,
        ema=optim.ema,
        **options,
    )
    places = (jax.tree.map(lambda leaf: leaf.sharding, abstract), None)
    return jit(step, donate_argnums=donate, out_shardings=places)


def assert_close(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), wanted in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, wanted, err_msg=str(path), **tolerance)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "sizes, accumulate",
    [
        ({}, 1),
        ({}, 2),
        ({}, 4),
        (dict(data=8), 1),
        (dict(data=8), 2),
        (dict(data=1, fsdp=8), 1),
        (dict(data=2, fsdp=2, tensor=2), 1),
        (dict(data=2, fsdp=2, tensor=2), 4),
    ],
    ids=str,
)
def test_three_training_steps(sizes, accumulate):
    mesh = mesh_of(**sizes)
    abstract, state = start(mesh)
    step = stepper(abstract, accumulate=accumulate)
    for t, (params, ema, expected) in enumerate(reference()):
        state, metrics = step(state, to_devices(batch(t), BATCH, mesh))
        assert state.step == t + 1
        found = {name: float(value) for name, value in metrics.items()}
        assert found == pytest.approx(expected, rel=1e-5)
        assert_close(state.params, params, rtol=1e-5, atol=3e-6)
        assert_close(state.ema, ema, rtol=1e-5, atol=3e-6)


def test_the_steps_above_are_clipped():
    norms = [metrics["grad_norm"] for _, _, metrics in reference()]
    assert max(norms) > 2.5 > min(norms)

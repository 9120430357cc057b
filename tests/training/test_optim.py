"""Schedules and update rules against formulas and a NumPy implementation written out here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.errors import UserError
from vit_jax.training.optim import OptimConfig, is_kernel, make_optimizer, make_schedule

LR = 0.4
COSINE = [LR / 2 * (1 + math.cos(math.pi * k / 80)) for k in (20, 40, 80)]


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(schedule="constant"), {0: LR, 57: LR, 100: LR}),
        (dict(schedule="linear"), {0: LR, 25: 0.75 * LR, 90: 0.1 * LR, 100: 0.0}),
        (
            dict(schedule="cosine"),
            {0: LR, 25: LR / 2 * (1 + math.sqrt(0.5)), 50: LR / 2, 100: 0.0},
        ),
        (dict(schedule="rsqrt", timescale=9.0), {0: LR, 27: LR / 2, 72: LR / 3}),
        (dict(schedule="rsqrt"), {0: LR, 100: LR / math.sqrt(1.01)}),
        # Twenty steps of warm-up, as a number and as a share.
        *[
            (dict(warmup=warmup, **fields), {0: 0.0, 1: LR / 20, 15: 0.75 * LR, 20: LR} | after)
            for warmup in (20.0, 0.2)
            for fields, after in [
                (dict(schedule="constant"), {21: LR, 100: LR}),
                (dict(schedule="linear"), {40: 0.75 * LR, 60: LR / 2, 100: 0.0}),
                (dict(schedule="cosine"), dict(zip((40, 60, 100), COSINE, strict=True))),
                (dict(schedule="rsqrt", timescale=9.0), {47: LR / 2, 92: LR / 3}),
            ]
        ],
        (dict(warmup=1.0), {0: 0.0, 1: LR, 100: 0.0}),  # one step, not the whole run
        (dict(warmup=100.0), {0: 0.0, 50: LR / 2, 100: LR}),
    ],
    ids=str,
)
def test_learning_rate_of_a_run_of_a_hundred_steps(fields, expected):
    schedule = make_schedule(OptimConfig(LR, **fields), 100)
    found = {step: float(schedule(jnp.int32(step))) for step in expected}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"warmup of 101 steps is longer than the run of 100"):
        make_schedule(OptimConfig(LR, warmup=101.0), 100)


# Three steps: the first two gradients are longer than the clip, the last is not.
CLIP = 1.5
LRS = [0.1, 0.05, 0.2]


def parameters():
    random = np.random.default_rng(0)
    shapes = {"a/kernel": (3, 4), "a/bias": (4,), "norm/scale": (4,), "pos_embed": (2, 4)}
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def gradients():
    random = np.random.default_rng(1)
    for size in (2.0, 1.0, 0.1):
        yield {name: size * random.normal(size=p.shape) for name, p in parameters().items()}


def nested(flat):
    tree = {}
    for name, array in flat.items():
        *parents, last = name.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = jnp.asarray(array, jnp.float32)
    return tree


def reference(name, *, clip, decay, decayed, b1=0.8, b2=0.95, eps=1e-6, momentum=0.7):
    """Three steps, one parameter after another; returns all of their parameters."""
    params = parameters()
    m = {key: np.zeros_like(p) for key, p in params.items()}
    v = {key: np.zeros_like(p) for key, p in params.items()}
    steps = []
    for t, (grads, lr) in enumerate(zip(gradients(), LRS, strict=True), 1):
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        shrink = 1.0 if clip is None else min(1.0, clip / norm)
        for key, grad in grads.items():
            grad = shrink * grad
            if name == "sgd":
                m[key] = momentum * m[key] + grad
                update = m[key]
            else:
                m[key] = b1 * m[key] + (1 - b1) * grad
                v[key] = b2 * v[key] + (1 - b2) * grad**2
                update = m[key] / (1 - b1**t) / (np.sqrt(v[key] / (1 - b2**t)) + eps)
            if key in decayed:
                update = update + decay * params[key]
            params[key] = params[key] - lr * update
        steps.append(dict(params))
    return steps


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize(
    "name, decay, which",
    [
        ("adamw", 0.3, "kernels"),
        ("adamw", 0.3, "all"),
        ("adamw", 0.0, "kernels"),
        ("adam", 0.0, "kernels"),
        ("sgd", 0.0, "kernels"),
        ("sgd", 0.3, "kernels"),
    ],
)
def test_three_steps(name, decay, which, clip):
    config = OptimConfig(
        LR,
        name,
        weight_decay=decay,
        decayed=which,
        grad_clip=clip,
        b1=0.8,
        b2=0.95,
        eps=1e-6,
        momentum=0.7,
    )
    optimizer = make_optimizer(config, lambda step: jnp.array(LRS)[step])
    decayed = {"a/kernel"} if which == "kernels" else set(parameters())
    expected = reference(name, clip=clip, decay=decay, decayed=decayed)

    params = nested(parameters())
    state = optimizer.init(params)
    for grads, after in zip(gradients(), expected, strict=True):
        updates, state = jax.jit(optimizer.update)(nested(grads), state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(
            lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6),
            params,
            nested(after),
        )


def test_the_gradients_above_are_clipped_twice():
    norms = [math.sqrt(sum((g**2).sum() for g in grads.values())) for grads in gradients()]
    assert [norm > CLIP for norm in norms] == [True, True, False]


def test_kernels_are_the_matrices_of_layers():
    names = {
        "patch_embed/kernel": True,
        "blocks/attention/qkv/kernel": True,
        "blocks/mlp/fc1/bias": False,
        "blocks/norm1/scale": False,
        "head/kernel": True,
        "cls_token": False,
        "pos_embed": False,
        "attention_pool/probe": False,
    }
    marks = is_kernel(nested(dict.fromkeys(names, 0.0)))
    paths = jax.tree_util.tree_leaves_with_path(marks)
    assert {jax.tree_util.keystr(p, simple=True, separator="/"): m for p, m in paths} == names


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(name="sdg"), r"optim.name is 'sdg'; did you mean 'sgd'\?"),
        (dict(name="lion"), "optim.name is 'lion'; known: adam, adamw, sgd"),
        (dict(schedule="cosin"), "optim.schedule is 'cosin'; did you mean 'cosine'"),
        (dict(decayed="kernel"), "optim.decayed is 'kernel'; did you mean 'kernels'"),
        (dict(name="adam", weight_decay=0.1), "adam has no weight decay; adamw does"),
        (dict(accumulate=0), "optim.accumulate is 0"),
        (dict(lr=-1e-3), "optim.lr is -0.001; it must be 0 or more"),
        (dict(warmup=-5.0), "optim.warmup is -5.0"),
        (dict(weight_decay=-0.1), "optim.weight_decay is -0.1"),
        (dict(grad_clip=0.0), "optim.grad_clip is 0.0; it must be positive"),
        (dict(grad_clip=-1.0), "optim.grad_clip is -1.0"),
        (dict(timescale=0.0), "optim.timescale is 0.0"),
        (dict(ema=1.0), r"optim.ema is 1.0; it must be in \[0, 1\)"),
        (dict(ema=-0.5), "optim.ema is -0.5"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**({"lr": LR} | fields))


def test_values_at_the_edge_are_accepted():
    config = OptimConfig(0.0, ema=0.0, weight_decay=0.0, grad_clip=None, warmup=0.0)
    assert float(make_schedule(config, 10)(3)) == 0.0

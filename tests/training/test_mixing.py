"""Mixup and cutmix on the device, against their formulas written out, and on a mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats
from tiny_models import as_float32, random_params

from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.training import steps
from vit_jax.training.objectives import LOSSES, Augment, draw_mixing, mix_images
from vit_jax.training.optim import OptimConfig, make_optimizer
from vit_jax.training.sharding import MeshConfig, make_mesh, to_devices
from vit_jax.training.state import TrainState, abstract_state, make_state
from vit_jax.training.steps import make_train_step

SIZE = (12, 20)


def drawn(augment, b=4, seed=0, size=SIZE):
    draw = jax.jit(lambda key: draw_mixing(augment, key, b, size))
    return {name: np.asarray(x) for name, x in draw(jax.random.key(seed)).items()}


def mixed(ours, partners, mixing):
    arrays = {name: jnp.array(x) for name, x in mixing.items()}
    return np.asarray(jax.jit(mix_images)(jnp.array(ours), jnp.array(partners), arrays))


def images(b, seed=0, size=SIZE):
    return np.random.default_rng(seed).uniform(-1, 1, (b, *size, 3)).astype(np.float32)


def test_mixup_is_a_blend_with_the_image_before():
    mixing = drawn(Augment(mixup=0.5), b=5)
    share = mixing["share"][0]
    assert (mixing["share"] == share).all() and (mixing["blend"] == share).all()
    assert 0.5 <= share < 1 and not mixing["box"].any()
    ours = images(5)
    partners = np.roll(ours, 1, axis=0)
    np.testing.assert_array_equal(partners[1], ours[0])
    found = mixed(ours, partners, mixing)
    np.testing.assert_allclose(found, share * ours + (1 - share) * partners, atol=1e-6)


@functools.cache
def boxes():
    """Cutmix of 4000 images of 224 x 224."""
    return drawn(Augment(cutmix=1.0, per_image=True), 4000, 1, (224, 224))


def test_cutmix_sets_a_box_in_and_counts_its_pixels():
    mixing = {name: x[:8] for name, x in boxes().items()}
    ours, partners = (images(8, seed, (224, 224)) for seed in (0, 1))
    found = mixed(ours, partners, mixing)
    for i, (top, left, bottom, right) in enumerate(mixing["box"]):
        expected = ours[i].copy()
        expected[top:bottom, left:right] = partners[i, top:bottom, left:right]
        np.testing.assert_array_equal(found[i], expected)
        kept = (expected == ours[i]).all(-1).mean()
        np.testing.assert_allclose(mixing["share"][i], kept, atol=1e-6)


def test_the_weights_of_mixup_are_those_of_beta(alpha=0.2):
    shares = drawn(Augment(mixup=alpha, per_image=True), b=4000)["share"]
    assert shares.min() >= 0.5

    def larger(x):  # the larger part of Beta(alpha, alpha)
        beta = scipy.stats.beta(alpha, alpha)
        return beta.cdf(x) - beta.cdf(1 - x)

    # Near 1 float32 has few numbers left.
    below = shares[shares < 0.999].astype(np.float64)
    assert abs(len(below) / len(shares) - larger(0.999)) < 0.03
    assert scipy.stats.kstest(below, lambda x: larger(x) / larger(0.999)).pvalue > 0.01


def test_the_boxes_of_cutmix_have_the_area_that_is_left():
    """Where the box is not cut off by the border, its area is 1 - Beta(1, 1): uniform."""
    box = boxes()["box"]
    inside = (box[:, :2] > 0).all(1) & (box[:, 2:] < 224).all(1)
    sides = box[:, 2:] - box[:, :2]
    # A box of side s stays inside with probability (1 - s)^2, where s = sqrt(area).
    side = sides[inside, 0] / 224
    density = lambda s: 2 * s * (1 - s) ** 2  # noqa: E731
    total = scipy.integrate.quad(density, 0, 1)[0]
    cdf = np.vectorize(lambda s: scipy.integrate.quad(density, 0, s)[0] / total)
    assert np.abs(np.sort(cdf(side)) - np.linspace(0, 1, inside.sum())).max() < 0.06
    assert (sides[inside, 0] == sides[inside, 1]).all()


def test_both_together_take_turns():
    mixing = drawn(Augment(mixup=0.8, cutmix=1.0, cutmix_share=0.3, per_image=True), b=2000)
    blended = mixing["blend"] < 1
    assert abs(blended.mean() - 0.7) < 0.04
    assert not mixing["box"][blended].any()


CONFIG = ViTConfig(
    image_size=SIZE, patch_size=(4, 4), width=16, depth=1, mlp_dim=32, num_heads=2, num_classes=5
)


def step_on(mesh, augment, accumulate=1, now=0, **options):
    """The metrics of one step, and the program that made them."""
    program, state, batch = compiled(mesh, augment, accumulate, **options)
    state = dataclasses.replace(state, step=jnp.full_like(state.step, now))
    return jax.device_get(program(state, batch)[1]), program.as_text()


@functools.cache
def compiled(mesh, augment, accumulate, **options):
    optim = OptimConfig(1e-2, name="sgd")
    optimizer = make_optimizer(optim, lambda step: 1e-2)
    abstract = abstract_state(CONFIG, optimizer, ema=False, mesh=mesh)
    params = as_float32(random_params(CONFIG))
    state = make_state(abstract, CONFIG, optimizer, seed=0, params=params)
    random = np.random.default_rng(0)
    batch = {
        "image": random.integers(0, 256, (16, *SIZE, 3), np.uint8),
        "label": random.integers(0, 5, 16).astype(np.int32),
        "mask": np.ones(16, bool),
    }
    step = make_train_step(
        structure(CONFIG)[0],
        optimizer,
        lambda step: 1e-2,
        Preprocess(SIZE),
        num_classes=5,
        objective="softmax",
        augment=augment,
        accumulate=accumulate,
        **options,
    )
    arguments = state, to_devices(batch, 16, mesh)
    return jax.jit(step).lower(*arguments).compile(), *arguments


ONE = make_mesh(MeshConfig(), jax.devices()[:1])
EIGHT = make_mesh(MeshConfig(data=8))
BOTH = Augment(mixup=0.8, cutmix=1.0, per_image=True, label_smoothing=0.1)


def test_mesh_and_micro_batches_do_not_change_what_is_mixed():
    expected, _ = step_on(ONE, BOTH)
    found, _ = step_on(EIGHT, BOTH, 2)
    plain, _ = step_on(ONE, Augment())
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[key], expected[key], rtol=2e-5)
        assert abs(expected[key] / plain[key] - 1) > 1e-3


def test_no_device_sees_all_images():
    _, text = step_on(EIGHT, BOTH, 2)
    assert "collective-permute" in text
    gathered = re.findall(r"= \w+\[([\d,]+)\][^=]* all-gather", text)
    assert not any(int(np.prod([int(n) for n in dims.split(",")])) > 500 for dims in gathered)


def test_mixing_ends_within_the_same_program():
    smoothed = Augment(label_smoothing=0.1)  # which stays
    for now, augment in ((0, BOTH), (1, BOTH), (2, smoothed), (3, smoothed)):
        found, _ = step_on(ONE, BOTH, now=now, mixed_steps=2)
        expected, _ = step_on(ONE, augment, now=now)
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-5)
    assert abs(step_on(ONE, BOTH)[0]["loss"] / found["loss"] - 1) > 1e-3


def test_how_many_steps_are_mixed():
    for off, total, expected in [
        (0, 50, 50),
        (0.1, 50, 45),
        (20, 50, 30),
        (0.25, 10, 8),
        (1, 2, 1),
    ]:
        assert Augment(mixup=0.5, mix_off=float(off)).mixed_steps(total) == expected
    for off in (50.0, 60.0, 0.999):
        with pytest.raises(UserError, match=r"augment\.mix_off of .* leaves none of the run of 50"):
            Augment(mixup=0.5, mix_off=off).mixed_steps(50)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(mixup=-1.0), r"augment\.mixup is -1"),
        (dict(cutmix=float("nan")), r"augment\.cutmix is nan"),
        (dict(cutmix_share=1.5), r"cutmix_share is 1\.5"),
        (dict(mixup=0.2, mix_off=-1.0), r"augment\.mix_off is -1"),
        (dict(mix_off=0.1), r"mix_off is 0\.1, but there is nothing to switch off"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Augment(**fields)


def test_labels_are_mixed_as_their_images_are(monkeypatch):
    """Each image is full in the channel of its label: mixed, its means are what it should be."""
    apart = functools.partial(lambda found, wanted, **_: jnp.abs(found - wanted).sum(-1))
    monkeypatch.setitem(LOSSES, "softmax", apart)
    monkeypatch.setattr(steps, "merged", lambda *_: lambda x, **_: x.mean(axis=(1, 2)))
    label = np.tile(np.arange(5, dtype=np.int32), 4)
    full = np.uint8(255) * np.eye(5, dtype=np.uint8)[label, None, None]
    batch = {"image": full.repeat(12, 1).repeat(20, 2), "label": label, "mask": np.ones(20, bool)}
    step = make_train_step(
        structure(CONFIG)[0],
        optax.identity(),
        lambda step: 1e-2,
        Preprocess(SIZE, in_channels=5, mean=0.0, std=1.0),
        num_classes=5,
        objective="softmax",
        augment=Augment(mixup=1.0, cutmix=1.0, per_image=True),
    )
    state = TrainState(jnp.int32(0), {"unused": jnp.zeros(2)}, (), None)
    assert float(jax.jit(step)(state, batch)[1]["loss"]) < 1e-5

"""The feature pyramid on the patches against convolutions written out here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from test_dense import TINY, WIDE, pictures
from tiny_models import as_float32, random_params, relative_error, run

import vit_jax
from vit_jax.analysis.cost import flops_per_image
from vit_jax.checkpoints.fit import place
from vit_jax.checkpoints.opened import open_model
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.training.trainable import trainable

CONFIG = ViTConfig(**TINY, **WIDE, pool="none", registers=1, pyramid=6)  # of 3x4 patches


def interpolated(x, size):
    for axis, new in enumerate(size):
        centres = [(np.arange(n) + 0.5) / n for n in (new, x.shape[axis])]
        x = np.apply_along_axis(lambda row, at=centres: np.interp(*at, row), axis, x)
    return x


def norm(x, p):
    centred = x - x.mean(axis=-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]
    )


def doubled(x, p):
    """Each pixel becomes 2x2, by a kernel each; `lax.conv_transpose` counts them backwards."""
    h, w, _ = x.shape
    y = np.zeros((2 * h, 2 * w, p["kernel"].shape[3]))
    for i in (0, 1):
        for j in (0, 1):
            y[i::2, j::2] = x @ p["kernel"][1 - i, 1 - j] + p["bias"]
    return y


def gelu(x):
    return x * scipy.special.ndtr(x)


def level(x, p):
    x = np.pad(norm(x @ p["conv1"]["kernel"][0, 0], p["norm1"]), [(1, 1), (1, 1), (0, 0)])
    h, w, _ = x.shape
    y = sum(
        x[i : h - 2 + i, j : w - 2 + j] @ p["conv2"]["kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )
    return norm(y, p["norm2"])


def written_out(x, p):
    up = doubled(gelu(norm(doubled(x, p["conv_up1"]), p["norm_up1"])), p["conv_up2"])
    h, w = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
    half = x[:h, :w].reshape(h // 2, 2, w // 2, 2, -1).max(axis=(1, 3))
    maps = [
        level(up, p["level1"]),
        level(doubled(x, p["conv_up"]), p["level2"]),
        level(x, p["level3"]),
        level(half, p["level4"]),
    ]
    return gelu(sum(interpolated(each, up.shape[:2]) for each in maps))


@pytest.fixture(scope="module")
def params():
    return as_float32(random_params(CONFIG))


def test_logits_are_those_of_the_maps_written_out(params):
    images = pictures(CONFIG)
    logits, captured = run(CONFIG, params, images, capture=("pooled", "pre_logits"))
    assert logits.shape == (2, 12, 16, 3) and captured["pooled"].shape == (2, 3, 4, 16)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    tokens = np.asarray(captured["pooled"], np.float64)
    wanted = np.stack([written_out(each, exact["pyramid"]) for each in tokens])
    assert relative_error(captured["pre_logits"], wanted) < 2e-6
    wanted = wanted @ exact["head"]["kernel"] + exact["head"]["bias"]
    assert relative_error(logits, wanted) < 2e-6


def test_it_is_saved_fitted_and_counted_as_part_of_the_head(tmp_path):
    model = vit_jax.create(CONFIG)
    vit_jax.save(model, tmp_path / "model.safetensors")
    again = vit_jax.load(tmp_path / "model.safetensors")
    assert again.config == CONFIG
    images = pictures(CONFIG)
    np.testing.assert_array_equal(again.model(images), model(images))
    with pytest.raises(UserError, match=r"timm has no models with model\.pool='none'"):
        vit_jax.save(model, tmp_path / "other.safetensors", format="timm")

    opened = open_model(tmp_path / "model.safetensors")
    changed = {6: "kept", 4: "fresh"}
    for channels, status in changed.items():
        config = ViTConfig(**TINY, **WIDE, pool="none", registers=1, pyramid=channels)
        lines = place(opened, config, head="fresh")[1]
        found = {line.status for line in lines if line.name.startswith("pyramid/")}
        assert found == {status}

    shapes = structure(CONFIG)[1]
    learning = trainable(("all_but_head",), shapes)
    assert set(learning.select(shapes)) == {"pyramid", "head"}
    plain = ViTConfig(**TINY, **WIDE, pool="none", registers=1)
    sizes = [
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(structure(c)[1]))
        for c in (CONFIG, plain)
    ]
    assert sizes[0] > sizes[1]
    # Kernels at the pixels of their outputs; of the doubled maps at those of their inputs.
    macs = 12 * 16 * 8 * 4 + 48 * 8 * 4 * 4 + 12 * 16 * 8 * 4
    macs += 192 * (4 * 6 + 54 * 6) + 48 * (8 * 6 + 54 * 6) + 12 * (96 + 54 * 6) + 2 * (96 + 54 * 6)
    macs += 192 * 6 * 3 - 12 * 16 * 3
    assert flops_per_image(CONFIG) - flops_per_image(plain) == 2 * macs


def test_half_precision_and_what_has_no_pyramid(params):
    half = ViTConfig(**TINY, **WIDE, pool="none", registers=1, pyramid=6, dtype="bfloat16")
    found = run(half, params, pictures(half))
    assert found.dtype == jnp.float32
    assert relative_error(found, np.asarray(run(CONFIG, params, pictures(half)))) < 0.05
    for fields in (dict(pool="gap"), dict(width=18), dict(image_size=(4, 20))):
        with pytest.raises(UserError, match=r"set model\.pyramid to None"):
            ViTConfig(**{**TINY, **WIDE, "pool": "none", "pyramid": 6, **fields})

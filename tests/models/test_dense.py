"""Dense features: each patch's token at the patch's place, at any resolution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models.config import ResNetConfig, ViTConfig
from vit_jax.models.resnet import ResNet

TINY = dict(width=16, depth=1, mlp_dim=16, num_heads=2, num_classes=3)
WIDE = dict(image_size=(12, 20), patch_size=(4, 5), in_channels=2)
CASES = {
    "class token": ViTConfig(**TINY, **WIDE),
    "no prefix": ViTConfig(**TINY, **WIDE, pool="gap", position="sincos2d"),
    "registers": ViTConfig(**TINY, **WIDE, distillation="token", registers=3, position_prefix=1),
    "norm after pool": ViTConfig(
        **TINY, **WIDE, pool="gap", class_token=True, norm_after_pool=True
    ),
    "hybrid": ViTConfig(
        **TINY, image_size=(16, 24), patch_size=(2, 1), resnet=(1,), resnet_width=32
    ),
}


def pictures(config, n=2):
    shape = (n, *config.image_size, config.in_channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_cases_have_the_grids_and_prefixes_they_are_for():
    assert [CASES[name].num_prefix_tokens for name in CASES] == [1, 0, 5, 1, 1]
    assert CASES["hybrid"].grid == (2, 6) and CASES["registers"].grid == (3, 4)


@pytest.mark.parametrize("name", CASES)
def test_tokens_lie_where_their_patches_are(name):
    config = CASES[name]
    model = vit_jax.create(config)

    @jax.jit
    def both(images):
        return model.dense(images), model(images, capture="encoded")[1]["encoded"]

    found, encoded = map(np.asarray, both(pictures(config)))
    gh, gw = config.grid
    assert found.shape == (2, gh, gw, 16)
    token = encoded.shape[1] - gh * gw  # patches come last, row by row
    for row in range(gh):
        for column in range(gw):
            np.testing.assert_array_equal(found[:, row, column], encoded[:, token])
            token += 1


@pytest.mark.parametrize("after", [False, True])
def test_patches_of_a_model_whose_blocks_add_nothing(after):
    """Then a feature is its own patch, projected, and normalised unless that is for the mean."""
    fields = dict(pool="gap", norm_after_pool=True) if after else {}
    config = ViTConfig(**TINY, **WIDE, **fields, class_token=True, registers=2, position="none")
    model = vit_jax.create(config)
    for branch in (model.blocks.attention.out, model.blocks.mlp.fc2):
        branch.kernel[...] = jnp.zeros_like(branch.kernel[...])
        branch.bias[...] = jnp.zeros_like(branch.bias[...])
    images = pictures(config)
    found = np.asarray(jax.jit(model.dense)(images))
    kernel = np.asarray(model.patch_embed.kernel[...], np.float64)
    for row in range(3):
        for column in range(4):
            patch = images[:, 4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
            x = np.tensordot(patch.astype(np.float64), kernel, 3)
            if not after:
                x = x - x.mean(axis=1, keepdims=True)
                x = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-6)
            np.testing.assert_allclose(found[:, row, column], x, atol=1e-5)


def test_a_head_on_each_patch_reads_no_other_tokens(tmp_path):
    """`pool="none"` is the linear head on `dense`; the format that holds it is our own."""
    config = dataclasses.replace(CASES["registers"], pool="none", class_token=True)
    model = vit_jax.create(config)
    kernel = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    model.head.kernel.set_value(jnp.asarray(kernel))
    logits = model(pictures(config))
    assert config.num_prefix_tokens == 5 and logits.shape == (2, *config.grid, 3)
    np.testing.assert_allclose(logits, model.dense(pictures(config)) @ kernel, atol=1e-5)

    vit_jax.save(model, tmp_path / "each.safetensors")
    loaded = vit_jax.load(tmp_path / "each.safetensors").model
    np.testing.assert_array_equal(loaded(pictures(config)), logits)
    for format in ("google", "timm", "hf"):
        with pytest.raises(UserError, match=f"{format} has no models with model.pool='none'"):
            vit_jax.save(model, tmp_path / f"{format}.safetensors", format=format)


def test_what_does_not_go_with_a_head_on_each_patch():
    for fields, match in (
        (dict(patch_dropout=0.5), "model.pool 'none' needs all patches"),
        (dict(representation_size=4), "no representation_size"),
        (dict(max_patches=8), "max_patches is for images of any shape"),
        (dict(distillation="head"), "goes with pool 'token'"),
    ):
        with pytest.raises(UserError, match=match):
            ViTConfig(**TINY, **WIDE, pool="none", **fields)


def test_a_resnet_has_its_feature_map():
    config = ResNetConfig(image_size=(16, 24), resnet=(1,), resnet_width=32, num_classes=3)
    model = vit_jax.create(config)
    assert isinstance(model, ResNet)

    @jax.jit
    def both(images):
        return model.dense(images), model(images, capture=("encoded", "pooled"))[1]

    found, captured = both(pictures(config))
    assert found.shape == (2, 4, 6, 128)
    np.testing.assert_array_equal(found.reshape(2, 24, 128), captured["encoded"])
    np.testing.assert_allclose(found.mean(axis=(1, 2)), captured["pooled"], atol=1e-5)
    with pytest.raises(UserError, match="do not fit a model made for"):
        model.dense(pictures(config)[:, 1:])


def test_dense_features_at_another_resolution(tiny_run):
    vit = vit_jax.load(tiny_run[0], image_size=(12, 20))
    image = np.random.default_rng(0).integers(0, 256, (31, 17, 1), np.uint8)
    found = jax.jit(vit.model.dense)(vit.preprocess(image)[None])
    assert found.shape == (1, 6, 10, 16) and np.isfinite(found).all()
    with pytest.raises(UserError, match="do not fit a model made for"):
        vit.model.dense(vit_jax.load(tiny_run[0]).preprocess(image)[None])

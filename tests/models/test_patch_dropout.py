"""Patch dropout: a model that sees some patches is a smaller model of these patches alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import as_float32, random_images, random_params, run

from vit_jax.analysis.cost import flops_per_image, step_flops
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.elementwise import drop_patches, kept_patches
from vit_jax.models.variants import variant
from vit_jax.training.config import Config
from vit_jax.training.sharding import BATCH, MeshConfig, make_mesh

TINY = dict(patch_size=(4, 5), width=16, mlp_dim=24, num_heads=2, num_classes=5)
GRID = dict(image_size=(8, 10), **TINY)  # 4 patches, of which 2 are kept


def test_how_many_are_kept_is_timms_number():
    # max(1, int(L * (1 - prob))) of timm.layers.PatchDropout
    for patches, rate, expected in (
        *((196, 0.5, 98), (196, 0.75, 49), (197, 0.5, 98), (49, 0.1, 44), (10, 0.3, 7)),
        *((4, 0.9, 1), (1, 0.5, 1), (16, 0.001, 15)),
    ):
        assert kept_patches(patches, rate) == expected


def test_each_image_keeps_a_random_part_in_order_and_the_prefix():
    b, n, prefix = 2000, 10, 2
    x = np.arange(b * (n + prefix), dtype=np.float32).reshape(b, n + prefix, 1)
    found = np.asarray(drop_patches(jnp.array(x), 0.65, prefix, jax.random.key(0)))
    assert found.shape == (b, prefix + 3, 1)
    np.testing.assert_array_equal(found[:, :prefix], x[:, :prefix])
    kept = (found[:, prefix:, 0] - x[:, :1, 0] - prefix).astype(int)  # which, of each image
    assert (np.diff(kept, axis=1) > 0).all() and kept.min() >= 0 and kept.max() < n
    assert len({tuple(row) for row in kept.tolist()}) == 120  # all parts of three of ten
    counts = np.bincount(kept.ravel(), minlength=n)
    assert np.abs(counts - b * 0.3).max() < 4.5 * np.sqrt(b * 0.3 * 0.7)
    again = np.asarray(drop_patches(jnp.array(x), 0.65, prefix, jax.random.key(1)))
    assert (again != found).any()


@pytest.mark.parametrize(
    "fields",
    [
        dict(depth=2, pool="gap", registers=1, scan=True, remat="full"),
        dict(depth=2, scan=False),
        dict(depth=1, pool="map", position="learned2d", distillation="token"),
    ],
    ids=["gap", "token", "map"],
)
def test_the_rest_is_the_model_of_the_patches_that_are_left(fields):
    config = ViTConfig(**GRID, **fields, patch_dropout=0.5)
    params, images = random_params(config), random_images(config, n=6)
    found = np.asarray(run(config, params, images, key=jax.random.key(3)))

    # The two patches side by side, with the positions that they had in the whole image.
    smaller = ViTConfig(image_size=(4, 10), **TINY, **(fields | dict(position="learned")))
    prefix = config.num_prefix_tokens
    table = np.asarray(structure_positions(config, params))
    wanted = {}
    for pair in itertools.combinations(range(4), 2):
        rows = [*range(prefix), *(prefix + i for i in pair)]
        own = {name: x for name, x in params.items() if not name.startswith("pos_embed")}
        own["pos_embed"] = table[rows]
        parts = images.reshape(6, 2, 4, 2, 5, 3).transpose(0, 1, 3, 2, 4, 5).reshape(6, 4, 4, 5, 3)
        seen = np.concatenate([parts[:, i] for i in pair], axis=2)
        wanted[pair] = np.asarray(run(smaller, own, seen))
    chosen = []
    for image, logits in enumerate(found):
        errors = {pair: np.abs(logits - of[image]).max() for pair, of in wanted.items()}
        pair = min(errors, key=errors.get)
        assert sorted(errors.values())[0] < 1e-5 < 1e-3 < sorted(errors.values())[1]
        chosen.append(pair)
    assert len(set(chosen)) > 2


def structure_positions(config, params):
    return nnx.merge(structure(config)[0], as_float32(params)).positions()


def test_evaluation_sees_all_patches_and_captures_what_training_saw():
    config = ViTConfig(**GRID, depth=2, patch_dropout=0.5)
    params, images = random_params(config), random_images(config)
    whole = dataclasses.replace(config, patch_dropout=0.0)
    captured = ("patches", "tokens", "attention")
    logits, values = run(config, params, images, capture=captured)
    np.testing.assert_array_equal(logits, run(whole, params, images, capture=captured)[0])
    assert values["tokens"].shape == (2, 2, 5, 16)
    _, values = run(config, params, images, capture=captured, key=jax.random.key(0))
    assert values["patches"].shape == (2, 4, 16) and values["tokens"].shape == (2, 2, 3, 16)
    assert values["attention"].shape == (2, 2, 2, 3, 3)


def test_training_computes_less():
    config = variant("Ti/16", depth=2, scan=False, patch_dropout=0.75, num_classes=10)
    graphdef, params = structure(config)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

    def flops(key):
        def forward(params, images):
            return nnx.merge(graphdef, params)(images, key=key)

        return jax.jit(forward).lower(params, images).cost_analysis()["flops"]

    share = flops_per_image(config, training=True) / flops_per_image(config)
    assert 0.2 < share < 0.4  # the patch embedding is that of all
    assert flops(jax.random.key(0)) / flops(None) == pytest.approx(share, rel=0.03)
    whole = dataclasses.replace(config, patch_dropout=0.0)
    ratio = step_flops(Config(batch_size=8), config) / step_flops(Config(batch_size=8), whole)
    assert ratio == pytest.approx(share)


def test_devices_drop_the_same_without_seeing_each_others_tokens():
    config = ViTConfig(**GRID, depth=1, patch_dropout=0.5)
    graphdef, params = structure(config)[0], as_float32(random_params(config))
    images = random_images(config, n=16).astype(np.float32)
    mesh = make_mesh(MeshConfig(data=8))

    def loss(params, images):
        logits = nnx.merge(graphdef, params)(images, key=jax.random.key(0))
        return (logits**2).sum()

    program = jax.jit(jax.grad(loss))
    split = jax.device_put(images, NamedSharding(mesh, BATCH))
    whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    compiled = program.lower(whole, split).compile()
    assert "all-gather" not in compiled.as_text()
    for one, other in zip(
        *map(jax.tree.leaves, (program(params, images), compiled(whole, split))), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_what_needs_all_patches_is_refused():
    for fields, message in (
        (dict(position="relative"), r"patch_dropout is 0\.5, but model\.position 'relative' needs"),
        (dict(position_at="layers"), r"model\.position_at 'layers' needs all patches"),
        (dict(patch_outputs=48), r"model\.patch_outputs 48 needs all patches: set model\.patch_"),
    ):
        with pytest.raises(UserError, match=message):
            ViTConfig(**GRID, depth=1, patch_dropout=0.5, **fields)
    with pytest.raises(UserError, match=r"patch_dropout is 1\.0; it must be in \[0, 1\)"):
        ViTConfig(**GRID, depth=1, patch_dropout=1.0)

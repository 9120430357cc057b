"""Images at their native size: as if each were alone, in a model of its own size."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fake_mesh
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import as_float32, random_params, relative_error

from vit_jax.compiler import traced_for
from vit_jax.errors import UserError
from vit_jax.models import native, positions
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.posembed import NATIVE_METHODS
from vit_jax.models.rotary import Rotary

TINY = dict(image_size=(16, 24), patch_size=4, width=16, depth=2, mlp_dim=24, num_heads=2)
TINY |= dict(num_classes=3, max_patches=26, native_resize="bilinear_antialias")
SHAPES = ((4, 24), (16, 20))
# Every pooling and kind of positions.
KINDS = [
    dict(pool="map", registers=1, position_prefix=0, position="learned2d_added"),
    dict(pool="token_gap", position="sincos2d", layer_scale=0.5),
    dict(distillation="head", rotary=Rotary("index", 10.0, layout="pairs", learned=True)),
    dict(
        pool="map",
        class_token=True,
        pool_prefix=True,
        position="rope",
        rotary=Rotary("index", 50.0, (3, 5), 1.0, "xy", "pairs"),
    ),
    dict(pool="gap", position="rope", norm_after_pool=True),
]


def images(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(h, w, 3)).astype(np.float32) for h, w in shapes]


def alone(params, config, image, **how):
    """What a model made for this one size says, with its tables resized on the host."""
    one = dataclasses.replace(config, max_patches=None, image_size=image.shape[:2])
    fitted = {
        name: positions.fitted(name, value, config, one, config.native_resize)[0]
        for name, value in flatten_dict(params, sep="/").items()
    }
    return called(one, unflatten_dict(fitted, sep="/"), image[None], **how)


def called(config, params, images, platform="cpu", **how):
    graphdef, _ = structure(config)
    params = jax.tree.map(jnp.asarray, params)
    program = traced_for(fake_mesh(platform), lambda p, x: nnx.merge(graphdef, p)(x, **how))
    with jax.default_matmul_precision("highest"):
        return jax.jit(program)(params, images)


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_padded_batch_is_as_each_image_alone(fields):
    config = ViTConfig(**TINY | fields)
    params = as_float32(random_params(config))
    wanted = np.concatenate([alone(params, config, image) for image in images()])
    packed = native.packed(images(), config)
    packed.pixels[0, 6:] = 1e3  # padding does not count, whatever it holds
    assert relative_error(called(config, params, packed), wanted) < 2e-6


def test_training_moves_all_images_by_the_same_draw():
    rotary = Rotary(shift=0.5, jitter=1.5, rescale=2.0)
    config, key = ViTConfig(**TINY, position="rope", rotary=rotary), jax.random.key(3)
    params = as_float32(random_params(config))
    wanted = np.concatenate([alone(params, config, image, key=key) for image in images()])
    found = called(config, params, native.packed(images(), config), key=key)
    assert relative_error(found, wanted) < 2e-6
    still = called(config, params, native.packed(images(), config))
    assert relative_error(still, wanted) > 1e-2


def test_what_other_devices_are_given_computes_the_same():
    config = ViTConfig(**TINY, pool="map", registers=1)
    params, packed = as_float32(random_params(config)), native.packed(images(), config)
    wanted = np.float64(called(config, params, packed))
    for platform in ("gpu", "tpu"):
        assert relative_error(called(config, params, packed, platform), wanted) < 2e-6


@pytest.mark.parametrize(
    "position, method",
    [
        *(("learned", method) for method in NATIVE_METHODS),
        *(("learned2d", "zoom"), ("learned2d_added", "bilinear_aspect")),
    ],
)
def test_positions_are_resized_as_on_the_host(position, method):
    fields = TINY | dict(position=position, native_resize=method, registers=2, max_patches=64)
    config = ViTConfig(**fields)
    shapes = [(1, 1), (4, 6), (4, 5), (2, 31), (9, 3), (7, 1), (8, 8)]
    owner = SimpleNamespace(**as_float32(random_params(config)))
    found = native.Sizes(config, jnp.asarray(shapes, jnp.int32)).positions(owner)
    for each, (h, w) in zip(np.asarray(found), shapes, strict=True):
        one = dataclasses.replace(config, max_patches=None, image_size=(4 * h, 4 * w))
        tables = {
            name: positions.fitted(name, getattr(owner, name), config, one, method)[0]
            for name in positions.table_shapes(config)
        }
        wanted = positions.one_table(tables, one)
        np.testing.assert_allclose(each[: len(wanted)], wanted, atol=3e-6)


def test_intermediates():
    config = ViTConfig(**TINY, pool="gap", registers=1)
    params = as_float32(random_params(config))
    names = ("tokens", "attention", "encoded")
    _, found = called(config, params, native.packed(images(), config), capture=names)
    _, wanted = alone(params, config, images()[0], capture=names)
    for name in ("tokens", "encoded"):
        here, there = (np.moveaxis(np.asarray(each[name]), -3, 0)[0] for each in (found, wanted))
        np.testing.assert_allclose(here[..., :7, :], there, atol=1e-4, err_msg=name)
    attention = found["attention"][:, 0, :, :7]
    np.testing.assert_allclose(attention[..., :7], wanted["attention"][:, 0], atol=1e-5)
    assert not np.asarray(attention[..., 7:]).any()


def test_lists_and_arrays_of_images():
    config = ViTConfig(**TINY)
    each = images(shapes=[(8, 12), (8, 12)])
    for given in (each, np.stack(each)):
        packed = native.packed(given, config)
        assert packed.grid.tolist() == [[2, 3], [2, 3]] and not packed.pixels[:, 6:].any()
        patch = packed.pixels[1, 4].reshape(4, 4, 3)  # of row 1, column 1
        np.testing.assert_array_equal(patch, each[1][4:8, 4:8])


@pytest.mark.parametrize(
    "shape, says",
    [
        ((9, 8, 3), "no whole number of patches of 4x4 pixels and 3 channels"),
        ((8, 8, 1), "no whole number of patches of 4x4 pixels and 3 channels"),
        ((36, 12, 3), "36x12 pixels has 27 patches, and the model takes 1 to 26"),
    ],
)
def test_images_that_do_not_fit(shape, says):
    with pytest.raises(UserError, match=says):
        native.packed([np.zeros(shape, np.float32)], ViTConfig(**TINY))
    config = ViTConfig(**TINY)
    model = nnx.eval_shape(lambda: nnx.merge(*structure(config)))
    with pytest.raises(UserError, match=r"do not fit a model made for \(b, 26, 48\)"):
        model(native.Patches(np.zeros((1, 25, 48), np.float32), np.ones((1, 2), np.int32)))


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(position="relative"), "model.position 'relative' is not"),
        (dict(position_at="layers"), "model.position_at 'layers' is not"),
        (dict(patch_dropout=0.5), "model.patch_dropout 0.5 is not"),
        (dict(resnet=(1,), resnet_width=32, patch_size=1), r"model.resnet \(1,\) is not"),
        (dict(native_resize="cubic"), "model.native_resize is 'cubic'"),
        (dict(max_patches=0), "model.max_patches is 0; expected an integer from 1 up"),
    ],
)
def test_models_that_cannot(fields, says):
    with pytest.raises(UserError, match=says):
        ViTConfig(**TINY | fields)

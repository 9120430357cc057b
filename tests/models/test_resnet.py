"""ResNets and hybrids: against float64 NumPy, how they start, what images they refuse."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_resnet
import numpy_vit
import pytest
from flax import nnx
from tiny_models import as_float32, exact, random_images, relative_error, run

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models import resnet, stack
from vit_jax.models.config import ResNetConfig, ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.variants import variant

# SAME pads these sizes on one side only, odd ones on both.
TINY = dict(resnet=(2, 1), resnet_width=32, image_size=(16, 32), num_classes=5)
ENCODER = dict(patch_size=1, width=16, depth=2, mlp_dim=24, num_heads=2)


def a_resnet(style, **fields):
    return ResNetConfig(**{**TINY, **fields}, resnet_style=style)


def a_hybrid(style, **fields):
    return ViTConfig(**{**TINY, **ENCODER, **fields}, resnet_style=style)


CASES = {
    **{style: a_resnet(style) for style in resnet.STYLES},
    "v1-odd": a_resnet("v1", image_size=(33, 47), resnet=(1, 2, 1), num_classes=0),
    "v2-odd": a_resnet("v2", image_size=(33, 47), resnet=(1, 1, 1, 2), in_channels=1),
    "hybrid-v1": a_hybrid("v1"),
    "hybrid-v2": a_hybrid("v2", patch_size=2, pool="gap"),
    "hybrid-timm_v1": a_hybrid("timm_v1", patch_size=(1, 2), resnet=(1, 2, 1), image_size=(32, 64)),
    "hybrid-timm_v2": a_hybrid("timm_v2", patch_size=(1, 2), position="sincos2d"),
    "stem-v1": a_hybrid("v1", resnet=(), patch_size=2),
    "stem-v2": a_hybrid("v2", resnet=(), patch_size=(2, 4)),
}
CAPTURES = {ResNetConfig: resnet.CAPTURES, ViTConfig: stack.CAPTURES}

# Float32 comes within 3e-6 of the reference.
TOLERANCE = 1e-5


def random_params(config):
    """Float64 values that float32 holds exactly, small enough for every epsilon to tell."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        keys = [part.key for part in path]
        values = rng.normal(size=leaf.shape)
        if keys[0] != "resnet":
            values = values * (0.25 if keys[-1] == "kernel" else 0.4) + (keys[-1] == "scale")
        elif keys[-1] == "kernel":  # off zero, and some outputs a hundred times as large as others
            values = (values + 0.5) * 10 ** rng.uniform(-5, -3, size=leaf.shape[-1])
        else:
            values = 0.02 * ((keys[-1] == "scale") + 0.5 * values)
        return exact(values)

    return jax.tree.map_with_path(draw, structure(config)[1])


def reference(config, params, images, style=None):
    style = style or numpy_resnet.CODE_BASES[config.resnet_style]
    if isinstance(config, ResNetConfig):
        return numpy_resnet.forward(params, images, style)
    maps = numpy_resnet.feature_maps(params["resnet"], images, style)
    return numpy_vit.forward(params, maps, pool=config.pool, position=config.position)


@functools.cache
def tiny(case):
    """A case's config, random parameters, random images and the reference's results."""
    config = CASES[case]
    params, images = random_params(config), exact(0.01 * random_images(config))
    return config, params, images, reference(config, params, images)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_captures_equal_the_written_out_equations(case):
    config, params, images, wanted = tiny(case)
    names = CAPTURES[type(config)]
    logits, captured = run(config, params, images, capture=names)
    assert logits.dtype == jnp.float32
    assert set(captured) == set(names)
    for name, value in {**captured, "logits": logits}.items():
        assert relative_error(value, wanted[name]) < TOLERANCE, name


OTHERS = [("v1", "same", False), ("v1", "norm_eps", 1e-5), ("v1", "std_eps", 0.0)]
OTHERS += [("v1", "var_eps", 1e-8), ("v2", "same", True), ("v2", "fill", -np.inf)]
OTHERS += [("v2", "norm_eps", 1e-6), ("v2", "var_eps", 1e-8)]


@pytest.mark.parametrize("case, name, value", OTHERS)
def test_the_comparison_can_tell_the_styles_apart(case, name, value):
    # Guards the tolerance: what another style does must be far outside it.
    config, params, images, wanted = tiny(case)
    style = {**numpy_resnet.CODE_BASES[case], name: value}
    other = reference(config, params, images, style)
    assert relative_error(other["encoded"], wanted["encoded"]) > 50 * TOLERANCE


GRADIENTS = {
    "resnet": a_resnet("v2", resnet=(3,), image_size=16),
    "hybrid": a_hybrid("v1", resnet=(2,), image_size=16, depth=1),
}


def gradient(config, params, images):
    """A function of parameters and images, and the arrays to call it with."""
    graphdef = structure(config)[0]
    targets = np.random.default_rng(2).normal(size=(2, 5))

    def loss(params, images):
        return jnp.sum(nnx.merge(graphdef, params)(images) * targets)

    return jax.value_and_grad(loss), (as_float32(params), as_float32(images))


@functools.cache
def gradients(case, **fields):
    config = dataclasses.replace(GRADIENTS[case], **fields)
    function, args = gradient(config, random_params(config), 0.01 * random_images(config))
    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(function)(*args))


@pytest.mark.parametrize(
    "case, fields",
    [
        ("resnet", dict(scan=False, remat="dots")),
        ("hybrid", dict(remat="full")),
    ],
    ids=str,
)
def test_scan_and_remat_change_no_gradient(case, fields):
    wanted = gradients(case)
    got = jax.tree.leaves(gradients(case, **fields))
    for (path, leaf), other in zip(jax.tree.leaves_with_path(wanted), got, strict=True):
        assert leaf.any() and relative_error(other, leaf) < TOLERANCE, path


def count_convolutions(jaxpr):
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "conv_general_dilated"
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            count += count_convolutions(inner) if hasattr(inner, "eqns") else 0
    return count


def test_full_remat_computes_the_convolutions_anew_and_dots_keeps_them():
    def convolutions(**fields):
        config = dataclasses.replace(GRADIENTS["hybrid"], **fields)
        params, images = structure(config)[1], np.zeros((2, 16, 16, 3), np.float32)
        function, _ = gradient(config, {}, images)
        return count_convolutions(jax.make_jaxpr(function)(params, images).jaxpr)

    # The root, a unit that projects, and the scanned one; the images need no gradient.
    forward = 1 + 4 + 3
    assert convolutions() == 3 * forward - 1
    assert convolutions(remat="dots") == 3 * forward - 1
    assert convolutions(remat="full") == 4 * forward - 1


@pytest.mark.parametrize("case", ["v1", "hybrid-v2"])
def test_bfloat16_stays_near_float32(case):
    config, params, images, wanted = tiny(case)
    config = dataclasses.replace(config, dtype="bfloat16")
    name = "encoded" if case == "v1" else "patches"  # what the ResNet alone comes to
    logits, captured = run(config, params, images, capture=name)
    assert logits.dtype == jnp.float32 and captured[name].dtype == jnp.bfloat16
    # A dozen convolutions, each rounded to 8 bits: 0.4%, and some of it adds up.
    assert 1e-3 < relative_error(captured[name], wanted[name]) < 0.05
    assert {leaf.dtype.name for leaf in jax.tree.leaves(structure(config)[1])} == {"float32"}


def test_norms_and_standardisation_are_float32_under_bfloat16():
    config = dataclasses.replace(CASES["v2"], dtype="bfloat16")
    graphdef, params = structure(config)
    images = np.zeros((2, 16, 32, 3), np.float32)
    jaxpr = str(jax.make_jaxpr(lambda p, x: nnx.merge(graphdef, p)(x))(params, images))
    for operation, dtype in [("rsqrt", "f32"), ("sqrt", "f32"), ("conv_general_dilated", "bf16")]:
        types = re.findall(rf":(\w+)\[[\d,]*\] = {operation}\b", jaxpr)
        assert types and set(types) == {dtype}, operation


def test_group_norm_keeps_its_digits_where_the_mean_is_large():
    x = 1e3 + np.random.default_rng(0).normal(size=(1, 8, 8, 64)).astype(np.float32)
    neutral, style = dict(scale=1.0, bias=0.0), numpy_resnet.CODE_BASES["v1"]
    exact = numpy_resnet.group_norm(x[0].astype(np.float64), neutral, style)
    # E[x^2] - E[x]^2 in float32 would be wrong by several percent of the variance.
    y = resnet.group_norm(64, CASES["v1"], nnx.Rngs(0))(x)
    np.testing.assert_allclose(y[0], exact, atol=2e-3)


@pytest.mark.parametrize("name", ["attention", "tokens", "patches", "poooled"])
def test_a_resnet_has_no_tokens_to_capture(name):
    graphdef, params = structure(CASES["v1"])
    with pytest.raises(UserError, match=rf"'{name}'.*pooled"):
        nnx.merge(graphdef, params)(np.zeros((1, 16, 32, 3)), capture=("encoded", name))


@pytest.mark.parametrize("case", ["v1", "hybrid-v1"])
@pytest.mark.parametrize("shape", [(32, 16, 3), (16, 32, 1), (20, 32, 3)])
def test_images_of_another_shape_raise_naming_both(case, shape):
    graphdef, params = structure(CASES[case])
    with pytest.raises(UserError) as error:
        nnx.merge(graphdef, params)(np.zeros((1, *shape)))
    assert str((1, *shape)) in str(error.value) and "(b, 16, 32, 3)" in str(error.value)


def test_parameters_of_a_stage_are_the_first_unit_and_the_others_stacked():
    shapes = structure(a_hybrid("v1", resnet=(4, 1)))[1]["resnet"]
    assert set(shapes) == {"conv_root", "norm_root", "stage1", "stage2"}
    assert set(shapes["stage1"]) == {"first", "rest"} and set(shapes["stage2"]) == {"first"}
    first, rest = shapes["stage1"]["first"], shapes["stage1"]["rest"]
    assert set(first) - set(rest) == {"conv_proj", "norm_proj"}
    assert first["conv1"]["kernel"].shape == (1, 1, 32, 32)
    assert first["conv_proj"]["kernel"].shape == (1, 1, 32, 128)
    assert rest["conv1"]["kernel"].shape == (3, 1, 1, 128, 32)
    assert rest["conv2"]["kernel"].shape == (3, 3, 3, 32, 32)
    assert rest["norm3"]["scale"].shape == (3, 128)
    assert shapes["stage2"]["first"]["conv2"]["kernel"].shape == (3, 3, 64, 64)
    assert set(structure(CASES["stem-v2"])[1]["resnet"]) == {"conv_root", "norm"}


@functools.cache
def fresh(style, seed=0):
    model = vit_jax.create(a_resnet(style, resnet=(3,), head_bias=-6.9), seed=seed)
    return jax.device_get(nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.parametrize("style", resnet.STYLES)
def test_resnets_start_as_in_googles_code(style):
    for path, leaf in jax.tree.leaves_with_path(fresh(style)["resnet"]):
        module, name = path[-2].key, path[-1].key
        if name == "kernel":  # LeCun normal, cut at two standard deviations and widened
            sigma = 1 / np.sqrt(math.prod(leaf.shape[-4:-1]))
            assert abs(leaf.std() / sigma - 1) < 5 / np.sqrt(2 * leaf.size)
            assert np.abs(leaf).max() <= 2 * sigma / 0.8796
        else:  # with Google's, a unit starts as its shortcut
            nothing = name == "bias" or (module == "norm3" and "v1" in style)
            np.testing.assert_array_equal(leaf, 0 if nothing else 1, err_msg=str(path))
    assert fresh(style)["head"]["kernel"].shape == (128, 5)
    assert not fresh(style)["head"]["kernel"].any()
    np.testing.assert_array_equal(fresh(style)["head"]["bias"], np.float32(-6.9))


def test_no_two_units_start_alike_and_the_seed_decides():
    kernels = []
    for params in (fresh("v1"), fresh("v1", seed=1)):
        stage = params["resnet"]["stage1"]
        kernels.append(stage["first"]["conv2"]["kernel"].ravel())
        kernels += [kernel.ravel() for kernel in stage["rest"]["conv2"]["kernel"]]
    assert len(kernels) == 6
    correlations = np.corrcoef(kernels) - np.eye(len(kernels))
    assert np.abs(correlations).max() < 6 / np.sqrt(kernels[0].size)


def test_create_makes_the_named_model():
    model = nnx.eval_shape(lambda: vit_jax.create("R50x1", resnet=(1, 2), num_classes=3))
    assert isinstance(model, resnet.ResNet)
    assert model.config == ResNetConfig(resnet=(1, 2), num_classes=3)
    model = nnx.eval_shape(lambda: vit_jax.create("R26+S/32", depth=2))
    assert isinstance(model, vit_jax.ViT) and model.config.resnet == (2, 2, 2, 2)


@pytest.mark.parametrize(
    "name, pixels, grid, channels",
    [("R+Ti/16", 32, 7, 64), ("R50+B/16", 16, 14, 1024), ("R50+L/32", 32, 7, 2048)],
)
def test_patches_of_a_hybrid_are_cut_from_the_feature_map(name, pixels, grid, channels):
    config = variant(name)
    assert config.patch_pixels == (pixels, pixels) and config.grid == (grid, grid)
    assert config.patch_channels == channels and config.num_positions == 1 + grid**2


def test_a_fresh_head_changes_nothing_else():
    config = variant("R26+B/32", representation_size=8, head_bias=-6.9, resnet_style="timm_v1")
    wanted = dataclasses.replace(config, representation_size=None, head_bias=0.0, num_classes=7)
    assert config.with_fresh_head(7) == wanted and wanted.resnet == (2, 2, 2, 2)
    config = variant("R50x3", head_bias=-6.9, image_size=480, remat="full")
    wanted = dataclasses.replace(config, head_bias=0.0, num_classes=7)
    assert config.with_fresh_head(7) == wanted and wanted.resnet_width == 192

"""The forward pass and its gradients against float64 NumPy, and where dropout and weights start."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_vit
import pytest
from flax import nnx
from tiny_models import as_float32, random_images, random_params, relative_error, run

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models import layers
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import init_params, structure
from vit_jax.models.stack import CAPTURES
from vit_jax.models.variants import variant

# Nothing square and nothing equal, so that no two axes can be confused.
TINY = dict(
    image_size=(12, 20),
    patch_size=(4, 5),
    width=16,
    depth=3,
    mlp_dim=24,
    num_heads=2,
    num_classes=5,
)

# Float32 comes within 5e-7 of the reference; the other GELU is 6e-5 away.
TOLERANCE = 2e-6


def reference(config, params, images):
    return numpy_vit.forward(
        params,
        images,
        pool=config.pool,
        position=config.position,
        position_at=config.position_at,
        gelu=config.gelu,
        eps=config.layernorm_eps,
    )


CASES = {
    "token": dict(),
    "token-represented": dict(representation_size=6, gelu="erf", position="sincos2d"),
    "token-headless": dict(representation_size=6, num_classes=0, position="none"),
    # No key is given, so nothing is dropped.
    "gap": dict(pool="gap", gelu="erf", dropout=0.5, drop_path=0.5),
    "map": dict(pool="map", position="sincos2d", layernorm_eps=0.1),
    "map-represented": dict(pool="map", representation_size=6, gelu="erf"),
    "gap-represented": dict(
        pool="gap", representation_size=6, position="none", in_channels=1, scan=False
    ),
    "learned at layers": dict(position_at="layers", scan=False),
    "2d": dict(position="learned2d", pool="gap"),
    "2d at layers": dict(position="learned2d", position_at="layers"),
    "2d added, shared": dict(position="learned2d_added", position_at="layers_shared"),
    "relative": dict(position="relative"),
    "relative, gap": dict(position="relative", pool="gap", scan=False),
    "each patch": dict(pool="none"),
}


@functools.cache
def tiny(case, **fields):
    """A case's config, random parameters, random images and the reference's results."""
    config = ViTConfig(**{**TINY, **CASES[case], **fields})
    params, images = random_params(config), random_images(config)
    return config, params, images, reference(config, params, images)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_captures_equal_the_written_out_equations(case):
    config, params, images, wanted = tiny(case)
    logits, captured = run(config, params, images, capture=CAPTURES)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, wanted["logits"]) < TOLERANCE
    assert set(captured) == set(CAPTURES)
    for name in CAPTURES:
        assert relative_error(captured[name], wanted[name]) < TOLERANCE, name
    np.testing.assert_allclose(captured["attention"].sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "case", ["token-represented", "map-represented", "2d at layers", "relative, gap"]
)
def test_bfloat16_comes_as_close_as_it_can(case):
    config, params, images, wanted = tiny(case, dtype="bfloat16")
    logits, captured = run(config, params, images, capture=CAPTURES)
    assert logits.dtype == captured["attention"].dtype == jnp.float32
    assert captured["tokens"].dtype == captured["encoded"].dtype == jnp.bfloat16
    # Of the largest value. Eight bits are steps of 0.004, rounded some twenty times a block.
    assert 1e-4 < relative_error(logits, wanted["logits"]) < 0.025
    for name in CAPTURES:
        assert relative_error(captured[name], wanted[name]) < 0.025, name
    assert {leaf.dtype.name for leaf in jax.tree.leaves(structure(config)[1])} == {"float32"}


def traced(config, shape, **kwargs):
    """The shapes of what a model returns for images of a shape."""
    graphdef, params = structure(config)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x, **kwargs), params, images)


def test_captures_have_the_documented_shapes():
    def captured(names):
        _, values = traced(tiny("token-represented")[0], (2, 12, 20, 3), capture=names)
        return {name: value.shape for name, value in values.items()}

    depth, b, n, d, heads, r = 3, 2, 12, 16, 2, 6
    documented = {
        "patches": (b, n, d),
        "tokens": (depth, b, 1 + n, d),
        "attention": (depth, b, heads, 1 + n, 1 + n),
        "encoded": (b, 1 + n, d),
        "pooled": (b, d),
        "pre_logits": (b, r),
    }
    assert captured(CAPTURES) == documented
    for name in CAPTURES:  # what was not asked for does not come back
        assert captured(name) == {name: documented[name]}


def test_logits_are_the_same_without_captures():
    config, params, images, wanted = tiny("token")
    logits = run(config, params, images)
    assert relative_error(logits, wanted["logits"]) < TOLERANCE


@pytest.mark.parametrize(
    "changed",
    [
        *(dict(gelu="erf"), dict(layernorm_eps=0.01), dict(position="sincos2d")),
        *(dict(pool="gap"), dict(position_at="layers_shared")),
    ],
    ids=str,
)
def test_the_comparison_can_tell_the_choices_apart(changed):
    # Guards the tolerance: another choice must be far outside it.
    config, params, images, wanted = tiny("token")
    fields = dict(pool=config.pool, position=config.position, gelu=config.gelu)
    if changed == dict(pool="gap"):
        params = {**params, "pos_embed": params["pos_embed"][1:]}
    fields.update({"eps" if k == "layernorm_eps" else k: v for k, v in changed.items()})
    other = numpy_vit.forward(params, images, **fields)
    assert relative_error(other["logits"], wanted["logits"]) > 20 * TOLERANCE


def test_scan_and_loop_compute_and_drop_the_same():
    # Without a key, both equal the reference: the cases above.
    fields = dict(dropout=0.3, drop_path=0.4, depth=2)
    config, params, images, wanted = tiny("token", scan=True, **fields)
    loop, _, _, _ = tiny("token", scan=False, **fields)
    kwargs = dict(key=jax.random.key(3), capture=CAPTURES)
    logits, captured = run(config, params, images, **kwargs)
    loop_logits, loop_captured = run(loop, params, images, **kwargs)
    assert relative_error(loop_logits, np.asarray(logits)) < TOLERANCE
    for name in CAPTURES:
        assert relative_error(loop_captured[name], np.asarray(captured[name])) < TOLERANCE, name
    assert relative_error(logits, wanted["logits"]) > 0.05  # something was dropped at all


@pytest.mark.parametrize("case", ["token", "map-represented"])
def test_gradients_equal_finite_differences_of_the_reference(case):
    config, params, images, _ = tiny(case)
    targets = np.random.default_rng(2).normal(size=(2, 5))

    def loss(xp, logits):
        return xp.sum(xp.sin(logits) * targets)

    def exact_loss(params, images):
        return loss(np, reference(config, params, images)["logits"])

    graphdef, inputs = structure(config)[0], {"params": params, "images": images}

    @jax.jit
    @jax.grad
    def gradient(inputs):
        return loss(jnp, nnx.merge(graphdef, inputs["params"])(inputs["images"]))

    with jax.default_matmul_precision("highest"):
        grads = gradient(as_float32(inputs))

    flat, tree = jax.tree.flatten_with_path(inputs)
    leaves = [leaf for _, leaf in flat]
    rng, step = np.random.default_rng(4), 1e-5
    for i, ((path, leaf), grad) in enumerate(zip(flat, jax.tree.leaves(grads), strict=True)):
        # Two random directions a leaf; half way towards the gradient, so that the slope is not
        # a small difference of large terms.
        for _ in range(2):
            grad64 = np.asarray(grad, np.float64)
            towards = grad64 / np.linalg.norm(grad64)
            direction = rng.normal(size=leaf.shape)
            direction = direction / np.linalg.norm(direction) + towards
            ends = []
            for sign in (1, -1):
                moved = [*leaves[:i], leaf + sign * step * direction, *leaves[i + 1 :]]
                ends.append(exact_loss(**jax.tree.unflatten(tree, moved)))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert abs((grad64 * direction).sum() - slope) < 1e-4 * abs(slope), path


def test_softmax_and_layer_norm_are_float32_under_bfloat16():
    config, _, images, _ = tiny("map-represented", dtype="bfloat16")
    graphdef, shapes = structure(config)
    jaxpr = jax.make_jaxpr(lambda params, x: nnx.merge(graphdef, params)(x))(
        shapes, as_float32(images)
    )
    for operation in ("exp", "rsqrt"):
        types = re.findall(rf":(\w+)\[[\d,]*\] = {operation}\b", str(jaxpr))
        assert types and set(types) == {"f32"}, operation


def test_unknown_capture_raises_and_names_the_nearest():
    with pytest.raises(UserError, match=r"'atention'.*did you mean 'attention'\?"):
        traced(ViTConfig(**TINY), (1, 12, 20, 3), capture=("tokens", "atention"))


@pytest.mark.parametrize("shape", [(12, 16, 3), (20, 12, 3), (12, 20, 1)])
def test_images_of_another_shape_raise_naming_both(shape):
    with pytest.raises(UserError) as error:
        traced(ViTConfig(**TINY), (2, *shape))
    assert str((2, *shape)) in str(error.value) and "(b, 12, 20, 3)" in str(error.value)


# Dropout. All kernels are zero or the identity, so each dense layer puts out a constant of its
# own magnitude, and the residual stream spells out which of them were dropped.
EMBEDDING, ATTENTION, HIDDEN, MLP = 4096.0, 256.0, 8.0, 1.0


def constant_model(**fields):
    config = ViTConfig(
        image_size=(16, 16),
        patch_size=(4, 4),
        width=16,
        mlp_dim=16,
        num_heads=2,
        pool="gap",
        num_classes=0,
        **fields,
    )
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), structure(config)[1])
    params["pos_embed"] += EMBEDDING
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    attention["qkv"]["bias"] += np.array([1, 1, ATTENTION]).reshape(3, 1, 1)
    attention["out"]["kernel"] += np.eye(16).reshape(2, 8, 16)
    mlp["fc1"]["bias"] += HIDDEN  # which GELU leaves alone, in float32
    mlp["fc2"]["kernel"] += np.eye(16)
    mlp["fc2"]["bias"] += MLP
    return config, params


def constant_tokens(config, params, key, n):
    images = np.zeros((n, *config.image_size, 3))
    _, captured = run(config, params, images, key=key, capture=("tokens", "attention"))
    # Neither Q, K and V nor the weights are dropped: 16 equal keys, 1/16 for each.
    np.testing.assert_array_equal(captured["attention"], 1 / 16)
    tokens = np.asarray(captured["tokens"], np.float64)
    return np.diff(tokens, axis=0, prepend=0)  # what each block adds


def test_dropout_follows_every_dense_layer_but_qkv_and_the_positions():
    # Paper, appendix B.1.
    rate, depth, n = 0.25, 3, 16
    config, params = constant_model(depth=depth, dropout=rate)
    rest = constant_tokens(config, params, jax.random.key(5), n)
    scale = 1 / (1 - rate)

    def peel(rest, value):
        """Reads whether `value` is part of each element, and takes it off."""
        mask = rest > value / 2
        return mask, rest - mask * value

    embedding, rest[0] = peel(rest[0], scale * EMBEDDING)
    masks = [embedding]
    for i in range(depth):
        attention, rest[i] = peel(rest[i], scale * ATTENTION)
        hidden, rest[i] = peel(rest[i], scale**2 * HIDDEN)
        mlp, rest[i] = peel(rest[i], scale * MLP)
        assert not (hidden & ~mlp).any()  # the last dropout takes the hidden layer's share along
        hidden = np.where(mlp, hidden, np.nan)
        masks += [attention, hidden, mlp]
    assert np.abs(rest).max() < 0.01  # and nothing else was added or dropped

    five_sigma = 5 * np.sqrt(rate * (1 - rate) / (0.75 * embedding.size))
    for mask in masks:
        assert abs(np.nanmean(mask) - (1 - rate)) < five_sigma

    def covariance(a, b):
        seen = ~np.isnan(a) & ~np.isnan(b)
        return np.cov(a[seen], b[seen])[0, 1]

    # Equal masks would have a covariance of rate * (1 - rate) = 0.19.
    masks = [np.asarray(mask, float) for mask in masks]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(covariance(a, b)) < 0.02
        for axis in range(3):  # examples, tokens and channels are drawn one by one
            assert abs(covariance(a, np.roll(a, 1, axis))) < 0.02


def test_the_key_decides_what_is_dropped():
    config, params = constant_model(depth=3, dropout=0.25)
    first, same, other = (
        constant_tokens(config, params, jax.random.key(seed), 16) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert ((first != other).mean(axis=(1, 2, 3)) > 0.5).all()


def test_drop_path_drops_branches_of_whole_examples_more_often_with_depth():
    rate, depth, n = 0.5, 3, 1000
    config, params = constant_model(depth=depth, drop_path=rate)
    steps = constant_tokens(config, params, jax.random.key(6), n)
    steps[0] -= EMBEDDING
    np.testing.assert_array_equal(steps, np.broadcast_to(steps[..., :1, :1], steps.shape))
    kept = []
    for i, step in enumerate(steps[:, :, 0, 0]):
        block_rate = rate * i / (depth - 1)
        scale = 1 / (1 - block_rate)
        attention = step > scale * ATTENTION / 2
        mlp = step - attention * scale * ATTENTION > scale * (HIDDEN + MLP) / 2
        rest = step - scale * (attention * ATTENTION + mlp * (HIDDEN + MLP))
        assert np.abs(rest).max() < 0.01
        for branch in (attention, mlp):
            share = 1 - branch.mean()
            assert abs(share - block_rate) <= 5 * np.sqrt(block_rate * (1 - block_rate) / n)
            kept.append(branch)
    assert all((a == b).mean() < 0.9 for i, a in enumerate(kept[2:]) for b in kept[2:][:i])


# Few tokens and two blocks, and all that there may be.
D, HEADS, VARIANT = 192, 3, "Ti/8x16"
FRESH = dict(image_size=(64, 128), depth=2, num_classes=10, representation_size=96, head_bias=-6.9)
FRESH |= dict(pool="map", class_token=True)


def created(seed):
    model = vit_jax.create(VARIANT, seed=seed, **FRESH)
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


@functools.cache
def fresh():
    return created(seed=0)


def assert_uniform(x, bound):
    x = x.ravel().astype(np.float64)
    assert np.abs(x).max() <= bound * (1 + 1e-6)
    sigma = bound / np.sqrt(3)
    assert abs(x.std() / sigma - 1) < 5 / np.sqrt(x.size)
    assert abs(x.mean()) < 5 * sigma / np.sqrt(x.size)
    # The outer half of the range holds half of the values, unlike any bell.
    assert abs((np.abs(x) > bound / 2).mean() - 0.5) < 2.5 / np.sqrt(x.size)


def assert_normal(x, sigma, truncated=False):
    x = x.ravel().astype(np.float64)
    assert abs(x.std() / sigma - 1) < 5 / np.sqrt(2 * x.size)
    assert abs(x.mean()) < 5 * sigma / np.sqrt(x.size)
    # LeCun normal is cut at two standard deviations and widened to make up for it.
    limit = 2 * sigma / 0.87962566
    assert (np.abs(x).max() <= limit * (1 + 1e-6)) == truncated


@pytest.mark.parametrize("block", [0, 1])
def test_attention_starts_as_four_xavier_matrices(block):
    attention = jax.tree.map(lambda x: x[block], fresh()["blocks"]["attention"])
    kernel = attention["qkv"]["kernel"]
    assert kernel.shape == (D, 3, HEADS, 64)
    bound = np.sqrt(6 / (D + D))
    for i in range(3):
        assert_uniform(kernel[:, i], bound)
    assert_uniform(attention["out"]["kernel"], bound)
    assert not attention["qkv"]["bias"].any() and not attention["out"]["bias"].any()


@pytest.mark.parametrize("block", [0, 1])
def test_mlp_starts_as_xavier_with_tiny_biases(block):
    mlp = jax.tree.map(lambda x: x[block], fresh()["blocks"]["mlp"])
    for layer in (mlp["fc1"], mlp["fc2"]):
        assert_uniform(layer["kernel"], np.sqrt(6 / (D + 4 * D)))
        assert_normal(layer["bias"], 1e-6)


def test_embeddings_start_as_in_googles_code():
    params = fresh()
    assert params["patch_embed"]["kernel"].shape == (8, 16, 3, D)
    assert_normal(params["patch_embed"]["kernel"], np.sqrt(1 / (8 * 16 * 3)), truncated=True)
    assert not params["patch_embed"]["bias"].any()
    assert params["pos_embed"].shape == (1 + 8 * 8, D)
    assert_normal(params["pos_embed"], 0.02)
    assert params["cls_token"].shape == (1, 1, D) and not params["cls_token"].any()


def test_norms_and_heads_start_as_in_googles_code():
    params = fresh()
    for norm in (params["norm"], params["blocks"]["norm1"], params["blocks"]["norm2"]):
        np.testing.assert_array_equal(norm["scale"], 1)
        np.testing.assert_array_equal(norm["bias"], 0)
    assert params["blocks"]["norm1"]["scale"].shape == (2, D)
    assert_normal(params["pre_logits"]["kernel"], np.sqrt(1 / D), truncated=True)
    assert not params["pre_logits"]["bias"].any()
    assert params["head"]["kernel"].shape == (96, 10) and not params["head"]["kernel"].any()
    np.testing.assert_array_equal(params["head"]["bias"], np.float32(-6.9))


def test_no_two_matrices_start_alike():
    blocks = fresh()["blocks"]
    matrices = [
        np.asarray(matrix).reshape(-1)[: D * D]
        for i in range(2)
        for matrix in (
            *np.moveaxis(blocks["attention"]["qkv"]["kernel"][i], 1, 0),
            blocks["attention"]["out"]["kernel"][i],
            blocks["mlp"]["fc1"]["kernel"][i],
            blocks["mlp"]["fc2"]["kernel"][i],
        )
    ]
    correlations = np.corrcoef(matrices) - np.eye(len(matrices))
    assert np.abs(correlations).max() < 6 / D


def test_attention_pooling_starts_as_big_visions():
    # Of a probe [1 1 d], Xavier sees 1 input and d outputs.
    pool = fresh()["attention_pool"]
    assert_uniform(pool["probe"], np.sqrt(6 / (1 + D)))
    for i in range(3):
        assert_uniform(pool["attention"]["qkv"]["kernel"][:, i], np.sqrt(6 / (D + D)))
    assert_uniform(pool["mlp"]["fc1"]["kernel"], np.sqrt(6 / (D + 4 * D)))
    np.testing.assert_array_equal(pool["norm"]["scale"], 1)


def test_the_seed_alone_decides_the_weights():
    def small(seed):
        return nnx.to_pure_dict(nnx.state(vit_jax.create("mu/4x8", image_size=(8, 16), seed=seed)))

    first, same, other = small(0), small(0), small(1)
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert (first["pos_embed"] != other["pos_embed"]).mean() > 0.99
    assert (first["patch_embed"]["kernel"] != other["patch_embed"]["kernel"]).mean() > 0.99
    q, other_q = (p["blocks"]["attention"]["qkv"]["kernel"] for p in (first, other))
    assert (q != other_q).mean() > 0.99


def test_structure_and_init_params_are_the_models_own():
    config = variant(VARIANT, **FRESH)
    expected = structure(config)[1]
    params = jax.jit(lambda: init_params(config, seed=0))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, fresh())
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    assert {type(leaf) for leaf in jax.tree.leaves(expected)} == {jax.ShapeDtypeStruct}
    assert traced(config, (2, 64, 128, 3)).shape == (2, 10)


def test_create_makes_the_named_model():
    model = nnx.eval_shape(lambda: vit_jax.create("mu/4x8", image_size=(8, 16), num_classes=3))
    assert isinstance(model, vit_jax.ViT)
    assert model.config == vit_jax.ViTConfig(
        image_size=(8, 16),
        patch_size=(4, 8),
        width=32,
        depth=1,
        mlp_dim=128,
        num_heads=2,
        num_classes=3,
    )
    config = ViTConfig(**TINY, pool="map")
    assert nnx.eval_shape(lambda: vit_jax.create(config)).config == config


def test_fields_beside_a_config_are_not_ignored():
    config = ViTConfig(**TINY)
    model = nnx.eval_shape(lambda: vit_jax.create(config, num_classes=9))
    assert model.config.num_classes == 9


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'craete'"):
        vit_jax.craete  # noqa: B018


def test_a_mean_is_over_the_patches_alone():
    config = ViTConfig(**{**TINY, "pool": "gap", "class_token": True, "registers": 2})
    _, captured = run(config, random_params(config), random_images(config), capture=CAPTURES)
    assert config.num_prefix_tokens == 3 and not config.norm_after_pool
    mean = captured["encoded"][:, 3:].mean(axis=1)
    np.testing.assert_allclose(captured["pooled"], mean, atol=1e-5)


def test_two_heads_are_averaged():
    config = ViTConfig(**{**TINY, "distillation": "head"})
    params = random_params(config)
    logits, captured = run(config, params, random_images(config), capture=("encoded",))
    each = [
        captured["encoded"][:, i] @ params[name]["kernel"] + params[name]["bias"]
        for i, name in enumerate(("head", "head_dist"))
    ]
    np.testing.assert_allclose(logits, (each[0] + each[1]) / 2, atol=1e-4)


def test_the_first_half_of_swiglu_is_the_gate():
    config = ViTConfig(**{**TINY, "mlp": "swiglu"})
    mlp = layers.Mlp(config, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 3, config.width)).astype(np.float32)
    gate, value = np.split(x @ mlp.fc1.kernel[...] + mlp.fc1.bias[...], 2, axis=-1)
    y = gate / (1 + np.exp(-gate)) * value
    np.testing.assert_allclose(
        mlp(jnp.asarray(x)), y @ mlp.fc2.kernel[...] + mlp.fc2.bias[...], atol=1e-5
    )

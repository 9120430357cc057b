"""Dropout, stochastic depth, LayerNorm and the choice of attention, each by itself."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_jax.errors import UserError
from vit_jax.models import attention, elementwise, layers, stack
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure

KEY = jax.random.key(7)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2000, 6, 8)), jnp.float32)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.8])
def test_dropout_zeroes_its_share_and_scales_the_rest(rate):
    x = X
    y = np.asarray(elementwise.dropout(x, rate, KEY))
    kept = y != 0
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / (1 - rate), rtol=1e-6)
    # Element by element: no axis is dropped as a whole.
    for axis in range(3):
        noise = np.sqrt(rate * (1 - rate) / x.shape[axis])
        assert kept.mean(axis=axis).std() < 1.6 * noise


def test_dropout_is_the_identity_without_a_key_or_rate():
    x = X
    assert elementwise.dropout(x, 0.5, None) is x
    assert elementwise.dropout(x, 0.0, KEY) is x


def test_dropout_depends_on_the_key_alone():
    y = elementwise.dropout(X, 0.5, KEY)
    np.testing.assert_array_equal(y, elementwise.dropout(X, 0.5, jax.random.key(7)))
    assert (y != elementwise.dropout(X, 0.5, jax.random.key(8))).mean() > 0.4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dropping_keeps_the_dtype(dtype):
    x = X.astype(dtype)
    assert elementwise.dropout(x, 0.5, KEY).dtype == dtype
    assert elementwise.drop_path(x, 0.5, KEY).dtype == dtype
    assert elementwise.drop_path(x, jnp.float32(0.5), KEY).dtype == dtype


def test_mean_over_many_keys_is_the_deterministic_value():
    x, rate, n = X[:3], 0.3, 4000
    keys = jax.random.split(KEY, n)
    # A kept value is x / (1 - rate): the variance of one draw is x^2 rate / (1 - rate).
    five_sigma = 5 * np.abs(x) * np.sqrt(rate / (1 - rate) / n)
    drops = (elementwise.dropout, elementwise.drop_path)
    draws = jax.jit(
        jax.vmap(lambda key: [drop(x, rate, key) for drop in drops]),
        compiler_options={"xla_backend_optimization_level": 0},
    )(keys)
    for draw in draws:
        assert (np.abs(draw.mean(axis=0) - x) < five_sigma).all()


@pytest.mark.parametrize("rate", [0.2, 0.6])
@pytest.mark.parametrize("traced", [False, True])
def test_drop_path_drops_whole_examples(rate, traced):
    x = X
    y = np.asarray(elementwise.drop_path(x, jnp.float32(rate) if traced else rate, KEY))
    kept = (y != 0).any(axis=(1, 2))
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / 2000)
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / (1 - rate), rtol=1e-6)
    np.testing.assert_array_equal(y[~kept], 0)


def test_drop_path_is_the_identity_without_a_key_or_rate():
    x = X
    assert elementwise.drop_path(x, 0.5, None) is x
    np.testing.assert_array_equal(elementwise.drop_path(x, 0.0, KEY), x)


def test_layer_norm_keeps_its_digits_where_the_mean_is_large():
    config = ViTConfig(width=64, num_heads=1)
    x = 1e4 + X.reshape(-1, 64)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(axis=-1, keepdims=True)) / exact.std(axis=-1, keepdims=True)
    # E[x^2] - E[x]^2 in float32 would be wrong by more than the variance itself.
    y = layers.layer_norm(config, nnx.Rngs(0))(x)
    np.testing.assert_allclose(y, exact, atol=2e-3)


def test_auto_attention_on_cpu_is_xlas():
    for dtype in ("float32", "bfloat16"):
        assert attention.attention_backend("auto", dtype, 64, 197) == "xla"


def test_auto_attention_with_a_bias_is_xlas(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.attention_backend.__wrapped__("auto", "bfloat16", 64, 197, True) == "xla"


@pytest.mark.parametrize("wanted, reached", [("xla", []), ("cudnn", ["cudnn"])])
def test_an_explicit_attention_is_what_runs(wanted, reached, monkeypatch):
    assert attention.attention_backend(wanted, "float32", 7, 3) == wanted
    asked = []

    def record(q, k, v, bias, *, implementation):
        assert bias is None
        asked.append(implementation)
        return v

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    config = ViTConfig(width=16, num_heads=2, attention=wanted)
    module = nnx.eval_shape(lambda: layers.Attention(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    x = jax.ShapeDtypeStruct((1, 5, 16), jnp.float32)
    jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    assert asked == reached


@pytest.mark.parametrize("position, wanted", [("learned", "cudnn"), ("relative", "xla")])
def test_captured_weights_are_those_that_a_fused_call_uses(position, wanted, monkeypatch):
    # What stands in for both sees the same arguments, and returns what weighs the values so.
    seen = {}

    def fused(q, k, v, bias=None, *, implementation="xla"):
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        logits = np.einsum("bmhk,bnhk->bhmn", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(logits + (0 if bias is None else np.asarray(bias, np.float64)))
        seen.update(implementation=implementation, weights=weights / weights.sum(-1, keepdims=True))
        return jnp.asarray(np.einsum("bhmn,bnhk->bmhk", seen["weights"], v), jnp.bfloat16)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    monkeypatch.setattr(layers, "attend", fused)
    monkeypatch.setattr(attention, "attention_backend", lambda *_: wanted)
    config = ViTConfig(
        image_size=8, patch_size=4, width=16, num_heads=2, dtype="bfloat16", position=position
    )
    module = layers.Attention(config, rngs=nnx.Rngs(0), relative=position == "relative")
    if position == "relative":
        random = np.random.default_rng(1).normal(size=(7, 2, 8))
        module.rel_embed[...] = jnp.asarray(random, jnp.float32)
    captures = stack.Captures("attention")
    x = np.random.default_rng(0).normal(size=(3, 5, 16))
    module(jnp.asarray(x, jnp.bfloat16), captures)
    assert seen["implementation"] == wanted
    assert captures.values["attention"].dtype == jnp.float32
    np.testing.assert_allclose(captures.values["attention"], seen["weights"], atol=1e-5)
    assert np.ptp(seen["weights"]) > 0.1


@pytest.mark.parametrize(
    "dtype, head_dim, tries",
    [
        ("bfloat16", 64, True),
        ("float16", 128, True),
        ("float32", 64, False),
        ("bfloat16", 20, False),
        ("bfloat16", 136, False),
    ],
)
def test_auto_attention_falls_back_where_cudnn_does_not_work(
    dtype, head_dim, tries, monkeypatch, caplog
):
    # A GPU in name only: whatever compiles for cuDNN here fails, and that is what auto catches.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    choose = attention.attention_backend.__wrapped__
    with caplog.at_level(logging.WARNING):
        assert choose("auto", dtype, head_dim, 197) == "xla"
    assert ("cuDNN" in caplog.text) == tries


def test_auto_attention_is_cudnns_where_it_compiles(monkeypatch):
    monkeypatch.setattr(attention, "target", lambda: "gpu")
    probed = []

    def fused(q, k, v, *, implementation, **lengths):
        assert set(lengths) == {"query_seq_lengths", "key_value_seq_lengths"}
        probed.append((implementation, q.shape, q.dtype.name))
        return q * k * v

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    attention._cudnn_works.cache_clear()
    assert attention.attention_backend("auto", "bfloat16", 64, 197) == "cudnn"
    [(implementation, shape, dtype)] = set(probed)
    assert (implementation, dtype) == ("cudnn", "bfloat16")
    assert (shape[1], shape[3]) == (198, 64)


def softmax_attention(q, k, v, bias, above):
    """Attention in float64, and of `sum(above * y)` the gradients to q, k, v and bias."""
    logits = np.einsum("bmhk,bnhk->bhmn", q, k) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    y = np.einsum("bhmn,bnhk->bmhk", weights, v)
    to_weights = np.einsum("bmhk,bnhk->bhmn", above, v)
    to_logits = weights * (to_weights - (weights * to_weights).sum(axis=-1, keepdims=True))
    to_q = np.einsum("bhmn,bnhk->bmhk", to_logits, k) / np.sqrt(q.shape[-1])
    to_k = np.einsum("bhmn,bmhk->bnhk", to_logits, q) / np.sqrt(q.shape[-1])
    return logits, [y, to_q, to_k, np.einsum("bhmn,bmhk->bnhk", weights, above), to_logits]


# Of the largest value. Logits of about 100 have float32 steps of 8e-6 where those of 1 have 1e-7;
# bfloat16 has steps of 0.008, and what is multiplied on the way back is rounded twice.
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "dtype, large, of_value, of_gradient",
    [
        ("float32", False, 1e-6, 2e-6),
        ("float32", True, 3e-5, 3e-5),
        ("bfloat16", False, 0.005, 0.02),
        ("bfloat16", True, 0.005, 0.02),
    ],
)
def test_attend_is_softmax_attention(dtype, large, of_value, of_gradient, biased):
    random = np.random.default_rng(3)
    shapes = [(2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8), (2, 3, 5, 7), (2, 5, 3, 8)]
    q, k, v, bias, above = (random.normal(size=shape) for shape in shapes)
    if large:  # whatever the query, all keys match it by as much more
        q[..., 0], k[..., 0] = 100, 3
        bias = bias + 40
    q, k, v, bias, above = (jnp.asarray(x, dtype) for x in (q, k, v, bias, above))
    held = [np.asarray(x, np.float64) for x in (q, k, v, bias * biased, above)]
    logits, wanted = softmax_attention(*held)
    with np.errstate(over="ignore"):
        assert np.isinf(np.exp(logits.astype(np.float32))).any() == large

    found, back = jax.vjp(attention.attend, q, k, v, *[bias] * biased)
    found = [found, *back(above)]
    for name, ours, theirs in zip(("y", "q", "k", "v", "bias"), found, wanted, strict=False):
        assert ours.dtype == dtype, name
        error = np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
        assert error < (of_value if name == "y" else of_gradient), name


@pytest.mark.parametrize(
    "inputs, outputs, equation",
    [
        ((8,), (3, 2, 4), "bnd,dshk->bnshk"),  # queries, keys and values
        ((8,), (2, 4), "bnd,dhk->bnhk"),  # queries alone
        ((2, 4), (8,), "bnhk,hkd->bnd"),  # out of attention
    ],
)
def test_product_is_every_token_times_the_kernel(inputs, outputs, equation):
    random = np.random.default_rng(4)
    x, kernel = random.normal(size=(2, 5, *inputs)), random.normal(size=(*inputs, *outputs))
    above = random.normal(size=(2, 5, *outputs))
    found, back = jax.vjp(layers.linear, jnp.float32(x), jnp.float32(kernel))
    np.testing.assert_allclose(found, np.einsum(equation, x, kernel), rtol=1e-5, atol=1e-5)
    left, right, out = equation.replace("->", ",").split(",")
    to_x, to_kernel = back(jnp.float32(above))
    expected = np.einsum(f"{out},{right}->{left}", above, kernel)
    np.testing.assert_allclose(to_x, expected, rtol=1e-5, atol=1e-5)
    expected = np.einsum(f"{left},{out}->{right}", x, above)
    np.testing.assert_allclose(to_kernel, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scan, backend, depth, wanted",
    [
        (None, "gpu", 24, False),
        (None, "gpu", 25, True),
        (None, "cpu", 24, True),
        (None, "tpu", 1, True),
        (True, "gpu", 1, True),
        (False, "gpu", 25, False),
        (False, "cpu", 1, False),
    ],
)
def test_where_blocks_are_scanned(scan, backend, depth, wanted, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert stack.scanned(scan, depth) is wanted
    # And that is what the program has: one body, or as many as there are blocks.
    if depth == 1:
        return
    config = ViTConfig(image_size=8, patch_size=4, width=8, num_heads=1, depth=depth, scan=scan)
    graphdef, shapes = structure(config)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    program = jax.make_jaxpr(lambda params, x: nnx.merge(graphdef, params)(x))(shapes, images)
    assert ("scan" in {equation.primitive.name for equation in program.eqns}) == wanted


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_images_that_are_no_floats_are_refused(dtype):
    config = ViTConfig(image_size=(8, 12), patch_size=(4, 4))
    for images in (np.zeros((2, 8, 12, 3), dtype), jnp.zeros((2, 8, 12, 3), dtype)):
        with pytest.raises(UserError, match=rf"normalised floats .* \.preprocess .*not {dtype}"):
            layers.check_images(images, config)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_images_of_any_floats_are_taken(dtype):
    images = jnp.zeros((2, 8, 12, 3), dtype)
    layers.check_images(images, ViTConfig(image_size=(8, 12), patch_size=(4, 4)))


@pytest.mark.parametrize(
    "shape, hint",
    [
        ((2, 3, 8, 12), r"their channels come first, and images\.transpose\(0, 2, 3, 1\) puts"),
        ((8, 12, 3), r"one image is images\[None\]"),
        ((2, 12, 8, 3), r"run them through \.preprocess, or load .* another image_size"),
        ((2, 8, 12, 1), r"run them through \.preprocess, or load .* another in_channels"),
        ((8, 12), r"run them through \.preprocess"),
        ((1, 2, 8, 12, 3), r"run them through \.preprocess"),
    ],
)
def test_images_of_another_layout_are_told_what_to_become(shape, hint):
    config = ViTConfig(image_size=(8, 12), patch_size=(4, 4))
    with pytest.raises(UserError, match=rf"a model made for \(b, 8, 12, 3\): {hint}"):
        layers.check_images(np.zeros(shape, np.float32), config)

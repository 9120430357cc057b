"""What is traced for GPUs is the same function: run here in float32, beside what a CPU is given."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fake_mesh
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as fused
from tiny_models import as_float32, random_images, random_params

from vit_jax import compiler
from vit_jax.models import attention, elementwise, layers, native
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.layers import folded
from vit_jax.models.lora import Lora
from vit_jax.models.native import Patches
from vit_jax.models.rotary import Rotary
from vit_jax.models.vit import ViT

GPU = fake_mesh("gpu")
SIZES = dict(image_size=8, patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=24, num_classes=5)


def computed(config, function, mesh=None):
    """What a function of (model, images) gives and its gradient, traced for a mesh's devices."""
    graphdef = structure(config)[0]
    images = as_float32(random_images(config, 3))

    def run(params):
        out = function(nnx.merge(graphdef, params), images)
        weights = np.random.default_rng(3).normal(size=out.shape)
        return jnp.sum(out * weights), out

    grad = jax.value_and_grad(run, has_aux=True)
    return jax.jit(compiler.traced_for(mesh, grad) if mesh else grad)(
        as_float32(random_params(config))
    )


def assert_alike(found, wanted, rtol):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), 1e-3), path


@pytest.mark.parametrize(
    "fields",
    [
        dict(depth=2),
        dict(depth=2, pool="gap", layer_scale=0.5, gelu="erf", scan=True),
        dict(qkv_bias=False, gelu="quick", pool="map", registers=2),
        dict(depth=2, mlp="swiglu", layer_scale=0.1, position_at="layers"),
        dict(position="relative", remat="full"),
        dict(position="rope", key_bias=False, mlp="swiglu", mlp_norm=True, attention_norm=True),
        dict(norm="rmsnorm", mlp="swiglu", proj_bias=False, qkv_bias=False, patch_norm=True),
        dict(parallel=True, layer_scale=0.5),
        dict(depth=4, branches=2, layer_scale=0.5),
        dict(depth=4, branches=2, scan=True, lora=Lora(2)),
        dict(depth=2, norm="rmsnorm", qk_norm="head", layer_scale=0.5, mlp_scale=False, scan=True),
        dict(norm_after_branch=True, layer_scale=0.5, norm="rmsnorm", qk_norm="all"),
        dict(pool="gap", norm_after_pool=True, pre_norm=True, position="sincos2d"),
        dict(
            depth=2, lora=Lora(2, targets=("qkv", "out", "fc1", "fc2")), layer_scale=0.5, pool="map"
        ),
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_a_cpu(fields):
    config = ViTConfig(attention="xla", **SIZES | fields)
    on_cpu, on_gpu = (computed(config, ViT.__call__, mesh) for mesh in (None, GPU))
    assert_alike(on_gpu, on_cpu, 2e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_folded_blocks_have_norms_that_do_nothing(bias):
    blocks = as_float32(random_params(ViTConfig(layer_scale=0.5, qkv_bias=bias, **SIZES)))["blocks"]
    found = jax.vmap(folded)(blocks)
    for name in ("scale1", "scale2"):
        np.testing.assert_array_equal(found[name], 1)
    for norm in ("norm1", "norm2") if bias else ("norm2",):
        np.testing.assert_array_equal(found[norm]["scale"], 1)
        np.testing.assert_array_equal(found[norm]["bias"], 0)
    if not bias:  # there is nowhere to move what it adds
        np.testing.assert_array_equal(found["norm1"]["bias"], blocks["norm1"]["bias"])


LOWERED = {
    "rope": (True, dict(position="rope", registers=1)),
    "moved": (True, dict(position="rope", rotary=Rotary(rescale=2.0), patch_dropout=0.5)),
    "learned rope": (True, dict(rotary=Rotary("index", learned=True, layout="pairs"))),
    "native rope": (True, dict(position="rope", max_patches=6)),
    "native": (True, dict(pool="gap", max_patches=5)),
    "a bias": (False, dict(position="relative_bias")),
}


@pytest.mark.parametrize("name", LOWERED)
def test_what_auto_lowers_to_for_gpus(name, monkeypatch):
    """cuDNN's kernel, there and back, wherever nothing is added to the logits; there is no GPU."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 92800)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(attention, "_cudnn_works", lambda *_: True)
    taken, fields = LOWERED[name]
    config = ViTConfig(**SIZES | fields, dtype="bfloat16", scan=True)
    graphdef, shapes = structure(config)
    images = jax.ShapeDtypeStruct((3, 8, 8, 3), jnp.float32)
    if config.max_patches is not None:
        grid = jax.ShapeDtypeStruct((3, 2), jnp.int32)
        images = Patches(jax.ShapeDtypeStruct((3, config.max_patches, 48), jnp.float32), grid)

    def loss(params, images):
        return nnx.merge(graphdef, params)(images, key=jax.random.key(0)).sum()

    program = jax.jit(compiler.traced_for(GPU, jax.grad(loss))).trace(shapes, images)
    calls = Counter(
        re.findall(r"__cudnn[\w$]+", program.lower(lowering_platforms=("cuda",)).as_text())
    )
    wanted = {"__cudnn$fmhaSoftmax": 1, "__cudnn$fmhaSoftmaxBackward": 1}
    assert calls == (wanted if taken else {})


@pytest.mark.parametrize("fields", [dict(registers=1), dict(pool="gap", position="rope")], ids=str)
def test_cudnn_is_told_how_many_tokens_of_each_image_are_real(fields, monkeypatch):
    """In its place what masks as it is documented; padded queries get zeros."""
    config = ViTConfig(attention="xla", max_patches=5, **SIZES | fields)
    rng = np.random.default_rng(1)
    packed = native.packed(
        [rng.normal(size=(h, w, 3)) for h, w in ((8, 8), (4, 20), (4, 4))], config
    )

    def lengths_only(q, k, v, bias, *, implementation, query_seq_lengths, key_value_seq_lengths):
        assert bias is None and implementation == "cudnn" and q.shape[1] % 2 == 0
        asked.append(implementation)
        real = (
            jnp.arange(q.shape[1]) < jnp.minimum(query_seq_lengths, key_value_seq_lengths)[:, None]
        )
        y = attention.attend(q, k, v, jnp.where(real, 0.0, -jnp.inf)[:, None, None])
        return jnp.where(real[..., None, None], y, 0.0)

    def outputs(model, _):
        logits, captured = model(packed, capture="attention")
        counts = config.num_prefix_tokens + packed.grid.prod(axis=1)
        queries = np.arange(config.num_tokens) < counts[:, None]  # padding asks something else
        weights = captured["attention"] * queries[:, None, :, None]
        return jnp.concatenate([logits.ravel(), weights.ravel()])

    wanted, asked = computed(config, outputs), []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lengths_only)
    for module in (layers, attention):
        monkeypatch.setattr(module, "backend_of", lambda config: "cudnn")
    assert_alike(computed(config, outputs, GPU), wanted, 2e-5)
    assert asked


def normalised_in_float64(x, epsilon, above):
    """LayerNorm without scale and bias, and the gradient of sum(above * y), written out."""
    n = x.shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    inverse = (np.square(centred).mean(-1, keepdims=True) + epsilon) ** -0.5
    y = centred * inverse
    jacobian = (np.eye(n) - 1 / n - y[..., :, None] * y[..., None, :] / n) * inverse[..., None]
    return y, np.einsum("...i,...ij->...j", above, jacobian)


def test_the_norm_and_its_gradient_are_the_written_out_ones():
    random = np.random.default_rng(0)
    x, above = random.normal(3, 2, (2, 5, 12)), random.normal(size=(2, 5, 12))
    wanted, gradient = normalised_in_float64(x, 1e-6, above)
    y, back = jax.vjp(lambda x: elementwise.normalised(1e-6, x), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    np.testing.assert_allclose(back(jnp.asarray(above, jnp.float32))[0], gradient, atol=1e-5)


def gelu_in_float64(kind, x):
    """GELU and its derivative by a central difference."""
    from scipy.special import erf, expit

    def value(x):
        if kind == "quick":
            return x * expit(1.702 * x)
        if kind == "erf":
            return x / 2 * (1 + erf(x / np.sqrt(2)))
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    return value(x), (value(x + 1e-5) - value(x - 1e-5)) / 2e-5


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("kind", ["tanh", "erf", "quick"])
def test_the_derivative_of_gelu_is_that_of_the_formula(kind, dtype, atol):
    x = jnp.linspace(-4, 4, 201).astype(dtype)
    y, back = jax.vjp(elementwise.gelu(kind), x)
    value, slope = gelu_in_float64(kind, np.asarray(x, np.float64))
    np.testing.assert_allclose(np.asarray(y, np.float64), value, atol=atol)
    found = np.asarray(back(jnp.ones_like(x))[0], np.float64)
    np.testing.assert_allclose(found, slope, atol=atol)
    assert back(jnp.ones_like(x))[0].dtype == jnp.dtype(dtype)


@pytest.mark.parametrize(
    "fields, padded",
    [
        (dict(), True),
        (dict(pool="gap"), False),
        (dict(depth=2, position_at="layers", scan=True), True),
        (dict(pool="gap", registers=3), True),
    ],
    ids=str,
)
def test_an_odd_number_of_tokens_is_padded_and_nobody_sees_it(fields, padded, monkeypatch):
    """Logits, what is captured, and gradients; in cuDNN's place what masks as it is documented."""
    config = ViTConfig(attention="xla", **SIZES | fields)
    real, seen = config.num_tokens, set()

    def fused(q, k, v, bias, *, implementation, **lengths):
        seen.add((implementation, q.shape[1], tuple(lengths)))
        y = attention.attend(q[:, :real], k[:, :real], v[:, :real])
        return jnp.pad(y, ((0, 0), (0, q.shape[1] - real), (0, 0), (0, 0)))

    def outputs(model, images):
        logits, captured = model(images, capture=("tokens", "attention", "encoded"))
        assert captured["attention"].shape == (config.depth, 3, 2, real, real)
        return jnp.concatenate([logits.ravel(), *(x.ravel() for x in captured.values())])

    wanted = computed(config, outputs)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    for module in (layers, attention):
        monkeypatch.setattr(module, "backend_of", lambda config: "cudnn")
    assert_alike(computed(config, outputs, GPU), wanted, 2e-5)
    names = ("query_seq_lengths", "key_value_seq_lengths") if padded else ()
    assert seen == {("cudnn", real + padded, names)}

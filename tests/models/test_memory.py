"""What a scanned block keeps for the way back: counted, bounded by a formula, without effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fake_mesh
from flax import nnx

from vit_jax import compiler
from vit_jax.models import stack
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure

B, N, D, M, H = 3, 17, 32, 96, 4  # images, tokens, width, mlp_dim, heads


def config_of(depth, dtype, **fields):
    sizes = dict(image_size=16, patch_size=4, width=D, mlp_dim=M, num_heads=H, num_classes=5)
    return ViTConfig(depth=depth, dtype=dtype, attention="xla", **sizes | fields)


def loss_of(config):
    """(params) -> a number, of random images and of weights that tell all logits apart."""
    random = np.random.default_rng(0)
    images = random.normal(size=(B, 16, 16, 3)).astype(np.float32)
    above = random.normal(size=(B, 5)).astype(np.float32)
    graphdef = structure(config)[0]
    return lambda params: jnp.sum(nnx.merge(graphdef, params)(images) * above)


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kept(config):
    """Bytes that the way back is given: `jax.vjp` returns a pytree of it."""
    return size(jax.eval_shape(lambda p: jax.vjp(loss_of(config), p)[1], structure(config)[1]))


def kept_by_a_block(dtype, **fields):
    """Without its parameters."""
    two, four = config_of(2, dtype, **fields), config_of(4, dtype, **fields)
    block = size(structure(two)[1]["blocks"]) / 2
    return (kept(four) - kept(two)) / 2 - block


def bound(dtype):
    """What a block may keep.

    In the model's dtype the block's input, and what came of the products with its kernels but the
    last: queries, keys and values, attention's output, the hidden layer. In float32 the softmax's
    exponentials, what they weighted, their sums and maxima, and of both LayerNorms two statistics.
    """
    e = jnp.dtype(dtype).itemsize
    return B * N * (e * (D + 3 * D + D + M) + 4 * D) + 4 * B * H * N * (N + 2) + 4 * 4 * B * N


def everything(monkeypatch):
    policy = jax.checkpoint_policies.everything_saveable
    monkeypatch.setitem(stack._REMAT, "none", policy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gelu", ["tanh", "quick", "erf"])
def test_a_block_keeps_products_sums_and_exponentials(gelu, dtype, monkeypatch):
    fields, allowed = dict(scan=True, gelu=gelu), bound(dtype)
    found = kept_by_a_block(dtype, **fields)
    assert 0.98 * allowed < found <= allowed
    everything(monkeypatch)
    assert kept_by_a_block(dtype, **fields) > 1.7 * allowed


def test_what_is_computed_anew_is_a_choice():
    found = [kept_by_a_block("float32", remat=remat) for remat in ("full", "dots", "none")]
    stream = 4 * B * N * D
    assert 0.95 * stream < found[0] < 1.1 * stream
    assert found[0] < found[1] < found[2] - 4 * B * H * N * N


def test_products_are_kept_on_gpus_as_on_cpus():
    """By remat=dots: queries, keys, values, attention's output and the hidden layer."""
    config = config_of(4, "float32", remat="dots", scan=True)
    on_gpu = compiler.traced_for(fake_mesh("gpu"), kept)(config)
    assert on_gpu == pytest.approx(kept(config), rel=0.05)


def test_the_compiled_program_keeps_no_more(monkeypatch):
    """By how many bytes a block makes the temporaries grow; of bfloat16 a CPU makes float32."""

    def growth(remat):
        sizes = []
        for depth in (4, 8):
            config = config_of(depth, "float32", scan=True, remat=remat)
            grad = jax.jit(jax.grad(loss_of(config)))
            compiled = grad.lower(structure(config)[1]).compile()
            sizes.append(compiled.memory_analysis().temp_size_in_bytes)
        return (sizes[1] - sizes[0]) / 4

    none, dots, full = map(growth, ("none", "dots", "full"))
    assert 1.2 * 1.2 * full < 1.2 * dots < none < 1.05 * bound("float32")
    everything(monkeypatch)
    assert growth("none") > 1.8 * bound("float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_without_a_checkpoint(dtype, monkeypatch):
    config, random = config_of(3, dtype, scan=True), np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: random.normal(0.1, 0.2, leaf.shape).astype(np.float32), structure(config)[1]
    )

    def gradient():
        return jax.jit(jax.grad(loss_of(config)))(params)

    ours, size_of_ours = gradient(), kept(config)
    monkeypatch.setattr(jax, "checkpoint", lambda f, **_: f)
    plain = gradient()
    assert kept(config) > 1.3 * size_of_ours
    for (path, leaf), wanted in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(plain), strict=True
    ):
        assert np.abs(leaf - wanted).max() <= 1e-6 * np.abs(wanted).max(), path

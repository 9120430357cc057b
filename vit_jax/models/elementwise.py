"""Elementwise and per-token operations, with derivatives that store few residuals."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Key

from vit_jax.compiler import target


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zeroes elements of x at `rate` and scales up the rest; the identity without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def drop_path(
    x: Float[Array, "b n d"], rate: float | Float[Array, ""], key: Key[Array, ""] | None
) -> Float[Array, "b n d"]:
    """Stochastic depth (arXiv 1603.09382): drops a whole residual branch for some examples."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def kept_patches(patches: int, rate: float) -> int:
    """How many patches patch dropout keeps: rounded down, and at least one, as timm does."""
    return max(1, int(patches * (1.0 - rate)))


def drop_patches(
    x: Float[Array, "b n d"], rate: float, num_prefix_tokens: int, key: Key[Array, ""] | None
) -> Float[Array, "b m d"]:
    """Patch dropout (FLIP, arXiv 2212.00794): keeps a random part of each image's patch tokens.

    The prefix tokens stay, and the order. The identity without a key, or at a rate of 0.
    """
    if key is None or rate == 0:
        return x
    prefix, patches = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]
    b, n, _ = patches.shape
    drawn = jax.random.uniform(jax.random.fold_in(key, 1), (b, n)).argsort(axis=1)
    index = jnp.sort(drawn[:, : kept_patches(n, rate)], axis=1)
    return jnp.concatenate([prefix, jnp.take_along_axis(patches, index[..., None], axis=1)], axis=1)


def gelu(kind: str) -> Callable[[Array], Array]:
    """Returns a GELU: `tanh` (Google's JAX code), `erf` (exact, PyTorch) or `quick` (CLIP)."""
    return functools.partial(_gelu, kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gelu(kind: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU with a derivative that stores only x, computed in float32."""
    return _plain_gelu(kind, x)


def _plain_gelu(kind: str, x: Array) -> Array:
    if kind == "quick":
        return x * jax.nn.sigmoid(1.702 * x)
    return nnx.gelu(x, approximate=kind == "tanh")


def _gelu_back(kind: str, x: Array, gradient: Array) -> tuple[Array]:
    _, back = jax.vjp(functools.partial(_plain_gelu, kind), x.astype(jnp.float32))
    return (back(gradient.astype(jnp.float32))[0].astype(x.dtype),)


_gelu.defvjp(lambda kind, x: (_gelu(kind, x), x), _gelu_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalised(epsilon: float, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Normalises x to mean 0 and variance 1 over the last dimension, in float32."""
    return _normalised(epsilon, x)[0]


def _normalised(epsilon: float, x: Array) -> tuple[Array, Array]:
    # Two-pass variance: the fast one loses digits where the mean is large.
    x = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return x * inverse, inverse


def _normalised_back(epsilon: float, x: Array, gradient: Array) -> tuple[Array]:
    y, inverse = _normalised(epsilon, x)
    gradient = gradient - gradient.mean(-1, keepdims=True)
    return (inverse * (gradient - y * (gradient * y).mean(-1, keepdims=True)),)


normalised.defvjp(lambda epsilon, x: (normalised(epsilon, x), x), _normalised_back)


@jax.custom_vjp
def row_major(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """The identity; on GPUs, the gradient of x is stored in row-major order.

    Otherwise XLA transposes the tokens of all blocks for the sum over images that is the gradient
    of the position embeddings.
    """
    return x


def _row_major_back(_: None, gradient: Array) -> tuple[Array]:
    if target() == "gpu":
        gradient = with_layout_constraint(gradient, Layout(major_to_minor=(0, 1, 2)))
    return (gradient,)


row_major.defvjp(lambda x: (x, None), _row_major_back)

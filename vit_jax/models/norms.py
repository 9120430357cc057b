"""Normalisation of tokens: LayerNorm and RMSNorm, and the norms of queries and keys."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vit_jax.compiler import target
from vit_jax.models.config import ViTConfig
from vit_jax.models.elementwise import normalised


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last dimension, with statistics in float32."""

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """On GPUs with a custom derivative: one kernel, which needs x alone."""
        if target() != "gpu":
            return super().__call__(x)
        y = normalised(self.epsilon, x.astype(jnp.float32))
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last dimension (arXiv 1910.07467), in float32.

    There is no mean to subtract, and no bias.
    """

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype):
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones(size))

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...]).astype(self.dtype)


Norm = LayerNorm | RMSNorm


def layer_norm(config: ViTConfig, rngs: nnx.Rngs, size: int | None = None) -> Norm:
    """Returns the model's norm over `size` channels, by default its width (`config.norm`)."""
    size, dtype = size or config.width, jnp.dtype(config.dtype)
    if config.norm == "rmsnorm":
        return RMSNorm(size, config.layernorm_eps, dtype)
    return LayerNorm(
        size,
        epsilon=config.layernorm_eps,
        dtype=dtype,
        use_fast_variance=False,  # which loses digits where the mean is large
        rngs=rngs,
    )


def add_qk_norms(owner: nnx.Module, config: ViTConfig, rngs: nnx.Rngs) -> None:
    """Creates the norms of queries and keys, over each head or over all of them together."""
    size = config.head_dim if config.qk_norm == "head" else config.width
    owner.q_norm, owner.k_norm = layer_norm(config, rngs, size), layer_norm(config, rngs, size)


def qk_normed(norm: Norm, x: Float[Array, "b n h k"]) -> Float[Array, "b n h k"]:
    """Normalises queries or keys, over each head or, where the norm is as wide, over all heads."""
    if norm.scale.shape[-1] == x.shape[-1]:
        return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

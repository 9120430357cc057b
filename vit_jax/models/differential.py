"""Differential attention (arXiv 2410.05258): the difference of two attention maps a head.

Each half of a head's channels of queries and keys makes a map of its own; the second one is
subtracted from the first, times a learned lambda, so that what both attend to cancels out.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vit_jax.models.config import ViTConfig
from vit_jax.models.linear import einsum_f32
from vit_jax.models.norms import RMSNorm

NAMES = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
EPSILON = 1e-5  # of the norm of each head's output, in the paper's code and timm's


def add_parameters(owner: nnx.Module, config: ViTConfig, rngs: nnx.Rngs) -> None:
    """Creates the vectors of lambda, half a head long, and the norm of each head's output."""
    for name in NAMES:
        drawn = 0.1 * jax.random.normal(rngs.params(), (config.head_dim // 2,))
        setattr(owner, name, nnx.Param(drawn))
    owner.head_norm = RMSNorm(config.head_dim, EPSILON, jnp.dtype(config.dtype))


def initial_lambda(index: int | float | Float[Array, ""]) -> Float[Array, ""]:
    """Lambda at the start of training, in the block of that index."""
    return 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(index, jnp.float32))


def weights(
    owner: nnx.Module,
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    index: int | float | Float[Array, ""],
) -> Float[Array, "b h n n"]:
    """The difference of both attention maps, in float32; rows sum to 1 - lambda."""
    maps = []
    for a, b in zip(jnp.split(q, 2, axis=-1), jnp.split(k, 2, axis=-1), strict=True):
        scores = einsum_f32("bmhk,bnhk->bhmn", a, b) * a.shape[-1] ** -0.5
        maps.append(jax.nn.softmax(scores, axis=-1))
    q1, k1, q2, k2 = (getattr(owner, name)[...] for name in NAMES)
    factor = jnp.exp(q1 @ k1) - jnp.exp(q2 @ k2) + initial_lambda(index)
    return maps[0] - factor * maps[1]


def attend(
    owner: nnx.Module,
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    index: int | float | Float[Array, ""],
) -> Float[Array, "b n h k"]:
    """Attention with these weights; each head's output is normalised, and scaled down as at first.

    Args:
      index: of the block, from 0.
    """
    y = einsum_f32("bhmn,bnhk->bmhk", weights(owner, q, k, index).astype(v.dtype), v)
    return (owner.head_norm(y) * (1 - initial_lambda(index))).astype(v.dtype)

"""Scaled dot-product attention: cuDNN's fused kernel or plain matrix products, and its weights."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from vit_jax.compiler import target, target_device
from vit_jax.models.config import ViTConfig
from vit_jax.models.linear import einsum_f32

logger = logging.getLogger(__name__)


def attend(
    q: Float[Array, "b m h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    bias: Float[Array, "#b #h #m n"] | None = None,
) -> Float[Array, "b m h k"]:
    """Unfused attention, softmax(q k' / sqrt(head_dim) + bias) v, with the softmax in float32.

    The softmax's division comes last, after the product with v, so that the sums of the backward
    pass run over head_dim, not over tokens (as in FlashAttention, arXiv 2205.14135, section 3.1).
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    scores = einsum_f32("bhmk,bhnk->bhmn", q, k)
    scale = q.shape[-1] ** -0.5
    if bias is not None:
        scores, scale = scores * scale + bias, 1.0
    highest = jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True)
    weights = jnp.exp((scores - highest) * scale)
    y = einsum_f32("bhmn,bhnk->bhmk", weights.astype(v.dtype), v)
    return jnp.swapaxes(y / weights.sum(axis=-1, keepdims=True), 1, 2).astype(v.dtype)


def attention_weights(
    q: Float[Array, "b m h k"],
    k: Float[Array, "b n h k"],
    bias: Float[Array, "#b #h #m n"] | None = None,
) -> Float[Array, "b h m n"]:
    """Attention weights in float32, which fused attention never stores, computed separately."""
    scores = jnp.einsum("bmhk,bnhk->bhmn", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    return jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)


def backend_of(config: ViTConfig) -> str:
    """Returns the backend of self-attention on the device that is traced for: `cudnn` or `xla`."""
    sizes = (config.dtype, config.head_dim, config.num_tokens)
    unfused = config.biases_logits or config.differential
    return attention_backend(config.attention, *sizes, unfused)


def attention_backend(
    wanted: str, dtype: str, head_dim: int, tokens: int, biased: bool = False
) -> str:
    """Chooses the backend of `jax.nn.dot_product_attention`; `auto` is cuDNN where it works.

    cuDNN takes half precision and head dimensions that are multiples of 8. Whether it works on the
    target device is tested once, by compiling a small gradient. With a bias on the logits (relative
    positions), `auto` is always XLA, as cuDNN limits the sizes and gradients of a bias; padding of
    images at their native size is no bias to it. cuDNN's gradients cannot be differentiated again:
    second derivatives need XLA.
    """
    if wanted != "auto":
        return wanted
    if biased or target() != "gpu" or dtype == "float32" or head_dim % 8 or head_dim > 128:
        return "xla"
    return "cudnn" if _cudnn_works(target_device(), dtype, head_dim, tokens) else "xla"


@functools.cache
def _cudnn_works(device: Any, dtype: str, head_dim: int, tokens: int) -> bool:
    def probe(q):
        y = jax.nn.dot_product_attention(q, q, q, implementation="cudnn", **padding(q, tokens))
        return y.astype("float32").sum()

    try:
        place = NamedSharding(Mesh([device], "x"), PartitionSpec())
        shape = (1, even(tokens), 1, head_dim)
        jax.jit(jax.grad(probe)).lower(jax.ShapeDtypeStruct(shape, dtype, sharding=place)).compile()
    except Exception as error:  # noqa: BLE001  cuDNN and XLA raise many types
        logger.warning("cuDNN attention is not available here, using XLA's: %s", error)
        return False
    return True


def padding(
    q: Float[Array, "b n h k"], length: int | Int[Array, " b"]
) -> dict[str, Int[Array, " b"]]:
    """Length arguments for `jax.nn.dot_product_attention` if only the first `length` tokens count.

    One length of all images, or one of each. They formally depend on q, so that they have its batch
    axes under `jax.vmap`, which JAX 0.10 needs.
    """
    if isinstance(length, int) and length == q.shape[1]:
        return {}
    lengths = jnp.where(q[:, 0, 0, 0] > 0, jnp.int32(length), jnp.int32(length))
    return dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths)


def even(tokens: int) -> int:
    """Rounds up to even: with cuDNN, JAX (0.10 to 0.12) refuses to train on odd token counts."""
    return tokens + tokens % 2

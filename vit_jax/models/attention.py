"""How attention is computed: by cuDNN where that works, or by products; and its weights."""

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
    bias: Float[Array, "b h m n"] | None = None,
) -> Float[Array, "b m h k"]:
    """softmax(q k' / sqrt(head_dim) + bias) v, where nothing fused does it; softmax in float32.

    The softmax divides last, what is weighted instead of the weights: so on the way back its sums
    run over head_dim, not over tokens (FlashAttention's trick, arXiv 2205.14135, section 3.1).
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
    bias: Float[Array, "b h m n"] | None = None,
) -> Float[Array, "b h m n"]:
    """The softmax that a fused attention never writes to memory, computed beside it in float32."""
    scores = jnp.einsum("bmhk,bnhk->bhmn", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    return jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)


def backend_of(config: ViTConfig) -> str:
    """What self-attention runs on where this is traced for: `cudnn` or `xla`."""
    sizes = (config.dtype, config.head_dim, config.num_tokens)
    return attention_backend(config.attention, *sizes, config.position == "relative")


def attention_backend(
    wanted: str, dtype: str, head_dim: int, tokens: int, biased: bool = False
) -> str:
    """Chooses what `jax.nn.dot_product_attention` runs on; `auto` is cuDNN where it works.

    cuDNN takes half precision and head dimensions that are multiples of 8; whether it does on the
    device that is traced for is found out by compiling a small gradient once. With a bias of the
    logits (relative positions), `auto` is XLA everywhere: cuDNN's has limits on sizes and on
    gradients. Its gradients have none of their own: second derivatives need XLA's.
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


def padding(q: Float[Array, "b n h k"], length: int) -> dict[str, Int[Array, " b"]]:
    """What tells `jax.nn.dot_product_attention` that tokens count up to `length`, if not all do.

    The same for each image. It depends on q, if only for the eye, so that it has q's axes under
    `jax.vmap`: JAX 0.10 needs that.
    """
    if length == q.shape[1]:
        return {}
    lengths = jnp.where(q[:, 0, 0, 0] > 0, jnp.int32(length), jnp.int32(length))
    return dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths)


def even(tokens: int) -> int:
    """How many tokens cuDNN is given: JAX refuses odd numbers in training (0.10 to 0.12)."""
    return tokens + tokens % 2

"""Matrix products of tokens with kernels, laid out and typed for speed on each device."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.compiler import target


def linear(
    x: Float[Array, "b n *inputs"],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
) -> Float[Array, "b n *outputs"]:
    """Multiplies every token [*inputs] by a kernel [*inputs *outputs] and adds a bias [*outputs].

    On CPUs and GPUs batch and tokens are flattened into one dimension; otherwise XLA transposes x
    in memory for the kernel's gradient. On TPUs that would cost a copy, as each image's tokens are
    padded to whole tiles.
    """
    inputs, lead = x.ndim - 2, x.shape[:2]
    if target() != "tpu":
        x = x.reshape(-1, *x.shape[2:])
    y = jnp.tensordot(x, kernel, axes=inputs)
    if bias is not None:
        if target() == "gpu" and bias.ndim == 2:  # heads: cuBLASLt adds vectors alone
            y, bias = y.reshape(len(y), -1), bias.reshape(-1)
        y = y + bias
    return y.reshape(*lead, *kernel.shape[inputs:])


def split_linear(
    x: Float[Array, "b n d"],
    kernel: Float[Array, "d parts heads k"],
    bias: Float[Array, "parts heads k"] | None = None,
) -> tuple[Float[Array, "b n heads k"], ...]:
    """`linear`, with a separate output for each part (Q, K, V).

    On GPUs the forward pass is one product a part, since slices of a fused result would be copied
    for cuDNN; the backward pass is one fused product.
    """
    return (_split_linear if target() == "gpu" else _slices_of_linear)(x, kernel, bias)


def _slices_of_linear(x: Array, kernel: Array, bias: Array | None) -> tuple[Array, ...]:
    y = linear(x, kernel, bias)
    return tuple(y[:, :, i] for i in range(kernel.shape[1]))


@jax.custom_vjp
def _split_linear(x: Array, kernel: Array, bias: Array | None) -> tuple[Array, ...]:
    parts = range(kernel.shape[1])
    return tuple(linear(x, kernel[:, i], None if bias is None else bias[i]) for i in parts)


_split_linear.defvjp(
    lambda *inputs: (_split_linear(*inputs), inputs),
    lambda inputs, gradients: jax.vjp(_slices_of_linear, *inputs)[1](gradients),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_f32(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, y)` of two arrays of one dtype, accumulated and returned in float32.

    The products in its gradient are in the inputs' dtype, too. JAX's own derivative would multiply
    by a float32 gradient, which is many times slower than bfloat16 on tensor cores. There is no
    forward-mode derivative.
    """
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _forward(equation: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum_f32(equation, x, y), (x, y)


def _back(equation: str, inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    _, back = jax.vjp(functools.partial(jnp.einsum, equation), *inputs)
    return back(gradient.astype(inputs[0].dtype))


einsum_f32.defvjp(_forward, _back)

"""Matrix products: where their tokens are, and in which type they are computed."""

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
    """Every token [*inputs] times a kernel [*inputs *outputs], plus a bias [*outputs].

    On CPUs and GPUs with the tokens of all images in one dimension: else XLA transposes x in memory
    for the kernel's gradient. A TPU would have to move them: it keeps each image's in whole tiles.
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
    """`linear`, as an array for each part.

    On GPUs they are products of their own, since cuDNN would have slices of one copied; on the way
    back they are one again.
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
    """`jnp.einsum(equation, x, y)` of two arrays of one dtype, summed and returned in float32.

    The products of its gradients are in that dtype too. Those that JAX makes by itself would have
    the float32 gradient of the result in them, and where there are tensor cores, bfloat16 is many
    times faster. There is no forward-mode derivative.
    """
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _forward(equation: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum_f32(equation, x, y), (x, y)


def _back(equation: str, inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    _, back = jax.vjp(functools.partial(jnp.einsum, equation), *inputs)
    return back(gradient.astype(inputs[0].dtype))


einsum_f32.defvjp(_forward, _back)

"""Matrix products: where their tokens are, and in which type they are computed."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.compiler import target


def product(
    x: Float[Array, "b n *inputs"], kernel: Float[Array, "..."]
) -> Float[Array, "b n *outputs"]:
    """Every token [*inputs] times a kernel [*inputs *outputs].

    On a CPU, with the tokens of all images in one dimension: else XLA transposes x in memory for
    the kernel's gradient. A TPU would have to move them: it keeps each image's in whole tiles.
    """
    inputs, lead = x.ndim - 2, x.shape[:2]
    if target() == "cpu":
        x = x.reshape(-1, *x.shape[2:])
    y = jnp.tensordot(x, kernel, axes=inputs)
    return y.reshape(*lead, *kernel.shape[inputs:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed(equation: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, y)` of two arrays of one dtype, summed and returned in float32.

    The products of its gradients are in that dtype too. Those that JAX makes by itself would have
    the float32 gradient of the result in them, and where there are tensor cores, bfloat16 is many
    times faster. There is no forward-mode derivative.
    """
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _forward(equation: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return summed(equation, x, y), (x, y)


def _back(equation: str, inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    _, back = jax.vjp(functools.partial(jnp.einsum, equation), *inputs)
    return back(gradient.astype(inputs[0].dtype))


summed.defvjp(_forward, _back)

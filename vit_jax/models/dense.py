"""Outputs of patches, interpolated to pixels."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def stretched(
    logits: Float[Array, "b gh gw k"], size: tuple[int, int], own: Int[Array, "b 2"] | None = None
) -> Float[Array, "b h w k"]:
    """Interpolates bilinearly between the centres of patches to `size` (h, w).

    As `F.interpolate` of torch without aligned corners: beyond the outermost centres the nearest
    patch counts.

    Args:
      own: the (h, w) of each image, where they differ: it is in the first rows and columns of the
        result, and what is beyond has no meaning.
    """
    return across(down(logits, size[0], own), size[1], own)


def down(
    x: Float[Array, "b gh w k"], length: int, own: Int[Array, "b 2"] | None = None
) -> Float[Array, "b {length} w k"]:
    """Interpolates rows alone (see `stretched`)."""
    if own is None:
        weights, equation = _weights(x.shape[1], length, length), "hg,bgwk->bhwk"
    else:
        weights, equation = _weights(x.shape[1], length, own[:, :1]), "bhg,bgwk->bhwk"
    return jnp.einsum(equation, weights, x, precision="highest")


def across(
    x: Float[Array, "b h gw k"], length: int, own: Int[Array, "b 2"] | None = None
) -> Float[Array, "b h {length} k"]:
    """Interpolates columns alone (see `stretched`)."""
    if own is None:
        weights, equation = _weights(x.shape[2], length, length), "wg,bhgk->bhwk"
    else:
        weights, equation = _weights(x.shape[2], length, own[:, 1:]), "bwg,bhgk->bhwk"
    return jnp.einsum(equation, weights, x, precision="highest")


def _weights(
    old: int, length: int, new: int | Int[Array, "b 1"]
) -> Float[Array, "*b {length} {old}"]:
    """How much each of `old` samples counts at `length` places, of which the first `new` matter."""
    centres = jnp.clip((jnp.arange(length) + 0.5) * (old / new) - 0.5, 0, old - 1)
    return jnp.maximum(1 - jnp.abs(centres[..., None] - jnp.arange(old)), 0)

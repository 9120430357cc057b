"""Outputs of patches, interpolated to pixels."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def stretched(
    logits: Float[Array, "b gh gw k"],
    size: tuple[int, int],
    own: Int[Array, "b 2"] | None = None,
    of: Int[Array, "b 2"] | None = None,
) -> Float[Array, "b h w k"]:
    """Interpolates bilinearly between the centres of patches to `size` (h, w).

    As `F.interpolate` of torch without aligned corners: beyond the outermost centres the nearest
    patch counts.

    Args:
      own: the (h, w) of each image, where they differ: it is in the first rows and columns of the
        result, and what is beyond has no meaning.
      of: the (gh, gw) of each image, where they differ, of which the same is true.
    """
    return across(down(logits, size[0], own, of), size[1], own, of)


def down(
    x: Float[Array, "b gh w k"],
    length: int,
    own: Int[Array, "b 2"] | None = None,
    of: Int[Array, "b 2"] | None = None,
) -> Float[Array, "b {length} w k"]:
    """Interpolates rows alone (see `stretched`)."""
    weights, each = _weights(x.shape[1], length, 0, own, of)
    return jnp.einsum(f"{each}hg,bgwk->bhwk", weights, x, precision="highest")


def across(
    x: Float[Array, "b h gw k"],
    length: int,
    own: Int[Array, "b 2"] | None = None,
    of: Int[Array, "b 2"] | None = None,
) -> Float[Array, "b h {length} k"]:
    """Interpolates columns alone (see `stretched`)."""
    weights, each = _weights(x.shape[2], length, 1, own, of)
    return jnp.einsum(f"{each}wg,bhgk->bhwk", weights, x, precision="highest")


def _weights(
    old: int, new: int, axis: int, own: Int[Array, "b 2"] | None, of: Int[Array, "b 2"] | None
) -> tuple[Float[Array, "*b {new} {old}"], str]:
    """How much each of `old` samples counts in each of `new`; and the axis of images, if any."""
    ours = new if own is None else own[:, axis, None]
    theirs = old if of is None else of[:, axis, None]
    centres = jnp.clip((jnp.arange(new) + 0.5) * (theirs / ours) - 0.5, 0, theirs - 1)
    weights = jnp.maximum(1 - jnp.abs(centres[..., None] - jnp.arange(old)), 0)
    return weights, "b" * (weights.ndim - 2)

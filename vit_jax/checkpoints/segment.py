"""Masks from the logits of patches: a class for each pixel of images of any size."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from vit_jax.data.joint import common_size
from vit_jax.data.masks import Mask
from vit_jax.models.dense import across, down

_ROWS = 32  # of pixels whose logits are there at a time


def pixel_classes(
    logits: Float[Array, "b gh gw k"], sizes: Sequence[tuple[int, int]]
) -> list[Mask]:
    """The class of each pixel of images of these sizes (h, w), by interpolated logits."""
    own = np.array(sizes, np.int32)
    found = np.asarray(on_device(logits, jnp.asarray(own), common_size(own)))
    return [mask[:h, :w] for mask, (h, w) in zip(found, sizes, strict=True)]


@functools.partial(jax.jit, static_argnames="size")
def on_device(
    logits: Float[Array, "b gh gw k"],
    own: Int[Array, "b 2"],
    size: tuple[int, int],
    of: Int[Array, "b 2"] | None = None,
) -> UInt8[Array, "b {size[0]} {size[1]}"]:
    """The classes of the pixels of images, each in the first rows and columns of `size` (h, w).

    `size` is from `common_size`: what is beyond an image has no meaning. `of` are the (gh, gw) of
    each image's logits, where they differ.
    """
    (h, w), b = size, len(logits)
    rows = down(logits.astype(jnp.float32), h, own, of)
    strips = jnp.moveaxis(rows.reshape(b, h // _ROWS, _ROWS, *rows.shape[2:]), 1, 0)
    classes = jax.lax.map(
        lambda strip: across(strip, w, own, of).argmax(axis=-1).astype(jnp.uint8), strips
    )
    return jnp.moveaxis(classes, 0, 1).reshape(b, h, w)

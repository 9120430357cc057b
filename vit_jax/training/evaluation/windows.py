"""Sliding windows: the logits of the pixels of large images, from windows of the model's size.

As the `slide` mode of mmsegmentation: logits, not probabilities, are averaged where windows
overlap, and the last window of a row or column ends with the image.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from vit_jax.models.dense import stretched


def step_sizes(window: tuple[int, int], stride: float) -> tuple[int, int]:
    """The (h, w) in pixels from window to window, of a stride in windows."""
    h, w = (max(1, round(side * stride)) for side in window)
    return h, w


def averaged(
    logits_of: Callable[[Array], Float[Array, "b gh gw k"]],
    images: Shaped[Array, "b h w c"],
    own: Int[Array, "b 2"],
    window: tuple[int, int],
    stride: float,
) -> Float[Array, "b h w k"]:
    """The mean of the logits of all windows that a pixel is in.

    Args:
      logits_of: the logits of the patches of windows [b ph pw c], `window` = (ph, pw).
      images: those of the batch, at the top left of arrays of one size, at least `window`.
      own: the (h, w) of each image; what is beyond in the result has no meaning.
      stride: the distance from one window to the next, in windows, in (0, 1].
    """
    b, steps = len(images), step_sizes(window, stride)
    # Of each image, the number of windows down and across.
    counts = jnp.stack(
        [jnp.maximum(-(-(own[:, axis] - window[axis]) // steps[axis]), 0) + 1 for axis in (0, 1)],
        axis=1,
    )
    rows, columns = counts.max(axis=0)
    shape = jax.eval_shape(
        logits_of, jax.ShapeDtypeStruct((b, *window, images.shape[3]), images.dtype)
    )

    def add(number, sums):
        at = jnp.stack([number // columns, number % columns])  # down, across
        there = (at < counts).all(axis=1)
        places = jnp.minimum(at * jnp.array(steps), own - jnp.array(window))
        cut = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), (*window, x.shape[2])))
        found = stretched(logits_of(cut(images, places)), window)
        found = jnp.where(there[:, None, None, None], found, 0.0)
        ones = jnp.broadcast_to(there[:, None, None, None], (b, *window, 1)).astype(jnp.float32)

        def put(sum_, x, at):
            old = jax.lax.dynamic_slice(sum_, (*at, 0), x.shape)
            return jax.lax.dynamic_update_slice(sum_, old + x, (*at, 0))

        return jax.vmap(put)(sums, jnp.concatenate([found, ones], axis=-1), places)

    sums = jnp.zeros((*images.shape[:3], shape.shape[-1] + 1), jnp.float32)
    sums = jax.lax.fori_loop(0, rows * columns, add, sums)
    return sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)

"""Semantic segmentation: losses of pixels, from the logits of patches and masks."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from vit_jax.data.masks import IGNORED
from vit_jax.models.dense import stretched
from vit_jax.training import objectives


def counted(masks: Integer[Array, "b h w"]) -> Float[Array, " b"]:
    """The number of pixels of each mask that count."""
    return jnp.sum(masks != IGNORED, axis=(1, 2)).astype(jnp.float32)


def sums(
    logits: Float[Array, "b gh gw k"],
    masks: Integer[Array, "b h w"],
    *,
    smoothing: float = 0.0,
    weights: tuple[float, ...] | None = None,
    focal: float = 0.0,
    dice: float = 0.0,
) -> dict[str, Float[Array, " b"]]:
    """Sums over the pixels of each image that count, to be divided by their number in the batch.

    Args:
      smoothing, weights, focal: as in `Augment`, of each pixel.
      dice: weight of `soft_dice`, which stands for each pixel of its image.

    Returns:
      loss: the cross-entropy and, with `dice`, that times its weight.
      pixel_accuracy: the number of pixels whose top class is right.
      dice: of all pixels, if it has a weight.
    """
    logits = stretched(logits.astype(jnp.float32), masks.shape[1:])
    valid, k = masks != IGNORED, logits.shape[-1]
    targets = jax.nn.one_hot(masks, k) * (1 - smoothing) + smoothing / k
    weights = None if weights is None else np.asarray(weights, np.float32)
    losses = objectives.softmax(logits, targets, weights, focal)
    right = valid & (logits.argmax(-1) == masks)
    found = {
        "loss": jnp.sum(losses, axis=(1, 2), where=valid),
        "pixel_accuracy": right.sum(axis=(1, 2)).astype(jnp.float32),
    }
    if dice:
        found["dice"] = counted(masks) * soft_dice(logits, masks)
        found["loss"] += dice * found["dice"]
    return found


def soft_dice(
    logits: Float[Array, "b h w k"], masks: Integer[Array, "b h w"]
) -> Float[Array, " b"]:
    """The soft Dice loss (arXiv 1606.04797) of each image, in [0, 1]; 0 where no pixel counts.

    1 minus the mean, over the classes in the image's mask, of 2 sum(p y) / (sum(p) + sum(y)), of
    probabilities p and the mask y of the class, over the pixels that count.
    """
    valid = (masks != IGNORED)[..., None]
    p = jnp.where(valid, jax.nn.softmax(logits), 0.0)
    y = jax.nn.one_hot(masks, logits.shape[-1])  # zeros, where the mask has no class
    area = y.sum(axis=(1, 2))
    ratio = 2 * (p * y).sum(axis=(1, 2)) / jnp.maximum(p.sum(axis=(1, 2)) + area, 1e-30)
    there = area > 0
    mean = ratio.sum(axis=-1, where=there) / jnp.maximum(there.sum(axis=-1), 1)
    return jnp.where(there.any(axis=-1), 1 - mean, 0.0)

"""Masked patch prediction (arXiv 2010.11929, sections 4.6 and B.1.2): corruption, targets, losses.

Half of the patch embeddings of an image are corrupted: 80% of these are replaced by a learned
[mask] embedding, 10% by that of another patch and 10% are kept, drawn independently. The output at
each corrupted patch predicts the original. Choices where the paper is silent: the other patch is
from the same image, but never the patch itself, so that no device needs another's images; half is
rounded; a loss is the mean over the corrupted patches.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, Shaped

from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ModelConfig, ViTConfig
from vit_jax.models.corruption import Corruption

MASKED, REPLACED = 0.8, 0.1  # the rest is kept
BITS = 3


@dataclasses.dataclass(frozen=True)
class Target:
    """What is predicted of a patch: mean colours of `cells` x `cells` areas, or (0) its pixels."""

    cells: int

    def shape(self, config: ViTConfig) -> tuple[int, ...]:
        """Shape of the prediction for one patch: (cells, classes), or (values,)."""
        channels, (ph, pw) = config.in_channels, config.patch_pixels
        return (self.cells**2, 2 ** (BITS * channels)) if self.cells else (ph * pw * channels,)


TARGETS = {"masked_colour": Target(1), "masked_small": Target(4), "masked_pixels": Target(0)}


def patch_outputs(objective: str, config: ModelConfig) -> int:
    """Number of outputs that the objective needs for each patch.

    Raises:
      UserError: the model has no patches, or their size does not suit the target.
    """
    if not isinstance(config, ViTConfig):
        raise UserError(
            f"objective {objective} predicts patches, which a ResNet has none of: name a ViT or a "
            "hybrid as model.variant"
        )
    if config.representation_size:
        raise UserError(
            f"model.representation_size is {config.representation_size}, but a model of objective "
            f"{objective} has no head: set it to None"
        )
    target, (ph, pw) = TARGETS[objective], config.patch_pixels
    if target.cells and (ph % target.cells or pw % target.cells):
        raise UserError(
            f"objective {objective} shrinks each patch to 4x4 pixels, but patches are {ph}x{pw}: "
            "their sides must be multiples of 4; or use masked_colour, masked_pixels"
        )
    if target.cells and config.in_channels > 4:
        raise UserError(
            f"objective {objective} has {8**config.in_channels:,} colours for "
            f"{config.in_channels} channels: at most 4 are possible; or use masked_pixels"
        )
    if config.grid[0] * config.grid[1] < 2:
        raise UserError(
            f"objective {objective} needs several patches, but an image of "
            f"{config.image_size[0]}x{config.image_size[1]} pixels is one patch of {ph}x{pw}"
        )
    return math.prod(target.shape(config))


def num_corrupted(patches: int) -> int:
    """Number of corrupted patches in an image: half of them, rounded."""
    return max(round(patches / 2), 1)


def draw_corruption(keys: Key[Array, " b"], patches: int) -> Corruption:
    """Draws the corruption of each image from its own key."""
    count = num_corrupted(patches)

    def draw(key):
        order_key, kind_key, other_key = jax.random.split(key, 3)
        order = jnp.argsort(jax.random.uniform(order_key, (patches,)))
        where, chosen = order[:count], jnp.argsort(order) < count
        kind = jax.random.uniform(kind_key, (patches,))
        own = jnp.arange(patches)
        other = (own + jax.random.randint(other_key, (patches,), 1, patches)) % patches
        replaced = chosen & (kind >= MASKED) & (kind < MASKED + REPLACED)
        return Corruption(where, jnp.where(replaced, other, own), chosen & (kind < MASKED))

    return jax.vmap(draw)(keys)


def cut(pixels: Shaped[Array, "b h w c"], patch: tuple[int, int]) -> Shaped[Array, "b n ph pw c"]:
    """Cuts images into patches, in row-major order."""
    (b, h, w, c), (ph, pw) = pixels.shape, patch
    x = pixels.reshape(b, h // ph, ph, w // pw, pw, c).swapaxes(2, 3)
    return x.reshape(b, -1, ph, pw, c)


def colours(patches: Shaped[Array, "b n ph pw c"], cells: int) -> Int[Array, "b n q"]:
    """Mean colours of `cells` x `cells` areas of each patch, each as one of 8**c classes.

    Pixels are in 0 to 255. The mean of each channel is quantised to 8 levels of 32; the first
    channel is the most significant digit of the class.
    """
    b, n, ph, pw, c = patches.shape
    h, w = ph // cells, pw // cells
    # Integer sums are exact; a float mean just below a level could be rounded up to it.
    exact = jnp.int32 if jnp.issubdtype(patches.dtype, jnp.integer) else jnp.float32
    sums = patches.astype(exact).reshape(b, n, cells, h, cells, w, c).sum(axis=(3, 5))
    levels = jnp.clip(sums // (256 // 2**BITS * h * w), 0, 2**BITS - 1).astype(jnp.int32)
    index = levels @ (2 ** (BITS * jnp.arange(c)[::-1]))
    return index.reshape(b, n, cells**2)


def targets(
    objective: str,
    pixels: Shaped[Array, "b h w c"],
    preprocess: Preprocess,
    config: ViTConfig,
    where: Int[Array, "b m"],
) -> Int[Array, "b m q"] | Float[Array, "b m v"]:
    """Targets of the corrupted patches, from images in 0 to 255."""
    target = TARGETS[objective]
    if not target.cells:
        pixels = preprocess.normalise(pixels)
    patches = cut(pixels, config.patch_pixels)
    patches = jnp.take_along_axis(patches, where[..., None, None, None], axis=1)
    if target.cells:
        return colours(patches, target.cells)
    return patches.reshape(*where.shape, -1)


def losses(
    objective: str,
    predictions: Float[Array, "b m k"],
    wanted: Int[Array, "b m q"] | Float[Array, "b m k"],
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Means over each image's corrupted patches: the loss, and the accuracy, if any.

    The loss is the cross-entropy of colours, or the squared error of normalised pixels.
    """
    if not TARGETS[objective].cells:
        return jnp.square(predictions - wanted).mean(axis=(1, 2)), {}
    logits = predictions.reshape(*wanted.shape, -1)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, wanted)
    right = (logits.argmax(axis=-1) == wanted).astype(jnp.float32)
    return loss.mean(axis=(1, 2)), {"accuracy": right.mean(axis=(1, 2))}

"""Head of detection: classes, boxes and centerness at each location of a pyramid's maps (FCOS)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from vit_jax.models.config import ViTConfig
from vit_jax.models.pyramid import sizes

PRIOR = 0.01  # the probability of each class at each location, in a new model


class Tower(nnx.Module):
    """3x3 convolutions, each with GroupNorm and ReLU behind it, and a last one for the outputs."""

    def __init__(self, outputs: int, bias: float, config: ViTConfig, *, rngs: nnx.Rngs):
        c, dtype = config.pyramid, jnp.dtype(config.dtype)
        options = dict(kernel_init=nnx.initializers.normal(0.01), dtype=dtype, rngs=rngs)
        self.convs = config.towers
        for index in range(1, self.convs + 1):
            setattr(self, f"conv{index}", nnx.Conv(c, c, (3, 3), **options))
            norm = nnx.GroupNorm(
                c, num_groups=32, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs
            )
            setattr(self, f"norm{index}", norm)
        first = nnx.initializers.constant(bias)
        self.conv_out = nnx.Conv(c, outputs, (3, 3), bias_init=first, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
        for index in range(1, self.convs + 1):
            conv, norm = getattr(self, f"conv{index}"), getattr(self, f"norm{index}")
            x = jax.nn.relu(norm(conv(x)))
        return self.conv_out(x)


class Detector(nnx.Module):
    """The head of FCOS (arXiv 1904.01355), as in torchvision, shared by all maps of the pyramid.

    Its outputs [b n k + 5] are, at each location: the logits of k classes; the distances from the
    location to the left, top, right and bottom of its box, in strides of its map, from 0 up; and
    the logit of the centerness. `locations` says where they are.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.classes = Tower(config.num_classes, math.log(PRIOR / (1 - PRIOR)), config, rngs=rngs)
        self.boxes = Tower(5, 0.0, config, rngs=rngs)

    def __call__(self, maps: tuple[Float[Array, "b _ _ c"], ...]) -> Float[Array, "b n o"]:
        boxes = rows([self.boxes(each) for each in maps])
        distances, centerness = jax.nn.relu(boxes[..., :4]), boxes[..., 4:]
        classes = rows([self.classes(each) for each in maps])
        return jnp.concatenate([classes, distances, centerness], axis=-1)


def rows(maps: list[Float[Array, "b _ _ c"]] | tuple[Float[Array, "b _ _ c"], ...]) -> Array:
    """The locations of all maps [b n c], in the order of the maps, row by row."""
    flat = [each.reshape(each.shape[0], -1, each.shape[-1]) for each in maps]
    return jnp.concatenate(flat, axis=1)


def locations(
    config: ViTConfig,
) -> tuple[Float32[np.ndarray, "n 2"], Float32[np.ndarray, " n"]]:
    """Where the outputs of a `Detector` are.

    Returns:
      The (x, y) of each location, the centre of its cell, and the cell's side, the stride of its
      map, in pixels of the model's image: a quarter, half, one and two patches.
    """
    patch, centres, strides = config.patch_pixels[0], [], []
    for scale, (h, w) in zip((0.25, 0.5, 1, 2), sizes(config.grid), strict=True):
        y, x = np.mgrid[:h, :w].reshape(2, -1) + 0.5
        centres.append(np.stack([x, y], axis=-1) * (patch * scale))
        strides.append(np.full(h * w, patch * scale))
    return np.concatenate(centres).astype(np.float32), np.concatenate(strides).astype(np.float32)

"""Feature pyramid of a plain Vision Transformer (ViTDet, arXiv 2203.16527): its maps, or one."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vit_jax.models.config import ViTConfig
from vit_jax.models.dense import stretched
from vit_jax.models.norms import layer_norm


def sizes(grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The (h, w) of the four maps on a grid of patches (gh, gw), the largest first."""
    gh, gw = grid
    return (4 * gh, 4 * gw), (2 * gh, 2 * gw), (gh, gw), (gh // 2, gw // 2)


class Level(nnx.Module):
    """One map of the pyramid: 1x1 and 3x3 convolutions without bias, each with a norm behind it."""

    def __init__(self, inputs: int, config: ViTConfig, *, rngs: nnx.Rngs):
        outputs, options = config.pyramid, dict(use_bias=False, dtype=config.dtype, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, outputs, (1, 1), **options)
        self.norm1 = layer_norm(config, rngs, outputs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), **options)
        self.norm2 = layer_norm(config, rngs, outputs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class Pyramid(nnx.Module):
    """Maps of 4, 2, 1 and 1/2 times the grid, from the last one, or their sum at the largest."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        d = config.width
        twice = dict(kernel_size=(2, 2), strides=2, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.conv_up1 = nnx.ConvTranspose(d, d // 2, **twice)
        self.norm_up1 = layer_norm(config, rngs, d // 2)
        self.conv_up2 = nnx.ConvTranspose(d // 2, d // 4, **twice)
        self.conv_up = nnx.ConvTranspose(d, d // 2, **twice)
        self.level1 = Level(d // 4, config, rngs=rngs)
        self.level2 = Level(d // 2, config, rngs=rngs)
        self.level3 = Level(d, config, rngs=rngs)
        self.level4 = Level(d, config, rngs=rngs)

    def levels(self, x: Float[Array, "b h w d"]) -> tuple[Float[Array, "b _ _ c"], ...]:
        """The four maps, the largest first, of `sizes`."""
        up = jax.nn.gelu(self.norm_up1(self.conv_up1(x)), approximate=False)
        largest = self.level1(self.conv_up2(up))
        smallest = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))  # odd: without the last row
        return largest, self.level2(self.conv_up(x)), self.level3(x), self.level4(smallest)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b 4*h 4*w c"]:
        """The sum of the maps, smaller ones interpolated bilinearly, behind a GELU."""
        largest, *others = self.levels(x)
        size = largest.shape[1:3]
        total = largest + sum(stretched(each, size).astype(x.dtype) for each in others)
        return jax.nn.gelu(total, approximate=False)

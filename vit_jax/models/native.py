"""Images at their native size: patches of images of any shape, padded to one number of them.

As NaViT (arXiv 2307.06304) and SigLIP 2's NaFlex (arXiv 2502.14786): each image has a grid of its
own, to which positions are resized, and padding is masked in attention and pooling. All of it is
computed on the device, from the grids alone, so that one program serves all shapes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_jax.errors import UserError
from vit_jax.models import layers
from vit_jax.models.config import ViTConfig
from vit_jax.models.posembed import ASPECT, sample_weights, sincos_of
from vit_jax.models.positions import table_shapes

_EXACT = jax.lax.Precision.HIGHEST


class Patches(NamedTuple):
    """Normalised images, cut into patches; of an image's `patches` the first h * w count.

    Attributes:
      pixels: of each patch, row by row, channels last: [b n p], floats.
      grid: the number of patches of each image, (down, across): int32 [b 2].
    """

    pixels: Float[Array | np.ndarray, "b n p"]
    grid: Int[Array | np.ndarray, "b 2"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The grids of a batch of images, and what a model makes of them.

    Attributes:
      config: of the model.
      grid: (h, w) of each image, in patches: int [b 2].
    """

    config: ViTConfig
    grid: Int[Array, "b 2"]

    @property
    def real(self) -> Bool[Array, "b n"]:
        """Which patches are of the image, and no padding."""
        return jnp.arange(self.config.max_patches) < self.grid.prod(axis=1)[:, None]

    @property
    def counts(self) -> Int[Array, " b"]:
        """The number of tokens of each image, without padding."""
        return self.config.num_prefix_tokens + self.grid.prod(axis=1)

    @property
    def bias(self) -> Float[Array, "b 1 1 n"]:
        """What hides padding from attention, added to its logits: 0 or minus infinity."""
        bias = jnp.where(self.real, 0.0, -jnp.inf)[:, None, None]
        return jnp.pad(bias, [(0, 0)] * 3 + [(self.config.num_prefix_tokens, 0)])

    @property
    def _indices(self) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
        """The row and the column of each patch; padding has some of its image's."""
        h, w = self.grid[:, :1], self.grid[:, 1:]
        index = jnp.arange(self.config.max_patches)
        return (
            jnp.minimum(index // w, h - 1).astype(jnp.float32),
            (index % w).astype(jnp.float32),
        )

    def positions(self, owner: Any) -> Float[Array, "b n d"]:
        """The embeddings that are added to the tokens of each image: prefix tokens, then patches.

        `owner` has the tables, of the grid `config.grid`, which are resized to each image's grid
        by `config.native_resize` (see `posembed.resize`).
        """
        config, (y, x) = self.config, self._indices
        tables = {name: getattr(owner, name)[...] for name in table_shapes(config)}
        rows, b = config.num_position_prefix, len(self.grid)
        prefix = jnp.zeros((0, config.width))
        if config.position == "learned":
            prefix, table = tables["pos_embed"][:rows], tables["pos_embed"][rows:]
            down, across = self._weights
            each = (down[..., None] * across[..., None, :]).reshape(*down.shape[:2], -1)
            patches = jnp.einsum("bnm,md->bnd", each, table, precision=_EXACT)
        elif "pos_embed_row" in tables:
            prefix = tables.get("pos_embed_prefix", prefix)
            parts = [
                jnp.einsum("bnm,md->bnd", weights, tables[name], precision=_EXACT)
                for weights, name in zip(
                    self._weights, ("pos_embed_row", "pos_embed_column"), strict=True
                )
            ]
            both = config.position == "learned2d"
            patches = jnp.concatenate(parts[::-1], axis=-1) if both else sum(parts)
        elif config.position == "sincos2d":
            patches = sincos_of(y, x, config.width, jnp)
        else:
            patches = jnp.zeros((b, config.max_patches, config.width))
        prefix = jnp.pad(prefix, [(0, config.num_prefix_tokens - len(prefix)), (0, 0)])
        prefix = jnp.broadcast_to(prefix, (b, *prefix.shape))
        return jnp.concatenate([prefix, patches], axis=1)

    @property
    def _weights(self) -> tuple[Float[Array, "b n gh"], Float[Array, "b n gw"]]:
        """The weights of the tables' rows and of their columns for each patch."""
        method, new = self.config.native_resize, self.grid.astype(jnp.float32)
        if method.endswith(ASPECT):
            same = (self.grid == jnp.asarray(self.config.grid)).all(axis=1, keepdims=True)
            new = jnp.where(same, new, new.max(axis=1, keepdims=True))
        method, (gh, gw), (y, x) = method.removesuffix(ASPECT), self.config.grid, self._indices
        return (
            sample_weights(y, gh, new[:, :1], method, jnp),
            sample_weights(x, gw, new[:, 1:], method, jnp),
        )

    @property
    def places(self) -> Float[Array, "b n 2"]:
        """The places of each image's tokens that rotary positions are of; 0 before the patches."""
        rotary, counts = self.config.rotary, self.grid.astype(jnp.float32)
        y, x = (
            rotary.place(index, counts[:, axis, None], axis)
            for axis, index in enumerate(self._indices)
        )
        places = jnp.stack((y, x) if rotary.axes == "yx" else (x, y), axis=-1)
        return jnp.pad(places, [(0, 0), (self.config.num_prefix_tokens, 0), (0, 0)])


def opened(images: Any, config: ViTConfig) -> tuple[Any, Sizes | None]:
    """What a model embeds of its images, and their sizes if it takes them as they are.

    Args:
      images: [b h w c] of `config.image_size`; with `config.max_patches`, `Patches`, or a sequence
        of images [h w c] (an array [b h w c] is one).

    Raises:
      UserError: images of another size or number of channels.
    """
    if config.max_patches is None:
        layers.check_images(images, config)
        return images, None
    if not isinstance(images, Patches):
        images = packed(images, config)
    expected = (config.max_patches, int(np.prod(config.patch_size)) * config.in_channels)
    if images.pixels.shape[1:] != expected:
        raise UserError(
            f"patches of shape {images.pixels.shape} do not fit a model made for "
            f"(b, {expected[0]}, {expected[1]}): run the images through .preprocess"
        )
    return images.pixels, Sizes(config, jnp.asarray(images.grid))


def packed(images: Sequence[Any] | Array | np.ndarray, config: ViTConfig) -> Patches:
    """Cuts normalised images [h w c], as `.preprocess` returns them, into padded patches.

    Raises:
      UserError: an image that is no whole number of patches, or has more than the model takes.
    """
    (ph, pw), c, n = config.patch_size, config.in_channels, config.max_patches
    pixels, grid = np.zeros((len(images), n, ph * pw * c), np.float32), []
    for image, row in zip(images, pixels, strict=True):
        shape = np.shape(image)
        if len(shape) != 3 or shape[0] % ph or shape[1] % pw or shape[2] != c:
            raise UserError(
                f"an image of shape {shape} is no whole number of patches of {ph}x{pw} pixels and "
                f"{c} channels: run it through .preprocess"
            )
        gh, gw = shape[0] // ph, shape[1] // pw
        if not 0 < gh * gw <= n:
            raise UserError(
                f"an image of {shape[0]}x{shape[1]} pixels has {gh * gw} patches, and the model "
                f"takes 1 to {n} (max_patches): run it through .preprocess"
            )
        cut = np.asarray(image, np.float32).reshape(gh, ph, gw, pw, c)
        row[: gh * gw] = cut.swapaxes(1, 2).reshape(gh * gw, -1)
        grid.append((gh, gw))
    return Patches(pixels, np.asarray(grid, np.int32).reshape(-1, 2))


def check_one_grid(config: Any) -> None:
    """Raises a UserError for a model whose images have different grids."""
    if getattr(config, "max_patches", None) is not None:
        raise UserError(
            "dense features, attention maps and programs are of one grid of patches, and with "
            "max_patches each image has its own: load the model with image_size=, without it"
        )

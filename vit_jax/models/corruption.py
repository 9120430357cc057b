"""Corrupted patches, for masked patch prediction."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Corruption(NamedTuple):
    """How the patches of each image are corrupted before the blocks (paper, section 4.6).

    Attributes:
      where: the indices of the corrupted patches, which are predicted.
      source: for each patch, the index of the patch that provides its embedding, mostly itself.
      masked: for each patch, whether a learned [mask] embedding replaces it.
    """

    where: Int[Array, "b m"]
    source: Int[Array, "b n"]
    masked: Bool[Array, "b n"]

    def apply(
        self, x: Float[Array, "b n d"], mask_token: Float[Array | np.ndarray, "1 1 d"]
    ) -> Float[Array, "b n d"]:
        """Corrupts patch embeddings."""
        x = jnp.take_along_axis(x, self.source[..., None], axis=1)
        return jnp.where(self.masked[..., None], mask_token.astype(x.dtype), x)

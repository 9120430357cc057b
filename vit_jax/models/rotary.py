"""Rotary position embeddings (RoFormer, arXiv 2104.09864), in two dimensions.

Pairs of channels of each query and key turn by angles that grow with the place of its patch, so
that attention logits depend on the difference of two places.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from vit_jax.errors import UserError, nearest

CHOICES = {
    "coordinates": ("centred", "index"),
    "axes": ("yx", "xy"),
    "layout": ("halves", "pairs"),
}
# What training does to the places of patches, in this order, and the least of each, which is none.
AUGMENTS = {"shift": 0, "jitter": 1, "rescale": 1}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions of the patches; tokens before them are not rotated.

    A quarter of a head's channels has an angle for each axis, the place times base^(-4i / head_dim)
    for i = 0, 1, ...; with the other half of the channels they make the pairs that are rotated. The
    defaults are DINOv3's (arXiv 2508.10104).

    Attributes:
      coordinates: the place of a patch: its centre between -1 and 1 of the image, times 2 pi
        (`centred`, DINOv3's), or the number of its row and column (`index`, EVA-02's, arXiv
        2303.11331).
      base: ratio of the highest frequency to about the lowest; 100 in DINOv3, 10000 in EVA-02.
      reference: the grid (h, w) that `index` is scaled to, whatever the image's; None is as it is.
      offset: what is added to `index`.
      axes: the axis that comes first among the channels: rows (`yx`) or columns (`xy`).
      layout: which channels make a pair: i and i + head_dim / 2 (`halves`), or 2i and 2i + 1
        (`pairs`).
      learned: whether each head of each layer learns its frequencies, two for each pair of
        channels, so that angles mix both axes (RoPE-Mixed, arXiv 2403.13298); `base` is then that
        of the initial ones, along directions drawn at random.
      shift: the most that training moves `centred` places along each axis, in halves of an image;
        None is not.
      jitter: the most that training then stretches or shrinks each axis, a factor; None is not.
      rescale: the most that training then stretches or shrinks both axes alike, a factor, 2 in
        DINOv3; None is not.

    Raises:
      UserError: a choice that does not exist, or a number out of range.
    """

    coordinates: str = "centred"
    base: float = 100.0
    reference: tuple[int, int] | None = None
    offset: float = 0.0
    axes: str = "yx"
    layout: str = "halves"
    learned: bool = False
    shift: float | None = None
    jitter: float | None = None
    rescale: float | None = None

    def __post_init__(self):
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"model.rotary.{name} is {value!r}: {nearest(value, choices)}")
        for name, least in (("base", 1.0), ("offset", -math.inf)):
            value = getattr(self, name)
            if not least < value < math.inf:
                above = f" above {least:g}" if least > -math.inf else ""
                raise UserError(f"model.rotary.{name} is {value!r}; expected a number{above}")
        grid = self.reference
        if grid is not None and not all(side > 0 for side in grid):
            raise UserError(f"model.rotary.reference is {grid!r}; expected a grid (h, w)")
        for name, least in AUGMENTS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not least <= value < math.inf:
                raise UserError(
                    f"model.rotary.{name} is {value!r}; expected a number from {least} up, or None"
                )
            if self.coordinates != "centred":
                raise UserError(
                    f"model.rotary.{name} is for coordinates 'centred', which are between -1 and 1 "
                    f"of every image, not {self.coordinates!r}: leave it out"
                )
        if self.coordinates == "centred" and (grid is not None or self.offset):
            name = "offset" if grid is None else "reference"
            raise UserError(
                f"model.rotary.{name} is for coordinates 'index': 'centred' ones end at -1 and 1 "
                "in every image"
            )

    def __str__(self) -> str:
        scaled = "" if self.reference is None else " of a grid of {}x{}".format(*self.reference)
        offset = f" from {self.offset:g}" if self.offset else ""
        places = f"{self.coordinates}{offset}{scaled}"
        more = ", learned" if self.learned else ""
        for name in AUGMENTS:
            value = getattr(self, name)
            more += "" if value is None else f", {name} {value:g} in training"
        return f"rotary, {places}, {self.axes}, base {self.base:g}, {self.layout}{more}"

    @property
    def augments(self) -> bool:
        """Whether training moves places."""
        return any(getattr(self, name) is not None for name in AUGMENTS)

    @property
    def plain(self) -> "Rotary":
        """The same positions without what only training does to them."""
        return dataclasses.replace(self, **dict.fromkeys(AUGMENTS))

    def places(self, grid: tuple[int, int], prefix: int) -> Float[np.ndarray, "n 2"]:
        """The place of each token along both axes, [prefix + gh * gw, 2]; 0 before the patches."""
        places = [
            self.place(np.arange(count, dtype=np.float64), count, axis)
            for axis, count in enumerate(grid)
        ]
        y, x = np.meshgrid(*places, indexing="ij")
        found = np.stack((y, x) if self.axes == "yx" else (x, y), axis=-1).reshape(-1, 2)
        return np.concatenate([np.zeros((prefix, 2)), found])

    def place(self, index: Any, count: Any, axis: int) -> Any:
        """The places of patches along an axis (0 is down), by index, of `count`; any arrays."""
        if self.coordinates == "centred":
            return ((index + 0.5) / count * 2 - 1) * 2 * np.pi
        scale = 1 if self.reference is None else self.reference[axis] / count
        return (index + self.offset) * scale

    def augmented(
        self, places: Float[Array | np.ndarray, "*b n 2"], prefix: int, key: Key[Array, ""]
    ) -> Float[Array, "*b n 2"]:
        """Places as training has them: shifted, then jittered, then rescaled (arXiv 2508.10104).

        One draw moves the patches of all images; the `prefix` tokens before them have no place.
        Factors are log-uniform between 1 / most and most.
        """
        keys = jax.random.split(key, 3)
        moved = jnp.asarray(places[..., prefix:, :], jnp.float32)
        if self.shift is not None:
            most = 2 * math.pi * self.shift
            moved += jax.random.uniform(keys[0], (2,), minval=-most, maxval=most)
        for most, drawn, shape in ((self.jitter, keys[1], (2,)), (self.rescale, keys[2], ())):
            if most is not None:
                most = math.log(most)
                moved *= jnp.exp(jax.random.uniform(drawn, shape, minval=-most, maxval=most))
        return jnp.concatenate([jnp.asarray(places[..., :prefix, :], jnp.float32), moved], axis=-2)

    def turns(self, places: Any, head_dim: int, xp: Any) -> Any:
        """Cosines and sines of the angles of places [... n 2]: the table [... n head_dim].

        The first half of the channels are cosines. NumPy and JAX arrays alike (`xp` is the module).
        """
        frequencies = self.base ** (-np.arange(head_dim // 4) / (head_dim // 4))
        angles = places[..., None] * frequencies
        angles = angles.reshape(*places.shape[:-1], head_dim // 2)  # [... n, axes * quarter]
        return xp.concatenate([xp.cos(angles), xp.sin(angles)], axis=-1)

    def frequencies(
        self, key: Key[Array, ""], heads: int, head_dim: int
    ) -> Float[Array, "2 {heads} half"]:
        """Initial frequencies that are learned, along both axes: [2 heads head_dim / 2].

        Those of a head are along two directions at a right angle, the first drawn at random.
        """
        sizes = self.base ** (-jnp.arange(head_dim // 4) / (head_dim // 4))
        turns = jax.random.uniform(key, (heads, 1), maxval=2 * jnp.pi)
        turns = jnp.stack([turns, turns + jnp.pi / 2], axis=1)  # [heads 2 1]
        both = jnp.stack([jnp.cos(turns), jnp.sin(turns)]) * sizes
        return both.reshape(2, heads, head_dim // 2)


def mixed(
    places: Float[Array | np.ndarray, "*b n 2"], frequencies: Float[Array, "2 h half"]
) -> Float[Array, "*b n h k"]:
    """The table of a layer with learned frequencies, for each head (see `Rotary.turns`)."""
    angles = jnp.einsum(
        "...na,ahf->...nhf", places, frequencies, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotate(
    x: Float[Array, "b n h k"], table: Float[Array | np.ndarray, "*b n _ k"], layout: str
) -> Float[Array, "b n h k"]:
    """Rotates queries or keys by the angles of a table, in float32, in x's dtype again.

    The table is that of all heads (an axis of 1) or of each.
    """
    cos, sin = jnp.split(jnp.asarray(table), 2, axis=-1)
    y = x.astype(jnp.float32)
    if layout == "halves":
        a, b = jnp.split(y, 2, axis=-1)
        y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = y[..., ::2], y[..., 1::2]
        y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(y.shape)
    return y.astype(x.dtype)

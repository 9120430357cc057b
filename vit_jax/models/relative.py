"""Relative position bias: a number for each offset between two patches, added to attention logits.

Each head has its own, in a table (T5, arXiv 1910.10683; BEiT, arXiv 2106.08254), or as the output
of a small MLP of the offset (Swin V2, arXiv 2111.09883).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vit_jax.errors import UserError, nearest
from vit_jax.models import posembed

CHOICES = {"kind": ("table", "mlp"), "coordinates": ("log", "swin")}
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """A bias of attention logits for each offset, from the key's patch to the query's, and head.

    The defaults are BEiT's.

    Attributes:
      kind: a learned `table` with a row for each offset, or an `mlp` of the offset's coordinates.
      shared: whether all blocks have the same bias, or each its own.
      hidden: hidden units of the MLP, behind which is a ReLU.
      coordinates: how the MLP sees an offset x along an axis, of up to m in either direction:
        sign(x) log(1 + |x|) (`log`, timm's), or that of 8 x / m, to the base of 8 (`swin`, Swin
        V2's); there the bias is 16 sigmoid(y) of its output y, and its last layer has no bias.

    Raises:
      UserError: a choice that does not exist, or no hidden units.
    """

    kind: str = "table"
    shared: bool = False
    hidden: int = 128
    coordinates: str = "log"

    def __post_init__(self):
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"model.relative_bias.{name} is {value!r}: {nearest(value, choices)}"
                )
        if type(self.hidden) is not int or self.hidden < 1:
            raise UserError(
                f"model.relative_bias.hidden is {self.hidden!r}; expected an integer from 1 up"
            )
        if type(self.shared) is not bool:
            raise UserError(
                f"model.relative_bias.shared is {self.shared!r}; expected True or False"
            )

    def __str__(self) -> str:
        what = "a table" if self.kind == "table" else f"an MLP of {self.hidden}, {self.coordinates}"
        return f"bias of {what}, {'shared' if self.shared else 'one a block'}"


class LogitBias(nnx.Module):
    """The parameters of a bias, of one block or of all.

    A table has a row for each of the (2 gh - 1) (2 gw - 1) offsets, row by row, and with tokens
    before the patches three more: from one of them to a patch, back, and among them (BEiT). It
    starts at zeros. An MLP says nothing of such tokens: their bias is 0 (timm).
    """

    def __init__(
        self,
        config: RelativeBias,
        grid: tuple[int, int],
        heads: int,
        prefix: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.grid, self.prefix = config, grid, prefix
        if config.kind == "table":
            self.table = nnx.Param(jnp.zeros((rows(grid, prefix), heads)))
        else:
            last = dict(use_bias=config.coordinates == "log", precision=_HIGHEST, rngs=rngs)
            self.fc1 = nnx.Linear(2, config.hidden, precision=_HIGHEST, rngs=rngs)
            self.fc2 = nnx.Linear(config.hidden, heads, **last)

    @jax.named_scope("attend")
    def __call__(self) -> Float[Array, "1 h n n"]:
        """The bias of each pair of tokens, query before key, in float32."""
        (h, w), prefix = self.grid, self.prefix
        if self.config.kind == "table":
            table = self.table[...]
            offsets, others = table[: (2 * h - 1) * (2 * w - 1)], table[(2 * h - 1) * (2 * w - 1) :]
        else:
            y = self.fc2(jax.nn.relu(self.fc1(seen(self.grid, self.config.coordinates))))
            offsets = 16 * jax.nn.sigmoid(y) if self.config.coordinates == "swin" else y
            others = jnp.zeros((3, y.shape[-1]))
        patches = expanded(offsets.T.reshape(-1, 2 * h - 1, 2 * w - 1))
        if not prefix:
            return patches[None]
        heads, n, _ = patches.shape
        shapes = (prefix, n), (n, prefix), (prefix, prefix)
        to, back, among = (
            jnp.broadcast_to(row[:, None, None], (heads, *shape))
            for row, shape in zip(others, shapes, strict=True)
        )
        top = jnp.concatenate([among, to], axis=2)
        return jnp.concatenate([top, jnp.concatenate([back, patches], axis=2)], axis=1)[None]


def rows(grid: tuple[int, int], prefix: int) -> int:
    """The rows of a table: one an offset, and three where there are tokens before the patches."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if prefix else 0)


def seen(grid: tuple[int, int], coordinates: str) -> Float[np.ndarray, "offsets 2"]:
    """What the MLP sees of each offset, rows before columns: [(2 gh - 1) (2 gw - 1), 2]."""
    axes = []
    for side in grid:
        x = np.arange(1 - side, side, dtype=np.float64)
        if coordinates == "swin":
            x = 8 * x / max(side - 1, 1)
        x = np.sign(x) * np.log1p(np.abs(x))
        axes.append(x / np.log(8) if coordinates == "swin" else x)
    y, x = np.meshgrid(*axes, indexing="ij")
    return np.stack([y, x], axis=-1).reshape(-1, 2).astype(np.float32)


def expanded(offsets: Float[Array, "h y x"]) -> Float[Array, "h n n"]:
    """The bias of each pair of patches, of that of each offset; without a gather."""
    heads, (h, w) = offsets.shape[0], ((side + 1) // 2 for side in offsets.shape[1:])
    across = _pairs(offsets)  # [heads offsets w w]
    both = _pairs(jnp.moveaxis(across, 1, 3))  # [heads w w h h]
    return both.transpose(0, 3, 1, 4, 2).reshape(heads, h * w, h * w)


def _pairs(x: Float[Array, "*b o"]) -> Float[Array, "*b n n"]:
    """[..., i, j] = x[..., i - j + n - 1], of 2n - 1 offsets.

    Rows repeated, padded by one and read at the old width are each shifted by one more.
    """
    n = (x.shape[-1] + 1) // 2
    y = jnp.pad(x[..., ::-1], [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    y = jnp.broadcast_to(y[..., None, :], (*x.shape[:-1], n, 2 * n))
    y = y.reshape(*x.shape[:-1], 2 * n * n)[..., n - 1 : n - 1 + n * (2 * n - 1)]
    return y.reshape(*x.shape[:-1], n, 2 * n - 1)[..., :n]


def resize(
    table: Float[np.ndarray, "o h"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    method: str,
) -> Float[np.ndarray, "p h"]:
    """Interpolates a table of offsets on their grid; rows of tokens before the patches are kept.

    Args:
      method: `geometric` is BEiT's own, as timm has it: the places of the old offsets grow
        geometrically, so that the smallest stay one patch long, and the new ones are interpolated
        linearly between them (Microsoft's code does so by cubic splines). The others take the
        offsets for pixels of an image (see `posembed.resize`); transformers' is `bilinear`.

    Raises:
      UserError: no such method.
    """
    old, new = (tuple(2 * side - 1 for side in grid) for grid in (old_grid, new_grid))
    offsets, others = table[: old[0] * old[1]], table[old[0] * old[1] :]
    if method == "geometric":
        down, across = (_geometric(*sides) for sides in zip(old, new, strict=True))
        grid = offsets.reshape(*old, -1).astype(np.float64)
        offsets = np.einsum("ih,jw,hwd->ijd", down, across, grid, optimize=True)
        offsets = offsets.reshape(new[0] * new[1], -1).astype(table.dtype)
    else:
        offsets = posembed.resize(offsets, old, new, 0, method)
    return np.concatenate([offsets, others])


def _geometric(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Interpolation weights of the old offsets along an axis for each new one.

    The distances between old offsets are q^0, q^1, ... outwards from 0, with the q of 1.01 to 1.5
    that puts the last of them at the last new one, found by bisection; beyond it, it is repeated.
    """
    if old == new:
        return np.eye(old)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (old // 2)) / (1 - q) > new // 2:
            high = q
        else:
            low = q
    outwards = np.cumsum(q ** np.arange(old // 2))
    places = np.concatenate([-outwards[::-1], [0.0], outwards])
    wanted = np.arange(new) - new // 2
    return np.stack([np.interp(wanted, places, row) for row in np.eye(old)], axis=1)

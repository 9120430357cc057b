"""Learned position embeddings (paper, appendix D.4): their tables, and the sums they add to tokens.

The tables belong to the model, or to each of its blocks; the functions here serve both.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vit_jax.errors import UserError
from vit_jax.models import posembed, relative
from vit_jax.models.config import ViTConfig
from vit_jax.models.linear import einsum_f32

_BIAS = "relative_bias/table"
NAMES = ("pos_embed", "pos_embed_row", "pos_embed_column", "pos_embed_prefix", "rel_embed", _BIAS)
INIT = nnx.initializers.normal(0.02)


def table_shapes(config: ViTConfig) -> dict[str, tuple[int, int]]:
    """Shapes of the position tables of one model or block, by name: (rows, channels).

    2D embeddings have one table for the rows of the grid and one for its columns, of half the width
    each in `learned2d`. Prefix tokens have a table of their own.
    """
    (gh, gw), width, prefix = config.grid, config.width, config.num_position_prefix
    if config.position == "learned":
        return {"pos_embed": (config.num_positions, width)}
    if config.position not in ("learned2d", "learned2d_added"):
        return {}
    channels = width // 2 if config.position == "learned2d" else width
    shapes = {"pos_embed_row": (gh, channels), "pos_embed_column": (gw, channels)}
    return shapes | ({"pos_embed_prefix": (prefix, width)} if prefix else {})


def add_tables(owner: nnx.Module, config: ViTConfig, rngs: nnx.Rngs) -> None:
    """Creates the position tables as parameters of a model or a block."""
    for name, shape in table_shapes(config).items():
        setattr(owner, name, nnx.Param(INIT(rngs.params(), shape)))


def composed(owner: nnx.Module, config: ViTConfig) -> Float[Array, "*depth n d"]:
    """The embeddings that `owner` adds to the tokens: prefix tokens first, zeros if they have none.

    For stacked blocks there is a leading depth axis.
    """
    tables = {name: getattr(owner, name)[...] for name in table_shapes(config)}
    return jnp.concatenate(_parts(tables, config), axis=-2)


def one_table(tables: dict[str, np.ndarray], config: ViTConfig) -> Float[np.ndarray, "n d"]:
    """The equivalent `pos_embed` of a plain learned embedding, from the tables."""
    prefix, _, patches = _parts(tables, config)
    return np.concatenate([prefix, np.asarray(patches, np.float32)])


def _parts(tables: dict[str, Any], config: ViTConfig) -> list[Any]:
    """Position embeddings of prefix tokens, zeros for those without a row, and of patches."""
    rows, width = config.num_position_prefix, config.width
    if config.position == "learned":
        table = tables["pos_embed"]
        prefix, patches = table[..., :rows, :], table[..., rows:, :]
    elif "pos_embed_row" in tables:
        row = tables["pos_embed_row"][..., :, None, :]
        column = tables["pos_embed_column"][..., None, :, :]
        if config.position == "learned2d":
            shape = (*row.shape[:-3], *config.grid, width // 2)
            halves = [jnp.broadcast_to(half, shape) for half in (column, row)]
            patches = jnp.concatenate(halves, axis=-1)
        else:
            patches = row + column
        patches = patches.reshape(*patches.shape[:-3], -1, width)
        prefix = tables.get("pos_embed_prefix", patches[..., :0, :])
    else:
        rows, prefix = 0, np.zeros((0, width), np.float32)
        patches = np.zeros((config.grid[0] * config.grid[1], width), np.float32)
        if config.position == "sincos2d":
            patches = posembed.sincos2d(config.grid, width)
    without = (*patches.shape[:-2], config.num_prefix_tokens - rows, width)
    return [prefix, np.zeros(without, np.float32), patches]


def relative_logits(
    q: Float[Array, "b n h k"], embeddings: Float[Array, "o h k"], num_prefix_tokens: int
) -> Float[Array, "b h n n"]:
    """Relative position logits: each query times the embedding of its offset to each key.

    Offsets are in raster order: embedding i is that of offset i - (patches - 1), from the key's
    patch to the query's. Pairs with a prefix token get 0. Returns float32, scaled by 1 / sqrt(k)
    like the other logits.
    """
    q = q[:, num_prefix_tokens:]
    b, n, heads, k = q.shape
    # Largest offset first, row i needs columns n - 1 - i to 2n - 2 - i. Padding rows by one and
    # reading them at the old width shifts each row one column further left than the row above.
    products = einsum_f32("bnhk,ohk->bhno", q, embeddings[::-1])
    flat = jnp.pad(products, [(0, 0)] * 3 + [(0, 1)]).reshape(b, heads, 2 * n * n)
    flat = flat[..., n - 1 : n - 1 + n * (2 * n - 1)]
    logits = flat.reshape(b, heads, n, 2 * n - 1)[..., :n] * k**-0.5
    return jnp.pad(logits, [(0, 0)] * 2 + [(num_prefix_tokens, 0)] * 2)


def fitted(
    name: str, value: np.ndarray, old: ViTConfig, new: ViTConfig, method: str
) -> tuple[np.ndarray, str]:
    """Resizes a position table to another grid (paper, section 3.2), 2D ones axis by axis.

    Args:
      name: of the parameter; under "blocks/", tables are resized layer by layer.
      method: see `posembed.resize`, and for a relative position bias `relative.resize`.

    Returns:
      The table, and a note on what was done to it; any other parameter as it is, with "kept".

    Raises:
      UserError: the embeddings are relative.
    """
    table = name.rpartition("/")[2]
    (gh, gw), (new_gh, new_gw) = old.grid, new.grid
    if old.grid == new.grid:
        return value, "kept"
    if table == "rel_embed":
        raise UserError(
            f"relative positions of a grid of {gh}x{gw} do not fit one of {new_gh}x{new_gw}: the "
            "same offset in raster order is another displacement there. Keep the grid: change "
            "image_size and patch_size together, or neither"
        )
    resize, count = posembed.resize, None
    axis, plain = {"pos_embed_row": 0, "pos_embed_column": 1}.get(table), method
    if name.endswith(_BIAS):
        resize, sizes = relative.resize, (old.grid, new.grid)
    elif table == "pos_embed":
        sizes = old.grid, new.grid, old.num_position_prefix
    elif axis is not None:
        count, plain = new.grid[axis], method.removesuffix(posembed.ASPECT)
        sizes = (old.grid[axis], 1), (count if plain == method else max(new.grid), 1), 0
    else:
        return value, "kept"
    if name.startswith("blocks/"):
        value = np.stack([resize(layer, *sizes, plain)[:count] for layer in value])
    else:
        value = resize(value, *sizes, plain)[:count]
    return value, f"resized {gh}x{gw} -> {new_gh}x{new_gw} ({method})"

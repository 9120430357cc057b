"""Growing images: training begins at smaller sizes, with positions resized inside the step.

Parameters, checkpoints and evaluation have the model's own size throughout. The program of a step
is compiled once for each size.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError
from vit_jax.models import positions, relative
from vit_jax.models.config import ModelConfig, ViTConfig


def at_size(model: ModelConfig, side: int) -> ModelConfig:
    """The model for images of side x side."""
    return dataclasses.replace(model, image_size=(side, side))


def check_sizes(sizes: Sequence[int], model: ModelConfig) -> None:
    """Raises a UserError if a model cannot be trained at these sizes."""
    if not sizes:
        return
    h, w = model.image_size
    if h != w or sizes[-1] != h:
        raise UserError(
            f"augment.image_sizes ends at {sizes[-1]}x{sizes[-1]}, and model.image_size is "
            f"{h}x{w}: images grow up to the size of the model, which is square"
        )
    if getattr(model, "position", "") == "relative" and len(sizes) > 1:
        raise UserError(
            "augment.image_sizes is not for model.position 'relative': the same offset in raster "
            "order is another displacement on another grid"
        )
    for side in sizes:
        try:
            at_size(model, side)
        except UserError as error:
            raise UserError(f"augment.image_sizes has {side}: {error}") from None


def fit(old: ModelConfig, new: ModelConfig, method: str) -> Callable[[Any], Any]:
    """Returns a function of the parameters of `old` that gives those of `new`, of another grid.

    It resizes the position tables (see `positions.fitted`), those of a bias as well, each by a
    matrix, so that gradients pass.
    """
    if not isinstance(old, ViTConfig) or old.grid == new.grid:
        return lambda params: params
    sizes = {name: rows for name, (rows, _) in positions.table_shapes(old).items()}
    if old.relative_bias is not None and old.relative_bias.kind == "table":
        sizes["relative_bias/table"] = relative.rows(old.grid, old.num_prefix_tokens)
    matrices = {
        name: positions.fitted(name, np.eye(rows), old, new, method)[0].astype(np.float32)
        for name, rows in sizes.items()
    }

    def fitted(params):
        flat = flatten_dict(params, sep="/")
        for path, table in flat.items():
            matrix = next((m for name, m in matrices.items() if path.endswith(name)), None)
            if matrix is not None:
                flat[path] = jnp.einsum("mn,...nd->...md", matrix, table, precision="highest")
        return unflatten_dict(flat, sep="/")

    return fitted


def by_size(steps: Mapping[tuple[int, int], Callable[..., Any]]) -> Callable[..., Any]:
    """Returns the step that is, for a batch of images of (h, w), that of its size."""

    def step(state, batch, *teacher):
        return steps[batch["image"].shape[1:3]](state, batch, *teacher)

    return step

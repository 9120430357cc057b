"""Update rules that see matrices, not numbers: Adafactor and Muon, of stacked parameters."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.lora import HEADS
from vit_jax.training.sharding import path_name

# Parameter -> the two axes that form its matrices, in Adafactor's factored moment and in Muon, one
# matrix for each index of the other axes. Every layer, Q, K, V and head has its own [d head_dim] or
# [head_dim d], as in big_vision, where these are a layer kernel's two largest axes. In Adafactor,
# matrices with a side below _LEAST_SIDE, and all other parameters, keep the moment of each entry.
MATRICES = (
    (r"attention/qkv/kernel$", (-4, -1)),
    (r"attention/rel_embed$", (-3, -1)),
    (r"(kernel|pos_embed(_\w+)?)$", (-2, -1)),
)
_LEAST_SIDE = 32
# Muon's matrices are those of kernels, and of convolutions [h w in out] one of [h w in, out]. What
# embeds patches, and the heads, are left to Adam, like all other parameters.
_CONVOLUTIONS = r"conv\w*/kernel$"
_EMBEDDING = ("patch_embed", *HEADS)


class FactoredState(NamedTuple):
    """Second moments: running means of squared gradients, in trees like the parameters'.

    `row` is averaged over the columns of each matrix, `col` over its rows. Reduced axes are kept
    with size 1, so that both are sharded like their parameter. For a parameter that is not
    factored, `row` has the mean of each entry, and `col` is None.
    """

    count: Any
    row: Any
    col: Any


def scale_by_factored_moment(b2: float) -> optax.GradientTransformation:
    """Divides by the root of Adafactor's factored second moment (arXiv 1804.04235, algorithm 4).

    As modified in "Scaling Vision Transformers" (arXiv 2106.04560, section 3.4): the decay is at
    most `b2`, and the learning rate is not scaled by the norm of the weights. As in big_vision,
    updates are not clipped.

    optax.scale_by_factored_rms does the same for a single matrix. For arrays with more axes it
    factors the two largest, which for stacked parameters may include the depth.
    """

    def init(params: Any) -> FactoredState:
        def zeros(path, param):
            axes = _matrix_axes(path, param)
            if axes is None:
                return jnp.zeros_like(param), None
            row, col = (jax.lax.slice_in_dim(param, 0, 1, axis=axis) for axis in axes[::-1])
            return jnp.zeros_like(row), jnp.zeros_like(col)

        return FactoredState(jnp.zeros((), jnp.int32), *_map_leaves(zeros, params))

    def update(grads: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        decay = jnp.minimum(b2, 1 - (state.count + 1.0) ** -0.8)

        def divide(path, grad, row, col):
            axes, square = _matrix_axes(path, grad), grad**2 + 1e-30
            if axes is None:
                row = decay * row + (1 - decay) * square
                return grad * jax.lax.rsqrt(row), row, None
            row = decay * row + (1 - decay) * square.mean(axes[1], keepdims=True)
            col = decay * col + (1 - decay) * square.mean(axes[0], keepdims=True)
            share = row / row.mean(axes[0], keepdims=True)
            return grad * jax.lax.rsqrt(share) * jax.lax.rsqrt(col), row, col

        updates, row, col = _map_leaves(divide, grads, state.row, state.col)
        return updates, FactoredState(state.count + 1, row, col)

    return optax.GradientTransformation(init, update)


def scale_by_muon(
    momentum: float, mu_dtype: str, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Muon, for matrices in the hidden layers: their momentum made orthogonal, by optax.contrib.

    Nesterov's momentum, five Newton-Schulz steps, and a factor of 0.2 sqrt(max(rows, columns)),
    which gives updates about the size of AdamW's ("Muon is Scalable for LLM Training", arXiv
    2502.16982, section 2.2). Every layer, Q, K, V and head has its own matrix (see `MATRICES`).

    Args:
      others: what scales the updates of all other parameters.
    """

    def axes(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(_muon_axes, params)

    def sized(update: Any, of: optax.contrib.MuonDimensionNumbers) -> Any:
        sides = [math.prod(update.shape[axis] for axis in each) for each in of]
        return update * (0.2 * math.sqrt(max(sides)))

    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=momentum, mu_dtype=mu_dtype, weight_dimension_numbers=axes
        ),
        optax.stateless(lambda updates, _: jax.tree.map(sized, updates, axes(updates))),
    )

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "muon" if _muon_axes(path, leaf) else "others", params
        )

    return optax.partition({"muon": muon, "others": others}, labels)


def _muon_axes(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    name = path_name(path)
    if not name.endswith("kernel") or name.split("/")[0] in _EMBEDDING:
        return None
    if re.search(_CONVOLUTIONS, name):
        rows, column = (-4, -3, -2), -1
    else:
        row, column = _axes(name)
        rows = (row,)
    return optax.contrib.MuonDimensionNumbers(rows, (column,))


def _matrix_axes(path: tuple[Any, ...], leaf: Any) -> tuple[int, int] | None:
    axes = _axes(path_name(path))
    return axes if axes and min(leaf.shape[axis] for axis in axes) >= _LEAST_SIDE else None


def _axes(name: str) -> tuple[int, int] | None:
    return next((axes for pattern, axes in MATRICES if re.search(pattern, name)), None)


def _map_leaves(function: Callable[..., tuple[Any, ...]], tree: Any, *rest: Any) -> list[Any]:
    """Maps a function of path and leaves to a tree for each output; None is a leaf, too."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    rest = [structure.flatten_up_to(each) for each in rest]
    results = [function(*leaf, *more) for leaf, *more in zip(leaves, *rest, strict=True)]
    return [structure.unflatten(values) for values in zip(*results, strict=True)]

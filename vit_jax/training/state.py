"""The train state, and its form in checkpoints."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vit_jax.models.config import ModelConfig
from vit_jax.models.create import init_params
from vit_jax.training.sharding import path_name, placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """The train state: arrays, or their shapes or shardings in the same structure.

    `step` counts the steps done (int32 []); `params` and `ema` are nested dicts by parameter name,
    `ema` is None if disabled.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, *, ema: bool, mesh: Mesh
) -> TrainState:
    """The shapes, types and shardings of the state, to create, jit over or restore it."""
    shapes = jax.eval_shape(lambda: _initial(init_params(config, 0), optimizer, ema))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        placement(shapes, mesh),
    )


def make_state(
    abstract: TrainState,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    params: Any | None = None,
) -> TrainState:
    """Creates the state before the first step, sharded on the mesh.

    Args:
      params: initial parameters, whose memory may be donated; None initialises new ones.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    ema = abstract.ema is not None
    if params is None:
        make = jax.jit(
            lambda: _initial(init_params(config, seed), optimizer, ema), out_shardings=shardings
        )
        return make()
    make = jax.jit(
        lambda params: _initial(params, optimizer, ema), out_shardings=shardings, donate_argnums=0
    )
    return make(jax.device_put(params, shardings.params))


def with_optimizer(
    state: TrainState, abstract: TrainState, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state with a new optimiser, for the next phase of a run; its memory is donated.

    Args:
      abstract: shapes, types and shardings of the result.
    """
    make = jax.jit(
        lambda step, params, ema: TrainState(step, params, optimizer.init(params), ema),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        donate_argnums=(0, 1, 2),
    )
    return make(state.step, state.params, state.ema)


def _initial(params: Any, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    average = jax.tree.map(jnp.array, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def to_saved(state: TrainState) -> dict[str, Any]:
    """The state as plain dicts; optimiser state by path, independent of optax's tuple types."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    saved = {
        "step": state.step,
        "params": state.params,
        "opt_state": {path_name(path): leaf for path, leaf in leaves},
    }
    return saved if state.ema is None else {**saved, "ema": state.ema}


def from_saved(saved: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of `to_saved`, in the structure of `like`."""
    opt_state = jax.tree_util.tree_map_with_path(
        lambda path, _: saved["opt_state"][path_name(path)], like.opt_state
    )
    return TrainState(saved["step"], saved["params"], opt_state, saved.get("ema"))

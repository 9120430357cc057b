"""Any model from its config: its structure, initial parameters, or both."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from vit_jax.models import lora, resnet
from vit_jax.models.config import ModelConfig, ResNetConfig, ViTConfig, check_fields
from vit_jax.models.stack import Layout
from vit_jax.models.variants import variant
from vit_jax.models.vit import ViT

Model = ViT | resnet.ResNet
_MODELS = {ViTConfig: ViT, ResNetConfig: resnet.ResNet}


def structure(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns the graph definition for `nnx.merge`, and parameter shapes; allocates nothing."""
    graphdef, shapes = _structure(config)
    return graphdef, jax.tree.map(lambda leaf: leaf, shapes)  # the caller's own dict


@functools.lru_cache(maxsize=128)
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    model = nnx.eval_shape(lambda: _make(config, nnx.Rngs(0)))
    graphdef, shapes = nnx.split(model)
    return graphdef, nnx.to_pure_dict(shapes)


def merged(graphdef: nnx.GraphDef, params: dict[str, Any], layout: Layout | None) -> Model:
    """Returns the model with these parameters; with a `layout`, the blocks' stay sharded.

    Each block, and each unit of a ResNet, gathers its own when it runs (see `stack.run_block`).
    """
    if layout is not None:
        later = {name: value for name, value in params.items() if name in ("blocks", "resnet")}
        now = {name: value for name, value in params.items() if name not in later}
        params = {**layout.params(now), **later}
    return nnx.merge(graphdef, params)


def init_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Newly initialised parameters as a nested dict of arrays; call it inside `jax.jit`."""
    return nnx.to_pure_dict(nnx.state(_make(config, nnx.Rngs(params=seed))))


def _make(config: ModelConfig, rngs: nnx.Rngs) -> Model:
    model = _MODELS[type(config)](config, rngs=rngs)
    if isinstance(config, ViTConfig) and config.lora is not None:
        lora.add_adapters(model, config.lora, rngs)
    return model


def create(name: str | ModelConfig = "B/16", *, seed: int = 0, **fields: Any) -> Model:
    """Returns a newly initialised model, with the initialisation of Google's code.

    Args:
      name: a variant such as "B/16", "R50+B/16" or "R50x1", or a config.
      seed: of the initialisation.
      **fields: of the config to change, such as image_size=384 or num_classes=10.

    Raises:
      UserError: no such variant or field, or sizes that do not fit together.
    """
    if isinstance(name, str):
        config = variant(name, **fields)
    else:
        check_fields(type(name), fields)
        config = dataclasses.replace(name, **fields)
    params = jax.jit(lambda: init_params(config, seed))()  # one program, not one a parameter
    return nnx.merge(structure(config)[0], params)

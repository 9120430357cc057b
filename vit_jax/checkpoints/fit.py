"""Adapts weights to another model config: kept, resized, newly initialised or dropped.

`fitted` decides for all of them: resolution, patch size, input channels and head.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.adapter import Adapter
from vit_jax.checkpoints.card import Line, ModelCard
from vit_jax.checkpoints.convert import shapes_of
from vit_jax.checkpoints.families import fitted_preprocess
from vit_jax.checkpoints.keys import parameters
from vit_jax.checkpoints.opened import Opened, facts
from vit_jax.errors import UserError
from vit_jax.models import posembed, positions
from vit_jax.models.config import ModelConfig, check_fields
from vit_jax.models.create import init_params, structure
from vit_jax.models.lora import learns


def place(
    opened: Opened,
    config: ModelConfig,
    *,
    head: str = "keep",
    method: str = "zoom",
    seed: int = 0,
    fresh: Sequence[str] = (),
    shardings: Callable[[Any], Any] | None = None,
) -> tuple[dict[str, Any], tuple[Line, ...]]:
    """Reads a model, adapts it to `config` (see `fitted`) and puts its arrays on their devices.

    Returns:
      Parameters as a nested dict of arrays, and a line on each parameter and each dropped array.
    """
    places = flatten_dict(shardings(structure(config)[1]), sep="/") if shardings else {}
    params, lines = {}, []
    for value, line in fitted(opened, config, head=head, method=method, seed=seed, fresh=fresh):
        lines.append(line)
        if line.name in places:
            params[line.name] = jax.make_array_from_callback(
                value.shape, places[line.name], lambda index, value=value: value[index]
            )
        else:
            params[line.name] = jax.device_put(value)
    return unflatten_dict(params, sep="/"), (*lines, *opened.dropped(config))


def native_card(card: ModelCard, max_patches: int, method: str | None = None) -> ModelCard:
    """The card of the same weights as a model of images of any shape (see `load`)."""
    method = method or card.position_resize
    changes = {"max_patches": max_patches, "native_resize": method}
    check_fields(type(card.config), changes)
    config = dataclasses.replace(card.config, **changes)
    preprocess = fitted_preprocess(card.preprocess, config)
    return dataclasses.replace(card, config=config, preprocess=preprocess)


def fitted(
    opened: Opened,
    new: ModelConfig,
    *,
    head: str = "keep",
    method: str = "zoom",
    seed: int = 0,
    fresh: Sequence[str] = (),
) -> Iterator[tuple[np.ndarray, Line]]:
    """Adapts parameters to another resolution, patch size, input channels or head, one by one.

    Args:
      head: `fresh` replaces the head, and the hidden layer before it, by a zero linear layer
        (paper, B.1.1); `keep` keeps both if the number of classes agrees. The same applies to a
        `patch_head`.
      method: how position embeddings are resized (see `posembed.resize`; paper, section 3.2).
      seed: for parameters that the old model does not have.
      fresh: patterns of parameters to draw anew, in which * is any text, such as `pos_embed`.

    Raises:
      UserError: any other parameter has a different shape, or a pattern matches none.
    """
    old, expected = opened.card.config, shapes_of(new)
    replaced = (
        ("head", "pre_logits/", "patch_head/", "detector/")
        if head == "fresh" or _heads_differ(old, new)
        else ()
    )
    for part, sizes in {"pyramid/": ("pyramid",), "detector/": ("pyramid", "towers")}.items():
        if any(getattr(old, name, None) != getattr(new, name, None) for name in sizes):
            replaced += (part,)
    anew = {name for pattern in fresh for name in parameters("model.fresh", pattern, expected)}
    anew |= {n for n in expected if n not in opened.shapes or n.startswith(replaced)}
    made = _fresh(new, sorted(anew), seed)
    for name, shape in expected.items():
        if name in made:
            yield made.pop(name), Line(name, shape, "fresh")
            continue
        value, status = opened.read(name), "kept"
        if name == "patch_embed/kernel":
            value, status = _fit_stem(value, new.patch_channels, new.patch_size)
        elif name == "resnet/conv_root/kernel":
            value, status = _fit_stem(value, new.in_channels, value.shape[:2])
        elif name.endswith(positions.NAMES):
            value, status = positions.fitted(name, value, old, new, method)
        if value.shape != shape:
            rows = [getattr(each, "num_position_prefix", 0) for each in (old, new)]
            if "pos_embed" in name and rows[0] < rows[1]:
                raise UserError(
                    f"{rows[1]} tokens before the patches are to have a position, and the "
                    f"checkpoint has {rows[0]}: set model.position_prefix={rows[0]}, and the new "
                    "tokens have none"
                )
            raise UserError(
                f"parameter {name} is {list(value.shape)} in the checkpoint and {list(shape)} in "
                "the model: only image_size, patch_size, in_channels and the head may change"
            )
        yield value, Line(name, shape, status, opened.sources[name])


def with_adapter(opened: Opened, adapter: Adapter, name: Any) -> Opened:
    """The model that an adapter makes of its base; `name` is the base's, for messages.

    Raises:
      UserError: it is not the base of the adapter.
    """
    adapter.check_base(opened.shapes, name)
    card, params, sources = adapter.plain_card, {}, {}
    for value, line in fitted(opened, card.config, method=card.position_resize):
        params[line.name], sources[line.name] = value, line.source
    adapter.check_weights(params, name)
    params = adapter.merged(params)
    sources |= dict.fromkeys(filter(learns, params), "adapter")
    sources |= {kernel: f"{sources[kernel]}, with its adapter" for kernel in adapter.kernels}
    return Opened(
        card,
        {key: value.shape for key, value in params.items()},
        params.pop,
        sources,
        facts(f"{opened.facts['file']}, with an adapter", card.config),
        opened.assumed,
        adapter=adapter,
    )


def _fit_stem(kernel: np.ndarray, channels: int, patch: tuple[int, ...]) -> tuple[np.ndarray, str]:
    (*old_patch, old_channels, _), statuses = kernel.shape, []
    if old_channels != channels:
        kernel = posembed.adapt_channels(kernel, channels)
        statuses.append(f"{old_channels} -> {channels} channels")
    if tuple(old_patch) != patch:
        kernel = posembed.resample_patches(kernel, patch)
        statuses.append("resampled {}x{} -> {}x{}".format(*old_patch, *patch))
    return kernel, ", ".join(statuses) or "kept"


def _fresh(config: ModelConfig, names: list[str], seed: int) -> dict[str, np.ndarray]:
    """Newly initialised parameters by path; compiles nothing if only a head is needed."""
    if all(name.startswith("head") for name in names):
        shapes = shapes_of(config)
        fills = {name: config.head_bias if name.endswith("bias") else 0.0 for name in names}
        return {name: np.full(shapes[name], fill, np.float32) for name, fill in fills.items()}

    def some():
        params = flatten_dict(init_params(config, seed), sep="/")
        return {name: params[name] for name in names}

    return jax.device_get(jax.jit(some)())


def _heads_differ(old: ModelConfig, new: ModelConfig) -> bool:
    def sizes(config):
        beside = (getattr(config, name, None) for name in ("representation_size", "patch_outputs"))
        return config.num_classes, *beside

    return sizes(old) != sizes(new)

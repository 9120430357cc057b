"""The model of a run: the config's fields, on those of its variant or of the checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_jax.checkpoints.convert import shapes_of
from vit_jax.checkpoints.opened import Opened
from vit_jax.errors import UserError, nearest
from vit_jax.models.config import ModelConfig, ViTConfig, check_fields
from vit_jax.models.lora import learns
from vit_jax.models.posembed import RESIZE_METHODS
from vit_jax.models.resnet import STYLES
from vit_jax.models.variants import variant, variant_fields, variant_kind
from vit_jax.training import masking, native
from vit_jax.training.config import CHOSEN, Config


def model_config(
    config: Config, base: ModelConfig | None, num_classes: int, keep_head: bool = False
) -> ModelConfig:
    """Returns the model's config: `base` (the checkpoint's, if any) with the fields of `config`.

    Unless the checkpoint's head is kept, its hidden layer is dropped, too.

    Raises:
      UserError: the config names no variant, has a field that the model does not have, has a
        ResNet that differs from the one in `base`, or is missing there, or adapters (LoRA) of a
        model that is not there or is a ResNet.
    """
    fields = {name: value for name, value in config.model.items() if name not in (*CHOSEN, "fresh")}
    name = fields.pop("variant", None)
    method, head = fields.pop("position_resize", None), fields.pop("head", "fresh")
    for key, value, known in (
        ("head", head, ("fresh", "keep")),
        ("position_resize", method, RESIZE_METHODS),
    ):
        if value is not None and value not in known:
            raise UserError(f"model.{key} is {value!r}; {nearest(value, known)}")
    fields.setdefault("num_classes", num_classes)
    fields["dtype"] = config.precision
    if "lora" in fields and not isinstance(base, ViTConfig):
        found = (
            "init_from names none" if base is None else "the checkpoint of init_from is a ResNet"
        )
        raise UserError(
            f"model.lora adapts a trained Vision Transformer, and {found}: set it to None"
        )
    if base is None and name is None:
        raise UserError("model.variant is not set: name one such as B/16, or an init_from")
    if config.segments or config.detects:
        kind = type(base) if base else variant_kind(variant_fields(name))
        fields = {**_of_places(config, kind, base), **fields}
    elif getattr(base, "pyramid", None) and fields.get("pool") not in (None, *_READ_PYRAMIDS):
        fields = {"pyramid": None, **fields}  # which another pool has no place for
        base = dataclasses.replace(base, pool=fields["pool"], pyramid=fields["pyramid"])
    elif getattr(base, "pool", None) == "locations" and not config.classifies:
        raise UserError(
            "the checkpoint of init_from has a head on a pyramid (model.pool 'locations'), which "
            f"objective {config.objective} has no place for: set --config.model.pool=gap (or "
            "token, where there is a class token)"
        )
    if base is None:
        model = variant(name, **fields)
    else:
        base = base if keep_head else base.with_fresh_head(num_classes)
        model = _changed(base, name, fields)
    _check_pool(config, model)
    return _with_patch_outputs(config, model)


# By objective: how its head reads a model, and what that is.
_POOLS = {"segmentation": ("none", "on each patch"), "detection": ("locations", "on a pyramid")}
_READ_PYRAMIDS = [pool for pool, _ in _POOLS.values()]
_PYRAMID = 256  # channels, as ViTDet has them


def _of_places(config: Config, kind: type[ModelConfig], base: ModelConfig | None) -> dict[str, Any]:
    """Fields of a model that tells what is where; its class token, if any, stays."""
    pool, where = _POOLS[config.objective]
    if kind is not ViTConfig:
        raise UserError(
            f"objective {config.objective} has a head {where} of a Vision Transformer, and the "
            "model is a ResNet: take a ViT or a hybrid, such as R50+B/16"
        )
    if (given := config.model.get("pool")) not in (None, pool):
        raise UserError(
            f"model.pool is {given!r}, but objective {config.objective} has a head {where}: leave "
            "model.pool out"
        )
    fields = {"pool": pool} | ({} if base is None else {"class_token": base.has_class_token})
    if config.detects and getattr(base, "pyramid", None) is None:
        fields["pyramid"] = _PYRAMID
    return fields


def _check_pool(config: Config, model: ModelConfig) -> None:
    """Raises a UserError if the head tells what is where, and the objective is another."""
    pool = getattr(model, "pool", None)
    for objective, (name, where) in _POOLS.items():
        if pool == name and config.classifies and objective != config.objective:
            raise UserError(
                f"model.pool is {pool!r}, a head {where}, but objective {config.objective} is of "
                "whole images: set --config.model.pool=gap (or token, where there is a class "
                f"token), or --config.objective={objective}"
            )


def same_head(model: ModelConfig, base: ModelConfig) -> bool:
    """Whether the heads of two models have the same shapes, and the same inputs."""
    names = ("num_classes", "representation_size", "pool", "norm_after_pool", "distillation")
    names += ("pyramid", "towers")
    return all(getattr(model, name, None) == getattr(base, name, None) for name in names)


def check_adapted(model: ModelConfig, init: Opened) -> None:
    """Raises a UserError if LoRA would freeze parameters that the checkpoint does not have."""
    if getattr(model, "lora", None) is None:
        return
    for name in shapes_of(model):
        if not (learns(name) or name in init.shapes):
            raise UserError(
                f"the model is to have {name}, which the checkpoint of init_from does not have "
                "and model.lora would freeze at random values: take the checkpoint's model, or "
                "fine-tune with --config.model.lora=None"
            )


def check_sizes(model: ModelConfig, base: ModelConfig) -> None:
    """Raises a UserError if the model is of another size than its checkpoint, which cannot fit."""
    names = ("width", "depth", "mlp_dim", "num_heads")
    other = [name for name in names if getattr(model, name, None) != getattr(base, name, None)]
    if other:
        wanted, has = (
            ", ".join(f"{name} {getattr(each, name)}" for name in other) for each in (model, base)
        )
        raise UserError(
            f"the model is to have {wanted}, but the checkpoint of init_from has {has}: "
            "--config.model.variant=None takes the checkpoint's sizes"
        )


def _changed(base: ModelConfig, name: str | None, fields: Mapping[str, Any]) -> ModelConfig:
    """The checkpoint's model with other fields; its ResNet, if any, cannot change."""
    is_vit = isinstance(base, ViTConfig)
    old, wanted = _network(is_vit, base.resnet, base.resnet_style), is_vit
    if name is not None:
        sizes = {"resnet": None, **variant_fields(name)}
        fields, wanted = {**sizes, **fields}, variant_kind(sizes) is ViTConfig
    units, style = (fields.get(f, getattr(base, f)) for f in ("resnet", "resnet_style"))
    if (new := _network(wanted, units, style)) != old:
        raise UserError(
            f"the model is to be {new}, but the checkpoint of init_from is {old}: leave "
            "model.variant and model.resnet out, or start from such a model"
        )
    check_fields(type(base), fields)
    return dataclasses.replace(base, **fields)


def _network(is_vit: bool, units: Any, style: Any) -> str:
    """Describes the part of a model that must agree with its checkpoint, for error messages."""
    if units is None:
        return "a ViT without a ResNet" if is_vit else "a ResNet of no units"
    normed = "pre" if style in STYLES and STYLES[style].preact else "post"
    units = tuple(units) if isinstance(units, list) else units
    resnet = f"a {normed}-activation ResNet of {units} units"
    return f"a ViT on {resnet}" if is_vit else resnet


def _with_patch_outputs(config: Config, model: ModelConfig) -> ModelConfig:
    """Adds the outputs for each patch that the objective needs."""
    given, wanted = config.model.get("patch_outputs"), 0
    if not config.classifies:
        native.check_objective(config.objective, model)
        wanted = masking.patch_outputs(config.objective, model)
    if given not in (None, wanted):
        raise UserError(
            f"model.patch_outputs is {given}, but objective {config.objective} needs {wanted}: "
            "leave it out"
        )
    return dataclasses.replace(model, patch_outputs=wanted) if wanted else model

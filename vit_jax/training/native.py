"""Training and evaluation on images of any shape (`model.max_patches`): what goes with it."""

import dataclasses

from vit_jax.checkpoints.card import ModelCard
from vit_jax.errors import UserError
from vit_jax.models.config import ModelConfig
from vit_jax.training.config import Config, EvalConfig


def fitted(model: ModelConfig, config: Config, method: str) -> ModelConfig:
    """The model, which resizes positions to each image's grid by `method`, if it does at all.

    Raises:
      UserError: a setting that is of images of one shape.
    """
    if getattr(model, "max_patches", None) is None:
        return model
    augment = config.augment
    of_one_shape = {
        "augment.mixup": augment.mixup,
        "augment.cutmix": augment.cutmix,
        "augment.image_sizes": augment.image_sizes,
        "distill.teacher": config.distill.teacher,
    }
    for key, value in of_one_shape.items():
        if value:
            raise _refused(key, value)
    return dataclasses.replace(model, native_resize=method)


def check_objective(objective: str, model: ModelConfig) -> None:
    """Raises a UserError if a model of images of any shape is to predict corrupted patches."""
    if getattr(model, "max_patches", None) is not None:
        raise _refused("objective", objective)


def check_views(card: ModelCard, how: EvalConfig) -> None:
    """Raises a UserError if images of any shape are to be seen in several views."""
    if card.preprocess.max_patches is not None:
        for name, several in {"crops": how.crops > 1, "flip": how.flip}.items():
            if several:
                raise _refused(f"eval.{name}", getattr(how, name))


def _refused(key: str, value: object) -> UserError:
    return UserError(
        f"{key} is {value!r}, which is for images of one shape, and with model.max_patches each "
        f"has its own: leave {key} out, or take a model without max_patches"
    )

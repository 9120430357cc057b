"""What is minimised: a loss for every example, from logits and target distributions."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Augment:
    """The `augment` section: what is done to a batch on the device."""

    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"augment.label_smoothing is {self.label_smoothing}; not in [0, 1)")


def softmax(logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Float[Array, " b"]:
    """Cross-entropy of one choice out of k."""
    return optax.losses.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def sigmoid(logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Float[Array, " b"]:
    """The sum of k yes-or-no cross-entropies (as for ImageNet-21k; big_vision's sigmoid_xent)."""
    loss = optax.losses.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets)
    return loss.sum(axis=-1)


OBJECTIVES: dict[str, Callable[[Array, Array], Array]] = {"softmax": softmax, "sigmoid": sigmoid}


def to_targets(
    labels: Int[Array, " b"] | Float[Array, "b k"], num_classes: int, smoothing: float = 0.0
) -> Float[Array, "b {num_classes}"]:
    """Class indices to one-hot rows, rows as they are, both mixed with `smoothing` of uniform."""
    targets = jax.nn.one_hot(labels, num_classes) if labels.ndim == 1 else labels
    return targets * (1 - smoothing) + smoothing / num_classes

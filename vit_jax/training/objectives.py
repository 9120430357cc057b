"""Losses for each example, from logits and target distributions, and mixup and cutmix."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Augment:
    """The `augment` section: augmentation of whole batches, on the device.

    Attributes:
      mixup: alpha of mixup (arXiv 1710.09412): weights are drawn from Beta(alpha, alpha), and the
        larger one goes to the image itself; 0 is off.
      cutmix: alpha of cutmix (arXiv 1905.04899), which pastes a box instead of blending; 0 is off.
      cutmix_share: the probability of cutmix if both are on.
      mix_off: without mixup and cutmix are the last steps, so many; below 1, a fraction of the run.
        Label smoothing stays. timm counts its `mixup_off_epoch` from the start.
      image_sizes: sides of the training images, which grow in equally long phases, such as
        128,160,224, up to model.image_size. Position embeddings are resized to each by the model's
        position_resize; what is saved and evaluated has the model's size. () is that size alone.
      per_image: whether weights and boxes are drawn for each image. Otherwise there is one a batch,
        as in AugReg and big_vision.
      label_smoothing: how much of each target is spread over all classes.
      class_weights: of the classes in the training loss: `inverse`, to their number of images, so
        that the weights of all images have a mean of 1; `effective`, to their effective number
        (arXiv 1901.05555; `effective:0.999` sets its beta, 0.9999), with a mean of 1 over classes;
        or a number for each class, in order, such as "1,1,4". None is the same for all.
      focal: gamma of the focal loss (arXiv 1708.02002), which weighs down what is predicted well
        already; 0 is off.
      dice: weight of the soft Dice loss (arXiv 1606.04797), which objective segmentation then adds
        to the cross-entropy: of each image, the mean over the classes in its mask; 0 is off.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_share: float = 0.5
    mix_off: float = 0.0
    image_sizes: tuple[int, ...] = ()
    per_image: bool = False
    label_smoothing: float = 0.0
    class_weights: str | None = None
    focal: float = 0.0
    dice: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"augment.label_smoothing is {self.label_smoothing}; not in [0, 1)")
        if self.class_weights is not None:
            _read_weights(self.class_weights)
        for name in ("mixup", "cutmix", "focal", "dice"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"augment.{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.cutmix_share <= 1:
            raise UserError(f"augment.cutmix_share is {self.cutmix_share}; not in [0, 1]")
        sides = self.image_sizes
        if min(sides, default=1) < 1 or list(sides) != sorted(set(sides)):
            raise UserError(
                f"augment.image_sizes is {sides}; expected sides in pixels that grow, such as "
                "128,160,224"
            )
        if not 0 <= self.mix_off < float("inf"):
            raise UserError(f"augment.mix_off is {self.mix_off}; it must be at least 0")
        if self.mix_off and not self.mixes:
            raise UserError(
                f"augment.mix_off is {self.mix_off:g}, but there is nothing to switch off: set "
                "augment.mixup or augment.cutmix, or leave it out"
            )

    @property
    def mixes(self) -> bool:
        """Whether there is mixup or cutmix."""
        return bool(self.mixup or self.cutmix)

    def mixed_steps(self, total_steps: int) -> int:
        """The number of first steps with mixup and cutmix, by `mix_off`.

        Raises:
          UserError: there are none.
        """
        off = round(self.mix_off * total_steps if self.mix_off < 1 else self.mix_off)
        if self.mix_off and off >= total_steps:
            raise UserError(
                f"augment.mix_off of {off} steps leaves none of the run of {total_steps}: shorten "
                "it, or give it as a share of the run, such as 0.1"
            )
        return total_steps - off


def softmax(
    logits: Float[Array, "*b k"],
    targets: Float[Array, "*b k"],
    weights: Float[Array | np.ndarray, " k"] | None = None,
    focal: float = 0.0,
) -> Float[Array, "*b"]:
    """Softmax cross-entropy over k classes, with the weights of classes and gamma of `Augment`."""
    logits = logits.astype(jnp.float32)
    if weights is None and not focal:
        return optax.losses.softmax_cross_entropy(logits, targets)
    log_p = jax.nn.log_softmax(logits)
    loss = -targets * log_p * _focal(1 - jnp.exp(log_p), focal)
    return jnp.sum(loss if weights is None else loss * weights, axis=-1)


def sigmoid(
    logits: Float[Array, "b k"],
    targets: Float[Array, "b k"],
    weights: Float[Array | np.ndarray, " k"] | None = None,
    focal: float = 0.0,
) -> Float[Array, " b"]:
    """Sigmoid cross-entropy, summed over classes (for ImageNet-21k; big_vision's sigmoid_xent)."""
    logits = logits.astype(jnp.float32)
    loss = optax.losses.sigmoid_binary_cross_entropy(logits, targets)
    if focal:
        p = jax.nn.sigmoid(logits)
        loss = -targets * jax.nn.log_sigmoid(logits) * _focal(1 - p, focal)
        loss -= (1 - targets) * jax.nn.log_sigmoid(-logits) * _focal(p, focal)
    return (loss if weights is None else loss * weights).sum(axis=-1)


def _focal(rest: Float[Array, "*b k"], gamma: float) -> Float[Array, "*b k"] | float:
    # A root has no derivative at 0, where a probability is 1.
    return jnp.maximum(rest, 1e-12) ** gamma if gamma else 1.0


# By objective (`card.OBJECTIVES` says what its logits mean).
LOSSES: dict[str, Callable[..., Array]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "distill": softmax,  # of the labels; the teacher's is in training/distill.py
}


def _read_weights(how: str) -> tuple[float, ...] | float | None:
    """The numbers of `Augment.class_weights`, or the beta of `effective`; None for `inverse`."""
    kind, _, beta = how.partition(":")
    try:
        if kind == "effective":
            found = float(beta or 0.9999)
            if not 0 <= found < 1:
                raise ValueError
            return found
        if how == "inverse":
            return None
        numbers = tuple(float(each) for each in how.strip("()[] ").split(",") if each.strip())
        if not numbers or not all(0 <= each < float("inf") for each in numbers):
            raise ValueError
        return numbers
    except ValueError:
        raise UserError(
            f"augment.class_weights is {how!r}; expected inverse, effective, effective:BETA with "
            "BETA in [0, 1), or a number for each class, such as 1,1,4"
        ) from None


def class_weights(
    how: str, labels: Sequence[str], counts: Sequence[int] | None
) -> tuple[float, ...]:
    """The weight of each class, by `Augment.class_weights` and the images of each class.

    A class of a kept head that the data does not have gets a weight of 1.

    Raises:
      UserError: not one number for each class; or the numbers of images are not known.
    """
    found = _read_weights(how)
    if isinstance(found, tuple):
        if len(found) != len(labels):
            raise UserError(
                f"augment.class_weights has {len(found)} numbers, but there are {len(labels)} "
                f"classes: {', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}"
            )
        return found
    if counts is None or not any(counts):
        raise UserError(
            f"augment.class_weights={how} needs the class of every image beforehand, which this "
            "source does not say: give a number for each class"
        )
    there = np.flatnonzero(counts)
    images = np.asarray(counts, np.float64)[there]
    if found is None:
        weights = images.sum() / (len(there) * images)
    else:
        weights = (1 - found) / (1 - found**images)
        weights *= len(there) / weights.sum()
    result = np.ones(len(counts))
    result[there] = weights
    return tuple(result.tolist())


def to_targets(
    labels: Int[Array, " b"] | Float[Array, "b k"], num_classes: int, smoothing: float = 0.0
) -> Float[Array, "b {num_classes}"]:
    """One-hot targets from class indices, or rows as they are; both with label smoothing."""
    targets = jax.nn.one_hot(labels, num_classes) if labels.ndim == 1 else labels
    return targets * (1 - smoothing) + smoothing / num_classes


def draw_mixing(augment: Augment, key: Array, b: int, size: tuple[int, int]) -> dict[str, Array]:
    """Draws mixup or cutmix parameters for a batch of `b` images of `size` (h, w).

    Returns:
      share: float32 [b], the weight of an image's own target; blend: float32 [b], the weight of its
      own pixels outside of the box; box: int32 [b 4], (top, left, bottom, right) of the pixels
      pasted from the partner.
    """
    rows = b if augment.per_image else 1
    keys = jax.random.split(key, 4)
    cut = jax.random.uniform(keys[0], (rows,)) < (
        augment.cutmix_share if augment.mixup and augment.cutmix else float(augment.cutmix > 0)
    )
    mixup = jax.random.beta(keys[1], *[augment.mixup or 1.0] * 2, (rows,))
    cutmix = jax.random.beta(keys[2], *[augment.cutmix or 1.0] * 2, (rows,))
    mixup = jnp.maximum(mixup, 1 - mixup)

    # A box with the remaining area around a uniform centre, clipped to the image.
    h_w = jnp.array(size)
    centre = jnp.floor(jax.random.uniform(keys[3], (rows, 2)) * h_w).astype(jnp.int32)
    half = jnp.floor(jnp.sqrt(1 - cutmix)[:, None] * h_w).astype(jnp.int32) // 2
    box = jnp.concatenate([centre - half, centre + half], axis=1)
    box = jnp.clip(box, 0, jnp.tile(h_w, 2)) * cut[:, None]
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (size[0] * size[1])
    blend = jnp.where(cut, 1.0, mixup)
    mixing = {"share": jnp.where(cut, 1 - area, mixup), "blend": blend, "box": box}
    return {name: jnp.broadcast_to(x, (b, *x.shape[1:])) for name, x in mixing.items()}


def mix_before(step: int, mixing: dict[str, Array], now: Int[Array, ""]) -> dict[str, Array]:
    """The parameters of `draw_mixing` before a step; from it on those that change nothing."""
    plain = {"share": 1.0, "blend": 1.0, "box": 0}
    return {name: jnp.where(now < step, x, plain[name]) for name, x in mixing.items()}


def mix_images(
    images: Float[Array, "b h w c"], partners: Float[Array, "b h w c"], mixing: dict[str, Array]
) -> Float[Array, "b h w c"]:
    """Blends every image with its partner, or pastes the partner's box into it."""
    h, w = images.shape[1:3]
    top, left, bottom, right = (mixing["box"][:, i, None, None] for i in range(4))
    y, x = jnp.arange(h)[None, :, None], jnp.arange(w)[None, None, :]
    inside = (top <= y) & (y < bottom) & (left <= x) & (x < right)
    own = jnp.where(inside, 0.0, mixing["blend"][:, None, None])[..., None]
    return own * images + (1 - own) * partners

"""Object detection: which location learns which box, and the losses of FCOS (arXiv 1904.01355)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_jax.models.config import ViTConfig
from vit_jax.models.detector import locations
from vit_jax.models.pyramid import sizes

RADIUS = 1.5  # in strides: how far from a box's centre a location may be
ALPHA, GAMMA = 0.25, 2  # of the focal loss (arXiv 1708.02002)
_LEAST = 1e-7  # added to areas that divide


def assign(config: ViTConfig, label: Float[Array, "b m 5"]) -> Int[Array, "b n"]:
    """The row of the box that each location learns, -1 for none.

    A location learns a box that it is inside of, if it is less than 1.5 strides from its centre,
    across and down, and the largest of the distances to its sides is over 4 and up to 8 strides; on
    the largest map also if it is smaller, and on the smallest if it is larger. Of several boxes it
    learns the one of the smallest area, of equal ones the first.

    Args:
      label: rows of (class, x0, y0, x1, y1), in pixels of the model's image; those with a class of
        -1 are padding.
    """
    (x, y), strides = (axis[:, None] for axis in locations(config)[0].T), locations(config)[1]
    lower, upper = _ranges(config, strides)
    strides = strides[:, None]
    kind, x0, y0, x1, y1 = (label[:, None, :, i].astype(jnp.float32) for i in range(5))  # [b 1 m]
    sides = x - x0, y - y0, x1 - x, y1 - y  # [b n m]
    nearest, farthest = (
        pick(pick(sides[0], sides[1]), pick(sides[2], sides[3]))
        for pick in (jnp.minimum, jnp.maximum)
    )
    off = jnp.maximum(jnp.abs(x - (x0 + x1) / 2), jnp.abs(y - (y0 + y1) / 2))
    fits = (kind >= 0) & (nearest > 0) & (off < RADIUS * strides)
    fits &= (farthest > lower) & (farthest <= upper)
    area = jnp.where(fits, (x1 - x0) * (y1 - y0), jnp.inf)
    return jnp.where(fits.any(axis=-1), area.argmin(axis=-1).astype(jnp.int32), -1)


def _ranges(config: ViTConfig, strides: Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest distances [n 1] of boxes for each location, in pixels: over, and up to."""
    first, *_, last = (h * w for h, w in sizes(config.grid))
    lower, upper = 4 * strides, 8 * strides
    lower[:first], upper[-last:] = 0, np.inf
    return lower[:, None], upper[:, None]


def positives(config: ViTConfig, label: Float[Array, "b m 5"]) -> Float[Array, " b"]:
    """The number of locations of each image that learn a box; of a batch, `sums` are divided by."""
    return (assign(config, label) >= 0).sum(axis=1).astype(jnp.float32)


def sums(
    config: ViTConfig, outputs: Float[Array, "b n o"], label: Float[Array, "b m 5"]
) -> dict[str, Float[Array, " b"]]:
    """Sums over the locations of each image, to be divided by the batch's `positives`, at least 1.

    Args:
      outputs: of `Detector`.
      label: as in `assign`.

    Returns:
      class_loss: the sigmoid focal loss of all classes at all locations.
      box_loss: 1 - GIoU (arXiv 1902.09630), where a location learns a box.
      centerness_loss: cross-entropy of the centerness, there as well.
      loss: their sum.
    """
    outputs = outputs.astype(jnp.float32)
    logits, distances, centerness = outputs[..., :-5], outputs[..., -5:-1], outputs[..., -1]
    row = assign(config, label)
    learns = row >= 0
    box = jnp.take_along_axis(label.astype(jnp.float32), jnp.maximum(row, 0)[..., None], axis=1)
    (centres, strides), classes = locations(config), jnp.arange(logits.shape[-1])
    right = learns[..., None] & (box[..., :1] == classes)
    wanted = jnp.concatenate([centres - box[..., 1:3], box[..., 3:] - centres], axis=-1)
    wanted = jnp.where(learns[..., None], wanted / strides[:, None], 1.0)
    found = {
        "class_loss": focal(logits, right).sum(axis=(1, 2)),
        "box_loss": jnp.sum(1 - giou(distances, wanted), axis=1, where=learns),
        "centerness_loss": jnp.sum(
            _cross_entropy(centerness, centered(wanted)), axis=1, where=learns
        ),
    }
    return {"loss": sum(found.values()), **found}


def focal(logits: Float[Array, "*b"], right: Bool[Array, "*b"]) -> Float[Array, "*b"]:
    """The sigmoid focal loss of logits that are to be high where `right`, and low elsewhere."""
    wrong = jnp.where(right, -logits, logits)  # the logit of what is not the case
    weight = jnp.where(right, ALPHA, 1 - ALPHA)
    return weight * jax.nn.sigmoid(wrong) ** GAMMA * jax.nn.softplus(wrong)


def giou(found: Float[Array, "*b 4"], wanted: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """GIoU of boxes by their distances (left, top, right, bottom) from one location inside both."""

    def area(sides):
        left, top, right, bottom = (sides[..., i] for i in range(4))
        return (left + right) * (top + bottom)

    inside, around = area(jnp.minimum(found, wanted)), area(jnp.maximum(found, wanted))
    union = area(found) + area(wanted) - inside
    return inside / (union + _LEAST) - (around - union) / (around + _LEAST)


def centered(distances: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """Centerness of a location in its box by its distances: 1 at the centre, 0 at the sides."""
    left, top, right, bottom = (distances[..., i] for i in range(4))
    across = jnp.minimum(left, right) / jnp.maximum(left, right)
    down = jnp.minimum(top, bottom) / jnp.maximum(top, bottom)
    return jnp.sqrt(across * down)


def _cross_entropy(logits: Float[Array, "*b"], target: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return jax.nn.softplus(logits) - logits * target

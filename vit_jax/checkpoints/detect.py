"""Boxes from the outputs of locations: decoding, and non-maximum suppression, on the device."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int

from vit_jax.models.config import ViTConfig
from vit_jax.models.detector import locations


def decoded(
    config: ViTConfig, outputs: Float[Array, "b n o"]
) -> tuple[Float32[Array, "b n 4"], Float32[Array, "b n k"]]:
    """Boxes and scores at all locations, from the outputs of a `Detector`.

    Returns:
      The corners (x0, y0, x1, y1) of each box, in pixels of the model's image, which they may be
      beyond; and the score of each class, sqrt(its probability x centerness).
    """
    outputs, (centres, strides) = outputs.astype(jnp.float32), locations(config)
    distances = outputs[..., -5:-1] * strides[:, None]
    corners = jnp.concatenate([centres - distances[..., :2], centres + distances[..., 2:]], axis=-1)
    scores = jax.nn.sigmoid(outputs[..., :-5]) * jax.nn.sigmoid(outputs[..., -1:])
    return corners, jnp.sqrt(scores)


@functools.partial(
    jax.jit, static_argnames=("config", "threshold", "candidates", "most", "iou", "spread")
)
def best(
    config: ViTConfig,
    outputs: Float[Array, "b n o"],
    size: Int[Array, "b 2"],
    threshold: float = 0.05,
    candidates: int = 1000,
    most: int = 100,
    iou: float = 0.6,
    spread: NamedSharding | None = None,
) -> dict[str, Array]:
    """The best boxes of each image, the best first, without those that overlap a better one.

    Args:
      outputs: of a `Detector`, for whole images that were resized to the model's size.
      size: the (h, w) of each image itself.
      threshold: boxes of lower scores, or this, are left out.
      candidates: how many of an image's boxes and classes are kept for the suppression, by score.
      most: the boxes of an image.
      iou: over which a box is left out if a better one of its class is there (see `suppressed`).
      spread: how the images are spread over devices, of which each then sees to its own; without
        it XLA would gather them all to find the best.

    Returns:
      corners: float32 [b most 4], (x0, y0, x1, y1) in pixels of each image, inside of it.
      classes: int32 [b most], -1 where there is no further box.
      scores: float32 [b most], 0 there. Boxes of no area are none.
    """
    limits = dict(threshold=threshold, candidates=candidates, most=most, iou=iou)
    one = functools.partial(_best, config, **limits)
    if spread is not None:
        own = spread.spec
        one = jax.shard_map(
            one, mesh=spread.mesh, in_specs=(own, own), out_specs=own, check_vma=False
        )
    return one(outputs, size)


def _best(
    config: ViTConfig,
    outputs: Float[Array, "b n o"],
    size: Int[Array, "b 2"],
    *,
    threshold: float,
    candidates: int,
    most: int,
    iou: float,
) -> dict[str, Array]:
    corners, scores = decoded(config, outputs)
    b, n, k = scores.shape
    h, w = jnp.split(size.astype(jnp.float32), 2, axis=1)
    own = jnp.concatenate([w, h, w, h], axis=1)[:, None]  # [b 1 4]
    height, width = config.image_size
    scale = jnp.array([1 / width, 1 / height] * 2, jnp.float32)
    corners = jnp.clip(corners * scale * own, 0, own)
    real = (corners[..., 2:] > corners[..., :2]).all(axis=-1)
    scores = jnp.where(real[..., None] & (scores > threshold), scores, 0)

    # The best candidates are at the locations whose best class is best, and these are fewer.
    where = jax.lax.top_k(scores.max(axis=-1), min(candidates, n))[1]
    where = jnp.sort(where, axis=1)  # equal scores are in the order of locations and classes
    scores = jnp.take_along_axis(scores, where[..., None], axis=1).reshape(b, -1)
    scores, index = jax.lax.top_k(scores, min(candidates, scores.shape[1]))
    where, classes = jnp.take_along_axis(where, index // k, axis=1), index % k
    corners = jnp.take_along_axis(corners, where[..., None], axis=1)

    keep = (scores > 0) & ~suppressed(corners, classes, scores > 0, iou)
    scores, index = jax.lax.top_k(jnp.where(keep, scores, 0), min(most, scores.shape[1]))
    there, missing = scores > 0, most - scores.shape[1]
    classes = jnp.where(there, jnp.take_along_axis(classes, index, axis=1), -1)
    corners = jnp.take_along_axis(corners, index[..., None], axis=1) * there[..., None]
    return {
        "corners": jnp.pad(corners, [(0, 0), (0, missing), (0, 0)]),
        "classes": jnp.pad(classes, [(0, 0), (0, missing)], constant_values=-1),
        "scores": jnp.pad(scores, [(0, 0), (0, missing)]),
    }


def suppressed(
    corners: Float[Array, "b c 4"],
    classes: Int[Array, "b c"],
    valid: Bool[Array, "b c"],
    iou: float,
) -> Bool[Array, "b c"]:
    """Which boxes a better one suppresses: greedy non-maximum suppression, of each class.

    From the first box on, each that is not suppressed suppresses all later ones of its class whose
    intersection over union with it is over `iou`. Boxes are the best first; those that are not
    `valid` suppress nothing.

    Whether a box is suppressed depends on the earlier ones alone. So, starting with none, what
    those that are not suppressed suppress is repeated until nothing changes, when it is the greedy
    result: a few products of a matrix and a vector, rather than a step for each box.
    """
    x0, y0, x1, y1 = (corners[..., i] for i in range(4))
    area = (x1 - x0) * (y1 - y0)

    def overlap(low, high):  # [b c c], of earlier boxes, down, with later ones, across
        ends = jnp.minimum(high[:, :, None], high[:, None])
        return jnp.maximum(ends - jnp.maximum(low[:, :, None], low[:, None]), 0)

    inside = overlap(x0, x1) * overlap(y0, y1)
    union = area[:, :, None] + area[:, None] - inside
    order = jnp.arange(corners.shape[1])
    covers = (inside > iou * union) & (classes[:, :, None] == classes[:, None])
    covers &= valid[:, :, None] & (order[:, None] < order)

    def step(state):
        out, _ = state
        new = (covers & ~out[:, :, None]).any(axis=1)
        return new, (new != out).any()

    none = jnp.zeros(valid.shape, bool)
    return jax.lax.while_loop(lambda state: state[1], step, (none, jnp.array(True)))[0]

"""Linear segmentation probe: a linear classifier of frozen patch features, scored on masks.

Its logits are interpolated to the masks' size. Functions of features and masks on the host;
deterministic, and every pixel of `test` counts once.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, Int64

from vit_jax.errors import UserError
from vit_jax.training.evaluation.probes import (
    Scale,
    check_positive,
    check_sets,
    cross_entropy,
    minimise,
    standard,
    standardised,
)

# The number of logits (pixels x classes) on the device at a time: 64 MiB, and a few copies.
BLOCK = 2**24


@dataclasses.dataclass(frozen=True)
class Dense:
    """The patch features of n examples, and the class of each pixel; -1 is of none."""

    x: Float32[np.ndarray, "n gh gw d"]
    y: Int32[np.ndarray, "n h w"]


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear classifier of d standardised features; its last row of weights is the bias."""

    weights: Float[Array, "e k"]
    scale: Scale


def segmentation(
    train: Dense,
    val: Dense | None,
    test: Dense,
    num_classes: int,
    *,
    l2: Sequence[float],
    steps: int,
) -> dict[str, float]:
    """Fits a linear classifier of patches to the masks of `train`, and scores it on `test`.

    Of several `l2`, the one with the best miou on `val` is chosen after fitting to `train` (the
    largest of equals), and used to fit both together. With one `l2`, `val` may be None. The
    device holds all training features in float32, and the logits of one block of examples.

    Returns:
      {"miou", "accuracy", "foreground_iou": on test (see `scores`), "l2": the chosen one}.

    Raises:
      UserError: a set has no examples, features that are not finite or of another width, or
        labels outside of 0 to num_classes - 1; or a number is not positive.
    """
    check_sets(num_classes, train, test, val, unknown=True)
    check_positive(l2=l2, steps=[steps])
    if len(l2) > 1 and val is None:
        raise UserError(f"{len(l2)} values of l2 and no validation examples to choose by")
    chosen, start = l2[0], None
    if len(l2) > 1:
        found = []
        for value in sorted(l2, reverse=True):  # a fit starts where the one before ended
            head = fit_head(train, num_classes, l2=value, steps=steps, start=start)
            start = head.weights
            found.append((scores(confusion(head, val))["miou"], value, start))
        _, chosen, start = max(found, key=lambda one: one[:2])
    if val is not None:
        train = Dense(np.concatenate([train.x, val.x]), np.concatenate([train.y, val.y]))
    head = fit_head(train, num_classes, l2=chosen, steps=steps, start=start)
    return {**scores(confusion(head, test)), "l2": float(chosen)}


def fit_head(
    train: Dense,
    num_classes: int,
    *,
    l2: float,
    steps: int,
    start: Float[Array, "e k"] | None = None,
) -> Head:
    """Minimises the mean cross-entropy of all pixels + l2 / 2 ||W||^2, with no penalty on the bias.

    Takes at most `steps` of full-batch L-BFGS, from `start`, by default zero weights and the log
    shares of the classes as bias.
    """
    n, gh, gw, d = train.x.shape
    scale = standard(train.x.reshape(-1, d))
    if start is None:
        known = train.y[train.y >= 0]
        shares = np.bincount(known, minlength=num_classes) / known.size
        start = np.zeros((d + 1, num_classes), np.float32)
        start[-1] = np.log(np.maximum(shares, 1e-13))  # those without pixels stay out
    size = min(n, max(1, BLOCK // (train.y[0].size * num_classes)))
    blocks = -(-n // size)
    # Padding has zero features and label -1, and does not count.
    x = np.zeros((blocks * size, gh, gw, d + 1), np.float32)
    y = np.full((blocks * size, *train.y.shape[1:]), -1, np.int32)
    x[:n], y[:n] = _standardised(train.x, scale), train.y
    x, y = (jnp.asarray(each.reshape(blocks, size, *each.shape[1:])) for each in (x, y))
    return Head(_fit(x, y, jnp.asarray(start), l2, steps), scale)


@jax.jit
def _fit(
    x: Float[Array, "m b gh gw d"],
    y: Int32[Array, "m b h w"],
    start: Float[Array, "d k"],
    l2: Float[Array, ""],
    steps: Int[Array, ""],
) -> Float[Array, "d k"]:
    pixels = jnp.sum(y >= 0, dtype=jnp.float32)

    def loss(weights):
        @jax.checkpoint  # so that the logits of one block are there at a time
        def add(total, block):
            losses = cross_entropy(stretched(block[0], weights, y.shape[2:]), block[1])
            return total + jnp.sum(losses, where=block[1] >= 0) / pixels, None

        mean, _ = jax.lax.scan(add, jnp.zeros(()), (x, y))
        return mean + l2 / 2 * jnp.sum(weights[:-1] ** 2)

    return minimise(loss, start, l2, steps)


def stretched(
    x: Float[Array, "b gh gw d"], weights: Float[Array, "d k"], size: tuple[int, int]
) -> Float[Array, "b h w k"]:
    """Patch logits, interpolated bilinearly between patch centres; borders use the nearest."""
    logits = jnp.matmul(x, weights, precision="highest")
    shape = (len(x), *size, weights.shape[1])
    return jax.image.resize(logits, shape, "bilinear", antialias=False, precision="highest")


def predict(
    head: Head, x: Float32[np.ndarray, "n gh gw d"], size: tuple[int, int]
) -> Int32[np.ndarray, "n {size[0]} {size[1]}"]:
    """Predicts the class of each pixel, for masks of `size` (h, w)."""
    return np.concatenate(list(_predict(head, x, size)))


def _predict(
    head: Head, x: Float32[np.ndarray, "n gh gw d"], size: tuple[int, int]
) -> Iterator[Int32[np.ndarray, "b h w"]]:
    rows = min(len(x), max(1, BLOCK // (size[0] * size[1] * head.weights.shape[1])))
    for i in range(0, len(x), rows):
        block = _standardised(x[i : i + rows], head.scale)
        padded = np.pad(block, [(0, rows - len(block)), (0, 0), (0, 0), (0, 0)])
        yield np.asarray(_classes(jnp.asarray(padded), head.weights, size))[: len(block)]


@functools.partial(jax.jit, static_argnames="size")
def _classes(
    x: Float[Array, "b gh gw d"], weights: Float[Array, "d k"], size: tuple[int, int]
) -> Int32[Array, "b h w"]:
    return stretched(x, weights, size).argmax(axis=-1).astype(jnp.int32)


def _standardised(
    x: Float32[np.ndarray, "n gh gw d"], scale: Scale
) -> Float32[np.ndarray, "n gh gw e"]:
    flat = standardised(x.reshape(-1, x.shape[-1]), scale, 1, np.float32)
    return flat.reshape(*x.shape[:-1], -1)


def confusion(head: Head, test: Dense) -> Int64[np.ndarray, "k k"]:
    """The confusion matrix on `test`, in pixels: true classes down, predicted ones across."""
    k, start = head.weights.shape[1], 0
    counts = np.zeros((k, k), np.int64)
    for found in _predict(head, test.x, test.y.shape[1:]):
        counts += count(test.y[start : start + len(found)], found, k)
        start += len(found)
    return counts


def count(
    truth: Int32[np.ndarray, "*shape"], found: Int32[np.ndarray, "*shape"], num_classes: int
) -> Int64[np.ndarray, "{num_classes} {num_classes}"]:
    """The confusion matrix of masks: true classes down, predicted ones across.

    Pixels of no class, -1, are left out.
    """
    known = truth >= 0
    pairs = truth[known].astype(np.int64) * num_classes + found[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(confusion: Int64[np.ndarray, "k k"]) -> dict[str, float]:
    """Metrics of a confusion matrix.

    Returns:
      {"miou": mean over classes of intersection / union, without classes that are neither true nor
      predicted anywhere; "accuracy": pixel accuracy; "foreground_iou": intersection / union of all
      classes but 0 merged into one, if there are any}.
    """
    total, right = confusion.sum(), np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
    there = union > 0
    found = {
        "miou": float(np.mean(right[there] / union[there])),
        "accuracy": float(right.sum() / total),
    }
    foreground = total - confusion[0, 0]
    if foreground:
        found["foreground_iou"] = float(confusion[1:, 1:].sum() / foreground)
    return found

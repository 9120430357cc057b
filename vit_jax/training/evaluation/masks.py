"""Evaluation of masks: a confusion matrix of all pixels, and the metrics that follow from it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int64, Integer

from vit_jax.data.masks import IGNORED
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.create import merged
from vit_jax.models.dense import across, down
from vit_jax.models.stack import Layout
from vit_jax.training.evaluation.windows import averaged
from vit_jax.training.steps import Batch, masks

_ROWS = 64  # of pixels whose logits are there at a time
# The metrics of each evaluation; and iou/NAME, of the classes that are true or predicted anywhere.
METRICS = ("miou", "pixel_accuracy", "loss")


def make_mask_eval_step(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    *,
    stride: float | None = None,
    layout: Layout | None = None,
) -> Callable[[Any, Batch], dict[str, Array]]:
    """Returns (params, batch) -> sums over the batch's pixels (see `pixel_sums`).

    Args:
      stride: images are of their own shapes, `scaled`, and seen by windows (see windows.py).
    """

    def eval_step(params, batch):
        model, scaled = merged(graphdef, params, layout), batch.get("scaled")

        def logits_of(pixels):
            return model(preprocess.normalise(pixels), layout=layout)

        if stride is None:
            logits = logits_of(batch["image"])
        else:
            window = preprocess.image_size
            logits = averaged(logits_of, batch["image"], scaled, window, stride)
        return pixel_sums(logits, masks(batch), batch["size"], scaled)

    return eval_step


def pixel_sums(
    logits: Float[Array, "b gh gw k"],
    truth: Integer[Array, "b h w"],
    own: Int[Array, "b 2"],
    of: Int[Array, "b 2"] | None = None,
) -> dict[str, Array]:
    """Sums over the pixels of masks that count.

    Args:
      own: the (h, w) of each mask, which is 255 beyond.
      of: the (gh, gw) of each image's logits, where they differ.

    Returns:
      confusion: int32 [k k], true classes down, predicted ones across; loss: float32 [], of
      cross-entropies, by the bilinearly interpolated logits.
    """
    b, h, w = truth.shape
    k = logits.shape[-1]
    if truth.size >= 2**31:
        raise UserError(
            f"{b:,} masks of {h}x{w} pixels are too many to count at a time: lower eval.batch_size"
        )
    strips = h // _ROWS if h % _ROWS == 0 else 1

    def split(x: Array) -> Array:  # [b h ...] -> [strips b rows ...]
        return jnp.moveaxis(x.reshape(b, strips, h // strips, *x.shape[2:]), 1, 0)

    def strip(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        x, truth = inputs
        log_p = jax.nn.log_softmax(across(x, w, own, of))
        valid = truth != IGNORED
        of_truth = jnp.take_along_axis(log_p, jnp.minimum(truth, k - 1)[..., None], axis=-1)
        loss = jnp.sum(-of_truth[..., 0], axis=(1, 2), where=valid)
        pairs = jnp.where(valid, truth.astype(jnp.int32) * k + log_p.argmax(-1), k * k)
        count = jax.vmap(lambda each: jnp.bincount(each.ravel(), length=k * k + 1))
        return count(pairs)[:, :-1].sum(axis=0), loss.sum()

    counts, losses = jax.lax.map(strip, (split(down(logits, h, own, of)), split(truth)))
    return {"confusion": counts.sum(axis=0).reshape(k, k), "loss": losses.sum()}


def added(results: Iterable[Mapping[str, np.ndarray]]) -> tuple[Int64[np.ndarray, "k k"], float]:
    """The confusion matrix and the loss of all batches, exact in the former."""
    confusion, loss = np.zeros((), np.int64), 0.0
    for values in results:
        confusion = confusion + values["confusion"].astype(np.int64)
        loss += float(values["loss"])
    return confusion, loss


def metrics(
    confusion: Int64[np.ndarray, "k k"], loss: float, names: Sequence[str]
) -> dict[str, float]:
    """The metrics of a confusion matrix with some pixels, and of the sum of their losses.

    Returns:
      miou: the mean, over the classes that are true or predicted anywhere, of intersection /
      union; pixel_accuracy; loss; and iou/NAME of each of these classes.
    """
    total, right = confusion.sum(), np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
    iou = {name: float(i / u) for name, i, u in zip(names, right, union, strict=True) if u}
    return {
        "miou": float(np.mean(list(iou.values()))),
        "pixel_accuracy": float(right.sum() / total),
        "loss": loss / int(total),
        **{f"iou/{name}": value for name, value in iou.items()},
    }

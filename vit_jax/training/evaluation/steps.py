"""The evaluation steps: sums over the examples of a batch, and features of each."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from vit_jax.checkpoints.card import OBJECTIVES
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ModelConfig
from vit_jax.models.create import Model
from vit_jax.models.native import Patches
from vit_jax.models.vit import Layout
from vit_jax.training import objectives
from vit_jax.training.steps import Batch, images, masked_sums, merged


def make_eval_step(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    *,
    num_classes: int,
    objective: str,
    each: bool = False,
    rows: bool = False,
    flip: bool = False,
    layout: Layout | None = None,
) -> Callable[[Any, Batch], dict[str, Array]]:
    """Returns (params, batch) -> sums over the batch's real examples, to be divided by the caller.

    An image may come as several crops, [b v h w c]: `averaged` makes their logits one.

    With labels [b k], an image is right if the top class is any of its labels (ImageNet-ReaL);
    images without labels are left out of all sums.

    Args:
      each: whether each label is a separate yes-or-no question, so that images without labels have
        a loss, too: `loss` is then the sum over all images, and `images` their number.
      rows: whether to add what is known of each example: logits (float32 [b k]), label, mask.
      flip: whether each image is seen mirrored as well.
    """
    loss_of = objectives.LOSSES[objective]

    def eval_step(params, batch):
        model = merged(graphdef, params, layout)
        if flip or batch["image"].ndim == 5:
            logits = _of_views(model, batch["image"], preprocess, objective, flip, layout)
        else:
            logits = model(images(batch, preprocess), layout=layout)
        targets = objectives.to_targets(batch["label"], num_classes)
        # Of several right classes the top one counts; images without any do not.
        mask = batch["mask"] & (targets.max(axis=-1) > 0)
        label = jnp.where(targets > 0, logits, -jnp.inf).argmax(-1)
        # The rank of the right class: ties go to the lower index, as in argmax, and NaN never wins.
        best = jnp.take_along_axis(logits, label[:, None], axis=1)
        index = jnp.arange(logits.shape[1])
        loses = (logits < best) | ((logits == best) & (index >= label[:, None]))
        rank = jnp.sum(~loses, axis=1)
        right = mask & (jnp.take_along_axis(targets, label[:, None], axis=1)[:, 0] > 0)
        sums = {
            "count": mask.sum(),
            "accuracy": jnp.sum((rank == 0) & right),
            "top5": jnp.sum((rank < min(5, num_classes)) & right),
            "loss": jnp.sum(loss_of(logits, targets) * (batch["mask"] if each else mask)),
        }
        if each:
            sums["images"] = batch["mask"].sum()
        if rows:
            known = {"label": batch["label"], "mask": batch["mask"]}
            sums |= {"logits": logits.astype(jnp.float32), **known}
        return sums

    return eval_step


def _of_views(
    model: Any,
    pixels: Array,
    preprocess: Preprocess,
    objective: str,
    flip: bool,
    layout: Layout | None,
) -> Array:
    """The logits [b k] of images [b h w c], or of crops of each [b v h w c], one view at a time."""
    views = jnp.moveaxis(pixels, 1, 0) if pixels.ndim == 5 else pixels[None]
    if flip:
        views = jnp.concatenate([views, views[..., ::-1, :]])
    logits = jax.lax.map(lambda view: model(preprocess.normalise(view), layout=layout), views)
    return averaged(logits, multi_label=OBJECTIVES[objective].multi_label)


def averaged(logits: Float[Array, "v b k"], *, multi_label: bool) -> Float[Array, "b k"]:
    """The logits of the mean of the probabilities of v views, float32.

    Probabilities are averaged, as by VGG (arXiv 1409.1556) and GoogLeNet (arXiv 1409.4842), not
    logits: their mean is a distribution that the loss and the calibration can be measured of, and
    one view of extreme logits does not outweigh all others. Classes that are questions of their own
    (`multi_label`) have a mean probability each.
    """
    logits, v = logits.astype(jnp.float32), len(logits)
    mean = functools.partial(jax.nn.logsumexp, axis=0, b=1 / v)
    if not multi_label:
        return mean(jax.nn.log_softmax(logits))
    return mean(jax.nn.log_sigmoid(logits)) - mean(jax.nn.log_sigmoid(-logits))


def make_masked_eval_step(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    *,
    objective: str,
    seed: int,
    layout: Layout | None = None,
) -> Callable[[Any, Batch, Any], dict[str, Array]]:
    """Returns (params, batch, start) -> sums over the batch's real examples, as `make_eval_step`.

    `start` is the position of the batch's first example in its split: an example's corruption
    depends on the seed and its position alone, so it is the same at every evaluation.
    """

    def eval_step(params, batch, start):
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys = fold(jax.random.key(seed), start + jnp.arange(len(batch["mask"])))
        model = merged(graphdef, params, layout)
        sums = masked_sums(model, batch, preprocess, objective, keys, layout=layout)
        return {"count": batch["mask"].sum(), **sums}

    return eval_step


def make_feature_step(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    *,
    dense: bool = False,
    layout: Layout | None = None,
) -> Callable[[Any, Batch], dict[str, Array]]:
    """Returns (params, batch) -> {x: the head's input, float32 [b d], label, mask}.

    With `dense`, x is the dense features [b gh gw d].
    """

    def feature_step(params, batch):
        model = merged(graphdef, params, layout)
        inputs = images(batch, preprocess)
        features = features_of(model, inputs, dense=dense, layout=layout)
        return {"x": features, "label": batch["label"], "mask": batch["mask"]}

    return feature_step


def features_of(
    model: Model,
    inputs: Float[Array, "b h w c"] | Patches,
    *,
    dense: bool,
    layout: Layout | None = None,
) -> Float32[Array, "b *d"]:
    """The head's input [b d], or the dense features [b gh gw d].

    Raises:
      UserError: the head's input is wanted of a model that pools nothing.
    """
    if dense:
        features = model.dense(inputs, layout=layout)
    else:
        check_pools(model.config, "features")
        features = model(inputs, capture="pre_logits", layout=layout)[1]["pre_logits"]
    return features.astype(jnp.float32)


def check_pools(config: ModelConfig, what: str) -> None:
    """Raises a UserError if a model has no features of whole images, which `what` is of."""
    if getattr(config, "pool", None) in ("none", "locations"):
        raise UserError(
            f"{what}: the model has no features of whole images, as its head reads each patch "
            f"by itself (model.pool {config.pool!r}): take dense ones, or an evaluator of type "
            "segmentation"
        )

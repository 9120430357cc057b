"""The evaluation steps: sums over the examples of a batch, and features of each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from vit_jax.data.transforms import Preprocess
from vit_jax.models.create import Model
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
    layout: Layout | None = None,
) -> Callable[[Any, Batch], dict[str, Array]]:
    """Returns (params, batch) -> sums over the batch's real examples, to be divided by the caller.

    With labels [b k], an image is right if the top class is any of its labels (ImageNet-ReaL);
    images without labels are left out of all sums.

    Args:
      each: whether each label is a separate yes-or-no question, so that images without labels have
        a loss, too: `loss` is then the sum over all images, `images` their number, and the rows
        that `multilabel.scores` reads are added: logits (float32), label, mask.
    """
    loss_of = objectives.LOSSES[objective]

    def eval_step(params, batch):
        logits = merged(graphdef, params, layout)(images(batch, preprocess), layout=layout)
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
        if not each:
            return sums
        rows = {"logits": logits.astype(jnp.float32), "label": targets, "mask": batch["mask"]}
        return {**sums, "images": batch["mask"].sum(), **rows}

    return eval_step


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
    model: Model, inputs: Float[Array, "b h w c"], *, dense: bool, layout: Layout | None = None
) -> Float32[Array, "b *d"]:
    """The head's input [b d], or the dense features [b gh gw d]."""
    if dense:
        features = model.dense(inputs, layout=layout)
    else:
        features = model(inputs, capture="pre_logits", layout=layout)[1]["pre_logits"]
    return features.astype(jnp.float32)

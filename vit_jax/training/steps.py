"""The training step and the evaluation steps, as pure functions on pytrees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, Shaped

from vit_jax.data.transforms import Preprocess
from vit_jax.models.vit import Layout, Model
from vit_jax.training import masking, objectives
from vit_jax.training.optim import norm
from vit_jax.training.state import TrainState

Batch = dict[str, Array]
# (params, batch, key, weight) -> (sum of losses / weight, other sums), all over real examples.
Loss = Callable[..., tuple[Array, dict[str, Array]]]


def images(batch: Batch, preprocess: Preprocess) -> Float[Array, "b h w c"]:
    """The batch's images, pixels in 0 to 255 (uint8 or float32), normalised on the device."""
    with jax.named_scope("patches"):  # which read the pixels
        return preprocess.normalise(batch["image"])


def merged(graphdef: nnx.GraphDef, params: dict[str, Any], layout: Layout | None) -> Model:
    """Returns the model with these parameters; with a `layout`, the blocks' stay sharded.

    Each block, and each unit of a ResNet, gathers its own when it runs (see `stack.run_block`).
    """
    if layout is not None:
        later = {name: value for name, value in params.items() if name in ("blocks", "resnet")}
        now = {name: value for name, value in params.items() if name not in later}
        params = {**layout.params(now), **later}
    return nnx.merge(graphdef, params)


def class_loss(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    objective: str,
    num_classes: int,
    smoothing: float,
    layout: Layout | None,
) -> Loss:
    """Returns the classification loss, with the accuracy; batches may have a `partner` to mix in.

    With labels [b k] an image is right if its top class is any of its labels, and the accuracy is
    a share of `labelled`, the images that have any. For mixed images, the labels are those of the
    larger part.
    """
    loss_of = objectives.OBJECTIVES[objective]

    def loss_fn(params, batch, key, weight):
        inputs, labels = images(batch, preprocess), batch["label"]
        targets = objectives.to_targets(labels, num_classes, smoothing)
        several = labels.ndim == 2
        if "partner" in batch:
            partner, mixing = batch["partner"], batch["mixing"]
            with jax.named_scope("mixing"):
                inputs = objectives.mix_images(inputs, images(partner, preprocess), mixing)
            others = objectives.to_targets(partner["label"], num_classes, smoothing)
            share = mixing["share"][:, None]
            targets = share * targets + (1 - share) * others
            if several:
                labels = jnp.where(share >= 0.5, labels, partner["label"])
        logits = merged(graphdef, params, layout)(inputs, key=key, layout=layout)
        with jax.named_scope("head"):
            loss = jnp.sum(loss_of(logits, targets) * batch["mask"]) / weight
            if several:
                best = jnp.take_along_axis(labels, logits.argmax(-1)[:, None], axis=1)[:, 0]
                hits = jnp.sum((best > 0) & batch["mask"])
                labelled = jnp.sum((labels.max(axis=-1) > 0) & batch["mask"])
                return loss, {"accuracy": hits, "labelled": labelled}
            hits = jnp.sum((logits.argmax(-1) == targets.argmax(-1)) & batch["mask"])
        return loss, {"accuracy": hits}

    return loss_fn


def patch_loss(
    graphdef: nnx.GraphDef, preprocess: Preprocess, objective: str, layout: Layout | None
) -> Loss:
    """Returns the loss of masked patch prediction, with the accuracy, if any; ignores labels."""

    def loss_fn(params, batch, key, weight):
        key, drawn = jax.random.split(key)
        keys = jax.random.split(drawn, len(batch["mask"]))
        model = merged(graphdef, params, layout)
        sums = masked_sums(model, batch, preprocess, objective, keys, key=key, layout=layout)
        return sums.pop("loss") / weight, sums

    return loss_fn


def masked_sums(
    model: Model,
    batch: Batch,
    preprocess: Preprocess,
    objective: str,
    keys: Key[Array, " b"],
    *,
    key: Key[Array, ""] | None = None,
    layout: Layout | None = None,
) -> dict[str, Array]:
    """Sums of loss and, if any, accuracy of masked patch prediction, over real examples.

    Args:
      keys: one an image, for its corruption.
      key: for dropout.
    """
    config, pixels = model.config, batch["image"]
    corruption = masking.draw_corruption(keys, config.grid[0] * config.grid[1])
    inputs = preprocess.normalise(pixels)
    predictions = model(inputs, key=key, corruption=corruption, layout=layout)
    wanted = masking.targets(objective, pixels, preprocess, config, corruption.where)
    loss, others = masking.losses(objective, predictions, wanted)
    return {name: jnp.sum(x * batch["mask"]) for name, x in {"loss": loss, **others}.items()}


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    preprocess: Preprocess,
    *,
    num_classes: int,
    objective: str,
    augment: objectives.Augment,
    accumulate: int = 1,
    ema: float | None = None,
    seed: int = 0,
    layout: Layout | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Returns (state, batch) -> (state, metrics), to be jitted with the state donated.

    The metrics are scalars for this batch alone: loss, accuracy (top-1, or of predicted patches;
    none for pixels; for several labels see `class_loss`), grad_norm (before clipping), param_norm
    (after the update) and lr.
    """
    if objective in masking.OBJECTIVES:
        loss_fn = patch_loss(graphdef, preprocess, objective, layout)
    else:
        smoothing = augment.label_smoothing
        loss_fn = class_loss(graphdef, preprocess, objective, num_classes, smoothing, layout)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(state, batch):
        # Randomness depends on seed and step alone, so no random state is stored.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if augment.mixup or augment.cutmix:
            # An image's partner is the previous one: a single permutation between devices, where a
            # random order would gather all images on each.
            partner = {name: jnp.roll(batch[name], 1, axis=0) for name in ("image", "label")}
            key, drawn = jax.random.split(key)
            b, h, w, _ = batch["image"].shape
            with jax.named_scope("mixing"):
                mixing = objectives.draw_mixing(augment, drawn, b, (h, w))
            batch = {**batch, "partner": partner, "mixing": mixing}
        weight = jnp.maximum(batch["mask"].sum(), 1).astype(jnp.float32)
        if accumulate == 1:
            (loss, sums), grads = grad_fn(state.params, batch, key, weight)
        else:
            loss, sums, grads = accumulated(grad_fn, state.params, batch, key, weight, accumulate)
        counts = dict.fromkeys(sums, weight)
        if "labelled" in sums:
            counts["accuracy"] = jnp.maximum(sums.pop("labelled"), 1)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            average = state.ema
            if ema is not None:
                average = optax.incremental_update(params, state.ema, 1 - ema)
            metrics = {
                "loss": loss,
                **{name: value / counts[name] for name, value in sums.items()},
                "grad_norm": norm(grads, whole=layout is None),
                "param_norm": norm(params, whole=layout is None),
                "lr": jnp.asarray(schedule(state.step), jnp.float32),
            }
        return TrainState(state.step + 1, params, opt_state, average), metrics

    return train_step


def accumulated(
    grad_fn: Callable[..., Any],
    params: Any,
    batch: Batch,
    key: Array,
    weight: Float[Array, ""],
    micro_batches: int,
) -> tuple[Float[Array, ""], Any, Any]:
    """Gradient accumulation: sums loss, metrics and gradient (float32) over micro-batches.

    Micro-batch i takes rows i, i + m, i + 2m, ..., so that each device slices its own rows.
    """

    def interleave(x: Shaped[Array, "b ..."]):
        return x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def one(micro, index):
        (loss, sums), grads = grad_fn(params, micro, jax.random.fold_in(key, index), weight)
        return loss, sums, grads

    def add(total, inputs):
        return jax.tree.map(jnp.add, total, one(*inputs)), None

    inputs = (jax.tree.map(interleave, batch), jnp.arange(micro_batches))
    loss, sums, _ = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, sums))
    total, _ = jax.lax.scan(add, (*zeros, jax.tree.map(jnp.zeros_like, params)), inputs)
    return total


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
    loss_of = objectives.OBJECTIVES[objective]

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
        if dense:
            features = model.dense(inputs, layout=layout)
        else:
            features = model(inputs, capture="pre_logits", layout=layout)[1]["pre_logits"]
        features = features.astype(jnp.float32)
        return {"x": features, "label": batch["label"], "mask": batch["mask"]}

    return feature_step

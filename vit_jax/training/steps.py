"""The training step and its losses, as pure functions on pytrees (see also evaluation/steps.py)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Integer, Key, Shaped

from vit_jax.checkpoints.card import OBJECTIVES
from vit_jax.data.boxes import NONE
from vit_jax.data.masks import IGNORED
from vit_jax.data.transforms import Preprocess
from vit_jax.models.config import ModelConfig
from vit_jax.models.create import Model, merged
from vit_jax.models.native import Patches
from vit_jax.models.stack import Layout
from vit_jax.training import detection, masking, objectives, segmentation
from vit_jax.training.distill import Teacher
from vit_jax.training.optim import norm
from vit_jax.training.state import TrainState
from vit_jax.training.trainable import Trainable

Batch = dict[str, Array]
# (params, batch, key, weight) -> (sum of losses / weight, other sums), all over real examples.
Loss = Callable[..., tuple[Array, dict[str, Array]]]


def images(batch: Batch, preprocess: Preprocess) -> Float[Array, "b h w c"] | Patches:
    """The batch's images, pixels in 0 to 255 (uint8 or float32), normalised on the device.

    With a `grid` of each, the images are patches.
    """
    with jax.named_scope("patches"):  # which read the pixels
        normalised = preprocess.normalise(batch["image"])
        return Patches(normalised, batch["grid"]) if "grid" in batch else normalised


def class_loss(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    objective: str,
    num_classes: int,
    smoothing: float,
    layout: Layout | None,
    frozen: int = 0,
    weights: tuple[float, ...] | None = None,
    focal: float = 0.0,
    teacher: Teacher | None = None,
) -> Loss:
    """Returns the classification loss, with the accuracy; batches may have a `partner` to mix in.

    With a `teacher`, whose parameters the loss takes last, its part in the loss is mixed in, and
    `label_loss`, `teacher_loss` and `agreement` (of the top classes) are added. A student with a
    distillation head learns from the teacher in that head, and from the labels in the other.

    Of the first `frozen` blocks no gradient is computed.

    With multi-label targets [b k], an image is right if its top class is one of its labels; images
    without labels do not count (`labelled` is the number of the others). With mixup or cutmix, the
    accuracy uses the labels of the image with the larger share.
    """
    weights = None if weights is None else np.asarray(weights, np.float32)
    loss_of = functools.partial(objectives.LOSSES[objective], weights=weights, focal=focal)
    options = {"frozen": frozen} if frozen else {}
    two_heads = teacher is not None and teacher.token
    options |= {"capture": "encoded"} if two_heads else {}

    def loss_fn(params, batch, key, weight, teacher_params=None):
        inputs, labels = images(batch, preprocess), batch["label"]
        targets = objectives.to_targets(labels, num_classes, smoothing)
        multi_label = labels.ndim == 2
        if "partner" in batch:
            partner, mixing = batch["partner"], batch["mixing"]
            with jax.named_scope("mixing"):
                inputs = objectives.mix_images(inputs, images(partner, preprocess), mixing)
            others = objectives.to_targets(partner["label"], num_classes, smoothing)
            share = mixing["share"][:, None]
            targets = share * targets + (1 - share) * others
            if multi_label:
                labels = jnp.where(share >= 0.5, labels, partner["label"])
        model = merged(graphdef, params, layout)
        logits = of_labels = of_teacher = model(inputs, key=key, layout=layout, **options)
        if two_heads:
            logits, captured = logits
            of_labels, of_teacher = model.heads(captured["encoded"])
        sums = {}
        if teacher is not None:
            wanted = teacher.logits(teacher_params, inputs, preprocess, layout)
        with jax.named_scope("head"):
            losses = loss_of(of_labels, targets)
            if teacher is not None:
                taught = teacher.loss(of_teacher, wanted)
                agrees = logits.argmax(-1) == wanted.argmax(-1)
                sums = {"label_loss": losses, "teacher_loss": taught, "agreement": agrees}
                sums = {name: jnp.sum(x * batch["mask"]) for name, x in sums.items()}
                losses = teacher.combined(losses, taught)
            loss = jnp.sum(losses * batch["mask"]) / weight
            if multi_label:
                best = jnp.take_along_axis(labels, logits.argmax(-1)[:, None], axis=1)[:, 0]
                hits = jnp.sum((best > 0) & batch["mask"])
                labelled = jnp.sum((labels.max(axis=-1) > 0) & batch["mask"])
                return loss, {"accuracy": hits, "labelled": labelled}
            hits = jnp.sum((logits.argmax(-1) == targets.argmax(-1)) & batch["mask"])
        return loss, {"accuracy": hits, **sums}

    return loss_fn


def mask_loss(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    augment: objectives.Augment,
    layout: Layout | None,
    frozen: int = 0,
    weights: tuple[float, ...] | None = None,
) -> Loss:
    """Returns the loss of masks, with the pixel accuracy; `weight` counts pixels (`weight_of`)."""
    how = dict(smoothing=augment.label_smoothing, focal=augment.focal, dice=augment.dice)

    def loss_fn(params, batch, key, weight):
        model = merged(graphdef, params, layout)
        inputs = images(batch, preprocess)
        logits = model(inputs, key=key, layout=layout, frozen=frozen)
        with jax.named_scope("head"):
            found = segmentation.sums(logits, masks(batch), weights=weights, **how)
            found = {name: each.sum() for name, each in found.items()}
        return found.pop("loss") / weight, found

    return loss_fn


def masks(batch: Batch) -> Integer[Array, "b h w"]:
    """The masks of a batch, in which padding does not count."""
    return jnp.where(batch["mask"][:, None, None], batch["label"], IGNORED)


def box_loss(
    graphdef: nnx.GraphDef, preprocess: Preprocess, layout: Layout | None, frozen: int = 0
) -> Loss:
    """Returns the loss of boxes, with its parts; `weight` counts locations (`weight_of`)."""

    def loss_fn(params, batch, key, weight):
        model = merged(graphdef, params, layout)
        inputs = images(batch, preprocess)
        outputs = model(inputs, key=key, layout=layout, frozen=frozen)
        with jax.named_scope("head"):
            found = detection.sums(model.config, outputs, boxes(batch))
            found = {name: jnp.sum(each * batch["mask"]) for name, each in found.items()}
        return found.pop("loss") / weight, found

    return loss_fn


def boxes(batch: Batch) -> Float[Array, "b m 5"]:
    """The boxes of a batch, without those of padding."""
    return jnp.where(batch["mask"][:, None, None], batch["label"], NONE)


def weight_of(batch: Batch, objective: str, config: ModelConfig | None = None) -> Float[Array, ""]:
    """What the sums of a loss are divided by, at least 1.

    The number of examples or, of masks, of pixels that count or, of boxes, of the locations of a
    model of `config` that learn one.
    """
    if OBJECTIVES[objective].masks:
        counted = segmentation.counted(masks(batch)).sum()
    elif OBJECTIVES[objective].boxes:
        counted = detection.positives(config, boxes(batch)).sum()
    else:
        counted = batch["mask"].sum()
    return jnp.maximum(counted, 1).astype(jnp.float32)


def patch_loss(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    objective: str,
    layout: Layout | None,
    frozen: int = 0,
) -> Loss:
    """Returns the loss of masked patch prediction, with the accuracy, if any; ignores labels."""

    def loss_fn(params, batch, key, weight):
        key, drawn = jax.random.split(key)
        keys = jax.random.split(drawn, len(batch["mask"]))
        model = merged(graphdef, params, layout)
        sums = masked_sums(
            model, batch, preprocess, objective, keys, key=key, layout=layout, frozen=frozen
        )
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
    frozen: int = 0,
) -> dict[str, Array]:
    """Sums of loss and, if any, accuracy of masked patch prediction, over real examples.

    Args:
      keys: one an image, for its corruption.
      key: for dropout.
    """
    config, pixels = model.config, batch["image"]
    corruption = masking.draw_corruption(keys, config.grid[0] * config.grid[1])
    inputs = preprocess.normalise(pixels)
    predictions = model(inputs, key=key, corruption=corruption, layout=layout, frozen=frozen)
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
    ema_warmup: bool = False,
    seed: int = 0,
    layout: Layout | None = None,
    trainable: Trainable | None = None,
    class_weights: tuple[float, ...] | None = None,
    mixed_steps: int | None = None,
    teacher: Teacher | None = None,
    fit: Callable[[Any], Any] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Returns (state, batch) -> (state, metrics), to be jitted with the state donated.

    With a `teacher`, the step takes its parameters as a third argument.

    `optimizer` is of the parameters that learn, as `trainable` says; None is all. Mixup and cutmix
    end after `mixed_steps`; None is never. `fit` makes the parameters of `graphdef` from those of
    the state, where images are smaller (see growth.py).

    The metrics are scalars for this batch alone: loss, accuracy (top-1, or of predicted patches;
    none for pixels; for several labels see `class_loss`; of masks, pixel_accuracy; of boxes, the
    parts of the loss), grad_norm (of what learns, before clipping), param_norm (of all, after the
    update) and lr.
    """
    learning = trainable or Trainable()
    counts_locations = OBJECTIVES[objective].boxes
    options = dict(layout=layout, frozen=learning.blocks)
    if objective in masking.TARGETS:
        loss_fn = patch_loss(graphdef, preprocess, objective, **options)
    elif OBJECTIVES[objective].masks:
        loss_fn = mask_loss(graphdef, preprocess, augment, weights=class_weights, **options)
    elif counts_locations:
        loss_fn = box_loss(graphdef, preprocess, **options)
    else:
        smoothing = augment.label_smoothing
        options |= dict(weights=class_weights, focal=augment.focal, teacher=teacher)
        loss_fn = class_loss(graphdef, preprocess, objective, num_classes, smoothing, **options)

    def loss_of(learned, params, *inputs):
        params = learning.combine(params, learned)
        return loss_fn(params if fit is None else fit(params), *inputs)

    def train_step(state, batch, *teacher_params):
        # Randomness depends on seed and step alone, so no random state is stored.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if augment.mixes:
            # An image's partner is the previous one: a single permutation between devices, where a
            # random order would gather all images on each.
            partner = {name: jnp.roll(batch[name], 1, axis=0) for name in ("image", "label")}
            key, drawn = jax.random.split(key)
            b, h, w, _ = batch["image"].shape
            with jax.named_scope("mixing"):
                mixing = objectives.draw_mixing(augment, drawn, b, (h, w))
                if mixed_steps is not None:
                    mixing = objectives.mix_before(mixed_steps, mixing, state.step)
            batch = {**batch, "partner": partner, "mixing": mixing}
        config = nnx.merge(graphdef, state.params).config if counts_locations else None
        weight = weight_of(batch, objective, config)
        learned = learning.select(state.params)
        grad_fn = jax.value_and_grad(
            lambda learned, *inputs: loss_of(learned, state.params, *inputs, *teacher_params),
            has_aux=True,
        )
        if accumulate == 1:
            (loss, sums), grads = grad_fn(learned, batch, key, weight)
        else:
            loss, sums, grads = accumulated(grad_fn, learned, batch, key, weight, accumulate)
        counts = dict.fromkeys(sums, weight)
        if "labelled" in sums:
            counts["accuracy"] = jnp.maximum(sums.pop("labelled"), 1)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, learned)
            learned = optax.apply_updates(learned, updates)
            params, average = learning.combine(state.params, learned), state.ema
            if ema is not None:  # what is frozen is its own average, without rounding
                t = state.step
                decay = jnp.minimum(ema, (1 + t) / (10 + t)) if ema_warmup else ema
                moved = optax.incremental_update(learned, learning.select(average), 1 - decay)
                average = learning.combine(average, moved)
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

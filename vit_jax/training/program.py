"""What a config comes to: the model's card, the data, the compiled step. Nothing is allocated."""

import dataclasses
from collections.abc import Callable, Sized
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.families import fitted_preprocess
from vit_jax.compiler import compiler_options, traced_for
from vit_jax.data import classes
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.sources import Source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ModelConfig
from vit_jax.models.vit import structure
from vit_jax.training import masking
from vit_jax.training.config import Config
from vit_jax.training.optim import make_optimizer, make_schedule
from vit_jax.training.sharding import BATCH, check_batch, make_layout
from vit_jax.training.state import TrainState, abstract_state
from vit_jax.training.steps import make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's training step on a mesh.

    Attributes:
      state: shapes, types and places of what is trained.
      batch: of what arrives.
      step: (state, batch) -> (state, metrics), jitted; it takes the state's memory over.
    """

    mesh: Mesh
    optimizer: optax.GradientTransformation
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, jax.Array]]]


def new_card(
    config: Config,
    labels: tuple[str, ...],
    fingerprint: str,
    base: ModelCard | None,
    *,
    multi_label: bool = False,
) -> tuple[ModelCard, bool]:
    """Says what a new run's weights will mean, and whether it keeps the head of `base`.

    Args:
      labels: the data's classes, which data.train.classes may call otherwise; with masked patch
        prediction the model has none.
      base: the model that the run starts from, if any: what `config` leaves out is its.
      multi_label: whether the data has several labels an image.

    Raises:
      UserError: the model does not fit the classes, or `base`.
    """
    masked = config.objective in masking.OBJECTIVES
    keep_head = base is not None and config.model.get("head") == "keep"
    if masked:
        # A patch head that was trained for one target says nothing of another.
        keep_head = keep_head and not base.labels and base.objective == config.objective
        labels = ()
    else:
        train, keep_head = config.data.train, keep_head and bool(base.labels)
        try:
            if keep_head:
                classes.match(labels, base.labels, train.classes)
                labels = base.labels
            else:
                labels = classes.renamed(labels, train.classes)[1]
        except UserError as error:
            kept = " (model.head=keep)" if keep_head else ""
            raise UserError(f"data.train ({train.source}){kept}: {error}") from None
    vit = config.model_config(base and base.config, len(labels), keep_head)
    if vit.num_classes != len(labels):
        data = f"objective {config.objective}" if masked else config.data.train.source
        raise UserError(
            f"model.num_classes is {vit.num_classes}, but {data} has {len(labels)} classes: leave "
            "model.num_classes out"
        )
    if base:
        preprocess = fitted_preprocess(base.preprocess, vit)
    else:
        preprocess = Preprocess(vit.image_size, vit.in_channels)
    # What `predict` does with a picture is what evaluation does.
    evaluated = config.data.val or config.data.test or config.data.train
    preprocess = evaluated.preprocess(preprocess)
    method = config.model.get("position_resize") or (base.position_resize if base else "zoom")
    card = ModelCard(
        vit,
        preprocess,
        labels,
        fingerprint,
        config.objective,
        method,
        multi_label=multi_label and not masked,
    )
    return card, keep_head


def run_steps(config: Config, source: Source | None) -> int:
    """The length of a run of `config` on its training split, None where that is not at hand."""
    return config.steps(len(source) if isinstance(source, Sized) else None)


def check_labels(config: Config, source: Source) -> None:
    """Raises a UserError where the objective does not learn from such labels."""
    name = f"data.train.source {config.data.train.source}"
    if getattr(source, "masks", False):
        raise UserError(
            f"{name} has masks for labels, and models learn labels of whole images: masks go with "
            "the evaluator type segmentation"
        )
    if getattr(source, "multi_label", False) and config.objective == "softmax":
        raise UserError(
            f"{name} has several labels an image, of which objective softmax would choose one: set "
            "--config.objective=sigmoid"
        )


def train_reader(config: Config, card: ModelCard, source: Source) -> BatchReader:
    """What reads the training batches.

    Raises:
      UserError: the objective does not learn from such labels.
    """
    check_labels(config, source)
    return BatchReader.of(
        source,
        config.data.train,
        card.preprocess,
        seed=config.seed,
        on_corrupt=config.data.on_corrupt,
    )


def make_program(
    config: Config,
    vit: ModelConfig,
    preprocess: Preprocess,
    total_steps: int,
    mesh: Mesh,
    *,
    multi_label: bool = False,
) -> Program:
    """Returns the program of `config` for a model `vit` on the devices of `mesh`.

    Args:
      multi_label: whether labels are float32 [b k] (see `ModelCard.multi_label`).

    Raises:
      UserError: the batch does not divide among the devices, or the warm-up is too long.
    """
    check_batch(config.batch_size, config.optim.accumulate, mesh)
    schedule = make_schedule(config.optim, total_steps)
    layout = make_layout(mesh, vit.dtype)
    optimizer = make_optimizer(config.optim, schedule, whole=layout is None)
    state = abstract_state(vit, optimizer, ema=config.optim.ema is not None, mesh=mesh)
    b, k = config.batch_size, vit.num_classes
    batch = {
        "image": ((b, *vit.image_size, vit.in_channels), jnp.uint8),
        "label": ((b, k), jnp.float32) if multi_label else ((b,), jnp.int32),
        "mask": ((b,), jnp.bool_),
    }
    step = make_train_step(
        structure(vit)[0],
        optimizer,
        schedule,
        preprocess,
        num_classes=k,
        objective=config.objective,
        augment=config.augment,
        accumulate=config.optim.accumulate,
        ema=config.optim.ema,
        seed=config.seed,
        layout=layout,
    )
    return Program(
        mesh,
        optimizer,
        state,
        {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))
            for name, (shape, dtype) in batch.items()
        },
        jax.jit(
            traced_for(mesh, step),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
            compiler_options=compiler_options(mesh, deterministic=config.mesh.deterministic),
        ),
    )

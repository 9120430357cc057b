"""The compiled training step of a plan, on a mesh. Nothing is allocated."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from vit_jax.compiler import compiler_options, traced_for
from vit_jax.models.create import structure
from vit_jax.training import growth
from vit_jax.training.optim import make_optimizer
from vit_jax.training.phases import Phase
from vit_jax.training.plan import Plan
from vit_jax.training.sharding import BATCH, check_batch, make_layout
from vit_jax.training.state import TrainState, abstract_state
from vit_jax.training.steps import make_train_step
from vit_jax.training.trainable import rates, trainable


@dataclasses.dataclass(frozen=True)
class Program:
    """The training step of a run on a mesh.

    Attributes:
      state: shapes, types and shardings of the train state.
      batch: shapes, types and shardings of a batch; of the largest, if images grow.
      step: (state, batch) -> (state, metrics), jitted; it donates the state. With a teacher, it
        takes its parameters third.
      teacher: shapes, types and shardings of the teacher's parameters, if there is one.
    """

    mesh: Mesh
    optimizer: optax.GradientTransformation
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    teacher: Any = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What `step` takes, as shapes, types and shardings."""
        return (self.state, self.batch, *([] if self.teacher is None else [self.teacher]))


def make_program(plan: Plan, mesh: Mesh, phase: Phase | None = None) -> Program:
    """Builds the program of a plan for the devices of `mesh`.

    Args:
      phase: one of `plan.phases`; None is the last.

    Raises:
      UserError: the batch does not divide among the devices, or the warm-up or augment.mix_off is
        too long.
    """
    config, card, model = plan.config, plan.card, plan.card.config
    phase = phase or plan.phases[-1]
    optim = phase.optim
    check_batch(config.batch_size, config.optim.accumulate, mesh)
    schedule = phase.schedule()
    layout = make_layout(mesh, model.dtype)
    graphdef, shapes = structure(model)
    learning = trainable(optim.freeze, shapes)
    factors = rates(optim, shapes, getattr(model, "branches", 1))
    factors = factors and tuple(learning.select(tree) for tree in factors)
    optimizer = make_optimizer(optim, schedule, whole=layout is None, rates=factors)
    optimizer = learning.optimizer(optimizer)
    state = abstract_state(model, optimizer, ema=config.optim.ema is not None, mesh=mesh)
    b, k = config.batch_size, model.num_classes
    batch = {
        "image": ((b, *card.preprocess.shape), jnp.uint8),
        "label": ((b, k), jnp.float32) if card.multi_label else ((b,), jnp.int32),
        "mask": ((b,), jnp.bool_),
    }
    if config.segments:
        batch["label"] = ((b, *card.preprocess.image_size), jnp.uint8)
    if config.detects:
        batch["label"] = ((b, config.data.max_boxes, 5), jnp.float32)
    if card.preprocess.max_patches is not None:
        batch["grid"] = ((b, 2), jnp.int32)
    mixed_steps = config.augment.mixed_steps(plan.total_steps)
    make_step = functools.partial(
        make_train_step,
        optimizer=optimizer,
        schedule=lambda step: schedule(step - phase.first),
        preprocess=card.preprocess,
        num_classes=k,
        objective=config.objective,
        augment=config.augment,
        accumulate=config.optim.accumulate,
        ema=config.optim.ema,
        ema_warmup=config.optim.ema_warmup,
        seed=config.seed,
        layout=layout,
        trainable=learning,
        class_weights=plan.class_weights,
        mixed_steps=mixed_steps if mixed_steps < plan.total_steps else None,
        teacher=plan.teacher,
    )
    step = make_step(graphdef)
    if plan.growth:  # jit compiles it for each size of images that it is given
        sized = {side: growth.at_size(model, side) for side in plan.growth.sides}
        step = growth.by_size(
            {
                (side, side): make_step(
                    structure(there)[0], fit=growth.fit(model, there, card.position_resize)
                )
                for side, there in sized.items()
            }
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
        plan.teacher and plan.teacher.abstract(mesh),
    )

"""Schedules and optimisers, put together from optax."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError, nearest
from vit_jax.training.sharding import path_name

NAMES = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "linear", "rsqrt", "constant")
DECAYED = ("kernels", "all")
MU_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The `optim` section.

    Attributes:
      lr: the highest learning rate, reached at the end of the warm-up.
      schedule: the decay that follows: to `end_lr` by `cosine` or `linear`, `constant`, or `rsqrt`,
        lr / sqrt(1 + (step - warmup) / timescale) ("Scaling Vision Transformers", section 3.5).
      warmup: steps of linear warm-up from zero; below 1, a share of the run.
      weight_decay: decoupled and multiplied by the learning rate, as in optax (big_vision's
        absolute decay of 1e-4 at lr 1e-3 is 0.1 here), on `decayed` parameters: `kernels`, which
        leaves out biases, LayerNorm, tokens and positions, or `all`.
      grad_clip: largest global norm of the gradient, None for no bound.
      mu_dtype: what the momentum, Adam's first moment, is kept in; Google's codes use bfloat16.
      accumulate: micro-batches that a batch is taken in.
      ema: decay of the running average of the parameters that is evaluated and loaded, or None.
    """

    lr: float
    name: str = "adamw"
    schedule: str = "cosine"
    end_lr: float = 0.0
    warmup: float = 0.0
    timescale: float = 10_000.0
    weight_decay: float = 0.0
    decayed: str = "kernels"
    grad_clip: float | None = None
    mu_dtype: str = "float32"
    accumulate: int = 1
    ema: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9

    def __post_init__(self):
        for field, known in (
            ("name", NAMES),
            ("schedule", SCHEDULES),
            ("decayed", DECAYED),
            ("mu_dtype", MU_DTYPES),
        ):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"optim.{field} is {value!r}; {nearest(value, known)}")
        if self.name == "adam" and self.weight_decay:
            raise UserError("optim.name=adam has no weight decay; adamw does")
        if self.accumulate < 1:
            raise UserError(f"optim.accumulate is {self.accumulate}; it must be at least 1")
        for field in ("lr", "end_lr", "warmup", "weight_decay"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UserError(f"optim.{field} is {getattr(self, field)}; it must be 0 or more")
        for field in ("grad_clip", "timescale"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise UserError(f"optim.{field} is {value}; it must be positive")
        if self.end_lr and self.schedule not in ("cosine", "linear"):
            raise UserError(f"optim.schedule {self.schedule!r} has no end_lr; cosine and linear do")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UserError(f"optim.ema is {self.ema}; it must be in [0, 1), such as 0.9999")


def make_schedule(config: OptimConfig, total_steps: int) -> Callable[[Any], Any]:
    """Returns step -> learning rate.

    Raises:
      UserError: the warm-up is longer than the run.
    """
    warmup = round(config.warmup * total_steps) if config.warmup < 1 else round(config.warmup)
    decay_steps = total_steps - warmup
    if decay_steps < 0:
        raise UserError(
            f"optim.warmup of {warmup} steps is longer than the run of {total_steps}: shorten it, "
            "or give it as a share of the run, such as 0.1"
        )
    if config.schedule == "cosine":
        share = config.end_lr / config.lr if config.lr else 0.0
        decay = optax.cosine_decay_schedule(config.lr, max(decay_steps, 1), alpha=share)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(config.lr, config.end_lr, max(decay_steps, 1))
    elif config.schedule == "rsqrt":

        def decay(step):
            return config.lr / jnp.sqrt(1 + step / config.timescale)

    else:
        decay = optax.constant_schedule(config.lr)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), decay], [warmup])


def make_optimizer(
    config: OptimConfig, schedule: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Returns clipping, the update rule, weight decay and the learning rate, in this order."""
    if config.name == "sgd":
        rule = optax.trace(decay=config.momentum, accumulator_dtype=config.mu_dtype)
    else:
        rule = optax.scale_by_adam(
            b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.mu_dtype
        )
    steps = [rule]
    if config.grad_clip is not None:
        steps.insert(0, optax.clip_by_global_norm(config.grad_clip))
    if config.weight_decay:
        mask = is_kernel if config.decayed == "kernels" else None
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule))


def is_kernel(params: Any) -> Any:
    """Marks the parameters that `decayed="kernels"` means: the matrices of all layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).endswith("kernel"), params
    )

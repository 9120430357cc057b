"""Learning rate schedules and optimisers, built with optax."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vit_jax.compiler import target
from vit_jax.errors import UserError, nearest
from vit_jax.training.matrices import scale_by_factored_moment, scale_by_muon
from vit_jax.training.sharding import path_name

NAMES = ("adamw", "adam", "adafactor", "sgd", "muon")
SCHEDULES = ("cosine", "linear", "rsqrt", "staircase", "constant")
DECAYED = ("kernels", "all")
MU_DTYPES = ("float32", "bfloat16")

_DECAYED_KERNELS = ("kernel", "lora_a", "lora_b")  # the matrices of all layers
_MOMENTUM = {"muon": 0.95}  # where it is not 0.9
_SMALL, _PARTS = 2**16, 2**12  # of a norm: elements of a leaf that is small; sums of another


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that learn at another rate.

    Attributes:
      match: a pattern of parameters' names in which * is any text, such as "pos_embed*".
      rate: a factor of the learning rate, on top of layer_decay's; 0 does not move them, but
        computes their gradient all the same (`freeze` does not).
      weight_decay: in place of optim.weight_decay; None for no other.
    """

    match: str
    rate: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self):
        for field in ("rate", "weight_decay"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{field} of optim.groups is {value}; it must be 0 or more")


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear probe before fine-tuning (LP-FT, arXiv 2202.10054), in the same run.

    The head alone learns, and no gradient of the rest is computed. Then everything learns that
    `freeze` leaves, with a new optimiser; warm-up and schedule take the rest of the run.

    Attributes:
      steps: how many of the run's steps it takes.
      lr: its learning rate, which is constant.
    """

    steps: int
    lr: float

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"optim.probe.steps is {self.steps}; it must be at least 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"optim.probe.lr is {self.lr}; it must be above 0")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The `optim` section: optimiser, learning rate schedule, gradient clipping and averaging.

    Attributes:
      name: the optimiser: `adamw`, `adam`, `sgd`, the `adafactor` of "Scaling Vision
        Transformers" (section 3.4): Adam with half of its state, and with a bfloat16 momentum a
        quarter, or `muon` (see `scale_by_muon`), for which AdamW's rates and decays are a start.
      lr: the peak learning rate, reached at the end of the warm-up.
      schedule: the decay after the warm-up: to `end_lr` by `cosine` or `linear`, `constant`,
        `rsqrt`, lr / sqrt(1 + (step - warmup) / timescale) ("Scaling Vision Transformers", section
        3.5), or `staircase`, which multiplies the rate by `drop_factor` after each of `drops`.
      timescale: time scale of rsqrt, in steps.
      end_lr: the rate at the end of the schedules cosine and linear.
      drops: steps after which staircase multiplies the rate, ascending; below 1, fractions of the
        run. As in BiT's code, step `drop` itself, counted from 0, still has the previous rate.
      drop_factor: what each drop of staircase multiplies the rate by.
      warmup: steps of linear warm-up from zero; below 1, a fraction of the run.
      weight_decay: weight decay, decoupled and multiplied by the learning rate, as in optax
        (big_vision's absolute decay of 1e-4 at lr 1e-3 is 0.1 here); adam has none.
      decayed: which parameters decay: `kernels`, which excludes biases, LayerNorm, tokens and
        positions, or `all`.
      grad_clip: maximum global norm of the gradient, None for no clipping.
      mu_dtype: dtype of the momentum, the first moment of Adam and of Adafactor; Google's code
        bases use bfloat16.
      accumulate: gradient accumulation: the number of micro-batches in a batch.
      ema: decay of the parameters' exponential moving average, which is then evaluated and loaded
        in their place; None for none.
      ema_warmup: whether this decay begins small, for runs of few steps: after t steps it is at
        most (1 + t) / (10 + t), as in TensorFlow's ExponentialMovingAverage with num_updates.
      b1: decay of the first moment of Adam and of Adafactor, which keeps none if it is 0.
      b2: decay of the second moment; for Adafactor, the upper bound of its decay 1 - step^-0.8.
      eps: added to the root of Adam's second moment; Adafactor's is 1e-30, in the squares.
      momentum: decay of the momentum; None is 0.9 for sgd and 0.95 for muon, the others have none.
      freeze: what does not learn: `backbone` (all but the head, its hidden layer and the attention
        pooling), `all_but_head`, `blocks[:N]`, the first N blocks, or patterns of parameters'
        names in which * is any text, such as patch_embed/*. No gradient is computed for it, and no
        optimiser state is kept.
      layer_decay: layer-wise decay of the learning rate (BEiT, MAE): a block's is that of the next
        one times this; the head's is `lr`, and the embedding's is of the layer before block 0.
      groups: by a name of one's own, parameters with other rates (see `Group`).
      probe: a linear probe before the rest of the run (see `Probe`); None for none.
    """

    lr: float
    name: str = "adamw"
    schedule: str = "cosine"
    end_lr: float = 0.0
    warmup: float = 0.0
    timescale: float = 10_000.0
    drops: tuple[float, ...] = ()
    drop_factor: float = 0.1
    weight_decay: float = 0.0
    decayed: str = "kernels"
    grad_clip: float | None = None
    mu_dtype: str = "float32"
    accumulate: int = 1
    ema: float | None = None
    ema_warmup: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float | None = None
    freeze: tuple[str, ...] = ()
    layer_decay: float | None = None
    groups: dict[str, Group] = dataclasses.field(default_factory=dict, hash=False)
    probe: Probe | None = None

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
        if self.name == "adafactor" and self.eps != OptimConfig.eps:
            raise UserError(f"optim.eps is {self.eps}, but adafactor has none to set; adamw does")
        decays = [group.weight_decay for group in self.groups.values()]
        if self.name == "adam" and any(decays):
            raise UserError("optim.name=adam has no weight decay for optim.groups; adamw does")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"optim.layer_decay is {self.layer_decay}; it must be in (0, 1]")
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
        if bool(self.drops) != (self.schedule == "staircase"):
            raise UserError(
                f"optim.schedule is {self.schedule!r} and optim.drops {self.drops}: staircase "
                "needs drops such as (0.3, 0.6, 0.9), the others have none"
            )
        if not all(low < high for low, high in itertools.pairwise((0, *self.drops, math.inf))):
            raise UserError(f"optim.drops is {self.drops}; expected ascending numbers above 0")
        if not 0 < self.drop_factor < 1:
            raise UserError(f"optim.drop_factor is {self.drop_factor}; it must be in (0, 1)")
        if self.momentum is None:  # saved as a number, as runs before muon have it
            object.__setattr__(self, "momentum", _MOMENTUM.get(self.name, 0.9))
        for field in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"optim.{field} is {getattr(self, field)}; it must be in [0, 1)")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UserError(f"optim.ema is {self.ema}; it must be in [0, 1), such as 0.9999")
        if self.ema_warmup and self.ema is None:
            raise UserError(
                "optim.ema_warmup is of an average, and optim.ema is None: set optim.ema, such as "
                "0.99, or leave ema_warmup out"
            )


def make_schedule(config: OptimConfig, total_steps: int) -> Callable[[Any], Any]:
    """Returns the learning rate schedule, a function of the step.

    Raises:
      UserError: the warm-up is longer than the run, or a drop is outside of the steps after it.
    """
    warmup = _steps(config.warmup, total_steps)
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

    elif config.schedule == "staircase":
        decay = _staircase(config, warmup, total_steps)
    else:
        decay = optax.constant_schedule(config.lr)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), decay], [warmup])


def _staircase(config: OptimConfig, warmup: int, total_steps: int) -> Callable[[Any], Any]:
    """The staircase schedule after the warm-up; steps are counted from the warm-up's end."""
    factors = {}
    for drop in config.drops:
        step = _steps(drop, total_steps)
        if not warmup <= step <= total_steps:
            raise UserError(
                f"optim.drops has step {step}, but the warm-up ends at {warmup} and the run at "
                f"{total_steps}: name a step between them, a share of the run such as 0.6, or a "
                "shorter optim.warmup"
            )
        first = step - warmup + 1
        # In a short run several fractions may be the same step.
        factors[first] = factors.get(first, 1.0) * config.drop_factor
    return optax.piecewise_constant_schedule(config.lr, factors)


def _steps(number: float, total_steps: int) -> int:
    """Converts a number of steps, or a fraction of the run if below 1, to steps."""
    return round(number * total_steps) if number < 1 else round(number)


def make_optimizer(
    config: OptimConfig,
    schedule: Callable[[Any], Any],
    *,
    whole: bool = True,
    rates: tuple[Any, Any] | None = None,
) -> optax.GradientTransformation:
    """Chains gradient clipping, the update rule, weight decay and the learning rate.

    Args:
      whole: whether each device has all of each parameter (see `norm`).
      rates: factors of the learning rate and weight decays of the parameters that learn (see
        `trainable.rates`); None for the same everywhere.
    """
    if config.name == "sgd":
        steps = [optax.trace(decay=config.momentum, accumulator_dtype=config.mu_dtype)]
    elif config.name == "adafactor":
        steps = [scale_by_factored_moment(config.b2)]
        if config.b1:
            steps.append(optax.ema(config.b1, debias=False, accumulator_dtype=config.mu_dtype))
    else:
        adam = optax.scale_by_adam(
            b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.mu_dtype
        )
        steps = [adam]
        if config.name == "muon":
            steps = [scale_by_muon(config.momentum, config.mu_dtype, adam)]
    if config.grad_clip is not None:
        steps.insert(0, clip_by_norm(config.grad_clip, whole=whole))
    if rates is not None:
        steps.append(_decay_and_scale(*rates))
    elif config.weight_decay:
        mask = is_kernel if config.decayed == "kernels" else None
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule))


def _decay_and_scale(factors: Any, decays: Any) -> optax.GradientTransformation:
    """Adds weight decay, and multiplies by the factors of the learning rate."""

    def one(update, param, factor, decay):
        return (update + decay * param if decay else update) * factor

    return optax.stateless(
        lambda updates, params: jax.tree.map(one, updates, params, factors, decays)
    )


def norm(tree: Any, *, whole: bool = True) -> Float[Array, ""]:
    """The global norm of a tree.

    On GPUs, if the leaves are `whole` on each, partial sums of all leaves are added up in a single
    final reduction: starting a reduction of a few numbers takes a GPU as long as reducing a hundred
    thousand.
    """
    if not whole or target() != "gpu":
        return optax.tree.norm(tree)
    parts = []
    for leaf in jax.tree.leaves(tree):
        squares = jnp.square(leaf.astype(jnp.float32)).reshape(math.gcd(leaf.size, _PARTS), -1)
        parts.append(squares.reshape(-1) if leaf.size < _SMALL else squares.sum(axis=1))
    # Without the barrier XLA splits the sum again, into one for each leaf.
    return jnp.sqrt(jax.lax.optimization_barrier(jnp.concatenate(parts)).sum())


def clip_by_norm(bound: float, *, whole: bool = True) -> optax.GradientTransformation:
    """Clips gradients to a global norm of `bound`, as optax does, but by our `norm`.

    The metrics use the same norm, so it is computed once a step.
    """

    def update(grads: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        found = norm(grads, whole=whole)
        fits = found < bound
        return jax.tree.map(lambda g: jnp.where(fits, g, g / found * bound), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def is_kernel(params: Any) -> Any:
    """Mask of the parameters that `decayed="kernels"` decays: the matrices of all layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).endswith(_DECAYED_KERNELS), params
    )


def is_decayed(config: OptimConfig, name: str) -> bool:
    """Whether weight decay is for the parameter of this name."""
    return config.decayed == "all" or name.endswith(_DECAYED_KERNELS)

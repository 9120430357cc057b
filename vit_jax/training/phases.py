"""The phases of a run: a linear probe, then fine-tuning (arXiv 2202.10054), or one phase alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

from vit_jax.errors import UserError
from vit_jax.training.optim import OptimConfig, make_schedule


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps with one optimiser, which starts anew in each phase.

    Attributes:
      first: the steps of the run before it.
      last: those after it; a checkpoint of this step has the optimiser of the next phase.
      optim: what it learns, and how.
    """

    first: int
    last: int
    optim: OptimConfig

    def schedule(self) -> Callable[[Any], Any]:
        """The learning rate, a function of the steps in this phase; raises as `make_schedule`."""
        return make_schedule(self.optim, self.last - self.first)


def make_phases(config: OptimConfig, total_steps: int) -> tuple[Phase, ...]:
    """The phases of a run.

    With `config.probe`, the head alone learns at first. What follows is as without it: warm-up and
    schedule take the rest of the run.

    Raises:
      UserError: the probe leaves no steps.
    """
    probe, others = config.probe, dataclasses.replace(config, probe=None)
    if probe is None:
        return (Phase(0, total_steps, config),)
    if probe.steps >= total_steps:
        raise UserError(
            f"optim.probe.steps is {probe.steps}, but the run has {total_steps} steps: shorten the "
            "probe, or train the head alone by --config.optim.freeze=all_but_head"
        )
    head = dataclasses.replace(
        others,
        lr=probe.lr,
        schedule="constant",
        warmup=0.0,
        end_lr=0.0,
        drops=(),
        freeze=(*others.freeze, "all_but_head"),
    )
    return Phase(0, probe.steps, head), Phase(probe.steps, total_steps, others)


def phase_after(step: int, phases: tuple[Phase, ...]) -> Phase:
    """The phase in which the run goes on after `step` steps."""
    return next((phase for phase in phases if step < phase.last), phases[-1])


def learning_rate(config: OptimConfig, total_steps: int, step: int) -> float:
    """The learning rate of the step after `step` steps, in a run of `total_steps`."""
    phase = phase_after(step, make_phases(config, total_steps))
    return float(phase.schedule()(step - phase.first))

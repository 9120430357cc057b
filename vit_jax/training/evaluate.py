"""The command `evaluate`: a run folder on its own data, or any model on the data of a config."""

import dataclasses
import functools
import os
from collections.abc import Sequence

from etils import epath

from vit_jax import distributed
from vit_jax.checkpoints.fit import place
from vit_jax.checkpoints.opened import open_together
from vit_jax.errors import UserError
from vit_jax.training.config import Config, differences, read_config
from vit_jax.training.config_file import overridden
from vit_jax.training.datasets import DataSets, with_recorded_sources
from vit_jax.training.evaluation import Evaluation
from vit_jax.training.sharding import (
    make_mesh,
    placement,
)


def evaluate_own(workdir: epath.PathLike, overrides: Sequence[str] = ()) -> dict[str, int | float]:
    """Evaluates a run folder with its own config and data, which may have moved.

    Args:
      workdir: the run folder, or one of its checkpoints, RUN/checkpoints/STEP or .../best.
      overrides: flags for fields that may change on resuming, and for new places of the same data,
        `--config.data.val.source=...`.

    Raises:
      UserError: as `evaluate_run`, or flags that would make it another run.
    """
    model = os.fspath(workdir).rstrip("/")
    if os.path.basename(os.path.dirname(model)) == "checkpoints":
        workdir = os.path.dirname(os.path.dirname(model))
    own = read_config(workdir)
    config, moved = with_recorded_sources(own, overridden(dataclasses.asdict(own), overrides))
    if changed := differences(own, config):
        raise UserError(
            f"{workdir} is evaluated as its config says ({'; '.join(changed)}): name --model and "
            "--config for another"
        )
    return evaluate_run(model, config, DataSets.of_run(workdir, moved))


def evaluate_run(
    path: epath.PathLike, config: Config, data: DataSets | None = None
) -> dict[str, int | float]:
    """Evaluates any model that `load` takes on the splits of `config`: {"val/accuracy": ..., ...}.

    `data` opens the splits (see `Evaluation`).

    Raises:
      UserError: no model there, no split to evaluate, or classes that do not agree.
    """
    mesh = make_mesh(dataclasses.replace(config.mesh, data=-1))
    distributed.meet()
    opened = open_together(path)
    evaluation = distributed.each("evaluation", lambda: Evaluation(config, opened.card, mesh, data))
    if not evaluation.names:
        raise UserError("the config has nothing to evaluate: no data.val, data.test, evaluators")
    shardings = functools.partial(placement, mesh=mesh)
    params, _ = place(opened, opened.card.config, shardings=shardings)
    results: dict[str, int | float] = {} if opened.step is None else {"step": opened.step}
    for values in evaluation.measure(list(evaluation.names), params):
        results |= values
    return results

"""The command `evaluate`: a run folder on its own data, or any model on the data of a config."""

import dataclasses
import functools
import os
from collections.abc import Sequence

from etils import epath

from vit_jax import distributed
from vit_jax.checkpoints.fit import native_card, place
from vit_jax.checkpoints.keys import Patterns
from vit_jax.checkpoints.opened import open_together
from vit_jax.errors import UserError
from vit_jax.training.config import Config, differences, read_config
from vit_jax.training.config_file import overridden
from vit_jax.training.datasets import DataSets, with_recorded_sources
from vit_jax.training.evaluation.evaluation import Evaluation
from vit_jax.training.evaluation.predictions import Predictions
from vit_jax.training.sharding import make_mesh, placement


def root_of(workdir: epath.PathLike) -> epath.PathLike:
    """The run folder of a run folder, or of one of its checkpoints."""
    model = os.fspath(workdir).rstrip("/")
    if os.path.basename(os.path.dirname(model)) == "checkpoints":
        return os.path.dirname(os.path.dirname(model))
    return workdir


def evaluate_own(
    workdir: epath.PathLike,
    overrides: Sequence[str] = (),
    kept: dict[str, Predictions] | None = None,
    needed_by: str = "",
) -> dict[str, int | float]:
    """Evaluates a run folder with its own config and data, which may have moved.

    Args:
      workdir: the run folder, or one of its checkpoints, RUN/checkpoints/STEP or .../best.
      overrides: flags for fields that may change on resuming, and for new places of the same data,
        `--config.data.val.source=...`.
      kept, needed_by: as in `evaluate_run`.

    Raises:
      UserError: as `evaluate_run`, or flags that would make it another run.
    """
    model, workdir = os.fspath(workdir).rstrip("/"), root_of(workdir)
    own = read_config(workdir)
    config, moved = with_recorded_sources(own, overridden(dataclasses.asdict(own), overrides))
    if changed := differences(own, config):
        raise UserError(
            f"{workdir} is evaluated as its config says ({'; '.join(changed)}): name --model and "
            "--config for another"
        )
    return evaluate_run(model, config, DataSets.of_run(workdir, moved), kept, needed_by)


def evaluate_run(
    path: epath.PathLike,
    config: Config,
    data: DataSets | None = None,
    kept: dict[str, Predictions] | None = None,
    needed_by: str = "",
    max_patches: int | None = None,
    **chosen: Patterns,
) -> dict[str, int | float]:
    """Evaluates any model that `load` takes on the splits of `config`: {"val/accuracy": ..., ...}.

    Args:
      data: opens the splits (see `Evaluation`).
      kept: where the predictions of each split are put, by its name (see `Evaluation`).
      needed_by: the flag that needs predictions, if any does.
      max_patches: as in `load`.
      chosen: `only` and `ignore`, as in `load`.

    Raises:
      UserError: no model there, no split to evaluate, classes that do not agree, or no classes
        where predictions are needed.
    """
    mesh = make_mesh(dataclasses.replace(config.mesh, data=-1))
    distributed.meet()
    opened = open_together(path, **chosen)
    if max_patches is not None:
        opened = dataclasses.replace(opened, card=native_card(opened.card, max_patches))
    evaluation = distributed.each(
        "evaluation", lambda: Evaluation(config, opened.card, mesh, data, kept)
    )
    if not evaluation.names:
        raise UserError("the config has nothing to evaluate: no data.val, data.test, evaluators")
    if needed_by and (config.segments or config.detects):
        tells, what = ("the class of each pixel", "masks") if config.segments else ("boxes",) * 2
        raise UserError(
            f"{needed_by} is of images that are classified, and objective {config.objective} tells "
            f"{tells}: `vit-jax predict --out=FOLDER` writes {what}"
        )
    if needed_by and not evaluation.classifies:
        raise UserError(
            f"{needed_by} is of images that are classified: here no data.val, data.test or "
            "evaluator of type classification does that"
        )
    shardings = functools.partial(placement, mesh=mesh)
    params, _ = place(opened, opened.card.config, shardings=shardings)
    results: dict[str, int | float] = {} if opened.step is None else {"step": opened.step}
    for values in evaluation.measure(list(evaluation.names), params):
        results |= values
    return results

"""The commands `train`, `evaluate` and `predict` as Python functions, and features."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Float32

from vit_jax import buckets, distributed
from vit_jax.checkpoints.keys import Patterns
from vit_jax.checkpoints.load import Loaded
from vit_jax.data.config import ON_CORRUPT
from vit_jax.data.inputs import Inputs
from vit_jax.errors import UserError, nearest
from vit_jax.training import console, loop
from vit_jax.training.config import Config
from vit_jax.training.config_file import as_flags, load_config, overridden
from vit_jax.training.evaluation import assess
from vit_jax.training.evaluation import evaluate as evaluation
from vit_jax.training.evaluation import files as evaluation_files
from vit_jax.training.evaluation.predict import Predictor, load_local
from vit_jax.training.evaluation.predictions import Predictions, check_path, write_rows

logger = logging.getLogger(__name__)
ConfigLike = epath.PathLike | Mapping[str, Any] | ml_collections.ConfigDict | Config


def train(
    config: ConfigLike, workdir: epath.PathLike, *, extend: bool = False, **overrides: Any
) -> dict[str, int | float]:
    """Trains a model, or resumes the run in `workdir` if it was stopped.

    In a script with several processes, call `vit_jax.distributed.connect()` first.

    Args:
      config: as `--config`: a recipe's name or a file, with its argument ("digits",
        "configs/images.py:Ti/16,folder:pets"), an ml_collections ConfigDict, nested dicts or a
        `Config`.
      workdir: the run folder. `vit_jax.load(workdir)` loads the model.
      extend: goes on with a run for longer than it was begun with.
      **overrides: values that replace the config's: `total_epochs=20`, `optim={"lr": 1e-3}`, or
        `**{"optim.lr": 1e-3}`.

    Returns:
      The last value of every metric of the run, as in its metrics.jsonl.

    Raises:
      UserError: an unknown key or a value of another type; the config does not fit the data, the
        devices or the run in `workdir`; the loss is no longer finite. What was saved is intact.
      Stopped: SIGTERM or Ctrl-C came; the run has saved a checkpoint and can be resumed.
    """
    with console.shown():
        results, lines = run_training(_config(config, overrides), workdir, extend=extend)
        for line in lines:
            logger.info("%s", line)
    return results


def run_training(
    config: Config, workdir: epath.PathLike, *, extend: bool = False
) -> tuple[dict[str, int | float], list[str]]:
    """Trains as `train` does; also returns the lines that sum up the run, for process 0."""
    with buckets.working(workdir) as folder:
        results = loop.train(config, folder, extend=extend)
        found = None
        if config.segments or config.detects:
            from vit_jax.analysis.found import write_found

            # The others wait: they would end, and take the run's connection with them.
            found = distributed.first("pictures", lambda: write_found(folder))
        if not distributed.is_lead():
            return results, []
        from vit_jax.analysis.plots import write_curves

        picture, name = write_curves(folder), buckets.shown(folder)
        picture = picture and f"{name}/{picture.name}"
        found = found and f"{name}/{found}"
        return results, console.finished(config, name, results, picture, found)


def evaluate(
    model: epath.PathLike,
    config: ConfigLike | None = None,
    *,
    pictures: epath.PathLike | None = None,
    predictions: epath.PathLike | None = None,
    max_patches: int | None = None,
    only: Patterns = (),
    ignore: Patterns = (),
    **overrides: Any,
) -> dict[str, int | float]:
    """Evaluates a run on its own data, or any model on the splits of a config.

    Args:
      model: a run folder, or with `config` any path that `load` takes.
      config: as for `train`; only its `data` and `eval` sections matter. None is the run's own.
      pictures: a folder for a confusion matrix, a reliability diagram and a page of the worst
        mistakes of each split; needs the extra `plot`.
      predictions: FILE.csv or FILE.jsonl for a row an image.
      max_patches, only, ignore: with `config`, as in `load`.
      **overrides: as for `train`. For a run on its own data only new places of the same data, and
        what may change on resuming: `**{"data.val.source": "folder:/new/pets"}`.

    Returns:
      {"val/accuracy": ..., "val/loss": ..., "val/ece": ..., ...}, and the "step" of a run. What is
      known of each class and image is in the run folder's `evaluation/`.

    Raises:
      UserError: no model or config there, no split to evaluate, or classes that do not agree.
    """
    with console.shown():
        given = None if config is None else _config(config, overrides)
        flags = as_flags(overrides) if config is None else []
        how = dict(max_patches=max_patches, only=only, ignore=ignore)
        return run_evaluation(model, given, flags, pictures, predictions, **how)[0]


def run_evaluation(
    model: epath.PathLike,
    config: Config | None,
    overrides: Sequence[str] = (),
    pictures: epath.PathLike | None = None,
    predictions: epath.PathLike | None = None,
    max_patches: int | None = None,
    only: Patterns = (),
    ignore: Patterns = (),
) -> tuple[dict[str, int | float], list[str]]:
    """Evaluates as `evaluate` does; also returns the lines that sum it up, for process 0."""
    needed_by = "--pictures" if pictures else "--predictions" if predictions else ""
    if predictions:
        check_path(os.fspath(predictions))
    if pictures:
        from vit_jax.analysis import quality as drawn

        drawn.check(pictures)
    kept: dict[str, Predictions] = {}
    if config is None and max_patches is not None:
        raise UserError(
            f"--max-patches={max_patches}: a run is evaluated on its own images as it was trained: "
            "name --model and --config for another size"
        )
    chosen = {name: each for name, each in {"only": only, "ignore": ignore}.items() if each}
    if config is None and chosen:
        raise UserError(
            f"--{min(chosen)}: a run folder is of one model, whose keys are all read: leave it out"
        )
    if config is None:
        model = buckets.local(model)
        results = evaluation.evaluate_own(model, overrides, kept, needed_by)
    else:
        how = dict(max_patches=max_patches, **chosen)
        results = evaluation.evaluate_run(model, config, None, kept, needed_by, **how)
    found = assess.assess(kept)
    lines = console.evaluated(buckets.shown(model), results)
    results = results | {
        k: v for name, each in found.items() for k, v in each.scalars(name).items()
    }
    if not distributed.is_lead():
        return results, []
    told = {
        name: evaluation_files.to_json(name, found[name], kept[name], results) for name in found
    }
    if views := {each.crops * (1 + each.flip) for each in kept.values()} - {1}:
        lines.append(f"each image is classified by the mean of {views.pop()} views of it")
    lines += assess.lines(found, {name: kept[name].source.label_names for name in found})
    if config is None and found:
        lines += _keep(evaluation.root_of(model), told, kept)
    if predictions:
        lines.append(f"{predictions}: {write_rows(os.fspath(predictions), kept):,} rows")
    if pictures:
        lines += drawn.write(pictures, found, kept, told)
    return results, lines


def _keep(
    workdir: epath.PathLike, told: Mapping[str, Any], kept: Mapping[str, Predictions]
) -> list[str]:
    """Writes what was found into the run folder, if it can be written to."""
    folder = os.path.join(os.fspath(workdir), evaluation_files.FOLDER)
    try:
        for name, each in told.items():
            evaluation_files.write(folder, name, each, kept[name])
        if (copy := buckets.attached(workdir)) is not None:
            copy.send(evaluation_files.FOLDER)
    except (OSError, UserError) as error:
        logger.warning("nothing is kept in %s: %s", folder, error)
        return []
    return [f"all of it is kept in {buckets.shown(folder)}, which `report` reads"]


def predict(
    model: epath.PathLike | Loaded,
    images: Any,
    topk: int = 5,
    *,
    batch_size: int | None = None,
    on_corrupt: str = "stop",
) -> Iterator[list[tuple[str, float]] | None]:
    """Yields the top classes of each image: [(name, probability), ...], most likely first.

    Images are read ahead by threads, and run in batches on all devices of this process, so that
    the first answer comes when up to five batches have been read; `Loaded.predict` answers each
    image before it reads the next.

    Args:
      model: any path that `load` takes, or what it returned.
      images: one image (a path, a file's bytes, a Pillow image, uint8 [h w c] or [h w]), an
        iterable of them, or the folders, archives, ... that `find_images` finds.
      topk: how many classes to return, at least 1, at most all.
      batch_size: images at a time on all devices; None for a size that suits them.
      on_corrupt: "stop" raises at an image that cannot be read; "skip" yields None for it, and logs
        why.

    Raises:
      UserError: no model there, it has no head, or an argument is invalid; while iterating, an
        image cannot be read.
    """
    return _answers(model, images, "classes", on_corrupt, topk=topk, batch_size=batch_size)


def features(
    model: epath.PathLike | Loaded,
    images: Any,
    *,
    dense: bool = False,
    batch_size: int | None = None,
    on_corrupt: str = "stop",
) -> Iterator[Float32[np.ndarray, "..."] | None]:
    """Yields the features of each image: the head's input, float32 [d].

    With `dense`, those of its patches, float32 [gh gw d] (see `ViT.dense`). The other arguments,
    and what is raised, are as in `predict`; the model needs no head.
    """
    what = "dense" if dense else "features"
    return _answers(model, images, what, on_corrupt, batch_size=batch_size)


def _answers(model: Any, images: Any, what: str, on_corrupt: str, **options: Any) -> Iterator[Any]:
    """Checks the arguments at once, and predicts when it is iterated over."""
    if on_corrupt not in ON_CORRUPT:
        raise UserError(f"on_corrupt is {on_corrupt!r}; {nearest(on_corrupt, ON_CORRUPT)}")
    answers = Predictor(load_local(model), what, **options)(images)
    names = images.names if isinstance(images, Inputs) else None

    def checked():
        for number, answer in enumerate(answers):
            if not isinstance(answer, UserError):
                yield answer
                continue
            name = names[number] if names else f"image {number + 1}"
            if on_corrupt == "stop":
                raise type(answer)(f"{name}: {answer}") if names else answer
            logger.warning("skipped %s: %s", name, answer)
            yield None

    return checked()


def _config(config: Any, overrides: Mapping[str, Any]) -> Config:
    flags = as_flags(overrides)
    if isinstance(config, (str, os.PathLike)):
        return load_config(os.fspath(config), flags)
    if isinstance(config, Config):
        return overridden(dataclasses.asdict(config), flags) if flags else config
    fields = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    if not isinstance(fields, Mapping):
        raise UserError(
            f"config is of type {type(config).__name__}; expected a recipe's name, a file, a "
            "ConfigDict or nested dicts"
        )
    return overridden(_nested(fields), flags)


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, as `overridden` changes its dicts in place."""
    return {
        name: _nested(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
    }

"""Evaluation: every example once, whatever the batch size and the number of devices."""

import dataclasses
import functools
from collections.abc import Callable, Sized
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from vit_jax.checkpoints.load import open_model, place
from vit_jax.data.pipeline import BatchReader, eval_batches
from vit_jax.data.sources import open_source, with_labels
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.vit import structure
from vit_jax.training.config import Config, from_json
from vit_jax.training.sharding import batch_shards, local_rows, make_mesh, placement, to_devices
from vit_jax.training.steps import make_eval_step

EvalStep = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]


def evaluate(
    eval_step: EvalStep,
    params: Any,
    read: BatchReader,
    *,
    batch_size: int,
    mesh: Mesh,
    threads: int | None = None,
) -> dict[str, float]:
    """Returns the means over all examples of `read.source`: accuracy (top-1), top5 and loss.

    Padding is masked; the sums of all batches are added on the host, and divided last. Where
    images that cannot be read are skipped, they are masked too, and `corrupt` is their number.
    """
    sums, corrupt = [], 0
    with eval_batches(read, batch_size, rows=local_rows(batch_size, mesh), threads=threads) as it:
        for batch in it:
            corrupt += int(batch["corrupt"].sum())
            sums.append(eval_step(params, to_devices(batch, batch_size, mesh)))
    totals = {
        name: np.sum([each[name] for each in jax.device_get(sums)], dtype=np.float64)
        for name in sums[0]
    }
    count = totals.pop("count")
    if not count:
        raise UserError("none of the images to evaluate can be read")
    means = {name: float(total / count) for name, total in totals.items()}
    return {**means, "corrupt": corrupt} if read.on_corrupt == "skip" else means


def readers(
    config: Config, preprocess: Preprocess, labels: tuple[str, ...]
) -> dict[str, BatchReader]:
    """Opens the val and test splits that the config has, as a model of `labels` reads them.

    Raises:
      UserError: a split has other classes than the model.
    """
    found = {}
    for name, split in {"val": config.data.val, "test": config.data.test}.items():
        if split is None:
            continue
        source = open_source(split.source, split.split)
        if not isinstance(source, Sized):
            raise UserError(f"data.{name}.source {split.source} is endless: name a finite split")
        try:
            source = with_labels(source, labels)
        except UserError as error:
            raise UserError(f"data.{name} ({split.source}, {split.split}): {error}") from None
        found[name] = BatchReader.of(source, split, preprocess, on_corrupt=config.data.on_corrupt)
    return found


def eval_batch_size(config: Config, mesh: Mesh) -> int:
    """The batch size of evaluation, rounded up to what the devices divide; the rest is padding."""
    shards = batch_shards(mesh)
    return -(-(config.eval.batch_size or config.batch_size) // shards) * shards


def read_config(workdir: epath.PathLike) -> Config:
    """The config that a run folder was trained with."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged or of another version: {error}") from None


def evaluate_run(path: epath.PathLike, config: Config) -> dict[str, int | float]:
    """Evaluates any model that `load` takes on the splits of `config`: {"val/accuracy": ..., ...}.

    Raises:
      UserError: no model there, no split to evaluate, or classes that do not agree.
    """
    mesh = make_mesh(dataclasses.replace(config.mesh, data=-1))
    opened = open_model(path)
    record, step = opened.record, opened.step
    batch_size = eval_batch_size(config, mesh)
    graphdef, _ = structure(record.config)
    params, _ = place(opened, record.config, shardings=functools.partial(placement, mesh=mesh))
    eval_step = jax.jit(
        make_eval_step(
            graphdef,
            record.preprocess,
            num_classes=record.config.num_classes,
            objective=config.objective,
        )
    )
    results: dict[str, int | float] = {}
    for name, read in readers(config, record.preprocess, record.labels).items():
        values = evaluate(
            eval_step, params, read, batch_size=batch_size, mesh=mesh, threads=config.data.threads
        )
        results |= {f"{name}/{key}": value for key, value in values.items()}
    if not results:
        raise UserError("the config has neither data.val nor data.test to evaluate")
    return results if step is None else {"step": step, **results}

"""The training run: start or resume, step, log, evaluate, save, stop."""

import collections
import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from vit_jax.checkpoints.families import fitted_preprocess
from vit_jax.checkpoints.load import open_model, place
from vit_jax.checkpoints.record import ModelRecord
from vit_jax.checkpoints.store import Store, lock, write_atomically
from vit_jax.data.pipeline import Batch, BatchReader, train_batches
from vit_jax.data.sources import Source, open_source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.training.config import Config, differences, to_json
from vit_jax.training.evaluate import Evaluation, read_config
from vit_jax.training.metrics import Diverged, Recorder, due, read_metrics
from vit_jax.training.program import make_program
from vit_jax.training.sharding import check_batch, local_rows, make_mesh, placement, to_devices
from vit_jax.training.state import from_saved, make_state, to_saved

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


def train(config: Config, workdir: epath.PathLike) -> dict[str, int | float]:
    """Trains until the config's last step, going on from what `workdir` holds.

    Returns:
      The last value of every metric of the run, as in its metrics.jsonl.

    Raises:
      UserError: the config does not fit the data, the devices or the run in `workdir`; the loss
        is no longer finite; or the disk is full. What was saved before is intact.
      Stopped: SIGTERM came; the run has saved and can be started again.
    """
    if "://" in os.fspath(workdir):
        raise UserError(f"{workdir}: a run folder must be on a local or mounted disk so far")
    workdir = epath.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{workdir} is a file; --workdir must be a folder") from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(workdir))
        stop = stack.enter_context(sigterm())
        store = Store(workdir, keep=config.checkpoint.keep)
        stack.callback(store.close)
        try:
            return _run(config, workdir, store, stop, stack)
        except Diverged as error:
            store.wait()
            saved = store.steps()
            kept = f"step {saved[-1]} is saved in {store.directory}" if saved else "none was saved"
            raise UserError(
                f"{error}; {kept}. Lower optim.lr, set optim.grad_clip, or lengthen optim.warmup, "
                "in another --workdir"
            ) from None


def _run(
    config: Config,
    workdir: epath.Path,
    store: Store,
    stop: Callable[[], bool],
    stack: contextlib.ExitStack,
) -> dict[str, int | float]:
    config.check_trains()
    source = open_source(config.data.train.source, config.data.train.split)
    total_steps = config.steps(len(source) if isinstance(source, Sized) else None)
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.optim.accumulate, mesh)

    resume_step = store.newest()
    record, params = _start(config, workdir, source, resume_step, mesh)
    program = make_program(config, record.config, record.preprocess, total_steps, mesh)
    read = BatchReader.of(
        source,
        config.data.train,
        record.preprocess,
        seed=config.seed,
        on_corrupt=config.data.on_corrupt,
    )
    evaluation = Evaluation(config, record, mesh)

    if resume_step is None:
        state = make_state(
            program.state, record.config, program.optimizer, seed=config.seed, params=params
        )
        write_atomically(workdir / "config.json", to_json(config))
        record.write(workdir)
    else:
        state = from_saved(store.restore(resume_step, to_saved(program.state)), program.state)
        logger.info("resuming %s at step %d of %d", workdir, resume_step, total_steps)
    start_step = resume_step or 0

    batches = stack.enter_context(
        train_batches(
            read,
            config.batch_size,
            start_step=start_step,
            stop_step=total_steps,
            rows=local_rows(config.batch_size, mesh),
            workers=config.data.workers,
            threads=config.data.threads,
        )
    )
    recorder = Recorder(
        workdir,
        start_step,
        total_steps,
        every=config.log.every,
        tensorboard=config.log.tensorboard,
    )
    stack.callback(recorder.close)

    arriving = on_device(batches, config.batch_size, mesh)
    for step in range(start_step + 1, total_steps + 1):
        began = time.perf_counter()
        batch, corrupt = next(arriving)
        waited = time.perf_counter() - began
        state, metrics = program.step(state, batch)
        if config.data.on_corrupt == "skip":
            metrics["corrupt"] = corrupt
        recorder.step(step, metrics, config.batch_size, waited)

        stopping = stop()
        measuring = evaluation.due(step, total_steps)
        saving = due(step, config.checkpoint.every, total_steps) or stopping
        if measuring or saving:
            recorder.flush()
            with recorder.pause():
                # All lines of this step are in metrics.jsonl before its checkpoint can exist.
                weights = state.params if state.ema is None else state.ema
                for values in evaluation.measure(measuring, weights):
                    recorder.write(step, values)
                if saving:
                    store.save(step, to_saved(state))
        if stopping and step < total_steps:
            store.wait()
            raise Stopped(f"stopped by SIGTERM after saving step {step} of {total_steps}")
    store.wait()
    last: dict[str, int | float] = {}
    for line in read_metrics(workdir):
        last |= line
    return last


def _start(
    config: Config, workdir: epath.Path, source: Source, resume_step: int | None, mesh: Mesh
) -> tuple[ModelRecord, Any | None]:
    """Decides where the run starts; returns what its weights mean and, if not fresh, them.

    In this order:
      1. resume: this folder holds a whole checkpoint, and the config still says the same;
      2. fine-tune: `init_from` names another model; its head is made anew (paper, B.1.1), its
         position embeddings are resized (section 3.2), its preprocessing is inherited;
      3. scratch.
    """
    if resume_step is not None:
        changed = differences(read_config(workdir), config)
        if changed:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(changed)}): give its own "
                "values to resume it, or name another --workdir"
            )
        record = ModelRecord.read(workdir)
        if record.fingerprint != source.fingerprint:
            raise UserError(
                f"the data of {config.data.train.source} changed since {workdir} began "
                f"(fingerprint {record.fingerprint} -> {source.fingerprint}): restore it, or name "
                "another --workdir"
            )
        return record, None

    num_classes = len(source.label_names)
    opened = None if config.init_from is None else open_model(config.init_from)
    base = opened and opened.record
    keep_head = base is not None and (
        config.model.get("head") == "keep" and base.labels == source.label_names
    )
    vit = config.vit(base and base.config, num_classes, keep_head)
    if vit.num_classes != num_classes:
        raise UserError(
            f"model.num_classes is {vit.num_classes}, but {config.data.train.source} has "
            f"{num_classes} classes: leave model.num_classes out"
        )
    if base:
        preprocess = fitted_preprocess(base.preprocess, vit)
    else:
        preprocess = Preprocess(vit.image_size, vit.in_channels)
    # What `predict` does with a picture is what evaluation does.
    evaluated = config.data.val or config.data.test or config.data.train
    preprocess = evaluated.preprocess(preprocess)
    method = config.model.get("position_resize") or (base.position_resize if base else "zoom")
    record = ModelRecord(
        vit, preprocess, source.label_names, source.fingerprint, config.objective, method
    )
    if opened is None:
        return record, None
    params, lines = place(
        opened,
        vit,
        head="keep" if keep_head else "fresh",
        method=method,
        seed=config.seed,
        shardings=functools.partial(placement, mesh=mesh),
    )
    logger.info("starting from %s: %d parameters", opened.facts["file"], len(lines))
    for line in lines:
        logger.info("  %-32s %s", line.name, line.fate)
    return record, params


def on_device(
    batches: Iterable[Batch], batch_size: int, mesh: Mesh, ahead: int = 2
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """Yields batches as global arrays, with `ahead` of them on their way to the devices.

    With each comes how many of its images could not be read.
    """
    queue: collections.deque[tuple[dict[str, jax.Array], int]] = collections.deque()
    for batch in batches:
        queue.append((to_devices(batch, batch_size, mesh), int(batch["corrupt"].sum())))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM has come; a second one ends the process."""
    came = False
    if threading.current_thread() is not threading.main_thread():  # such as in some notebooks
        yield lambda: False
        return

    def note(number, frame):
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)

"""The training loop: start or resume, step, log, evaluate, save, stop."""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from vit_jax import buckets, distributed
from vit_jax.checkpoints.fit import place
from vit_jax.checkpoints.store import Store, claim
from vit_jax.data.pipeline import Batch, train_batches
from vit_jax.errors import Stopped, UserError, during
from vit_jax.training import console, distill
from vit_jax.training.config import Config, read_config, to_json
from vit_jax.training.datasets import DataSets, with_recorded_sources
from vit_jax.training.evaluation.evaluation import Evaluation
from vit_jax.training.metrics import (
    Diverged,
    Recorder,
    check_wandb,
    due,
    last_values,
    read_corrupt,
    read_metrics,
    record_corrupt,
    record_start,
)
from vit_jax.training.phases import learning_rate
from vit_jax.training.plan import Plan, check_begun, count_steps, plan_run
from vit_jax.training.program import make_program
from vit_jax.training.selection import Selection
from vit_jax.training.sharding import (
    check_batch,
    local_rows,
    make_mesh,
    placement,
    to_devices,
    total,
    unsplit,
)
from vit_jax.training.state import from_saved, make_state, to_saved, with_optimizer
from vit_jax.training.stopping import SaveTimer, Stop
from vit_jax.training.trainable import trainable
from vit_jax.writing import write_atomically

logger = logging.getLogger(__name__)


def train(
    config: Config, workdir: epath.PathLike, *, extend: bool = False
) -> dict[str, int | float]:
    """Trains until the config's last step, resuming from the newest checkpoint in `workdir`.

    Every process of a run calls this (after `distributed.connect`), with a `workdir` on a shared
    disk, or that `buckets.working` gave it.

    Args:
      extend: goes on with a run for longer than it was begun with (see `plan_run`). The learning
        rate is then that of the longer schedule.

    Returns:
      The last value of every metric of the run, as in its metrics.jsonl.

    Raises:
      UserError: the config does not fit the data, the devices or the run in `workdir`; the loss
        is no longer finite; or the disk is full. Earlier checkpoints are intact.
      Stopped: SIGTERM or Ctrl-C came; the run has saved a checkpoint and can be resumed.
    """
    workdir = epath.Path(os.path.expanduser(workdir))
    with console.shown(), contextlib.ExitStack() as stack:
        store = Store(workdir, keep=config.checkpoint.keep, together=True)
        stack.enter_context(distributed.advising(functools.partial(_advice, store)))
        if config.log.wandb:
            distributed.first("wandb", check_wandb)
        claim(workdir, stack)
        stop = Stop(stack)
        stack.callback(store.close)
        try:
            return _run(config, workdir, store, stop, stack, extend)
        except Diverged as error:
            store.wait()
            saved = store.steps()
            kept = f"step {saved[-1]} is saved in {store.directory}" if saved else "none was saved"
            raise UserError(
                f"{error}; {kept}. Lower optim.lr, set optim.grad_clip, or lengthen optim.warmup, "
                "in another --workdir"
            ) from None
        except Exception as error:
            distributed.explain(error)  # before the store waits for a process that is gone
            raise


def _advice(store: Store) -> str:
    """What the user should do when a process of the run is lost."""
    try:
        saved = store.steps()
    except Exception:  # noqa: BLE001 - of a bucket that cannot be reached either
        return "start the same command again: it goes on from its newest checkpoint"
    begins = f"goes on from step {saved[-1]}" if saved else "begins anew, as nothing was saved yet"
    return f"start the same command again: it {begins}"


def _run(
    config: Config,
    workdir: epath.Path,
    store: Store,
    stop: Stop,
    stack: contextlib.ExitStack,
    extend: bool,
) -> dict[str, int | float]:
    config.check_trains()
    doing, name = "reading the data and making the model", buckets.shown(workdir)
    stack.enter_context(during(lambda: doing))
    resume_step, data = store.newest(), DataSets()
    if resume_step is not None:  # with the recorded sources, and where they are now
        begun = read_config(workdir)
        check_begun(workdir, begun, config)
        config, moved = with_recorded_sources(begun, config)
        data = DataSets.of_run(workdir, moved)
    source = distributed.each("data", lambda: data.open("data.train", config.data.train))
    mesh = make_mesh(config.mesh)
    distributed.meet()
    check_batch(config.batch_size, config.optim.accumulate, mesh)
    plan = plan_run(config, workdir, source, resume_step, extend)
    card, total_steps = plan.card, plan.total_steps
    if card.labels:
        source = data.with_labels("data.train", config.data.train, card.labels)
    params = _starting_params(plan, mesh)
    start_step = resume_step or 0
    taught = ()  # or the teacher's parameters
    if (teacher := plan.teacher) is not None:
        weights, fingerprint = teacher.read(mesh)
        taught = (weights,)
        if resume_step is not None:
            distill.check(workdir, teacher, fingerprint)
    phases = [each for each in plan.phases if start_step < each.last] or [plan.phases[-1]]
    programs = collections.deque((each, make_program(plan, mesh, each)) for each in phases)
    phase, program = programs.popleft()
    for parameter in unsplit(program.state.params, mesh):
        logger.info("%s", parameter)
    read = plan.reader(source)
    evaluation = distributed.each("evaluation", lambda: Evaluation(config, card, mesh, data))
    distributed.first("same images", lambda: data.check_held_out(config))
    for line in console.summary(plan, mesh, program.state, data.summary(), name, start_step):
        logger.info("%s", line)
    if (count := plan.examples) is not None and count < config.batch_size:
        logger.info(
            "batch_size is %d, and data.train has %d images: each step sees images more than once",
            *(config.batch_size, count),
        )

    if resume_step is None:
        state = make_state(
            program.state, card.config, program.optimizer, seed=config.seed, params=params
        )
        if distributed.is_lead():
            if teacher is not None:
                distill.write(workdir, teacher, fingerprint)
            write_atomically(workdir / "config.json", to_json(config))
            card.write(workdir)
    else:
        state = from_saved(store.restore(resume_step, to_saved(program.state)), program.state)
        if resume_step < total_steps:
            logger.info("resuming %s at step %d of %d", name, resume_step, total_steps)
        if extend and begun != config:
            _extend(plan, begun)
            if distributed.is_lead():
                write_atomically(workdir / "config.json", to_json(config))
    if distributed.is_lead():
        data.write(workdir)

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
    if distributed.is_lead():
        record_start(workdir, start_step, total_steps, mesh.size)
    selection = Selection(
        config.checkpoint.best,
        config.stop,
        evaluation.during(),
        read_metrics(workdir, start_step),
        plan.phases[-1].first,
    )
    keep_best(store, selection)
    recorder = Recorder(workdir, start_step, total_steps, config)
    stack.push(lambda kind, *_: recorder.close(failed=kind is not None))

    skips = config.data.on_corrupt == "skip"
    corrupt = read_corrupt(workdir, start_step) if skips else 0
    if start_step == total_steps or selection.ended:
        logger.info("%s is finished: there is nothing left to train", name)
    arriving = on_device(batches, config.batch_size, mesh, corrupt=skips)
    timer = SaveTimer(config.checkpoint.every_minutes, start_step)
    growth = plan.growth
    for step in range(start_step + 1, total_steps + 1) if not selection.ended else ():
        compiles = step in (start_step + 1, phase.first + 1)
        compiles |= growth is not None and step - 1 in growth.starts
        first = "compiling or " if compiles else ""
        doing = f"{first}running step {step} of {total_steps}"
        began = time.perf_counter()
        batch, unread = next(arriving)
        waited = time.perf_counter() - began
        with contextlib.ExitStack() as beside:
            if compiles:
                if step > start_step + 1:
                    beside.enter_context(recorder.pause())
                beside.enter_context(console.compiling(growth and growth(step - 1)))
            state, metrics = program.step(state, batch, *taught)
        if step == phase.last and programs:
            phase, program = programs.popleft()
            state = with_optimizer(state, program.state, program.optimizer)
            learned, count = trainable(phase.optim.freeze, state.params).sizes(state.params)
            logger.info(
                "step %s: the probe is over; %s of %s parameters learn now",
                *(f"{each:,}" for each in (step, learned, count)),
            )
        if step == start_step + 1:
            stop.on_ctrl_c()
        if skips:
            corrupt += unread
            metrics["corrupt"] = corrupt
        recorder.step(step, metrics, config.batch_size, waited)

        stopping = stop(step)
        measuring = evaluation.due(step, total_steps)
        saving = due(step, config.checkpoint.every, total_steps) or bool(stopping)
        saving |= timer.due(step)
        if measuring or saving:
            recorder.flush()
            with recorder.pause():
                # All lines up to this step are in metrics.jsonl before its checkpoint exists.
                weights = state.params if state.ema is None else state.ema
                for values in evaluation.measure(measuring, weights):
                    recorder.write(step, values)
                    saving |= selection.add(step, values)
                if selection.ended and step < total_steps:
                    logger.info("stopping early at step %d: %s", step, selection.ended)
                    last = [name for name in evaluation.names if name not in measuring]
                    for values in evaluation.measure(last, weights):
                        recorder.write(step, values)
                    saving = True
                keep_best(store, selection)
                if saving:
                    if skips and distributed.is_lead():
                        record_corrupt(workdir, step, int(corrupt))
                    store.save(step, to_saved(state))
                    timer.saved()
        if selection.ended:
            break
        if stopping and step < total_steps:
            store.wait()
            raise Stopped(
                f"stopped by {stopping} after saving step {step} of {total_steps}; the same "
                "command goes on from there",
                130 if stopping == "Ctrl-C" else 143,
            )
    store.wait()
    if (best := selection.best) and best.step:
        logger.info("best %s: %.4g at step %s", best.metric.name, best.value, f"{best.step:,}")
    if (n := int(corrupt)) and start_step < total_steps and distributed.is_lead():
        count = "an image" if n == 1 else f"{n} images"
        logger.warning(
            "%s of %s could not be read: the next took its place", count, config.data.train.source
        )
    return distributed.first("results", lambda: last_values(workdir))


def keep_best(store: Store, selection: Selection) -> None:
    """Tells the store which checkpoint is the best, from when it is written."""
    if (best := selection.best) and best.step:
        store.keep_best(best.step, {best.metric.name: best.value})
    elif not best:
        store.keep_best(None, {})


def _extend(plan: Plan, before: Config) -> None:
    """Logs what a longer run does to the learning rate, growing images and mixing."""
    steps, at = count_steps(before, plan.examples), plan.resume_step
    old, new = (learning_rate(plan.config.optim, total, at) for total in (steps, plan.total_steps))
    logger.info(
        "extended from %s to %s steps: the learning rate at step %s is %.4g, of the longer "
        "schedule, where the shorter one had %.4g",
        *(f"{steps:,}", f"{plan.total_steps:,}", f"{at + 1:,}", new, old),
    )
    growth, augment = plan.growth, plan.config.augment
    if growth:
        last, now = dataclasses.replace(growth, total_steps=steps)(at - 1), growth(at)
        if now < last:
            logger.info("images shrink from %dx%d to %dx%d, and grow again", last, last, now, now)
    mixed = augment.mixed_steps(plan.total_steps)
    if augment.mix_off and augment.mixed_steps(steps) < at < mixed:
        logger.info("mixup and cutmix are on again, until step %s", f"{mixed:,}")


def _starting_params(plan: Plan, mesh: Mesh) -> Any | None:
    """Initial parameters of a fine-tuning run, adapted to its model; None for other runs."""
    if plan.init is None:
        return None
    params, lines = place(
        plan.init,
        plan.card.config,
        head="keep" if plan.keep_head else "fresh",
        method=plan.card.position_resize,
        seed=plan.config.seed,
        fresh=plan.config.model.get("fresh") or (),
        shardings=functools.partial(placement, mesh=mesh),
    )
    changed = [line for line in lines if line.status != "kept"]
    kept = len(lines) - len(changed)
    others = ", the others:" if changed else ""
    logger.info("starting from %s: %d parameters kept%s", plan.init.facts["file"], kept, others)
    for line in changed:
        logger.info("  %-32s %s", line.name, line.status)
    return params


def on_device(
    batches: Iterable[Batch], batch_size: int, mesh: Mesh, *, corrupt: bool, ahead: int = 2
) -> Iterator[tuple[dict[str, jax.Array], int | jax.Array]]:
    """Yields batches as global arrays, prefetching `ahead` of them to the devices.

    With each, if `corrupt`, comes the number of its unreadable images not counted before.
    """
    queue: collections.deque[tuple[dict[str, jax.Array], int | jax.Array]] = collections.deque()
    for batch in batches:
        unread = total(batch["corrupt"], batch_size, mesh) if corrupt else 0
        queue.append((to_devices(batch, batch_size, mesh), unread))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue

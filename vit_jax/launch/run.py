"""Runs the points of a sweep, each in its own run folder, and records their states.

WORKDIR/NAME/        the run folder of a point
WORKDIR/NAME.log     the output of its command, of all starts
WORKDIR/sweep.json   every point and its state, always up to date
"""

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from vit_jax import buckets
from vit_jax.errors import UserError
from vit_jax.launch.jobs import STATES, Job, Launcher
from vit_jax.launch.launchers import python
from vit_jax.launch.progress import Progress, with_code
from vit_jax.launch.slurm_queue import Record
from vit_jax.launch.sweep import RECORD, Sweep, point_config
from vit_jax.writing import check_own, check_text, make_folder, write_atomically

PATIENCE = 10.0  # seconds that a run which was just killed may still hold its folder


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a point: its state, one of STATES, and the last value of every metric."""

    name: str
    config: str
    overrides: dict[str, Any]
    after: tuple[str, ...]
    state: str = "waiting"
    exit_code: int | None = None
    metrics: dict[str, int | float] = dataclasses.field(default_factory=dict)


def train_command(config: str, workdir: str, flags: Sequence[str]) -> list[str]:
    """The command that starts a run, or resumes it if it was stopped."""
    return [
        *(python(), "-m", "vit_jax", "train"),
        *(f"--config={config}", f"--workdir={workdir}"),
        *flags,
    ]


def run_sweep(
    sweep: Sweep,
    workdir: epath.PathLike,
    launcher: Launcher,
    *,
    command: Callable[[str, str, Sequence[str]], list[str]] = train_command,
) -> list[Result]:
    """Runs all unfinished points in WORKDIR/NAME, with their output in NAME.log.

    WORKDIR/sweep.json always has the state of every point. If a point fails, only those after it
    are not run.

    Raises:
      UserError: another sweep runs in this folder; a run folder is in use, or holds a run with
        another config. Nothing was started.
      Stopped: SIGTERM or SIGINT came.
    """
    check_text(workdir)
    if buckets.is_bucket(workdir):
        buckets.check(workdir)
    record = getattr(launcher, "record", None)
    if hasattr(launcher, "record") and buckets.is_bucket(workdir) != (record is not None):
        raise UserError(
            f"--record is {record}, and --workdir {os.fspath(workdir)}: with a bucket, and only "
            "then, jobs need a folder on a disk that all nodes share, for their scripts and logs: "
            "--record=DIR"
        )
    if buckets.is_bucket(workdir) and not launcher.dry:
        with buckets.working(workdir) as folder:
            place = buckets.check(workdir)
            return _run(sweep, epath.Path(folder), place, launcher, command, record)
    place = os.fspath(workdir) if buckets.is_bucket(workdir) else os.path.abspath(workdir)
    return _run(sweep, epath.Path(place), place.rstrip("/"), launcher, command)


def _run(
    sweep: Sweep,
    root: epath.Path,
    place: str,
    launcher: Launcher,
    command: Callable[[str, str, Sequence[str]], list[str]],
    logs: str | None = None,
) -> list[Result]:
    """Runs a sweep with its record in `root`; the points' runs are in `place`.

    The logs are in the folder `logs`, or else in `root`.
    """
    from vit_jax.checkpoints.store import lock
    from vit_jax.training.metrics import last_values

    names = [point.name for point in sweep.points]
    jobs = {
        point.name: Job(
            point.name,
            tuple(
                command(
                    point.config,
                    f"{place}/{point.name}",
                    point.flags(lambda name: f"{place}/{name}"),
                )
            ),
            os.path.join(os.path.abspath(logs or root), f"{point.name}.log"),
            point.after,
        )
        for point in sweep.points
    }
    if launcher.dry:
        list(launcher.run(list(jobs.values())))
        return []
    with contextlib.ExitStack() as stack:
        if not (root / RECORD).exists():
            known = (f"{glob.escape(name)}*" for name in names)
            check_own(root, (*known, "slurm", "report.*", "*.log", "*.out", "*.err"), "this sweep")
        make_folder(root, "--workdir")
        make_folder(logs or root, "--record")
        stack.enter_context(lock(root))
        results = {
            point.name: Result(point.name, point.config, point.overrides, point.after)
            for point in sweep.points
        }
        for result in _finished(sweep, root, place):
            results[result.name] = result
        unfinished = [name for name in names if results[name].state != "finished"]
        outlived = launcher.under_way([jobs[name] for name in unfinished])
        for name in unfinished:
            if name not in outlived:
                _wait_until_free(root / name)
        _write(root, sweep.spec, results.values())
        progress = stack.enter_context(Progress(root, results))
        changes = launcher.run([jobs[name] for name in unfinished])
        for change in stack.enter_context(contextlib.closing(changes)):
            if change is not None:
                if (copy := buckets.attached(root)) is not None:
                    copy.pull(change.name)
                results[change.name] = dataclasses.replace(
                    results[change.name],
                    state=change.state,
                    exit_code=change.exit_code,
                    metrics=last_values(root / change.name),
                )
                _write(root, sweep.spec, results.values())
            progress.show(change)
        return list(results.values())


def failures(results: Sequence[Result]) -> str | None:
    """Describes unfinished points in one sentence; None if all are finished."""
    failed = [result for result in results if result.state == "failed"]
    if not failed:
        return None
    names = [f"{result.name}{with_code(result.exit_code)}" for result in failed]
    waiting = [result.name for result in results if result.state == "waiting"]
    rest = f"; not run, as they are after these: {', '.join(waiting)}" if waiting else ""
    return f"{len(failed)} of {len(results)} points failed: {', '.join(names)} (see NAME.log){rest}"


def _finished(sweep: Sweep, root: epath.Path, place: str) -> Iterator[Result]:
    """Yields the points that are finished and need not be run again.

    A point is finished if the record says that its command succeeded, and its folder holds a run
    with this config, with its last checkpoint at the step of its last metrics. If only the record
    is lost, the command runs again, which for a finished run is no more than a start.

    Raises:
      UserError: a folder holds a run with another config.
    """
    from vit_jax.checkpoints.store import Store
    from vit_jax.training.config import differences, read_config
    from vit_jax.training.metrics import last_values

    recorded = {result.name: result for result in _read(root)}
    for point in sweep.points:
        folder = root / point.name
        saved = Store(folder).steps()
        if not saved:
            continue
        changed = differences(
            read_config(folder), point_config(point, lambda name: f"{place}/{name}")
        )
        if changed:
            raise UserError(
                f"{folder} holds a run of another config ({'; '.join(changed)}): give the sweep "
                "another --workdir, or the point another name"
            )
        metrics = last_values(folder)
        old = recorded.get(point.name)
        if old and old.state == "finished" and saved[-1] == metrics.get("step"):
            yield Result(
                point.name, point.config, point.overrides, point.after, "finished", 0, metrics
            )


def _wait_until_free(folder: epath.Path) -> None:
    """Raises a UserError if a live run holds the folder; a folder that does not exist is free."""
    from vit_jax.checkpoints.store import lock

    deadline = time.monotonic() + PATIENCE
    while (folder / ".lock").exists():
        try:
            with lock(folder):
                return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def read_results(workdir: epath.PathLike) -> list[Result]:
    """Reads the results of a sweep: every point, its state, the last value of every metric.

    If the run folders are gone, metrics are those recorded in sweep.json when a point ended.

    Raises:
      UserError: it is not a sweep's folder.
    """
    from vit_jax.training.metrics import last_values

    root = epath.Path(workdir)
    if not (root / RECORD).exists():
        raise UserError(f"{workdir} holds no sweep: it has no {RECORD}")
    results = [
        dataclasses.replace(result, metrics=last_values(root / result.name) or result.metrics)
        for result in _read(root)
    ]
    if any(result.state == "running" for result in results) and not is_held(root):
        running = Record.read(root).numbers()  # where jobs outlive the sweep, they may
        results = [
            dataclasses.replace(result, state="stopped")
            if result.state == "running" and result.name not in running
            else result
            for result in results
        ]
    return results


def is_held(root: epath.Path) -> bool:
    """Whether a sweep runs in this folder, by its lock: a killed sweep leaves no other sign."""
    if (copy := buckets.attached(root)) is not None:
        return copy.held()
    with contextlib.suppress(FileNotFoundError), open(root / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _read(root: epath.Path) -> list[Result]:
    path = root / RECORD
    if not path.exists():
        return []
    try:
        points = json.loads(path.read_text())["points"]
        results = [
            Result(
                **{
                    **point,
                    "after": tuple(point["after"]),
                    "overrides": {
                        key: tuple(value) if isinstance(value, list) else value
                        for key, value in point["overrides"].items()
                    },
                }
            )
            for point in points
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({error}): move it away, and what is "
            "finished is found by running the sweep again"
        ) from None
    if any(result.state not in STATES for result in results):
        raise UserError(f"{path} is of another version: it has states other than {STATES}")
    return results


def _write(root: epath.Path, spec: str, results: Iterable[Result]) -> None:
    record = {"sweep": spec, "points": [dataclasses.asdict(result) for result in results]}
    write_atomically(root / RECORD, json.dumps(record, indent=1))

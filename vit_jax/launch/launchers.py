"""Launchers that run, or print, the points of a sweep on this machine, and lookup by name."""

import collections
import contextlib
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vit_jax.errors import Stopped, UserError, nearest
from vit_jax.launch import child
from vit_jax.launch.jobs import ENVIRONMENT, Change, Job, Launcher, option, signals
from vit_jax.launch.slurm import Slurm


@dataclasses.dataclass(frozen=True)
class Print:
    """Prints the commands, quoted for a shell, in an order in which they can be run."""

    dry = True

    def run(self, jobs: Sequence[Job]) -> Iterator[Change | None]:
        for job in jobs:
            print(shlex.join(job.command))
        yield from ()

    def under_way(self, jobs: Sequence[Job]) -> set[str]:
        return set()


@dataclasses.dataclass(frozen=True)
class Local:
    """Runs `jobs` at a time on this machine, each on an equal share of its cores and GPUs.

    A preempted command (exit code 75 or 143, or a signal) is started again after `delay` seconds,
    up to `retries` times. On Linux, commands are killed if this process dies.
    """

    jobs: int = option(1, "N", "how many at a time (default: local 1, slurm all)")
    retries: int = 3
    delay: float = 2.0
    poll: float = 0.1

    dry = False

    def __post_init__(self):
        if self.jobs < 1:
            raise UserError(f"--jobs is {self.jobs}; it must be at least 1")

    def under_way(self, jobs: Sequence[Job]) -> set[str]:
        return set()  # no command outlives the sweep

    def run(self, jobs: Sequence[Job]) -> Iterator[Change | None]:
        left, failed = list(jobs), set[str]()
        free = shares(self.jobs)
        running: dict[str, tuple[Job, subprocess.Popen, Share]] = {}
        tries: collections.Counter[str] = collections.Counter()
        not_before: dict[str, float] = {}
        passed_on, shown = 0, 0.0
        with signals() as came, _ending(running):
            while True:
                for job, process, share in list(running.values()):
                    if process.poll() is None:
                        continue
                    del running[job.name]
                    free.insert(0, share)
                    code = process.returncode
                    code = code if code >= 0 else 128 - code
                    preempted = code == 75 or code > 128
                    if code == 0:
                        yield Change(job.name, "finished", code)
                    elif preempted and came():
                        yield Change(job.name, "stopped", code)
                    elif preempted and tries[job.name] < self.retries:
                        tries[job.name] += 1
                        not_before[job.name] = time.monotonic() + self.delay
                        left.insert(0, job)
                        yield Change(job.name, "waiting", code)
                    else:
                        failed.add(job.name)
                        yield Change(job.name, "failed", code)

                unfinished = {*(job.name for job in left), *running}
                for job in list(left):
                    if failed & set(job.after):
                        left.remove(job)
                        failed.add(job.name)
                    elif free and not came() and not unfinished & set(job.after):
                        if not_before.get(job.name, 0.0) <= time.monotonic():
                            share = free.pop(0)
                            running[job.name] = job, _start(job, share), share
                            left.remove(job)
                            yield Change(job.name, "running")

                while passed_on < came():  # a second one ends what runs at once
                    passed_on += 1
                    for _, process, _ in running.values():
                        process.terminate()
                if not running and (came() or not left):
                    break
                if time.monotonic() - shown > 1.0:
                    shown = time.monotonic()
                    yield None
                time.sleep(self.poll)
            if came():
                raise Stopped("stopped: what ran has saved, and the same command goes on")


LAUNCHERS: dict[str, Callable[..., Any]] = {"local": Local, "slurm": Slurm, "print": Print}


def make_launcher(name: str, **options: Any) -> Launcher:
    """Returns the launcher of that name; `options` that are None keep their defaults.

    Raises:
      UserError: no such launcher, or an option that it does not have.
    """
    if name not in LAUNCHERS:
        raise UserError(f"there is no launcher {name!r}; {nearest(name, LAUNCHERS)}")
    known = {field.name for field in dataclasses.fields(LAUNCHERS[name])}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in known:
            raise UserError(f"the launcher {name!r} has no --{key.replace('_', '-')}: leave it out")
    return LAUNCHERS[name](**given)


def python() -> str:
    """How to call this Python in a command: `python`, if a shell would run the same."""
    found = shutil.which("python") or ""
    same = os.path.dirname(found) == os.path.dirname(sys.executable)
    return "python" if same else sys.executable


@dataclasses.dataclass(frozen=True)
class Share:
    """Resources of one job slot: cores (none: all of them), and environment variables."""

    cores: tuple[int, ...] = ()
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def shares(jobs: int) -> list[Share]:
    """Splits cores and GPUs equally between `jobs`, as their number affects rounding.

    If there are fewer than jobs, jobs share them.
    """
    if jobs == 1:
        return [Share()]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus, found = _gpus(), []
    for i in range(jobs):
        environment = {}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(_part(gpus, i, jobs))
            if len(gpus) < jobs and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
                at_once = -(-jobs // len(gpus))  # otherwise the first to come takes most of it
                environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / at_once:.3f}"
        found.append(Share(tuple(_part(cores, i, jobs)), environment))
    return found


def _part(items: list[Any], i: int, count: int) -> list[Any]:
    each = len(items) // count
    return items[i * each : (i + 1) * each] if each else items[i % max(len(items), 1) :][:1]


def _gpus() -> list[str]:
    """The NVIDIA GPUs that a command would see, found without JAX."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(folder.iterdir())))] if folder.is_dir() else []


def _start(job: Job, share: Share) -> subprocess.Popen:
    """Starts a job in its own session, so that Ctrl-C reaches only the sweep, which forwards it."""
    cores = ",".join(map(str, share.cores))
    wrapper = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), cores]
    with open(job.log, "a") as log:
        log.write(f"$ {shlex.join(job.command)}\n")
        log.flush()
        return subprocess.Popen(
            [*wrapper, *job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ, **share.environment},
            start_new_session=True,
        )


@contextlib.contextmanager
def _ending(running: dict[str, Any], patience: float = 60.0) -> Iterator[None]:
    """Context that ends all running commands on exit: SIGTERM to let them save, then SIGKILL."""
    try:
        yield
    finally:
        processes = [process for _, process, _ in running.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + patience
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.0))
            process.kill()
            process.wait()

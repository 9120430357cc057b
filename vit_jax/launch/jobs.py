"""What a launcher is given, and what it tells: jobs, and how they change.

A launcher is an iterator of what changes, so that another (a cluster's queue) is one class more.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

# What commands find in their environment, unless it says otherwise: large pages for large arrays.
# XLA's CPU backend takes its memory anew each step, page by page (experiments/benchmarks).
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
STATES = ("waiting", "running", "finished", "failed", "stopped")


@dataclasses.dataclass(frozen=True)
class Job:
    """A point as a command, which writes to `log` and waits for the jobs named in `after`."""

    name: str
    command: tuple[str, ...]
    log: str
    after: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Change:
    """A job is now in `state`, one of STATES, perhaps as its command ended with `exit_code`.

    A command that a signal ended has 128 and the signal's number, as in a shell.
    """

    name: str
    state: str
    exit_code: int | None = None


@runtime_checkable
class Launcher(Protocol):
    """Runs jobs. `dry` says that nothing is run at all."""

    dry: bool

    def run(self, jobs: Sequence[Job]) -> Iterator[Change | None]:
        """Yields every change of a job, and None about every second, until all have ended.

        A job starts once those it is `after` are finished (one that is not among `jobs` is), and
        never if one of them failed. The order of `jobs` respects `after`. Closing the iterator
        stops what runs, unless the launcher's jobs outlive it.

        Raises:
          Stopped: SIGTERM or SIGINT came, and was passed on to what runs, or jobs outlive it.
        """
        ...

    def under_way(self, jobs: Sequence[Job]) -> set[str]:
        """The names of those jobs that outlived the sweep that started them; `run` takes them up.

        Raises:
          UserError: such a job runs another command.
        """
        ...


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Yields a function that says how often SIGTERM or SIGINT has come, at most once a second.

    timeout(1) sends two at once: one to its child, one to the group that this is in.
    """
    count, latest = 0, float("-inf")
    if threading.current_thread() is not threading.main_thread():  # such as in some notebooks
        yield lambda: 0
        return

    def note(number, frame):
        nonlocal count, latest
        if time.monotonic() - latest > 1.0:
            count, latest = count + 1, time.monotonic()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

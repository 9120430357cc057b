"""The interface of launchers: jobs, and changes of their states.

A launcher is an iterator over changes; support for another cluster is one more class.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

# Default environment of commands: huge pages for large arrays, as XLA's CPU backend allocates its
# memory again in each step, page by page (experiments/benchmarks).
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
STATES = ("waiting", "running", "finished", "failed", "stopped")


@dataclasses.dataclass(frozen=True)
class Job:
    """A sweep point as a command; it writes to `log` and waits for the jobs named in `after`."""

    name: str
    command: tuple[str, ...]
    log: str
    after: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Change:
    """A job's new `state`, one of STATES, with its command's `exit_code` if it ended.

    The exit code of a command ended by a signal is 128 plus the signal's number, as in a shell.
    """

    name: str
    state: str
    exit_code: int | None = None


@runtime_checkable
class Launcher(Protocol):
    """Runs jobs. With `dry`, nothing is run."""

    dry: bool

    def run(self, jobs: Sequence[Job]) -> Iterator[Change | None]:
        """Yields every change of a job, and None about every second, until all have ended.

        A job starts once the jobs in its `after` are finished (those not among `jobs` count as
        finished), and never if one of them failed. `jobs` are in an order that respects `after`.
        Closing the iterator stops running jobs, unless they outlive the launcher.

        Raises:
          Stopped: SIGTERM or SIGINT came, and was passed on to running jobs, unless these outlive
            the launcher.
        """
        ...

    def under_way(self, jobs: Sequence[Job]) -> set[str]:
        """Names of the jobs still running after the sweep that started them; `run` continues them.

        Raises:
          UserError: such a job runs another command.
        """
        ...


def option(default: Any, metavar: str, help: str) -> Any:
    """A field of a launcher that a flag of `sweep` sets."""
    return dataclasses.field(default=default, metadata={"metavar": metavar, "help": help})


def options(launcher: Any) -> list[dataclasses.Field]:
    """The fields of a launcher that flags set."""
    return [field for field in dataclasses.fields(launcher) if field.metadata]


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Yields a function that counts SIGTERM and SIGINT, at most one a second.

    timeout(1) sends two at once: one to its child, and one to the process group.
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

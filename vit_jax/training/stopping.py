"""When a run saves by the clock and when it stops early; all processes decide the same."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from vit_jax import distributed

logger = logging.getLogger(__name__)


class SaveTimer:
    """Says after which steps a checkpoint is due by time: `minutes` (0: never) after the last one.

    Process 0 has the clock. The processes only meet at steps that it announces, of which there are
    a few between two checkpoints: the first step, then half of the steps that fit in the time left.
    """

    def __init__(self, minutes: float, step: int):
        self._seconds = minutes * 60
        self._next = step + 1  # the next step after which process 0 is asked
        self._saved = self._began = time.monotonic()
        self._first = step

    def due(self, step: int) -> bool:
        """Whether to save after `step`. Collective: to be called after every step."""
        if not self._seconds or step < self._next:
            return False
        saving, self._next = distributed.first("timer", lambda: self._decide(step))
        return saving

    def saved(self) -> None:
        """To be called after every checkpoint, whatever it was due by."""
        self._saved = time.monotonic()

    def _decide(self, step: int) -> list[Any]:
        now = time.monotonic()
        left = self._saved + self._seconds - now
        a_step = (now - self._began) / (step - self._first)
        ahead = 1 if distributed.count() == 1 else max(1, int(left / 2 / max(a_step, 1e-6)))
        return [left <= 0, step + ahead]


class Stop:
    """Says after which step a run has to save and stop, by SIGTERM or Ctrl-C.

    With several processes, it is the same step for all, whichever of them got the signal. The same
    signal a second time ends the process at once.

    Args:
      stack: restores the signals' handlers.
    """

    def __init__(self, stack: contextlib.ExitStack):
        self._stack = stack
        self._came: set[int] = set()
        if distributed.count() == 1:  # otherwise JAX notes it (see distributed.preempted)
            self._note(signal.SIGTERM, signal.SIG_DFL)

    def on_ctrl_c(self) -> None:
        """Lets Ctrl-C save from now on; before, there is nothing to save."""
        self._note(signal.SIGINT, signal.default_int_handler if _interactive() else signal.SIG_DFL)

    def __call__(self, step: int) -> str | None:
        """What asks to stop after `step`, "SIGTERM" or "Ctrl-C". Collective: after every step."""
        interrupted = signal.SIGINT in self._came
        if distributed.count() > 1:
            if not distributed.preempted(step):
                return None
            interrupted = "yes" in distributed.gather("stop", "yes" if interrupted else "no")
        elif not self._came:
            return None
        return "Ctrl-C" if interrupted else "SIGTERM"

    def _note(self, number: int, again: Any) -> None:
        if threading.current_thread() is not threading.main_thread():  # as in some notebooks
            return

        def note(*_: Any) -> None:
            self._came.add(number)
            signal.signal(number, again)
            if number == signal.SIGINT:
                logger.warning("stopping after this step; Ctrl-C again to stop at once")
                if distributed.count() > 1:
                    os.kill(os.getpid(), signal.SIGTERM)

        self._stack.callback(signal.signal, number, signal.signal(number, note))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Context in which Ctrl-C ends the process at once, even while XLA compiles.

    Python's own handler would wait until XLA returns. A notebook or an interactive Python keeps it.
    """
    if _interactive() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interactive() -> bool:
    """Whether there is a user's session that must outlive the run, such as a notebook's."""
    return hasattr(sys, "ps1")

"""Multi-process runs: how processes join, synchronise, and end together.

With one process everything here is free. Functions marked "collective" must be called by every
process with the same name, in the same order for one name, and must not wait for one another.

What JAX does by itself when a process is lost (0.10 to 0.12): a CPU collective (gloo) raises within
milliseconds, one on a GPU or TPU may hang. The coordinator notices a missing heartbeat only after
its timeout. Then, or if the coordinator itself is lost or unreachable at the start, C++ aborts
every process with a stack trace, before Python can react (there is a callback, but it cannot be
called from Python). So each process tells the others through the coordinator that it is alive, or
why it ends. Our message precedes the abort, unless the coordinator's own process is lost.
"""

import collections
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from vit_jax.errors import Unreachable, UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")

JOIN_TIMEOUT = 300  # seconds that a process waits for all others to start
PEER_TIMEOUT = 60  # seconds within which the loss of a process ends all others
LOST = 75  # exit code: a process is gone, or never came; starting again helps (sysexits' TEMPFAIL)
_FOREVER = 7 * 24 * 3600 * 1000  # ms; the watch, not a barrier, notices who will never come

_turns: collections.Counter[str] = collections.Counter()


def _runtime() -> Any:
    # Private: JAX has no public way to send text to other processes, or to get this process's index
    # without touching a device.
    from jax._src import distributed

    return distributed.global_state


def count() -> int:
    """The number of processes."""
    return _runtime().num_processes


def index() -> int:
    """The index of this process, from 0."""
    return _runtime().process_id


def is_lead() -> bool:
    """Whether this is process 0, which writes logs and holds the run folder's lock."""
    return index() == 0


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    join_timeout: int = JOIN_TIMEOUT,
    preemptible: bool = True,
) -> None:
    """Joins the other processes, if any; to be called before a device is touched.

    Without arguments JAX detects TPU pods, GKE, Slurm and Open MPI; elsewhere nothing happens. A
    process that has not joined within `join_timeout` seconds ends with a message and the exit code
    LOST.

    Args:
      coordinator: HOST:PORT of process 0, with `processes` and `process_id`, or none of them;
        `processes=1` by itself runs alone, whatever JAX would detect.
      preemptible: whether SIGTERM only makes `preempted` true, on every process.

    Raises:
      UserError: only some of the three, or inconsistent numbers; process 0 cannot listen.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    if (coordinator, processes, process_id) == (None, None, None):
        address, n, i, local_devices = _detect(join_timeout)
    else:
        _check(coordinator, processes, process_id)
        address, n, i, local_devices = coordinator, processes, process_id, None
    if address is None or n is None or i is None or n == 1:
        return
    if any(name.lower().endswith("_proxy") for name in os.environ):  # none is meant for this
        os.environ["no_grpc_proxy"] = address.rpartition(":")[0]
        jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_enable_preemption_service", preemptible)
    timeout = float(os.environ.get("VIT_JAX_PEER_TIMEOUT", PEER_TIMEOUT))
    _speak_at_abort()
    # JAX would abort at its own timeout, so ours comes first.
    timer = threading.Timer(join_timeout, _never_joined, (address, n, i, join_timeout))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address,
            n,
            i,
            local_devices,
            initialization_timeout=join_timeout + 30,
            heartbeat_timeout_seconds=max(int(timeout), 1),
            shutdown_timeout_seconds=max(int(timeout), 1),
        )
    except RuntimeError as error:
        raise UserError(
            f"process {i} could not join the others at {address} ({error}): is the port in use?"
        ) from None
    finally:
        timer.cancel()
    global _watch
    _watch = _Watch(timeout)


def _detect(timeout: int) -> tuple[str | None, int | None, int | None, Any]:
    """The cluster that JAX detects: coordinator address, process count, process id, devices."""
    # Private: `initialize` also detects it, but makes even a single process listen on a port.
    from jax._src.clusters import ClusterEnv

    try:
        with warnings.catch_warnings(action="ignore"):  # of a package that Kubernetes would need
            return ClusterEnv.auto_detect_unset_distributed_params(*[None] * 5, timeout)
    except Exception as error:
        raise UserError(
            f"this is a cluster, but JAX cannot read its settings ({error}): give --coordinator, "
            "--processes and --process-id, or --processes=1 to run alone"
        ) from error


def _check(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    if processes == 1 and coordinator is None and process_id in (None, 0):
        return
    if coordinator is None or processes is None or process_id is None:
        raise UserError(
            "--coordinator, --processes and --process-id belong together: give all three, or none "
            "where JAX finds the other processes itself (TPU pods, GKE, Slurm, Open MPI)"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator is {coordinator!r}; expected HOST:PORT, as 10.0.0.1:1234")
    if processes < 1 or not 0 <= process_id < processes:
        raise UserError(
            f"--process-id is {process_id} and --processes {processes}; expected 0 to "
            f"{max(processes, 1) - 1}, another one for each process"
        )


def _never_joined(address: str, n: int, i: int, seconds: float) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        reason = f"not all {n} processes came to the coordinator {address} within {seconds} s"
        reason += f" (this is process {i}): start them all, each with another --process-id"
    except OSError as error:
        reason = (
            f"process {i} could not reach the coordinator {address} within {seconds} s: {error}"
        )
        reason += "; is process 0 running there?"
    _end(LOST, reason)


def meet() -> None:
    """Logs, on process 0, a line for each process: host, pid, devices. Collective.

    To be called before anything is compiled.
    """
    import jax

    if jax.process_count() != count():
        raise UserError(
            f"JAX sees {jax.process_count()} processes, which have not been joined: call "
            "vit_jax.distributed.connect() before a device is touched"
        )
    if count() == 1:
        return
    mine = jax.local_devices()
    if mine[0].platform == "cpu":
        # On CPUs only process 0 ever finds a program in the cache, and what it then starts waits at
        # most 30 s, fixed in C++, for the others, which are still compiling.
        jax.config.update("jax_enable_compilation_cache", False)
    devices = f"{len(mine)} x {mine[0].device_kind}, ids {', '.join(str(d.id) for d in mine)}"
    lines = gather("table", f"{socket.gethostname()}, pid {os.getpid()}, {devices}")
    if is_lead():
        for i, line in enumerate(lines):
            logger.info("process %d of %d: %s", i, count(), line)


def gather(name: str, value: str) -> list[str]:
    """Returns every process's text, in process order. Collective; touches no device."""
    if count() == 1:
        return [value]
    client, turn = _runtime().client, _turns[name]
    _turns[name] += 1
    folder = f"vit_jax/{name}/{turn}/"
    client.key_value_set(f"{folder}{index():09}", value)
    client.wait_at_barrier(folder, _FOREVER)
    if is_lead() and turn:  # all have read the turn before: they are in this one
        client.key_value_delete(f"vit_jax/{name}/{turn - 1}/")
    return [value for _, value in sorted(client.key_value_dir_get(folder))]


def first(name: str, make: Callable[[], T]) -> T:
    """Runs `make` on process 0; all get its value (JSON types), or its UserError. Collective."""
    if count() == 1:
        return make()
    value, error = None, None
    if is_lead():
        try:
            value = make()
        except UserError as raised:
            error = [raised.code, str(raised)]
    value, error = json.loads(gather(name, json.dumps([value, error]))[0])
    if error is not None:
        raise _of_code(*error)
    return value


def _of_code(code: int, text: str) -> UserError:
    return Unreachable(text) if code == Unreachable.code else UserError(text)


def each(name: str, make: Callable[[], T]) -> T:
    """Runs `make` on every process; all raise the UserError that any of them raised. Collective.

    `make` must not be collective itself, as a process that raises would not take part.
    """
    if count() == 1:
        return make()
    value, error = None, None
    try:
        value = make()
    except UserError as raised:
        error = [raised.code, str(raised)]
    errors = [json.loads(each) for each in gather(name, json.dumps(error))]
    if any(errors):
        who, (code, text) = next((i, error) for i, error in enumerate(errors) if error)
        where = (
            ""
            if all(error == errors[0] for error in errors)
            else f" (on process {who} of {count()} only)"
        )
        raise _of_code(code, f"{text}{where}")
    return value


def preempted(step: int) -> bool:
    """Whether any process got SIGTERM, and all have to save `step` and stop.

    To be called by every process after each step; it does not wait for the others. After it has
    returned True, another SIGTERM ends the process at once.
    """
    from jax.experimental import multihost_utils

    reached = multihost_utils.reached_preemption_sync_point(step)
    if reached:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return reached


# How processes end. -----------------------------------------------------------------------------


def _advice() -> str:
    return "start the same command again"


_watch: "_Watch | None" = None
_ending = threading.Lock()


def alone() -> bool:
    """Whether this process runs without others, or has left them."""
    return _watch is None


@contextlib.contextmanager
def advising(advice: Callable[[], str]) -> Iterator[None]:
    """Context in which `advice()` is what to tell the user when a process is lost."""
    global _advice
    before, _advice = _advice, advice
    try:
        yield
    finally:
        _advice = before


def leave(code: int, message: str = "") -> None:
    """Prints `message`, and ends all processes with `code`; a single process only prints.

    With the code 0 or 143 nothing is ended, as every process gets here by itself.
    """
    if _watch is not None and code not in (0, 143):
        _watch.leave(code, message)
    if _watch is not None:
        _watch.stop()
    if message:
        print(message, file=sys.stderr)


def explain(error: BaseException) -> None:
    """Ends this process with a message if `error` is a consequence of another process's loss.

    A collective operation may fail long before it is known which process was lost, so this waits
    for the watch to find out.
    """
    causes = ("Gloo", "NCCL", "coordination", "Connection", "Socket", "UNAVAILABLE", "heartbeat")
    known = isinstance(error, UserError) or not any(cause in str(error) for cause in causes)
    if _watch is None or known:
        return
    _watch.hurry.set()
    time.sleep(_watch.timeout)  # the watch ends the process meanwhile
    reason = str(error).split("\n")[0][:300]
    _watch.leave(LOST, f"error: the processes lost their connection ({reason}); {_advice()}")


class _Watch:
    """Heartbeat thread: tells the others that this process is alive, and ends it when one is lost.

    A process counts as lost when its mark has not changed for 0.8 of `timeout` seconds, or, once a
    collective operation has failed, for a quarter of it.
    """

    def __init__(self, timeout: float):
        self.timeout, self.hurry = timeout, threading.Event()
        self._period = timeout / 12
        self._late: list[int] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops the heartbeat, so that the others do not count this process as lost."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            self._mark("left")

    def leave(self, code: int, message: str) -> NoReturn:
        """Ends this process and, through its mark, the others; process 0, the coordinator, last."""
        _ending.acquire()  # only one thread speaks, and none goes on
        message = message or f"process {index()} was interrupted"
        with contextlib.suppress(Exception):
            print(message, file=sys.stderr, flush=True)
            sys.stdout.flush()
        with contextlib.suppress(Exception):  # the coordinator may be what is gone
            self._mark(json.dumps([code, message]))
            deadline = time.monotonic() + 3 * self._period
            while is_lead() and time.monotonic() < deadline:
                if not any(mark.isdigit() for i, mark in self._marks() if i not in self._late):
                    break
                time.sleep(self._period / 20)
        os._exit(code)

    def _mark(self, mark: str) -> None:
        _runtime().client.key_value_set(f"vit_jax/alive/{index()}", mark, allow_overwrite=True)

    def _marks(self) -> list[tuple[int, str]]:
        marks = _runtime().client.key_value_dir_get("vit_jax/alive/")
        return [(int(key.rpartition("/")[2]), mark) for key, mark in marks]

    def _run(self) -> None:
        began, beat = time.monotonic(), 0
        seen = {i: ("", began) for i in range(count())}
        while not self._stopped.is_set():
            try:
                self._mark(str(beat))
                marks = self._marks()
            except Exception as error:  # noqa: BLE001
                logger.debug("%s", error)
                self.leave(
                    LOST, f"error: process 0, which held the run together, is gone; {_advice()}"
                )
            now, beat = time.monotonic(), beat + 1
            for i, mark in marks:
                if mark.startswith("["):
                    self.leave(*json.loads(mark))
                if mark != seen[i][0]:
                    seen[i] = mark, now
            limit = self.timeout * (0.25 if self.hurry.is_set() else 0.8)
            self._late = [
                i for i, (mark, at) in seen.items() if mark != "left" and now - at > limit
            ]
            if self._late:
                who = ", ".join(map(str, self._late))
                self.leave(
                    LOST,
                    f"error: process {who} of {count()} is gone (no sign of life for {limit:.0f} "
                    f"s); {_advice()}",
                )
            # Only `stop` interrupts this sleep: looking early would make the others seem late.
            self._stopped.wait(self._period)


def _end(code: int, sentence: str) -> NoReturn:
    _ending.acquire()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(code)


def _speak_at_abort() -> None:
    """Adds a message and our exit code when C++ aborts this process.

    The handler runs in whichever C++ thread aborts, where one of Python's would never run.
    """

    def aborted(_: int) -> None:
        if _ending.acquire(blocking=False):
            reason = "JAX ended this process (see above), most likely as process 0 is gone"
            if _watch is None:
                reason = (
                    "JAX could not join the processes (see above); has each its own --process-id?"
                )
            os.write(2, f"error: {reason}; {_advice()}\n".encode())
        os._exit(LOST)

    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)  # kept, as C holds no reference
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


_handler: Any = None

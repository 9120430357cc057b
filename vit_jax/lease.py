"""A lease on a folder in a bucket: who may write there, by conditional writes and a heartbeat."""

import contextlib
import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError
from vit_jax.objects import Objects

logger = logging.getLogger(__name__)

STALE = 60.0  # seconds without a heartbeat after which another run may take the lease
_LEASE = ".lease"


class Taken(UserError):
    """Another process has the lease."""


class Lease:
    """The right to write to a folder, or a part of it, kept by a heartbeat in its context.

    A lease is stale when its object has not changed for STALE seconds of the waiting process's own
    clock, or at once if its owner was a process of this machine that is gone.

    Args:
      name: of its object in the folder.
    """

    def __init__(self, url: str, stale: float = STALE, name: str = _LEASE):
        self.at_each_beat: Callable[[], None] = lambda: None
        self.stale = stale
        self._name = name
        self._objects = Objects(url)
        self._me = {**_process(), "id": uuid.uuid4().hex[:8]}
        self._generation = Objects.MISSING
        self._seen: tuple[bytes, float] | None = None  # the generation of another's, since when
        self._content: bytes | None = None
        self._renewed = (-math.inf, -math.inf)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def id(self) -> str:
        """A name of this lease that no other has."""
        return self._me["id"]

    @property
    def owner(self) -> str:
        """Who had the lease at the last look; "" if nobody had."""
        return "" if _free(self._content) else _who(self._content)

    def __enter__(self) -> "Lease":
        told = False
        while not self._take():
            if self._alive:
                raise self._taken()
            if not told:
                told = True
                logger.info(
                    "%s was in use by %s: waiting up to %.0f s for a sign of life",
                    *(self._objects.url, self.owner, self.stale),
                )
            time.sleep(self.stale / 30)
        return self

    @contextlib.contextmanager
    def if_free(self) -> Iterator[bool]:
        """Context that takes the lease if it can be had at once; yields whether it was.

        That an owner is silent takes several looks to see, by the same object.
        """
        mine = self._take()
        try:
            yield mine
        finally:
            if mine:
                self.__exit__()

    def _take(self) -> bool:
        """Takes the lease if it is free, or if its owner was silent for long; begins to beat."""
        self._content, generation = self._objects.read(self._name)
        now = time.monotonic()
        self._alive = self._seen is not None and self._seen[0] != generation
        if self._seen is None or self._alive:
            self._seen = generation, now
        if not _free(self._content):
            if now - self._seen[1] <= self.stale:
                return False
            logger.warning("%s: %s is silent and loses it", self._objects.url, self.owner)
        if not self._write(generation):
            self._content = self._objects.read(self._name)[0]
            self._alive = True
            return False
        self._thread.start()
        return True

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(UserError):
            self._write(self._generation, released=True)

    def confirm(self, within: float = 0.0) -> None:
        """Renews the lease, unless that was done in the last `within` seconds.

        Nobody can take it for `stale` seconds after: to pass over that is as safe as to renew it.

        Raises:
          Taken: another process has it.
          Unreachable: the store does not answer.
        """
        with self._lock:
            now = _clocks()
            past = [after - before for after, before in zip(now, self._renewed, strict=True)]
            if max(past) < within:  # one of the clocks stands still in a suspended machine
                return
            if self._write(self._generation):
                self._renewed = now
                return
            # Of a beat that seemed to fail, the store may have got all but sent the answer.
            self._content, generation = self._objects.read(self._name)
            if _owner(self._content).get("id") != self.id or not self._write(generation):
                raise self._taken()
            self._renewed = now

    def _write(self, generation: bytes, **more: Any) -> bool:
        # The time makes each beat another content, so that no retry is taken for another's write.
        content = json.dumps({**self._me, "time": time.time(), **more}).encode()
        made = self._objects.write(self._name, content, generation)
        self._generation = self._generation if made is None else made
        return made is not None

    def _beat(self) -> None:
        beside = threading.Thread()  # what takes long must not delay the next beat
        while not self._over.wait(self.stale / 4):
            if self._warned(self.confirm) and not beside.is_alive():
                beside = threading.Thread(target=self._warned, args=(self.at_each_beat,))
                beside.start()
        if beside.ident is not None:
            beside.join()

    def _warned(self, work: Callable[[], None]) -> bool:
        """Whether it succeeds; the next save raises what is wrong, if it still is."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the beats go on
            logger.warning("%s", error)
            return False
        return True

    def _taken(self) -> "Taken":
        if self._content is None:
            return Taken(f"{self._objects.url}/{self._name} was deleted by somebody else")
        return Taken(
            f"{self._objects.url} is in use by {_who(self._content)}: wait for it to end, or name "
            "another --workdir"
        )


def _clocks() -> tuple[float, float]:
    return time.monotonic(), time.time()


def _process() -> dict[str, Any]:
    """This process, as other ones on this machine can look for it."""
    try:  # the same numbers mean the same processes within a boot, and a namespace of a container
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = uuid.uuid4().hex
    return {
        "host": os.uname().nodename,
        "machine": machine,
        "process": os.getpid(),
        "born": _born(os.getpid()),
        "since": time.ctime(),
    }


def _born(process: int) -> str | None:
    """When a process of this machine began, in ticks since boot; None if there is none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _owner(content: bytes | None) -> dict[str, Any]:
    try:
        return dict(json.loads(content or b"{}"))
    except (ValueError, TypeError):
        return {}


def _free(content: bytes | None) -> bool:
    """Whether a lease is nobody's, or that of a process of this machine that is gone."""
    owner, me = _owner(content), _process()
    if content is None or owner.get("released"):
        return True
    here = owner.get("machine") == me["machine"] and owner.get("host") == me["host"]
    return here and _born(int(owner.get("process", 0))) != owner.get("born")


def _who(content: bytes | None) -> str:
    owner = _owner(content)
    names = (owner.get(name, "?") for name in ("process", "host", "since"))
    return "process {} on {} since {}".format(*names)


def held(url: str) -> bool:
    """Whether somebody writes in a folder, by the time of the last heartbeat."""
    content = Objects(url).read(_LEASE)[0]
    return not _free(content) and time.time() - _owner(content).get("time", 0) < 2 * STALE

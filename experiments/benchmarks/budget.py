"""Runs jobs one after another within a time, and keeps on disk whatever they have found so far.

Each job is a process with a group of its own, so that one that crashes, hangs or outlasts the time
takes nothing else along, and leaves nothing running. This file imports nothing that is slow to
import: what is imported before it counts against no one's time.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
PATIENCE = 3  # times its estimate may a job take, and
LEAST = 60  # seconds in any case, before it is taken to hang


@dataclasses.dataclass(frozen=True)
class Job:
    """A function that yields rows, and about how many seconds it needs.

    The function must be importable by name, as everything that goes to another process.
    """

    name: str
    estimate: float
    function: Callable[..., Iterator[dict[str, Any]]]
    args: tuple = ()


def run(jobs: Iterable[Job], rows: Path, deadline: float) -> dict[str, str]:
    """Runs the jobs that fit before the deadline, of `time.monotonic`; none outlives it.

    Returns why each job that did not end well did not: as it stands in `rows`, too.
    """
    failed: dict[str, str] = {}
    for job in jobs:
        left = deadline - time.monotonic()
        if job.estimate > left:
            why = f"it needs about {job.estimate:.0f} s, and {int(max(left, 0))} s are left"
            append(rows, {"job": job.name, "skipped": why})
        else:
            print(f"{time.monotonic() - BEGAN:4.0f} s: {job.name}", flush=True)
            why = _run(job, rows, min(left, max(PATIENCE * job.estimate, LEAST)))
        if why:
            print(f"{time.monotonic() - BEGAN:4.0f} s: {job.name}: {why}", flush=True)
            failed[job.name] = why
    return failed


def _run(job: Job, rows: Path, seconds: float) -> str | None:
    """Runs a job in a process; returns what went wrong."""
    count = len(read(rows))
    process = multiprocessing.get_context("spawn").Process(
        target=_work, args=(job, rows, os.getpid())
    )
    process.start()
    process.join(seconds)
    why = None
    if process.exitcode is None:
        why = f"stopped after {seconds:.0f} s"
    elif process.exitcode:
        why = f"its process ended with exit code {process.exitcode}"
    _kill(process)
    if why:
        append(rows, {"job": job.name, "error": why})
        return why
    return next((row["error"] for row in read(rows)[count:] if "error" in row), None)


def _kill(process: Any) -> None:
    """Ends a job and whatever it has started, and does not wait long for what cannot end."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # none is left, or it did not come so far as to have a group
        process.kill()
    process.join(1)


def _work(job: Job, rows: Path, parent: int) -> None:
    """What runs in a job's process."""
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    began = time.monotonic()

    def keep(row: dict[str, Any]) -> None:
        seconds = round(time.monotonic() - began, 1)
        append(rows, {"job": job.name, "job_seconds": seconds, **row})

    try:
        for row in job.function(*job.args):
            keep(row)
    except Exception as error:  # noqa: BLE001  a row like others; what is next may still run
        said = f"{type(error).__name__}: {error}".split("\n")[0]
        keep({"error": said, "details": traceback.format_exc()})


def _end_with(parent: int) -> None:
    """Nothing goes on when who started it was killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


def append(rows: Path, row: dict[str, Any]) -> None:
    """Adds a line of JSON."""
    before = rows.read_bytes() if rows.exists() else b""
    write(rows, before + json.dumps(row).encode() + b"\n")


def write(path: Path, content: bytes) -> None:
    """Writes a file so that, whenever this is killed, all of it is there or what was before."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def read(rows: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []

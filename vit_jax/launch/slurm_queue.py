"""Slurm's queue: the record of submitted jobs (jobs.json), squeue and scancel."""

import dataclasses
import getpass
import json
import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError
from vit_jax.writing import write_atomically

FOLDER = "slurm"  # in a sweep's folder
# squeue's states of jobs that will run, or run. A job in any other state has ended.
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"}


@dataclasses.dataclass(frozen=True)
class Queued:
    """A job in squeue; `name` is that of its array."""

    state: str = ""  # Slurm knows of no such job (any more)
    name: str = ""

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def runs(self) -> bool:
        return self.state in RUNNING


@dataclasses.dataclass
class Record:
    """The file jobs.json: submitted arrays, and each point's index in its array.

    A point is removed when its end was reported, an array when it has no points left.
    """

    folder: Path
    arrays: list[dict[str, Any]]

    @classmethod
    def read(cls, root: os.PathLike) -> "Record":
        """Reads the record in a sweep's folder; empty if there is none."""
        folder = Path(root) / FOLDER
        path = folder / "jobs.json"
        try:
            arrays = json.loads(path.read_text())["arrays"] if path.exists() else []
            return cls(folder, [{key: array[key] for key in _KEYS} for array in arrays])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is damaged or of another version ({error!r}): `scancel` the jobs of this "
                "sweep, and move it away"
            ) from None

    def find(self, queue: Mapping[str, Queued]) -> None:
        """Finds the ids of arrays by name, if the sweep was killed while submitting them."""
        numbers = {job.name: number.partition("_")[0] for number, job in queue.items()}
        for array in self.arrays:
            array["id"] = array["id"] or numbers.get(array["name"])
        self.arrays = [array for array in self.arrays if array["id"]]

    def write(self) -> None:
        path = self.folder / "jobs.json"
        write_atomically(path, json.dumps({"arrays": self.arrays}, indent=1))

    def numbers(self) -> dict[str, str]:
        """The job id of each point, as "12_0"."""
        return {
            point: f"{array['id']}_{i}"
            for array in self.arrays
            for point, i in array["points"].items()
            if array["id"]
        }

    def forget(self, names: Iterable[str]) -> None:
        gone = set(names)
        for array in self.arrays:
            array["points"] = {name: i for name, i in array["points"].items() if name not in gone}
        self.arrays = [array for array in self.arrays if array["points"]]
        self.write()


_KEYS = ("name", "id", "points")


def queue() -> dict[str, Queued]:
    """Every job of this user by its id, including those that have just ended."""
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--states=all"]
    lines = ask([*command, "--format=%i|%T|%j"]).splitlines()
    fields = [line.strip().split("|", 2) for line in lines if line.count("|") >= 2]
    return {number: Queued(state, name) for number, state, name in fields}


def cancel(numbers: Sequence[str]) -> None:
    """Cancels jobs by id; jobs that have ended are ignored."""
    if numbers:
        subprocess.run(["scancel", "--quiet", *numbers], check=False, capture_output=True)


def ask(command: Sequence[str]) -> str:
    """Runs a Slurm command and returns its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"{command[0]} failed ({words}); the command was {shlex.join(command)}")
    return done.stdout

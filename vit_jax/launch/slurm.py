"""The points of a sweep as jobs of Slurm, which outlive the sweep that submitted them.

WORKDIR/slurm/NAME.sh    the job of a point; `sbatch NAME.sh` runs it by hand
WORKDIR/slurm/*.out      what Slurm itself said of jobs; NAME.log has what their commands said
WORKDIR/slurm/NAME.exit  what it ended with, written by the job, so that no accounting is needed
WORKDIR/slurm/_*.sh      an array of points that wait for the same
WORKDIR/slurm/jobs.json  which jobs are not yet accounted for in sweep.json

A run that saved and ended, for its time was up or others needed the node, is queued again by its
own job. Slurm itself queues again what it preempted or whose node is gone.
"""

import dataclasses
import getpass
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError
from vit_jax.launch.jobs import Change, Job, Stopped, signals

FOLDER = "slurm"
SAVING = 120  # seconds before its end that a job is told of it
ARRAY = 1000  # points an array; Slurm's own limit, unless configured otherwise, is 1001
DOWN = 600.0  # seconds that Slurm may not answer
# What squeue calls a job that will run, or runs. A job in any other state has ended.
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"}


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Submits jobs to Slurm and watches them; they outlive it, and it takes them up again.

    Points that wait for the same are one array, of which `jobs` run at a time.

    Args:
      nodes, tasks_per_node: of one point. Several tasks are one run; each takes one GPU, so of
        several nodes there is, unless said otherwise, a task for each. One task takes all GPUs.
      gpus_per_node: a number, perhaps after a kind, as `a100:4`.
      sbatch: further options of sbatch, as in a shell; they win over the others.
      poll: seconds between two looks at the queue.
      patience: seconds after a job's end that what it wrote may take to be seen here.
    """

    jobs: int | None = None
    partition: str | None = None
    nodes: int = 1
    tasks_per_node: int | None = None
    gpus_per_node: str | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    sbatch: str = ""
    poll: float = 10.0
    patience: float = 30.0

    dry = False

    def __post_init__(self):
        for name in ("jobs", "nodes", "tasks_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        for name in ("partition", "gpus_per_node", "time"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"\S+", value):
                raise UserError(f"--{name.replace('_', '-')} is {value!r}; expected one word")
        if self.gpus_per_node is not None and not re.search(r"(^|:)[1-9]\d*$", self.gpus_per_node):
            raise UserError(f"--gpus-per-node is {self.gpus_per_node!r}; expected 4, or a100:4")
        if self.sbatch and not re.fullmatch(r"-[^\n]*", self.sbatch.strip()):
            raise UserError(
                f"--sbatch is {self.sbatch!r}; expected sbatch's own options on one line, as "
                '--sbatch="--account=x --mem=8G"'
            )
        missing = [each for each in ("sbatch", "squeue") if shutil.which(each) is None]
        if missing:
            raise UserError(
                f"there is no {' and no '.join(missing)} here: the launcher 'slurm' must be "
                "started where Slurm's commands are"
            )

    def under_way(self, jobs: Sequence[Job]) -> set[str]:
        record = _Record.read(_folder(jobs), _queue) if jobs else _Record(Path(), [])
        names = set()
        for job in jobs:
            if job.name in record.ids():
                script = record.folder / f"{job.name}.sh"
                if not script.exists() or shlex.join(job.command) not in script.read_text():
                    number = record.ids()[job.name]
                    raise UserError(
                        f"job {number} of an earlier sweep in this --workdir runs {job.name} by "
                        f"another command (see {script}): `scancel {number}`, or name another "
                        "--workdir"
                    )
                names.add(job.name)
        return names

    def run(self, jobs: Sequence[Job]) -> Iterator[Change | None]:
        if not jobs:
            return
        folder = _folder(jobs)
        folder.mkdir(parents=True, exist_ok=True)
        with signals() as came:
            record = _Record.read(folder, _queue)
            record.keep({job.name for job in jobs})
            left = {job.name: job for job in jobs}
            failed: set[str] = set()
            # First what became of the jobs of an earlier sweep, while nobody looked.
            queue = _queue()
            for job in jobs:
                number = record.ids().get(job.name)
                if number is None:
                    continue
                code = _exit_code(folder, job.name)
                lost = any(name in left and name not in record.ids() for name in job.after)
                if queue.get(number, ("",))[0] in WAITING | RUNNING:
                    if not lost:
                        continue
                    _cancel([number])  # it waits for a job that is no more
                elif code is not None:
                    del left[job.name]
                    failed |= {job.name} if code else set()
                    yield Change(job.name, "failed" if code else "finished", code)
                record.keep(record.ids().keys() - {job.name})
            _drop(left, failed, record)
            self._submit([job for job in left.values() if job.name not in record.ids()], record)

            seen: dict[str, str] = {}
            gone_since: dict[str, float] = {}
            shown = looked = answered = time.monotonic()
            looked -= self.poll
            while left and not came():
                if time.monotonic() - looked < self.poll:
                    if time.monotonic() - shown > 1.0:
                        shown = time.monotonic()
                        yield None
                    time.sleep(min(self.poll, 0.1))
                    continue
                looked = time.monotonic()
                try:
                    queue = _queue()
                    answered = looked
                except UserError:
                    if looked - answered > DOWN:
                        raise
                    continue
                for name, number in record.ids().items():
                    if name not in left:
                        continue
                    state = queue.get(number, ("",))[0]
                    if state in WAITING | RUNNING:
                        state = "running" if state in RUNNING else "waiting"
                        gone_since.pop(name, None)
                        if state != seen.get(name, "waiting"):
                            yield Change(name, state)
                        seen[name] = state
                        continue
                    code = _exit_code(folder, name)
                    gone_since.setdefault(name, looked)
                    if code is None and looked - gone_since[name] < self.patience:
                        continue
                    job = left.pop(name)
                    if code is None:
                        _tell(job.log, f"error: job {number} is {state or 'gone'}, it did not end")
                    if code != 0:
                        failed.add(name)
                    yield Change(name, "failed" if code != 0 else "finished", code)
                    record.keep(record.ids().keys() - {name})
                    _drop(left, failed, record)
            if left:
                numbers = sorted({number.partition("_")[0] for number in record.ids().values()})
                raise Stopped(
                    f"no longer watched: {len(left)} jobs go on in Slurm. The same command watches "
                    f"them again, `scancel {' '.join(numbers)}` ends them"
                )

    def _submit(self, jobs: Sequence[Job], record: "_Record") -> None:
        """Submits jobs, as an array those that wait for the same."""
        arrays: dict[frozenset[str], list[Job]] = {}
        coming = {*record.ids(), *(job.name for job in jobs)}
        for job in jobs:
            arrays.setdefault(frozenset(coming & set(job.after)), []).append(job)
        for after, members in arrays.items():  # each comes after those that it waits for
            for start in range(0, len(members), ARRAY):
                self._submit_array(members[start : start + ARRAY], after, record)

    def _submit_array(self, jobs: list[Job], after: frozenset[str], record: "_Record") -> None:
        folder = record.folder
        name = f"{folder.parent.name}-{secrets.token_hex(3)}"
        lines = []
        for i, job in enumerate(jobs):
            (folder / f"{job.name}.exit").unlink(missing_ok=True)
            script = folder / f"{job.name}.sh"
            script.write_text(self.script(job, folder))
            lines.append(f"  {i}) exec bash {shlex.quote(str(script))} ;;")
        head = self._head(name, str(folder / f"_{name}_%a.out"))
        body = ['case "$SLURM_ARRAY_TASK_ID" in', *lines, "esac", ""]
        path = folder / f"_{name}.sh"
        path.write_text("\n".join([*head, *body]))
        limit = f"%{self.jobs}" if self.jobs else ""
        command = ["sbatch", "--parsable", f"--array=0-{len(jobs) - 1}{limit}"]
        if after:
            ids = record.ids()
            waits = ":".join(sorted(ids[each] for each in after))
            command += [f"--dependency=afterok:{waits}", "--kill-on-invalid-dep=yes"]
        # Before it is submitted, so that it is found if this process is killed meanwhile.
        record.arrays.append({"name": name, "id": None, "points": {}})
        record.arrays[-1]["points"] = {job.name: i for i, job in enumerate(jobs)}
        record.write()
        try:
            record.arrays[-1]["id"] = _ask([*command, str(path)]).strip().partition(";")[0]
        except UserError:
            del record.arrays[-1]
            raise
        finally:
            record.write()

    def script(self, job: Job, folder: Path) -> str:
        """The text of a job that runs `job`, by hand or in an array."""
        srun = ["srun", "--kill-on-bad-exit=0"]  # those that still save are not to be killed
        if self.cpus_per_task:
            srun.append(f"--cpus-per-task={self.cpus_per_task}")  # no longer inherited
        name, bin_folder = job.name, os.path.dirname(os.path.abspath(sys.executable))
        return SCRIPT.format(
            head="\n".join(self._head(name, str(folder / f"{name}.out"))),
            path=shlex.quote(bin_folder),
            log=shlex.quote(job.log),
            exit=shlex.quote(str(folder / f"{name}.exit")),
            command=f"{shlex.join(srun)} {shlex.join(job.command)}",
        )

    def _head(self, name: str, output: str) -> list[str]:
        tasks = self.tasks_per_node
        if tasks is None and self.nodes > 1 and self.gpus_per_node:
            tasks = int(self.gpus_per_node.rpartition(":")[2])
        options = {
            "job-name": name,
            "chdir": os.getcwd().replace("%", "%%"),
            "output": output,
            "partition": self.partition,
            "nodes": self.nodes,
            "ntasks-per-node": tasks or 1,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "signal": f"TERM@{SAVING}",
            "open-mode": "append",
        }
        lines = [
            f"#SBATCH --{option}={_quoted(str(value))}"
            for option, value in options.items()
            if value is not None
        ]
        more = [f"#SBATCH {self.sbatch.strip()}"] if self.sbatch else []
        return ["#!/bin/bash", *lines, "#SBATCH --requeue", *more]


SCRIPT = """{head}

PATH={path}:$PATH
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
rm -f {exit}
exec >>{log} 2>&1
echo "job $job on $SLURM_JOB_NODELIST, start $((${{SLURM_RESTART_COUNT:-0}} + 1))"
{command}
code=$?

# 143: it has saved. 75, and death by a signal: it may go better next time, but not for ever.
again=0
((code == 143)) && again=1
((code == 75 || code > 128)) && ((SECONDS > 600 || ${{SLURM_RESTART_COUNT:-0}} < 3)) && again=1
# What was cancelled is not running any more.
if ((again)) && [[ "$(scontrol show job --oneliner "$job")" == *" JobState=RUNNING "* ]]; then
  echo "exit code $code: queued again"
  scontrol requeue "$job" && exit "$code"
fi
echo "$code" >{exit}
exit "$code"
"""


@dataclasses.dataclass
class _Record:
    """The file jobs.json: the arrays that were submitted, and the index in them of each point.

    A point is taken out once its end was told; where this leaves none, so is the array.
    """

    folder: Path
    arrays: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, queue: Any) -> "_Record":
        """Reads it; `queue` says whether an array is there that may not have been submitted."""
        arrays = []
        if (folder / "jobs.json").exists():
            arrays = json.loads((folder / "jobs.json").read_text())["arrays"]
        if any(array["id"] is None for array in arrays):
            numbers = {name: number.partition("_")[0] for number, (_, name) in queue().items()}
            arrays = [{**each, "id": each["id"] or numbers.get(each["name"])} for each in arrays]
        return cls(folder, [array for array in arrays if array["id"] is not None])

    def write(self) -> None:
        path = self.folder / "jobs.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"arrays": self.arrays}, indent=1))
        os.replace(partial, path)

    def ids(self) -> dict[str, str]:
        """The job of each point, as "12_0"."""
        return {
            point: f"{array['id']}_{i}"
            for array in self.arrays
            for point, i in array["points"].items()
        }

    def keep(self, names: set[str]) -> None:
        for array in self.arrays:
            array["points"] = {name: i for name, i in array["points"].items() if name in names}
        self.arrays = [array for array in self.arrays if array["points"]]
        self.write()


def queued(root: os.PathLike) -> set[str]:
    """The names of the points that a sweep in this folder has given to Slurm."""
    return set(_Record.read(Path(root) / FOLDER, dict).ids())


def _folder(jobs: Sequence[Job]) -> Path:
    return Path(jobs[0].log).parent / FOLDER


def _drop(left: dict[str, Job], failed: set[str], record: _Record) -> None:
    """Takes out the jobs that are after a failed one. Slurm cancels them, if it does not yet know
    why, this does."""
    dropped: list[str] = []
    for name, job in list(left.items()):  # in an order that respects `after`
        if {*failed, *dropped} & set(job.after):
            dropped.append(name)
            del left[name]
    numbers = [number for name, number in record.ids().items() if name in dropped]
    if numbers:
        _cancel(numbers)
        record.keep(record.ids().keys() - set(dropped))


def _queue() -> dict[str, tuple[str, str]]:
    """The state and the name of every job of this user, of those that ended just now as well."""
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--states=all"]
    lines = _ask([*command, "--format=%i|%T|%j"]).splitlines()
    found = [line.strip().split("|", 2) for line in lines if line.count("|") >= 2]
    return {number: (state, name) for number, state, name in found}


def _cancel(numbers: list[str]) -> None:
    subprocess.run(["scancel", "--quiet", *numbers], check=False, capture_output=True)


def _ask(command: list[str]) -> str:
    """Runs a command of Slurm's and returns what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"{command[0]} failed ({' '.join(words) or f'exit code {done.returncode}'}); the "
            f"command was {shlex.join(command)}"
        )
    return done.stdout


def _exit_code(folder: Path, name: str) -> int | None:
    path = folder / f"{name}.exit"
    os.listdir(folder)  # makes NFS look again
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None


def _tell(log: str, line: str) -> None:
    with open(log, "a") as file:
        file.write(f"{line}\n")


def _quoted(text: str) -> str:
    """A value as sbatch reads it in a script."""
    if re.fullmatch(r"[\w./:@%=+,-]*", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

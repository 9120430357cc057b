"""Launches the points of a sweep as Slurm jobs, which outlive the sweep that submitted them.

WORKDIR/slurm/NAME.sh    the job of a point; `sbatch NAME.sh` runs it by hand
WORKDIR/slurm/*.out      Slurm's own output; NAME.log has that of the commands
WORKDIR/slurm/NAME.exit  its exit code, written by the job, so that no accounting is needed
WORKDIR/slurm/_*.sh      a job array of points that wait for the same points
WORKDIR/slurm/jobs.json  jobs that are not yet recorded in sweep.json

A run that saved and ended, due to its time limit or preemption, is requeued by its own job. Slurm
itself requeues jobs that it preempted or that lost their node.
"""

import dataclasses
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vit_jax.errors import Stopped, UserError
from vit_jax.launch.jobs import ENVIRONMENT, Change, Job, option, signals
from vit_jax.launch.slurm_queue import FOLDER, Queued, Record, ask, cancel, queue
from vit_jax.writing import write_atomically

SAVING = 120  # seconds before its end that a job is told of it
ARRAY = 1000  # points an array; Slurm's own limit, unless configured otherwise, is 1001
DOWN = 600.0  # seconds that Slurm may not answer


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Submits jobs to Slurm and watches them; they outlive this process, and can be taken up again.

    Points that wait for the same points are one job array, with `jobs` running at a time.

    Args:
      nodes, tasks_per_node: for one point. Several tasks are one run, with one GPU each; on several
        nodes the default is a task for each GPU. A single task takes all GPUs.
      gpus_per_node: a number, optionally with a type, as `a100:4`.
      sbatch: additional sbatch options, as in a shell; they override the others.
      poll: seconds between two looks at the queue.
      patience: seconds to wait after a job's end for its files to become visible here.
    """

    jobs: int | None = None
    partition: str | None = option(None, "NAME", "where to run")
    nodes: int = option(1, "N", "nodes of a point; several are one run (default 1)")
    tasks_per_node: int | None = option(
        None, "N", "processes (default: a GPU each on several nodes, otherwise 1)"
    )
    gpus_per_node: str | None = option(None, "[KIND:]N", "such as 8 or a100:4")
    cpus_per_task: int | None = option(None, "N", "cores of a process")
    time: str | None = option(None, "LIMIT", "as 8:00:00; a run that is longer is queued again")
    record: str | None = option(
        None, "DIR", "with a --workdir in a bucket: a shared folder for the jobs' scripts and logs"
    )
    sbatch: str = option("", "OPTIONS", 'more of sbatch: --sbatch="--account=x --mem=8G"')
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
        gpus, tasks = self._gpus(), self.tasks_per_node
        if gpus and tasks and self.nodes * tasks > 1 and tasks != gpus:
            raise UserError(
                f"--tasks-per-node is {tasks} and --gpus-per-node {self.gpus_per_node}: of several "
                f"tasks each takes one GPU, so expected {gpus}, or one task on one node"
            )
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

    def _gpus(self) -> int:
        """GPUs of a node."""
        return int((self.gpus_per_node or "0").rpartition(":")[2])

    def under_way(self, jobs: Sequence[Job]) -> set[str]:
        if not jobs:
            return set()
        record = Record.read(_root(jobs))
        if record.arrays:
            record.find(queue())
        numbers = record.numbers()
        for job in jobs:
            script = record.folder / f"{job.name}.sh"
            text = script.read_text() if script.exists() else ""
            if job.name in numbers and shlex.join(job.command) not in text:
                number = numbers[job.name]
                raise UserError(
                    f"job {number} of a sweep before this one runs {job.name} by another command "
                    f"(see {script}): `scancel {number}`, or name another --workdir"
                )
        return {job.name for job in jobs if job.name in numbers}

    def run(self, jobs: Sequence[Job]) -> Iterator[Change | None]:
        if not jobs:
            return
        record = Record.read(_root(jobs))
        record.folder.mkdir(parents=True, exist_ok=True)
        left = {job.name: job for job in jobs}
        with signals() as came:
            yield from self._take_up(left, record)
            self._submit([job for job in left.values() if job.name not in record.numbers()], record)
            yield from self._watch(left, record, came)
        if left:
            numbers = [number for name, number in record.numbers().items() if name in left]
            arrays = sorted({number.partition("_")[0] for number in numbers})
            raise Stopped(
                f"no longer watched: {len(left)} jobs go on in Slurm; the same command watches "
                f"them again, `scancel {' '.join(arrays)}` ends them"
            )

    def _take_up(self, left: dict[str, Job], record: Record) -> Iterator[Change | None]:
        """Yields what ended in the meantime, and forgets lost jobs, which are submitted again."""
        now = queue()
        record.find(now)
        for name, number in record.numbers().items():
            here = now.get(number, Queued())
            if name not in left and not here.waits and not here.runs:
                record.forget([name])
        for name, job in list(left.items()):  # in an order that respects `after`
            numbers = record.numbers()
            if name not in left or name not in numbers:
                continue
            here = now.get(numbers[name], Queued())
            if here.runs:
                continue
            if here.waits:
                if all(each in numbers for each in job.after if each in left):
                    continue
                cancel([numbers[name]])  # it waits for a job that is no more
            elif (code := _exit_code(record, name)) is not None:
                yield _ended(left, record, name, code)
            record.forget([name])

    def _watch(
        self, left: dict[str, Job], record: Record, came: Callable[[], int]
    ) -> Iterator[Change | None]:
        """Yields every change of the jobs in `left`, until there are none."""
        states = dict.fromkeys(left, "waiting")
        gone_since: dict[str, float] = {}
        looked, shown, answered = float("-inf"), float("-inf"), time.monotonic()
        while left and not came():
            if time.monotonic() - shown > 1.0:
                shown = time.monotonic()
                yield None
            if time.monotonic() - looked < self.poll:
                time.sleep(min(self.poll, 0.1))
                continue
            looked = time.monotonic()
            try:
                now = queue()
            except UserError:
                if looked - answered > DOWN:
                    raise
                continue
            answered = looked
            for name, number in record.numbers().items():
                here = now.get(number, Queued())
                if name not in left:  # after one that failed in this look
                    continue
                if here.waits or here.runs:
                    gone_since.pop(name, None)
                    state = "running" if here.runs else "waiting"
                    if state != states[name]:
                        states[name] = state
                        yield Change(name, state)
                    continue
                code = _exit_code(record, name)
                if code is None:
                    if looked - gone_since.setdefault(name, looked) < self.patience:
                        continue
                    with open(left[name].log, "a") as log:
                        log.write(
                            f"error: job {number} left no exit code: {here.state or 'gone'}\n"
                        )
                yield _ended(left, record, name, code)
                record.forget([name])

    def _submit(self, jobs: Sequence[Job], record: Record) -> None:
        """Submits jobs; those that wait for the same jobs are one array."""
        arrays: dict[tuple[str, ...], list[Job]] = {}
        coming = {*record.numbers(), *(job.name for job in jobs)}
        for job in jobs:
            after = tuple(sorted(coming & set(job.after)))
            arrays.setdefault(after, []).append(job)
        for after, members in arrays.items():  # each comes later than those that it waits for
            for start in range(0, len(members), ARRAY):
                self._submit_array(members[start : start + ARRAY], after, record)

    def _submit_array(self, jobs: Sequence[Job], after: Sequence[str], record: Record) -> None:
        folder = record.folder
        name = f"{folder.parent.name}-{secrets.token_hex(3)}"
        for job in jobs:
            (folder / f"{job.name}.exit").unlink(missing_ok=True)
            write_atomically(folder / f"{job.name}.sh", self.script(job))
        scripts = [shlex.quote(str(folder / f"{job.name}.sh")) for job in jobs]
        cases = [f"  {i}) exec bash {script} ;;" for i, script in enumerate(scripts)]
        path = folder / f"_{name}.sh"
        head = self._head(name, _literal(folder / f"_{name}_") + "%a.out")
        lines = [head, 'case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", ""]
        write_atomically(path, "\n".join(lines))

        limit = f"%{self.jobs}" if self.jobs else ""
        command = ["sbatch", "--parsable", f"--array=0-{len(jobs) - 1}{limit}"]
        if after:
            numbers = record.numbers()
            waits = ":".join(numbers[each] for each in after)
            command += [f"--dependency=afterok:{waits}", "--kill-on-invalid-dep=yes"]
        # Recorded before submission, so that the array is found if this process is killed.
        array = {"name": name, "id": None, "points": {job.name: i for i, job in enumerate(jobs)}}
        record.arrays.append(array)
        record.write()
        try:
            array["id"] = ask([*command, str(path)]).strip().partition(";")[0]
        except UserError:
            record.arrays.remove(array)
            raise
        finally:
            record.write()

    def script(self, job: Job) -> str:
        """The batch script of a job, in an array or submitted by hand."""
        folder = _root([job]) / FOLDER
        srun = ["srun", "--kill-on-bad-exit=0"]  # those that still save are not to be killed
        if self.cpus_per_task:
            srun.append(f"--cpus-per-task={self.cpus_per_task}")  # no longer inherited
        return SCRIPT.format(
            head=self._head(job.name, _literal(folder / f"{job.name}.out")),
            path=shlex.quote(os.path.dirname(os.path.abspath(sys.executable))),
            exports="\n".join(f"export {k}=${{{k}-{v}}}" for k, v in ENVIRONMENT.items()),
            log=shlex.quote(job.log),
            exit=shlex.quote(str(folder / f"{job.name}.exit")),
            command=f"{shlex.join(srun)} {shlex.join(job.command)}",
        )

    def _head(self, name: str, output: str) -> str:
        options = {
            "job-name": name,
            "chdir": os.getcwd(),
            "output": output,
            "partition": self.partition,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node or (self._gpus() if self.nodes > 1 else 0) or 1,
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
        return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", *more])


SCRIPT = """{head}

PATH={path}:$PATH
{exports}
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


def _root(jobs: Sequence[Job]) -> Path:
    return Path(jobs[0].log).parent


def _ended(left: dict[str, Job], record: Record, name: str, code: int | None) -> Change:
    """Removes a job, and if it failed, the jobs after it, from `left`; returns the change."""
    del left[name]
    if code == 0:
        return Change(name, "finished", code)
    dropped = {name}
    for job in list(left.values()):  # in an order that respects `after`
        if dropped & set(job.after):
            dropped.add(job.name)
            del left[job.name]
    dropped.remove(name)
    cancel([number for each, number in record.numbers().items() if each in dropped])
    record.forget(dropped)
    return Change(name, "failed", code)


def _exit_code(record: Record, name: str) -> int | None:
    os.listdir(record.folder)  # makes NFS look again
    path = record.folder / f"{name}.exit"
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None


def _literal(path: Path) -> str:
    """Escapes a path for sbatch, which replaces patterns with %."""
    return str(path).replace("%", "%%")


def _quoted(text: str) -> str:
    """Quotes a value for sbatch in a script."""
    if re.fullmatch(r"[\w./:@%=+,-]*", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

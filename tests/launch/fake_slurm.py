"""Stands for Slurm's commands, whichever it is called as: one node that runs all jobs at once.

FAKE_SLURM is a folder: N_I.json is a task of an array. A process of its own runs each, waits for
what it depends on, and runs it again where it was queued again. What is in `refuse` is said by
sbatch, `asked` has the lines of its calls.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(os.environ["FAKE_SLURM"])


def read(number):
    while True:
        try:
            return json.loads((ROOT / f"{number}.json").read_text())
        except ValueError:
            time.sleep(0.001)


def change(number, **fields):
    path = ROOT / f"{number}.json"
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({**(read(number) if path.exists() else {}), **fields}))
    os.replace(partial, path)


def running(array):
    return sum(read(path.stem)["state"] == "RUNNING" for path in ROOT.glob(f"{array}_*.json"))


def run_task(number, script, waits, limit):
    array, _, index = number.partition("_")
    while waits:
        states = [read(each)["state"] for each in waits]
        if {"FAILED", "CANCELLED"} & set(states):
            change(number, state="CANCELLED")
        if read(number)["state"] == "CANCELLED":
            return
        if set(states) == {"COMPLETED"}:
            break
        time.sleep(0.005)
    while limit and any(read(f"{array}_{i}")["state"] == "PENDING" for i in range(int(index))) | (
        running(array) >= limit
    ):
        time.sleep(0.005)
    for start in range(99):
        env = {**os.environ, "SLURM_JOB_ID": f"9{array}{index}", "SLURM_JOB_NODELIST": "n1"}
        env |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index}
        env["SLURM_RESTART_COUNT"] = str(start)
        if start == 0:
            del env["SLURM_RESTART_COUNT"]
        process = subprocess.Popen(["bash", script], env=env, start_new_session=True)
        change(number, state="RUNNING", pid=process.pid)
        code = process.wait()
        if read(number)["state"] == "CANCELLED":
            return
        if not (ROOT / f"{number}.again").exists():
            break
        (ROOT / f"{number}.again").unlink()
        change(number, state="PENDING")
        while (ROOT / "full").exists():
            time.sleep(0.005)
    change(number, state="FAILED" if code else "COMPLETED")


def sbatch(*arguments):
    with open(ROOT / "asked", "a") as file:
        file.write(" ".join(arguments) + "\n")
    if (ROOT / "refuse").exists():
        sys.exit((ROOT / "refuse").read_text())
    options = dict(each[2:].partition("=")[::2] for each in arguments[:-1])
    lines = pathlib.Path(arguments[-1]).read_text().splitlines()
    name = next(line.partition("=")[2] for line in lines if "--job-name" in line)
    array = str(1 + len(list(ROOT.glob("*_0.json"))))
    span, _, limit = options["array"].partition("%")
    waits = options.get("dependency", "").split(":")[1:]
    for i in range(int(span.partition("-")[2]) + 1):
        change(f"{array}_{i}", state="PENDING", name=name)
    for i in range(int(span.partition("-")[2]) + 1):
        task = [f"{array}_{i}", arguments[-1], ",".join(waits), limit]
        command = [sys.executable, "-I", "-S", __file__, "run_task", *task]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen(command, start_new_session=True, **quiet)
    print(array)


def squeue(*arguments):
    if (ROOT / "down").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
    for path in sorted(ROOT.glob("*_*.json")):
        job = read(path.stem)
        print(f"{path.stem}|{job['state']}|{job['name']}")


def scontrol(verb, *arguments):
    if verb == "show":
        print(f"JobId=9 ArrayJobId=1 JobState={read(arguments[-1])['state']} Reason=None Requeue=1")
    else:
        (ROOT / f"{arguments[-1]}.again").touch()


def scancel(*arguments):
    for number in arguments:
        if "_" in number:
            job = read(number)
            change(number, state="CANCELLED")
            if job["state"] == "RUNNING":
                os.killpg(job["pid"], signal.SIGKILL)


def srun(*arguments):
    command = [each for each in arguments if not each.startswith("--kill") and "-per-" not in each]
    os.execvp(command[0], command)


if sys.argv[1] == "run_task":
    number, script, waits, limit = sys.argv[2:]
    run_task(number, script, waits.split(",") if waits else [], int(limit or 0))
else:
    globals()[pathlib.Path(sys.argv[0]).name](*sys.argv[1:])

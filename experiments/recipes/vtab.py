"""Fine-tunes a model on VTAB-1k's 19 tasks, and prints their accuracies and means.

    python experiments/recipes/vtab.py B/16 --init-from=B_16.npz [--runs=runs/vtab] \\
        [--tasks=pets,dtd] [--config.KEY=VALUE ...]

Each task is one `python -m vit_jax train` command with configs/vtab.py, printed before it starts;
it goes on where it was stopped, and a finished one is not done again.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from vit_jax.data.forms.vtab import TASKS


def train(variant: str, task: str, workdir: Path, overrides: list[str]) -> float:
    """Runs the training command and returns the accuracy on the test images."""
    command = [
        sys.executable,
        "-m",
        "vit_jax",
        "train",
        f"--config=configs/vtab.py:{variant},{task}",
    ]
    command += [f"--workdir={workdir}", "--json", *overrides]
    print("\n$ python " + " ".join(command[1:]), flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # it saves, then ends
        out, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(out)["test/accuracy"]


def table(scores: dict[str, float]) -> str:
    """A line a task, then the means of the groups and of all that were run."""
    lines = [f"{TASKS[task].group:12}  {task:22} {score:7.2%}" for task, score in scores.items()]
    groups = list(dict.fromkeys(TASKS[task].group for task in scores))
    for group in groups:
        mean = statistics.mean(scores[task] for task in scores if TASKS[task].group == group)
        lines.append(f"{group:12}  {'mean':22} {mean:7.2%}")
    return "\n".join([*lines, f"{'all':12}  {'mean':22} {statistics.mean(scores.values()):7.2%}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", help="such as B/16")
    parser.add_argument("--init-from", required=True, help="whatever vit_jax.load reads")
    parser.add_argument("--runs", type=Path, default=Path("runs/vtab"), help="where run folders go")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated; default all")
    args, overrides = parser.parse_known_args()
    tasks = args.tasks.split(",")
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"no task {', '.join(sorted(unknown))}; tasks are {', '.join(TASKS)}")
    overrides = [f"--config.init_from={args.init_from}", *overrides]
    print(table({task: train(args.variant, task, args.runs / task, overrides) for task in tasks}))


if __name__ == "__main__":
    main()

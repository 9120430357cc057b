"""Seconds that a run on a plain disk takes to start, to save and in all, beside another checkout.

    git worktree add /tmp/before COMMIT
    python experiments/benchmarks/disk.py /tmp/before [--rounds=10]

Both checkouts train the same tiny model of the digits, as `vit-jax train`, in turns: one is first
in even rounds, the other in odd ones. `start` is from the start of the process to the end of its
first step, with programs out of JAX's cache, which an uncounted round fills; `save` is the median
of a run's saves, from the call to the complete checkpoint; `processor` is the time of all threads,
which other programs of the machine disturb least. Needs the extra `demo`.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from input import device, spread

HERE = Path(__file__).resolve().parents[2]
FLAGS = [
    *("model.width=16", "model.depth=2", "model.mlp_dim=32", "model.num_heads=2"),
    *("batch_size=32", "total_steps=24", "eval.every=24", "checkpoint.every=2", "log.every=24"),
]
PROGRAM = """
import json, sys, time
began, found = float(sys.argv.pop(1)), {"save": []}
from vit_jax.__main__ import main
from vit_jax.checkpoints.store import Store
from vit_jax.training.metrics import Recorder
save, commit, step, starts = Store.save, Store._commit, Recorder.step, []
def timed_save(self, *args):
    self.wait()
    starts.append(time.time())
    return save(self, *args)
def timed_commit(self, *args):
    commit(self, *args)
    found["save"].append(time.time() - starts[-1])
def timed_step(self, *args):
    step(self, *args)
    found.setdefault("start", time.time() - began)
Store.save, Store._commit, Recorder.step = timed_save, timed_commit, timed_step
assert main(sys.argv[1:]) == 0
found["whole"], found["processor"] = time.time() - began, time.process_time()
print(json.dumps(found))
"""


def run(checkout: Path, folder: Path) -> dict[str, float]:
    """Seconds of one run: start, save (the median of its saves) and whole."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(folder / f"cache{abs(hash(checkout))}")}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        argv = ["train", f"--config={checkout}/configs/digits.py", f"--workdir={workdir}/run"]
        argv += [f"--config.{flag}" for flag in FLAGS]
        command = [sys.executable, "-c", PROGRAM, repr(time.time()), *argv]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "save": statistics.median(found["save"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", type=Path, help="the folder of another checkout")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    load, trees = os.getloadavg()[0], (HERE, args.other.resolve())
    found: dict[Path, list[dict[str, float]]] = {tree: [] for tree in trees}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, args.rounds):
            for tree in trees[:: 1 if number % 2 else -1]:
                seconds = run(tree, Path(folder))
                if number >= 0:
                    found[tree].append(seconds)
    print(f"{datetime.date.today()}, {device()}, load average {load:.1f} at the start,")
    print(f"{args.rounds} rounds; median (lowest-highest)\n")
    print("| seconds to | this tree | the other one | ratio of medians |\n|---|---|---|---|")
    for what in ("start", "save", "whole", "processor"):
        ours, others = ([each[what] for each in found[tree]] for tree in trees)
        ratio = statistics.median(ours) / statistics.median(others)
        print(f"| {what} | {spread(ours, '.3f')} | {spread(others, '.3f')} | {ratio:.3f} |")


if __name__ == "__main__":
    main()

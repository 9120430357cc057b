"""Images a second of the whole training program beside those of its parts, on one device.

    python experiments/benchmarks/loop.py                             # a CPU, about two minutes
    python experiments/benchmarks/loop.py --json=loop.json            # a GPU: B/16, bfloat16, 512

Takes turns, round after round: `step`, the compiled training step alone, on a batch of random
pixels that stays on the device; `reader`, the batches of JPEG files alone; `train`, the program
that users start (`vit_jax.training.loop.train`) on the same files, as its metrics.jsonl tells it;
and the same with every step logged. Ratios are taken within a round.

A run can be as fast as the slower of step and reader, its limit; on a CPU, where both need the same
cores, as fast as one after the other. Targets: 0.97 of the limit, and 0.97 of the speed where every
step is logged. Each run's first steps, in which it is compiled, are left out, and so is what the
program does not count as training: starting, and the checkpoint at the end.
"""

import argparse
import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from input import device, paths_of, spread, write_files

from vit_jax.data.pipeline import train_batches
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.models.config import CHOICES
from vit_jax.models.variants import variant
from vit_jax.training.config import Config
from vit_jax.training.config_file import load_config
from vit_jax.training.loop import train
from vit_jax.training.metrics import read_metrics
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import MeshConfig, make_mesh, to_devices
from vit_jax.training.state import make_state

CONFIG = Path(__file__).parents[2] / "configs" / "images.py"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "simplejpeg", "numpy")
WHOLE, EVERY = "train", "train, every step logged"
TARGET = 0.97


def config_of(args: argparse.Namespace, files: str, log_every: int) -> Config:
    """The run: `configs/images.py` without evaluation and, but for the last step, checkpoints."""
    flags = {
        "batch_size": args.batch_size,
        "total_steps": args.warmup + args.steps,
        "model.image_size": (args.image_size, args.image_size),
        "precision": args.dtype,
        "data.val": None,
        "data.workers": args.workers,
        "data.threads": args.threads,
        "log.every": log_every,
        "checkpoint.every": 0,
    }
    flags = [f"--config.{name}={value}" for name, value in flags.items()]
    return load_config(f"{CONFIG}:{args.variant},folder:{files},all,all", flags)


class Step:
    """The compiled step alone, made as `train` makes it; its state is there only while it runs."""

    def __init__(self, config: Config):
        source = open_source(config.data.train.source, config.data.train.split)
        plan = make_plan(config, TrainingData.of(source))
        self.config, self.vit = config, plan.card.config
        self.mesh = make_mesh(MeshConfig())
        self.program = make_program(plan, self.mesh)
        self.reader = plan.reader(source)

    def measure(self, steps: int) -> float:
        """Images a second."""
        size, random = self.config.batch_size, np.random.default_rng(0)
        rows = {
            "image": random.integers(0, 256, self.program.batch["image"].shape, np.uint8),
            "label": random.integers(0, self.vit.num_classes, size, np.int32),
            "mask": np.ones(size, bool),
        }
        batch = to_devices(rows, size, self.mesh)
        state = make_state(self.program.state, self.vit, self.program.optimizer, seed=0)
        for _ in range(2):
            state, metrics = self.program.step(state, batch)
        jax.device_get(metrics)
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = self.program.step(state, batch)
        jax.device_get(metrics)
        return steps * size / (time.perf_counter() - began)

    def read(self, steps: int) -> float:
        """Images a second of the reader alone, its batches thrown away."""
        size, data = self.config.batch_size, self.config.data
        options = dict(workers=data.workers, threads=data.threads)
        with train_batches(self.reader, size, start_step=0, stop_step=10**9, **options) as batches:
            for _ in itertools.islice(batches, 4):  # what is read ahead
                pass
            began = time.perf_counter()
            for _ in itertools.islice(batches, steps):
                pass
            return steps * size / (time.perf_counter() - began)


def whole(config: Config, warmup: int) -> dict[str, float]:
    """Runs `train` in a folder of its own; returns what it says of the steps after `warmup`."""
    with tempfile.TemporaryDirectory() as workdir:
        train(config, workdir)
        lines = [x for x in read_metrics(workdir) if x["step"] > warmup and "train/loss" in x]
    every = config.log.every
    seconds = [every * config.batch_size / line["images_per_second"] for line in lines]
    waited = sum(s * x["input_wait_fraction"] for s, x in zip(seconds, lines, strict=True))
    return {
        "images_per_second": len(lines) * every * config.batch_size / sum(seconds),
        "input_wait_fraction": waited / sum(seconds),
    }


def measure(args: argparse.Namespace, files: str) -> list[dict[str, Any]]:
    """All rounds; the order turns round after each."""
    configs = {WHOLE: config_of(args, files, args.log_every), EVERY: config_of(args, files, 1)}
    step, rounds = Step(configs[WHOLE]), []
    turns = {
        "step": lambda: {"images_per_second": step.measure(args.steps)},
        "reader": lambda: {"images_per_second": step.read(args.steps)},
        WHOLE: lambda: whole(configs[WHOLE], args.warmup),
        EVERY: lambda: whole(configs[EVERY], args.warmup),
    }
    for number in range(args.rounds):
        found: dict[str, Any] = {}
        for name in list(turns)[:: -1 if number % 2 else 1]:
            found[name] = turns[name]()
            gc.collect()  # a run's state, before the next one's
        rounds.append({name: found[name] for name in turns} | {"limit": limit(found)})
    return rounds


def limit(found: dict[str, Any]) -> float:
    """What a run can reach: see above."""
    step, reader = (found[name]["images_per_second"] for name in ("step", "reader"))
    if jax.default_backend() == "cpu":
        return 1 / (1 / step + 1 / reader)
    return min(step, reader)


def ratios(rounds: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of each round: the program by its limit, by the step, and logging every step by not."""
    speeds = [
        {name: x["images_per_second"] for name, x in r.items() if name != "limit"} for r in rounds
    ]
    return {
        "train / limit": [s[WHOLE] / r["limit"] for s, r in zip(speeds, rounds, strict=True)],
        "train / step": [s[WHOLE] / s["step"] for s in speeds],
        "every step logged / train": [s[EVERY] / s[WHOLE] for s in speeds],
    }


def tell(record: dict[str, Any]) -> None:
    """Prints the table, and how far the targets are."""
    rounds = record["rounds"]
    print("| what | images/s | waits for input |\n|---|---|---|")
    for name in ("step", "reader", WHOLE, EVERY):
        waits = [r[name]["input_wait_fraction"] for r in rounds if name in (WHOLE, EVERY)]
        speed = spread([r[name]["images_per_second"] for r in rounds], ".4g")
        print(f"| {name} | {speed} | {spread(waits, '.1%') if waits else ''} |")
    print(f"| limit | {spread([r['limit'] for r in rounds], '.4g')} | |\n")
    for name, values in record["ratios"].items():
        wanted = f", target {TARGET}" if name != "train / step" else ""
        print(f"{name}: {spread(values, '.3f')}{wanted}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags; those left out become what suits the device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--variant", help="default: B/16; on CPU Ti/16")
    add("--image-size", type=int, default=224)
    add("--batch-size", type=int, help="default: 512; on CPU 4")
    add("--dtype", choices=CHOICES["dtype"], help="default: bfloat16; on CPU float32")
    add("--workers", type=int, default=0, help="processes that read; 0 reads on threads")
    add("--threads", type=int, help="that read (default: as many as there are cores)")
    add("--log-every", type=int, help="steps of `train` (default: 50; on CPU 10)")
    add("--steps", type=int, help="measured in each turn (default: 100; on CPU 10)")
    add("--rounds", type=int, default=3)
    add("--images", type=int, help="files (default: 4096; on CPU 256)")
    add("--data", help="a folder that keeps the files for the next run")
    add("--json", type=Path, metavar="FILE", help="where to write the numbers of every round")
    args = parser.parse_args(argv)
    cpu = jax.default_backend() == "cpu"
    usual = dict(variant=("B/16", "Ti/16"), batch_size=(512, 4), dtype=("bfloat16", "float32"))
    usual |= dict(log_every=(50, 10), steps=(100, 10), images=(4096, 256))
    for name, values in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, values[cpu])
    if args.steps % args.log_every:
        parser.error(f"--steps {args.steps} is no multiple of --log-every {args.log_every}")
    try:
        variant(args.variant, image_size=args.image_size)
    except UserError as error:
        parser.error(str(error))
    args.warmup = args.log_every
    return args


def main(argv: list[str] | None = None) -> None:
    """Makes the files, measures, prints and writes what came out."""
    args = parse(argv)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    record = {"date": datetime.date.today().isoformat(), "backend": jax.default_backend()}
    record |= {"device": jax.devices()[0].device_kind, "host": device(), "versions": versions}
    record |= {"argv": sys.argv[1:] if argv is None else argv, "load": os.getloadavg()[0]}
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "data")}
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{record['date']}, {record['device']}, host {record['host']}, load average ", end="")
    print(f"{record['load']:.1f} at the start, {told};")
    print(", ".join(f"{name}={value}" for name, value in settings.items()) + ".\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        # All runs share one compiled step, which they would compile alike, but one after another.
        jax.config.update("jax_compilation_cache_dir", os.path.join(temporary, "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        folder = os.path.join(args.data or temporary, str(args.images))
        files = write_files(folder, args.images)
        size = sum(map(os.path.getsize, paths_of(folder))) / args.images
        rounds = measure(args, files)
    record |= {"settings": settings, "bytes_per_image": size, "rounds": rounds}
    record |= {"ratios": ratios(rounds)}
    record["medians"] = {name: statistics.median(x) for name, x in record["ratios"].items()}
    tell(record)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

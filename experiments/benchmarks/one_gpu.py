"""Measures all that needs a GPU in one call that cannot overrun, what is worth most first.

    python experiments/benchmarks/one_gpu.py --seconds=420 --out=DIR
    python experiments/benchmarks/one_gpu.py --seconds=420 --out=DIR2 --only=options,infer
    python experiments/benchmarks/one_gpu.py --read=DIR --picture=train.png    # measures nothing

Parity of logits with float64 NumPy; training steps beside timm's, in turns; what options of the
compiler are worth; the roofline's prediction beside measured kernels; what a process needs of the
memory; inference; tests. Each row is in DIR/rows.jsonl as soon as it is measured, so that what is
cut off counts as far as it came. A job starts only if it is likely to fit, and ends with the time.
"""

import contextlib
import dataclasses
import functools
import gzip
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import budget
import engine
import flags
import jax
import jax.numpy as jnp
import kernels
import numpy as np
import one_gpu_tables
import workers
from contestants import MASKS, Ours, random_batch
from flax import nnx
from names import read_name

from vit_jax.analysis.chips import CHIPS
from vit_jax.analysis.roofline import Roofline, read_kernels
from vit_jax.compiler import OPTIONS, compiler_options
from vit_jax.errors import UserError, nearest
from vit_jax.extras import install
from vit_jax.models.config import ModelConfig
from vit_jax.models.create import init_params, structure
from vit_jax.models.variants import variant

ROOT = Path(__file__).parents[2]
BEST = "timm-compile:max-autotune+cudnn"  # of timm's, with the attention that ours has
THEIRS = ("timm-compile", BEST)
KINDS = ("parity", "step", "train", "options", "roofline", "infer", "tests")
# Of what asks for another device, or for what only a GPU has.
TESTS = (
    "tests/models/test_layers.py",
    "tests/training/test_precision.py",
    "tests/test_compiler.py",
)
TINY_TESTS = ("tests/test_structure.py",)
TESTS_SECONDS = 150  # at most
ENDS = ("PASSED", "FAILED", "ERROR", "SKIPPED")  # of a test, as pytest calls them
PROFILED = 3  # steps
LEAST, MARGIN = 20, 2  # seconds in all, and those kept for the end


class Model(NamedTuple):
    """What is measured: a variant, the side and the number of its images, and if it has masks."""

    variant: str
    side: int
    batch_size: int
    masks: bool = False

    def __str__(self) -> str:
        what = "images with masks" if self.masks else "images"
        return f"{self.variant} at {self.side}, {self.batch_size} {what}"

    def row(self, table: str) -> dict[str, Any]:
        named = {"variant": self.variant, "image": [self.side] * 2, "batch_size": self.batch_size}
        return {"table": table, **named}


B16, L16, S16 = Model("B/16", 224, 256), Model("L/16", 224, 128), Model("S/16", 224, 256)
LARGE_IMAGES, WITH_MASKS = Model("B/16", 384, 64), Model("B/16", 512, 16, masks=True)
TINY = Model("mu/16", 32, 2)


@dataclasses.dataclass(frozen=True)
class Day:
    """What all jobs share; `record` is engine's of where they run, once that is known."""

    out: Path
    caches: Path
    deadline: float  # of time.monotonic
    tiny: bool
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rounds(self) -> dict[str, int]:
        return {"steps": 1, "repeats": 2} if self.tiny else {"steps": 10, "repeats": 5}

    def config(self, model: Model) -> ModelConfig:
        fields = dict(image_size=model.side, dtype=self.record["dtype"])
        return variant(model.variant, **fields, **(MASKS if model.masks else {}))


def jobs_of(day: Day, kinds: list[str]) -> list[budget.Job]:
    """What is worth most first; seconds are what one H100 with 16 cores is likely to need."""
    table = OPTIONS.get(day.record["backend"], {}).items()
    flips = [f"ours+xla:{name}={not v}".lower() for name, v in table if isinstance(v, bool)]
    rows: list[tuple] = [
        (20, "parity", parity, Model("Ti/16", 224, 2)),
        (25, "parity", parity, Model("B/16", 224, 2)),
        (60, "step", step, B16),
        (80, "train", train, B16, "ours", "timm-compile"),
        (150, "train", train, B16, "ours", BEST),
        (200, "train", train, L16, "ours", "timm-compile"),
        (110, "train", train, S16, "ours", "timm-compile"),
        (130, "train", train, LARGE_IMAGES, "ours", "timm-compile"),
        (150, "train", train, WITH_MASKS, "ours", "timm-compile"),
        (60, "options", train, B16, "ours", "ours+scan"),
        *((70, "options", train, B16, "ours", flip) for flip in flips),
        (70, "options", train, B16, "ours", "ours+deterministic"),
        (40, "options", train, B16, "ours", "ours+loop"),  # on GPUs the same program: the noise
        (35, "roofline", roofline, B16),
        (70, "infer", infer, B16, "ours", "timm-compile"),
        *((60, "roofline", roofline, model) for model in (S16, LARGE_IMAGES, L16)),
        (60, "tests", run_tests, TINY_TESTS if day.tiny else TESTS),
    ]
    jobs: dict[tuple, budget.Job] = {}
    for seconds, kind, function, what, *names in rows:
        if isinstance(what, Model):
            what = TINY._replace(masks=what.masks) if day.tiny else what
        names = [name for name in names if not left_out(day, name)]
        said = f"{kind}: {what}" if isinstance(what, Model) else f"{kind}: {len(what)} files"
        said += f": {', '.join(names)}" if names else ""
        job = budget.Job(said, 4 if day.tiny else seconds, function, (day, what, *names))
        if kind in kinds and not (day.tiny and names == ["ours", "ours+loop"]):
            jobs.setdefault((function, what, *names), job)  # some are alike where timm is missing
    return list(jobs.values())


def left_out(day: Day, name: str) -> str | None:
    """Why a contestant is not measured here; None where it is."""
    asked, backend = read_name(name, "train"), day.record["backend"]
    if asked.family == "timm" and not all(map(importlib.util.find_spec, ("torch", "timm"))):
        return flags.NO_TIMM
    if asked.mode and backend == "cpu":
        return f"{name} is left out: it compiles for minutes on a cpu."
    return asked.needless(backend)


def environment(day: Day) -> Iterator[dict[str, Any]]:
    """Where all this runs: the record that the other benchmarks begin with."""
    machine = workers.describe({})
    machine.pop("refused")
    for package in importlib.metadata.distributions():
        if package.name.startswith("nvidia-cudnn"):
            machine["versions"]["cudnn"] = package.version
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
        machine["versions"]["driver"] = driver.stdout.split("\n")[0]
    dtype = "float32" if machine["backend"] == "cpu" else "bfloat16"
    args = Namespace(machine=machine, dtype=dtype, **day.rounds)
    record = engine.new_record("train", args)
    missing = {name: left_out(dataclasses.replace(day, record=record), name) for name in THEIRS}
    yield {"table": "environment", "record": record, "left_out": missing}


def parity(day: Day, model: Model) -> Iterator[dict[str, Any]]:
    """The logits of random parameters, the head's too, beside those of float64 NumPy."""
    path = ROOT / "tests" / "models" / "numpy_vit.py"
    spec = importlib.util.spec_from_file_location("numpy_vit", path)
    numpy_vit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(numpy_vit)
    config, random = day.config(model), np.random.default_rng(0)
    params = jax.tree.map(  # noise, as zeros would hide what is left out
        lambda leaf: np.float32(leaf + 0.02 * random.normal(size=leaf.shape)),
        jax.jit(lambda: init_params(config, 0))(),
    )
    images = random_batch(config, model.batch_size)["image"] / np.float32(127.5) - 1
    choices = {"pool": config.pool, "position": config.position, "gelu": config.gelu}
    exact = jax.tree.map(np.float64, params)
    wanted = numpy_vit.forward(exact, np.float64(images), **choices)["logits"]
    for dtype in ("float32", "bfloat16"):
        graphdef, _ = structure(dataclasses.replace(config, dtype=dtype))
        forward = jax.jit(
            lambda params, images, graphdef=graphdef: nnx.merge(graphdef, params)(images),
            compiler_options=compiler_options(),
        )
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            compiled = forward.lower(params, images).compile()
        difference = float(np.abs(np.float64(compiled(params, images)) - wanted).max())
        row = model.row("parity") | {"dtype": dtype, "attention": attention_in(compiled)}
        yield row | {"difference": difference, "spread": float(wanted.std())}
    if day.record["backend"] == "gpu":
        yield from gradients(day, model, params, images)


def gradients(day: Day, model: Model, params: Any, images: Any) -> Iterator[dict[str, Any]]:
    """Gradients through cuDNN's attention beside those through XLA's.

    Of an odd number of tokens, which is padded, and of an even one: the largest difference of a
    parameter's gradient, by the spread of it.
    """
    for pool in ("token", "gap"):
        found: dict[str, Any] = {}
        for backend in ("cudnn", "xla"):
            fields = {"dtype": "bfloat16", "attention": backend, "pool": pool}
            config = dataclasses.replace(day.config(model), **fields, class_token=pool == "token")
            graphdef, _ = structure(config)

            def loss(params, graphdef=graphdef):
                return jnp.square(nnx.merge(graphdef, params)(images)).sum()

            grad = jax.jit(jax.grad(loss), compiler_options=compiler_options())
            found[backend] = jax.tree.map(np.float64, grad(params))
        differences = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max() / (b.std() + 1e-30)), *found.values()
        )
        where, worst = max(jax.tree.leaves_with_path(differences), key=lambda leaf: leaf[1])
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found["cudnn"]))
        row = model.row("gradients") | {"pool": pool, "tokens": config.num_tokens}
        yield row | {"worst": worst, "where": jax.tree_util.keystr(where), "finite": finite}


def attention_in(compiled: Any) -> str:
    """What attention a compiled program calls."""
    return "cudnn" if "__cudnn$fmha" in compiled.as_text() else "xla"


def first_step(day: Day, model: Model) -> tuple[Ours, dict[str, Any]]:
    """Takes steps in this fresh process; returns what took them, and the memory's row."""
    workers.use_caches(engine.folder_of(day.caches, "ours"))
    running = Ours("train", read_name("ours", "train"), day.config(model), model.batch_size)
    began = time.perf_counter()
    running.compile()
    loss = running.run(1)
    row = {"first_step_seconds": time.perf_counter() - began, "loss": loss}
    if not math.isfinite(loss):
        raise FloatingPointError(f"the first step's loss is {loss}")
    running.run(1)
    row |= {"attention": attention_in(running.step), **running.memory()}
    return running, model.row("memory") | row


def step(day: Day, model: Model) -> Iterator[dict[str, Any]]:
    """That a step runs at all; what it compiles is there for the jobs that follow."""
    yield first_step(day, model)[1]


def compare(task: str, day: Day, model: Model, *names: str) -> Iterator[dict[str, Any]]:
    """One model's contestants in turns, as the benchmark of the task records them."""
    config = day.config(model)
    args = Namespace(names=list(names), machine=day.record, **day.rounds)
    found = engine.measure(task, config, model.batch_size, args, day.caches, compiling=False)
    name = model.variant + ", masks" * model.masks
    case = engine.new_case(name, config, model.batch_size) | found
    yield {"table": task, "case": case}


train, infer = (functools.partial(compare, task) for task in ("train", "infer"))


def roofline(day: Day, model: Model) -> Iterator[dict[str, Any]]:
    """Memory, then the step by the roofline and by the clock, then its kernels by a profile."""
    running, row = first_step(day, model)
    yield row
    text, chip = running.step.as_text(), CHIPS.get(day.record["device_kind"])
    keep_first(day.out / "hlo.txt.gz", gzip.compress(text.encode()))
    steps, began = day.rounds["steps"], time.perf_counter()
    running.run(steps)
    row = model.row("roofline") | {"measured": (time.perf_counter() - began) / steps}
    found = read_kernels(text)
    predicted = Roofline(tuple(found), chip).seconds if chip else None
    yield row | {"launches": sum(each.times for each in found), "predicted": predicted}
    with tempfile.TemporaryDirectory(dir=day.caches) as folder:
        trace = kernels.profile(lambda: running.run(PROFILED), folder)
    keep_first(day.out / "trace.json.gz", trace)
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    seconds = {name: s / PROFILED for name, s in kernels.kernel_seconds(events).items()}
    note = None if seconds else "the profile has no kernels of a GPU"
    yield model.row("kernels") | {"note": note, **kernels.beside(found, seconds, chip)}


def keep_first(path: Path, content: bytes) -> None:
    """Keeps what the first model's program and profile are, for questions no table answers."""
    if not path.exists():
        budget.write(path, content)


def run_tests(day: Day, files: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Tests on this device, as long as there is time; what they say is in tests.txt."""
    said = day.out / "tests.txt"
    # A line for each, so that those before the end of the time count; without the variable, the
    # tests would ask for CPUs.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", *files]
    given: dict[str, Any] = {"env": {"JAX_PLATFORMS": "", "PYTHONUNBUFFERED": "1", **os.environ}}
    row: dict[str, Any] = {"table": "tests", "files": list(files), "exit_code": None}
    with open(said, "w") as file, contextlib.suppress(subprocess.TimeoutExpired):
        given |= {"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT}
        left = min(day.deadline - time.monotonic() - MARGIN, TESTS_SECONDS)
        row["exit_code"] = subprocess.run(command, timeout=left, **given).returncode
    ends = re.findall(rf"^tests/.* ({'|'.join(ENDS)})\b", said.read_text(), re.M)
    yield row | {"ends": {end: ends.count(end) for end in ENDS}}


def parse(argv: list[str] | None) -> Namespace:
    """Reads the flags; a mistake is one sentence, and exit code 2."""
    parser = flags.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--seconds", type=float, default=420, help="all that this may take, from start to end")
    add("--out", type=Path, metavar="DIR", help="where to write rows.jsonl and tests.txt")
    add("--only", default=",".join(KINDS), help=f"some of the jobs: {','.join(KINDS)}")
    add("--tiny", action="store_true", help="a tiny model instead, to see whether all of it runs")
    add("--read", type=Path, metavar="DIR", help="tell an earlier --out; measure nothing")
    add("--picture", type=Path, metavar="FILE", help="with --read: where to draw training")
    args = parser.parse_args(argv)
    try:
        _check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _check(args: Namespace) -> None:
    if (args.out is None) == (args.read is None):
        raise UserError("say where to write with --out=DIR, or what to tell with --read=DIR")
    if args.picture and (args.read is None or not args.picture.parent.is_dir()):
        raise UserError(f"--picture={args.picture}: it goes with --read, into a folder that exists")
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--picture needs matplotlib: {install('plot')}")
    for kind in [kind for kind in args.only.split(",") if kind not in KINDS]:
        raise UserError(f"--only={args.only}: no jobs {kind!r}; {nearest(kind, KINDS)}")
    if not args.seconds >= LEAST:
        raise UserError(f"--seconds={args.seconds:g}: too few to measure anything; {LEAST} or more")
    if args.read is not None:
        args.rows = one_gpu_tables.read(args.read)
        if args.picture and not any(row.get("table") == "train" for row in args.rows):
            raise UserError(f"--read={args.read}: nothing of training is in it to draw")
        return
    rows = args.out / "rows.jsonl"
    if rows.exists():
        raise UserError(f"--out={args.out}: rows.jsonl is there already; name another folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UserError(f"--out={args.out}: {error.strerror}; name a folder to write to") from None


def main(argv: list[str] | None = None) -> None:
    """Measures what fits, then tells it; or tells an earlier day."""
    args = parse(argv)
    if args.read is None:
        measure(args)
        args.rows = budget.read(args.out / "rows.jsonl")
    if args.rows and "record" in args.rows[0]:
        print("\n".join(one_gpu_tables.lines(args.rows)), flush=True)
    if args.picture:
        one_gpu_tables.draw(args.rows, args.picture)
    if multiprocessing.active_children():  # which no signal ends, and Python would wait for
        os._exit(0)


def measure(args: Namespace) -> None:
    """Runs the day's jobs; leaves rows behind, whatever happens."""
    os.environ.update(flags.ENVIRONMENT)
    if args.tiny:  # as nothing but compiling would take its time
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    deadline = budget.BEGAN + args.seconds - MARGIN
    caches = Path(tempfile.mkdtemp(prefix="one-gpu-"))
    day = Day(args.out, caches, deadline, args.tiny)
    rows = args.out / "rows.jsonl"
    budget.run([budget.Job("environment", 5, environment, (day,))], rows, deadline)
    records = [row["record"] for row in budget.read(rows) if "record" in row]
    if not records:
        raise SystemExit("one_gpu.py: JAX did not start; rows.jsonl says why")
    day = dataclasses.replace(day, record=records[0])
    if day.record["backend"] == "cpu" and not args.tiny:
        print("one_gpu.py: JAX found no GPU; to try this on a CPU, give --tiny", file=sys.stderr)
        raise SystemExit(2)
    budget.run(jobs_of(day, args.only.split(",")), rows, deadline)
    # There may be thousands of files in it: no reason to come late.
    cleaning = threading.Thread(target=shutil.rmtree, args=(caches, True), daemon=True)
    cleaning.start()
    cleaning.join(MARGIN / 2)


if __name__ == "__main__":
    main()

"""Measures our training step beside timm's on random data, on one device.

    python experiments/benchmarks/train.py --variants=B/16,L/16 --batch-sizes=128,256 --json=b.json

All contestants train the same model (their parameters are counted) with the same AdamW, from uint8
images that are on the device already: normalise, forward, backward, update. They take turns, round
after round, together with a large matrix product, the ceiling; so what slows the machine down for
a while slows all of them. Medians are reported, with the lowest and the highest round.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from vit_jax.analysis.cost import flops_per_image
from vit_jax.models.config import CHOICES, ViTConfig, variant

# JAX would take most of a GPU's memory when it starts; here torch shares the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Compilation is timed: nothing that an earlier run left behind may shorten it.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# jax and torch are imported in child processes alone, one for each model and batch size, so that
# every measurement of memory starts from none.

CONTESTANTS = ("ours", "timm", "timm-compile")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "timm")
NO_TIMM = (
    "timm's step is left out: torch and timm are not both installed. Install torch for this device "
    "as https://pytorch.org says, then `pip install timm`.\n"
)
COLUMNS = (
    "variant | image | batch | contestant | images/s | TFLOP/s | of ceiling | ours / this | "
    "peak GiB | compile s"
)


@contextlib.contextmanager
def noting(result: dict[str, Any]):
    """Notes an error and goes on: one failure does not end the other measurements."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  jax, torch and their compilers raise many types
        text = f"{type(error).__name__}: {error}"
        memory = re.search(r"RESOURCE_EXHAUSTED|out of memory|can't allocate|MemoryError", text)
        result |= {"error": "out of memory" if memory else text.split("\n")[0], "details": text}


def measure(
    config: ViTConfig, batch_size: int, names: list[str], steps: int, repeats: int
) -> dict[str, Any]:
    """Measures one model at one batch size: contestants and the ceiling take turns."""
    import contestants
    import numpy as np

    random = np.random.default_rng(0)
    shape = (batch_size, *config.image_size, config.in_channels)
    batch = {
        "image": random.integers(0, 256, shape, np.uint8),
        "label": random.integers(0, config.num_classes, batch_size, np.int32),
        "mask": np.ones(batch_size, bool),
    }
    results: dict[str, Any] = {name: {"seconds_per_step": []} for name in names}
    running = {}
    for name, result in results.items():
        with noting(result):
            running[name] = contestants.start(name, config, batch, result)
    if len(counts := {x["parameters"] for x in results.values() if "parameters" in x}) > 1:
        raise AssertionError(f"not the same model: {sorted(counts)} parameters")
    ceiling, ceilings = contestants.Ceiling(config.dtype), []
    for _ in range(repeats):
        for name, contestant in running.items():
            if "error" not in results[name]:
                with noting(results[name]):
                    began = time.perf_counter()
                    results[name]["loss"] = contestant.run(steps)
                    seconds = (time.perf_counter() - began) / steps
                    results[name]["seconds_per_step"].append(seconds)
        ceilings.append(ceiling.measure())
    return {"results": results, "ceiling_size": ceiling.size, "ceiling_flops": ceilings}


def describe() -> dict[str, Any]:
    """The device that jax runs on, and the versions of the packages."""
    import jax

    backend, device = jax.default_backend(), jax.devices()[0].device_kind
    if backend == "cpu":
        with contextlib.suppress(OSError, TypeError):
            device = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
        device += f", {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    found = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = {name: found.get(name) for name in PACKAGES}
    return {"backend": backend, "device": device, "versions": versions}


def in_child(function: Any, *args: Any) -> Any:
    """Calls a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def spread(values: list[float], form: str) -> str:
    """The median, with the lowest and the highest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def rows(case: dict[str, Any]) -> list[str]:
    """The table's rows of one model at one batch size."""
    lines, batch_size = [], case["batch_size"]
    image = "x".join(str(side) for side in case["config"]["image_size"])
    ours = case["results"].get("ours", {}).get("seconds_per_step", [])
    for name, result in case["results"].items():
        cells = [case["variant"], image, str(batch_size), name]
        if "error" in result:
            cells += [result["error"].replace("|", "/"), *[""] * 5]
        else:
            seconds = result["seconds_per_step"]
            speed = 3 * case["flops_per_image"] * batch_size / statistics.median(seconds)
            ratios = [theirs / us for us, theirs in zip(ours, seconds, strict=False)]
            peak, compiling = result["peak_bytes"], result["compile_seconds"]
            cells += [
                spread([batch_size / s for s in seconds], ".4g"),
                f"{speed / 1e12:.3g}",
                f"{speed / statistics.median(case['ceiling_flops']):.0%}",
                spread(ratios, ".2f") if ratios and name != "ours" else "",
                f"{peak / 2**30:.2f}" if peak else "",
                f"{compiling:.1f}" if compiling else "",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def best(name: str, cases: list[dict[str, Any]]) -> str:
    """A sentence: each contestant at its own fastest batch size, and ours by theirs."""
    tops: dict[str, tuple[float, int]] = {}
    for case in cases:
        for contestant, result in case["results"].items():
            if "error" not in result:
                speed = case["batch_size"] / statistics.median(result["seconds_per_step"])
                tops[contestant] = max(tops.get(contestant, (0, 0)), (speed, case["batch_size"]))
    told = [f"{c} {speed:.4g} images/s at batch {size}" for c, (speed, size) in tops.items()]
    if "ours" in tops:
        told += [f"ours / {c} {tops['ours'][0] / tops[c][0]:.2f}" for c in tops if c != "ours"]
    return f"{name} at its best batch size: {', '.join(told) or 'nothing ran'}."


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags; those left out become what suits the device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--variants", help="such as B/16,L/14 (default: B/16; on CPU Ti/16)")
    add("--image-size", type=int, default=224)
    add("--batch-sizes", help="such as 64,128 (default: 128,256,512; on CPU 4)")
    add("--dtype", choices=CHOICES["dtype"], help="default: bfloat16; on CPU float32")
    add("--gelu", choices=CHOICES["gelu"], default="tanh", help="of all contestants")
    add("--steps", type=int, help="in a round (default: 20; on CPU 2)")
    add("--repeats", type=int, help="rounds (default: 7; on CPU 3)")
    add("--contestants", help=f"default: {','.join(CONTESTANTS)}; on CPU ours,timm")
    add("--scan", action="store_true", default=True, help="our blocks under lax.scan (default)")
    add("--loop", action="store_false", dest="scan", help="our blocks in a Python loop")
    add("--json", type=Path, metavar="FILE", help="where to write the numbers of every round")
    args = parser.parse_args(argv)
    args.machine = in_child(describe)
    cpu = args.machine["backend"] == "cpu"
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    args.steps = args.steps or (2 if cpu else 20)
    args.repeats = args.repeats or (3 if cpu else 7)
    args.contestants = args.contestants or ",".join(CONTESTANTS[: 2 if cpu else 3])
    args.contestants = args.contestants.split(",")
    fields = dict(image_size=args.image_size, dtype=args.dtype, gelu=args.gelu, scan=args.scan)
    try:
        sizes = args.batch_sizes or ("4" if cpu else "128,256,512")
        args.batch_sizes = [int(size) for size in sizes.split(",")]
        variants = args.variants or ("Ti/16" if cpu else "B/16")
        args.configs = {name: variant(name, **fields) for name in variants.split(",")}
    except ValueError as error:
        parser.error(str(error))
    if unknown := set(args.contestants) - set(CONTESTANTS):
        parser.error(f"no contestants {sorted(unknown)}; known: {', '.join(CONTESTANTS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measures every variant at every batch size; prints and writes results as they come."""
    args = parse(argv)
    record = {"date": datetime.date.today().isoformat(), **args.machine, "argv": sys.argv[1:]}
    installed = [f"{name} {version}" for name, version in record["versions"].items() if version]
    print(f"{record['date']}, {record['device']}, {', '.join(installed)};")
    print(f"{args.repeats} rounds of {args.steps} steps, {args.dtype}, scan={args.scan}.\n")
    torch = importlib.util.find_spec("torch") and importlib.util.find_spec("timm")
    if not torch and args.contestants != ["ours"]:
        print(NO_TIMM)
        args.contestants = [name for name in args.contestants if name == "ours"]
    print(f"| {COLUMNS} |\n{'|---' * len(COLUMNS.split('|'))}|", flush=True)
    cases = record["cases"] = []
    rounds = (args.contestants, args.steps, args.repeats)
    for name, config in args.configs.items():
        for batch_size in args.batch_sizes:
            case = {"variant": name, "batch_size": batch_size, "config": dataclasses.asdict(config)}
            case |= {"flops_per_image": flops_per_image(config)}
            failure: dict[str, Any] = {}
            with noting(failure):
                case |= in_child(measure, config, batch_size, *rounds)
            if failure:  # of the whole process
                case |= {"results": {c: failure for c in args.contestants}, "ceiling_flops": []}
            cases.append(case)
            print("\n".join(rows(case)), flush=True)
            if args.json:
                args.json.write_text(json.dumps(record, indent=1))
    if ceilings := [flops / 1e12 for case in cases for flops in case["ceiling_flops"]]:
        size = next(case["ceiling_size"] for case in cases if case["ceiling_flops"])
        print(f"\nCeiling: {spread(ceilings, '.3g')} TFLOP/s, {size}^3 product in {args.dtype}.")
    for name in args.configs:
        print(best(name, [case for case in cases if case["variant"] == name]))


if __name__ == "__main__":
    main()

"""What train.py and infer.py share: measuring in turns, and the record of it."""

import argparse
import dataclasses
import datetime
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import flags
import tables
import workers
from contestants import segments
from names import read_name

from vit_jax.analysis.cost import flops_per_image
from vit_jax.models.config import ModelConfig

PASSES = {"train": 3, "infer": 1}  # of the model's products: there, and twice as many back


def measure(
    task: str,
    config: ModelConfig,
    batch_size: int,
    args: argparse.Namespace,
    caches: Path,
    compiling: bool,
) -> dict[str, Any]:
    """Measures one model at one batch size: contestants and the ceiling take turns.

    Each round begins with another one. Those that ran out of memory beside the others are measured
    again alone, so that the others' memory counts against no one.
    """
    results: dict[str, Any] = {}
    names = args.names
    folders = {name: folder_of(caches, name) for name in names}
    families = {name: read_name(name, task).family for name in names}

    def started(pool: workers.Workers, name: str) -> dict[str, Any]:
        what = (task, name, config, batch_size, args.machine["backend"], folders[name])
        return pool.noted(families[name], workers.start, *what)

    compiled: dict[str, dict[str, float]] = {name: {} for name in names}
    for name in names if compiling else ():
        for kind in ("cold", "warm"):  # each in a fresh process; the first fills the caches
            with workers.Workers() as pool:
                once = started(pool, name)
            if "first_step_seconds" in once:
                compiled[name][f"{kind}_seconds"] = once["first_step_seconds"]
                compiled[name]["process_peak_bytes"] = once.get("process_peak_bytes")

    ceilings: list[dict[str, Any]] = []

    def take_turns(together: list[str]) -> None:
        """Contestants that are in memory at the same time, round after round."""
        with workers.Workers() as pool:
            for name in together:
                results[name] = {**started(pool, name), **compiled[name], "seconds_per_step": []}
            if segments(config):  # where all begin with the same weights
                starts = [results[name] for name in together]
                check_losses([x["first_value"] for x in starts if "first_value" in x], config)
            for number in range(args.repeats):
                first = number % len(together)
                for name in together[first:] + together[:first]:
                    if "error" not in results[name]:
                        once = pool.noted(families[name], workers.turn, name, args.steps)
                        for kind in ("seconds", "cpu_seconds"):
                            if kind in once:
                                per_step = results[name].setdefault(f"{kind}_per_step", [])
                                per_step.append(once.pop(kind))
                        results[name] |= once
                ceilings.append(pool.noted("ours", workers.ceiling, config.dtype))

    take_turns(names)
    for name in names if len(names) > 1 else ():
        if results[name].get("error") == "out of memory":  # which the others may have
            take_turns([name])
            results[name]["alone"] = True
    counts = {x["parameters"] for x in results.values() if "parameters" in x}
    if len(counts) > 1:
        raise AssertionError(f"not the same model: {sorted(counts)} parameters")
    return {
        "results": results,
        "ceiling_size": next((once["size"] for once in ceilings if "size" in once), None),
        "ceiling_flops": [once["flops"] for once in ceilings if "flops" in once],
    }


def check_losses(losses: list[float], config: ModelConfig) -> None:
    """Raises unless the losses of the same weights are the same, but for rounding."""
    tolerance = 1e-4 if config.dtype == "float32" else 1e-2
    if not all(math.isclose(loss, losses[0], rel_tol=tolerance) for loss in losses):
        raise AssertionError(f"not the same loss of the same weights: {losses}")


def folder_of(caches: Path, name: str) -> str:
    """Where a contestant's compiler keeps what it compiled."""
    return str(caches / re.sub(r"\W+", "_", name))


def search_largest(
    task: str, name: str, config: ModelConfig, args: argparse.Namespace, caches: Path
) -> dict[str, Any]:
    """The largest batch by XLA's analysis; on an accelerator it is run, or half of it and so on."""
    backend = args.machine["backend"]
    with workers.Workers() as pool:
        what = (task, name, config, args.memory_gib, str(caches))
        found = pool.noted("ours", workers.largest_batch, *what)
    while backend != "cpu" and found.get("batch_size"):
        with workers.Workers() as pool:
            what = (task, name, config, found["batch_size"], backend, str(caches))
            once = pool.noted("ours", workers.start, *what)
        found["ran"] = "error" not in once
        if once.get("error") != "out of memory":
            return found | {key: once[key] for key in ("error", "details") if key in once}
        found |= {"batch_size": found["batch_size"] // 2, "bytes": None}
    return found


def main(task: str, doc: str, argv: list[str] | None = None) -> None:
    """Measures every model at every batch size; prints and writes results as they come."""
    args = flags.parse(task, doc, argv)
    if args.read is not None:
        record = args.record
        tell(record)
    else:
        record = run(task, args)
    if args.picture:
        tables.draw(record, args.picture)


def tell(record: dict[str, Any]) -> None:
    """Prints all of a record."""
    print(record["header"] + "\n\n" + tables.header(tables.COLUMNS))
    print("\n".join(row for case in record["cases"] for row in tables.rows(record, case)))
    if record["largest"]:
        print("\n" + tables.header(tables.LARGEST_COLUMNS))
        print("\n".join(map(tables.largest_row, record["largest"])))
    print("\n" + "\n".join(tables.sentences(record)))


def run(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the record of what was measured, told and written as it came."""
    record = new_record(task, args)
    print("\n".join([record["header"], *args.notes]) + "\n")
    print(tables.header(tables.COLUMNS), flush=True)

    def keep(text: str) -> None:
        print(text, flush=True)
        record["summary"] = tables.summary(record)
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for number, (name, config) in enumerate(args.configs):
            for batch_size in args.batch_sizes:
                # How long compiling takes hardly depends on sizes: once for each variant.
                seen = {case["variant"] for case in record["cases"]}
                compiling = args.compile and name not in seen
                caches = Path(folder, f"model{number}")
                case = new_case(name, config, batch_size)
                failure: dict[str, Any] = {}
                with workers.noting(failure):
                    case |= measure(task, config, batch_size, args, caches, compiling)
                if failure:  # of the whole case
                    case |= {"results": {c: failure for c in args.names}, "ceiling_flops": []}
                record["cases"].append(case)
                keep("\n".join(tables.rows(record, case)))
        if args.resolutions:
            print("\n" + tables.header(tables.LARGEST_COLUMNS), flush=True)
            for number, (name, config) in enumerate(args.configs):
                for contestant in [each for each in args.names if each.startswith("ours")]:
                    caches = Path(folder, f"largest{number}")
                    found = {"variant": name, "image": list(config.image_size)}
                    found |= search_largest(task, contestant, config, args, caches)
                    record["largest"].append(found | {"contestant": contestant})
                    keep(tables.largest_row(record["largest"][-1]))
    print("\n" + "\n".join(tables.sentences(record)))
    return record


def new_case(name: str, config: ModelConfig, batch_size: int) -> dict[str, Any]:
    """What stands beside the results of one model at one batch size."""
    case = {"variant": name, "image": list(config.image_size), "batch_size": batch_size}
    flops = flops_per_image(config)
    return case | {"config": dataclasses.asdict(config), "flops_per_image": flops}


def new_record(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """The record of a run before anything is measured: where, with what, how."""
    record = {"date": datetime.date.today().isoformat(), "task": task, "passes": PASSES[task]}
    record |= {**args.machine, "dtype": args.dtype, "argv": sys.argv[1:]}
    shown = ("XLA_FLAGS", "GLIBC_TUNABLES", *flags.ENVIRONMENT)
    record["environment"] = {name: os.environ.get(name) for name in shown}
    installed = [f"{name} {version}" for name, version in record["versions"].items() if version]
    pages = record["environment"]["GLIBC_TUNABLES"]
    record["header"] = (
        f"{record['date']}, {record['device']}, {', '.join(installed)};\n"
        f"{task}: {args.repeats} rounds of {args.steps} steps, {args.dtype}; "
        f"huge pages: {f'GLIBC_TUNABLES={pages}' if pages else 'not asked for'}."
    )
    return record | {"cases": [], "largest": [], "summary": None}

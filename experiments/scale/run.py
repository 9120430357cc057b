"""Rehearses large runs: compiles their training steps for TPUs, on a machine that has none.

    python experiments/scale/run.py [ROW ...]         # the first table
    python experiments/scale/run.py --compile-time    # the last one

Writes what it finds to results.json, row by row, and README.md from all of it. Needs libtpu
(`pip install 'vit_jax[tpu]'`), one core and, for the largest, 8 GB of memory.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import time
from pathlib import Path

import jax

from vit_jax.analysis import chips, cost, preflight
from vit_jax.analysis.collectives import by_kind
from vit_jax.models.config import variant
from vit_jax.training.config import load_config
from vit_jax.training.sharding import make_mesh

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "pretrain.py"
# Name -> topology, the config's argument, overrides beside those of all rows.
COMMON = ["precision=bfloat16", "optim.mu_dtype=bfloat16", "model.num_classes=1000"]
ROWS = {
    "B/16": ("v5e:4x4", "B/16,jft", "mesh.data=1 mesh.fsdp=16 model.remat=dots optim.accumulate=2"),
    "L/16": ("v5e:8x8", "L/16,jft", "mesh.data=8 mesh.fsdp=8 model.remat=full"),
    "H/14 at 518": (
        "v5p:4x4x4",
        "H/14,jft,518",
        "mesh.data=16 mesh.fsdp=4 model.remat=full batch_size=512",
    ),
    "g/14": ("v5p:8x8x4", "g/14,jft", "mesh.data=64 mesh.fsdp=4 model.remat=full"),
    "G/14": ("v5p:8x8x4", "G/14,jft", "mesh.data=32 mesh.fsdp=8 model.remat=full"),
    "22B/14": (
        "v5p:8x16x16",
        "22B/14,jft",
        "mesh.data=16 mesh.fsdp=128 model.remat=full batch_size=65536",
    ),
}


def rehearse(name: str) -> dict:
    """Returns one row of the table."""
    topology, argument, overrides = ROWS[name]
    flags = [f"--config.{each}" for each in (*COMMON, *overrides.split())]
    config = load_config(f"{CONFIG}:{argument}", flags)
    devices = chips.topology_devices(topology)
    record, _, _ = preflight.open_record(config)
    began = time.perf_counter()
    found = preflight.rehearse(config, record, make_mesh(config.mesh, devices))
    rate, _ = preflight.flop_rate(devices, record.config)
    return {
        "command": f"python -m vit_jax preflight --config=configs/pretrain.py:{argument} "
        f"--topology={topology} {' '.join(flags)}",
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(found.program.mesh.shape),
        "batch": config.batch_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(found.program.state.params)),
        "fits": found.fits,
        "peak_gib": found.peak_bytes and found.peak_bytes / chips.GIB,
        "state_gib": found.state_bytes / chips.GIB,
        "limit_gib": found.limit_bytes / chips.GIB,
        "moves": by_kind(found.collectives),
        "moved_gb": found.moved_bytes / 1e9,
        "least_gb": found.least_bytes / 1e9,
        "milliseconds_at_half_peak": cost.step_flops(config, record.config) / rate * 1e3,
        "compile_seconds": time.perf_counter() - began,
    }


def compile_times() -> dict:
    """Seconds to trace, lower and compile one step on the CPU, by depth."""
    times: dict[str, float] = {}
    flags = [f"--config.{each}" for each in (*COMMON, "batch_size=8", "precision=float32")]
    config = load_config(f"{CONFIG}:S/16,jft", flags)
    record, _, _ = preflight.open_record(config)
    mesh = make_mesh(config.mesh, jax.devices("cpu")[:1])
    scanned, looped = (("scan", 12), ("scan", 48)), (("loop", 12), ("loop", 48))
    for cases in (scanned, scanned, scanned, looped):
        for how, depth in cases:
            vit = dataclasses.replace(
                variant("S/16", image_size=64), depth=depth, scan=how == "scan"
            )
            jax.clear_caches()
            began = time.perf_counter()
            preflight.rehearse(config, dataclasses.replace(record, config=vit), mesh)
            key = f"{how} {depth}"
            times[key] = min(times.get(key, 1e9), time.perf_counter() - began)
    return times


def readme(results: dict) -> str:
    """The page, from results.json."""
    rows = []
    for name, row in results["rows"].items():
        mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        moves = ", ".join(
            f"{kind} {count:,} x, {size / 1e9:.2f} GB"
            for kind, (count, size) in row["moves"].items()
            if size > 1e6
        )
        rows.append(
            f"| {name} | {row['parameters'] / 1e9:.3g} | {row['topology']}, {row['devices']:,} | "
            f"{mesh} | {row['batch']:,} | {row['peak_gib']:.1f} of {row['limit_gib']:.1f} | "
            f"{row['state_gib']:.2f} | {row['moved_gb']:.2f} | "
            f"{row['moved_gb'] / row['least_gb']:.2f} | {moves} |"
        )
    times = results.get("compile_times", {})
    depths = [
        f"| {how} | {times[f'{how} 12']:.1f} s | {times[f'{how} 48']:.1f} s | "
        f"{times[f'{how} 48'] / times[f'{how} 12']:.2f} |"
        for how in ("scan", "loop")
        if f"{how} 48" in times
    ]
    commands = [row["command"].replace(" --", " \\\n    --") for row in results["rows"].values()]
    return PAGE.format(
        rows="\n".join(rows),
        depths="\n".join(depths),
        commands="\n\n".join(commands),
        date=results["date"],
        versions=results["versions"],
    )


PAGE = """# Large runs, rehearsed

Does it fit, and how much does it move between chips? Each row is the real training step of a
config, compiled by the TPU's own compiler for that many chips, on a machine that has none. Nothing
was run: memory and traffic are the compiler's, speed is not measured here.

This page is written by `python experiments/scale/run.py`; last on {date}, with {versions}.

| model | 10^9 weights | TPUs | mesh | batch | GiB a chip | of it state | GB moved | ratio | how |
|---|---|---|---|---|---|---|---|---|---|
{rows}

- Memory is what a chip sets aside for the step, of what it has: state, two batches and all
  temporaries. Traffic is what each chip sends in a step, and its ratio to the least.
- bfloat16 computation, float32 parameters, AdamW with its first moment in bfloat16, 1000 classes.
- The least is what the mesh needs with parameters kept where they are: each split parameter is
  gathered twice, its gradient scattered once, in bfloat16; shards are summed over `data`. What is
  outside the blocks may be gathered once only, which makes a ratio just below 1 possible.
- What hides a collective is looked through: sums fused with the slice that follows count as
  reduce-scatters, products summed around a ring as the permutes that they are.
- A TPU scatters a gradient only where each part is a whole number of tiles (16 rows in bfloat16,
  of each of the directions that it sends in). Elsewhere it pads, or sums everything everywhere,
  for twice the traffic: widths such as 1664 = 13 x 128 do better with a small `fsdp` and a large
  `data`. `preflight` says what a mesh comes to.

## Compile time and depth

One training step of S/16's width on one CPU device, traced, lowered and compiled, all in one run;
scanned the best of three, looped once. Scanning the blocks (`model.scan`, the default but on GPUs)
compiles one block, whatever the depth.

| blocks | depth 12 | depth 48 | ratio |
|---|---|---|---|
{depths}

## Commands

```
{commands}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all")
    parser.add_argument("--compile-time", action="store_true", help="measure the last table")
    args = parser.parse_args()
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"rows": {}}

    def write() -> None:
        packages = ("jax", "libtpu")
        results["date"] = datetime.date.today().isoformat()
        results["versions"] = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
        results["rows"] = {name: results["rows"][name] for name in ROWS if name in results["rows"]}
        file.write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "README.md").write_text(readme(results))

    if args.compile_time:
        results["compile_times"] = compile_times()
        write()
    for name in args.rows or ([] if args.compile_time else ROWS):
        results["rows"][name] = rehearse(name)
        row = results["rows"][name]
        print(name, row["peak_gib"], row["moved_gb"] / max(row["least_gb"], 1e-9), flush=True)
        write()


if __name__ == "__main__":
    main()

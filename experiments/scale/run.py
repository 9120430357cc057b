"""Rehearses large runs: compiles their training steps for TPUs and GPUs, on a machine without.

    python experiments/scale/run.py [tpus | gpus | ROW ...]    # all, where both compilers are
    python experiments/scale/run.py --compile-time    # the last table

Writes what it finds to results.json, row by row, and README.md from all of it. Needs libtpu
(`pip install -e '.[tpu]'`) or XLA's compiler for GPUs (`pip install -e '.[cuda]'`), one core
and, for the largest, 8 GB of memory.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import time
from pathlib import Path

import jax

from vit_jax.analysis import chips, preflight
from vit_jax.analysis.collectives import by_kind
from vit_jax.models.variants import variant
from vit_jax.training.config_file import load_config
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
    "B/16, GPUs": ("h100:8", "B/16,jft", "mesh.data=8"),
    "L/16, GPUs": ("h100:8", "L/16,jft", "mesh.data=8 optim.accumulate=2"),
    "H/14 at 518, GPUs": (
        "h100:4x8",
        "H/14,jft,518",
        "mesh.data=4 mesh.fsdp=8 batch_size=512",
    ),
    "G/14, GPUs": ("h200:8x8", "G/14,jft", "mesh.data=8 mesh.fsdp=8 model.remat=full"),
}
KINDS = {
    kind: [n for n in ROWS if n.endswith("GPUs") == (kind == "gpus")] for kind in ("tpus", "gpus")
}


def rehearse(name: str) -> dict:
    """Returns one row of the table."""
    topology, argument, overrides = ROWS[name]
    flags = [f"--config.{each}" for each in (*COMMON, *overrides.split())]
    config = load_config(f"{CONFIG}:{argument}", flags)
    devices = chips.topology_devices(topology)
    plan, _, _ = preflight.open_plan(config)
    began = time.perf_counter()
    found = preflight.compile_step(plan, make_mesh(config.mesh, devices))
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
        "roofline_milliseconds": found.roofline and found.roofline.seconds * 1e3,
        "of_ceiling": found.roofline and found.roofline.ceiling,
        "attention": "cuDNN" if found.fused_attention else "XLA",
        "compile_seconds": time.perf_counter() - began,
        "made": made(),
    }


def made() -> str:
    """When, and with what."""
    packages = ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cudnn-cu13")
    found = {each.name: each.version for each in importlib.metadata.distributions()}
    versions = [f"{name} {found[name]}" for name in packages if name in found]
    return f"{datetime.date.today().isoformat()}, with {', '.join(versions)}"


def compile_times() -> dict:
    """Seconds to trace, lower and compile one step on the CPU, by depth."""
    times: dict[str, float] = {}
    flags = [f"--config.{each}" for each in (*COMMON, "batch_size=8", "precision=float32")]
    config = load_config(f"{CONFIG}:S/16,jft", flags)
    plan, _, _ = preflight.open_plan(config)
    mesh = make_mesh(config.mesh, jax.devices("cpu")[:1])
    scanned, looped = (("scan", 12), ("scan", 48)), (("loop", 12), ("loop", 48))
    for cases in (scanned, scanned, scanned, looped):
        for how, depth in cases:
            vit = dataclasses.replace(
                variant("S/16", image_size=64), depth=depth, scan=how == "scan"
            )
            jax.clear_caches()
            began = time.perf_counter()
            preflight.compile_step(plan.with_model(vit), mesh)
            key = f"{how} {depth}"
            times[key] = min(times.get(key, 1e9), time.perf_counter() - began)
    return times


def readme(results: dict) -> str:
    """The page, from results.json."""
    tables: dict[str, list[str]] = {"tpus": [], "gpus": []}
    for name, row in results["rows"].items():
        kind = "gpus" if name in KINDS["gpus"] else "tpus"
        mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        moves = ", ".join(
            f"{kind} {count:,} x, {size / 1e9:.2f} GB"
            for kind, (count, size) in row["moves"].items()
            if size > 1e6
        )
        cells = [
            name.removesuffix(", GPUs"),
            f"{row['parameters'] / 1e9:.3g}",
            f"{row['topology']}, {row['devices']:,}",
            mesh,
            f"{row['batch']:,}",
            f"{row['peak_gib']:.1f} of {row['limit_gib']:.1f}",
            f"{row['state_gib']:.2f}",
        ]
        if kind == "gpus":
            cells += [f"{row['roofline_milliseconds']:.0f}", f"{row['of_ceiling']:.0%}"]
        ratio = row["moved_gb"] / row["least_gb"]
        cells += [f"{row['moved_gb']:.2f}", f"{ratio:.2f}", moves]
        tables[kind].append(f"| {' | '.join(cells)} |")
    times = results.get("compile_times", {})
    depths = [
        f"| {how} | {times[f'{how} 12']:.1f} s | {times[f'{how} 48']:.1f} s | "
        f"{times[f'{how} 48'] / times[f'{how} 12']:.2f} |"
        for how in ("scan", "loop")
        if f"{how} 48" in times
    ]
    rows = results["rows"]
    when = {kind: {rows[name]["made"] for name in rows if name in KINDS[kind]} for kind in KINDS}
    commands = [row["command"].replace(" --", " \\\n    --") for row in rows.values()]
    return PAGE.format(
        tpus="\n".join(tables["tpus"]),
        gpus="\n".join(tables["gpus"]),
        depths="\n".join(depths),
        commands="\n\n".join(commands),
        when="; ".join(
            f"{k.upper()[:-1]}s on {', '.join(sorted(v))}" for k, v in when.items() if v
        ),
    )


PAGE = """# Large runs, rehearsed

Does it fit, and how much does it move between chips? Each row is the real training step of a
config, compiled by the compiler of TPUs or GPUs for that many, on a machine that has none. Nothing
was run: memory and traffic are the compiler's, speed is not measured here.

This page is written by `python experiments/scale/run.py`; last for {when}.

| model | 10^9 weights | TPUs | mesh | batch | GiB a chip | of it state | GB moved | ratio | how |
|---|---|---|---|---|---|---|---|---|---|
{tpus}

| model | 10^9 weights | GPUs | mesh | batch | GiB | state | ms | ceiling | GB moved | ratio | how |
|---|---|---|---|---|---|---|---|---|---|---|---|
{gpus}

- Milliseconds are those of the roofline of the compiled program, at the least, without what moves
  between GPUs (see `preflight`); the ceiling is what large products reach. All use cuDNN's
  attention. What a GPU has is the 75% of its memory that JAX takes by default.
- On several nodes only `data` spans them: `4x8` are four nodes of eight GPUs.

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
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"tpus, gpus, or of {', '.join(ROWS)}"
    )
    parser.add_argument("--compile-time", action="store_true", help="measure the last table")
    args = parser.parse_args()
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"rows": {}}

    def write() -> None:
        results["rows"] = {name: results["rows"][name] for name in ROWS if name in results["rows"]}
        file.write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "README.md").write_text(readme(results))

    if args.compile_time:
        results["compile_times"] = compile_times()
        write()
    asked = args.rows or ([] if args.compile_time else list(KINDS))
    names = [row for each in asked for row in KINDS.get(each, [each])]
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no row {unknown[0]!r}: tpus, gpus, or of {', '.join(ROWS)}")
    for name in names:
        results["rows"][name] = rehearse(name)
        row = results["rows"][name]
        print(name, row["peak_gib"], row["moved_gb"] / max(row["least_gb"], 1e-9), flush=True)
        write()


if __name__ == "__main__":
    main()

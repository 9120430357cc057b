"""Does pre-training on fractals help a small ViT on digits? Trains it both ways, prints a table.

    python experiments/fractals/run.py [--runs=runs] [--seeds=0,1,2] [--epochs=1,3,10]

For each seed: one run on fractals, then for each length one fine-tuned from it at a higher
resolution and one from scratch, of the same steps. Runs that were stopped go on.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from run import train

CONFIG = "configs/fractals.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--epochs", default="1,3,10", help="of fine-tuning, comma-separated")
    args = parser.parse_args()

    found: dict[tuple[str, str], list[float]] = {}
    fractals = []
    for seed in args.seeds.split(","):
        pretrained = args.runs / f"fractals_seed{seed}"
        fractals.append(train(CONFIG, pretrained, f"--config.seed={seed}")["val/accuracy"])
        for epochs in args.epochs.split(","):
            flags = [f"--config.seed={seed}", f"--config.total_epochs={epochs}"]
            for start, init in {
                "fractals": [f"--config.init_from={pretrained}"],
                "scratch": [],
            }.items():
                workdir = args.runs / f"fractals_digits_seed{seed}_{epochs}_{start}"
                result = train(f"{CONFIG}:digits", workdir, *flags, *init)
                found.setdefault((epochs, start), []).append(result["test/accuracy"])

    def spread(values):
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.1%} ± {deviation:.1%}"

    print(f"\nfractals, val accuracy: {spread(fractals)}\n")
    print("| epochs on digits | from scratch | from fractals | difference, seed by seed |")
    print("|---|---|---|---|")
    for epochs in args.epochs.split(","):
        scratch, ours = found[epochs, "scratch"], found[epochs, "fractals"]
        differences = [b - a for a, b in zip(scratch, ours, strict=True)]
        print(f"| {epochs} | {spread(scratch)} | {spread(ours)} | {spread(differences)} |")


if __name__ == "__main__":
    main()

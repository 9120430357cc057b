"""Trains a small ViT on handwritten digits, fine-tunes it at a higher resolution, prints a table.

    python experiments/digits/run.py [--runs=runs] [--seeds=0,1,2]

Each run is one `python -m vit_jax train` command, printed before it starts, and goes on where it
was stopped. With several seeds, the mean, the spread and the paired difference are printed too.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

CONFIG = "configs/digits.py"


def train(config: str, workdir: Path, *overrides: str) -> dict[str, float]:
    """Runs the training command and returns the last value of every metric."""
    command = [sys.executable, "-m", "vit_jax", "train", f"--config={config}"]
    command += [f"--workdir={workdir}", "--json", *overrides]
    print("\n$ python " + " ".join(command[1:]), flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # it saves, then ends
        out, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    args = parser.parse_args()

    rows, accuracies = [], {"8x8": [], "16x16": []}
    for seed in args.seeds.split(","):
        pretrained = args.runs / f"digits_seed{seed}"
        finetuned = args.runs / f"digits_seed{seed}_16x16"
        runs = {
            "8x8": (train(CONFIG, pretrained, f"--config.seed={seed}"), pretrained),
            "16x16": (
                train(
                    f"{CONFIG}:finetune",
                    finetuned,
                    f"--config.seed={seed}",
                    f"--config.init_from={pretrained}",
                    "--config.model.head=fresh",  # as in the paper, B.1.1
                ),
                finetuned,
            ),
        }
        for size, (result, folder) in runs.items():
            accuracies[size].append(result["test/accuracy"])
            rows.append(
                f"{seed:>4}  {size:>5}  {result['test/accuracy']:13.2%}  {result['seconds']:7.0f}  "
                f"{result['images_per_second']:8.0f}  {folder}"
            )
    print("\nseed   size  test accuracy  seconds  images/s  run folder")
    print("\n".join(rows))
    if len(rows) > 2:
        differences = [b - a for a, b in zip(*accuracies.values(), strict=True)]
        for name, values in {**accuracies, "16x16 minus 8x8": differences}.items():
            spread = statistics.stdev(values)
            print(f"{name}: mean {statistics.mean(values):.2%}, standard deviation {spread:.2%}")
    print(f'\nIn a notebook: import vit_jax; vit = vit_jax.load("{finetuned}")')


if __name__ == "__main__":
    main()

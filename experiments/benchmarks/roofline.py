"""Compiles our training step for GPUs that are not there, and tells how long it takes at the least.

    python experiments/benchmarks/roofline.py --gpus=h100,h200,b200 --json=roofline.json
    python experiments/benchmarks/roofline.py --variants=B/16 --parts --model=pool=gap

The step is that of train.py (uint8 images, bfloat16, AdamW), on one GPU. XLA has no GPU to try its
kernels on, so its choices are those without autotuning. Needs jax[cuda13], no GPU: minutes on two
cores, and the same numbers every time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from contestants import our_program
from names import read_name
from tables import header

from vit_jax.analysis.chips import CHIPS, GIB, GPUS, topology_devices
from vit_jax.analysis.roofline import Roofline, read_kernels
from vit_jax.analysis.roofline import tell as tell_kernel
from vit_jax.errors import UserError, nearest
from vit_jax.models.config import ModelConfig
from vit_jax.models.variants import variant

COLUMNS = (
    "variant | image | batch | GPU | ms | images/s | of ceiling | kernels | GB | temporaries GiB"
)
# Variant, image size, batch: as train.py would be run.
CASES = (("Ti/16", 224, 256), ("S/16", 224, 256), ("B/16", 224, 256), ("L/16", 224, 256))
CASES += (("B/16", 384, 64),)


def compiled(config: ModelConfig, batch_size: int, gpu: str, contestant: str = "ours") -> Any:
    """The step of a contestant of train.py, compiled for one GPU of a kind."""
    named = read_name(contestant, "train")
    devices = topology_devices(f"{gpu}:1")
    _, shapes, step, _ = our_program("train", named, config, batch_size, devices)
    return step.lower(*shapes).compile(compiler_options=named.xla)


def measure(config: ModelConfig, batch_size: int, gpu: str, contestant: str) -> dict[str, Any]:
    """What the compiled step is, as a row of the table and as JSON keeps it."""
    program = compiled(config, batch_size, gpu, contestant)
    chip = CHIPS[GPUS[gpu][0]]
    roofline = Roofline(tuple(read_kernels(program.as_text())), chip)
    parts = roofline.by(lambda kernel: f"{kernel.part}, {kernel.direction}")
    return {
        "gpu": gpu,
        "batch_size": batch_size,
        "image": list(config.image_size),
        "ms": roofline.seconds * 1e3,
        "images_per_second": batch_size / roofline.seconds,
        "of_ceiling": roofline.ceiling,
        "kernels": roofline.launches,
        "gb": roofline.bytes / 1e9,
        "tflop": roofline.flops / 1e12,
        "temporaries_gib": program.memory_analysis().temp_size_in_bytes / GIB,
        "parts_ms": {part: seconds * 1e3 for part, seconds in parts.items()},
        "dearest": [tell_kernel(*dearest) for dearest in roofline.dearest(12)],
    }


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    cells = (
        name,
        "x".join(map(str, found["image"])),
        str(found["batch_size"]),
        found["gpu"],
        f"{found['ms']:.2f}",
        f"{found['images_per_second']:,.0f}",
        f"{found['of_ceiling']:.0%}",
        f"{found['kernels']:,}",
        f"{found['gb']:.1f}",
        f"{found['temporaries_gib']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def read_fields(texts: list[str]) -> dict[str, Any]:
    """Fields of the model as KEY=VALUE, each value as JSON or else as text."""
    fields: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        try:
            fields[key] = json.loads(value)
        except ValueError:
            fields[key] = value
    return fields


def main(argv: list[str] | None = None) -> None:
    """Prints the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpus", default="h100", help="h100, h200, b200, a100; several by commas")
    parser.add_argument("--variants", help="only these; several by commas")
    parser.add_argument("--contestant", default="ours", help="as train.py names them: ours+scan")
    parser.add_argument("--model", action="append", default=[], help="KEY=VALUE of the model")
    parser.add_argument(
        "--parts", action="store_true", help="the parts and the dearest kernels too"
    )
    parser.add_argument("--json", type=Path, help="where to keep what was found")
    args = parser.parse_args(argv)
    try:
        tell(args)
    except UserError as error:
        parser.error(str(error))


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for what cannot be compiled, before any of it is."""
    known = dict.fromkeys(name for name, _, _ in CASES)
    for flag, given, names in (("gpus", args.gpus, GPUS), ("variants", args.variants, known)):
        for each in [each for each in (given or "").split(",") if each and each not in names]:
            raise UserError(f"--{flag}={given}: no {each!r}; {nearest(each, names)}")
    if read_name(args.contestant, "train").family != "ours":
        raise UserError(f"--contestant={args.contestant}: only ours can be compiled here")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json={args.json}: there is no folder {args.json.parent}")


def tell(args: argparse.Namespace) -> None:
    """Compiles case by case, and prints and keeps what was found."""
    check(args)
    rows: list[dict[str, Any]] = []
    print(header(COLUMNS), flush=True)
    for name, size, batch_size in CASES:
        if args.variants and name not in args.variants.split(","):
            continue
        sizes = dict(image_size=size, num_classes=1000, dtype="bfloat16")
        config = variant(name, **sizes | read_fields(args.model))
        for gpu in args.gpus.split(","):
            found = measure(config, batch_size, gpu, args.contestant)
            print(row(name, found), flush=True)
            if args.parts:
                for part, milliseconds in found["parts_ms"].items():
                    print(f"    {milliseconds:7.3f} ms {part}")
                print("    " + "\n    ".join(found["dearest"]), flush=True)
            rows.append({"variant": name, "fields": args.model, **found})
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

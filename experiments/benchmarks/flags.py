"""What train.py and infer.py are asked for: flags, and what suits the device for those left out."""

import argparse
import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import workers
from contestants import MASKS
from names import MODES, read_name

from vit_jax.errors import UserError, nearest
from vit_jax.extras import install
from vit_jax.launch.jobs import ENVIRONMENT as LAUNCHED
from vit_jax.models.config import CHOICES, ModelConfig, ResNetConfig
from vit_jax.models.variants import variant

CONTESTANTS = (
    "ours",
    "timm",
    "timm-compile",
    "timm-compile:reduce-overhead",
    "timm-compile:max-autotune",
)
ON_CPU = ("ours", "timm")  # torch.compile takes minutes there
NO_TIMM = (
    "timm is left out: torch and timm are not both installed. Install torch for this device as "
    "https://pytorch.org says, then `pip install timm`."
)
HUGE_PAGES = LAUNCHED["GLIBC_TUNABLES"]
# Of all processes, so of all contestants. JAX would take most of a GPU's memory when it starts;
# here torch shares the GPU.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, and ends with exit code 2."""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized arguments: "):
            given = message.split()[2].split("=")[0]
            message = f"no flag {given}; {nearest(given, self._option_string_actions)}"
        self.exit(2, f"{self.prog}: {message}\n")


def parse(task: str, doc: str, argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags; those left out become what suits the device."""
    parser = Parser(description=doc.split("\n")[0], allow_abbrev=False)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--variants", help="such as B/16,L/14,R50x1 (default: B/16; on CPU Ti/16)")
    add("--image-size", type=int, help="default: 224; with --masks 512")
    parser.set_defaults(masks=False)
    if task == "train":
        told = f"learn masks: a head of {MASKS['num_classes']} classes on each patch of a ViT"
        add("--masks", action="store_true", help=told)
    add("--resolutions", help="several image sizes; also looks for the largest batch that fits")
    add("--batch-sizes", help="such as 64,128 (default: 128,256,512; on CPU 4)")
    add("--dtype", choices=CHOICES["dtype"], help="default: bfloat16; on CPU float32")
    add("--gelu", choices=CHOICES["gelu"], default="tanh", help="of all contestants")
    add("--steps", type=int, help="in a round (default: 20; on CPU 2)")
    add("--repeats", type=int, help="rounds (default: 7; on CPU 3)")
    add(
        "--contestants",
        help="ours, ours+loop, ours+scan, ours+deterministic, ours+remat:dots (of training), "
        f"ours+xla:FLAG=VALUE; timm, timm-compile, timm-compile:MODE with MODE of {MODES[1:]}, "
        f"each also +flash or +cudnn; default: {','.join(CONTESTANTS)}; on CPU {','.join(ON_CPU)}",
    )
    add("--scan", action="store_true", default=None, help="ours under lax.scan, whatever suits")
    add("--loop", action="store_false", dest="scan", help="ours as a loop, whatever suits")
    add("--compile", action=switch, help="time compiling, cold and warm (default: not on CPU)")
    add("--hugepages", action="store_true", help=f"GLIBC_TUNABLES={HUGE_PAGES} in all processes")
    add("--memory-gib", type=float, default=16, help="for the largest batch on a CPU")
    add("--json", type=Path, metavar="FILE", help="where to write the numbers of every round")
    add("--picture", type=Path, metavar="FILE", help="where to draw them")
    add(
        "--read", type=Path, metavar="FILE", help="tell and draw an earlier --json; measure nothing"
    )
    args = parser.parse_args(argv)
    try:
        _check_files(args)
        if args.read is None:
            _complete(task, args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _check_files(args: argparse.Namespace) -> None:
    for flag in ("json", "picture"):
        path = getattr(args, flag)
        if path is not None and not path.parent.is_dir():
            raise UserError(f"--{flag}={path}: there is no folder {path.parent}; make it first")
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--picture needs matplotlib: {install('plot')}")
    if args.read is not None and not args.read.is_file():
        raise UserError(f"--read={args.read}: there is no such file; name one that --json wrote")
    if args.read is not None:
        try:
            args.record = json.loads(args.read.read_text())
            args.record["cases"], args.record["header"]
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"--read={args.read}: this is no record of a benchmark; name one that --json wrote"
            ) from None


def _complete(task: str, args: argparse.Namespace) -> None:
    names = (args.contestants or ",".join(CONTESTANTS)).split(",")
    asked = {name: read_name(name, task) for name in names}
    os.environ.update(ENVIRONMENT)
    if args.hugepages:
        before = os.environ.get("GLIBC_TUNABLES", "")
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (before, HUGE_PAGES)))
    options = {name: each.xla for name, each in asked.items() if each.xla}
    args.machine = workers.in_child(workers.describe, options)
    for name, message in args.machine.pop("refused").items():
        raise UserError(f"contestant {name}: {message}")
    cpu = args.machine["backend"] == "cpu"
    if args.contestants is None and cpu:
        names = list(ON_CPU)
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    args.steps = args.steps or (2 if cpu else 20)
    args.repeats = args.repeats or (3 if cpu else 7)
    args.compile = not cpu if args.compile is None else args.compile
    args.batch_sizes = _numbers("batch-sizes", args.batch_sizes or ("4" if cpu else "128,256,512"))
    sizes = [args.image_size or (512 if args.masks else 224)]
    if args.resolutions:
        sizes = _numbers("resolutions", args.resolutions)
    variants = args.variants or ("Ti/16" if cpu else "B/16")
    args.configs = [
        (name + ", masks" * args.masks, _config(name, size, args))
        for name in variants.split(",")
        for size in sizes
    ]
    args.notes = []
    for name in names:
        if why := asked[name].needless(args.machine["backend"]):
            args.notes.append(f"{name} is left out: {why}.")
    names = [name for name in names if not asked[name].needless(args.machine["backend"])]
    torch = importlib.util.find_spec("torch") and importlib.util.find_spec("timm")
    if not torch and any(asked[name].family == "timm" for name in names):
        args.notes.append(NO_TIMM)
        names = [name for name in names if asked[name].family == "ours"]
    if not names:
        raise UserError(" ".join(["no contestant is left to measure.", *args.notes]))
    args.names = list(dict.fromkeys(names))


def _numbers(flag: str, text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise UserError(f"--{flag}={text}: expected positive whole numbers, such as 64,128")
    return [int(number) for number in numbers]


def _config(name: str, size: int, args: argparse.Namespace) -> ModelConfig:
    fields = dict(image_size=size, dtype=args.dtype, scan=args.scan)
    fields |= MASKS if args.masks else {}
    config = variant(name, **fields)
    if isinstance(config, ResNetConfig):  # which has no GELU
        return config
    return dataclasses.replace(config, gelu=args.gelu)

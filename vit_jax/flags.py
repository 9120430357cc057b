"""Command line flags of `vit-jax COMMAND`; unknown flags are refused."""

import argparse
import dataclasses
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence

import vit_jax
from vit_jax import distributed
from vit_jax.errors import UserError, nearest
from vit_jax.launch.jobs import options
from vit_jax.launch.launchers import LAUNCHERS

CONFIG = "a config file, or a recipe by its name (see `vit-jax configs`)"
_MAX_PATCHES = "take images in their own shapes, each with at most so many patches"


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A flag type: an integer from `least` to `most`."""

    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?\d+", text.strip()) else None
        if value is None or value < least or (most is not None and value > most):
            bound = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number {bound}")
        return value

    return read


def path(text: str) -> str:
    """A flag type: a path, with ~ expanded, which a shell does not do in --workdir=~/x."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


def fields(pairs: list[str]) -> dict[str, object]:
    """Parses NAME=VALUE pairs, for what a file does not say, as fields of the model's config."""
    if not pairs:
        return {}
    from vit_jax.models.config import FAMILIES, pair
    from vit_jax.training.config import MODEL_KEYS, SIDES
    from vit_jax.training.config_file import read_value

    kinds = {
        field.name: MODEL_KEYS.get(field.name, str)
        for family in FAMILIES.values()
        for field in dataclasses.fields(family)
    }
    kinds["architecture"] = str
    found, texts = {}, {}
    for given in pairs:
        name, _, text = given.partition("=")
        if name not in kinds:
            raise UserError(f"unknown model field in {given!r}; {nearest(name, kinds)}")
        value = None if text == "None" else read_value(f"{given!r}: {name}", text, kinds[name])
        if texts.setdefault(name, text) != text:
            raise UserError(f"--set {name}={texts[name]} and --set {given}: which of them?")
        found[name] = pair(value, name) if value and f"model.{name}" in SIDES else value
    return found


def add_chosen(command: argparse.ArgumentParser) -> None:
    """Flags that choose the keys of a weight file."""
    for flag, what in {
        "--only": "keys to read, of a file that holds more than one model, such as 'model_ema.*'",
        "--ignore": "keys to leave out, such as 'text_model.*'",
    }.items():
        command.add_argument(flag, metavar="PATTERN", action="append", default=[], help=what)


class Command(argparse.ArgumentParser):
    """A parser that accepts flags anywhere among images, and raises UserErrors.

    Flags cannot be abbreviated. `--config.KEY VALUE` is `--config.KEY=VALUE`.
    """

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)
        self.register("action", None, Last)

    def error(self, message):
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args=None, namespace=None):
        if self.get_default("takes_overrides"):
            args = _joined(args)
        self._check(args)
        namespace, rest = super().parse_known_args(args, namespace)
        if hasattr(namespace, "images"):  # argparse takes those before the first flag alone
            late = [value for value in rest if not value.startswith("-")]
            namespace.images = [*namespace.images, *map(path, late)]
            rest = [value for value in rest if value.startswith("-")]
        return namespace, rest

    def _check(self, args):
        """Raises for the first unknown flag, before argparse complains of a missing one."""
        overrides = self.get_default("takes_overrides")
        for flag in args:
            name = flag.partition("=")[0]
            known = [known for known in self._option_string_actions if known.startswith("--")]
            if flag == "--":
                break
            if not re.match(r"--?[^\W\d]", flag) or name in self._option_string_actions:
                continue
            if overrides and name.startswith("--config."):
                if "=" not in flag:
                    raise UserError(f"{flag} has no value: write {flag}=VALUE")
                continue
            if overrides:
                from vit_jax.training.config import keys

                known += [f"--config.{key}" for key in keys()]
            raise UserError(f"unknown argument {flag!r}; {nearest(name, known)}")


def _joined(args: Sequence[str]) -> list[str]:
    """Joins `--config.KEY` and the value after it by "="; a value does not begin with "--"."""
    joined: list[str] = []
    for arg in args:
        before = joined[-1] if joined else ""
        waits = before.startswith("--config.") and "=" not in before
        if waits and not arg.startswith("--"):
            joined[-1] = f"{before}={arg}"
        else:
            joined.append(arg)
    return joined


class Last(argparse.Action):
    """Stores a flag's value; if a flag is repeated, the last counts, with a warning."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = vars(self).setdefault("given", values)
        if before != values:
            logging.getLogger("vit_jax").info(
                "%s=%s counts, not the %s before it", option_string, values, before
            )
        self.given = values
        setattr(namespace, self.dest, values)


def make_parser(functions: Mapping[str, Callable[..., None]]) -> argparse.ArgumentParser:
    """Builds the parser of all commands; `--config.KEY=VALUE` flags are left over."""
    parser = argparse.ArgumentParser(prog="vit-jax", description=vit_jax.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"vit_jax {vit_jax.__version__}")
    overrides = "--config.KEY=VALUE changes any key of the config (see `vit-jax config`)."
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)

    command = commands.add_parser(
        "train",
        help=functions["train"].__doc__,
        epilog=overrides,
    )
    command.add_argument("--config", required=True, metavar="FILE.py|NAME[:ARGUMENT]", help=CONFIG)
    command.add_argument(
        "--workdir", type=path, required=True, help="the run folder; resumed if it exists"
    )
    command.add_argument(
        "--extend", action="store_true", help="go on for longer than the run was begun with"
    )
    command.add_argument("--json", action="store_true", help="print the results as a line of JSON")
    add_hosts(command)
    command.set_defaults(function=functions["train"], takes_overrides=True)

    command = commands.add_parser("evaluate", help=functions["evaluate"].__doc__)
    command.add_argument(
        "--workdir", type=path, help="a run folder, evaluated as its own config says"
    )
    command.add_argument(
        "--model", type=path, help="whatever vit_jax.load reads, evaluated as --config says"
    )
    command.add_argument("--config", metavar="FILE.py|NAME[:ARGUMENT]", help=CONFIG)
    command.add_argument(
        "--pictures",
        type=path,
        metavar="DIR",
        help="draw confusion and calibration there, and a page of the worst mistakes",
    )
    command.add_argument(
        "--predictions", type=path, metavar="FILE", help="a row an image, FILE.csv or FILE.jsonl"
    )
    command.add_argument("--max-patches", type=number(1), help=_MAX_PATCHES)
    add_chosen(command)
    command.add_argument("--json", action="store_true", help="print the results as a line of JSON")
    add_hosts(command)
    command.set_defaults(function=functions["evaluate"], takes_overrides=True)

    command = commands.add_parser("predict", help=functions["predict"].__doc__)
    command.add_argument("--model", type=path, required=True, help="whatever vit_jax.load reads")
    command.add_argument("--topk", type=number(1), help="classes to name (default 5)")
    command.add_argument(
        "images",
        type=path,
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder, an archive, a pattern in quotes, @LIST, or a data source",
    )
    for name, kind, what in (
        ("split", str, "of data sources, where they have several"),
        (
            "out",
            path,
            "FILE.jsonl, .csv or .parquet; of features .npy or .parquet; of masks or boxes a "
            "folder",
        ),
        ("batch-size", number(1), "images at a time (default: what suits the devices)"),
        ("threads", number(1), "that decode images (default: one a core)"),
        ("max-patches", number(1), _MAX_PATCHES),
    ):
        command.add_argument(f"--{name}", type=kind, help=what)
    add_chosen(command)
    for name, what in {"features": "the head's inputs", "dense": "features of patches"}.items():
        command.add_argument(f"--{name}", action="store_true", help=f"write {what}, not classes")
    command.add_argument(
        "--overlay", action="store_true", help="also write images with their masks or boxes"
    )
    command.add_argument(
        "--windows",
        help="masks of large images by windows of the model's size: scaled or own (eval.windows)",
    )
    command.add_argument(
        "--threshold",
        type=float,
        help="the lowest score of a box (default 0.05, and 0.5 of those that --overlay draws)",
    )
    command.set_defaults(function=functions["predict"], takes_overrides=False)

    fields = dict(
        metavar="NAME=VALUE",
        action="append",
        default=[],
        dest="known",
        help="a field of the config that the file does not say, such as gelu=tanh or num_heads=8",
    )
    command = commands.add_parser("convert", help=functions["convert"].__doc__)
    command.add_argument("src", type=path, help="whatever vit_jax.load reads")
    command.add_argument(
        "dst",
        type=path,
        help="FILE.npz, FILE.safetensors, or a folder for timm and hf; FILE.stablehlo and "
        "FILE.onnx are programs; hf:OWNER/NAME of the hub",
    )
    command.add_argument(
        "--format", help="of weights: google, big_vision, timm, hf, vit_jax or lora"
    )
    command.add_argument(
        "--preprocess",
        action="store_true",
        help="a program takes uint8 pixels, not normalised ones",
    )
    command.add_argument("--adapter", metavar="FILE", help="of format lora, to merge into SRC")
    command.add_argument("--license", metavar="NAME", help="of hf:OWNER/NAME, such as apache-2.0")
    command.add_argument("--set", **fields)
    add_chosen(command)
    command.set_defaults(function=functions["convert"], takes_overrides=False)

    command = commands.add_parser("inspect", help=functions["inspect"].__doc__)
    command.add_argument("src", type=path, help="whatever vit_jax.load reads")
    command.add_argument(
        "images", type=path, nargs="*", metavar="IMAGE", help="what to see attention on"
    )
    command.add_argument(
        "--pictures",
        type=path,
        metavar="DIR",
        help="draw filters and positions there, and attention",
    )
    command.add_argument("--set", **fields)
    add_chosen(command)
    command.set_defaults(function=functions["inspect"], takes_overrides=False)

    command = commands.add_parser(
        "data",
        help=functions["data"].__doc__,
        epilog=overrides,
    )
    command.add_argument(
        "spec", type=path, nargs="?", metavar="SPEC", help="such as folder:/data/pets"
    )
    command.add_argument("--split", help="one of them alone (default: all that there are)")
    command.add_argument(
        "--config", metavar="FILE.py|NAME[:ARGUMENT]", help="its data in SPEC's place"
    )
    command.add_argument(
        "--model", type=path, help="whatever vit_jax.load reads: what its classes are in it"
    )
    command.add_argument(
        "--pictures", type=path, metavar="DIR", help="draw examples, stored and as read"
    )
    command.set_defaults(function=functions["data"], takes_overrides=True)

    command = commands.add_parser(
        "preflight",
        help=functions["preflight"].__doc__,
        epilog=overrides,
    )
    command.add_argument("--config", required=True, metavar="FILE.py|NAME[:ARGUMENT]", help=CONFIG)
    command.add_argument(
        "--topology",
        help="what to compile for, where there is none: v5e:4x4, h100:8, h200:2x8, ...",
    )
    command.add_argument(
        "--search-seconds",
        type=number(0),
        default=120,
        metavar="SECONDS",
        help="how long to try changes of a run that does not fit (default 120; 0: none)",
    )
    command.set_defaults(function=functions["preflight"], takes_overrides=True)

    command = commands.add_parser("sweep", help=functions["sweep"].__doc__)
    command.add_argument(
        "file", type=path, metavar="FILE[:SCALE]", help="a Python file that yields points"
    )
    command.add_argument(
        "--workdir", type=path, required=True, help="where run folders go, one a point"
    )
    command.add_argument(
        "--launcher", default="local", help="local (default), slurm, or print commands"
    )
    for name, launcher in LAUNCHERS.items():
        group = command.add_argument_group(name, (launcher.__doc__ or "").partition("\n")[0])
        for field in options(launcher):
            whole = int in (field.type, *typing.get_args(field.type))
            flag = f"--{field.name.replace('_', '-')}"
            if flag not in command._option_string_actions:  # several launchers have --jobs
                group.add_argument(flag, type=number(1) if whole else str, **field.metadata)
    command.set_defaults(function=functions["sweep"], takes_overrides=False)

    command = commands.add_parser("report", help=functions["report"].__doc__)
    command.add_argument(
        "folders", type=path, nargs="+", metavar="DIR", help="run folders, or folders of sweeps"
    )
    command.add_argument(
        "--out", type=path, metavar="FILE.html", help="default: report.html in the first DIR"
    )
    command.set_defaults(function=functions["report"], takes_overrides=False)

    command = commands.add_parser("prepare", help=functions["prepare"].__doc__)
    command.add_argument(
        "src", type=path, help="a folder, a tar, tars such as 'a-*.tar', or a source"
    )
    command.add_argument(
        "dst", type=path, help="a folder, also in a bucket, read by the source records:DST"
    )
    for name, kind, default, what in (
        ("split", str, "train", "what to call the split (default train)"),
        ("part", str, None, "which part of SRC it is, such as train or all[:90%%]"),
        ("labels", path, None, "file that says each image's class: a text, ImageNet's devkit"),
        ("classes", path, None, "text file with a class name a line, in order (default: sorted)"),
        ("short-side", number(1), None, "shrink images whose shorter side is longer, to JPEG"),
        ("quality", number(1, 100), 95, "of those JPEGs (default 95)"),
        ("examples", number(1), None, "how many to take, of an endless source"),
        ("shard-examples", number(1), 4096, "how many a shard has (default 4096)"),
        ("threads", number(1), None, "default: one a core"),
    ):
        command.add_argument(f"--{name}", type=kind, default=default, help=what)
    command.set_defaults(function=functions["prepare"], takes_overrides=False)

    command = commands.add_parser("config", help=functions["config"].__doc__, epilog=overrides)
    command.add_argument("file", metavar="FILE.py|NAME[:ARGUMENT]|KEY", help="a config, or a key")
    command.add_argument(
        "prefix",
        nargs="?",
        metavar="KEY",
        help="what this key means, or all of a section, `optim.`",
    )
    command.set_defaults(function=functions["config"], takes_overrides=True)

    command = commands.add_parser("configs", help=functions["configs"].__doc__)
    command.set_defaults(function=functions["configs"], takes_overrides=False)
    return parser


def add_hosts(command: argparse.ArgumentParser) -> None:
    """Adds the flags of multi-process programs."""
    group = command.add_argument_group(
        "several processes", "needed only where JAX does not find them itself"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is to listen")
    group.add_argument("--processes", type=number(1), metavar="N", help="how many there are")
    group.add_argument(
        "--process-id", type=number(0), metavar="I", help="which one this is, from 0"
    )
    group.add_argument(
        "--join-timeout",
        type=number(1),
        default=distributed.JOIN_TIMEOUT,
        metavar="SECONDS",
        help=f"how long to wait for all to start (default {distributed.JOIN_TIMEOUT})",
    )


def parse(
    argv: list[str], functions: Mapping[str, Callable[..., None]]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line: returns the flags, with `function`, and the config's flags.

    Raises:
      UserError: no such command, flag or value.
      SystemExit: with --help, --version or no arguments.
    """
    parser = make_parser(functions)
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    known = dict(commands.choices)
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    command = argv[0]
    if command not in known and command not in ("-h", "--help", "--version"):
        raise UserError(f"there is no command {command!r}; {nearest(command, known)}")
    args, rest = parser.parse_known_args(argv)
    stray = [each for each in rest if not each.startswith("--config.")]
    if stray:
        raise UserError(f"unknown argument {stray[0]!r}; see `{known[command].prog} --help`")
    return args, rest

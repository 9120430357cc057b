"""`python -m vit_jax COMMAND`: flags in, one function called, a sentence and an exit code out.

Exit codes: 0 done, 1 a bug of ours (with a traceback), 2 the user's mistake, 75 another process of
the run is gone or never came (starting again goes on), 143 stopped by SIGTERM after saving. Where
there are several processes, all end with the same one.
"""

import argparse
import ast
import dataclasses
import errno
import json
import logging
import sys
import traceback
import warnings

from vit_jax import hosts
from vit_jax.errors import Stopped, UserError, nearest

SLURM = {
    "partition": (str, "NAME", "where to run"),
    "nodes": (int, "N", "several are one run (default 1)"),
    "tasks_per_node": (int, "N", "processes (default: a GPU each on several nodes, otherwise 1)"),
    "gpus_per_node": (str, "[KIND:]N", "such as 8 or a100:4"),
    "cpus_per_task": (int, "N", "cores of a process"),
    "time": (str, "LIMIT", "such as 8:00:00; a run that is longer is queued again"),
    "sbatch": (str, "OPTIONS", 'more of sbatch, in quotes: --sbatch="--account=x --mem=8G"'),
}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def train(args: argparse.Namespace, overrides: list[str]) -> None:
    """Trains a model, or goes on with a run that was stopped."""
    join(args, preemptible=True)
    from vit_jax.analysis.plots import curves
    from vit_jax.training import loop
    from vit_jax.training.config import load_config

    results = loop.train(load_config(args.config, overrides), args.workdir)
    if hosts.is_lead():
        curves(args.workdir)
        print(json.dumps(results))


def evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    """Evaluates a run, or any model on the splits of a config."""
    join(args, preemptible=False)
    from vit_jax.training.config import load_config
    from vit_jax.training.evaluate import evaluate_run, read_config

    if args.workdir:
        if args.config or args.model or overrides:
            raise UserError("give --workdir alone, or --model and --config")
        config, model = read_config(args.workdir), args.workdir
    elif args.model and args.config:
        config, model = load_config(args.config, overrides), args.model
    else:
        raise UserError("give --workdir=RUN, or --model=PATH and --config=FILE")
    results = evaluate_run(model, config)
    if hosts.is_lead():
        print(json.dumps(results))


def join(args: argparse.Namespace, *, preemptible: bool) -> None:
    """Joins the other processes, of which only the first shows its messages."""
    hosts.connect(
        args.coordinator,
        args.processes,
        args.process_id,
        join_timeout=args.join_timeout,
        preemptible=preemptible,
    )
    if not hosts.is_lead():
        logging.getLogger("vit_jax").setLevel(logging.WARNING)


def predict(args: argparse.Namespace, overrides: list[str]) -> None:
    """Names the likeliest classes of image files, one JSON object a line."""
    from vit_jax.checkpoints.load import load

    loaded = load(args.model)
    for file, labels in zip(args.images, loaded.predict(args.images, args.topk), strict=True):
        print(json.dumps({"file": file, "labels": labels}, ensure_ascii=False), flush=True)


def convert(args: argparse.Namespace, overrides: list[str]) -> None:
    """Writes a model under the names of another code base."""
    from vit_jax.checkpoints.export import save
    from vit_jax.checkpoints.load import load

    report = save(load(args.src, **_fields(args.known)), args.dst, format=args.format)
    print(f"{args.dst}: {len(report.lines)} arrays in {args.format}'s names")
    for name, what in report.assumed.items():
        print(f"note: {name}: {what}")


def inspect(args: argparse.Namespace, overrides: list[str]) -> None:
    """Says what a file of weights is: every key, what maps where, what it could not know.

    With --pictures it draws what they have learnt instead, and what they attend to in images.
    """
    from vit_jax.checkpoints.load import inspect as inspect_file
    from vit_jax.checkpoints.load import load

    known = _fields(args.known)
    if args.pictures is None:
        if args.images:
            raise UserError(f"{args.images[0]} is drawn with --pictures=DIR only: where to?")
        print(inspect_file(args.src, **known))
        return
    from vit_jax.analysis.plots import pictures

    paths, notes = pictures(load(args.src, **known), args.pictures, args.images)
    print(*paths, *(f"note: {note}" for note in notes), sep="\n")


def prepare(args: argparse.Namespace, overrides: list[str]) -> None:
    """Turns a folder, archives or any source of images into shards that are read by index."""
    from vit_jax.data.prepare import Conversion, prepare

    options = ("split", "part", "labels", "classes", "examples", "shard_examples", "threads")
    info = prepare(
        args.src,
        args.dst,
        conversion=Conversion(args.short_side, args.quality, args.exif),
        **{name: getattr(args, name) for name in options},
    )
    told = {"examples": info["examples"], "classes": len(info["label_names"])}
    told |= {"bad_images": info["bad_images"], "fingerprint": info["fingerprint"]}
    print(json.dumps({"source": f"records:{args.dst}", "split": args.split, **told}))


def preflight(args: argparse.Namespace, overrides: list[str]) -> None:
    """Says what a run will need, before anything is spent; exit code 2 if it does not fit."""
    from vit_jax.analysis.preflight import preflight
    from vit_jax.training.config import load_config

    for line in preflight(load_config(args.config, overrides), args.topology):
        print(line, flush=True)


def sweep(args: argparse.Namespace, overrides: list[str]) -> None:
    """Runs every point of a sweep file, or goes on with a sweep that was stopped."""
    from vit_jax.launch.launchers import make_launcher
    from vit_jax.launch.run import failures, run_sweep
    from vit_jax.launch.sweep import load_sweep

    options = {name: getattr(args, name) for name in ("jobs", *SLURM)}
    launcher = make_launcher(args.launcher, **options)
    failed = failures(run_sweep(load_sweep(args.file), args.workdir, launcher))
    if failed:
        raise UserError(failed)


def report(args: argparse.Namespace, overrides: list[str]) -> None:
    """Compares runs: one HTML page, and one Markdown table beside it and on the screen."""
    from vit_jax.launch.report import write_report

    print(write_report(args.folders, args.out), end="")


def _fields(pairs: list[str]) -> dict[str, object]:
    """Reads NAME=VALUE pairs, of what a file does not say itself, as fields of the config."""
    from vit_jax.models.config import FAMILIES

    kinds = {f.name: f.type for kind in FAMILIES.values() for f in dataclasses.fields(kind)}
    kinds["architecture"] = str
    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in kinds:
            raise UserError(f"unknown model field in {pair!r}; {nearest(name, kinds)}")
        try:
            found[name] = value if "str" in str(kinds[name]) else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(f"{pair!r}: {value!r} is no {kinds[name]}") from None
    return found


class Command(argparse.ArgumentParser):
    """The flags of a command, which may stand anywhere among its images."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, rest = super().parse_known_args(args, namespace)
        if hasattr(namespace, "images"):  # argparse takes those before the first flag alone
            late = [value for value in rest if not value.startswith("-")]
            namespace.images = [*namespace.images, *late]
            rest = [value for value in rest if value.startswith("-")]
        return namespace, rest


def make_parser() -> argparse.ArgumentParser:
    """The commands and their flags; `--config.KEY=VALUE` is left to the config."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)

    command = commands.add_parser(
        "train", help=train.__doc__, epilog="--config.KEY=VALUE changes any key of the config."
    )
    command.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]")
    command.add_argument("--workdir", required=True, help="the run folder; resumed if it exists")
    add_hosts(command)
    command.set_defaults(function=train, takes_overrides=True)

    command = commands.add_parser("evaluate", help=evaluate.__doc__)
    command.add_argument("--workdir", help="a run folder, evaluated as its own config says")
    command.add_argument("--model", help="whatever vit_jax.load reads, evaluated as --config says")
    command.add_argument("--config", metavar="FILE.py[:ARGUMENT]")
    add_hosts(command)
    command.set_defaults(function=evaluate, takes_overrides=True)

    command = commands.add_parser("predict", help=predict.__doc__)
    command.add_argument("--model", required=True, help="whatever vit_jax.load reads")
    command.add_argument("--topk", type=int, default=5, help="classes to name (default 5)")
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.set_defaults(function=predict, takes_overrides=False)

    fields = dict(
        metavar="NAME=VALUE",
        action="append",
        default=[],
        dest="known",
        help="a field of the config that the file does not say, such as gelu=tanh or num_heads=8",
    )
    command = commands.add_parser("convert", help=convert.__doc__)
    command.add_argument("src", help="whatever vit_jax.load reads")
    command.add_argument("dst", help="FILE.npz, FILE.safetensors, or a folder for timm and hf")
    command.add_argument("--format", required=True, help="google, big_vision, timm, hf or vit_jax")
    command.add_argument("--set", **fields)
    command.set_defaults(function=convert, takes_overrides=False)

    command = commands.add_parser("inspect", help=inspect.__doc__)
    command.add_argument("src", help="whatever vit_jax.load reads")
    command.add_argument("images", nargs="*", metavar="IMAGE", help="what to see attention on")
    command.add_argument(
        "--pictures", metavar="DIR", help="draw filters and positions there, and attention"
    )
    command.add_argument("--set", **fields)
    command.set_defaults(function=inspect, takes_overrides=False)

    command = commands.add_parser(
        "preflight",
        help=preflight.__doc__,
        epilog="--config.KEY=VALUE changes any key of the config.",
    )
    command.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]")
    command.add_argument(
        "--topology",
        help="what to compile for, where there is none: v5e:4x4, h100:8, h200:2x8, ...",
    )
    command.set_defaults(function=preflight, takes_overrides=True)

    command = commands.add_parser("sweep", help=sweep.__doc__)
    command.add_argument("file", metavar="FILE[:SCALE]", help="a Python file that yields points")
    command.add_argument("--workdir", required=True, help="where run folders go, one a point")
    command.add_argument(
        "--launcher", default="local", help="local (default), slurm, or print commands"
    )
    command.add_argument(
        "--jobs", type=int, metavar="N", help="how many at a time (default: local 1, slurm all)"
    )
    group = command.add_argument_group("slurm", "what one point gets; jobs outlive this command")
    for name, (kind, metavar, what) in SLURM.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=what)
    command.set_defaults(function=sweep, takes_overrides=False)

    command = commands.add_parser("report", help=report.__doc__)
    command.add_argument("folders", nargs="+", metavar="DIR", help="run folders, or sweeps'")
    command.add_argument("--out", metavar="FILE.html", help="default: report.html in the first DIR")
    command.set_defaults(function=report, takes_overrides=False)

    command = commands.add_parser("prepare", help=prepare.__doc__)
    command.add_argument("src", help="a folder, a tar, tars such as 'a-*.tar', or a source")
    command.add_argument("dst", help="a folder, read by the source records:DST")
    for name, kind, default, what in (
        ("split", str, "train", "what to call the split (default train)"),
        ("part", str, None, "which part of SRC it is, such as train or all[:90%%]"),
        ("labels", str, None, "file that says each image's class: a text, ImageNet's devkit"),
        ("classes", str, None, "text file with a class name a line, in order (default: sorted)"),
        ("short-side", int, None, "shrink images whose shorter side is longer, to JPEG"),
        ("quality", int, 95, "of those JPEGs (default 95)"),
        ("examples", int, None, "how many to take, of an endless source"),
        ("shard-examples", int, 4096, "how many a shard has (default 4096)"),
        ("threads", int, None, "default: one a core"),
    ):
        command.add_argument(f"--{name}", type=kind, default=default, help=what)
    command.add_argument("--exif", action="store_true", help="turn shrunk images upright")
    command.set_defaults(function=prepare, takes_overrides=False)
    return parser


def add_hosts(command: argparse.ArgumentParser) -> None:
    """The flags of a program of several processes."""
    group = command.add_argument_group(
        "several processes", "needed only where JAX does not find them itself"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is to listen")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--join-timeout",
        type=int,
        default=hosts.JOIN_TIMEOUT,
        metavar="SECONDS",
        help=f"how long to wait for all to start (default {hosts.JOIN_TIMEOUT})",
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args, rest = make_parser().parse_known_args(argv)
    code, message = 0, ""
    try:
        for flag in rest:
            if not (args.takes_overrides and flag.startswith("--config.") and "=" in flag):
                known = [f"--{name}" for name in vars(args) if name not in ("function",)]
                raise UserError(f"unknown argument {flag!r}; {nearest(flag, known)}")
        args.function(args, rest)
    except UserError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            code, message = 2, f"error: {error}: make room or choose another place"
        elif isinstance(error, Stopped):
            code, message = 143, str(error)
        else:
            hosts.explain(error)
            if hosts.alone():
                raise
            traceback.print_exc()
            code, message = 1, f"error: process {hosts.index()} failed: {error!r}"
    hosts.leave(code, message)
    return code


def set_up_screen() -> None:
    """Shows our own messages, plainly."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("vit_jax").setLevel(logging.INFO)
    # Orbax's threads narrate a failed save at length; the store raises it, as one sentence.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")


if __name__ == "__main__":
    set_up_screen()
    sys.exit(main())

"""The command line: `vit-jax COMMAND`, or `python -m vit_jax COMMAND`.

Exit codes: 0 done, 1 a bug of ours (with a traceback), 2 the user's mistake, 3 done, but `predict`
was given files that are no readable images, 75 another process of the run was lost or did not
start, or a bucket does not answer (starting again resumes), 130 Ctrl-C (training saves first), 141
nobody reads the output (as in `inspect X | head`), 143 stopped by SIGTERM after saving. Several
processes all end with the same one.
"""

import argparse
import functools
import io
import json
import logging
import os
import select
import signal
import sys
import traceback
import warnings

from vit_jax import distributed
from vit_jax.errors import Stopped, UserError, name_extra, sentence
from vit_jax.flags import fields, parse
from vit_jax.recipes import find, listing

INCOMPLETE = 3  # exit code: all is done that could be


def train(args: argparse.Namespace, overrides: list[str]) -> None:
    """Trains a model, or resumes a run that was stopped."""
    join(args, preemptible=True)
    from vit_jax.training.config_file import load_config

    config = load_config(args.config, overrides)
    from vit_jax.commands import run_training

    results, lines = run_training(config, args.workdir, extend=args.extend)
    if distributed.is_lead():
        print(json.dumps(results) if args.json else "\n".join(lines))


def evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    """Evaluates a run, or any model on the splits of a config."""
    join(args, preemptible=False)
    from vit_jax.commands import run_evaluation
    from vit_jax.training.config_file import load_config

    files = dict(pictures=args.pictures, predictions=args.predictions)
    files |= dict(max_patches=args.max_patches, only=args.only, ignore=args.ignore)
    if args.workdir and not args.config and not args.model:
        results, lines = run_evaluation(args.workdir, None, overrides, **files)
    elif args.model and args.config and not args.workdir:
        config = load_config(args.config, overrides)
        results, lines = run_evaluation(args.model, config, **files)
    else:
        raise UserError("give --workdir=RUN alone, or both --model=PATH and --config=FILE")
    if distributed.is_lead():
        print(json.dumps(results) if args.json else "\n".join(lines))


def join(args: argparse.Namespace, *, preemptible: bool) -> None:
    """Joins the processes of a run, of which only the first shows its messages."""
    distributed.connect(
        args.coordinator,
        args.processes,
        args.process_id,
        join_timeout=args.join_timeout,
        preemptible=preemptible,
    )
    if not distributed.is_lead():
        logging.getLogger("vit_jax").setLevel(logging.WARNING)


def predict(args: argparse.Namespace, overrides: list[str]) -> int:
    """Predicts classes, masks or boxes, or writes features, of images, folders and data sources.

    Without --out one JSON object a line. Exit code 3 if anything named is no readable image.
    """
    if args.features and args.dense:
        raise UserError("--features and --dense are two kinds of features: name one of them")
    what = "dense" if args.dense else "features" if args.features else "classes"
    if args.topk and what != "classes":
        raise UserError(f"--topk={args.topk} counts classes, and --{what} names none: leave it out")
    from vit_jax.data.inputs import find_images

    inputs = find_images(*args.images, split=args.split)
    from vit_jax.training.evaluation.predict import load_local
    from vit_jax.training.evaluation.predict_boxes import boxes_to
    from vit_jax.training.evaluation.predict_masks import answers, masks_to
    from vit_jax.training.evaluation.predict_output import predict_to

    how = dict(max_patches=args.max_patches, only=args.only, ignore=args.ignore)
    load = functools.partial(load_local, args.model, **how)
    options = dict(batch_size=args.batch_size, threads=args.threads)
    if what == "classes":
        what = answers(args.model, args.out, args.only, args.ignore)
    if what in ("masks", "boxes") and args.topk:
        raise UserError(f"--topk={args.topk} names classes of images, and {what} have all")
    if args.windows and what != "masks":
        flag = f"--windows={args.windows}"
        raise UserError(f"{flag} is for masks: of a model that segments, into --out=FOLDER")
    if args.threshold is not None and what != "boxes":
        flag = f"--threshold={args.threshold:g}"
        raise UserError(f"{flag} is for boxes: of a model that detects, into --out=FOLDER")
    if what == "masks":
        options |= dict(overlays=args.overlay, windows=args.windows or "none")
        return 0 if masks_to(args.out, inputs, load, **options) else INCOMPLETE
    if what == "boxes":
        options |= dict(overlays=args.overlay, threshold=args.threshold)
        return 0 if boxes_to(args.out, inputs, load, **options) else INCOMPLETE
    if args.overlay:
        raise UserError(
            "--overlay is for masks and boxes: of a model that segments or detects, into "
            "--out=FOLDER"
        )
    done = predict_to(args.out, inputs, load, what, topk=args.topk or 5, **options)
    return 0 if done else INCOMPLETE


def convert(args: argparse.Namespace, overrides: list[str]) -> None:
    """Converts a model to the format of another code base, or to a program."""
    from vit_jax.checkpoints.export import save
    from vit_jax.checkpoints.load import load
    from vit_jax.checkpoints.programs import ENDINGS

    program = args.dst.lower().endswith(ENDINGS)
    if args.format is None and not program:
        raise UserError("the following arguments are required: --format (programs have none)")
    options = dict(only=args.only, ignore=args.ignore, **fields(args.known))
    if args.adapter:
        options["adapter"] = args.adapter
    if args.license is not None and not args.dst.startswith("hf:"):
        raise UserError(f"--license is for the hub, hf:OWNER/NAME, not for {args.dst}")
    if args.dst.startswith("hf:"):
        from vit_jax.training.hub import upload

        if args.license is None:
            raise UserError(f"{args.dst} needs --license=NAME: which one, nothing here can know")
        model = load(args.src, **options) if any(options.values()) else args.src
        print(upload(model, args.dst, license=args.license, format=args.format))
        return
    model = load(args.src, **options)
    format = "vit_jax" if args.format is None else args.format
    report = save(model, args.dst, format=format, preprocess=args.preprocess)
    if program:
        print(f"{args.dst}: takes {report.facts['input']}; gives {report.facts['output']}")
    else:
        print(f"{args.dst}: {len(report.lines)} arrays in {format}'s names")
    for name, what in report.assumed.items():
        print(f"note: {name}: {what}")


def inspect(args: argparse.Namespace, overrides: list[str]) -> None:
    """Reports on a weight file: the model, and where each key goes.

    With --pictures it plots what the model has learnt instead, and its attention on images.
    """
    from vit_jax.checkpoints.load import load
    from vit_jax.checkpoints.opened import inspect as inspect_file

    known = fields(args.known) | dict(only=args.only, ignore=args.ignore)
    if args.pictures is None:
        if args.images:
            raise UserError(f"{args.images[0]} is drawn with --pictures=DIR only: where to?")
        print(inspect_file(args.src, **known))
        return
    from vit_jax.analysis.plots import pictures

    paths, notes = pictures(load(args.src, **known), args.pictures, args.images)
    print(*paths, *(f"note: {note}" for note in notes), sep="\n")


def prepare(args: argparse.Namespace, overrides: list[str]) -> None:
    """Converts a folder, archives or any image source to shards with random access."""
    if "://" in args.dst:  # temporary files to remove, and leases to give back
        signal.signal(signal.SIGINT, signal.default_int_handler)
    from vit_jax.data.prepare import Conversion, prepare

    options = ("split", "part", "labels", "classes", "examples", "shard_examples", "threads")
    info = prepare(
        args.src,
        args.dst,
        conversion=Conversion(args.short_side, args.quality),
        **{name: getattr(args, name) for name in options},
    )
    summary = {"examples": info["examples"], "classes": len(info["label_names"])}
    summary |= {"bad_images": info["bad_images"], "fingerprint": info["fingerprint"]}
    print(json.dumps({"source": f"records:{args.dst}", "split": args.split, **summary}))


def data(args: argparse.Namespace, overrides: list[str]) -> None:
    """Reports on a data source: splits, classes, sizes, duplicates, problems."""
    from vit_jax.analysis.data import data
    from vit_jax.training.config_file import load_config

    if (args.spec is None) == (args.config is None) or (overrides and not args.config):
        raise UserError("give a SPEC such as folder:/data/pets, or --config=FILE.py")
    config = load_config(args.config, overrides) if args.config else None
    if config:
        print(f"config {args.config}")
    options = dict(split=args.split, model=args.model, folder=args.pictures)
    for line in data(args.spec, config, **options):
        print(line, flush=True)


def preflight(args: argparse.Namespace, overrides: list[str]) -> None:
    """Reports the memory and time that a run will need; exit code 2 if it does not fit."""
    from vit_jax.training.config_file import load_config

    config = load_config(args.config, overrides)
    from vit_jax.analysis.preflight import preflight

    for line in preflight(config, args.topology, args.search_seconds):
        print(line, flush=True)


def sweep(args: argparse.Namespace, overrides: list[str]) -> None:
    """Runs every point of a sweep file, or resumes a sweep that was stopped."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it has processes to end
    from vit_jax.launch.jobs import options
    from vit_jax.launch.launchers import LAUNCHERS, make_launcher
    from vit_jax.launch.run import failures, run_sweep
    from vit_jax.launch.sweep import load_sweep

    names = {field.name for each in LAUNCHERS.values() for field in options(each)}
    launcher = make_launcher(args.launcher, **{name: getattr(args, name) for name in names})
    failed = failures(run_sweep(load_sweep(args.file), args.workdir, launcher))
    if failed:
        raise UserError(failed)


def report(args: argparse.Namespace, overrides: list[str]) -> None:
    """Compares runs: an HTML page, and a Markdown table next to it and on the screen."""
    from vit_jax.launch.page import write_report

    print(write_report(args.folders, args.out), end="")


def config(args: argparse.Namespace, overrides: list[str]) -> None:
    """Shows the keys of a config with their values, or what keys mean."""
    from vit_jax.training.reference import explained, is_key, lines, matching

    if args.prefix is None and is_key(args.file):
        if overrides:
            raise UserError(f"{overrides[0]} is for a config file, but {args.file} is a key")
        print(*map(explained, matching(args.file)), sep="\n")
        return
    for line in lines(args.file, overrides, args.prefix):
        print(line)


def configs(args: argparse.Namespace, overrides: list[str]) -> None:
    """Lists the recipes: config files that come with the package."""
    print(listing())


COMMANDS = {
    function.__name__: function
    for function in (
        train,
        evaluate,
        predict,
        convert,
        inspect,
        data,
        preflight,
        sweep,
        report,
        prepare,
        config,
        configs,
    )
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    code, message, command = 0, "", ""
    try:
        try:
            args, rest = parse(sys.argv[1:] if argv is None else argv, COMMANDS)
        except SystemExit:
            _flush()  # of --help
            raise
        command = args.function.__name__
        if getattr(args, "config", None):
            find(args.config)  # before imports that take seconds
        code = args.function(args, rest) or 0
        _flush()
    except UserError as error:
        code, message = error.code, f"error: {error}"
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        known = sentence(error, command)
        if isinstance(error, BrokenPipeError) and _reader_left():
            code = 141  # as a shell tells of SIGPIPE
        elif known is not None:
            code, message = 2, f"error: {known}"
        elif isinstance(error, SystemExit):
            raise
        elif isinstance(error, Stopped):
            code, message = error.code, str(error)
        else:
            distributed.explain(error)
            if distributed.alone():
                raise
            traceback.print_exc()
            code, message = 1, f"error: process {distributed.index()} failed: {error!r}"
    distributed.leave(code, message)
    return code


def _flush() -> None:
    """Writes out what is printed; that nobody reads it is noticed here."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _reader_left() -> bool:
    """Whether stdout's reader has gone; if so, redirects stdout to /dev/null."""
    try:
        file = sys.stdout.fileno()
    except (AttributeError, io.UnsupportedOperation):  # there is none, or it is no file
        return False
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    left = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file)
    return left


def set_up_screen() -> None:
    """Configures logging: our messages as plain text, no noise from libraries."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("vit_jax").setLevel(logging.INFO)
    # Orbax's threads log a failed save at length; the store raises it as one sentence.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("jax._src.xla_bridge").addFilter(name_extra)
    sys.unraisablehook = lambda unraisable: None
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    warnings.filterwarnings("ignore", message="Palette images with Transparency")  # it is dropped


def interrupted(*_: object) -> None:
    """Ends the program at Ctrl-C, until a command has something to save (see stopping.py).

    A KeyboardInterrupt would be lost in a library's callback or import, and threads of JAX may
    crash while Python winds down.
    """
    distributed.leave(130, "stopped by Ctrl-C")
    os._exit(130)


def run() -> int:
    """The program: sets up the screen, runs the command of sys.argv, returns its exit code."""
    signal.signal(signal.SIGINT, interrupted)
    set_up_screen()
    return main()


if __name__ == "__main__":
    sys.exit(run())

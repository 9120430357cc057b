"""What a run shows: its summary, its progress and its results.

A terminal and a notebook have a progress bar; a pipe and a log file have a line every PERIOD
seconds. All messages are log records of `vit_jax`, and stay above a terminal's bar.
"""

import contextlib
import io
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm
from etils import epath
from jax.sharding import Mesh

from vit_jax import distributed
from vit_jax.models.config import ViTConfig
from vit_jax.models.elementwise import kept_patches
from vit_jax.models.variants import variant_fields
from vit_jax.training.config import Config
from vit_jax.training.plan import Plan
from vit_jax.training.sharding import AXES, device_memory
from vit_jax.training.stopping import interruptible
from vit_jax.training.trainable import trainable

logger = logging.getLogger(__name__)
PERIOD = 30.0  # seconds between two lines of progress where there is no bar
# The training metrics that progress shows, and their names in a bar.
SHOWN = {
    **{"train/loss": "loss", "train/accuracy": "acc", "train/pixel_accuracy": "acc"},
    "images_per_second": "img/s",
}
_OF_CLASSES = ("iou", "ap")  # metrics of each class
_CLASSES = 12  # at most, of which they are shown
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


def summary(
    plan: Plan, mesh: Mesh, state: Any, data: Sequence[str], workdir: str, start_step: int
) -> list[str]:
    """The lines that a run begins with: devices, model, data, steps and the run folder.

    Args:
      state: the train state, or its shapes.
      data: a line for each split (see `DataSets.summary`).
    """
    config, total = plan.config, plan.total_steps
    steps = f"{total:,} of {config.batch_size:,} images each"
    if plan.examples is not None:
        steps += f", {_number(total * config.batch_size / plan.examples)} epochs"
    if probe := config.optim.probe:
        steps += f"; the first {probe.steps:,} train the head alone (optim.probe)"
    steps += f"; resumed at step {start_step:,}" if start_step else ""
    if config.data.val is not None and not 0 < config.eval.every < total:
        steps += "; val is measured at the end alone (eval.every)"
    every, minutes = config.checkpoint.every, config.checkpoint.every_minutes
    saved = [f"{every:,} steps"] * (every > 0) + [f"{minutes:g} minutes"] * (minutes > 0)
    when = " or ".join(saved)
    augment = "; ".join(_augment(plan))
    return [
        f"{'devices':<10}  {_devices(mesh)}",
        f"{'model':<10}  {_model(plan, state)}",
        *([f"{'teacher':<10}  {plan.teacher}"] if plan.teacher else []),
        *data,
        f"{'steps':<10}  {steps}",
        *([f"{'augment':<10}  {augment}"] if augment else []),
        f"{'run folder':<10}  {workdir}, saved {f'every {when}, and ' if when else ''}at the end",
    ]


def _augment(plan: Plan) -> Iterator[str]:
    """What changes during the run, or from training to evaluation."""
    config, total = plan.config, plan.total_steps
    if (repeats := config.data.train.repeats) > 1:
        yield f"each image {repeats} times in a batch, 1 of {repeats} images in an epoch"
    model = plan.card.config
    if isinstance(model, ViTConfig) and (rate := model.patch_dropout):
        n = math.prod(model.grid)
        yield f"{kept_patches(n, rate)} of {n} patches of a training image"
    if growth := plan.growth:
        phases = zip(growth.sides, growth.starts, strict=True)
        told = [f"{side}x{side} from step {first + 1:,}" for side, first in phases]
        yield f"images of {', '.join(told)}"
    if (mixed := config.augment.mixed_steps(total)) < total:
        yield f"mixup and cutmix end after step {mixed:,}"


def _devices(mesh: Mesh) -> str:
    device, n = mesh.devices.flat[0], mesh.size
    local = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    memory = device_memory(local)
    text = f"{n:,} x {device.device_kind}"
    if memory is not None:
        text += f", {memory / 2**30:.3g} GiB of memory{' each' if n > 1 else ''}"
    if n > 1:
        sizes = zip(AXES, mesh.devices.shape, strict=True)
        text += f", mesh {' '.join(f'{axis}={size}' for axis, size in sizes if size > 1)}"
    return text + (f", {distributed.count():,} processes" if distributed.count() > 1 else "")


def _model(plan: Plan, state: Any) -> str:
    given, model = plan.config.model, plan.card.config
    name = given.get("variant")
    if name is None:
        vit = isinstance(model, ViTConfig)
        name = f"ViT with width {model.width}, depth {model.depth}" if vit else "ResNet"
    else:
        sizes = variant_fields(name)
        changed = [
            f"{key} {given[key]}" for key in sizes if given.get(key, sizes[key]) != sizes[key]
        ]
        name += f" with {', '.join(changed)}" if changed else ""
    classes = f", {model.num_classes:,} classes" if model.num_classes else ""
    learned, count = trainable(plan.config.optim.freeze, state.params).sizes(state.params)
    learning = f", of which {learned:,} learn" if learned < count else ""
    pixels = "{}x{} pixels".format(*model.image_size)
    if (most := plan.card.preprocess.max_patches) is not None:
        pixels = f"images of any shape, at most {most} patches"
    precision = "" if model.dtype == "float32" else f", {model.dtype}"
    return f"{name}; {pixels}{classes}, {count:,} parameters{learning}{precision}"


@contextlib.contextmanager
def compiling(side: int | None = None) -> Iterator[None]:
    """Says that the training step is being compiled and, at the end, how long it took.

    Args:
      side: of the images, where they grow.
    """
    sized = "" if side is None else f" for images of {side}x{side} pixels"
    logger.info("compiling the training step%s ...", sized)
    began = time.monotonic()
    with interruptible():
        yield
    logger.info("compiled in %.1f s", time.monotonic() - began)


class Progress:
    """The progress of a run on the screen: a bar, or a line every PERIOD seconds."""

    def __init__(self, name: str, start_step: int, total_steps: int):
        self._name, self._start, self._total = name, start_step, total_steps
        self._step, self._last = start_step, dict[str, int | float]()
        self._stack, self._bar = contextlib.ExitStack(), None
        self._lead = distributed.is_lead()

    def step(self, step: int) -> None:
        """To be called after every step; the first call, when it is compiled, starts the clock."""
        if not self._lead:
            return
        if self._step == self._start:
            self._began = self._last_line = time.monotonic()
            self._first, self._bar = step, self._make_bar()
            if self._bar is None:
                logger.info("a line of progress every %g s", PERIOD)
        self._step = step
        if self._bar is not None:
            self._bar.update()
        elif time.monotonic() - self._last_line > PERIOD:
            self._log_progress()

    def measured(self, step: int, values: Mapping[str, int | float]) -> None:
        """Shows the metrics of a step: those of training with the progress, others as a line."""
        if any(name.startswith("train/") for name in values):
            self._last = {name: values[name] for name in SHOWN if name in values}
            if self._bar is not None:
                known = {SHOWN[name]: _number(value) for name, value in self._last.items()}
                self._bar.set_postfix(known, refresh=False)
            elif step == self._total:
                self._log_progress()
        else:
            self._say(step, "; ".join(measured(values)))

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
        self._stack.close()

    def _say(self, step: int, words: str) -> None:
        width = len(f"{self._total:,}")
        logger.info("step %*s of %s: %s", width, f"{step:,}", f"{self._total:,}", words)

    def _log_progress(self) -> None:
        self._last_line = now = time.monotonic()
        train = [
            f"{name.removeprefix('train/')} {_number(value)}"
            for name, value in self._last.items()
            if name.startswith("train/")
        ]
        words = [f"train {', '.join(train)}"] if train else []
        if "images_per_second" in self._last:
            words.append(f"{_number(self._last['images_per_second'])} images/s")
        if (done := self._step - self._first) and self._step < self._total:
            left = (self._total - self._step) * (now - self._began) / done
            words.append(f"{tqdm.tqdm.format_interval(left)} left")
        self._say(self._step, ", ".join(words))

    def _make_bar(self) -> tqdm.tqdm | None:
        options = dict(total=self._total, initial=self._start, desc=self._name, bar_format=_BAR)
        if _in_notebook():
            return _NotebookBar(**options)
        if not sys.stderr.isatty():
            return None
        from tqdm.contrib.logging import logging_redirect_tqdm  # warns in a notebook

        loggers = [logging.getLogger("vit_jax"), logging.root]
        shown = [each for each in loggers if any(map(_is_console, each.handlers))]
        self._stack.enter_context(logging_redirect_tqdm(shown))
        if 0 in os.get_terminal_size(sys.stderr.fileno()):  # it does not say
            return tqdm.tqdm(**options, ncols=80, nrows=24)
        return tqdm.tqdm(**options, dynamic_ncols=True)


class _NotebookBar(tqdm.tqdm):
    """A bar in one output of a notebook's cell, which is replaced; it needs no ipywidgets."""

    def __init__(self, **options: Any):
        self._handle: Any = None
        super().__init__(**options, file=io.StringIO(), ascii=False, ncols=100, mininterval=0.5)

    def display(self, *_: Any, **__: Any) -> None:
        from IPython.display import display

        data = {"text/plain": str(self)}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def clear(self, *_: Any, **__: Any) -> None:
        pass


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Context in which our log records are printed, if nobody has set a level for them.

    The command line has; in a script or a notebook, Python would show warnings only.
    """
    ours = logging.getLogger("vit_jax")
    if ours.level != logging.NOTSET or ours.isEnabledFor(logging.INFO):
        yield
        return
    # A notebook shows stderr as if something were wrong.
    handler = logging.StreamHandler(sys.stdout if _in_notebook() else sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    propagate, ours.propagate = ours.propagate, False
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if distributed.is_lead() else logging.WARNING)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(logging.NOTSET)
        ours.propagate = propagate


def measured(values: Mapping[str, int | float]) -> list[str]:
    """A line for each split or evaluator: "val accuracy 0.9721, top5 0.9989, loss 0.1021".

    Of the metrics of each class, val/iou/NAME or val/ap/NAME, there is one as well, with the lowest
    ones.
    """
    lines: dict[str, dict[str, int | float]] = {}
    for name, value in values.items():
        split, _, metric = name.partition("/")
        kind, _, of_class = metric.partition("/")
        if kind in _OF_CLASSES:
            split, metric = f"{split} {kind}", of_class
        if metric and split != "train":
            lines.setdefault(split, {})[metric] = value
    for split, found in lines.items():
        if split.endswith(tuple(f" {kind}" for kind in _OF_CLASSES)) and len(found) > _CLASSES:
            lowest = sorted(found, key=found.__getitem__)[:_CLASSES]
            lines[split] = {name: found[name] for name in lowest}
            lines[split][f"... of {len(found)} classes, the highest"] = max(found.values())
    return [
        f"{split} {', '.join(f'{name} {_number(value)}' for name, value in found.items())}"
        for split, found in lines.items()
    ]


def evaluated(model: epath.PathLike, results: Mapping[str, int | float]) -> list[str]:
    """The lines of an evaluation: the model, and a line for each split or evaluator."""
    step = f" at step {results['step']:,}" if "step" in results else ""
    return [f"{model}{step}:", *measured(results)]


def finished(
    config: Config,
    workdir: epath.PathLike,
    results: Mapping[str, int | float],
    picture: Any,
    found: Any = None,
) -> list[str]:
    """The last lines of a run: what was measured, where all is, and the commands that come next."""
    seconds = results.get("seconds")
    took = f" in {tqdm.tqdm.format_interval(seconds)}" if seconds is not None else ""
    lines = [f"finished {results.get('step', 0):,} steps{took}", *measured(results)]
    kept = f"{workdir} has the model, its checkpoints and metrics.jsonl"
    kept += f"; curves in {picture}" if picture else ""
    lines.append(kept + (f"; what the model finds in {found}" if found else ""))
    if config.checkpoint.best:
        workdir = f"{workdir}/checkpoints/best"
    next_ = [["vit-jax", "evaluate", f"--workdir={workdir}"]] if len(lines) > 2 else []
    commands = [shlex.join(command) for command in next_]
    if config.classifies:
        out = ["--out=masks"] if config.segments else ["--out=boxes"] if config.detects else []
        commands.append(f"{shlex.join(['vit-jax', 'predict', f'--model={workdir}', *out])} IMAGE")
    return [*lines, "next:", *(f"  {command}" for command in commands)]


def _number(value: int | float) -> str:
    """Four digits, but no exponent for large numbers."""
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}"

"""Metric logging: metrics.jsonl, TensorBoard, Weights & Biases and the screen."""

import contextlib
import json
import logging
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from vit_jax import distributed
from vit_jax.errors import UserError
from vit_jax.extras import install
from vit_jax.training.config import Config, to_json
from vit_jax.training.console import Progress
from vit_jax.writing import write_atomically

logger = logging.getLogger(__name__)

# Keys that depend on the machine and its load: the only ones that may differ in a resumed run.
TIMING_KEYS = ("images_per_second", "input_wait_fraction", "seconds")
# Training stops before the next checkpoint if one of these is not finite.
FINITE = ("loss", "grad_norm", "param_norm")


def read_metrics(workdir: epath.PathLike, last: int | float = math.inf) -> list[dict[str, Any]]:
    """Reads a run's metrics.jsonl, up to step `last`.

    An incomplete last line, left by a kill, is dropped.
    """
    lines = _read_lines(epath.Path(workdir) / "metrics.jsonl")
    return [line for line in lines if line["step"] <= last]


def _read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Reads JSON objects that have a step, up to the first invalid line."""
    lines = []
    for text in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def last_values(workdir: epath.PathLike) -> dict[str, int | float]:
    """The last value of every metric of a run, {} if it has none yet."""
    last: dict[str, int | float] = {}
    for line in read_metrics(workdir):
        last |= line
    return last


def record_start(workdir: epath.Path, start_step: int, total_steps: int, devices: int) -> None:
    """Adds a line to starts.jsonl: the first step, the total steps and the devices of a start.

    It tells what hardware the seconds of metrics.jsonl were spent on. Earlier starts at or after
    `start_step` are dropped, as all of their steps are run again.
    """
    start = {"step": start_step, "total_steps": total_steps, "devices": devices}
    start |= {"kind": jax.devices()[0].device_kind, "processes": distributed.count()}
    kept = [line for line in read_starts(workdir) if line["step"] < start_step]
    text = "".join(json.dumps(line) + "\n" for line in [*kept, start])
    write_atomically(workdir / "starts.jsonl", text)


def read_starts(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Reads the lines of `record_start`; [] for a run from before they existed."""
    return _read_lines(epath.Path(workdir) / "starts.jsonl")


def record_corrupt(workdir: epath.Path, step: int, images: int) -> None:
    """Adds a line to corrupt.jsonl: the number of unreadable training images up to a step.

    A run that resumes from this step's checkpoint continues the count.
    """
    kept = [line for line in _read_lines(workdir / "corrupt.jsonl") if line["step"] < step]
    lines = [*kept, {"step": step, "images": images}]
    write_atomically(workdir / "corrupt.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def read_corrupt(workdir: epath.Path, step: int) -> int:
    """Reads the count of `record_corrupt` at a step, or the last before it; 0 if there is none."""
    lines = [line for line in _read_lines(workdir / "corrupt.jsonl") if line["step"] <= step]
    return lines[-1]["images"] if lines else 0


def due(step: int, every: int, total_steps: int) -> bool:
    """Whether something that runs every `every` steps (0: never), and at the last one, is due."""
    return step == total_steps or (every > 0 and step % every == 0)


class Diverged(Exception):
    """A step's loss or gradient is no longer finite."""


class Recorder:
    """Writes the metrics of steps and evaluations: metrics.jsonl, the screen, and as `log` says.

    Lines after `start_step` are dropped first, as those steps will be run again. A step's metrics
    are fetched after the next step was dispatched, so that logging never makes the device wait.
    With several processes, only process 0 writes.
    """

    def __init__(self, workdir: epath.Path, start_step: int, total_steps: int, config: Config):
        self._every, self._total_steps = config.log.every, total_steps
        lines = read_metrics(workdir, start_step)
        self._file, self._events, self._wandb = None, None, None
        if distributed.is_lead():
            path = workdir / "metrics.jsonl"
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._file = path.open("a")
            self._events = _tensorboard(workdir, start_step) if config.log.tensorboard else None
            self._wandb = _wandb(workdir, start_step, config, lines) if config.log.wandb else None
        self._progress = Progress(workdir.name, start_step, total_steps)
        # `seconds` continues from where a resumed run stopped.
        self._began = time.perf_counter() - max((x.get("seconds", 0.0) for x in lines), default=0.0)
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._restart_clock()

    def step(self, step: int, metrics: dict[str, jax.Array], images: int, waited: float) -> None:
        """Records the metrics of a dispatched step; its input took `waited` seconds to arrive.

        Raises:
          Diverged: an earlier step's loss or gradient is not finite.
        """
        if self._pending and (self._due(self._pending[-1][0]) or len(self._pending) >= 100):
            began = self._start
            self.flush()
            if self._start != began:  # this step's wait belongs to the new line
                self._start -= waited
        self._pending.append((step, metrics))
        self._images += images
        self._waited += waited
        self._progress.step(step)

    def flush(self) -> None:
        """Fetches pending metrics from the device and writes the lines that are due.

        Raises:
          Diverged: a step's loss or gradient is not finite. Lines before it are written.
        """
        pending, self._pending = self._pending, []
        for step, values in jax.device_get(pending):
            if not all(math.isfinite(values[name]) for name in FINITE):
                values_text = ", ".join(f"{name} {values[name]:.4g}" for name in FINITE)
                raise Diverged(f"the run diverged at step {step} ({values_text})")
            if self._due(step):
                seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
                line = {f"train/{name}": float(value) for name, value in values.items()}
                line["images_per_second"] = self._images / seconds
                line["input_wait_fraction"] = self._waited / seconds
                line["seconds"] = time.perf_counter() - self._began
                self.write(step, line)
                self._restart_clock()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line and flushes it; `step` counts the steps done."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        self._progress.measured(step, values)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside this context from the images per second."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def close(self, *, failed: bool = False) -> None:
        """Closes all writers; `failed` is reported to Weights & Biases."""
        self._progress.close()
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))

    def _due(self, step: int) -> bool:
        return due(step, self._every, self._total_steps)

    def _restart_clock(self) -> None:
        self._start, self._waited, self._paused, self._images = time.perf_counter(), 0.0, 0.0, 0


def _tensorboard(workdir: epath.Path, start_step: int) -> Any:
    try:
        import tensorboardX
    except ImportError:
        return None
    return tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)


def check_wandb() -> None:
    """Raises a UserError if log.wandb cannot be used."""
    try:
        import wandb
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):  # a folder of that name, such as its own, is imported too
        raise UserError(
            f"log.wandb is on, but wandb is not installed: {install('wandb')}, or leave log.wandb "
            "out"
        )


def _wandb(
    workdir: epath.Path, start_step: int, config: Config, lines: Sequence[dict[str, Any]]
) -> Any:
    """The Weights & Biases run; a resumed run continues the one named in the file wandb_id.

    Lines of steps that are run again are not replaced there, as resumed runs are the same. A run
    that turns it on midway uploads the earlier lines first.
    """
    import wandb

    path = workdir / "wandb_id"
    known = start_step > 0 and path.exists()
    if not known:
        write_atomically(path, uuid.uuid4().hex[:16])
    try:
        run = wandb.init(
            project=config.log.wandb_project,
            dir=str(workdir),
            id=path.read_text().strip(),
            name=workdir.name,
            config=json.loads(to_json(config)),
            resume="allow",
            allow_val_change=True,  # a resumed run may have another mesh
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases cannot be reached ({error}): run `wandb login`, set "
            "WANDB_MODE=offline, or leave log.wandb out"
        ) from None
    for line in () if known else lines:
        run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])
    return run

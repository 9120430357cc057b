"""What a run reports: metrics.jsonl, TensorBoard events, and a line on the screen."""

import json
import logging
import sys
import time
from typing import Any

import tqdm
from etils import epath

from vit_jax.checkpoints.store import write_atomically

logger = logging.getLogger(__name__)

# Keys that depend on the machine and its load: the only ones that a resumed run may change.
TIMING_KEYS = ("images_per_second", "input_wait_fraction", "seconds")


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class MetricsLog:
    """Appends a line a step, each flushed; starts by dropping lines later than `start_step`."""

    def __init__(self, workdir: epath.Path, start_step: int, *, tensorboard: bool = True):
        lines = [line for line in read_metrics(workdir) if line["step"] <= start_step]
        self._path = workdir / "metrics.jsonl"
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self._path.open("a")
        self._events = _tensorboard(workdir, start_step) if tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line; `step` counts the steps done."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _tensorboard(workdir: epath.Path, start_step: int) -> Any:
    try:
        import tensorboardX
    except ImportError:
        return None
    return tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)


class Clock:
    """Speed between two log lines, without the time that evaluation and saving took."""

    def __init__(self):
        self.total = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        self._start, self._waited, self._paused, self._images = time.perf_counter(), 0.0, 0.0, 0

    def count(self, images: int, waited: float) -> None:
        """Adds a batch that took `waited` seconds to arrive from the input pipeline."""
        self._images += images
        self._waited += waited

    def pause(self, seconds: float) -> None:
        """Leaves `seconds` out."""
        self._paused += seconds

    def read(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        values = {
            "images_per_second": self._images / seconds,
            "input_wait_fraction": self._waited / seconds,
            "seconds": time.perf_counter() - self.total,
        }
        self.restart()
        return values


class Progress:
    """One live line with loss, accuracy, images/s and time left; silent where nobody looks."""

    def __init__(self, start_step: int, total_steps: int, name: str):
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=start_step,
            desc=name,
            unit="step",
            file=sys.stderr,
            disable=None if sys.stderr.isatty() else True,
            dynamic_ncols=True,
        )

    def update(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows the latest values, as a postfix of the line or, with no terminal, in the log."""
        short = {
            "test/accuracy": "test",
            "train/loss": "loss",
            "train/accuracy": "acc",
            "val/accuracy": "val",
            "images_per_second": "img/s",
        }
        shown = {short[k]: f"{v:.4g}" for k, v in values.items() if k in short}
        if self._bar.disable:
            values = " ".join(f"{name} {value}" for name, value in shown.items())
            logger.info("step %d/%d %s", step, self._bar.total, values)
        else:
            self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        self._bar.close()

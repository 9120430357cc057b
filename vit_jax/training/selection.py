"""The best checkpoint of a run, and early stopping: both follow from the lines of metrics.jsonl."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax.errors import UserError

# Metrics of which more is better; of a loss, less is.
_HIGHER = (
    *("accuracy", "top5", "mAP", "micro_f1", "macro_f1", "miou", "pixel_accuracy"),
    *("iou", "foreground_iou", "mean", "map", "ap", "ap50", "ap75"),
    *("ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100"),
)


@dataclasses.dataclass(frozen=True)
class StopConfig:
    """The `stop` section: early stopping.

    Attributes:
      patience: evaluations without a better `metric` after which the run ends, as if that were its
        last step; 0 is never. Those during optim.probe do not count.
      metric: as for checkpoint.best, which is also its default.
    """

    patience: int = 0
    metric: str | None = None

    def __post_init__(self):
        if self.patience < 0:
            raise UserError(f"stop.patience is {self.patience}; it must be 0 or more")
        if self.metric is not None:
            Metric.parse("stop.metric", self.metric)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric that a run is judged by, such as val/accuracy.

    Attributes:
      key: of the config, that names it.
      name: as in metrics.jsonl.
      higher: whether more is better.
    """

    key: str
    name: str
    higher: bool

    @classmethod
    def parse(cls, key: str, text: str) -> "Metric":
        """Reads "val/accuracy" or "val/loss:min".

        Raises:
          UserError: it is no metric of an evaluation, or not clear whether more is better.
        """
        name, _, mode = text.partition(":")
        split, _, last = name.partition("/")  # that of a class is iou/NAME
        if not split or not last or split in ("train", "test"):
            raise UserError(
                f"{key} is {text!r}; expected a metric of data.val or of an evaluator, such as "
                "val/accuracy or val/loss:min"
            )
        if mode not in ("", "min", "max"):
            raise UserError(f"{key} is {text!r}; expected {name}:min or {name}:max")
        if not mode and last.partition("/")[0] not in (*_HIGHER, "loss"):
            raise UserError(
                f"{key} is {text!r}: say whether more is better, {name}:max, or less, {name}:min"
            )
        return cls(key, name, mode == "max" or (not mode and last != "loss"))


@dataclasses.dataclass
class History:
    """The best value of a metric so far.

    Attributes:
      step, value: of the best measurement; 0 and NaN before the first. Of equal ones, the first.
      since: the number of measurements after it, but for those up to step `begins`.
    """

    metric: Metric
    step: int = 0
    value: float = math.nan
    since: int = 0
    begins: int = 0

    def read(self, lines: Iterable[Mapping[str, Any]]) -> "History":
        """Adds lines of metrics.jsonl, in order."""
        for line in lines:
            self.add(line["step"], line)
        return self

    def add(self, step: int, values: Mapping[str, Any]) -> bool:
        """Adds what was measured at a step; returns whether it is the best so far."""
        value = values.get(self.metric.name)
        if value is None:
            return False
        sign = 1 if self.metric.higher else -1
        if not math.isnan(value) and not sign * value <= sign * self.value:
            self.step, self.value, self.since = step, value, 0
            return True
        self.since += step > self.begins
        return False


class Selection:
    """Which checkpoint of a run is the best, and whether the run has ended early.

    Args:
      best: checkpoint.best.
      stop: the `stop` section.
      metrics: by evaluation that is measured during the run, the names of its metrics, or None
        where they are not known beforehand.
      lines: of metrics.jsonl, up to the step that the run is at.
      begins: the step from which on the patience of `stop` counts: that after a linear probe.

    Raises:
      UserError: a metric that is not measured during the run.
    """

    def __init__(
        self,
        best: str | None,
        stop: StopConfig,
        metrics: Mapping[str, tuple[str, ...] | None],
        lines: Iterable[Mapping[str, Any]],
        begins: int = 0,
    ):
        lines = list(lines)
        self._metrics, self._patience = metrics, stop.patience
        self.best = best and self._history("checkpoint.best", best, lines, 0)
        key = "checkpoint.best" if stop.metric is None else "stop.metric"
        self._stop = stop.patience and self._history(key, stop.metric or best, lines, begins)

    def _history(self, key: str, text: str, lines: list[Mapping[str, Any]], begins: int) -> History:
        metric = Metric.parse(key, text)
        split, _, last = metric.name.partition("/")
        if split not in self._metrics:
            there = ", ".join(self._metrics) or "nothing"
            raise UserError(
                f"{key} is {text}, but during the run {there} is measured: set eval.every, and "
                f"data.val or eval.evaluators.{split}"
            )
        known = self._metrics[split]
        if known is not None and last not in known:
            raise UserError(f"{key} is {text}, but {split} has {', '.join(known)}")
        return History(metric, begins=begins).read(lines)

    def add(self, step: int, values: Mapping[str, Any]) -> bool:
        """Adds what an evaluation measured; returns whether the model is the best so far.

        Raises:
          UserError: the evaluation has no such metric.
        """
        for history in filter(None, (self.best, self._stop)):
            name, split = history.metric.name, next(iter(values)).partition("/")[0]
            if name.partition("/")[0] == split and name not in values:
                raise UserError(
                    f"{history.metric.key} is {name}, but measured are {', '.join(values)}"
                )
        if self._stop:
            self._stop.add(step, values)
        return bool(self.best and self.best.add(step, values))

    @property
    def ended(self) -> str:
        """Why the run ends early; "" if it does not."""
        if not self._stop or self._stop.since < self._patience:
            return ""
        times = "1 evaluation" if self._patience == 1 else f"{self._patience} evaluations"
        best = f"{self._stop.value:.4g} at step {self._stop.step:,}"
        return f"{self._stop.metric.name} has not been better than {best} for {times}"

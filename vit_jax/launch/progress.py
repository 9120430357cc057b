"""Progress display of a sweep: a live table on a terminal, otherwise a line for each change."""

import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from vit_jax.launch.jobs import Change

# Metrics to show as progress; the first that a run has is used.
SHOWN = (
    "test/mAP",
    "val/mAP",
    "test/map",
    "val/map",
    "test/accuracy",
    "val/accuracy",
    "train/accuracy",
    "train/loss",
)


class Progress:
    """Shows the states of a sweep's points; `results`, in the folder `root`, is updated outside."""

    def __init__(
        self, root: epath.Path, results: Mapping[str, Any], logs: epath.Path | None = None
    ):
        self._root, self._results, self._logs = root, results, logs or root
        self._live = sys.stdout.isatty()
        self._lines = 0
        self._began: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        if not self._live:
            states = [result.state for result in self._results.values()]
            done = states.count("finished")
            self._print(f"{done} of {len(states)} points are finished")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._draw()

    def show(self, change: Change | None) -> None:
        """Shows a change; None means that only time has passed."""
        if self._live:
            self._draw()
        elif change is not None:
            self._print(self._sentence(change))

    def _sentence(self, change: Change) -> str:
        if change.state == "running":
            self._began[change.name] = time.monotonic()
            return f"{change.name}: started"
        began = self._began.get(change.name)  # not known of one that ran before this
        took = "" if began is None else f" in {time.monotonic() - began:.0f} s"
        code = with_code(change.exit_code)
        sentences = {
            "finished": f"finished{took}, {measured(self._results[change.name])}",
            "failed": f"failed{code}: {self._last_words(change.name)}",
            "stopped": f"stopped{code}",
            "waiting": f"preempted{code}, will be started again",
        }
        return f"{change.name}: {sentences[change.state]}"

    def _last_words(self, name: str) -> str:
        lines = [line for line in _tail(self._logs / f"{name}.log").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1]

    def _print(self, line: str) -> None:
        print(line, flush=True)

    def _draw(self) -> None:
        size = shutil.get_terminal_size()
        width = min(max(map(len, self._results)), size.columns // 3)
        rows = [self._row(result, width) for result in self._results.values()]
        if len(rows) > size.lines - 2:  # what cannot be drawn over must not be drawn
            states = [result.state for result in self._results.values()]
            counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
            active = [
                row for row, s in zip(rows, states, strict=True) if s in ("running", "failed")
            ]
            rows = [counts, *active[-(size.lines - 3) :]]
        up = f"\x1b[{self._lines}F" if self._lines else ""
        text = "".join(f"\x1b[2K{row[: size.columns - 1]}\n" for row in rows)
        print(f"{up}{text}\x1b[J", end="", flush=True)
        self._lines = len(rows)

    def _row(self, result: Any, width: int) -> str:
        name = result.name
        name = name if len(name) <= width else f"...{name[3 - width :]}"  # their ends differ
        row = f"{name:<{width}}  {result.state:<8}"
        if result.state == "running":
            from vit_jax.training.metrics import last_values

            metrics = last_values(self._root / result.name)
            step, total = metrics.get("step", 0), self._total(result.name)
            row += f"  {step}/{total or '?'}  {measured(result, metrics)}"
            if total and step and "seconds" in metrics:
                row += f"  {metrics['seconds'] / step * (total - step):.0f} s left"
        elif result.metrics:
            row += f"  {result.metrics.get('step', 0)}  {measured(result)}"
        return row

    def _total(self, name: str) -> int | None:
        """The run's total steps, as it noted when it began: only it knows, as it reads the data."""
        from vit_jax.training.metrics import read_starts

        starts = read_starts(self._root / name)
        return starts[-1].get("total_steps") if starts else None


def measured(result: Any, metrics: Mapping[str, Any] | None = None) -> str:
    """The most telling metric of a run: "val/accuracy 0.98"."""
    metrics = result.metrics if metrics is None else metrics
    name = next((name for name in SHOWN if name in metrics), None)
    return "" if name is None else f"{name} {metrics[name]:.4g}"


def with_code(exit_code: int | None) -> str:
    """Formats an exit code for a message; empty if there is none."""
    return "" if exit_code is None else f" with exit code {exit_code}"


def _tail(path: epath.Path, size: int = 4096) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(file.tell() - size, 0))
        return file.read().decode(errors="replace")

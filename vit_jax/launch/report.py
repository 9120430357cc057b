"""Compares runs: groups, statistics and tables, as plain text, numbers and Markdown.

comparison.py reads a folder into a `Run`; this module makes a `Report` of several; page.py renders
it as HTML, and writes both.
"""

import dataclasses
import logging
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vit_jax.launch.comparison import Run, lower_is_better

logger = logging.getLogger(__name__)

_FEW = 6  # settings that differ: up to so many have a column each
_CURVES = 9  # pictures, at most
_NO_CURVE = ("_std", "/lr", "/grad_norm", "/param_norm")
_OF_CLASS = ("/iou/", "/ap/")  # metrics of each class, val/iou/NAME
_DASH = "–"  # noqa: RUF001  (what is not known)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; statistics are over those in `counted`."""

    label: str
    runs: tuple[Run, ...]
    counted: tuple[Run, ...]

    def values(self, metric: str | None) -> list[float]:
        values = [run.last(metric) for run in self.counted]
        return [value for value in values if value is not None]

    def mean(self, metric: str | None) -> float | None:
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def spread(self, metric: str | None) -> float | None:
        """The sample standard deviation (ddof 1); None for fewer than two runs."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of plain text, not yet escaped; `numeric` columns are right-aligned."""

    headers: list[str]
    rows: list[list[str]]
    numeric: list[bool]


@dataclasses.dataclass(frozen=True)
class Report:
    """A comparison of several runs.

    `metric` is what they are compared by, `test` the same metric on the test split, if any.
    Groups are sorted by their mean, best first; [] if no two runs share a point.
    """

    title: str
    runs: list[Run]
    groups: list[Group]
    metric: str | None
    test: str | None
    best: Run | None
    varied: list[str]
    common: dict[str, Any]


def title(folders: Sequence[str]) -> str:
    """The title of a report: the folders' names, at most the first two."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return (
        ", ".join(names) if len(names) < 4 else f"{', '.join(names[:2])} and {len(names) - 2} more"
    )


# Comparison


def main_metric(runs: Iterable[Run]) -> str | None:
    """The metric to compare runs by: val/mAP, val/accuracy, val/miou or val/map, else another of
    val, else one of an evaluator, else train/loss."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    names = [name for name in names if not name.endswith("_std")]
    val = [name for name in names if name.startswith("val/")]
    others = [name for name in names if name.split("/")[0] not in ("train", "val", "test")]
    accuracies = [name for name in val if not lower_is_better(name)]
    first = ["val/mAP", "val/accuracy", "val/miou", "val/map"]
    ordered = [*first, *accuracies, *val, *others, "train/loss"]
    return next((name for name in ordered if name in names), None)


def compare(runs: Sequence[Run], title: str) -> Report:
    """Compares runs: varied settings, groups of seeds, the best run.

    Runs are compared by the last value of the metric, which is that of the weights they keep.
    Unfinished runs count only if no run is finished.
    """
    metric = main_metric(runs)
    twin = f"test/{metric.rpartition('/')[2]}" if metric else None
    test = twin if any(twin in run.curves for run in runs) else None
    known = [run.settings for run in runs if run.settings]
    keys = list(dict.fromkeys(key for settings in known for key in settings))
    varied = [key for key in keys if len({repr(each.get(key)) for each in known}) > 1]
    common = {key: known[0].get(key) for key in keys if key not in varied}
    counted = [run for run in runs if run.state == "finished"] or list(runs)
    counted = [run for run in counted if run.last(metric) is not None]
    sign = -1 if lower_is_better(metric or "") else 1
    best = max(counted, key=lambda run: sign * run.last(metric), default=None)
    points: dict[str, list[Run]] = {}
    for run in runs:
        points.setdefault(run.point, []).append(run)
    groups = []
    for members in points.values() if any(len(each) > 1 for each in points.values()) else ():
        mine = tuple(run for run in members if run in counted)
        groups.append(Group(_label(members, varied), tuple(members), mine))
    groups.sort(key=lambda group: _order(group.mean(metric), sign))
    if not all("config" in settings for settings in known):
        common = {}  # whole configs, which agree in most
    return Report(title, list(runs), groups, metric, test, best, varied, common)


def _order(value: float | None, sign: int) -> tuple[bool, float]:
    return (value is None, 0.0 if value is None else -sign * value)


def _label(runs: Sequence[Run], varied: Sequence[str]) -> str:
    """Label of a group: the varied settings that its runs share."""
    shared = [
        key
        for key in varied
        if key != "seed" and len({repr(run.settings.get(key)) for run in runs}) == 1
    ]
    parts = [
        f"{short(key, varied)}={text(runs[0].settings[key])}"
        for key in shared
        if key in runs[0].settings
    ]
    return ", ".join(parts) or (runs[0].name if len(runs) == 1 else "all seeds")


def short(key: str, keys: Sequence[str]) -> str:
    """The end of a key, as lr or probe.lr, if it is unique among `keys`; else the whole key."""
    return _end(key) if [_end(each) for each in keys].count(_end(key)) == 1 else key


def _end(key: str) -> str:
    """The last part of a key; the last two in a section of a section, but not of `data`."""
    section, *parts = key.split(".")
    return ".".join(parts[-2:] if parts and section != "data" else key.split(".")[-1:])


def text(value: Any) -> str:
    """Formats a setting as in a flag."""
    if isinstance(value, list | tuple):
        return "x".join(map(text, value))
    return str(value)


def number(value: float | None) -> str:
    """Formats a metric, with enough digits to tell runs apart."""
    if value is None:
        return _DASH
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def _amount(value: float | None) -> str:
    """Formats a speed, a time or a cost."""
    if value is None:
        return _DASH
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def group_table(report: Report) -> Table:
    """A table with a row for each group: number of seeds, mean and standard deviation.

    Columns without any known value are left out, such as deviations of one seed each.
    """
    metrics = [name for name in (report.metric, report.test) if name]
    headers = ["point"]
    headers += [head for name in metrics for head in (f"{name}, mean", "std")]
    rows = [
        [
            group.label,
            *(number(f(name)) for name in metrics for f in (group.mean, group.spread)),
            str(len(group.counted)) + _of(len(group.counted), len(group.runs)),
        ]
        for group in report.groups
    ]
    headers.append("seeds")
    return _known(Table(headers, rows, [False] + [True] * (len(headers) - 1)))


def _of(some: int, all_of_them: int) -> str:
    return "" if some == all_of_them else f" of {all_of_them}"


def run_table(report: Report) -> Table:
    """A table with a row for each run. Columns without any known value are left out."""
    metric, test = report.metric, report.test
    columns: list[tuple[str, bool, Callable[[Run], str]]] = [
        ("run", False, lambda run: run.name),
        ("state", False, lambda run: run.state),
    ]
    if metric:
        columns.append((metric, True, lambda run: number(run.last(metric))))
    if test:
        columns.append((test, True, lambda run: number(run.last(test))))
    if metric:
        columns.append(("best, at step", True, lambda run: _best(run, metric)))
    columns.append(("steps", True, lambda run: f"{run.steps}/{run.total or '?'}"))
    if len(report.varied) <= _FEW:
        for key in report.varied:
            head = short(key, report.varied)
            columns.append((head, False, lambda run, key=key: _setting(run, key)))
    else:
        columns.append(("differs in", False, lambda run: _settings(run, report.varied)))
    columns += [
        ("images/s", True, lambda run: _amount(run.images_per_second)),
        ("seconds", True, lambda run: _amount(run.seconds)),
        ("devices", False, lambda run: run.devices or _DASH),
        ("device-hours", True, lambda run: _amount(run.device_hours)),
        ("note", False, lambda run: run.note),
    ]
    heads, rights, makers = zip(*columns, strict=True)
    rows = [[make(run) for make in makers] for run in report.runs]
    return _known(Table(list(heads), rows, list(rights)))


def _known(table: Table) -> Table:
    """The table without columns of which nothing is known, but for the first."""
    cells = zip(*table.rows, strict=True)
    kept = [i for i, column in enumerate(cells) if i == 0 or set(column) - {_DASH, ""}]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table([table.headers[i] for i in kept], rows, [table.numeric[i] for i in kept])


def _setting(run: Run, key: str) -> str:
    return text(run.settings[key]) if key in run.settings else _DASH


def _settings(run: Run, varied: Sequence[str]) -> str:
    keys = [key for key in varied if run.settings.get(key) is not None]
    return ", ".join(f"{short(key, varied)}={text(run.settings[key])}" for key in keys)


def _best(run: Run, metric: str) -> str:
    best = run.best(metric)
    return _DASH if best is None else f"{number(best[1])} at {best[0]}"


def curve_names(report: Report) -> list[str]:
    """The metrics to plot: those that change in a run, the most important first.

    Those of single classes are left out.
    """
    names = dict.fromkeys(
        name
        for run in report.runs
        for name, points in run.curves.items()
        if len({value for _, value in points}) > 1
    )
    names = [name for name in names if not name.endswith(_NO_CURVE)]
    names = [name for name in names if not any(part in name for part in _OF_CLASS)]
    order = ["val", "", "train"]  # evaluators have names of their own

    def place(name: str) -> tuple[bool, int, bool]:
        split = name.split("/")[0]
        return (
            name != report.metric,
            order.index(split if split in order else ""),
            name.startswith("train/") and not lower_is_better(name),
        )

    names.sort(key=place)
    return names[:_CURVES]


def summary(report: Report) -> str:
    """One line: the number of runs, their states, and their cost."""
    states = [run.state for run in report.runs]
    parts = [f"{len(states)} run{'s' * (len(states) != 1)}"]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    parts += [f"{'all' if n == len(states) > 1 else n} {state}" for state, n in counts.items()]
    hours = [run.device_hours for run in report.runs if run.device_hours is not None]
    if hours:
        parts.append(f"{_amount(sum(hours))} device-hours" + _of(len(hours), len(states)))
    return ", ".join(parts)


# Markdown


def markdown(report: Report) -> str:
    """Formats the report as GitHub-flavoured Markdown tables."""
    parts = [f"# {escape(report.title)}", escape(summary(report)) + "."]
    if report.best is not None:
        line = f"Best by {escape(report.metric)}: **{escape(report.best.name)}**, "
        line += f"{number(report.best.last(report.metric))}"
        score = report.best.last(report.test)
        line += f"; {escape(report.test)} {number(score)}" if score is not None else ""
        parts.append(f"{line}.")
    if report.common:
        same = ", ".join(f"{key}={text(value)}" for key, value in report.common.items())
        parts.append(f"The same in all: {escape(same)}.")
    if report.groups:
        parts.append(markdown_table(group_table(report)))
    parts.append(markdown_table(run_table(report)))
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """Formats a table as GitHub-flavoured Markdown."""
    rule = ["---:" if right else "---" for right in table.numeric]
    rows = [[escape(cell) for cell in row] for row in (table.headers, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def escape(words: str) -> str:
    """Escapes text for Markdown and terminals."""
    words = printable(words).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    words = re.sub(r"([\\`*\[\]|~#])", r"\\\1", words)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", words)


def printable(words: str) -> str:
    """Replaces control characters in text by spaces."""
    return "".join(c if c.isprintable() else " " for c in words)

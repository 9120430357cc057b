"""What the reports of experiments/ share: means and spreads, tables, curves."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

FEW = "others/5shot"  # what most of them measure by; see configs/evidence.py


@dataclasses.dataclass(frozen=True)
class Point:
    """A run: its overrides, and the last value of each metric."""

    name: str
    overrides: dict[str, Any]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Told:
    """What an experiment came to.

    Attributes:
      table, verdict: Markdown, for its own page.
      short, agrees: what was measured, and whether it is what the paper saw, for the front page.
      figure: the picture, or None where `measure` has drawn it.
      spread: what the numbers' spread is over.
      minutes: of training, of all points; filled in by `evidence.tell`.
    """

    table: str
    verdict: str
    short: str
    agrees: str
    figure: Any = None
    spread: str = "Means and standard deviations are over seeds."
    minutes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean, standard deviation and number of some values; prints as percents."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def std(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        spread = f" ± {self.std:.1%}" if len(self.values) > 1 else ""
        return f"{self.mean:.1%}{spread}"

    def minus(self, other: "Mean") -> tuple[float, float]:
        """The difference of the means, and its standard error."""
        parts = [each.std**2 / len(each.values) for each in (self, other)]
        return self.mean - other.mean, math.sqrt(sum(parts))

    def beats(self, other: "Mean") -> bool:
        """Whether it is larger by more than twice the standard error of the difference."""
        difference, error = self.minus(other)
        return difference > 2 * error


def means(
    points: Iterable[Point], key: Callable[[Point], Hashable], metric: str = FEW
) -> dict[Any, Mean]:
    """A metric's mean for each value of `key`, in the order of the points; None is left out."""
    found: dict[Hashable, list[float]] = {}
    for point in points:
        if key(point) is not None and metric in point.metrics:
            found.setdefault(key(point), []).append(point.metrics[metric])
    return {value: Mean(tuple(values)) for value, values in found.items()}


@dataclasses.dataclass(frozen=True)
class Difference:
    """What one kind of run is better by than another, seed by seed, with a 95% interval."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the mean, by Student's t; without bounds for a single seed."""
        from scipy import stats

        n = len(self.values)
        if n < 2:
            return -math.inf, math.inf
        half = stats.t.ppf(0.975, n - 1) * statistics.stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half

    def decides(self, least: float) -> str:
        """Whether it is there, given the smallest mean that would be agreement.

        "yes" if the mean is at least that and the interval above 0; "no" if the interval is below
        the smallest; else "undecided".
        """
        low, high = self.interval
        if low > 0 and self.mean >= least:
            return "yes"
        return "no" if high < least else "undecided"

    def within(self, most: float) -> str:
        """Whether the two kinds are alike, given the largest difference that would be agreement.

        "yes" if the whole interval is within ± that; "no" if all of it is outside; else
        "undecided".
        """
        low, high = self.interval
        if -most < low and high < most:
            return "yes"
        return "no" if low > most or high < -most else "undecided"

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:+.1%} ({low:+.1%} to {high:+.1%})"


def every(decisions: Iterable[str]) -> str:
    """Whether all hold: "yes" if each does, "no" if one does not, else "undecided"."""
    found = {*decisions}
    return "no" if "no" in found else "undecided" if "undecided" in found else "yes"


def by_seed(
    points: Iterable[Point], key: Callable[[Point], Hashable], metric: str
) -> dict[Any, dict[int, float]]:
    """A metric of each seed, for each value of `key`."""
    found: dict[Hashable, dict[int, float]] = {}
    for point in points:
        if key(point) is not None and metric in point.metrics:
            found.setdefault(key(point), {})[point.overrides["seed"]] = point.metrics[metric]
    return found


def less(a: dict[int, float], b: dict[int, float]) -> Difference:
    """a - b of the seeds that both have."""
    return Difference(tuple(a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figure(width: float = 6.4, height: float = 3.8) -> tuple[Any, Any]:
    """An empty Figure, which needs no screen, and its axes."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def dots(values: dict[str, Mean], label: str, reference: str = "") -> Any:
    """A row a name: its values, their mean and standard deviation.

    The dashed line is at the mean of `reference`.
    """
    drawn, axes = figure(6.4, 0.8 + 0.32 * len(values))
    for row, each in enumerate(reversed(values.values())):
        axes.plot(
            [100 * x for x in each.values], [row] * len(each.values), "o", color="#9db8d2", ms=4
        )
        axes.errorbar(
            100 * each.mean, row, xerr=100 * each.std, fmt="o", color="#1f4e79", capsize=3, ms=6
        )
    axes.set_yticks(range(len(values)), list(values)[::-1])
    axes.set_ylim(-0.6, len(values) - 0.4)
    if reference:
        axes.axvline(100 * values[reference].mean, color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel(f"{label} (%)")
    return drawn


def curves(
    lines: dict[str, dict[float, Mean]], x: str, y: str, *, log: bool = True, axes: Any = None
) -> Any:
    """A line a name, with error bars of one standard deviation; a figure of its own, or `axes`."""
    drawn = None
    if axes is None:
        drawn, axes = figure()
    for name, values in lines.items():
        axes.errorbar(
            list(values),
            [100 * each.mean for each in values.values()],
            [100 * each.std for each in values.values()],
            marker="o",
            markersize=4,
            capsize=2,
            label=name,
        )
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(lambda value, _: "")  # which would overlap
        values = sorted({x for line in lines.values() for x in line})
        if len(values) < 8:
            axes.set_xticks(values, [f"{value:,g}" for value in values])
    axes.set(xlabel=x, ylabel=f"{y} (%)")
    axes.legend(fontsize=8)
    return drawn

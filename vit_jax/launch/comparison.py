"""Reads run folders for a report; damaged files are reported, and the rest is read."""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from vit_jax import buckets
from vit_jax.errors import UserError
from vit_jax.launch.run import Result, is_held, read_results
from vit_jax.launch.sweep import RECORD

Point = tuple[int, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, as read from its folder; None is unknown.

    `settings` are a sweep's overrides, or the whole config. `point` is the same for runs that
    differ only in their seed. `note` says what could not be read.
    """

    name: str
    folder: str
    settings: dict[str, Any]
    point: str
    state: str
    steps: int = 0
    total: int | None = None
    curves: dict[str, list[Point]] = dataclasses.field(default_factory=dict)
    images_per_second: float | None = None
    seconds: float | None = None
    device_hours: float | None = None
    devices: str | None = None
    note: str = ""

    def last(self, metric: str | None) -> float | None:
        """The last value of a metric, that of the run's final or current weights."""
        points = self.curves.get(metric or "")
        return points[-1][1] if points else None

    def best(self, metric: str) -> Point | None:
        """The step with the best value, and the value; the first of equals."""
        sign = -1 if lower_is_better(metric) else 1
        points = self.curves.get(metric)
        return max(points, key=lambda point: (sign * point[1], -point[0])) if points else None


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss."""
    return "loss" in metric.partition("/")[2].partition("/")[0]


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Reads all runs in some run folders and sweeps, in order."""
    found: dict[epath.Path, Result | None] = {}
    for folder in (os.path.abspath(buckets.local(each)) for each in folders):
        root = epath.Path(folder)
        if (root / RECORD).exists():
            found |= {root / result.name: result for result in read_results(root)}
        elif _is_run(root):
            found.setdefault(root, None)
        else:
            inside = root.is_dir() and any(_is_run(child) for child in root.iterdir())
            raise UserError(
                f"{folder} {'is' if root.is_dir() else 'is no folder, and'} neither a run "
                f"(config.json) nor a sweep ({RECORD}): "
                + (f"name the folders in it, {folder}/*" if inside else "name a run folder")
            )
    if not found:
        raise UserError(f"{', '.join(folders)}: a sweep without points")
    sweeps = None not in found.values()
    names = _names(list(found))
    runs = [
        _read_run(folder, result, name, sweeps=sweeps)
        for (folder, result), name in zip(found.items(), names, strict=True)
    ]
    if not any(run.curves or run.settings for run in runs):
        raise UserError(f"nothing could be read: {'; '.join(run.note for run in runs)}")
    of_folder = {run.folder: run for run in runs}
    return [dataclasses.replace(run, point=_point(run, of_folder)) for run in runs]


def _is_run(root: epath.Path) -> bool:
    return any((root / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints"))


def _names(folders: Sequence[epath.Path]) -> list[str]:
    """Folder names, with parent folders if two are the same."""
    parts = [folder.parts for folder in folders]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def _read_run(folder: epath.Path, result: Result | None, name: str, *, sweeps: bool) -> Run:
    """Reads a run folder; with `sweeps`, its settings are the overrides, else the whole config."""
    from vit_jax.checkpoints.card import BROKEN
    from vit_jax.training.config import flat, is_resumable, read_config
    from vit_jax.training.metrics import read_starts
    from vit_jax.training.plan import count_steps

    notes, config, total = [], None, None
    settings = {} if result is None else {"config": result.config, **result.overrides}
    try:
        if result is None or (folder / "config.json").exists():
            config = read_config(folder)
            total = config.total_steps
            if config.total_examples is not None:
                total = count_steps(config, None)
    except (*BROKEN, OSError) as error:
        notes.append(str(error))
    if config is not None and not sweeps:
        leaves = flat(config).items()
        settings = {k: v for k, v in leaves if not is_resumable(k) or k.startswith("mesh.")}
    lines, damage = _read_lines(folder)
    notes += damage
    if not lines and result is not None and isinstance(result.metrics.get("step"), int):
        lines = [result.metrics]  # only sweep.json was kept
    starts = read_starts(folder)
    if starts and isinstance(starts[-1].get("total_steps"), int):
        total = starts[-1]["total_steps"]
    curves: dict[str, list[Point]] = {}
    for line in lines:
        for key, value in line.items():
            if "/" in key and _is_number(value):
                curves.setdefault(key, []).append((line["step"], float(value)))
    steps = lines[-1]["step"] if lines else 0
    if result is not None:
        state = result.state
    elif (total is not None and steps >= total) or any(key.startswith("test/") for key in curves):
        state = "finished"
    else:
        state = "running" if is_held(folder) else "stopped"
    if total is None and state == "finished":
        total = steps
    speeds = [x["images_per_second"] for x in lines if _is_number(x.get("images_per_second"))]
    times = [x["seconds"] for x in lines if _is_number(x.get("seconds"))]
    return Run(
        name,
        str(folder),
        settings,
        "",
        state,
        steps,
        total,
        curves,
        float(statistics.median(speeds)) if speeds else None,
        float(times[-1]) if times else None,
        device_hours(lines, starts),
        _devices(starts),
        "; ".join(notes),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_lines(folder: epath.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl, and a note if more than the last line is damaged."""
    from vit_jax.training.metrics import read_metrics

    path = folder / "metrics.jsonl"
    try:
        lines = read_metrics(folder)
        written = len(path.read_bytes().splitlines()) if path.exists() else 0
    except OSError as error:
        return [], [f"metrics.jsonl cannot be read: {error}"]
    if written > len(lines) + 1:
        note = f"metrics.jsonl is damaged in line {len(lines) + 1} of {written}; it ends there"
        return lines, [note]
    return lines, []


def device_hours(
    lines: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]
) -> float | None:
    """Device hours: a run's seconds times the number of devices at the time.

    None if the number of devices at the start is unknown.
    """
    hours, before = 0.0, 0.0
    for line in lines:
        if not _is_number(line.get("seconds")):
            continue
        on = [start.get("devices") for start in starts if start["step"] < line["step"]]
        if not on or not _is_number(on[-1]):
            return None
        hours += (line["seconds"] - before) * on[-1] / 3600
        before = line["seconds"]
    return hours if before else None


def _devices(starts: Sequence[Mapping[str, Any]]) -> str | None:
    """The devices of the last start: "8 TPU v5p"."""
    if not starts:
        return None
    return f"{starts[-1].get('devices', '?')} {starts[-1].get('kind', '?')}"


def _point(run: Run, of_folder: Mapping[str, Run], seen: tuple[str, ...] = ()) -> str:
    """A run's identity without the seed; with that of the run it starts from or learns from."""
    from vit_jax.training.config import is_resumable

    if not run.settings:
        return run.folder
    settings = {k: v for k, v in run.settings.items() if k != "seed" and not is_resumable(k)}
    for key in ("init_from", "distill.teacher"):
        other = settings.get(key)
        if isinstance(other, str):
            beside = os.path.join(os.path.dirname(run.folder), other[1:])
            source = of_folder.get(beside if other.startswith("@") else os.path.abspath(other))
            if source is not None and source.folder not in seen:
                settings[key] = _point(source, of_folder, (*seen, source.folder))
    where = os.path.dirname(run.folder) if "config" in settings else ""
    return json.dumps([where, settings], sort_keys=True)

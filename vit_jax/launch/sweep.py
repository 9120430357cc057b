"""Sweep files: a function that yields points, each of which becomes one run.

    config = "configs/digits.py"

    def sweep(scale="laptop"):
        for point in product({"optim.lr": [1e-3, 3e-3], "seed": [0, 1, 2]}):
            yield point

A point is a dict of config overrides. It may also have a `name` (by default made from the overrides
that differ between points), its own `config`, and `after`: the name of a point, or several, that
must finish first. A value "@NAME" is the run folder of that point, and implies `after`. If the file
has SCALES, only these can be asked for.
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, nearest
from vit_jax.recipes import run_file

RECORD = "sweep.json"  # beside the run folders; see run.py
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")
_LONGEST = 150  # of a name; file systems take 255 bytes


def product(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """All combinations of the axes' values; the last axis varies fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def together(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Zips axes of equal length: their first values, then their second, ...

    Points combine with `|`: `a | b for a in together(...) for b in product(...)`.
    """
    return [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep; `overrides` are as in the file, including "@NAME"."""

    name: str
    config: str
    overrides: dict[str, Any]
    after: tuple[str, ...] = ()

    def flags(self, folder: Callable[[str], str]) -> list[str]:
        """The overrides as flags; `folder` maps a point's name to its run folder."""
        return [
            f"--config.{key}={folder(value[1:]) if _refers(value) else value}"
            for key, value in self.overrides.items()
        ]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The checked points of a sweep file, in an order that respects `after`."""

    spec: str
    points: tuple[Point, ...]


def load_sweep(spec: str) -> Sweep:
    """Loads `FILE` or `FILE:SCALE`, and checks every point, including its config.

    Config files are looked up from the current directory, then from the parent folders of the
    sweep file, nearest first; recipes are found by name from anywhere.

    Raises:
      UserError: no such file, function or scale; points with the same name, with a circular or
        unknown `after`; an override that the config does not accept.
    """
    path, _, scale = spec.partition(":")
    default, raw = _read_file(spec, path, scale)
    points = [_point(spec, fields, default) for fields in raw]
    if not points:
        raise UserError(f"{spec} yields no points; expected dicts of overrides of the config")
    points = _named(spec, points)
    points = _ordered(spec, [_waiting(point) for point in points])
    points = [
        dataclasses.replace(point, config=_find_config(point.config, path)) for point in points
    ]
    for point in points:
        try:
            point_config(point, lambda name: name).check_trains()
        except UserError as error:
            raise UserError(f"{spec}, point {point.name}: {error}") from None
    return Sweep(spec, tuple(points))


def _read_file(spec: str, path: str, scale: str) -> tuple[Any, list[Any]]:
    """Returns the file's `config` and what its function yields."""
    if not os.path.isfile(path) or not path.endswith(".py"):
        raise UserError(f"there is no sweep file {path!r} ({spec}); expected FILE.py or FILE:SCALE")
    try:
        module = run_file(path)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    function = getattr(module, "sweep", None)
    if not callable(function):
        raise UserError(f"{path} is no sweep file: it has no function sweep")
    scales = getattr(module, "SCALES", None)
    if scale and scales is not None and scale not in scales:
        raise UserError(f"{spec} has no scale {scale!r}; {nearest(scale, scales)}")
    try:
        return getattr(module, "config", None), list(function(scale) if scale else function())
    except (ValueError, TypeError) as error:
        raise UserError(f"{spec}: {error}") from None
    except Exception as error:
        raise UserError(f"{spec}: sweep fails ({type(error).__name__}: {error})") from error


def _point(spec: str, fields: Any, default: Any) -> Point:
    """Converts what a sweep yields to a Point; its name may still be empty."""
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise UserError(f"{spec} yields {fields!r}; expected a dict of overrides")
    overrides = dict(fields)
    name, config = overrides.pop("name", ""), overrides.pop("config", default)
    after = overrides.pop("after", ())
    after = (after,) if isinstance(after, str) else after
    if not isinstance(name, str) or ("name" in fields and not _NAME.fullmatch(name)):
        raise UserError(
            f"{spec}: a point is named {name!r}; a name is a folder's, of letters, digits and "
            "._=,+- and begins with one of the former"
        )
    if not isinstance(config, str):
        raise UserError(
            f"{spec}: the config of a point is {config!r}; expected the path of a config file, "
            "from the file's `config` or the point's own"
        )
    if not isinstance(after, (list, tuple)) or not all(isinstance(each, str) for each in after):
        raise UserError(f"{spec}: `after` is {after!r}; expected the name of a point, or several")
    from vit_jax.training.config_file import plain

    overrides = {key: plain(f"{spec}: {key}", value) for key, value in overrides.items()}
    return Point(name, config, overrides, tuple(after))


def _refers(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("@")


def _waiting(point: Point) -> Point:
    """Adds to `after` the points whose folders the overrides name."""
    named = [value[1:] for value in point.overrides.values() if _refers(value)]
    return dataclasses.replace(point, after=tuple(dict.fromkeys([*point.after, *named])))


def _named(spec: str, points: list[Point]) -> list[Point]:
    """Names unnamed points by the overrides in which they differ."""
    settings = [{"config": point.config, **point.overrides} for point in points if not point.name]
    keys = dict.fromkeys(key for each in settings for key in each)
    varied = [key for key in keys if len({repr(each.get(key)) for each in settings}) > 1]
    named = []
    for point in points:
        if not point.name:
            own = {"config": point.config, **point.overrides}
            parts = [f"{key}={_text(own[key])}" for key in varied if key in own]
            name = ",".join(parts) or "point"
            if len(name) > _LONGEST:
                digest = hashlib.sha256(name.encode()).hexdigest()[:8]
                name = f"{name[: _LONGEST - 9]}-{digest}"
            point = dataclasses.replace(point, name=name)
        named.append(point)
    names = [point.name for point in named]
    for name in names:
        if names.count(name) > 1:
            same = [point for point in named if point.name == name]
            what = "the same point" if same[0] == same[1] else "different ones"
            raise UserError(
                f"{spec}: {names.count(name)} points have the name {name!r} ({what}): leave one "
                "out, or give each a `name` of its own"
            )
        if name in (RECORD, "slurm") or f"{name}.log" in names or len(name) > 200:
            raise UserError(f"{spec}: a point cannot be named {name!r}: choose another `name`")
    return named


def _text(value: Any) -> str:
    """Formats a value as part of a file name."""
    if isinstance(value, tuple):
        return "x".join(map(_text, value))
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", str(value)).strip("_")


def _ordered(spec: str, points: list[Point]) -> list[Point]:
    """Sorts points so that each comes after those that it waits for, otherwise in order."""
    by_name = {point.name: point for point in points}
    done: dict[str, Point] = {}

    def visit(point: Point, path: tuple[str, ...]) -> None:
        if point.name in path:
            circle = [*path[path.index(point.name) :], point.name]
            raise UserError(f"{spec}: points wait for one another: {' after '.join(circle)}")
        if point.name not in done:
            for name in point.after:
                if name not in by_name:
                    raise UserError(
                        f"{spec}: {point.name} is after {name!r}, which is no point; "
                        f"{nearest(name, by_name)}"
                    )
                visit(by_name[name], (*path, point.name))
            done[point.name] = point

    for point in points:
        visit(point, ())
    return list(done.values())


def _find_config(config: str, sweep_file: str) -> str:
    path, colon, argument = config.partition(":")
    if path.endswith(".py") and not os.path.exists(path):
        for folder in Path(os.path.abspath(sweep_file)).parents:
            if (folder / path).is_file():
                return f"{folder / path}{colon}{argument}"
    return config


def point_config(point: Point, folder: Callable[[str], str]) -> Any:
    """The Config of a point; `folder` maps the names of points in it to run folders."""
    from vit_jax.training.config_file import load_config

    return load_config(point.config, point.flags(folder))

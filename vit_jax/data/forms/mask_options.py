"""What options and lists say of the classes of masks, beside what is known of a data set."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from vit_jax.data import storage
from vit_jax.data.forms.cells import read_table, read_text
from vit_jax.data.forms.class_lists import read_pairs
from vit_jax.data.forms.known_masks import ADE, ade20k, completed
from vit_jax.data.forms.mask_classes import (
    REDUCED,
    Classes,
    few_numbers,
    numbers_of,
    occurring,
    own_palette,
    spread,
)
from vit_jax.data.masks import IGNORED, MOST, Colours
from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

CLASS_OPTIONS = ("classes", "reduce_zero", "foreground", "colours")
_LABELMAP = "labelmap.txt"
_LISTS = (ADE, "classes.txt", "labels.txt", "class_names.txt", _LABELMAP)
_COLOURED = re.compile(r"([^:]+):(\d{1,3}),(\d{1,3}),(\d{1,3}):[^:]*:[^:]*")  # CVAT's labelmap.txt
_TOLD = 2000  # of more masks it is said that all are read
_MANY = 64  # numbers, of which not all are taken to be classes unless it is said


def classes_of(
    where: str,
    kind: str,
    root: str,
    given: Mapping[str, str],
    masks: Sequence[str],
    every: Callable[[], Sequence[str]],
) -> Classes:
    """What the numbers of a data set's masks mean: by its layout, its lists, or the user's options.

    Args:
      where: the source, for messages.
      kind: of `Layout`.
      given: options: `classes` (a file of names, or their number), `reduce_zero`, `foreground`,
        `colours`.
      masks: the paths of the masks.
      every: returns those of all splits, which are read where nothing says how many classes there
        are.

    Raises:
      UserError: nothing says what 0 means where data sets differ, or options that do not fit.
    """
    found = completed(where, root, kind, _said(where, root, given), given, masks)
    if not found.names:
        names = _numbered(where, found.table, found.colours, every())
        how = f"nothing names the classes: they are called 0 to {len(names) - 1}"
        found = found.added(how, names=names)
    elif _may_be_binary(found, given):
        _check_binary(where, occurring(spread(every()), found.colours))
    if found.palette is None:
        found = found.added("", palette=own_palette(masks[0], found))
    return found


def classes_said(where: str, given: Mapping[str, str], sample: Iterable[bytes]) -> Classes:
    """What numbers mean by the options alone, as of `classes_of`, where masks are in records.

    Args:
      sample: the bytes of some masks.

    Raises:
      UserError: the options do not say how many classes there are.
    """
    said = _said(where, "", given)
    if not said.names:
        raise UserError(
            f"{where}: nothing says what the classes of its masks are: add classes=FILE, a list of "
            "their names, or classes=N, how many there are"
        )
    if _may_be_binary(said, given):
        found = np.zeros(256, bool)
        for data in sample:
            found[np.unique(numbers_of(where, data, said.colours))] = True
        _check_binary(where, found)
    return said


def _said(where: str, root: str, given: Mapping[str, str]) -> Classes:
    """What the options and a list in the folder `root` say; without names, if they say none."""
    ways = [key for key in ("colours", "reduce_zero", "foreground") if key in given]
    if len(ways) > 1:
        raise UserError(f"{where}: {ways[0]}= and {ways[1]}= exclude each other")
    found = _listed(where, root, given, bool(ways))
    if ways and found.colours is not None and ways != ["colours"]:
        raise UserError(f"{where}: {ways[0]}= is for numbers, and {_LABELMAP} names colours")
    if "colours" in given:
        by_colour = _by_colour(_path(root, given["colours"]))
        if found.names and found.names != by_colour.names:
            raise UserError(
                f"{where}: {given['colours']} names other classes than the list: leave one of them "
                "out"
            )
        found = by_colour
    reduce_zero = given.get("reduce_zero")
    if reduce_zero not in (None, "true", "false"):
        raise UserError(f"{where}: reduce_zero is {reduce_zero!r}; expected true or false")
    if reduce_zero == "true":
        how = "0 is of no class, and 1 is class 0 (reduce_zero=true)"
        found = found.added(how, table=REDUCED)
    if "foreground" in given:
        found = _foreground(where, given["foreground"], found)
    if len(found.names) > MOST:
        raise UserError(
            f"{where} has {len(found.names)} classes, and masks tell at most {MOST} apart"
        )
    return found


def _path(root: str, name: str) -> str:
    """A file that an option names: in the data's folder, or by its whole path."""
    inside = f"{root}/{name}"
    return inside if root and storage.is_file(inside) else os.path.expanduser(name)


def _listed(where: str, root: str, given: Mapping[str, str], zero: bool) -> Classes:
    """What `classes=` says, or a list in the folder; without names if there is none.

    Args:
      zero: whether an option says what 0 is.
    """
    said = given.get("classes")
    if said is not None and re.fullmatch(r"[1-9]\d{0,4}", said):
        return Classes(tuple(map(str, range(int(said)))), f"{said} classes, as said")
    here = [name for name in _LISTS if root and storage.is_file(f"{root}/{name}")]
    if said is None and len(here) > 1:
        raise UserError(f"{where} has {' and '.join(here)}: say which is meant, classes={here[0]}")
    if said is None and not here:
        return Classes((), "")
    path = _path(root, said or here[0])
    name = os.path.basename(path)
    if name == ADE:
        return ade20k(path, zero)
    if name == _LABELMAP and _label_map(path):
        return _by_colour(path)
    return Classes(_names(path), f"classes by {name}")


def _names(path: str) -> tuple[str, ...]:
    """The names in a list, in its order, or in that of the numbers before them."""
    rows = read_pairs(path)
    if all(len(row) == 2 for row in rows):
        numbers = sorted((int(row[0]), row[1]) for row in rows if row[0].isdecimal())
        if [number for number, _ in numbers] != list(range(len(rows))):
            raise UserError(f"{path} has two columns; expected numbers from 0 on, and names")
        rows = [(name,) for _, name in numbers]
    names = tuple(row[0] for row in rows)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} names the class {twice!r} twice")
    return names


def _foreground(where: str, number: str, said: Classes) -> Classes:
    if not re.fullmatch(r"[1-9]\d{0,2}", number) or int(number) > 255:
        raise UserError(f"{where}: foreground is {number!r}; expected a number from 1 to 255")
    if said.names and len(said.names) != 2:
        raise UserError(f"{where}: foreground= is for two classes, and there are {len(said.names)}")
    known = {IGNORED: IGNORED, 0: 0, int(number): 1}
    how = f"0 is class 0, and {number} is class 1"
    if int(number) != IGNORED:
        how += f", {IGNORED} is of no class"
    table = tuple(known.get(value, -1) for value in range(256))
    return said.added(how, names=said.names or ("0", "1"), table=table)


def _label_map(path: str) -> list[tuple[str, ...]]:
    """The (name, r, g, b) of CVAT's labelmap.txt; none of another list."""
    lines = [line.strip() for line in (read_text(path, "list of classes") or "").splitlines()]
    found = [_COLOURED.fullmatch(line) for line in lines if line and not line.startswith("#")]
    return [each.groups() for each in found] if all(found) else []


def _by_colour(path: str) -> Classes:
    """The classes by a table of names and r, g, b; a row called "ignored" is of no class."""
    rows = _label_map(path) if os.path.basename(path) == _LABELMAP else []
    if not rows:
        table = read_table(path)
        if not table.header and not any(cells[0].isdecimal() for cells in table.columns.values()):
            table = table.headed()
        columns = list(table.columns.values())
        columns.sort(key=lambda cells: all(re.fullmatch(r"\d{1,3}", cell) for cell in cells))
        numbers = [all(re.fullmatch(r"\d{1,3}", cell) for cell in cells) for cells in columns]
        if numbers != [False, True, True, True]:
            raise UserError(f"{path}: expected a column of names, and three of r, g and b")
        rows = list(zip(*columns, strict=True))
    called = [row[0] for row in rows]
    colours = [tuple(map(int, row[1:])) for row in rows]
    if max(map(max, colours)) > 255 or len(set(colours)) < len(rows):
        raise UserError(f"{path} has a colour twice, or above 255")
    if twice := [name for name in called if name != "ignored" and called.count(name) > 1]:
        raise UserError(f"{path} names the class {twice[0]!r} twice")
    classes = [i for i, name in enumerate(called) if name != "ignored"]
    known: Colours = {
        65536 * r + 256 * g + b: classes.index(i) if i in classes else IGNORED
        for i, (r, g, b) in enumerate(colours)
    }
    return Classes(
        tuple(called[i] for i in classes),
        f"colours by {os.path.basename(path)}",
        tuple(colours[i] for i in classes),
        colours=known,
    )


def _numbered(
    where: str, table: tuple[int, ...] | None, colours: Colours | None, masks: Sequence[str]
) -> tuple[str, ...]:
    """The classes of all masks as numbers; reads all of them."""
    if len(masks) > _TOLD:
        logger.info(
            "%s: nothing says how many classes there are: all %s masks are read (classes=N or a "
            "classes.txt saves it)",
            *(where, f"{len(masks):,}"),
        )
    present = occurring(masks, colours)
    if table is None:
        _check_binary(where, present)
    known = np.arange(256) if table is None else np.array(table)
    numbers = sorted(set(known[present].tolist()) - {IGNORED, -1})
    if not numbers:
        raise UserError(f"{where}: no pixel of any mask has a class")
    if len(numbers) > _MANY:
        raise UserError(
            f"{where}: nothing says what the classes are, and the masks have {len(numbers)} "
            f"numbers, {few_numbers(numbers)}: if these are classes, say how many there are, "
            "classes=N; else the masks were blurred when they were resized or drawn"
        )
    if numbers[-1] >= 2 * len(numbers):
        raise UserError(
            f"{where}: the masks have the classes {few_numbers(numbers)}, with gaps: say how many "
            "there are, classes=N, or name them in a classes.txt"
        )
    return tuple(map(str, range(numbers[-1] + 1)))


def _may_be_binary(said: Classes, given: Mapping[str, str]) -> bool:
    """Whether 255 may be one of the two classes, as no option says that it is or is not."""
    return len(said.names) <= 2 and "foreground" not in given


def _check_binary(where: str, present: Bool[np.ndarray, "256"]) -> None:
    if set(np.flatnonzero(present)) <= {0, IGNORED} and present[IGNORED]:
        raise UserError(
            f"{where}: the masks have 0 and 255 alone, and 255 is of no class here: if it is a "
            "class, say foreground=255; if it is none, foreground=1, or how many classes there are "
            "of more than two, classes=N"
        )

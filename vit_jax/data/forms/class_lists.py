"""Class names: their order, and the files that list them."""

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from vit_jax.data.forms.cells import NoTable, Table, is_word, parsed_json, read_table, read_text
from vit_jax.data.forms.files import class_name
from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"0|[1-9]\d{0,7}", re.ASCII)


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts class names; numbers by value, and with all from 0 on if more than half occur."""
    found = set(names)
    if not found or not all(_NUMBER.fullmatch(name) for name in found):
        return tuple(sorted(found))
    numbers = sorted(map(int, found))
    if numbers[-1] < 2 * len(numbers):
        numbers = range(numbers[-1] + 1)
    return tuple(map(str, numbers))


def read_pairs(path: str) -> list[tuple[str, ...]]:
    """Reads a list of classes as [("cat",), ("dog",)], or pairs as [("0", "cat"), ("1", "dog")].

    A header is left out if it is certain. Lines of a WordNet id, a space and a name are pairs, as
    are the items of a JSON object. A third column that counts the rows from 0 or 1 gives their
    order, and is left out, as in imagenet_class_index.json.

    Raises:
      UserError: no such file, or ambiguous columns.
    """
    columns = _readings(path)[0]
    if len(columns) > 2:
        order = [place for place, cells in enumerate(columns) if _places(cells) is not None]
        if len(columns) != 3 or len(order) != 1:
            raise UserError(
                f"{path} has {len(columns)} columns; expected classes, or pairs of names"
            )
        columns = _by_places(columns, order[0])
        del columns[order[0]]
    return list(zip(*columns, strict=True))


def read_classes(path: str, found: Sequence[str]) -> tuple[str, ...]:
    """Reads the class names in order from a list or a table.

    In a table, the column with all classes of the data is read, in the order of another column
    that counts from 0 or 1, if there is one, else in that of the file.

    Args:
      path: see `read_pairs`.
      found: the classes of the data.

    Raises:
      UserError: no such file, no column or several with the data's classes, a class that is listed
        twice, or numbers that are not 0 to N-1 or 1 to N.
    """
    wanted, fitting = set(found), {}
    readings = _readings(path, "file of class names")
    for columns in readings:
        for place, cells in enumerate(columns):
            if wanted <= set(cells):
                ordered = _ordered(path, columns, place)
                if len(columns) == 1 and is_word(ordered[0]) and ordered[0] not in wanted:
                    logger.info("%s: %r is taken for a header", path, ordered[0])
                    ordered = ordered[1:]
                fitting.setdefault(ordered, None)
    if len(fitting) > 1:
        raise UserError(f"{path} has the data's classes in more than one column")
    names = next(iter(fitting), None)
    if names is None:
        if len(readings[0]) > 1:
            first = [f"{cells[0]!r}, ..." for cells in readings[0]]
            unknown = [name for name in found if not any(name in cells for cells in readings[0])]
            raise UserError(
                f"{path} has no column with all classes of the data in it: found "
                f"{'; '.join(first)}, but not such as {(unknown or found)[0]!r}"
            )
        names = readings[0][0]
    if len(set(names)) != len(names):
        raise UserError(f"{path} names a class twice")
    return names


def _readings(path: str, what: str = "list of classes") -> list[list[tuple[str, ...]]]:
    """All possible readings of a list of classes as columns, the most likely first."""
    text = read_text(path, what)
    if text is None:
        return [_table_columns(read_table(path, what))]
    value = parsed_json(text)
    if value is not None:
        return [_json_columns(path, value, what)]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    whole = [tuple(map(class_name, lines))]
    words = [line.split(None, 1) for line in lines]
    if all(len(each) == 2 and re.fullmatch(r"n\d{8}", each[0]) for each in words):
        return [_columns(words), whole]
    try:
        table = read_table(path, what)
    except NoTable:
        return [whole]
    columns = _table_columns(table)
    loose = len(columns) > 1 and all(", " in line for line in lines) and '"' not in text
    if len(columns) == 1:
        return [columns]
    if loose and "\t" not in text and all(line.count(",") == line.count(", ") for line in lines):
        return [whole, columns]  # "tench, Tinca tinca" is more likely one name
    return [columns, whole]


def _columns(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    return [tuple(map(class_name, cells)) for cells in zip(*rows, strict=True)]


def _table_columns(table: Table) -> list[tuple[str, ...]]:
    return [tuple(map(class_name, cells)) for cells in table.columns.values()]


def _json_columns(path: str, value: Any, what: str) -> list[tuple[str, ...]]:
    rows: list[tuple[Any, ...]]
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return _table_columns(read_table(path, what))
    if isinstance(value, dict):
        rows = [(k, *(v if isinstance(v, list) else [v])) for k, v in value.items()]
    else:
        rows = [tuple(v) if isinstance(v, list) else (v,) for v in value]
    plain = all(type(cell) in (str, int) for row in rows for cell in row)
    if not rows or not plain or len(set(map(len, rows))) != 1:
        raise UserError(
            f"{path} is no {what}: expected a JSON list of names, or an object of names and numbers"
        )
    return _columns([[str(cell).strip() for cell in row] for row in rows])


def _places(cells: Sequence[str]) -> list[int] | None:
    """The cells as places from 0, if they are 0 to N-1 or 1 to N in any order."""
    if not all(_NUMBER.fullmatch(cell) for cell in cells):
        return None
    numbers = [int(cell) for cell in cells]
    first = min(numbers)
    complete = first in (0, 1) and sorted(numbers) == list(range(first, first + len(numbers)))
    return [number - first for number in numbers] if complete else None


def _by_places(columns: Sequence[tuple[str, ...]], place: int) -> list[tuple[str, ...]]:
    order = sorted(range(len(columns[place])), key=_places(columns[place]).__getitem__)
    return [tuple(cells[row] for row in order) for cells in columns]


def _ordered(path: str, columns: list[tuple[str, ...]], place: int) -> tuple[str, ...]:
    """A column sorted by the numbers in it or in another column."""
    numbers = [i for i, cells in enumerate(columns) if all(map(_NUMBER.fullmatch, cells))]
    if len(columns) == 1 or not numbers:
        return columns[place]
    if place in numbers:
        numbers = [place]
    if len(numbers) > 1:
        raise UserError(f"{path} has two columns of numbers: leave one of them out")
    at = numbers[0]
    if _places(columns[at]) is None:
        raise UserError(
            f"{path}: the numbers of its {len(columns[at])} classes are not 0 to "
            f"{len(columns[at]) - 1}, nor 1 to {len(columns[at])}"
        )
    if "0" not in columns[at]:
        logger.info("%s counts from 1: its class 1 is class 0 here", path)
    return _by_places(columns, at)[place]

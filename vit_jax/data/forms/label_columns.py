"""The columns of labels in a table."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from vit_jax.data.forms.cells import Table
from vit_jax.data.forms.files import class_name
from vit_jax.errors import UserError, nearest

LABEL_COLUMNS = ("label", "class", "category", "target", "breed", "species")
_MEASURE = re.compile(r"[-+]?\d*[.,]\d+(e[-+]?\d+)?|-\d+", re.IGNORECASE)


_PLURALS = ("labels", "tags", "classes", "categories")


def label_column(table: Table, said: str | None, others: Collection[str], how: str) -> str:
    """The column of labels: the one `said`, the only one not in `others`, or in LABEL_COLUMNS.

    Raises:
      UserError: no column or several; or, unless `said`, cells that look like measurements,
        captions, or several labels.
    """
    if said is not None:
        return table.known(said)
    rest = [name for name in table.columns if name not in others]
    named = [name for name in rest if name.lower() in LABEL_COLUMNS]
    for one in (rest, named):
        if len(one) == 1:
            _check_labels(table, one[0], how)
            return one[0]
    if not rest:
        raise UserError(f"{table.path} has no column of labels: found {table.summary()}")
    raise UserError(
        f"{table.path} has {len(rest)} columns that may be labels ({', '.join(map(repr, rest))}): "
        f"say which, as in {how},label={(named or rest)[0]}"
    )


def _check_labels(table: Table, column: str, how: str) -> None:
    """Raises a UserError if the cells of a column are most likely not classes."""
    cells = [cell for cell in table.columns[column] if cell]
    why = None
    if odd := next(filter(_MEASURE.fullmatch, cells), None):
        why = f"numbers such as {odd!r}"
    elif odd := next((cell for cell in cells if _has_several(column, cell)), None):
        several = "" if how.startswith("--") else f" ({how},labels={column} reads them)"
        why = f"what may be several labels, such as {odd!r}{several}"
    elif len(set(cells)) == len(cells) > 4 and column.lower() not in LABEL_COLUMNS:
        why = f"another text for each image, such as {cells[0]!r}"
    if why:
        raise UserError(
            f"{table.path}: column {column!r} has {why}: if these are class names indeed, say so, "
            f"as in {how},label={column}"
        )


def _has_several(column: str, cell: str) -> bool:
    between = r"[|;,\s]" if column.lower().endswith(_PLURALS) else r"[|;]|,(?! )"
    return bool(re.search(between, cell))


SEPARATORS = {"|": "|", ";": ";", "comma": ",", "space": " "}


def row_labels(
    rows: Table, given: Mapping[str, str], others: list[str], where: str
) -> tuple[list[tuple[str, ...]], bool]:
    """The class names of each row, and whether they are multi-label."""
    said = given.get("labels")
    if said is None:
        if not [name for name in rows.columns if name not in others] and rows.lists:
            raise UserError(f"{where}: say labels={next(iter(rows.lists))} for several an image")
        cells = rows.columns[_one(rows, label_column(rows, given.get("label"), others, where))]
        nan = {"": "", "nan": "", "NaN": ""}
        return [(class_name(nan.get(cell, cell)),) for cell in cells], False
    if said in rows.lists:
        return [tuple(map(class_name, cell)) for cell in rows.lists[said]], True
    if said == "*" or (said not in rows.columns and "+" in said):
        every = [name for name in rows.columns if name not in others]
        names = every if said == "*" else [rows.known(name) for name in said.split("+")]
        return list(_indicated(rows, names)), True
    cells = rows.columns[rows.known(said)]
    separator = _separator(rows, said, cells, given.get("separator"))
    return [
        tuple(class_name(each.strip()) for each in cell.split(separator) if each.strip())
        for cell in cells
    ], True


def _one(rows: Table, column: str) -> str:
    if column in rows.lists:
        raise UserError(f"{rows.path}: column {column!r} has lists: say labels={column}")
    return column


def _separator(rows: Table, column: str, cells: Sequence[str], said: str | None) -> str:
    """The separator of the labels in a cell. UserError: it is ambiguous."""
    if said is not None:
        if said not in SEPARATORS:
            raise UserError(f"separator={said}: {nearest(said, SEPARATORS)}")
        return SEPARATORS[said]
    found = [name for name in ("|", ";", "space") if any(SEPARATORS[name] in c for c in cells)]
    if any("," in cell for cell in cells):
        found.append("comma")
    if len(found) == 1 and found != ["comma"]:
        return SEPARATORS[found[0]]
    if not found:
        return "|"
    raise UserError(
        f"{rows.path}: what is between the labels of column {column!r}? Say separator="
        + " or ".join(found)
    )


def _indicated(rows: Table, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The columns that are 1, for each row. UserError: a cell that is neither 0 nor 1."""
    if not names:
        raise UserError(f"{rows.path} has no columns of labels: found {rows.summary()}")
    for name in names:
        for row, cell in enumerate(rows.columns[name]):
            if cell not in ("0", "1"):
                raise UserError(
                    f"{rows.at(row)}: column {name!r} has {cell!r}; expected 0 or 1 for a class"
                )
    for cells in zip(*(rows.columns[name] for name in names), strict=True):
        yield tuple(
            class_name(name) for name, cell in zip(names, cells, strict=True) if cell == "1"
        )

"""The source `table:`: image files, labels and splits listed in a table."""

import collections
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from vit_jax.data import storage
from vit_jax.data.forms.cells import Table, read_table
from vit_jax.data.forms.class_lists import sorted_names
from vit_jax.data.forms.files import (
    WHOLE,
    Packed,
    PassedOver,
    file_example,
    fingerprint_of,
    is_image,
    labels_at,
    parse_split,
    percentile,
)
from vit_jax.data.forms.label_columns import row_labels
from vit_jax.data.forms.layout import options
from vit_jax.data.forms.mask_options import CLASS_OPTIONS, classes_of
from vit_jax.data.forms.pair_files import Pair
from vit_jax.data.forms.pairs import PairSource, check_unpaired, source_of
from vit_jax.errors import UserError, nearest

logger = logging.getLogger(__name__)

_OF_MASKS = (*CLASS_OPTIONS, "unpaired")
OPTIONS = ("image", "label", "labels", "separator", "split", "root", "mask", *_OF_MASKS)
_SPLIT_COLUMNS = ("split", "subset", "partition")


@dataclasses.dataclass(frozen=True, eq=False)
class TableSource:
    """Image files listed in a table; `source[i]["image"]` is a file's bytes.

    The labels of example i are `labels[ends[i - 1]:ends[i]]`: one, unless `multi_label`.
    """

    root: str
    names: Packed  # relative to root
    labels: Int32[np.ndarray, " m"]
    ends: Int64[np.ndarray, " n"]
    label_names: tuple[str, ...]
    fingerprint: str
    multi_label: bool = False

    @property
    def in_bucket(self) -> bool:
        return storage.is_url(self.root)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = labels_at(self.labels, self.ends, index, self.multi_label)
        return file_example(self.root, self.names[index], label)


def table(argument: str, split: str) -> TableSource | PairSource:
    """The images listed in a table (see `cells.read_table`), in its order.

    Args:
      argument: FILE, and, where ambiguous, options behind commas:
        image=COLUMN: file paths, with or without the ending;
        label=COLUMN: class names;
        labels=COLUMN: any number of class names an image, as lists or separated by |, ; or spaces
          (separator=|, ;, comma or space if several of these occur);
        labels=COLUMN+COLUMN or labels=*: a column of 0 and 1 for each class, * for all others;
        split=COLUMN: the split of each image; default: the column named split, if any;
        root=FOLDER: the folder that paths are relative to; default: that of the table;
        mask=COLUMN: files of masks, in place of labels, with the options of `pairs` for classes,
        and unpaired=skip, which leaves out rows without a mask.
      split: a value of that column, or "all"; a part of it as for folders, such as "all[:90%]".

    Raises:
      UserError: a missing or ambiguous column, no such split, a missing file, or an image without
        a label or with two.
    """
    where = f"table:{argument}"
    rows, given = _open(argument)
    name, low, high = parse_split(split)
    column = _split_column(rows, given)
    known = _splits(rows, column)
    if name not in (WHOLE, *known):
        if not known:
            raise UserError(
                f"{where} has no column of splits, so that {split!r} is unknown: use split=all, "
                "all[:90%] or all[90%:], or say split=COLUMN"
            )
        raise UserError(f"{where} has no split {split!r}; {nearest(name, [*known, WHOLE])}")
    root = _root(rows, given)
    if "mask" in given:
        return _masked(where, rows, given, column, (name, low, high))
    image = _image_column(rows, given, root)
    labels, many = row_labels(rows, given, [image, *([column] if column else [])], where)
    in_split = [name == WHOLE or cell == name for cell in _cells(rows, column)]
    files = _files(rows, rows.columns[image], root, in_split)
    chosen: dict[str, int] = {}
    elsewhere = set()
    again = 0
    for row, (file, _) in enumerate(files):
        if not in_split[row]:
            elsewhere.add(file)
        elif not low <= percentile(file) < high:
            continue
        elif file in chosen:
            again += 1
            if labels[row] != labels[chosen[file]]:
                raise UserError(
                    f"{rows.at(row)}: {file!r} is {_text(labels[row])}, but "
                    f"{_text(labels[chosen[file]])} in line {rows.lines[chosen[file]]}"
                )
        else:
            chosen[file] = row
            if not many and not labels[row][0]:
                raise UserError(f"{rows.at(row)}: {file!r} has no label")
    if not chosen:
        raise UserError(f"{where} has no image in split {split!r}")
    if again:
        logger.warning("%s lists %d images again, which are taken once", where, again)
    if shared := sum(file in elsewhere for file in chosen):
        logger.warning("%s has %d images of split %r in others, too", where, shared, split)
    names = sorted_names(each for cell in labels for each in cell if each)
    _check_numbers(where, names)
    numbers = {each: number for number, each in enumerate(names)}
    found = [sorted(numbers[each] for each in set(labels[row])) for row in chosen.values()]
    flat = [number for each in found for number in each]
    keys = [f"{file}\0{each}" for file, each in zip(chosen, found, strict=True)]
    return TableSource(
        root,
        Packed.of(chosen),
        np.array(flat, np.int32),
        np.cumsum([len(each) for each in found], dtype=np.int64),
        names,
        fingerprint_of(names, keys, [files[row][1] for row in chosen.values()]),
        many,
    )


def _masked(
    where: str,
    rows: Table,
    given: Mapping[str, str],
    column: str | None,
    part: tuple[str, int, int],
) -> PairSource:
    """The images of a part (split, low, high), with the masks in a column."""
    root, key, (name, low, high) = _root(rows, given), rows.known(given["mask"]), part
    others = {each: cells for each, cells in rows.columns.items() if each != key}
    image = _image_column(dataclasses.replace(rows, columns=others), given, root)
    needed = [name == WHOLE or cell == name for cell in _cells(rows, column)]
    passed = PassedOver()
    for row, (file, mask) in enumerate(zip(rows.columns[image], rows.columns[key], strict=True)):
        if needed[row] and not (file and mask):
            what = "no mask" if file else "no image"
            if "unpaired" not in given:
                raise UserError(f"{rows.at(row)}: {what} in this row (unpaired=skip leaves it out)")
            passed.add(file or mask or rows.at(row), what)
            needed[row] = False
    columns = [_files(rows, rows.columns[each], root, needed) for each in (image, key)]
    chosen: dict[str, Pair] = {}
    for row, ((file, size), (mask, mask_size)) in enumerate(zip(*columns, strict=True)):
        if needed[row] and low <= percentile(file) < high:
            if file in chosen:
                raise UserError(f"{rows.at(row)}: {file!r} is listed again")
            chosen[file] = Pair(file, mask, size, mask_size)
    if not chosen:
        raise UserError(f"{where} has no image in split {name!r}")
    paths = [os.path.join(root, mask) for mask, _ in columns[1]]
    mine = [path for path, there in zip(paths, needed, strict=True) if there]

    def every() -> list[str]:
        folders = _Folders(root)
        found = [folders.find(cell) if cell else None for cell in rows.columns[key]]
        if without := sum(each is None for each in found):
            logger.info("%s: %d rows, of all splits, have no mask", where, without)
        return sorted({os.path.join(root, each[0]) for each in found if each})

    classes = classes_of(where, "plain", os.path.dirname(rows.path) or ".", given, mine, every)
    return source_of(where, root, list(chosen.values()), classes, passed)


def _check_numbers(where: str, names: Sequence[str]) -> None:
    """Raises a UserError if two labels are one number, such as "1" and "01"."""
    values: dict[int, str] = {}
    for name in names:
        number = name.isascii() and name.isdigit()
        if number and (other := values.setdefault(int(name), name)) != name:
            raise UserError(f"{where}: are the labels {other!r} and {name!r} one class, or two?")


def table_splits(argument: str) -> tuple[str, ...]:
    """The splits of a table: the values of its split column, and "all"."""
    rows, given = _open(argument)
    return (*_splits(rows, _split_column(rows, given)), WHOLE)


def _open(argument: str) -> tuple[Table, dict[str, str]]:
    path, given = options(argument, OPTIONS)
    named = [key for key in ("label", "labels", "mask") if key in given]
    if len(named) > 1:
        raise UserError(f"table:{argument}: {named[0]}=COLUMN or {named[1]}=COLUMN, not both")
    if "mask" not in given and (odd := [key for key in _OF_MASKS if key in given]):
        raise UserError(f"table:{argument}: {odd[0]}= is for masks, of mask=COLUMN")
    check_unpaired(f"table:{argument}", given)
    rows = read_table(path, "table of images", spaces=True)
    said = {given[key] for key in ("image", "label", "labels", "mask", "split") if key in given}
    if not rows.header and len(rows) > 1:
        folders = _Folders(_root(rows, given))
        starts = [cells[:2] for cells in rows.columns.values()]
        if not said <= {*rows.columns, "*"} or any(
            folders.find(second) and not folders.find(first) and not is_image(first)
            for first, second in starts
        ):
            logger.info("%s: its first row, %s, is its header", path, [cell for cell, _ in starts])
            rows = rows.headed()
    return rows, given


def _root(rows: Table, given: Mapping[str, str]) -> str:
    return os.path.expanduser(given.get("root") or os.path.dirname(rows.path) or ".")


def _split_column(rows: Table, given: Mapping[str, str]) -> str | None:
    if "split" in given:
        return rows.known(given["split"])
    named = [name for name in rows.columns if name.lower() in _SPLIT_COLUMNS]
    if len(named) > 1:
        raise UserError(f"{rows.path} has columns {named[0]!r} and {named[1]!r}: say split=COLUMN")
    return named[0] if named else None


def _cells(rows: Table, column: str | None) -> Sequence[str]:
    return [""] * len(rows) if column is None else rows.columns[column]


def _splits(rows: Table, column: str | None) -> tuple[str, ...]:
    """The values of the split column."""
    if column is None:
        return ()
    cells = rows.columns[column]
    if "" in cells:
        raise UserError(f"{rows.at(cells.index(''))} is in no split (column {column!r})")
    found = sorted(set(cells))
    odd = [cell for cell in found if cell == WHOLE or "[" in cell or "]" in cell]
    if odd or 2 * len(found) > len(rows) > 4:
        raise UserError(
            f"{rows.path}: column {column!r} is no column of splits, with {len(found)} values such "
            f"as {(odd or found)[0]!r}"
        )
    return tuple(found)


def _image_column(rows: Table, given: Mapping[str, str], root: str) -> str:
    """The `image` option, or the only column with files in its first or last cell."""
    if "image" in given:
        return rows.known(given["image"])
    folders = _Folders(root)
    found = [
        name
        for name, cells in rows.columns.items()
        if any(folders.find(cell) for cell in (cells[0], cells[-1]) if cell)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{rows.path} has several columns with files ({', '.join(map(repr, found))}): say "
            "image=COLUMN"
        )
    named = [
        name for name, cells in rows.columns.items() if is_image(cells[0]) and is_image(cells[-1])
    ]
    if len(named) == 1:
        return named[0]
    if rows.binary:
        raise UserError(
            f"{rows.path} has the bytes of images in it ({', '.join(rows.binary)}): use hf-data:"
        )
    raise UserError(
        f"{rows.path}: no column has files of {root!r} in it: found {rows.summary()}; say "
        "image=COLUMN, or root=FOLDER"
    )


class _Folders:
    """Looks up files in a folder tree, listing each folder once."""

    def __init__(self, root: str):
        self.root = root
        self._listed: dict[str, tuple[dict[str, int], dict[str, list[str]]]] = {}

    def find(self, cell: str) -> tuple[str, int] | None:
        """The path relative to the root and the size of a file; None if there is no such file.

        Raises:
          UserError: a name without ending fits several images.
        """
        for path in dict.fromkeys((cell, cell.replace("\\", "/"))):
            path = path if ".." in path else os.path.normpath(path)
            folder, name = os.path.split(path)
            files, stems = self._list(folder)
            if name in files:
                return path, files[name]
            if len(several := stems.get(name, [])) > 1:
                raise UserError(
                    f"{cell!r} may be {' or '.join(map(repr, several))} of "
                    f"{os.path.join(self.root, folder)}: give files with their endings"
                )
            for one in several:
                return os.path.join(folder, one), files[one]
        return None

    def _list(self, folder: str) -> tuple[dict[str, int], dict[str, list[str]]]:
        if folder not in self._listed:
            files = storage.files(os.path.join(self.root, folder))
            stems = collections.defaultdict(list)
            for name in sorted(files):
                if is_image(name):
                    stems[os.path.splitext(name)[0]].append(name)
            self._listed[folder] = files, stems
        return self._listed[folder]


def _files(
    rows: Table, cells: Sequence[str], root: str, needed: Sequence[bool]
) -> list[tuple[str, int]]:
    """The path relative to the root and the size of each row's file.

    Raises:
      UserError: a file that is needed is missing.
    """
    folders = _Folders(root)
    found = [folders.find(cell) if cell else None for cell in cells]
    missing = [row for row, each in enumerate(found) if each is None and needed[row]]
    if missing:
        first = missing[0]
        what = f"there is no file {os.path.join(root, cells[first])!r}"
        raise UserError(
            f"{rows.at(first)}: {what if cells[first] else 'the cell of the file is empty'}"
            + (f", and {len(missing) - 1} others are missing" if len(missing) > 1 else "")
        )
    return [each or (cell, 0) for each, cell in zip(found, cells, strict=True)]


def _text(labels: Sequence[str]) -> str:
    return " and ".join(map(repr, labels)) or "nothing"

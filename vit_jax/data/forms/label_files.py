"""Files of labels for archives without labels: `prepare --labels`."""

import dataclasses
import io
import itertools
import logging
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import scipy.io
import scipy.io.matlab

from vit_jax.data import storage
from vit_jax.data.forms.cells import Table, is_word, read_table
from vit_jax.data.forms.label_columns import LABEL_COLUMNS, label_column
from vit_jax.data.forms.layout import options
from vit_jax.data.images import SUFFIXES
from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

_LABELLED = re.compile(
    rf"(?P<name>.+?({'|'.join(map(re.escape, SUFFIXES))}))[,\t ]\s*(?P<label>.+)", re.IGNORECASE
)
_BOXES = re.compile(r"(n\d{8}( -?\d+){4}\s*)+")


@dataclasses.dataclass(frozen=True)
class Match:
    """The rows of a table that belong to images.

    Attributes:
      rows: the first row of each image, or None.
      keys: the key of each row; rows of one image have the same key.
    """

    rows: list[int | None]
    keys: list[str]


def read_labels(path: str, names: Sequence[str]) -> list[str]:
    """The class of every image, from a file of labels.

    The file is one of these:
      - ImageNet-1k's development kit (ILSVRC2012_devkit_t12.tar.gz);
      - a table (see `cells.read_table`) with a column of image paths, file names, or file names
        without ending, and a column of labels: the only other one, the only one of LABEL_COLUMNS,
        or that of FILE,label=COLUMN (and image=COLUMN), such as Kaggle's LOC_val_solution.csv;
      - lines of an image name, a space and a label;
      - a line with the label of each image, in the order of the sorted names.

    Raises:
      UserError: any other file, or labels of other images.
    """
    if path.endswith((".tar", ".tar.gz", ".tgz")):
        return _in_order(path, _development_kit(path), names)
    if os.path.basename(path) == "ILSVRC2012_validation_ground_truth.txt":
        raise UserError(
            f"the numbers in {path} say nothing without the kit that they are from: give "
            "ILSVRC2012_devkit_t12.tar.gz itself"
        )
    file, given = options(path, ("image", "label"))
    if not storage.exists(file):
        raise UserError(f"there is no file of labels {file!r}")
    table, images = _label_table(file, names, given)
    if images is None:
        return _in_order(file, list(table.columns["1"]), names)
    image, match = next(iter(images.items()))
    missing = [name for name, row in zip(names, match.rows, strict=True) if row is None]
    if missing:
        raise UserError(
            f"{path} says nothing of {len(missing)} images, such as {missing[0]!r} (column "
            f"{image!r} names the images)"
        )
    labels = table.columns[label_column(table, given.get("label"), images, f"--labels={file}")]
    if all(_stem(label) != label for label in labels):
        raise UserError(f"{path} has files such as {labels[0]!r} for labels")
    labels = _classes_of_boxes(table, labels)
    found = _labels_of(table, labels, match, image)
    used = len(set(match.rows))
    if used < len(table):
        logger.info("%s: %d of %d rows are of other images", path, len(table) - used, len(table))
    return found


def _label_table(
    path: str, names: Sequence[str], given: Mapping[str, str]
) -> tuple[Table, dict[str, Match] | None]:
    """Returns the table and its columns of image names, which are None if it is a plain list."""
    plain = read_table(path, "file of labels")
    for table in (plain, *_divided_by_spaces(plain)):
        if "image" in given and given["image"] not in table.columns and not table.header:
            table = table.headed()
        tried = [table.known(given["image"])] if "image" in given else list(table.columns)
        found = image_columns(table, tried, names)
        if found:
            break
    else:
        if list(plain.columns) == ["1"] and not plain.header and not given:
            return plain, None
        raise UserError(
            f"{path}: no column names images such as {names[0]!r}: found {plain.summary()}"
        )
    column, match = next(iter(found.items()))
    if not table.header and set(match.rows).isdisjoint((0, None)):
        if _stem(table.columns[column][0]) == table.columns[column][0]:
            table = table.headed()
            tried = [list(table.columns)[int(name) - 1] for name in found]
            found = image_columns(table, tried, names)
    return table, found


def _divided_by_spaces(table: Table) -> Iterator[Table]:
    """Splits a column at spaces in several ways: "A_1 1 3", "my a.jpg big cat", "a big cat"."""
    if list(table.columns) != ["1"] or table.header:
        return
    lines = table.columns["1"]
    pairs = [_LABELLED.fullmatch(line) for line in lines]
    if any(pairs) and not all(pairs):
        odd = lines[pairs.index(None)]
        raise UserError(f"{table.path}: {odd!r} names no image and class, as other lines do")
    by_words = [line.split() for line in lines]
    by_first = [line.split(None, 1) for line in lines]
    for rows in ([pair.groups()[::2] for pair in pairs if pair], by_words, by_first):
        if rows and len(rows[0]) > 1 and {len(row) for row in rows} == {len(rows[0])}:
            columns = {
                str(number): cells for number, cells in enumerate(zip(*rows, strict=True), 1)
            }
            yield dataclasses.replace(table, columns=columns)


def image_columns(table: Table, tried: Iterable[str], names: Sequence[str]) -> dict[str, Match]:
    """The columns of image names: those that match the most images.

    Columns named "label" and the like come last, and those with file endings first.

    Raises:
      UserError: columns that match images with different rows.
    """
    cells = {name: [_plain(cell) for cell in table.columns[name]] for name in tried}
    firsts = {name: _first_rows(each) for name, each in cells.items()}
    best: dict[str, tuple[int, list[int | None], Callable[[str], str]]] = {}
    for wanted, key in _keys_of(names):
        for name, first in firsts.items():
            most = best[name][0] if name in best else 0
            if most < len(names):
                by_key = _first_rows(map(key, first), first.values())
                rows = [by_key.get(each) for each in wanted]
                if (count := len(rows) - rows.count(None)) > most:
                    best[name] = count, rows, key
    ranks, found = {}, {}
    for name, (count, rows, key) in best.items():
        ending = any(_stem(cell) != cell for cell in firsts[name])
        ranks[name] = count, name.lower() not in LABEL_COLUMNS, ending
        found[name] = Match(rows, [key(cell) for cell in cells[name]])
    found = {name: match for name, match in found.items() if ranks[name] == max(ranks.values())}
    if any(match.rows != next(iter(found.values())).rows for match in found.values()):
        raise UserError(
            f"{table.path}: columns {' and '.join(map(repr, found))} both name the images, "
            "differently: say image=COLUMN"
        )
    return found


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _stem(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if stem and (dot + ending).lower() in SUFFIXES else name


def _lower_ending(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return name if "/" in ending else stem + dot + ending.lower()


# How to make a key of an image's path below the folder that all share, and of a cell.
_RULES: tuple[tuple[Callable[[str], str], Callable[[str], str]], ...] = (
    (str, str),
    (_base, _base),
    (_stem, str),
    (lambda name: _stem(_base(name)), _base),
)


def _keys_of(names: Sequence[str]) -> Iterator[tuple[list[str], Callable[[str], str]]]:
    """Yields the images' keys by each rule that keeps them unique, and the key of a cell."""
    names = [_plain(name) for name in names]
    folder = os.path.commonpath({os.path.dirname(name) for name in names}) if names else ""
    below = [name[len(folder) + 1 :] for name in names] if folder else names
    for of_name, of_cell in _RULES:
        for start in (names, below) if folder and of_cell is str else (names,):
            for ending in (str, _lower_ending):
                keys = [ending(of_name(name)) for name in start]
                if len(set(keys)) == len(keys):
                    yield keys, lambda cell, of=of_cell, end=ending: end(of(cell))


def _plain(cell: str) -> str:
    return cell.replace("\\", "/").removeprefix("./").lstrip("/")


def _first_rows(keys: Iterable[str], rows: Iterable[int] | None = None) -> dict[str, int]:
    """Key -> its first row."""
    found: dict[str, int] = {}
    for key, row in zip(keys, itertools.count() if rows is None else rows, strict=False):
        found.setdefault(key, row)
    return found


def _labels_of(table: Table, labels: Sequence[str], match: Match, image: str) -> list[str]:
    """The label of each image. UserError: an image without a label, or with two."""
    names, first = table.columns[image], {match.keys[row]: row for row in match.rows}
    for row, key in enumerate(match.keys):
        other = first.get(key, row)
        if labels[other] != labels[row]:
            raise UserError(
                f"{table.at(row)}: {names[row]!r} is {labels[row]!r}, but {labels[other]!r} in "
                f"line {table.lines[other]}"
            )
    for row in match.rows:
        if not labels[row] or labels[row].lower() == "nan":
            raise UserError(f"{table.at(row)}: {names[row]!r} has no label")
    return [labels[row] for row in match.rows]


def _classes_of_boxes(table: Table, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The WordNet ids in Kaggle's bounding boxes, such as "n03995372 85 1 499 272 "."""
    if not all(_BOXES.fullmatch(label) for label in labels):
        return labels
    found = []
    for row, label in enumerate(labels):
        ids = set(label.split()[::5])
        if len(ids) > 1:
            raise UserError(f"{table.at(row)} has boxes of several classes: {label!r}")
        found.append(ids.pop())
    return tuple(found)


def _in_order(path: str, labels: list[str], names: Sequence[str]) -> list[str]:
    """Assigns labels, a line each, to the images in the order of their sorted names."""
    if len(labels) != len(names):
        raise UserError(f"{path} has {len(labels)} labels, but there are {len(names)} images")
    if len(labels) > 2 and is_word(labels[0]) and labels[0] not in labels[1:]:
        raise UserError(
            f"{path}: is its first line, {labels[0]!r}, a header? Then it has {len(labels) - 1} "
            f"labels of {len(names)} images; expected one in each line, and no header"
        )
    firsts = [label.split(None, 1)[0] for label in labels]
    if len(labels) > 1 and len(set(firsts)) == len(firsts) and all(" " in each for each in labels):
        raise UserError(
            f"{path}: {labels[0]!r} may be a class, or an image and its class, though no image is "
            f"named so ({names[0]!r} is): name the images as they are, NAME,CLASS in each line"
        )
    order = sorted(range(len(names)), key=names.__getitem__)
    classes = [""] * len(names)
    for row, label in zip(order, labels, strict=True):
        classes[row] = label
    return classes


def _development_kit(path: str) -> list[str]:
    """The WordNet ids of ImageNet-1k's validation images, in the order of their names."""
    try:
        with tarfile.open(path) as kit:
            files = {os.path.basename(m.name): m for m in kit if m.isreg()}
            meta = scipy.io.loadmat(
                io.BytesIO(kit.extractfile(files["meta.mat"]).read()), squeeze_me=True
            )
            numbers = kit.extractfile(files["ILSVRC2012_validation_ground_truth.txt"]).read()
        ids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in meta["synsets"]}
        return [ids[int(number)] for number in numbers.split()]
    except FileNotFoundError:
        raise UserError(f"there is no file of labels {path!r}") from None
    except (
        *(tarfile.TarError, scipy.io.matlab.MatReadError, zlib.error, lzma.LZMAError, EOFError),
        *(OSError, LookupError, ValueError, TypeError),
    ) as error:
        raise UserError(f"{path} is no development kit of ILSVRC2012: {error!r}") from None

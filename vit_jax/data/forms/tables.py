"""What tables say of images and classes: labels of images, lists and pairs of class names."""

import dataclasses
import io
import itertools
import logging
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import scipy.io
import scipy.io.matlab

from vit_jax.data.forms.cells import (
    Table,
    is_word,
    read_table,
)
from vit_jax.data.forms.layout import options
from vit_jax.data.images import SUFFIXES
from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "class", "category", "target", "breed", "species")
_LABELLED = re.compile(
    rf"(?P<name>.+?({'|'.join(map(re.escape, SUFFIXES))}))[,\t ]\s*(?P<label>.+)", re.IGNORECASE
)
_BOXES = re.compile(r"(n\d{8}( -?\d+){4}\s*)+")
_MEASURE = re.compile(r"[-+]?\d*[.,]\d+(e[-+]?\d+)?|-\d+", re.IGNORECASE)
_PLURALS = ("labels", "tags", "classes", "categories")


@dataclasses.dataclass(frozen=True)
class Match:
    """How a column names images.

    Attributes:
      rows: the first row of each image, None where there is none.
      keys: what the cells were compared by, so that rows of one key are of one image.
    """

    rows: list[int | None]
    keys: list[str]


def read_labels(path: str, names: Sequence[str]) -> list[str]:
    """The class of every image of a split whose archive does not say it.

    Args:
      path: ImageNet-1k's development kit (ILSVRC2012_devkit_t12.tar.gz); a table (see
        `cells.read_table`) with a column that names the images, by path, by the file's name, or by
        that without its ending, and one of labels; name and label with a space between; or a text
        with a line for each image: its class, in the order of the sorted names. The column of
        labels is the only other one, or the only one of LABEL_COLUMNS, or said:
        FILE,label=COLUMN and FILE,image=COLUMN. Kaggle's LOC_val_solution.csv of ImageNet is one.

    Raises:
      UserError: another file, or one that is not about these images.
    """
    if path.endswith((".tar", ".tar.gz", ".tgz")):
        return _in_order(path, _development_kit(path), names)
    if os.path.basename(path) == "ILSVRC2012_validation_ground_truth.txt":
        raise UserError(
            f"the numbers in {path} say nothing without the kit that they are from: give "
            "ILSVRC2012_devkit_t12.tar.gz itself"
        )
    file, told = options(path, ("image", "label"))
    if not os.path.exists(file):
        raise UserError(f"there is no file of labels {file!r}")
    table, images = _label_table(file, names, told)
    if images is None:
        return _in_order(file, list(table.columns["1"]), names)
    image, match = next(iter(images.items()))
    missing = [name for name, row in zip(names, match.rows, strict=True) if row is None]
    if missing:
        raise UserError(
            f"{path} says nothing of {len(missing)} images, such as {missing[0]!r} (column "
            f"{image!r} names the images)"
        )
    labels = table.columns[label_column(table, told.get("label"), images, f"--labels={file}")]
    if all(_stem(label) != label for label in labels):
        raise UserError(f"{path} has files such as {labels[0]!r} for labels")
    labels = _classes_of_boxes(table, labels)
    found = _labels_of(table, labels, match, image)
    used = len(set(match.rows))
    if used < len(table):
        logger.info("%s: %d of %d rows are of other images", path, len(table) - used, len(table))
    return found


def _label_table(
    path: str, names: Sequence[str], told: Mapping[str, str]
) -> tuple[Table, dict[str, Match] | None]:
    """A table and its columns that name the images; None for these where it is a plain list."""
    plain = read_table(path, "file of labels")
    for table in (plain, *_divided_by_spaces(plain)):
        if "image" in told and told["image"] not in table.columns and not table.header:
            table = table.headed()
        tried = [table.known(told["image"])] if "image" in told else list(table.columns)
        found = image_columns(table, tried, names)
        if found:
            break
    else:
        if list(plain.columns) == ["1"] and not plain.header and not told:
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
    """A column of text as tables: "A_1 1 3", "my a.jpg big cat", "a big cat"."""
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
    """Which columns name the images, and how.

    Those that name most of them, and in the same rows; columns called "label" and the like only
    where there is no other, and "1" only where no other has "1.jpg".

    Raises:
      UserError: columns that name them differently, or an image that has two rows.
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


# What an image is called, from its path below the folder that all share, and a cell.
_RULES: tuple[tuple[Callable[[str], str], Callable[[str], str]], ...] = (
    (str, str),
    (_base, _base),
    (_stem, str),
    (lambda name: _stem(_base(name)), _base),
)


def _keys_of(names: Sequence[str]) -> Iterator[tuple[list[str], Callable[[str], str]]]:
    """What the images may be called, by rules under which all differ; and a cell's key by each."""
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


def label_column(table: Table, said: str | None, others: Collection[str], how: str) -> str:
    """The column of labels: the one said, the only one not in `others`, or of LABEL_COLUMNS.

    Raises:
      UserError: none, or several; or one that was not said, whose cells are rather measures,
        captions, or several labels each.
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
    """Refuses a column whose cells are no classes in all likelihood."""
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


def _labels_of(table: Table, labels: Sequence[str], match: Match, image: str) -> list[str]:
    """The label of each image. UserError: an empty one, or two of one image."""
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
    """The WordNet ids of ImageNet's boxes, "n03995372 85 1 499 272 ", as Kaggle has them."""
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
    """Labels that are in the order of the sorted names, a line each."""
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
    """The WordNet ids of ImageNet-1k's 50,000 validation images, in the order of their names."""
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

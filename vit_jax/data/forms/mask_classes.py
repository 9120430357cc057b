"""The classes of masks: their names and colours, and what the numbers in the files mean."""

import concurrent.futures
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from vit_jax.data import storage
from vit_jax.data.forms.cells import read_table
from vit_jax.data.forms.class_lists import read_pairs
from vit_jax.data.images import BadImage
from vit_jax.data.masks import (
    IGNORED,
    MOST,
    Colours,
    Mask,
    Palette,
    decode_mask,
    palette_of,
    voc_palette,
)
from vit_jax.errors import UserError, check_refused

logger = logging.getLogger(__name__)

_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()
# Cityscapes' classes in the order of their trainId: name, id, colour.
_CITYSCAPES = (
    *(("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)), ("building", 11, (70,) * 3)),
    *(("wall", 12, (102, 102, 156)), ("fence", 13, (190, 153, 153)), ("pole", 17, (153,) * 3)),
    *(("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0))),
    *(("vegetation", 21, (107, 142, 35)), ("terrain", 22, (152, 251, 152))),
    *(("sky", 23, (70, 130, 180)), ("person", 24, (220, 20, 60)), ("rider", 25, (255, 0, 0))),
    *(("car", 26, (0, 0, 142)), ("truck", 27, (0, 0, 70)), ("bus", 28, (0, 60, 100))),
    *(("train", 31, (0, 80, 100)), ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32))),
)
CLASS_OPTIONS = ("classes", "reduce_zero", "foreground", "colours")
_IDS = 34  # of Cityscapes, 0 to 33
_ADE = "objectInfo150.txt"
_LISTS = ("classes.txt", "labels.txt", "class_names.txt")
_REDUCED = (IGNORED, *range(IGNORED - 1), IGNORED)  # 0 is of no class, 1 is class 0
_SAMPLE = 64  # masks that are looked at for how they count
_TOLD = 2000  # of more masks it is said that all are read


@dataclasses.dataclass(frozen=True)
class Classes:
    """What the numbers in mask files mean.

    Attributes:
      names: of the classes.
      how: where they are from, and how numbers are read, for the user.
      palette: a colour for each class, or None.
      table: number in a file -> class, 255 of none, -1 if it must not occur; None keeps numbers.
      colours: of RGB masks, the class of each colour.
    """

    names: tuple[str, ...]
    how: str
    palette: Palette | None = None
    table: tuple[int, ...] | None = None
    colours: Colours | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """What a fingerprint has of it."""
        return (*self.names, repr(self.table), repr(self.colours))

    def decode(self, where: str, data: bytes) -> Mask:
        """Decodes a mask file's bytes; raises as `decode_mask`, with `where`, and as `numbered`."""
        return self.numbered(where, _decoded(where, data, self.colours))

    def numbered(self, where: str, mask: Mask) -> Mask:
        """The classes of a file's numbers. UserError: some that are no class."""
        if self.table is not None:
            classes = np.array(self.table, np.int16)[mask]
            if (odd := mask[classes < 0]).size:
                raise UserError(f"{where} has the number {odd[0]}; {self.how}")
            mask = classes.astype(np.uint8)
        if (odd := mask[(mask >= len(self.names)) & (mask != IGNORED)]).size:
            raise UserError(
                f"{where} has the class {odd[0]}, but there are {len(self.names)}, 0 to "
                f"{len(self.names) - 1}; {self.how}"
            )
        return mask


def read_numbers(path: str, colours: Colours | None = None) -> Mask:
    """Reads the numbers in a mask file; raises as `decode_mask`, with the path."""
    try:
        return _decoded(f"the mask {path}", storage.read(path), colours)
    except OSError as error:
        check_refused(error, path)
        raise UserError(
            f"{path} could be listed but not read ({error.strerror}): did the folder change?"
        ) from None


def _decoded(where: str, data: bytes, colours: Colours | None) -> Mask:
    try:
        return decode_mask(data, colours)
    except BadImage as error:
        raise BadImage(f"{where}: {error}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


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
    said = _said(where, root, given)
    names, palette, table, how = said.names, said.palette, said.table, [said.how]
    if kind == "cityscapes":
        names, palette, table = _cityscapes(names, masks, how)
    elif kind == "ade20k" and "reduce_zero" not in given:
        table = _by_info(where, root, how)
    if not names and kind == "voc":
        names, palette = tuple(_VOC), voc_palette(len(_VOC))
        how.append("the classes of Pascal VOC")
    if not names:
        names = _numbered(where, table, said.colours, every())
        how.append(f"nothing names the classes: they are called 0 to {len(names) - 1}")
    elif kind == "plain" and "foreground" not in given:
        _check_binary(where, _present(_spread(masks), said.colours))
    if palette is None:
        palette = _own_palette(masks[0], len(names), table is not None and table[0] == IGNORED)
    return Classes(names, "; ".join(filter(None, how)), palette, table, said.colours)


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
    if "foreground" not in given:
        found = np.zeros(256, bool)
        for data in sample:
            found[np.unique(_decoded(where, data, said.colours))] = True
        _check_binary(where, found)
    return said


def _said(where: str, root: str, given: Mapping[str, str]) -> Classes:
    """What the options and a list in the folder `root` say; without names, if they say none."""
    how: list[str] = []
    table, palette, colours = None, None, None
    ways = [key for key in ("colours", "reduce_zero", "foreground") if key in given]
    if len(ways) > 1:
        raise UserError(f"{where}: {ways[0]}= and {ways[1]}= exclude each other")
    names = _listed(where, root, given, how)
    if "colours" in given:
        names, palette, colours = _by_colour(where, _path(root, given["colours"]), names)
        how.append(f"colours by {given['colours']}")
    reduce_zero = given.get("reduce_zero")
    if reduce_zero not in (None, "true", "false"):
        raise UserError(f"{where}: reduce_zero is {reduce_zero!r}; expected true or false")
    if reduce_zero == "true":
        table = _REDUCED
        how.append("0 is of no class, and 1 is class 0 (reduce_zero=true)")
    if "foreground" in given:
        table = _foreground(where, given["foreground"], names, how)
        names = names or ("0", "1")
    if names and len(names) > MOST:
        raise UserError(f"{where} has {len(names)} classes, and masks tell at most {MOST} apart")
    return Classes(names or (), "; ".join(how), palette, table, colours)


def _by_info(where: str, root: str, how: list[str]) -> tuple[int, ...]:
    """How ADE20K's own masks are read, if its table of classes is there."""
    if storage.is_file(f"{root}/{_ADE}"):
        how.append(f"0 is of no class, and 1 is class 0 ({_ADE} is there)")
        return _REDUCED
    raise UserError(
        f"{where} has the folders of ADE20K, whose masks count classes from 1 on with 0 for none, "
        f"but not its {_ADE}: say reduce_zero=true if that is so, or reduce_zero=false if 0 is a "
        "class"
    )


def _path(root: str, name: str) -> str:
    """A file that an option names: in the data's folder, or by its whole path."""
    inside = f"{root}/{name}"
    return inside if root and storage.is_file(inside) else os.path.expanduser(name)


def _listed(
    where: str, root: str, given: Mapping[str, str], how: list[str]
) -> tuple[str, ...] | None:
    """The names by `classes=`, or of a list in the folder; None if there is none."""
    said = given.get("classes")
    if said is not None and re.fullmatch(r"[1-9]\d{0,4}", said):
        how.append(f"{said} classes, as said")
        return tuple(map(str, range(int(said))))
    here = [name for name in (_ADE, *_LISTS) if root and storage.is_file(f"{root}/{name}")]
    if said is None and len(here) > 1:
        raise UserError(f"{where} has {' and '.join(here)}: say which is meant, classes={here[0]}")
    if said is None and not here:
        return None
    path = _path(root, said or here[0])
    how.append(f"classes by {os.path.basename(path)}")
    return _ade(path) if os.path.basename(path) == _ADE else _names(path)


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


def _ade(path: str) -> tuple[str, ...]:
    """The names in ADE20K's table of its 150 classes."""
    columns = read_table(path).columns
    places, names = columns.get("Idx", ()), columns.get("Name", ())
    if [*map(str, range(1, len(places) + 1))] != list(places) or len(names) != len(places):
        raise UserError(f"{path} is not ADE20K's: expected columns Idx, from 1 on, and Name")
    return names


def _foreground(
    where: str, number: str, names: tuple[str, ...] | None, how: list[str]
) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,2}", number) or int(number) > 255:
        raise UserError(f"{where}: foreground is {number!r}; expected a number from 1 to 255")
    if names is not None and len(names) != 2:
        raise UserError(f"{where}: foreground= is for two classes, and there are {len(names)}")
    how.append(f"0 is class 0, and {number} is class 1")
    return tuple({0: 0, int(number): 1}.get(value, -1) for value in range(256))


def _by_colour(
    where: str, path: str, names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], Palette, Colours]:
    """The classes by a table of names and r, g, b; a row called "ignored" is of no class."""
    table = read_table(path)
    if not table.header and not any(cells[0].isdecimal() for cells in table.columns.values()):
        table = table.headed()
    columns = list(table.columns.values())
    at = [i for i, cells in enumerate(columns) if all(re.fullmatch(r"\d{1,3}", c) for c in cells)]
    if len(columns) != 4 or len(at) != 3:
        raise UserError(f"{path}: expected a column of names, and three of r, g and b")
    called = next(cells for i, cells in enumerate(columns) if i not in at)
    rows = list(zip(*(map(int, columns[i]) for i in at), strict=True))
    if max(map(max, rows)) > 255 or len(set(rows)) < len(rows):
        raise UserError(f"{path} has a colour twice, or above 255")
    classes = [i for i, name in enumerate(called) if name != "ignored"]
    found = tuple(called[i] for i in classes)
    if names is not None and names != found:
        raise UserError(f"{where}: {path} names other classes than the list: leave one of them out")
    packed = [65536 * r + 256 * g + b for r, g, b in rows]
    known = {packed[i]: classes.index(i) if i in classes else IGNORED for i in range(len(rows))}
    return found, tuple(rows[i] for i in classes), known


def _cityscapes(
    names: tuple[str, ...], masks: Sequence[str], how: list[str]
) -> tuple[tuple[str, ...], Palette | None, tuple[int, ...] | None]:
    """Cityscapes' 19 classes; from `labelIds` by the official table."""
    called, ids, colours = zip(*_CITYSCAPES, strict=True)
    how.append("Cityscapes' folders" if names else "the 19 classes of Cityscapes")
    if masks[0].endswith("TrainIds.png"):
        return names or called, None if names else colours, None
    how.append("labelIds are read as their trainIds, others are of no class")
    train = {number: place for place, number in enumerate(ids)}
    table = [train.get(value, IGNORED if value < _IDS else -1) for value in range(256)]
    table[IGNORED] = IGNORED
    return names or called, None if names else colours, tuple(table)


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
    present = _present(tuple(masks), colours)
    if table is None:
        _check_binary(where, present)
    known = np.arange(256) if table is None else np.array(table)
    numbers = sorted(set(known[present].tolist()) - {IGNORED, -1})
    if not numbers:
        raise UserError(f"{where}: no pixel of any mask has a class")
    if numbers[-1] >= 2 * len(numbers):
        raise UserError(
            f"{where}: the masks have the classes {few_numbers(numbers)}, with gaps: say how many "
            "there are, classes=N, or name them in a classes.txt"
        )
    return tuple(map(str, range(numbers[-1] + 1)))


def few_numbers(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return ", ".join(map(str, numbers[:5])) + more


def _check_binary(where: str, present: Bool[np.ndarray, "256"]) -> None:
    if set(np.flatnonzero(present)) <= {0, IGNORED} and present[IGNORED]:
        raise UserError(
            f"{where}: the masks have 0 and 255 alone, and 255 is of no class here: if it is a "
            "class, say foreground=255"
        )


def _spread(masks: Sequence[str]) -> tuple[str, ...]:
    chosen = np.unique(np.linspace(0, len(masks) - 1, min(len(masks), _SAMPLE)).astype(int))
    return tuple(masks[i] for i in chosen.tolist())


@functools.lru_cache(16)
def _present_of(masks: tuple[str, ...], versions: tuple[str, ...]) -> Bool[np.ndarray, "256"]:
    found = np.zeros(256, bool)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for values in pool.map(_numbers_in, masks):
            found[values] = True
    return found


def _numbers_in(path: str) -> np.ndarray:
    try:
        return np.unique(read_numbers(path))
    except BadImage:
        return np.zeros(0, np.uint8)  # which is said when the mask is read


def _present(masks: Sequence[str], colours: Colours | None) -> Bool[np.ndarray, "256"]:
    """Which numbers occur in masks."""
    if colours is not None:  # all are known
        return np.isin(np.arange(256), list(colours.values()))
    return _present_of(tuple(masks), tuple(map(storage.version, masks)))


def _own_palette(path: str, k: int, reduced: bool) -> Palette | None:
    """The colours of an indexed mask, if there are as many as classes, and all differ."""
    try:
        found = palette_of(storage.read(path))
    except (UserError, OSError):
        return None  # which is said when the mask is read
    chosen = (found or [])[reduced : k + reduced]
    return tuple(chosen) if len(set(chosen)) == k else None

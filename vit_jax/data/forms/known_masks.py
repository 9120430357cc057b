"""Data sets that are known: Pascal VOC, ADE20K and Cityscapes.

All that is known of them is here, and decided at once: their folders, and what the numbers in their
masks mean, which are the table, names and colours of a `Classes`.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from vit_jax.data import storage
from vit_jax.data.forms.cells import read_table
from vit_jax.data.forms.files import PassedOver
from vit_jax.data.forms.mask_classes import REDUCED, Classes, palette_in, spread
from vit_jax.data.forms.pair_files import Layout, Pair, files_below, files_in, folders_in
from vit_jax.data.images import SUFFIXES
from vit_jax.data.masks import IGNORED, voc_palette
from vit_jax.errors import UserError, nearest

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
_LISTS = "ImageSets/Segmentation"  # of Pascal VOC
_CITY, _CITY_MASKS = "_leftImg8bit", ("_gtFine_labelTrainIds", "_gtFine_labelIds")
_VOC_NAME = re.compile(r"(\d{4}_)?\d{6}")  # of its images, of 2007 and of later years
_CITY_NAME = re.compile(r"[a-z-]+_\d{6}_\d{6}_gtFine_")  # of its masks: city, sequence, frame
_IDS = 34  # of Cityscapes, 0 to 33
ADE = "objectInfo150.txt"
_ADE_SPLITS = {"training", "validation", "testing"}
_SAY = "say what its classes are, classes=FILE, a list of their names, or classes=N, their number"


def known_folders(inside: set[str]) -> str | None:
    """The kind of layout that folders of these names are, of those told by their names alone."""
    if {"JPEGImages", "SegmentationClass"} <= inside:
        return "voc"
    return "cityscapes" if {"leftImg8bit", "gtFine"} <= inside else None


def is_ade20k(images: str, masks: str, splits: Sequence[str]) -> bool:
    """Whether plain folders are those of ADE20K, or a part of them."""
    return (
        (images, masks) == ("images", "annotations") and {*splits} <= _ADE_SPLITS and bool(splits)
    )


def known_layout(where: str, root: str, kind: str, given: Mapping[str, str]) -> Layout:
    """The layout of a kind of `known_folders`. UserError: options that it leaves no place for."""
    if kind == "voc":
        _check(where, "Pascal VOC", given, ("suffix", "unpaired"))
        return _voc(where, root)
    others = ("suffix", "unpaired", "reduce_zero", "foreground", "colours")
    _check(where, "Cityscapes", given, others)
    return _cityscapes(where, root)


def completed(
    where: str, root: str, kind: str, said: Classes, given: Mapping[str, str], masks: Sequence[str]
) -> Classes:
    """What options and lists say of the masks of a layout, with what is known of a data set.

    Args:
      kind: of `Layout`.
      said: by options and lists; kept as it is where the data set is none that is known.

    Raises:
      UserError: it may be a known data set or not, or what is said does not fit to its masks.
    """
    if kind == "cityscapes":
        return _of_cityscapes(where, said, masks)
    if kind == "voc" and not said.names:
        return _of_voc(where, said, masks)
    numbers = said.table is None and said.colours is None and "reduce_zero" not in given
    if kind == "ade20k" and numbers:
        return _of_ade20k(where, root, said)
    return said


def ade20k(path: str, zero: bool) -> Classes:
    """The classes of ADE20K's table of them, and that its masks count them from 1 on.

    Args:
      zero: whether the user says otherwise what 0 is.
    """
    found = Classes(_ade_names(path), f"classes by {os.path.basename(path)}")
    if zero:
        return found
    return found.added("0 is of no class, and 1 is class 0, as ADE20K counts", table=REDUCED)


def _ade_names(path: str) -> tuple[str, ...]:
    """The names in ADE20K's table of its 150 classes."""
    columns = read_table(path).columns
    places, names = columns.get("Idx", ()), columns.get("Name", ())
    if [*map(str, range(1, len(places) + 1))] != list(places) or len(names) != len(places):
        raise UserError(f"{path} is not ADE20K's: expected columns Idx, from 1 on, and Name")
    return names


def _of_ade20k(where: str, root: str, said: Classes) -> Classes:
    if storage.is_file(f"{root}/{ADE}"):
        return said.added(f"0 is of no class, and 1 is class 0 ({ADE} is there)", table=REDUCED)
    raise UserError(
        f"{where} has the folders of ADE20K, whose masks count classes from 1 on with 0 for none, "
        f"but not its {ADE}: say reduce_zero=true if that is so, or reduce_zero=false if 0 is a "
        "class"
    )


def _of_voc(where: str, said: Classes, masks: Sequence[str]) -> Classes:
    """Pascal VOC's classes, if the masks are surely its own: other data sets have its folders."""
    colours = voc_palette(len(_VOC))
    palettes = [tuple(each[: len(_VOC)]) for each in map(palette_in, spread(masks)) if each]
    stems = (os.path.splitext(os.path.basename(path))[0] for path in masks)
    own = {*palettes} == {colours} and all(map(_VOC_NAME.fullmatch, stems))
    if not own or said.table is not None:
        raise UserError(
            f"{where} has the folders of Pascal VOC, but not its names and colours of masks (such "
            f"as {os.path.basename(masks[0])}): {_SAY}"
        )
    return said.added("the classes of Pascal VOC", names=tuple(_VOC), palette=colours)


def _of_cityscapes(where: str, said: Classes, masks: Sequence[str]) -> Classes:
    """The 19 classes, of `labelIds` by the official table; or all ids, if 34 names are given.

    Of other data sets in its folders, which files of other names tell, what is said.
    """
    called, ids, colours = zip(*_CITYSCAPES, strict=True)
    official = all(_CITY_NAME.match(os.path.basename(path)) for path in masks)
    if not official and said.names and not {*called} <= {*said.names}:
        return said
    if not official and not said.names:
        raise UserError(
            f"{where} has the folders of Cityscapes, but not its file names (such as "
            f"{os.path.basename(masks[0])}): {_SAY}"
        )
    names, train = said.names or called, masks[0].endswith("TrainIds.png")
    kind, counts = ("labelTrainIds", (19,)) if train else ("labelIds", (19, _IDS))
    if len(names) not in counts:
        raise UserError(
            f"{where}: Cityscapes' {kind} have {' or '.join(map(str, counts))} classes, and "
            f"{len(names)} are named: leave out the list or classes="
        )
    own = not train and (len(names) == _IDS or not official)  # all ids
    places = {name: ids[i] if own else i for i, name in enumerate(called)}
    odd = [name for i, name in enumerate(names) if places.get(name, i) != i]
    if odd:
        raise UserError(
            f"{where}: {odd[0]!r} is {names.index(odd[0])} in the list of names, and "
            f"{places[odd[0]]} in Cityscapes' {kind}: leave the list out"
        )
    how = [said.how, "Cityscapes' folders" if said.names else "the 19 classes of Cityscapes"]
    table = None
    if own:
        how.append("labelIds are kept as they are")
    elif not train:
        how.append("labelIds are read as their trainIds, others are of no class")
        by_id = {number: place for place, number in enumerate(ids)}
        table = [by_id.get(value, IGNORED if value < _IDS else -1) for value in range(256)]
        table[IGNORED] = IGNORED
        table = tuple(table)
    return Classes(names, "; ".join(filter(None, how)), None if own else colours, table)


def _check(where: str, what: str, given: Mapping[str, str], others: Sequence[str]) -> None:
    """Raises a UserError for options that the folders of a known data set leave no place for."""
    if odd := [key for key in others if key in given]:
        raise UserError(
            f"{where}: {odd[0]}= is not for the folders of {what}, which say themselves how they "
            "are read: leave it out, or name the folders by images= and masks="
        )


def _voc(where: str, root: str) -> Layout:
    lists = storage.files(f"{root}/{_LISTS}")
    splits = tuple(sorted(name[:-4] for name in lists if name.endswith(".txt")))
    if not splits:
        raise UserError(
            f"{where}: {root}/{_LISTS} has no SPLIT.txt, a list of the images of each split; "
            f"without lists, say images=JPEGImages,masks=SegmentationClass"
        )

    def read(split: str, passed: PassedOver) -> list[Pair]:
        if split not in splits:
            raise UserError(f"{where} has no split {split!r}; {nearest(split, splits)}")
        folders = [
            files_in(where, root, "JPEGImages", SUFFIXES),
            files_in(where, root, "SegmentationClass", (".png",)),
        ]
        path, pairs = f"{root}/{_LISTS}/{split}.txt", []
        for number, stem in _lines(path):
            for files, what in zip(folders, ("image", "mask"), strict=True):
                if stem not in files:
                    raise UserError(f"{path}, line {number}: there is no {what} of {stem!r}")
            (image, size), (mask, mask_size) = (files[stem] for files in folders)
            pairs.append(Pair(image, mask, size, mask_size))
        return pairs

    def masks(split: str) -> list[str]:
        theirs = files_in(where, root, "SegmentationClass", (".png",))
        stems = (stem for _, stem in _lines(f"{root}/{_LISTS}/{split}.txt"))
        return [theirs[stem][0] for stem in stems if stem in theirs]

    return Layout("voc", splits, read, masks)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a list that are not empty, with their numbers."""
    text = storage.read(path).decode("utf-8", "surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.split()[0]


def _cityscapes(where: str, root: str) -> Layout:
    splits = tuple(sorted(folders_in(f"{root}/leftImg8bit")))

    def read(split: str, passed: PassedOver) -> list[Pair]:
        if split not in splits:
            raise UserError(f"{where} has no split {split!r}; {nearest(split, splits)}")
        start, pairs = f"leftImg8bit/{split}", []
        theirs = files_below(
            where, root, f"gtFine/{split}", PassedOver()
        )  # polygons, instances, ...
        # Of both kinds, the one that all images have.
        found = files_below(where, root, start, passed)
        stems = {stem: stem.removesuffix(_CITY) for stem in found}
        each = [sum(f"{stem}{end}" in theirs for stem in stems.values()) for end in _CITY_MASKS]
        end = _CITY_MASKS[0] if each[0] >= each[1] else _CITY_MASKS[1]
        for stem, (path, size) in sorted(found.items()):
            mask = f"{stems[stem]}{end}"
            if mask not in theirs:
                raise UserError(f"{where}: {path} has no mask gtFine/{split}/{mask}.png")
            pairs.append(Pair(path, theirs[mask][0], size, theirs[mask][1]))
        return pairs

    def masks(split: str) -> list[str]:
        if not storage.is_folder(f"{root}/gtFine/{split}"):
            return []
        theirs = files_below(where, root, f"gtFine/{split}", PassedOver())
        kinds = [[theirs[stem][0] for stem in theirs if stem.endswith(end)] for end in _CITY_MASKS]
        return kinds[0] or kinds[1]

    return Layout("cityscapes", splits, read, masks)

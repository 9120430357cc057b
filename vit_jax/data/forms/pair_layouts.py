"""Where images and their masks are: folders as of ADE20K, Cityscapes, Pascal VOC, or plain ones."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vit_jax.data import storage
from vit_jax.data.forms.files import WHOLE, PassedOver, class_name, image_files
from vit_jax.data.forms.layout import few, out_of_the_way, split_kind
from vit_jax.data.images import SUFFIXES
from vit_jax.errors import UserError, check_refused, nearest

_IMAGES = ("images", "imgs", "image")
_MASKS = ("masks", "annotations", "labels", "mask")
_SURE = ("masks", "annotations")  # which no folder of classes is called
_LISTS = "ImageSets/Segmentation"  # of Pascal VOC
_CITY, _CITY_MASKS = "_leftImg8bit", ("_gtFine_labelTrainIds", "_gtFine_labelIds")


class Pair(NamedTuple):
    """An image and its mask: paths below the root, and their bytes."""

    image: str
    mask: str
    size: int
    mask_size: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folders of a data set.

    Attributes:
      kind: "voc", "cityscapes", "ade20k" or "plain".
      splits: their names; none if there is but "all".
      read: a split's name -> its pairs, in the order of the images' names or of a list; files that
        are left out go into the second argument.
    """

    kind: str
    splits: tuple[str, ...]
    read: Callable[[str, PassedOver], list[Pair]]


def layout_of(where: str, root: str, given: Mapping[str, str]) -> Layout:
    """Finds the layout of a folder.

    Args:
      where: the source, for messages.
      given: options; `images` and `masks` name folders, `suffix` is what the name of a mask has
        behind that of its image, `unpaired=skip` leaves out what has no partner.

    Raises:
      UserError: there is no such folder, or no layout that is known.
    """
    if not storage.is_folder(root):
        raise UserError(f"{where}: there is no folder {root}")
    named = {key: given[key] for key in ("images", "masks") if key in given}
    if len(named) == 1:
        raise UserError(f"{where}: images= and masks= name two folders in it: give both")
    inside = _folders(root)
    if named:
        return _plain(where, root, named["images"], named["masks"], given)
    if {"JPEGImages", "SegmentationClass"} <= inside:
        _check(where, "Pascal VOC", given, ("suffix", "unpaired"))
        return _voc(where, root)
    if {"leftImg8bit", "gtFine"} <= inside:
        others = ("suffix", "unpaired", "reduce_zero", "foreground", "colours")
        _check(where, "Cityscapes", given, others)
        return _cityscapes(where, root)
    pair = _names(where, inside)
    if pair is not None:
        return _plain(where, root, *pair, given)
    outer = [name for name in sorted(inside) if _names(where, _folders(f"{root}/{name}"))]
    if outer and all(map(split_kind, outer)):
        return _outer(where, root, outer, given)
    raise _unknown(where, root, inside, outer)


def _check(where: str, what: str, given: Mapping[str, str], others: Sequence[str]) -> None:
    """Raises a UserError for options that the folders of a known data set leave no place for."""
    if odd := [key for key in others if key in given]:
        raise UserError(
            f"{where}: {odd[0]}= is not for the folders of {what}, which say themselves how they "
            "are read: leave it out, or name the folders by images= and masks="
        )


def is_layout(root: str) -> bool:
    """Whether a folder surely has images and masks: by the names of the folders in it."""
    if not storage.is_folder(root):
        return False
    inside = _folders(root)
    known = ({"JPEGImages", "SegmentationClass"}, {"leftImg8bit", "gtFine"})
    return any(each <= inside for each in known) or (
        "images" in inside and len(inside.intersection(_SURE)) == 1
    )


def _unknown(where: str, root: str, inside: set[str], outer: list[str]) -> UserError:
    deeper = [*outer, *(name for name in sorted(inside) if is_layout(f"{root}/{name}"))]
    hint = f"; pairs:{root}/{deeper[0]} has them" if deeper else ""
    return UserError(
        f"{where}: no folders of images and masks in {root} (found "
        f"{few(inside) or 'no folder'}){hint}. Expected images and masks, the folders of ADE20K, "
        "Cityscapes or Pascal VOC, or names: pairs:PATH,images=FOLDER,masks=FOLDER"
    )


def _folders(root: str) -> set[str]:
    try:
        entries = storage.scan(root)
    except OSError as error:
        check_refused(error, root)
        raise UserError(f"{root} cannot be listed: {error.strerror}") from None
    return {
        each.name for each in entries if each.is_dir() and not out_of_the_way(f"{each.name}/file")
    }


def _names(where: str, inside: set[str]) -> tuple[str, str] | None:
    """The folders of images and of masks by their names; None if one is missing."""
    images = [name for name in _IMAGES if name in inside]
    masks = [name for name in _MASKS if name in inside]
    if not images or not masks:
        return None
    if len(images) > 1 or len(masks) > 1:
        twice = images if len(images) > 1 else masks
        raise UserError(
            f"{where} has {' and '.join(twice)}: say which is meant, "
            f"images={images[0]},masks={masks[0]}"
        )
    return images[0], masks[0]


def _plain(where: str, root: str, images: str, masks: str, given: Mapping[str, str]) -> Layout:
    for name in (images, masks):
        if not storage.is_folder(f"{root}/{name}"):
            raise UserError(f"{where}: there is no folder {root}/{name}")
    inside = _folders(f"{root}/{images}")
    splits = tuple(sorted(inside)) if inside and all(map(split_kind, inside)) else ()

    def read(split: str, passed: PassedOver) -> list[Pair]:
        below = "" if split == WHOLE else f"/{split}"
        if below and not storage.is_folder(f"{root}/{images}{below}"):
            known = splits or (WHOLE,)
            raise UserError(f"{where} has no split {split!r}; {nearest(split, known)}")
        if below and not storage.is_folder(f"{root}/{masks}{below}"):
            raise UserError(f"{where}: there is no folder {root}/{masks}{below} beside the images")
        return _matched(where, root, images + below, masks + below, given, passed)

    called = (images, masks) == ("images", "annotations")
    ade = called and splits == ("training", "validation")
    return Layout("ade20k" if ade else "plain", splits, read)


def _outer(where: str, root: str, outer: list[str], given: Mapping[str, str]) -> Layout:
    """SPLIT/images and SPLIT/masks."""

    def read(split: str, passed: PassedOver) -> list[Pair]:
        if split not in outer:
            raise UserError(f"{where} has no split {split!r}; {nearest(split, outer)}")
        images, masks = _names(where, _folders(f"{root}/{split}"))
        return _matched(where, root, f"{split}/{images}", f"{split}/{masks}", given, passed)

    return Layout("plain", tuple(outer), read)


def _matched(
    where: str, root: str, images: str, masks: str, given: Mapping[str, str], passed: PassedOver
) -> list[Pair]:
    """The images below a folder with the masks of the same names below another."""
    suffix, found = given.get("suffix", ""), _files(where, root, images, passed)
    theirs = _files(where, root, masks, passed)
    if odd := [path for path, _ in theirs.values() if not path.lower().endswith(".png")]:
        raise UserError(
            f"{where}: {len(odd):,} masks are no PNG, such as {odd[0]}: save them as indexed or "
            "grey PNG, which keeps the number of each class"
        )
    pairs = {
        stem: Pair(path, theirs[mask][0], size, theirs[mask][1])
        for stem, (path, size) in found.items()
        if (mask := f"{stem}{suffix}") in theirs
    }
    alone = [found[stem][0] for stem in found if stem not in pairs]
    used = {pair.mask for pair in pairs.values()}
    spare = [path for path, _ in theirs.values() if path not in used]
    if given.get("unpaired") == "skip":
        for path in alone:
            passed.add(path, "without a mask")
        for path in spare:
            passed.add(path, "a mask without an image")
    elif alone or spare:
        what, which = ("images have no mask", alone) if alone else ("masks have no image", spare)
        hint = ""
        if alone and not pairs and spare:
            hint = f"; masks are called as {spare[0]}: is there a suffix, such as suffix=_mask?"
        raise UserError(
            f"{where}: {len(which):,} {what}, such as {which[0]}{hint} (an image and its mask "
            "have the same name before the ending; unpaired=skip leaves out what has no partner)"
        )
    return [pairs[stem] for stem in sorted(pairs)]


def _files(where: str, root: str, start: str, passed: PassedOver) -> dict[str, tuple[str, int]]:
    """Name without its ending -> (path, bytes) of the image files below a folder."""
    found: dict[str, tuple[str, int]] = {}
    for path, size in sorted(image_files(root, start, passed)):
        stem = class_name(os.path.splitext(path[len(start) + 1 :])[0])
        if stem in found:
            raise UserError(f"{where}: {found[stem][0]} and {path} have the same name")
        found[stem] = path, size
    return found


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
            _by_stem(root, "JPEGImages", SUFFIXES),
            _by_stem(root, "SegmentationClass", (".png",)),
        ]
        path, pairs = f"{root}/{_LISTS}/{split}.txt", []
        for number, stem in _lines(path):
            for files, what in zip(folders, ("image", "mask"), strict=True):
                if stem not in files:
                    raise UserError(f"{path}, line {number}: there is no {what} of {stem!r}")
            (image, size), (mask, mask_size) = (files[stem] for files in folders)
            pairs.append(Pair(image, mask, size, mask_size))
        return pairs

    return Layout("voc", splits, read)


def _by_stem(root: str, folder: str, endings: tuple[str, ...]) -> dict[str, tuple[str, int]]:
    return {
        os.path.splitext(name)[0]: (f"{folder}/{name}", size)
        for name, size in storage.files(f"{root}/{folder}").items()
        if name.lower().endswith(endings)
    }


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a list that are not empty, with their numbers."""
    text = storage.read(path).decode("utf-8", "surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.split()[0]


def _cityscapes(where: str, root: str) -> Layout:
    splits = tuple(sorted(_folders(f"{root}/leftImg8bit")))

    def read(split: str, passed: PassedOver) -> list[Pair]:
        if split not in splits:
            raise UserError(f"{where} has no split {split!r}; {nearest(split, splits)}")
        start, pairs = f"leftImg8bit/{split}", []
        theirs = _files(where, root, f"gtFine/{split}", PassedOver())  # polygons, instances, ...
        # Of both kinds, the one that all images have.
        found = _files(where, root, start, passed)
        stems = {stem: stem.removesuffix(_CITY) for stem in found}
        each = [sum(f"{stem}{end}" in theirs for stem in stems.values()) for end in _CITY_MASKS]
        end = _CITY_MASKS[0] if each[0] >= each[1] else _CITY_MASKS[1]
        for stem, (path, size) in sorted(found.items()):
            mask = f"{stems[stem]}{end}"
            if mask not in theirs:
                raise UserError(f"{where}: {path} has no mask gtFine/{split}/{mask}.png")
            pairs.append(Pair(path, theirs[mask][0], size, theirs[mask][1]))
        return pairs

    return Layout("cityscapes", splits, read)

"""The files of images and masks: pairs of them, in the folders of a layout."""

import dataclasses
import os
from collections.abc import Callable
from typing import NamedTuple

from vit_jax.data import storage
from vit_jax.data.forms.files import PassedOver, class_name, image_files
from vit_jax.data.forms.layout import out_of_the_way
from vit_jax.errors import UserError, check_refused


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
      masks: a split's name -> the paths of its masks below the root, with images or without.
    """

    kind: str
    splits: tuple[str, ...]
    read: Callable[[str, PassedOver], list[Pair]]
    masks: Callable[[str], list[str]]


def folders_in(root: str) -> set[str]:
    """The names of the folders in a folder; UserError: it cannot be listed."""
    try:
        entries = storage.scan(root)
    except OSError as error:
        check_refused(error, root)
        raise UserError(f"{root} cannot be listed: {error.strerror}") from None
    return {
        each.name for each in entries if each.is_dir() and not out_of_the_way(f"{each.name}/file")
    }


def files_below(
    where: str, root: str, start: str, passed: PassedOver
) -> dict[str, tuple[str, int]]:
    """Name without its ending -> (path, bytes) of the image files below a folder."""
    found: dict[str, tuple[str, int]] = {}
    for path, size in sorted(image_files(root, start, passed)):
        stem = class_name(os.path.splitext(path[len(start) + 1 :])[0])
        if stem in found:
            raise UserError(f"{where}: {found[stem][0]} and {path} have the same name")
        found[stem] = path, size
    return found


def files_in(
    where: str, root: str, folder: str, endings: tuple[str, ...]
) -> dict[str, tuple[str, int]]:
    """Name without its ending -> (path, bytes) of the files in a folder that end so."""
    found: dict[str, tuple[str, int]] = {}
    for name, size in sorted(storage.files(f"{root}/{folder}").items()):
        if name.lower().endswith(endings):
            stem, path = os.path.splitext(name)[0], f"{folder}/{name}"
            if stem in found:
                raise UserError(f"{where}: {found[stem][0]} and {path} have the same name")
            found[stem] = path, size
    return found

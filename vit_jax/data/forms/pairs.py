"""The source `pairs:`, images and the masks beside them, which have a class for each pixel."""

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.data import storage
from vit_jax.data.forms.files import (
    WHOLE,
    Packed,
    PassedOver,
    file_example,
    fingerprint_of,
    parse_split,
    percentile,
    tell,
)
from vit_jax.data.forms.layout import options
from vit_jax.data.forms.mask_classes import Classes, read_numbers
from vit_jax.data.forms.mask_options import CLASS_OPTIONS, classes_of
from vit_jax.data.forms.pair_files import Pair
from vit_jax.data.forms.pair_layouts import layout_of
from vit_jax.data.images import BadImage
from vit_jax.data.masks import Palette, header
from vit_jax.errors import UserError, nearest

logger = logging.getLogger(__name__)

OPTIONS = (*CLASS_OPTIONS, "images", "masks", "suffix", "unpaired")


@dataclasses.dataclass(frozen=True, eq=False)
class PairSource:
    """Image files with masks; `source[i]["image"]` is a file's bytes, the label uint8 [h w]."""

    root: str
    names: Packed  # of the images, relative to root
    masks_names: Packed  # of their masks
    classes: Classes
    fingerprint: str
    passed_over: PassedOver = dataclasses.field(default_factory=PassedOver)

    masks = True

    @property
    def in_bucket(self) -> bool:
        return storage.is_url(self.root)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.classes.names

    @property
    def palette(self) -> Palette | None:
        return self.classes.palette

    @property
    def how(self) -> str:
        """How masks are read, for the user."""
        return self.classes.how

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.mask_path(index)
        label = self.classes.numbered(f"the mask {path}", read_numbers(path, self.classes.colours))
        return {**file_example(self.root, self.names[index], 0), "label": label}

    def mask_path(self, index: int) -> str:
        return os.path.join(self.root, self.masks_names[index])

    def mask_size(self, index: int) -> tuple[int, int]:
        """The (h, w) of a mask, from the first bytes of its file."""
        path = self.mask_path(index)
        try:
            return header(storage.start(path, 26))[:2]
        except BadImage as error:
            raise BadImage(f"the mask {path}: {error}") from None
        except UserError as error:
            raise UserError(f"the mask {path}: {error}") from None


def pairs(argument: str, split: str) -> PairSource:
    """Images and their masks below PATH, in the folders of one of these:

    - ADE20K: images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png, training and validation;
    - Cityscapes: leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png and gtFine/SPLIT/CITY/...;
    - Pascal VOC: JPEGImages, SegmentationClass, and the lists ImageSets/Segmentation/SPLIT.txt;
    - any other: images/NAME.jpg and masks/NAME.png, images/SPLIT/ and masks/SPLIT/, or
      SPLIT/images/ and SPLIT/masks/; images=FOLDER,masks=FOLDER names others.

    Masks are indexed or grey PNG files; 255 is of no class. Behind the path may be
    `classes=FILE` (or classes.txt in PATH: the names of the classes, in order) or `classes=N`,
    `reduce_zero=true` (0 is of no class, 1 is class 0), `foreground=255` (this number is class 1),
    `colours=FILE` (names, r, g, b: masks are read by their colours), `suffix=_mask` (of the masks'
    names) and `unpaired=skip`.

    Args:
      split: a folder or list as above; "all" for all, where there is none. A part of it is
        "train[:90%]", by a hash of the image's name.

    Raises:
      UserError: no such folder, split or layout; an image without a mask, or a mask without an
        image; or nothing says what the numbers in the masks mean.
    """
    where = f"pairs:{argument}"
    root, given = _options(argument)
    name, low, high = parse_split(split)
    layout = layout_of(where, root, given)
    if name == WHOLE and layout.splits and layout.kind != "plain":
        raise UserError(f"{where} has the splits {', '.join(layout.splits)}: name one of them")
    passed = PassedOver()
    every = layout.read(name, passed)
    found = [pair for pair in every if low <= percentile(pair.image) < high]
    if not found:
        raise UserError(f"{where} has no image in split {split!r}")

    def all_masks() -> list[str]:
        parts = {each: layout.masks(each) for each in layout.splits if name != WHOLE}
        if without := [each for each, part in parts.items() if not part]:
            _say(f"{where}: no masks in {', '.join(without)}: the classes are those of the others")
        theirs = (os.path.join(root, path) for part in parts.values() for path in part)
        return sorted({*mine, *theirs})

    mine = [os.path.join(root, pair.mask) for pair in every]
    classes = classes_of(where, layout.kind, root, given, mine, all_masks)
    return source_of(where, root, found, classes, passed)


def source_of(
    where: str, root: str, found: Sequence[Pair], classes: Classes, passed: PassedOver
) -> PairSource:
    """The source of these pairs; says how their masks are read."""
    _say(f"{where}: {classes.how}")
    tell(where, passed)
    files = [path for pair in found for path in (pair.image, pair.mask)]
    sizes = [size for pair in found for size in (pair.size, pair.mask_size)]
    return PairSource(
        root,
        Packed.of(pair.image for pair in found),
        Packed.of(pair.mask for pair in found),
        classes,
        fingerprint_of(classes.identity, files, sizes),
        passed,
    )


def pairs_splits(argument: str) -> tuple[str, ...]:
    """The splits of a data set, or "all"."""
    root, given = _options(argument)
    return layout_of(f"pairs:{argument}", root, given).splits or (WHOLE,)


def _options(argument: str) -> tuple[str, dict[str, str]]:
    root, given = options(argument, OPTIONS)
    check_unpaired(f"pairs:{argument}", given)
    return root.rstrip("/") or "/", given


def check_unpaired(where: str, given: Mapping[str, str]) -> None:
    """Raises a UserError unless the option `unpaired`, if given, is skip."""
    if (said := given.get("unpaired", "skip")) != "skip":
        raise UserError(f"{where}: unpaired is {said!r}; {nearest(said, ['skip'])}")


@functools.cache
def _say(text: str) -> None:
    """Logs a line once."""
    logger.info("%s", text)

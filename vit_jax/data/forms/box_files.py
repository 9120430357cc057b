"""Image files with boxes, as `coco:` and `yolo:` find them."""

import dataclasses
import functools
import hashlib
import io
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from vit_jax.data import storage
from vit_jax.data.boxes import Boxes
from vit_jax.data.forms.files import (
    Packed,
    PassedOver,
    file_example,
    fingerprint_of,
    is_image,
    parse_split,
    percentile,
    tell,
)
from vit_jax.data.images import BadImage, upright_size
from vit_jax.errors import UserError, check_refused

logger = logging.getLogger(__name__)


class Listed(NamedTuple):
    """An image file: its path below the root, its bytes, its boxes, and its (h, w) if known."""

    path: str
    bytes: int
    boxes: Boxes
    size: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class BoxSource:
    """Image files with boxes; `source[i]["image"]` is a file's bytes, the label `Boxes`.

    Attributes:
      names: of the images, relative to root.
      every: the boxes of all images; those of image i end before ends[i].
      sizes: the (h, w) of the images that boxes were drawn on, 0 where they are not known; those of
        `shares` once they are read.
      shares: whether corners are in shares of the image's width and height, not in pixels.
      how: how they are read, for the user.
      category_ids: the number of each class in the COCO file, if they are whole numbers.
    """

    root: str
    names: Packed
    every: Boxes
    ends: Int64[np.ndarray, " n"]
    sizes: Int32[np.ndarray, "n 2"]
    label_names: tuple[str, ...]
    fingerprint: str
    how: str
    shares: bool = False
    category_ids: tuple[int, ...] | None = None
    passed_over: PassedOver = dataclasses.field(default_factory=PassedOver)

    boxes = True

    @property
    def in_bucket(self) -> bool:
        return storage.is_url(self.root)

    @property
    def box_counts(self) -> Int64[np.ndarray, " n"]:
        """How many boxes each image has, without those of crowds."""
        before = np.cumsum([0, *~self.every.crowd], dtype=np.int64)[[0, *self.ends.tolist()]]
        return np.diff(before)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = file_example(self.root, self.names[index], 0)
        size = self._size(index, io.BytesIO(example["image"])) if self.shares else None
        found = {**example, "label": self._boxes(index, size)}
        known = size or tuple(self.sizes[index].tolist())
        return {**found, "size": known} if any(known) else found

    def boxes_of(self, index: int) -> Boxes:
        """The boxes of an image, in pixels. BadImage: they are in shares of one without a size."""
        return self._boxes(index, self.image_size_of(index) if self.shares else None)

    def image_size_of(self, index: int) -> tuple[int, int]:
        """The (h, w) of an image that is turned upright, from the list or its file's header."""
        if self.sizes[index].any():
            return tuple(self.sizes[index].tolist())
        try:
            with storage.opened(os.path.join(self.root, self.names[index])) as file:
                return self._size(index, file)
        except OSError as error:
            check_refused(error, self.names[index])
            raise UserError(
                f"{self.names[index]} could be listed but not read ({error.strerror}): did the "
                "folder change?"
            ) from None

    def _size(self, index: int, file: Any) -> tuple[int, int]:
        """Reads it from a header, and keeps it: of a bucket, each time is a request."""
        try:
            self.sizes[index] = upright_size(file)
        except BadImage as error:
            raise BadImage(f"{self.names[index]}: {error}") from None
        return tuple(self.sizes[index].tolist())

    def _boxes(self, index: int, size: tuple[int, int] | None) -> Boxes:
        found = self.every[slice(self.ends[index - 1] if index else 0, self.ends[index])]
        return found if size is None else found.resized((1, 1), size)


def box_source(
    where: str,
    split: str,
    root: str,
    listed: Sequence[Listed],
    names: Sequence[str],
    how: Iterable[str],
    passed: PassedOver,
    **fields: Any,
) -> BoxSource:
    """The source of the images of a split that are in its part, such as train[:90%]; says how.

    Raises:
      UserError: there is none.
    """
    _, low, high = parse_split(split)
    kept = [each for each in listed if low <= percentile(each.path) < high]
    if not kept:
        raise UserError(f"{where} has no image in split {split!r}")
    every = joined([each.boxes for each in kept])
    counts = np.array([len(each.boxes) for each in kept])
    empty = [each.path for each in kept if not len(each.boxes)]
    notes = [note("images without boxes", len(empty), empty[0])] if empty else []
    said = "; ".join([*notes, *how])
    text = f"{where}, {split}: {len(kept):,} images with {len(every):,} boxes"
    _say(f"{text} ({said})" if said else text)
    tell(where, passed)
    digest = hashlib.sha256()
    for array in (every.corners, every.classes, every.crowd, every.area, counts):
        digest.update(np.ascontiguousarray(array).tobytes())
    return BoxSource(
        root,
        Packed.of(each.path for each in kept),
        every,
        np.cumsum(counts, dtype=np.int64),
        np.array([each.size for each in kept], np.int32).reshape(-1, 2),
        tuple(names),
        fingerprint_of(
            (*names, digest.hexdigest()),
            [each.path for each in kept],
            [each.bytes for each in kept],
        ),
        said,
        passed_over=passed,
        **fields,
    )


def joined(boxes: Sequence[Boxes]) -> Boxes:
    """The boxes of several images, one after the other."""
    parts = [Boxes.of([], []), *boxes]
    fields = ("corners", "classes", "crowd", "area")
    return Boxes(*(np.concatenate([getattr(each, name) for each in parts]) for name in fields))


def check_names(where: str, names: Sequence[Any]) -> None:
    """Raises a UserError unless these are the names of classes, all different."""
    if not names:
        raise UserError(f"{where} names no class")
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: class {number} is called {name!r}; expected a name")
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise UserError(f"{where} has two classes called {twice!r}: give them different names")


class Folders:
    """The files of folders below a root, each listed once."""

    def __init__(self, root: str):
        self._root = root
        self._known: dict[str, Mapping[str, int]] = {}

    def __getitem__(self, path: str) -> int | None:
        """The bytes of a file by its path; None if it is not there."""
        folder, name = os.path.split(path)
        return self._files(folder).get(name)

    def _files(self, folder: str) -> Mapping[str, int]:
        if folder not in self._known:
            self._known[folder] = storage.files(os.path.join(self._root, folder).rstrip("/") or "/")
        return self._known[folder]

    def beside(self, paths: Collection[str], endings: tuple[str, ...] | None = None) -> list[str]:
        """The images in the folders that were listed, or what ends so, that are not in `paths`."""
        return [
            path
            for folder, files in self._known.items()
            for name in sorted(files)
            if (is_image(name) if endings is None else name.lower().endswith(endings))
            and (path := os.path.join(folder, name)) not in paths
        ]


def some(count: int, what: str, such: str) -> str:
    """A part of a message: "3 images are missing, such as 1.jpg"."""
    return f"{count:,} {what}, such as {such}"


def note(what: str, count: int, such: str) -> str:
    """What to say of a source: "boxes without width or height (ignored): 2, such as ..."."""
    return f"{what}: {count:,}, such as {such}"


@functools.cache
def _say(text: str) -> None:
    """Logs a line once."""
    logger.info("%s", text)

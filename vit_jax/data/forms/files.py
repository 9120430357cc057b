"""The source `folder:`, images in a folder for each class; and what all file sources share."""

import collections
import dataclasses
import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from vit_jax.data import storage
from vit_jax.data.forms.layout import (
    TEXTS,
    check_class_folders,
    label_option,
    out_of_the_way,
    split_kind,
    unknown_format,
)
from vit_jax.data.images import SUFFIXES, sniff
from vit_jax.errors import UserError, check_refused, nearest

logger = logging.getLogger(__name__)

_SPLIT = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<low>\d+%)?:(?P<high>\d+%)?\])?")
WHOLE = "all"
_LOOSE = "in no class folder"
# Files that are not logged: they were never meant to be images.
_QUIET = ("of no known format", "of a folder", "hidden", "empty")


@dataclasses.dataclass(frozen=True, eq=False)
class Packed(Sequence):
    """Strings stored as one, so that millions of file names are small and quick to pickle."""

    text: bytes
    ends: Int64[np.ndarray, " n"]

    @classmethod
    def of(cls, names: Iterable[str]) -> "Packed":
        encoded = [os.fsencode(name) for name in names]
        return cls(b"".join(encoded), np.cumsum([0, *map(len, encoded)], dtype=np.int64)[1:])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]])


class PassedOver:
    """The files that a source skips: a count for each reason, and the first names.

    As a string: "4 files passed over: 3 of no known format (.txt), 1 empty".

    Attributes:
      counts: reason -> number of files.
      files: (name, reason) of the first MOST files.
    """

    MOST = 10_000

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self.files: list[tuple[str, str]] = []

    def add(self, name: str, why: str) -> None:
        self.counts[why] += 1
        if len(self.files) < self.MOST:
            self.files.append((name, why))

    def update(self, other: "PassedOver") -> None:
        self.counts.update(other.counts)
        self.files.extend(other.files[: self.MOST - len(self.files)])

    def __len__(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {why}" for why, count in self.counts.most_common())
        return f"{len(self)} files passed over: {reasons}" if reasons else "no file passed over"


def tell(where: str, passed_over: PassedOver) -> None:
    """Logs the files that were skipped, if there may be images among them."""
    if any(not why.startswith(_QUIET) for why in passed_over.counts):
        loud = (each for each in passed_over.files if not each[1].startswith(_QUIET))
        name, why = next(loud, ("", ""))
        such = f"; such as {name}, {why}" if name else ""
        logger.info("%s: %s%s", where, passed_over, such)


def labels_at(
    labels: Int32[np.ndarray, " m"], ends: Int64[np.ndarray, " n"], index: int, several: bool
) -> int | tuple[int, ...]:
    """labels[ends[index - 1] : ends[index]] as a tuple if `several`, else its only element."""
    found = tuple(labels[ends[index - 1] if index else 0 : ends[index]].tolist())
    return found if several else found[0]


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Images in the folders of their classes; `source[i]["image"]` is a file's bytes."""

    root: str
    names: Packed  # relative to root
    labels: Int32[np.ndarray, " n"]
    label_names: tuple[str, ...]
    fingerprint: str
    passed_over: PassedOver = dataclasses.field(default_factory=PassedOver)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return file_example(self.root, self.names[index], int(self.labels[index]))


def file_example(root: str, file: str, label: int | tuple[int, ...]) -> dict[str, Any]:
    """An example of a file below `root`. UserError: the file cannot be read."""
    path = os.path.join(root, file)
    try:
        data = storage.read(path)
    except OSError as error:
        check_refused(error, path)
        raise UserError(
            f"{path} could be listed but not read ({error.strerror}): did the folder change?"
        ) from None
    return {"image": data, "label": label, "name": path, "file": file}


def folder(path: str, split: str) -> FolderSource:
    """Image files under PATH/SPLIT/CLASS, at any depth, in the order of their names.

    A file is an image by its ending, or else by its first bytes; others are counted in
    `passed_over`. Class folders named like splits, or a single one with folders of images in it,
    are an error unless `,label=folder` behind the path confirms that they are classes.

    Args:
      split: a sub-folder, such as "train" or "images/train"; "all" is PATH itself. A part of it is
        "all[:90%]" or "all[90%:]", by a hash of the file's name, so that adding files does not
        move others.

    Raises:
      UserError: no such folder, no class, a class without images, or folders that do not look like
        classes.
    """
    path, label = label_option(path, ("folder",))
    name, low, high = parse_split(split)
    root = path if name == WHOLE else os.path.join(path, name)
    if not storage.is_folder(root):
        here = _classes(path) if storage.is_folder(path) else None
        if here is None:
            raise UserError(f"folder:{path}: there is no such folder")
        raise UserError(
            f"folder:{path} has no sub-folder {name!r}; {nearest(name, here)}. If its sub-folders "
            "are classes, use split=all, all[:90%] or all[90%:]"
        )
    classes = _classes(root)
    if not classes:
        raise _no_folders(path, root)
    storage.list_ahead([os.path.join(root, one) for one in classes.values()])
    passed = _beside_classes(root)
    names, sizes, labels, every, empty = [], [], [], [], {}
    for label_number, one in enumerate(classes):
        before = passed.counts.copy()
        found = sorted(image_files(root, classes[one], passed))
        if not found:
            empty[one] = passed.counts - before
        for file, size in found:
            every.append(file)
            if low <= percentile(file) < high:
                names.append(file)
                sizes.append(size)
                labels.append(label_number)
    inside = [*every, *(f"{one}/." for one in empty)]
    check_class_folders(f"folder:{path}", split, inside, label is not None)
    if empty:
        named = [
            repr(one) + (f" ({', '.join(f'{n} {why}' for why, n in why.items())})" if why else "")
            for one, why in empty.items()
        ]
        raise UserError(
            f"{root} has {len(empty)} class folder(s) without any image: {', '.join(named[:5])}"
        )
    if not names:
        raise UserError(f"folder:{path} has no image in split {split!r}")
    tell(f"folder:{path}", passed)
    names_of_classes = tuple(classes)
    fingerprint = fingerprint_of(names_of_classes, names, sizes)
    return FolderSource(
        root, Packed.of(names), np.array(labels, np.int32), names_of_classes, fingerprint, passed
    )


def _no_folders(path: str, root: str) -> UserError:
    passed = _beside_classes(root)
    loose = [name for name, why in passed.files if why == _LOOSE]
    how = ""
    if loose:
        how = (
            f"; its {passed.counts[_LOOSE]} images, such as {loose[0]!r}, are in none: move them "
            "into a folder for each class, or list them with their classes in a table "
            f"(table:FILE,root={root})"
        )
    return UserError(f"folder:{path}: {root} has no sub-folders, one for each class{how}")


def folder_splits(path: str) -> tuple[str, ...]:
    """The splits of a folder: sub-folders named like splits, and "all"."""
    try:
        here = _classes(label_option(path, ("folder",))[0])
    except OSError:
        raise UserError(f"folder:{path}: there is no such folder") from None
    return (*(name for name in here.values() if split_kind(name)), WHOLE)


def parse_split(split: str) -> tuple[str, int, int]:
    """Parses "train" to ("train", 0, 100), and "train[90%:]" to ("train", 90, 100)."""
    match = _SPLIT.fullmatch(split)
    low, high = (
        int(((match and match[name]) or default).rstrip("%"))
        for name, default in {"low": "0", "high": "100"}.items()
    )
    if not match or not 0 <= low < high <= 100:
        raise UserError(f"split {split!r}: expected NAME, NAME[:90%] or NAME[90%:]")
    return match["name"], low, high


def percentile(name: str) -> float:
    """A number in [0, 100), a hash of the name."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 * 100


def class_name(name: str) -> str:
    """A class name in Unicode's composed form (NFC), which macOS does not use for files."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))


def _classes(root: str) -> dict[str, str]:
    """Class name -> folder, sorted."""
    entries = storage.scan(root)
    folders = [e.name for e in entries if _is_dir(e) and not _no_folder(e.name)]
    found: dict[str, str] = {}
    for name in folders:
        if (other := found.setdefault(class_name(name), name)) != name:
            raise UserError(f"{root} has two folders of one name: {other!a} and {name!a}")
    return dict(sorted(found.items()))


def _is_dir(entry: os.DirEntry | storage.Entry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _no_folder(name: str) -> str | None:
    """Why a folder is skipped by its name; None if it is not."""
    return out_of_the_way(f"{name}/file")


def _beside_classes(root: str) -> PassedOver:
    """The files outside of class folders, and the folders that are skipped."""
    passed = PassedOver()
    for entry in storage.scan(root):
        if not _is_dir(entry):
            _, why = judged(entry.path)
            passed.add(entry.name, why or _LOOSE)
        elif why := _no_folder(entry.name):
            passed.add(f"{entry.name}/", why)
    return passed


def image_files(root: str, start: str, passed: PassedOver) -> Iterator[tuple[str, int]]:
    """Yields (path relative to `root`, size) of the image files in a folder of it."""
    # A link may lead back up, or to another class.
    waiting, seen = [start], {_inode(root), _inode(os.path.join(root, start))}
    while waiting:
        here = waiting.pop()
        try:
            entries = storage.scan(os.path.join(root, here))
        except OSError as error:
            check_refused(error, error.filename)
            raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from None
        for entry in entries:
            path = f"{here}/{entry.name}"
            if _is_dir(entry):
                if why := _no_folder(entry.name):
                    passed.add(f"{path}/", why)
                elif (inode := _inode(entry.path)) not in seen:
                    seen.add(inode)
                    waiting.append(path)
                continue
            size, why = judged(entry.path)
            if why is None:
                yield path, size
            else:
                passed.add(path, why)


def judged(path: str) -> tuple[int, str | None]:
    """A file's size, and why it is no image, else None; known endings are not opened."""
    name = os.path.basename(path)
    if name.startswith("."):
        return 0, "hidden"
    try:
        size = storage.plain_size(path)
    except OSError:
        return 0, "a link to nothing"
    if size is None:
        return 0, "no plain file"
    if is_image(name):
        return size, None
    if not size:
        return 0, "empty"
    if name.lower().endswith(TEXTS):
        return 0, unknown_format(name)
    try:
        start = storage.start(path, 32)
    except OSError as error:
        return 0, f"not to be opened ({error.strerror})"
    return size, None if sniff(start) else unknown_format(name)


def _inode(path: str) -> tuple[int, int] | str:
    if storage.is_url(path):  # which has no links
        return path
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def is_image(name: str) -> bool:
    """Whether a file has the name of an image."""
    return name.lower().endswith(SUFFIXES) and not os.path.basename(name).startswith(".")


def fingerprint_of(label_names: tuple[str, ...], names: Iterable[str], sizes: Iterable[int]) -> str:
    """A hash that changes when a file is added, removed, renamed or resized."""
    digest = hashlib.sha256(repr(label_names).encode())
    for name, size in zip(names, sizes, strict=True):
        digest.update(os.fsencode(name) + b"\0%d\n" % size)
    return digest.hexdigest()[:16]

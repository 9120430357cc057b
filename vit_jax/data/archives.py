"""Images in tar archives, which are read in place and never unpacked: ImageNet's, WebDataset's."""

import array
import dataclasses
import functools
import glob
import io
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from vit_jax.data.files import (
    WHOLE,
    OpenFiles,
    Packed,
    class_name,
    fingerprint_of,
    is_image,
    open_file,
    parse_split,
    percentile,
)
from vit_jax.data.images import BadImage
from vit_jax.data.tables import read_labels
from vit_jax.errors import UserError

# A file of more bytes is no image to decode.
MAX_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class TarSource:
    """Images inside tar archives, read where they are: nothing is unpacked.

    In a compressed archive going back means starting over: read it in order.
    """

    files: OpenFiles
    names: Packed
    archive: Int32[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    label_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        which, size = int(self.archive[index]), int(self.sizes[index])
        name = f"{self.files.paths[which]}: {self.names[index]}"
        if size > MAX_BYTES:
            raise BadImage(f"{name} has {size} bytes; images of up to {MAX_BYTES} are read")
        data = self.files.read(which, int(self.offsets[index]), size)
        file = self.names[index]
        return {"image": data, "label": int(self.labels[index]), "name": name, "file": file}


def tar(path: str, split: str) -> TarSource:
    """The images of uncompressed tar archives; see `open_tar`.

    Raises:
      UserError: no such file, no tar, a compressed one, or nothing in it that is an image.
    """
    source = open_tar(path, split)
    for file in source.files.paths:
        if not isinstance(open_file(file), io.FileIO):
            raise UserError(
                f"tar:{file} is compressed, so that no image can be read without all before it: "
                "`python -m vit_jax prepare` makes shards of it"
            )
    return source


def open_tar(path: str, split: str = WHOLE, labels: str | None = None) -> TarSource:
    """The images of tar archives, in the order of their places in them.

    A class is, whichever there is first:
      - what `labels` says (see `read_labels`);
      - the name of a tar inside the tar, as in ImageNet-1k's and ImageNet-21k's;
      - what a file NAME.cls (a number) or NAME.json ({"label": ...}) beside NAME.jpg says, as in
        WebDataset's shards;
      - the first folder below those that all files share.

    Args:
      path: a file, or a pattern for several, such as shards-*.tar or shards-{000..041}.tar.
      split: "all", or the name of a folder in the archive; a part of it as for folders.

    Raises:
      UserError: no such file, no tar, or nothing in it that is an image of a class.
    """
    files = OpenFiles(_expand(path))
    folder_name, low, high = parse_split(split)
    # Columns, not objects: ImageNet-21k has 14 million rows.
    names, inners, beside, places = [], [], [], []
    archive, offsets, sizes = (array.array("q") for _ in range(3))
    for number, one in enumerate(files.paths):
        keys, told = [], {}
        for name, inner, offset, size, read in _members(one):
            key, suffix = _key(name)
            place = _below(name, folder_name)
            if suffix in (".cls", ".json"):
                told |= _label_beside(key, suffix, read)
            elif is_image(name) and place is not None and low <= percentile(name) < high:
                names.append(f"{inner}/{name}" if inner else name)
                inners.append(inner)
                places.append(place)
                keys.append(key)
                archive.append(number)
                offsets.append(offset)
                sizes.append(size)
        beside += [told.get(key) for key in keys]
    if not names:
        raise UserError(f"tar:{path} has no image in split {split!r}")
    if labels is not None:
        classes = read_labels(labels, names)
    else:
        classes = [inner or said for inner, said in zip(inners, beside, strict=True)]
        if None in classes:
            several = len(files.paths) > 1
            stems = [_stem(files.paths[number]) if several else None for number in archive]
            classes = _folder_classes(classes, places, stems)
        if None in classes:
            raise UserError(
                f"tar:{path}: {names[classes.index(None)]} is in no folder of a class: say with "
                "--labels which classes the images have"
            )
    classes = [class_name(name) for name in classes]
    label_names = _sorted_classes(classes, ids=labels is not None or classes == beside)
    numbers = {name: label for label, name in enumerate(label_names)}
    labelled = [f"{name}\0{numbers[one]}" for name, one in zip(names, classes, strict=True)]
    return TarSource(
        files,
        Packed.of(names),
        np.array(archive, np.int32),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        np.array([numbers[name] for name in classes], np.int32),
        label_names,
        fingerprint_of(label_names, labelled, sizes),
    )


def _sorted_classes(names: Iterable[str], ids: bool) -> tuple[str, ...]:
    """The names of the classes; those that are numbers are ids from 0 on."""
    names = set(names)
    if ids and all(re.fullmatch(r"0|[1-9]\d{0,7}", name, re.ASCII) for name in names):
        return tuple(str(i) for i in range(max(map(int, names)) + 1))
    return tuple(sorted(names))


def _expand(path: str) -> list[str]:
    """The files of a pattern with *, ? or {000..041}."""
    braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path)
    if braces:
        before, low, high, after = braces.groups()
        paths = [f"{before}{i:0{len(low)}d}{after}" for i in range(int(low), int(high) + 1)]
    else:
        paths = [path] if os.path.exists(path) else sorted(glob.glob(path))
    missing = [one for one in paths if not os.path.isfile(one)]
    if missing or not paths:
        raise UserError(f"tar:{path}: there is no file {(missing or [path])[0]!r}")
    return paths


def _members(path: str) -> Iterator[tuple[str, str | None, int, int, Callable[[], bytes]]]:
    """Every plain file in a tar and in the tars inside it; links, devices and such are passed over.

    Yields:
      its name, the name of the tar inside the tar that it is in, the offset and number of its
      bytes, and a function that reads them.
    """
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as outer:
            for member in _plain(outer):
                body = functools.partial(_read_member, outer, member)
                if not member.name.lower().endswith(".tar"):
                    yield member.name, None, member.offset_data, member.size, body
                    continue
                name = os.path.basename(member.name)[: -len(".tar")]
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    for one in _plain(inner):
                        body = functools.partial(_read_member, inner, one)
                        yield one.name, name, member.offset_data + one.offset_data, one.size, body
    except UserError:
        raise
    except (
        *(tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error),
        *(ValueError, RecursionError, MemoryError, OverflowError),
    ) as error:
        raise UserError(f"{path} is no whole tar archive: {error}") from None


def _plain(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        archive.members.clear()  # tarfile would keep them all, 1 KB for each
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
        if member.isreg() and not member.issparse():
            yield member
    # At a damaged header tarfile ends as if the archive did.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {archive.offset}")


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return archive.extractfile(member).read(min(member.size, 2**20))


def _key(path: str) -> tuple[str, str]:
    """WebDataset's key of a file, and what comes after it: "a/b.cls" -> ("a/b", ".cls")."""
    start = path.rfind("/") + 1
    dot = path.find(".", start + 1)
    return (path, "") if dot < 0 else (path[:dot], path[dot:].lower())


def _label_beside(stem: str, suffix: str, read: Callable[[], bytes]) -> dict[str, str]:
    """What a WebDataset's .cls or .json says of the class of its sample."""
    text = read().decode("utf-8", "replace").strip()
    if suffix == ".cls":
        return {stem: text}
    try:
        label = json.loads(text)["label"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {stem: str(label)}


def _below(name: str, folder_name: str) -> str | None:
    """What comes after a folder in a path; None where it is not in there."""
    name = os.path.normpath("/" + name.lstrip("/"))
    if folder_name == WHOLE:
        return name[1:]
    _, found, after = name.partition(f"/{folder_name.strip('/')}/")
    return after if found else None


def _stem(path: str) -> str:
    return os.path.basename(path).partition(".tar")[0]


def _folder_classes(
    classes: Sequence[str | None], places: Sequence[str], stems: Sequence[str | None]
) -> list[str | None]:
    """Fills in the first folder below those that all files share; without folders, the stem."""
    folders = [os.path.dirname(place) for place in places]
    distinct = {folder for folder, known in zip(folders, classes, strict=True) if known is None}
    shared = os.path.commonpath(distinct) if len(distinct) > 1 else os.path.dirname(*distinct)
    found = []
    for known, folder, stem in zip(classes, folders, stems, strict=True):
        first = folder[len(shared) :].lstrip("/").partition("/")[0]
        found.append(known or first or (None if folder else stem))
    return found

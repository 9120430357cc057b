"""Images in tar and zip archives, read in place and never unpacked: ImageNet's, WebDataset's."""

import array
import collections
import dataclasses
import glob
import io
import logging
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from vit_jax.data.forms.files import (
    WHOLE,
    Packed,
    PassedOver,
    class_name,
    fingerprint_of,
    parse_split,
    percentile,
    tell,
)
from vit_jax.data.forms.label_files import read_labels
from vit_jax.data.forms.layout import (
    TEXTS,
    check_class_folders,
    label_option,
    out_of_the_way,
    split_kind,
    unknown_format,
)
from vit_jax.data.forms.members import Member, is_zip, members
from vit_jax.data.forms.open_files import OpenFiles, open_file
from vit_jax.data.forms.origins import BESIDE, ORIGINS, Beside, Said, choose
from vit_jax.data.images import SUFFIXES, BadImage, sniff
from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

# A file of more bytes is no image to decode.
MAX_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class TarSource:
    """Images inside tar or zip archives, read where they are: nothing is unpacked.

    In a compressed tar going back means starting over: read it in order. Where images have several
    labels, `labels` has a tuple for each.
    """

    files: OpenFiles
    names: Packed
    archive: Int32[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"] | tuple[tuple[int, ...], ...]
    label_names: tuple[str, ...]
    fingerprint: str
    # Of zips: as how many bytes an image is there (-1: as it is), and the checksum of its bytes.
    deflated: Int64[np.ndarray, " n"] | None = None
    crcs: Int64[np.ndarray, " n"] | None = None
    holes: dict[int, tuple[tuple[int, int], ...]] = dataclasses.field(default_factory=dict)
    passed_over: PassedOver = dataclasses.field(default_factory=PassedOver)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        return isinstance(self.labels, tuple)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size, file = int(self.sizes[index]), self.names[index]
        name = f"{self.files.paths[int(self.archive[index])]}: {file}"
        if size > MAX_BYTES:
            raise BadImage(f"{name} has {size} bytes; images of up to {MAX_BYTES} are read")
        label = self.labels[index] if isinstance(self.labels, tuple) else int(self.labels[index])
        return {"image": self._bytes(index, name), "label": label, "name": name, "file": file}

    def _bytes(self, index: int, name: str) -> bytes:
        which, at, size = (int(x[index]) for x in (self.archive, self.offsets, self.sizes))
        if index in self.holes:  # the parts between them stand one after the other
            data = bytearray(size)
            for start, length in self.holes[index]:
                data[start : start + length] = self.files.read(which, at, length)
                at += length
            return bytes(data)
        packed = -1 if self.deflated is None else int(self.deflated[index])
        if packed > MAX_BYTES:
            raise BadImage(f"{name} has {packed} bytes; images of up to {MAX_BYTES} are read")
        data = self.files.read(which, at, size if packed < 0 else packed)
        if packed >= 0:
            try:
                data = zlib.decompressobj(-15).decompress(data, size + 1)
            except zlib.error as error:
                raise BadImage(f"{name} cannot be inflated: {error}") from None
        if self.crcs is not None and self.crcs[index] not in (-1, zlib.crc32(data)):
            raise BadImage(f"{name} is damaged: its checksum is another")
        return data


def tar(path: str, split: str) -> TarSource:
    """The images of uncompressed tar archives, or of zips; see `open_tar`.

    Raises:
      UserError: no such file, no archive, a compressed tar, or nothing in it that is an image.
    """
    for file in _expand(label_option(path, ORIGINS)[0]):
        if not isinstance(open_file(file), io.FileIO):
            raise UserError(
                f"tar:{file} is compressed, so that no image can be read without all before it: "
                "`python -m vit_jax prepare` makes shards of it"
            )
    return open_tar(path, split)


def open_tar(path: str, split: str = WHOLE, labels: str | None = None) -> TarSource:
    """The images of tar or zip archives, in the order of their places in them.

    What says the classes is one of these (ORIGINS), the same for all images:
      - cls, json: what a file NAME.cls, or NAME.json ({"label": ...}), beside NAME.jpg says, as in
        WebDataset's shards. A list in a .json is several labels;
      - tar: the name of a tar inside the archive, as in ImageNet-1k's and ImageNet-21k's;
      - folder: the first folder below those that all files share;
      - txt: NAME.txt, where there is none of the above and texts repeat: captions do not;
      - shard: the name of the archive itself, where there are several that are not only numbered.
    Where images differ in that, or two of them say different things, `,label=cls` (or another)
    behind the path says which one counts, `,label=json.KEY` which value; or `labels` does.

    Args:
      path: a file, or a pattern for several, such as shards-*.tar or shards-{000..041}.tar.
      split: "all", or the name of a folder in the archive; a part of it as for folders.
      labels: a file that says the class of every image (see `read_labels`).

    Raises:
      UserError: no such file, no archive, no image in it, or one whose class is not certain.
    """
    path, wanted = label_option(path, ORIGINS)
    wanted, _, key = (wanted or "").partition(".")
    files = OpenFiles(_expand(path))
    rows, passed = _Rows(), PassedOver()
    for number, one in enumerate(files.paths):
        rows.extend(_listed(one, number, split, key or "label", passed))
    names = rows.names
    if not names:
        raise UserError(
            f"tar:{path} has no image in split {split!r}" + (f" ({passed})" if passed else "")
        )
    if len(rows.above) > 1:
        parse = split.partition("[")
        some = sorted(f"{above.strip('/')}/{parse[0]}".strip("/") for above in rows.above)
        raise UserError(
            f"tar:{path} has several folders {parse[0]!r}: {', '.join(some[:3])}: say "
            f"split={some[0]}{parse[1]}{parse[2]}, or another"
        )
    if labels is not None:
        origin, classes = "labels", read_labels(labels, names)
    else:
        shared, places, folders = _class_folders(rows.places, rows.inners)
        stems = [_stem(file) for file in files.paths]
        said: dict[str, Sequence[Said]] = {
            **rows.said,
            "folder": folders,
            "tar": [inner or None for inner in rows.inners],
            "shard": [stems[number] for number in rows.numbers["archive"]],
        }
        origin, classes = choose(f"tar:{path}", names, said, wanted or None, rows.hint())
        if origin in ("folder", "tar", "shard"):
            below = places if origin == "folder" else [f"{one}/." for one in sorted(set(classes))]
            check_class_folders(f"tar:{path}", split, below, bool(wanted), origin)
        if origin == "folder":
            lost = {one[len(shared) :].strip("/").partition("/")[0] for one in rows.lost}
            if lost := sorted(lost - {"", *folders}):
                logger.info("tar:%s has no image in its folders %s", path, ", ".join(lost[:5]))
    several = isinstance(classes[0], tuple)
    each = [one if several else (one,) for one in classes]
    stored = _stored_names(f"tar:{path}", {name for one in each for name in one})
    label_names = _sorted_classes(stored.values(), ids=origin in ("labels", *BESIDE))
    order = {name: label for label, name in enumerate(label_names)}
    numbers = {name: order[stored[name]] for name in stored}
    found = [tuple(numbers[name] for name in one) for one in each]
    labelled = (
        f"{name}\0{','.join(map(str, one))}" for name, one in zip(names, found, strict=True)
    )
    tell(f"tar:{path}", passed)
    columns = {name: np.array(column, np.int64) for name, column in rows.numbers.items()}
    zipped = any(map(is_zip, files.paths))
    return TarSource(
        files,
        Packed.of(names),
        columns["archive"].astype(np.int32),
        columns["offset"],
        columns["size"],
        tuple(found) if several else np.array([one for (one,) in found], np.int32),
        label_names,
        fingerprint_of(label_names, labelled, columns["size"].tolist()),
        columns["deflated"] if zipped else None,
        columns["crc"] if zipped else None,
        rows.holes,
        passed,
    )


def tar_splits(path: str) -> tuple[str, ...]:
    """What may be given as a split: folders that are called as splits are, and "all"."""
    found = set()
    for one in _expand(label_option(path, ORIGINS)[0]):
        for member in members(one):
            *folders, _ = member.path.split("/")
            if out_of_the_way(member.path) is None:
                found.update([folder for folder in folders if split_kind(folder)][:1])
    return (*sorted(found), WHOLE)


class _Rows:
    """Columns, not objects: ImageNet-21k has 14 million rows."""

    def __init__(self):
        self.names: list[str] = []
        self.places: list[str] = []  # paths below the split's folder
        self.inners: list[str] = []
        self.said: dict[str, list[Said]] = {kind: [] for kind in BESIDE}
        names = ("archive", "offset", "size", "deflated", "crc")
        self.numbers = {name: array.array("q") for name in names}
        self.holes: dict[int, tuple[tuple[int, int], ...]] = {}
        self.above: set[str] = set()  # where the split's folder lies
        self.lost: set[str] = set()  # folders of files that are no images
        self.other_keys: tuple[str, ...] = ()

    def add(self, archive: int, member: Member, above: str, place: str) -> None:
        inner = os.path.basename(member.outer)
        if member.holes is not None:
            self.holes[len(self.names)] = member.holes
        self.names.append(f"{inner}/{member.name}" if inner else member.name)
        self.places.append(place)
        self.inners.append(inner)
        self.above.add(above)
        row = (archive, member.offset, member.size, member.deflated, member.crc)
        for column, value in zip(self.numbers.values(), row, strict=True):
            column.append(value)

    def extend(self, other: "_Rows") -> None:
        """Adds the rows of another archive, in the order of their places in it."""
        start, offsets = len(self.names), other.numbers["offset"]
        order = sorted(range(len(offsets)), key=offsets.__getitem__)
        for mine, theirs in [
            *((getattr(self, key), getattr(other, key)) for key in ("names", "places", "inners")),
            *((self.said[key], other.said[key]) for key in BESIDE),
            *((self.numbers[key], other.numbers[key]) for key in self.numbers),
        ]:
            mine.extend(theirs[row] for row in order)
        if other.holes:
            at = {row: start + i for i, row in enumerate(order)}
            self.holes |= {at[row]: holes for row, holes in other.holes.items()}
        self.above |= other.above
        self.lost |= other.lost
        self.other_keys = self.other_keys or other.other_keys

    def hint(self) -> str:
        """What else a .json could mean, if it has no label."""
        keys = ", ".join(self.other_keys[:8])
        return f" (a .json beside them has {keys}: ,label=json.KEY reads one)" if keys else ""


def _listed(path: str, number: int, split: str, key: str, passed: PassedOver) -> _Rows:
    """The images of an archive that are in a split, and what is beside them."""
    rows, beside, paths = _Rows(), Beside(key), []
    folder_name, low, high = parse_split(split)
    for member in members(path):
        where = member.path
        found = _below(where, folder_name)
        if found is None:
            continue
        ending = os.path.splitext(member.name)[1].lower()
        why = out_of_the_way(where) or member.why
        if why is None and ending[1:] in BESIDE:
            beside.add(where, member.read)
            continue
        if why is None and ending not in SUFFIXES:
            seen = ending not in TEXTS and member.size and sniff(member.read(32))
            why = None if seen else unknown_format(where) if member.size else "empty"
        if why is not None:
            passed.add(f"{path}: {where}", why)
            if not why.startswith("of a folder"):
                rows.lost.add(os.path.dirname(found[1]))
        elif (low, high) == (0, 100) or low <= percentile(member.name) < high:
            rows.add(number, member, *found)
            paths.append(where)
    if len(set(paths)) < len(paths):
        twice = next(one for one, count in collections.Counter(paths).items() if count > 1)
        raise UserError(f"{path} has {twice} twice, and which one counts is not certain")
    for one in beside.alone(paths) if (low, high) == (0, 100) else ():
        passed.add(f"{path}: {one}", unknown_format(one))
        rows.lost.add(os.path.dirname(_below(one, folder_name)[1]))
    for kind, column in rows.said.items():
        column.extend(beside.of(kind, paths))
    rows.other_keys = beside.other_keys
    return rows


def _class_folders(
    places: Sequence[str], inners: Sequence[str]
) -> tuple[str, list[str], list[str | None]]:
    """The folder that all images share, the paths below it, and the first folder of each.

    Tars inside the archive are not counted as folders.
    """
    folders = set(map(os.path.dirname, places))
    shared = os.path.commonpath(folders) if len(folders) > 1 else os.path.dirname(*folders)
    rest, found = [], []
    for place, inner in zip(places, inners, strict=True):
        parts = place[len(shared) :].lstrip("/").split("/")
        if inner in parts[:-1]:
            parts.remove(inner)
        rest.append("/".join(parts))
        found.append(parts[0] if len(parts) > 1 else None)
    return shared, rest, found


def _stored_names(where: str, classes: Iterable[str]) -> dict[str, str]:
    """As what each class is stored (see `class_name`): no two of them as one."""
    stored = {name: class_name(name) for name in classes}
    others: dict[str, str] = {}
    for name, new in stored.items():
        other = others.setdefault(new, name)
        if unicodedata.normalize("NFC", other) != unicodedata.normalize("NFC", name):
            raise UserError(f"{where}: two classes would both be {new!r}: {other!a} and {name!a}")
    return stored


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


def _below(path: str, folder_name: str) -> tuple[str, str] | None:
    """What comes before and after a folder in a path; None where it is not in there."""
    path = os.path.normpath("/" + path.lstrip("/"))
    if folder_name == WHOLE:
        return "", path[1:]
    above, found, after = path.partition(f"/{folder_name.strip('/')}/")
    return (above, after) if found else None


def _stem(path: str) -> str:
    return re.sub(r"(\.tar(\.\w+)?|\.\w+)$", "", os.path.basename(path), flags=re.IGNORECASE)

"""The sources `tar:` and `zip:`: images in archives (ImageNet's, WebDataset's), read in place."""

import dataclasses
import logging
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from vit_jax.data import storage
from vit_jax.data.forms.archive_rows import scan_all
from vit_jax.data.forms.files import WHOLE, Packed, PassedOver, class_name, fingerprint_of, tell
from vit_jax.data.forms.label_files import read_labels
from vit_jax.data.forms.layout import check_class_folders, label_option, out_of_the_way, split_kind
from vit_jax.data.forms.members import is_zip, members
from vit_jax.data.forms.open_files import OpenFiles, is_compressed
from vit_jax.data.forms.origins import BESIDE, ORIGINS, Said, choose
from vit_jax.data.images import BadImage
from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

# Larger files are not decoded.
MAX_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class TarSource:
    """Images in tar or zip archives, read without unpacking.

    Read a compressed tar in order, as seeking back starts over. With several labels an image,
    `labels` has a tuple for each.
    """

    files: OpenFiles
    names: Packed
    archive: Int32[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"] | tuple[tuple[int, ...], ...]
    label_names: tuple[str, ...]
    fingerprint: str
    # For zips: the compressed size of each image (-1: stored), and its checksum.
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
        if index in self.holes:  # of a sparse file, only the other parts are stored
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
      UserError: no such file, no archive, a compressed tar, or no image in it.
    """
    for file in _expand(label_option(path, ORIGINS)[0]):
        if is_compressed(file):
            raise UserError(
                f"tar:{file} is compressed, so that no image can be read without all before it: "
                "`vit-jax prepare` makes shards of it"
            )
    return open_tar(path, split)


def open_tar(path: str, split: str = WHOLE, labels: str | None = None) -> TarSource:
    """The images of tar or zip archives, in the order of their offsets.

    The labels come from one of these (ORIGINS), the same for all images:
      - cls, json: the file NAME.cls, or NAME.json ({"label": ...}), beside NAME.jpg, as in
        WebDataset's shards. A list in a .json is several labels;
      - tar: the name of a tar inside the archive, as in ImageNet-1k's and ImageNet-21k's;
      - folder: the first folder below those that all files share;
      - txt: NAME.txt, if there is none of the above and texts repeat, which captions do not;
      - shard: the name of the archive, if there are several that are not only numbered.
    If that is ambiguous, `,label=cls` (or another) behind the path selects one, `,label=json.KEY`
    a value in the .json; or give `labels`.

    Args:
      path: a file, or a pattern for several, such as shards-*.tar or shards-{000..041}.tar.
      split: "all", or the name of a folder in the archive; a part of it as for folders.
      labels: a file with the class of every image (see `read_labels`).

    Raises:
      UserError: no such file, no archive, no image in it, or an ambiguous label.
    """
    path, wanted = label_option(path, ORIGINS)
    wanted, _, key = (wanted or "").partition(".")
    files = OpenFiles(_expand(path))
    passed = PassedOver()
    rows = scan_all(files.paths, split, key or "label", passed)
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


def unlabelled(path: str) -> TarSource:
    """All images of one archive, in the order of their offsets, each of the one class "".

    Raises:
      UserError: no archive, or a damaged one.
    """
    passed = PassedOver()
    rows = scan_all([path], WHOLE, "label", passed)
    columns = {name: np.array(column, np.int64) for name, column in rows.numbers.items()}
    return TarSource(
        OpenFiles([path]),
        Packed.of(rows.names),
        columns["archive"].astype(np.int32),
        columns["offset"],
        columns["size"],
        np.zeros(len(rows.names), np.int32),
        ("",),
        fingerprint_of(("",), rows.names, columns["size"].tolist()),
        columns["deflated"],
        columns["crc"],
        rows.holes,
        passed,
    )


def tar_splits(path: str) -> tuple[str, ...]:
    """The splits of an archive: folders named like splits, and "all"."""
    found = set()
    for one in _expand(label_option(path, ORIGINS)[0]):
        for member in members(one):
            *folders, _ = member.path.split("/")
            if out_of_the_way(member.path) is None:
                found.update([folder for folder in folders if split_kind(folder)][:1])
    return (*sorted(found), WHOLE)


def _class_folders(
    places: Sequence[str], inners: Sequence[str]
) -> tuple[str, list[str], list[str | None]]:
    """The folder that all images share, the paths below it, and the first folder of each.

    Tars inside the archive do not count as folders.
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
    """Class -> its name by `class_name`. UserError: two classes get the same name."""
    stored = {name: class_name(name) for name in classes}
    others: dict[str, str] = {}
    for name, new in stored.items():
        other = others.setdefault(new, name)
        if unicodedata.normalize("NFC", other) != unicodedata.normalize("NFC", name):
            raise UserError(f"{where}: two classes would both be {new!r}: {other!a} and {name!a}")
    return stored


def _sorted_classes(names: Iterable[str], ids: bool) -> tuple[str, ...]:
    """Sorts class names; if `ids` and all are numbers, they are all numbers from 0 on."""
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
        paths = [path] if storage.exists(path) else storage.matches(path)
    missing = [one for one in paths if not storage.is_file(one)]
    if missing or not paths:
        raise UserError(f"tar:{path}: there is no file {(missing or [path])[0]!r}")
    return paths


def _stem(path: str) -> str:
    return re.sub(r"(\.tar(\.\w+)?|\.\w+)$", "", os.path.basename(path), flags=re.IGNORECASE)

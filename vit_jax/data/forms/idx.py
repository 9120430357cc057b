"""The source `idx:`: MNIST and sets in its format, such as Fashion-MNIST and EMNIST."""

import dataclasses
import logging
import lzma
import math
import os
import re
import struct
import zlib

import numpy as np
from jaxtyping import UInt8

from vit_jax.data import storage
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.forms.files import parse_split, percentile
from vit_jax.data.forms.open_files import open_file
from vit_jax.errors import UserError, nearest

logger = logging.getLogger(__name__)

_FILE = re.compile(
    r"(?P<prefix>.*?)-?(?P<split>train|test|t10k)-(?P<kind>images|labels)"
    r"[.-]idx\d-ubyte(\.gz|\.bz2|\.xz)?"
)
_UINT8 = 0x08


@dataclasses.dataclass(frozen=True)
class _Pair:
    images: str
    labels: str


def idx(path: str, split: str) -> ArraySource:
    """MNIST's files: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., gzipped or not.

    Class names are the numbers that occur in any split. EMNIST's images are transposed in its
    files; they are read as they are, with a warning.

    Args:
      path: a folder with one such set, or FOLDER/PREFIX if there are several, such as
        gzip/emnist-letters. If a file is there gzipped and not, the latter is read.
      split: "train" or "test" (t10k), or a part of it such as "train[:90%]", drawn by a hash of
        the image's number.

    Raises:
      UserError: no such folder, set or split, or files that are damaged or in another format.
    """
    where = f"idx:{path}"
    name, low, high = parse_split(split)
    prefix, pairs = _pairs(path)
    if name not in pairs:
        raise UserError(f"{where} has no split {name!r}; {nearest(name, pairs)}")
    if "emnist" in prefix.lower():
        logger.warning(
            "%s: EMNIST's images are transposed in its files, and read as they are", where
        )
    labels = {one: _read(pair.labels, 1) for one, pair in pairs.items()}
    images = _read(pairs[name].images, 3)
    if len(images) != len(labels[name]):
        raise UserError(
            f"{pairs[name].images} has {len(images)} images, but {pairs[name].labels} "
            f"{len(labels[name])} labels"
        )
    classes = np.unique(np.concatenate(list(labels.values())))
    chosen = [i for i in range(len(images)) if low <= percentile(f"{name}/{i}") < high]
    if not chosen:
        raise UserError(f"{where} has no image in split {split!r}")
    found = np.searchsorted(classes, labels[name][chosen]).astype(np.int32)
    images = images if images.ndim == 4 else images[..., None]
    return ArraySource(images[chosen], found, tuple(str(each) for each in classes))


def idx_splits(path: str) -> tuple[str, ...]:
    """The splits of a set."""
    return tuple(_pairs(path)[1])


def _pairs(path: str) -> tuple[str, dict[str, _Pair]]:
    """The prefix of the only set in a folder, and split -> files."""
    root, wanted = os.path.expanduser(path), None
    if not storage.is_folder(root):
        root, wanted = os.path.split(root)
        wanted = wanted.rstrip("-")
    if not storage.is_folder(root or "."):
        raise UserError(f"idx:{path}: there is no such folder")
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name in storage.names(root or "."):
        if match := _FILE.fullmatch(name):
            split = "train" if match["split"] == "train" else "test"
            kinds = found.setdefault(match["prefix"], {}).setdefault(split, {})
            other = kinds.setdefault(match["kind"], os.path.join(root, name))
            if _unpacked(other) != _unpacked(os.path.join(root, name)):
                raise UserError(f"idx:{path} has two files of one kind: {other} and {name}")
    if not found:
        raise UserError(
            f"idx:{path}: {root!r} has no files such as train-images-idx3-ubyte.gz in it"
        )
    if wanted is None and len(found) > 1:
        some = next(filter(None, sorted(found)))
        raise UserError(
            f"idx:{path} has several sets ({', '.join(map(repr, sorted(found)))}): say which, as "
            f"in idx:{os.path.join(path, some)}"
        )
    prefix = next(iter(found)) if wanted is None else wanted
    if prefix not in found:
        raise UserError(f"idx:{path}: no set {prefix!r}; {nearest(prefix, found)}")
    pairs = {}
    for split, kinds in sorted(found[prefix].items(), reverse=True):
        if len(kinds) < 2:
            raise UserError(f"{next(iter(kinds.values()))} has no images or labels beside it")
        pairs[split] = _Pair(kinds["images"], kinds["labels"])
    return prefix, pairs


def _unpacked(path: str) -> str:
    return re.sub(r"\.(gz|bz2|xz)$", "", path)


def _read(path: str, dims: int) -> UInt8[np.ndarray, "..."]:
    """The array of a file: labels [n] (dims=1), images [n h w] or [n h w c] (dims=3)."""
    try:
        with open_file(path) as file:
            data = file.read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    known = (1,) if dims == 1 else (3, 4)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UINT8 or data[3] not in known:
        raise UserError(
            f"{path} begins with {data[:4].hex(' ') or 'nothing'}; expected 00 00 08 0{dims}, as "
            f"in MNIST's files of {'labels' if dims == 1 else 'images'}"
        )
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise UserError(f"{path} is cut off in its header")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) != start + math.prod(shape) or not math.prod(shape):
        raise UserError(
            f"{path} has {len(data) - start} bytes behind its header, which says {list(shape)}: "
            "it is cut off, or damaged"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)

"""The source `records:`, ArrayRecord shards that `prepare` wrote; and images in any records."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import resource
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt64

from vit_jax.data import storage
from vit_jax.data.forms.examples import feature_values, parse_example
from vit_jax.data.forms.files import parse_split
from vit_jax.data.forms.mask_classes import Classes
from vit_jax.data.forms.ranged_records import RangedRecords
from vit_jax.data.images import BadImage
from vit_jax.data.masks import Palette, header
from vit_jax.errors import UserError, check_refused, nearest

logger = logging.getLogger(__name__)


@runtime_checkable
class Records(Protocol):
    """Random access to serialised examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource:
    """Images in `tf.train.Example` records; `source[i]["image"]` is an image file's bytes.

    Attributes:
      keys: the features of the image, the label and, if there is one, the example's name.
      classes: of masks, which are then the labels; None of labels of images.
      kept: the file of image hashes that `prepare` wrote, and their digest.
    """

    records: Records
    keys: tuple[str, str, str | None]
    where: str
    label_names: tuple[str, ...]
    fingerprint: str
    multi_label: bool = False
    kept: tuple[str, str] | None = None
    classes: Classes | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def masks(self) -> bool:
        return self.classes is not None

    @property
    def palette(self) -> Palette | None:
        return None if self.classes is None else self.classes.palette

    @property
    def how(self) -> str:
        """How masks are read, for the user."""
        return "" if self.classes is None else self.classes.how

    @property
    def in_bucket(self) -> bool:
        records = self.records.records if isinstance(self.records, _Share) else self.records
        return getattr(records, "in_bucket", False)

    def kept_content(self) -> UInt64[np.ndarray, " n"] | None:
        """The saved hash of each image (see `contents.content`); None if missing or outdated."""
        if self.kept is None:
            return None
        path, expected = self.kept
        share = self.records if isinstance(self.records, _Share) else None
        whole = self.records if share is None else share.records
        try:
            hashes = np.load(storage.local(path), allow_pickle=False)
        except UserError:
            raise
        except (OSError, ValueError, EOFError):
            return None
        if hashes.dtype != np.uint64 or hashes.shape != (len(whole),):
            return None
        if content_digest(hashes) != expected:
            return None
        return hashes if share is None else hashes[[share.place(i) for i in range(len(share))]]

    def mask_bytes(self, index: int) -> bytes:
        """The file of an example's mask. UserError: it has none."""
        found = parse_example(self.records[index]).get(self.keys[1])
        if not isinstance(found, bytes):
            raise UserError(f"{self.where}, example {index} has no bytes {self.keys[1]!r}")
        return found

    def mask_size(self, index: int) -> tuple[int, int]:
        try:
            return header(self.mask_bytes(index))[:2]
        except BadImage as error:
            raise BadImage(f"the mask of {self.where}, example {index}: {error}") from None

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, key, name = self.keys
        where = f"{self.where}, example {index}"
        try:
            record = self.records[index]
            example = parse_example(record)
            label = self._label(record, example)
        except UserError:
            raise
        except (ValueError, IndexError, RuntimeError, struct.error) as error:
            if _NOT_OPENED.search(str(error)):  # not the fault of this record
                raise UserError(f"{where} cannot be read: {error}") from None
            raise BadImage(f"{where}: {error}") from None
        file = str(index)
        if name and isinstance(example.get(name), bytes):
            file = example[name].decode("utf-8", "replace")
            where += f" ({file})"
        if self.classes is not None and isinstance(label, bytes):
            label = self.classes.decode(f"the mask of {where}", label)
        labels = () if self.masks else label if isinstance(label, tuple) else (label,)
        if self.masks and not isinstance(label, np.ndarray):
            raise UserError(f"{where} has no bytes {key!r} of a mask")
        if not isinstance(example.get(image), bytes) or not all(isinstance(n, int) for n in labels):
            raise UserError(
                f"{where} has {', '.join(example) or 'nothing'}; expected bytes {image!r} and a "
                f"number {key!r}"
            )
        return {"image": example[image], "label": label, "name": where, "file": file}

    def _label(self, record: bytes, example: Mapping[str, Any]) -> Any:
        """An example's label; `example` has the first value of each feature."""
        key = self.keys[1]
        if self.multi_label and key in example:
            return tuple(feature_values(record, key))
        return example.get(key)


# Errors of array_record that are about a file, not a record.
_NOT_OPENED = re.compile(r"open\(\)|No such file|Too many open|at least 64KB")


def allow_open_files() -> None:
    """Raises the limit of open files to the maximum: array_record keeps each shard open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if most == resource.RLIM_INFINITY else most
    with contextlib.suppress(ValueError, OSError):  # macOS allows fewer than it reports
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def digest(identity: tuple[Any, ...]) -> str:
    """A fingerprint of 16 hex digits."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a shard to read, with the fields of array_record's FileInstruction."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def array_records(parts: Sequence[Any]) -> Records:
    """The records of parts of ArrayRecord files, each with the fields of `Part`, in order.

    Raises:
      UserError: a file in a bucket is no ArrayRecord file, or of a kind that is not read there.
    """
    if any(storage.is_url(part.filename) for part in parts):
        return RangedRecords.of(parts)
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    allow_open_files()
    return ArrayRecordDataSource(parts)


INFO = "vit_jax_{split}.json"  # metadata of a split, written last
CONTENT = "content_{split}.npy"  # a hash of each image file, uint64, in the order of the records
FEATURES = ("image", "label", "name")


def records(path: str, split: str) -> RecordSource:
    """The ArrayRecord shards that `prepare` wrote; `split` as for folders.

    A part such as "train[:90%]" is taken from a fixed random order, so that it has all classes.

    Raises:
      UserError: no such folder or split, or one that is unfinished or has changed.
    """
    where = f"records:{path}"
    name, low, high = parse_split(split)
    try:
        info = json.loads(storage.read(os.path.join(path, INFO.format(split=name))))
        shards, label_names = info["shards"], tuple(info["label_names"])
        fingerprint = info["fingerprint"]
        for shard in shards:
            found = storage.size(os.path.join(path, shard["file"]))
            if found != shard["bytes"]:
                raise UserError(
                    f"{where}: {shard['file']} has {found} bytes, not {shard['bytes']}: it changed "
                    "or is cut off"
                )
    except FileNotFoundError as error:
        known = record_splits(path)
        missing = os.path.basename(error.filename or "")
        raise UserError(
            f"{where} has no split {name!r} ({missing} is not there); {nearest(name, known)}. "
            "`vit-jax prepare` writes such folders"
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, UserError):
            raise
        check_refused(error, path)
        raise UserError(f"{where}: what was said of split {name!r} is damaged: {error!r}") from None
    counts = [shard["examples"] for shard in shards]
    total = sum(counts)
    start, stop = (round(percent * total / 100) for percent in (low, high))
    if start == stop:
        raise UserError(f"{where} has no example in split {split!r}")
    files = (os.path.join(path, shard["file"]) for shard in shards)
    reader = array_records([Part(file, 0, n, n) for file, n in zip(files, counts, strict=True)])
    if (low, high) != (0, 100):
        reader = _Share(reader, start, stop)
        fingerprint = digest((fingerprint, start, stop, "mixed"))
    kept = None
    if isinstance(info.get("content"), str):  # splits of earlier versions have none
        kept = os.path.join(path, CONTENT.format(split=name)), info["content"]
    return RecordSource(reader, FEATURES, f"{where} {split}", label_names, fingerprint, kept=kept)


def record_splits(path: str) -> list[str]:
    """The splits that `prepare` wrote into a folder."""
    start, end = INFO.split("{split}")
    here = storage.names(path) if storage.is_folder(path) else []
    return [n[len(start) : -len(end)] for n in here if n.startswith(start) and n.endswith(end)]


def content_digest(hashes: UInt64[np.ndarray, " n"]) -> str:
    """A digest of image hashes, saved in the metadata: 16 hex digits."""
    return hashlib.sha256(hashes.astype("<u8")).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _Share:
    """Records `start` to `stop` in a fixed random order, as shards may be sorted by class."""

    records: Records
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> bytes:
        return self.records[self.place(index)]

    def place(self, index: int) -> int:
        """The number of a record among all."""
        # Imported here, as Grain imports jax, which takes a second.
        from grain.experimental import index_shuffle

        last = len(self.records) - 1
        return index_shuffle(self.start + index, max_index=last, seed=0, rounds=4) if last else 0

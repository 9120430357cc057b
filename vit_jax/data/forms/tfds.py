"""The source `tfds:`: data sets prepared by TFDS, read without TensorFlow.

ArrayRecord files have an index; for TFRecord files, one is made once and cached.
"""

import concurrent.futures
import dataclasses
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from vit_jax.data import storage
from vit_jax.data.forms.layout import options
from vit_jax.data.forms.mask_options import CLASS_OPTIONS, classes_said
from vit_jax.data.forms.open_files import OpenFiles
from vit_jax.data.forms.records import (
    Records,
    RecordSource,
    allow_open_files,
    array_records,
    digest,
)
from vit_jax.errors import UserError, nearest

_INFO = "dataset_info.json"
_SAMPLE = 16  # masks that are looked at for how they count


def tfds(argument: str, split: str) -> RecordSource:
    """A data set that TFDS prepared: NAME, NAME/CONFIG:VERSION, or the path of its folder.

    Names are looked up in TFDS_DATA_DIR, or ~/tensorflow_datasets. `,label=KEY` behind it selects
    the label among the features: a class label, a sequence of them for multi-label, or an image
    that is a mask, with the options of `pairs` for its classes.

    Args:
      split: in TFDS's syntax, such as "train[:98%]".

    Raises:
      UserError: no such data set, split, option or label, a format that cannot be read by index,
        or features without an image and a label.
    """
    where, given = f"tfds:{argument}", {}
    if not storage.is_folder(os.path.expanduser(argument)):  # names may have commas
        argument, given = options(argument, ("label", *CLASS_OPTIONS))
    chosen = given.get("label")
    path = os.path.expanduser(argument.rstrip("/"))
    if (path.startswith(("/", ".")) or storage.is_url(path)) and not storage.is_folder(path):
        raise UserError(f"{where}: there is no such folder")
    builder = prepared(where, argument, path if storage.is_folder(path) else None)
    keys = _feature_keys(where, builder.info, chosen)
    if keys[1] != keys[0] and _kind(builder.info, keys[1]) == "Image":
        return _masked(where, builder, split, keys, given)
    if odd := [key for key in CLASS_OPTIONS if key in given]:
        raise UserError(f"{where}: {odd[0]}= is for masks, of label=KEY of an image")
    names, multi_label = class_names(where, builder.info, keys[1])
    records, identity = split_records(where, builder, split)
    identity = (*identity, names) if chosen is None else (*identity, names, chosen)
    return RecordSource(records, keys, f"{where} {split}", names, digest(identity), multi_label)


def _masked(
    where: str, builder: Any, split: str, keys: tuple[str, str, str | None], given: dict[str, str]
) -> RecordSource:
    """The images of a split, with the masks in another feature."""
    records, identity = split_records(where, builder, split)
    unread = RecordSource(records, keys, f"{where} {split}", (), "")
    chosen = np.unique(np.linspace(0, len(records) - 1, _SAMPLE).astype(int)).tolist()
    classes = classes_said(where, given, (unread.mask_bytes(index) for index in chosen))
    identity = digest((*identity, keys[1], *classes.identity))
    return dataclasses.replace(
        unread, label_names=classes.names, fingerprint=identity, classes=classes
    )


def prepared(where: str, name: str, path: str | None = None) -> Any:
    """TFDS's builder of the data set `name`, or of the one in the folder `path`.

    Raises:
      UserError: there is none, or it cannot be read; the message begins with `where`.
    """
    import tensorflow_datasets
    from google.protobuf import json_format
    from tensorflow_datasets.core import read_only_builder

    try:
        if path and storage.is_file(os.path.join(path, _INFO)):
            return _builder(path)
        if path:
            versions = [n for n in storage.names(path) if re.fullmatch(r"\d+\.\d+\.\d+", n)]
            if versions:  # it is NAME or NAME/CONFIG
                newest = max(versions, key=lambda found: [int(n) for n in found.split(".")])
                return _builder(os.path.join(path, newest))
            if storage.is_url(path):
                raise UserError(f"{where}: there is no {_INFO} in it, nor in folders of versions")
            parent, name = os.path.split(os.path.abspath(path))
            return read_only_builder.builder_from_files(name, data_dir=parent)
        folder = os.environ.get("TFDS_DATA_DIR")  # TFDS reads it only when imported
        return read_only_builder.builder_from_files(
            name, **({"data_dir": folder} if folder else {})
        )
    except tensorflow_datasets.core.DatasetNotFoundError:
        raise UserError(
            f"{where}: TFDS finds no prepared data set of that name; prepare it with tfds, set "
            "TFDS_DATA_DIR, or give its folder"
        ) from None
    except UserError:
        raise
    except (ValueError, OSError, KeyError, json_format.ParseError) as error:
        raise UserError(f"{where} cannot be opened: {error}") from None


def _builder(path: str) -> Any:
    """TFDS's builder of the data set in a folder; its files keep the folder's name, or URL."""
    import tensorflow_datasets

    if not storage.is_url(path):
        return tensorflow_datasets.builder_from_directory(path)
    # TFDS reads what describes the data from disks alone.
    folder = storage.kept(f"{path}/{_INFO}", _INFO).parent
    for name in storage.files(path):
        if name.endswith((".json", ".txt")):
            storage.write_kept(folder / name, [storage.read(f"{path}/{name}")])
    builder = tensorflow_datasets.builder_from_directory(folder)
    builder.bucket = path
    return builder


def split_records(where: str, builder: Any, split: str) -> tuple[Records, tuple[Any, ...]]:
    """The records of a split of a prepared data set, and what identifies them.

    Raises:
      UserError: no such split, or a format that cannot be read by index.
    """
    import tensorflow_datasets

    info = builder.info
    try:
        chosen = info.splits[split]
        files = chosen.file_instructions
    except (KeyError, ValueError) as error:
        known = nearest(split, info.splits)
        raise UserError(f"the source {where} has no split {split!r}; {known} ({error})") from None
    if not chosen.num_examples:
        raise UserError(f"{where} has no example in split {split!r}")
    form = info.file_format.value
    if form not in ("array_record", "tfrecord"):
        raise UserError(
            f"{where} is in {form}, which TFDS does not read whole by index: prepare it again with "
            "file_format='array_record'"
        )
    if bucket := getattr(builder, "bucket", None):
        files = [
            dataclasses.replace(f, filename=f"{bucket}/{os.path.basename(f.filename)}")
            for f in files
        ]
    missing = [f.filename for f in files if not storage.is_file(f.filename)]
    if missing:
        raise UserError(f"{where}: {missing[0]} is not there: prepare the data set again")
    allow_open_files()
    parts = [(os.path.basename(f.filename), f.skip, f.take) for f in files]
    sizes = [storage.size(f.filename) for f in files]
    identity = (info.full_name, parts, sizes)
    if form == "tfrecord":
        return TfRecords.of(files, chosen.num_examples), identity
    if any(storage.is_url(f.filename) for f in files):
        return array_records(files), identity
    method = tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split, deserialize_method=method), identity


def class_names(where: str, info: Any, key: str) -> tuple[tuple[str, ...], bool]:
    """The names of a label's classes, and whether it is multi-label.

    Raises:
      UserError: the data set has no class label of that name.
    """
    labels = {}
    for name, feature in info.features.items():
        several = type(feature).__name__ == "Sequence"
        label = feature.feature if several else feature
        if type(label).__name__ == "ClassLabel":
            labels[name] = label, several
    if key not in labels:
        raise UserError(f"{where} has no class label {key!r}; {nearest(key, labels)}")
    label, several = labels[key]
    return tuple(label.names or map(str, range(label.num_classes))), several


def _kind(info: Any, key: str) -> str:
    """The kind of a feature; "" if there is none of this name."""
    return type(info.features[key]).__name__ if key in info.features else ""


def _feature_keys(where: str, info: Any, label: str | None) -> tuple[str, str, str | None]:
    """The names of the image, label and text features; those of the supervised pair go first."""
    kinds: dict[str, list[str]] = {"Image": [], "ClassLabel": [], "Text": []}
    first = [key for key in info.supervised_keys or () if isinstance(key, str)]
    for key in [*first, *(key for key in info.features if key not in first)]:
        kinds.setdefault(_kind(info, key), []).append(key)
    if label is not None:
        kinds["ClassLabel"] = [label]
        kinds["Image"].sort(key=lambda name: name == label)  # which may be a mask
    if not kinds["Image"] or not kinds["ClassLabel"]:
        raise UserError(
            f"{where} has the features {', '.join(info.features)}; expected an image and a label"
        )
    return kinds["Image"][0], kinds["ClassLabel"][0], (kinds["Text"] or [None])[0]


@dataclasses.dataclass(frozen=True, eq=False)
class TfRecords:
    """Random access to the records of TFRecord files."""

    files: OpenFiles
    which: Int32[np.ndarray, " n"]
    starts: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]

    @classmethod
    def of(cls, instructions: Sequence[Any], expected: int) -> "TfRecords":
        """The records selected by TFDS's file instructions (filename, skip, take).

        Raises:
          UserError: a damaged file, or another number of records than `expected`.
        """
        paths = [os.fspath(each.filename) for each in instructions]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            starts = list(pool.map(record_starts, paths))
        parts = []
        for number, (each, found) in enumerate(zip(instructions, starts, strict=True)):
            stop = len(found) - 1  # the last start is the end
            if each.take not in (None, -1):
                stop = min(stop, each.skip + each.take)
            begin = found[each.skip : stop]
            size = found[each.skip + 1 : stop + 1] - begin - _AROUND
            parts.append((np.full(len(begin), number, np.int32), begin + _BEFORE, size))
        which, begins, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
        if len(which) != expected:
            raise UserError(
                f"{os.path.dirname(paths[0])} has {len(which)} records where its dataset_info.json "
                f"says {expected}: prepare it again"
            )
        return cls(OpenFiles(paths), which, begins, sizes)

    @property
    def in_bucket(self) -> bool:
        return self.files.in_bucket

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int) -> bytes:
        return self.files.read(
            int(self.which[index]), int(self.starts[index]), int(self.sizes[index])
        )


# A TFRecord is its length (8 bytes), a checksum (4), the data, and a checksum (4).
_BEFORE, _AROUND = 12, 16


def record_starts(path: str) -> Int64[np.ndarray, " n_plus_1"]:
    """The offsets of the records in a TFRecord file, and the end of the last one.

    Cached in the user's cache folder.
    """
    return storage.index(path, "tfrecord", lambda: np.fromiter(_scan(path), np.int64))


def _scan(path: str) -> Iterator[int]:
    at, size = 0, storage.size(path)
    with storage.opened(path) as file:
        while at < size:
            yield at
            file.seek(at)
            header = file.read(8)
            length = struct.unpack("<Q", header)[0] if len(header) == 8 else size
            at += _AROUND + length
    if at != size:
        raise UserError(f"{path} is cut off, or no uncompressed TFRecord file")
    yield at

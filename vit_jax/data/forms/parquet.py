"""Images in columns of Parquet files, read by row."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Int32, Int64

from vit_jax.data.forms.files import labels_at
from vit_jax.data.images import BadImage
from vit_jax.errors import UserError


class ParquetRows:
    """Random access to the rows of a column of Parquet files, thread-safe.

    Parquet is read a row group at a time. The last two groups are cached, so reading rows in order
    is cheap; the cache is not pickled.
    """

    KEPT = 2

    def __init__(self, paths: Sequence[str], column: str):
        self.paths, self.column = tuple(paths), column
        groups, starts, row, self.largest = [], [], 0, 0
        for number, path in enumerate(self.paths):
            metadata = _metadata(path)
            for group in range(metadata.num_row_groups):
                stored = metadata.row_group(group)
                if stored.num_rows:
                    groups.append((number, group))
                    starts.append(row)
                    row += stored.num_rows
                    self.largest = max(self.largest, _bytes_of(stored, column))
        self._groups = np.array(groups, np.int64).reshape(-1, 2)
        self._starts, self._rows = np.array(starts, np.int64), row
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getstate__(self):
        lost = ("_lock", "_kept")
        return {name: value for name, value in self.__dict__.items() if name not in lost}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return self._rows

    def place(self, row: int) -> tuple[int, int]:
        """The number of a row's file, and of its group among those of all files."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return int(self._groups[group, 0]), group

    def __getitem__(self, row: int) -> Any:
        """The cell of a row: None, bytes, or a dict. UserError: the file cannot be read."""
        file, group = self.place(row)
        with self._lock:
            future, mine = self._kept.get(group), False
            if future is None:
                future, mine = concurrent.futures.Future(), True
                self._kept[group] = future
                if len(self._kept) > self.KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
        if mine:
            try:
                future.set_result(self._read(self.paths[file], int(self._groups[group, 1])))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._kept.pop(group, None)
                raise
        return future.result()[row - int(self._starts[group])].as_py()

    def _read(self, path: str, group: int) -> pyarrow.ChunkedArray:
        with reading(path), pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            return file.read_row_group(group, [self.column], use_threads=False).column(0)


@dataclasses.dataclass(frozen=True, eq=False)
class ParquetSource:
    """Images in Parquet files; `source[i]["image"]` is an image file's bytes.

    The labels of example i are `labels[ends[i - 1]:ends[i]]`: one, unless `multi_label`.
    """

    images: ParquetRows
    rows: Int64[np.ndarray, " n"]
    labels: Int32[np.ndarray, " m"]
    ends: Int64[np.ndarray, " n"]
    label_names: tuple[str, ...]
    fingerprint: str
    multi_label: bool = False

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        cell = self.images[row]
        path = self.images.paths[self.images.place(row)[0]]
        data, file = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, "")
        name = f"{path}, row {row} of the split" + (f" ({file})" if file else "")
        if not isinstance(data, bytes):
            raise BadImage(f"{name} has no bytes of an image in it")
        label = labels_at(self.labels, self.ends, index, self.multi_label)
        return {"image": data, "label": label, "name": name, "file": file or str(row)}


def is_list(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds lists, of any or of one length."""
    types = pyarrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def holds_images(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type can be image files: bytes, or a struct with bytes."""
    types = pyarrow.types
    if types.is_struct(kind):
        kinds = [field.type for field in kind if field.name == "bytes"]
    else:
        kinds = [kind]
    return any(types.is_binary(each) or types.is_large_binary(each) for each in kinds)


def holds_labels(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type can be labels: integers, strings, booleans, lists of those."""
    types = pyarrow.types
    if is_list(kind) or types.is_dictionary(kind):
        return holds_labels(kind.value_type)
    fits = (types.is_integer, types.is_string, types.is_large_string, types.is_boolean)
    return any(each(kind) for each in fits)


def read_column(paths: Sequence[str], column: str) -> list[Any]:
    """Reads one column of all files, in their order, as Python values; None for nulls."""
    found = []
    for path in paths:
        with reading(path):
            found += pyarrow.parquet.read_table(path, columns=[column]).column(0).to_pylist()
    return found


def _metadata(path: str) -> pyarrow.parquet.FileMetaData:
    with reading(path):
        return pyarrow.parquet.read_metadata(path)


def _bytes_of(group: pyarrow.parquet.RowGroupMetaData, column: str) -> int:
    """The size of a column in a row group, in bytes."""
    parts = (group.column(i) for i in range(group.num_columns))
    return sum(p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] == column)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns errors of pyarrow into a UserError."""
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(20).startswith(b"version https://git-"):
                why = "it stands for a file that Git LFS has not fetched"
        raise UserError(f"{path} cannot be read: {why}") from None

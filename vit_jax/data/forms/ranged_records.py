"""ArrayRecord files in buckets, read by ranges: array_record itself reads only disks.

The format is Riegeli's records file (github.com/google/riegeli, "Riegeli/records file format"):
chunks, interrupted every 64 KiB by a block header, and at the end, in a block of its own, where
the footer is, which has the offset of each chunk. Chunks have one or more records.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from jaxtyping import Int64

from vit_jax.data import storage
from vit_jax.errors import UserError

_BLOCK = 2**16
_BLOCK_HEADER = 24
_HEADER = struct.Struct("<5Q")  # hash, size of the data, its hash, type and records, decoded size
_MAGIC = 0x71930E704FDAE05E  # of ArrayRecord's postscript
_CODECS = {ord("z"): "zstd", ord("b"): "brotli"}


@dataclasses.dataclass(frozen=True, eq=False)
class RangedRecords:
    """Random access to the records of ArrayRecord files in buckets, a request for each.

    Attributes:
      paths: the files.
      starts: of each file, the offsets of its chunks, and where the last one ends.
      firsts: of each file, the numbers of the first record of each chunk, and how many there are.
      skips: of each file, how many records are left out before the first.
      ends: of each file, how many records there are up to its last one.
    """

    paths: tuple[str, ...]
    starts: tuple[Int64[np.ndarray, " _chunks"], ...]
    firsts: tuple[Int64[np.ndarray, " _chunks"], ...]
    skips: Int64[np.ndarray, " files"]
    ends: Int64[np.ndarray, " files"]

    @classmethod
    def of(cls, parts: Sequence[Any]) -> "RangedRecords":
        """The records of parts of files, each with filename, skip and take (-1: all others).

        Raises:
          UserError: no ArrayRecord file, or one with fewer records.
        """
        paths = [part.filename for part in parts]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            indexes = list(pool.map(_index, paths))
        counts = []
        for part, (_, firsts) in zip(parts, indexes, strict=True):
            there = int(firsts[-1]) - part.skip
            count = there if part.take in (None, -1) else part.take
            if not 0 <= count <= there:
                raise UserError(
                    f"{part.filename} has {firsts[-1]} records; expected {part.skip + part.take}"
                )
            counts.append(count)
        return cls(
            tuple(paths),
            *(tuple(column) for column in zip(*indexes, strict=True)),
            np.array([part.skip for part in parts], np.int64),
            np.cumsum(counts, dtype=np.int64),
        )

    in_bucket = True

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = int(np.searchsorted(self.ends, index, side="right"))
        before = int(self.ends[file - 1]) if file else 0
        record = index - before + int(self.skips[file])
        chunk = int(np.searchsorted(self.firsts[file], record, side="right")) - 1
        start, stop = (int(at) for at in self.starts[file][chunk : chunk + 2])
        path = self.paths[file]
        records = _records(storage.read(path, start, stop - start), start, path)
        return records[record - int(self.firsts[file][chunk])]


def _index(path: str) -> tuple[Int64[np.ndarray, " chunks"], Int64[np.ndarray, " chunks"]]:
    """The starts of a file's chunks and their first records, each with the end; kept once read."""
    try:
        return tuple(storage.index(path, "records", lambda: np.stack(_footer(path))))
    except FileNotFoundError:
        raise UserError(f"{path} is not there: prepare the data set again") from None


def _footer(path: str) -> tuple[Int64[np.ndarray, " chunks"], Int64[np.ndarray, " chunks"]]:
    end = storage.size(path)
    last = max(end - _BLOCK, 0)
    tail = storage.read(path, last, end - last)
    try:
        where = _fields(_records(tail, last, path)[0])
        offset = where.get(1, 0)
        if where.get(2) != _MAGIC or not 0 < offset <= last:
            raise ValueError("no postscript")
        chunks = _records(storage.read(path, offset, last - offset), offset, path)[1:]
        found = [_fields(each) for each in chunks]
    except UserError:
        raise
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is no whole ArrayRecord file: prepare it again") from error
    starts = [each.get(1, 0) for each in found]
    counts = [each.get(3, 0) for each in found]
    return np.array([*starts, offset], np.int64), np.cumsum([0, *counts], dtype=np.int64)


class _Chunk(NamedTuple):
    kind: int
    count: int
    decoded: int
    data: memoryview


def _records(raw: bytes, offset: int, path: str) -> list[bytes]:
    """The records of the chunk that begins `raw`, which is at `offset` of the file.

    Raises:
      ValueError: it is damaged.
      UserError: it is of a kind that is not read.
    """
    try:
        chunk = _chunk(raw, offset)
        codec, at = chunk.data[0], 1
        if chunk.kind == ord("t") or codec == ord("s"):
            raise UserError(
                f"{path} has records that are transposed, or compressed by snappy, which are not "
                "read from a bucket: copy it to a disk, or write it with zstd"
            )
        if chunk.kind != ord("r"):
            raise ValueError("no records")
        length, at = _varint(chunk.data, at)
        sizes = _decompressed(codec, chunk.data[at : at + length])
        values = memoryview(_decompressed(codec, chunk.data[at + length :]))
    except (IndexError, struct.error, pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged at byte {offset}") from error
    ends = np.cumsum([0, *_varints(sizes)])
    if len(ends) != chunk.count + 1 or ends[-1] != len(values) or chunk.decoded != len(values):
        raise ValueError(f"{path} is damaged at byte {offset}")
    return [bytes(values[a:b]) for a, b in itertools.pairwise(ends)]


def _chunk(raw: bytes, offset: int) -> _Chunk:
    """Parses a chunk, leaving out the block headers in it."""
    parts, at = [], 0
    while at < len(raw):
        into = (offset + at) % _BLOCK
        if into == 0:
            at += _BLOCK_HEADER
            continue
        count = min(_BLOCK - into, len(raw) - at)
        parts.append(raw[at : at + count])
        at += count
    whole = memoryview(b"".join(parts))
    _, length, _, kind, decoded = _HEADER.unpack_from(whole)
    data = whole[_HEADER.size : _HEADER.size + length]
    if len(data) != length:
        raise ValueError("the chunk is cut off")
    return _Chunk(kind & 0xFF, kind >> 8, decoded, data)


def _decompressed(codec: int, data: memoryview) -> bytes:
    if codec == 0:
        return bytes(data)
    length, at = _varint(data, 0)
    if codec not in _CODECS:
        raise ValueError(f"codec {codec}")
    return _codec(codec).decompress(bytes(data[at:]), length, asbytes=True) if length else b""


@functools.cache
def _codec(codec: int) -> pyarrow.Codec:
    return pyarrow.Codec(_CODECS[codec])


def _varint(data: Sequence[int], at: int) -> tuple[int, int]:
    """A number in base 128, and where the next one begins."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _fields(message: bytes) -> dict[int, int]:
    """The numbers among the fields of a protocol buffer, by their tags."""
    found, at = {}, 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            found[key >> 3], at = _varint(message, at)
        elif key & 7 == 1:
            at += 8
        elif key & 7 == 2:
            length, at = _varint(message, at)
            at += length
        else:
            at += 4
    return found

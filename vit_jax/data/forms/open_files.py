"""Files, plain or compressed, read at any offset from any thread."""

import bz2
import collections
import gzip
import io
import lzma
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from vit_jax.data import storage
from vit_jax.errors import UserError


class OpenFiles:
    """Reads byte ranges of files, thread-safe; pickled as paths."""

    def __init__(self, paths: Iterable[str]):
        self.paths = tuple(paths)
        self._ranges: dict[int, bool] = {}
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getstate__(self):
        return self.paths

    def __setstate__(self, paths):
        self.__init__(paths)

    def _ranged(self, which: int) -> bool:
        """Whether a file is read by ranges, from a bucket."""
        if which not in self._ranges:
            path = self.paths[which]
            self._ranges[which] = storage.is_url(path) and not is_compressed(path)
        return self._ranges[which]

    def read(self, which: int, offset: int, size: int) -> bytes:
        """Reads `size` bytes at `offset` of file number `which`, decompressed if need be.

        Raises:
          UserError: the file cannot be read, or is too short.
        """
        if self._ranged(which):
            return storage.read(self.paths[which], offset, size)
        try:
            with self._lock:
                if which not in self._open:
                    self._open[which] = open_file(self.paths[which])
                    if len(self._open) > 256:  # systems allow 1,024, and others need some
                        self._open.popitem(last=False)  # closed when its last reader is done
                self._open.move_to_end(which)
                file = self._open[which]
                if not isinstance(file, io.FileIO):
                    file.seek(offset)
                    data = file.read(size)
            if isinstance(file, io.FileIO):
                data = os.pread(file.fileno(), size, offset)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{self.paths[which]} cannot be read: {error}") from None
        if len(data) != size:
            raise UserError(
                f"{self.paths[which]} ends before byte {offset + size}: it changed, or is cut off"
            )
        return data


class _Zstd(io.RawIOBase):
    """A decompressed Zstandard file; seeking back starts over."""

    def __init__(self, path: str):
        self._path = path
        self._start()

    def _start(self) -> None:
        import pyarrow

        self._stream, self._at = pyarrow.input_stream(self._path, compression="zstd"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end of a .zst is not known")
        offset += self._at if whence == io.SEEK_CUR else 0
        if offset < self._at:
            self._start()
        while self._at < offset and self.read(min(offset - self._at, 2**20)):
            pass
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


_DECOMPRESSORS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda path: io.BufferedReader(_Zstd(path), 2**17),
    b"\x50\x2a\x4d\x18": lambda path: io.BufferedReader(_Zstd(path), 2**17),  # pzstd's
}


def open_file(path: str) -> Any:
    """Opens a file, decompressed if need be; a plain file of a disk is an unbuffered io.FileIO."""
    if (opener := _decompressor(path)) is not None:
        return opener(storage.local(path))
    return storage.opened(path) if storage.is_url(path) else open(path, "rb", buffering=0)


def is_compressed(path: str) -> bool:
    """Whether a file is compressed, so that it has to be read from its start."""
    return _decompressor(path) is not None


def _decompressor(path: str) -> Callable[[str], Any] | None:
    start = storage.start(path, 5)
    return next((found for magic, found in _DECOMPRESSORS.items() if start.startswith(magic)), None)

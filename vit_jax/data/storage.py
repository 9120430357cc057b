"""Files of data, on disks and in buckets: listed, read whole, or by ranges.

A path is a disk's, or a URL such as gs://BUCKET/FOLDER/FILE. The folders of buckets are listed
once by each process, and what is read is of the version that was listed.
"""

import concurrent.futures
import contextlib
import errno
import fnmatch
import functools
import glob
import gzip
import hashlib
import io
import logging
import os
import posixpath
import re
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.cache import Cache, checksum
from vit_jax.errors import UserError
from vit_jax.objects import Entry as Listed
from vit_jax.objects import Objects, cache, check
from vit_jax.writing import replacing

logger = logging.getLogger(__name__)

_AHEAD = 2**20  # bytes that one request brings where a file is read from its start
_MANY = 64 * 2**20  # bytes of a piece of a whole file; of larger ones the copying is told
_START = 32  # bytes that tell the kind of a file
_SCHEME = re.compile(r"\w+://")
_CACHE: Cache | None = None
_LISTINGS: dict[str, dict[str, Listed]] = {}
_LOCK, _LOCKS = threading.Lock(), {}


def is_url(path: str) -> bool:
    """Whether a path is that of a bucket."""
    return _SCHEME.match(path) is not None


def keep(where: str | None) -> None:
    """Has this process keep what it reads from buckets: "DIR,100GB" (see `cache.Cache.of`)."""
    global _CACHE
    if where is None or _CACHE is None or where != _CACHE.where:
        _CACHE = None if where is None else Cache.of(where)


def exists(path: str) -> bool:
    """Whether a file or a folder is there."""
    return is_file(path) or is_folder(path) if is_url(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
    """Whether a folder is there."""
    return bool(_listed(path.rstrip("/"))) if is_url(path) else os.path.isdir(path)


def is_file(path: str) -> bool:
    """Whether a file is there."""
    if not is_url(path):
        return os.path.isfile(path)
    found = _find(path)
    return found is not None and found.size is not None


def plain_size(path: str) -> int | None:
    """The size of a plain file in bytes; None of a folder, device or the like.

    Raises:
      OSError: nothing is there, or it cannot be looked at.
    """
    if is_url(path):
        return _version(path).size
    found = os.stat(path)
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def size(path: str) -> int:
    """The size of a file in bytes.

    Raises:
      OSError: there is no such file, or it cannot be looked at.
    """
    return _version(path).size if is_url(path) else os.path.getsize(path)


def version(path: str) -> str:
    """What changes when a file does: of a bucket its generation, of a disk size and time."""
    if is_url(path):
        return f"{path} {_version(path).generation.hex()}"
    found = os.stat(path)
    return f"{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns}"


def names(path: str) -> list[str]:
    """The names in a folder, sorted.

    Raises:
      OSError: there is no such folder.
    """
    return sorted(_listed(path.rstrip("/"))) if is_url(path) else sorted(os.listdir(path))


class Entry(NamedTuple):
    """A file or folder of a bucket, with what `files` uses of an os.DirEntry."""

    name: str
    path: str
    folder: bool

    def is_dir(self) -> bool:
        return self.folder


def scan(path: str) -> list[os.DirEntry] | list[Entry]:
    """What is in a folder, sorted by name.

    Raises:
      OSError: there is no such folder, or it cannot be listed.
    """
    if not is_url(path):
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    path = path.rstrip("/")
    listed = sorted(_listed(path).items())
    return [Entry(name, f"{path}/{name}", found.size is None) for name, found in listed]


def files(path: str) -> dict[str, int]:
    """The names and sizes of the files in a folder; of none, nothing."""
    if is_url(path):
        listed = _listed(path.rstrip("/")).items()
        return {name: found.size for name, found in listed if found.size is not None}
    try:
        with os.scandir(path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except OSError:
        return {}


def matches(pattern: str, recursive: bool = False) -> list[str]:
    """The paths that a pattern with *, ? or [...] matches, sorted; of a URL, in its last part.

    Hidden names match only patterns that begin with a full stop.

    Args:
      recursive: whether ** is any depth, on a disk.

    Raises:
      UserError: a pattern of folders, or of any depth, in a bucket.
    """
    if not is_url(pattern):
        return sorted(glob.glob(pattern, recursive=recursive))
    folder, _, name = pattern.rpartition("/")
    if glob.has_magic(folder) or "**" in name:
        raise UserError(f"{pattern}: in a bucket, a pattern is of names in one folder")
    return [
        f"{folder}/{each}"
        for each in sorted(_listed(folder))
        if fnmatch.fnmatchcase(each, name) and each.startswith(".") <= name.startswith(".")
    ]


def list_ahead(folders: Sequence[str]) -> None:
    """Lists folders of a bucket at once, rather than one after the other."""
    if any(map(is_url, folders)):
        list(_pool().map(_listed, folders))


def read(path: str, at: int = 0, length: int | None = None) -> bytes:
    """Reads a file, or `length` bytes of it from `at` on.

    Of a bucket, the cache is asked first (see `keep`).

    Raises:
      OSError: a disk's file cannot be read.
      UserError: a bucket's file is not there, changed since it was listed, or is too short.
      Unreachable: the store does not answer.
    """
    if not is_url(path):
        with open(path, "rb") as file:
            file.seek(at)
            return file.read(-1 if length is None else length)
    whole = _version(path)
    length = whole.size - at if length is None else length
    if at + length > whole.size:
        raise UserError(f"{path} ends before byte {at + length}: it changed, or is cut off")
    if length <= 0:
        return b""
    key = f"{version(path)} {at} {length}"
    if _CACHE is not None and (kept := _CACHE.get(key)) is not None and len(kept) == length:
        return kept
    bucket, name = _place(path)
    content, generation = _bucket(bucket).read_range(name, at, length)
    if content is None or generation != whole.generation:
        raise UserError(f"{path} changed since it was listed: start again")
    if _CACHE is not None:
        _CACHE.put(key, content)
    return content


def start(path: str, count: int) -> bytes:
    """The first bytes of a file, at most `count`, which is at most 32; raises as `read`."""
    return (_start(path) if is_url(path) else read(path, 0, _START))[:count]


@functools.lru_cache(2**16)
def _start(url: str) -> bytes:
    return read(url, 0, min(_START, size(url)))


def opened(path: str) -> io.IOBase:
    """A file to read in binary, with `seek`; of a bucket, in pieces of a megabyte."""
    if not is_url(path):
        return open(path, "rb")
    return io.BufferedReader(_Ranges(path), _AHEAD)


def local(path: str) -> str:
    """The path of a whole file on this machine: of a bucket's, of a copy in $VIT_JAX_CACHE.

    Raises:
      OSError, UserError, Unreachable: as `read`.
    """
    if not is_url(path):
        return path
    copy = kept(path, os.path.basename(path))
    if not copy.is_file():
        if size(path) > _MANY:
            logger.info("%s (%.1f GB) is copied to %s", path, size(path) / 1e9, copy)
        pieces = range(0, size(path), _MANY)
        write_kept(copy, (read(path, at, min(_MANY, size(path) - at)) for at in pieces))
    return str(copy)


def index(path: str, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` returns, an array about a file, kept in $VIT_JAX_CACHE for this version of it."""

    def content() -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, make())
        return buffer.getvalue()

    return np.load(io.BytesIO(_made_once(path, f"{name}.npy", content)), allow_pickle=False)


def text(path: str, name: str, make: Callable[[], str]) -> str:
    """What `make` returns, a text about a file, kept in $VIT_JAX_CACHE for this version of it."""
    packed = _made_once(path, f"{name}.gz", lambda: gzip.compress(make().encode(), 5))
    return gzip.decompress(packed).decode()


def _made_once(path: str, name: str, make: Callable[[], bytes]) -> bytes:
    where = kept(path, name)
    with contextlib.suppress(OSError):
        found, content = (known := where.read_bytes())[:4], known[4:]
        if found == checksum(content):
            return content
    content = make()
    try:
        write_kept(where, [checksum(content), content])
    except (OSError, UserError) as error:
        logger.warning("the index of %s is not kept: %s", path, error)
    return content


def kept(path: str, name: str) -> Path:
    """Where what is known of a file is kept in $VIT_JAX_CACHE, apart for each version of it."""
    digest = hashlib.sha256(os.fsencode(version(path))).hexdigest()[:32]
    return cache() / "data" / digest / name


def write_kept(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file as a whole, though other processes may do so at once."""
    with replacing(path, f"{path}.{os.getpid()}.{threading.get_ident()}") as temporary:
        with open(temporary, "wb") as file:
            file.writelines(pieces)


class _Ranges(io.RawIOBase):
    """A file of a bucket, read by ranges."""

    def __init__(self, path: str):
        self._path, self._size, self._at = path, size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._size - self._at), 0)
        buffer[:count] = read(self._path, self._at, count)
        self._at += count
        return count


def listings() -> dict[str, dict[str, Listed]]:
    """What this process has listed, for worker processes, which are to read the same versions."""
    return _LISTINGS


def know(listed: dict[str, dict[str, Listed]]) -> None:
    """Takes over what another process has listed."""
    for folder, found in listed.items():
        _LISTINGS.setdefault(folder, found)


def forget() -> None:
    """Lists anew, and connects anew, whatever is read next."""
    _LISTINGS.clear()
    for known in (_bucket, _start):
        known.cache_clear()


def _listed(folder: str) -> dict[str, Listed]:
    folder = check(_clean(folder), whole=True)
    if folder not in _LISTINGS:
        with _LOCK:
            lock = _LOCKS.setdefault(folder, threading.Lock())
        with lock:  # of several threads, one lists
            if folder not in _LISTINGS:
                bucket, inside = _place(folder)
                _LISTINGS[folder] = _bucket(bucket).folder(inside)
    return _LISTINGS[folder]


def _clean(path: str) -> str:
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{posixpath.normpath(rest)}"


@functools.cache
def _bucket(url: str) -> Objects:
    return Objects(url)


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(64, "list")


def _place(path: str) -> tuple[str, str]:
    """The URL of a bucket, and a name in it."""
    scheme, _, rest = _clean(path).partition("://")
    bucket, _, name = rest.partition("/")
    return f"{scheme}://{bucket}", name


def _find(path: str) -> Listed | None:
    folder, _, name = _clean(path).rpartition("/")
    return _listed(folder).get(name)


def _version(path: str) -> Listed:
    found = _find(path)
    if found is None or found.size is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return found

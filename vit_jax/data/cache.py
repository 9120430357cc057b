"""A folder that keeps what was read from buckets, up to a size, shared by processes."""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import threading
import time
import zlib
from pathlib import Path

from vit_jax.errors import UserError, check_refused

logger = logging.getLogger(__name__)

NAME = "vit_jax_data"  # of the folder in the one that the user names
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNUSED = 24 * 3600.0  # seconds after which an entry makes room for others
_TOUCHED = 3600.0  # seconds within which a use is not noted again
_LEFT_FREE = 256 * 2**20  # bytes of disk


def parse(where: str) -> tuple[Path, int]:
    """Parses "DIR,100GB" to a folder and bytes.

    Raises:
      UserError: another form.
    """
    match = re.fullmatch(r"(.+),(\d+(?:\.\d+)?)(MB|GB|TB)", where)
    if match is None:
        raise UserError(
            f"data.cache is {where!r}; expected a folder and its largest size, such as "
            "/tmp/images,100GB (MB, GB or TB)"
        )
    return Path(match[1]).expanduser(), int(float(match[2]) * _UNITS[match[3]])


def checksum(content: bytes) -> bytes:
    """The four bytes that are kept before a content."""
    return zlib.crc32(content).to_bytes(4, "little")


class Cache:
    """Pieces of files, each with a checksum, in a folder of their own of at most `limit` bytes.

    Processes share the folder. Each counts what is there anew whenever it has added a hundredth of
    the limit, so n of them may exceed it by n hundredths. In a full cache, entries that nobody has
    used for a day make room; otherwise nothing is added, as each epoch reads everything once, and
    whatever was replaced would be missed.
    """

    def __init__(self, folder: Path, limit: int, where: str):
        self.folder, self.limit, self.where = folder, limit, where
        self._lock = threading.Lock()
        self._total = self._count()
        self._counting = False
        self._added, self._full_since = 0, -_TOUCHED

    @classmethod
    def of(cls, where: str) -> "Cache":
        """A cache by its folder and size, as in "/tmp/images,100GB".

        Raises:
          UserError: another form, or a folder that cannot be made or written to.
        """
        folder, limit = parse(where)
        folder /= NAME  # what else the user has there is not touched
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return cls(folder, limit, where)
        except OSError as error:
            check_refused(error, folder)
            raise UserError(f"data.cache: {folder} cannot be used: {error.strerror}") from None

    def get(self, key: str) -> bytes | None:
        """What is kept under a key; None if nothing is, or it is damaged."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                content = file.read()
                age = time.time() - os.fstat(file.fileno()).st_mtime
            if age > _TOUCHED:
                os.utime(path)
        except OSError:
            return None
        if content[:4] == checksum(content[4:]):
            return content[4:]
        logger.warning("%s is damaged, and read anew", path)
        return None

    def put(self, key: str, content: bytes) -> None:
        """Keeps something, if there is room; a disk that is full or fails is a warning."""
        path, count = self._path(key), len(content) + 4
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            if not self._has_room(count):
                return
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(checksum(content) + content)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._stop(f"cannot be written to ({os.strerror(error.errno or errno.EIO)})")

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(os.fsencode(key)).hexdigest()
        return self.folder / name[:2] / name[2:40]

    def _has_room(self, count: int) -> bool:
        with self._lock:
            if self._counting or time.monotonic() - self._full_since < _TOUCHED:
                return False
            full = self._total + count > self.limit
            self._counting = mine = full or self._added > self.limit // 100
        if mine:  # while the other threads go on without adding anything
            try:
                total = self._count()
                if total + count > self.limit:
                    total = self._count(but_unused=True)
                self._total, self._added = total, 0
            finally:
                self._counting = False
        with self._lock:
            if self._total + count > self.limit:
                self._stop(f"is full, with {self._total / 1e6:,.0f} MB")
                return False
            if shutil.disk_usage(self.folder).free < count + _LEFT_FREE:
                self._stop("is on a disk that is nearly full")
                return False
            self._total += count
            self._added += count
            return True

    def _stop(self, why: str) -> None:
        logger.warning("data.cache: %s %s: nothing is added for an hour", self.folder, why)
        self._full_since = time.monotonic()

    def _count(self, but_unused: bool = False) -> int:
        """The bytes of all entries; those that were not used for a day can be removed first."""
        total, now = 0, time.time()
        for folder in self.folder.iterdir():
            for path in folder.iterdir():
                with contextlib.suppress(OSError):  # another process removed it, or it is another's
                    found = path.stat()
                    if but_unused and now - found.st_mtime > _UNUSED:
                        path.unlink()
                    else:
                        total += found.st_size
        return total

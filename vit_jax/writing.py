"""Writing to disk: files atomically, folders with parents, nothing among foreign files."""

import contextlib
import errno
import fnmatch
import os
import re
from collections.abc import Iterable, Iterator

from vit_jax.errors import UserError
from vit_jax.objects import Objects

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a write raises, with no name


@contextlib.contextmanager
def replacing(path: str | os.PathLike, temporary: str | None = None) -> Iterator[str]:
    """Yields a temporary path to write to, which then replaces the file `path`, on disk as a whole.

    Missing parent folders are made, and the file has the mode of the user's umask, whatever wrote
    it. If the body raises, the file is as it was before; a kill leaves at most the temporary.

    Args:
      temporary: a path in the same folder; by default .NAME.tmp.

    Raises:
      OSError: with the name of the file itself, not of the temporary.
      UserError: a part of the path is a file, or the path is a folder.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; expected the name of a file")
    make_folder(folder or ".")
    temporary = temporary or os.path.join(folder, f".{name}.tmp")
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # safetensors writes for the owner alone
        os.replace(temporary, path)
    except OSError as error:
        unnamed = error.filename is None and error.errno in _FULL
        if error.filename != temporary and not unnamed:
            raise
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a whole file, as `replacing` does; text as UTF-8, with what is no text escaped."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")  # names of files may be no text
    if "://" in os.fspath(path):  # a bucket, where writing is atomic
        folder, name = os.path.split(os.fspath(path))
        Objects(folder).replace(name, content)
        return
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


def make_folder(path: str | os.PathLike, flag: str = "") -> None:
    """Makes a folder, with its parents, unless it is there.

    Args:
      flag: the flag that named it, for the error.

    Raises:
      UserError: it or one of its parents is a file.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        there = os.fspath(path)
        while there and not os.path.lexists(there):
            there = os.path.dirname(there)
        known = "a file" if os.path.exists(there) else "a broken link"
        must = f"{flag} must be a folder" if flag else "expected a folder"
        raise UserError(f"{there} is {known}; {must}") from None


def check_own(path: str | os.PathLike, own: Iterable[str], what: str) -> None:
    """Raises a UserError if a folder holds anything that is not ours to overwrite or lie beside.

    Args:
      own: patterns of the names that may be there; hidden files always may.
      what: what would be written there, such as "a run".
    """
    if os.path.isdir(path):
        check_names(path, os.listdir(path), own, what)


def check_names(
    path: str | os.PathLike, there: Iterable[str], own: Iterable[str], what: str
) -> None:
    """As `check_own`, of a folder that holds these names."""
    own = tuple(own)
    there = sorted(name for name in there if not name.startswith("."))
    foreign = [name for name in there if not any(fnmatch.fnmatchcase(name, each) for each in own)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        raise UserError(
            f"{os.fspath(path)} holds {foreign[0]}{more}, which is not part of {what}: name a new "
            "or an empty folder"
        )


def check_text(path: str | os.PathLike) -> None:
    """Raises a UserError if a path is not UTF-8, as the libraries that write there need it."""
    if re.search("[\ud800-\udfff]", os.fspath(path)):
        raise UserError(f"{os.fspath(path)} is not UTF-8 text: rename it, or choose another folder")

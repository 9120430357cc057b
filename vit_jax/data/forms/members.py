"""Lists the files in a tar or zip with their offsets, following links, without unpacking."""

import functools
import io
import lzma
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vit_jax.data import storage
from vit_jax.data.forms.layout import out_of_the_way
from vit_jax.data.forms.open_files import open_file
from vit_jax.data.images import sniff
from vit_jax.errors import UserError, check_refused

_FOREIGN = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"\x1f\x9d": "compressed by compress (.Z)",
    b"LZIP": "compressed by lzip",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (`git lfs pull`)",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}
_ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
# Compression methods of zips that are not read, by number.
_METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd"}


class Member(NamedTuple):
    """A file in an archive, or a link to one.

    Attributes:
      name: the path in the archive.
      outer: the path of the inner tar that has it, without ".tar"; or "".
      offset: the position of its bytes in the archive.
      size: their number.
      read: reads the first n bytes; only valid until the next member.
      deflated: the compressed size in a zip; -1 if stored.
      crc: the checksum of its bytes in a zip; else -1.
      holes: for a sparse file in a tar, the (start, length) of the parts that are stored.
      link: the target of a link, which may not exist.
      why: why it cannot be read.
    """

    name: str
    outer: str
    offset: int = 0
    size: int = 0
    read: Callable[[int], bytes] = lambda n: b""
    deflated: int = -1
    crc: int = -1
    holes: tuple[tuple[int, int], ...] | None = None
    link: str | None = None
    why: str | None = None

    @property
    def path(self) -> str:
        """The path, with inner tars as folders."""
        return f"{self.outer}/{self.name}" if self.outer else self.name


def is_zip(path: str) -> bool:
    """Whether a file is a zip, by its first bytes."""
    return storage.start(path, 4) in _ZIP


def members(path: str) -> Iterator[Member]:
    """Every file in a tar and in the tars inside it, or in a zip.

    Links come last, with the offset of their target in the same archive. Links to nothing, devices
    and the like have `why`.

    Raises:
      UserError: another file, one that is cut off or damaged, or an encrypted zip.
    """
    links: dict[str, Member] = {}
    for member in _members(path):
        if member.link is None:
            yield member
        else:
            links[posixpath.normpath(member.path)] = member
    if links:
        yield from _linked(path, links)


def _members(path: str) -> Iterator[Member]:
    start = storage.start(path, 32)
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise UserError(f"{path} is {what}; tar, tar.gz, .bz2, .xz, .zst and zip are read")
    if sniff(start):
        raise UserError(f"{path} is an image ({sniff(start)}); an archive or a folder was expected")
    zipped = start.startswith(_ZIP)
    try:
        yield from _zip_members(path) if zipped else _tar_members(path)
    except UserError:
        raise
    except (
        *(tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, lzma.LZMAError, zlib.error),
        *(ValueError, RecursionError, MemoryError, OverflowError, struct.error, RuntimeError),
    ) as error:
        check_refused(error, path)
        kind = "zip" if zipped else "tar"
        raise UserError(f"{path} is no whole {kind} archive: {error}") from None


def _linked(path: str, links: dict[str, Member]) -> Iterator[Member]:
    """Yields the links with the offsets of their targets, reading the archive again."""
    wanted: dict[str, list[str]] = {}
    for link in links:
        target, seen = link, set()
        while target in links and target not in seen:
            seen.add(target)
            target = links[target].link
        if target in seen:
            yield links[link]._replace(why="a link in a circle")
        else:
            wanted.setdefault(target, []).append(link)
    found = set()
    for member in _members(path):
        if member.link is not None:
            continue
        whole = folder = posixpath.normpath(member.path)
        while folder not in ("", "/"):  # a link may be to any folder that it is in
            for link in wanted.get(folder, ()):
                if not link.startswith(f"{folder}/"):
                    found.add(link)
                    name = links[link].name + whole[len(folder) :]
                    yield member._replace(name=name, outer=links[link].outer)
            folder = posixpath.dirname(folder)
    for target, each in wanted.items():
        out = target.startswith(("../", "/"))
        for link in each:
            if target == "." or link.startswith(f"{target}/"):
                yield links[link]._replace(why="a link to a folder that it is in")
            elif link not in found:
                why = "a link out of the archive" if out else "a link to nothing"
                yield links[link]._replace(why=why)


def _tar_members(path: str) -> Iterator[Member]:
    with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as outer:
        for member in _headers(outer):
            tar = member.isreg() and member.name.lower().endswith(".tar")
            if not tar or out_of_the_way(member.name):
                yield _tar_member(outer, member)
                continue
            name = member.name[: -len(".tar")]
            if member.issparse():
                raise UserError(f"{path}: {member.name} in it is sparse, which is not read")
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                for one in _headers(inner):
                    yield _tar_member(inner, one, name, member.offset_data)


def _headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yields the headers of all entries but folders."""
    for member in archive:
        archive.members.clear()  # tarfile would keep them all, 1 KB for each
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
        if not member.isdir():
            yield member
    # At a damaged header, tarfile stops as at the end of the archive.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {archive.offset}")


def _tar_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, outer: str = "", start: int = 0
) -> Member:
    if not (member.isreg() or member.issym() or member.islnk()):
        return Member(member.name, outer, why="no plain file")
    if not member.isreg():
        base = os.path.dirname(member.name) if member.issym() else ""
        link = posixpath.normpath(posixpath.join(outer, base, member.linkname))
        return Member(member.name, outer, link=link)
    read = functools.partial(_read_tar, archive, member)
    holes = tuple(member.sparse) if member.issparse() else None
    at = start + member.offset_data
    return Member(member.name, outer, at, member.size, read, holes=holes)


def _read_tar(archive: tarfile.TarFile, member: tarfile.TarInfo, n: int) -> bytes:
    return archive.extractfile(member).read(min(member.size, n))


def _zip_members(path: str) -> Iterator[Member]:
    with (
        storage.opened(path) as file,
        storage.opened(path) as headers,
        zipfile.ZipFile(file) as archive,
    ):
        for info in archive.infolist():
            name = _zip_name(info)
            if name.endswith("/"):
                continue
            if info.flag_bits & 0x2041:
                raise UserError(f"{path} is encrypted ({name}): unpack it with its password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                method = _METHODS.get(info.compress_type, f"method {info.compress_type}")
                raise UserError(
                    f"{path}: {name} is compressed by {method}, not by deflate: unpack it"
                )
            read = functools.partial(_read_zip, archive, info)
            if stat.S_ISLNK(info.external_attr >> 16):
                target = os.fsdecode(read(4096))
                link = posixpath.normpath(posixpath.join(os.path.dirname(name), target))
                yield Member(name, "", link=link)
                continue
            yield Member(
                *(name, "", _data_offset(headers, info), info.file_size, read),
                deflated=info.compress_size if info.compress_type else -1,
                crc=info.CRC,
            )


def _data_offset(raw: io.BufferedIOBase, info: zipfile.ZipInfo) -> int:
    """The offset of a file's bytes, behind its local header."""
    raw.seek(info.header_offset)
    header = raw.read(30)
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise zipfile.BadZipFile(f"no header at byte {info.header_offset}")
    return info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Its path, with slashes, in UTF-8 where it is that, though not marked so (as macOS does)."""
    name = info.filename
    if not info.flag_bits & 0x800 and not name.isascii():
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    return name if "/" in name else name.replace("\\", "/")


def _read_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo, n: int) -> bytes:
    with archive.open(info) as file:
        return file.read(n)

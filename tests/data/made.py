"""Images, files and archives that the tests of data write."""

import io
import re
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import simplejpeg

from vit_jax.errors import UserError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def saved(image, kind, **options):
    """The bytes of an image file, of a Pillow image or of pixels."""
    out = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name, content, wrong=0):
    """A part of a PNG; its checksum may be wrong."""
    checksum = zlib.crc32(name + content) ^ wrong
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png_of(w, h, pixels=b"", before=b"", after=b"", kind=2):
    """A PNG that claims to be of that size, with more chunks before its pixels and after."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, kind, 0, 0, 0))
    content = header + before + chunk(b"IDAT", zlib.compress(pixels)) + after
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def turned(orientation):
    """An EXIF block."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return exif


def jpeg(number):
    """A grey image as bright as its number, with it as text behind; all differ."""
    return simplejpeg.encode_jpeg(np.full((8, 8, 3), number % 256, np.uint8), 90) + b"%d" % number


def written(path, content):
    """Writes bytes, text or a table; the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pyarrow.Table):
        pyarrow.parquet.write_table(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def numbered(members):
    """{name: bytes}; of names alone, the images `jpeg` of their places."""
    if isinstance(members, dict):
        return members
    return {name: jpeg(number) for number, name in enumerate(members)}


def tree(root, members):
    """Writes files into a folder."""
    for name, data in numbered(members).items():
        written(root / name, data)
    return root


def packed(members, mode="w", links=()):
    """A tar of files, and of links (name, target): symbolic ones if it starts with @."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in numbered(members).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in dict(links).items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE if target.startswith("@") else tarfile.LNKTYPE
            member.linkname = target.removeprefix("@")
            archive.addfile(member)
    return out.getvalue()


def zipped(members, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in numbered(members).items():
            archive.writestr(name, data)
    return out.getvalue()


def refused(call, cases, error=UserError):
    """`call(*case)` raises for each case; a pattern of its message is the case's last part."""
    for *case, message in cases:
        try:
            call(*case)
        except error as raised:
            assert re.search(message, str(raised)), f"{case}: {raised}"
        else:
            pytest.fail(f"{case} is not refused: expected {message}")

"""Images, files and archives that the tests of data write."""

import io
import re
import tarfile
import zipfile

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

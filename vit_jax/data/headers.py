"""Reads the headers of image files: format, orientation, size."""

import re
import struct
import zlib
from collections.abc import Iterator

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"


def _table(patterns: dict[bytes, str]) -> dict[re.Pattern[bytes], str]:
    return {re.compile(pattern, re.DOTALL): name for pattern, name in patterns.items()}


_MAGIC = _table(
    {
        _JPEG: "JPEG",
        _PNG: "PNG",
        rb"RIFF....WEBP": "WEBP",
        rb"GIF8[79]a": "GIF",
        rb"BM.{4}\0{4}....[\x0c(4@lx|8]\0{3}": "BMP",  # the sizes of its second header
        rb"(II[*+]\0|MM\0[*+])(?!....CR\x02)": "TIFF",
        rb"P[1-6][\s#]": "PPM",
        rb"....ftyp(avi[fs]|mi[fa]f1.{4}.*avif)": "AVIF",
    }
)
_PICTURES = _table(
    {
        rb"....ftyp(hei|hev|mif|miaf|msf)": "HEIC",
        rb"....ftypcrx |II.{6}CR\x02|FUJIFILMCCD": "a camera's raw file",
        rb"\xff\x0a|\0{3}\x0cJXL ": "JPEG XL",
        rb"\xff\x4f\xff\x51|\0{3}\x0cjP  ": "JPEG 2000",
        rb"\W*(<\?xml.*?)?<svg\b": "an SVG drawing",
        rb"8BPS": "a Photoshop file",
        rb"v/1\x01": "OpenEXR",
        rb"PF\s": "a PFM of floats",
        rb"\0\0[\x01\x02]\0": "an icon",
        rb"%PDF-": "a PDF",
        rb".{128}DICM": "DICOM",
    }
)
_OTHERS = _table(
    {
        rb"$": "empty",
        rb"version https://git-lfs\.": "a pointer of Git LFS: `git lfs pull` fetches the file",
        rb"\W*(<!--.*?-->\s*)?<(?i:!doctype html|html|head|body)\b": "a web page, not an image",
        rb"....ftyp": "a video, or another file of MP4's kind",
        rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!": "an archive, not an image",
        rb"\x93NUMPY": "an array of NumPy, not an image",
        rb"\0{32}": "zeros from its start, as a file that was not written to its end",
    }
)
# Other chunks with a wrong checksum are kept, as their name may be what is damaged.
_ANCILLARY = frozenset(
    b"tEXt zTXt iTXt iCCP gAMA cHRM sRGB sBIT pHYs tIME bKGD hIST sPLT tRNS eXIf acTL fcTL fdAT "
    b"cICP mDCV cLLI oFFs pCAL sCAL".split()
)
# Those with an orientation.
_TURNING = (
    *(b"eXIf", b"iTXtXML:com.adobe.xmp\0\0"),
    *(b"zTXtRaw profile type exif\0", b"tEXtRaw profile type exif\0"),
)
_ORIENTATION = 0x0112  # the EXIF tag


def _match(table: dict[re.Pattern[bytes], str], data: bytes) -> str | None:
    return next((name for magic, name in table.items() if magic.match(data)), None)


def sniff(start: bytes) -> str | None:
    """The format by the first bytes of a file (32 are enough), None if it is not in FORMATS."""
    return _match(_MAGIC, start)


def unread(data: bytes) -> str:
    """Describes a file that could not be decoded, to follow "it is"."""
    for kind, start, end in segments(data):
        if kind in (0xC0, 0xC1, 0xC2) and end > start and data[start] != 8:
            return f"JPEG of {data[start]} bits, which is not read: save it with 8"
    data = data[:512]
    if known := sniff(data):
        hint = "; save it with unsigned pixels of 8 or 16 bits" if known == "TIFF" else ""
        return f"{known}, but damaged or of a kind that is not read{hint}"
    if picture := _match(_PICTURES, data):
        return f"{picture}, which is not read: save it as JPEG or PNG"
    return _match(_OTHERS, data) or "of no known format"


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, start, end) of the segments of a JPEG up to and including its first scan.

    Stops early at damaged segments.
    """
    at = 2
    while data[:3] == _JPEG and at + 4 <= len(data) and data[at] == 0xFF:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if not at + 4 <= end <= len(data):
            return
        yield data[at + 1], at + 4, end
        if data[at + 1] == 0xDA:
            return
        at = end


def height_at(data: bytes) -> int | None:
    """The offset of a JPEG's height; None if progressive, CMYK, or with restart markers."""
    for kind, start, end in segments(data):
        if kind in (0xC0, 0xC1):
            return start + 1 if end - start > 5 and data[start + 5] in (1, 3) else None
        if kind == 0xDD or (0xC2 <= kind <= 0xDA and kind not in (0xC4, 0xD8)):
            return None
    return None


def jpeg_orientation(data: bytes) -> int | None:
    """The EXIF orientation of a JPEG, 1 if it has none; None if Pillow has to read it."""
    orientation, kind = None, 0
    for kind, start, end in segments(data):
        if kind != 0xE1:
            continue
        if data.startswith(b"Exif\0\0", start):
            if orientation is not None:
                return None
            orientation = _exif_orientation(data[start + 6 : end])
            if orientation is None:
                return None
        elif data.find(b"tiff:Orientation", start, end) >= 0:  # in XMP
            return None
    return (orientation or 1) if kind == 0xDA else None


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation in an EXIF block; 0 if it has none, None if it is unusual or damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    if at < 8 or at + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, at)
    entries = exif[at + 2 : at + 2 + 12 * count]
    if len(entries) != 12 * count:
        return None
    found = 0
    for tag, kind, number, value in struct.iter_unpack(f"{order}HHIH2x", entries):
        if tag == _ORIENTATION:
            if (kind, number) != (3, 1):
                return None
            found = value
    return found


def bare(data: bytes) -> bytes | None:
    """A JPEG or PNG without its metadata, which may be damaged or too long for Pillow.

    None for other files.
    """
    if data.startswith(_PNG):
        return _bare_png(data)
    if not data.startswith(_JPEG):
        return None
    kept, end = [data[:2]], 2
    for kind, start, end in segments(data):
        # Keep JFIF's and Adobe's segments, which define the colours.
        least = {0xE0: 14, 0xEE: 12}.get(kind, 2**16)
        if not (0xE0 <= kind <= 0xEF or kind == 0xFE) or end - start >= least:
            kept.append(data[start - 4 : end])
    return b"".join([*kept, data[end:]])


def _bare_png(data: bytes) -> bytes:
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        chunk, name = data[at:end], data[at + 4 : at + 8]
        sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        dropped = name in _ANCILLARY or (sound and name[0] & 0x20)
        if end > len(data) or not dropped or (sound and chunk.startswith(_TURNING, 4)):
            kept.append(chunk)
        at = end
    return b"".join([*kept, data[at:]])

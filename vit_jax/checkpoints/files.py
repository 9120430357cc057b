"""Reads and writes weight files; files are untrusted input.

The format is detected from the contents, not from the name. Names, shapes and types are checked
against the size of the file before anything is allocated; nothing is ever unpickled.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float32, Shaped

from vit_jax.checkpoints import flax_files, shards
from vit_jax.errors import UserError, check_refused, nearest
from vit_jax.writing import replacing, write_atomically

WEIGHTS = (".npz", ".safetensors")
_FLAX = ".msgpack"  # read, not written
_FLOATS = ("float32", "float16", "bfloat16", "float64")
_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
# Weights hardly compress: a file with a higher ratio is a zip bomb.
_MOST_UNPACKED, _UNPACKED_ANYWAY = 20, 64 << 20
_LONGEST_HEADER = 12_000  # NumPy itself reads no .npy header longer than 10,000 bytes
_BROKEN = (
    *(safetensors.SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, struct.error),
    *(ValueError, TypeError, LookupError, OverflowError, NotImplementedError, RuntimeError),
)


_PACKED = "compressed ({}): unpack it first"
_MARKS = {
    b"\x89HDF": "HDF5, as Keras (.h5) has it",
    b"GGUF": "GGUF, quantised for llama.cpp",
    b"\x1f\x8b": _PACKED.format("gzip"),
    b"\x28\xb5\x2f\xfd": _PACKED.format("zstandard"),
    b"\xfd7zXZ": _PACKED.format("xz"),
    b"BZh": _PACKED.format("bzip2"),
    b"7z\xbc\xaf": _PACKED.format("7-Zip"),
    b"\x93NUMPY": "a single array of NumPy (.npy)",
}
_ENDINGS = {
    ".onnx": "an ONNX program, not weights by their names: run it in ONNX Runtime",
    ".stablehlo": "a program of JAX, not weights by their names: run it by jax.export.deserialize",
    ".tflite": "a TensorFlow Lite program",
    ".pb": "a program of TensorFlow",
    ".h5": _MARKS[b"\x89HDF"],
    ".keras": "a Keras archive of HDF5",
    ".gguf": _MARKS[b"GGUF"],
    ".gz": _PACKED.format("gzip"),
    ".zst": _PACKED.format("zstandard"),
    ".zip": "a zip archive: unpack it first",
    ".pt2": "a program exported by PyTorch (.pt2)",
}
_FOLDERS = {
    "saved_model.pb": "a TensorFlow SavedModel",
    "_CHECKPOINT_METADATA": "an Orbax checkpoint, without the run folder that says what it is of",
    "_METADATA": "an Orbax checkpoint, without the run folder that says what it is of",
    "manifest.ocdbt": "an Orbax checkpoint, without the run folder that says what it is of",
    "checksums.json": "one checkpoint of a run folder: name the run folder, two above it",
}
# Zip archives other than .npz, by a member's name.
_ZIPS = {
    "model.weights.h5": _ENDINGS[".keras"],
    "archive_format": _ENDINGS[".pt2"],
    "serialized_exported_program.json": _ENDINGS[".pt2"],
    ".npz": _ENDINGS[".zip"],
    ".safetensors": _ENDINGS[".zip"],
}


class Weights:
    """Named arrays in one or several files, read on demand.

    Attributes:
      shapes: of every array, by its name in the file.
      dtypes: their names, such as "bfloat16".
      card: the metadata that `vit_jax.save` wrote with them, {} for other files.
      stale: whether there is such metadata, but it belongs to other weights.
      config, preprocessor: the config.json and preprocessor_config.json of the folder, {} if none.
      before: the prefix that was taken off all names (see keys.py).
      left_out: arrays that the caller chose to leave out, and their shapes.
    """

    def __init__(self, path: str):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.card: Mapping[str, Any] = {}
        self.stale = False
        self.config: Mapping[str, Any] = {}
        self.preprocessor: Mapping[str, Any] = {}
        self.before = ""
        self.left_out: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, Span | Callable[[], np.ndarray]] = {}

    def add(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        place: "Span | Callable[[], np.ndarray] | None" = None,
    ) -> None:
        """Registers an array with its place in a file, or a function that reads it."""
        if name in self.shapes:
            raise UserError(f"{self.path}: there are two arrays named {name!r}")
        self.shapes[name], self.dtypes[name] = tuple(map(int, shape)), dtype
        if place is not None:
            self._places[name] = place

    def read(
        self, name: str, out: Float32[np.ndarray, "..."] | None = None
    ) -> Float32[np.ndarray, "..."]:
        """Reads one array as float32, directly into a contiguous `out` if given.

        Raises:
          UserError: its type is not real numbers, or the file is damaged.
        """
        shape, dtype, place = self.shapes[name], self.dtypes[name], self._places[name]
        if dtype not in _FLOATS:
            raise UserError(f"{self.path}: {name} is {dtype}; expected one of {', '.join(_FLOATS)}")
        with reading(self.path, name):
            if not isinstance(place, Span):
                array = place()
            elif out is not None and dtype == "float32":
                return place.read(out)
            else:
                array = place.read(
                    np.empty(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
                )
        if out is None:
            return array.astype(np.float32, copy=False)
        out[...] = array
        return out

    def renamed(self, rename: Callable[[str], str | None]) -> "Weights":
        """Returns the same arrays under other names; those that get None are left out."""
        other = copy.copy(self)
        other.shapes, other.dtypes, other._places = {}, {}, {}
        for name, shape in self.shapes.items():
            if (new := rename(name)) is not None:
                other.add(new, shape, self.dtypes[name], self._places.get(name))
        return other

    def reshaped(self, name: str, shape: tuple[int, ...]) -> "Weights":
        """Returns the same arrays, one of them in another shape of as many numbers."""
        other = self.renamed(lambda key: key)
        other.shapes[name], place = shape, other._places.get(name)
        if place is not None and not isinstance(place, Span):
            other._places[name] = lambda: place().reshape(shape)
        return other

    def missing(self, key: str, shape: tuple[int, ...] | None = None) -> UserError:
        """Returns the error for a missing key, with the most similar key of the file."""
        of = f" of shape {list(shape)}" if shape is not None else ""
        near = nearest(key, self.shapes)
        hint = f"; {near}" if near.endswith("?") else ""
        return UserError(f"{self.path}: the key {key}{of} is missing{hint}")


@dataclasses.dataclass(frozen=True)
class Span:
    """The byte range of an uncompressed array in an open file.

    `crc` is the expected checksum, if the file has one, continued from `crc_before`.
    """

    file: io.BufferedReader
    start: int
    crc: int | None = None
    crc_before: int = 0

    def read(self, out: np.ndarray) -> Shaped[np.ndarray, "..."]:
        """Fills a contiguous array. Threads may read the same file concurrently.

        Raises:
          EOFError: the file is too short.
          ValueError: the checksum does not match.
        """
        buffer, done = memoryview(out.reshape(-1).view(np.uint8)), 0
        while done < len(buffer):
            count = os.preadv(self.file.fileno(), [buffer[done:]], self.start + done)
            if not count:
                raise EOFError("the file ends before the array does")
            done += count
        if self.crc is not None and zlib.crc32(buffer, self.crc_before) != self.crc:
            raise ValueError("its checksum does not match")
        return out


@contextlib.contextmanager
def reading(path: str, what: str = "") -> Iterator[None]:
    """Context that turns any error of reading a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no file {path!r}") from None
    except (*_BROKEN, OSError, RecursionError, MemoryError) as error:
        check_refused(error, path)
        where = f" ({what})" if what else ""
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"{path}{where} is damaged or cut off: {reason}") from None


def open_weights(path: str) -> Weights:
    """Opens an .npz, .safetensors or Flax .msgpack file, or a folder with one as the hub has it.

    Raises:
      UserError: no such file, or it is damaged, of a type that can run code when loaded, or
        claims to be larger than it can be.
    """
    weights = Weights(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    first = _file_of_folder(path) if os.path.isdir(path) else path
    files, index = [first], {}
    if first.endswith(".safetensors.index.json") and os.path.exists(first):
        index = read_json(first)
        files = shards.files_of(first, index)
    else:
        shards.check_alone(first)
    places: dict[str, str] = {}
    for file in files:
        known = len(weights.shapes)
        _open(weights, file)
        places |= dict.fromkeys(list(weights.shapes)[known:], file)
    if index:
        shards.check(first, index, places)
    if len(files) == 1 and files[0].endswith(".npz"):
        beside = read_json(f"{files[0].removesuffix('.npz')}.json")
        weights.stale = "vit_jax" in beside and beside.get("weights") != _fingerprint(files[0])
        weights.card = {} if weights.stale else beside.get("vit_jax") or {}
    weights.config = read_json(os.path.join(folder, "config.json"))
    weights.preprocessor = read_json(os.path.join(folder, "preprocessor_config.json"))
    if not isinstance(weights.card, Mapping):
        raise UserError(f"{path}: the card of the model is no JSON object")
    return weights


def _file_of_folder(path: str) -> str:
    """The file of weights in a folder, or the index of several."""
    names = sorted(os.listdir(path))
    found = [name for name in names if name.endswith(WEIGHTS)]
    found = found or [name for name in names if name.endswith(_FLAX)]
    for name in ("model.safetensors", shards.INDEX, *(found if len(found) == 1 else ())):
        if name in names:
            return os.path.join(path, name)
    torch = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if not found and torch:
        raise UserError(_pickled(os.path.join(path, torch[0])))
    what = f"several weight files ({', '.join(found)}): name one" if found else "no weights"
    expected = (
        "Expected a run folder (model/model.json), model.safetensors, or an .npz or .safetensors "
        "file"
    )
    if not found:
        kind = next((kind for name, kind in _FOLDERS.items() if name in names), None)
        kind = kind or ("a TensorFlow checkpoint" if "checkpoint" in names else None)
        if kind:
            raise UserError(f"{path} is {kind}, which is not read here. {expected}")
        others = [(n, _ENDINGS[end]) for n in names if (end := os.path.splitext(n)[1]) in _ENDINGS]
        if others:
            what = f"{others[0][0]}, {others[0][1]}, and nothing that is read here"
    raise UserError(f"{path} holds {what}. {expected}")


def _open(weights: Weights, path: str) -> None:
    with reading(path):
        with open(path, "rb") as file:
            start = file.read(512)
        # A safetensors file starts with the length of its JSON, which can be any bytes.
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(path):
            _open_safetensors(weights, path)
        elif start.startswith(b"PK"):
            _open_npz(weights, path)
        elif re.match(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa0-\xbf\xd9]", start, re.DOTALL):
            for name, array in flax_files.arrays(path):  # a map whose keys are texts
                weights.add(name, array.shape, array.dtype.name, lambda array=array: array)
        elif start.startswith(b"\x80") or b"ustar" in start:
            raise UserError(_pickled(path))
        elif start.startswith(b"version https://git-lfs"):
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it "
                "was cloned"
            )
        elif not start:
            raise UserError(f"{path} is empty")
        else:
            kind = _kind(start, os.path.splitext(path)[1])
            if kind is None:
                raise UserError(f"{path} is cut off, or neither an .npz nor a .safetensors file")
            raise UserError(f"{path} is {kind}; expected an .npz or .safetensors file")


def _kind(start: bytes, ending: str) -> str | None:
    """Names an unsupported file type by its first bytes, or by the file name's ending.

    The ending counts only for types without magic bytes.
    """
    for mark, kind in _MARKS.items():
        if start.startswith(mark):
            return kind
    if start[4:8] == b"TFL3":
        return _ENDINGS[".tflite"]
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>", b"<html lan"):
        return "a web page, which came in place of the file"
    if start.lstrip()[:1] in (b"{", b"["):
        return "a text of JSON (a model is named by the folder of its config.json)"
    named = _ENDINGS.get(ending) if ending in (".onnx", ".pb", ".stablehlo") else None
    if named is None and start[0] == 8 and start[2:3] == b"\x12" and b"pytorch" in start[:32]:
        named = _ENDINGS[".onnx"]
    return named


def _pickled(path: str) -> str:
    return (
        f"{path} is pickled, and loading it could run any code: convert it where you trust it, in "
        "an environment with torch, by `safetensors.torch.save_file(torch.load(PATH, "
        'map_location="cpu", weights_only=True), "model.safetensors")`, and load that'
    )


def _open_npz(weights: Weights, path: str) -> None:
    file = open(path, "rb")
    archive = zipfile.ZipFile(file)
    infos = archive.infolist()
    names = [info.filename for info in infos]
    if not any(name.endswith(".npy") for name in names):
        for part, kind in _ZIPS.items():
            if any(name.endswith(part) for name in names):
                raise UserError(f"{path} is {kind}; expected an .npz or .safetensors file")
    if any(name.endswith("data.pkl") for name in names):
        raise UserError(_pickled(path))
    packed, unpacked = (sum(getattr(i, n) for i in infos) for n in ("compress_size", "file_size"))
    size = os.path.getsize(path)
    if packed > size or unpacked > max(_MOST_UNPACKED * size, _UNPACKED_ANYWAY):
        raise UserError(
            f"{path} has {size:,} bytes and claims to unpack to {unpacked:,}: refused, weights do "
            "not compress like that"
        )
    for info in infos:
        name = info.filename.removesuffix(".npy")
        with reading(path, name), archive.open(info) as member:
            raw = member.read(_LONGEST_HEADER)
            start = io.BytesIO(raw)
            version = np.lib.format.read_magic(start)
            if version not in ((1, 0), (2, 0)):
                raise UserError(f"{path}: {name} has an .npy header of version {version}")
            read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            shape, fortran, dtype = read_header(start)
            count = 1
            for side in shape:
                count *= side
            if any(side < 0 for side in shape) or dtype.hasobject:
                raise UserError(f"{path}: {name} holds {dtype} of shape {shape}: refused")
            header, size = start.tell(), count * dtype.itemsize
            if header + size != info.file_size:
                raise UserError(
                    f"{path}: {name} should take {size:,} bytes by its header, but has "
                    f"{info.file_size - header:,}"
                )
            place: Any = functools.partial(_read_member, archive, info)
            if info.compress_type == zipfile.ZIP_STORED and not fortran and dtype.isnative:
                begin = _member_start(file, info) + header
                place = Span(file, begin, info.CRC, zlib.crc32(raw[:header]))
        # NumPy does not know bfloat16 and saves it as 2-byte void.
        kind = "bfloat16" if dtype == np.dtype("V2") else dtype.name
        weights.add(name, shape, kind, place)


def _fingerprint(path: str) -> str:
    """A checksum of the names and checksums in an .npz directory: fast for any file size."""
    with reading(path), zipfile.ZipFile(path) as archive:
        members = sorted((info.filename, info.CRC) for info in archive.infolist())
    return hashlib.sha256(repr(members).encode()).hexdigest()


def _member_start(file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """The offset of a member's data, after its local header, name and extra field."""
    local = os.pread(file.fileno(), 30, info.header_offset)
    name, extra = struct.unpack("<HH", local[26:30])
    return info.header_offset + 30 + name + extra


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Shaped[np.ndarray, "..."]:
    with archive.open(info) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        member.read(1)  # the end of the member is where its checksum is compared
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _open_safetensors(weights: Weights, path: str) -> None:
    safetensors.safe_open(path, framework="np")  # which checks the header, offsets and sizes
    file = open(path, "rb")
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    for name, part in header.items():
        kind = _SAFETENSORS.get(part["dtype"], part["dtype"])
        place = Span(file, 8 + length + part["data_offsets"][0])
        weights.add(name, part["shape"], kind, place)
    if "vit_jax" in metadata:
        weights.card = json.loads(metadata["vit_jax"])


def read_json(path: str) -> dict[str, Any]:
    """Reads a small JSON object, {} if there is no such file.

    Raises:
      UserError: it is not a JSON object.
    """
    if not os.path.exists(path):
        return {}
    with reading(path):
        if os.path.getsize(path) > 64 << 20:
            raise ValueError("it has more than 64 MB")
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {type(value).__name__}")
        return value


def write_weights(path: str, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
    """Writes an .npz (with the card next to it, as .json) or a .safetensors file, by its ending.

    Raises:
      UserError: the path has another ending, or is a folder.
    """
    if not path.endswith(WEIGHTS):
        raise UserError(f"{path}: {nearest(os.path.splitext(path)[1], WEIGHTS)}")
    with replacing(path) as temporary:
        if path.endswith(".npz"):
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            described = {"vit_jax": card, "weights": _fingerprint(temporary)}
            write_atomically(f"{path.removesuffix('.npz')}.json", json.dumps(described, indent=1))
        else:
            metadata = {"format": "pt", "vit_jax": json.dumps(card)}
            try:
                safetensors.numpy.save_file(dict(arrays), temporary, metadata=metadata)
            except safetensors.SafetensorError as error:  # such as on a full disk
                if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
                    raise
                number = int(found[1])
                raise OSError(number, os.strerror(number), path) from None

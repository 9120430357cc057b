"""Files that are damaged, lie about themselves or would run code: refused, or read as they are."""

import collections
import contextlib
import dataclasses
import io
import json
import pathlib
import pickle
import random
import re
import resource
import struct
import tarfile
import tempfile
import time
import tracemalloc
import typing
import warnings
import zipfile

import dialects
import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit_jax
from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.files import open_weights
from vit_jax.checkpoints.opened import open_model
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig

EXAMPLES = dialects.examples()
PAPER, TIMM, VIT, OURS = (
    EXAMPLES[name] for name in ("google paper", "timm plain", "hf vit", "ours")
)
NESTED = "[" * 100_000 + "]" * 100_000
HUGE = 10**400


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Without the types of signatures enforced, which would refuse much on their own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What is imported and traced at first use is not what the times below are about."""
    open_model(PAPER.write(tmp_path_factory.mktemp("warm")))


def refused(path, match=None, seconds=30.0, megabytes=32, **known):
    """Asserts that a file is refused in one sentence, soon, and without much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(UserError, match=match) as caught:
            vit_jax.load(path, **known)
        took, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One line that a terminal shows as it is, whatever the file contains.
    assert isinstance(caught.value, ValueError) and str(caught.value).isprintable()
    assert took < seconds, f"{took:.1f} s"
    assert peak < megabytes << 20, f"{peak >> 20} MB"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (megabytes + 64) << 10, f"{grown >> 10} MB"
    return str(caught.value)


# -- Pickles -------------------------------------------------------------------------------------


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def torch_zip(pickled):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", b"\0" * 64)
    return buffer.getvalue()


def torch_tar(pickled):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    return buffer.getvalue()


PICKLES = {
    "pickle": lambda pickled: pickled,
    "legacy": lambda pickled: (
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + pickled
    ),
    "zip": torch_zip,
    "tar": torch_tar,
}


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.pth", "weights.npz"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_not_opened_and_how_to_convert_it_is_said(kind, name, tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(PICKLES[kind](pickle.dumps(Evil(marker), protocol=2)))
    said = refused(path, "is pickled, and loading it could run any code")
    assert str(path) in said
    assert "`safetensors.torch.save_file(torch.load(PATH, map_location=" in said
    assert "weights_only=True" in said and "where you trust it" in said
    if not name.endswith(".npz"):
        assert str(path) in refused(path.parent, "is pickled")  # the folder that it is in
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # as it would have been


def test_object_arrays_are_not_unpickled(tmp_path):
    marker = tmp_path / "marker"
    evil = np.array([[[Evil(marker)] * 8]], dtype=object)
    fields = np.zeros((1, 1, 8), [("x", "<f4"), ("y", "O")])
    path = tmp_path / "x.npz"
    for name in ("cls", "extra"):
        for array in (evil, fields):
            with path.open("wb") as file:
                np.savez(file, **{**PAPER.arrays, name: array})
            refused(path, f"{name} holds .* of shape .*: refused")
    assert not marker.exists()


# -- npz -----------------------------------------------------------------------------------------


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(text, version=(1, 0), length=None):
    """The start of an .npy file with any text for a header."""
    text = text.encode("latin-1") if isinstance(text, str) else text
    size = len(text) if length is None else length
    packed = struct.pack("<H" if version == (1, 0) else "<I", size)
    return b"\x93NUMPY" + bytes(version) + packed + text


def header_of(shape, descr="<f4", fortran=False):
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape!r}, }}\n"


def zip_of(members, method=zipfile.ZIP_STORED):
    """A zip of (name, content) pairs, each name as often as it comes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def paper_with(name, content, **kwargs):
    members = {f"{key}.npy": npy(value) for key, value in PAPER.arrays.items()}
    return zip_of({**members, f"{name}.npy": content}.items(), **kwargs)


DATA = PAPER.arrays["cls"].tobytes()
LIES = {
    "more than it has": header_of((1, 1, 9)),
    "less than it has": header_of((1, 1, 7)),
    "2**40": header_of((2**40,)),
    "2**40 twice": header_of((2**40, 2**40)),
    "2**62 floats": header_of((2**62,)),
    "wraps around to 8": header_of((2**32, 2**32, 8)),
    "wraps around to 0": header_of((2**32, 2**32)),
    "nothing": header_of((0, 2**62)),
    "negative": header_of((1, 1, -8)),
    "negative twice": header_of((1, -1, -8)),
    "no number": header_of((1, "a", 8)),
    "a float": header_of((1, 1, 8.0)),
    "no tuple": header_of(8),
    "many axes": header_of((1,) * 70 + (8,)),
    "unknown type": header_of((1, 1, 8), "<f3"),
    "objects": header_of((1, 1, 4), "|O"),
    "objects inside": header_of((1, 1, 2), [("a", "<f4"), ("b", "|O")]),
    "no type": header_of((1, 1, 8), 7),
    "huge items": header_of((1, 1, 1), "|V1099511627776"),
    "huge text": header_of((1, 1, 1), "<U1099511627776"),
    "no items": header_of((1, 1, 2**62), "|V0"),
    "no dict": "[1, 2]\n",
    "other keys": "{'descr': '<f4', 'shape': (1, 1, 8)}\n",
    "code": "__import__('os').system('true')\n",
    "nested": "(" * 5000 + ")" * 5000 + "\n",
    "nested dicts": "{1:" * 3000 + "1" + "}" * 3000 + "\n",
    "long": "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 8), }" + " " * 60_000 + "\n",
    "a long number": header_of((1, 1, 8)).replace("8", "8" + "0" * 5000),
    "a power": header_of((1, 1, 8)).replace("8", "9**9**9**9"),
    "zero bytes": "\0" * 100,
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies(name, tmp_path):
    path = tmp_path / "x.npz"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path.write_bytes(paper_with("cls", npy_header(LIES[name]) + DATA, method=method))
        said = refused(path)
        assert "cls" in said and len(said) < 1000


def test_a_header_that_claims_to_be_huge(tmp_path):
    path = tmp_path / "x.npz"
    for version in ((2, 0), (3, 0)):
        content = npy_header(header_of((1, 1, 8)), version, length=2**32 - 1) + DATA
        path.write_bytes(paper_with("cls", content))
        refused(path, "cls")
    for start in (b"", b"\x93NUM", b"\x93NUMPY", b"\x93NUMPY\x01", b"\x93NUMPY\x09\x00", b"PK"):
        path.write_bytes(paper_with("cls", start))
        refused(path, "cls")


def test_a_file_that_unpacks_to_more_than_weights_do(tmp_path):
    path = tmp_path / "x.npz"
    zeros = np.zeros(80 << 18, np.float32)  # 80 MB, which deflate to 80 kB
    path.write_bytes(paper_with("extra", npy(zeros), method=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1 << 20
    refused(path, r"claims to unpack to 83,8\d\d,\d\d\d: refused", megabytes=8)

    # Many small ones do as much harm as a large one.
    small = npy(zeros[: 8 << 18])
    members = [(f"{key}.npy", npy(value)) for key, value in PAPER.arrays.items()]
    members += [(f"extra{i}.npy", small) for i in range(10)]
    path.write_bytes(zip_of(members, zipfile.ZIP_DEFLATED))
    refused(path, "claims to unpack to", megabytes=8)

    # And one that says that it is small is no larger for it.
    raw = bytearray(paper_with("extra", npy(zeros), method=zipfile.ZIP_DEFLATED))
    for start in (raw.rindex(b"extra.npy") - 46, raw.index(b"extra.npy") - 30):
        place = start + (24 if raw[start : start + 4] == b"PK\x01\x02" else 22)
        raw[place : place + 4] = struct.pack("<I", 1000)
    path.write_bytes(raw)
    refused(path, "extra", megabytes=8)


def test_members_that_share_their_bytes(tmp_path):
    """A few bytes that many members are made of, each of them honest about its size."""
    array = npy(np.zeros(1 << 18, np.float32))
    raw = zip_of([("a.npy", array)])
    start = raw.index(b"PK\x01\x02")
    end = raw.index(b"PK\x05\x06")
    entry, members = raw[start:end], []
    for i in range(200):
        members.append(entry.replace(b"a.npy", f"{i:05}".encode()))
    directory = b"".join(members)
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 200, 200, len(directory), start, 0)
    path = tmp_path / "x.npz"
    path.write_bytes(raw[:start] + directory + tail)
    refused(path)


def test_two_arrays_of_one_name(tmp_path):
    path = tmp_path / "x.npz"
    members = [(f"{key}.npy", npy(value)) for key, value in PAPER.arrays.items()]
    for name in ("cls.npy", "cls"):
        path.write_bytes(zip_of([*members, (name, npy(np.zeros((1, 1, 8), np.float32)))]))
        refused(path, "two arrays named 'cls'")


def test_what_a_zip_may_be_besides(tmp_path):
    path = tmp_path / "x.npz"
    whole = PAPER.to_bytes()
    central = whole.index(b"PK\x01\x02")

    def patched(offset, format, value, where=central):
        raw = bytearray(whole)
        struct.pack_into(format, raw, where + offset, value)
        return bytes(raw)

    encrypted = bytearray(patched(8, "<H", 1))
    struct.pack_into("<H", encrypted, 6, 1)
    end = whole.rindex(b"PK\x05\x06")
    for name, raw in {
        "encrypted": bytes(encrypted),
        "unknown compression": patched(10, "<H", 99),
        "lzma": patched(10, "<H", zipfile.ZIP_LZMA),
        "deflate": patched(10, "<H", zipfile.ZIP_DEFLATED),
        "checksum": patched(16, "<I", 0),
        "packed": patched(20, "<I", 2**31),
        "unpacked": patched(24, "<I", 2**31),
        "nothing": patched(24, "<I", 0),
        "length of a name": patched(28, "<H", 60_000),
        "starts behind the end": patched(42, "<I", 2**31),
        "starts elsewhere": patched(42, "<I", 1),
        "size of the list": patched(12, "<I", 2**31, where=end),
        "start of the list": patched(16, "<I", 2**31, where=end),
        "no list": whole.replace(b"PK\x01\x02", b"PK\x01\x03"),
        "cut": whole[:central],
        "nothing but the list": whole[central:],
        "nothing but a start": b"PK\x03\x04",
        "empty": b"PK\x05\x06" + b"\0" * 18,
        "folder": zip_of([("folder/", b"")]),
        "text": zip_of([("notes.txt", b"hello")]),
    }.items():
        path.write_bytes(raw)
        try:
            refused(path)
        except pytest.fail.Exception:
            pytest.fail(name)


@pytest.mark.parametrize("name", ["google paper", "timm plain", "hf vit", "ours"])
def test_a_file_that_is_cut_off(name, tmp_path):
    example = EXAMPLES[name]
    path = example.write(tmp_path)
    file = path / "model.safetensors" if path.is_dir() else path
    whole = file.read_bytes()
    lengths = {*np.linspace(0, len(whole) - 1, 16).astype(int).tolist(), 1, 7, 8, 9, 63, 64, 65}
    for length in sorted(lengths):
        file.write_bytes(whole[:length])
        said = refused(path, **example.known)
        assert str(file) in said
        assert ("is empty" in said) == (length == 0)
    file.write_bytes(whole)
    open_model(path, **example.known)


# -- Files of other kinds ------------------------------------------------------------------------


def test_files_that_are_no_weights(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346293852\n"
    for raw, message in {
        b"": "is empty",
        pointer: r"Git LFS pointer, not the file itself: run `git lfs pull`",
        b"\x89HDF\r\n\x1a\n" + b"\0" * 100: r"is HDF5, .*; expected an \.npz or \.safetensors file",
        b"\x93NUMPY\x01\x00v\x00{": r"a single array of NumPy \(.npy\)",
        b"<!DOCTYPE html><html>": "is a web page, which came in place of the file",
        b'{"error": "not found"}': "is a text of JSON",
        b"GGUF\x03\0\0\0" + b"\0" * 100: "is GGUF",
        b"\x1f\x8b\x08\0" + b"\0" * 100: r"is compressed \(gzip\): unpack it first",
        b"\x28\xb5\x2f\xfd" + b"\0" * 100: r"is compressed \(zstandard\): unpack it first",
        b"\x1c\0\0\0TFL3" + b"\0" * 100: "is a TensorFlow Lite program",
        b"\0" * 4096: "neither an .npz nor a .safetensors file",
        b"\x08\x03\x12\x07pytorch": "is an ONNX program",
    }.items():
        for name in ("model.safetensors", "x.npz"):
            path = tmp_path / name
            path.write_bytes(raw)
            assert str(path) in refused(path, message)
    for name, message in {
        "flax_model.msgpack": "is Flax's msgpack, .*: take the model.safetensors of the same model",
        "saved_model.pb": "is a program of TensorFlow",
        "model.onnx": "is an ONNX program",
    }.items():
        (tmp_path / name).write_bytes(b"\x08\x07:\xa4 and more")
        refused(tmp_path / name, message)


@pytest.mark.parametrize(
    "member, message",
    [
        ("model.weights.h5", "is a Keras archive of HDF5"),
        ("model/archive_format", r"is a program exported by PyTorch \(.pt2\)"),
        ("serialized_exported_program.json", r"is a program exported by PyTorch \(.pt2\)"),
        ("folder/model.safetensors", "is a zip archive: unpack it first"),
    ],
)
def test_zips_that_are_no_weights(member, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr(member, "?")
        archive.writestr("config.json", "{}")
    refused(tmp_path / "x", message)


@pytest.mark.parametrize(
    "member, message",
    [
        ("saved_model.pb", "is a TensorFlow SavedModel, which is not read here"),
        ("_CHECKPOINT_METADATA", "is an Orbax checkpoint, without the run folder"),
        ("checksums.json", "is one checkpoint of a run folder: name the run folder"),
        ("flax_model.msgpack", "holds flax_model.msgpack, Flax's msgpack"),
        ("tf_model.h5", "holds tf_model.h5, HDF5"),
        ("model.onnx", "holds model.onnx, an ONNX program"),
        ("x.gguf", "holds x.gguf, GGUF"),
        ("x.npz.zst", r"holds x.npz.zst, compressed \(zstandard\)"),
    ],
)
def test_folders_of_others(member, message, tmp_path):
    (tmp_path / member).write_bytes(b"?")
    said = refused(tmp_path, message)
    assert "Expected a run folder (model/model.json), model.safetensors, or an" in said


def test_an_index_stands_for_its_shards(tmp_path):
    path = EXAMPLES["hf sharded"].write(tmp_path)
    index = path / "model.safetensors.index.json"
    assert open_model(index).shapes == open_model(path).shapes


def test_folders_without_weights(tmp_path):
    refused(tmp_path, "holds no weights. Expected a run folder .*, model.safetensors, or an")
    (tmp_path / "config.json").write_text(json.dumps(VIT.files["config.json"]))
    refused(tmp_path, "holds no weights")
    for name in ("a.npz", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, r"several weight files \(a.npz, b.safetensors\): name one")
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path)
    refused(tmp_path / "none.npz", "there is no")
    refused(tmp_path / "config.json" / "x.npz", "there is no")
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    refused(tmp_path / "loop.npz")


# -- safetensors ---------------------------------------------------------------------------------


def timm_with(**changes):
    """A valid header with the fields of one entry changed (None takes one out), and its data."""
    header, data = dialects.split_safetensors(TIMM.to_bytes())
    entry = {**header["cls_token"], **changes}
    header["cls_token"] = {k: v for k, v in entry.items() if v is not None}
    return dialects.safetensors_of(header, data)


@pytest.mark.parametrize("length", [0, 1, 2**20, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 1])
def test_a_length_of_the_header_that_is_wrong(length, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + TIMM.to_bytes()[8:])
    refused(path, num_heads=2)


ENTRIES = {
    "unknown type": {"dtype": "F33"},
    "no type": {"dtype": None},
    "a type of another size": {"dtype": "F64"},
    "a number for a type": {"dtype": 32},
    "more": {"shape": [1, 1, 9]},
    "less": {"shape": [1, 1, 7]},
    "2**40": {"shape": [2**40]},
    "2**62": {"shape": [2**62, 4]},
    "wraps around": {"shape": [2**32, 2**32, 8]},
    "too large for a number": {"shape": [2**70]},
    "negative": {"shape": [1, -1, -8]},
    "a float": {"shape": [1, 1, 8.0]},
    "words": {"shape": ["1", "1", "8"]},
    "no list": {"shape": 8},
    "no shape": {"shape": None},
    "deep": {"shape": [[1, 1, 8]]},
    "no places": {"data_offsets": None},
    "one place": {"data_offsets": [0]},
    "three places": {"data_offsets": [0, 32, 64]},
    "negative places": {"data_offsets": [-32, 0]},
    "backwards": {"data_offsets": [32, 0]},
    "behind the end": {"data_offsets": [2**40, 2**40 + 32]},
    "around the end": {"data_offsets": [0, 2**64 - 1]},
    "shared with others": {"data_offsets": [64, 96]},
    "words for places": {"data_offsets": ["0", "32"]},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_lies(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(timm_with(**ENTRIES[name]))
    refused(path, num_heads=2)


@pytest.mark.parametrize("kind", ["I32", "U32", "BOOL", "F8_E4M3", "I64"])
def test_types_that_are_no_weights(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    shape = {"I64": [1, 1, 4], "BOOL": [1, 4, 8], "F8_E4M3": [1, 4, 8]}.get(kind, [1, 1, 8])
    path.write_bytes(timm_with(dtype=kind, shape=shape))
    refused(path, "cls_token", num_heads=2)


def test_headers_of_other_forms(tmp_path):
    path = tmp_path / "model.safetensors"
    header, data = dialects.split_safetensors(TIMM.to_bytes())
    text = json.dumps(header).encode()
    for raw in [
        dialects.safetensors_of(b"[1, 2]", data),
        dialects.safetensors_of(b"{}", data),
        dialects.safetensors_of(b"{}", b""),
        dialects.safetensors_of(text[:-10], data),
        dialects.safetensors_of(text.replace(b"cls_token", b"cls\xfftoken"), data),
        dialects.safetensors_of(text.replace(b"cls_token", b"cls\\ud800"), data),
        dialects.safetensors_of(text.replace(b"{", b" {", 1), data),
        dialects.safetensors_of(text.replace(b'"cls_token"', b'"head.bias"'), data),
        dialects.safetensors_of(text + b"\0", data),
        dialects.safetensors_of(text + b"{}", data),
        dialects.safetensors_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, data),
        dialects.safetensors_of({**header, "cls_token": []}, data),
        dialects.safetensors_of({**header, "cls_token": None}, data),
        dialects.safetensors_of({**header, "__metadata__": []}, data),
        dialects.safetensors_of({**header, "__metadata__": {"vit_jax": {"config": {}}}}, data),
        dialects.safetensors_of(header, data + b"\0"),
        dialects.safetensors_of(header, data[:-1]),
        dialects.safetensors_of(header, b""),
    ]:
        path.write_bytes(raw)
        refused(path, num_heads=2)


# -- What stands beside the numbers --------------------------------------------------------------


def ours_with(text):
    """A file of ours with any text for its card."""
    return dialects.to_safetensors(OURS.arrays, {"format": "pt", "vit_jax": text})


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "null", "0", "1", "[]", "[1]", '"text"', "{}", "{", "NaN", '{"config": null}'),
        *('{"config": []}', '{"config": [["width", 8]]}', '{"config": "width"}', '{"config": 1}'),
        *('{"config": {}}', '{"config": {"width": 8}}', "1" * 5000, NESTED),
        *('{"config": ' + NESTED + "}", '{"config": {"gelu": ' + NESTED + "}}"),
        '{"config": {"gelu": ' + "[" * 300 + "]" * 300 + "}}",
    ],
    ids=lambda text: f"{text[:24]}{len(text) if len(text) > 24 else ''}",
)
def test_a_record_that_is_none(text, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(ours_with(text))
    refused(path)
    if text:  # the same beside an npz, where an empty file is none
        path = PAPER.write(tmp_path)
        weights = dialects.fingerprint(path.read_bytes())
        path.with_suffix(".json").write_text(f'{{"vit_jax": {text}, "weights": "{weights}"}}')
        with contextlib.suppress(UserError):
            vit = vit_jax.load(path)
            assert not json.loads(text).get("config") if text[0] == "{" else not json.loads(text)
            check_types(vit)


ODD = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "minus": -1,
    "float": 0.5,
    "huge": HUGE,
    "2**40": 2**40,
    "infinite": float("inf"),
    "nan": float("nan"),
    "text": "x",
    "digits": "2",
    "no text": "",
    "list": [],
    "lists": [[8], 8],
    "object": {},
    "nested": json.loads("[" * 200 + "]" * 200),
}


def check_types(found):
    """Whatever a file says: what comes out of it is of the types that everything else expects."""
    for card, kinds in (
        (found.config, typing.get_type_hints(ViTConfig)),
        (found.preprocess, typing.get_type_hints(Preprocess)),
    ):
        for field in dataclasses.fields(card):
            value, kind = getattr(card, field.name), kinds[field.name]
            options = typing.get_args(kind) or (kind,)
            if value is None:
                assert type(None) in options, field.name
            elif isinstance(value, tuple):
                inside = int if "size" in field.name else float
                assert all(type(v) is inside for v in value), (field.name, value)
            else:
                allowed = {int, float} if float in options else set(options)
                assert type(value) in allowed, (field.name, value)
    assert isinstance(found.labels, tuple) and all(type(label) is str for label in found.labels)
    assert len(found.labels) == found.config.num_classes
    assert found.objective in ("softmax", "sigmoid"), found.objective


def with_odd_values(content, write, only=None, read=lambda path: open_model(path).card):
    """Reads a file once for each field of `content` and each odd value in its place."""
    outcomes, wrong = collections.Counter(), []
    for field in content if only is None else only:
        for name, value in ODD.items():
            path = write({**content, field: value})
            start = time.process_time()
            try:
                check_types(read(path))
                outcomes["loaded"] += 1
            except UserError as error:
                outcomes["refused"] += 1
                if len(str(error)) > 1000 or not str(error).isprintable():
                    wrong.append(f"{field}={name}: {error!s:.200}")
            except Exception as error:  # noqa: BLE001  whatever it is, it is a bug
                wrong.append(f"{field}={name}: {type(error).__name__} {error!s:.200}")
            if time.process_time() - start > 30:
                wrong.append(f"{field}={name} took too long")
    assert not wrong, "\n" + "\n".join(wrong)
    assert outcomes["refused"] and outcomes["loaded"]


def test_odd_values_in_the_record_of_a_model(tmp_path):
    path = tmp_path / "x.safetensors"
    full = {field.name: field.default for field in dataclasses.fields(ViTConfig)}
    fields = {**full, **OURS.card["config"]}

    def write(config):
        path.write_bytes(ours_with(json.dumps({**OURS.card, "config": config})))
        return path

    with_odd_values(fields, write)


@pytest.mark.parametrize("family", [[], {"a": 1}, 3, None, "cnn", "resnet"])
def test_a_record_of_an_odd_family(family, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(ours_with(json.dumps({**OURS.card, "family": family})))
    with pytest.raises(UserError):
        open_model(path)


def test_odd_values_in_the_rest_of_a_record(tmp_path):
    path = tmp_path / "x.safetensors"

    def write(card):
        path.write_bytes(ours_with(json.dumps(card)))
        return path

    with_odd_values(OURS.card, write)
    pre = OURS.card["preprocess"]
    with_odd_values(pre, lambda preprocess: write({**OURS.card, "preprocess": preprocess}))


def test_odd_values_in_the_record_of_a_run(tmp_path):
    (tmp_path / "model").mkdir()
    card = OURS.card

    def write(content):
        (tmp_path / "model" / "model.json").write_text(json.dumps(content))
        return tmp_path

    with_odd_values(card, write, read=ModelCard.read)
    for name in ("config", "preprocess"):
        with_odd_values(
            card[name],
            lambda inner, name=name: write({**card, name: inner}),
            read=ModelCard.read,
        )


def test_odd_values_in_a_config_of_hugging_face(tmp_path):
    path = VIT.write(tmp_path)

    def write(name):
        def writer(content):
            VIT.write(tmp_path)
            (tmp_path / name).write_text(json.dumps(content))
            return path

        return writer

    fields = ("id2label", "hidden_act", "layer_norm_eps", "num_attention_heads", "image_size")
    config = {**VIT.files["config.json"], "vision_config": None, "use_swiglu_ffn": False}
    only = (*fields, "vision_config", "num_hidden_layers", "use_swiglu_ffn")
    with_odd_values(config, write("config.json"), only)
    processor = {**dialects.PREPROCESSOR, "do_center_crop": True, "crop_size": 8}
    only = [field for field in processor if field not in ("do_resize", "image_processor_type")]
    with_odd_values(processor, write("preprocessor_config.json"), only)
    with_odd_values(
        {"height": 8, "shortest_edge": 8},
        lambda size: write("preprocessor_config.json")({**processor, "size": size}),
    )


def test_odd_values_in_a_config_of_timm(tmp_path):
    folder = EXAMPLES["timm folder"]
    path = folder.write(tmp_path)

    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return path

    config = folder.files["config.json"]
    only = ("architecture", "global_pool", "model_args", "pretrained_cfg", "label_names")
    with_odd_values(config, write, only)
    args = {**config["model_args"], "global_pool": "token", "act_layer": "gelu"}
    with_odd_values(args, lambda args: write({**config, "model_args": args}))
    inner = config["pretrained_cfg"]
    only = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    with_odd_values(inner, lambda inner: write({**config, "pretrained_cfg": inner}), only)


def test_json_that_is_none(tmp_path):
    example = EXAMPLES["hf sharded"]
    path = example.write(tmp_path)
    for name in ("config.json", "preprocessor_config.json", "model.safetensors.index.json"):
        whole = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        for text in (b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", NESTED.encode(), b"\0"):
            (tmp_path / name).write_bytes(text)
            said = refused(path)
            assert name in said
        (tmp_path / name).write_bytes(whole)
        vit_jax.load(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    refused(path)


def test_a_large_json_is_not_read(tmp_path):
    path = VIT.write(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    refused(path, "config.json")


def test_an_index_that_names_other_files(tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(VIT.to_bytes())
    path = tmp_path / "in"
    EXAMPLES["hf sharded"].write(path)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for name in (
        *("../secret.safetensors", str(secret), "./model-00001-of-00003.safetensors"),
        *("sub/../../secret.safetensors", "..", ".", "", "/", "none.safetensors", "a\0b"),
        *("config.json", "x" * 5000, "\ud800", None, 7, ["../secret.safetensors"]),
    ):
        index.write_text(json.dumps({"weight_map": {**weight_map, "classifier.bias": name}}))
        said = refused(path)
        assert "classifier" not in said
    for content in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}):
        index.write_text(json.dumps(content))
        refused(path, "has no weight_map")
    # A shard that is not there, one that has what another has, and one that is pickled.
    index.write_text(json.dumps({"weight_map": weight_map}))
    shard = path / "model-00002-of-00003.safetensors"
    kept = shard.read_bytes()
    shard.write_bytes((path / "model-00001-of-00003.safetensors").read_bytes())
    refused(path, "there are two arrays named")
    shard.write_bytes(b"\x80\x02}q\x00.")
    refused(path, "is pickled")
    shard.unlink()
    refused(path, "there is no file .*00002-of-00003")
    shard.write_bytes(kept)
    vit_jax.load(path)


def test_names_that_are_odd(tmp_path):
    """Names are nothing but names: whatever is in them, they are keys that belong to nothing."""
    for name in (
        "../../x",
        "blocks.99999999999999999999.norm1.weight",
        "a" * 3000,
        "{}",
        "blocks.",
    ):
        arrays = {**TIMM.arrays, name: np.zeros(3, np.float32)}
        path = dataclasses.replace(TIMM, arrays=arrays).write(tmp_path)
        said = refused(path, num_heads=2)
        assert name[:100] in said and len(said) < 2000
    for name in ("a\x1b[31mb", "a\nerror: b", "a\u202eb", "a\0b"):  # which a terminal would obey
        arrays = {**TIMM.arrays, name: np.zeros(3, np.float32)}
        path = dataclasses.replace(TIMM, arrays=arrays).write(tmp_path)
        refused(path, num_heads=2)
    for number in (10**3, 10**6 - 1, 10**12):
        arrays = {**TIMM.arrays, f"blocks.{number}.norm1.weight": np.zeros(8, np.float32)}
        path = dataclasses.replace(TIMM, arrays=arrays).write(tmp_path)
        refused(path, "missing|belongs to no part", num_heads=2)
    arrays = {**PAPER.arrays, "../../x": np.zeros(3, np.float32)}
    refused(dataclasses.replace(PAPER, arrays=arrays).write(tmp_path), "belongs to no part")


# -- Anything at all -----------------------------------------------------------------------------


@dataclasses.dataclass
class Files:
    """What is on disk for an example: the arrays, how they are packed, and JSON beside them."""

    example: dialects.Example
    members: list[tuple[str, np.ndarray]]
    texts: dict[str, bytes]
    card: bytes | None
    header: typing.Callable = staticmethod(lambda header: header)
    raw: typing.Callable = staticmethod(lambda raw: raw)

    def write(self, folder):
        """Writes it all; returns what to load."""
        npz, beside = self.example.ending == ".npz", bool(self.example.files)
        path = folder / ("model.safetensors" if beside else f"weights{self.example.ending}")
        for name, text in self.texts.items():
            (folder / name).write_bytes(text)
        if self.example.shards > 1:
            EXAMPLES[self.example.name].write(folder)
            for name, text in self.texts.items():
                (folder / name).write_bytes(text)
            file = sorted(folder.glob("*.safetensors"))[0]
            file.write_bytes(self.raw(file.read_bytes()))
        elif npz:
            members = [(f"{name}.npy", self.header(npy(array))) for name, array in self.members]
            path.write_bytes(self.raw(zip_of(members)))
            if self.card is not None:
                try:
                    weights = dialects.fingerprint(path.read_bytes()).encode()
                except Exception:  # noqa: BLE001  of what is no zip any more, by whatever change
                    weights = b""
                text = b'{"vit_jax": ' + self.card + b', "weights": "' + weights + b'"}'
                path.with_suffix(".json").write_bytes(text)
        else:
            arrays = dict(self.members)
            metadata = {"format": "pt"}
            if self.card is not None:
                metadata["vit_jax"] = self.card.decode("utf-8", "replace")
            header, data = dialects.split_safetensors(dialects.to_safetensors(arrays, metadata))
            path.write_bytes(self.raw(dialects.safetensors_of(self.header(header), data)))
        return folder if beside else path


def files_of(example):
    texts = {name: json.dumps(content).encode() for name, content in example.files.items()}
    if example.shards > 1:
        texts["model.safetensors.index.json"] = json.dumps(example.index()).encode()
    return Files(
        example,
        list(example.arrays.items()),
        texts,
        json.dumps(example.card).encode() if example.card else None,
    )


NAMES = sorted({name for example in EXAMPLES.values() for name in example.arrays})
WORDS = sorted(
    {"vision_config", "model_args", "act_layer", "global_pool", "img_size", "block_fn", "crop_size"}
    | {"label_names", "image_size", "size", "do_center_crop", "use_swiglu_ffn", "shortest_edge"}
    | {field.name for field in dataclasses.fields(ViTConfig)}
)


def mutate(files, rng):
    """One change of one kind; `rng` is a random.Random."""
    kinds = [mutate_names, mutate_names, mutate_arrays, mutate_arrays, mutate_bytes, mutate_bytes]
    kinds += [mutate_header]
    if files.texts:
        kinds += [mutate_texts] * 3
    if files.card is not None:
        kinds += [mutate_record] * 3
    if files.example.shards > 1:
        kinds = [mutate_bytes, mutate_texts]
    rng.choice(kinds)(files, rng)


def mutate_names(files, rng):
    members, i = files.members, rng.randrange(len(files.members))
    name, array = members[i]
    what = rng.randrange(7)
    if what == 0:
        del members[i]
    elif what == 1:  # a whole group: all biases of a kind, a layer, a block
        part = rng.choice([p for p in re.split(r"[./]", name) if p])
        members[:] = [m for m in members if part not in re.split(r"[./]", m[0])] or members
    elif what == 2:
        members[i] = (rng.choice(NAMES), array)
    elif what == 3:
        members.append((rng.choice([*NAMES, name]), array))
    elif what == 4:
        old, new = rng.choice(["0", "1"]), rng.choice(["0", "1", "2", "7", "00", "-1", "999999999"])
        members[i] = (name.replace(old, new, 1), array)
    elif what == 5:
        prefix = rng.choice(["model.", "vit.", "params/", "opt/target/", "module.", "img/", "x/"])
        members[:] = [(prefix + key, value) for key, value in members]
    else:
        at = rng.randrange(len(name) + 1)
        members[i] = (
            name[:at] + rng.choice(["", "x", "é", "\n", "/", "."]) + name[at + 1 :],
            array,
        )
    if files.example.ending == ".safetensors" or rng.random() < 0.9:
        files.members = list(dict(members).items())


def mutate_arrays(files, rng):
    members, i = files.members, rng.randrange(len(files.members))
    name, array = members[i]
    what = rng.randrange(8)
    if what == 0 and array.ndim:
        array = array.reshape(rng.choice([(-1,), (1, *array.shape), array.shape[::-1]]))
    elif what == 1 and array.ndim:
        array = np.ascontiguousarray(array.T)
    elif what == 2 and array.ndim:
        array = np.ascontiguousarray(array[: rng.randrange(array.shape[0] + 1)])
    elif what == 3 and array.ndim:
        array = np.concatenate([array, array])
    elif what == 4:
        kinds = ["<f2", "<f8", "V2", "<i4"]
        if files.example.ending == ".npz":
            kinds += [">f4", ">f8", "?", "<c8", "<u2", "<U1", "S3"]
        kind = rng.choice(kinds)
        array = array.view("V2") if kind == "V2" and array.ndim else array
        if kind != "V2" and array.dtype.kind != "V":
            array = array.astype(kind)
    elif what == 5:
        j = rng.randrange(len(members))
        members[i], members[j] = (name, members[j][1]), (members[j][0], array)
        return
    elif what == 6 and array.dtype.kind == "f":
        array = np.full_like(array, rng.choice([np.nan, np.inf, -0.0, 1e-40, 3e38]))
    elif files.example.ending == ".npz":
        array = np.asfortranarray(array)
    members[i] = (name, array)


def mutate_bytes(files, rng):
    what, where, many = rng.randrange(7), rng.random(), rng.randrange(1, 9)
    seed = rng.randrange(2**16)

    def change(raw):
        if not raw:
            return raw
        at = min(int(where * len(raw)), len(raw) - 1)
        if what == 0:
            return raw[:at]
        if what == 1:
            return raw[at:]
        if what == 2:
            return raw[:at] + random.Random(seed).randbytes(many) + raw[at:]
        if what == 3:
            return raw[:at] + raw[at + many :]
        if what == 4:
            return raw + raw[at:]
        out, chosen = bytearray(raw), random.Random(seed)
        # The first bytes and the last, which say what the rest is, are worth more attention.
        span = len(raw) if what == 5 else min(len(raw), 700)
        start = 0 if what == 5 or where < 0.5 else len(raw) - span
        for _ in range(many):
            out[start + chosen.randrange(span)] ^= 1 << chosen.randrange(8)
        return bytes(out)

    before = files.raw
    files.raw = lambda raw: change(before(raw))


# What is replaced in the header of an .npy member.
HEADERS = [(b"<f4", b">f4"), (b"<f4", b"<i4"), (b"<f4", b"|O8"), (b"False", b"True "), (b"8", b"4")]
HEADERS += [(b"8", b"-"), (b"(", b"["), (b"\x01\x00", b"\x02\x00"), (b"descr", b"desCr")]


def mutate_header(files, rng):
    before, seed = files.header, rng.randrange(2**16)
    if files.example.ending == ".npz":
        nth = rng.randrange(len(files.members))
        old, new = rng.choice(HEADERS)
        left = [nth]

        def change(content):
            content, left[0] = before(content), left[0] - 1
            start = content[:128].replace(old, new, 1) if left[0] == -1 else content[:128]
            return start + content[128:]

    else:

        def change(header):
            header, chosen = dict(before(header)), random.Random(seed)
            name = chosen.choice(list(header))
            entry = dict(header[name])
            field = chosen.choice([*entry, "dtype", "shape", "data_offsets"])
            if field in ("shape", "data_offsets") and entry.get(field) and chosen.random() < 0.7:
                values = list(entry[field])
                values[chosen.randrange(len(values))] += chosen.choice([-4, -1, 1, 4, 8, 2**33])
                entry[field] = values
            elif field == "dtype" and chosen.random() < 0.7:
                entry[field] = chosen.choice(["F16", "BF16", "F64", "I32", "U8", "F8_E5M2", "F4"])
            else:
                entry[field] = chosen.choice(list(ODD.values()))
            header[name] = entry
            if chosen.random() < 0.1:
                del header[name]
            return header

    files.header = change


def mutate_texts(files, rng):
    name = rng.choice(sorted(files.texts))
    files.texts[name] = mutated_json(files.texts[name], rng)


def mutate_record(files, rng):
    files.card = mutated_json(files.card, rng)


def mutated_json(text, rng):
    """JSON with a value changed, a key taken out or added; one time in five, some other bytes."""
    if rng.random() < 0.2:
        out = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            if out:
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        return bytes(out[: rng.randrange(len(out) + 1)] if rng.random() < 0.3 else out)
    try:
        content = json.loads(text)
    except ValueError:
        return text
    at = content
    while isinstance(at, dict) and at:
        key = rng.choice([*at, *at, *at, rng.choice(WORDS)])
        inside = at.get(key)
        if isinstance(inside, dict) and inside and rng.random() < 0.8:
            at = inside
            continue
        if key in at and rng.random() < 0.2:
            del at[key]
        elif isinstance(inside, list) and inside and rng.random() < 0.5:
            inside[rng.randrange(len(inside))] = rng.choice(list(ODD.values()))
        elif type(inside) is int and rng.random() < 0.5:
            at[key] = inside + rng.choice([-1, 1, 2, 4])
        elif type(inside) is bool and rng.random() < 0.5:
            at[key] = not inside
        elif type(inside) is str and rng.random() < 0.5:
            at[key] = rng.choice(
                ["gap", "map", "token", "erf", "swiglu", "head", "sincos2d", "none"]
            )
        else:
            at[key] = rng.choice(list(ODD.values()))
        break
    return json.dumps(content).encode()


# Names that may be left over, of each code base.
LEFT = re.compile(
    r"opt/|params/txt/|txt/|(params/)?[tb]$|decoder|text_model\.|logit_(scale|bias)$"
    r"|(visual|text)_projection\.|(\w+\.)?embeddings\.mask_token$|mask_token$"
    r"|(vision_model\.)?embeddings\.position_ids$"
)


def judge(path, known):
    """Opens and reads what is at `path`: "refused", or "loaded" and right.

    Raises:
      AssertionError: it is wrong, or took too long; whatever else the code under test raises.
    """
    start = time.process_time()
    try:
        opened = open_model(path, **known)
        found = {name: opened.read(name) for name in opened.shapes}
    except UserError as error:
        assert len(str(error)) < 2000 and str(error).isprintable()
        outcome = "refused"
    else:
        outcome = "loaded"
    took = time.process_time() - start
    assert took < 60, f"{took:.1f} s"
    if outcome == "refused":
        return outcome

    card, config = opened.card, opened.card.config
    arrays = dialects.read(path)
    expected, leftover = dialects.ours(arrays, config.num_heads)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32 and found[name].shape == value.shape, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert dialects.count(config) == sum(value.size for value in expected.values())
    assert set(opened.leftover) == leftover
    assert all(LEFT.match(name) for name in leftover), leftover
    check_types(card)
    assert card.preprocess.in_channels == config.in_channels
    said = dialects.read_record(path)
    if said and said.get("config"):
        for field, value in {**said["config"], **known}.items():
            kept = getattr(config, field)
            if field in ("image_size", "patch_size"):
                value = tuple(value) if isinstance(value, list) else (value,)
                value = (value[0], value[-1])
            assert kept == value and type(kept) is type(value), field
        assert card.labels == tuple(str(label) for label in said["labels"])
        assert card.objective == said["objective"]
        for field in ("resize", "aspect", "crop", "resize_dtype", "mean", "std"):
            if field in said["preprocess"]:
                value = said["preprocess"][field]
                value = tuple(value) if isinstance(value, list) else value
                assert getattr(card.preprocess, field) == value, field
    elif path.is_dir():
        check_config(json.loads((path / "config.json").read_bytes()), opened.facts["file"], config)
    return outcome


def check_config(said, dialect, config):
    """What a config.json of others says, and the weights do not, is what the model has."""
    if dialect.startswith("hf"):
        said = said.get("vision_config") or said
        fields = {"num_attention_heads": "num_heads", "layer_norm_eps": "layernorm_eps"}
        for theirs, mine in fields.items():
            assert said.get(theirs, getattr(config, mine)) == getattr(config, mine)
        gelu = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "quick_gelu": "quick"}
        if config.mlp == "gelu" and said.get("hidden_act") in gelu:
            assert gelu[said["hidden_act"]] == config.gelu
        assert said.get("num_hidden_layers", config.depth) == config.depth
    else:
        args = said.get("model_args") or {}
        assert args.get("num_heads", config.num_heads) == config.num_heads


def run(name, rng):
    """One case: an example, one to three changes of it, and what became of it."""
    files = files_of(EXAMPLES[name])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if files.members:
            mutate(files, rng)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return judge(files.write(pathlib.Path(folder)), EXAMPLES[name].known)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_nobody_changed_is_judged_right(name, tmp_path):
    example = EXAMPLES[name]
    assert judge(files_of(example).write(tmp_path), example.known) == "loaded"


CASES = given(st.sampled_from(sorted(EXAMPLES)), st.randoms(use_true_random=False))
QUIET = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=200, derandomize=True, **QUIET)
@CASES
def test_changed_files_are_refused_or_read_right(name, rng):
    run(name, rng)


@pytest.mark.slow
def test_many_changed_files_are_refused_or_read_right(capsys):
    outcomes, start = collections.Counter(), time.time()

    @settings(max_examples=20_000, **QUIET)
    @CASES
    def every(name, rng):
        outcomes[run(name, rng)] += 1

    try:
        every()
    finally:
        with capsys.disabled():
            print(f"\n{dict(outcomes)} in {time.time() - start:.0f} s")
    assert outcomes["loaded"] > 1000 < outcomes["refused"]


def test_a_few_members_that_share_their_bytes(tmp_path):
    """Too few to be more than weights unpack to: together they are longer than the file."""
    raw = zip_of([("a.npy", npy(np.zeros(1 << 18, np.float32)))])
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    members = (raw[start:end].replace(b"a.npy", b"%d.npy" % i) for i in range(10))
    directory = b"".join(members)
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 10, 10, len(directory), start, 0)
    path = tmp_path / "x.npz"
    path.write_bytes(raw[:start] + directory + tail)
    refused(path, "weights do not compress like that")


def test_a_shard_outside_of_the_folder_of_its_index(tmp_path):
    path = tmp_path / "in"
    EXAMPLES["hf sharded"].write(path)
    index = path / "model.safetensors.index.json"
    (path / "model-00002-of-00003.safetensors").rename(tmp_path / "outside.safetensors")
    text = index.read_text().replace("model-00002-of-00003.safetensors", "../outside.safetensors")
    index.write_text(text)
    refused(path, "names files outside of its folder")


def test_a_bit_of_a_large_array_that_is_another(tmp_path):
    """One that is read by itself, not with its header."""
    value = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    raw = zip_of([("a.npy", npy(value))])
    path = tmp_path / "x.npz"
    path.write_bytes(raw)
    np.testing.assert_array_equal(open_weights(str(path)).read("a"), value)
    at = raw.index(value.tobytes()) + value.nbytes - 1
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(UserError, match="its checksum does not match"):
        open_weights(str(path)).read("a")

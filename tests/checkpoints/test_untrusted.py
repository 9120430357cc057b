"""Files that are damaged, lie about themselves or would run code: refused, or read as they are."""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import pickle
import random
import re
import resource
import shutil
import struct
import tarfile
import time
import tracemalloc
import typing
import warnings
import zipfile

import dialects
import numpy as np
import pytest

import vit_jax
from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.files import open_weights
from vit_jax.checkpoints.opened import open_model
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig

pytestmark = pytest.mark.usefixtures("as_users_have_it")
EXAMPLES = dialects.examples()
PAPER, TIMM, VIT, OURS = (
    EXAMPLES[name] for name in ("google paper", "timm plain", "hf vit", "ours")
)
NESTED = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What is imported and traced at first use is not what the times below are about."""
    for example in (PAPER, TIMM, VIT):
        open_model(example.write(tmp_path_factory.mktemp("warm")), **example.known)


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


def all_refused(path, files, match=None, **known):
    """Asserts it of each content of a file, by names of what is wrong with it; what was said."""
    said = {}
    for name, raw in files.items():
        path.write_bytes(raw)
        try:
            said[name] = refused(path, match, **known)
        except (AssertionError, pytest.fail.Exception) as error:
            raise AssertionError(name) from error
    return said


# -- Pickles -------------------------------------------------------------------------------------


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def torch_zip(pickled):
    members = {"data.pkl": pickled, "version": "3\n", "data/0": b"\0" * 64}
    return zip_of((f"archive/{name}", content) for name, content in members.items())


def torch_tar(pickled):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    return buffer.getvalue()


def test_a_pickle_is_not_opened_and_how_to_convert_it_is_said(tmp_path):
    marker = tmp_path / "marker"
    evil = pickle.dumps(Evil(marker), protocol=2)
    legacy = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + evil
    kinds = {"pickle": evil, "legacy": legacy, "zip": torch_zip(evil), "tar": torch_tar(evil)}
    for name in ("model.pt", "pytorch_model.bin", "model.pth", "weights.npz"):
        path = tmp_path / name.split(".")[1] / name
        path.parent.mkdir()
        message = "is pickled, and loading it could run any code"
        for said in all_refused(path, kinds, message).values():
            assert str(path) in said
            assert "`safetensors.torch.save_file(torch.load(PATH, map_location=" in said
            assert "weights_only=True" in said and "where you trust it" in said
        if not name.endswith(".npz"):
            assert str(path) in refused(path.parent, "is pickled")  # the folder that it is in
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()  # as it would have been


def test_object_arrays_are_not_unpickled(tmp_path):
    marker = tmp_path / "marker"
    evil = np.array([[[Evil(marker)] * 8]], dtype=object)
    fields = np.zeros((1, 1, 8), [("x", "<f4"), ("y", "O")])
    for name in ("cls", "extra"):
        for array in (evil, fields):
            np.savez(tmp_path / "x.npz", **{**PAPER.arrays, name: array})
            refused(tmp_path / "x.npz", f"{name} holds .* of shape .*: refused")
    assert not marker.exists()


# -- npz -----------------------------------------------------------------------------------------


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(text, version=(1, 0), length=None):
    """The start of an .npy file with any text for a header."""
    text = text.encode("latin-1")
    size = len(text) if length is None else length
    packed = struct.pack("<H" if version == (1, 0) else "<I", size)
    return b"\x93NUMPY" + bytes(version) + packed + text


def header_of(shape, descr="<f4"):
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n"


def zip_of(members, method=zipfile.ZIP_STORED):
    """A zip of (name, content) pairs, each name as often as it comes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


MEMBERS = {f"{key}.npy": npy(value) for key, value in PAPER.arrays.items()}


def paper_with(name, content, **kwargs):
    return zip_of({**MEMBERS, f"{name}.npy": content}.items(), **kwargs)


DATA = PAPER.arrays["cls"].tobytes()
SHAPES = [(1, 1, 9), (1, 1, 7), (1, 1, -8), (1, -1, -8), (1, "a", 8), (1, 1, 8.0), 8]
SHAPES += [(2**40,), (2**40, 2**40), (2**62,), (0, 2**62), (1,) * 70 + (8,)]
SHAPES += [(2**32, 2**32, 8), (2**32, 2**32)]  # whose sizes wrap around to 8 and to 0
EIGHT = header_of((1, 1, 8))
LIES = [header_of(shape) for shape in SHAPES]
LIES += [header_of((1, 1, 8), descr) for descr in ("<f3", 7)]
LIES += [header_of((1, 1, 4), "|O"), header_of((1, 1, 2), [("a", "<f4"), ("b", "|O")])]
LIES += [header_of((1, 1, 1), f"{kind}1099511627776") for kind in ("|V", "<U")]
LIES += [header_of((1, 1, 2**62), "|V0"), "[1, 2]\n", "{'descr': '<f4', 'shape': (1, 1, 8)}\n"]
LIES += ["__import__('os').system('true')\n", "(" * 5000 + ")" * 5000 + "\n", "\0" * 100]
LIES += ["{1:" * 3000 + "1" + "}" * 3000 + "\n", EIGHT.strip() + " " * 60_000 + "\n"]
LIES += [EIGHT.replace("8", "8" + "0" * 5000), EIGHT.replace("8", "9**9**9**9")]


def test_a_header_that_lies(tmp_path):
    contents = {text[:90]: npy_header(text) + DATA for text in LIES}
    assert len(contents) == len(LIES)
    for version in ((2, 0), (3, 0)):  # which claim to be huge
        contents[version] = npy_header(EIGHT, version, length=2**32 - 1) + DATA
    for start in (b"", b"\x93NUM", b"\x93NUMPY", b"\x93NUMPY\x01", b"\x93NUMPY\x09\x00", b"PK"):
        contents[start] = start
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raw = {name: paper_with("cls", each, method=method) for name, each in contents.items()}
        for name, said in all_refused(tmp_path / "x.npz", raw, "cls").items():
            assert len(said) < 1000, name


def test_a_file_that_unpacks_to_more_than_weights_do(tmp_path):
    path = tmp_path / "x.npz"
    zeros = np.zeros(80 << 18, np.float32)  # 80 MB, which deflate to 80 kB
    whole = paper_with("extra", npy(zeros), method=zipfile.ZIP_DEFLATED)
    path.write_bytes(whole)
    assert path.stat().st_size < 1 << 20
    refused(path, r"claims to unpack to 83,8\d\d,\d\d\d: refused", megabytes=8)

    # Many small ones do as much harm as a large one.
    small = npy(zeros[: 8 << 18])
    members = [*MEMBERS.items(), *((f"extra{i}.npy", small) for i in range(10))]
    path.write_bytes(zip_of(members, zipfile.ZIP_DEFLATED))
    refused(path, "claims to unpack to", megabytes=8)

    # And one that says that it is small is no larger for it.
    raw = bytearray(whole)
    for start in (raw.rindex(b"extra.npy") - 46, raw.index(b"extra.npy") - 30):
        place = start + (24 if raw[start : start + 4] == b"PK\x01\x02" else 22)
        raw[place : place + 4] = struct.pack("<I", 1000)
    path.write_bytes(raw)
    refused(path, "extra", megabytes=8)


@pytest.mark.parametrize("count, message", [(200, None), (10, "weights do not compress like that")])
def test_members_that_share_their_bytes(count, message, tmp_path):
    """A few bytes that many members are made of, each of them honest about its size.

    Ten are too few to be more than weights unpack to: together they are longer than the file.
    """
    raw = zip_of([("a.npy", npy(np.zeros(1 << 18, np.float32)))])
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    members = (raw[start:end].replace(b"a.npy", b"%05d" % i) for i in range(count))
    directory = b"".join(members)
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    path = tmp_path / "x.npz"
    path.write_bytes(raw[:start] + directory + tail)
    refused(path, message)


def test_two_arrays_of_one_name(tmp_path):
    cls = npy(np.zeros((1, 1, 8), np.float32))
    twice = {name: zip_of([*MEMBERS.items(), (name, cls)]) for name in ("cls.npy", "cls")}
    all_refused(tmp_path / "x.npz", twice, "two arrays named 'cls'")


def test_what_a_zip_may_be_besides(tmp_path):
    whole = PAPER.to_bytes()
    central, end = whole.index(b"PK\x01\x02"), whole.rindex(b"PK\x05\x06")

    def patched(offset, format, value, where=central):
        raw = bytearray(whole)
        struct.pack_into(format, raw, where + offset, value)
        return bytes(raw)

    encrypted = bytearray(patched(8, "<H", 1))
    struct.pack_into("<H", encrypted, 6, 1)
    files = {
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
    }
    all_refused(tmp_path / "x.npz", files)


@pytest.mark.parametrize("name", ["google paper", "timm plain", "hf vit", "ours"])
def test_a_file_that_is_cut_off(name, tmp_path):
    example = EXAMPLES[name]
    path = example.write(tmp_path)
    file = path / "model.safetensors" if path.is_dir() else path
    whole = file.read_bytes()
    lengths = {*np.linspace(0, len(whole) - 1, 8).astype(int).tolist(), 1, 7, 8, 9, 63, 64, 65}
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
    pt2 = r"is a program exported by PyTorch \(.pt2\)"
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
            (tmp_path / name).write_bytes(raw)
            assert str(tmp_path / name) in refused(tmp_path / name, message)
    for name, message in {
        "saved_model.pb": "is a program of TensorFlow",
        "model.onnx": "is an ONNX program",
    }.items():
        (tmp_path / name).write_bytes(b"\x08\x07:\xa4 and more")
        refused(tmp_path / name, message)
    for member, message in {
        "model.weights.h5": "is a Keras archive of HDF5",
        "model/archive_format": pt2,
        "serialized_exported_program.json": pt2,
        "folder/model.safetensors": "is a zip archive: unpack it first",
    }.items():
        (tmp_path / "x").write_bytes(zip_of([(member, "?"), ("config.json", "{}")]))
        refused(tmp_path / "x", message)


def test_folders_of_others(tmp_path):
    for member, message in {
        "saved_model.pb": "is a TensorFlow SavedModel, which is not read here",
        "_CHECKPOINT_METADATA": "is an Orbax checkpoint, without the run folder",
        "checksums.json": "is one checkpoint of a run folder: name the run folder",
        "tf_model.h5": "holds tf_model.h5, HDF5",
        "model.onnx": "holds model.onnx, an ONNX program",
        "x.gguf": "holds x.gguf, GGUF",
        "x.npz.zst": r"holds x.npz.zst, compressed \(zstandard\)",
    }.items():
        (tmp_path / member).write_bytes(b"?")
        said = refused(tmp_path, message)
        assert "Expected a run folder (model/model.json), model.safetensors, or an" in said
        (tmp_path / member).unlink()


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

HEADER, NUMBERS = dialects.split_safetensors(TIMM.to_bytes())


def timm_with(**changes):
    """A valid header with the fields of one entry changed (None takes one out), and its data."""
    entry = {**HEADER["cls_token"], **changes}
    entry = {k: v for k, v in entry.items() if v is not None}
    return dialects.safetensors_of({**HEADER, "cls_token": entry}, NUMBERS)


def test_a_length_of_the_header_that_is_wrong(tmp_path):
    lengths = (0, 1, 2**20, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 1)
    files = {n: struct.pack("<Q", n) + TIMM.to_bytes()[8:] for n in lengths}
    all_refused(tmp_path / "model.safetensors", files, num_heads=2)


ENTRIES = {
    "dtype": ["F33", None, "F64", 32],
    "shape": [[1, 1, 9], [1, 1, 7], [2**40], [2**62, 4], [2**70], [1, -1, -8], [1, 1, 8.0]],
    "data_offsets": [None, [0], [0, 32, 64], [-32, 0], [32, 0], [2**40, 2**40 + 32], [64, 96]],
}
ENTRIES["shape"] += [8, None, [2**32, 2**32, 8], ["1", "1", "8"], [[1, 1, 8]]]
ENTRIES["data_offsets"] += [["0", "32"], [0, 2**64 - 1]]


def test_an_entry_that_lies_or_is_no_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    for field, values in ENTRIES.items():
        lies = {f"{field} {value}": timm_with(**{field: value}) for value in values}
        all_refused(path, lies, num_heads=2)
    shapes = {"I64": [1, 1, 4], "BOOL": [1, 4, 8], "F8_E4M3": [1, 4, 8]}
    shapes |= {"I32": [1, 1, 8], "U32": [1, 1, 8]}
    kinds = {kind: timm_with(dtype=kind, shape=shape) for kind, shape in shapes.items()}
    all_refused(path, kinds, "cls_token", num_heads=2)


def test_headers_of_other_forms(tmp_path):
    text = json.dumps(HEADER).encode()
    metadata = {"vit_jax": {"config": {}}}
    headers = [
        *(b"[1, 2]", b"{}", text[:-10], text + b"\0", text + b"{}", text.replace(b"{", b" {", 1)),
        text.replace(b"cls_token", b"cls\xfftoken"),
        text.replace(b"cls_token", b"cls\\ud800"),
        text.replace(b'"cls_token"', b'"head.bias"'),
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        *({**HEADER, "cls_token": []}, {**HEADER, "cls_token": None}),
        *({**HEADER, "__metadata__": []}, {**HEADER, "__metadata__": metadata}),
    ]
    files = [dialects.safetensors_of(header, NUMBERS) for header in headers]
    files += [
        dialects.safetensors_of(HEADER, data) for data in (NUMBERS + b"\0", NUMBERS[:-1], b"")
    ]
    files += [dialects.safetensors_of(b"{}", b"")]
    all_refused(tmp_path / "model.safetensors", dict(enumerate(files)), num_heads=2)


# -- What stands beside the numbers --------------------------------------------------------------


def ours_with(text):
    """A file of ours with any text for its card."""
    return dialects.to_safetensors(OURS.arrays, {"format": "pt", "vit_jax": text})


def test_a_record_that_is_none(tmp_path):
    texts = ["", " ", "null", "0", "1", "[]", "[1]", '"text"', "{}", "{", "NaN"]
    for config in ("null", "[]", '[["width", 8]]', '"width"', "1", "{}", '{"width": 8}', NESTED):
        texts.append(f'{{"config": {config}}}')
    texts += ["1" * 5000, NESTED, '{"config": {"gelu": ' + NESTED + "}}"]
    texts += ['{"config": {"gelu": ' + "[" * 300 + "]" * 300 + "}}"]
    all_refused(tmp_path / "x.safetensors", {text[:40]: ours_with(text) for text in texts})
    path = PAPER.write(tmp_path)
    weights = dialects.fingerprint(path.read_bytes())
    for text in texts[1:]:  # the same beside an npz, where an empty file is none
        path.with_suffix(".json").write_text(f'{{"vit_jax": {text}, "weights": "{weights}"}}')
        with contextlib.suppress(UserError):
            vit = open_model(path).card
            assert not json.loads(text).get("config") if text[0] == "{" else not json.loads(text)
            check_types(vit)


ODD = {"null": None, "true": True, "false": False, "zero": 0, "minus": -1, "float": 0.5}
ODD |= {"huge": 10**400, "2**40": 2**40, "infinite": float("inf"), "nan": float("nan")}
ODD |= {"text": "x", "digits": "2", "no text": "", "list": [], "lists": [[8], 8], "object": {}}
ODD["nested"] = json.loads("[" * 200 + "]" * 200)


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


def with_odd_values(content, write, only=None, read=lambda path: open_model(path).card, odd=ODD):
    """Reads a file once for each field of `content` and each odd value in its place."""
    outcomes, wrong = collections.Counter(), []
    for field in content if only is None else only:
        for name in odd:
            path = write({**content, field: ODD[name]})
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


def writer(path, target=None):
    """What puts a JSON into a file and returns what to open."""
    return lambda content: (path.write_text(json.dumps(content)), target or path)[1]


def test_odd_values_in_the_record_of_a_model(tmp_path):
    path, card = tmp_path / "x.safetensors", OURS.card
    full = {field.name: field.default for field in dataclasses.fields(ViTConfig)}

    def write(content):
        path.write_bytes(ours_with(json.dumps(content)))
        return path

    # What is of another type is refused as in the record of a run, below, where it costs less.
    few = ("zero", "minus", "huge", "2**40", "lists")
    with_odd_values(
        {**full, **card["config"]}, lambda config: write({**card, "config": config}), odd=few
    )
    with_odd_values(card, write)
    with_odd_values(card["preprocess"], lambda pre: write({**card, "preprocess": pre}), odd=few)
    for family in ([], {"a": 1}, 3, None, "cnn", "resnet"):
        with pytest.raises(UserError):
            open_model(write({**card, "family": family}))


def test_odd_values_in_the_record_of_a_run(tmp_path):
    (tmp_path / "model").mkdir()
    write, card = writer(tmp_path / "model" / "model.json", tmp_path), OURS.card
    full = {field.name: field.default for field in dataclasses.fields(ViTConfig)}
    with_odd_values(card, write, read=ModelCard.read)
    for name, inner in (("config", {**full, **card["config"]}), ("preprocess", card["preprocess"])):
        write_inner = functools.partial(lambda name, inner: write({**card, name: inner}), name)
        with_odd_values(inner, write_inner, read=ModelCard.read)


def test_odd_values_in_a_config_of_hugging_face(tmp_path):
    path = VIT.write(tmp_path)
    write = writer(tmp_path / "config.json", path)
    config = {**VIT.files["config.json"], "vision_config": None, "use_swiglu_ffn": False}
    only = ("id2label", "hidden_act", "layer_norm_eps", "num_attention_heads", "image_size")
    with_odd_values(config, write, (*only, "vision_config", "num_hidden_layers", "use_swiglu_ffn"))
    write(VIT.files["config.json"])
    write = writer(tmp_path / "preprocessor_config.json", path)
    processor = {**dialects.PREPROCESSOR, "do_center_crop": True, "crop_size": 8}
    only = [field for field in processor if field not in ("do_resize", "image_processor_type")]
    with_odd_values(processor, write, only)
    with_odd_values(
        {"height": 8, "shortest_edge": 8}, lambda size: write({**processor, "size": size})
    )


def test_odd_values_in_a_config_of_timm(tmp_path):
    folder = EXAMPLES["timm folder"]
    path, config = folder.write(tmp_path), folder.files["config.json"]
    write = writer(tmp_path / "config.json", path)
    only = ("architecture", "global_pool", "model_args", "pretrained_cfg", "label_names")
    with_odd_values(config, write, only)
    args = {**config["model_args"], "global_pool": "token", "act_layer": "gelu"}
    with_odd_values(args, lambda args: write({**config, "model_args": args}))
    only = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    inner = config["pretrained_cfg"]
    with_odd_values(inner, lambda inner: write({**config, "pretrained_cfg": inner}), only)


def test_json_that_is_none(tmp_path):
    path = EXAMPLES["hf sharded"].write(tmp_path)
    for name in ("config.json", "preprocessor_config.json", "model.safetensors.index.json"):
        whole = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        for text in (b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", NESTED.encode(), b"\0"):
            (tmp_path / name).write_bytes(text)
            assert name in refused(path)
        (tmp_path / name).write_bytes(whole)
        open_model(path)
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
    path = EXAMPLES["hf sharded"].write(tmp_path / "in")
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for name in (
        *("../secret.safetensors", str(secret), "./model-00001-of-00003.safetensors"),
        *("sub/../../secret.safetensors", "..", ".", "", "/", "none.safetensors", "a\0b"),
        *("config.json", "x" * 5000, "\ud800", None, 7, ["../secret.safetensors"]),
    ):
        index.write_text(json.dumps({"weight_map": {**weight_map, "classifier.bias": name}}))
        assert "classifier" not in refused(path)
    outside = weight_map | {"classifier.bias": "../secret.safetensors"}
    index.write_text(json.dumps({"weight_map": outside}))
    refused(path, "names files outside of its folder")
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
    open_model(path)


def test_names_that_are_odd(tmp_path):
    """Names are nothing but names: whatever is in them, they are keys that belong to nothing."""

    def with_name(name, size=3, example=TIMM, match=None):
        arrays = {**example.arrays, name: np.zeros(size, np.float32)}
        path = dataclasses.replace(example, arrays=arrays).write(tmp_path)
        return refused(path, match, **example.known)

    for name in ("../../x", f"blocks.{10**20 - 1}.norm1.weight", "a" * 3000, "{}", "blocks."):
        said = with_name(name)
        assert name[:100] in said and len(said) < 2000
    for name in ("a\x1b[31mb", "a\nerror: b", "a\u202eb", "a\0b"):  # which a terminal would obey
        with_name(name)
    for number in (10**6 - 1, 10**12):
        with_name(f"blocks.{number}.norm1.weight", 8, match="missing|belongs to no part")
    with_name("../../x", 3, PAPER, "belongs to no part")


# -- Anything at all -----------------------------------------------------------------------------


class Files:
    """What is on disk for an example: the arrays, how they are packed, and JSON beside them."""

    def __init__(self, example):
        self.example, self.members = example, list(example.arrays.items())
        self.texts = {name: json.dumps(each).encode() for name, each in example.files.items()}
        if example.shards > 1:
            self.texts["model.safetensors.index.json"] = json.dumps(example.index()).encode()
        self.texts |= {"card": json.dumps(example.card).encode()} if example.card else {}
        self.raw = lambda content: content

    def write(self, folder):
        """Writes it all; returns what to load."""
        example, beside, texts = self.example, bool(self.example.files), dict(self.texts)
        card = texts.pop("card", None)
        path = folder / ("model.safetensors" if beside else f"weights{example.ending}")
        if example.shards > 1:
            example.write(folder)
            path = min(folder.glob("*.safetensors"))
            path.write_bytes(self.raw(path.read_bytes()))
        elif example.ending == ".npz":
            members = [(f"{name}.npy", npy(array)) for name, array in self.members]
            path.write_bytes(self.raw(zip_of(members)))
            if card is not None:
                try:
                    weights = dialects.fingerprint(path.read_bytes()).encode()
                except Exception:  # noqa: BLE001  of what is no zip any more, by whatever change
                    weights = b""
                text = b'{"vit_jax": ' + card + b', "weights": "' + weights + b'"}'
                path.with_suffix(".json").write_bytes(text)
        else:
            said = {} if card is None else {"vit_jax": card.decode("utf-8", "replace")}
            metadata = {"format": "pt", **said}
            path.write_bytes(self.raw(dialects.to_safetensors(dict(self.members), metadata)))
        for name, text in texts.items():
            (folder / name).write_bytes(text)
        return folder if beside else path


NAMES = sorted({name for example in EXAMPLES.values() for name in example.arrays})
WORDS = sorted(
    {"vision_config", "model_args", "act_layer", "global_pool", "img_size", "block_fn", "crop_size"}
    | {"label_names", "image_size", "size", "do_center_crop", "use_swiglu_ffn", "shortest_edge"}
    | {field.name for field in dataclasses.fields(ViTConfig)}
)


PREFIXES = ["model.", "vit.", "params/", "opt/target/", "module.", "img/", "x/"]
KINDS = ["<f2", "<f8", "V2", "<i4", ">f4", ">f8", "?", "<c8", "<u2", "<U1", "S3"]


def mutate(files, rng):
    """One change of one kind; `rng` is a random.Random."""
    kinds = [mutate_names, mutate_arrays, mutate_bytes] * 2
    kinds += [mutate_texts] * 3 if files.texts else []
    if files.example.shards > 1:
        kinds = [mutate_bytes, mutate_texts]
    rng.choice(kinds)(files, rng)


def mutate_names(files, rng):
    members, i = files.members, rng.randrange(len(files.members))
    name, array = members[i]
    others, at = members[:i] + members[i + 1 :], rng.randrange(len(name) + 1)
    part = rng.choice([p for p in re.split(r"[./]", name) if p] or [""])
    old, new = rng.choice("01"), rng.choice(["0", "1", "2", "7", "00", "-1", "999999999"])
    prefix, letter = rng.choice(PREFIXES), rng.choice(["", "x", "é", "\n", "/", "."])
    members = rng.choice(
        [
            others,
            # A whole group: all biases of a kind, a layer, a block.
            [m for m in members if part not in re.split(r"[./]", m[0])] or members,
            [*others, (rng.choice(NAMES), array)],
            [*members, (rng.choice([*NAMES, name]), array)],
            [*others, (name.replace(old, new, 1), array)],
            [(prefix + key, value) for key, value in members],
            [*others, (name[:at] + letter + name[at + 1 :], array)],
        ]
    )
    unique = files.example.ending == ".safetensors" or rng.random() < 0.9
    files.members = list(dict(members).items()) if unique else members


def retyped(array, kind):
    """The same bytes, or the same numbers, as another type."""
    if "V" not in kind + array.dtype.kind:
        return array.astype(kind)
    fits = array.shape[-1] * array.itemsize % np.dtype(kind).itemsize == 0
    return array.view(kind) if fits else array


def mutate_arrays(files, rng):
    npz, members, i = (
        files.example.ending == ".npz",
        files.members,
        rng.randrange(len(files.members)),
    )
    (name, array), (other, theirs) = members[i], rng.choice(members)
    if not array.ndim:
        return
    kind = rng.choice(KINDS if npz else KINDS[:4])
    fill = rng.choice([np.nan, np.inf, -0.0, 1e-40, 3e38])
    changes = [
        lambda: array.reshape(rng.choice([(-1,), (1, *array.shape), array.shape[::-1]])),
        lambda: np.ascontiguousarray(array.T),
        lambda: np.ascontiguousarray(array[: rng.randrange(array.shape[0] + 1)]),
        lambda: np.concatenate([array, array]),
        lambda: retyped(array, kind),
        lambda: np.full_like(array, fill) if array.dtype.kind == "f" else array,
        lambda: np.asfortranarray(array) if npz else array,
        None,
    ]
    change = rng.choice(changes)
    if change is None:  # two of them change places
        members[:] = [(k, array if k == other else v) for k, v in members]
    members[i] = (name, change() if change else theirs)


def mutate_bytes(files, rng):
    what, where, many = rng.randrange(7), rng.random(), rng.randrange(1, 9)
    before, chosen = files.raw, random.Random(rng.randrange(2**16))

    def change(raw):
        raw = before(raw)
        at = min(int(where * len(raw)), max(len(raw) - 1, 0))
        more = chosen.randbytes(many)
        # The first bytes and the last, which say what the rest is, are worth more attention.
        span = len(raw) if what == 5 else min(len(raw), 700)
        start, flipped = 0 if what == 5 or where < 0.5 else len(raw) - span, bytearray(raw)
        for _ in range(many if raw else 0):
            flipped[start + chosen.randrange(span)] ^= 1 << chosen.randrange(8)
        cut = [raw[:at], raw[at:], raw[:at] + more + raw[at:], raw[:at] + raw[at + many :]]
        return [*cut, raw + raw[at:], bytes(flipped), bytes(flipped)][what]

    files.raw = change


def mutate_texts(files, rng):
    """JSON with a value changed, a key taken out or added; one time in five, some other bytes."""
    name = rng.choice(sorted(files.texts))
    text = files.texts[name]
    if rng.random() < 0.2:
        out = bytearray(text)
        for _ in range(rng.randrange(1, 4) if out else 0):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        files.texts[name] = bytes(out[: rng.randrange(len(out) + 1)] if rng.random() < 0.3 else out)
        return
    try:
        content = at = json.loads(text)
    except ValueError:
        return
    while isinstance(at, dict) and at:
        key = rng.choice([*at, *at, *at, rng.choice(WORDS)])
        inside = at.get(key)
        if not isinstance(inside, dict) or not inside or rng.random() < 0.2:
            break
        at = inside
    if not isinstance(at, dict) or not at:
        return
    words = ["gap", "map", "token", "erf", "swiglu", "head", "sincos2d", "none"]
    odd, near = rng.choice(list(ODD.values())), rng.random() < 0.5
    if key in at and rng.random() < 0.2:
        del at[key]
    elif isinstance(inside, list) and inside and near:
        inside[rng.randrange(len(inside))] = odd
    elif type(inside) in (int, bool, str) and near:
        like = {int: lambda: inside + rng.choice([-1, 1, 2, 4]), bool: lambda: not inside}
        at[key] = like.get(type(inside), lambda: rng.choice(words))()
    else:
        at[key] = odd
    files.texts[name] = json.dumps(content).encode()


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
        found = None
    took = time.process_time() - start
    assert took < 60, f"{took:.1f} s"
    if found is None:
        return "refused"

    card, config = opened.card, opened.card.config
    arrays = dialects.read(path)
    before = opened.facts.get("prefix", "").removesuffix(", taken off every key")
    assert all(name.startswith(before) for name in arrays)
    arrays = {name.removeprefix(before): value for name, value in arrays.items()}
    expected, leftover = dialects.ours(arrays, config.num_heads)
    leftover = {before + name for name in leftover}
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32 and found[name].shape == value.shape, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert dialects.count(config) == sum(value.size for value in expected.values())
    assert set(opened.leftover) == leftover
    assert all(LEFT.match(name.removeprefix(before)) for name in leftover), leftover
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
        fields = ("resize", "aspect", "crop", "resize_dtype", "mean", "std")
        for field in set(fields) & set(said["preprocess"]):
            value = said["preprocess"][field]
            value = tuple(value) if isinstance(value, list) else value
            assert getattr(card.preprocess, field) == value, field
    elif path.is_dir():
        check_config(json.loads((path / "config.json").read_bytes()), opened.facts["file"], config)
    return "loaded"


def check_config(said, dialect, config):
    """What a config.json of others says, and the weights do not, is what the model has."""
    fields = {"num_heads": "num_heads"}
    if dialect.startswith("hf"):
        said = said.get("vision_config") or said
        fields = {"num_attention_heads": "num_heads", "layer_norm_eps": "layernorm_eps"}
        fields |= {"num_hidden_layers": "depth"}
        gelu = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "quick_gelu": "quick"}
        if config.mlp == "gelu" and said.get("hidden_act") in gelu:
            assert gelu[said["hidden_act"]] == config.gelu
    else:
        said = said.get("model_args") or {}
    for theirs, mine in fields.items():
        assert said.get(theirs, getattr(config, mine)) == getattr(config, mine)


def run(folder, cases):
    """So many cases of each example, of none to three changes; how often it came to what."""
    outcomes = collections.Counter()
    for name, example in EXAMPLES.items():
        for case in range(cases):
            rng, files = random.Random(f"{name} {case}"), Files(example)
            for _ in range(rng.choice([1, 1, 1, 2, 3]) if case else 0):
                if files.members:
                    mutate(files, rng)
            path = folder / "case"
            path.mkdir()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    outcome = judge(files.write(path), example.known)
            except Exception as error:
                raise AssertionError(f"{name}, case {case}") from error
            assert case or outcome == "loaded", name  # what nobody changed
            outcomes[outcome] += 1
            shutil.rmtree(path)
    return outcomes


def test_changed_files_are_refused_or_read_right(tmp_path):
    outcomes = run(tmp_path, 4)
    assert outcomes["loaded"] > 50 < outcomes["refused"]


@pytest.mark.slow  # finds what one change in thousands does
def test_many_changed_files_are_refused_or_read_right(tmp_path, capsys):
    outcomes = run(tmp_path, 550)
    with capsys.disabled():
        print(f"\n{dict(outcomes)}")
    assert outcomes["loaded"] > 1000 < outcomes["refused"]


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

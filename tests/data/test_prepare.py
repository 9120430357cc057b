"""Prepared shards: against what went in, TFDS's own reader and protobuf's own parser."""

import collections
import errno
import fcntl
import gzip
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import cv2
import hypothesis
import numpy as np
import PIL.Image
import pytest
import simplejpeg
import tensorflow_datasets
from conftest import ROOT
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.__main__ import main
from vit_jax.data.forms.examples import parse_example, write_example
from vit_jax.data.forms.records import FEATURES, RecordSource
from vit_jax.data.prepare import Conversion, prepare
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


def pixels(h, w, seed=0, channels=3):
    """Smooth, so that a JPEG loses little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), np.uint8)
    return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC).reshape(h, w, channels)


def jpeg(h=12, w=16, seed=0):
    return simplejpeg.encode_jpeg(pixels(h, w, seed), 90)


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


KINDS = ("records", "tfds")
CLASSES = ("Dog", "cat", "épagneul")


@pytest.fixture
def pets(tmp_path):
    """Ten images of three classes, under train."""
    for i in range(10):
        save(tmp_path / f"pets/train/{CLASSES[i % 3]}/{i} ñ.jpg", jpeg(seed=i))
    return str(tmp_path / "pets")


def examples(source):
    return [(source[i]["image"], source[i]["label"]) for i in range(len(source))]


def files(dst):
    """The bytes of all that is left in a folder, without what says which data they are from."""
    found = {path.name: path.read_bytes() for path in dst.iterdir() if path.is_file()}
    info = json.loads(found.pop("vit_jax_train.json"))
    return found, info["fingerprint"], info["shards"]


def test_prepared_images_are_those_of_the_folder_and_tfds_reads_them(pets, tmp_path):
    dst = tmp_path / "new" / "shards"
    info = prepare(pets, str(dst), shard_examples=4)
    given = open_source(f"folder:{pets}", "train")
    source = open_source(f"records:{dst}", "train")
    assert examples(source) == examples(given)
    assert source.label_names == given.label_names == CLASSES
    assert source.fingerprint == info["fingerprint"]
    names = [os.path.basename(given[i]["name"]) for i in range(10)]
    assert all(f"({name})" in source[i]["name"] for i, name in enumerate(names))
    assert [shard["examples"] for shard in info["shards"]] == [4, 4, 2]
    assert (info["examples"], info["bad_images"]) == (10, 0)
    assert not list(dst.glob("bad*")) and not list(dst.glob("*.partial"))

    builder = tensorflow_datasets.builder_from_directory(dst)
    decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
    theirs = builder.as_data_source("train", decoders=decoders)
    assert [(each["image"], each["label"]) for each in theirs] == examples(given)
    assert [each["name"].decode() for each in theirs] == names
    assert tuple(builder.info.features["label"].names) == CLASSES
    decoded = builder.as_data_source("train")[3]["image"]
    np.testing.assert_array_equal(decoded, PIL.Image.open(io.BytesIO(given[3]["image"])))
    assert "tensorflow" not in sys.modules


def test_tfds_and_records_agree(pets, tmp_path):
    prepare(pets, str(tmp_path / "dst"), shard_examples=4)
    ours, theirs = (open_source(f"{k}:{tmp_path / 'dst'}", "train") for k in KINDS)
    assert examples(ours) == examples(theirs)
    assert ours.label_names == theirs.label_names
    with pytest.raises(UserError, match="has no example in split"):
        open_source(f"records:{tmp_path / 'dst'}", "train[:1%]")


def test_parts_have_all_classes_and_share_no_example(tmp_path):
    """As large as TFDS makes them, which rounds halves alike: 31.5 of 45 are 32."""
    images = np.arange(45 * 16, dtype=np.uint8).reshape(45, 4, 4)
    np.savez(tmp_path / "sorted.npz", train_images=images, train_labels=np.repeat(range(3), 15))
    prepare(f"arrays:{tmp_path / 'sorted.npz'}", str(tmp_path / "dst"), shard_examples=10)
    shards = tmp_path / "dst"
    parts = ["train[:20%]", "train[20%:70%]", "train[70%:]"]
    ours = [open_source(f"records:{shards}", part) for part in parts]
    assert [len(part) for part in ours] == [
        len(open_source(f"tfds:{shards}", part)) for part in parts
    ]
    whole = open_source(f"records:{shards}", "train")
    read = [example for part in ours for example in examples(part)]
    assert sorted(read) == sorted(examples(whole)) and read != examples(whole)
    assert len({part.fingerprint for part in (*ours, whole)}) == 4
    # A contiguous fifth would have the first class alone.
    assert {label for _, label in examples(ours[0])} == {0, 1, 2}
    assert examples(pickle.loads(pickle.dumps(ours[1]))) == examples(ours[1])


# --------------------------------------------------------------------------------------- examples

Example = tf_example_pb2.Example
INT64 = st.integers(-(2**63), 2**63 - 1)
NAME = st.text(max_size=20)


def first(message):
    """What `parse_example` is to find, by protobuf's own reading."""
    found = {}
    for name, feature in message.features.feature.items():
        kind = feature.WhichOneof("kind")
        values = getattr(feature, kind).value if kind in ("bytes_list", "int64_list") else []
        found[name] = values[0] if len(values) else None
    return found


def varint(value):
    value %= 2**64
    return (bytes([value & 127 | 128]) + varint(value >> 7)) if value > 127 else bytes([value])


def field(number, data):
    """A field of bytes, or, of an int, of a number."""
    if isinstance(data, int):
        return varint(number << 3) + varint(data)
    return varint(number << 3 | 2) + varint(len(data)) + data


@hypothesis.settings(deadline=None, derandomize=True, database=None)
@hypothesis.given(st.dictionaries(NAME, st.binary(max_size=300) | INT64))
def test_an_example_is_written_as_protobuf_would(features):
    written = write_example(features)
    assert first(Example.FromString(written)) == features == parse_example(written)
    entries = b""
    for name in sorted(features):
        one = type(Example().features)()
        value = features[name]
        kind = "bytes_list" if isinstance(value, bytes) else "int64_list"
        getattr(one.feature[name], kind).value.append(value)
        entries += one.SerializeToString()
    assert written == field(1, entries)


VALUES = (
    st.lists(st.binary(max_size=200), max_size=3).map(
        lambda values: field(1, b"".join(field(1, each) for each in values))
    )
    | st.lists(INT64, max_size=3).map(
        lambda values: field(3, b"".join(field(1, each) for each in values))
    )
    | st.lists(INT64, min_size=1, max_size=3).map(
        lambda values: field(3, field(1, b"".join(map(varint, values))))
    )
    | st.lists(st.floats(width=32), max_size=3).map(
        lambda values: field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
    )
    | st.just(b"")
)


@hypothesis.settings(deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(st.tuples(NAME, VALUES, st.booleans()), max_size=5))
def test_an_example_is_read_as_protobuf_does(entries):
    """Features in any order, name or value first, one twice, integers packed or one by one."""
    wire = b""
    for name, value, name_last in entries:
        parts = [field(1, name.encode()), field(2, value)]
        wire += field(1, b"".join(reversed(parts) if name_last else parts))
    wire = field(1, wire)
    assert parse_example(wire) == first(Example.FromString(wire))


def test_floats_one_by_one_are_read_as_protobuf_does():
    value = field(2, b"\x0d" + struct.pack("<f", 1.5))
    wire = field(1, field(1, field(1, b"x") + field(2, value)))
    assert parse_example(wire) == first(Example.FromString(wire)) == {"x": None}


SOUND = write_example({"image": jpeg(), "label": 1, "name": "ñ.jpg".encode()})


@hypothesis.settings(deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.binary(max_size=60)
    | st.integers(0, len(SOUND)).map(lambda n: SOUND[:n])
    | st.tuples(st.integers(0, len(SOUND) - 1), st.integers(1, 255)).map(
        lambda at: SOUND[: at[0]] + bytes([SOUND[at[0]] ^ at[1]]) + SOUND[at[0] + 1 :]
    )
)
@hypothesis.example(field(1, 1))
@hypothesis.example(field(1, field(1, 1)))
@hypothesis.example(field(1, field(1, field(1, 1))))
@hypothesis.example(field(1, field(1, field(2, 1))))
@hypothesis.example(field(1, field(1, field(2, field(1, field(1, 1))))))
@hypothesis.example(b"\xff" * 12)
def test_garbage_is_a_bad_image_and_no_bug(data):
    source = RecordSource([data], FEATURES, "here", ("a",), "")
    try:
        example = source[0]
    except UserError as error:
        assert str(error).startswith("here, example 0")
    else:
        assert isinstance(example["image"], bytes) and isinstance(example["label"], int)


# ----------------------------------------------------------------------------------------- images


def png_header(h, w):
    """A PNG that claims to be of that size."""
    chunks = b""
    for kind, data in [
        (b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ]:
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


BAD = {
    "cat/text.jpg": (b"not an image", "it is of no known format"),
    "cat/empty.png": (b"", "it is empty"),
    "Dog/cut.jpg": (jpeg(100, 100)[:-300], "OSError: "),
    "Dog/bomb.png": (png_header(50_000, 50_000), "DecompressionBombError: "),
}


def test_bad_images_are_left_out_and_listed(pets, tmp_path, capsys):
    given = examples(open_source(f"folder:{pets}", "train"))
    for name, (data, _) in BAD.items():
        save(tmp_path / "pets/train" / name, data)
    dst = tmp_path / "dst"
    assert main(["prepare", pets, str(dst), "--shard-examples=1"]) == 0  # some shards are empty
    assert json.loads(capsys.readouterr().out)["bad_images"] == len(BAD)
    lines = (dst / "bad_images_train.jsonl").read_text().splitlines()
    found = {each["name"]: each["why"] for each in map(json.loads, lines)}
    assert set(found) == {f"{pets}/train/{name}" for name in BAD}
    for name, (_, why) in BAD.items():
        assert found[f"{pets}/train/{name}"].startswith(why)
    for kind in KINDS:
        assert examples(open_source(f"{kind}:{dst}", "train")) == given
    theirs = tensorflow_datasets.builder_from_directory(dst).as_data_source("train")
    assert [each["label"] for each in theirs] == [label for _, label in given]


def test_nothing_but_bad_images_is_an_error(tmp_path):
    save(tmp_path / "pets/cat/1.jpg", b"text")
    save(tmp_path / "pets/cat/2.jpg", b"text")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"none of the 2 images of .*pets can be read; .*1\.jpg"
        ):
            prepare(str(tmp_path / "pets"), str(tmp_path / "dst"))
        with pytest.raises(UserError, match="has no split 'train'"):
            open_source(f"records:{tmp_path / 'dst'}", "train")


@pytest.mark.parametrize(
    "size, short, expected",
    [
        ((160, 240), 80, (80, 120)),
        ((240, 164), 80, (117, 80)),
        ((81, 500), 80, (80, 494)),
        ((333, 333), 70, (70, 70)),
        ((20, 90), 20, None),
        ((19, 90), 20, None),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_are_shrunk(size, short, expected, channels):
    image = pixels(*size, channels=channels)
    kind = {"colorspace": "GRAY", "colorsubsampling": "Gray"} if channels == 1 else {}
    for data in (
        simplejpeg.encode_jpeg(image, 95, **kind),
        cv2.imencode(".png", image)[1].tobytes(),
    ):
        converted = Conversion(short_side=short, quality=93)(data)
        if expected is None:
            assert converted == data
            continue
        new = PIL.Image.open(io.BytesIO(converted))
        assert (new.format, new.mode) == ("JPEG", "L" if channels == 1 else "RGB")
        before = np.asarray(PIL.Image.open(io.BytesIO(data)))
        area = cv2.resize(before, expected[::-1], interpolation=cv2.INTER_AREA)
        assert np.asarray(new).shape == area.shape
        assert np.abs(np.asarray(new).astype(int) - area).mean() < 3
        out = io.BytesIO()
        PIL.Image.fromarray(area).save(out, "JPEG", quality=93)
        assert new.quantization == PIL.Image.open(out).quantization


@pytest.mark.parametrize("channels", [1, 3])
def test_a_shrunk_image_is_upright(channels):
    image = PIL.Image.fromarray(pixels(160, 240, channels=channels).squeeze())
    tags = image.getexif()
    tags[0x0112] = 6  # a quarter turn
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, exif=tags)
    new = PIL.Image.open(io.BytesIO(Conversion(short_side=80)(out.getvalue())))
    assert 0x0112 not in new.getexif()
    turned = np.ascontiguousarray(np.rot90(image, -1))
    area = cv2.resize(turned, (80, 120), interpolation=cv2.INTER_AREA)
    assert np.abs(np.asarray(new).astype(int) - area).mean() < 3
    assert Conversion(short_side=160)(out.getvalue()) == out.getvalue()


# --------------------------------------------------------------------------- again, and once more


def test_threads_change_nothing(pets, tmp_path):
    options = {"conversion": Conversion(short_side=5), "shard_examples": 3}
    for threads in (1, 4):
        prepare(pets, str(tmp_path / f"{threads}"), threads=threads, **options)
    assert files(tmp_path / "1") == files(tmp_path / "4")


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    many = [simplejpeg.encode_jpeg(pixels(900, 900, seed), 90) for seed in range(4)]
    for i in range(120):
        save(tmp_path / f"pets/train/{'ab'[i % 2]}/{i:03d}.jpg", many[i // 2 % 4])
    src, dst = str(tmp_path / "pets"), tmp_path / "dst"
    flags = ["--short-side=200", "--shard-examples=10", "--threads=1"]
    command = [sys.executable, "-m", "vit_jax", "prepare", src, str(dst), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    unfinished, latest = dst / ".unfinished_train", time.monotonic() + 120
    while not list(unfinished.glob("images-*.json")):
        assert process.poll() is None and time.monotonic() < latest, process.poll()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = [path.name.removesuffix(".json") for path in unfinished.glob("images-*.json")]
    assert 0 < len(kept) < 12
    with pytest.raises(UserError, match="has no split 'train'"):
        open_source(f"records:{dst}", "train")
    with pytest.raises(UserError, match=r"made otherwise \(quality differ"):
        prepare(src, str(dst), shard_examples=10, conversion=Conversion(200, 90))

    # One of them was not wholly on the disk, and must be made again.
    damaged = kept.pop() if len(kept) > 1 else None
    if damaged:
        os.truncate(dst / damaged, 100)
    times = {name: (dst / name).stat().st_mtime_ns for name in kept}
    assert main(["prepare", src, str(dst), *flags]) == 0
    assert {name: (dst / name).stat().st_mtime_ns for name in kept} == times
    assert main(["prepare", src, str(tmp_path / "at once"), *flags]) == 0
    assert files(dst) == files(tmp_path / "at once")
    assert not unfinished.exists() and len(open_source(f"records:{dst}", "train")) == 120


def test_a_full_disk_stops_with_a_sentence_and_what_was_written_counts(
    pets, tmp_path, capsys, monkeypatch
):
    usage = collections.namedtuple("usage", "total used free")
    dst, whole = tmp_path / "dst", tmp_path / "whole"

    def disk_usage(path):  # room for two shards
        return usage(2**40, 0, 2**40 if len(list(dst.glob("*-of-00004"))) < 2 else 0)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    argv = ["prepare", pets, str(dst), "--shard-examples=3"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "the disk is nearly full" in err and err.count("\n") == 1
    with pytest.raises(OSError, match="nearly full") as caught:
        prepare(pets, str(dst), shard_examples=3)
    assert caught.value.errno == errno.ENOSPC
    assert len(list(dst.glob("*-of-00004"))) == 2
    with pytest.raises(UserError, match="has no split 'train'"):
        open_source(f"records:{dst}", "train")
    monkeypatch.undo()
    assert main(argv) == 0
    prepare(pets, str(whole), shard_examples=3)
    assert files(dst) == files(whole)


def test_a_finished_split_is_left_alone(pets, tmp_path):
    dst = tmp_path / "dst"
    info = prepare(pets, str(dst))
    times = {path: path.stat().st_mtime_ns for path in dst.iterdir()}
    assert prepare(pets, str(dst)) == info
    moved = shutil.move(pets, tmp_path / "elsewhere")
    assert prepare(str(moved), str(dst)) == info
    assert {p: p.stat().st_mtime_ns for p in times if p.name != ".lock"} == {
        p: t for p, t in times.items() if p.name != ".lock"
    }


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"conversion": Conversion(short_side=4)}, "short_side"),
        ({"conversion": Conversion(quality=90)}, "quality"),
        ({"shard_examples": 3}, "shard_examples"),
        ({"examples": 2}, "examples"),
        ({"part": "train[:50%]"}, "source_fingerprint, examples"),
    ],
)
def test_other_options_are_refused(pets, tmp_path, changes, named):
    prepare(pets, str(tmp_path / "dst"))
    before = files(tmp_path / "dst")
    with pytest.raises(UserError, match=rf"holds split 'train' made otherwise \({named} differ\)"):
        prepare(pets, str(tmp_path / "dst"), **changes)
    assert files(tmp_path / "dst") == before


@pytest.mark.parametrize(
    "short, exif, same", [(None, False, True), (4, True, True), (4, False, False)]
)
def test_what_an_earlier_version_shrunk_lying_is_other_data(pets, tmp_path, short, exif, same):
    options = {"conversion": Conversion(short_side=short)}
    info = prepare(pets, str(tmp_path / "dst"), **options)
    assert info["plan"]["upright"] is True
    del info["plan"]["upright"]
    info["plan"]["exif"] = exif
    (tmp_path / "dst" / "vit_jax_train.json").write_text(json.dumps(info))
    if same:
        assert prepare(pets, str(tmp_path / "dst"), **options)["shards"] == info["shards"]
    else:
        with pytest.raises(UserError, match=r"made otherwise \(upright differ\)"):
            prepare(pets, str(tmp_path / "dst"), **options)


def test_two_at_the_same_time_are_refused(pets, tmp_path):
    prepare(pets, str(tmp_path / "dst"))
    with open(tmp_path / "dst" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another prepare is writing to .*dst"):
            prepare(pets, str(tmp_path / "dst"))
    prepare(pets, str(tmp_path / "dst"))


def test_a_second_split_has_the_classes_of_the_first(pets, tmp_path):
    dst = tmp_path / "dst"
    first_info = prepare(pets, str(dst), shard_examples=4)
    save(tmp_path / "pets/val/épagneul/1.jpg", jpeg(seed=20))
    save(tmp_path / "pets/val/cat/2.jpg", jpeg(seed=21))
    info = prepare(pets, str(dst), split="val")
    assert tuple(info["label_names"]) == CLASSES
    expected = [(jpeg(seed=21), 1), (jpeg(seed=20), 2)]
    train = examples(open_source(f"folder:{pets}", "train"))
    decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
    builder = tensorflow_datasets.builder_from_directory(dst)
    for split, wanted in {"val": expected, "train": train}.items():
        for kind in KINDS:
            source = open_source(f"{kind}:{dst}", split)
            assert examples(source) == wanted and source.label_names == CLASSES
        theirs = builder.as_data_source(split, decoders=decoders)
        assert [(each["image"], each["label"]) for each in theirs] == wanted
    assert prepare(pets, str(dst), shard_examples=4) == first_info
    save(tmp_path / "pets/test/wolf/1.jpg", jpeg())
    save(tmp_path / "pets/test/cat/1.jpg", jpeg())
    with pytest.raises(UserError, match="knows no 'wolf'"):
        prepare(pets, str(dst), split="test")


SAME = r"as split 'val' is the same images as split 'train' of .*: say which part each split is"


@pytest.mark.parametrize(
    "first, second",
    [
        ({}, {}),
        ({"part": "train[:50%]"}, {"part": "train[:50%]"}),
        ({"src": "folder:SRC"}, {"src": "SRC"}),
        ({}, {"src": "SRC/train", "part": "all"}),
        ({"conversion": Conversion(short_side=4)}, {"shard_examples": 3}),
        ({"src": "fractals:classes=3,size=16", "examples": 6},) * 2,
    ],
)
def test_the_same_images_are_no_second_split(pets, tmp_path, first, second):
    def make(split, src="SRC", part="train", **options):
        prepare(src.replace("SRC", pets), str(dst), split=split, part=part, **options)

    dst = tmp_path / "dst"
    make("train", **first)
    before = files(dst)
    base = second.get("part", "train").partition("[")[0]
    hint = re.escape(f"such as --part={base}[:90%] for one and --part={base}[90%:] for the other")
    with pytest.raises(UserError, match=f"{SAME}, {hint}"):
        make("val", **second)
    assert files(dst) == before and not (dst / ".unfinished_val").exists()


def test_a_split_that_was_begun_is_a_split(pets, tmp_path, monkeypatch):
    dst, usage = tmp_path / "dst", collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
        with pytest.raises(OSError, match="nearly full"):
            prepare(pets, str(dst), split="trian", part="train")
    with pytest.raises(UserError, match=r"'trian' of .*begun \(if .* delete .*unfinished_trian\)"):
        prepare(pets, str(dst))
    shutil.rmtree(dst / ".unfinished_trian")
    assert prepare(pets, str(dst))["examples"] == 10


def test_other_images_of_the_same_names_and_sizes_are_a_second_split(tmp_path):
    for split, seed in (("train", 0), ("val", 9)):
        for i in range(4):
            image = cv2.imencode(".bmp", pixels(6, 8, seed + i))[1].tobytes()
            save(tmp_path / f"src/{split}/{'ab'[i % 2]}/{i}.bmp", image)
    for split in ("train", "val"):
        prepare(str(tmp_path / "src"), str(tmp_path / "dst"), split=split)
    sources = [open_source(f"records:{tmp_path / 'dst'}", split) for split in ("train", "val")]
    assert not {image for image, _ in examples(sources[0])} & {i for i, _ in examples(sources[1])}


@pytest.mark.parametrize("earlier", [False, True])
def test_images_that_two_splits_share_are_counted(pets, tmp_path, caplog, monkeypatch, earlier):
    dst = tmp_path / "dst"
    prepare(pets, str(dst))
    if earlier:  # a version that kept no hashes
        info = json.loads((dst / "vit_jax_train.json").read_text())
        del info["content"]
        (dst / "vit_jax_train.json").write_text(json.dumps(info))
    given = open_source(f"folder:{pets}", "train[50%:]")
    assert caplog.messages == []
    prepare(pets, str(dst), split="val", part="train[50%:]")
    n = len(given)
    (said,) = caplog.messages
    assert said.startswith(f"{n} images of split 'val' of {dst} are in split 'train' too: ")
    monkeypatch.setattr("vit_jax.data.prepare._MOST_READ", 5)
    save(tmp_path / "more/cat/1.jpg", jpeg(seed=50))
    prepare(str(tmp_path / "more"), str(dst), split="more", part="all")
    assert len(caplog.messages) == 1 + earlier
    assert "'train' of" not in caplog.messages[-1] or "has no hashes of its 10" in caplog.text


def test_what_an_earlier_version_began_is_finished_without_hashes(pets, tmp_path, monkeypatch):
    dst, usage = tmp_path / "dst", collections.namedtuple("usage", "total used free")
    full = lambda path: usage(1, 1, 0 if list(dst.glob("*-of-00004")) else 2**40)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full)
        with pytest.raises(OSError, match="nearly full"):
            prepare(pets, str(dst), shard_examples=3)
    (vouched,) = (dst / ".unfinished_train").glob("images-*.json")
    shard = json.loads(vouched.read_text())
    assert len(shard.pop("content")) == 3 * 16
    vouched.write_text(json.dumps(shard))
    assert "content" not in prepare(pets, str(dst), shard_examples=3)
    source = open_source(f"records:{dst}", "train")
    assert source.kept_content() is None and not (dst / "content_train.npy").exists()
    assert examples(source) == examples(open_source(f"folder:{pets}", "train"))


def test_a_file_of_classes_fixes_their_order(pets, tmp_path):
    names = ("épagneul", "wolf", "cat", "Dog")
    text = tmp_path / "classes.txt"
    text.write_text("\n".join(names) + "\n\n")
    prepare(pets, str(tmp_path / "dst"), classes=str(text))
    given = open_source(f"folder:{pets}", "train")
    expected = [names.index(given.label_names[label]) for label in given.labels]
    for kind in KINDS:
        source = open_source(f"{kind}:{tmp_path / 'dst'}", "train")
        assert source.label_names == names
        assert [label for _, label in examples(source)] == expected
    for content, message in [
        (b"Dog\ncat\n", "knows no 'épagneul'|names other classes than the splits that"),
        (b"Dog\ncat\nDog\n", "names a class twice"),
        (b"\xff\xfe", "is no file of class names"),
    ]:
        text.write_bytes(content)
        for dst in ("dst", "new"):
            with pytest.raises(UserError, match=message):
                prepare(pets, str(tmp_path / dst), classes=str(text))


def test_so_many_examples_of_an_endless_source(tmp_path):
    spec = "fractals:classes=3,size=16"
    info = prepare(spec, str(tmp_path), examples=8, shard_examples=5)
    assert info["examples"] == 8 and info["label_names"] == ["fractal0", "fractal1", "fractal2"]
    given, found = open_source(spec, "train"), open_source(f"records:{tmp_path}", "train")
    for i in range(8):
        image = np.asarray(PIL.Image.open(io.BytesIO(found[i]["image"])))
        np.testing.assert_array_equal(image, given[i]["image"].squeeze())
        assert found[i]["label"] == given[i]["label"]
    with pytest.raises(UserError, match="is endless: say how many --examples"):
        prepare(spec, str(tmp_path / "all"))


@pytest.mark.parametrize("change", ["cut", "longer", "gone", "garbled", "list"])
def test_shards_that_changed_are_refused(pets, tmp_path, change):
    prepare(pets, str(tmp_path), shard_examples=4)
    shard, info = tmp_path / "images-train.array_record-00001-of-00003", "vit_jax_train.json"
    if change in ("cut", "longer"):
        os.truncate(shard, shard.stat().st_size + (1 if change == "longer" else -1))
    elif change == "gone":
        shard.unlink()
    else:
        (tmp_path / info).write_text("{" if change == "garbled" else "[]")
    messages = {
        "gone": rf"\({shard.name} is not there\)",
        "garbled": "is damaged",
        "list": "is dam",
    }
    with pytest.raises(UserError, match=messages.get(change, f"{shard.name} has .* bytes, not")):
        open_source(f"records:{tmp_path}", "train")


# --------------------------------------------------------------------- archives, and command line


def packed(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


TARS = {
    "of tars": packed(
        {
            f"winter21_whole/{c}.tar": packed({f"{c}_{i}.JPEG": jpeg(seed=i) for i in range(4)})
            for c in ("n02", "n01")
        }
    ),
    "of folders": packed({f"set/{c}/{i}.jpg": jpeg(seed=i) for c in "ba" for i in range(4)}),
    "flat": packed({f"{i}.jpg": jpeg(seed=i) for i in range(4)}),
}


@pytest.mark.parametrize("kind", ["of tars", "of folders", "flat"])
def test_a_compressed_archive_gives_the_same_shards(tmp_path, kind):
    save(tmp_path / "a.tar", TARS[kind])
    save(tmp_path / "b.tar.gz", gzip.compress(TARS[kind]))
    save(tmp_path / "labels.txt", b"a\nb\na\nb\n")
    labels = str(tmp_path / "labels.txt") if kind == "flat" else None
    for name in ("a.tar", "b.tar.gz"):
        for threads in (1, 4):
            dst = tmp_path / f"{name}{threads}"
            prepare(
                str(tmp_path / name), str(dst), labels=labels, threads=threads, shard_examples=3
            )
    with_tar, *others = (
        files(tmp_path / f"{name}{threads}") for name in ("a.tar", "b.tar.gz") for threads in (1, 4)
    )
    assert all(each == with_tar for each in others)
    spec = f"tar:{tmp_path / 'a.tar'}"
    source = open_source(f"records:{tmp_path / 'b.tar.gz4'}", "train")
    if kind != "flat":
        assert examples(source) == examples(open_source(spec, "all"))


def test_the_command_prints_one_line(pets, tmp_path, capsys):
    dst = str(tmp_path / "dst")
    flags = ["--split=half", "--part=train[:50%]", "--short-side=6", "--quality=80", "--threads=2"]
    assert main(["prepare", f"folder:{pets}", dst, *flags]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert out.count("\n") == 1 and err == ""
    source = open_source(said["source"], said["split"])
    assert said == {
        "source": f"records:{dst}",
        "split": "half",
        "examples": len(open_source(f"folder:{pets}", "train[:50%]")),
        "classes": 3,
        "bad_images": 0,
        "fingerprint": source.fingerprint,
    }
    assert PIL.Image.open(io.BytesIO(source[0]["image"])).size == (8, 6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["SRC/nowhere", "DST"], "there is no file '.*nowhere'"),
        (["folder:SRC/nowhere", "DST"], "there is no such folder"),
        (["folders:SRC", "DST"], "there is no file"),
        (["SRC", "DST", "--part=trian"], "did you mean 'train'"),
        (["SRC", "SRC/train/cat/1 ñ.jpg"], "is a file; expected a folder"),
        (["SRC", "DST", "--quality=0"], "no whole number from 1 to 100"),
        (["SRC", "DST", "--short-side=0"], "no whole number of 1 or more"),
        (["SRC", "DST", "--labels=x.txt"], "--labels is for tar archives"),
        (["SRC", "DST", "--classes=nowhere.txt"], "nowhere.txt is no file of class names"),
        (["SRC", "DST", "--shrot-side=3"], "unknown argument '--shrot-side=3'"),
        (["fractals:classes=3", "DST"], "say how many --examples to take"),
        (["SRC", "DST", "--part=train", "--split=a/b"], "split .a/b.: a name of letters"),
        (["SRC", "DST", "--part=train", "--split=a[:9%]"], "a name of letters"),
        (["SRC", "SRC/train/cat/1 ñ.jpg/x"], "is a file; expected a folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(pets, tmp_path, capsys, flags, message):
    replaced = [flag.replace("SRC", pets).replace("DST", str(tmp_path / "dst")) for flag in flags]
    assert main(["prepare", *replaced]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)


def test_the_fingerprint_is_of_the_names_of_classes_too(pets, tmp_path):
    one = prepare(pets, str(tmp_path / "one"))
    (tmp_path / "pets/train/Dog").rename(tmp_path / "pets/train/Bear")  # the first class as before
    other = prepare(pets, str(tmp_path / "other"))
    assert [s["sha256"] for s in one["shards"]] == [s["sha256"] for s in other["shards"]]
    assert one["fingerprint"] != other["fingerprint"]

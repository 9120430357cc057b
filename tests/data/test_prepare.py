"""Prepared shards: against what went in, TFDS's own reader and protobuf's own parser."""

import collections
import contextlib
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
import subprocess
import sys

import cv2
import numpy as np
import PIL.Image
import pytest
import simplejpeg
import tensorflow_datasets
from conftest import ROOT, fails
from made import noise, packed, png_of, refused, saved, tree, turned, written

from vit_jax.__main__ import main
from vit_jax.data.prepare import Conversion, prepare
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


def pixels(h, w, seed=0, channels=3):
    """Smooth, so that a JPEG loses little."""
    return cv2.resize(
        noise(4, 4, channels, seed=seed), (w, h), None, 0, 0, cv2.INTER_CUBIC
    ).reshape(h, w, channels)


def jpeg(h=12, w=16, seed=0):
    return simplejpeg.encode_jpeg(pixels(h, w, seed), 90)


KINDS = ("records", "tfds")
CLASSES = ("Dog", "cat", "épagneul")


@pytest.fixture
def pets(tmp_path):
    """Ten images of three classes, under train."""
    names = [f"{CLASSES[i % 3]}/{i} ñ.jpg" for i in range(10)]
    tree(tmp_path / "pets/train", {name: jpeg(seed=i) for i, name in enumerate(names)})
    return str(tmp_path / "pets")


@pytest.fixture
def full(monkeypatch):
    """Says that the disk is full, once there are so many files of that pattern."""
    usage = collections.namedtuple("usage", "total used free")

    @contextlib.contextmanager
    def after(dst, pattern="*", count=0):
        def disk_usage(path):
            return usage(2**40, 0, 2**40 if len(list(dst.glob(pattern))) < count else 0)

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", disk_usage)
            yield

    return after


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
    sources = [open_source(f"{kind}:{dst}", "train") for kind in KINDS]
    for source in sources:
        assert examples(source) == examples(given)
        assert source.label_names == given.label_names == CLASSES
    assert sources[0].fingerprint == info["fingerprint"]
    names = [os.path.basename(given[i]["name"]) for i in range(10)]
    assert all(f"({name})" in sources[0][i]["name"] for i, name in enumerate(names))
    assert [shard["examples"] for shard in info["shards"]] == [4, 4, 2]
    assert (info["examples"], info["bad_images"]) == (10, 0)
    assert not list(dst.glob("bad*")) and not list(dst.glob("*.partial"))
    with pytest.raises(UserError, match="has no example in split"):
        open_source(f"records:{dst}", "train[:1%]")

    builder = tensorflow_datasets.builder_from_directory(dst)
    decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
    theirs = builder.as_data_source("train", decoders=decoders)
    assert [(each["image"], each["label"]) for each in theirs] == examples(given)
    assert [each["name"].decode() for each in theirs] == names
    assert tuple(builder.info.features["label"].names) == CLASSES
    decoded = builder.as_data_source("train")[3]["image"]
    np.testing.assert_array_equal(decoded, PIL.Image.open(io.BytesIO(given[3]["image"])))
    assert "tensorflow" not in sys.modules


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


# ----------------------------------------------------------------------------------------- images


BAD = {
    "cat/text.jpg": (b"not an image", "it is of no known format"),
    "cat/empty.png": (b"", "it is empty"),
    "Dog/cut.jpg": (jpeg(100, 100)[:-300], "OSError: "),
    "Dog/bomb.png": (png_of(50_000, 50_000), "DecompressionBombError: "),
}


def test_bad_images_are_left_out_and_listed(pets, tmp_path, capsys):
    given = examples(open_source(f"folder:{pets}", "train"))
    tree(tmp_path / "pets/train", {name: data for name, (data, _) in BAD.items()})
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
    # Nothing but bad ones is an error, however often.
    bad, dst = tree(tmp_path / "bad", {f"cat/{i}.jpg": b"text" for i in (1, 2)}), tmp_path / "none"
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 2 images of .*bad can be read; .*1\.jpg"):
            prepare(str(bad), str(dst))
        with pytest.raises(UserError, match="has no split 'train'"):
            open_source(f"records:{dst}", "train")


@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_are_shrunk(channels):
    kind = {"colorspace": "GRAY", "colorsubsampling": "Gray"} if channels == 1 else {}
    for size, short, expected in [
        ((160, 240), 80, (80, 120)),
        ((240, 164), 80, (117, 80)),
        ((81, 500), 80, (80, 494)),
        ((133, 133), 70, (70, 70)),
        ((20, 90), 20, None),
        ((19, 90), 20, None),
    ]:
        image = pixels(*size, channels=channels)
        for data in (simplejpeg.encode_jpeg(image, 95, **kind), saved(image, "PNG")):
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
            same = io.BytesIO(saved(area, "JPEG", quality=93))
            assert new.quantization == PIL.Image.open(same).quantization
    # And upright.
    image = pixels(160, 240, channels=channels)
    data = saved(image, "JPEG", quality=95, exif=turned(6))
    new = PIL.Image.open(io.BytesIO(Conversion(short_side=80)(data)))
    assert 0x0112 not in new.getexif()
    upright = np.ascontiguousarray(np.rot90(image.squeeze(), -1))
    area = cv2.resize(upright, (80, 120), interpolation=cv2.INTER_AREA)
    assert np.abs(np.asarray(new).astype(int) - area).mean() < 3
    assert Conversion(short_side=160)(data) == data


# --------------------------------------------------------------------------- again, and once more


# Kills itself amid the third of four shards, of which it has begun to write one.
KILLED = """
import os, signal, sys
from vit_jax.data import prepare
from vit_jax.__main__ import main

class Deadly(prepare.Conversion):
    done = 0
    def __call__(self, image):
        Deadly.done += 1
        if Deadly.done > 25:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(image)

prepare.Conversion = Deadly
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    images = {f"train/{'ab'[i % 2]}/{i:03d}.jpg": jpeg(60, 80, i) for i in range(40)}
    src, dst = str(tree(tmp_path / "pets", images)), tmp_path / "dst"
    flags = ["--short-side=20", "--shard-examples=10", "--threads=1"]
    command = [sys.executable, "-c", KILLED, "prepare", src, str(dst), *flags]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    unfinished = dst / ".unfinished_train"
    kept = sorted(path.name.removesuffix(".json") for path in unfinished.glob("images-*.json"))
    assert len(kept) == 2
    with pytest.raises(UserError, match="has no split 'train'"):
        open_source(f"records:{dst}", "train")
    with pytest.raises(UserError, match=r"made otherwise \(quality differ"):
        prepare(src, str(dst), shard_examples=10, conversion=Conversion(20, 90))

    os.truncate(dst / kept.pop(), 100)  # not wholly on the disk: to be made again
    time = (dst / kept[0]).stat().st_mtime_ns
    assert main(["prepare", src, str(dst), *flags]) == 0
    assert (dst / kept[0]).stat().st_mtime_ns == time
    assert main(["prepare", src, str(tmp_path / "at once"), *flags]) == 0
    assert files(dst) == files(tmp_path / "at once")
    assert not unfinished.exists() and len(open_source(f"records:{dst}", "train")) == 40


def test_a_full_disk_stops_with_a_sentence_and_what_was_written_counts(
    pets, tmp_path, capsys, full
):
    dst, whole = tmp_path / "dst", tmp_path / "whole"
    argv = ["prepare", pets, str(dst), "--shard-examples=3"]
    with full(dst, "*-of-00004", 2):
        assert "the disk is nearly full" in fails(capsys, *argv)
        with pytest.raises(OSError, match="nearly full") as caught:
            prepare(pets, str(dst), shard_examples=3)
    assert caught.value.errno == errno.ENOSPC
    assert len(list(dst.glob("*-of-00004"))) == 2
    with pytest.raises(UserError, match="has no split 'train'"):
        open_source(f"records:{dst}", "train")
    assert main(argv) == 0
    prepare(pets, str(whole), shard_examples=3)
    assert files(dst) == files(whole)


def test_a_finished_split_is_left_alone(pets, tmp_path):
    def times():
        return {p: p.stat().st_mtime_ns for p in dst.iterdir() if p.name != ".lock"}

    dst = tmp_path / "dst"
    info = prepare(pets, str(dst))
    before, when = files(dst), times()
    assert prepare(pets, str(dst)) == info
    cases = [
        ({"conversion": Conversion(short_side=4)}, "short_side"),
        ({"conversion": Conversion(quality=90)}, "quality"),
        ({"shard_examples": 3}, "shard_examples"),
        ({"examples": 2}, "examples"),
        ({"part": "train[:50%]"}, "source_fingerprint, examples"),
    ]
    cases = [(c, rf"holds split 'train' made otherwise \({name} differ\)") for c, name in cases]
    refused(lambda changes: prepare(pets, str(dst), **changes), cases)
    with open(dst / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another prepare is writing to .*dst"):
            prepare(pets, str(dst))
    assert prepare(str(shutil.move(pets, tmp_path / "elsewhere")), str(dst)) == info
    assert times() == when and files(dst) == before


def test_what_an_earlier_version_shrunk_lying_is_other_data(pets, tmp_path):
    for short, exif, same in [(None, False, True), (4, True, True), (4, False, False)]:
        options, dst = {"conversion": Conversion(short_side=short)}, tmp_path / f"{short}{exif}"
        info = prepare(pets, str(dst), **options)
        assert info["plan"].pop("upright") is True
        info["plan"]["exif"] = exif
        (dst / "vit_jax_train.json").write_text(json.dumps(info))
        if same:
            assert prepare(pets, str(dst), **options)["shards"] == info["shards"]
        else:
            with pytest.raises(UserError, match=r"made otherwise \(upright differ\)"):
                prepare(pets, str(dst), **options)


def test_a_second_split_has_the_classes_of_the_first(pets, tmp_path):
    dst = tmp_path / "dst"
    first_info = prepare(pets, str(dst), shard_examples=4)
    more = {"val/épagneul/1.jpg": jpeg(seed=20), "val/cat/2.jpg": jpeg(seed=21)}
    tree(tmp_path / "pets", more | dict.fromkeys(("test/wolf/1.jpg", "test/cat/1.jpg"), jpeg()))
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
    with pytest.raises(UserError, match="knows no 'wolf'"):
        prepare(pets, str(dst), split="test")


SAME = r"as split 'val' is the same images as split 'train' of .*: say which part each split is"


def test_the_same_images_are_no_second_split(pets, tmp_path):
    fractals = {"src": "fractals:classes=3,size=16", "examples": 6}
    for number, (first, second) in enumerate(
        [
            ({}, {}),
            ({"part": "train[:50%]"}, {"part": "train[:50%]"}),
            ({"src": "folder:SRC"}, {"src": "SRC"}),
            ({}, {"src": "SRC/train", "part": "all"}),
            ({"conversion": Conversion(short_side=4)}, {"shard_examples": 3}),
            (fractals, fractals),
        ]
    ):
        dst = tmp_path / f"{number}"

        def make(split, src="SRC", part="train", dst=dst, **options):
            prepare(src.replace("SRC", pets), str(dst), split=split, part=part, **options)

        make("train", **first)
        before = files(dst)
        base = second.get("part", "train").partition("[")[0]
        hint = f"such as '--part={base}[:90%]' for one and '--part={base}[90%:]' for the other"
        with pytest.raises(UserError, match=f"{SAME}, {re.escape(hint)}"):
            make("val", **second)
        assert files(dst) == before and not (dst / ".unfinished_val").exists()


def test_a_split_that_was_begun_is_a_split(pets, tmp_path, full):
    dst = tmp_path / "dst"
    with full(dst), pytest.raises(OSError, match="nearly full"):
        prepare(pets, str(dst), split="trian", part="train")
    with pytest.raises(UserError, match=r"'trian' of .*begun \(if .* delete .*unfinished_trian\)"):
        prepare(pets, str(dst))
    shutil.rmtree(dst / ".unfinished_trian")
    assert prepare(pets, str(dst))["examples"] == 10


def test_other_images_of_the_same_names_and_sizes_are_a_second_split(tmp_path):
    found = []
    for split, seed in (("train", 0), ("val", 9)):
        images = {f"{'ab'[i % 2]}/{i}.bmp": saved(pixels(6, 8, seed + i), "BMP") for i in range(4)}
        tree(tmp_path / "src" / split, images)
        prepare(str(tmp_path / "src"), str(tmp_path / "dst"), split=split)
        source = open_source(f"records:{tmp_path / 'dst'}", split)
        found.append({image for image, _ in examples(source)})
        assert found[-1] == set(images.values())


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
    written(tmp_path / "more/cat/1.jpg", jpeg(seed=50))
    prepare(str(tmp_path / "more"), str(dst), split="more", part="all")
    assert len(caplog.messages) == 1 + earlier
    assert "'train' of" not in caplog.messages[-1] or "has no hashes of its 10" in caplog.text


def test_what_an_earlier_version_began_is_finished_without_hashes(pets, tmp_path, full):
    dst = tmp_path / "dst"
    with full(dst, "*-of-00004", 1), pytest.raises(OSError, match="nearly full"):
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


def test_shards_that_changed_are_refused(pets, tmp_path):
    tmp_path = tmp_path / "shards"
    prepare(pets, str(tmp_path), shard_examples=4)
    shard, info = tmp_path / "images-train.array_record-00001-of-00003", "vit_jax_train.json"
    size = shard.stat().st_size
    for change, message in [
        (lambda: os.truncate(shard, size + 1), f"{shard.name} has .* bytes, not"),
        (lambda: os.truncate(shard, size - 1), f"{shard.name} has .* bytes, not"),
        (shard.unlink, rf"\({shard.name} is not there\)"),
        (lambda: (tmp_path / info).write_text("{"), "is damaged"),
        (lambda: (tmp_path / info).write_text("[]"), "is damaged"),
    ]:
        change()
        with pytest.raises(UserError, match=message):
            open_source(f"records:{tmp_path}", "train")


# --------------------------------------------------------------------- archives, and command line


IMAGES = {f"{i}.jpg": jpeg(seed=i) for i in range(4)}
INNER = {
    f"winter21_whole/{c}.tar": packed({c + n: IMAGES[n] for n in IMAGES}) for c in ("n2", "n1")
}
TARS = {
    "of tars": packed(INNER),
    "of folders": packed({f"set/{c}/{name}": IMAGES[name] for c in "ba" for name in IMAGES}),
    "flat": packed(IMAGES),
}


@pytest.mark.parametrize("kind", TARS)
def test_a_compressed_archive_gives_the_same_shards_whatever_the_threads(tmp_path, kind):
    archives = {"a.tar": TARS[kind], "b.tar.gz": gzip.compress(TARS[kind])}
    tree(tmp_path, archives | {"labels.txt": b"a\nb\na\nb\n"})
    labels, found = str(tmp_path / "labels.txt") if kind == "flat" else None, []
    for name, threads in [("a.tar", 1), ("a.tar", 4), ("b.tar.gz", 1), ("b.tar.gz", 4)]:
        options = {"labels": labels, "threads": threads, "shard_examples": 3}
        dst = tmp_path / f"{name}{threads}"
        prepare(str(tmp_path / name), str(dst), conversion=Conversion(short_side=9), **options)
        found.append(files(dst))
    assert all(each == found[0] for each in found)
    prepare(str(tmp_path / "b.tar.gz"), str(tmp_path / "whole"), labels=labels)
    source = open_source(f"records:{tmp_path / 'whole'}", "train")
    if kind == "flat":
        assert examples(source) == [(image, i % 2) for i, image in enumerate(IMAGES.values())]
    else:
        assert examples(source) == examples(open_source(f"tar:{tmp_path / 'a.tar'}", "all"))


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


def test_a_mistake_is_one_sentence_and_exit_code_2(pets, tmp_path, capsys):
    for flags, message in [
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
    ]:
        flags = [flag.replace("SRC", pets).replace("DST", str(tmp_path / "dst")) for flag in flags]
        assert re.search(message, fails(capsys, "prepare", *flags)), flags


def test_the_fingerprint_is_of_the_names_of_classes_too(pets, tmp_path):
    one = prepare(pets, str(tmp_path / "one"))
    (tmp_path / "pets/train/Dog").rename(tmp_path / "pets/train/Bear")  # the first class as before
    other = prepare(pets, str(tmp_path / "other"))
    assert [s["sha256"] for s in one["shards"]] == [s["sha256"] for s in other["shards"]]
    assert one["fingerprint"] != other["fingerprint"]

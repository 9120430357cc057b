"""What is said of sources, and the checks of their splits, against what was put there."""

import hashlib
import io
import os
import shutil
import types

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest

from vit_jax.__main__ import main
from vit_jax.data import contents, describe, pictures
from vit_jax.data.classes import match, with_labels
from vit_jax.data.contents import image_hash
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.forms.files import PassedOver
from vit_jax.data.forms.records import RecordSource
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import SOURCES, open_source
from vit_jax.errors import UserError

DIGITS = "configs/digits.py"


def encoded(seed, size=(6, 9), mode="RGB", kind="PNG", orientation=None):
    """An image file of random pixels: size is (h, w)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 4), np.uint8)
    image, exif, out = PIL.Image.fromarray(pixels).convert(mode), PIL.Image.Exif(), io.BytesIO()
    if orientation:
        exif[0x0112] = orientation
    image.save(out, kind, exif=exif)
    return out.getvalue()


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def pets(tmp_path):
    """60 different images of two classes, without splits."""
    for i in range(60):
        save(tmp_path / f"pets/{'cat' if i % 3 else 'dog'}/{i:02d}.png", encoded(i))
    return tmp_path / "pets"


def blake(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# --------------------------------------------------------------------------------------- contents


def test_the_content_of_files_is_of_their_bytes_in_order(pets):
    source = open_source(f"folder:{pets}", "all")
    expected = [blake(path.read_bytes()) for path in sorted(pets.glob("*/*"))]
    for threads in (1, 3):
        found = contents.content(source, threads=threads)
        assert found.dtype == np.uint64 and found.tolist() == expected
    relabelled = with_labels(source, ("dog", "cat"))
    assert contents.content(relabelled).tolist() == expected


def test_the_content_of_pixels_is_of_shape_and_type_too():
    images = [np.zeros((2, 3, 1), np.uint8), np.zeros((3, 2, 1), np.uint8)]
    images += [np.zeros((2, 3, 1), np.int8), np.ones((2, 3, 1), np.uint8), bytes(6)]
    assert len({image_hash(image) for image in images}) == 5
    turned = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    assert image_hash(turned) == image_hash(turned.copy()) != image_hash(turned.T)


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_and_shared_against_loops(seed):
    random = np.random.default_rng(seed)
    a, b = (random.integers(0, 12, n).astype(np.uint64) for n in (20, random.integers(0, 15)))
    found = [group.tolist() for group in contents.duplicates(a)]
    groups = {value: np.flatnonzero(a == value).tolist() for value in a.tolist() if value}
    assert found == sorted(group for group in groups.values() if len(group) > 1)
    first, there = contents.shared(a, b)
    pairs = [(a.tolist().index(v), j) for j, v in enumerate(b.tolist()) if v and v in a]
    assert list(zip(first.tolist(), there.tolist(), strict=True)) == pairs
    none = np.zeros(0, np.uint64)
    assert [len(each) for each in (*contents.shared(none, b), *contents.shared(a, none))] == [0] * 4


@pytest.mark.parametrize("part", ["train", "train[:30%]", "train[30%:]"])
def test_shards_keep_the_content_of_each_image_in_order(pets, tmp_path, monkeypatch, part):
    dst = tmp_path / "dst"
    save(pets / "cat/bad.png", b"nothing")
    prepare(str(pets), str(dst), shard_examples=7)
    source = open_source(f"records:{dst}", part)
    expected = [blake(source[i]["image"]) for i in range(len(source))]
    with monkeypatch.context() as patch:
        patch.setattr(RecordSource, "__getitem__", lambda *_: pytest.fail("was read"))
        assert contents.content(source).tolist() == expected
    # Where there are none, or those of other shards, the images are read.
    kept = dst / "content_train.npy"
    np.save(kept, np.load(kept)[::-1].copy())
    assert source.kept_content() is None and contents.content(source).tolist() == expected
    kept.unlink()
    assert source.kept_content() is None and contents.content(source).tolist() == expected


# ----------------------------------------------------------------------------------------- checks


def opened(**specs):
    return {f"data.{name}": open_source(*spec) for name, spec in specs.items()}


def test_the_same_images_are_refused_unless_meant(pets):
    spec = f"folder:{pets}"
    same = opened(train=(spec, "all"), val=(spec, "all"))
    with pytest.raises(
        UserError,
        match=r"^data.train and data.val are the same 60 images: hold images out, such as split "
        r"all\[:90%\] for one and all\[90%:\] .*data.same_images=True if it is meant$",
    ):
        contents.check_splits(same)
    assert contents.check_splits(same, allow=True) == [
        "data.train and data.val are the same 60 images"
    ]
    held_out = opened(train=(spec, "all[:80%]"), val=(spec, "all[80%:]"))
    assert contents.check_splits(held_out) == []


@pytest.mark.parametrize("most", [20_000, 10])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_part_of_the_whole_is_refused_however_many_there_are(pets, tmp_path, most, kind):
    """By contents, or where those are too many to read by the files' places."""
    spec = f"folder:{pets}"
    if kind == "tar":
        spec = f"tar:{shutil.make_archive(str(tmp_path / 'pets'), 'tar', pets)}"
    named = opened(train=(spec, "all"), val=(spec, "all[80%:]"))
    n = len(named["data.val"])
    message = rf"{n} of the {n} images of data.val are in data.train too, such as .*png and .*png:"
    with pytest.raises(UserError, match=message):
        contents.check_splits(named, most=most)
    held_out = opened(train=(spec, "all[:80%]"), val=(spec, "all[80%:]"))
    lines = contents.check_splits(held_out, most=most)
    assert len(lines) == (most == 10)
    assert all("data.train and data.val share images was not looked at" in line for line in lines)


def test_a_few_shared_images_are_said(pets, tmp_path):
    for i in range(4):
        save(tmp_path / f"more/cat/{i}.png", encoded(100 + i))
    for i in (5, 8):
        shutil.copy(pets / f"cat/{i:02d}.png", tmp_path / f"more/cat/copy {i}.png")
    save(tmp_path / "more/dog/bad.png", b"")  # an empty file is no image of both
    save(pets / "dog/empty.png", b"")
    named = opened(train=(f"folder:{pets}", "all"), val=(f"folder:{tmp_path / 'more'}", "all"))
    hashes = [contents.content(each) for each in named.values()]
    count = len(contents.shared(*hashes)[1])
    (line,) = contents.check_splits(named)
    assert line == (
        f"{count} of the 7 images of data.val are in data.train too, such as "
        f"{pets}/cat/05.png and {tmp_path}/more/cat/copy 5.png"
    )
    for name in ("small", "large"):  # the smaller one is named first, wherever it stands
        shutil.copytree(pets, tmp_path / name)
    shutil.rmtree(tmp_path / "small/cat")
    save(tmp_path / "small/cat/x.png", encoded(200))
    named = opened(train=(f"folder:{tmp_path}/small", "all"), val=(f"folder:{pets}", "all"))
    with pytest.raises(UserError, match=r"^21 of the 22 images of data.train are in data.val too"):
        contents.check_splits(named)


def test_other_images_of_the_same_names_and_sizes_are_no_copies(tmp_path):
    for split, seed in (("train", 0), ("val", 50)):
        for i in range(6):
            data = encoded(seed + i, kind="BMP")
            save(tmp_path / f"{split}/{'ab'[i % 2]}/{i}.bmp", data)
    named = opened(train=(f"folder:{tmp_path}", "train"), val=(f"folder:{tmp_path}", "val"))
    assert len({source.fingerprint for source in named.values()}) == 1
    assert contents.check_splits(named) == []


def test_shards_are_compared_however_many_there_are(pets, tmp_path):
    for split, part in (("train", "all"), ("val", "all[90%:]")):
        prepare(str(pets), str(tmp_path / "dst"), split=split, part=part)
    spec = f"records:{tmp_path / 'dst'}"
    with pytest.raises(UserError, match=r"(\d+) of the \1 images of data.val are in data.train"):
        contents.check_splits(opened(train=(spec, "train"), val=(spec, "val")), most=0)
    parts = opened(train=(spec, "train[:90%]"), val=(spec, "train[90%:]"))
    assert contents.check_splits(parts, most=0) == []


def test_what_is_made_by_a_formula_is_compared_by_name():
    spec = "fractals:classes=30"
    endless = opened(train=(spec, "train"), val=(spec, "val"), test=(spec, "test"))
    assert contents.check_splits(endless) == []
    with pytest.raises(UserError, match=r"data.val and data.test are the same 300 images"):
        contents.check_splits(opened(val=(spec, "val"), test=(spec, "val")))
    scenes = opened(val=("scenes:digits", "val"), test=("scenes:digits", "test"))
    assert contents.check_splits(scenes) == []
    digits = opened(train=("digits", "train"), val=("digits", "val"), test=("digits", "test"))
    assert contents.check_splits(digits, most=0) == []


def arrays(labels, names=("a", "b", "c")):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return ArraySource(images, np.array(labels, np.int32), names)


@pytest.mark.parametrize(
    "source, message",
    [
        (arrays([0, 0], ("images",)), r"data.train has one class alone, 'images': nothing to"),
        (arrays([1, 1]), r"data.train is of one of 3 classes alone, 'b': nothing to tell apart"),
        (with_labels(arrays([1, 1]), ("c", "b", "a")), "classes alone, 'b'"),
        (arrays([0, 1]), None),
    ],
)
def test_one_class_alone_is_refused(source, message):
    if message:
        with pytest.raises(UserError, match=message):
            contents.check_splits({"data.train": source})
    else:
        assert contents.check_splits({"data.train": source}) == []
    assert contents.check_splits({"data.train": source}, classes=False) == []
    assert contents.check_splits({"data.val": source}) == []


def test_several_labels_or_none_may_be_of_one_class():
    source = RecordSource([b""], ("image", "label", None), "here", ("a",), "", multi_label=True)
    assert contents.check_splits({"data.train": source}) == []


def test_a_line_a_split_before_training(pets):
    passed = PassedOver()
    passed.add("notes.txt", "of no known format (.txt)")
    folder = open_source(f"folder:{pets}", "all")
    object.__setattr__(folder, "passed_over", passed)
    named = {"data.train": folder, "data.val": open_source("fractals:classes=2000", "train")}
    named["test"] = open_source("scenes:digits", "test")
    specs = {"data.train": f"folder:{pets}, all", "data.val": "fractals:classes=2000, train"}
    assert describe.first_lines(named, specs) == [
        f"data.train  {specs['data.train']}: 60 images of 2 classes (cat, dog; 20 to 40 each), "
        "1 files passed over: 1 of no known format (.txt)",
        "data.val    fractals:classes=2000, train: endless images of 2,000 classes (fractal0, "
        "fractal1, ...)",
        "test        1,000 images of 11 classes (background, 0, ...; one for each pixel)",
    ]


# ------------------------------------------------------------------------- what the command prints


@pytest.fixture
def animals(tmp_path):
    """Two splits with much that is amiss."""
    files = {
        "train/cat/1.png": encoded(1, (5, 7), "L"),
        "train/cat/2.jpg": encoded(2, (5, 9), kind="JPEG", orientation=6),
        "train/cat/3.jpg": encoded(3, (11, 7), kind="JPEG", orientation=3),
        "train/dog/1.png": encoded(1, (5, 7), "L"),
        "train/dog/bad.png": b"nothing",
        "train/dog/cut.png": encoded(4, (40, 40))[:-200],
        "train/wolf/1.png": encoded(6, (8, 8), "RGBA"),
        "train/wolf/2.png": encoded(6, (8, 8), "RGBA"),
        "val/cat/9.png": encoded(9),
        "val/dog/9.jpg": encoded(3, (11, 7), kind="JPEG", orientation=3),
        "val/wolf/9.png": encoded(10),
    }
    for name, data in files.items():
        save(tmp_path / "animals" / name, data)
    return tmp_path / "animals"


def sections(out):
    """{section: {what: values}} of what was printed."""
    found, section, what = {}, "", ""
    for line in out.splitlines():
        if not line.startswith("  "):
            section = line.strip()
            found.setdefault(section, {})
            continue
        what = line[2:16].strip() or what
        found[section].setdefault(what, []).append(line[16:])
    return found


def test_the_report_of_a_folder(animals, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "animals"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"folder {animals}\nsplits: train, val\n\ntrain\n")
    found = sections(out)
    size = sum(path.stat().st_size for path in (animals / "train").rglob("*.*"))
    assert found["train"].pop("time to read")[0].endswith("(measured here, 8 images)")
    unreadable = found["train"].pop("unreadable")
    assert unreadable[0] == "2 found; 8 were decoded"
    assert unreadable[1] == "dog/bad.png: it is of no known format"
    assert unreadable[2].startswith("dog/cut.png: OSError")
    assert found["train"] == {
        "examples": ["8"],
        "classes": ["3: in 2 to 3 images each, median 3", "cat: 3, dog: 3, wolf: 2"],
        "formats": ["5 PNG, 2 JPEG, 1 unknown"],
        "sizes": ["h 5 to 40, median 8; w 7 to 40, median 8 (of 7 sampled)"],
        "channels": ["3 RGB, 2 grey, 2 RGB with alpha (of 7 sampled)"],
        "orientation": [
            "1 of 7 sampled lie on their side; turned upright with exif",
            "1 of 7 sampled are upside down or mirrored; exif likewise",
        ],
        "bytes": [f"{size:,}"],
        "duplicates": [
            "4 images are but 2, such as cat/1.png, dog/1.png",
            "1 of the 2 with DIFFERENT labels:",
            "cat/1.png is cat; dog/1.png is dog",
        ],
    }
    assert found["between splits"] == {
        "train, val": [
            "1 of the 3 images of val are in train too, such as animals/train/cat/3.jpg and "
            "animals/val/dog/9.jpg; 1 with DIFFERENT labels"
        ]
    }
    assert main(["data", f"folder:{animals}", "--split=val"]) == 0
    out = capsys.readouterr().out
    assert "splits: val\n" in out and "between" not in out
    assert sections(out)["val"]["duplicates"] == ["none, byte for byte"]


def test_what_was_passed_over_is_said(pets):
    source, passed = open_source(f"folder:{pets}", "all"), PassedOver()
    for i in range(7):
        passed.add(f"{i}.txt", "of no known format (.txt)")
    object.__setattr__(source, "passed_over", passed)
    said = sections("\n".join(describe.report({"all": source})))["all"]["passed over"]
    assert said == [str(passed), *(f"{i}.txt: of no known format (.txt)" for i in range(5))]


def test_the_report_of_what_is_made_and_of_arrays(tmp_path, capsys):
    assert main(["data", "fractals:classes=3,size=8", "--split=train"]) == 0
    train = sections(capsys.readouterr().out)["train"]
    assert train["examples"] == ["endless; 200 were looked at"]
    assert train["classes"][0] == "3: in 66 to 67 images each, median 67 (of 200)"
    assert train["sizes"] == ["h 8, w 8"]

    images = np.arange(40 * 4, dtype=np.uint8).reshape(40, 2, 2)
    images[7] = images[3]
    splits = {"a_images": images, "a_labels": np.repeat([0, 2], 20)}
    splits |= {"b_images": images[5:9], "b_labels": np.zeros(4, int)}
    np.savez(tmp_path / "x.npz", **splits, label_names=["x", "y", "z"])
    assert main(["data", str(tmp_path / "x.npz")]) == 0
    found = sections(capsys.readouterr().out)
    assert found["a"]["classes"] == [
        "3: in 0 to 20 images each, median 20",
        "x: 20, y: 0, z: 20",
        "1 without an image: y",
    ]
    assert found["a"]["formats"] == ["40 pixels"] and found["a"]["channels"] == ["40 grey"]
    assert found["a"]["duplicates"] == ["2 images are but 1, such as example 3, example 7"]
    assert found["between splits"]["a, b"] == [
        "4 of the 4 images of b are in a too, such as example 5 and example 0"
    ]


def test_the_report_of_a_config(capsys):
    assert main(["data", f"--config={DIGITS}", "--config.data.test=None"]) == 0
    out = capsys.readouterr().out
    found = sections(out)
    sections_of = [name.partition(" ")[0] for name in found if name]
    assert sections_of == ["config", "data.train", "data.val", "between"]
    assert found["data.train  digits, train"]["examples"] == ["1,259"]
    assert out.endswith(
        "between splits\n  data.train, data.val  no image is in both, byte for byte\n"
    )


def test_the_splits_that_there_are(animals, pets, tmp_path):
    assert describe.splits_of(f"folder:{animals}") == ["train", "val"]
    assert describe.splits_of(f"folder:{pets}") == []
    assert list(describe.open_splits(f"folder:{pets}")) == ["all"]
    dst = str(tmp_path / "dst")
    for split, part in (("train", "all[:90%]"), ("held", "all[90%:]")):
        prepare(str(pets), dst, split=split, part=part)
    assert sorted(describe.splits_of(f"records:{dst}")) == ["held", "train"]
    assert sorted(describe.splits_of(f"tfds:{dst}")) == ["held", "train"]
    for path, kind in ((pets, "folder"), (dst, "records"), (tmp_path / "no", "")):
        assert describe.understood(str(path)) == f"{kind}:{path}".removeprefix(":")
    zipped = shutil.make_archive(str(tmp_path / "z"), "zip", animals)
    assert describe.splits_of(describe.understood(zipped)) == ["train", "val"]
    options = f"{zipped},label=folder"
    assert describe.understood(options) == f"zip:{options}"
    hub = tmp_path / "hub"
    hub.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), hub / "test.parquet")
    assert describe.splits_of(f"hf-data:{hub}") == ["test"]
    (tmp_path / "no.npz").write_bytes(b"PK\x03\x04")
    assert describe.splits_of(f"arrays:{tmp_path}/no.npz") == []
    shutil.make_archive(str(tmp_path / "animals"), "zip", animals)
    for kind in ("tar", "zip"):
        assert describe.splits_of(f"{kind}:{tmp_path}/animals.zip") == ["train", "val"]
    assert set(SOURCES) - set(describe.SPLITS) == set()


def test_classes_of_a_model_are_said(pets, capsys, monkeypatch):
    source = open_source(f"folder:{pets}", "all")
    same = match(source.label_names, ("dog", "wolf", "cat"))
    assert list(describe.mapping_lines("all", same)) == [
        "  all           2 of the model's 3, by name"
    ]
    other = match(source.label_names, ("Dog", "cat, tabby"))
    assert [line.split(None, 1)[-1] for line in describe.mapping_lines("all", other)] == [
        "2 of the model's 2, by the first of several names",
        "is cat, tabby",
        "is Dog",
    ]
    card = types.SimpleNamespace(labels=("cat", "wolf", "fox"))
    fake = types.SimpleNamespace(card=card)
    monkeypatch.setattr("vit_jax.analysis.data.open_model", lambda path: fake)
    assert main(["data", f"folder:{pets}", "--model=somewhere"]) == 2
    error = capsys.readouterr().err
    assert f"all (folder:{pets}): has 2 classes" in error and "knows no 'dog'" in error


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give a SPEC such as folder:/data/pets, or --config=FILE.py"),
        (["digits", f"--config={DIGITS}"], "give a SPEC"),
        (["digits", "--config.seed=1"], "give a SPEC"),
        (["folder:nowhere"], "there is no such folder"),
        (["nowhere"], "no source 'nowhere'"),
        (["arrays:nowhere.npz"], "there is no such file"),
        (["digits", "--split=tset"], "did you mean 'test'"),
        ([f"--config={DIGITS}", "--split=tset"], "has no data.tset; did you mean 'test'"),
        (["digits", "--split=val", f"--pictures={DIGITS}"], "is a file; expected a folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, flags, message):
    assert main(["data", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_split_that_cannot_be_opened_hides_no_other(animals, capsys):
    shutil.rmtree(animals / "val" / "cat")
    (animals / "val" / "cat").mkdir()
    assert main(["data", str(animals)]) == 2
    out, err = capsys.readouterr()
    assert sections(out)["train"]["examples"] == ["8"]
    assert "without any image" in sections(out)["val"]["not opened"][0]
    assert err.startswith("error: val: ")


# --------------------------------------------------------------------------------------- pictures


def tile(path, number, size, columns=8):
    """The pixels of a tile that is filled by an image of that (h, w)."""
    left, top = pictures.corner(number, columns)
    left, top = (at + (pictures.SIDE - n) // 2 for at, n in ((left, size[1]), (top, size[0])))
    return np.asarray(PIL.Image.open(path))[top : top + size[0], left : left + size[1]]


def test_pictures_are_the_images(pets, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", str(pets), f"--pictures={out}"]) == 0
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said[0] == f"{out}/all_stored.png: 48 examples of all, as stored"
    assert said[1].startswith(f"{out}/all_model.png: 48 examples of all, as the model gets them (")
    side, rows = pictures.SIDE + pictures.GAP, 6 * (pictures.SIDE + pictures.GAP + pictures.CAPTION)
    for name in os.listdir(out):
        size = PIL.Image.open(out / name).size
        assert size == (8 * side + pictures.GAP, rows + pictures.GAP)
    source = open_source(f"folder:{pets}", "all")
    at = np.round(np.linspace(0, 59, 48)).astype(int)
    for number in (0, 7, 8, 47):  # 6 x 9 pixels, each 24 x 24
        image = PIL.Image.open(io.BytesIO(source[int(at[number])]["image"]))
        enlarged = np.asarray(image).repeat(24, 0).repeat(24, 1)
        np.testing.assert_array_equal(tile(out / "all_stored.png", number, (144, 216)), enlarged)


def test_pictures_are_what_a_batch_has(tmp_path, capsys):
    flags = [f"--config={DIGITS}", "--split=train", f"--pictures={tmp_path}"]
    assert main(["data", *flags]) == 0
    from vit_jax.data.pipeline import BatchReader
    from vit_jax.data.transforms import Preprocess
    from vit_jax.training.config import load_config

    config, source = load_config(DIGITS), open_source("digits", "train")
    read = BatchReader.of(source, config.data.train, Preprocess((8, 8), 1), seed=config.seed)
    at = np.round(np.linspace(0, 1258, 48)).astype(int)
    images = read(np.arange(48), at)["image"]
    stored, model = (tmp_path / f"data_train_{end}.png" for end in ("stored", "model"))
    for number in (0, 13, 47):
        for path, image in ((stored, source.images[at[number]]), (model, images[number])):
            expected = image.repeat(28, 0).repeat(28, 1).repeat(3, 2)
            np.testing.assert_array_equal(tile(path, number, (224, 224)), expected)
    assert (stored.read_bytes() == model.read_bytes()) is False


def test_what_cannot_be_drawn_is_an_empty_tile(animals):
    source = open_source(f"folder:{animals}", "train")
    read, _ = pictures.default_reader(source)
    tiles = pictures.stored(source, pictures.chosen(source))
    assert [tile.image is None for tile in tiles] == [False] * 4 + [True] * 2 + [False] * 2
    assert [(tile.title, tile.note) for tile in tiles[3:6]] == [
        ("dog", "1.png"),
        ("cannot be read", "bad.png"),
        ("cannot be read", "cut.png"),
    ]
    as_read = pictures.as_read(read, range(8), tiles)
    assert [tile.image is None for tile in as_read] == [tile.image is None for tile in tiles]
    assert as_read[0].image.shape == (224, 224, 3)
    for spec in ("fractals:classes=5,size=16", "scenes:digits,size=16"):
        source = open_source(spec, "train")
        indices = pictures.chosen(source, 3)
        tiles = pictures.stored(source, indices)
        assert [tile.image.shape[:2] for tile in tiles] == [(16, 16)] * 3
        read, _ = pictures.default_reader(source)
        assert pictures.as_read(read, indices, tiles)[2].image.shape == (224, 224, 3)


def test_captions_stay_on_their_tiles():
    font = PIL.ImageFont.load_default(16)
    assert pictures.shortened("épagneul\n猫", font) == "epagneul ?"
    for text in ("x" * 300, "a name/" * 20):
        short = pictures.shortened(text, font)
        start, end = short.split("...")
        assert font.getlength(short) <= pictures.SIDE < font.getlength(f"{start}xx...{end}")
        assert text.startswith(start) and text.endswith(end)
    wide = np.zeros((30, 3000, 3), np.uint8)
    assert pictures.fitted(wide).size == (224, 2)
    page = pictures.sheet([pictures.Tile(wide, "x" * 300, "y" * 300)] * 2)
    assert page.size == (2 * (224 + 12) + 12, 224 + 42 + 24)
    margin = np.asarray(page)[:, -12:]
    assert (margin == 255).all() and (np.asarray(page)[-12:] == 255).all()

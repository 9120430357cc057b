"""What is said of sources, and the checks of their splits, against what was put there."""

import functools
import hashlib
import io
import os
import types

import numpy as np
import PIL.Image
import pyarrow
import pytest
from conftest import DIGITS
from made import noise, packed, refused, saved, tree, turned, written, zipped

from vit_jax.__main__ import main
from vit_jax.data import contents, describe, pictures, sources
from vit_jax.data.classes import match, with_labels
from vit_jax.data.contents import image_hash
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.forms.files import PassedOver
from vit_jax.data.forms.records import RecordSource
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import SOURCES, open_source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.training.config_file import load_config


def encoded(seed, size=(6, 9), mode="RGB", kind="PNG", orientation=1):
    """An image file of random pixels: size is (h, w)."""
    image = PIL.Image.fromarray(noise(*size, 4, seed=seed)).convert(mode)
    return saved(image, kind, **({"exif": turned(orientation)} if orientation > 1 else {}))


PETS = {f"{'cat' if i % 3 else 'dog'}/{i:02d}.png": encoded(i) for i in range(60)}


@pytest.fixture
def pets(tmp_path):
    """60 different images of two classes, without splits."""
    return tree(tmp_path / "pets", PETS)


@pytest.fixture
def whole(pets):
    return open_source(f"folder:{pets}", "all")


def blake(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# --------------------------------------------------------------------------------------- contents


def test_the_content_of_files_is_of_their_bytes_in_order(whole):
    expected = [blake(data) for _, data in sorted(PETS.items())]
    for threads in (1, 3):
        found = contents.content(whole, threads=threads)
        assert found.dtype == np.uint64 and found.tolist() == expected
    assert contents.content(with_labels(whole, ("dog", "cat"))).tolist() == expected


def test_the_content_of_pixels_is_of_shape_and_type_too():
    images = [np.zeros((2, 3, 1), np.uint8), np.zeros((3, 2, 1), np.uint8)]
    images += [np.zeros((2, 3, 1), np.int8), np.ones((2, 3, 1), np.uint8), bytes(6)]
    assert len({image_hash(image) for image in images}) == 5
    lying = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    assert image_hash(lying) == image_hash(lying.copy()) != image_hash(lying.T)


def test_duplicates_and_shared_against_loops():
    for seed in range(5):
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


def test_shards_keep_the_content_of_each_image_in_order(tmp_path, monkeypatch):
    dst, few = tmp_path / "dst", dict(list(PETS.items())[:20])
    src = tree(tmp_path / "few", few | {"cat/bad.png": b"nothing"})
    prepare(str(src), str(dst), shard_examples=7)
    parts = [open_source(f"records:{dst}", f"train{of}") for of in ("", "[:30%]", "[30%:]")]
    expected = [[blake(part[i]["image"]) for i in range(len(part))] for part in parts]
    with monkeypatch.context() as patch:
        patch.setattr(RecordSource, "__getitem__", lambda *_: pytest.fail("was read"))
        assert [contents.content(part).tolist() for part in parts] == expected
    # Where there are none, or those of other shards, the images are read.
    kept = dst / "content_train.npy"
    for change in (lambda: np.save(kept, np.load(kept)[::-1].copy()), kept.unlink):
        change()
        assert [part.kept_content() for part in parts] == [None] * 3
        assert [contents.content(part).tolist() for part in parts] == expected


# ----------------------------------------------------------------------------------------- checks


def opened(**specs):
    return {f"data.{name}": open_source(*spec) for name, spec in specs.items()}


def test_the_same_images_are_refused_unless_meant(pets, whole):
    same = {"data.train": whole, "data.val": open_source(f"folder:{pets}", "all")}
    said = "data.train and data.val are the same 60 images"
    hint = r"all\[:90%\] for one and all\[90%:\] .*data.same_images=True if it is meant$"
    with pytest.raises(UserError, match=f"^{said}: hold images out, such as split {hint}"):
        contents.check_splits(same)
    assert contents.check_splits(same, allow=True) == [said]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_part_of_the_whole_is_refused_however_many_there_are(pets, tmp_path, kind):
    """By contents, or where those are too many to read by the files' places."""
    spec = f"folder:{pets}" if kind == "folder" else f"tar:{tmp_path / 'pets.tar'}"
    written(tmp_path / "pets.tar", packed(PETS))
    named = opened(train=(spec, "all"), val=(spec, "all[80%:]"))
    held_out = opened(train=(spec, "all[:80%]"), val=(spec, "all[80%:]"))
    n = len(named["data.val"])
    message = rf"{n} of the {n} images of data.val are in data.train too, such as .*png and .*png:"
    for most, count in ((20_000, 0), (10, 1)):
        with pytest.raises(UserError, match=message):
            contents.check_splits(named, most=most)
        lines = contents.check_splits(held_out, most=most)
        unseen = "data.train and data.val share images was not looked at"
        assert len(lines) == count and all(unseen in line for line in lines)


def test_a_few_shared_images_are_said(pets, tmp_path):
    more = {f"cat/{i}.png": encoded(100 + i) for i in range(4)}
    more |= {f"cat/copy {i}.png": PETS[f"cat/{i:02d}.png"] for i in (5, 8)}
    tree(tmp_path / "more", more | {"dog/bad.png": b""})  # empty files are alike, too
    written(pets / "dog/empty.png", b"")
    named = opened(train=(f"folder:{pets}", "all"), val=(f"folder:{tmp_path / 'more'}", "all"))
    assert contents.check_splits(named) == [
        "3 of the 7 images of data.val are in data.train too, such as "
        f"{pets}/cat/05.png and {tmp_path}/more/cat/copy 5.png"
    ]
    # The smaller one is named first, wherever it stands.
    dogs = {name: data for name, data in PETS.items() if "dog" in name}
    tree(tmp_path / "small", dogs | {"cat/x.png": encoded(200), "dog/empty.png": b""})
    named = opened(train=(f"folder:{tmp_path}/small", "all"), val=(f"folder:{pets}", "all"))
    with pytest.raises(UserError, match=r"^21 of the 22 images of data.train are in data.val too"):
        contents.check_splits(named)


def test_other_images_of_the_same_names_and_sizes_are_no_copies(tmp_path):
    for split, seed in (("train", 0), ("val", 50)):
        files = {f"{'ab'[i % 2]}/{i}.bmp": encoded(seed + i, kind="BMP") for i in range(6)}
        tree(tmp_path / split, files)
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
    for spec in ("scenes:digits", "digits"):
        splits = opened(train=(spec, "train"), val=(spec, "val"), test=(spec, "test"))
        assert contents.check_splits(splits, most=0) == []


def arrays(labels, names=("a", "b", "c")):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return ArraySource(images, np.array(labels, np.int32), names)


def test_one_class_alone_is_refused():
    cases = [
        (arrays([0, 0], ("images",)), r"data.train has one class alone, 'images': nothing to"),
        (arrays([1, 1]), r"data.train is of one of 3 classes alone, 'b': nothing to tell apart"),
        (with_labels(arrays([1, 1]), ("c", "b", "a")), "classes alone, 'b'"),
    ]
    refused(lambda source: contents.check_splits({"data.train": source}), cases)
    for source, _ in cases:
        assert contents.check_splits({"data.train": source}, classes=False) == []
        assert contents.check_splits({"data.val": source}) == []
    several = RecordSource([b""], ("image", "label", None), "here", ("a",), "", multi_label=True)
    for source in (arrays([0, 1]), several):
        assert contents.check_splits({"data.train": source}) == []


def test_a_line_a_split_before_training(pets, whole):
    passed = PassedOver()
    passed.add("notes.txt", "of no known format (.txt)")
    object.__setattr__(whole, "passed_over", passed)
    named = {"data.train": whole, "data.val": open_source("fractals:classes=2000", "train")}
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
    return tree(tmp_path / "animals", files)


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
    # A split that cannot be opened hides no other.
    (animals / "val/cat/9.png").unlink()
    assert main(["data", str(animals)]) == 2
    out, err = capsys.readouterr()
    assert sections(out)["train"]["examples"] == ["8"]
    assert "without any image" in sections(out)["val"]["not opened"][0]
    assert err.startswith("error: val: ")


def test_what_was_passed_over_is_said(whole):
    passed = PassedOver()
    for i in range(7):
        passed.add(f"{i}.txt", "of no known format (.txt)")
    object.__setattr__(whole, "passed_over", passed)
    said = sections("\n".join(describe.report({"all": whole})))["all"]["passed over"]
    assert said == [str(passed), *(f"{i}.txt: of no known format (.txt)" for i in range(5))]


def test_the_report_of_what_is_made_of_arrays_and_of_a_config(tmp_path, capsys):
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
    each, counts = "3: in 0 to 20 images each, median 20", "x: 20, y: 0, z: 20"
    assert found["a"]["classes"] == [each, counts, "1 without an image: y"]
    assert found["a"]["formats"] == ["40 pixels"] and found["a"]["channels"] == ["40 grey"]
    assert found["a"]["duplicates"] == ["2 images are but 1, such as example 3, example 7"]
    said = "4 of the 4 images of b are in a too, such as example 5 and example 0"
    assert found["between splits"]["a, b"] == [said]

    assert main(["data", f"--config={DIGITS}", "--config.data.test=None"]) == 0
    out = capsys.readouterr().out
    found = sections(out)
    names = [name.partition(" ")[0] for name in found if name]
    assert names == ["config", "data.train", "data.val", "between"]
    assert found["data.train  digits, train"]["examples"] == ["1,259"]
    last = "between splits\n  data.train, data.val  no image is in both, byte for byte\n"
    assert out.endswith(last)


def test_the_splits_that_there_are(animals, pets, tmp_path):
    splits_of, understood = sources.splits_of, sources.understood
    assert splits_of(f"folder:{animals}") == ["train", "val"]
    assert splits_of(f"folder:{pets}") == []
    assert list(sources.open_splits(f"folder:{pets}")) == ["all"]
    dst = str(tmp_path / "dst")
    for split, part in (("train", "all[:90%]"), ("held", "all[90%:]")):
        prepare(str(pets), dst, split=split, part=part)
    assert sorted(splits_of(f"records:{dst}")) == ["held", "train"]
    assert sorted(splits_of(f"tfds:{dst}")) == ["held", "train"]
    for path, kind in ((pets, "folder"), (dst, "records"), (tmp_path / "no", "")):
        assert understood(str(path)) == f"{kind}:{path}".removeprefix(":")
    files = {str(path.relative_to(animals)): path.read_bytes() for path in animals.rglob("*.*")}
    archive = written(tmp_path / "animals.zip", zipped(files))
    assert understood(f"{archive},label=folder") == f"zip:{archive},label=folder"
    for spec in (understood(archive), f"tar:{archive}", f"zip:{archive}"):
        assert splits_of(spec) == ["train", "val"]
    written(tmp_path / "hub/test.parquet", pyarrow.table({"a": [1]}))
    assert splits_of(f"hf-data:{tmp_path}/hub") == ["test"]
    assert splits_of(f"arrays:{written(tmp_path / 'no.npz', b'PK')}") == []
    assert set(SOURCES) - set(sources.SPLITS) == set()


def test_classes_of_a_model_are_said(pets, whole, capsys, monkeypatch):
    def lines(names):
        return list(describe.mapping_lines("all", match(whole.label_names, names)))

    assert lines(("dog", "wolf", "cat")) == ["  all           2 of the model's 3, by name"]
    said = [line.split(None, 1)[-1] for line in lines(("Dog", "cat, tabby"))]
    by = "2 of the model's 2, by the first of several names"
    assert said == [by, "is cat, tabby", "is Dog"]
    card = types.SimpleNamespace(labels=("cat", "wolf", "fox"))
    model = types.SimpleNamespace(card=card)
    monkeypatch.setattr("vit_jax.analysis.data.open_model", lambda path: model)
    assert main(["data", f"folder:{pets}", "--model=somewhere"]) == 2
    error = capsys.readouterr().err
    assert f"all (folder:{pets}): has 2 classes" in error and "knows no 'dog'" in error


def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, pets):
    for flags, message in [
        ([], "give a SPEC such as folder:/data/pets, or --config=FILE.py"),
        (["digits", f"--config={DIGITS}"], "give a SPEC"),
        (["digits", "--config.seed=1"], "give a SPEC"),
        (["folder:nowhere"], "there is no such folder"),
        (["nowhere"], "no source 'nowhere'"),
        (["arrays:nowhere.npz"], "there is no such file"),
        (["digits", "--split=tset"], "did you mean 'test'"),
        ([f"--config={DIGITS}", "--split=tset"], "has no data.tset; did you mean 'test'"),
        (["digits", "--split=val", f"--pictures={DIGITS}"], "is a file; expected a folder"),
        ([str(pets), f"--pictures={pets}/look"], "whose images they would be taken for"),
    ]:
        assert main(["data", *flags]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------- pictures


def tile(page, number, size, columns=8):
    """The pixels of a tile that is filled by an image of that (h, w)."""
    left, top = pictures.corner(number, columns)
    left, top = (at + (pictures.SIDE - n) // 2 for at, n in ((left, size[1]), (top, size[0])))
    return page[top : top + size[0], left : left + size[1]]


def test_pictures_are_the_images_and_what_a_batch_has(whole, pets, tmp_path, capsys, monkeypatch):
    assert pictures.chosen(whole) == np.round(np.linspace(0, 59, 48)).astype(int).tolist()
    few = functools.partial(pictures.chosen, most=10)  # a PNG of many takes long
    monkeypatch.setattr(pictures, "chosen", few)
    out = tmp_path / "out"
    assert main(["data", str(pets), f"--pictures={out}"]) == 0
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said[0] == f"{out}/all_stored.png: 10 examples of all, as stored"
    assert said[1].startswith(f"{out}/all_model.png: 10 examples of all, as the model gets them (")
    side, rows = pictures.SIDE + pictures.GAP, 2 * (pictures.SIDE + pictures.GAP + pictures.CAPTION)
    for name in os.listdir(out):
        size = PIL.Image.open(out / name).size
        assert size == (8 * side + pictures.GAP, rows + pictures.GAP)
    page = np.asarray(PIL.Image.open(out / "all_stored.png"))
    at = np.round(np.linspace(0, 59, 10)).astype(int)
    for number in (0, 7, 8, 9):  # 6 x 9 pixels, each 24 x 24
        image = np.asarray(PIL.Image.open(io.BytesIO(whole[int(at[number])]["image"])))
        enlarged = image.repeat(24, 0).repeat(24, 1)
        np.testing.assert_array_equal(tile(page, number, (144, 216)), enlarged)

    assert main(["data", f"--config={DIGITS}", "--split=train", f"--pictures={out}"]) == 0
    config, source = load_config(DIGITS), open_source("digits", "train")
    read = BatchReader.of(source, config.data.train, Preprocess((8, 8), 1), seed=config.seed)
    at = np.round(np.linspace(0, 1258, 10)).astype(int)
    images = {"stored": source.images[at], "model": read(np.arange(10), at)["image"]}
    assert (images["stored"] != images["model"]).any()
    for kind, expected in images.items():
        page = np.asarray(PIL.Image.open(out / f"data_train_{kind}.png"))
        for number in (0, 8, 9):
            enlarged = expected[number].repeat(28, 0).repeat(28, 1).repeat(3, 2)
            np.testing.assert_array_equal(tile(page, number, (224, 224)), enlarged)


def test_what_cannot_be_drawn_is_an_empty_tile(animals):
    source = open_source(f"folder:{animals}", "train")
    read, _ = pictures.default_reader(source)
    tiles = pictures.stored(source, pictures.chosen(source))
    empty = [False] * 4 + [True] * 2 + [False] * 2
    assert [each.image is None for each in tiles] == empty
    shown = [("dog", "1.png"), ("cannot be read", "bad.png"), ("cannot be read", "cut.png")]
    assert [(each.title, each.note) for each in tiles[3:6]] == shown
    as_read = pictures.as_read(read, range(8), tiles)
    assert [each.image is None for each in as_read] == empty
    assert as_read[0].image.shape == (224, 224, 3)
    for spec in ("fractals:classes=5,size=16", "scenes:digits,size=16"):
        source = open_source(spec, "train")
        indices = pictures.chosen(source, 3)
        tiles = pictures.stored(source, indices)
        assert [each.image.shape[:2] for each in tiles] == [(16, 16)] * 3
        read, _ = pictures.default_reader(source)
        assert pictures.as_read(read, indices, tiles)[2].image.shape == (224, 224, 3)


def test_captions_stay_on_their_tiles():
    font = PIL.ImageFont.load_default(16)
    assert pictures.shortened("épagneul\n猫", font) == "epagneul ?"
    for text in ("x" * 60, "a name/" * 10):
        short = pictures.shortened(text, font)
        start, end = short.split("...")
        assert font.getlength(short) <= pictures.SIDE < font.getlength(f"{start}xx...{end}")
        assert text.startswith(start) and text.endswith(end)
    wide = np.zeros((30, 3000, 3), np.uint8)
    assert pictures.fitted(wide).size == (224, 2)
    page = np.asarray(pictures.sheet([pictures.Tile(wide, "x" * 60, "y" * 60)] * 2))
    assert page.shape == (224 + 42 + 24, 2 * (224 + 12) + 12, 3)
    assert (page[:, -12:] == 255).all() and (page[-12:] == 255).all()

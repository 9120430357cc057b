"""Images with masks: the layouts that people have, and what the numbers in their files mean."""

import dataclasses
import io
import logging
import pickle
import shutil
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from made import chunk, noise, refused, saved, turned, written

from vit_jax.data.config import Split
from vit_jax.data.describe import report
from vit_jax.data.forms.pair_layouts import is_layout
from vit_jax.data.images import BadImage, decode
from vit_jax.data.inputs import find_images
from vit_jax.data.masks import decode_mask, default_palette, encode_mask, voc_palette
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import open_source, open_splits, splits_of, understood
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError

SIZE = (9, 14)
PALETTE = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (9, 8, 7)]


def numbers(seed, high=3, ignored=True):
    """A mask that has all numbers below `high`, and 255."""
    mask = np.random.default_rng(seed).integers(0, high, SIZE, np.uint8)
    mask.flat[:high] = np.arange(high)
    mask[-1, -1] = 255 if ignored else 0
    return mask


def grey(mask):
    return saved(PIL.Image.fromarray(mask), "PNG")


def indexed(mask, palette=PALETTE):
    picture = PIL.Image.fromarray(mask)
    colours = [
        *palette,
        *[(7, 7, 7)] * (256 - len(palette)),
    ]  # fewer would have it cut to fewer bits
    picture.putpalette([value for colour in colours for value in colour])
    return saved(picture, "PNG")


def raw_png(mask, bits):
    """A grey PNG of any depth, written out by hand."""
    h, w = mask.shape
    rows = [
        b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes()
        for row in mask
    ]
    header = struct.pack(">IIBBBBB", w, h, bits, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def photo(seed=0, size=SIZE, **options):
    return saved(noise(*size, 3, seed=seed), "JPEG", **options)


def plain(root, splits=("",), mask=grey, n=3, **files):
    """images/SPLIT/N.jpg, masks/SPLIT/N.png."""
    for split in splits:
        for i in range(n):
            written(root / "images" / split / f"{i}.jpg", photo(i))
            written(root / "masks" / split / f"{i}.png", mask(numbers(i)))
    for name, content in files.items():
        written(root / name, content)
    return f"pairs:{root}"


def labels(source):
    return [example["label"] for example in source]


def test_plain_folders(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vit_jax")
    spec = plain(tmp_path)
    written(tmp_path / "masks" / "notes.md", "made by hand")
    source = open_source(spec, "all")
    assert source.masks and len(source) == 3 and source.label_names == ("0", "1", "2")
    assert "nothing names the classes: they are called 0 to 2" in caplog.text
    for i, example in enumerate(source):
        assert example["image"] == photo(i) and example["file"] == f"images/{i}.jpg"
        assert example["label"].dtype == np.uint8
        np.testing.assert_array_equal(example["label"], numbers(i))
        assert source.mask_size(i) == SIZE
    assert splits_of(spec) == [] and understood(str(tmp_path)) == spec
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[1]["label"], numbers(1))
    assert source.passed_over.files == [("masks/notes.md", "of no known format (.md)")]
    # The fingerprint is that of the files and of how they are read.
    prints = {source.fingerprint}
    (tmp_path / "classes.txt").write_text("road\ncar\nsky\n")
    named = open_source(spec, "all")
    assert named.label_names == ("road", "car", "sky") and named.palette is None
    prints.add(named.fingerprint)
    prints.add(open_source(f"{spec},classes=4", "all").fingerprint)
    written(tmp_path / "masks" / "2.png", indexed(numbers(2)))
    prints.add(open_source(spec, "all").fingerprint)
    assert len(prints) == 4
    names = find_images(str(tmp_path)).names
    assert names == [str(tmp_path / "images" / f"{i}.jpg") for i in range(3)]


@pytest.mark.parametrize("outer", [False, True])
def test_split_folders(tmp_path, outer):
    for split, count in {"train": 3, "val": 2}.items():
        for i in range(count):
            for kind, name, data in [("images", "jpg", photo(i)), ("masks", "png", None)]:
                where = (split, kind) if outer else (kind, split)
                data = data or grey(numbers(i, high=4 if split == "val" else 3))
                written(tmp_path.joinpath(*where, f"city/{i}.{name}"), data)
    spec = f"pairs:{tmp_path}"
    assert splits_of(spec) == ["train", "val"]
    found = open_splits(spec)
    assert [len(each) for each in found.values()] == [3, 2]
    # Both have the classes of all, without names.
    assert {each.label_names for each in found.values()} == {("0", "1", "2", "3")}
    both = len(open_source(spec, "train[:50%]")), len(open_source(spec, "train[50%:]"))
    assert sum(both) == 3
    cases = [("test", "has no split 'test'; known: train, val")]
    if outer:
        cases.append(("all", "has no split 'all'"))
    else:
        assert len(open_source(spec, "all")) == 5
    refused(lambda split: open_source(spec, split), cases)


def test_pascal_voc(tmp_path):
    for i, name in enumerate(("2007_000001", "2007_000002", "2007_000003")):
        written(tmp_path / "JPEGImages" / f"{name}.jpg", photo(i))
        if i < 2:
            mask = indexed(numbers(i, high=21), voc_palette(256))
            written(tmp_path / "SegmentationClass" / f"{name}.png", mask)
    lists = tmp_path / "ImageSets" / "Segmentation"
    written(lists / "train.txt", "2007_000002\n2007_000001\n")
    written(lists / "val.txt", "2007_000001\n\n")
    written(lists / "bad.txt", "2007_000001\n2007_000003\n")
    spec = f"pairs:{tmp_path}"
    assert splits_of(spec) == ["bad", "train", "val"] and is_layout(str(tmp_path))
    source = open_source(spec, "train")
    assert source.label_names[::20] == ("background", "tvmonitor") and len(source) == 2
    # The table in the development kit: aeroplane, bicycle, ..., tvmonitor.
    assert source.palette[1:4] == ((128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert source.palette[20] == (0, 64, 128) and voc_palette(256)[255] == (224, 224, 192)
    for found, i in zip(labels(source), (1, 0), strict=True):
        np.testing.assert_array_equal(found, numbers(i, high=21))
    cases = [
        ("bad", "bad.txt, line 2: there is no mask of '2007_000003'"),
        ("all", "has the splits bad, train, val: name one"),
        ("trian", "did you mean 'train'"),
    ]
    refused(lambda split: open_source(spec, split), cases)
    mask = indexed(numbers(1, high=22), voc_palette(256))
    written(tmp_path / "SegmentationClass" / "2007_000002.png", mask)
    with pytest.raises(
        UserError, match=r"2007_000002.png has the class 21, but there are 21, 0 to 20"
    ):
        open_source(spec, "train")[0]
    with pytest.raises(UserError, match=r"suffix= is not for the folders of Pascal VOC"):
        open_source(f"{spec},suffix=x", "train")
    (tmp_path / "more").mkdir()
    for path in lists.iterdir():
        path.rename(tmp_path / "more" / path.name)
    with pytest.raises(UserError, match=r"ImageSets/Segmentation has no SPLIT.txt"):
        open_source(spec, "train")


ADE = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(
    f"{i}\t0.1\t{9 - i}\t2\t1\t{name}\n" for i, name in enumerate(("wall", "building, edifice"), 1)
)


def test_ade20k(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vit_jax")
    for split in ("training", "validation"):
        written(tmp_path / "images" / split / "ADE_1.jpg", photo(1))
        written(tmp_path / "annotations" / split / "ADE_1.png", grey(numbers(1, ignored=False)))
    spec = f"pairs:{tmp_path}"
    assert splits_of(spec) == ["training", "validation"]
    with pytest.raises(UserError, match=r"but not its objectInfo150.txt: say reduce_zero=true if"):
        open_source(spec, "training")
    raw = numbers(1, ignored=False)
    source = open_source(f"{spec},reduce_zero=true", "training")
    expected = np.where(raw == 0, 255, raw.astype(int) - 1)
    np.testing.assert_array_equal(source[0]["label"], expected)
    assert source.label_names == ("0", "1")
    as_is = open_source(f"{spec},reduce_zero=false", "validation")
    np.testing.assert_array_equal(as_is[0]["label"], raw)
    written(tmp_path / "objectInfo150.txt", ADE)
    named = open_source(spec, "training")
    assert named.label_names == ("wall", "building, edifice")
    np.testing.assert_array_equal(named[0]["label"], expected)
    assert "0 is of no class, and 1 is class 0, as ADE20K counts" in caplog.text
    by_number = open_source(f"{spec},classes=2", "training")  # as the list is there
    np.testing.assert_array_equal(by_number[0]["label"], expected)
    as_is = open_source(f"{spec},reduce_zero=false,classes=3", "training")
    np.testing.assert_array_equal(as_is[0]["label"], raw)
    written(tmp_path / "annotations" / "training" / "ADE_1.png", grey(raw + 1))
    with pytest.raises(UserError, match=r"ADE_1.png has the class 2, but there are 2"):
        open_source(spec, "training")[0]


@pytest.mark.parametrize("folders", ["images/validation annotations/validation", "i/train m/train"])
def test_the_list_of_ade20k_says_how_its_masks_count(tmp_path, folders):
    """In whatever folders they are: class 1 of the list is 0 here, and 0 is of none."""
    images, masks = folders.split()
    raw = numbers(1, ignored=False)
    written(tmp_path / images / "1.jpg", photo(1))
    written(tmp_path / masks / "1.png", grey(raw))
    split = images.partition("/")[2]
    spec = f"pairs:{tmp_path}" + ("" if images.startswith("images") else ",images=i,masks=m")
    if split == "validation":
        with pytest.raises(UserError, match=r"has the folders of ADE20K.* but not its objectInfo"):
            open_source(spec, split)
    written(tmp_path / "objectInfo150.txt", ADE)
    source = open_source(spec, split)
    assert source.label_names[0] == "wall"
    np.testing.assert_array_equal(source[0]["label"] == 0, raw == 1)
    np.testing.assert_array_equal(source[0]["label"] == 255, raw == 0)
    rows = f"image,mask\n{images}/1.jpg,{masks}/1.png\n"
    table = open_source(f"table:{written(tmp_path / 't.csv', rows)},image=image,mask=mask", "all")
    np.testing.assert_array_equal(table[0]["label"], source[0]["label"])


def test_folders_as_of_pascal_voc(tmp_path):
    """Of a data set of other classes: by CVAT's list and colours, or by what the user says."""
    names, colours = ("background", "road", "tree"), [(0, 0, 0), (250, 50, 83), (51, 221, 255)]
    for i in range(2):
        written(tmp_path / "JPEGImages" / f"00000{i}.jpg", photo(i))
        mask = indexed(numbers(i, ignored=False), colours)
        written(tmp_path / "SegmentationClass" / f"00000{i}.png", mask)
    written(tmp_path / "ImageSets" / "Segmentation" / "default.txt", "000000\n000001\n")
    written(tmp_path / "ImageSets" / "Segmentation" / "test.txt", "000009\n")  # without masks
    spec = f"pairs:{tmp_path}"
    assert len(open_source(f"{spec},classes=2", "default")) == 2
    with pytest.raises(UserError, match=r"not its names and colours.*classes=FILE"):
        open_source(spec, "default")
    for kept in (names, None):
        more = "" if kept else ",classes=3"
        rows = [f"{n}:{r},{g},{b}::\n" for n, (r, g, b) in zip(names, colours, strict=True)]
        written(tmp_path / "labelmap.txt", "# label:color_rgb:parts:actions\n" + "".join(rows))
        source = open_source(spec + more, "default")
        assert source.label_names == (kept or ("0", "1", "2"))
        assert source.palette == tuple(colours)
        np.testing.assert_array_equal(source[1]["label"], numbers(1, ignored=False))
    # By colours, whatever the order of a palette, and without one.
    swapped = np.array([0, 2, 1], np.uint8)[numbers(1, ignored=False)]
    flat = np.array(colours, np.uint8)[numbers(1, ignored=False)]
    for data in (
        indexed(swapped, [colours[i] for i in (0, 2, 1)]),
        saved(PIL.Image.fromarray(flat), "PNG"),
    ):
        written(tmp_path / "SegmentationClass" / "000001.png", data)
        found = open_source(spec, "default")[1]["label"]
        np.testing.assert_array_equal(found, numbers(1, ignored=False))
    written(tmp_path / "SegmentationClass" / "000001.png", grey(numbers(1, ignored=False)))
    with pytest.raises(UserError, match=r"the colour \[1, 1, 1\], which the table of colours"):
        open_source(spec, "default")[1]
    # Pascal VOC's own colours and names, but counted otherwise.
    (tmp_path / "labelmap.txt").unlink()
    for i in range(2):
        mask = indexed(numbers(i), voc_palette(256))
        written(tmp_path / "SegmentationClass" / f"00000{i}.png", mask)
    assert open_source(spec, "default").label_names[1] == "aeroplane"
    with pytest.raises(UserError, match="has the folders of Pascal VOC, but not"):
        open_source(f"{spec},reduce_zero=true", "default")
    written(tmp_path / "JPEGImages" / "000000.png", photo(0))
    with pytest.raises(UserError, match=r"000000.jpg and .*000000.png have the same name"):
        open_source(spec, "default")


def test_cityscapes(tmp_path):
    ids = np.array([[0, 7, 8, 33], [23, 6, 29, 255]], np.uint8)
    train_ids = [[255, 0, 1, 18], [10, 255, 255, 255]]  # cityscapesscripts' labels.py
    for split in ("train", "val"):
        for name, mask in [("labelIds", ids), ("labelTrainIds", np.array(train_ids, np.uint8))]:
            if split == "val" and name == "labelTrainIds":
                continue
            written(
                tmp_path / "gtFine" / split / "ulm" / f"ulm_000000_000019_gtFine_{name}.png",
                grey(mask),
            )
        written(
            tmp_path / "gtFine" / split / "ulm" / "ulm_000000_000019_gtFine_polygons.json", "{}"
        )
        image = saved(noise(2, 4, 3), "PNG")
        written(
            tmp_path / "leftImg8bit" / split / "ulm" / "ulm_000000_000019_leftImg8bit.png", image
        )
    spec = f"pairs:{tmp_path}"
    found = open_splits(spec)
    for source in found.values():
        assert source[0]["label"].tolist() == train_ids and len(source.label_names) == 19
        assert (source.label_names[0], source.palette[18]) == ("road", (119, 11, 32))
    assert "labelIds are read as their trainIds" in found["val"].how
    with pytest.raises(UserError, match=r"reduce_zero= is not for the folders of Cityscapes"):
        open_source(f"{spec},reduce_zero=true", "val")
    all_ids = open_source(f"{spec},classes=34", "val")
    assert all_ids[0]["label"].tolist() == ids.tolist() and all_ids.palette is None
    names = written(tmp_path / "n.txt", "\n".join(sorted(found["val"].label_names)))
    cases = [
        (f"{spec},classes=34", "labelTrainIds have 19 classes, and 34 are named"),
        (f"{spec},classes=20", "labelTrainIds have 19 classes, and 20"),
        (f"{spec},classes={names}", "'bicycle' is 0 in the list of names, and 18 in Cityscapes'"),
    ]
    refused(lambda given: open_source(given, "train"), cases)
    mask = tmp_path / "gtFine" / "val" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"
    written(mask, grey(ids + 1))
    with pytest.raises(UserError, match=r"labelIds.png has the number 34; the 19 classes"):
        open_source(spec, "val")[0]
    for kind, end in ("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"):
        written(tmp_path / "own" / kind / "val" / "ulm" / f"7_{end}.png", grey(ids[:, :3]))
    own = f"pairs:{tmp_path}/own"  # of any classes
    with pytest.raises(UserError, match=r"not its file names \(such as 7_gtFine_.*classes=FILE"):
        open_source(own, "val")
    assert len(open_source(f"{own},classes=2", "val")) == 1
    assert open_source(f"{own},classes=40", "val")[0]["label"].tolist() == ids[:, :3].tolist()
    names = written(tmp_path / "n.txt", "\n".join(found["val"].label_names))
    with pytest.raises(UserError, match=r"'road' is 0 in the list of names, and 7 in Cityscapes'"):
        open_source(f"{own},classes={names}", "val")
    assert open_source(f"{spec},classes={names}", "train").palette == found["train"].palette
    mask.unlink()
    with pytest.raises(
        UserError,
        match=r"ulm_000000_000019_leftImg8bit.png has no mask gtFine/val/ulm/ulm_000000_000019",
    ):
        open_source(spec, "val")


def test_numbers_are_kept_at_every_depth():
    """Pillow spreads grey of 2 and 4 bits over 0 to 255, and OpenCV reads palettes as colours."""
    for bits in (1, 2, 4, 8):
        mask = np.random.default_rng(bits).integers(0, 2**bits, SIZE, np.uint8)
        np.testing.assert_array_equal(decode_mask(raw_png(mask, bits)), mask)
        out, palette = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (2**bits, 3))
        picture = PIL.Image.fromarray(mask)
        picture.putpalette(palette.ravel().tolist())
        picture.save(out, "PNG", bits=bits)
        assert out.getvalue()[24:26] == bytes([bits, 3])
        np.testing.assert_array_equal(decode_mask(out.getvalue()), mask)
    wide = np.array([[0, 255], [7, 9]], np.uint16)
    np.testing.assert_array_equal(decode_mask(saved(PIL.Image.fromarray(wide), "PNG")), wide)
    # And what is written is what is read.
    mask = numbers(0, high=21)
    data = encode_mask(mask, default_palette(21))
    np.testing.assert_array_equal(decode_mask(data), mask)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == "P" and opened.getpalette()[:6] == [0, 0, 0, 230, 159, 0]
    assert len(set(default_palette(255))) == 255 and default_palette(2) == default_palette(9)[:2]


def test_masks_that_are_no_masks():
    colour = saved(noise(4, 4, 3), "PNG")
    cases = [
        (saved(noise(4, 4, 3), "JPEG"), "it is no PNG; masks are indexed or grey PNG"),
        (colour, "it is RGB, and the class of a pixel is a number: save it as an indexed"),
        (saved(noise(4, 4, 4), "PNG"), "it is RGB with transparency"),
        (saved(PIL.Image.new("LA", (2, 2)), "PNG"), "it is grey with transparency"),
        (saved(PIL.Image.fromarray(np.full((2, 2), 256, np.uint16)), "PNG"), "has the number 256"),
        (saved(noise(4, 4, 1), "PNG", exif=turned(6)), r"turned by EXIF \(orientation 6\)"),
        (b"", "no PNG"),
    ]
    refused(decode_mask, cases)
    whole = grey(numbers(0))
    refused(
        decode_mask, [(whole[:20], "cut off"), (whole[:-30], ""), (b"\x89PNG", "cut")], BadImage
    )


def test_colours_by_a_table(tmp_path):
    colours = np.array([[10, 20, 30], [0, 0, 0], [200, 0, 5]], np.uint8)
    table = "name,r,g,b\nsky,10,20,30\nignored,0,0,0\ncar,200,0,5\nignored,1,1,1\n"
    which = np.random.default_rng(0).integers(0, 3, (3, *SIZE))
    spec = plain(tmp_path, mask=lambda mask: saved(colours[which[0]], "PNG"), **{"c.csv": table})
    source = open_source(f"{spec},colours=c.csv", "all")
    assert source.label_names == ("sky", "car") and source.palette == ((10, 20, 30), (200, 0, 5))
    np.testing.assert_array_equal(source[1]["label"], np.array([0, 255, 1])[which[0]])
    written(tmp_path / "masks" / "2.png", saved(np.full((*SIZE, 3), 7, np.uint8), "PNG"))
    with pytest.raises(UserError, match=r"2.png: it has the colour \[7, 7, 7\]"):
        source[2]
    with pytest.raises(UserError, match=r"0.png: it is RGB"):
        open_source(spec, "all")
    # Palettes and grey are colours, too; a channel of transparency may be there, unused.
    opaque = np.concatenate([colours, np.full((3, 1), 255, np.uint8)], 1)
    for data in (saved(opaque[which[0]], "PNG"), indexed(which[0].astype(np.uint8), colours)):
        written(tmp_path / "masks" / "2.png", data)
        np.testing.assert_array_equal(source[2]["label"], np.array([0, 255, 1])[which[0]])
    written(tmp_path / "masks" / "2.png", grey(np.full(SIZE, 255, np.uint8)))
    with pytest.raises(UserError, match=r"2.png: it has the colour \[255, 255, 255\]"):
        source[2]
    opaque[0, 3] = 254
    written(tmp_path / "masks" / "2.png", saved(opaque[which[0]], "PNG"))
    with pytest.raises(UserError, match=r"2.png: it is RGB with trans.* save it without transp"):
        source[2]
    written(tmp_path / "masks" / "2.png", saved(colours[which[0]], "PNG"))
    written(tmp_path / "c.csv", table.replace("200,0,5", "10,20,30"))
    with pytest.raises(UserError, match="has a colour twice"):
        open_source(f"{spec},colours=c.csv", "all")


def test_two_classes_of_0_and_255(tmp_path):
    """Which would all be the background, as 255 is of no class."""
    spec = plain(tmp_path, mask=lambda mask: grey(np.where(mask == 1, 255, 0).astype(np.uint8)))
    for more in ("", ",classes=2"):
        with pytest.raises(UserError, match=r"0 and 255 alone, .* say foreground=255"):
            open_source(spec + more, "all")
    source = open_source(f"{spec},foreground=255", "all")
    assert source.label_names == ("0", "1")
    np.testing.assert_array_equal(source[0]["label"], numbers(0) == 1)
    written(tmp_path / "classes.txt", "rest\ncat\n")
    coloured = open_source(f"{spec},foreground=255", "all")
    assert coloured.label_names == ("rest", "cat") and coloured.palette is None
    picture = PIL.Image.fromarray(np.where(numbers(0) == 1, 255, 0).astype(np.uint8))
    picture.putpalette([9, 9, 9] + [7] * 762 + [255, 0, 0])
    first = (tmp_path / "masks" / "0.png").read_bytes()
    written(tmp_path / "masks" / "0.png", saved(picture, "PNG"))
    assert open_source(f"{spec},foreground=255", "all").palette == ((9, 9, 9), (255, 0, 0))
    written(tmp_path / "masks" / "0.png", first)
    # Or 255 is of no class, where there are three classes, or the user says what is class 1.
    for more in (",classes=3", ",foreground=1"):
        source = open_source(spec + more, "all")
        np.testing.assert_array_equal(source[0]["label"] == 255, numbers(0) == 1)
    written(tmp_path / "masks" / "0.png", grey(np.full(SIZE, 9, np.uint8)))
    with pytest.raises(UserError, match=r"0.png has the number 9; .*255 is class 1"):
        open_source(f"{spec},foreground=255", "all")[0]


def test_a_split_that_has_0_and_255_alone(tmp_path):
    """Others have what tells that 255 is of no class, as in data sets of rare defects."""
    spec = plain(tmp_path, splits=("train",), mask=lambda mask: grey(mask % 2), n=2)
    for i in range(2):
        written(tmp_path / "images" / "val" / f"{i}.jpg", photo(i))
        written(tmp_path / "masks" / "val" / f"{i}.png", grey(np.full(SIZE, 255 * i, np.uint8)))
    written(tmp_path / "classes.txt", "sound\ndefect\n")
    assert (open_source(spec, "val")[1]["label"] == 255).all()


def test_splits_without_masks_and_the_classes_of_all(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vit_jax")
    spec = plain(tmp_path, splits=("train", "val"))
    written(tmp_path / "images" / "test" / "0.jpg", photo())
    written(tmp_path / "images" / "val" / "9.jpg", photo())  # which stops val, not train
    written(tmp_path / "masks" / "val" / "2.png", grey(numbers(2, high=4)))
    assert open_source(spec, "train").label_names == ("0", "1", "2", "3")
    assert "no masks in test: the classes are those of the others" in caplog.text
    refused(
        lambda split: open_source(spec, split),
        [("test", "no folder .*masks/test beside"), ("val", "images/val/9.jpg")],
    )


def test_blurred_masks_have_no_classes(tmp_path):
    spec = plain(tmp_path, mask=lambda mask: grey(np.arange(126, dtype=np.uint8).reshape(SIZE)))
    with pytest.raises(UserError, match=r"have 126 numbers, 0, .* classes=N; else .* blurred"):
        open_source(spec, "all")
    assert len(open_source(f"{spec},classes=126", "all").label_names) == 126


def test_an_indexed_mask_gives_its_colours(tmp_path):
    source = open_source(plain(tmp_path, mask=indexed), "all")
    assert source.palette == tuple(PALETTE[:3])
    np.testing.assert_array_equal(source[0]["label"], numbers(0))
    same = open_source(f"pairs:{tmp_path},reduce_zero=true", "all")
    assert same.palette == tuple(PALETTE[1:3])


def test_what_is_not_sure_is_refused(tmp_path):
    spec = plain(tmp_path / "a")
    root = tmp_path / "a"
    cases = [
        (f"{spec},class=3", "has an option 'class'; did you mean 'classes'"),
        (f"{spec},images=images", "images= and masks= .*: give both"),
        (f"{spec},images=images,masks=no", "there is no folder .*/no"),
        (f"{spec},reduce_zero=1", "reduce_zero is '1'; expected true or false"),
        (f"{spec},foreground=0", "foreground is '0'; expected a number from 1 to 255"),
        (f"{spec},classes=3,foreground=255", "foreground= is for two classes, and there are 3"),
        (
            f"{spec},reduce_zero=true,foreground=1",
            "reduce_zero= and foreground= exclude each other",
        ),
        (f"{spec},classes=256", "has 256 classes, and masks tell at most 255 apart"),
        (f"{spec},classes=no.txt", "no.txt"),
        (f"{spec},unpaired=yes", "unpaired is 'yes'"),
        (f"pairs:{tmp_path}", r"no folders of images and masks .*pairs:.*/a has them"),
        (f"pairs:{tmp_path}/b", "there is no folder"),
    ]
    refused(lambda given: open_source(given, "all"), cases)

    def changed(files, more=""):
        for name, content in files.items():
            written(root / name, content)
        try:
            open_source(spec + more, "all")
        finally:
            for name in files:
                (root / name).unlink()
            shutil.rmtree(root / "labels", ignore_errors=True)

    gap = grey(np.full(SIZE, 90, np.uint8))
    cases = [
        ({"images/9.jpg": photo()}, r"1 images have no mask, such as images/9.jpg"),
        ({"masks/9.png": grey(numbers(0))}, r"1 masks have no image, such as masks/9.png"),
        ({"masks/9.jpg": photo()}, "1 masks are no PNG, such as masks/9.jpg"),
        ({"images/0.png": photo()}, "images/0.jpg and images/0.png have the same name"),
        ({"images/9.jpg": photo(), "masks/9.png": gap}, "classes 0, 1, 2, 90, with gaps"),
        ({"labels/0.png": grey(numbers(0))}, "has masks and labels: say which is meant"),
        ({"classes.txt": "a\n", "labels.txt": "b\n"}, "has classes.txt and labels.txt"),
        ({"classes.txt": "a\nb\na\n"}, "names the class 'a' twice"),
        ({"classes.txt": "1\ta\n2\tb\n"}, "expected numbers from 0 on, and names"),
    ]
    refused(changed, cases)
    written(root / "images" / "9.jpg", photo())
    source = open_source(f"{spec},unpaired=skip", "all")
    assert len(source) == 3 and source.passed_over.files == [("images/9.jpg", "without a mask")]


def test_the_suffix_of_masks(tmp_path):
    for i in range(2):
        written(tmp_path / "images" / f"{i}.jpg", photo(i))
        written(tmp_path / "masks" / f"{i}_mask.png", grey(numbers(i)))
    with pytest.raises(UserError, match=r"masks are called as masks/0_mask.png: is there a suffix"):
        open_source(f"pairs:{tmp_path}", "all")
    source = open_source(f"pairs:{tmp_path},suffix=_mask", "all")
    np.testing.assert_array_equal(source[1]["label"], numbers(1))


def test_a_photograph_is_upright_and_its_mask_as_it_is(tmp_path):
    """The mask was drawn on what a viewer shows; one drawn before is on its side, and refused."""
    written(tmp_path / "images" / "0.jpg", photo(0, SIZE[::-1], exif=turned(6), quality=95))
    written(tmp_path / "masks" / "0.png", grey(numbers(0)))
    source = open_source(f"pairs:{tmp_path}", "all")
    read = BatchReader.of(source, Split("x", "y"), Preprocess(SIZE, 3), whole_masks=True)
    batch = read(np.arange(1), np.arange(1))
    np.testing.assert_array_equal(batch["image"][0], decode(source[0]["image"], exif=True))
    np.testing.assert_array_equal(batch["label"][0, : SIZE[0], : SIZE[1]], numbers(0))
    text = "\n".join(report(open_splits(f"pairs:{tmp_path}")))
    assert "unreadable" not in text
    written(tmp_path / "masks" / "0.png", grey(numbers(0).T.copy()))
    with pytest.raises(
        UserError, match=r"0.jpg is of 9 x 14 .* its mask of 14 x 9; it lies on its"
    ):
        read(np.arange(1), np.arange(1))
    text = "\n".join(report(open_splits(f"pairs:{tmp_path}")))
    assert "images/0.jpg: 9 x 14 pixels, and its mask has 14 x 9" in text


def test_a_damaged_mask_is_an_image_that_cannot_be_read(tmp_path, caplog):
    spec = plain(tmp_path)
    written(tmp_path / "masks" / "1.png", grey(numbers(1))[:-40])
    source = open_source(spec, "all")
    read = BatchReader.of(source, Split("x", "y"), Preprocess(SIZE, 3))
    with pytest.raises(BadImage, match=r"the mask .*masks/1.png.*on_corrupt=skip"):
        read(np.arange(3), np.arange(3))
    read = BatchReader.of(source, Split("x", "y"), Preprocess(SIZE, 3), on_corrupt="skip")
    batch = read(np.arange(3), np.arange(3))
    assert batch["mask"].tolist() == [True, False, True] and (batch["label"][1] == 255).all()
    # Nor does a size that its first bytes claim take memory.
    claims = bytearray(grey(numbers(1)))
    claims[16:24] = struct.pack(">II", 400_000, 400_000)
    written(tmp_path / "masks" / "1.png", bytes(claims))
    with pytest.raises(BadImage, match=r"masks/1.png: it claims 400000 x 400000 pixels"):
        source.mask_size(1)
    read = dataclasses.replace(read, whole_masks=True)
    assert read(np.arange(3), np.arange(3))["label"].shape == (3, 32, 32)


def test_the_report_counts_pixels(tmp_path):
    spec = plain(tmp_path, splits=("train", "val"))
    text = "\n".join(report(open_splits(spec)))
    every = np.concatenate([numbers(i).ravel() for i in range(3)])
    share = np.bincount(every, minlength=256) / every.size
    assert f"pixels        {every.size}, of no class {share[255]:.1%}" in text
    assert f"0 {share[0]:.1%}" in text and "masks         nothing names the classes" in text
    assert "3 of the 3 images of val are in train too, such as" in text
    with pytest.raises(UserError, match="has masks for labels, which records do not hold"):
        prepare(spec, str(tmp_path / "out"), part="train")
    plain(tmp_path / "outer" / "train")
    cases = [
        (tmp_path, "has masks for labels, .*: train on it as it is; if its images are in folders"),
        (tmp_path / "outer", "has masks for labels, which records do not hold"),
    ]
    refused(lambda folder: prepare(str(folder), str(tmp_path / "out")), cases)


def test_a_table_of_images_and_masks(tmp_path):
    rows = ["photo,truth,split"]
    for i in range(4):
        written(tmp_path / "a" / f"{i}.jpg", photo(i))
        written(tmp_path / "b" / f"m{i}.png", indexed(numbers(i, high=2 + i % 2)))
        rows.append(f"a/{i}.jpg,b/m{i}.png,{'train' if i < 3 else 'val'}")
    path = written(tmp_path / "table.csv", "\n".join(rows) + "\n")
    spec = f"table:{path},mask=truth"
    assert splits_of(spec) == ["train", "val"]
    train, val = open_splits(spec).values()
    assert (len(train), len(val)) == (3, 1) and train.masks
    assert train.label_names == val.label_names == ("0", "1", "2")
    for i, example in enumerate(train):
        assert example["image"] == photo(i)
        np.testing.assert_array_equal(example["label"], numbers(i, high=2 + i % 2))
    named = open_source(f"{spec},classes=3,reduce_zero=true", "val")
    np.testing.assert_array_equal(named[0]["label"][0, :3], [255, 0, 1])
    cases = [
        (f"table:{path},classes=3", "classes= is for masks, of mask=COLUMN"),
        (f"{spec},label=split", "label=COLUMN or mask=COLUMN, not both"),
        (f"table:{path},mask=trut", "no column 'trut'; did you mean 'truth'"),
    ]
    refused(lambda given: open_source(given, "train"), cases)
    written(tmp_path / "table.csv", "\n".join([*rows, rows[1]]) + "\n")
    with pytest.raises(UserError, match=r"line 6: 'a/0.jpg' is listed again"):
        open_source(spec, "train")
    empty = [*rows[:3], "a/2.jpg,,train", ",b/m2.png,train", "a/3.jpg,,val"]
    written(tmp_path / "table.csv", "\n".join(empty) + "\n")
    with pytest.raises(UserError, match=r"line 4: no mask in this row \(unpaired=skip"):
        open_source(spec, "train")
    source = open_source(f"{spec},unpaired=skip", "train")
    assert len(source) == 2 and source.label_names == ("0", "1", "2")
    assert source.passed_over.files == [("a/2.jpg", "no mask"), ("b/m2.png", "no image")]
    cases = [
        (f"{spec},unpaired=yes", "unpaired is 'yes'"),
        (f"table:{path},label=split,unpaired=skip", "unpaired= is for masks, of mask=COLUMN"),
        (f"table:{path},image=photo,label=split", "line 5: the cell of the file is empty"),
    ]
    refused(lambda given: open_source(given, "all"), cases)
    written(tmp_path / "table.csv", "\n".join(rows) + "\n")
    (tmp_path / "b" / "m1.png").unlink()
    with pytest.raises(UserError, match=r"line 3: there is no file .*b/m1.png"):
        open_source(spec, "train")


def test_a_feature_of_tfds_that_is_a_mask(tmp_path):
    fake_tfds = pytest.importorskip("fake_tfds")
    kinds = {
        "image": fake_tfds.Image(encoding_format="jpeg"),
        "mask": fake_tfds.Image(shape=(None, None, 1), encoding_format="png"),
        "species": fake_tfds.ClassLabel(names=["cat", "dog"]),
    }

    def example(i):
        return {"image": photo(i), "mask": grey(numbers(i)), "species": i % 2}

    fake_tfds.write(tmp_path, "pets", "1.0.0", kinds, {"train": (5, example)})
    spec = f"tfds:{tmp_path}/pets/1.0.0"
    source = open_source(f"{spec},label=mask,classes=3", "train[1:]")
    assert source.masks and len(source) == 4 and source.label_names == ("0", "1", "2")
    for i in range(4):
        found = source[i]
        assert found["image"] == photo(i + 1) and source.mask_size(i) == SIZE
        np.testing.assert_array_equal(found["label"], numbers(i + 1))
    assert splits_of(f"{spec},label=mask,classes=3") == ["train"]
    labels = open_source(spec, "train")
    assert not labels.masks and labels.label_names == ("cat", "dog")
    reduced = open_source(f"{spec},label=mask,classes=2,reduce_zero=true", "train")
    assert len({source.fingerprint, labels.fingerprint, reduced.fingerprint}) == 3
    cases = [
        (f"{spec},label=mask", "nothing says what the classes of its masks are: add classes=FILE"),
        (f"{spec},classes=3", "classes= is for masks, of label=KEY of an image"),
        (f"{spec},label=masks", "no class label 'masks'"),
    ]
    refused(lambda given: open_source(given, "train"), cases)
    few = open_source(f"{spec},label=mask,classes=2", "train")
    with pytest.raises(UserError, match=r"train, example 0 has the class 2, but there are 2"):
        few[0]

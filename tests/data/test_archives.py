"""Folders and tar archives as sources: files of the real formats, laid out as the real sets are."""

import bz2
import concurrent.futures
import gzip
import io
import lzma
import os
import pickle
import re
import subprocess
import tarfile
import tracemalloc
import unicodedata
import zipfile

import numpy as np
import pyarrow
import pytest
import scipy.io
import simplejpeg

from vit_jax.data.forms.archives import open_tar, tar_splits
from vit_jax.data.forms.files import OpenFiles, folder_splits
from vit_jax.data.images import BadImage
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


def jpeg(number):
    return simplejpeg.encode_jpeg(np.full((8, 8, 3), number % 256, np.uint8), 90) + b"%d" % number


def tree(root, *names):
    """Writes an image to each name; all differ."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


def packed(members, mode="w"):
    """A tar of {name: bytes}, or of names alone, whose images all differ."""
    if not isinstance(members, dict):
        members = {name: jpeg(number) for number, name in enumerate(members)}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def told(source):
    """{name: (class, bytes)}, in order."""
    found = {}
    for i in range(len(source)):
        example = source[i]
        assert example["label"] == source.labels[i] and source.names[i] in example["name"]
        found[source.names[i]] = source.label_names[example["label"]], example["image"]
    assert len(found) == len(source), "an image twice"
    return found


def classes(source):
    return {name: label for name, (label, _) in told(source).items()}


def folder(root, split="all"):
    return open_source(f"folder:{root}", split)


def tar(path, split="all"):
    return open_source(f"tar:{path}", split)


# ---------------------------------------------------------------------------------------- folders


def test_a_folder_of_class_folders(tmp_path):
    images = ["Dog/a.jpg", "cat/A B.JPEG", "cat/deep/er/x.PnG", "cat/jpg"]  # one by its content
    images += ["épagneul/z.webp", "épagneul/ñ.jpg"]
    others = ["cat/.hidden.jpg", "cat/.git/x.jpg", "cat/notes.txt", ".cache/x.jpg"]
    tree(tmp_path / "train", *others, *images, "loose.jpg")
    tree(tmp_path / "val", "cat/only.jpg")
    source = folder(tmp_path, "train")
    assert source.label_names == ("Dog", "cat", "épagneul")
    expected = {n: (n.split("/")[0], (tmp_path / "train" / n).read_bytes()) for n in images}
    assert told(source) == expected
    assert list(told(source)) == images  # in the order of their names
    assert source.labels.dtype == np.int32
    assert classes(folder(tmp_path / "val")) == {"cat/only.jpg": "cat"}
    assert list(classes(folder(tmp_path / "train" / "..", "val"))) == ["cat/only.jpg"]


def test_a_name_is_the_same_class_however_its_accents_are_stored(tmp_path):
    names = [unicodedata.normalize(form, "Café") for form in ("NFC", "NFD")]
    assert names[0] != names[1]
    sources = [folder(tree(tmp_path / str(len(n)), f"{n}/1.jpg", "dog/2.jpg")) for n in names]
    tars = [tmp_path / f"{len(name)}.tar" for name in names]
    for path, name in zip(tars, names, strict=True):
        path.write_bytes(packed([f"{name}/1.jpg", "dog/2.jpg"]))
    for source in [*sources, *map(tar, tars)]:
        assert source.label_names == ("Café", "dog")
        assert list(classes(source).values()) == ["Café", "dog"]


def test_two_folders_of_one_class_lose_no_image(tmp_path):
    names = [unicodedata.normalize(form, "Café") for form in ("NFC", "NFD")]
    try:
        source = folder(tree(tmp_path, *(f"{name}/{len(name)}.jpg" for name in names)))
    except UserError:
        return
    assert len(source) == 2


@pytest.mark.parametrize(
    "link, target, more",
    [
        ("cat/l.jpg", "../dog/2.jpg", ["cat/l.jpg"]),
        ("cat/l.jpg", "nowhere.jpg", []),
        ("cat/more", "../../else", ["cat/more/9.jpg"]),
        ("pig", "../else", ["pig/9.jpg"]),
        ("cat/sub/loop", "../sub", []),
        ("cat/loop", ".", []),
        ("cat/up", "..", []),
        ("cat/self.jpg", "self.jpg", []),
        ("self", "self", []),
    ],
)
def test_links_are_followed_and_loops_end(tmp_path, link, target, more):
    tree(tmp_path / "else", "9.jpg")
    root = tree(tmp_path / "pets", "cat/1.jpg", "cat/sub/3.jpg", "dog/2.jpg")
    (root / link).symlink_to(target)
    expected = sorted(["cat/1.jpg", "cat/sub/3.jpg", "dog/2.jpg", *more])
    assert classes(folder(root)) == {name: name.split("/")[0] for name in expected}


def test_parts_share_nothing_and_keep_their_files_when_others_are_added(tmp_path):
    tree(tmp_path, *(f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(300)))
    whole, low, high = (set(classes(folder(tmp_path, f"all{p}"))) for p in ("", "[:80%]", "[80%:]"))
    assert low | high == whole and not low & high
    assert abs(len(low) / len(whole) - 0.8) < 0.06  # four standard deviations
    middle = set(classes(folder(tmp_path, "all[40%:80%]")))
    assert middle == low - set(classes(folder(tmp_path, "all[:40%]")))
    archive = tmp_path / "all.tar"
    archive.write_bytes(packed(sorted(whole)))
    assert set(classes(tar(archive, "all[:80%]"))) == low
    tree(tmp_path, *(f"{c}/more{i}.jpg" for c in ("cat", "ape") for i in range(300)))
    assert low < set(classes(folder(tmp_path, "all[:80%]")))
    assert high < set(classes(folder(tmp_path, "all[80%:]")))


def test_a_pickled_source_is_small_and_the_same(tmp_path):
    names = [f"{c}/{i:04d}.jpg" for c in ("cat", "dog") for i in range(1000)]
    (tmp_path / "all.tar").write_bytes(packed(names))
    for source in (folder(tree(tmp_path / "pets", *names)), tar(tmp_path / "all.tar")):
        first = source[0]  # a file is open now
        pickled = pickle.dumps(source)
        assert len(pickled) < 45 * len(names)  # 12 for the name, 4 to 28 for the numbers
        copy = pickle.loads(pickled)
        assert told(copy) == told(source) and copy[0] == first
        assert copy.fingerprint == source.fingerprint and copy.label_names == source.label_names


def test_the_fingerprint_changes_with_the_files_and_only_with_them(tmp_path):
    tree(tmp_path, "cat/1.jpg", "cat/2.jpg", "dog/3.jpg")
    (tmp_path / "empty").mkdir()
    found = []
    for change in (
        lambda: (tmp_path / "empty").rmdir(),
        lambda: tree(tmp_path, "dog/4.jpg"),
        lambda: (tmp_path / "cat/1.jpg").rename(tmp_path / "cat/0.jpg"),
        lambda: (tmp_path / "cat/0.jpg").unlink(),
        lambda: (tmp_path / "cat").rename(tmp_path / "Cat"),
        lambda: (tmp_path / "dog/3.jpg").write_bytes(b"longer" + jpeg(3)),
    ):
        change()
        found.append(folder(tmp_path).fingerprint)
        os.utime(tmp_path / "dog/3.jpg", (1, 1))
        (tmp_path / "dog/notes.txt").write_text(str(found))
        assert folder(tmp_path).fingerprint == found[-1]
        tmp_path.joinpath("all.tar").unlink(missing_ok=True)
    assert len(set(found)) == len(found)
    assert folder(tmp_path, "all[:50%]").fingerprint != found[-1]


@pytest.mark.parametrize(
    "names, split, message",
    [
        (None, "train", "folder:.*pets: there is no such folder"),
        (["train/cat/1.jpg"], "trian", "has no sub-folder 'trian'; did you mean 'train'?"),
        (["cat/1.jpg"], "train", "no sub-folder 'train'; known: cat. If .* use split=all"),
        (
            ["train/cat/1.jpg", "train/dog/x.txt", "train/pig/.x.jpg"],
            "train",
            r"'dog' \(1 of no known format \(.txt\)\), 'pig' \(1 hidden\)$",
        ),
        (
            ["train/dog/x.txt"],
            "train",
            r"1 class folder\(s\) without any image: 'dog' \(1 of no known format \(.txt",
        ),
        (["train/1.jpg"], "train", "train has no sub-folders, one for each class"),
        (["cat/1.jpg"], "all[:1%]", r"has no image in split 'all\[:1%\]'"),
        *(
            (["cat/1.jpg"], split, re.escape(f"split {split!r}: expected NAME, NAME[:90%]"))
            for split in ("", "all[", "all[90%]", "all[:110%]", "all[:9]", "[:9%]")
        ),
        *((["cat/1.jpg"], split, "expected NAME") for split in ("all[9%:9%]", "all[:0%]", "a[:]b")),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, names, split, message):
    if names is not None:
        tree(tmp_path / "pets", *names)
    with pytest.raises(UserError, match=message):
        folder(tmp_path / "pets", split)


def test_a_file_that_vanished_is_named(tmp_path):
    source = folder(tree(tmp_path, "cat/1.jpg", "dog/2.jpg"))
    (tmp_path / "cat/1.jpg").unlink()
    with pytest.raises(UserError, match=r"cat/1\.jpg could be listed but not read .No such file"):
        source[0]
    assert source[1]["image"] == jpeg(1)


# ------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize(
    "names, expected",
    [
        (["dog/b.jpg", "cat/a.JPG", "dog/deep/c.png"], "dog cat dog"),
        (["set 1/train/é/a b.jpg", "set 1/train/dog/b.jpg"], "é dog"),
        (["pets/cat/1.jpg", "pets/cat/2.jpg"], "cat cat"),
        (["/etc/cat/1.jpg", "/etc/dog/2.jpg"], "cat dog"),
        (["../../cat/1.jpg", "../../dog/2.jpg"], "cat dog"),
        ([f"{'long' * 40}/cat/{'é' * 90}.jpg", f"{'long' * 40}/dog/2.jpg"], "cat dog"),
        (["./cat/1.jpg", "./dog/2.jpg"], "cat dog"),
        (["./set/a/1.jpg", "./set/b/2.jpg"], "a b"),
        (["/x/a/1.jpg", "x/b/2.jpg"], "a b"),
        (["01/a.jpg", "02/b.jpg"], "01 02"),
        (["1/a.jpg", "20/b.jpg"], "1 20"),
    ],
)
def test_a_tar_of_class_folders(tmp_path, names, expected):
    extra = {"README.txt": b"text", ".DS_Store": b"", "cat/._a.jpg": b"Mac"}
    images = {name: jpeg(number) for number, name in enumerate(names)}
    (tmp_path / "a.tar").write_bytes(packed(extra | images))
    source = tar(tmp_path / "a.tar")
    assert source.label_names == tuple(sorted(set(expected.split())))
    assert told(source) == {
        name: (label, images[name]) for name, label in zip(names, expected.split(), strict=True)
    }


def test_a_split_of_a_tar_is_a_folder_in_it(tmp_path):
    names = ["pets/train/cat/1.jpg", "pets/train/dog/2.jpg", "pets/val/dog/3.jpg", "trained/x.jpg"]
    (tmp_path / "a.tar").write_bytes(packed(names))
    assert classes(tar(tmp_path / "a.tar", "train")) == {names[0]: "cat", names[1]: "dog"}
    assert classes(tar(tmp_path / "a.tar", "val")) == {names[2]: "dog"}
    with pytest.raises(UserError, match="has no image in split 'test'"):
        tar(tmp_path / "a.tar", "test")


@pytest.mark.parametrize("prefix", ["", "winter21_whole/"])
def test_a_tar_of_a_tar_for_each_class(tmp_path, prefix):
    """ImageNet-1k's training set, and ImageNet-21k."""
    images = {
        wnid: {f"{wnid}_{i}.JPEG": jpeg(10 * c + i) for i in range(3)}
        for c, wnid in enumerate(["n01440764", "n02119789", "n01443537"])
    }
    outer = packed({f"{prefix}{wnid}.tar": packed(each) for wnid, each in images.items()})
    (tmp_path / "a.tar").write_bytes(outer)
    source = tar(tmp_path / "a.tar")
    assert source.label_names == tuple(sorted(images))
    expected = {f"{w}/{n}": (w, data) for w, inner in images.items() for n, data in inner.items()}
    assert told(source) == expected
    compressed = tmp_path / "a.tar.gz"
    compressed.write_bytes(gzip.compress(outer))
    again = open_tar(str(compressed))
    assert told(again) == expected and again.fingerprint == source.fingerprint
    assert again[0] == {**source[0], "name": again[0]["name"]}  # going back is possible
    with pytest.raises(
        UserError, match=r"a\.tar\.gz is compressed, .* `python -m vit_jax prepare`"
    ):
        tar(compressed)


WNIDS = {1: "n02119789", 2: "n02100735", 3: "n02110185", 4: "n01440764"}
TRUTH = [3, 1, 4, 4, 2]


def kit(truth=TRUTH, name="synsets"):
    """ILSVRC2012_devkit_t12.tar.gz."""
    kinds = [(key, "O") for key in ("ILSVRC2012_ID", "WNID", "words", "num_children", "children")]
    synsets = np.zeros((len(WNIDS), 1), kinds)
    for row, (number, wnid) in enumerate(WNIDS.items()):
        synsets[row, 0] = (float(number), wnid, "fox, kit fox", 0.0, np.zeros((0, 0)))
    meta = io.BytesIO()
    scipy.io.savemat(meta, {name: synsets})
    text = "".join(f"{number}\n" for number in truth).encode()
    top = "ILSVRC2012_devkit_t12"
    members = {f"{top}/readme.txt": b"words", f"{top}/data/meta.mat": meta.getvalue()}
    return members | {f"{top}/data/ILSVRC2012_validation_ground_truth.txt": text}


@pytest.fixture
def validation(tmp_path):
    """ImageNet-1k's validation tar: flat, and not in the order of the names."""
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in (3, 0, 4, 1, 2)]
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(packed(names))
    return tmp_path / "ILSVRC2012_img_val.tar"


LABELS = {
    "ILSVRC2012_devkit_t12.tar.gz": packed(kit(), "w:gz"),
    "in order.txt": "".join(f"{WNIDS[n]}\n" for n in TRUTH).encode(),
    "pairs.csv": "".join(
        f"ILSVRC2012_val_{i + 1:08d}.JPEG,{WNIDS[TRUTH[i]]}\n" for i in (4, 2, 0, 1, 3)
    ).encode(),
    "pairs.txt": "".join(
        f"val/ILSVRC2012_val_{i + 1:08d}.JPEG {WNIDS[TRUTH[i]]}\n\n" for i in range(5)
    ).encode(),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_flat_tar_takes_its_classes_from_a_file(validation, name):
    labels = validation.parent / name
    labels.write_bytes(LABELS[name])
    source = open_tar(str(validation), labels=str(labels))
    assert source.label_names == ("n01440764", "n02100735", "n02110185", "n02119789")
    expected = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in (3, 0, 4, 1, 2)]
    assert classes(source) == {n: WNIDS[TRUTH[int(n[-7:-5]) - 1]] for n in expected}
    with pytest.raises(UserError, match="is in no folder of a class: say with --labels"):
        tar(validation)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("ILSVRC2012_validation_ground_truth.txt", b"3\n1\n4\n4\n2\n", "give ILSVRC2012_devkit"),
        ("head.txt", b"label\na\nb\na\nb\n", "first line, 'label', a header.*has 4 labels of 5 im"),
        ("few.txt", b"a\nb\n", "few.txt has 2 labels, but there are 5 images"),
        ("few.csv", b"ILSVRC2012_val_00000001.JPEG,a\n", "says nothing of 4 images, such as"),
        ("no.txt", None, "there is no file of labels '.*no.txt'"),
        ("bytes.txt", b"\xff\xfe", "is no file of labels"),
        ("kit.tar.gz", b"text", "kit.tar.gz is no development kit of ILSVRC2012"),
        ("kit.tar.gz", packed(["meta.mat"], "w:gz"), "is no development kit"),
        ("kit.tar.gz", packed(kit(), "w:gz")[:200], "is no development kit"),
        ("kit.tar.gz", packed(kit(TRUTH[:4]), "w:gz"), "has 4 labels, but there are 5 images"),
        ("kit.tar", packed(kit(name="x")), "is no development kit"),
        ("kit.tar", packed(kit([9] * 5)), "is no development kit"),
    ],
)
def test_labels_that_do_not_fit_are_refused(validation, name, data, message):
    if data is not None:
        (validation.parent / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_tar(str(validation), labels=str(validation.parent / name))


@pytest.mark.parametrize(
    "names, labels, expected",
    [
        (["my a.jpg", "my b.jpg"], "my a.jpg,cat\nmy b.jpg,dog", "cat dog"),
        (["a/1.jpg", "b/1.jpg"], "cat\ndog", "cat dog"),
    ],
)
def test_labels_are_given_to_the_right_image(tmp_path, names, labels, expected):
    (tmp_path / "a.tar").write_bytes(packed(names))
    (tmp_path / "labels.txt").write_text(labels)
    try:
        source = open_tar(str(tmp_path / "a.tar"), labels=str(tmp_path / "labels.txt"))
    except UserError:
        return
    assert list(classes(source).values()) == expected.split()


@pytest.mark.parametrize("pattern", ["{000..002}.tar", "*.tar", "00?.tar"])
@pytest.mark.parametrize("beside", ["cls", "json", "JSON"])
def test_shards_of_webdataset(tmp_path, pattern, beside):
    expected = {}
    for shard in range(3):
        members = {}
        for i in range(4):
            stem = f"v1.0/{shard}{i}"
            label = f'{{"label": {3 * i}, "url": "x"}}' if beside != "cls" else f"{3 * i}"
            members |= {f"{stem}.{beside}": f"{label}\n".encode(), f"{stem}.txt": b"a cat"}
            members |= {f"{stem}.jpg": jpeg(10 * shard + i)}
            expected[f"{stem}.jpg"] = str(3 * i), jpeg(10 * shard + i)
        (tmp_path / f"shard-{shard:03d}.tar").write_bytes(packed(members))
    source = tar(tmp_path / f"shard-{pattern}")
    assert told(source) == expected
    assert source.label_names == tuple(map(str, range(10)))  # a number is its class's place


def test_shards_of_webdataset_may_name_their_classes(tmp_path):
    members = {"a.jpg": jpeg(0), "a.cls": b"tabby", "b.jpg": jpeg(1), "b.cls": b"ox\n"}
    (tmp_path / "a.tar").write_bytes(packed(members))
    assert classes(tar(tmp_path / "a.tar")) == {"a.jpg": "tabby", "b.jpg": "ox"}


def samples(text, options=""):
    """A tar's members from "a.jpg a.cls=0 b.jpg": names, and what is in the files of labels."""
    members = {}
    for number, word in enumerate(text.split(";")):
        name, _, content = word.strip().partition("=")
        members[name] = (
            content.encode() if re.search("cls$|json$|txt$", name.lower()) else jpeg(number)
        )
    return members


TWICE = "a.jpg; a.txt=cat; b.jpg; b.txt=dog; c.jpg; c.txt=cat; d.jpg; d.txt=dog"


@pytest.mark.parametrize(
    "text, option, expected",
    [
        ("x 2.0.jpg; x 2.0.cls=5; x 2.1.jpg; x 2.1.cls=3", "", "5 3"),
        ("x 2.0.jpg; x 2.0.cls=1", "", "1"),
        ("a.JPG; a.notes.txt=x; a.CLS=1", "", "1"),
        ('a.jpg; a.json={"label": 3.0}; b.jpg; b.json={"label": "1"}', "", "3 1"),
        ('a.jpg; a.json={"label": " Tabby "}; b.jpg; b.json={"label": "ox"}', "", "Tabby ox"),
        ('a.jpg; a.json={"label": 1, "class": "x"}; b.jpg; b.json={"label": 0}', "", "1 0"),
        ('a.jpg; a.json={"class": "x"}; b.jpg; b.json={"class": "y"}', ",label=json.class", "x y"),
        ("a.jpg; a.cls=3.0; b.jpg; b.cls=\ufeff2", "", "3 2"),
        (TWICE, "", "cat dog cat dog"),
        ("a.jpg; a.txt=a cat; b.jpg; b.txt=a dog", ",label=txt", "a cat;a dog"),
        ("cat/a.jpg; cat/a.txt=mine; dog/b.jpg; readme.txt=text", "", "cat dog"),
        ('a.jpg; a.cls=1; a.json={"label": 1}; b.jpg; b.cls=0; b.json={"label": 0}', "", "1 0"),
        ("cat/a.jpg; cat/a.cls=0; dog/b.jpg", ",label=folder", "cat dog"),
        ("x/a.jpg; x/a.cls=0; y/b.jpg; y/b.cls=1", ",label=cls", "0 1"),
        ("x/a.jpg; x/a.cls=x; y/b.jpg; y/b.cls=y", "", "x y"),
        ("v1.0/a.jpg; v1.0/a.cls=0; v1.0/a.json={}; v1.0/b.jpg; v1.0/b.cls=2", "", "0 2"),
        ("a.jpg; a.cls=A; b.jpg; b.cls=7", ",label=cls", "A 7"),
    ],
)
def test_one_thing_says_the_classes_of_all(tmp_path, text, option, expected):
    members = samples(text)
    (tmp_path / "a.tar").write_bytes(packed(members))
    source = tar(f"{tmp_path}/a.tar{option}")
    images = [name for name in members if name.lower().endswith(".jpg")]
    expected = expected.split(";" if ";" in expected else " ")
    assert told(source) == {n: (c, members[n]) for n, c in zip(images, expected, strict=True)}
    if expected[0].isdigit():  # a number is its class's place
        assert source.label_names == tuple(map(str, range(1 + max(map(int, expected)))))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.jpg; a.cls=0; b.jpg", r"b.jpg has no .cls beside it, as a.jpg has: .*--labels=FILE$"),
        ("b.jpg; a.jpg; a.cls=0", r"b.jpg has no .cls beside it, as a.jpg has"),
        ("a.jpg; a.cls=0; b.jpg; b.cls=", "b.jpg: its .cls is empty"),
        ("a.jpg; a.cls=0; b.jpg; b.cls=cat", "others names: a.jpg has '0', b.jpg 'cat'"),
        ("a.jpg; a.cls=1; b.jpg; b.cls=01", "are the labels '01' and '1' one class, or two"),
        ("a.jpg; a.cls=-1", "a.jpg: its .cls says -1.0; expected a name or a whole number"),
        ("a.jpg; a.cls=2.5", "a.jpg: its .cls says 2.5"),
        ("a.jpg; a.cls=cat\ndog", "its .cls says .*: several lines"),
        ("a.jpg; a.cls=\0\1", "its .cls is no text in UTF-8"),
        ("a.jpg; a.cls=0 5 7", "its .cls says '0 5 7': several numbers"),
        ("cat/a.jpg; cat/a.cls=0; dog/b.jpg", r"dog/b.jpg has no .cls .*label=cls\|folder behind"),
        (
            'a.jpg; a.cls=0; a.json={"label": "cat"}; b.jpg; b.cls=1',
            r"b.jpg has no label in a .json beside it, as a.jpg has: .* ,label=cls\|json",
        ),
        (
            'a.jpg; a.cls=0; a.json={"label": "cat"}; b.jpg; b.cls=1; b.json={"label": "ox"}',
            r"a.jpg is of class '0' by its .cls and 'cat' by its .json: .*label=cls\|json",
        ),
        ("x/a.jpg; x/a.cls=0; y/b.jpg; y/b.cls=1", "x/a.jpg is of .* 'x' by its folder"),
        ("img.v2.jpg; img.cls=0", "img.v2.jpg: its .cls may be img.cls, or not: the names agree"),
        ("a.jpg; a.seg.png; a.cls=0", "a.seg.png: its .cls may be a.cls, or not"),
        ("a.jpg; a.png; a.cls=0", "a.png: its .cls is also that of a.jpg"),
        ("x 2.0.jpg; x 2.0.cls=0; x 2.1.jpg", "x 2.1.jpg: its .cls may be x 2.0.cls, or not"),
        ("a.jpg; b.jpg; cat/c.jpg", "a.jpg has no folder of a class, as cat/c.jpg has"),
        ("a.jpg; a.txt=a red cat; b.jpg; b.txt=a dog; c.jpg; c.txt=a dog", "not taken for classes"),
        ("a.jpg; a.txt=x; b.jpg; c.jpg; d.jpg", "b.jpg has no .txt beside it, as a.jpg has"),
        *(
            (f'a.jpg; a.json={{"label": {value}}}', f"a.jpg: its .json says {re.escape(said)}")
            for value, said in [
                *((value, value) for value in ("null", "true", "-1", "1.5", '""', "NaN", "1e+300")),
                *(('{"id": 3}', '{"id": 3}'), ("[1, null]", "[1, null]"), ("[1, 1]", "[1, 1]")),
                *(("[0.0, 1.0]", "[0.0, 1.0]"), ("[[1]]", "[[1]]")),
            ]
        ),
        ('a.jpg; a.json={"url": 1, "class": 2}', r"no folder .*has url, class: ,label=json.KEY"),
        ("a.jpg; a.json=[1]; b.jpg; b.json={", "a.jpg is in no folder of a class"),
        ('a.jpg; a.json={"label": [0, 1]}; b.jpg; b.json={"label": [1, 0]}', "one-hot"),
    ],
)
def test_a_class_that_is_not_certain_is_refused(tmp_path, text, message):
    (tmp_path / "a.tar").write_bytes(packed(samples(text)))
    with pytest.raises(UserError, match=message):
        tar(tmp_path / "a.tar")


def test_a_list_is_several_labels(tmp_path):
    text = (
        'a.jpg; a.json={"label": [4, 2]}; b.jpg; b.json={"label": []}; c.jpg; c.json={"label": 1}'
    )
    (tmp_path / "a.tar").write_bytes(packed(samples(text)))
    source = tar(tmp_path / "a.tar")
    assert source.multi_label and source.label_names == ("0", "1", "2", "3", "4")
    assert [source[i]["label"] for i in range(3)] == [(4, 2), (), (1,)]
    (tmp_path / "a.tar").write_bytes(packed(samples('a.jpg; a.json={"label": ["ox", "cow"]}')))
    assert tar(tmp_path / "a.tar")[0]["label"] == (1, 0)


def test_a_file_twice_is_refused_in_one_archive_alone(tmp_path):
    for shard in "xy":
        text = f"a.jpg; a.cls={shard}; b.jpg; b.cls=z"
        (tmp_path / f"{shard}.tar").write_bytes(packed(samples(text)))
    source = tar(tmp_path / "?.tar")
    assert [source.label_names[label] for label in source.labels] == ["x", "z", "y", "z"]
    out = io.BytesIO()
    for twice, message in [
        ("a.jpg", r"x\.tar has a.jpg twice"),
        ("a.cls", "is there twice: a.cls"),
    ]:
        with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as archive:
            for name in ("a.jpg", "a.cls", twice):
                member = tarfile.TarInfo(name)
                member.size = 4
                archive.addfile(member, io.BytesIO(b"0123"))
        (tmp_path / "x.tar").write_bytes(out.getvalue())
        with pytest.raises(UserError, match=message):
            tar(tmp_path / "x.tar")


@pytest.mark.parametrize(
    "stems", ["shard-0 shard-1", "train-0 val-0", "1 2", "a-0 a-1 b", "test x"]
)
def test_shards_that_are_only_numbered_are_no_classes(tmp_path, stems, caplog):
    for number, stem in enumerate(stems.split()):
        (tmp_path / f"{stem}.tar").write_bytes(packed({f"{number}.jpg": jpeg(number)}))
    with pytest.raises(UserError, match=r"no class but the name of its archive, .*,label=shard"):
        tar(tmp_path / "*.tar")
    found = classes(tar(f"{tmp_path}/*.tar,label=shard"))
    assert found == {f"{number}.jpg": stem for number, stem in enumerate(stems.split())}
    inner = {f"{stem}.tar": packed([f"{n}.jpg"]) for n, stem in enumerate(stems.split())}
    (tmp_path / "all.tgz").write_bytes(packed(inner))
    with pytest.raises(UserError, match=r"no class but the name of its archive, .*,label=tar"):
        tar(tmp_path / "all.tgz")


def test_shards_whose_names_are_classes_are_said(tmp_path, caplog):
    caplog.set_level("INFO")
    for stem in ("cat", "big dog"):
        (tmp_path / f"{stem}.tar").write_bytes(packed([f"{stem}.jpg"]))
    assert set(classes(tar(tmp_path / "*.tar")).values()) == {"cat", "big dog"}
    assert "each archive is a class: big dog, cat" in caplog.text


# --------------------------------------------------------------------- links, splits, zips, others


def linked(members, links, kind="w"):
    """A tar of {name: bytes}, and of links: (name, target), symbolic if it starts with @."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=kind) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE if target.startswith("@") else tarfile.LNKTYPE
            member.linkname = target.removeprefix("@")
            archive.addfile(member)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    "links, expected",
    [
        ({"bird/1.jpg": "cat/1.jpg"}, {"bird/1.jpg": 1}),
        ({"bird/1.jpg": "./cat/1.jpg"}, {"bird/1.jpg": 1}),
        ({"bird/1.jpg": "@../cat/1.jpg"}, {"bird/1.jpg": 1}),
        (
            {"bird/2.jpg": "bird/1.jpg", "bird/1.jpg": "@../cat/1.jpg"},
            {f"bird/{i}.jpg": 1 for i in (1, 2)},
        ),
        ({"bird": "@cat"}, {"bird/1.jpg": 1}),
        ({"bird/more": "@../dog"}, {"bird/more/2.jpg": 2, "bird/more/deep/3.png": 3}),
        ({"bird/x.jpg": "@../.store/9"}, {"bird/x.jpg": 9}),
        ({"bird/x.jpg": "@y.jpg", "bird/y.jpg": "@x.jpg"}, "2 a link in a circle"),
        ({"bird/x.jpg": "bird/x.jpg"}, "1 a link in a circle"),
        ({"bird/x.jpg": "@../../x.jpg"}, "1 a link out of the archive"),
        ({"bird/x.jpg": "@/etc/x.jpg"}, "1 a link out of the archive"),
        ({"bird/x.jpg": "@1.jpg"}, "1 a link to nothing"),
        ({"cat/up": "@.."}, "1 a link to a folder that it is in"),
        ({"cat/here": "@."}, "1 a link to a folder that it is in"),
    ],
)
def test_links_in_a_tar_are_followed_in_it(tmp_path, links, expected, mode, caplog):
    caplog.set_level("INFO")
    members = {"cat/1.jpg": jpeg(1), "dog/2.jpg": jpeg(2), "dog/deep/3.png": jpeg(3)}
    (tmp_path / "a.tar").write_bytes(linked(members | {".store/9": jpeg(9)}, links, mode))
    source = open_tar(str(tmp_path / "a.tar"))
    found = told(source)
    more = expected if isinstance(expected, dict) else {}
    images = members | {name: jpeg(number) for name, number in more.items()}
    assert found == {name: (name.split("/")[0], data) for name, data in images.items()}
    passed = str(source.passed_over)
    if isinstance(expected, str):
        assert expected in passed and expected in caplog.text
        assert ("no image in its folders bird" in caplog.text) == ("bird" in str(links))
    else:
        assert passed == "1 files passed over: 1 of a folder .store" and not caplog.text


@pytest.mark.parametrize("form", ["gnu", "posix", "ustar", "v7"])
def test_tars_of_all_forms(tmp_path, form):
    """GNU tar's own: long names, links, and holes, as its forms have them."""
    tree(tmp_path, "cat/1.jpg", "dog/2.jpg")
    long = "cat/" + ("l" * 70 + "/") * (1 if form != "v7" else 0) + "x" * 60 + ".jpg"
    tree(tmp_path, long)
    os.link(tmp_path / "cat/1.jpg", tmp_path / "dog/1.jpg")
    sparse = form in ("gnu", "posix")
    if sparse:
        with (tmp_path / "dog/holes.bmp").open("wb") as file:
            file.write(jpeg(7))
            file.seek(2**20)
            file.write(b"end")
            file.truncate(2**21)
    files = ["cat", "dog"]
    holes = ["-S"] if sparse else []
    command = ["tar", f"--format={form}", *holes, "--sort=name", "-cf", "a.tar", *files]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = told(tar(tmp_path / "a.tar"))
    names = ["cat/1.jpg", long, "dog/1.jpg", "dog/2.jpg", *["dog/holes.bmp"] * sparse]
    assert found == {n: (n.split("/")[0], (tmp_path / n).read_bytes()) for n in names}
    assert (tmp_path / "a.tar").stat().st_size < 2**17


def zipped(members, **options):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_as_a_tar_is(tmp_path, kind, method):
    names = ["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg"]
    members = {f"set/{name}": jpeg(n) for n, name in enumerate(names)}
    others = {"__MACOSX/set/train/cat/._1.jpg": b"Mac", "set/train/cat/": b""}
    (tmp_path / "a.zip").write_bytes(zipped(others | members, compression=method))
    (tmp_path / "a.tar").write_bytes(packed(members))
    for split in ("train", "val", "set/train", "train[:90%]"):
        source = open_source(f"{kind}:{tmp_path}/a.zip", split)
        expected = tar(tmp_path / "a.tar", split)
        assert told(pickle.loads(pickle.dumps(source))) == told(source) == told(expected)
        assert source.label_names == expected.label_names
        assert source.fingerprint == expected.fingerprint
    with pytest.raises(UserError, match=r"train, val are called like splits.*split=train"):
        open_source(f"{kind}:{tmp_path}/a.zip", "all")
    assert tar_splits(str(tmp_path / "a.zip")) == ("train", "val", "all")
    many = {"a/1.jpg": jpeg(1), "a/1.cls": b"1", "b/2.jpg": jpeg(2), "b/2.cls": b"0"}
    (tmp_path / "b.zip").write_bytes(zipped(many, compression=method))
    assert classes(tar(f"{tmp_path}/b.zip,label=cls")) == {"a/1.jpg": "1", "b/2.jpg": "0"}


def test_names_in_a_zip_are_only_names(tmp_path):
    names = ["cat\\1.jpg", "/etc/dog/2.jpg", "../../ox/3.jpg", "Café/4.jpg"]
    data = zipped({name: jpeg(n) for n, name in enumerate(names)})
    (tmp_path / "a.zip").write_bytes(data.replace("Café".encode(), "Café".encode()))
    found = classes(tar(tmp_path / "a.zip"))
    assert list(found.values()) == ["cat", "etc", "ox", "Café"]
    unmarked = zipped({"Cafe1/1.jpg": jpeg(0), "b/1.jpg": jpeg(1)})
    (tmp_path / "b.zip").write_bytes(unmarked.replace(b"Cafe1", "Café".encode()))
    assert list(classes(tar(tmp_path / "b.zip")).values()) == ["Café", "b"]
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("cat/1.jpg", jpeg(1))
        link = zipfile.ZipInfo("dog/1.jpg")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "../cat/1.jpg")
    found = {"cat/1.jpg": ("cat", jpeg(1)), "dog/1.jpg": ("dog", jpeg(1))}
    assert told(tar(tmp_path / "c.zip")) == found


def test_a_damaged_image_in_a_zip_is_a_bad_image(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = bytearray(zipped({"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)}, compression=method))
        data[60] ^= 255
        (tmp_path / "a.zip").write_bytes(data)
        source = tar(tmp_path / "a.zip")
        assert source[1]["image"] == jpeg(2)
        with pytest.raises(BadImage, match=r"1\.jpg (is damaged|cannot be inflated)"):
            source[0]


ZIP = zipped({"cat/1.jpg": jpeg(0)})


@pytest.mark.parametrize(
    "data, message",
    [
        (b"7z\xbc\xaf\x27\x1c" + bytes(99), "is a 7z archive; tar, .* zip are read"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(99), "is a rar archive; tar"),
        (jpeg(0), r"is an image \(JPEG\)"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "is a web page"),
        (ZIP[:-30], "is no whole zip archive"),
        (ZIP[:20] + ZIP[200:], "is no whole zip archive"),
        (zipped({"a/1.jpg": jpeg(0)}, compression=zipfile.ZIP_LZMA), "is compressed by lzma"),
        (zipped({"a.zip": ZIP}), r"no image .*1 an archive beside images \(.zip\)"),
        (zipped({}), "has no image in split"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "is no whole tar archive"),
    ],
)
def test_what_an_archive_is_is_said(tmp_path, data, message):
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_tar(str(tmp_path / "a.zip"))


def test_an_encrypted_zip_is_refused(tmp_path):
    data = bytearray(ZIP)
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"is encrypted \(cat/1.jpg\): unpack it"):
        tar(tmp_path / "a.zip")


def zstd(data):
    """In two frames, as parallel compressors write."""
    frames = (data[: len(data) // 3], data[len(data) // 3 :])
    return b"".join(pyarrow.compress(one, "zstd", asbytes=True) for one in frames)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_a_compressed_tar_is_read_in_any_order(tmp_path, compress):
    data = {f"{c}/{i}.jpg": jpeg(i) * 99 for i, c in enumerate("abab")}
    (tmp_path / "a.tar").write_bytes(compress(packed(data)))
    source = open_tar(str(tmp_path / "a.tar"))
    assert told(source) == {name: (name[0], each) for name, each in data.items()}
    assert [source[i]["image"] for i in (3, 0, 2)] == [[*data.values()][i] for i in (3, 0, 2)]
    with pytest.raises(UserError, match="is compressed, so that no image can be read without"):
        tar(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(compress(packed(data))[:-200])
    with pytest.raises(UserError, match="is no whole tar archive"):
        open_tar(str(tmp_path / "a.tar"))


def test_what_is_no_image_is_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    images = ["cat/a.jfif", "cat/b.jpe", "cat/c", "cat/d.jpg", "cat/e.avif", "dog/f.dat"]
    avif = b"\0\0\0\x20ftypavif" + bytes(20)
    members = {name: avif if name == "cat/e.avif" else jpeg(n) for n, name in enumerate(images)}
    others = {
        "cat/x.heic": (b"\0\0\0\x20ftypheic" + bytes(20), "in a format that is not read (.heic)"),
        "cat/x.db": (b"text", "of no known format (.db)"),
        "cat/x": (b"text", "of no known format (no ending)"),
        "cat/x.dat": (b"", "empty"),
        "cat/notes.md": (b"P1 text", "of no known format (.md)"),
        "cat/._d.jpg": (b"Mac", "hidden"),
        "cat/@eaDir/d.jpg": (jpeg(9), "of a folder @eaDir"),
        "__MACOSX/d.jpg": (jpeg(9), "of a folder __MACOSX"),
        ".git/d.jpg": (jpeg(9), "of a folder .git"),
    }
    everything = members | {name: data for name, (data, _) in others.items()}
    for name, data in everything.items():
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "a.tar").write_bytes(packed(everything))
    (tmp_path / "a.zip").write_bytes(zipped(everything))
    sources = [folder(tmp_path / "pets"), tar(tmp_path / "a.tar"), tar(tmp_path / "a.zip")]
    for source in sources:
        assert told(source) == {n: (n.split("/")[0], data) for n, data in members.items()}
        assert dict(source.passed_over.counts) == dict.fromkeys(
            (why for _, why in others.values()), 1
        )
        found = {
            os.path.basename(name): why for name, why in source.passed_over.files if "x" in name
        }
        assert found.items() >= {"x.db": "of no known format (.db)"}.items()
    assert caplog.text.count("9 files passed over") == 3 and "x.heic" in caplog.text


def test_a_class_without_images_in_a_tar_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "a.tar").write_bytes(packed(samples("x/cat/a.jpg; x/dog/b.jpg; x/ox/c.txt=moo")))
    source = tar(tmp_path / "a.tar")
    assert source.label_names == ("cat", "dog") and len(source.passed_over) == 1
    assert "has no image in its folders ox" in caplog.text


def test_ordinary_files_beside_images_need_no_word(tmp_path, caplog):
    caplog.set_level("INFO")
    tree(tmp_path, "cat/1.jpg", "dog/2.jpg", "dog/readme.txt", ".cache/x", "dog/.DS_Store")
    assert len(folder(tmp_path).passed_over) == 3 and not caplog.text
    tree(tmp_path, "loose.jpg")
    assert folder(tmp_path).passed_over.counts["in no class folder"] == 1
    assert "1 in no class folder" in caplog.text and "such as loose.jpg" in caplog.text
    (tmp_path / "dog/gone.jpg").symlink_to("nowhere")
    assert folder(tmp_path).passed_over.counts["a link to nothing"] == 1


def test_files_of_images_are_not_opened_to_be_listed(tmp_path, monkeypatch):
    tree(tmp_path, "cat/1.jpg", "dog/2.PNG")
    monkeypatch.setattr(
        "vit_jax.data.forms.files.sniff", lambda start: pytest.fail("it was opened")
    )
    assert len(folder(tmp_path)) == 2


def test_masks_among_images_are_said(tmp_path, caplog):
    tree(
        tmp_path,
        "benign/b (1).png",
        "benign/b (1)_mask.png",
        "benign/b (1)_mask_1.png",
        "x/no_mask_1.png",
    )
    assert len(folder(tmp_path)) == 4
    assert "2 files are called like masks of others, such as benign/b (1)_mask.png" in caplog.text


def test_folders_that_are_called_nearly_like_splits_are_classes(tmp_path):
    names = [
        "train/1.jpg",
        "train/ice/2.jpg",
        "cross-train/3.jpg",
        "test_tube/4.jpg",
        "imager/5.jpg",
    ]
    tree(tmp_path, *names)
    assert folder(tmp_path).label_names == ("cross-train", "imager", "test_tube", "train")


@pytest.mark.parametrize(
    "names, split, message",
    [
        (
            ["cat.0.jpg", "dog.0.jpg"],
            "all",
            "its 2 images, such as 'cat.0.jpg', .*table:FILE,root=",
        ),
        (
            ["train/images/1.jpg", "train/labels/1.txt"],
            "train",
            "'images' is called like one of all images.*table:FILE",
        ),
        (
            ["a/train/cat/1.jpg", "a/val/cat/1.jpg"],
            "all",
            "in the splits train, val: say split=a/tra",
        ),
    ],
)
def test_how_to_say_it_is_said_of_folders_without_classes(tmp_path, names, split, message):
    tree(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        folder(tmp_path, split)


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    "names, split, message, sure",
    [
        (
            ["train/images/cat/1.jpg", "train/images/dog/2.jpg"],
            "train",
            r"all images are in the folder 'images', .* split=train/images \(.*; if not, .*,label=",
            "images images",
        ),
        (
            ["train/a/b/cat/1.jpg", "train/a/b/dog/x/2.jpg"],
            "train[:100%]",
            r"in the folder 'a/b', .*\(cat, dog\).* split=train/a/b\[:100%\]",
            "a a",
        ),
        (
            ["training/cat/1.jpg", "Test_set/dog/2.jpg"],
            "all",
            r"Test_set, training are called like splits.*split=Test_set \(prepare: --part=Test_set",
            "training Test_set",
        ),
        (
            ["test/cat/1.jpg", "train/cat/2.jpg", "x/3.jpg"],
            "all",
            "test, train are",
            "test train x",
        ),
        (
            ["seg_train/seg_train/sea/1.jpg", "seg_test/seg_test/sea/2.jpg", "seg_pred/3.jpg"],
            "all",
            "seg_test, seg_train are called like splits",
            "seg_train seg_test seg_pred",
        ),
        (
            ["train/cat/1.jpg", "train/dog/2.jpg", "unlabeled/3.jpg"],
            "all",
            "the folders train are called like splits",
            "train train unlabeled",
        ),
        (["fold_0/a/1.jpg", "fold_1/a/2.jpg"], "all", "fold_0, fold_1 are", "fold_0 fold_1"),
        (["images/1.jpg", "masks/2.png"], "all", "'images' is called.*table:", "images masks"),
        (
            ["Images/cat/1.jpg", "Images/dog/2.jpg", "docs/3.jpg"],
            "all",
            "'Images' is called like one of all images.* split=Images if",
            "Images Images docs",
        ),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path, kind, names, split, message, sure):
    tree(tmp_path / "d", *names)
    (tmp_path / "d.tar").write_bytes(packed(names))
    where = f"{kind}:{tmp_path}/d{'.tar' if kind == 'tar' else ''}"
    if kind == "tar" and split != "all":  # whose shared folders are none of classes
        assert set(classes(open_source(where, split)).values()) == {"cat", "dog"}
        return
    with pytest.raises(UserError, match=message):
        open_source(where, split)
    found = told(open_source(f"{where},label=folder", split))
    assert sorted(label for label, _ in found.values()) == sorted(sure.split())


@pytest.mark.parametrize(
    "names, split, warned",
    [
        (["n01/images/1.jpg", "n02/images/2.jpg"], "all", None),  # tiny-imagenet
        (["cat/1.jpg", "cat/deep/2.jpg"], "all", None),
        (["train/1.jpg", "car/2.jpg"], "all", None),
        (
            ["a/x/1.jpg", "a/y/2.jpg", "b/x/3.jpg", "b/y/4.jpg"],
            "all",
            "classes are a, b; .*split=a",
        ),
        (["Cat/1.jpg", "cat/2.jpg"], "all", "'Cat' and 'cat' are two classes"),
    ],
)
def test_folders_that_may_be_no_classes_are_said(tmp_path, names, split, warned, caplog):
    tree(tmp_path / "d", *names)
    (tmp_path / "d.tar").write_bytes(packed(names))
    expected = {name: name.split("/")[0] for name in names}
    assert classes(folder(tmp_path / "d", split)) == expected
    assert bool(re.search(warned or ".", caplog.text)) == bool(warned), caplog.text
    assert bool(caplog.text) == bool(warned)


def test_splits_are_listed(tmp_path):
    names = ["train/cat/1.jpg", "val/cat/2.jpg", "docs/x.txt", ".test/x.jpg"]
    tree(tmp_path / "d", *names)
    (tmp_path / "d.tar").write_bytes(packed([f"d/{name}" for name in names]))
    assert folder_splits(str(tmp_path / "d")) == ("train", "val", "all")
    assert tar_splits(str(tmp_path / "d.tar")) == ("train", "val", "all")


def test_a_split_in_two_places_is_refused(tmp_path):
    names = ["a/train/cat/1.jpg", "b/train/dog/2.jpg"]
    (tmp_path / "a.tar").write_bytes(packed(names))
    with pytest.raises(
        UserError, match=r"several folders 'train': a/train, b/train: .*split=a/train"
    ):
        tar(tmp_path / "a.tar", "train")
    assert classes(tar(tmp_path / "a.tar", "b/train")) == {names[1]: "dog"}


def test_classes_whose_names_no_text_can_hold_are_not_merged(tmp_path):
    (tmp_path / "a.tar").write_bytes(packed(["\udcff/1.jpg", "\udcfe/2.jpg"]))
    with pytest.raises(UserError, match="two classes would both be"):
        tar(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "option, message",
    [
        ("lable=cls", r"has no option 'lable'; did you mean 'label'\?"),
        ("label=clss", r"label 'clss'; did you mean 'cls'\?"),
        ("label=tar", "1.jpg has no tar inside the archive"),
    ],
)
def test_an_option_that_does_not_fit_is_named(tmp_path, option, message):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    with pytest.raises(UserError, match=message):
        tar(f"{tmp_path}/a.tar,{option}")


def test_what_is_in_folders_of_a_tar_in_a_tar(tmp_path):
    inner = {f"{w}.tar": packed([f"{w}/images/{w}.jpg"]) for w in ("cat", "dog")}
    (tmp_path / "a.tar").write_bytes(packed({f"x/{name}": data for name, data in inner.items()}))
    assert set(classes(tar(tmp_path / "a.tar")).values()) == {"cat", "dog"}
    parts = {f"part {w}.tar": packed([f"cat/{w}.jpg", f"dog/{w}.jpg"]) for w in "xy"}
    (tmp_path / "a.tar").write_bytes(packed(parts))
    with pytest.raises(UserError, match=r"by its tar and 'cat' by its folder: .*tar\|folder"):
        tar(tmp_path / "a.tar")
    found = classes(tar(f"{tmp_path}/a.tar,label=folder"))
    assert {name.split("/")[1]: label for name, label in found.items()} == {
        "cat": "cat",
        "dog": "dog",
    }
    tars = {
        f"{split}/{c}.tar": packed([f"{split}.jpg"]) for split in ("train", "val") for c in "ab"
    }
    (tmp_path / "a.tar").write_bytes(packed(tars))
    assert classes(tar(tmp_path / "a.tar", "val")) == {"a/val.jpg": "a", "b/val.jpg": "b"}


def test_several_class_tars_by_a_pattern(tmp_path):
    expected = {}
    for wnid in ("n02119789", "n01440764"):
        names = [f"{wnid}_{i}.JPEG" for i in range(2)]
        (tmp_path / f"{wnid}.tar").write_bytes(packed(names))
        expected |= dict.fromkeys(names, wnid)
    assert classes(tar(tmp_path / "n*.tar")) == expected
    with pytest.raises(UserError, match="is in no folder of a class"):
        tar(tmp_path / "n02119789.tar")


def test_nothing_outside_a_hostile_tar_is_touched(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    target = str(tmp_path / "secret.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, data in [
            ("a/1.jpg", tarfile.REGTYPE, jpeg(1)),
            ("a/link.jpg", tarfile.SYMTYPE, b""),
            ("a/hard.jpg", tarfile.LNKTYPE, b""),
            ("a/fifo.jpg", tarfile.FIFOTYPE, b""),
            ("a/null.jpg", tarfile.CHRTYPE, b""),
            ("a/disk.jpg", tarfile.BLKTYPE, b""),
            ("a/folder.jpg", tarfile.DIRTYPE, b""),
            ("../b/secret.jpg", tarfile.REGTYPE, jpeg(2)),
            (f"..{target}", tarfile.REGTYPE, jpeg(3)),
            ("a/\x1b[31m\udcff.jpg", tarfile.REGTYPE, jpeg(4)),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), target
            archive.addfile(member, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    source = tar(tmp_path / "a.tar")
    assert [source[i]["image"] for i in range(len(source))] == [jpeg(i) for i in (1, 2, 3, 4)]
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "secret.jpg").read_bytes() == b"secret"


WHOLE = packed(["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"])
SECOND = 2 * 512 + (len(jpeg(0)) // 512) * 512  # where its header starts


@pytest.mark.parametrize(
    "data, message",
    [
        (None, r"there is no file '.*a\.tar'"),
        (b"", "is no whole tar archive: empty file"),
        (b"text" * 1000, "is no whole tar archive"),
        (packed([]), "has no image in split 'all'"),
        (packed({"cat/x.txt": b"text"}), "has no image in split 'all'"),
        (WHOLE[: SECOND + 512 + 100], "is no whole tar archive: unexpected end of data"),
        (packed({"n1.tar": WHOLE[: SECOND + 612]}), "is no whole tar archive"),
        (packed({"n1.tar": b"text" * 1000}), "is no whole tar archive"),
        (gzip.compress(WHOLE)[:-200], "is no whole tar archive"),
        (WHOLE[: SECOND + 100], "no whole tar"),
        (WHOLE[:SECOND] + b"?" + WHOLE[SECOND + 1 :], "no whole tar"),
    ],
)
def test_what_is_wrong_with_a_tar_is_said(tmp_path, data, message):
    if data is not None:
        (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_tar(str(tmp_path / "a.tar"))


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "s-0.tar").write_bytes(WHOLE)
    with pytest.raises(UserError, match=r"there is no file '.*s-1\.tar'"):
        tar(tmp_path / "s-{0..1}.tar")
    with pytest.raises(UserError, match=r"there is no file '.*t-\*\.tar'"):
        tar(tmp_path / "t-*.tar")


@pytest.mark.parametrize("change", ["cut", "gone"])
def test_a_tar_that_changed_after_it_was_opened_is_named(tmp_path, change):
    path = tmp_path / "a.tar"
    path.write_bytes(WHOLE)
    source = tar(path)
    os.truncate(path, SECOND + 600) if change == "cut" else path.unlink()
    with pytest.raises(
        UserError, match=r"a\.tar (ends before byte|cannot be read: .*No such file)"
    ):
        source[1]


def test_members_cost_no_object_each(tmp_path):
    n = 1000
    (tmp_path / "a.tar").write_bytes(packed([f"cat/{i:05d}.jpg" for i in range(n)]))
    tar(tmp_path / "a.tar")
    tracemalloc.start()
    try:
        source = tar(tmp_path / "a.tar")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == n
    assert kept < 80 * n and peak < 700 * n, (kept / n, peak / n)


@pytest.mark.parametrize("count, opener", [(300, open), (3, gzip.open)])
def test_many_threads_read_the_same_bytes(tmp_path, count, opener):
    """And more files than are kept open."""
    data = np.random.default_rng(0).bytes(5000)
    paths = [str(tmp_path / f"{i}") for i in range(count)]
    for i, path in enumerate(paths):
        with opener(path, "wb") as file:
            file.write(data[i:])
    files = OpenFiles(paths)
    random = np.random.default_rng(1)
    jobs = [tuple(random.integers(0, high) for high in (count, 3000, 1500)) for _ in range(3000)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda job: files.read(*map(int, job)), jobs))
    assert found == [data[i + at : i + at + size] for i, at, size in jobs]
    with pytest.raises(UserError, match="ends before byte 6000: it changed, or is cut off"):
        files.read(0, 4000, 2000)


def test_a_link_has_the_class_that_is_beside_it(tmp_path):
    """Links are met last, and sorted to the place of what they lead to."""
    members = {
        "1.jpg": jpeg(1),
        "1.cls": b"cat",
        "3.jpg": jpeg(3),
        "3.cls": b"dog",
        "2.cls": b"bird",
    }
    (tmp_path / "a.tar").write_bytes(linked(members, {"2.jpg": "1.jpg"}))
    assert classes(open_tar(str(tmp_path / "a.tar"))) == {
        "1.jpg": "cat",
        "2.jpg": "bird",
        "3.jpg": "dog",
    }

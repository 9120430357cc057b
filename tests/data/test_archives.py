"""Folders and tar archives as sources: files of the real formats, laid out as the real sets are."""

import bz2
import concurrent.futures
import gzip
import io
import itertools
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
from made import jpeg, packed, refused, tree, written, zipped

from vit_jax.data.forms.archives import open_tar, tar_splits
from vit_jax.data.forms.files import folder_splits
from vit_jax.data.forms.open_files import OpenFiles
from vit_jax.data.images import BadImage
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


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


def by_folder(members):
    """What `told` finds of {name: bytes} whose first folders are the classes."""
    return {name: (name.split("/")[0], data) for name, data in members.items()}


def folder(root, split="all"):
    return open_source(f"folder:{root}", split)


def tar(path, split="all"):
    return open_source(f"tar:{path}", split)


@pytest.fixture
def tar_of(tmp_path):
    """Opens a tar of these files, or bytes, with options of the source."""

    def make(members, options="", split="all"):
        data = members if isinstance(members, bytes) else packed(members)
        (tmp_path / "a.tar").write_bytes(data)
        return tar(f"{tmp_path}/a.tar{options}", split)

    return make


# ---------------------------------------------------------------------------------------- folders


def test_a_folder_of_class_folders(tmp_path):
    images = ["Dog/a.jpg", "cat/A B.JPEG", "cat/deep/er/x.PnG", "cat/jpg"]  # one by its content
    images += ["épagneul/z.webp", "épagneul/ñ.jpg"]
    others = ["cat/.hidden.jpg", "cat/.git/x.jpg", "cat/notes.txt", ".cache/x.jpg"]
    tree(tmp_path / "train", [*others, *images, "loose.jpg"])
    tree(tmp_path / "val", ["cat/only.jpg"])
    source = folder(tmp_path, "train")
    assert source.label_names == ("Dog", "cat", "épagneul") and source.labels.dtype == np.int32
    expected = {name: (tmp_path / "train" / name).read_bytes() for name in images}
    assert list(told(source).items()) == list(by_folder(expected).items())  # in this order
    assert classes(folder(tmp_path / "val")) == {"cat/only.jpg": "cat"}
    assert list(classes(folder(tmp_path / "train" / "..", "val"))) == ["cat/only.jpg"]


def test_a_name_is_the_same_class_however_its_accents_are_stored(tmp_path):
    forms = [unicodedata.normalize(form, "Café") for form in ("NFC", "NFD")]
    assert forms[0] != forms[1]
    for number, form in enumerate(forms):
        names = [f"{form}/{number}.jpg", "dog/2.jpg"]
        written(tmp_path / "a.tar", packed(names))
        for source in (folder(tree(tmp_path / str(number), names)), tar(tmp_path / "a.tar")):
            assert source.label_names == ("Café", "dog")
            assert list(classes(source).values()) == ["Café", "dog"]
    try:  # both in one folder lose no image
        source = folder(tree(tmp_path / "both", [f"{form}/{len(form)}.jpg" for form in forms]))
    except UserError:
        return
    assert len(source) == 2


def test_links_are_followed_and_loops_end(tmp_path):
    for link, target, more in [
        ("cat/l.jpg", "../dog/2.jpg", ["cat/l.jpg"]),
        ("cat/l.jpg", "nowhere.jpg", []),
        ("cat/more", "../../else", ["cat/more/9.jpg"]),
        ("pig", "../else", ["pig/9.jpg"]),
        ("cat/sub/loop", "../sub", []),
        ("cat/loop", ".", []),
        ("cat/up", "..", []),
        ("cat/self.jpg", "self.jpg", []),
        ("self", "self", []),
    ]:
        tree(tmp_path / "else", ["9.jpg"])
        names = ["cat/1.jpg", "cat/sub/3.jpg", "dog/2.jpg"]
        root = tree(tmp_path / "pets", names)
        (root / link).symlink_to(target)
        expected = {name: name.split("/")[0] for name in sorted([*names, *more])}
        assert classes(folder(root)) == expected, (link, target)
        (root / link).unlink()


def test_parts_share_nothing_and_keep_their_files_when_others_are_added(tmp_path):
    def part(of):
        return set(classes(folder(tmp_path, f"all{of}")))

    tree(tmp_path, [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(80)])
    whole, low, high = map(part, ("", "[:80%]", "[80%:]"))
    assert low | high == whole and not low & high
    assert abs(len(low) / len(whole) - 0.8) < 0.127  # four standard deviations
    assert part("[40%:80%]") == low - part("[:40%]")
    written(tmp_path / "all.tar", packed(sorted(whole)))
    assert set(classes(tar(tmp_path / "all.tar", "all[:80%]"))) == low
    tree(tmp_path, [f"{c}/more{i}.jpg" for c in ("cat", "ape") for i in range(80)])
    assert low < part("[:80%]") and high < part("[80%:]")


def test_a_pickled_source_is_small_and_the_same(tmp_path):
    names = [f"{c}/{i:04d}.jpg" for c in ("cat", "dog") for i in range(200)]
    written(tmp_path / "all.tar", packed(names))
    for source in (folder(tree(tmp_path / "pets", names)), tar(tmp_path / "all.tar")):
        first = source[0]  # a file is open now
        pickled = pickle.dumps(source)
        assert len(pickled) < 45 * len(names) + 1000  # 12 a name, 4 to 28 its numbers
        copy = pickle.loads(pickled)
        assert told(copy) == told(source) and copy[0] == first
        assert copy.fingerprint == source.fingerprint and copy.label_names == source.label_names


def test_the_fingerprint_changes_with_the_files_and_only_with_them(tmp_path):
    tree(tmp_path, ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"])
    (tmp_path / "empty").mkdir()
    found = []
    for change in (
        lambda: (tmp_path / "empty").rmdir(),
        lambda: written(tmp_path / "dog/4.jpg", jpeg(0)),
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
    assert len(set(found)) == len(found)
    assert folder(tmp_path, "all[:50%]").fingerprint != found[-1]


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    bad = "train/cat/1.jpg train/dog/x.txt train/pig/.x.jpg"
    cases = [
        ("", "train", "folder:.*0: there is no such folder"),
        ("train/cat/1.jpg", "trian", "has no sub-folder 'trian'; did you mean 'train'?"),
        ("cat/1.jpg", "train", "no sub-folder 'train'; known: cat. If .* use split=all"),
        (bad, "train", r"'dog' \(1 of no known format \(.txt\)\), 'pig' \(1 hidden\)$"),
        ("train/dog/x.txt", "train", r"1 class folder\(s\) without any image: 'dog' \(1 of no kn"),
        ("train/1.jpg", "train", "train has no sub-folders, one for each class"),
        ("cat/1.jpg", "all[:1%]", r"has no image in split 'all\[:1%\]'"),
        # Without classes, or of splits.
        ("cat.0.jpg dog.0.jpg", "all", "its 2 images, such as 'cat.0.jpg', .*table:FILE,root="),
        ("train/images/1.jpg train/labels/1.txt", "train", "'images' is called like one of.*table"),
        ("a/train/cat/1.jpg a/val/cat/1.jpg", "all", "in the splits train, val: say split=a/tra"),
    ]
    for split in ("", "all[", "all[90%]", "all[:110%]", "all[:9]", "[:9%]"):
        cases += [("cat/1.jpg", split, re.escape(f"split {split!r}: expected NAME, NAME[:90%]"))]
    cases += [
        ("cat/1.jpg", split, "expected NAME") for split in ("all[9%:9%]", "all[:0%]", "a[:]b")
    ]
    count = itertools.count()
    refused(lambda names, s: folder(tree(tmp_path / f"{next(count)}", names.split()), s), cases)


def test_a_file_that_vanished_is_named(tmp_path):
    source = folder(tree(tmp_path, ["cat/1.jpg", "dog/2.jpg"]))
    (tmp_path / "cat/1.jpg").unlink()
    with pytest.raises(UserError, match=r"cat/1\.jpg could be listed but not read .No such file"):
        source[0]
    assert source[1]["image"] == jpeg(1)


# ------------------------------------------------------------------------------------------- tars


def test_a_tar_of_class_folders(tar_of):
    long, extra = "long" * 40, {"README.txt": b"text", ".DS_Store": b"", "cat/._a.jpg": b"Mac"}
    for names, expected in [
        (["dog/b.jpg", "cat/a.JPG", "dog/deep/c.png"], "dog cat dog"),
        (["set 1/train/é/a b.jpg", "set 1/train/dog/b.jpg"], "é dog"),
        (["pets/cat/1.jpg", "pets/cat/2.jpg"], "cat cat"),
        (["/etc/cat/1.jpg", "/etc/dog/2.jpg"], "cat dog"),
        (["../../cat/1.jpg", "../../dog/2.jpg"], "cat dog"),
        ([f"{long}/cat/{'é' * 90}.jpg", f"{long}/dog/2.jpg"], "cat dog"),
        (["./cat/1.jpg", "./dog/2.jpg"], "cat dog"),
        (["./set/a/1.jpg", "./set/b/2.jpg"], "a b"),
        (["/x/a/1.jpg", "x/b/2.jpg"], "a b"),
        (["01/a.jpg", "02/b.jpg"], "01 02"),
        (["1/a.jpg", "20/b.jpg"], "1 20"),
    ]:
        images, expected = {n: jpeg(i) for i, n in enumerate(names)}, expected.split()
        source = tar_of(extra | images)
        assert source.label_names == tuple(sorted(set(expected)))
        assert told(source) == dict(
            zip(names, zip(expected, images.values(), strict=True), strict=True)
        )


def test_a_split_of_a_tar_is_a_folder_in_it(tar_of):
    names = ["pets/train/cat/1.jpg", "pets/train/dog/2.jpg", "pets/val/dog/3.jpg", "trained/x.jpg"]
    assert classes(tar_of(names, split="train")) == {names[0]: "cat", names[1]: "dog"}
    assert classes(tar_of(names, split="val")) == {names[2]: "dog"}
    with pytest.raises(UserError, match="has no image in split 'test'"):
        tar_of(names, split="test")
    names = ["a/train/cat/1.jpg", "b/train/dog/2.jpg"]
    with pytest.raises(UserError, match=r"several folders 'train': a/train, b/t.*split=a/train"):
        tar_of(names, split="train")
    assert classes(tar_of(names, split="b/train")) == {names[1]: "dog"}


@pytest.mark.parametrize("prefix", ["", "winter21_whole/"])
def test_a_tar_of_a_tar_for_each_class(tmp_path, prefix):
    """ImageNet-1k's training set, and ImageNet-21k."""
    images = {
        wnid: {f"{wnid}_{i}.JPEG": jpeg(10 * c + i) for i in range(3)}
        for c, wnid in enumerate(["n01440764", "n02119789", "n01443537"])
    }
    outer = packed({f"{prefix}{wnid}.tar": packed(each) for wnid, each in images.items()})
    written(tmp_path / "a.tar", outer)
    source = tar(tmp_path / "a.tar")
    assert source.label_names == tuple(sorted(images))
    expected = by_folder({f"{w}/{n}": data for w in images for n, data in images[w].items()})
    assert told(source) == expected
    again = open_tar(written(tmp_path / "a.tar.gz", gzip.compress(outer)))
    assert told(again) == expected and again.fingerprint == source.fingerprint
    assert again[0] == {**source[0], "name": again[0]["name"]}  # going back is possible
    message = r"a\.tar\.gz is compressed, .* `vit-jax prepare`"
    with pytest.raises(UserError, match=message):
        tar(tmp_path / "a.tar.gz")


WNIDS = {1: "n02119789", 2: "n02100735", 3: "n02110185", 4: "n01440764"}
TRUTH = [3, 1, 4, 4, 2]


def val(i):
    return f"ILSVRC2012_val_{i + 1:08d}.JPEG"


def kit(truth=TRUTH, name="synsets", mode="w:gz"):
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
    members[f"{top}/data/ILSVRC2012_validation_ground_truth.txt"] = text
    return packed(members, mode)


@pytest.fixture
def validation(tmp_path):
    """ImageNet-1k's validation tar: flat, and not in the order of the names."""
    path = tmp_path / "ILSVRC2012_img_val.tar"
    written(path, packed([val(i) for i in (3, 0, 4, 1, 2)]))
    return path


def test_a_flat_tar_takes_its_classes_from_a_file(validation):
    wnids = [WNIDS[number] for number in TRUTH]
    for name, content in {
        "ILSVRC2012_devkit_t12.tar.gz": kit(),
        "in order.txt": "".join(f"{wnid}\n" for wnid in wnids),
        "pairs.csv": "".join(f"{val(i)},{wnids[i]}\n" for i in (4, 2, 0, 1, 3)),
        "pairs.txt": "".join(f"val/{val(i)} {wnids[i]}\n\n" for i in range(5)),
    }.items():
        source = open_tar(str(validation), labels=written(validation.parent / name, content))
        assert source.label_names == ("n01440764", "n02100735", "n02110185", "n02119789")
        assert classes(source) == {val(i): wnids[i] for i in (3, 0, 4, 1, 2)}
    with pytest.raises(UserError, match="is in no folder of a class: say with --labels"):
        tar(validation)


def test_labels_that_do_not_fit_are_refused(validation):
    cases = [
        ("ILSVRC2012_validation_ground_truth.txt", b"3\n1\n4\n4\n2\n", "give ILSVRC2012_devkit"),
        ("head.txt", b"label\na\nb\na\nb\n", "first line, 'label', a header.*has 4 labels of 5 im"),
        ("few.txt", b"a\nb\n", "few.txt has 2 labels, but there are 5 images"),
        ("few.csv", f"{val(0)},a\n", "says nothing of 4 images, such as"),
        ("bytes.txt", b"\xff\xfe", "is no file of labels"),
        ("kit.tar.gz", b"text", "kit.tar.gz is no development kit of ILSVRC2012"),
        ("kit.tar.gz", packed(["meta.mat"], "w:gz"), "is no development kit"),
        ("kit.tar.gz", kit()[:200], "is no development kit"),
        ("kit.tar.gz", kit(TRUTH[:4]), "has 4 labels, but there are 5 images"),
        ("kit.tar", kit(name="x", mode="w"), "is no development kit"),
        ("kit.tar", kit([9] * 5, mode="w"), "is no development kit"),
    ]
    here = validation.parent
    refused(lambda name, it: open_tar(str(validation), labels=written(here / name, it)), cases)
    with pytest.raises(UserError, match=r"there is no file of labels '.*no\.txt'"):
        open_tar(str(validation), labels=str(here / "no.txt"))


def test_labels_are_given_to_the_right_image(tmp_path):
    for names, labels in [
        (["my a.jpg", "my b.jpg"], "my a.jpg,cat\nmy b.jpg,dog"),
        (["a/1.jpg", "b/1.jpg"], "cat\ndog"),
    ]:
        archive = written(tmp_path / "a.tar", packed(names))
        try:
            source = open_tar(archive, labels=written(tmp_path / "labels.txt", labels))
        except UserError:
            continue
        assert list(classes(source).values()) == ["cat", "dog"]


def test_shards_of_webdataset(tmp_path):
    for beside, pattern in [("cls", "{000..002}.tar"), ("json", "*.tar"), ("JSON", "00?.tar")]:
        expected = {}
        for shard in range(3):
            members = {}
            for i in range(4):
                stem = f"v1.0/{shard}{i}"
                label = f'{{"label": {3 * i}, "url": "x"}}' if beside != "cls" else f"{3 * i}"
                members |= {f"{stem}.{beside}": f"{label}\n".encode(), f"{stem}.txt": b"a cat"}
                members |= {f"{stem}.jpg": jpeg(10 * shard + i)}
                expected[f"{stem}.jpg"] = str(3 * i), jpeg(10 * shard + i)
            written(tmp_path / f"{beside}-{shard:03d}.tar", packed(members))
        source = tar(tmp_path / f"{beside}-{pattern}")
        assert told(source) == expected
        assert source.label_names == tuple(map(str, range(10)))  # a number is its class's place


def samples(text):
    """A tar's members from "a.jpg; a.cls=0; b.jpg": names, and what is in the files of labels."""
    members = {}
    for number, word in enumerate(text.split(";")):
        name, _, content = word.strip().partition("=")
        beside = re.search("cls$|json$|txt$", name.lower())
        members[name] = content.encode() if beside else jpeg(number)
    return members


TWICE = "a.jpg; a.txt=cat; b.jpg; b.txt=dog; c.jpg; c.txt=cat; d.jpg; d.txt=dog"


def test_one_thing_says_the_classes_of_all(tar_of):
    for text, option, expected in [
        ("a.jpg; a.cls=tabby; b.jpg; b.cls=ox\n", "", "tabby ox"),
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
    ]:
        members = samples(text)
        source = tar_of(members, option)
        images = [name for name in members if name.lower().endswith(".jpg")]
        expected = expected.split(";" if ";" in expected else " ")
        assert told(source) == {n: (c, members[n]) for n, c in zip(images, expected, strict=True)}
        if expected[0].isdigit():  # a number is its class's place
            assert source.label_names == tuple(map(str, range(1 + max(map(int, expected)))))


def test_a_class_that_is_not_certain_is_refused(tar_of):
    cls_or_json = 'a.jpg; a.cls=0; a.json={"label": "cat"}; b.jpg; b.cls=1'
    hot = 'a.jpg; a.json={"label": [0, 1]}; b.jpg; b.json={"label": [1, 0]}'
    cases = [
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
        (cls_or_json, r"b.jpg has no label in a .json beside it, as a.jpg .* ,label=cls\|json"),
        (
            f'{cls_or_json}; b.json={{"label": "ox"}}',
            r"a.jpg is of class '0' by its .cls and 'cat'",
        ),
        ("x/a.jpg; x/a.cls=0; y/b.jpg; y/b.cls=1", "x/a.jpg is of .* 'x' by its folder"),
        ("img.v2.jpg; img.cls=0", "img.v2.jpg: its .cls may be img.cls, or not: the names agree"),
        ("a.jpg; a.seg.png; a.cls=0", "a.seg.png: its .cls may be a.cls, or not"),
        ("a.jpg; a.png; a.cls=0", "a.png: its .cls is also that of a.jpg"),
        ("x 2.0.jpg; x 2.0.cls=0; x 2.1.jpg", "x 2.1.jpg: its .cls may be x 2.0.cls, or not"),
        ("a.jpg; b.jpg; cat/c.jpg", "a.jpg has no folder of a class, as cat/c.jpg has"),
        ("a.jpg; a.txt=a red cat; b.jpg; b.txt=a dog; c.jpg; c.txt=a dog", "not taken for classes"),
        ("a.jpg; a.txt=x; b.jpg; c.jpg; d.jpg", "b.jpg has no .txt beside it, as a.jpg has"),
        ('a.jpg; a.json={"url": 1, "class": 2}', r"no folder .*has url, class: ,label=json.KEY"),
        ("a.jpg; a.json=[1]; b.jpg; b.json={", "a.jpg is in no folder of a class"),
        (hot, "one-hot"),
    ]
    values = ["null", "true", "-1", "1.5", '""', "NaN", "1e+300", '{"id": 3}', "[1, null]"]
    for value in (*values, "[1, 1]", "[0.0, 1.0]", "[[1]]"):
        text = f'a.jpg; a.json={{"label": {value}}}'
        cases.append((text, f"a.jpg: its .json says {re.escape(value)}"))
    refused(lambda text: tar_of(samples(text)), cases)
    archive = {"cat/1.jpg": jpeg(0), "dog/2.jpg": jpeg(1)}
    cases = [
        (",lable=cls", r"has no option 'lable'; did you mean 'label'\?"),
        (",label=clss", r"label 'clss'; did you mean 'cls'\?"),
        (",label=tar", "1.jpg has no tar inside the archive"),
    ]
    refused(lambda option: tar_of(archive, option), cases)
    with pytest.raises(UserError, match="two classes would both be"):  # names that no text can hold
        tar_of(["\udcff/1.jpg", "\udcfe/2.jpg"])


def test_a_list_is_several_labels(tar_of):
    lists = {"a": "[4, 2]", "b": "[]", "c": "1"}
    text = "; ".join(
        f'{name}.jpg; {name}.json={{"label": {value}}}' for name, value in lists.items()
    )
    source = tar_of(samples(text))
    assert source.multi_label and source.label_names == ("0", "1", "2", "3", "4")
    assert [source[i]["label"] for i in range(3)] == [(4, 2), (), (1,)]
    assert tar_of(samples('a.jpg; a.json={"label": ["ox", "cow"]}'))[0]["label"] == (1, 0)


def test_a_file_twice_is_refused_in_one_archive_alone(tmp_path):
    for shard in "xy":
        written(tmp_path / f"{shard}.tar", packed(samples(f"a.jpg; a.cls={shard}; b.jpg; b.cls=z")))
    source = tar(tmp_path / "?.tar")
    assert [source.label_names[label] for label in source.labels] == ["x", "z", "y", "z"]

    def twice(name):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for each in ("a.jpg", "a.cls", name):
                member = tarfile.TarInfo(each)
                member.size = 4
                archive.addfile(member, io.BytesIO(b"0123"))
        tar(tmp_path / "x.tar")

    refused(twice, [("a.jpg", r"x\.tar has a.jpg twice"), ("a.cls", "is there twice: a.cls")])


def test_shards_that_are_only_numbered_are_no_classes(tmp_path):
    for stems in ("shard-0 shard-1", "train-0 val-0", "1 2", "a-0 a-1 b", "test x"):
        stems, here = stems.split(), tmp_path / stems
        tars = {f"{stem}.tar": packed({f"{n}.jpg": jpeg(n)}) for n, stem in enumerate(stems)}
        tree(here, tars | {"all.tgz": packed(tars)})
        for name, option in (("*.tar", "shard"), ("all.tgz", "tar")):
            message = rf"no class but the name of its archive, .*,label={option}"
            with pytest.raises(UserError, match=message):
                tar(here / name)
        found = classes(tar(f"{here}/*.tar,label=shard"))
        assert found == {f"{number}.jpg": stem for number, stem in enumerate(stems)}


def test_shards_whose_names_are_classes_are_said(tmp_path, caplog):
    caplog.set_level("INFO", "vit_jax")
    tree(tmp_path, {f"{stem}.tar": packed([f"{stem}.jpg"]) for stem in ("cat", "big dog")})
    assert set(classes(tar(tmp_path / "*.tar")).values()) == {"cat", "big dog"}
    assert "each archive is a class: big dog, cat" in caplog.text
    with pytest.raises(UserError, match="is in no folder of a class"):  # of one alone
        tar(tmp_path / "cat.tar")


# --------------------------------------------------------------------- links, splits, zips, others


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_in_a_tar_are_followed_in_it(tmp_path, mode, caplog):
    caplog.set_level("INFO", "vit_jax")
    members = {"cat/1.jpg": jpeg(1), "dog/2.jpg": jpeg(2), "dog/deep/3.png": jpeg(3)}
    two = {"bird/2.jpg": "bird/1.jpg", "bird/1.jpg": "@../cat/1.jpg"}
    for links, expected in [
        ({"bird/1.jpg": "cat/1.jpg"}, {"bird/1.jpg": 1}),
        ({"bird/1.jpg": "./cat/1.jpg"}, {"bird/1.jpg": 1}),
        ({"bird/1.jpg": "@../cat/1.jpg"}, {"bird/1.jpg": 1}),
        (two, {"bird/1.jpg": 1, "bird/2.jpg": 1}),
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
    ]:
        caplog.clear()
        data = packed(members | {".store/9": jpeg(9)}, mode, links)
        source = open_tar(written(tmp_path / "a.tar", data))
        more = expected if isinstance(expected, dict) else {}
        images = members | {name: jpeg(number) for name, number in more.items()}
        assert told(source) == by_folder(images), links
        passed = str(source.passed_over)
        if more:
            assert passed == "1 files passed over: 1 of a folder .store" and not caplog.text
        else:
            assert expected in passed and expected in caplog.text
            assert ("no image in its folders bird" in caplog.text) == ("bird" in str(links))


@pytest.mark.parametrize("form", ["gnu", "posix", "ustar", "v7"])
def test_tars_of_all_forms(tmp_path, form):
    """GNU tar's own: long names, links, and holes, as its forms have them."""
    long = "cat/" + ("l" * 70 + "/") * (1 if form != "v7" else 0) + "x" * 60 + ".jpg"
    tree(tmp_path, ["cat/1.jpg", "dog/2.jpg", long])
    os.link(tmp_path / "cat/1.jpg", tmp_path / "dog/1.jpg")
    sparse = form in ("gnu", "posix")
    if sparse:
        with (tmp_path / "dog/holes.bmp").open("wb") as file:
            file.write(jpeg(7))
            file.seek(2**18)
            file.write(b"end")
            file.truncate(2**19)
    command = ["tar", f"--format={form}", *["-S"] * sparse, "--sort=name", "-cf", "a.tar"]
    subprocess.run([*command, "cat", "dog"], cwd=tmp_path, check=True)
    names = ["cat/1.jpg", long, "dog/1.jpg", "dog/2.jpg", *["dog/holes.bmp"] * sparse]
    expected = by_folder({name: (tmp_path / name).read_bytes() for name in names})
    assert told(tar(tmp_path / "a.tar")) == expected
    assert (tmp_path / "a.tar").stat().st_size < 2**17


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_as_a_tar_is(tmp_path, method):
    names = ["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg"]
    members = {f"set/{name}": jpeg(n) for n, name in enumerate(names)}
    others = {"__MACOSX/set/train/cat/._1.jpg": b"Mac", "set/train/cat/": b""}
    many = zipped(
        {"a/1.jpg": jpeg(1), "a/1.cls": b"1", "b/2.jpg": jpeg(2), "b/2.cls": b"0"}, method
    )
    files = {"a.zip": zipped(others | members, method), "a.tar": packed(members), "b.zip": many}
    tree(tmp_path, files)
    for kind in ("tar", "zip"):
        for split in ("train", "val", "set/train", "train[:90%]"):
            source = open_source(f"{kind}:{tmp_path}/a.zip", split)
            expected = tar(tmp_path / "a.tar", split)
            assert told(pickle.loads(pickle.dumps(source))) == told(source) == told(expected)
            assert source.label_names == expected.label_names
            assert source.fingerprint == expected.fingerprint
        with pytest.raises(UserError, match=r"train, val are called like splits.*split=train"):
            open_source(f"{kind}:{tmp_path}/a.zip", "all")
    assert tar_splits(str(tmp_path / "a.zip")) == ("train", "val", "all")
    assert classes(tar(f"{tmp_path}/b.zip,label=cls")) == {"a/1.jpg": "1", "b/2.jpg": "0"}


def test_names_in_a_zip_are_only_names(tar_of):
    found = classes(
        tar_of(zipped(["cat\\1.jpg", "/etc/dog/2.jpg", "../../ox/3.jpg", "Café/4.jpg"]))
    )
    assert list(found.values()) == ["cat", "etc", "ox", "Café"]
    unmarked = zipped(["Cafe1/1.jpg", "b/1.jpg"]).replace(b"Cafe1", "Café".encode())
    assert list(classes(tar_of(unmarked)).values()) == ["Café", "b"]
    link = zipfile.ZipInfo("dog/1.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    members = {"cat/1.jpg": jpeg(1), "dog/1.jpg": jpeg(1)}
    linked = zipped({"cat/1.jpg": jpeg(1), link: b"../cat/1.jpg"})
    assert told(tar_of(linked)) == by_folder(members)


def test_a_damaged_image_in_a_zip_is_a_bad_image(tar_of):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = bytearray(zipped({"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)}, method))
        data[60] ^= 255
        source = tar_of(bytes(data))
        assert source[1]["image"] == jpeg(2)
        with pytest.raises(BadImage, match=r"1\.jpg (is damaged|cannot be inflated)"):
            source[0]


ZIP = zipped(["cat/1.jpg"])
WHOLE = packed(["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"])
SECOND = 2 * 512 + (len(jpeg(0)) // 512) * 512  # where its header starts


def test_what_is_wrong_with_an_archive_is_said(tmp_path):
    encrypted = bytearray(ZIP)
    encrypted[6] |= 1
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    whole = "is no whole tar archive"
    cases = [
        (b"", f"{whole}: empty file"),
        (b"text" * 1000, whole),
        (packed([]), "has no image in split 'all'"),
        (packed({"cat/x.txt": b"text"}), "has no image in split 'all'"),
        (WHOLE[: SECOND + 512 + 100], f"{whole}: unexpected end of data"),
        (packed({"n1.tar": WHOLE[: SECOND + 612]}), whole),
        (packed({"n1.tar": b"text" * 1000}), whole),
        (gzip.compress(WHOLE)[:-200], whole),
        (WHOLE[: SECOND + 100], whole),
        (WHOLE[:SECOND] + b"?" + WHOLE[SECOND + 1 :], whole),
        (b"\x28\xb5\x2f\xfd" + bytes(99), whole),
        (b"7z\xbc\xaf\x27\x1c" + bytes(99), "is a 7z archive; tar, .* zip are read"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(99), "is a rar archive; tar"),
        (jpeg(0), r"is an image \(JPEG\)"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "is a web page"),
        (ZIP[:-30], "is no whole zip archive"),
        (ZIP[:20] + ZIP[200:], "is no whole zip archive"),
        (zipped(["a/1.jpg"], zipfile.ZIP_LZMA), "is compressed by lzma"),
        (zipped({"a.zip": ZIP}), r"no image .*1 an archive beside images \(.zip\)"),
        (zipped({}), "has no image in split"),
        (bytes(encrypted), r"is encrypted \(cat/1.jpg\): unpack it"),
    ]
    refused(lambda data: open_tar(written(tmp_path / "archive", data)), cases)
    written(tmp_path / "s-0.tar", WHOLE)
    cases = [(name, rf"there is no file '.*{name[:2]}") for name in ("a.tar", "t-*.tar")]
    refused(lambda name: tar(tmp_path / name), [*cases, ("s-{0..1}.tar", r"no file '.*s-1\.tar'")])


def zstd(data):
    """In two frames, as parallel compressors write."""
    frames = (data[: len(data) // 3], data[len(data) // 3 :])
    return b"".join(pyarrow.compress(one, "zstd", asbytes=True) for one in frames)


def test_a_compressed_tar_is_read_in_any_order(tar_of, tmp_path):
    data = {f"{c}/{i}.jpg": jpeg(i) * 99 for i, c in enumerate("abab")}
    for compress in (gzip.compress, bz2.compress, lzma.compress, zstd):
        archive = compress(packed(data))
        with pytest.raises(UserError, match="is compressed, so that no image can be read without"):
            tar_of(archive)
        source = open_tar(str(tmp_path / "a.tar"))
        assert told(source) == by_folder(data)
        assert [source[i]["image"] for i in (3, 0, 2)] == [[*data.values()][i] for i in (3, 0, 2)]
        with pytest.raises(UserError, match="is no whole tar archive"):
            open_tar(written(tmp_path / "b.tar", archive[:-200]))


def test_what_is_no_image_is_counted(tmp_path, caplog):
    caplog.set_level("INFO", "vit_jax")
    images = ["cat/a.jfif", "cat/b.jpe", "cat/c", "cat/d.jpg", "cat/e.avif", "dog/f.dat"]
    avif, heic = (b"\0\0\0\x20ftyp" + kind + bytes(20) for kind in (b"avif", b"heic"))
    members = {name: avif if name == "cat/e.avif" else jpeg(n) for n, name in enumerate(images)}
    others = {
        "cat/x.heic": (heic, "in a format that is not read (.heic)"),
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
    archives = {"a.tar": packed(everything), "a.zip": zipped(everything)}
    tree(tree(tmp_path, archives) / "pets", everything)
    for source in (folder(tmp_path / "pets"), tar(tmp_path / "a.tar"), tar(tmp_path / "a.zip")):
        assert told(source) == by_folder(members)
        passed = source.passed_over
        assert dict(passed.counts) == dict.fromkeys((why for _, why in others.values()), 1)
        found = {os.path.basename(name): why for name, why in passed.files}
        assert found["x.db"] == "of no known format (.db)"
    assert caplog.text.count("9 files passed over") == 3 and "x.heic" in caplog.text


def test_what_else_is_said_of_files(tmp_path, tar_of, caplog, monkeypatch):
    caplog.set_level("INFO", "vit_jax")
    ordinary = ["cat/1.jpg", "dog/2.PNG", "dog/readme.txt", ".cache/x", "dog/.DS_Store"]
    tree(tmp_path / "a", ordinary)
    with monkeypatch.context() as patch:  # files of images are not opened to be listed
        patch.setattr("vit_jax.data.forms.files.sniff", lambda start: pytest.fail("was opened"))
        assert len(folder(tmp_path / "a")) == 2
    assert len(folder(tmp_path / "a").passed_over) == 3 and not caplog.text
    tree(tmp_path / "a", ["loose.jpg"])
    assert folder(tmp_path / "a").passed_over.counts["in no class folder"] == 1
    assert "1 in no class folder" in caplog.text and "such as loose.jpg" in caplog.text
    (tmp_path / "a/dog/gone.jpg").symlink_to("nowhere")
    assert folder(tmp_path / "a").passed_over.counts["a link to nothing"] == 1
    source = tar_of(samples("x/cat/a.jpg; x/dog/b.jpg; x/ox/c.txt=moo"))
    assert source.label_names == ("cat", "dog") and len(source.passed_over) == 1
    assert "has no image in its folders ox" in caplog.text
    masks = ["b/b (1).png", "b/b (1)_mask.png", "b/b (1)_mask_1.png", "x/no_mask_1.png"]
    assert len(folder(tree(tmp_path / "b", masks))) == 4
    assert "2 files are called like masks of others, such as b/b (1)_mask.png" in caplog.text


def test_folders_that_are_no_classes_are_refused(tmp_path):
    one = "train/images/cat/1.jpg train/images/dog/2.jpg"
    all_in = r"all images are in the folder 'images', .* split=train/images \(.*; if not, .*,label="
    deep = r"in the folder 'a/b', .*\(cat, dog\).* split=train/a/b\[:100%\]"
    two = r"Test_set, training are called like splits.*split=Test_set \(prepare: --part=Test_set"
    seg = "seg_train/seg_train/sea/1.jpg seg_test/seg_test/sea/2.jpg seg_pred/3.jpg"
    images = "'Images' is called like one of all images.* split=Images if"
    for number, (names, split, message, sure) in enumerate(
        [
            (one, "train", all_in, "images images"),
            ("train/a/b/cat/1.jpg train/a/b/dog/x/2.jpg", "train[:100%]", deep, "a a"),
            ("training/cat/1.jpg Test_set/dog/2.jpg", "all", two, "training Test_set"),
            ("test/cat/1.jpg train/cat/2.jpg x/3.jpg", "all", "test, train are", "test train x"),
            (seg, "all", "seg_test, seg_train are called", "seg_train seg_test seg_pred"),
            ("train/c/1.jpg train/d/2.jpg un/3.jpg", "all", "folders train are", "train train un"),
            ("fold_0/a/1.jpg fold_1/a/2.jpg", "all", "fold_0, fold_1 are", "fold_0 fold_1"),
            ("images/1.jpg masks/2.png", "all", "'images' is called.*table:", "images masks"),
            ("Images/c/1.jpg Images/d/2.jpg docs/3.jpg", "all", images, "Images Images docs"),
        ]
    ):
        tree(tmp_path / f"{number}", names.split())
        written(tmp_path / f"{number}.tar", packed(names.split()))
        for where in (f"folder:{tmp_path}/{number}", f"tar:{tmp_path}/{number}.tar"):
            if where.endswith("tar") and split != "all":  # whose shared folders are none of classes
                assert set(classes(open_source(where, split)).values()) == {"cat", "dog"}
                continue
            with pytest.raises(UserError, match=message):
                open_source(where, split)
            found = told(open_source(f"{where},label=folder", split))
            assert sorted(label for label, _ in found.values()) == sorted(sure.split())


def test_folders_that_may_be_no_classes_are_said(tmp_path, caplog):
    several = "classes are a, b; .*split=a"
    nearly = "train/1.jpg train/ice/2.jpg cross-train/3.jpg test_tube/4.jpg imager/5.jpg"
    for number, (names, warned) in enumerate(
        [
            ("n01/images/1.jpg n02/images/2.jpg", None),  # tiny-imagenet
            ("cat/1.jpg cat/deep/2.jpg", None),
            ("train/1.jpg car/2.jpg", None),
            (nearly, None),
            ("a/x/1.jpg a/y/2.jpg b/x/3.jpg b/y/4.jpg", several),
            ("Cat/1.jpg cat/2.jpg", "'Cat' and 'cat' are two classes"),
        ]
    ):
        caplog.clear()
        found = classes(folder(tree(tmp_path / f"{number}", names.split())))
        assert found == {name: name.split("/")[0] for name in names.split()}
        assert bool(caplog.text) == bool(warned) and re.search(warned or "", caplog.text), names


def test_splits_are_listed(tmp_path):
    names = ["train/cat/1.jpg", "val/cat/2.jpg", "docs/x.txt", ".test/x.jpg"]
    assert folder_splits(str(tree(tmp_path / "d", names))) == ("train", "val", "all")
    archive = packed([f"d/{name}" for name in names])
    assert tar_splits(written(tmp_path / "d.tar", archive)) == ("train", "val", "all")


def test_what_is_in_folders_of_a_tar_in_a_tar(tar_of):
    inner = {f"x/{w}.tar": packed([f"{w}/images/{w}.jpg"]) for w in ("cat", "dog")}
    assert set(classes(tar_of(inner)).values()) == {"cat", "dog"}
    parts = {f"part {w}.tar": packed([f"cat/{w}.jpg", f"dog/{w}.jpg"]) for w in "xy"}
    with pytest.raises(UserError, match=r"by its tar and 'cat' by its folder: .*tar\|folder"):
        tar_of(parts)
    found = classes(tar_of(parts, ",label=folder"))
    assert {(name.split("/")[1], label) for name, label in found.items()} == {
        ("cat", "cat"),
        ("dog", "dog"),
    }
    tars = {f"{s}/{c}.tar": packed([f"{s}.jpg"]) for s in ("train", "val") for c in "ab"}
    assert classes(tar_of(tars, split="val")) == {"a/val.jpg": "a", "b/val.jpg": "b"}


def test_nothing_outside_a_hostile_tar_is_touched(tmp_path):
    target = written(tmp_path / "secret.jpg", b"secret")
    kinds = {
        "a/1.jpg": tarfile.REGTYPE,
        "../b/secret.jpg": tarfile.REGTYPE,
        f"..{target}": tarfile.REGTYPE,
        "a/\x1b[31m\udcff.jpg": tarfile.REGTYPE,
        **{"a/link.jpg": tarfile.SYMTYPE, "a/hard.jpg": tarfile.LNKTYPE},
        **{"a/fifo.jpg": tarfile.FIFOTYPE, "a/null.jpg": tarfile.CHRTYPE},
        **{"a/disk.jpg": tarfile.BLKTYPE, "a/folder.jpg": tarfile.DIRTYPE},
    }
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, (name, kind) in enumerate(kinds.items()):
            data, member = jpeg(number) if kind == tarfile.REGTYPE else b"", tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), target
            archive.addfile(member, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    source = tar(tmp_path / "a.tar")
    assert [source[i]["image"] for i in range(len(source))] == [jpeg(i) for i in range(4)]
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "secret.jpg").read_bytes() == b"secret"


def test_a_tar_that_changed_after_it_was_opened_is_named(tar_of, tmp_path):
    path, message = tmp_path / "a.tar", r"a\.tar (ends before byte|cannot be read: .*No such file)"
    for change in (lambda: os.truncate(path, SECOND + 600), path.unlink):
        source = tar_of(WHOLE)
        change()
        with pytest.raises(UserError, match=message):
            source[1]


def test_members_cost_no_object_each(tar_of, tmp_path):
    n = 1000
    tar_of(WHOLE)
    written(tmp_path / "a.tar", packed({f"cat/{i:05d}.jpg": b"x" for i in range(n)}))
    tracemalloc.start()
    try:
        source = tar(tmp_path / "a.tar")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == n
    assert kept < 90 * n and peak < 700 * n, (kept / n, peak / n)


@pytest.mark.parametrize("count, opener", [(300, open), (3, gzip.open)])
def test_many_threads_read_the_same_bytes(tmp_path, count, opener):
    """And more files than are kept open."""
    data = np.random.default_rng(0).bytes(5000)
    paths = [str(tmp_path / f"{i}") for i in range(count)]
    for i, path in enumerate(paths):
        with opener(path, "wb") as file:
            file.write(data[i:])
    files, random = OpenFiles(paths), np.random.default_rng(1)
    jobs = [tuple(random.integers(0, high) for high in (count, 3000, 1500)) for _ in range(1000)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda job: files.read(*map(int, job)), jobs))
    assert found == [data[i + at : i + at + size] for i, at, size in jobs]
    with pytest.raises(UserError, match="ends before byte 6000: it changed, or is cut off"):
        files.read(0, 4000, 2000)


def test_a_link_has_the_class_that_is_beside_it(tar_of):
    """Links are met last, and sorted to the place of what they lead to."""
    members = {
        "1.jpg": jpeg(1),
        "1.cls": b"cat",
        "3.jpg": jpeg(3),
        "3.cls": b"dog",
        "2.cls": b"bird",
    }
    assert classes(tar_of(packed(members, links={"2.jpg": "1.jpg"}))) == {
        "1.jpg": "cat",
        "2.jpg": "bird",
        "3.jpg": "dog",
    }

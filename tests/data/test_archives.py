"""Folders and tar archives as sources: files of the real formats, laid out as the real sets are."""

import concurrent.futures
import gzip
import io
import os
import pickle
import re
import tarfile
import tracemalloc
import unicodedata

import numpy as np
import pytest
import scipy.io
import simplejpeg

from vit_jax.data.archives import open_tar
from vit_jax.data.files import OpenFiles
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
    images = ["Dog/a.jpg", "cat/A B.JPEG", "cat/deep/er/x.PnG", "épagneul/z.webp", "épagneul/ñ.jpg"]
    others = ["cat/.hidden.jpg", "cat/.git/x.jpg", "cat/notes.txt", "cat/jpg", ".cache/x.jpg"]
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
        (["train/cat/1.jpg", "train/dog/x.txt", "train/pig/.x.jpg"], "train", "'dog', 'pig'$"),
        (["train/dog/x.txt"], "train", r"train has 1 class folder\(s\) without any image \(.jpg"),
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
    members = {"a.jpg": jpeg(0), "a.cls": b"tabby", "b.jpg": jpeg(1), "b.json": b'{"label": "ox"}'}
    (tmp_path / "a.tar").write_bytes(packed(members))
    assert classes(tar(tmp_path / "a.tar")) == {"a.jpg": "tabby", "b.jpg": "ox"}
    (tmp_path / "a.tar").write_bytes(packed(members | {"b.json": b"[1]"}))
    with pytest.raises(UserError, match=r"b\.jpg is in no folder of a class"):
        tar(tmp_path / "a.tar")


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
    n = 2000
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

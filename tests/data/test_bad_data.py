"""Images that cannot be read, endless sources, classes that differ: stopped, or gone on rightly."""

import dataclasses
import io
import json
import re
import tarfile
import zipfile

import numpy as np
import PIL.Image
import pytest
import simplejpeg
from grain import MapDataset

from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.images import BadImage
from vit_jax.data.pipeline import (
    BatchReader,
    DataConfig,
    Split,
    eval_batches,
    shuffled,
    train_batches,
)
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import InceptionCrop, Preprocess, RandomAffine
from vit_jax.errors import UserError

N = 9
PREPROCESS = Preprocess((8, 8))


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """Grey JPEGs as bright as their index; those in `bad` are cut off."""

    bad: tuple[int, ...] = ()
    label_names: tuple[str, ...] = tuple("abc")
    n: int = N

    fingerprint = "files"

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        data = simplejpeg.encode_jpeg(np.full((16, 16, 3), 20 * index, np.uint8), quality=95)
        data = data[:100] if index in self.bad else data
        return {"image": data, "label": index % 3, "name": f"/photos/{index}.jpg"}


def brightness(batch):
    return [round(float(image.mean()) / 20) for image in batch["image"]]


def train(source, steps=3, size=6, **options):
    fields = {key: options.pop(key) for key in ("on_corrupt",) if key in options}
    read = BatchReader(source, PREPROCESS, **fields)
    with train_batches(read, size, start_step=0, stop_step=steps, **options) as batches:
        return list(batches)


def evaluated(source, size=6, **fields):
    with eval_batches(BatchReader(source, PREPROCESS, **fields), size) as batches:
        return list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_training_with_its_path(workers):
    message = r"/photos/4\.jpg is no readable image: .*; data\.on_corrupt=skip goes on without it"
    with pytest.raises(ValueError, match=message) as raised:
        train(Files((4,)), workers=workers)
    assert isinstance(raised.value, UserError)  # so that the command line ends with 2


def test_a_bad_image_stops_evaluation_with_its_path():
    with pytest.raises(BadImage, match=r"/photos/7\.jpg is no readable image"):
        evaluated(Files((7,)))


@pytest.mark.parametrize("options", [dict(threads=1), dict(threads=3), dict(workers=2)])
def test_skipped_in_training_its_place_is_taken_by_the_next(options, caplog):
    found = train(Files((4, 5, 8)), on_corrupt="skip", **options)
    whole = train(Files())
    instead = {4: 6, 5: 6, 8: 0}
    for step, (batch, other) in enumerate(zip(found, whole, strict=True)):
        expected = [instead.get(index, index) for index in other["index"].tolist()]
        assert batch["index"].tolist() == expected == brightness(batch)
        assert batch["label"].tolist() == [index % 3 for index in expected]
        first = np.arange(6) + 6 * step < N  # of two epochs
        assert (
            batch["corrupt"].tolist() == ([x in instead for x in other["index"]] & first).tolist()
        )
        assert batch["mask"].all()
    assert sum(batch["corrupt"].sum() for batch in found) == 3
    if "workers" not in options:  # whose log is their own
        assert sorted(re.findall(r"skipped (\S+):", caplog.text)) == [
            f"/photos/{i}.jpg" for i in (4, 5, 8)
        ]


def test_skipped_in_evaluation_it_is_left_out(caplog):
    found = evaluated(Files((0, 7)), on_corrupt="skip")
    index = np.concatenate([batch["index"] for batch in found])
    mask = np.concatenate([batch["mask"] for batch in found])
    corrupt = np.concatenate([batch["corrupt"] for batch in found])
    assert index[mask].tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert index[corrupt].tolist() == [0, 7]
    assert not found[0]["image"][0].any()
    assert "skipped /photos/0.jpg" in caplog.text and "skipped /photos/7.jpg" in caplog.text


def test_where_nothing_can_be_read_skipping_ends():
    with pytest.raises(UserError, match="100 images in a row cannot be read, up to /photos/"):
        train(Files(tuple(range(N))), on_corrupt="skip")


def test_every_bad_row_of_a_batch_may_fail_at_once():
    with pytest.raises(BadImage):
        train(Files(tuple(range(N))), threads=4)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_without_a_name_stops(label):
    class Wrong(Files):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "label": label}

    with pytest.raises(UserError, match=rf"the label {label}, but there are 3 class names"):
        train(Wrong(), on_corrupt="skip")


@pytest.mark.parametrize("n", [1, 2, 7, 1259])
@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_the_order_is_that_of_grain(n, seed):
    stream = MapDataset.range(n).seed(seed).shuffle().repeat()
    positions = np.array([0, 1, n, 2 * n - 1, 5 * n + n // 2])
    expected = [stream[int(position)] for position in positions]
    assert shuffled(seed, n, positions).tolist() == expected


def test_an_endless_source_is_read_as_it_comes_and_anew_for_each_seed():
    source = open_source("fractals:classes=3,size=16", "train")
    found = []
    for seed in (0, 1):
        read = BatchReader(source, Preprocess((16, 16)), seed)
        with train_batches(read, 4, start_step=2, stop_step=4) as batches:
            found.append(np.concatenate([batch["index"] for batch in batches]))
    assert found[0].tolist() == list(range(8, 16))
    assert found[1].tolist() == [2**40 + i for i in range(8, 16)]


def test_inception_crop_sees_the_whole_image():
    keep = Preprocess((8, 8), aspect="keep", crop=0.5)
    read = BatchReader(Files(), keep, inception_crop=InceptionCrop((1.0, 1.0), (1.0, 1.0)))
    assert read.preprocess == dataclasses.replace(keep, aspect="squash", crop=1.0)


@pytest.mark.parametrize(
    "key, value",
    [
        ("inception_crop", InceptionCrop()),
        ("random_crop", True),
        ("affine", RandomAffine(degrees=9.0)),
        ("flip", True),
    ],
)
def test_evaluation_is_never_augmented(key, value):
    split = Split("digits", "val", **{key: value})
    with pytest.raises(UserError, match=f"data.val is evaluated as it is: {key}"):
        DataConfig(Split("digits", "train"), val=split)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: DataConfig(Split("digits", "train"), on_corrupt="skp"),
            r"on_corrupt is 'skp'; did you mean 'skip'\?",
        ),
        (
            lambda: Split("digits", "train", inception_crop=InceptionCrop(), random_crop=True),
            "exclude each other",
        ),
        (lambda: InceptionCrop(area=(0.5, 2.0)), r"area is \(0\.5, 2\.0\)"),
        (lambda: Preprocess((8, 8), jpeg="quick"), "data jpeg 'quick': known: accurate, fast"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def arrays(names):
    labels = np.arange(len(names), dtype=np.int32)
    return ArraySource(np.zeros((len(names), 2, 2, 1), np.uint8), labels, tuple(names))


def test_a_sliver_that_would_become_huge_is_a_bad_image():
    sliver = PIL.Image.fromarray(np.zeros((1, 60_000), np.uint8))
    file = io.BytesIO()
    sliver.save(file, "PNG")
    keep = Preprocess((224, 224), aspect="keep", crop=0.875)
    with pytest.raises(BadImage, match=r"1 x 60000 pixels would become 256 x 15360000"):
        keep(file.getvalue())

    class OneSliver(Files):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return {**example, "image": file.getvalue()} if index == 2 else example

    files = OneSliver()
    with pytest.raises(BadImage, match=r"/photos/2\.jpg is no readable image: 1 x 60000 pixels"):
        BatchReader(files, keep)(np.arange(N), np.arange(N))
    batch = BatchReader(files, keep, on_corrupt="skip")(np.arange(N), np.arange(N))
    assert batch["corrupt"].tolist() == [index == 2 for index in range(N)]


def test_a_file_that_cannot_be_opened_is_no_bad_image(tmp_path):
    """Or else skipping would leave out whole shards without a word."""
    prepare("fractals:classes=2,size=8", str(tmp_path), examples=6, shard_examples=3)
    source = open_source(f"records:{tmp_path}", "train")
    next(tmp_path.glob("*-00001-of-00002")).unlink()
    assert source[0]["label"] == 0
    with pytest.raises(UserError) as raised:
        source[5]
    assert not isinstance(raised.value, BadImage)


def test_other_labels_are_another_data_set(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(4):
            data = Files()[i]["image"]
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    for name, labels in {"one": "cat cat dog dog", "other": "dog dog cat cat"}.items():
        (tmp_path / name).write_text(labels.replace(" ", "\n"))
    prepare(str(tmp_path / "a.tar"), str(tmp_path / "out"), labels=str(tmp_path / "one"))
    with pytest.raises(UserError, match="source_fingerprint differ"):
        prepare(str(tmp_path / "a.tar"), str(tmp_path / "out"), labels=str(tmp_path / "other"))
    (tmp_path / "third").write_text("0.jpg,cat\n1.jpg,cat\n2.jpg,dog\n3.jpg,\n")
    with pytest.raises(UserError, match=r"line 4: '3\.jpg' has no label"):
        prepare(str(tmp_path / "a.tar"), str(tmp_path / "x"), labels=str(tmp_path / "third"))


def test_what_was_passed_over_is_listed_by_prepare(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    members = {f"{c}/{i}.jpg": Files()[i]["image"] for i, c in enumerate("aabb")}
    others = {"a/x.txt": "of no known format (.txt)", "b/@eaDir/0.jpg": "of a folder @eaDir"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in [*members.items(), *((name, b"text") for name in others)]:
            archive.writestr(name, data)
            path = tmp_path / "pets" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    for src, named in {"a.zip": f"{tmp_path}/a.zip: ", "pets": ""}.items():
        dst = tmp_path / f"from {src}"
        assert prepare(str(tmp_path / src), str(dst))["examples"] == 4
        found = open_source(f"records:{dst}", "train")
        assert [(found[i]["image"], found[i]["label"]) for i in range(4)] == [
            (data, "ab".index(name[0])) for name, data in members.items()
        ]
        listed = (dst / "passed_over_train.jsonl").read_text().splitlines()
        listed = {each["name"]: each["why"] for each in map(json.loads, listed)}
        whole = "b/@eaDir/" if src == "pets" else "b/@eaDir/0.jpg"
        assert listed == {
            f"{named}a/x.txt": others["a/x.txt"],
            f"{named}{whole}": "of a folder @eaDir",
        }
        assert re.search(rf"2 files passed over: 1 of .*, 1 of .*, listed in {dst}", caplog.text)
    assert f"{tmp_path}/pets has no folder 'train': all of it is taken" in caplog.text
    assert f"{tmp_path}/a.zip: all of it is taken" in caplog.text
    monkeypatch.setattr("vit_jax.data.forms.files.PassedOver.MOST", 1)
    prepare(str(tmp_path / "a.zip"), str(tmp_path / "third"))
    lines = (tmp_path / "third/passed_over_train.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1]) == {"more": 1}


def test_several_labels_go_into_no_shard(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", Files()[0]["image"])
        archive.writestr("a.json", '{"label": [2, 1]}')
    with pytest.raises(UserError, match="has several labels or none"):
        prepare(str(tmp_path / "a.zip"), str(tmp_path / "out"))


def test_folders_called_like_splits_are_prepared_if_they_are_classes(tmp_path):
    for name in ("train/1.jpg", "test/2.jpg"):
        (tmp_path / "trips" / name).parent.mkdir(parents=True)
        (tmp_path / "trips" / name).write_bytes(Files()[0]["image"])
    src, dst = str(tmp_path / "trips"), str(tmp_path / "out")
    with pytest.raises(UserError, match=r"--part=test.*or, if they are classes, .*,label=folder"):
        prepare(src, dst, split="x")
    assert prepare(f"{src},label=folder", dst, split="x")["label_names"] == ["test", "train"]

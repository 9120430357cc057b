"""Images that cannot be read, endless sources, classes that differ: stopped, or gone on rightly."""

import dataclasses
import json
import re

import numpy as np
import pytest
import simplejpeg
from grain import MapDataset
from made import packed, refused, saved, tree, zipped

from vit_jax.data.images import BadImage
from vit_jax.data.order import shuffled
from vit_jax.data.pipeline import BatchReader, eval_batches, train_batches
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import InceptionCrop, Preprocess
from vit_jax.errors import UserError

N = 9
PREPROCESS = Preprocess((8, 8))


class Files:
    """Grey JPEGs as bright as their index; those in `bad` are cut off. Others may be given."""

    label_names, fingerprint = tuple("abc"), "files"

    def __init__(self, *bad, label=None, images=()):
        self.bad, self.label, self.images = bad, label, dict(images)

    def __len__(self):
        return N

    def __getitem__(self, index):
        data = simplejpeg.encode_jpeg(np.full((16, 16, 3), 20 * index, np.uint8), quality=95)
        data = data[:100] if index in self.bad else self.images.get(index, data)
        label = index % 3 if self.label is None else self.label
        return {"image": data, "label": label, "name": f"/photos/{index}.jpg"}


def train(source, on_corrupt="stop", threads=1, steps=3, **fields):
    read = BatchReader(source, PREPROCESS, on_corrupt=on_corrupt, **fields)
    with train_batches(read, 6, start_step=0, stop_step=steps, threads=threads) as batches:
        return list(batches)


def evaluated(source, **fields):
    with eval_batches(BatchReader(source, PREPROCESS, **fields), 6) as batches:
        return list(batches)


def test_a_bad_image_stops_with_its_path():
    message = r"/photos/4\.jpg is no readable image: .*; --config\.data\.on_corrupt=skip goes on"
    for run in (train, evaluated):
        with pytest.raises(BadImage, match=message) as raised:
            run(Files(4))
        assert isinstance(raised.value, UserError)  # so that the command line ends with 2
    with pytest.raises(BadImage):  # every row of a batch at once
        train(Files(*range(N)), threads=4)


@pytest.mark.parametrize("threads", [1, 3])
def test_skipped_in_training_its_place_is_taken_by_the_next(threads, caplog):
    found, whole = train(Files(4, 5, 8), "skip", threads), train(Files())
    instead = {4: 6, 5: 6, 8: 0}
    for step, (batch, other) in enumerate(zip(found, whole, strict=True)):
        expected = [instead.get(index, index) for index in other["index"].tolist()]
        brightness = [round(float(image.mean()) / 20) for image in batch["image"]]
        assert batch["index"].tolist() == expected == brightness
        assert batch["label"].tolist() == [index % 3 for index in expected]
        first = np.arange(6) + 6 * step < N  # of two epochs
        corrupt = [x in instead for x in other["index"]] & first
        assert batch["corrupt"].tolist() == corrupt.tolist() and batch["mask"].all()
    assert sum(batch["corrupt"].sum() for batch in found) == 3
    skipped = [f"/photos/{i}.jpg" for i in (4, 5, 8)]
    assert sorted(re.findall(r"skipped (\S+):", caplog.text)) == skipped


def test_copies_of_a_skipped_image_count_once():
    options = dict(steps=10, repeats=3)  # more than two epochs of the images
    whole, found = train(Files(), **options), train(Files(4), "skip", **options)
    for batch, other in zip(found, whole, strict=True):
        expected = np.where(other["index"] == 4, 5, other["index"])
        assert batch["index"].tolist() == expected.tolist()
    assert sum(batch["corrupt"].sum() for batch in found) == 1


def test_skipped_in_evaluation_it_is_left_out(caplog):
    found = evaluated(Files(0, 7), on_corrupt="skip")
    keys = ("index", "mask", "corrupt")
    index, mask, corrupt = (np.concatenate([batch[key] for batch in found]) for key in keys)
    assert index[mask].tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert index[corrupt].tolist() == [0, 7]
    assert not found[0]["image"][0].any()
    assert "skipped /photos/0.jpg" in caplog.text and "skipped /photos/7.jpg" in caplog.text


def test_where_skipping_does_not_help_it_ends():
    cases = [(Files(*range(N)), "100 images in a row cannot be read, up to /photos/")]
    cases += [(Files(label=n), f"the label {n}, but there are 3 class names") for n in (3, -1)]

    def read(source):
        read = BatchReader(source, PREPROCESS, on_corrupt="skip", replace=True)
        read(np.arange(1), np.arange(1))

    refused(read, cases)


def test_the_order_is_that_of_grain():
    for seed, n in [(0, 1), (1, 2), (2**31, 1259)]:
        stream = MapDataset.range(n).seed(seed).shuffle().repeat()
        positions = np.array([0, 1, n, 2 * n - 1, 5 * n + n // 2])
        expected = [stream[int(position)] for position in positions]
        assert shuffled(seed, n, positions).tolist() == expected


def test_an_endless_source_is_read_as_it_comes_and_anew_for_each_seed():
    source = open_source("fractals:classes=3,size=16", "train")
    for seed in (0, 1):
        read = BatchReader(source, Preprocess((16, 16)), seed)
        with train_batches(read, 4, start_step=2, stop_step=4) as batches:
            found = np.concatenate([batch["index"] for batch in batches])
        assert found.tolist() == [seed * 2**40 + i for i in range(8, 16)]


def test_inception_crop_sees_the_whole_image():
    keep = Preprocess((8, 8), aspect="keep", crop=0.5)
    read = BatchReader(Files(), keep, inception_crop=InceptionCrop((1.0, 1.0), (1.0, 1.0)))
    assert read.preprocess == dataclasses.replace(keep, aspect="squash", crop=1.0)


def test_a_sliver_that_would_become_huge_is_a_bad_image():
    sliver = saved(np.zeros((1, 60_000), np.uint8), "PNG")
    keep = Preprocess((224, 224), aspect="keep", crop=0.875)
    with pytest.raises(BadImage, match=r"1 x 60000 pixels would become 256 x 15360000"):
        keep(sliver)
    files, rows = Files(images={2: sliver}), np.arange(N)
    with pytest.raises(BadImage, match=r"/photos/2\.jpg is no readable image: 1 x 60000 pixels"):
        BatchReader(files, keep)(rows, rows)
    batch = BatchReader(files, keep, on_corrupt="skip")(rows, rows)
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
    members = {f"{i}.jpg": Files()[i]["image"] for i in range(4)}
    third = "0.jpg,cat\n1.jpg,cat\n2.jpg,dog\n3.jpg,\n"
    files = {"one": b"cat\ncat\ndog\ndog", "other": b"dog\ndog\ncat\ncat", "third": third.encode()}
    tree(tmp_path, {"a.tar": packed(members), **files})

    def make(labels, dst="out"):
        prepare(str(tmp_path / "a.tar"), str(tmp_path / dst), labels=str(tmp_path / labels))

    make("one")
    with pytest.raises(UserError, match="source_fingerprint differ"):
        make("other")
    with pytest.raises(UserError, match=r"line 4: '3\.jpg' has no label"):
        make("third", "x")


def test_what_was_passed_over_is_listed_by_prepare(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "vit_jax")
    members = {f"{c}/{i}.jpg": Files()[i]["image"] for i, c in enumerate("aabb")}
    others = {"a/x.txt": "of no known format (.txt)", "b/@eaDir/0.jpg": "of a folder @eaDir"}
    everything = members | dict.fromkeys(others, b"text")
    (tmp_path / "a.zip").write_bytes(zipped(everything))
    tree(tmp_path / "pets", everything)
    for src, named, whole in (("a.zip", f"{tmp_path}/a.zip: ", "0.jpg"), ("pets", "", "")):
        dst = tmp_path / f"from {src}"
        assert prepare(str(tmp_path / src), str(dst))["examples"] == 4
        found = open_source(f"records:{dst}", "train")
        assert [(found[i]["image"], found[i]["label"]) for i in range(4)] == [
            (data, "ab".index(name[0])) for name, data in members.items()
        ]
        listed = map(json.loads, (dst / "passed_over_train.jsonl").read_text().splitlines())
        listed = {each["name"]: each["why"] for each in listed}
        names = (f"{named}a/x.txt", f"{named}b/@eaDir/{whole}")
        assert listed == dict(zip(names, others.values(), strict=True))
        assert re.search(rf"2 files passed over: 1 of .*, 1 of .*, listed in {dst}", caplog.text)
    assert f"{tmp_path}/pets has no folder 'train': all of it is taken" in caplog.text
    assert f"{tmp_path}/a.zip: all of it is taken" in caplog.text
    monkeypatch.setattr("vit_jax.data.forms.files.PassedOver.MOST", 1)
    prepare(str(tmp_path / "a.zip"), str(tmp_path / "third"))
    lines = (tmp_path / "third/passed_over_train.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1]) == {"more": 1}


def test_what_goes_into_no_shard(tmp_path):
    image = Files()[0]["image"]
    (tmp_path / "a.zip").write_bytes(zipped({"a.jpg": image, "a.json": b'{"label": [2, 1]}'}))
    with pytest.raises(UserError, match="has several labels or none"):
        prepare(str(tmp_path / "a.zip"), str(tmp_path / "out"))
    # Folders called like splits, unless they are said to be classes.
    src = str(tree(tmp_path / "trips", {"train/1.jpg": image, "test/2.jpg": image}))
    with pytest.raises(UserError, match=r"--part=test.*or, if they are classes, .*,label=folder"):
        prepare(src, str(tmp_path / "out"), split="x")
    info = prepare(f"{src},label=folder", str(tmp_path / "out"), split="x")
    assert info["label_names"] == ["test", "train"]

"""Data in buckets: on servers of this machine that speak Google's and Amazon's protocols."""

import json
import os
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import servers
from array_record.python.array_record_module import ArrayRecordWriter
from fake_tfds import write
from made import jpeg, packed, saved, tree, written, zipped
from tensorflow_datasets.core import features

from vit_jax import objects
from vit_jax.data import storage
from vit_jax.data.cache import Cache
from vit_jax.data.config import DataConfig, Split
from vit_jax.data.forms.ranged_records import RangedRecords
from vit_jax.data.forms.records import Part, array_records
from vit_jax.data.inputs import find_images
from vit_jax.data.pipeline import BatchReader, eval_batches, train_batches
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import open_source, splits_of
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import Unreachable, UserError
from vit_jax.objects import Objects

TFRECORD = Path(__file__).parent / "files" / "tfds" / "pets" / "1.0.0"
STORES = ["gs", "s3"] if platform.machine() == "x86_64" else ["s3"]  # the program's machine
FAULTS = servers.Faults(kinds=(503, "reset"))
PETS = [f"{split}/{pet}/{i}.jpg" for split in ("train", "val") for pet in "ab" for i in range(9)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set in each form, on a disk."""
    root = tmp_path_factory.mktemp("data")
    tree(root / "folder", PETS)
    rows = "".join(f"folder/{name},{name.split('/')[1]}\n" for name in PETS)
    written(root / "table.csv", f"file,label\n{rows}")
    samples = {f"{i:03d}.jpg": jpeg(i) for i in range(12)}
    samples |= {f"{i:03d}.cls": str(i % 3).encode() for i in range(12)}
    ordered = dict(sorted(samples.items()))
    half = [dict(list(ordered.items())[part]) for part in (slice(12), slice(12, 24))]
    written(root / "shards" / "web-000.tar", packed(half[0]))
    written(root / "shards" / "web-001.tar", packed(half[1]))
    written(root / "pets.zip", zipped(PETS[:18]))
    written(root / "pets.tar.gz", packed(PETS[:18], "w:gz"))
    for split in ("train", "val"):
        prepare(f"folder:{root / 'folder'}", str(root / "records"), split=split, shard_examples=7)
    shutil.copytree(TFRECORD, root / "pets" / "1.0.0")
    kinds = {
        "image": features.Image(encoding_format="jpeg"),
        "label": features.ClassLabel(names=["x", "y"]),
    }
    write(
        root, "marks", "1.0.0", kinds, {"train": (9, lambda i: {"image": jpeg(i), "label": i % 2})}
    )
    for i in range(5):
        split = "train" if i < 3 else "val"
        written(root / "pairs" / "images" / split / f"{i}.jpg", jpeg(i))
        mask = saved(np.full((8, 8, 1), i % 2, np.uint8), "PNG")
        written(root / "pairs" / "masks" / split / f"{i}.png", mask)
    written(root / "pairs" / "names.txt", "cat\ndog\n")
    for i in range(5):
        split = "train" if i < 3 else "val"
        written(root / "yolo" / "images" / split / f"{i}.jpg", jpeg(i))
        written(root / "yolo" / "labels" / split / f"{i}.txt", f"{i % 2} .5 .5 .5 .{i + 1}\n")
    yaml = "path: .\ntrain: images/train\nval: images/val\ntest: some.txt\nnames: [cat, dog]\n"
    written(root / "yolo" / "data.yaml", yaml)
    written(root / "yolo" / "some.txt", "".join(f"images/train/{i}.jpg\n" for i in range(3)))
    images = [dict(id=i, file_name=f"train/{i}.jpg", height=8, width=8) for i in range(3)]
    boxes = [dict(id=i, image_id=i, category_id=4, bbox=[1, i, 4, 3]) for i in range(3)]
    found = dict(images=images, annotations=boxes, categories=[dict(id=4, name="cat")])
    written(root / "yolo" / "annotations" / "instances_train.json", json.dumps(found))
    np.savez(root / "small.npz", train_images=np.zeros((4, 8, 8), np.uint8), train_labels=range(4))
    return root


@pytest.fixture(scope="module", params=STORES)
def bucket(request, data):
    """The URL of a copy of `data`."""
    server = {"gs": servers.google, "s3": servers.amazon}[request.param]
    with pytest.MonkeyPatch.context() as patch, server(FAULTS) as found:
        for name, value in found.items():
            patch.setenv(name, value)
        url = f"{request.param}://runs/data"
        for path in filter(Path.is_file, data.rglob("*")):
            Objects(url).replace(path.relative_to(data).as_posix(), path.read_bytes())
        yield url


@pytest.fixture(autouse=True)
def forgetful(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    FAULTS.share = 0.0
    storage.forget()
    yield
    FAULTS.share = 0.0
    storage.keep(None)


FORMS = {
    "folder:ROOT/folder": ("train", "val[:50%]"),
    "table:ROOT/table.csv": ("all",),
    "tar:ROOT/shards/web-*.tar": ("all",),
    "tar:ROOT/shards/web-{000..001}.tar,label=cls": ("all",),
    "zip:ROOT/pets.zip": ("train",),
    "records:ROOT/records": ("train", "val[30%:]"),
    "tfds:ROOT/pets": ("train", "train[3:8]"),
    "tfds:ROOT/marks/1.0.0": ("train[1:]",),
    "arrays:ROOT/small.npz": ("train",),
    "pairs:ROOT/pairs": ("train", "all"),
    "pairs:ROOT/pairs,classes=names.txt": ("train",),
    "yolo:ROOT/yolo": ("train", "test"),
    "coco:ROOT/yolo": ("train",),
    "coco:ROOT/yolo/annotations/instances_train.json,images=../images": ("all",),
}


def rows(boxes):
    return np.column_stack([boxes.corners, boxes.classes, boxes.area])


@pytest.mark.parametrize("form", FORMS)
def test_a_source_in_a_bucket_is_that_on_a_disk(form, bucket, data):
    for split in FORMS[form]:
        ours = open_source(form.replace("ROOT", bucket), split)
        theirs = open_source(form.replace("ROOT", str(data)), split)
        assert ours.fingerprint == theirs.fingerprint
        assert ours.label_names == theirs.label_names and len(ours) == len(theirs) > 2
        for i in range(len(theirs)):
            labels = ours[i]["label"], theirs[i]["label"]
            if hasattr(theirs, "boxes_of"):
                labels = [rows(label) for label in labels]
                np.testing.assert_array_equal(rows(ours.boxes_of(i)), labels[1])
            np.testing.assert_array_equal(*labels)
            np.testing.assert_array_equal(ours[i]["image"], theirs[i]["image"])
    assert splits_of(form.replace("ROOT", bucket)) == splits_of(form.replace("ROOT", str(data)))


def test_a_compressed_archive_in_a_bucket_is_prepared(bucket, data, tmp_path):
    made = [
        prepare(f"tar:{root}/pets.tar.gz", str(tmp_path / name), part="train")
        for name, root in {"ours": bucket, "theirs": data}.items()
    ]
    assert made[0]["fingerprint"] == made[1]["fingerprint"] and made[0]["examples"] == 18


def batches(source, spec, step=0, workers=0, cache=None):
    split = Split(spec, "train", flip=True)
    assert getattr(source, "in_bucket", False) == ("://" in spec)
    read = BatchReader.of(source, split, Preprocess((8, 8)), seed=1, cache=cache)
    with train_batches(read, 8, start_step=step, stop_step=9, workers=workers) as found:
        return [{key: value.copy() for key, value in batch.items()} for batch in found]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for mine, his in zip(ours, theirs, strict=True):
        for key in his:
            np.testing.assert_array_equal(mine[key], his[key])


@pytest.mark.parametrize("form", ["records:ROOT/records", "folder:ROOT/folder"])
def test_batches_are_those_of_a_disk_despite_faults_and_read_once_with_a_cache(
    form, bucket, data, tmp_path
):
    on_disk = open_source(form.replace("ROOT", str(data)), "train")
    expected = batches(on_disk, "folder:there")
    spec = form.replace("ROOT", bucket)
    source = open_source(spec, "train")
    FAULTS.share, before = 0.05, FAULTS.requests
    assert_equal(batches(source, spec), expected)
    assert FAULTS.requests - before >= 72  # an image each
    FAULTS.share = 0.0
    cache = f"{tmp_path / 'kept'},100MB"
    batches(source, spec, cache=cache)
    before = FAULTS.requests
    assert_equal(batches(source, spec, step=2, cache=cache), expected[2:])
    assert FAULTS.requests == before
    (damaged, *_) = (path for path in (tmp_path / "kept").glob("*/*/*") if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert_equal(batches(source, spec, cache=cache), expected)
    assert before < FAULTS.requests <= before + 4  # its epochs are read ahead at once


@pytest.mark.parametrize("bucket", STORES[:1], indirect=True)
def test_worker_processes_share_the_cache(bucket, data, tmp_path):
    spec = f"records:{bucket}/records"
    cache = f"{tmp_path / 'kept'},100MB"
    ours = batches(open_source(spec, "train"), spec, step=5, workers=2, cache=cache)
    theirs = open_source(f"records:{data}/records", "train")
    assert_equal(ours, batches(theirs, "folder:there", step=5))
    assert sum(path.is_file() for path in (tmp_path / "kept").glob("*/*/*")) == 18


def test_every_example_is_evaluated_once(bucket):
    spec = f"table:{bucket}/table.csv"
    read = BatchReader.of(open_source(spec, "all"), Split(spec, "all"), Preprocess((8, 8)))
    with eval_batches(read, 7) as found:
        indices = np.concatenate([batch["index"] for batch in found])
    assert sorted(indices[indices >= 0]) == list(range(len(PETS)))


def test_images_are_found_in_a_bucket(bucket, data):
    arguments = ["folder/val", "folder/train/a/*.jpg", "pets.zip", "folder/train/b/3.jpg"]
    ours = find_images(*(f"{bucket}/{each}" for each in arguments))
    theirs = find_images(*(f"{data}/{each}" for each in arguments))
    assert list(ours) == list(theirs) and len(ours) == 18 + 9 + 18 + 1
    assert list(ours.names)[-1] == f"{bucket}/folder/train/b/3.jpg"


def test_what_is_known_of_an_archive_is_kept(bucket):
    spec = f"tar:{bucket}/shards/web-*.tar"
    first = open_source(spec, "all")
    storage.forget()
    before = FAULTS.requests
    again = open_source(spec, "all")
    assert FAULTS.requests - before == 5  # three lists, and the first bytes of two files
    assert again.fingerprint == first.fingerprint and again.passed_over.counts == {}
    assert again[5]["image"] == first[5]["image"]


def test_a_file_that_changes_under_a_run_is_no_other_image(bucket):
    store = Objects(f"{bucket}/changing")
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        store.replace(name, jpeg(1))
    source = open_source(f"folder:{bucket}/changing", "all")
    assert source[0]["image"] == jpeg(1)
    for other in (jpeg(2) + bytes(99), b"short"):
        store.replace("a/1.jpg", other)
        with pytest.raises(UserError, match=r"a/1\.jpg changed since it was listed: start again"):
            source[0]


def test_a_store_that_does_not_answer_ends_with_code_75(bucket, monkeypatch):
    source = open_source(f"records:{bucket}/records", "train")
    monkeypatch.setattr(objects, "RETRIES", {**objects.RETRIES, "max_retries": 1})
    storage.forget()
    storage.size(f"{bucket}/records/vit_jax_train.json")
    FAULTS.share = 1.0
    with pytest.raises(Unreachable, match="does not answer") as caught:
        source[0]
    assert caught.value.code == 75


def test_what_is_not_there_is_said(bucket):
    for spec, message in {
        f"folder:{bucket}/none": "there is no such folder",
        f"records:{bucket}/folder": "has no split 'train'",
        f"tar:{bucket}/none-*.tar": "there is no file",
        f"tar:{bucket}/*/web-000.tar": "a pattern is of names in one folder",
        f"tfds:{bucket}/folder": "there is no dataset_info.json",
        f"table:{bucket}/none.csv": "there is no such file",
        f"hf-data:{bucket}/folder": "read from disks",
        f"idx:{bucket}/folder": "has no files such as",
        "folder:ftp://host/data": "expected gs://",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(spec, "train")


OPTIONS = ["group_size:1", "group_size:5", "group_size:1,uncompressed", "group_size:1,brotli:4"]


@pytest.mark.parametrize("options", OPTIONS)
def test_records_are_those_that_array_record_reads(options, tmp_path):
    """Among them records that span several of the format's blocks of 64 KiB."""
    path, random = str(tmp_path / "file"), np.random.default_rng(0)
    writer = ArrayRecordWriter(path, options)
    sizes = (0, 1, 3_000, 70_000, 200_000)
    wrote = [random.bytes(int(random.choice(sizes))) for _ in range(60)]
    for record in wrote:
        writer.write(record)
    writer.close()
    parts = [Part(path, 0, 60, 60), Part(path, 7, 11, 60), Part(path, 59, -1, 60)]
    found = RangedRecords.of(parts)
    assert [found[i] for i in range(len(found))] == [*wrote, *wrote[7:18], wrote[59]]
    assert [array_records(parts[:1])[i] for i in (0, 59)] == [wrote[0], wrote[59]]
    with pytest.raises(IndexError):
        found[72]
    with pytest.raises(UserError, match="has 60 records; expected 61"):
        RangedRecords.of([Part(path, 1, 60, 60)])


@pytest.mark.parametrize("options", ["group_size:3,transpose:true", "group_size:1,snappy"])
def test_records_of_other_kinds_are_refused(options, tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "file"), options)
    for i in range(9):
        writer.write(b"%d" % i * 50)
    writer.close()
    with pytest.raises(UserError, match="not read from a bucket"):
        RangedRecords.of([Part(str(tmp_path / "file"), 0, 9, 9)])[0]


def test_damaged_records_are_refused(tmp_path):
    path = tmp_path / "file"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for i in range(30):
        writer.write(b"%d" % i * 999)
    writer.close()
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for damaged in (
        b"",
        whole[:100],
        whole[: 2**16],
        whole[: -(2**16)],
        whole[2**16 :],
        bytes(2**17),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="no whole ArrayRecord file"):
            RangedRecords.of([Part(str(path), 0, 30, 30)])
    footer = len(whole) - 2**16
    for _ in range(200):  # of damage that is seen, the error is told
        where = int(random.choice([random.integers(footer, footer + 130), random.integers(9000)]))
        path.write_bytes(whole[:where] + bytes([whole[where] ^ 0x41]) + whole[where + 1 :])
        try:
            records = RangedRecords.of([Part(str(path), 0, 30, 30)])
            [records[i] for i in range(30)]
        except ValueError:  # of which UserError is one
            pass


def test_a_cache_keeps_to_its_limit_and_lets_the_unused_go(tmp_path, caplog):
    cache = Cache.of(f"{tmp_path}/kept,1MB")
    for i in range(12):
        cache.put(f"{i}", bytes([i]) * 99_996)
    assert [cache.get(f"{i}") is not None for i in range(12)] == [True] * 10 + [False] * 2
    assert "is full, with 1 MB: nothing is added" in caplog.text
    again = Cache.of(f"{tmp_path}/kept,1MB")  # as another process counts
    again.put("12", bytes(99_996))
    assert again.get("12") is None
    for path in (tmp_path / "kept").glob("*/*/*"):
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    assert again.get("3") == bytes([3]) * 99_996  # which notes its use
    third = Cache.of(f"{tmp_path}/kept,1MB")
    third.put("12", bytes(99_996))
    assert third.get("12") == bytes(99_996) and third.get("3") and third.get("4") is None


def test_a_cache_that_cannot_be_is_refused(tmp_path):
    for where, message in {
        "/tmp/x": "expected a folder and its largest size",
        "100GB": "expected a folder and its largest size",
        "/tmp/x,100G": "expected a folder and its largest size",
    }.items():
        with pytest.raises(UserError, match=message):
            DataConfig(cache=where)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of this path is a file"):
        Cache.of(f"{tmp_path / 'file'},1MB")

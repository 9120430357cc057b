"""Prepared data sets: what TensorFlow and TFDS wrote is read without TensorFlow.

`files/tfds/pets/1.0.0` was written by tensorflow-datasets 4.9.10 with TensorFlow 2.21, as two
TFRecord files: twelve JPEGs of three classes, in the order of their paths (`disable_shuffling`).
"""

import gzip
import json
import pickle
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data import records
from vit_jax.data.pipeline import BatchReader, eval_batches, train_batches
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import InceptionCrop, Preprocess
from vit_jax.errors import UserError

TFRECORD = Path(__file__).parent / "files" / "tfds" / "pets" / "1.0.0"
CLASSES = ("Abyssinian", "Chat égyptien", "Maine Coon")


def written():
    """(label, name, JPEG) of every example, read with protobuf's own parser."""
    found = []
    for path in sorted(TFRECORD.glob("*.tfrecord-*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            feature = tf_example_pb2.Example.FromString(data[12 : 12 + length]).features.feature
            image, name = (feature[key].bytes_list.value[0] for key in ("image", "file_name"))
            found.append((feature["label"].int64_list.value[0], name.decode(), image))
            data = data[12 + length + 4 :]
    return found


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch, tmp_path):
    """Nothing imports TensorFlow, and indices are kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    assert "tensorflow" not in sys.modules


@pytest.fixture
def as_folder(tmp_path):
    for label, name, image in written():
        path = tmp_path / "pets" / CLASSES[label] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return tmp_path / "pets"


class Pets(tensorflow_datasets.core.GeneratorBasedBuilder):
    """The same images, for TFDS to write as ArrayRecord."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    folder = None

    def _info(self):
        features = tensorflow_datasets.features
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {"image": features.Image(), "label": features.ClassLabel(names=CLASSES)}
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        paths = sorted(self.folder.glob("*/*.jpg"))
        for number, path in enumerate(paths):
            yield number, {"image": str(path), "label": path.parent.name}


@pytest.fixture
def array_record(as_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Pets, "folder", as_folder)
    builder = Pets(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def test_one_set_of_images_in_four_forms_gives_the_same_batches(as_folder, array_record, tmp_path):
    prepare(str(as_folder), str(tmp_path / "shards"), shard_examples=5)
    specs = {
        f"folder:{as_folder}": "all",
        f"tfds:{TFRECORD}": "train",
        f"tfds:{array_record}": "train",
        f"records:{tmp_path / 'shards'}": "train",
    }
    found = []
    for spec, split in specs.items():
        source = open_source(spec, split)
        assert source.label_names == CLASSES
        assert [(e["label"], e["image"]) for e in map(source.__getitem__, range(12))] == [
            (label, image) for label, _, image in written()
        ]
        read = BatchReader(source, Preprocess((9, 8)), 5, InceptionCrop(), flip=True)
        with train_batches(read, 8, start_step=1, stop_step=4) as batches:
            train = list(batches)
        with eval_batches(BatchReader(source, Preprocess((9, 8))), 8) as batches:
            found.append([*train, *batches])
    for other in found[1:]:
        for one, batch in zip(found[0], other, strict=True):
            assert all((one[key] == batch[key]).all() for key in one)
    assert len(found[0]) == 5 and found[0][0]["image"].std() > 10


@pytest.mark.parametrize("form", ["tfrecord", "array_record"])
@pytest.mark.parametrize(
    "split, rows",
    [
        ("train[:50%]", range(6)),
        ("train[25%:]", range(3, 12)),
        ("train[5:7]", range(5, 7)),
        ("train[-2:]", range(10, 12)),
        ("train[:3]+train[9:]", (0, 1, 2, 9, 10, 11)),
    ],
)
def test_a_slice_of_a_split_is_what_tfds_says(form, split, rows, request):
    path = TFRECORD if form == "tfrecord" else request.getfixturevalue("array_record")
    source = open_source(f"tfds:{path}", split)
    expected = [written()[row][2] for row in rows]
    assert [source[i]["image"] for i in range(len(source))] == expected
    assert source.fingerprint != open_source(f"tfds:{path}", "train").fingerprint
    copy = pickle.loads(pickle.dumps(source))
    assert copy[1]["image"] == expected[1] and copy.fingerprint == source.fingerprint


def test_a_data_set_is_found_by_its_name(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(TFRECORD.parents[1]))
    for spec in ("tfds:pets", "tfds:pets:1.0.0", f"tfds:{TFRECORD.parent}"):
        assert open_source(spec, "train")[7]["label"] == 1


def test_the_name_of_an_example_says_where_it_is():
    name = open_source(f"tfds:{TFRECORD}", "train")[5]["name"]
    assert name.startswith("tfds:") and name.endswith("example 5 (1.jpg)")


def test_the_index_of_a_tfrecord_file_is_made_once(tmp_path, monkeypatch):
    open_source(f"tfds:{TFRECORD}", "train")
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 2
    monkeypatch.setattr(records, "_scan", None)  # not called again
    assert open_source(f"tfds:{TFRECORD}", "train")[0]["image"] == written()[0][2]


@pytest.mark.parametrize("content", [b"", b"no array", "float", "short"])
def test_a_damaged_index_is_made_again(tmp_path, content):
    open_source(f"tfds:{TFRECORD}", "train")
    for path in (tmp_path / "cache").rglob("*.npy"):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            starts = np.load(path)
            np.save(path, starts * 1.0 if content == "float" else starts[:-1])
    assert open_source(f"tfds:{TFRECORD}", "train")[11]["image"] == written()[11][2]


def test_no_folder_for_the_index_is_no_mistake(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_source(f"tfds:{TFRECORD}", "train")) == 12
    assert "is not kept" in caplog.text


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(TFRECORD, tmp_path / "pets" / "1.0.0")
    return tmp_path / "pets" / "1.0.0"


def test_a_tfrecord_file_that_is_cut_off_or_compressed_is_refused(copy):
    path = next(copy.glob("*-00001-*"))
    whole = path.read_bytes()
    for data in (whole[:-7], whole + b"1234", gzip.compress(whole)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="-00001-of-00002 is cut off, or no uncompressed"):
            open_source(f"tfds:{copy}", "train")


def test_records_that_the_metadata_does_not_know_of_are_refused(copy):
    path = next(copy.glob("*-00001-*"))
    data = path.read_bytes()
    path.write_bytes(data[: struct.unpack("<Q", data[:8])[0] + 16])  # one record of six
    with pytest.raises(UserError, match=r"has 7 records where its dataset_info.json says 12"):
        open_source(f"tfds:{copy}", "train")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_formats_and_features_that_do_not_serve_are_refused(copy):
    change(copy / "dataset_info.json", fileFormat="parquet")
    with pytest.raises(UserError, match=r"is in parquet, which .* file_format='array_record'"):
        open_source(f"tfds:{copy}", "train")
    change(copy / "dataset_info.json", fileFormat="tfrecord")
    features = json.loads((copy / "features.json").read_text())
    del features["featuresDict"]["features"]["label"]
    change(copy / "dataset_info.json", supervisedKeys=None)
    (copy / "features.json").write_text(json.dumps(features))
    with pytest.raises(
        UserError,
        match=r"features (file_name, image|image, file_name); expected an image and a label",
    ):
        open_source(f"tfds:{copy}", "train")


def test_a_label_out_of_range_stops_with_the_example(copy):
    features = json.loads((copy / "features.json").read_text())
    features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "2"
    (copy / "features.json").write_text(json.dumps(features))
    (copy / "label.labels.txt").write_text("a\nb\n")
    read = BatchReader(open_source(f"tfds:{copy}", "train"), Preprocess((8, 8)))
    message = r"example (8|9|10|11) \(\d.jpg\) has the label 2, but there are 2 class names"
    with pytest.raises(UserError, match=message), eval_batches(read, 4) as batches:
        list(batches)


def test_a_record_that_is_no_example_is_a_bad_image(copy):
    path = next(copy.glob("*-00000-*"))
    data = bytearray(path.read_bytes())
    data[12:40] = b"\xff" * 28
    path.write_bytes(data)
    read = BatchReader(open_source(f"tfds:{copy}", "train"), Preprocess((8, 8)), on_corrupt="skip")
    with eval_batches(read, 12) as batches:
        (batch,) = batches
    assert batch["corrupt"].tolist() == [True] + 11 * [False]
    assert batch["mask"].tolist() == [False] + 11 * [True]


@pytest.mark.parametrize(
    "spec, split, message",
    [
        ("tfds:no_such_set", "train", "TFDS finds no prepared data set of that name"),
        ("tfds:/no/such/folder", "train", "there is no such folder"),
        (f"tfds:{TFRECORD}", "tarin", r"no split 'tarin'; did you mean 'train'\?"),
        (f"tfds:{TFRECORD}", "train[:x%]", "no split 'train"),
        (f"records:{TFRECORD}", "train", "has no split 'train'.*prepare"),
        ("records:/no/such/folder", "train", "has no split 'train'.*prepare"),
    ],
)
def test_what_is_not_there_is_named(spec, split, message):
    with pytest.raises(UserError, match=message):
        open_source(spec, split)

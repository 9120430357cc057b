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

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow_datasets
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data.classes import Matched, Relabelled, with_labels
from vit_jax.data.forms import examples, records
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


class Real(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Images with one label and with any number of them: the features of imagenet2012_real."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    labels = ((2,), (0, 1), (), (2, 0, 1), (1,))

    def _info(self):
        features, label = tensorflow_datasets.features, tensorflow_datasets.features.ClassLabel
        kinds = {
            "image": features.Image(encoding_format="jpeg"),
            "original_label": label(names=CLASSES),
            "real_label": features.Sequence(label(names=CLASSES)),
            "file_name": features.Text(),
            "boxes": features.Sequence({"kind": label(num_classes=2)}),
        }
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(kinds),
            supervised_keys=("image", "real_label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for number, labels in enumerate(self.labels):
            _, name, image = written()[number]
            example = {"image": image, "file_name": name, "boxes": [{"kind": 1}] * number}
            yield number, {**example, "original_label": number % 3, "real_label": labels}


@pytest.fixture
def real(tmp_path):
    builder = Real(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    return f"tfds:{builder.data_dir}"


def test_a_feature_may_be_chosen_as_the_label(real):
    plain = open_source(real, "validation")
    one, several = (
        open_source(f"{real},label={key}", "validation") for key in ("original_label", "real_label")
    )
    assert [each.multi_label for each in (plain, one, several)] == [False, False, True]
    for index, labels in enumerate(Real.labels):
        assert plain[index]["label"] == one[index]["label"] == index % 3
        assert several[index]["label"] == labels
        assert plain[index]["image"] == several[index]["image"] == written()[index][2]
    assert plain.label_names == one.label_names == several.label_names == CLASSES
    assert len({each.fingerprint for each in (plain, one, several)}) == 3
    copy = pickle.loads(pickle.dumps(several))
    assert copy.multi_label and copy[2]["label"] == ()


def test_several_labels_become_those_of_a_model(real):
    source = open_source(f"{real},label=real_label", "validation")
    names = ("Bombay", *reversed(CLASSES))
    other = with_labels(source, names)
    assert other.multi_label and other.label_names == names
    assert [other[i]["label"] for i in range(5)] == [(1,), (3, 2), (), (1, 3, 2), (2,)]
    short = Relabelled(source, Matched(CLASSES[:2], names, (3, 2), ""))
    assert short[0]["label"] == (-1,)  # reported where it is read
    assert not with_labels(open_source(real, "validation"), names).multi_label


def test_a_label_may_be_chosen_in_a_folder_whose_name_has_a_comma(copy, tmp_path):
    (tmp_path / "a,label=b").symlink_to(copy)
    for spec in (f"{tmp_path}/a,label=b", f"{tmp_path}/a,label=b,label=label"):
        assert open_source(f"tfds:{spec}", "train")[7]["label"] == 1


def test_fingerprints_do_not_change():
    """Runs that resume hang on them."""
    splits = {"train": "de4aa8102c33e742", "train[:3]+train[9:]": "0838bde69c67d682"}
    for split, expected in splits.items():
        assert open_source(f"tfds:{TFRECORD}", split).fingerprint == expected
    chosen = open_source(f"tfds:{TFRECORD},label=label", "train")
    assert chosen.fingerprint != splits["train"] and chosen[7]["label"] == 1


@pytest.mark.parametrize(
    "option, message",
    [
        ("label=real_lable", r"has no class label 'real_lable'; did you mean 'real_label'\?"),
        ("label=image", "has no class label 'image'; known: original_label, real_label"),
        ("label=boxes", "has no class label 'boxes'; known: original_label, real_label"),
        ("label=boxes/kind", "has no class label 'boxes/kind'"),
        ("label=", "has no class label ''; known: original_label, real_label"),
        ("lable=real_label", r"has no option 'lable'; did you mean 'label'\?"),
        ("split=train", "has no option 'split'; known: label"),
    ],
)
def test_a_label_or_an_option_that_is_not_there_is_named(real, option, message):
    with pytest.raises(UserError, match=message):
        open_source(f"{real},{option}", "validation")


def number(value):
    """A varint, written as the format has it."""
    value, out = value % 2**64, b""
    while value > 127:
        value, out = value >> 7, out + bytes([value % 128 + 128])
    return out + bytes([value])


def message(field, data):
    return number(field * 8 + 2) + number(len(data)) + data


LISTS = {
    "bytes_list": st.lists(st.binary(max_size=9), max_size=4),
    "float_list": st.lists(st.floats(width=32), max_size=9),
    "int64_list": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9),
}
FEATURES = st.dictionaries(
    st.text(max_size=3),
    st.sampled_from(list(LISTS)).flatmap(lambda kind: st.tuples(st.just(kind), LISTS[kind])),
    max_size=4,
)


def unpacked(features):
    """The message with each number of a list as a field of its own."""
    entries = b""
    for name, (kind, values) in features.items():
        field, one = {
            "bytes_list": (1, lambda value: message(1, value)),
            "float_list": (2, lambda value: bytes([8 + 5]) + struct.pack("<f", value)),
            "int64_list": (3, lambda value: bytes([8]) + number(value)),
        }[kind]
        values = message(field, b"".join(map(one, values)))
        entries += message(1, message(1, name.encode()) + message(2, values))
    return message(1, entries)


@hypothesis.settings(deadline=None)
@hypothesis.given(FEATURES, st.data())
def test_all_values_of_a_feature_are_those_that_protobuf_reads(features, data):
    example = tf_example_pb2.Example()
    for name, (kind, values) in features.items():
        example.features.feature[name].ClearField("kind")
        getattr(example.features.feature[name], kind).value.extend(values)
    packed = example.SerializeToString()
    for record in (packed, unpacked(features)):
        parsed = tf_example_pb2.Example.FromString(record).features.feature
        assert set(parsed) == set(features)
        for name in features:
            (_, values), *_ = [(k.name, v.value) for k, v in parsed[name].ListFields()] or [
                ("", [])
            ]
            found = examples.feature_values(record, name)
            assert np.array_equal(found, values, equal_nan=features[name][0] == "float_list")
            assert [type(one) for one in found] == [type(one) for one in values]
            first = examples.parse_example(record)[name]
            if features[name][0] != "float_list":
                assert first == (found[0] if found else None)
        assert examples.feature_values(record, "none of them") == []
        # A damaged one is said to be, or gives other values.
        cut = data.draw(st.integers(0, len(record)))
        broken = bytearray(record[:cut])
        for _ in range(data.draw(st.integers(0, 2)) if broken else 0):
            broken[data.draw(st.integers(0, cut - 1))] = data.draw(st.integers(0, 255))
        for name in features:
            try:
                assert isinstance(examples.feature_values(bytes(broken), name), list)
            except ValueError:
                pass


@pytest.mark.parametrize(
    "data",
    [
        message(1, message(1, message(1, b"a") + message(2, message(3, message(1, b"\x01\xff"))))),
        message(1, message(1, message(1, b"a") + message(2, message(2, message(1, b"123"))))),
        message(1, message(1, message(1, b"a") + message(2, message(3, b"\x08\xff")))),
        message(1, message(1, message(1, b"a") + bytes([16, 5]))),
        message(1, message(1, bytes([8, 5]) + message(2, b""))),
        message(1, b"\x0a\x7f"),
        bytes([8, 5]),
    ],
)
def test_a_list_that_is_damaged_is_refused(data):
    with pytest.raises(ValueError, match=r"tf\.train\.Example|multiple of element size"):
        examples.feature_values(data, "a")

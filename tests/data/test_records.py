"""Prepared data sets: what TensorFlow and TFDS wrote is read without TensorFlow.

`files/tfds/pets/1.0.0` was written by tensorflow-datasets 4.9.10 with TensorFlow 2.21, as two
TFRecord files: twelve JPEGs of three classes, in the order of their paths (`disable_shuffling`).
"""

import functools
import gzip
import json
import pickle
import shutil
import struct
import sys
from pathlib import Path

import fake_tfds
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from made import refused, tree
from tensorflow_datasets.core import features
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data.classes import Matched, Relabelled, with_labels
from vit_jax.data.forms import examples, records, tfds
from vit_jax.data.forms.records import RecordSource
from vit_jax.data.pipeline import BatchReader, eval_batches, train_batches
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import InceptionCrop, Preprocess
from vit_jax.errors import UserError

TFRECORD = Path(__file__).parent / "files" / "tfds" / "pets" / "1.0.0"
CLASSES = ("Abyssinian", "Chat égyptien", "Maine Coon")


@functools.cache
def stored():
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


@pytest.fixture(scope="module")
def array_record(tmp_path_factory):
    """The same images, as TFDS writes ArrayRecord."""
    kinds = {"image": features.Image(), "label": features.ClassLabel(names=CLASSES)}
    splits = {"train": (12, lambda i: {"image": stored()[i][2], "label": stored()[i][0]})}
    pair = ("image", "label")
    folder = tmp_path_factory.mktemp("tfds")
    return fake_tfds.write(folder, "pets", "1.0.0", kinds, splits, pair).data_dir


def test_one_set_of_images_in_four_forms_gives_the_same_batches(array_record, tmp_path):
    files = {f"{CLASSES[label]}/{name}": image for label, name, image in stored()}
    as_folder = tree(tmp_path / "pets", files)
    prepare(str(as_folder), str(tmp_path / "shards"), shard_examples=5)
    specs = [f"tfds:{TFRECORD}", f"tfds:{array_record}", f"records:{tmp_path / 'shards'}"]
    found = []
    for spec in (f"folder:{as_folder}", *specs):
        source = open_source(spec, "all" if spec.startswith("folder") else "train")
        assert source.label_names == CLASSES
        assert [(e["label"], e["image"]) for e in map(source.__getitem__, range(12))] == [
            (label, image) for label, _, image in stored()
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


def test_a_slice_of_a_split_is_what_tfds_says(array_record):
    for split, rows in [
        ("train[:50%]", range(6)),
        ("train[25%:]", range(3, 12)),
        ("train[5:7]", range(5, 7)),
        ("train[-2:]", range(10, 12)),
        ("train[:3]+train[9:]", (0, 1, 2, 9, 10, 11)),
    ]:
        for path in (TFRECORD, array_record):
            source = open_source(f"tfds:{path}", split)
            expected = [stored()[row][2] for row in rows]
            assert [source[i]["image"] for i in range(len(source))] == expected
            assert source.fingerprint != open_source(f"tfds:{path}", "train").fingerprint
            copy = pickle.loads(pickle.dumps(source))
            assert copy[1]["image"] == expected[1] and copy.fingerprint == source.fingerprint


def test_a_data_set_is_found_by_its_name_and_names_its_examples(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(TFRECORD.parents[1]))
    for spec in ("tfds:pets", "tfds:pets:1.0.0", f"tfds:{TFRECORD.parent}"):
        assert open_source(spec, "train")[7]["label"] == 1
    name = open_source(f"tfds:{TFRECORD}", "train")[5]["name"]
    assert name.startswith("tfds:") and name.endswith("example 5 (1.jpg)")


def test_the_index_of_a_tfrecord_file_is_made_once(tmp_path, monkeypatch, caplog):
    def image(row):
        return open_source(f"tfds:{TFRECORD}", "train")[row]["image"]

    assert image(0) == stored()[0][2]
    indices = list((tmp_path / "cache").rglob("*.npy"))
    assert len(indices) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tfds, "_scan", None)  # not called again
        assert image(0) == stored()[0][2]
    for damage in (  # it is made again
        lambda path, whole: path.write_bytes(b""),
        lambda path, whole: path.write_bytes(b"no array"),
        lambda path, whole: path.write_bytes(whole[:-8]),
        lambda path, whole: path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])),
    ):
        for path in indices:
            damage(path, path.read_bytes())
        assert image(11) == stored()[11][2]
    assert "is not kept" not in caplog.text
    (tmp_path / "file").write_text("")  # no folder for it is no mistake
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert image(11) == stored()[11][2] and "is not kept" in caplog.text


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(TFRECORD, tmp_path / "pets" / "1.0.0")
    return tmp_path / "pets" / "1.0.0"


def test_what_is_no_whole_set_of_use_is_refused(copy):
    def change(**fields):
        path = copy / "dataset_info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    path = next(copy.glob("*-00001-*"))
    whole = path.read_bytes()
    one = whole[: struct.unpack("<Q", whole[:8])[0] + 16]  # record of six
    cut = "-00001-of-00002 is cut off, or no uncompressed"
    cases = [(data, cut) for data in (whole[:-7], whole + b"1234", gzip.compress(whole))]
    cases += [(one, "has 7 records where its dataset_info.json says 12")]
    refused(lambda data: (path.write_bytes(data), open_source(f"tfds:{copy}", "train")), cases)
    change(fileFormat="parquet")
    with pytest.raises(UserError, match=r"is in parquet, which .* file_format='array_record'"):
        open_source(f"tfds:{copy}", "train")
    change(fileFormat="tfrecord", supervisedKeys=None)
    features = json.loads((copy / "features.json").read_text())
    del features["featuresDict"]["features"]["label"]
    (copy / "features.json").write_text(json.dumps(features))
    message = "features (file_name, image|image, file_name); expected an image and a label"
    with pytest.raises(UserError, match=message):
        open_source(f"tfds:{copy}", "train")


def test_a_label_out_of_range_stops_with_the_example(copy):
    features = json.loads((copy / "features.json").read_text())
    features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "2"
    (copy / "features.json").write_text(json.dumps(features))
    (copy / "label.labels.txt").write_text("a\nb\n")
    read = BatchReader(open_source(f"tfds:{copy}", "train"), Preprocess((8, 8)))
    message = r"example (8|9|10|11) \(\d.jpg\) has the label 2, but there are 2 class names"
    with pytest.raises(UserError, match=message):
        read(np.arange(12), np.arange(12))


def test_a_record_that_is_no_example_is_a_bad_image(copy):
    path = next(copy.glob("*-00000-*"))
    data = bytearray(path.read_bytes())
    data[12:40] = b"\xff" * 28
    path.write_bytes(data)
    read = BatchReader(open_source(f"tfds:{copy}", "train"), Preprocess((8, 8)), on_corrupt="skip")
    batch = read(np.arange(12), np.arange(12))
    assert batch["corrupt"].tolist() == [True] + 11 * [False]
    assert batch["mask"].tolist() == [False] + 11 * [True]


def test_what_is_not_there_is_named():
    cases = [
        ("tfds:no_such_set", "train", "TFDS finds no prepared data set of that name"),
        ("tfds:/no/such/folder", "train", "there is no such folder"),
        (f"tfds:{TFRECORD}", "tarin", r"no split 'tarin'; did you mean 'train'\?"),
        (f"tfds:{TFRECORD}", "train[:x%]", "no split 'train"),
        (f"records:{TFRECORD}", "train", "has no split 'train'.*prepare"),
        ("records:/no/such/folder", "train", "has no split 'train'.*prepare"),
    ]
    refused(open_source, cases)


LABELS = ((2,), (0, 1), (), (2, 0, 1), (1,))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Images with one label and with any number of them: the features of imagenet2012_real."""
    label = features.ClassLabel
    kinds = {
        "image": features.Image(encoding_format="jpeg"),
        "original_label": label(names=CLASSES),
        "real_label": features.Sequence(label(names=CLASSES)),
        "file_name": features.Text(),
        "boxes": features.Sequence({"kind": label(num_classes=2)}),
    }

    def example(i):
        _, name, image = stored()[i]
        labels = {"original_label": i % 3, "real_label": LABELS[i]}
        return {"image": image, "file_name": name, "boxes": [{"kind": 1}] * i, **labels}

    folder, splits = tmp_path_factory.mktemp("tfds"), {"validation": (5, example)}
    pair = ("image", "real_label")
    return f"tfds:{fake_tfds.write(folder, 'real', '1.0.0', kinds, splits, pair).data_dir}"


def test_a_feature_may_be_chosen_as_the_label(real):
    plain = open_source(real, "validation")
    one, several = (
        open_source(f"{real},label={key}", "validation") for key in ("original_label", "real_label")
    )
    assert [each.multi_label for each in (plain, one, several)] == [False, False, True]
    for index, labels in enumerate(LABELS):
        assert plain[index]["label"] == one[index]["label"] == index % 3
        assert several[index]["label"] == labels
        assert plain[index]["image"] == several[index]["image"] == stored()[index][2]
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


def test_a_label_or_an_option_that_is_not_there_is_named(real):
    cases = [
        ("label=real_lable", r"has no class label 'real_lable'; did you mean 'real_label'\?"),
        ("label=image", "has no class label 'image'; known: original_label, real_label"),
        ("label=boxes", "has no class label 'boxes'; known: original_label, real_label"),
        ("label=boxes/kind", "has no class label 'boxes/kind'"),
        ("label=", "label= once, and with a value, was expected"),
        ("lable=real_label", r"an option 'lable'; did you mean 'label'\?"),
        ("split=train", "an option 'split'; known: classes, colours"),
    ]
    refused(lambda option: open_source(f"{real},{option}", "validation"), cases)


# --------------------------------------------------------------------------------------- examples

Example = tf_example_pb2.Example
SETTINGS = hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=40)
INT64 = st.integers(-(2**63), 2**63 - 1)
NAME = st.text("a/é猫😀\0", max_size=20)  # of all characters, it makes a table first


def varint(value):
    value %= 2**64
    return (bytes([value & 127 | 128]) + varint(value >> 7)) if value > 127 else bytes([value])


def field(number, data):
    """A field of bytes, or, of an int, of a number."""
    if isinstance(data, int):
        return varint(number << 3) + varint(data)
    return varint(number << 3 | 2) + varint(len(data)) + data


def list_of(kind, values, packed):
    """A feature's values, numbers packed or one by one."""
    if kind == 0:
        return field(1, b"".join(field(1, each) for each in values))
    if packed:
        data = struct.pack(f"<{len(values)}f", *values) if kind == 1 else map(varint, values)
        return field(kind + 1, field(1, data if kind == 1 else b"".join(data)))
    one = [lambda v: b"\x0d" + struct.pack("<f", v), lambda v: b"\x08" + varint(v)][kind - 1]
    return field(kind + 1, b"".join(map(one, values)))


VALUES = [st.binary(max_size=200), st.floats(width=32), INT64]
FEATURES = st.lists(
    st.tuples(NAME, st.sampled_from(range(3)), st.booleans(), st.booleans()).flatmap(
        lambda told: st.tuples(st.just(told), st.lists(VALUES[told[1]], max_size=4))
    ),
    max_size=5,
)


@SETTINGS
@hypothesis.given(FEATURES, st.booleans(), st.data())
def test_examples_are_read_as_protobuf_does(entries, empty, data):
    """Features in any order, name or value first, one twice, one without values."""
    wire = field(1, field(1, b"empty") + field(2, b"")) if empty else b""
    for (name, kind, packed, name_last), values in entries:
        parts = [field(1, name.encode()), field(2, list_of(kind, values, packed))]
        wire += field(1, b"".join(reversed(parts) if name_last else parts))
    wire = field(1, wire)
    first = {}
    for name, feature in Example.FromString(wire).features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        found = examples.feature_values(wire, name)
        assert np.array_equal(found, values, equal_nan=kind == "float_list")
        assert [type(one) for one in found] == [type(one) for one in values]
        first[name] = values[0] if values and kind != "float_list" else None
    assert examples.parse_example(wire) == first
    assert examples.feature_values(wire, "none of them") == []
    # A damaged one is said to be, or gives other values.
    cut = data.draw(st.integers(0, len(wire)))
    broken = bytearray(wire[:cut])
    for _ in range(data.draw(st.integers(0, 2)) if broken else 0):
        broken[data.draw(st.integers(0, cut - 1))] = data.draw(st.integers(0, 255))
    for name in first:
        try:
            assert isinstance(examples.feature_values(bytes(broken), name), list)
        except ValueError:
            pass


@SETTINGS
@hypothesis.given(st.dictionaries(NAME, st.binary(max_size=300) | INT64, max_size=6))
def test_an_example_is_written_as_protobuf_would(features):
    wire, entries = examples.write_example(features), b""
    assert examples.parse_example(wire) == features
    for name in sorted(features):
        one, value = type(Example().features)(), features[name]
        kind = "bytes_list" if isinstance(value, bytes) else "int64_list"
        getattr(one.feature[name], kind).value.append(value)
        entries += one.SerializeToString()
    assert wire == field(1, entries)


def test_a_list_that_is_damaged_is_refused():
    message = r"tf\.train\.Example|multiple of element size"
    for data in (
        field(1, field(1, field(1, b"a") + field(2, field(3, field(1, b"\x01\xff"))))),
        field(1, field(1, field(1, b"a") + field(2, field(2, field(1, b"123"))))),
        field(1, field(1, field(1, b"a") + field(2, field(3, b"\x08\xff")))),
        field(1, field(1, field(1, b"a") + field(2, 5))),
        field(1, field(1, field(1, 5) + field(2, b""))),
        field(1, b"\x0a\x7f"),
        field(1, 5),
    ):
        with pytest.raises(ValueError, match=message):
            examples.feature_values(data, "a")


SOUND = examples.write_example({"image": stored()[0][2], "label": 1, "name": "ñ.jpg".encode()})
DEEP = field(1, field(1, field(2, field(1, field(1, 1)))))
DAMAGED = [field(1, 1), field(1, field(1, 1)), field(1, field(1, field(1, 1)))]
DAMAGED += [field(1, field(1, field(2, data))) for data in (1, b"\xff")]
DAMAGED += [DEEP, b"\xff" * 12]


@SETTINGS
@hypothesis.given(
    st.binary(max_size=60)
    | st.integers(0, len(SOUND)).map(lambda n: SOUND[:n])
    | st.tuples(st.integers(0, len(SOUND) - 1), st.integers(1, 255)).map(
        lambda at: SOUND[: at[0]] + bytes([SOUND[at[0]] ^ at[1]]) + SOUND[at[0] + 1 :]
    )
)
def test_garbage_is_a_bad_image_and_no_bug(data):
    source = RecordSource([data], records.FEATURES, "here", ("a",), "")
    try:
        example = source[0]
    except UserError as error:
        assert str(error).startswith("here, example 0")
    else:
        assert isinstance(example["image"], bytes) and isinstance(example["label"], int)


for damaged in DAMAGED:
    test_garbage_is_a_bad_image_and_no_bug = hypothesis.example(damaged)(
        test_garbage_is_a_bad_image_and_no_bug
    )

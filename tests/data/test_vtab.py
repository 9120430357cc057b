"""VTAB's 19 tasks, on data sets that TFDS itself wrote, with the features of its own builders.

Labels and splits are written out again below, in NumPy and in TFDS's words, from the reference
code (google-research/task_adaptation at commit ed9b417) and the data sets' published sizes.
"""

import dataclasses
import functools
import pickle
import sys

import fake_tfds
import numpy as np
import pytest
import tensorflow_datasets
from made import refused
from tensorflow_datasets.core import features

from vit_jax.data.forms.vtab import SPLITS, TASKS
from vit_jax.data.images import BadImage, decode, encode
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError

ClassLabel, Image, Text = features.ClassLabel, features.Image, features.Text
F32 = np.float32


def write(folder, name, kinds, splits, shards=None):
    return fake_tfds.write(folder, name, "3.0.0", kinds, splits, shards=shards)


# The features beside the image, those that matter of each data set, and what example i has of them.


def plain(text, classes, **more):
    def example(i):
        return {text: f"{i}.jpg", "label": i * 7 % classes} | dict.fromkeys(more, i % 2)

    return {text: Text(), "label": ClassLabel(num_classes=classes), **more}, example


def beside(value, end):
    return np.nextafter(F32(value), F32(end))


# Distances, on and beside the bounds and between two float32 numbers, and what they make.
CLEVR_CASES = [
    ((8.0, 9.0, 12.0), 0),
    ((beside(8, 0), 12.0, 11.0), 0),
    ((30.0, 8.000001, 20.0), 1),
    ((8.0000001, 9.0, 9.0), 0),  # 8 as a float32
    ((8.5, 10.5, 13.1, 9.0), 1),
    ((8.5 + 1e-6, 10.5, 13.1, 9.0), 2),
    ((9.1, 9.0, 9.2, 9.3, 9.4), 2),
    ((9.1, 9.2, 9.3, 9.7, 11.0, 12.3), 3),
    ((9.5, 9.6, 9.7, 9.8, 9.9, 10.0, 11.0), 3),
    ((10.0, 10.0, 10.1, 10.2, 10.3, 10.4, 11.0, 12.0), 4),
    ((beside(10, 99), 10.1, 10.2, 10.3, 10.4, 11.0, 12.0, 13.0, 14.0), 5),
    ((99.9, 100.0, 1e4, *[100.0] * 7), 5),
]
KITTI_CASES = [
    ((), 3),
    ((("Pedestrian", 3.0), ("Cyclist", 4.0), ("Tram", 5.0), ("Misc", 1.0)), 3),
    ((("Person_sitting", 3.0), ("Car", 8.0)), 0),
    ((("Car", 30.0), ("Van", beside(8, 0)), ("Pedestrian", -3.0)), 0),
    ((("Car", 30.0), ("Truck", 8.000001)), 1),
    ((("Truck", 8.0000001),), 0),
    ((("Van", 20.0),), 1),
    ((("Tram", 1.0), ("Van", 20.000002)), 2),
    ((("Car", -4.6),), 0),
    ((("Car", 76.31), ("Car", 999.0)), 2),
    ((("Car", 1200.0),), 3),
]


def clevr(i):
    distances, _ = CLEVR_CASES[i % len(CLEVR_CASES)]
    one = {"size": "large", "shape": "cube", "rotation": 0.1, "3d_coords": [1, 2, 3]}
    objects = [one | {"pixel_coords": [7.0, 11.0 * i, distance]} for distance in distances]
    asked = [{"question": "How many?", "answer": "3"}] * (i % 3)
    return {"file_name": f"{i}.png", "objects": objects, "question_answer": asked}


def kitti(i):
    place = {"truncated": 0.0, "dimensions": [1.5, 1.6, 3.9]}
    objects, _ = KITTI_CASES[i % len(KITTI_CASES)]
    objects = [place | {"type": kind, "location": [-1.5, 1.5, z]} for kind, z in objects]
    return {"image/file_name": f"{i}.png", "objects": objects}


def floats(*shape):
    return features.Tensor(shape=shape, dtype=F32)


VEHICLES = ["Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc"]
CLEVR_OBJECT = {
    "size": ClassLabel(names=["small", "large"]),
    "shape": ClassLabel(names=["cube", "sphere", "cylinder"]),
    **{"rotation": floats(), "3d_coords": floats(3), "pixel_coords": floats(3)},
}
CLEVR = {
    "file_name": Text(),
    "objects": features.Sequence(CLEVR_OBJECT),
    "question_answer": features.Sequence({"question": Text(), "answer": Text()}),
}
KITTI_OBJECT = {"type": ClassLabel(names=VEHICLES), "truncated": floats()}
KITTI_OBJECT |= {"dimensions": floats(3), "location": floats(3)}
KITTI = {"image/file_name": Text(), "objects": features.Sequence(KITTI_OBJECT)}
DSPRITES = {
    **{"id": Text(), "label_orientation": ClassLabel(num_classes=40)},
    **{f"label_{axis}_position": ClassLabel(num_classes=32) for axis in "xy"},
    "value_orientation": floats(),
}
NORB = {"image2": Image(shape=(96, 96, 1))}
NORB |= {"label_category": ClassLabel(num_classes=5), "label_elevation": ClassLabel(num_classes=9)}
NORB["label_azimuth"] = ClassLabel(num_classes=18)


def dsprites(i):
    turn, x = i % 40, i * 3 % 32
    return {
        **{"id": f"{i:06d}", "label_orientation": turn, "label_x_position": x},
        **{"label_y_position": 5, "value_orientation": turn / 39 * 2 * np.pi},
    }


def norb(i):
    labels = {"label_category": i % 5, "label_elevation": i % 9, "label_azimuth": i % 18}
    return {"image2": grey(i), **labels}


# Each data set: its features, example i, how many each split has, and what its val, trainval and
# test are called, or where its train and its val end. Two have the 1,000 images of VTAB-1k.
COARSE, SPECIES = ClassLabel(num_classes=20), ClassLabel(names=["cat", "dog"])
PETS, HALVES = {"train": 1013, "test": 5}, "test[:50%] train+test[:50%] test[50%:]"
OWN, FEW = "validation train+validation test", {"train": 24, "validation": 23, "test": 7}
SETS = {
    "caltech101": (*plain("image/file_name", 102), {"train": 29, "test": 5}, (26, 29)),
    "cifar100": (*plain("id", 100, coarse_label=COARSE), {"train": 31, "test": 5}, (27, 31)),
    "dtd": (*plain("file_name", 47), FEW, OWN),
    "oxford_flowers102": (*plain("file_name", 102), FEW, OWN),
    "oxford_iiit_pet": (*plain("file_name", 37, species=SPECIES), PETS, (810, 1013)),
    "sun397/tfds": (*plain("file_name", 397), FEW, OWN),
    "svhn_cropped": (*plain("id", 10), {"train": 29, "test": 5, "extra": 3}, (26, 29)),
    "patch_camelyon": (*plain("id", 2), FEW, OWN),
    "eurosat/rgb": (*plain("filename", 10), {"train": 34}, (20, 26)),
    "resisc45": (*plain("filename", 45), {"train": 29}, (17, 22)),
    "diabetic_retinopathy_detection/btgraham-300": (*plain("name", 5), FEW, OWN),
    "clevr": (CLEVR, clevr, {"train": 29, "validation": 12, "test": 5}, (26, 29)),
    "dmlab": (*plain("filename", 6), FEW, OWN),
    "kitti": (KITTI, kitti, FEW, OWN),
    "dsprites": (DSPRITES, dsprites, {"train": 109}, (87, 97)),
    "smallnorb": (NORB, norb, {"train": 803, "test": 405}, HALVES),
}


def names_of_splits(name):
    """What TFDS calls its train, val, trainval, test and val200."""
    *_, sizes, splits = SETS[name]
    if isinstance(splits, str):
        return "train", *splits.split(), f"{splits.split()[0].removesuffix('[:50%]')}[:200]"
    val, end = splits
    trainval = "train" if end == sizes["train"] else f"train[:{end}]"
    test = "validation" if name == "clevr" else "test" if "test" in sizes else f"train[{end}:]"
    middle = f"train[{val}:]" if end == sizes["train"] else f"train[{val}:{end}]"
    return f"train[:{val}]", middle, trainval, test, f"train[{val}:{val + 200}]"


@functools.cache
def grey(i):
    """A PNG of 0 and 1, one of eleven."""
    return encode(np.random.default_rng(i % 11).integers(0, 2, (3, 4, 1), np.uint8))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Writes a data set at its first use."""
    folder = tmp_path_factory.mktemp("vtab")

    @functools.cache
    def make(name):
        kinds, example, sizes, _ = SETS[name]
        starts = np.cumsum([0, *sizes.values()]).tolist()
        splits = {
            split: (n, lambda i, start=start: {"image": grey(start + i), **example(start + i)})
            for (split, n), start in zip(sizes.items(), starts, strict=False)
        }
        return write(folder, name, {"image": Image(), **kinds}, splits, 3)

    return make


@pytest.fixture
def opened(made, monkeypatch):
    def open_task(task, split):
        folder = made(TASKS[task].data).data_dir
        root = folder[: folder.rindex(f"/{TASKS[task].data}/")]
        monkeypatch.setenv("TFDS_DATA_DIR", root)
        return open_source(f"vtab:{task}", split)

    yield open_task
    assert "tensorflow" not in sys.modules


# The reference's labels, from what TFDS reads.


def interval(value, bounds):
    return np.flatnonzero((F32(bounds) - F32(value)) < 0).max()


def kitti_distance(example):
    types, places = example["objects"]["type"], example["objects"]["location"]
    z = np.array(places, F32).reshape(-1, 3)[np.array(types, int) < 3, 2]
    return interval(np.append(z, F32(1000)).min(), [-100, 8, 20, 999])


def grouped(key, classes):
    return lambda example: np.floor(F32(example[key]) / F32(classes / 16))


LABELS = {
    "clevr_count": lambda example: len(example["objects"]["size"]) - 3,
    "clevr_distance": lambda example: interval(
        np.min(np.array(example["objects"]["pixel_coords"])[:, 2]), [0, 8, 8.5, 9, 9.5, 10, 100]
    ),
    "kitti_distance": kitti_distance,
    "dsprites_location": grouped("label_x_position", 32),
    "dsprites_orientation": grouped("label_orientation", 40),
    "smallnorb_azimuth": lambda example: example["label_azimuth"],
    "smallnorb_elevation": lambda example: example["label_elevation"],
}
CLASSES = {
    **{"caltech101": 102, "cifar100": 100, "dtd": 47, "flowers102": 102, "pets": 37, "sun397": 397},
    **{"svhn": 10, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5},
    **{"clevr_count": 8, "clevr_distance": 6, "dmlab": 6, "kitti_distance": 4},
    **{"dsprites_location": 16, "dsprites_orientation": 16},
    **{"smallnorb_azimuth": 18, "smallnorb_elevation": 9},
}


def test_there_are_nineteen_tasks_in_three_groups():
    assert list(TASKS) == list(CLASSES)
    groups = [task.group for task in TASKS.values()]
    assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8
    assert {task.data for task in TASKS.values()} == set(SETS)


@pytest.mark.parametrize("task", CLASSES)
def test_examples_and_labels_are_those_of_the_reference(task, made, opened):
    builder = made(TASKS[task].data)
    train, val, trainval, test, val200 = names_of_splits(TASKS[task].data)
    parts = {"train": train, "val": val, "trainval": trainval, "test": test}
    parts |= {"train800": "train[:800]", "val200": val200}
    parts["train800val200"] = f"train[:800]+{val200}"
    assert SPLITS == tuple(parts)
    text = next((key for key, kind in builder.info.features.items() if type(kind) is Text), None)
    fingerprints = set()
    for split, part in parts.items():
        if "00" in split and builder.info.splits["train"].num_examples < 800:
            continue
        source = opened(task, split)
        skip = {key: tensorflow_datasets.decode.SkipDecoding() for key in ("image", "image2")}
        expected = builder.as_data_source(
            part, decoders={key: skip[key] for key in skip if key in builder.info.features}
        )
        thousand = {"train800": 800, "val200": 200, "train800val200": 1000}
        assert len(source) == len(expected) == thousand.get(split, len(expected))
        step = len(source) // 8 + 1
        for index in [*range(0, len(source), step), len(source) - 1]:
            example, true = source[index], expected[index]
            assert type(example["label"]) is int
            assert example["label"] == LABELS.get(task, lambda each: each["label"])(true)
            if text:
                assert example["file"] == true[text].decode()
            assert example["name"].startswith(f"vtab:{task} {split}, example {index}")
            if not task.startswith("dsprites"):
                assert example["image"] == true["image"]
            else:
                assert example["image"].dtype == np.uint8
                assert (example["image"] == np.where(decode(true["image"]) == 1, 255, 0)).all()
        assert source.fingerprint not in fingerprints
        fingerprints.add(source.fingerprint)
    if builder.info.splits["train"].num_examples < 800:
        with pytest.raises(UserError, match=r"has no split 'train\[:800\].* incompatible with"):
            opened(task, "train800val200")
    names = source.label_names
    assert len(set(names)) == len(names) == CLASSES[task]


def cases(opened, task, given):
    """The labels of examples, by the number of the case that they are made of."""
    source = opened(task, "trainval")
    found = {}
    for example in map(source.__getitem__, range(len(source))):
        found[int(example["file"].split(".")[0]) % len(given)] = example["label"]
    return [found[case] for case in range(len(given))]


def test_distances_on_and_beside_the_bounds(opened):
    """The same once more, by hand."""
    found = cases(opened, "clevr_distance", CLEVR_CASES)
    assert found == [label for _, label in CLEVR_CASES]
    assert cases(opened, "clevr_count", CLEVR_CASES) == [0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]
    found = cases(opened, "kitti_distance", KITTI_CASES)
    assert found == [label for _, label in KITTI_CASES]


# What the reference's formats become at the published number of training examples.
PUBLISHED = {
    "caltech101": (3059, "train[:2753] train[2753:] test train[2753:2953]"),
    "cifar100": (50000, "train[:45000] train[45000:] test train[45000:45200]"),
    "pets": (3680, "train[:2944] train[2944:] test train[2944:3144]"),
    "svhn": (73257, "train[:65931] train[65931:] test train[65931:66131]"),
    "eurosat": (27000, "train[:16200] train[16200:21600] train[21600:] train[16200:16400]"),
    "resisc45": (31500, "train[:18900] train[18900:25200] train[25200:] train[18900:19100]"),
    "clevr_count": (70000, "train[:63000] train[63000:] validation train[63000:63200]"),
}
for own in ("dtd", "flowers102", "sun397", "patch_camelyon", "diabetic_retinopathy", "dmlab"):
    PUBLISHED[own] = (1000, "train validation test validation[:200]")
PUBLISHED["kitti_distance"] = PUBLISHED["dtd"]
PUBLISHED["smallnorb_azimuth"] = (24300, "train test[:50%] test[50%:] test[:200]")
PUBLISHED["dsprites_location"] = (
    *(737280, "train[:589824] train[589824:663552] train[663552:] train[589824:590024]"),
)


def test_the_splits_of_the_true_sizes():
    for task, (n, expected) in PUBLISHED.items():
        assert TASKS[task].parts(n) == tuple(expected.split()), task


def test_names_of_derived_classes(opened):
    assert opened("clevr_count", "test").label_names == tuple("3 4 5 6 7 8 9 10".split())
    names = opened("dsprites_orientation", "test").label_names
    for angle in range(40):
        low, high = names[int(angle // 2.5)].split(" to ")
        assert int(low) <= angle <= int(high)


def test_a_source_is_small_and_the_same_in_another_process(opened):
    for task in ("clevr_distance", "dsprites_location", "dtd"):
        source = opened(task, "trainval")
        data = pickle.dumps(source)
        copy = pickle.loads(data)
        assert len(data) < 20_000
        assert copy.fingerprint == source.fingerprint and copy[21]["label"] == source[21]["label"]
        assert np.array_equal(copy[20]["image"], source[20]["image"])


def test_fingerprints_name_the_task(opened):
    tasks = ("clevr_count", "clevr_distance", "smallnorb_azimuth", "smallnorb_elevation")
    found = [opened(task, "val").fingerprint for task in tasks]
    assert len(set(found)) == 4
    assert found == [opened(task, "val").fingerprint for task in tasks]
    assert opened("dtd", "val").fingerprint != open_source("tfds:dtd", "validation").fingerprint


def test_white_is_white_in_a_batch(opened):
    source = opened("dsprites_location", "val")
    batch = BatchReader(source, Preprocess((3, 4)))(np.arange(10), np.arange(10))
    assert batch["image"].shape == (10, 3, 4, 3) and set(np.unique(batch["image"])) == {0, 255}
    assert batch["label"].tolist() == [source[i]["label"] for i in range(10)]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Writes a data set of the test's own, of so many examples a split."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    def make(name, kinds, n, example, *splits):
        kinds = {"image": Image(), **kinds}
        write(tmp_path, name, kinds, dict.fromkeys(splits, (n, example)))

    return make


def test_what_is_not_there_is_named(small):
    cases = [
        ("vtab:clevr_cuont", "train", r"no task 'clevr_cuont'; did you mean 'clevr_count'\?"),
        ("vtab", "train", "no task ''; known: caltech101, cifar100, "),
        ("vtab:dtd", "validation", "vtab:dtd has no split 'validation'; "),
        ("vtab:dtd", "train80", r"did you mean 'train800'\?"),
        ("vtab:dtd", "train[:10]", "has no split"),
        ("vtab:dtd", "val", r"vtab:dtd \(tfds:dtd\): TFDS finds no prepared data set of that name"),
    ]
    refused(open_source, cases)
    kinds, example = plain("file_name", 37)
    sets = {"oxford_iiit_pet": "pets", "clevr": "clevr_count", "smallnorb": "smallnorb_azimuth"}
    for name in sets:
        small(name, kinds, 30, lambda i: {"image": grey(i), **example(i)}, "train")
    assert len(open_source("vtab:pets", "train")) == 24
    few = r"'train\[:800\]\+train\[24:224\]'.*with 30 examples"
    cases = [("pets", "train800val200", few), ("pets", "test", "vtab:pets has no split 'test'")]
    for name, task in list(sets.items())[1:]:
        missing = TASKS[task].features[0]
        cases.append((task, "train", f"vtab:{task}: {name}/3.0.0 has no feature '{missing}'"))
    refused(lambda task, split: open_source(f"vtab:{task}", split), cases)


def test_a_damaged_record_is_refused(opened):
    source = opened("kitti_distance", "train")
    record = source.records[4]
    for damaged in (record[:-3], b"", record.replace(b"objects/type", b"objects/typo")):
        broken = dataclasses.replace(source, records=[damaged])
        with pytest.raises(UserError):
            broken[0]


def test_an_example_without_a_label_or_an_image_is_named(small):
    bare = {"image": grey(0), **clevr(0), "objects": []}
    small("clevr", CLEVR, 1, lambda i: bare, "train", "validation")
    for task, label in {"clevr_count": -3, "clevr_distance": 6}.items():
        read = BatchReader(open_source(f"vtab:{task}", "test"), Preprocess((4, 4)))
        message = rf"example 0 \(0.png\) has the label {label}, but there are {CLASSES[task]} class"
        with pytest.raises(UserError, match=message):
            read(np.arange(1), np.arange(1))
    small("dsprites", DSPRITES, 10, lambda i: {"image": b"no image", **dsprites(i)}, "train")
    with pytest.raises(BadImage, match=r"vtab:dsprites_location val, example 0 \(00000\d\): it is"):
        open_source("vtab:dsprites_location", "val")[0]

"""Data sets in Parquet files, as the Hugging Face hub has them: which row has which label."""

import concurrent.futures
import json
import pickle
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made import refused

from vit_jax.data.forms import hub
from vit_jax.data.images import BadImage
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError

CLASSES = {"_type": "ClassLabel", "names": ["dog", "cat", "ox"]}
IMAGE = {"_type": "Image"}
CARD = {
    "dataset_info": {
        "features": [
            {"name": "image", "dtype": "image"},
            {"name": "label", "dtype": {"class_label": {"names": {"0": "dog", "1": "cat"}}}},
        ]
    }
}


def shard(path, numbers, labels, features=None, image="image", label="label", rows=2, **more):
    """Writes rows whose images are the bytes of their numbers, `rows` to a group."""
    images = [{"bytes": b"%d" % n, "path": f"{n}.png"} for n in numbers]
    table = pa.table({image: images, label: labels, **more})
    if features is not None:
        told = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def card(root, value):
    # JSON is YAML.
    root.joinpath("README.md").write_text(f"---\n{json.dumps(value)}\n---\n# Pets\n---\n")


def told(source):
    """[(number, class or classes)], in order."""
    found = []
    for i in range(len(source)):
        example = source[i]
        assert example["file"] == f"{example['image'].decode()}.png"
        label, names = example["label"], source.label_names
        many = isinstance(label, tuple)
        assert many == source.multi_label
        found.append((int(example["image"]), [names[n] for n in label] if many else names[label]))
    return found


@pytest.fixture
def pets(tmp_path):
    features = {"image": IMAGE, "label": CLASSES}
    shard(tmp_path / "data/train-00000-of-00002.parquet", range(5), [0, 1, 2, 0, 1], features)
    shard(tmp_path / "data/train-00001-of-00002.parquet", range(5, 8), [2, 2, 0], features)
    shard(tmp_path / "data/test-00000-of-00001-a1b2.parquet", [8], [2], features)
    return tmp_path


TRAIN = list(enumerate(["dog", "cat", "ox", "dog", "cat", "ox", "ox", "dog"]))


def test_rows_have_their_images_and_labels(pets):
    spec = f"hf-data:{pets}"
    train = open_source(spec, "train")
    assert train.label_names == ("dog", "cat", "ox") and told(train) == TRAIN
    assert told(open_source(spec, "test")) == [(8, "ox")]
    assert hub.hub_splits(str(pets)) == ("test", "train")
    assert [train[i]["image"] for i in (7, 0, 4, 4, 5)] == [b"7", b"0", b"4", b"4", b"5"]
    assert told(pickle.loads(pickle.dumps(train))) == TRAIN and len(pickle.dumps(train)) < 3000
    parts = [told(open_source(spec, f"train[{part}]")) for part in (":50%", "50%:")]
    assert sorted(parts[0] + parts[1]) == TRAIN and all(parts)
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        open_source(spec, "trian")


def test_a_group_is_read_once_for_rows_in_order_and_by_many_threads(pets, monkeypatch):
    reads = []
    read = hub.ParquetRows._read
    monkeypatch.setattr(
        hub.ParquetRows, "_read", lambda self, *place: reads.append(place) or read(self, *place)
    )
    source = open_source(f"hf-data:{pets}", "train")
    assert [source[i]["image"] for i in range(8)] == [b"%d" % i for i in range(8)]
    assert len(reads) == 5
    reads.clear()
    source = open_source(f"hf-data:{pets}", "train")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # of one group, which stays
        assert set(pool.map(lambda i: source[i]["image"], [0] * 16)) == {b"0"}
    assert len(reads) == 1


def test_fingerprints_are_of_the_contents_alone(pets, tmp_path_factory):
    first = open_source(f"hf-data:{pets}", "train").fingerprint
    moved = pets.rename(tmp_path_factory.mktemp("elsewhere") / "b")
    assert open_source(f"hf-data:{moved}", "train").fingerprint == first
    half = open_source(f"hf-data:{moved}", "train[:50%]").fingerprint
    features = {"image": IMAGE, "label": CLASSES}
    shard(moved / "data/train-00001-of-00002.parquet", range(5, 8), [2, 0, 2], features)
    assert len({first, half, open_source(f"hf-data:{moved}", "train").fingerprint}) == 3


LISTS = {"labels": [[1, 0], [], [1]], "features": {"label": {"feature": CLASSES}}}
CASES = [
    ("", {"card": CARD}, ["dog", "cat", "dog"]),
    ("", {"label": "species", "x": [5, 6, 7]}, ["0", "1", "0"]),
    ("", {"labels": ["pug", "ox", "pug"]}, ["pug", "ox", "pug"]),
    ("", {"labels": [10, 9, 10]}, ["10", "9", "10"]),
    ("", LISTS, [["dog", "cat"], [], ["cat"]]),
    ("", {"labels": [["a", "b"], [], ["a"]]}, [["a", "b"], [], ["a"]]),
    (",label=fine", {"label": "coarse", "fine": ["x", "y", "z"]}, ["x", "y", "z"]),
    (",image=image", {"mask": [b"1", b"2", b"3"]}, ["0", "1", "0"]),
]


def test_columns_and_classes(tmp_path):
    for number, (options, fields, expected) in enumerate(CASES):
        fields, here = {"labels": [0, 1, 0], "card": {}, **fields}, tmp_path / f"{number}"
        told_card, labels = fields.pop("card"), fields.pop("labels")
        shard(here / "train/0000.parquet", range(3), labels, **fields)
        card(here, told_card)
        source = open_source(f"hf-data:{here}{options}", "train")
        assert told(source) == list(enumerate(expected)), fields


def test_all_splits_count_the_same_classes(tmp_path):
    shard(tmp_path / "train.parquet", range(3), ["b", "c", "b"])
    shard(tmp_path / "validation.parquet", range(2), ["a", "c"])
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "unlabelled.parquet")
    for split, names in (("train", "bcb"), ("validation", "ac")):
        source = open_source(f"hf-data:{tmp_path}", split)
        assert source.label_names == ("a", "b", "c")
        assert told(source) == list(enumerate(names))


def test_configs_of_folders_and_of_the_card(tmp_path):
    for config, labels in (("small", [0]), ("large", [1])):
        shard(tmp_path / config / "train/0000.parquet", [1], labels)
    with pytest.raises(UserError, match=r"several configs \('large', 'small'\): say which, as in"):
        open_source(f"hf-data:{tmp_path}", "train")
    assert told(open_source(f"hf-data:{tmp_path},config=large", "train")) == [(1, "1")]
    with pytest.raises(UserError, match="no config 'smal'; did you mean 'small'"):
        open_source(f"hf-data:{tmp_path},config=smal", "train")
    files = [{"split": "val", "path": ["small/train/*.parquet", "large/**/*.parquet"]}]
    card(tmp_path, {"configs": [{"config_name": "default", "data_files": files}]})
    assert told(open_source(f"hf-data:{tmp_path}", "val")) == [(1, "0"), (1, "1")]
    card(
        tmp_path, {"configs": [{"data_dir": "small", "data_files": {"dev": "train/0000.parquet"}}]}
    )
    assert told(open_source(f"hf-data:{tmp_path}", "dev")) == [(1, "0")]
    for path, message in (("no/*", "where there is no file"), ("*.md", "which is no Parquet file")):
        card(tmp_path, {"configs": [{"data_files": path}]})
        with pytest.raises(UserError, match=message):
            open_source(f"hf-data:{tmp_path}", "train")


def test_what_is_not_sure_is_refused(tmp_path):
    file, spec = tmp_path / "train.parquet", f"hf-data:{tmp_path}"
    both = dict.fromkeys(("fine_label", "coarse_label"), CLASSES)
    two = dict(label="coarse_label", fine_label=[1], features=both)
    same = {"label": {**CLASSES, "names": ["a", "a"]}}
    cases = [
        (two, "surely the labels .*say label"),
        (dict(label="caption"), "no column is surely the labels .caption."),
        (dict(mask=[b"x"]), "images in columns image, mask: say image=COLUMN"),
        (dict(labels=pa.array([None], pa.int64())), "row 0 has no label in column 'label'"),
        (dict(labels=[-1]), "a label is -1"),
        (dict(labels=[-1], features={"label": CLASSES}), "no labels in split 'train': all are -1"),
        (dict(labels=[3], features={"label": CLASSES}), "a label is 3, but 'label' has 3 classes"),
        (dict(features=same), "two classes one name"),
        (dict(features={"label": CLASSES}, card=CARD), "give column 'label' different class names"),
    ]

    def opened(fields):
        fields = {"labels": [0], "card": {}, **fields}
        card(tmp_path, fields.pop("card"))
        shard(file, [0], fields.pop("labels"), **fields)
        open_source(spec, "train")

    refused(opened, cases)
    card(tmp_path, {})
    pointer = "version https://git-lfs.github.com/spec/v1\n"
    cases = [(pointer, "Git LFS has not fetched"), ("PAR1", "cannot be read")]
    refused(lambda data: (file.write_text(data), open_source(spec, "train")), cases)
    file.unlink()
    with pytest.raises(UserError, match=r"no Parquet files; .*refs/convert/parquet"):
        open_source(spec, "train")
    shard(tmp_path / "1.2.parquet", [0], [0])
    with pytest.raises(UserError, match="does not say which split"):
        open_source(spec, "train")
    (tmp_path / "1.2.parquet").unlink()
    shard(tmp_path / "train-00000-of-00002.parquet", [0], [0], {"label": CLASSES})
    shard(tmp_path / "train-00001-of-00002.parquet", [0], [0])
    with pytest.raises(UserError, match="has other classes in 'label' than"):
        open_source(spec, "train")


def test_an_image_that_is_not_there_is_a_bad_one(tmp_path):
    images = [{"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": None}]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "train.parquet")
    source = open_source(f"hf-data:{tmp_path}", "train")
    with pytest.raises(BadImage, match=r"row 0 of the split .a.png. has no bytes"):
        source[0]
    assert source[1]["image"] == b"x" and source[1]["file"] == "1"


def test_large_groups_are_said(pets, caplog, monkeypatch):
    open_source(f"hf-data:{pets}", "train")
    assert caplog.text == ""
    monkeypatch.setattr(hub, "_LARGE", 10)
    open_source(f"hf-data:{pets}", "train")
    assert "`vit-jax prepare` makes shards" in caplog.text


def test_the_hub_is_asked_for_parquet_files_alone(pets, monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repo, **options):
        asked.append((repo, options))
        if repo.endswith("gone"):
            raise OSError("no such\nthing")
        return str(pets)

    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    source = open_source("hf-data:some/pets@refs/convert/parquet", "train")
    assert told(source) == TRAIN
    files = ["*.parquet", "README.md"]
    expected = dict(repo_type="dataset", revision="refs/convert/parquet", allow_patterns=files)
    assert asked == [("some/pets", expected)]
    with pytest.raises(
        UserError, match=r"could not be fetched \(OSError: no such thing\).*by hand"
    ):
        open_source("hf-data:some/gone", "train")
    with pytest.raises(UserError, match="there is no such folder, and OWNER/NAME was expected"):
        open_source("hf-data:/nowhere/x", "train")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"\[hub\]'\. To do without it"):
        open_source("hf-data:some/pets", "train")

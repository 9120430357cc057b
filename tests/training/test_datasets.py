"""The data of runs: by which classes it is measured, from where, and that it is held out."""

import dataclasses
import json
import logging
import os

import jax
import numpy as np
import pytest
from conftest import DIGITS, TINY

from vit_jax.checkpoints.opened import open_model
from vit_jax.data.config import Split
from vit_jax.data.forms.arrays import digits
from vit_jax.data.images import encode
from vit_jax.errors import UserError
from vit_jax.training.config import EvalConfig, unpack
from vit_jax.training.config_file import load_config
from vit_jax.training.datasets import DataSets
from vit_jax.training.evaluation.evaluate import evaluate_own, evaluate_run
from vit_jax.training.evaluation.evaluation import Evaluation
from vit_jax.training.evaluation.evaluators import Knn, Probe
from vit_jax.training.loop import train
from vit_jax.training.sharding import MeshConfig, make_mesh


def write_digits(root, names="0123456789", splits=("train", "val")):
    """The digits as folders of files, whose classes are called by `names`."""
    for split in splits:
        source = digits("", split)
        for i in range(0, len(source), 1 if split == "val" else 5):
            example = source[i]
            folder = root / split / names[example["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:04d}.png").write_bytes(encode(example["image"]))


def config_of(*flags):
    return load_config(DIGITS, [*TINY, *flags])


def evaluated(model, root, *flags):
    flags = ("--config.data.test=None", f"--config.data.val.source=folder:{root}", *flags)
    return evaluate_run(model, config_of(*flags))["val/accuracy"]


def test_a_model_is_measured_by_classes_under_whatever_names(tiny_run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vit_jax")
    workdir, results = tiny_run
    expected = results["val/accuracy"]
    write_digits(tmp_path / "same", splits=["val"])
    assert evaluated(workdir, tmp_path / "same") == expected
    write_digits(tmp_path / "padded", [f"{i:03d}" for i in range(10)], ["val"])
    assert evaluated(workdir, tmp_path / "padded") == expected
    assert "data.val: 10 classes of 10, by number: 000 is 0" in caplog.text
    # In an order that is not the model's: "a digit 9" sorts first.
    words = ["nine", "eight", "one", "zero", "two", "three", "four", "five", "six", "seven"]
    write_digits(tmp_path / "words", words, ["val"])
    with pytest.raises(UserError, match=r"data\.val \(folder:.*, val\): has 10 .* no 'eight'"):
        evaluated(workdir, tmp_path / "words")
    rows = "".join(f"{name}\t{number}\n" for number, name in enumerate(words))
    (file := tmp_path / "which.tsv").write_text(rows)
    assert evaluated(workdir, tmp_path / "words", f"--config.data.val.classes={file}") == expected
    wrong = evaluated(workdir, tmp_path / "words", "--config.data.val.classes=in_order")
    assert wrong != expected and "in order, as asked for" in caplog.text


def test_a_head_is_kept_by_names_or_not_at_all(tiny_run, tmp_path, untrained):
    write_digits(tmp_path / "padded", [f"{9 - i:03d}" for i in range(10)])
    flags = [f"--config.init_from={tiny_run[0]}", "--config.model.head=keep"]
    flags += [f"--config.data.{s}.source=folder:{tmp_path}/padded" for s in ("train", "val")]
    flags += ["--config.data.test=None", "--config.total_steps=1"]
    rows = "".join(f"{9 - number:03d};{number}\n" for number in range(10))
    (tmp_path / "which.csv").write_text(rows)
    told = [f"--config.data.{s}.classes={tmp_path}/which.csv" for s in ("train", "val")]
    flags.append("--config.optim.warmup=0")
    results = train(config_of(*flags, *told), tmp_path / "kept")
    assert results["val/accuracy"] == pytest.approx(tiny_run[1]["val/accuracy"], abs=0.01)
    kept = json.loads((tmp_path / "kept" / "data.json").read_text())
    assert kept["data.val"]["mapping"]["009"] == "0" and kept["data.val"]["examples"] == 179
    for folder in (tmp_path / "padded").iterdir():
        (folder / "009").rename(folder / "dodo")
    with pytest.raises(UserError, match=r"\(model\.head=keep\): has 10 .* no '000'"):
        train(config_of(*flags), tmp_path / "refused")


def test_a_run_finds_its_data_from_anywhere(tmp_path, monkeypatch, caplog, untrained):
    (home := tmp_path / "home").mkdir()
    (away := tmp_path / "away").mkdir()
    write_digits(home / "pictures")
    monkeypatch.chdir(home)
    sources = [f"--config.data.{s}.source=folder:pictures" for s in ("train", "val")]
    config = config_of(*sources, "--config.data.test=None", "--config.total_steps=2")
    first = train(config, tmp_path / "run")

    def again(*flags):
        return evaluate_own(tmp_path / "run", flags)["val/accuracy"]

    monkeypatch.chdir(away)
    assert train(config, tmp_path / "run") == first
    assert again() == first["val/accuracy"]

    # The same data at another place, by its name: the run goes on, and remembers it.
    (home / "pictures").rename(away / "moved")
    with pytest.raises(UserError, match=rf"data\.train: folder:{home}/pictures"):
        train(config, tmp_path / "run")
    assert again("--config.data.val.source=folder:moved") == first["val/accuracy"]
    with pytest.raises(UserError, match=r"optim\.lr.*: name --model and --config"):
        again("--config.optim.lr=1")
    moved = config_of(
        *(flag.replace("pictures", "moved") for flag in sources),
        *("--config.data.test=None", "--config.total_steps=2"),
    )
    assert train(moved, tmp_path / "run") == first
    monkeypatch.chdir(tmp_path)
    assert again() == first["val/accuracy"]

    # Other data is no other place of the same.
    val = away / "moved" / "val" / "3"
    (val / os.listdir(val)[0]).unlink()
    monkeypatch.chdir(away)
    with pytest.raises(UserError, match=r"data\.val: folder:.*moved is not the data of this run"):
        train(moved, tmp_path / "run")
    assert again() != first["val/accuracy"]
    assert "moved changed since the run began" in caplog.text


def test_home_is_where_a_tilde_says(tmp_path, monkeypatch):
    write_digits(tmp_path, splits=["val"])
    monkeypatch.setenv("HOME", str(tmp_path))
    val = dataclasses.replace(config_of().data.val, source="folder:~")
    assert len(DataSets().open("data.val", val)) == 179


def test_what_is_measured_is_not_what_is_trained_on(tiny_run, tmp_path, untrained):
    flags = ["--config.data.val.split=train", "--config.total_steps=1"]
    with pytest.raises(UserError, match=r"data\.train and data\.val"):
        train(config_of(*flags), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    train(config_of(*flags, "--config.data.same_images=True"), tmp_path / "run")
    probe = {"type": "probe", "l2": (1e-3, 1e-2)}
    for part, split in {"train": "train", "val": "val", "test": "val"}.items():
        probe[part] = {"source": "digits", "split": split}
    evaluators = EvalConfig(evaluators={"linear": unpack(Probe, probe)})
    config = dataclasses.replace(config_of(), eval=evaluators)
    with pytest.raises(UserError, match=r"linear\.val and eval\.evaluators\.linear\.test"):
        evaluate_run(tiny_run[0], config)


def folders(root, classes):
    """Noise of one image a class, in folders of these names, as a split."""
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        pixels = np.random.default_rng([i, *root.name.encode()]).integers(0, 256, (8, 8, 1))
        (root / name / "1.png").write_bytes(encode(pixels.astype(np.uint8)))
    return Split(f"folder:{root}", "all")


@pytest.mark.parametrize("objective", ["softmax", "masked_colour"])
def test_an_evaluator_has_the_classes_of_its_own_train_split(
    tiny_run, tmp_path, monkeypatch, objective
):
    """One test split, of which classes are missing, under two training splits."""
    test = folders(tmp_path / "test", "bd")
    own = {
        "some": Knn(train=folders(tmp_path / "some", "abcd"), test=test),
        "more": Knn(train=folders(tmp_path / "more", "0abcd"), test=test),
    }
    card = dataclasses.replace(open_model(tiny_run[0]).card, objective=objective)
    data = dataclasses.replace(config_of().data, val=None, test=None)
    changes = dict(objective=objective, data=data, eval=EvalConfig(evaluators=own))
    config = dataclasses.replace(config_of("--config.augment=None"), **changes)
    evaluation = Evaluation(config, card, make_mesh(MeshConfig(), jax.devices()[:1]))

    def run(params, name, split, *, dense):
        source = evaluation._reads[name, split].source
        labels = np.array([source[i]["label"] for i in range(len(source))], np.int32)
        return np.eye(5, dtype=np.float32)[labels], labels

    monkeypatch.setattr(evaluation, "_run", run)
    labels = {n: evaluation.features(None, n, test).y.tolist() for n in own}
    assert labels == {"some": [1, 3], "more": [2, 4]}
    for found in evaluation.measure(list(own), None):
        assert set(found.values()) == {1.0}, found


def test_a_run_keeps_what_an_evaluators_classes_are_called(tmp_path):
    """In their order too, and those without an image; of another source it kept nothing."""
    split = folders(tmp_path / "pictures", "ab")
    (file := tmp_path / "classes.csv").write_text("b,bird\nz,zebra\na,ant\n")
    split = dataclasses.replace(split, classes=str(file))
    other = dataclasses.replace(folders(tmp_path / "others", "ez"), classes=str(file))

    def of(data, split):
        source = data.open("eval.evaluators.e.train", split)
        labels = data.labels("eval.evaluators.e.train", split)
        source = data.with_labels("eval.evaluators.e.train", split, labels)
        return labels, [source[i]["label"] for i in range(len(source))]

    began = DataSets()
    assert of(began, split) == (("bird", "zebra", "ant"), [2, 0])
    began.write(tmp_path)
    file.write_text("e,emu\nz,zebra\n")
    again = DataSets.of_run(tmp_path)
    assert of(again, split) == (("bird", "zebra", "ant"), [2, 0])
    again.write(tmp_path)
    assert of(DataSets.of_run(tmp_path), split) == (("bird", "zebra", "ant"), [2, 0])
    assert of(again, other) == (("emu", "zebra"), [0, 1])


def test_evaluators_that_a_run_did_not_have_are_looked_at(tmp_path):
    split = folders(tmp_path / "pictures", "ab")
    names, began = ("eval.evaluators.e.train", "eval.evaluators.e.test"), DataSets()
    began.open("data.val", split)
    began.write(tmp_path)
    again = DataSets.of_run(tmp_path)
    for name in names:
        again.open(name, split)
    with pytest.raises(UserError, match="are the same 2 images"):
        again.check(names, config_of())
    again.write(tmp_path)
    again = DataSets.of_run(tmp_path)
    for name in names:
        again.open(name, split)
    again.check(names, config_of())


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"data.val": 3}', '{"v": {"place": 7}}'])
def test_a_damaged_file_is_said(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=r"data\.json is damaged \(.*\): remove it, and"):
        DataSets.of_run(tmp_path)

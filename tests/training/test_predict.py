"""Prediction in batches on eight devices, against the model called on each image."""

import csv
import dataclasses
import itertools
import json
import re
from argparse import Namespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from conftest import benchmarks
from flax import nnx
from jax.sharding import Mesh
from tiny_models import as_float32, random_params

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.convert import shapes_of
from vit_jax.data.images import encode
from vit_jax.errors import UserError
from vit_jax.models.config import ResNetConfig, ViTConfig
from vit_jax.models.create import structure
from vit_jax.training.evaluation import predict_output
from vit_jax.training.evaluation.predict import Predictor, best, default_batch_size

CONFIG = ViTConfig(
    image_size=8, patch_size=4, width=8, depth=1, mlp_dim=8, num_heads=1, num_classes=5
)
NOISE = np.random.default_rng(0).integers(0, 256, (21, 9, 7, 3), np.uint8)


def saved(config, path):
    model = nnx.merge(structure(config)[0], as_float32(random_params(config)))
    vit_jax.save(model, path, format="vit_jax")
    return vit_jax.load(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("model") / "vit.safetensors"


@pytest.fixture(scope="module")
def vit(path):
    return saved(CONFIG, path)


def reference(vit, images):
    """Logits of each image, as it is prepared alone."""
    prepared = np.stack([vit.preprocess(image) for image in images])
    return np.asarray(jax.jit(vit.model)(prepared), np.float64)


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def check(vit, answers, probabilities, topk=5):
    answers = list(answers)
    assert len(answers) == len(probabilities)
    for answer, wanted in zip(answers, probabilities, strict=True):
        order = np.argsort(-wanted)[:topk]
        assert [name for name, _ in answer] == [vit.labels[i] for i in order]
        np.testing.assert_allclose([p for _, p in answer], wanted[order], rtol=2e-5)


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of all batches that run, and the steps that run them."""
    seen, forward = [], Predictor.forward

    def watched(self, batch):
        seen.append((batch["image"].shape, batch["image"].dtype, self._step))
        return forward(self, batch)

    monkeypatch.setattr(Predictor, "forward", watched)
    return seen


@pytest.mark.parametrize("n, batch", [(1, 8), (8, 8), (9, 16), (21, 16)])
def test_batches_answer_as_the_model_does_image_by_image(vit, shapes, n, batch):
    found = list(vit_jax.predict(vit, NOISE[:n], topk=3, batch_size=16))
    check(vit, found, softmax(reference(vit, NOISE[:n])), topk=3)
    # Of one size, spread over eight devices, and compiled once for all calls.
    assert [shape[0] for shape, _, _ in shapes] == [batch] * -(-n // batch)
    assert len({dtype for _, dtype, _ in shapes}) == 1 and shapes[0][1] == np.uint8
    assert len({id(step) for _, _, step in shapes}) == 1
    compiled = shapes[0][2]._cache_size()
    list(vit_jax.predict(vit, NOISE[:n], topk=3, batch_size=16))
    assert shapes[-1][2] is shapes[0][2] and shapes[0][2]._cache_size() == compiled <= 2


def test_as_many_devices_as_there_are_share_a_batch(vit):
    predictor = Predictor(vit, batch_size=3)
    assert predictor.batch_size == 8 == len(jax.local_devices())
    assert predictor.mesh.shape["data"] == 8


def test_recipes_that_resize_in_float_and_sigmoid(vit, shapes):
    how = dataclasses.replace(vit.preprocess, resize_dtype="float32", mean=0.4, std=0.2)
    other = dataclasses.replace(vit, preprocess=how, objective="sigmoid")
    found = vit_jax.predict(other, list(NOISE), topk=20)
    check(vit, found, 1 / (1 + np.exp(-reference(other, NOISE))))
    assert shapes[0][1] == np.float32


def test_the_best_classes_and_of_equal_ones_the_first():
    logits = jnp.float32([[0, 3, 3, -1], [1, 1, 1, 1]])
    index, probability = best(logits, 3, False)
    np.testing.assert_array_equal(index, [[1, 2, 0], [0, 1, 2]])
    np.testing.assert_allclose(probability[0], softmax(np.asarray(logits[0]))[[1, 2, 0]], rtol=1e-6)
    np.testing.assert_allclose(best(logits, 1, True)[1][0], 1 / (1 + np.exp(-3.0)), rtol=1e-6)


def test_images_without_an_end_are_read_a_few_batches_ahead(vit, shapes):
    taken = []
    images = (taken.append(i) or NOISE[i % 21] for i in itertools.count())
    answers = vit_jax.predict(vit, images, batch_size=8)
    assert not taken
    found = [next(answers)]
    # The devices have two batches to go on with, and the threads two more.
    assert (len(taken), len(shapes)) == (5 * 8, 3)
    found.extend(itertools.islice(answers, 8))
    check(vit, found, softmax(reference(vit, NOISE[:9])))
    assert (len(taken), len(shapes)) == (6 * 8, 4)


def test_what_is_wrong_with_the_iterable_is_raised_after_the_images_before(vit):
    def images():
        yield from NOISE[:10]
        raise ConnectionError("the camera is off")

    found = []
    with pytest.raises(ConnectionError, match="the camera is off"):
        found.extend(vit_jax.predict(vit, images(), batch_size=8))
    check(vit, found, softmax(reference(vit, NOISE[:10])))


def test_an_image_that_cannot_be_read_stops_or_is_skipped(vit, caplog):
    images = [*NOISE[:3], b"no image", NOISE[3]]
    answers, found = vit_jax.predict(vit, iter(images), batch_size=8), []
    with pytest.raises(UserError, match="it is of no known format"):
        found.extend(answers)
    check(vit, found, softmax(reference(vit, NOISE[:3])))  # those before it are answered
    found = list(vit_jax.predict(vit, images, on_corrupt="skip"))
    assert found.pop(3) is None and "skipped image 4: it is of no known" in caplog.text
    check(vit, found, softmax(reference(vit, NOISE[:4])))
    for options, why in (
        ({"on_corrupt": "ignore"}, "on_corrupt is 'ignore'"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of 1 or more"),
        ({"topk": 0}, "topk is 0"),
    ):
        with pytest.raises(UserError, match=why):  # before it is iterated over
            vit_jax.predict(vit, images, **options)
    with pytest.raises(UserError, match="or an iterable of images, found int"):
        vit_jax.predict(vit, 7)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, pool="gap", num_classes=0, image_size=(8, 16)),
        dataclasses.replace(CONFIG, representation_size=6),
        ResNetConfig(image_size=8, resnet=(1,), resnet_width=32, num_classes=3),
    ],
    ids=["headless", "representation", "resnet"],
)
def test_features_are_what_the_model_captures(config, tmp_path):
    loaded = saved(config, tmp_path / "model.safetensors")
    assert shapes_of(loaded.config) == shapes_of(config)
    prepared = np.stack([loaded.preprocess(image) for image in NOISE[:9]])
    capture = ("encoded", "pre_logits")
    captured = jax.jit(lambda x: loaded.model(x, capture=capture))(prepared)[1]
    found = np.stack(list(vit_jax.features(loaded, NOISE[:9], batch_size=8)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, captured["pre_logits"], rtol=1e-3, atol=1e-4)
    found = np.stack(list(vit_jax.features(loaded, NOISE[:9], dense=True)))
    grid = config.grid if isinstance(config, ViTConfig) else (2, 2)
    prefix = getattr(config, "num_prefix_tokens", 0)
    tokens = np.asarray(captured["encoded"])[:, prefix:]
    wanted = tokens.reshape(9, *grid, -1)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    if not config.num_classes:
        with pytest.raises(UserError, match=r"no head to name classes by.* --features"):
            vit_jax.predict(loaded, NOISE[0])


def test_the_size_of_a_batch_suits_the_devices():
    def mesh(platform, n):
        devices = np.array([Mock(platform=platform)] * n)
        return Mock(spec=Mesh, devices=devices, shape={"data": n, "fsdp": 1})

    for platform, n, size, wanted in (
        ("gpu", 1, 224, 128),
        ("gpu", 4, 224, 512),
        ("gpu", 1, 384, 32),
        ("gpu", 1, 2048, 1),
        ("tpu", 2, 32, 2048),
        ("cpu", 1, 224, 32),
        ("cpu", 8, 224, 32),
        ("cpu", 8, 2048, 8),
        ("cpu", 1, 8, 256),
    ):
        assert default_batch_size((size, size), mesh(platform, n)) == wanted, (platform, size)


# The command. ------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of 20 images, one that is damaged, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets" / "dogs").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "pets" / ("dogs" if i > 9 else "") / f"{i:02}.png").write_bytes(
            encode(NOISE[i])
        )
    (tmp_path / "pets" / "05a.jpg").write_bytes(b"\xff\xd8\xff damaged")
    (tmp_path / "pets" / "README.md").touch()
    return tmp_path


NAMES = [f"pets/{'dogs/' if i > 9 else ''}{i:02}.png" for i in range(20)]
NAMES.insert(6, "pets/05a.jpg")


def predict(path, *argv):
    return main(["predict", f"--model={path}", "--batch-size=8", *argv])


def test_the_forms_of_the_output_hold_the_same(vit, path, here, capsys, caplog):
    caplog.set_level("INFO", "vit_jax")
    assert predict(path, "pets", "--topk=2") == 3
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["file"] for row in rows] == NAMES
    assert re.search(r"1 of 21 images cannot be read\n  pets/05a\.jpg: ", caplog.text)
    assert "1 files passed over: 1 empty\n  pets/README.md: empty" in caplog.text
    assert list(rows[6]) == ["file", "error"]
    good = [row for row in rows if "labels" in row]
    check(vit, [row["labels"] for row in good], softmax(reference(vit, NOISE[:20])), topk=2)

    for ending in ("jsonl", "csv", "parquet"):
        assert predict(path, "pets", "--topk=2", f"--out=out/x.{ending}") == 3
        assert f"out/x.{ending}: 21 images in " in caplog.text
    assert capsys.readouterr().out == ""
    assert re.search(r"x\.csv: 21 images in \d+\.\d s\n", caplog.text)  # of 3 batches, no rate
    assert (here / "out" / "x.jsonl").read_text() == printed
    columns = ["file", "label1", "probability1", "label2", "probability2", "error"]
    with open("out/x.csv", newline="") as file:
        table = csv.reader(file)
        assert next(table) == columns
        from_csv = list(table)
    from_parquet = pyarrow.parquet.read_table("out/x.parquet")
    assert from_parquet.column_names == columns
    for row, cells, other in zip(rows, from_csv, from_parquet.to_pylist(), strict=True):
        flat = [cell for pair in row.get("labels", [("", "")] * 2) for cell in pair]
        assert cells == [row["file"], *map(str, flat), row.get("error", "")]
        assert list(other.values()) == [
            *(row["file"], *(None if cell == "" else cell for cell in flat)),
            row.get("error"),
        ]


def test_features_go_to_files(vit, path, here):
    wanted = np.stack(list(vit_jax.features(vit, NOISE[:20])))
    assert predict(path, "pets", "--features", "--out=x.npy") == 3
    found = np.load("x.npy", mmap_mode="r")
    rows = [json.loads(line) for line in (here / "x.files.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == NAMES and "error" in rows[6]
    assert found.dtype == np.float32 and np.isnan(found[6]).all()
    np.testing.assert_allclose(np.delete(found, 6, 0), wanted, rtol=1e-5)
    assert predict(path, "pets", "--features", "--out=x.parquet") == 3
    table = pyarrow.parquet.read_table("x.parquet").to_pylist()
    assert [row["file"] for row in table] == NAMES
    assert table[6]["features"] is None and table[6]["error"] == rows[6]["error"]
    both = zip(table, found, strict=True)
    assert all(row["features"] == x.tolist() for row, x in both if row["features"])
    assert predict(path, *NAMES[:2], "--dense", "--out=d.npy") == 0
    dense = list(vit_jax.features(vit, [encode(image) for image in NOISE[:2]], dense=True))
    np.testing.assert_allclose(np.load("d.npy"), dense, rtol=1e-5)
    assert dense[0].shape == (2, 2, 8)
    for flags in (["--dense", "--features"], ["--features", "--topk=2"]):
        assert predict(path, NAMES[0], *flags, "--out=no.npy") == 2


def test_a_file_is_whole_or_as_it_was(path, here, monkeypatch, caplog):
    (here / "x.csv").write_text("before")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(predict_output.csv.DictWriter, "writerow", fail)
        assert predict(path, "pets", "--out=x.csv") == 2
    assert (here / "x.csv").read_text() == "before"
    assert predict("/nowhere", "pets", "--out=y.npy", "--features") == 2
    assert sorted(each.name for each in here.iterdir()) == ["pets", "x.csv"]
    with monkeypatch.context() as patch:
        patch.setattr(predict_output.shutil, "disk_usage", lambda path: Mock(free=600))
        assert predict(path, "pets", "--out=y.npy", "--features") == 2  # 21 x 8 of float32
    assert sorted(each.name for each in here.iterdir()) == ["pets", "x.csv"]
    (here / "pets" / "README.md").rename(here / "pets" / ".hidden")
    (here / "pets" / "05a.jpg").unlink()
    assert predict(path, "pets", "--out=x.csv") == 0  # hidden files are nobody's images
    assert "passed over" not in caplog.text


def test_sources_and_folders_from_python(vit, here, caplog):
    found = vit_jax.find_images("pets/dogs", "pets/00.png")
    assert found.names == [*NAMES[11:], NAMES[0]]
    wanted = softmax(reference(vit, [*NOISE[10:20], NOISE[0]]))
    check(vit, vit_jax.predict(vit, found), wanted)
    check(vit, vit.predict(found), wanted)
    with pytest.raises(UserError, match=r"pets/05a\.jpg: "):
        list(vit_jax.predict(vit, vit_jax.find_images("pets")))


def test_the_benchmark_measures_all_turns(tmp_path):
    (benchmark,) = benchmarks("predict")
    args = Namespace(variant="mu/16", image_size=32, dtype="float32", batch_size=8, batches=2)
    args.rounds = 1
    (found,) = benchmark.measure(args, str(tmp_path))
    assert list(found) == ["forward", "reader", "predict"]
    assert all(value > 0 for pair in found.values() for value in pair)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 16

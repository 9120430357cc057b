"""Evaluators: right numbers, every example once on any number of devices, mistakes in one sentence.

What the probes compute is compared with other libraries in test_probes.py; here they are run on a
model, in training and after it.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import DIGITS, TINY, fails, write_config
from tiny_models import as_float32, random_params
from tiny_models import run as run_model

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.fit import place
from vit_jax.checkpoints.opened import open_model
from vit_jax.data.config import Split
from vit_jax.data.sources import open_source
from vit_jax.models.create import structure
from vit_jax.training.config import from_json, to_json
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation import evaluators
from vit_jax.training.evaluation.evaluate import evaluate_run
from vit_jax.training.evaluation.evaluation import Evaluation
from vit_jax.training.evaluation.probes import Features, few_shot, knn, linear_probe
from vit_jax.training.evaluation.steps import make_eval_step
from vit_jax.training.loop import train
from vit_jax.training.metrics import read_metrics
from vit_jax.training.sharding import MeshConfig, make_mesh, placement

CONFIG = """
import importlib.util
from ml_collections import ConfigDict

def get_config():
    spec = importlib.util.spec_from_file_location("digits", {digits!r})
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    config = digits.get_config()
    splits = {{name: dict(source="digits", split=name) for name in ("train", "val", "test")}}
    train, val, test = splits["train"], splits["val"], splits["test"]
    config.eval.evaluators = ConfigDict(dict(
        again=dict(type="classification", test=test),
        shots=dict(type="fewshot", train=train, test=test, shots=(1, 5), seeds=2),
        near=dict(type="knn", train=val, test=test, neighbours=(1, 20), every=0),
        probe=dict(type="probe", train=val, val=val, test=test, l2=(1e-2, 1.0), every=16),
    ))
    config.data.same_images = True
    return config
"""
NAMES = ("again", "shots", "near", "probe")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG.format(digits=DIGITS))
    return str(path)


@pytest.fixture(scope="module")
def run(config_file, tmp_path_factory):
    """A run folder with evaluators, and what training returned."""
    workdir = tmp_path_factory.mktemp("run") / "evaluated"
    return workdir, train(load_config(config_file, TINY), workdir)


@pytest.fixture(scope="module")
def features(run):
    """The features of every example, through the public model."""
    vit = vit_jax.load(run[0])
    sources = {split: open_source("digits", split) for split in ("train", "val", "test")}
    images = [vit.preprocess(example["image"]) for s in sources.values() for example in s]
    model = jax.jit(lambda images: vit.model(images, capture="pre_logits"))
    x, found = np.asarray(model(np.stack(images))[1]["pre_logits"]), {}
    for split, source in sources.items():
        labels = np.array([example["label"] for example in source], np.int32)
        found[split], x = Features(x[: len(labels)], labels), x[len(labels) :]
    return found


@pytest.mark.parametrize("devices, batch_size", [(1, 50), (8, 7)])
def test_features_of_every_example_in_order(run, features, devices, batch_size):
    workdir, _ = run
    config = load_config(
        DIGITS, [f"--config.eval.batch_size={batch_size}", "--config.data.same_images=True"]
    )
    split = Split("digits", "test")
    probe = evaluators.Knn(train=split, test=split)
    config = dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, evaluators={"p": probe})
    )
    opened, mesh = open_model(workdir), make_mesh(MeshConfig(), jax.devices()[:devices])
    params, _ = place(opened, opened.card.config, shardings=lambda x: placement(x, mesh))
    evaluation = Evaluation(config, opened.card, mesh)
    found = evaluation.features(params, "p", split)
    np.testing.assert_array_equal(found.y, features["test"].y)
    np.testing.assert_allclose(found.x, features["test"].x, atol=2e-6)
    assert len(evaluation.label_names("p", split)) == 10


def test_the_same_in_training_in_evaluate_and_written_out(run, features, capsys):
    workdir, result = run
    assert main(["evaluate", f"--workdir={workdir}", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = {name: value for name, value in result.items() if name.split("/")[0] in NAMES}
    assert {name.split("/")[0] for name in found} == set(NAMES)
    for name, value in found.items():
        # Batches differ by eight devices: the last bits do, and a tie may fall otherwise.
        assert printed[name] == pytest.approx(value, abs=2 / 359), name
    train_, val, test = features["train"], features["val"], features["test"]
    expected = {
        "shots": few_shot(train_, test, 10, shots=(1, 5), seeds=2, l2=1024.0),
        "near": knn(val, test, 10, neighbours=(1, 20), temperature=0.07),
        "probe": linear_probe(val, val, test, 10, l2=(1e-2, 1.0), steps=1000),
        "again": {"accuracy": result["test/accuracy"], "top5": result["test/top5"]},
    }
    for name, values in expected.items():
        for key, value in values.items():
            assert found[f"{name}/{key}"] == pytest.approx(value, abs=2 / 359), key
    assert found["again/loss"] == pytest.approx(result["test/loss"], rel=1e-6)


def test_each_evaluator_at_its_own_steps(run):
    steps = {name: [] for name in NAMES}
    for line in read_metrics(run[0]):
        for name in {key.split("/")[0] for key in line} & set(NAMES):
            steps[name].append(line["step"])
    assert steps == {"again": [8, 16, 24], "shots": [8, 16, 24], "near": [24], "probe": [16, 24]}


def test_the_config_comes_back_from_json(config_file):
    config = load_config(config_file, TINY)
    assert set(config.eval.evaluators) == set(NAMES)
    assert from_json(to_json(config)) == config


def test_flags_reach_evaluators_and_take_them_back(config_file):
    flags = ["--config.eval.evaluators.shots.shots=(3,)", "--config.eval.evaluators.near=None"]
    flags += ["--config.eval.evaluators.near.temperature=0.1", "--config.data.val=None"]
    config = load_config(config_file, [flags[0], flags[1], flags[3]])
    assert config.eval.evaluators["shots"].shots == (3,)
    assert "near" not in config.eval.evaluators and config.data.val is None
    assert load_config(config_file, [flags[2]]).eval.evaluators["near"].temperature == 0.1


SPLIT = "dict(source='digits', split='train')"
SECTION = f"dict(type='knn', train={SPLIT}, test={SPLIT}" + "{})"
MISTAKES = {
    "type": ("near=dict(type='knm')", "near.type is 'knm'; did you mean 'knn'"),
    "no type": ("near=dict(test=1)", "near.type is None; known: classification, fewshot"),
    "no test": (
        "near=dict(type='knn', train=dict(source='digits', split='val'))",
        r"eval\.evaluators\.near\.test is not set",
    ),
    "key": (
        f"near={SECTION.format(', neighbors=(3,)')}",
        "near.neighbors; did you mean 'eval.evaluators.near.neighbours'",
    ),
    "name": (f"val={SECTION.format('')}", r"eval\.evaluators\.val: expected a name"),
    "every": (f"near={SECTION.format(', every=-1')}", "every is -1"),
    "augmented": (
        f"near={SECTION.format('')[:-2]}, flip=True))",
        "flip of digits is for data.train alone",
    ),
    "source": (f"near={SECTION.format('').replace('digits', 'digit', 1)}", "no source 'digit'"),
    "endless": (
        "near=dict(type='classification', test=dict(source='fractals:classes=10', split='train'))",
        r"near\.source fractals:classes=10 is endless",
    ),
    "k": (f"near={SECTION.format(', neighbours=(0,)')}", "0"),
    "one l2": (
        f"near={SECTION.format('').replace('knn', 'probe')}",
        "a probe chooses its l2 on a val split",
    ),
    "task": ("near=dict(type='vtab', tasks=('pet',))", "no task 'pet'; did you mean 'pets'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, tmp_path, capsys, run):
    section, message = MISTAKES[name]
    values = f"batch_size=64, eval=dict(evaluators=dict({section}))"
    path = write_config(tmp_path / "config.py", values)
    error = fails(capsys, "evaluate", f"--model={run[0]}", f"--config={path}")
    assert pytest.RaisesExc(ValueError, match=message).matches(ValueError(error)), error


def test_a_config_that_only_evaluates(tmp_path, capsys, run):
    values = "batch_size=64, data=dict(test=dict(source='digits', split='test'))"
    path = write_config(tmp_path / "config.py", values)
    assert main(["evaluate", f"--model={run[0]}", f"--config={path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test/accuracy"] == run[1]["test/accuracy"]
    error = fails(capsys, "train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert "data.train is not set: this config can evaluate" in error
    nothing = ["evaluate", f"--model={run[0]}", f"--config={path}", "--config.data.test=None"]
    assert "nothing to evaluate" in fails(capsys, *nothing)


def test_a_model_without_a_head_has_features(run, tmp_path):
    """Such as a checkpoint of self-supervised pre-training."""
    vit = vit_jax.load(run[0], num_classes=0)
    vit_jax.save(vit, tmp_path / "headless.safetensors", format="vit_jax")
    split = Split("digits", "test")
    flags = [f"--config.data.{key}" for key in ("val=None", "test=None", "same_images=True")]
    config = load_config(DIGITS, flags)
    fields = {"near": evaluators.Knn(train=split, test=split, neighbours=(1,))}
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, evaluators=fields))
    assert evaluate_run(tmp_path / "headless.safetensors", config) == {"near/knn1": 1.0}


def test_several_labels_an_image_against_numpy():
    """ImageNet-ReaL: right where any label is hit, images without labels left out."""
    config = vit_jax.ViTConfig(
        image_size=(4, 4), patch_size=(4, 4), in_channels=1, width=8, depth=1, mlp_dim=8,
        num_heads=1, num_classes=7,
    )  # fmt: skip
    rng, graphdef, params = np.random.default_rng(0), structure(config)[0], random_params(config)
    images = rng.integers(0, 256, (64, 4, 4, 1), np.uint8)
    labels = (rng.random((64, 7)) < 0.25).astype(np.float32)
    mask = rng.random(64) < 0.8
    preprocess = vit_jax.data.transforms.Preprocess((4, 4), 1)
    step = jax.jit(make_eval_step(graphdef, preprocess, num_classes=7, objective="sigmoid"))
    found = step(as_float32(params), {"image": images, "label": labels, "mask": mask})

    logits = np.asarray(run_model(config, params, preprocess.normalise(images)), np.float64)
    assert (labels.sum(axis=1) == 0).any() and (labels.sum(axis=1) > 1).any()
    count = accuracy = top5 = loss = 0
    for row, right, real in zip(logits, labels, mask, strict=True):
        if not real or not right.any():
            continue
        ranking = np.argsort(-row)
        count += 1
        accuracy += right[ranking[0]] > 0
        # Of the classes before the likeliest right one, how many are wrong: all of them.
        top5 += right[ranking[:5]].any()
        loss += np.sum(np.logaddexp(0, row) - right * row)
    assert (int(found["count"]), int(found["accuracy"]), int(found["top5"])) == (
        count, accuracy, top5,
    )  # fmt: skip
    assert float(found["loss"]) == pytest.approx(loss, rel=1e-5)


def test_vtab_gives_tasks_groups_and_means(monkeypatch):
    """Nineteen tasks: 7 natural, 4 specialized, 8 structured (arXiv 1910.04867, Table 1)."""
    asked = []

    class Model:
        def classify(self, split):
            raise AssertionError("a probe reads features")

        def features(self, split):
            asked.append((split.source, split.split))
            return split

        def dense(self, split):
            raise AssertionError("and no more of them")

        def num_classes(self, split):
            return 3

    def probe(train, val, test, classes, *, l2, steps):
        assert (train.split, val.split, test.split) == ("train800", "val200", "test")
        return {"accuracy": len(train.source) / 100, "l2": 1.0}

    monkeypatch.setattr(evaluators, "linear_probe", probe)
    found = evaluators.Vtab().measure(Model())
    groups = {"natural": 7, "specialized": 4, "structured": 8}
    tasks = {name: value for name, value in found.items() if name not in (*groups, "mean")}
    assert len(tasks) == 19 and len(asked) == 3 * 19
    assert found["mean"] == pytest.approx(np.mean(list(tasks.values())))
    for group, size in groups.items():
        names = [name for name, task in evaluators.TASKS.items() if task.group == group]
        assert len(names) == size
        assert found[group] == pytest.approx(np.mean([tasks[name] for name in names]))
    some = evaluators.Vtab(tasks=("pets", "dtd")).measure(Model())
    assert set(some) == {"pets", "dtd"}

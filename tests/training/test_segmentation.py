"""Segmentation of patches: scores by hand and by scikit-learn, heads that must and cannot learn."""

import dataclasses
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DIGITS, fails, write_config
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.fit import place
from vit_jax.checkpoints.opened import open_model
from vit_jax.data.config import Split
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation import evaluators
from vit_jax.training.evaluation import segmentation as module
from vit_jax.training.evaluation.evaluation import Evaluation
from vit_jax.training.evaluation.segmentation import (
    Dense,
    count,
    fit_head,
    predict,
    scores,
    segmentation,
    stretched,
)
from vit_jax.training.sharding import MeshConfig, make_mesh, placement

CONFIG = DIGITS.replace("digits.py", "evaluate.py")
SMALL = "scenes:digits,size=16,examples=24"


def test_scores_counted_by_hand():
    truth = np.array([[0, 0, 1], [1, 2, 2]], np.int32)
    found = np.array([[0, 1, 1], [0, 2, 1]], np.int32)
    # Class 0: 1 of 3 pixels; 1: 1 of 4; 2: 1 of 2; 3 is nowhere. Foreground: 3 of 5.
    expected = {"miou": (1 / 3 + 1 / 4 + 1 / 2) / 3, "accuracy": 0.5, "foreground_iou": 3 / 5}
    assert scores(count(truth, found, 4)) == pytest.approx(expected)
    assert scores(count(truth * 0, found * 0, 3)) == {"miou": 1.0, "accuracy": 1.0}
    # What is of no class, -1, does not count.
    some = np.where(np.array([[0, 1, 0], [0, 0, 1]]), -1, truth)
    expected = {"miou": (1 / 2 + 1 / 2 + 1) / 3, "accuracy": 3 / 4, "foreground_iou": 2 / 3}
    assert scores(count(some, found, 4)) == pytest.approx(expected)
    # Found alone, a class counts, as 0.
    assert scores(count(truth * 0, found, 3))["miou"] == pytest.approx(2 / 6 / 3)


def test_scores_against_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, (9, 7, 5)).astype(np.int32)
    found = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 6, truth.shape))
    confusion = count(truth, found.astype(np.int32), 8)  # of which two are nowhere
    assert confusion.dtype == np.int64 and confusion.sum() == truth.size
    found = found.ravel()
    assert scores(confusion) == pytest.approx(
        {
            "miou": jaccard_score(truth.ravel(), found, average="macro"),
            "accuracy": np.mean(truth.ravel() == found),
            "foreground_iou": jaccard_score(truth.ravel() > 0, found > 0),
        }
    )
    # More pixels than int32 counts.
    assert scores(confusion * 2**40)["miou"] == pytest.approx(scores(confusion)["miou"])


@pytest.mark.parametrize("size", [(8, 12), (7, 11), (4, 3)])
def test_logits_are_stretched_as_opencv_does(size):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(5, 2))
    found = stretched(jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32), size)
    logits = (x @ weights).astype(np.float32)
    expected = [cv2.resize(one, size[::-1], interpolation=cv2.INTER_LINEAR) for one in logits]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def encoded(seed, n=6, noise=False):
    """Masks of blocks of 2 x 2 pixels, one a patch, and features that are their class, turned.

    Between patches more than half of a pixel is its own patch's: the mask can be had exactly.
    """
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 3, (n, 4, 4)).astype(np.int32)
    turn = np.random.default_rng(99).normal(size=(3, 6))
    x = rng.normal(size=(n, 4, 4, 6)) if noise else np.eye(3)[blocks] @ turn * np.geomspace(1, 9, 6)
    return Dense(x.astype(np.float32), np.kron(blocks, np.ones((1, 2, 2), np.int32)))


def test_features_that_say_the_mask_and_noise(monkeypatch):
    sets = encoded(0), encoded(1), encoded(2)
    good = segmentation(*sets, 3, l2=(1e-4, 10.0), steps=40)
    assert good["miou"] > 0.99 and good["accuracy"] > 0.99 and good["l2"] == 1e-4
    whole = fit_head(sets[0], 3, l2=0.1, steps=40)
    monkeypatch.setattr(module, "BLOCK", 5 * 8 * 8 * 3)  # blocks of five examples, some padded
    blocks = fit_head(sets[0], 3, l2=0.1, steps=40)
    np.testing.assert_allclose(blocks.weights, whole.weights, atol=1e-3)
    found = predict(blocks, sets[1].x, (8, 8))
    np.testing.assert_array_equal(found, predict(whole, sets[1].x, (8, 8)))
    noise = [encoded(seed, noise=True) for seed in range(2)]
    bad = segmentation(noise[0], None, noise[1], 3, l2=(1e-2,), steps=20)
    assert bad["miou"] < 0.4 and bad["accuracy"] < 0.5


def test_a_head_of_single_pixels_is_scikit_learns():
    """Where a patch is a pixel, it is logistic regression, of the pixels that have a class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (10, 4, 4)).astype(np.int32)
    x = np.eye(3)[labels] @ rng.normal(size=(3, 5)) + rng.normal(size=(10, 4, 4, 5))
    labels[rng.random(labels.shape) < 0.1] = -1
    train, l2, known = Dense(x.astype(np.float32), labels), 1e-2, labels.ravel() >= 0
    head = fit_head(train, 3, l2=l2, steps=300)
    flat = train.x.reshape(-1, 5).astype(np.float64)
    flat = (flat - flat.mean(0)) / (flat.std(0) + 1e-5)
    theirs = LogisticRegression(C=1 / (l2 * known.sum()), tol=1e-10, max_iter=2000)
    theirs.fit(flat[known], labels.ravel()[known])
    ours = np.asarray(head.weights)
    centred = ours[:-1] - ours[:-1].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred, theirs.coef_.T, atol=2e-3)
    assert np.mean(predict(head, train.x, (4, 4)).ravel() == theirs.predict(flat)) > 0.99
    again = fit_head(train, 3, l2=l2, steps=300)
    np.testing.assert_array_equal(ours, again.weights)


def test_wrong_sets_are_one_sentence():
    good, empty = (
        encoded(0),
        Dense(np.zeros((0, 4, 4, 6), np.float32), np.zeros((0, 12, 12), np.int32)),
    )
    wide = Dense(np.zeros((2, 4, 4, 7), np.float32), good.y[:2])
    infinite = Dense(good.x + np.inf, good.y)
    for test, classes, message in (
        (empty, 3, "there are no test examples"),
        (wide, 3, "test features are 7 wide; expected 6"),
        (infinite, 3, "test examples are not finite"),
        (Dense(good.x, 0 * good.y - 1), 3, "no label of the test examples is of any class"),
        (good, 2, "labels of training examples are 0 to 2; expected 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            segmentation(good, None, test, classes, l2=(1.0,), steps=1)
    with pytest.raises(UserError, match="2 values of l2 and no validation"):
        segmentation(good, None, good, 3, l2=(1.0, 2.0), steps=1)
    with pytest.raises(UserError, match="steps is"):
        segmentation(good, None, good, 3, l2=(1.0,), steps=0)


def evaluation(run, devices, batch_size):
    config = load_config(DIGITS, [f"--config.eval.batch_size={batch_size}"])
    splits = {name: Split(SMALL, name) for name in ("train", "val", "test")}
    fields = {"s": evaluators.Segmentation(**splits)}
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, evaluators=fields))
    opened, mesh = open_model(run), make_mesh(MeshConfig(), jax.devices()[:devices])
    params, _ = place(opened, opened.card.config, shardings=lambda x: placement(x, mesh))
    return Evaluation(config, opened.card, mesh), params, splits


def test_evaluate_segments(tiny_run, capsys):
    """Features of every example once and in order; the command, and the same from its parts."""
    command = ["evaluate", f"--model={tiny_run[0]}", f"--config={CONFIG}:scenes,{SMALL}", "--json"]
    flags = ["--config.eval.evaluators.scenes.steps=5", "--config.eval.evaluators.scenes.l2=(0.1,)"]
    assert main([*command, *flags]) == 0
    printed = json.loads(capsys.readouterr().out)

    run, params, splits = evaluation(tiny_run[0], 1, 10)  # the last batch is padded
    sets = {name: run.dense(params, "s", split) for name, split in splits.items()}
    vit, source = vit_jax.load(tiny_run[0]), open_source(SMALL, "test")
    images = np.stack([vit.preprocess(example["image"]) for example in source])
    # Two programs, which round otherwise.
    np.testing.assert_allclose(
        sets["test"].x, jax.jit(vit.model.dense)(images), rtol=1e-6, atol=5e-6
    )
    assert sets["test"].x.shape == (24, 4, 4, 16)
    halved = [example["label"][1::2, 1::2] for example in source]
    np.testing.assert_array_equal(sets["test"].y, halved)
    assert len(run.label_names("s", splits["test"])) == 11

    expected = segmentation(**sets, num_classes=11, l2=(0.1,), steps=5)
    for name, value in expected.items():
        assert printed[f"scenes/{name}"] == pytest.approx(value, abs=5e-3), name
    assert 0 < printed["scenes/miou"] < printed["scenes/accuracy"] < 1


def test_dense_features_on_devices_that_do_not_divide_the_examples(tiny_run):
    one, params, splits = evaluation(tiny_run[0], 1, 10)
    expected = one.dense(params, "s", splits["val"])
    eight, params, _ = evaluation(tiny_run[0], 8, 7)
    found = eight.dense(params, "s", splits["val"])
    np.testing.assert_allclose(found.x, expected.x, atol=2e-6)
    np.testing.assert_array_equal(found.y, expected.y)


SCENES = "dict(source='scenes:digits,examples=4', split='{}'{})"
DIGIT = "dict(source='digits', split='train')"
MISTAKES = {
    "labels": (
        f"type='segmentation', train={DIGIT}, test={DIGIT}",
        "evaluators.s.train: digits has no masks, which segmentation needs: name a source",
    ),
    "masks": (
        f"type='knn', train={SCENES.format('train', '')}, test={SCENES.format('test', '')}",
        "s.train: scenes:digits,examples=4 has masks for labels, which objective segmentation and ",
    ),
    "l2": (
        f"type='segmentation', train={SCENES.format('train', '')}, l2=(0.1, 1.0), "
        f"test={SCENES.format('test', '')}",
        "segmentation chooses its l2 on a val split",
    ),
    "flip": (
        f"type='segmentation', train={SCENES.format('train', ', flip=True')}, "
        f"test={SCENES.format('test', '')}",
        "flip of scenes:digits,examples=4 is for data.train alone",
    ),
    "classes": (
        f"type='segmentation', train={SCENES.format('train', '')}, "
        f"test={SCENES.format('test', '').replace('digits', 'fractals')}",
        "the model knows no 'fractal0'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, tmp_path, capsys, tiny_run):
    section, message = MISTAKES[name]
    values = f"batch_size=8, eval=dict(evaluators=dict(s=dict({section})))"
    path = write_config(tmp_path / "config.py", values)
    assert message in fails(capsys, "evaluate", f"--model={tiny_run[0]}", f"--config={path}")


def test_no_classifier_learns_or_is_tested_on_masks(tmp_path, capsys):
    for key in ("train", "val"):
        flags = [f"--config.data.{key}.source=scenes:digits", "--config.data.train.affine=None"]
        command = ["train", f"--config={DIGITS}", f"--workdir={tmp_path / key}"]
        error = fails(capsys, *command, *flags)
        assert "masks" in error and "objective segmentation" in error.replace("=", " ")
    prepare = ["prepare", "scenes:digits,examples=3", tmp_path / "dst", "--split=train"]
    assert "has masks for labels, which records do not hold" in fails(capsys, *prepare)
    error = fails(capsys, "evaluate", "--model=x", f"--config={CONFIG}:scenes,knn")
    assert "'knn' is no source of masks; expected such as scenes:fractals" in error

"""Classes of unequal size: balanced streams, weighted and focal losses, beside NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DIGITS, TINY

from vit_jax.data.classes import with_labels
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.order import Balance
from vit_jax.errors import UserError
from vit_jax.training.config_file import load_config
from vit_jax.training.objectives import class_weights, sigmoid, softmax
from vit_jax.training.plan import TrainingData, make_plan

SIZES = (60, 25, 9, 6)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4, dtype=np.int32), SIZES))


def source_of(labels=LABELS, names=("a", "b", "c", "d")):
    return ArraySource(np.zeros((len(labels), 2, 2, 1), np.uint8), labels, names)


def stream(balance, seed, first, last):
    return Balance.of(source_of(), balance)(seed, np.arange(first, last))


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_an_epoch_has_each_class_as_often_as_asked(balance):
    share = np.array(SIZES, float) ** (1 - balance)
    wanted = share / share.sum() * 100
    for epoch in range(3):
        drawn = stream(balance, 7, 100 * epoch, 100 * (epoch + 1))
        counts = np.bincount(LABELS[drawn], minlength=4)
        assert counts.sum() == 100 and np.abs(counts - wanted).max() < 1


def test_each_class_takes_its_examples_in_turn():
    drawn = stream(1.0, 3, 0, 1200)  # twelve epochs, 300 draws of each class
    for label, size in enumerate(SIZES):
        # An epoch's draws are shuffled, but over all of them no example is behind another.
        times = np.bincount(drawn, minlength=100)[np.flatnonzero(LABELS == label)]
        assert times.sum() == 300 and times.max() - times.min() <= (300 % size > 0)
    first, second = drawn[:100], drawn[100:200]
    assert not np.array_equal(LABELS[first], LABELS[second])
    # Any part of the stream is the same without what is before it, and other seeds have others.
    np.testing.assert_array_equal(stream(1.0, 3, 150, 170), drawn[150:170])
    assert not np.array_equal(stream(1.0, 4, 0, 100), first)


def test_classes_are_the_models():
    source = with_labels(source_of(names=("d", "c", "b", "a")), ("a", "b", "c", "d", "more"))
    order = Balance.of(source, 1.0)
    assert order.quotas.tolist() == [25] * 4
    drawn = order(0, np.arange(100))
    assert np.bincount([source[int(i)]["label"] for i in drawn]).tolist() == [25] * 4


def test_class_weights():
    names = ("a", "b", "c", "d")
    inverse = class_weights("inverse", names, SIZES)
    np.testing.assert_allclose(inverse, [100 / (4 * n) for n in SIZES])
    np.testing.assert_allclose(np.average(inverse, weights=SIZES), 1.0)
    # Cui et al. 2019: (1 - beta) / (1 - beta ** n), normalised to sum to the number of classes.
    effective = np.array([(1 - 0.99) / (1 - 0.99**n) for n in SIZES])
    np.testing.assert_allclose(
        class_weights("effective:0.99", names, SIZES), effective / effective.sum() * 4
    )
    assert class_weights("1,2,0.5,0", names, None) == (1.0, 2.0, 0.5, 0.0)
    assert class_weights("inverse", (*names, "more"), (*SIZES, 0))[4] == 1.0


WEIGHTS = np.array([0.5, 2.0, 1.0], np.float32)


@pytest.mark.parametrize("focal", [0.0, 2.0])
def test_weighted_and_focal_losses(focal):
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(0, 3, (5, 3)), jnp.float32)
    targets = jnp.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.3, 0.7, 0], [0, 0, 0]], jnp.float32)
    x = np.asarray(logits, np.float64)
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    expected = -(targets * WEIGHTS * (1 - p) ** focal * np.log(p)).sum(axis=1)
    np.testing.assert_allclose(softmax(logits, targets, WEIGHTS, focal), expected, rtol=1e-5)
    p = 1 / (1 + np.exp(-x))
    each = targets * (1 - p) ** focal * np.log(p) + (1 - targets) * p**focal * np.log(1 - p)
    expected = -(WEIGHTS * each).sum(axis=1)
    np.testing.assert_allclose(sigmoid(logits, targets, WEIGHTS, focal), expected, rtol=1e-5)


def test_what_is_certain_has_a_gradient():
    logits, targets = jnp.array([[80.0, -80.0]]), jnp.array([[1.0, 0.0]])
    for loss in (softmax, sigmoid):
        found = jax.grad(lambda x: loss(x, targets, None, 0.5).sum())(logits)  # noqa: B023
        assert np.isfinite(found).all()


def plan_of(*flags):
    config = load_config(DIGITS, [*TINY, *(f"--config.{flag}" for flag in flags)])
    return make_plan(config, TrainingData.of(source_of()))


def test_a_plan_has_the_weights_of_its_data():
    assert plan_of().class_weights is None
    expected = class_weights("inverse", "abcd", SIZES)
    assert plan_of("augment.class_weights=inverse").class_weights == expected


def test_images_without_a_label_are_of_no_class():
    class Unlabelled(list):
        label_names, fingerprint, labels = ("a", "b"), "", np.array([-1, 0, 1, 1], np.int32)

    assert TrainingData.of(Unlabelled([{}] * 4)).counts == (1, 2)


@pytest.mark.parametrize(
    "flag, said",
    [
        ("augment.class_weights=inverted", "expected inverse, effective, effective:BETA"),
        ("augment.class_weights=effective:1", "expected inverse, effective, effective:BETA"),
        ("augment.class_weights=1,2", "has 2 numbers, but there are 4 classes: a, b, c, d"),
        ("augment.focal=-1", "augment.focal is -1.0; it must be at least 0"),
        ("data.train.balance=2", "data.train.balance is 2.0; it must be in [0, 1]"),
        ("data.val.balance=0.5", "balance is for data.train"),
    ],
)
def test_what_is_wrong_is_said(flag, said):
    with pytest.raises(UserError, match=re.escape(said)):
        plan_of(flag).class_weights  # noqa: B018


def test_a_class_without_images_or_labels_that_are_not_known():
    with pytest.raises(UserError, match="class 'e' has no images"):
        Balance.of(source_of(names=(*"abcde",)), 1.0)
    with pytest.raises(UserError, match="needs the class of every image beforehand"):
        class_weights("inverse", ("a", "b"), None)

"""Probes of features against NumPy written out and against scikit-learn."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from vit_jax.errors import UserError
from vit_jax.training.evaluation import probes
from vit_jax.training.evaluation.probes import Features, few_shot, fit, knn, linear_probe


def clusters(n, d, k, *, seed=0, spread=1.0, wrong=0.0):
    """n examples around k centres, features of different scales and means, some labels wrong."""
    centres = np.random.default_rng(99).normal(size=(k, d))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    x = (centres[y] + spread * rng.normal(size=(n, d))) * np.geomspace(0.5, 2, d) + np.arange(d) / d
    y = np.where(rng.random(n) < wrong, rng.integers(0, k, n), y)
    return Features(x.astype(np.float32), y.astype(np.int32))


def joined(a, b):
    return Features(np.concatenate([a.x, b.x]), np.concatenate([a.y, b.y]))


def shuffled(features, seed=0):
    order = np.random.default_rng(seed).permutation(len(features.y))
    return Features(features.x[order], features.y[order])


# Few shots


def drawn(y, num_classes, shots, seed):
    """The indices of the examples that a seed draws, class by class."""
    rng, chosen = np.random.default_rng(seed), []
    for label in range(num_classes):
        own = [i for i in range(len(y)) if y[i] == label]
        chosen += rng.permutation(np.array(own, int)).tolist()[:shots]
    return chosen


def augmented(x, by, constant):
    x, by = x.astype(np.float64), by.astype(np.float64)
    x = (x - by.mean(0)) / (by.std(0) + 1e-5)
    return np.concatenate([x, np.full((len(x), 1), constant)], axis=1)


@pytest.mark.parametrize("d", [6, 160], ids=["more examples", "more features"])
def test_few_shot_is_the_ridge_of_the_normal_equations(d):
    k, l2 = 7, 1024.0
    train, test = clusters(150, d, k, spread=2), clusters(400, d, k, seed=1, spread=2)
    expected = {}
    for shots in (2, 5, 25):  # there are 15 to 30 of each class
        accuracies = []
        for seed in range(3):
            chosen = drawn(train.y, k, shots, seed)
            x = augmented(train.x[chosen], train.x[chosen], 100)
            assert (len(chosen) > d + 1) == (d == 6)
            y = np.where(train.y[chosen][:, None] == np.arange(k), 1.0, -1.0)
            weights = np.linalg.inv(x.T @ x + l2 * np.eye(d + 1)) @ (x.T @ y)
            ridge = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(x, y)
            np.testing.assert_allclose(probes.ridge(x, y, l2), weights, rtol=1e-7, atol=1e-12)
            np.testing.assert_allclose(probes.ridge(x, y, l2), ridge.coef_.T, rtol=1e-7, atol=1e-12)
            scores = augmented(test.x, train.x[chosen], 100) @ weights
            accuracies.append(np.mean([scores[i].argmax() == test.y[i] for i in range(400)]))
        expected[f"{shots}shot"] = np.mean(accuracies)
        expected[f"{shots}shot_std"] = np.sqrt(
            sum((a - np.mean(accuracies)) ** 2 for a in accuracies) / 2
        )
    found = few_shot(train, test, k, shots=(2, 5, 25), seeds=3, l2=l2)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found["5shot"] > found["2shot"] > 1.5 / k and found["2shot_std"] > 0


def test_few_shot_draws_the_first_of_a_permutation_of_each_class(monkeypatch):
    train = Features(np.zeros((60, 2), np.float32), np.arange(60, dtype=np.int32) % 5)
    train.x[:, 0] = np.arange(60)
    seen, scale = [], probes.standard
    monkeypatch.setattr(probes, "standard", lambda x: seen.append(x[:, 0].tolist()) or scale(x))
    found = few_shot(train, train, 5, shots=[3, 1, 1000], seeds=2, l2=1.0)
    assert seen == [drawn(train.y, 5, shots, seed) for seed in (0, 1) for shots in (3, 1, 1000)]
    assert set(seen[1]) < set(seen[0]) and sorted(seen[2]) == list(range(60))
    assert list(found) == ["3shot", "1shot", "1000shot", "3shot_std", "1shot_std", "1000shot_std"]


def test_few_shot_takes_classes_with_few_examples_or_none():
    x = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 3]]
    train = Features(x, np.array([0, 0, 0, 1, 3], np.int32))
    test = Features(x[[0, 3, 4]], np.array([0, 1, 3], np.int32))
    assert few_shot(train, test, 6, shots=(2,), seeds=1, l2=1.0) == {"2shot": 1.0}


def test_few_shot_with_too_little_ridge_is_refused():
    one = clusters(40, 1, 2)
    same = Features(one.x * np.linspace(0.1, 1.7, 10, dtype=np.float32), one.y)
    with pytest.raises(UserError, match=r"l2 is 1e-30, too little .* expected more"):
        few_shot(same, same, 2, shots=(20,), seeds=1, l2=1e-30)


# Nearest neighbours


def nearest(train, x, num_classes, k, temperature):
    """The classes that the k nearest of `train` elect, one pair of vectors after another."""

    def cosine(a, b):
        a, b = a.astype(np.float64), b.astype(np.float64)
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b) or 1.0)

    elected = []
    for query in x:
        similar = [cosine(query, one) for one in train.x]
        order = sorted(range(len(similar)), key=lambda i: (-similar[i], i))[:k]
        votes = [0.0] * num_classes
        for i in order:
            votes[train.y[i]] += np.exp(similar[i] / temperature)
        elected.append(votes.index(max(votes)))
    return np.array(elected, np.int32)


NEIGHBOURS = (1, 2, 10, 41, 500)


@pytest.mark.parametrize(
    "blocks", [(7, 13), (1, 50), (4096, 16384)], ids=lambda blocks: "x".join(map(str, blocks))
)
def test_knn_is_that_of_a_double_loop_whatever_the_blocks(blocks, monkeypatch):
    monkeypatch.setattr(probes, "TEST_BLOCK", blocks[0])
    monkeypatch.setattr(probes, "TRAIN_BLOCK", blocks[1])
    train, test = clusters(97, 5, 4, spread=0.8), clusters(23, 5, 4, seed=1, spread=0.8)
    found = knn(train, test, 4, neighbours=NEIGHBOURS, temperature=0.2)
    for k in NEIGHBOURS:
        elected = nearest(train, test.x, 4, k, 0.2)
        # 23 examples, each of which counts once
        assert found[f"knn{k}"] == np.mean(elected == test.y)
        checked = knn(train, Features(test.x, elected), 4, neighbours=(k, 500), temperature=0.2)
        assert checked[f"knn{k}"] == 1.0
    assert len(set(found.values())) > 1


def test_knn_is_that_of_scikit_learn():
    train, test = clusters(200, 12, 6, spread=3), clusters(150, 12, 6, seed=1, spread=3)
    for k in (1, 8, 30):
        theirs = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda away: np.exp((1 - away) / 0.07)
        ).fit(train.x.astype(np.float64), train.y)
        elected = theirs.predict(test.x.astype(np.float64)).astype(np.int32)
        found = knn(train, Features(test.x, elected), 6, neighbours=(k, 30), temperature=0.07)
        assert found[f"knn{k}"] == 1.0


def test_of_equally_near_ones_the_earlier_and_the_lower_class_win(monkeypatch):
    monkeypatch.setattr(probes, "TRAIN_BLOCK", 3)
    axes = np.eye(4, dtype=np.float32)
    # Twice each axis, in different blocks, and far away enough of the others to be of no weight.
    train = Features(axes[[0, 1, 2, 3, 0, 1, 2, 3]], np.array([5, 1, 3, 0, 2, 4, 3, 6], np.int32))

    def elected(k, classes):
        test = Features(2 * axes, np.array(classes, np.int32))
        return knn(train, test, 7, neighbours=(k, 8), temperature=0.01)[f"knn{k}"]

    assert elected(1, [5, 1, 3, 0]) == 1.0  # the earlier
    assert elected(2, [2, 1, 3, 0]) == 1.0  # one vote each: the lower class
    assert elected(8, [2, 1, 3, 0]) == 1.0
    # All of five are equally near to zero, whose nearest are the first.
    zero = Features(np.zeros((1, 4), np.float32), np.array([5], np.int32))
    assert knn(train, zero, 7, neighbours=(1, 8), temperature=0.01)["knn1"] == 1.0


def test_knn_knows_directions_only_of_whatever_size():
    train, test = clusters(50, 5, 3), clusters(30, 5, 3, seed=1)
    expected = knn(train, test, 3, neighbours=(5,), temperature=0.07)
    for factor in (1e-38, 1e-20, 1e36):
        scaled = Features(train.x * np.float32(factor), train.y)
        assert knn(scaled, test, 3, neighbours=(5,), temperature=0.07) == expected
    train.x[3] = 0
    train.x[7] = 0
    test.x[2] = 0
    elected = nearest(train, test.x, 3, 5, 0.07)
    checked = Features(test.x, elected)
    assert knn(train, checked, 3, neighbours=(5,), temperature=0.07) == {"knn5": 1.0}


def test_padding_is_no_neighbour(monkeypatch):
    monkeypatch.setattr(probes, "TRAIN_BLOCK", 4)
    rng = np.random.default_rng(0)
    train = Features(rng.random((6, 3), np.float32), np.ones(6, np.int32))
    test = Features(-rng.random((5, 3), np.float32), np.ones(5, np.int32))
    found = knn(train, test, 2, neighbours=(1, 3, 9), temperature=10.0)
    assert found == {"knn1": 1.0, "knn3": 1.0, "knn9": 1.0}


def test_knn_does_not_depend_on_the_order_of_training_examples():
    train, test = clusters(97, 5, 4, spread=0.8), clusters(23, 5, 4, seed=1, spread=0.8)
    found, other = (
        knn(features, test, 4, neighbours=NEIGHBOURS, temperature=0.2)
        for features in (train, shuffled(train))
    )
    assert found == other


def test_small_temperatures_ask_the_nearest_alone():
    train, test = clusters(60, 4, 5, spread=2), clusters(40, 4, 5, seed=1, spread=2)
    found = knn(train, test, 5, neighbours=(1, 60), temperature=1e-5)
    assert found["knn1"] == found["knn60"]
    # Far from all: exp(similarity / temperature) is 0 in float32 for each of them.
    away = Features(-np.abs(test.x), test.y)
    found = knn(Features(np.abs(train.x), train.y), away, 5, neighbours=(1, 60), temperature=1e-4)
    assert found["knn1"] == found["knn60"]


def test_knn_compiles_once(monkeypatch):
    monkeypatch.setattr(probes, "TEST_BLOCK", 8)
    monkeypatch.setattr(probes, "TRAIN_BLOCK", 16)
    probes._nearer.clear_cache(), probes._elect.clear_cache()
    knn(clusters(41, 3, 2), clusters(19, 3, 2), 2, neighbours=(1, 5), temperature=0.1)
    assert probes._nearer._cache_size() == probes._elect._cache_size() == 1


# The linear probe


def objective(x, y, weights, l2):
    """The loss in float64."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    logits = x @ weights
    highest = logits.max(axis=1)
    rest = np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    losses = highest + rest - logits[np.arange(len(y)), y]
    return losses.mean() + l2 / 2 * np.square(weights[:-1]).sum()


def logistic(x, y, l2):
    """scikit-learn's weights, the bias last, for features with a constant 1 at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs = LogisticRegression(C=1 / (l2 * len(y)), tol=1e-10, max_iter=10000)
        theirs.fit(np.asarray(x[:, :-1], np.float64), y)
    return np.concatenate([theirs.coef_.T, theirs.intercept_[None]])


def ours(x, y, l2):
    return np.asarray(fit(x, y, jnp.zeros((31, 4), jnp.float32), l2, 1000))


# Of two shapes, which the tests below have too: compiling is what takes time here.
PROBLEMS = {
    "noisy": clusters(120, 30, 4, spread=3, wrong=0.2),
    "separable": clusters(120, 30, 4, spread=0.5),
    "more weights than examples": clusters(60, 30, 4, spread=3),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_fit_is_that_of_scikit_learn(name):
    train = PROBLEMS[name]
    x = augmented(train.x, train.x, 1).astype(np.float32)
    unseen = augmented(clusters(500, 30, 4, seed=5, spread=2).x, train.x, 1)
    # With less the noisy problem needs more than 1000 steps.
    for l2 in (1.0, 1e-2, 1e-4 if name == "noisy" else 1e-6):
        found, expected = ours(x, train.y, l2), logistic(x, train.y, l2)
        lowest = objective(x, train.y, expected, l2)
        assert objective(x, train.y, found, l2) == pytest.approx(lowest, rel=1e-6)
        scores = np.sort(unseen @ expected, axis=1)
        lead = scores[:, -1] - scores[:, -2]
        same = (unseen @ found).argmax(1) == (unseen @ expected).argmax(1)
        assert same[lead > np.median(lead) / 100].all() and same.mean() > 0.99


def test_where_the_fit_starts_does_not_matter_and_steps_end_it():
    train = PROBLEMS["separable"]
    x = augmented(train.x, train.x, 1).astype(np.float32)
    start = jnp.asarray(np.random.default_rng(0).normal(size=(31, 4)), jnp.float32)
    losses = [objective(x, train.y, fit(x, train.y, start, 1e-4, n), 1e-4) for n in (1, 20, 1000)]
    lowest = objective(x, train.y, ours(x, train.y, 1e-4), 1e-4)
    assert losses[0] > 1.5 * losses[1] > 1.5 * lowest
    assert losses[2] == pytest.approx(lowest, rel=1e-6)


def reference(train, val, test, l2):
    """The accuracy on test, and the l2 that is best on val, by scikit-learn."""

    def accuracy(fitted, features, value):
        weights = logistic(augmented(fitted.x, fitted.x, 1), fitted.y, value)
        return np.mean((augmented(features.x, fitted.x, 1) @ weights).argmax(1) == features.y)

    chosen = max(l2, key=lambda value: (accuracy(train, val, value), value))
    return {"accuracy": accuracy(joined(train, val), test, chosen), "l2": chosen}


def test_the_probe_chooses_l2_on_val_and_fits_to_all():
    l2 = [1e-3, 10.0, 1e-1, 1.0, 1e-2]
    for seed in (0, 10):
        train = clusters(60, 30, 4, seed=seed, spread=3, wrong=0.1)
        val = clusters(60, 30, 4, seed=seed + 1, spread=3)
        test = clusters(999, 30, 4, seed=seed + 2, spread=3)
        found = linear_probe(train, val, test, 4, l2=l2, steps=1000)
        assert found == pytest.approx(reference(train, val, test, l2), rel=1e-12)
        assert found["l2"] not in (min(l2), max(l2)) and 0.5 < found["accuracy"] < 1
        assert found == linear_probe(train, val, test, 4, l2=l2, steps=1000)
        # All that l2 is chosen by may as well be known before, and in any order.
        l2_alone, both = [found["l2"]], shuffled(joined(train, val))
        assert found == linear_probe(train, val, test, 4, l2=l2_alone, steps=1000)
        assert found == linear_probe(both, None, test, 4, l2=l2_alone, steps=1000)


def test_of_equally_good_l2_the_largest_is_taken():
    train, val = (clusters(60, 30, 4, seed=seed, spread=0.3) for seed in (0, 1))
    found = linear_probe(train, val, val, 4, l2=[1e-5, 1e-2, 1e-4], steps=1000)
    assert found == {"accuracy": 1.0, "l2": 1e-2}


def test_classes_that_are_missing_and_features_that_are_constant():
    many, val, test = (clusters(n, 30, 4, seed=n, spread=0.3) for n in (200, 60, 50))
    rows = np.flatnonzero(many.y != 2)[:60]
    train = Features(many.x[rows], many.y[rows])
    for features in (train, val, test):
        features.x[:, 4] = 1000.1
    found = linear_probe(train, None, test, 4, l2=[1e-6], steps=1000)
    assert found["accuracy"] == np.mean(test.y != 2) < 1
    # Val brings the class that train lacks.
    found = linear_probe(train, val, test, 4, l2=[1e-3, 1e-6], steps=1000)
    assert found["accuracy"] == 1.0


# What is refused

PROBES = {
    "few_shot": lambda train, test, k: few_shot(train, test, k, shots=(1,), seeds=1, l2=1.0),
    "knn": lambda train, test, k: knn(train, test, k, neighbours=(1,), temperature=0.1),
    "linear_probe": lambda train, test, k: linear_probe(train, None, test, k, l2=[1.0], steps=5),
    "val": lambda train, val, k: linear_probe(train, val, train, k, l2=[1.0], steps=5),
}


def changed(x=None, y=None):
    features = clusters(6, 3, 2)
    return Features(features.x if x is None else x, features.y if y is None else y)


NOT_A_NUMBER, INFINITE = np.ones((6, 3), np.float32), np.ones((6, 3), np.float32)
NOT_A_NUMBER[2, 1], INFINITE[5, 0] = np.nan, -np.inf
WRONG = {
    "none": (changed(np.zeros((0, 3), np.float32), np.zeros(0, np.int32)), r"there are no NAME ex"),
    "nan": (changed(NOT_A_NUMBER), r"the features of the NAME examples are not finite"),
    "infinite": (changed(INFINITE), r"the features of the NAME examples are not finite"),
    "too high": (changed(y=np.array([0, 1, 2, 0, 1, 0], np.int32)), r"labels of NAME .* 0 to 2; "),
    "negative": (changed(y=np.array([0, 1, -1, 0, 1, 0], np.int32)), r"labels of NAME .* -1 to 1"),
    "width": (
        changed(np.ones((6, 4), np.float32)),
        r"features are \d wide; expected \d, as in training",
    ),
}


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("wrong", WRONG)
def test_features_that_cannot_be_are_refused(probe, wrong):
    features, message = WRONG[wrong]
    right, other = changed(), "validation" if probe == "val" else "test"
    with pytest.raises(UserError, match=message.replace("NAME", "training")):
        PROBES[probe](features, right, 2)
    with pytest.raises(UserError, match=message.replace("NAME", other)):
        PROBES[probe](right, features, 2)


SHOTS = dict(shots=[1], seeds=1, l2=1.0)
NEAREST = dict(neighbours=[1], temperature=0.1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: few_shot(f, f, 2, **SHOTS | dict(shots=[5, 0])), r"shots is \[5, 0\]; expected"),
        (lambda f: few_shot(f, f, 2, **SHOTS | dict(shots=())), r"shots is \[\]"),
        (lambda f: few_shot(f, f, 2, **SHOTS | dict(seeds=0)), r"seeds is \[0\]"),
        (lambda f: few_shot(f, f, 2, **SHOTS | dict(l2=-1.0)), r"l2 is \[-1\.0\]"),
        (lambda f: few_shot(f, f, 2, **SHOTS | dict(l2=float("nan"))), r"l2 is \[nan\]"),
        (lambda f: knn(f, f, 2, **NEAREST | dict(neighbours=[-3])), r"neighbours is \[-3\]"),
        (lambda f: knn(f, f, 2, **NEAREST | dict(temperature=0.0)), r"temperature is \[0\.0\]"),
        (lambda f: linear_probe(f, f, f, 2, l2=[0.0], steps=1), r"l2 is \[0\.0\]"),
        (lambda f: linear_probe(f, f, f, 2, l2=[], steps=1), r"l2 is \[\]"),
        (lambda f: linear_probe(f, f, f, 2, l2=[1.0], steps=0), r"steps is \[0\]"),
        (
            lambda f: linear_probe(f, None, f, 2, l2=[1.0, 2.0], steps=1),
            r"2 values of l2 and no va",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call(changed())
